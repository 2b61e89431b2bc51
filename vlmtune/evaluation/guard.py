"""Baselines for a figure: guessers that never see the picture, and the guard against forgetting.

majority answer  the most frequent answer to the question's text in the training data; to a text
                 that is not there, the most frequent answer of all (the priors of Antol et al.
                 2015, arXiv 1505.00468, section 4, taken to the single question)
blank pictures   the model itself, each picture replaced by mid-grey of the same size

RUN/eval/guard-step-000000/  what the model could do before training
RUN/eval/guard-step-NNNNNN/  afterwards
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import PIL.Image

from vlmtune.data.media import upright_size
from vlmtune.data.types import Conversation, Image, Part, Turn
from vlmtune.errors import VlmtuneError, nearest
from vlmtune.evaluation.metrics.registry import METRICS
from vlmtune.evaluation.references import question_of
from vlmtune.recipe.schema import EvalSection, is_lower_better

GREY = 128


def majority_answers(training: Sequence[Conversation], asked: Sequence[Conversation]) -> list[str]:
    """What the training data's most frequent answers make of each question asked; of equally
    frequent ones the first seen. Raises VlmtuneError where no training sample has an answer."""
    of_text: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for conversation in training:
        for question, answer in _exchanges(conversation):
            of_text[question][answer] += 1
            overall[answer] += 1
    if not overall:
        raise VlmtuneError(
            "the training data has no answer to guess from",
            do="pass the training data with --train",
        )
    counts = (of_text.get(question_of(conversation), overall) for conversation in asked)
    return [count.most_common(1)[0][0] for count in counts]


def blanked(conversation: Conversation) -> Conversation:
    """The conversation with each picture mid-grey."""
    turns = tuple(
        Turn(turn.role, tuple(_blank(part) for part in turn.parts)) for turn in conversation.turns
    )
    return replace(conversation, turns=turns)


def _exchanges(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Each question's text with the answer to it."""
    turns = conversation.turns
    for before, turn in zip(turns, turns[1:]):
        if before.role == "user" and turn.role == "assistant":
            yield before.text.strip(), turn.text.strip()
    if turns[-1].role == "user" and conversation.answers:
        yield turns[-1].text.strip(), Counter(conversation.answers).most_common(1)[0][0]


def _blank(part: Part) -> Part:
    if not isinstance(part, Image):
        return part
    # The model has seen the picture already, within the limit of pixels.
    width, height = upright_size(part, max_pixels=sys.maxsize)
    return Image(_grey_picture(width, height), part.base_dir)


@lru_cache(maxsize=1024)
def _grey_picture(width: int, height: int) -> str:
    stream = io.BytesIO()
    PIL.Image.new("L", (width, height), GREY).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


BEFORE = Path("eval") / "guard-step-000000"
"""In a run folder: the guard's report before training."""

ROUNDING = 1e-9
"""A fall from 0.90 to 0.88 is one of 0.02, whatever binary fractions make of it."""


@dataclass(frozen=True)
class GuardVerdict:
    """`drop` is how much worse the figure became; negative where it got better. `has_fallen`:
    whether that is more than is allowed."""

    metric: str
    before: float
    after: float
    drop: float
    max_drop: float
    has_fallen: bool

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        change = "forgotten: " if self.has_fallen else ""
        return (
            f"{change}guard {self.metric} {self.before:.4f} before training, {self.after:.4f} "
            f"after; it may get worse by at most {self.max_drop:g}"
        )


def guard_verdict(before: float, after: float, *, metric: str, max_drop: float) -> GuardVerdict:
    """Whether `metric` fell by more than `max_drop`; a figure that is better where it is lower (a
    loss, a rank) must not rise by more."""
    drop = after - before if is_lower_better(metric) else before - after
    has_fallen = drop > max_drop + ROUNDING
    return GuardVerdict(metric, before, after, drop, max_drop, has_fallen)


def guard_section(section: EvalSection) -> EvalSection:
    """How the guard's set is evaluated: its own task and metric, everything else as in `eval`."""
    guard = section.guard
    assert guard is not None
    # A figure (bleu_4) need not be a metric's name (bleu); then the task's own metrics have it.
    metrics = [guard.metric] if guard.metric in METRICS else []
    return section.model_copy(update={"task": guard.task, "metrics": metrics, "guard": None})


def guarded_metric(metrics: Mapping[str, object], name: str | None) -> str:
    """The figure that must not fall: `name`, or the first of `metrics`.

    Raises VlmtuneError where there is no such figure.
    """
    if name is None and metrics:
        return next(iter(metrics))
    if name is None or name not in metrics:
        close = None if name is None else nearest(name, metrics)
        raise VlmtuneError(
            "eval.guard.metric is not measured on the guard's data"
            + (f"; did you mean '{close}'?" if close else ""),
            got=repr(name),
            expected=" or ".join(metrics) or "a metric that applies to at least one sample",
        )
    return name


def read_figures(folder: Path) -> dict[str, float] | None:
    """The figures in a report's `metrics.json`; None where there is no report."""
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        return {name: float(interval["value"]) for name, interval in metrics.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VlmtuneError("not a report of an evaluation", file=path, got=str(error)) from error
