"""How far a figure is from what it was: paired on the samples, or else by the two intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmtune.evaluation.metrics.base import Mean
from vlmtune.evaluation.metrics.bootstrap import Interval, bootstrap_intervals
from vlmtune.report.evaluations import Evaluation, Pair, row_key
from vlmtune.report.figures import Figure, number

SAME = 1e-6
"""How far the mean of the scores may be from a figure that is their mean."""


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


def apart(before: Figure, after: Figure, sign: int) -> tuple[float, float]:
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
