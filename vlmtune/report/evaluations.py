"""The evaluations of a run: each RUN/eval/* folder, and which two are `before` and `after`.

RUN/eval/step-000000/        before training
RUN/eval/step-000100/        during and after it
RUN/eval/guard-step-000100/  the guard against forgetting
RUN/eval/NAME/               by `vlmtune eval RUN`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmtune.report.figures import Figure, number, read_figures
from vlmtune.report.run import RunRecord, read_lines, read_object

_STEP = re.compile(r"(?P<guard>guard-)?step-(?P<step>\d+)")
RIGHT_FROM = 0.5
"""A score from here on counts as right; most are 0 or 1."""


@dataclass
class Evaluation:
    """One folder. `step` is None for what `vlmtune eval` wrote; `blind` holds the figures of
    guessers that never see a picture, by their names; `written` in seconds."""

    name: str
    step: int | None
    is_guard: bool
    task: str
    data: tuple[str, ...]
    num_samples: int
    figures: dict[str, Figure]
    slices: dict[str, dict[str, Figure]]
    blind: dict[str, dict[str, Figure]]
    rows: list[dict[str, Any]] = field(repr=False)
    written: float

    @property
    def label(self) -> str:
        if self.step is None:
            return self.name
        return "before training" if self.step == 0 else f"step {self.step:,}"

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(str(row["id"]) for row in self.rows if "id" in row)

    @property
    def main_figure(self) -> str | None:
        return next(iter(self.figures), None)


@dataclass(frozen=True)
class Pair:
    """The same questions before training and after; either may be missing."""

    before: Evaluation | None
    after: Evaluation | None

    @property
    def shown(self) -> Evaluation | None:
        """The one that says where the model stands."""
        return self.after or self.before

    @property
    def main_figure(self) -> str | None:
        """The first figure that the two have in common."""
        if self.shown is None:
            return None
        if self.before is None or self.after is None:
            return self.shown.main_figure
        return next((name for name in self.after.figures if name in self.before.figures), None)

    @property
    def has_same_samples(self) -> bool:
        return (
            self.before is not None and self.after is not None and self.before.ids == self.after.ids
        )


def read_evaluations(record: RunRecord) -> list[Evaluation]:
    """Every evaluation of a run, those of steps first and in their order."""
    folders = [p for p in (record.folder / "eval").glob("*") if p.is_dir()]
    found = [e for folder in folders if (e := _read(folder, record.unreadable)) is not None]
    return sorted(found, key=lambda e: (e.is_guard, e.step is None, e.step or 0, e.written))


def choose_pair(evaluations: Sequence[Evaluation], record: RunRecord) -> Pair:
    """Before and after on the same samples: the newest evaluation of the result that has them (or
    most of them), and the one before the first step."""
    before = next((e for e in evaluations if e.step == 0 and not e.is_guard), None)
    later = _of_result(evaluations, record)
    if before is None:
        return Pair(None, max(later, key=_age, default=None))
    same = [e for e in later if e.task == before.task and e.ids & before.ids]
    return Pair(before, max(same, key=lambda e: (e.ids == before.ids, *_age(e)), default=None))


def choose_widest(
    evaluations: Sequence[Evaluation], record: RunRecord, pair: Pair
) -> Evaluation | None:
    """The evaluation of the result with the most samples of the pair's data, the newest of several:
    during training a choice of the data is evaluated, afterwards often all of it."""
    if pair.after is None:
        return pair.before
    same = [
        e
        for e in _of_result(evaluations, record)
        if e.task == pair.after.task and e.ids & pair.after.ids
    ]
    return max(same, key=lambda e: (e.num_samples, *_age(e)))


def _of_result(evaluations: Sequence[Evaluation], record: RunRecord) -> list[Evaluation]:
    """Those after training began. Where a best step was chosen, others do not speak for it."""
    best_step = _best_step(record)
    return [
        e
        for e in evaluations
        if not e.is_guard and e.step != 0 and (e.step is None or best_step in (None, e.step))
    ]


def _best_step(record: RunRecord) -> int | None:
    best = (record.summary or {}).get("best")
    return best.get("step") if isinstance(best, dict) else None


def _age(evaluation: Evaluation) -> tuple[float, int]:
    return evaluation.written, evaluation.step or 0


def guard_pair(evaluations: Sequence[Evaluation], record: RunRecord) -> Pair:
    """The guard's evaluations before training and at the result's step: the best, or the last."""
    guards = [e for e in evaluations if e.is_guard and e.step is not None]
    before = next((e for e in guards if e.step == 0), None)
    wanted = _best_step(record)
    after = [e for e in guards if e.step != 0]
    chosen = next((e for e in after if e.step == wanted), after[-1] if after else None)
    return Pair(before, chosen)


def is_right(row: dict[str, Any] | None) -> bool | None:
    """Whether a row's answer counts as right (a query: its match ranked first); None: no score."""
    if row is None:
        return None
    score = number(row.get("score"))
    if score is not None:
        return score >= RIGHT_FROM
    rank = number(row.get("rank"))
    return None if rank is None else rank <= 1


def row_key(row: dict[str, Any]) -> tuple[str, str]:
    """What names a row in its report: queries in both directions may share an id."""
    return str(row.get("id", "")), str(row.get("direction", ""))


def _read(folder: Path, unreadable: dict[str, int]) -> Evaluation | None:
    summary = read_object(folder / "metrics.json", unreadable)
    if summary is None:
        return None
    named = _STEP.fullmatch(folder.name)
    slices = summary.get("slices")
    blind, data = summary.get("blind"), summary.get("data")
    num_samples = summary.get("num_samples")
    rows = read_lines(folder / "predictions.jsonl", unreadable)
    return Evaluation(
        name=folder.name,
        step=None if named is None else int(named["step"]),
        is_guard=named is not None and named["guard"] is not None,
        task=str(summary.get("task", "")),
        data=tuple(map(str, data)) if isinstance(data, list) else (),
        num_samples=num_samples if isinstance(num_samples, int) else len(rows),
        figures=read_figures(summary.get("metrics")),
        slices={
            str(kind): read_figures(metrics)
            for kind, metrics in (slices.items() if isinstance(slices, dict) else ())
        },
        blind={
            str(guesser): read_figures(of.get("metrics"))
            for guesser, of in (blind.items() if isinstance(blind, dict) else ())
            if isinstance(of, dict)
        },
        rows=rows,
        written=(folder / "metrics.json").stat().st_mtime,
    )
