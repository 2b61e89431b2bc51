"""What the training loop asks of an adapter method, and the plan of modules it applies to.

    recipe -> plan_modules -> AdapterPlan -> lora | adalora | full -> Adapter -> the training loop

The loop knows only `Adapter`; a method is one file here and one line in `registry.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from vlmtune.errors import VlmtuneError
from vlmtune.models.family import lies_under
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
                f"weight with {head}; a separately trained copy would part them",
                got=f"{path} in modules_to_save beside an adapter",
                do="name its layers instead, or train without an adapter (lora_target: [])",
            )
    if embeddings not in saved:
        return None
    logger.info("%s and %s share one weight: it is trained once, for both", embeddings, head)
    return head
