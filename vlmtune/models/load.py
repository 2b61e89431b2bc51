"""A vision-language model and its processor from a hub id or a folder, checked and verified.

The budget is the image processor's own `size` (areas in pixels), so that `save_pretrained` writes
it and serving shrinks a picture exactly as training did.

source --read_config--> config --family_for--> Family
       --load_processor--> processor, pixel budget set
       --from_pretrained--> weights: safetensors only, none missing, bits as asked for
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_utils import SizeDict
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from vlmtune.errors import VlmtuneError, plural
from vlmtune.models import quantize
from vlmtune.models.families import FAMILIES, Family, family_for
from vlmtune.recipe.data_section import ImageSection
from vlmtune.recipe.schema import QuantizationSection

if TYPE_CHECKING:
    from vlmtune.recipe.data_section import ImageSection


ADAPTER_FILE = "adapter_config.json"


def check_source(source: str) -> None:
    """Raise VlmtuneError where `source` is neither a model folder nor could be a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            if (folder / ADAPTER_FILE).is_file():
                raise VlmtuneError(
                    "the folder is an adapter, and a base model is needed",
                    file=source,
                    do=f"merge it first (`vlmtune merge {source} --output DIR`) and give DIR, or "
                    "give the adapter's own base model",
                )
            raise VlmtuneError(
                "the folder is not a model: it has no config.json",
                file=source,
                do="give the folder that save_pretrained wrote, or a hub id",
            )
        return
    if folder.exists():
        raise VlmtuneError("the model is a file", file=source, expected="a folder or a hub id")
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path or "\\" in source:
        raise VlmtuneError("no such model folder", file=source, expected="a folder or a hub id")


