"""The answers that a reader wants within a minute: learned? still wrong? skipped? forgotten?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.guard import guard_verdict, guarded_metric
from vlmtune.evaluation.metrics.base import Mean
from vlmtune.evaluation.metrics.bootstrap import Interval, bootstrap_intervals
from vlmtune.report.evaluations import Evaluation, Pair, is_right, row_key
from vlmtune.report.figures import Figure, number, plural, sentence, short_number, spoken
from vlmtune.report.mistakes import mixups, worst_slices
from vlmtune.report.recipe_diff import value_at
from vlmtune.report.run import RunRecord

SAME = 1e-6
"""How far the mean of the scores may be from a figure that is their mean."""
MAX_REASONS = 8


@dataclass(frozen=True)
class Finding:
    """`tone` is `good`, `bad` or `plain`; `answer` is a short sentence, `details` what backs it."""

    question: str
    tone: str
    answer: str
    details: tuple[str, ...] = ()


def findings(
    record: RunRecord, recipe: Mapping[str, Any] | None, pair: Pair, guard: Pair
) -> list[Finding]:
    """The four answers, in the order of the page."""
    return [
        _learned(record, pair),
        _still_wrong(pair),
        _skipped(record),
        _forgotten(recipe, guard),
    ]


def difference(pair: Pair, name: str) -> Interval | None:
    """The mean of `after - before` of a figure over the samples of both, with its paired 95 %
    interval (pictures resampled as wholes); None where the figure is no mean of scores."""
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


def grouped_reasons(skipped: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Why samples were skipped, without places and values, most frequent first."""
    counts = Counter(_reason(entry) for entry in skipped)
    return counts.most_common(MAX_REASONS)


def loss_course(record: RunRecord, name: str = "loss") -> tuple[float, float] | None:
    """The first and the last logged value; None with fewer than two."""
    values = [v for line in record.lines if (v := number(line.get(name))) is not None]
    return (values[0], values[-1]) if len(values) > 1 else None


def _learned(record: RunRecord, pair: Pair) -> Finding:
    question = "Did it learn?"
    details = tuple(
        f"{what} went from {short_number(course[0])} to {short_number(course[1])}."
        for name, what in (("loss", "Training loss"), ("eval_loss", "Held-out loss"))
        if (course := loss_course(record, name)) is not None
    )
    best = (record.summary or {}).get("best")
    if isinstance(best, dict):
        details += (f"The result is step {best.get('step')}'s, the best by {best.get('metric')}.",)
    name = pair.main_figure
    if name is None or pair.shown is None:
        told = "No answers were evaluated" + (", only the loss is known." if details else " yet.")
        return Finding(question, "plain", told, details)
    if pair.before is None or pair.after is None:
        figure = pair.shown.figures[name]
        when = "after" if pair.before is None else "before"
        missing = "before training" if pair.before is None else "after it"
        return Finding(
            question,
            "plain",
            f"{sentence(spoken(name))} is {_value(figure)} {when} training; nothing was measured "
            f"{missing}.",
            details,
        )
    before, after = pair.before.figures[name], pair.after.figures[name]
    change = difference(pair, name)
    sign = -1 if after.lower_is_better else 1
    if change is not None:
        low, high = sorted((sign * change.low, sign * change.high))
        details = (f"The difference is {_change(change, after)}.", *details)
    else:
        low, high = _apart(before, after, sign)
    details = (*details, *_guessed(pair.after, name))
    if not pair.has_same_samples:
        details = (*details, "The two were measured on different choices of the data.")
    verdict, tone = (
        ("Yes.", "good")
        if low > 0
        else ("It got worse.", "bad")
        if high < 0
        else ("No clear change.", "plain")
    )
    told = f"{verdict} {sentence(spoken(name))} went from {before.text} to {_value(after)}."
    return Finding(question, tone, told, details)


