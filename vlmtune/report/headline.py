"""The page's summary: did the run learn, what is still wrong, what was skipped or forgotten?"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import PydanticUndefined

from vlmtune.errors import VlmtuneError, plural
from vlmtune.evaluation.guard import guard_verdict, guarded_metric
from vlmtune.evaluation.metrics.base import Interval, Mean, bootstrap_intervals
from vlmtune.recipe.explain import section_of, walk_keys
from vlmtune.recipe.yaml import parse_yaml
from vlmtune.report.format import Figure, format_name, number, sentence, short_number
from vlmtune.report.gallery import clipped, mixups, worst_slices
from vlmtune.report.run import Evaluation, Pair, RunRecord, is_right, row_key

NO_DEFAULT = "required"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Difference:
    """A dotted key, its value and its default as text, and what the key means."""

    key: str
    value: str
    default: str
    meaning: str


def parse_recipe(text: str | None) -> dict[str, Any] | None:
    """The values of a resolved recipe as they stand, unchecked; None where it cannot be read.

    Not validated: a run of another version may have keys that this one does not know.
    """
    if text is None:
        return None
    try:
        document, errors = parse_yaml(text, file="recipe.resolved.yaml")
    except VlmtuneError:
        return None
    return document.value if not errors and isinstance(document.value, dict) else None


def differences(values: dict[str, Any]) -> list[Difference]:
    """The keys of `values` that differ from their defaults, in the schema's order; keys that the
    schema does not know come last."""
    known = dict(walk_keys())
    sections = {key for key, info in known.items() if section_of(info.annotation) is not None}
    given = dict(_flat(values, sections))
    found = []
    for key, info in known.items():
        if key not in given:
            continue
        default = info.get_default(call_default_factory=True)
        if key in sections and given[key] is None:
            continue  # a section that is absent, which is its default
        if default is PydanticUndefined:
            found.append(Difference(key, _shown(given[key]), NO_DEFAULT, info.description or ""))
        elif given[key] != default:
            found.append(
                Difference(key, _shown(given[key]), _shown(default), info.description or "")
            )
    found += [
        Difference(key, _shown(value), UNKNOWN, "this version has no such key")
        for key, value in given.items()
        if key not in known
    ]
    return found


def value_at(values: dict[str, Any] | None, key: str) -> Any:
    """The value of a dotted key, or None."""
    holder: Any = values
    for name in key.split("."):
        holder = holder.get(name) if isinstance(holder, dict) else None
    return holder


def _flat(values: dict[str, Any], sections: set[str], prefix: str = "") -> Iterator[tuple]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in sections and isinstance(value, dict):
            yield from _flat(value, sections, f"{key}.")
        else:
            yield key, value


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


SAME = 1e-6
"""A figure this close to the mean of the scores counts as their mean."""


def difference(pair: Pair, name: str) -> Interval | None:
    """The mean of `after - before` of a figure over the samples of both, with its paired 95 %
    interval (resampled by picture); None where the figure is not a mean of scores."""
    if pair.before is None or pair.after is None:
        return None
    before = {row_key(row): row for row in pair.before.rows}
    changes, clusters = [], []
    for row in pair.after.rows:
        old, new = _score(before.get(row_key(row)), name), _score(row, name)
        if old is None or new is None:
            continue
        changes.append(new - old)
        clusters.append(tuple(row.get("images") or ()) or (str(row.get("id")),))
    if not changes or not all(_is_mean(e, name) for e in (pair.before, pair.after)):
        return None
    sums = np.array([(change, 1.0) for change in changes])
    mean = Mean(name, lambda _: None)
    return bootstrap_intervals(sums, figures=mean.figures, clusters=clusters, seed=0)[name]


def apart(before: Figure, after: Figure, sign: int) -> tuple[float, float]:
    """The smallest and the largest gap between the two intervals; positive means better."""
    lows = [f.value if f.low is None else f.low for f in (before, after)]
    highs = [f.value if f.high is None else f.high for f in (before, after)]
    if sign < 0:
        return lows[0] - highs[1], highs[0] - lows[1]
    return lows[1] - highs[0], highs[1] - lows[0]


def _score(row: Mapping[str, Any] | None, name: str) -> float | None:
    scores = None if row is None else row.get("scores")
    direction = None if row is None else row.get("direction")
    if direction is not None:  # figures name their direction, the scores of a row do not
        name = name.removeprefix(f"{direction}_")
    return number(scores.get(name)) if isinstance(scores, dict) else None


def _is_mean(evaluation: Evaluation, name: str) -> bool:
    scores = [s for row in evaluation.rows if (s := _score(row, name)) is not None]
    return bool(scores) and abs(float(np.mean(scores)) - evaluation.figures[name].value) < SAME


MAX_REASONS = 8


@dataclass(frozen=True)
class Finding:
    """`tone` is `good`, `bad` or `plain`; `answer` is a short sentence, `details` support it."""

    question: str
    tone: str
    answer: str
    details: tuple[str, ...] = ()


def findings(
    record: RunRecord,
    recipe: Mapping[str, Any] | None,
    *,
    pair: Pair,
    widest: Evaluation | None,
    guard: Pair,
) -> list[Finding]:
    """The four answers, in the order of the page. `widest` is the evaluation with the most samples:
    it shows best what is still wrong."""
    return [
        _learned(record, pair, widest),
        _still_wrong(widest),
        _skipped(record),
        _forgotten(recipe, guard),
    ]


def grouped_reasons(skipped: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Why samples were skipped, without file, line and value; most frequent first."""
    counts = Counter(_reason(entry) for entry in skipped)
    return counts.most_common(MAX_REASONS)


