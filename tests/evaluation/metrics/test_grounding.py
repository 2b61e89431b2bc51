import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from vlmtune.evaluation.metrics import grounding
from vlmtune.evaluation.metrics.base import Answered
from vlmtune.evaluation.metrics.grounding import Box, iou, parse_box


@pytest.mark.parametrize(
    "text",
    [
        "[10, 20, 30, 40]",
        "[10,20,30,40]",
        "(10 20 30 40)",
        "(10,20),(30,40)",
        "(10, 20), (30, 40)",
        "[[10, 20], [30, 40]]",
        "[[10, 20, 30, 40]]",
        "<box>10, 20, 30, 40</box>",
        "<box_1>10 20 30 40</box_1>",
        "<box>(10,20),(30,40)</box>",
        "<ref>the cat</ref><box>(10,20),(30,40)</box> and <box>(1,2),(3,4)</box>",
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(10,20),(30,40)<|box_end|>",
        '```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "cat"}]\n```',
        "The 2 cats are at [10.0, 20., +30, 40].",
        "10, 20, 30, 40",
        "[30, 40, 10, 20]",
        "[10, 40, 30, 20]",
    ],
)
def test_the_first_box_of_a_text(text: str) -> None:
    assert parse_box(text) == Box(10, 20, 30, 40)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "[10, 20, 30]",
        "[10, 20, 30, 40, 50]",
        "(10, 20)",
        "[[10, 20], [30, 20], [30, 40], [10, 40]]",  # a polygon
        "10 of 20, 30 or 40",
        "[x1, y1, x2, y2]",
    ],
)
def test_what_is_not_a_box(text: str) -> None:
    assert parse_box(text) is None


def test_iou_by_hand() -> None:
    square = Box(0, 0, 10, 10)
    assert iou(square, square) == 1.0
    assert iou(square, Box(5, 0, 15, 10)) == 50 / 150
    assert iou(square, Box(0, 0, 10, 5)) == 0.5  # with a pixel more a side: 66 / 121
    assert iou(square, Box(10, 0, 20, 10)) == 0.0
    assert iou(Box(1, 1, 1, 1), Box(1, 1, 1, 1)) == 0.0


def test_iou_is_torchvisions() -> None:
    numbers = np.random.default_rng(0).uniform(0, 10, size=(2, 40, 4))
    corners = np.concatenate(
        [
            np.minimum(numbers[..., :2], numbers[..., 2:]),
            np.maximum(numbers[..., :2], numbers[..., 2:]),
        ],
        axis=-1,
    )
    theirs = box_iou(*torch.from_numpy(corners)).diagonal()
    ours = [iou(Box(*a), Box(*b)) for a, b in zip(*corners.tolist())]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-12)
    assert sum(value > 0 for value in ours) > 10


def test_figures_by_hand() -> None:
    reference = "[0, 0, 10, 10]"
    samples = [
        Answered("[0, 0, 10, 10]", reference),  # 1
        Answered("[0, 0, 10, 5]", reference),  # 0.5, which is enough
        Answered("[5, 0, 15, 10]", reference),  # 1 / 3
        Answered("there", reference),  # 0
        Answered("[0, 0, 1, 1]", None, (reference, "[0, 0, 1, 1]")),  # 1: the best reference
        Answered("[0, 0, 1, 1]", "left"),  # no box to compare with
    ]
    entries = grounding.grounding_statistics(samples)
    assert [entry and entry.score for entry in entries] == [1.0, 1.0, 0.0, 0.0, 1.0, None]
    figures = grounding.grounding_figures(
        np.sum([entry.sums for entry in entries if entry], axis=0)
    )
    assert figures["box_accuracy"] == pytest.approx(3 / 5)
    assert figures["mean_iou"] == pytest.approx((1 + 0.5 + 1 / 3 + 0 + 1) / 5)
    assert figures["box_unparsed"] == pytest.approx(1 / 5)
