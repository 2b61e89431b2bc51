"""Classification: accuracy, and F1 averaged over the classes.

The classes are the references' (normalised as in `normalize.py`; the consensus where a sample has
several). For class k with right_k answers, given_k answers and wanted_k references of that class:

    F1_k = 2 right_k / (given_k + wanted_k);    macro-F1 = mean of F1_k over the classes

as in Sokolova & Lapalme 2009 (10.1016/j.ipm.2009.03.002), in the form that averages the classes' F1
(scikit-learn's `average="macro"`), not the F1 of averaged precision and recall.

An answer that is none of the classes is wrong and counts in `class_unparsed`.

What to know: scikit-learn also averages over classes that were only predicted; here an answer
outside the classes lowers its reference's F1 but is no class of its own. In a slice or a resample
the mean is over the classes that occur there as references. A class is the whole answer: "a cat."
is "cat", "It is a cat" is not.

Letters for shapes: C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmtune.evaluation.metrics.base import Answered, Floats, Statistics, divided
from vlmtune.evaluation.metrics.exact_match import accepted_answers
from vlmtune.evaluation.metrics.normalize import normalize_answer


def statistics(samples: Sequence[Answered]) -> list[Statistics | None]:
    """right_1 … right_C, given_1 … given_C, wanted_1 … wanted_C, answers outside the classes.

    A sample without a reference, or with several equally frequent ones, does not count.
    """
    wanted = [_only(accepted_answers(sample)) for sample in samples]
    numbers = {name: number for number, name in enumerate(sorted({n for n in wanted if n}))}
    known: dict[tuple[int, int | None], Statistics] = {}
    entries: list[Statistics | None] = []
    for sample, name in zip(samples, wanted):
        if not name:
            entries.append(None)
            continue
        outcome = (numbers[name], numbers.get(normalize_answer(sample.prediction)))
        if outcome not in known:  # at most C * (C + 1) of them, each with 3 C numbers
            known[outcome] = _statistics_of(*outcome, num_classes=len(numbers))
        entries.append(known[outcome])
    return entries


def figures(sums: Floats) -> dict[str, Floats]:
    num_classes = (sums.shape[-1] - 1) // 3
    right, given, wanted = (
        sums[..., part * num_classes : (part + 1) * num_classes] for part in range(3)
    )
    count = wanted.sum(axis=-1)
    f1 = np.where(wanted > 0, np.nan_to_num(divided(2 * right, given + wanted)), 0.0)
    return {
        "class_accuracy": divided(right.sum(axis=-1), count),
        "macro_f1": divided(f1.sum(axis=-1), (wanted > 0).sum(axis=-1).astype(float)),
        "class_unparsed": divided(sums[..., -1], count),
    }


def _statistics_of(wanted: int, given: int | None, *, num_classes: int) -> Statistics:
    sums = [0.0] * (3 * num_classes + 1)
    sums[2 * num_classes + wanted] = 1.0
    if given is None:
        sums[-1] = 1.0
    else:
        sums[num_classes + given] = 1.0
        sums[given] = float(given == wanted)
    return Statistics(float(given == wanted), tuple(sums))


def _only(names: set[str]) -> str | None:
    return next(iter(names)) if len(names) == 1 else None
