"""AdaLoRA: adapters whose ranks shrink to a budget where they matter least.

Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv
2303.10512. PEFT's layers hold the triplets (column of B, entry of E, row of A); the schedule, the
importance and the masks are ours (`rank_budget.py`), because nothing in the usual training stack
calls PEFT's, and its own update fails for a module without a gradient.

    after every optimizer step t:
        t <= T - t_f    update the importance of the modules that the data reached, unless fp16's
                        loss scaler threw the step away
        t a multiple of the interval and t_i < t < T - t_f, or t = T - t_f
                        keep the b(t) best triplets of all modules, set E of the others to 0
        t > T - t_f     the mask is final: E of the pruned triplets is set to 0 again

The change of a weight is `alpha / (initial_rank + 1e-5) B diag(E) A` before and after pruning, in
training, in both exports and in a merge (the 1e-5 is PEFT's).

Deviations from the paper: the orthogonality penalty is the mean over matrices of the Frobenius
norms (the authors' code and PEFT; eq. 4 sums their squares); importance is measured with the
weights after the step and the gradients before it (the same).
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from torch import Tensor
from transformers import ProcessorMixin

from vlmtune.errors import VlmtuneError, plural
from vlmtune.models.adapters.base import AdapterPlan, plan_modules
from vlmtune.models.adapters.rank_budget import BudgetSchedule, RankAllocator, Triplets
from vlmtune.models.adapters.wrapping import (
    ADAPTER,
    adapter_tensors,
    check_wrapped,
    config_of,
    exact,
    load_tensors,
    plain_number,
    trained_tensors,
    tuner_layers,
    wrap,
    write_adapter,
)
from vlmtune.models.autocast import without_autocast
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import AdaLoraSection, Recipe

logger = logging.getLogger("vlmtune")

LORA_FOLDER = "lora"
"""In the adapter folder: the same change as a plain LoRA."""

PREFIX = "base_model.model."
EPSILON = 1e-5
"""PEFT divides by `ranknum + 1e-5`."""


class AdaLoraAdapter:
    """A PEFT AdaLoRA model with our allocator; implements `Adapter`."""

    name = "adalora"

    def __init__(
        self,
        model: PeftModel,
        processor: ProcessorMixin,
        allocator: RankAllocator,
        *,
        orthogonal_weight: float,
    ) -> None:
        self.model = model
        self._processor = processor
        self.allocator = allocator
        self._orthogonal_weight = orthogonal_weight

    def penalty(self) -> Tensor | None:
        """`gamma * mean(|A A^T - I|_F, |B^T B - I|_F)` over all modules; None where gamma is 0."""
        if self._orthogonal_weight == 0:
            return None
        norms: list[Tensor] = []
        with without_autocast(self._device()):
            for t in self.allocator.triplets.values():
                for gram in (t.a @ t.a.T, t.b.T @ t.b):  # (r, r)
                    identity = torch.eye(gram.shape[0], device=gram.device)
                    norms.append(torch.linalg.norm(gram - identity))
            return self._orthogonal_weight * torch.stack(norms).mean()

    def after_step(self, step: int, *, skipped: Tensor | None = None) -> dict[str, object]:
        """Update importance and masks; `ranks` and `total_rank` where the masks changed. A skipped
        step counts for the schedule, not for the importance."""
        if not self.allocator.update(step, skipped=skipped):
            return {}
        ranks = self.allocator.ranks()
        return {"ranks": ranks, "total_rank": sum(ranks.values())}

    def no_decay_names(self) -> set[str]:
        """All of A, B and E: decay would compete with the pruning."""
        return {n for n in trained_tensors(self.model) if ".lora_" in n}

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"parameter.{n}": t for n, t in trained_tensors(self.model).items()}
        return state | {f"allocator.{n}": t for n, t in self.allocator.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        tensors = {f"parameter.{n}": t for n, t in trained_tensors(self.model).items()}
        own = self.allocator.state_dict()
        load_tensors(tensors | {f"allocator.{n}": t for n, t in own.items()}, state)

    def save(self, folder: Path) -> None:
        """Write the pruned AdaLoRA adapter, and the same change as a plain LoRA in `lora/`.

        Stock PEFT loads both, modules of rank 0 included; in the plain LoRA such a module keeps
        one triplet of zeros, because a LoRA of rank 0 cannot be built.
        """
        write_adapter(
            self.model, folder, config=self._pruned_config(), tensors=self._pruned_tensors()
        )
        config, tensors = self._as_lora()
        write_adapter(self.model, folder / LORA_FOLDER, config=config, tensors=tensors)
        self._processor.save_pretrained(folder)

    def _device(self) -> torch.device:
        return next(iter(self.allocator.triplets.values())).e.device

    def _pruned_config(self) -> AdaLoraConfig:
        """PEFT shapes A, E and B by `rank_pattern`: the kept entries out of `init_r`."""
        config: AdaLoraConfig = copy.deepcopy(config_of(self.model))
        config.rank_pattern = {
            f"{path}.lora_E": mask.tolist() + [False] * (config.init_r - mask.numel())
            for path, mask in self.allocator.masks.items()
        }
        return config

    def _pruned_tensors(self) -> dict[str, Tensor]:
        tensors = adapter_tensors(self.model)
        for path, mask in self.allocator.masks.items():
            triplets = self.allocator.triplets[path]
            tensors[f"{PREFIX}{path}.lora_A"] = triplets.a[mask]
            tensors[f"{PREFIX}{path}.lora_E"] = triplets.e[mask]
            tensors[f"{PREFIX}{path}.lora_B"] = triplets.b[:, mask]
        return tensors

    def _as_lora(self) -> tuple[LoraConfig, dict[str, Tensor]]:
        """E folded into A; `alpha_pattern` keeps the scale at `alpha / (initial_rank + 1e-5)`."""
        own = config_of(self.model)
        scale = own.lora_alpha / (own.init_r + EPSILON)
        tensors = {n: t for n, t in adapter_tensors(self.model).items() if ".lora_" not in n}
        ranks: dict[str, int] = {}
        for path, mask in self.allocator.masks.items():
            triplets = self.allocator.triplets[path]
            kept = mask if mask.any() else _first_only(mask)
            ranks[path] = int(kept.sum())
            a = triplets.a[kept] * triplets.e[kept] * mask[kept].unsqueeze(1)
            tensors[f"{PREFIX}{path}.lora_A.weight"] = a
            tensors[f"{PREFIX}{path}.lora_B.weight"] = triplets.b[:, kept]
        config = LoraConfig(
            r=own.init_r,
            lora_alpha=own.lora_alpha,
            target_modules=sorted(ranks),
            rank_pattern={exact(path): rank for path, rank in ranks.items()},
            alpha_pattern={exact(path): scale * rank for path, rank in ranks.items()},
            modules_to_save=own.modules_to_save,
            ensure_weight_tying=own.ensure_weight_tying,
        )
        config.base_model_name_or_path = own.base_model_name_or_path
        config.revision = own.revision
        return config, tensors


def build_adalora(vlm: VLM, recipe: Recipe, *, total_steps: int) -> AdaLoraAdapter:
    """Wrap `vlm.model` in place. Raises VlmtuneError for a schedule without a pruning phase."""
    section = recipe.adalora
    assert section is not None, "method_of chose adalora"
    warmup, final = schedule_steps(section, total_steps=total_steps)
    plan = plan_modules(vlm, recipe, rank=section.initial_rank)
    config = AdaLoraConfig(
        init_r=section.initial_rank,
        target_r=section.target_rank,
        tinit=warmup,
        tfinal=final,
        deltaT=section.interval,
        beta1=section.beta1,
        beta2=section.beta2,
        orth_reg_weight=section.orthogonal_weight,
        total_step=total_steps,
        lora_alpha=plain_number(recipe.alpha),
        lora_dropout=recipe.dropout,
        target_modules=[t.path for t in plan.targets],
    )
    model = wrap(vlm, config, plan)
    layers = tuner_layers(model)
    _lower_ranks(layers, plan, config)
    check_wrapped(model, plan, ranks={t.path: t.rank for t in plan.targets})
    triplets = {path: _triplets(layers[path]) for path in sorted(layers)}
    start = sum(t.rank for t in triplets.values())
    schedule = BudgetSchedule(
        start=start,
        target=_final_budget(section.target_rank * len(triplets), start),
        warmup=warmup,
        final=final,
        total=total_steps,
        interval=section.interval,
    )
    allocator = RankAllocator(triplets, schedule, beta1=section.beta1, beta2=section.beta2)
    return AdaLoraAdapter(
        model, vlm.processor, allocator, orthogonal_weight=section.orthogonal_weight
    )


def schedule_steps(section: AdaLoraSection, *, total_steps: int) -> tuple[int, int]:
    """t_i and t_f in optimizer steps. Raises VlmtuneError where no step is left for pruning."""
    warmup, final = (
        round(value * total_steps) if value < 1 else round(value)
        for value in (section.warmup, section.final)
    )
    if warmup + final >= total_steps:
        raise VlmtuneError(
            "adalora.warmup and adalora.final leave no optimizer step for pruning",
            got=f"warmup {warmup} + final {final} of {plural(total_steps, 'step')}",
            expected=f"together fewer than {plural(total_steps, 'step')}",
            do="lower adalora.warmup or adalora.final, or train for longer",
        )
    return warmup, final


def _final_budget(target: int, start: int) -> int:
    if target < start:
        return target
    logger.warning(
        "the target modules' sizes allow a total rank of %d, not above the target of %d: "
        "nothing will be pruned",
        start,
        target,
    )
    return start


def _lower_ranks(layers: dict[str, Any], plan: AdapterPlan, config: AdaLoraConfig) -> None:
    """Give modules too small for `init_r` their limit; the scale stays `alpha / init_r`."""
    for target in plan.targets:
        layer = layers[target.path]
        if target.rank != config.init_r:
            layer.update_layer(ADAPTER, target.rank, config.lora_alpha, config=config)
            layer.ranknum[ADAPTER].data.fill_(float(config.init_r))


def _triplets(layer: Any) -> Triplets:
    return Triplets(
        a=layer.lora_A[ADAPTER],
        e=layer.lora_E[ADAPTER],
        b=layer.lora_B[ADAPTER],
    )


def _first_only(mask: Tensor) -> Tensor:
    first = torch.zeros_like(mask)
    first[0] = True
    return first
