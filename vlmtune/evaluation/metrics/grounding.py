"""Grounding: does the box in the answer overlap the reference's box by half?

Intersection over union as in PASCAL VOC (Everingham et al. 2010, section 4.2); `box_accuracy` is
the share of answers with an IoU of at least 0.5, the figure of referring expression comprehension
(RefCOCO, Yu et al. 2016, arXiv 1608.00272); best over references.

A box is the first that the text has, in one of the forms

    [x1, y1, x2, y2]    (x1, y1), (x2, y2)    [[x1, y1], [x2, y2]]    <box>x1, y1, x2, y2</box>

also inside tags or JSON, or four numbers and nothing else. A text with several boxes is judged by
the first; three or more points in a row are a polygon, not a box. An answer without a box has IoU 0
and counts in `box_unparsed`.

What to know:
- The numbers are compared as they are: prediction and reference must be in the same frame (pixels,
  0 to 1, or 0 to 1000). Nothing is scaled.
- x2 and y2 are the far edges, not width and height; corners may come in any order.
- Forms in which y comes first, or that write numbers as location tokens, are not read.
Deviations: areas are continuous, (x2 - x1) * (y2 - y1); VOC's script counts pixels and adds 1 to
each side. VOC wants more than 0.5, here and in the scripts for RefCOCO 0.5 is enough.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlmtune.evaluation.metrics.base import Answered, Floats, Statistics, divided

THRESHOLD = 0.5

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_COMMA = r"(?:\s*,\s*|\s+)"
_PAIR = rf"{_NUMBER}{_COMMA}{_NUMBER}"
_FLAT = rf"{_PAIR}{_COMMA}{_PAIR}"
_POINT = rf"[\[(]\s*{_PAIR}\s*[\])]"
_TAG = r"<[^<>]*>"
_BOX = re.compile(
    rf"[\[(]\s*{_FLAT}\s*[\])]"
    rf"|{_POINT}(?:\s*,?\s*{_POINT})+"
    rf"|<[^<>]*box[^<>]*>\s*{_FLAT}\s*{_TAG}"
    rf"|^\s*{_FLAT}\s*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Box:
    """A rectangle with x1 <= x2 and y1 <= y2."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def area(self) -> float:
        return (self.x2 - self.x1) * (self.y2 - self.y1)


def grounding_statistics(samples: Sequence[Answered]) -> list[Statistics | None]:
    """Answers with an IoU of at least 0.5, the IoU, answers without a box, answers."""
    return [_statistics_of(sample) for sample in samples]


def grounding_figures(sums: Floats) -> dict[str, Floats]:
    return {
        "box_accuracy": divided(sums[..., 0], sums[..., 3]),
        "mean_iou": divided(sums[..., 1], sums[..., 3]),
        "box_unparsed": divided(sums[..., 2], sums[..., 3]),
    }


def parse_box(text: str) -> Box | None:
    """The first box in `text`; None where there is none."""
    for found in _BOX.finditer(text):
        numbers = [float(number) for number in re.findall(_NUMBER, re.sub(_TAG, " ", found[0]))]
        if len(numbers) == 4:
            x1, y1, x2, y2 = numbers
            return Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    return None


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0.0 where both boxes are empty."""
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    shared = max(width, 0.0) * max(height, 0.0)
    union = a.area + b.area - shared
    return shared / union if union > 0 else 0.0


def _statistics_of(sample: Answered) -> Statistics | None:
    references = [box for text in sample.references if (box := parse_box(text)) is not None]
    if not references:
        return None
    given = parse_box(sample.prediction)
    best = 0.0 if given is None else max(iou(given, box) for box in references)
    is_right = float(best >= THRESHOLD)
    return Statistics(is_right, (is_right, best, float(given is None), 1.0))
