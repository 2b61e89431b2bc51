"""What a check found, as `vlmtune check --json` prints it and the table for people shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmtune.models.targets import TrainedRow
from vlmtune.preflight.epoch_stats import Disk
from vlmtune.preflight.memory import Epoch, Memory
from vlmtune.preflight.model import PartCount
from vlmtune.preflight.problems import Problem, ProblemKind, Verdict, kind_of
from vlmtune.preflight.run import Report
from vlmtune.preflight.sets import (
    GOOD,
    NO_MEDIA,
    NOT_A_ROW,
    NOT_ENCODED,
    TOO_LONG,
    CheckedSet,
    SetName,
)
from vlmtune.train.feed import SkippedSample

PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class SetSummary:
    """What was found in one set.

    `files` maps each file to its format. `dropped` counts rows by reason, `left_out` names those
    whose place is kept; `changed` counts what was done to samples. `encoded_in_full`: whether
    every sample was encoded, rather than measured by the sizes of its pictures.
    """

    rows: int = 0
    rows_looked_at: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    samples: int = 0
    bad: int = 0
    too_long: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    image_tokens: int = 0
    images: int = 0
    tokens_per_sample: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    left_out: Sequence[SkippedSample] = ()
    changed: Mapping[str, int] = field(default_factory=dict)
    encoded_in_full: bool = False


@dataclass(frozen=True)
class CheckSummary:
    """The verdict, the problems, and every figure; None where a problem was in the way.

    Of each kind of problem, `problems` holds the first ones and `kinds` the count. The token,
    picture and sample counts are those of `data.train`.
    """

    verdict: Verdict
    problems: Sequence[Problem]
    kinds: Sequence[ProblemKind]
    num_errors: int
    num_warnings: int
    samples: int
    tokens: int
    supervised_tokens: int
    image_tokens: int
    images: int
    dropped: Mapping[str, int]
    changed: Mapping[str, int]
    sets: Mapping[SetName, SetSummary]
    duplicates: Mapping[SetName, int]
    overlap: Mapping[SetName, Mapping[str, int]]
    steps: int | None
    epochs: float | None
    epoch: Epoch | None
    run: Mapping[str, int] | None
    method: str | None
    trainable_parameters: int | None
    trained: Sequence[TrainedRow]
    parts: Mapping[str, PartCount]
    memory_bytes: int | None
    memory: Memory | None
    disk: Disk | None


def summary_of(report: Report) -> CheckSummary:
    """The report without its tables of rows."""
    sets = {name: _set_summary(checked) for name, checked in report.sets.items()}
    train = sets.get("data.train", SetSummary())
    figures, memory, trained = report.figures, report.memory, report.trained
    return CheckSummary(
        verdict=report.problems.verdict,
        problems=report.problems.found,
        kinds=report.problems.kinds(),
        num_errors=report.problems.num("error"),
        num_warnings=report.problems.num("warning"),
        samples=train.samples,
        tokens=train.tokens,
        supervised_tokens=train.supervised_tokens,
        image_tokens=train.image_tokens,
        images=train.images,
        dropped=train.dropped,
        changed=train.changed,
        sets=sets,
        duplicates=report.duplicates,
        overlap=report.overlaps,
        steps=None if figures is None else figures.steps,
        epochs=None if figures is None else figures.epochs,
        epoch=None if figures is None else figures.epoch,
        run=None if figures is None else figures.run,
        method=None if trained is None else trained.method,
        trainable_parameters=None if trained is None else trained.trainable_parameters,
        trained=() if trained is None else trained.rows,
        parts={} if trained is None else trained.parts,
        memory_bytes=None if memory is None else memory.total,
        memory=memory,
        disk=report.disk,
    )


def _set_summary(checked: CheckedSet) -> SetSummary:
    table = checked.table
    good = table.rows(GOOD)
    tokens = table.num_tokens()[good]
    dropped: Counter[str] = Counter()
    left_out = []
    for (_, kind), kept in table.failures.items():
        dropped[kind] += kept.count
        left_out += [
            SkippedSample(
                id=failed.id,
                file=failed.source.file,
                line=failed.source.line,
                reason=kind_of(failed.error.message),
                is_bad=failed.state != TOO_LONG,
            )
            for failed in kept.failed
        ]
    return SetSummary(
        rows=checked.num_rows,
        rows_looked_at=len(table),
        files={file.rows.file: file.format for file in checked.files},
        samples=len(good),
        bad=table.count(NOT_A_ROW, NO_MEDIA, NOT_ENCODED),
        too_long=table.count(TOO_LONG),
        tokens=int(tokens.sum()),
        supervised_tokens=_total(table.supervised, good),
        image_tokens=_total(table.media, good),
        images=_total(table.images, good),
        tokens_per_sample=_percentiles(tokens),
        dropped=dict(dropped),
        left_out=left_out,
        changed=dict(table.notes),
        encoded_in_full=not checked.by_size,
    )


def _total(column: Any, rows: np.ndarray) -> int:
    return int(np.frombuffer(column, np.uint32)[rows].sum()) if len(rows) else 0


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    found = np.percentile(values, PERCENTILES, method="higher")
    return {f"p{share}": int(value) for share, value in zip(PERCENTILES, found, strict=True)}
