"""The interface of an adapter method for the training loop, and what PEFT's methods share.

    recipe -> plan_modules -> AdapterPlan -> lora | adalora | full -> Adapter -> the training loop

The loop knows only `Adapter`; a method is one file here and one line in `registry.py`.

PEFT matches names by suffix and by pattern; full paths go in, and what came out is read off the
wrapped model. Nothing is left to `prepare_model_for_kbit_training` (it casts the 16-bit parts to
float32) or `enable_input_require_grads` (it back-propagates through a frozen vision tower).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmtune.errors import VlmtuneError
from vlmtune.models.families import lies_under
from vlmtune.models.load import VLM
from vlmtune.models.quantize import bits_of
from vlmtune.models.targets import (
    Target,
    embeddings_path,
    has_tied_embeddings,
    lm_head_path,
    resolve_modules_to_save,
    resolve_targets,
)
from vlmtune.recipe.schema import Recipe

logger = logging.getLogger("vlmtune")


class Adapter(Protocol):
    """A model prepared for training by one method.

    `model` is what is trained: a PeftModel, or the base model itself. Its trainable parameters are
    float32 and the only ones with `requires_grad`. No method contains a collective: with several
    processes each holds the same tensors and, after the gradients are reduced, does the same.
    """

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> nn.Module: ...

    def penalty(self) -> Tensor | None:
        """A term added to the loss once per optimizer step, already weighted: float32, scalar."""

    def after_step(self, step: int, *, skipped: Tensor | None = None) -> dict[str, object]:
        """Called after `optimizer.step()` and before `zero_grad()`, once for every step from 1.

        `skipped` (bool, on the device): whether fp16's loss scaler threw the step away, with
        gradients that say nothing; None without one. Returns fields for the log; empty where
        nothing changed.
        """

    def no_decay_names(self) -> set[str]:
        """Names of `model`'s parameters that never get weight decay."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs: trained tensors at full size, and the method's state."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take `state` back. Raises VlmtuneError where its names are not exactly ours."""

    def save(self, folder: Path) -> None:
        """Write what inference loads: an adapter for stock PEFT, or a model folder."""


@dataclass(frozen=True)
class AdapterPlan:
    """Which modules get an adapter and which are trained in full.

    `saved` holds no module inside another one. `tied_head` is the path of an output layer that
    shares its weight with the trained input embeddings: one weight is trained, and stays shared.
    """

    targets: tuple[Target, ...]
    saved: tuple[str, ...]
    tied_head: str | None


def plan_modules(vlm: VLM, recipe: Recipe, *, rank: int) -> AdapterPlan:
    """Resolve `lora_target` and `modules_to_save` on the loaded model.

    A target inside a module that is trained in full gets no adapter of its own (a notice counts
    them). Raises VlmtuneError for a quantised module in `modules_to_save`, and where no target is
    left.
    """
    names = resolve_modules_to_save(vlm.model, recipe.modules_to_save, family=vlm.family)
    saved = tuple(sorted(names))
    refuse_quantized(vlm.model, saved)
    head = _tied_head(vlm.model, saved)
    targets = resolve_targets(vlm.model, recipe.lora_target, family=vlm.family, rank=rank)
    kept = tuple(t for t in targets if not any(lies_under(t.path, path) for path in saved))
    if len(kept) < len(targets):
        logger.info(
            "%d of %d targets lie in modules_to_save: trained in full, without an adapter",
            len(targets) - len(kept),
            len(targets),
        )
    if not kept:
        raise VlmtuneError(
            "every module of lora_target lies in modules_to_save",
            got=f"lora_target {recipe.lora_target}, modules_to_save {recipe.modules_to_save}",
            do="set lora_target: [] to train without an adapter, or name other targets",
        )
    return AdapterPlan(kept, saved, head)


def refuse_quantized(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise VlmtuneError where a module that is to be trained in full has quantised weights."""
    for path in paths:
        for name, module in model.get_submodule(path).named_modules():
            if bits_of(module) < 16:
                full = f"{path}.{name}" if name else path
                raise VlmtuneError(
                    f"modules_to_save: {full} is quantised and cannot be trained in full",
                    got=f"{bits_of(module)}-bit weights",
                    expected="16-bit weights",
                    do=f"add {path} (or its part) to quantization.skip",
                )


def _tied_head(model: nn.Module, saved: Sequence[str]) -> str | None:
    """The output layer that shares its weight with embeddings trained in full, if there is one."""
    if not has_tied_embeddings(model):
        return None
    embeddings, head = embeddings_path(model), lm_head_path(model)
    assert head not in saved, "resolve_modules_to_save names the embeddings of a tied pair"
    for path in saved:
        if path != embeddings and lies_under(embeddings, path):
            raise VlmtuneError(
                f"modules_to_save: {path} contains the input embeddings, which share their "
                f"weight with {head}; a separately trained copy would untie them",
                got=f"{path} in modules_to_save together with an adapter",
                do="name its layers instead, or train without an adapter (lora_target: [])",
            )
    if embeddings not in saved:
        return None
    logger.info("%s and %s share one weight: it is trained once, for both", embeddings, head)
    return head


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
    """Suppress PEFT's warnings that do not matter to the user."""
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


def check_wrapped(model: PeftModel, plan: AdapterPlan) -> None:
    """Assert that exactly the planned modules are wrapped, and train with the planned ranks."""
    ranks = {target.path: target.rank for target in plan.targets}
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
            "the checkpoint belongs to another model or adapter",
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
