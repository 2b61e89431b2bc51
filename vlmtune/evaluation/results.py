"""The result of an evaluation, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.metrics.base import Answered, Interval
from vlmtune.files import write_file


class Row(Protocol):
    """One line of `predictions.jsonl`."""

    def as_row(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class Prediction:
    """One answered question; `scores` holds the metrics that apply to it."""

    id: str
    images: tuple[str, ...]
    question: str
    answer: str | None
    answers: tuple[str, ...]
    options: tuple[str, ...]
    prediction: str
    scores: dict[str, float]
    question_type: str | None

    @property
    def score(self) -> float | None:
        """The first score that applies; None where no metric does."""
        return next(iter(self.scores.values()), None)

    def as_row(self) -> dict[str, object]:
        return asdict(self) | {"score": self.score}


@dataclass(frozen=True)
class EvalReport:
    """`slices` maps a question type to its metrics; empty where no sample has one."""

    task: str
    num_samples: int
    metrics: dict[str, Interval]
    slices: dict[str, dict[str, Interval]]
    predictions: Sequence[Row]

    def summary(self) -> dict[str, object]:
        """Everything but the rows, as `metrics.json` and `--json` hold it."""
        return {
            "task": self.task,
            "num_samples": self.num_samples,
            "metrics": {name: interval.as_dict() for name, interval in self.metrics.items()},
            "slices": {
                kind: {name: interval.as_dict() for name, interval in metrics.items()}
                for kind, metrics in self.slices.items()
            },
        }


PREDICTIONS = "predictions.jsonl"
METRICS = "metrics.json"
PREDICTION_KEYS = {"id", "images", "question", "answer", "answers", "options", "prediction"}


@dataclass(frozen=True)
class Result:
    """`name` is how the evaluated target is called; `rows` are its predictions by sample id."""

    name: str
    folder: Path
    summary: dict[str, Any]
    rows: dict[str, dict[str, Any]]

    @property
    def task(self) -> str:
        return str(self.summary["task"])

    def answered(self, ids: Sequence[str]) -> list[Answered]:
        """The answers to the samples called `ids`, as metrics take them."""
        return [
            Answered(row["prediction"], row["answer"], tuple(row["answers"]), tuple(row["options"]))
            for row in (self.rows[name] for name in ids)
        ]


def write_report(
    report: EvalReport, folder: Path, *, about: Mapping[str, object] | None = None
) -> None:
    """`predictions.jsonl` (a line a sample) and `metrics.json` into `folder`; each file appears
    whole or not at all. `about` (what was evaluated, on what) goes into `metrics.json` too."""
    lines = [json.dumps(p.as_row(), ensure_ascii=False) for p in report.predictions]
    write_file(folder / PREDICTIONS, "".join(line + "\n" for line in lines))
    summary = {**(about or {}), **report.summary()}
    write_file(folder / METRICS, json.dumps(summary, indent=2) + "\n")


def is_finished(folder: Path) -> bool:
    """Whether an evaluation's report is in `folder`."""
    return (folder / PREDICTIONS).is_file() and (folder / METRICS).is_file()


def read_result(folder: Path, name: str) -> Result:
    """The report in `folder`. Raises VlmtuneError where its files are not what `eval` writes."""
    summary = _parsed(folder / METRICS, (folder / METRICS).read_text(encoding="utf-8"), 1)
    if not isinstance(summary.get("task"), str) or not isinstance(summary.get("metrics"), dict):
        raise VlmtuneError(
            "not a report of an evaluation", file=folder / METRICS, expected="task and metrics"
        )
    path = folder / PREDICTIONS
    rows: dict[str, dict[str, Any]] = {}
    # Not splitlines: an answer may hold a character that Unicode counts as the end of a line.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        row = _parsed(path, line, number)
        missing = PREDICTION_KEYS - row.keys()
        if missing:
            raise VlmtuneError(
                "the line is not a prediction of an evaluation",
                file=path,
                line=number,
                got=f"no {', '.join(sorted(missing))}",
            )
        rows[str(row["id"])] = row
    return Result(name, folder, summary, rows)


def _parsed(path: Path, text: str, line: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise VlmtuneError(f"not JSON: {error}", file=path, line=line) from error
    if not isinstance(value, dict):
        raise VlmtuneError("not an object", file=path, line=line, expected="{…}")
    return value
