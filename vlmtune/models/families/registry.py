"""The model families by `model_type`, and how an unknown one is described by the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from vlmtune.errors import VlmtuneError, nearest
from vlmtune.models.families.llava_idefics import IDEFICS, LLAVA
from vlmtune.models.families.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from vlmtune.models.family import Family, leaf_names

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
        return replace(known, parts={**known.parts, **stated}, takes_features=False)
    if "language" not in stated:
        raise VlmtuneError(
            f"parts says nothing about the language part of a model of type {model_type!r}",
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
