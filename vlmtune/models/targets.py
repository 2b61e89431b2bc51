"""Resolves `lora_target` and `modules_to_save` to module paths, and lists what is trained.

A target entry is one of (looked up in this order)
    a group                language.attn, language.mlp, vision.attn, vision.mlp (vision_mlp),
                           connector, all-linear
    `re:` and a pattern    over full paths, matched from start to end
    a full path            of a linear layer, or of a module: then every linear layer in it
    a leaf name            q_proj: in the language part, as users of other tools mean it
An entry that matches nothing is an error; overlapping entries count a module once.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vlmtune.errors import VlmtuneError, nearest
from vlmtune.models.families import Family, kind_of, lies_under, part_of
from vlmtune.models.forward import base_of

logger = logging.getLogger("vlmtune")

GROUPS = (
    "language.attn",
    "language.mlp",
    "vision.attn",
    "vision.mlp",
    "vision_mlp",
    "connector",
    "all-linear",
)
CONTAINERS = (nn.ModuleList, nn.ModuleDict)
SAVED_NAMES = ("embeddings", "lm_head", "connector", "vision", "language", "all")


@dataclass(frozen=True)
class Target:
    """One linear layer that gets an adapter."""

    path: str
    part: str
    kind: str
    in_features: int
    out_features: int
    rank: int

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]


def resolve_targets(
    model: nn.Module, names: Sequence[str], *, family: Family, rank: int
) -> list[Target]:
    """The linear layers that `names` select, in the model's order, each once.

    Works on a model on the meta device and on a quantised one. A rank above a layer's smaller side
    is lowered to it, with one notice that counts the layers.

    Raises VlmtuneError where an entry matches nothing, or a module that is no linear layer.
    """
    linear = linear_modules(model)
    chosen: set[str] = set()
    for name in names:
        chosen.update(_select(name, model=model, linear=linear, family=family))
    _check_tied_head(model, chosen)
    targets = [
        Target(
            path=path,
            part=part_of(path, family) or "other",
            kind=kind_of(path, family),
            in_features=module.in_features,
            out_features=module.out_features,
            rank=min(rank, module.in_features, module.out_features),
        )
        for path, module in linear.items()
        if path in chosen
    ]
    lowered = [target for target in targets if target.rank < rank]
    if lowered:
        logger.warning(
            "rank %d is more than %d of %d target modules allow; lowered there to their limit "
            "(smallest: %d, %s)",
            rank,
            len(lowered),
            len(targets),
            min(target.rank for target in lowered),
            min(lowered, key=lambda target: target.rank).path,
        )
    return targets


def resolve_modules_to_save(model: nn.Module, names: Sequence[str], *, family: Family) -> list[str]:
    """Full paths of the modules that `names` select, in the given order, each once.

    `all` gives every part. With tied embeddings, `embeddings` and `lm_head` are one matrix: either
    name gives the path of the embeddings.

    Raises VlmtuneError where an entry matches nothing.
    """
    paths: list[str] = []
    for name in names:
        for path in _saved(name, model=model, family=family):
            if path not in paths:
                paths.append(path)
    # A module inside another one that is trained in full is already covered.
    return [p for p in paths if not any(p != q and lies_under(p, q) for q in paths)]


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Full path -> linear layer; bitsandbytes' 4- and 8-bit layers are linear layers too."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def embeddings_path(model: nn.Module) -> str:
    """Full path of the token embeddings."""
    return _path_of(model, model.get_input_embeddings())


def lm_head_path(model: nn.Module) -> str:
    """Full path of the output projection."""
    return _path_of(model, model.get_output_embeddings())


def has_tied_embeddings(model: nn.Module) -> bool:
    """Whether `lm_head` and the token embeddings share one matrix (also on the meta device)."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def group_paths(name: str, *, linear: Sequence[str], family: Family) -> list[str]:
    """The linear layers of a group of `GROUPS`."""
    if name == "all-linear":
        return [p for p in linear if part_of(p, family) == "language"]
    if name == "connector":
        return [p for p in linear if part_of(p, family) == "connector"]
    part, kind = re.split(r"[._]", name)
    return [p for p in linear if part_of(p, family) == part and kind_of(p, family) == kind]


def part_modules(model: nn.Module, part: str, *, family: Family) -> list[str]:
    """The fewest modules that hold all parameters of a part and none of another.

    A part with another inside it (the merger in Qwen's vision tower) is given by its children, and
    so is a bare list of modules: it has no forward that PEFT could wrap.
    """
    parameters = [path for path, _ in model.named_parameters(remove_duplicate=False)]

    def cover(path: str, module: nn.Module) -> list[str]:
        inside = {part_of(p, family) for p in parameters if lies_under(p, path)}
        if inside == {part} and not isinstance(module, CONTAINERS):
            return [path]
        if part not in inside:
            return []
        return [
            p for name, child in module.named_children() for p in cover(f"{path}.{name}", child)
        ]

    modules = dict(model.named_modules())
    return [p for root in family.parts[part] if root in modules for p in cover(root, modules[root])]


