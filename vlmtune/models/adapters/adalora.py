"""AdaLoRA: adapters whose ranks shrink to a budget where they matter least.

    gradients -> sensitivity |w g| -> averages -> score of a triplet -> the b(t) best of all modules

Zhang et al. 2023, arXiv 2303.10512: importance eq. 8 to 11, score of a triplet eq. 7, budget
eq. 12. Shapes: r rank of a module at the start, I its inputs, O its outputs.

Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv
2303.10512. PEFT's layers hold the triplets (column of B, entry of E, row of A); the schedule, the
importance and the masks are ours, because nothing in the usual training stack
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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from torch import Tensor
from transformers import ProcessorMixin

from vlmtune.errors import VlmtuneError, plural
from vlmtune.models.adapters.base import (
    ADAPTER,
    AdapterPlan,
    adapter_tensors,
    check_wrapped,
    config_of,
    exact,
    load_tensors,
    plain_number,
    plan_modules,
    trained_tensors,
    tuner_layers,
    wrap,
    write_adapter,
)
from vlmtune.models.load import VLM
from vlmtune.models.precision import without_autocast
from vlmtune.recipe.schema import AdaLoraSection, Recipe


@dataclass(frozen=True)
class BudgetSchedule:
    """The total rank after optimizer step t of `total` (eq. 12), with t_i `warmup`, t_f `final`."""

    start: int
    target: int
    warmup: int
    final: int
    total: int
    interval: int

    @property
    def last_pruning(self) -> int:
        return self.total - self.final

    def budget_at(self, step: int) -> int:
        """b(step): the start, then the cubic curve rounded down in exact integers, the target."""
        if step <= self.warmup:
            return self.start
        left = max(self.last_pruning - step, 0)
        span = self.last_pruning - self.warmup
        return self.target + (self.start - self.target) * left**3 // span**3

    def prunes_at(self, step: int) -> bool:
        """Masks are chosen anew at multiples of the interval in between, and a last time."""
        between = self.warmup < step < self.last_pruning
        return step == self.last_pruning or (between and step % self.interval == 0)


@dataclass(frozen=True)
class Triplets:
    """One module's trained tensors: the change of its weight is a multiple of B diag(E) A."""

    a: Tensor  # (r, I)
    e: Tensor  # (r, 1)
    b: Tensor  # (O, r)

    @property
    def rank(self) -> int:
        return self.e.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"a": self.a, "e": self.e, "b": self.b}


class RankAllocator:
    """Running importance of every entry, and the mask of the kept triplets of every module.

    A module that a step's data did not reach (a vision module in a step of text) keeps its
    importance: its zero gradient says nothing about it. So does one whose gradient is not finite:
    one infinity would stay in its averages for ever.
    """

    def __init__(
        self,
        triplets: Mapping[str, Triplets],
        schedule: BudgetSchedule,
        *,
        beta1: float,
        beta2: float,
    ) -> None:
        self.triplets = dict(triplets)
        self.schedule = schedule
        self._beta1 = beta1
        self._beta2 = beta2
        self._step = torch.zeros((), dtype=torch.int64)
        self._importance = self._zeros()
        self._uncertainty = self._zeros()
        self.masks = {
            path: torch.ones(t.rank, dtype=torch.bool, device=t.e.device)
            for path, t in self.triplets.items()
        }

    def ranks(self) -> dict[str, int]:
        return {path: int(mask.sum()) for path, mask in self.masks.items()}

    def update(self, step: int, *, skipped: Tensor | None = None) -> bool:
        """Take in optimizer step `step` (from 1, none left out); whether the masks changed.

        `skipped` (bool): whether the step was thrown away, its gradients with it.
        """
        expected = int(self._step) + 1
        assert step == expected, f"after_step({step}) called, step {expected} is due"
        self._step.fill_(step)
        schedule = self.schedule
        if step <= schedule.last_pruning and not (skipped is not None and bool(skipped)):
            self._update_importance()
        changed = False
        if schedule.prunes_at(step):
            changed = self._choose(schedule.budget_at(step))
        # Between two choices a pruned entry may grow back and compete again; at each it starts
        # from 0, and after the last it stays there.
        if schedule.prunes_at(step) or step > schedule.last_pruning:
            self._apply_masks()
        if step == schedule.last_pruning:
            total = sum(self.ranks().values())
            assert total == schedule.target, (total, schedule.target)
        return changed

    def state_dict(self) -> dict[str, Tensor]:
        """The step, both averages of every entry and the masks; not copies."""
        state = {"step": self._step}
        for path, mask in self.masks.items():
            state[f"mask.{path}"] = mask
            for kind in ("a", "e", "b"):
                state[f"importance.{path}.{kind}"] = self._importance[path][kind]
                state[f"uncertainty.{path}.{kind}"] = self._uncertainty[path][kind]
        return state

    def _zeros(self) -> dict[str, dict[str, Tensor]]:
        return {
            path: {kind: torch.zeros_like(p.detach()) for kind, p in t.tensors().items()}
            for path, t in self.triplets.items()
        }

    @torch.no_grad()
    def _update_importance(self) -> None:
        """Eq. 8 to 10: I = |w g|, its average, and the average of |I - average|."""
        for path, triplets in self.triplets.items():
            sensitivities = {
                kind: (parameter * parameter.grad).abs()
                for kind, parameter in triplets.tensors().items()
                if parameter.grad is not None
            }
            if not _is_told(triplets, sensitivities.values()):
                continue
            for kind, sensitivity in sensitivities.items():
                average = self._importance[path][kind]
                average.mul_(self._beta1).add_(sensitivity, alpha=1 - self._beta1)
                deviation = (sensitivity - average).abs()
                uncertainty = self._uncertainty[path][kind]
                uncertainty.mul_(self._beta2).add_(deviation, alpha=1 - self._beta2)

    def scores(self, path: str) -> Tensor:
        """Eq. 7 and 11: s(E_i) + mean of s(A_i,:) + mean of s(B_:,i), with s = I * U; (r,)."""
        entry = {k: self._importance[path][k] * self._uncertainty[path][k] for k in ("a", "e", "b")}
        return entry["e"].squeeze(1) + entry["a"].mean(dim=1) + entry["b"].mean(dim=0)

    def _choose(self, budget: int) -> bool:
        """Keep exactly the `budget` best triplets of all modules; of equals, the first."""
        scores = torch.cat([self.scores(path) for path in self.triplets])
        best = torch.argsort(scores, descending=True, stable=True)[:budget]
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[best] = True
        parts = torch.split(kept, [t.rank for t in self.triplets.values()])
        changed = False
        for mask, new in zip(self.masks.values(), parts, strict=True):
            changed = changed or not torch.equal(mask, new)
            mask.copy_(new)
        return changed

    @torch.no_grad()
    def _apply_masks(self) -> None:
        for path, triplets in self.triplets.items():
            triplets.e.masked_fill_(~self.masks[path].unsqueeze(1), 0.0)


def _is_told(triplets: Triplets, sensitivities: Iterable[Tensor]) -> bool:
    """Whether the step says something of the module: its data reached it (only the loss, not the
    penalty, moves E), and every number is finite."""
    if triplets.e.grad is None:
        return False
    finite = [torch.isfinite(s).all() for s in sensitivities]
    return bool(torch.stack([(triplets.e.grad != 0).any(), *finite]).all())  # read once


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
    check_wrapped(model, plan)
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
