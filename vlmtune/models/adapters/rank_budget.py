"""AdaLoRA's allocator: how many triplets are kept after a step, and which.

    gradients -> sensitivity |w g| -> averages -> score of a triplet -> the b(t) best of all modules

Zhang et al. 2023, arXiv 2303.10512: importance eq. 8 to 11, score of a triplet eq. 7, budget
eq. 12. Shapes: r rank of a module at the start, I its inputs, O its outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


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