def read_config(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The config of a vision-language model; downloads nothing but small files.

    Raises VlmtuneError where it cannot be read, is no VLM's, is of a quantised checkpoint, or has
    an adapter beside it.
    """
    check_source(source)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                source, revision=revision, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise explained(
            error, source, what="the model's config cannot be loaded", do="check config.json"
        ) from error
    auto_map = getattr(config, "auto_map", None) or {}
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not known and "AutoModelForImageTextToText" not in auto_map:
        raise VlmtuneError(
            f"{source} is not a vision-language model",
            got=f"model_type {config.model_type!r}",
            expected="a model that transformers loads with AutoModelForImageTextToText",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise VlmtuneError(
            f"the weights of {source} are quantised already",
            do="name the unquantised model and set quantization_bit in the recipe",
        )
    _check_without_adapter(source, revision=commit_of(config) or revision)
    return config


def _check_without_adapter(source: str, *, revision: str | None) -> None:
    """transformers attaches an adapter beside a base model in a folder, and loads, for a hub id,
    the base that the adapter names: both without a word."""
    with quiet_transformers():
        found = find_adapter_config_file(source, revision=revision)
    if found is None:
        return
    is_local = Path(source).is_dir()
    fetch = "" if is_local else f"`hf download {source} --local-dir FOLDER`, and in FOLDER "
    raise VlmtuneError(
        f"{'' if is_local else source + ': '}the base model has an adapter beside it, which would "
        "be loaded with it",
        file=source if is_local else None,
        got=ADAPTER_FILE,
        expected="a base model alone",
        do=f"{fetch}move {ADAPTER_FILE} and the adapter's weights to another folder: without them "
        "this is the bare base. To go on from the adapter, merge it first (`vlmtune merge "
        "ADAPTER_FOLDER --output DIR`) and give DIR as the model",
    )


def commit_of(config: PretrainedConfig) -> str | None:
    """The hub commit that a config was read from; None for a folder."""
    return getattr(config, "_commit_hash", None)


def explained(error: Exception, source: str, *, what: str, do: str | None = None) -> VlmtuneError:
    """A transformers error as one that says where it happened and what to do."""
    text = str(error)
    local = Path(source).is_dir()
    if "trust_remote_code" in text:
        do = "set trust_remote_code: true if you trust the authors of this model"
    elif "couldn't connect" in text or "connection error" in text or "offline" in text.lower():
        what += ": the hub cannot be reached and the model is not in the cache"
        do = "check the network and HF_HUB_OFFLINE, or download the model and give its folder"
    elif "gated repo" in text:
        do = "accept the model's terms on its hub page and log in with `hf auth login`"
    elif "not a valid model identifier" in text or "Repo id must" in text:
        do = "check the spelling of the hub id, or give a folder"
    elif "valid git identifier" in text:
        do = "check revision: a branch, a tag or a commit of this model"
    elif "does not recognize this architecture" in text or "model type" in text:
        do = "install a newer transformers, or check config.json"
    return VlmtuneError(
        what if local else f"{source}: {what}",
        file=source if local else None,
        got=first_line(text),
        do=do,
    )


def first_line(text: str, limit: int = 200) -> str:
    """The first line of an upstream message, short enough for ours."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= limit else line[: limit - 1] + "…"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' progress bars and warnings off: what they say is checked and said by us."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    offloading = logging.getLogger("accelerate.big_modeling")
    offloading_level = offloading.level
    offloading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        offloading.setLevel(offloading_level)
        if bars:
            transformers_logging.enable_progress_bar()


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def load_processor(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    image: ImageSection | None = None,
) -> ProcessorMixin:
    """The processor (tokenizer, image processor, chat template) of a hub id or folder.

    Raises VlmtuneError where files are missing or the pixel budget cannot be applied.
    """
    if not Path(source).is_dir():  # an adapter's folder has a processor and no config.json
        check_source(source)
    _check_tokenizer_files(source)
    try:
        with quiet_transformers():
            processor = AutoProcessor.from_pretrained(
                source, revision=revision, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise explained(
            error,
            source,
            what="the processor cannot be loaded",
            do="copy the processor's files (preprocessor_config.json or processor_config.json, "
            "the tokenizer and the chat template) of the original model beside the weights",
        ) from error
    _check_complete(processor, source)
    if image is not None:
        set_pixel_budget(processor, min_pixels=image.min_pixels, max_pixels=image.max_pixels)
    return processor


def pixel_budget(processor: ProcessorMixin) -> tuple[int, int] | None:
    """Smallest and largest area of a picture in pixels, or None where areas are not limited."""
    size = _area_size(processor)
    return None if size is None else (size["shortest_edge"], size["longest_edge"])


def set_pixel_budget(
    processor: ProcessorMixin, *, min_pixels: int | None, max_pixels: int | None
) -> None:
    """Set the areas between which pictures are resized, in pixels; None keeps the processor's own.

    Raises VlmtuneError for a processor that does not size pictures by area, and where the two
    cross.
    """
    if min_pixels is None and max_pixels is None:
        return
    own = pixel_budget(processor)
    if own is None:
        families = sorted({f.name for f in FAMILIES.values() if f.pixel_budget})
        raise VlmtuneError(
            f"image.min_pixels and image.max_pixels have no effect on a "
            f"{type(processor.image_processor).__name__}",
            expected="a processor that sizes pictures by area: " + ", ".join(families),
            do="remove the image section",
        )
    low = own[0] if min_pixels is None else min_pixels
    high = own[1] if max_pixels is None else max_pixels
    if low > high:
        raise VlmtuneError(
            "the pixel budget is empty: min_pixels is above max_pixels",
            got=f"min_pixels {low}, max_pixels {high}"
            + (" (the processor's own)" if max_pixels is None or min_pixels is None else ""),
            do="set both image.min_pixels and image.max_pixels",
        )
    # The names are historical: for these processors the "edges" are areas.
    processor.image_processor.size = SizeDict(shortest_edge=low, longest_edge=high)
    assert pixel_budget(processor) == (low, high), "the image processor ignored its size"


def _area_size(processor: ProcessorMixin) -> dict[str, int] | None:
    """The image processor's `size` as it would be saved, if it means areas."""
    image_processor = processor.image_processor
    # CLIP's and Idefics' sizes have the same keys and mean lengths; only a processor that also
    # knows the (older) pixel arguments takes areas.
    if not {"min_pixels", "max_pixels"} <= set(image_processor.valid_kwargs.__annotations__):
        return None
    size = image_processor.to_dict()["size"]
    return size if {"shortest_edge", "longest_edge"} <= set(size) else None


def _check_tokenizer_files(source: str) -> None:
    # Without them transformers makes an empty tokenizer in silence.
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise VlmtuneError(
            "the folder has no tokenizer",
            file=source,
            expected="one of " + ", ".join(TOKENIZER_FILES),
            do="copy the tokenizer's files of the original model into it",
        )


def _check_complete(processor: object, source: str) -> None:
    for what in ("image_processor", "tokenizer"):
        if not hasattr(processor, what):
            raise VlmtuneError(
                f"no {what.replace('_', ' ')} in the processor of {source}",
                got=f"a {type(processor).__name__}",
                do="use a model for pictures and text, with all its processor files",
            )
    assert isinstance(processor, ProcessorMixin)
    if processor.chat_template is None:
        # Older checkpoints keep it with the tokenizer only.
        processor.chat_template = processor.tokenizer.chat_template
    if processor.chat_template is None:
        raise VlmtuneError(
            f"{source} has no chat template",
            expected="chat_template.jinja, chat_template.json or one in tokenizer_config.json",
            do="use the instruction-tuned model, or copy its chat template beside the tokenizer",
        )


def pad_token_id(processor: ProcessorMixin) -> int:
    """The tokenizer's padding token, or its end token where it has none; padding is masked."""
    tokenizer = processor.tokenizer
    chosen = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return int(chosen)


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
    offload_folder: Path | None = None,
) -> VLM:
    """Load a model and its processor; in eval mode, on `device` (CUDA where there is one).

    `dtype` is that of every weight that is not quantised. `quantization_bit` 4 or 8 quantises all
    linear layers but `quantization.skip`; what is in effect is read off the model. With
    `offload_folder` the weights stay in their files, and those that transformers makes out of
    others are written there.

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
        if offload_folder is not None:
            options |= {"device_map": {"": "disk"}, "offload_folder": str(offload_folder)}
        elif place.type != "cpu":
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
                do="use the weights and the config.json of the same model",
            )
    if info["unexpected_keys"]:
        keys = sorted(info["unexpected_keys"])
        logger.warning(
            "%s of %s not loaded, because the model has no such weights: %s",
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
