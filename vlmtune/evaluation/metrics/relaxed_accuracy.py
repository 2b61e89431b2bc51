"""Relaxed accuracy: a number may be 5 % off, a text must be the same.

Masry et al. 2022 (ChartQA, arXiv 2203.10244), end of section 5.1, after Methani et al. 2020; in the
form of pix2struct's `relaxed_correctness`, which the published figures use. Best over references:

- Prediction and reference are both numbers, the reference not 0: right if they differ by at most
  5 % of the reference. "12 %" is 0.12, so that "12" is not within 5 % of it.
- Otherwise: right if the texts are the same in lower case. "1,000" is a text, not a number.

Deviations: space around the texts, and before the percent sign, is ignored; "nan", "inf" and
"1_000" are texts.
"""

from __future__ import annotations

import math

from vlmtune.evaluation.metrics.base import Answered

TOLERANCE = 0.05


def relaxed_accuracy(sample: Answered) -> float | None:
    """1.0 or 0.0; None where the sample has no reference."""
    if not sample.references:
        return None
    return float(any(_is_right(sample.prediction, reference) for reference in sample.references))


def _is_right(given: str, reference: str) -> bool:
    value, target = _number(given), _number(reference)
    if value is None or not target:
        return given.strip().lower() == reference.strip().lower()
    return abs(value - target) / abs(target) <= TOLERANCE


def _number(text: str) -> float | None:
    text = text.strip()
    digits = text.rstrip("%")
    try:
        value = float(digits) if "_" not in digits else math.nan
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100 if digits != text else value
