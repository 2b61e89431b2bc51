"""A vision-language model from a hub id or a folder, in 16 or 32 bit or quantised, and verified.

source --read_config--> config --family_for--> Family
       --load_processor--> processor, pixel budget set
       --from_pretrained--> weights: safetensors only, none missing, bits as asked for
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from vlmtune.errors import VlmtuneError, plural
from vlmtune.models import quantize
from vlmtune.models.families.registry import FAMILIES, family_for
from vlmtune.models.family import Family
from vlmtune.models.processor import load_processor as load_processor
from vlmtune.models.source import commit_of, explained, quiet_transformers, read_config
from vlmtune.recipe.data_section import ImageSection
from vlmtune.recipe.schema import QuantizationSection

logger = logging.getLogger("vlmtune")


@dataclass
class VLM:
    """A loaded model with what belongs to it; `commit` is the hub commit, None for a folder."""

    model: PreTrainedModel
    processor: ProcessorMixin
    family: Family
    source: str
    commit: str | None


def load_vlm(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization_bit: int = 16,
    quantization: QuantizationSection | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    image: ImageSection | None = None,
    parts: Mapping[Any, Sequence[str]] | None = None,
) -> VLM:
    """Load a model and its processor; in eval mode, on `device` (CUDA where there is one).

    `dtype` is that of every weight that is not quantised. `quantization_bit` 4 or 8 quantises all
    linear layers but `quantization.skip`; what is in effect is read off the model.

    Raises VlmtuneError for whatever the user can put right: the folder, its files, its weights,
    the hub, an unknown family, a skip entry or a pixel budget without effect.
    """
    config = read_config(source, revision=revision, trust_remote_code=trust_remote_code)
    commit = commit_of(config)
    revision = commit or revision  # a branch that moves meanwhile does not mix two versions
    on_meta = None
    if quantization_bit != 16 or parts is not None or config.model_type not in FAMILIES:
        on_meta = build_on_meta(config, trust_remote_code=trust_remote_code)
    family = family_for(config.model_type, parts=parts, model=on_meta)
    processor = load_processor(
        source, revision=revision, trust_remote_code=trust_remote_code, image=image
    )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "dtype": dtype,
    }
    if quantization_bit == 16:
        if place.type != "cpu":
            options["device_map"] = {"": place}
        model = _load_weights(source, options)
    else:
        assert on_meta is not None
        model = _load_quantized(
            source,
            options | {"device_map": {"": place}},
            bit=quantization_bit,
            section=quantization or QuantizationSection(),
            on_meta=on_meta,
            family=family,
        )
    model.eval()
    return VLM(model=model, processor=processor, family=family, source=source, commit=commit)


def build_on_meta(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config without memory for its weights: paths and shapes only."""
    with torch.device("meta"), quiet_transformers():
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)


def _load_quantized(
    source: str,
    options: dict[str, Any],
    *,
    bit: int,
    section: QuantizationSection,
    on_meta: nn.Module,
    family: Family,
) -> PreTrainedModel:
    skip_paths = quantize.expand_skip(on_meta, section.skip, family=family)
    quantize.check_skip_leaves_head(on_meta, skip_paths)
    config = quantize.quantization_config(bit, section, skip_paths=skip_paths)
    model = _load_weights(source, options | {"quantization_config": config})
    quantize.check_quantization(model, bit, section, skip_paths=skip_paths)
    quantize.finish_quantized(model)
    return model


def _load_weights(source: str, options: dict[str, Any]) -> PreTrainedModel:
    """`from_pretrained` with every key accounted for; its own report is checked, not printed."""
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                source,
                use_safetensors=True,
                output_loading_info=True,
                # Off, a wrong shape is an exception without the name of the weight.
                ignore_mismatched_sizes=True,
                **options,
            )
    except SafetensorError as error:
        raise explained(
            error, source, what="a weight file is damaged", do="copy or download it again"
        ) from error
    except (OSError, ValueError) as error:
        raise explained(
            error, source, what="the weights cannot be loaded", do=_advice_on_weights(source)
        ) from error
    model, info = loaded
    _check_keys(info, source)
    return model


def _check_keys(info: Mapping[str, Any], source: str) -> None:
    """Weights that the file lacks would be random numbers; tied ones are not in this list."""
    wrong_shapes = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    for keys, what in (
        (sorted(wrong_shapes), "of another shape than config.json says"),
        (sorted(set(info["missing_keys"]) - set(wrong_shapes)), "missing from the weight files"),
    ):
        if keys:
            raise VlmtuneError(
                f"{plural(len(keys), 'weight')} of {source} {what}",
                got=_shown(keys),
                do="use the weights and the config.json of one and the same model",
            )
    if info["unexpected_keys"]:
        keys = sorted(info["unexpected_keys"])
        logger.warning(
            "%s of %s without a place in the model, not loaded: %s",
            plural(len(keys), "weight"),
            source,
            _shown(keys),
        )


def _advice_on_weights(source: str) -> str:
    if any(Path(source).glob("*.bin")):
        return (
            "only .bin files are there, which can run code when loaded: convert them with "
            "save_pretrained, which writes safetensors"
        )
    return "the model needs model.safetensors, or the shards and model.safetensors.index.json"


def _shown(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
