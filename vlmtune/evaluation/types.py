"""What an evaluation gives back: rows (answers, or ranked queries) and figures over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from vlmtune.evaluation.metrics.bootstrap import Interval


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
