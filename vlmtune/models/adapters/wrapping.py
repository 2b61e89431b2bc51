"""What the methods built on PEFT share: wrapping, checking the result, and the adapter folder.

PEFT matches names by suffix and by pattern; full paths go in, and what came out is read off the
wrapped model. Nothing is left to `prepare_model_for_kbit_training` (it casts the 16-bit parts to
float32) or `enable_input_require_grads` (it back-propagates through a frozen vision tower).
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmtune.errors import VlmtuneError
from vlmtune.models.adapters.base import AdapterPlan
from vlmtune.models.load import VLM

ADAPTER = "default"
"""PEFT's name for the only adapter of a model."""

WEIGHTS_FILE = "adapter_model.safetensors"


def exact(path: str) -> str:
    """A key for `rank_pattern` and `alpha_pattern` that matches `path` alone.

    PEFT reads the key as a regular expression for the end of a path: `a.b` would hit `x.a.b`.
    """
    return "^" + re.escape(path)


def plain_number(value: float) -> Any:
    """A whole number as an integer: some readers of `adapter_config.json` expect one."""
    return int(value) if value == int(value) else value


def config_of(model: PeftModel) -> Any:
    """The PEFT config of the model's only adapter."""
    return model.peft_config[ADAPTER]


@contextlib.contextmanager
def expected_warnings() -> Iterator[None]:
    """PEFT's warnings that say nothing to the user, off."""
    with warnings.catch_warnings():
        # PEFT asks an old name of a transformers property.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # A pruned adapter's rank_pattern names tensors where PEFT looks for modules; it works.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys")
        # What does not arrive in the model is an error of ours.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        yield


def wrap(vlm: VLM, config: LoraConfig, plan: AdapterPlan) -> PeftModel:
    """Put `config`'s adapter into `vlm.model` in place; its tensors are float32.

    Everything else is frozen. The base's source and commit are recorded for the adapter's reader.
    """
    config.modules_to_save = list(plan.saved) or None
    config.ensure_weight_tying = plan.tied_head is not None
    with expected_warnings():
        model = get_peft_model(vlm.model, config, adapter_name=ADAPTER)
    config.base_model_name_or_path = vlm.source
    config.revision = vlm.commit
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            # A count, frozen by PEFT and unfrozen where its cast to float32 makes it anew.
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def check_wrapped(model: PeftModel, plan: AdapterPlan, *, ranks: Mapping[str, int]) -> None:
    """Assert that exactly the planned modules are wrapped, and train with the planned ranks."""
    base = model.get_base_model()
    layers = tuner_layers(model)
    assert set(layers) == set(ranks), sorted(set(layers) ^ set(ranks))
    for path, layer in layers.items():
        assert layer.r[ADAPTER] == ranks[path], (path, layer.r[ADAPTER], ranks[path])
    wrappers = {n for n, m in base.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    planned = {*plan.saved, *([plan.tied_head] if plan.tied_head else [])}
    assert wrappers == planned, sorted(wrappers ^ planned)
    for name, parameter in model.named_parameters():
        of_adapter = ".lora_" in name or f".modules_to_save.{ADAPTER}." in name
        assert parameter.requires_grad == (of_adapter and "ranknum" not in name), name
        assert not parameter.requires_grad or parameter.dtype == torch.float32, name


def tuner_layers(model: PeftModel) -> dict[str, Any]:
    """The modules with an adapter (PEFT's layers) by their path in the base model."""
    base = model.get_base_model()
    return {name: m for name, m in base.named_modules() if isinstance(m, BaseTunerLayer)}


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name, detached; a shared one once."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def load_tensors(into: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `into`'s tensors. Raises VlmtuneError unless names and shapes agree."""
    _require_names(into.keys(), state.keys())
    for name, tensor in into.items():
        if tensor.shape != state[name].shape:
            raise VlmtuneError(
                f"checkpoint tensor {name} has another shape",
                got=tuple(state[name].shape),
                expected=tuple(tensor.shape),
                do="resume with the recipe that the checkpoint was made with",
            )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(state[name])


def _require_names(expected: Iterable[str], got: Iterable[str]) -> None:
    missing = sorted(set(expected) - set(got))
    unknown = sorted(set(got) - set(expected))
    if missing or unknown:
        raise VlmtuneError(
            "the checkpoint is of another model or adapter",
            got=f"{len(unknown)} unknown tensors {unknown[:3]}, {len(missing)} missing "
            f"{missing[:3]}",
            do="resume with the recipe that the checkpoint was made with",
        )


def write_adapter(
    model: PeftModel,
    folder: Path,
    *,
    config: LoraConfig | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` to `folder`.

    `config` and `tensors` (named as in the file) replace the model's own. PEFT's own
    `save_pretrained` would ask the hub about the vocabulary and write a model card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = adapter_tensors(model)
    # Tied tensors share memory, which a safetensors file cannot express: each gets its own.
    plain = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    save_file(plain, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    written = copy.deepcopy(config_of(model) if config is None else config)
    written.inference_mode = True
    written.save_pretrained(str(folder))


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors named as in an adapter file: the trained ones, no adapter name."""
    return get_peft_model_state_dict(
        model, state_dict=model.state_dict(), adapter_name=ADAPTER, save_embedding_layers=False
    )