def _select(
    name: str, *, model: nn.Module, linear: dict[str, nn.Linear], family: Family
) -> list[str]:
    if name in GROUPS:
        paths = group_paths(name, linear=list(linear), family=family)
        if not paths:
            raise _no_match(name, linear=linear, family=family, reason="has no linear layer")
        return paths
    if name.startswith("re:"):
        return _select_pattern(name, model=model, linear=linear, family=family)
    modules = dict(model.named_modules())
    if name in modules:
        paths = [p for p in linear if lies_under(p, name)]
        if not paths:
            raise VlmtuneError(
                f"lora_target: {name!r} is a {type(modules[name]).__name__}",
                expected="a linear layer, or a module with linear layers in it",
                do="remove it, or train it in full: modules_to_save",
            )
        return paths
    paths = [p for p in linear if p.rpartition(".")[2] == name and part_of(p, family) == "language"]
    if not paths:
        raise _no_match(name, linear=linear, family=family, reason="matches no linear layer")
    return paths


def _select_pattern(
    name: str, *, model: nn.Module, linear: dict[str, nn.Linear], family: Family
) -> list[str]:
    try:
        pattern = re.compile(name.removeprefix("re:"))
    except re.error as error:
        raise VlmtuneError(
            f"lora_target: {name!r} is not a regular expression: {error}",
            do="escape dots as \\. and check the brackets",
        ) from error
    # Containers and norms may match: a pattern means layers with a weight matrix.
    matrices = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and pattern.fullmatch(path)
    }
    for path, module in matrices.items():
        if path not in linear:
            raise VlmtuneError(
                f"lora_target: {name!r} matches {path}, a {type(module).__name__}",
                expected="linear layers only",
                do="narrow the pattern",
            )
    if not matrices:
        raise _no_match(name, linear=linear, family=family, reason="matches no linear layer")
    return list(matrices)


def _saved(name: str, *, model: nn.Module, family: Family) -> list[str]:
    tied = has_tied_embeddings(model)
    if name == "embeddings" or (name == "lm_head" and tied):
        return [embeddings_path(model)]
    if name == "all":
        parts = [part for part in family.parts if not (tied and part == "lm_head")]
        return [p for part in parts for p in part_modules(model, part, family=family)]
    if name in family.parts:
        return part_modules(model, name, family=family)
    known = {path: module for path, module in model.named_modules() if path}
    if name in known:
        if tied and name == lm_head_path(model):
            return [embeddings_path(model)]
        if isinstance(known[name], CONTAINERS):
            return [f"{name}.{child}" for child, _ in known[name].named_children()]
        return [name]
    raise VlmtuneError(
        f"modules_to_save: {name!r} matches no module",
        expected=f"one of {', '.join(SAVED_NAMES)}, or a full module path"
        + _hint(nearest(name, [*SAVED_NAMES, *known])),
    )


def _check_tied_head(model: nn.Module, chosen: set[str]) -> None:
    if model.get_output_embeddings() is None:
        return
    head = lm_head_path(model)
    if head in chosen and has_tied_embeddings(model):
        raise VlmtuneError(
            f"lora_target: {head} shares its weight with the embeddings of this model; an adapter "
            "merged into it would change both",
            do="leave it out, or train the shared matrix: modules_to_save: [embeddings]",
        )


def _no_match(
    name: str, *, linear: dict[str, nn.Linear], family: Family, reason: str
) -> VlmtuneError:
    leaves = sorted(
        {p.rpartition(".")[2] for p in linear if part_of(p, family) == "language"},
    )
    elsewhere = [p for p in linear if p.rpartition(".")[2] == name]
    hint = _hint(nearest(name, [*GROUPS, *leaves, *linear]))
    do = None
    if elsewhere:
        part = part_of(elsewhere[0], family)
        do = f"a leaf name means the language part; this one is in {part}: name a group of "
        do += f"{part}, a full path ({elsewhere[0]}) or re:.*\\.{re.escape(name)}"
    return VlmtuneError(
        f"lora_target: {name!r} {reason}",
        expected=f"a group ({', '.join(GROUPS)}), a leaf name of the language part "
        f"({', '.join(leaves)}), a full path or re:…{hint}",
        do=do,
    )


def _hint(close: str | None) -> str:
    return f"; did you mean {close!r}?" if close else ""


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    for path, module in model.named_modules():
        if module is wanted:
            return path
    raise AssertionError("the embeddings are a module of the model")


IN_FULL = "in full"


@dataclass(frozen=True)
class TrainedRow:
    """Modules of one part, kind and rank; `rank` is empty for what is trained in full."""

    part: str
    kind: str
    modules: int
    rank: int | None
    trainable_parameters: int


def trained_rows(model: nn.Module, family: Family) -> list[TrainedRow]:
    """One row for each part, kind and rank that trains, in the order of the parts."""
    base = base_of(model)
    counts: dict[tuple[str, str, int | None], list[int]] = defaultdict(list)
    inside: set[str] = set()
    for path, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        adapter = module.active_adapters[0]
        named = {f"{path}.{n}": p for n, p in module.named_parameters()}
        inside |= named.keys()
        size = sum(p.numel() for p in named.values() if p.requires_grad)
        rank = module.r[adapter]
        counts[(part_of(path, family) or "other", kind_of(path, family), int(rank))].append(size)
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and name not in inside:
            counts[(part_of(name, family) or "other", IN_FULL, None)].append(parameter.numel())
    return [
        TrainedRow(part, kind, len(sizes), rank, sum(sizes))
        for (part, kind, rank), sizes in sorted(counts.items(), key=lambda item: str(item[0]))
    ]