def _still_wrong(pair: Pair) -> Finding:
    question = "On what is it still wrong?"
    shown, name = pair.shown, pair.main_figure
    if shown is None or name is None:
        return Finding(question, "plain", "Not known: no answers were evaluated.")
    judged = [right for row in shown.rows if (right := is_right(row)) is not None]
    details = []
    if judged:
        wrong = judged.count(False)
        details.append(f"{wrong:,} of {plural(len(judged), 'prediction')} are wrong.")
    if found := mixups(shown):
        worst = found[0]
        details.append(
            f"Most often: “{worst.answered}” where “{worst.right}” was right "
            f"({plural(worst.count, 'time')})."
        )
    slices = worst_slices(shown, name)
    if not slices:
        return Finding(question, "plain", details.pop(0) if details else "Not known.", (*details,))
    words = [f"{spoken(kind)} ({figure.text})" for kind, figure in slices[:3]]
    tone = "plain"
    told = "Worst on " + ", then ".join(words) + "."
    if judged and not judged.count(False):
        told, tone = "On nothing that was measured.", "good"
    return Finding(question, tone, told, tuple(details))


def _skipped(record: RunRecord) -> Finding:
    question = "Was anything skipped?"
    details = [f"{plural(n, 'sample')}: {reason}" for reason, n in grouped_reasons(record.skipped)]
    notes = (record.summary or {}).get("notes")
    if isinstance(notes, dict):
        details += [f"{plural(count, 'sample')}: {note}" for note, count in notes.items()]
    details += [
        f"{plural(count, 'line')} of {name} could not be read"
        for name, count in record.unreadable.items()
    ]
    if not record.skipped:
        told = "No, nothing." if record.lines else "Nothing so far."
        return Finding(question, "plain" if details else "good", told, tuple(details))
    told = f"Yes, {plural(len(record.skipped), 'sample')} were not trained on."
    return Finding(question, "bad", told.replace("1 sample were", "1 sample was"), tuple(details))


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
    verdict = guard_verdict(before.value, after.value, metric=name, max_drop=allowed)
    told = (
        f"{sentence(spoken(name))} on the guard's data went from {before.text} to {_value(after)}."
    )
    limit = f"{100 * allowed:g} points" if after.is_share else short_number(allowed)
    details = (f"At most {limit} worse is allowed.",)
    if verdict.has_fallen:
        return Finding(question, "bad", f"Yes, too much. {told}", details)
    return Finding(question, "good", f"No, the guard held. {told}", details)


def _guessed(evaluation: Evaluation, name: str) -> list[str]:
    """What guessers score that never see the picture."""
    return [
        f"Without seeing a picture ({spoken(guesser)}): {of[name].text}."
        for guesser, of in evaluation.blind.items()
        if name in of
    ]


def _value(figure: Figure) -> str:
    return figure.text + (f" ({figure.interval})" if figure.interval else "")


def _change(change: Interval, figure: Figure) -> str:
    scale, unit, form = (100, " points", "{:+.1f}") if figure.is_share else (1, "", "{:+.3g}")
    value, low, high = (form.format(scale * x) for x in (change.value, change.low, change.high))
    return f"{value}{unit} ({low} to {high}, paired on {plural(change.count, 'sample')})"


def _apart(before: Figure, after: Figure, sign: int) -> tuple[float, float]:
    """How far the two intervals are apart at least and at most; the better way is up."""
    lows = [f.value if f.low is None else f.low for f in (before, after)]
    highs = [f.value if f.high is None else f.high for f in (before, after)]
    if sign < 0:
        return lows[0] - highs[1], highs[0] - lows[1]
    return lows[1] - highs[0], highs[1] - lows[0]


def _score(row: Mapping[str, Any] | None, name: str) -> float | None:
    scores = None if row is None else row.get("scores")
    direction = None if row is None else row.get("direction")
    if direction is not None:  # the figures of both directions stand side by side, a row's do not
        name = name.removeprefix(f"{direction}_")
    return number(scores.get(name)) if isinstance(scores, dict) else None


def _is_mean(evaluation: Evaluation, name: str) -> bool:
    scores = [s for row in evaluation.rows if (s := _score(row, name)) is not None]
    return bool(scores) and abs(float(np.mean(scores)) - evaluation.figures[name].value) < SAME


def _reason(entry: Mapping[str, Any]) -> str:
    """`FILE:LINE: what is wrong; got: …` -> `what is wrong`."""
    reason = str(entry.get("reason") or "no reason given")
    place = f"{entry.get('file')}:{entry.get('line')}: "
    return re.split(r"; (?:got|expected|do): ", reason.removeprefix(place))[0]
