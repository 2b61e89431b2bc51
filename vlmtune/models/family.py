"""What vlmtune knows about a model family: which module paths are which part of a VLM.

    full path of a module or parameter --part_of--> vision | connector | language | lm_head
                                       --kind_of--> attn | mlp | connector | lm_head | other

Paths start at the root of the `…ForConditionalGeneration` model. Parts may nest (a connector inside
the vision tower): the longest matching path wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

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
    media_layout: MediaLayout = "flat"
    pixel_budget: bool = False
    positions: Literal["text", "mrope"] | None = None
    takes_features: bool = False
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
