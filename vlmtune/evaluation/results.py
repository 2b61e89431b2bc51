"""A finished evaluation read back from its folder: `predictions.jsonl` and `metrics.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.metrics.base import Answered

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
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = _parsed(path, line, number)
        missing = PREDICTION_KEYS - row.keys()
        if missing:
            raise VlmtuneError(
                "the line is no answer of an evaluation",
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
