"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the merger inside the vision tower is the connector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vlmtune.models.family import Family

LANGUAGE_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LANGUAGE_MLP = ("gate_proj", "up_proj", "down_proj")
VISION_ATTENTION = ("qkv", "proj")


def window_order(backbone: Any, media: Mapping[str, Tensor]) -> Tensor:
    """Where each place's row is in the output of Qwen2.5-VL's merger, (rows,) int64: the tower
    attends in windows and has the rows window by window."""
    (grid,) = (tensor for name, tensor in media.items() if name.endswith("_grid_thw"))
    visual = backbone.visual
    index, _ = get_vision_window_index(
        grid,
        spatial_merge_size=visual.spatial_merge_size,
        window_size=visual.window_size,
        patch_size=visual.patch_size,
    )
    return torch.argsort(index)


QWEN2_VL = Family(
    name="Qwen2-VL",
    model_types=("qwen2_vl",),
    parts={
        "vision": ("model.visual",),
        "connector": ("model.visual.merger",),
        "language": ("model.language_model",),
        "lm_head": ("lm_head",),
    },
    attention={"vision": VISION_ATTENTION, "language": LANGUAGE_ATTENTION},
    mlp={"vision": ("fc1", "fc2"), "language": LANGUAGE_MLP},
    pixel_budget=True,
    positions="mrope",
    takes_features=True,
)

QWEN2_5_VL = Family(
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    parts=QWEN2_VL.parts,
    attention=QWEN2_VL.attention,
    # The tower's MLP is gated like the language model's and shares its leaf names.
    mlp={"vision": LANGUAGE_MLP, "language": LANGUAGE_MLP},
    pixel_budget=True,
    positions="mrope",
    takes_features=True,
    feature_order=window_order,
)

QWEN3_VL = Family(
    name="Qwen3-VL",
    model_types=("qwen3_vl",),
    # The deepstack mergers carry features of inner vision layers to inner language layers.
    parts={
        **QWEN2_VL.parts,
        "connector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
    },
    attention=QWEN2_VL.attention,
    mlp={"vision": ("linear_fc1", "linear_fc2"), "language": LANGUAGE_MLP},
    pixel_budget=True,
    positions="mrope",
    takes_features=True,
)
