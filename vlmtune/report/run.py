"""Reads a run folder and its evaluations, whether the run is finished, running or dead.

A missing or half-written file is never an error here: `RunRecord.unreadable` counts what could not
be read, and the page shows the count.

RUN/eval/step-000000/        before training
RUN/eval/step-000100/        during and after it
RUN/eval/guard-step-000100/  the guard against forgetting
RUN/eval/NAME/               by `vlmtune eval RUN`
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmtune.errors import VlmtuneError
from vlmtune.report.format import Figure, number, read_figures

RUN_FILES = ("recipe.resolved.yaml", "metrics.jsonl", "environment.json", "checkpoints")
RESULTS = ("adapter", "model")
STILL_SECONDS = 15 * 60
"""A run without a result that wrote nothing for this long counts as dead."""
RESUMED_SECONDS = 2.0
"""If metrics.jsonl is newer than summary.json by this much, the summary is of a session before."""

Line = dict[str, Any]


@dataclass(frozen=True)
class State:
    """`name` is `finished`, `running`, `stopped` (by a signal, with a checkpoint) or `failed` (no
    result, no recorded stop, nothing written lately)."""

    name: str
    text: str


@dataclass
class RunRecord:
    """What a run folder holds. `lines` are those of metrics.jsonl; `unreadable` counts, for each
    file, what is not valid JSON."""

    folder: Path
    lines: list[Line]
    skipped: list[Line]
    recipe_text: str | None
    resolved_text: str | None
    environment: Line | None
    modules: Line | None
    summary: Line | None
    state: State
    unreadable: dict[str, int] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)


def read_run(folder: Path, *, now: float | None = None) -> RunRecord:
    """The record of the run in `folder`. `now`: seconds since the epoch; None reads the clock.

    Raises VlmtuneError where `folder` is not a run folder.
    """
    _check_is_run(folder)
    unreadable: dict[str, int] = {}
    lines = [
        line
        for line in read_lines(folder / "metrics.jsonl", unreadable)
        if isinstance(line.get("step"), int)
    ]
    record = RunRecord(
        folder=folder,
        lines=sorted(lines, key=lambda line: line["step"]),
        skipped=read_lines(folder / "skipped.jsonl", unreadable),
        recipe_text=_read_text(folder / "recipe.yaml"),
        resolved_text=_read_text(folder / "recipe.resolved.yaml"),
        environment=read_object(folder / "environment.json", unreadable),
        modules=read_object(folder / "modules.json", unreadable),
        summary=_current_summary(folder, unreadable),
        state=State("", ""),
        unreadable=unreadable,
    )
    record.state = _state_of(record, time.time() if now is None else now)
    return record


def read_lines(path: Path, unreadable: dict[str, int]) -> list[Line]:
    """The JSON objects of a JSONL file; empty if there is no file. Other lines (such as a
    half-written last one) are counted under the file's name."""
    text = _read_text(path) or ""
    found: list[Line] = []
    # Not splitlines: an answer may contain a character that Unicode counts as a line end.
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            unreadable[path.name] = unreadable.get(path.name, 0) + 1
    return found


def read_object(path: Path, unreadable: dict[str, int]) -> Line | None:
    """The JSON object in `path`; None without one."""
    text = _read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        unreadable[path.name] = unreadable.get(path.name, 0) + 1
        return None
    return value