def loss_course(
    record: RunRecord, name: str = "loss", *, until: float = math.inf
) -> tuple[float, float] | None:
    """The first and the last value logged up to step `until`; None with fewer than two."""
    lines = [line for line in record.lines if line["step"] <= until]
    values = [v for line in lines if (v := number(line.get(name))) is not None]
    return (values[0], values[-1]) if len(values) > 1 else None


def _learned(record: RunRecord, pair: Pair, widest: Evaluation | None) -> Finding:
    question = "Did it learn?"
    best = (record.summary or {}).get("best")
    best_step = number(best.get("step")) if isinstance(best, dict) else None
    until = math.inf if best_step is None else best_step
    details = tuple(
        f"{what} went from {short_number(course[0])} to {short_number(course[1])}."
        for name, what in (("loss", "Training loss"), ("eval_loss", "Held-out loss"))
        if (course := loss_course(record, name, until=until)) is not None
    )
    if isinstance(best, dict):
        details += (
            f"The result is from step {best.get('step')}, the best by {best.get('metric')}.",
        )
    name = pair.main_figure
    if name is None or pair.shown is None:
        told = "No answers were evaluated" + ("; only the loss is known." if details else " yet.")
        return Finding(question, "plain", told, details)
    if pair.before is None or pair.after is None:
        figure = pair.shown.figures[name]
        when = "after" if pair.before is None else "before"
        missing = "before training" if pair.before is None else "after it"
        return Finding(
            question,
            "plain",
            f"{sentence(format_name(name))} is {_value(figure)} {when} training; nothing was "
            f"measured {missing}.",
            details,
        )
    before, after = pair.before.figures[name], pair.after.figures[name]
    change = difference(pair, name)
    sign = -1 if after.lower_is_better else 1
    if change is not None:
        low, high = sorted((sign * change.low, sign * change.high))
        details = (f"The difference is {_change(change, after)}.", *details)
    else:
        low, high = apart(before, after, sign)
    details = (*details, *_other_way(pair, name), *_measured_on_more(pair, widest, name))
    if not pair.has_same_samples:
        details = (*details, "The two evaluations did not use the same samples.")
    verdict, tone = (
        ("Yes.", "good")
        if low > 0
        else ("It got worse.", "bad")
        if high < 0
        else ("No clear change.", "plain")
    )
    told = f"{verdict} {sentence(format_name(name))} went from {before.text} to {_value(after)}."
    return Finding(question, tone, told, details)


def _still_wrong(shown: Evaluation | None) -> Finding:
    question = "What does it still get wrong?"
    name = None if shown is None else shown.main_figure
    if shown is None or name is None:
        return Finding(question, "plain", "Not known: no answers were evaluated.")
    judged = [right for row in shown.rows if (right := is_right(row)) is not None]
    details = []
    if judged:
        wrong = judged.count(False)
        verb = "is" if wrong == 1 else "are"
        details.append(f"{wrong:,} of {plural(len(judged), 'prediction')} {verb} wrong.")
    if found := mixups(shown):
        worst = found[0]
        details.append(
            f"Most frequent: “{worst.answered}” where “{worst.right}” is right "
            f"({plural(worst.count, 'time')})."
        )
    slices = worst_slices(shown, name)
    if not slices:
        return Finding(question, "plain", details.pop(0) if details else "Not known.", (*details,))
    imperfect = [(kind, f) for kind, f in slices if not f.is_share or f.value < 1]
    words = [f"{format_name(kind)} ({f.text})" for kind, f in (imperfect or slices)[:3]]
    tone = "plain"
    told = "Worst on " + ", then ".join(words) + "."
    if judged and not judged.count(False):
        told, tone = "Nothing that was measured.", "good"
    return Finding(question, tone, told, tuple(details))


