"""Yes or no: accuracy, precision, recall and F1 of "yes", and how often "yes" is said.

Li et al. 2023 (POPE, arXiv 2305.10355), section 5.2. Applies to samples whose reference is yes or
no. POPE's script reads an answer so: of the text up to the first period, without commas, split at
spaces, "no" if one of the words is "No", "no" or "not", else "yes".

Deviations:
- An answer without a "no" is a "yes" for the script whatever it says ("a dog", an empty text). Here
  it must have the word "yes". An answer that is neither is wrong and counts in `yes_no_unparsed`:
  not as a "yes", so that precision and `yes_fraction` do not see it, but as a "yes" that was missed
  where "yes" was right.
- Words are compared in lower case and without the marks around them ("No!", "NO"); "n't" at the end
  of a word counts as "not".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from vlmtune.evaluation.metrics.base import Answered, Floats, Statistics, divided
from vlmtune.evaluation.metrics.exact_match import accepted_answers

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


def statistics(samples: Sequence[Answered]) -> list[Statistics | None]:
    """Right and wrong "yes", missed "yes", right "no", answers that are neither, answers."""
    return [_statistics_of(sample) for sample in samples]


def figures(sums: Floats) -> dict[str, Floats]:
    right_yes, wrong_yes, missed_yes, right_no, unparsed, count = (
        sums[..., number] for number in range(6)
    )
    return {
        "yes_no_accuracy": divided(right_yes + right_no, count),
        "yes_no_precision": divided(right_yes, right_yes + wrong_yes),
        "yes_no_recall": divided(right_yes, right_yes + missed_yes),
        "yes_no_f1": divided(2 * right_yes, 2 * right_yes + wrong_yes + missed_yes),
        "yes_fraction": divided(right_yes + wrong_yes, count),
        "yes_no_unparsed": divided(unparsed, count),
    }


def parse_yes_no(text: str) -> Literal["yes", "no"] | None:
    """What the first sentence of `text` says; None where it says neither."""
    words = _WORD.findall(text.replace("\u2019", "'").lower().partition(".")[0])
    if any(word in ("no", "not") or word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else None


def _statistics_of(sample: Answered) -> Statistics | None:
    accepted = accepted_answers(sample)
    if accepted not in ({"yes"}, {"no"}):
        return None
    said = parse_yes_no(sample.prediction)
    is_right = said in accepted
    outcomes = (
        is_right and said == "yes",
        not is_right and said == "yes",
        not is_right and "yes" in accepted,
        is_right and said == "no",
        said is None,
        True,
    )
    return Statistics(float(is_right), tuple(float(outcome) for outcome in outcomes))