def _check_is_run(folder: Path) -> None:
    expected = "a run folder, as `vlmtune train` writes it, with " + " or ".join(RUN_FILES)
    if not folder.is_dir():
        raise VlmtuneError(
            "a file, not a run folder" if folder.exists() else "no such run folder",
            file=folder,
            expected=expected,
        )
    if not any((folder / name).exists() for name in RUN_FILES):
        names = sorted(path.name for path in folder.iterdir())
        raise VlmtuneError(
            "not a run folder",
            file=folder,
            got=", ".join(names[:5]) + (", …" if len(names) > 5 else "") or "an empty folder",
            expected=expected,
            do="give the recipe's output_dir",
        )


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _current_summary(folder: Path, unreadable: dict[str, int]) -> Line | None:
    """summary.json, unless the run went on after it was written."""
    summary = read_object(folder / "summary.json", unreadable)
    written, logged = (_modified(folder / n) for n in ("summary.json", "metrics.jsonl"))
    if written is not None and logged is not None and logged > written + RESUMED_SECONDS:
        return None
    return summary


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _state_of(record: RunRecord, now: float) -> State:
    folder, summary, step = record.folder, record.summary, record.last_step
    result = next((name for name in RESULTS if (folder / name).is_dir()), None)
    if summary is not None and summary.get("stopped_by") is not None:
        stopped = summary.get("steps", step)
        return State("stopped", f"stopped by a signal at step {stopped}; a checkpoint was saved")
    if result is not None:
        return State("finished", f"finished at step {step}; the result is in {result}/")
    times = [t for name in (*RUN_FILES, "skipped.jsonl", "eval") if (t := _modified(folder / name))]
    times += [t for path in folder.glob("eval/*") if (t := _modified(path))]
    still = now - max(times, default=now)
    if still < STILL_SECONDS:
        return State("running", f"running: step {step}, last written {format_age(still)} ago")
    checkpoints = sorted(path.name for path in folder.glob("checkpoints/step-*"))
    kept = f"the newest checkpoint is {checkpoints[-1]}" if checkpoints else "it has no checkpoint"
    return State(
        "failed",
        f"ended at step {step} without a result, {format_age(still)} ago; {kept}",
    )


def format_age(seconds: float) -> str:
    """`seconds` in the largest fitting unit: `40 seconds`, `3 minutes`, `2 days`."""
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = round(seconds / size)
            return f"{count} {unit}{'s' if count != 1 else ''}"
    count = max(0, round(seconds))
    return f"{count} second{'s' if count != 1 else ''}"


_STEP = re.compile(r"(?P<guard>guard-)?step-(?P<step>\d+)")
RIGHT_FROM = 0.5
"""A score of at least this counts as right; most scores are 0 or 1."""


@dataclass
class Evaluation:
    """One evaluation folder. `step` is None if `vlmtune eval` wrote it; `blind` holds, by name, the
    figures of guessers that see no picture; `written` is in seconds."""

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
        """The evaluation that shows the current state of the model."""
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
    """The evaluation before the first step, and the newest one of the result on the same samples
    (or on most of them)."""
    before = next((e for e in evaluations if e.step == 0 and not e.is_guard), None)
    later = _of_result(evaluations, record)
    if before is None:
        return Pair(None, max(later, key=_age, default=None))
    same = [e for e in later if e.task == before.task and e.ids & before.ids]
    return Pair(before, max(same, key=lambda e: (e.ids == before.ids, *_age(e)), default=None))


def choose_widest(
    evaluations: Sequence[Evaluation], record: RunRecord, pair: Pair
) -> Evaluation | None:
    """The evaluation of the result with the most samples of the pair's data, the newest of several.
    Training often evaluates a part of the data, `vlmtune eval` all of it."""
    if pair.after is None:
        return pair.before
    same = [
        e
        for e in _of_result(evaluations, record)
        if e.task == pair.after.task and e.ids & pair.after.ids
    ]
    return max(same, key=lambda e: (e.num_samples, *_age(e)))


def _of_result(evaluations: Sequence[Evaluation], record: RunRecord) -> list[Evaluation]:
    """Those after training began; where a best step was chosen, only that step's."""
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
    """Whether a row's answer counts as right (for a query: its match is ranked first); None if it
    has no score."""
    if row is None:
        return None
    score = number(row.get("score"))
    if score is not None:
        return score >= RIGHT_FROM
    rank = number(row.get("rank"))
    return None if rank is None else rank <= 1


def row_key(row: dict[str, Any]) -> tuple[str, str]:
    """The key of a row in its report: queries of both directions may share an id."""
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