def _skipped(record: RunRecord) -> Finding:
    question = "Was anything skipped?"
    reasons = grouped_reasons(record.skipped)
    details = [f"{plural(count, 'sample')}: {clipped(reason)}" for reason, count in reasons]
    notes = (record.summary or {}).get("notes")
    if isinstance(notes, dict):
        details += [f"{plural(count, 'sample')}: {note}" for note, count in notes.items()]
    details += [
        f"{plural(count, 'line')} of {name} could not be read"
        for name, count in record.unreadable.items()
    ]
    if not record.skipped:
        told = "No." if record.lines else "Not so far."
        return Finding(question, "plain" if details else "good", told, tuple(details))
    told = f"Yes, training left out {plural(len(record.skipped), 'sample')}."
    return Finding(question, "bad", told, tuple(details))


def _forgotten(recipe: Mapping[str, Any] | None, guard: Pair) -> Finding:
    question = "Did it forget?"
    section = value_at(dict(recipe or {}), "eval.guard")
    if not isinstance(section, dict):
        return Finding(question, "plain", "Not measured: the recipe has no eval.guard.")
    if guard.before is None or guard.after is None:
        when = "before training" if guard.before is None else "after training"
        return Finding(question, "plain", f"Not known: the guard was not measured {when}.")
    allowed = number(section.get("max_drop"))
    try:
        name = guarded_metric(guard.after.figures, section.get("metric"))
    except VlmtuneError as error:
        return Finding(question, "plain", f"Not known: {error.message}.")
    if name not in guard.before.figures or allowed is None:
        return Finding(question, "plain", f"Not known: {name} was not measured before training.")
    before, after = guard.before.figures[name], guard.after.figures[name]
    if before.value == 0 and not before.lower_is_better:
        told = (
            f"There was nothing to forget: {format_name(name)} was {before.text} before training."
        )
        return Finding(question, "plain", told)
    verdict = guard_verdict(before.value, after.value, metric=name, max_drop=allowed)
    change = f"went from {before.text} to {_value(after)}"
    told = f"{sentence(format_name(name))} on the guard's data {change}."
    limit = f"{100 * allowed:g} points" if after.is_share else short_number(allowed)
    details = (f"The recipe allows it to get worse by at most {limit}.",)
    if verdict.has_fallen:
        return Finding(question, "bad", f"Yes, more than allowed. {told}", details)
    return Finding(question, "good", f"No, the guard held. {told}", details)


def _other_way(pair: Pair, name: str) -> list[str]:
    """Retrieval: the same figure of the other direction."""
    other = name.replace("picture_to_text_", "text_to_picture_")
    if pair.before is None or pair.after is None or other == name:
        return []
    before, after = pair.before.figures.get(other), pair.after.figures.get(other)
    if before is None or after is None:
        return []
    return [f"{sentence(format_name(other))} went from {before.text} to {_value(after)}."]


def _measured_on_more(pair: Pair, widest: Evaluation | None, name: str) -> list[str]:
    """The figure on more samples, and what guessers score that never see the picture."""
    if widest is None or name not in widest.figures:
        return []
    told = [
        f"Without the pictures ({format_name(guesser)}): {of[name].text}."
        for guesser, of in widest.blind.items()
        if name in of
    ]
    if widest is not pair.after:
        count = plural(widest.num_samples, "sample")
        told.insert(0, f"Over {count} ({widest.label}): {_value(widest.figures[name])}.")
    return told


def _value(figure: Figure) -> str:
    return figure.text + (f" ({figure.interval})" if figure.interval else "")


def _change(change: Interval, figure: Figure) -> str:
    scale, unit, form = (100, " points", "{:+.1f}") if figure.is_share else (1, "", "{:+.3g}")
    value, low, high = (form.format(scale * x) for x in (change.value, change.low, change.high))
    return f"{value}{unit} ({low} to {high}, paired on {plural(change.count, 'sample')})"


def _reason(entry: Mapping[str, Any]) -> str:
    """`FILE:LINE: what is wrong; got: …` -> `what is wrong`."""
    reason = str(entry.get("reason") or "no reason given")
    place = f"{entry.get('file')}:{entry.get('line')}: "
    return re.split(r"; (?:got|expected|do): ", reason.removeprefix(place))[0]
