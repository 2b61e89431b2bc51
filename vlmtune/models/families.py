"""What vlmtune knows about model families: which module paths are which part of a VLM.

    full path of a module or parameter --part_of--> vision | connector | language | lm_head
                                       --kind_of--> attn | mlp | connector | lm_head | other

Paths start at the root of the `…ForConditionalGeneration` model. Parts may nest (a connector inside
the vision tower): the longest matching path wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from vlmtune.errors import VlmtuneError, nearest

MediaLayout = Literal["flat", "stacked"]

ATTENTION_WORDS = ("attn", "attention")
MLP_WORDS = ("mlp", "feed_forward", "feedforward", "ffn")


@dataclass(frozen=True)
class Family:
    """One model family.

    `attention` and `mlp` hold, per part, the names of the linear layers (last path component).
    `media_layout` says how the pictures of a batch lie: `flat`, one after the other along
    dimension 0; `stacked`, one row per sample. `pixel_budget`: the image processor sizes a picture
    by its area, so that `image.min_pixels` and `image.max_pixels` have an effect.

    `takes_features`: the features of pictures and videos can be made apart, by
    `get_image_features` and `get_video_features`, and given to the model's forward pass;
    `feature_order`: where the tower works in an order of its own, which row of the connector's
    output comes in each place, from the backbone and the arguments for one picture.
    """

    name: str
    model_types: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    attention: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mlp: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    image_batching: MediaLayout = "flat"
    pixel_budget: bool = False
    positions: Literal["text", "mrope"] | None = None
    supports_precomputed_features: bool = False
    feature_order: Callable[[Any, Mapping[str, Tensor]], Tensor] | None = None


def lies_under(path: str, prefix: str) -> bool:
    """Whether `path` is `prefix` or inside it; `a.b` lies under `a`, `ab` does not."""
    return path == prefix or path.startswith(prefix + ".")


def part_of(path: str, family: Family) -> str | None:
    """The part that a module or parameter path belongs to, or None where no part claims it."""
    best: tuple[int, str | None] = (-1, None)
    for part, prefixes in family.parts.items():
        for prefix in prefixes:
            if lies_under(path, prefix) and len(prefix) > best[0]:
                best = (len(prefix), part)
    return best[1]


def kind_of(path: str, family: Family) -> str:
    """What a linear layer does: `attn`, `mlp`, `connector`, `lm_head` or `other`."""
    part = part_of(path, family)
    if part in ("connector", "lm_head"):
        return part
    if part is None:
        return "other"
    enclosing, _, leaf = path.rpartition(".")
    kinds = []
    if leaf in family.attention.get(part, ()):
        kinds.append("attn")
    if leaf in family.mlp.get(part, ()):
        kinds.append("mlp")
    if len(kinds) == 2:  # one name for both (`dense`): the enclosing module decides
        return enclosing_kind(enclosing) or "other"
    return kinds[0] if kinds else "other"


def enclosing_kind(path: str) -> str | None:
    """`attn` or `mlp` by the innermost component of a module path that says so."""
    for component in reversed(path.lower().split(".")):
        if any(word in component for word in ATTENTION_WORDS):
            return "attn"
        if any(word in component for word in MLP_WORDS):
            return "mlp"
    return None


def leaf_names(model: nn.Module, family: Family) -> tuple[dict, dict]:
    """Attention and MLP leaf names per part, read off a model whose family states none.

    A linear layer belongs to attention or MLP by the names of the modules around it.
    """
    found: dict[str, dict[str, set[str]]] = {"attn": {}, "mlp": {}}
    for path, module in model.named_modules():
        part = part_of(path, family)
        if not isinstance(module, nn.Linear) or part not in ("vision", "language"):
            continue
        enclosing, _, leaf = path.rpartition(".")
        kind = enclosing_kind(enclosing)
        if kind is not None:
            found[kind].setdefault(part, set()).add(leaf)
    attention, mlp = (
        {part: tuple(sorted(leaves)) for part, leaves in found[kind].items()}
        for kind in ("attn", "mlp")
    )
    return attention, mlp


LANGUAGE_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LANGUAGE_MLP = ("gate_proj", "up_proj", "down_proj")
VISION_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
VISION_MLP = ("fc1", "fc2")

LLAVA_ATTENTION = {"vision": VISION_ATTENTION, "language": LANGUAGE_ATTENTION}
LLAVA_MLP = {"vision": VISION_MLP, "language": LANGUAGE_MLP}

LLAVA = Family(
    name="LLaVA",
    model_types=("llava",),
    parts={
        "vision": ("model.vision_tower",),
        "connector": ("model.multi_modal_projector",),
        "language": ("model.language_model",),
        "lm_head": ("lm_head",),
    },
    attention=LLAVA_ATTENTION,
    mlp=LLAVA_MLP,
    positions="text",
    supports_precomputed_features=True,
)

IDEFICS = Family(
    name="Idefics",
    model_types=("smolvlm", "idefics3", "idefics2"),
    parts={
        "vision": ("model.vision_model",),
        "connector": ("model.connector",),
        "language": ("model.text_model",),
        "lm_head": ("lm_head",),
    },
    attention=LLAVA_ATTENTION,
    mlp=LLAVA_MLP,
    image_batching="stacked",
    positions="text",
    supports_precomputed_features=True,
)
QWEN_VISION_ATTENTION = ("qkv", "proj")


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
    attention={"vision": QWEN_VISION_ATTENTION, "language": LANGUAGE_ATTENTION},
    mlp={"vision": ("fc1", "fc2"), "language": LANGUAGE_MLP},
    pixel_budget=True,
    positions="mrope",
    supports_precomputed_features=True,
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
    supports_precomputed_features=True,
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
    supports_precomputed_features=True,
)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "llava": LLAVA,
    "smolvlm": IDEFICS,
    "idefics3": IDEFICS,
    "idefics2": IDEFICS,
}


def family_for(
    model_type: str,
    *,
    parts: Mapping[str, Sequence[str]] | None = None,
    model: nn.Module | None = None,
) -> Family:
    """The family of a model type; `parts` (from the recipe) describe one that no file knows.

    For a known family, `parts` replace that family's paths part by part; what its connector gives
    is then no longer known, and its features are made by the model alone. `model` (on the meta
    device is enough) is needed to check `parts` and to list the modules of an unknown model.

    Raises VlmtuneError for an unknown model type without `parts`, and for a path in `parts` that
    no module has.
    """
    known = FAMILIES.get(model_type)
    if parts is None:
        if known is None:
            raise _unknown(model_type, model)
        return known
    assert model is not None, "parts are checked against a model"
    stated = {part: tuple(paths) for part, paths in parts.items()}
    _check_paths(stated, model)
    if known is not None:
        return replace(known, parts={**known.parts, **stated}, supports_precomputed_features=False)
    if "language" not in stated:
        raise VlmtuneError(
            f"parts does not name the language model of a model of type {model_type!r}",
            got=", ".join(stated) or "nothing",
            do="add parts.language with the path of the language model",
        )
    family = Family(name=model_type, model_types=(model_type,), parts=stated)
    attention, mlp = leaf_names(model, family)
    return replace(family, attention=attention, mlp=mlp)


def top_level_modules(model: nn.Module) -> list[str]:
    """Module paths down to depth 2, with their class: what a user needs to write `parts`."""
    return [
        f"{path} ({type(module).__name__})"
        for path, module in model.named_modules()
        if path and path.count(".") < 2
    ]


def _unknown(model_type: str, model: nn.Module | None) -> VlmtuneError:
    close = nearest(model_type, FAMILIES)
    modules = "" if model is None else "; its modules: " + ", ".join(top_level_modules(model))
    return VlmtuneError(
        f"no family file knows the model type {model_type!r}{modules}",
        expected="one of " + ", ".join(FAMILIES) + (f" (nearest: {close})" if close else ""),
        do="state the module paths of vision, connector, language and lm_head under parts: "
        "in the recipe",
    )


def _check_paths(parts: Mapping[str, Sequence[str]], model: nn.Module) -> None:
    known = {path for path, _ in model.named_modules() if path}
    known |= {path for path, _ in model.named_parameters()}
    for part, paths in parts.items():
        for path in paths:
            if path not in known:
                raise VlmtuneError(
                    f"parts.{part}: no module has the path {path!r}",
                    expected=nearest(path, known) or ", ".join(top_level_modules(model)),
                    do="give full module paths from the root of the model",
                )
