"""Base + adapter for a merge: the base's weights stay in their files, one is read when it is due.

open_on_disk: the model without its weights (streamed.py), the adapter loaded into it
Folding:      base(name), folded(name), expected(name): a weight in float32, made when asked for
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from vlmtune.errors import VlmtuneError, plural
from vlmtune.models.adapters.folded import (
    changed_names,
    folded_weight,
    has_formula,
    merge_layer,
    saved_weights,
)
from vlmtune.models.adapters.wrapping import WEIGHTS_FILE as ADAPTER_WEIGHTS
from vlmtune.models.adapters.wrapping import tuner_layers
from vlmtune.models.families.registry import family_for
from vlmtune.models.forward import base_name, base_of
from vlmtune.models.load import VLM
from vlmtune.models.open import (
    RUN_FILE,
    Kind,
    OpenTarget,
    base_of_adapter,
    check_target,
    read_run_recipe,
    result_of_run,
    say_unused_weights,
    with_adapter,
)
from vlmtune.models.processor import load_processor
from vlmtune.models.source import ADAPTER_FILE, commit_of, read_config
from vlmtune.models.streamed import Placed, loaded, make_real, place, weights_at
from vlmtune.models.tensor_files import HeapKeeper, stored_tensors, weight_files

logger = logging.getLogger("vlmtune")

CONFIG_FILE = "config.json"
FOLD_TENSORS = 4
"""Tensors of a weight's size that folding it makes: W, the change, the scaled change, the sum."""


def open_on_disk(target: str | Path, *, trust_remote_code: bool = False) -> OnDisk:
    """Open a run or adapter folder for merging, without reading the base's weights.

    Raises VlmtuneError as `open_target` does, and for a model, which there is nothing to merge of.
    """
    check_target(target)
    folder = Path(target).expanduser()
    recipe = read_run_recipe(folder) if (folder / RUN_FILE).is_file() else None
    result = folder if recipe is None else result_of_run(folder)
    is_adapter = (result / ADAPTER_FILE).is_file()
    if recipe is None and not is_adapter:
        raise VlmtuneError(
            "nothing to merge: this is a model without an adapter",
            file=target,
            expected="a run folder or an adapter folder",
        )
    source, revision = base_of_adapter(result) if is_adapter else (str(result), None)
    trust = trust_remote_code or (recipe is not None and recipe.trust_remote_code)
    parts = None if recipe is None else recipe.parts
    vlm, placed = _place_vlm(source, revision, trust, parts)
    if is_adapter:
        say_unused_weights(result, source)
    carried: frozenset[str] = frozenset()
    if is_adapter and not placed.converted:
        candidates = _base_names_in(result / ADAPTER_WEIGHTS) & placed.key_of.keys()
        make_real(placed.model, candidates)
        vlm = with_adapter(vlm, result, trust)
        model: Any = vlm.model
        carried = candidates - {name for name, _ in saved_weights(model)}
    vlm.model.requires_grad_(False)
    kind: Kind = "adapter" if recipe is None else "run"
    config = cached_file(source, CONFIG_FILE, revision=vlm.commit)
    assert config is not None, "read_config has read it"
    return OnDisk(OpenTarget(vlm, kind, recipe), placed, carried, Path(config).parent, trust)


def _place_vlm(
    source: str, revision: str | None, trust: bool, parts: Mapping[Any, Any] | None
) -> tuple[VLM, Placed]:
    config = read_config(source, revision=revision, trust_remote_code=trust)
    commit = commit_of(config)
    revision = commit or revision
    stored = stored_tensors(weight_files(source, revision=revision))
    placed = place(config, stored, source=source, trust_remote_code=trust)
    if placed.unused:
        logger.info(
            "%s of %s without a place in the model: copied unread",
            plural(len(placed.unused), "tensor"),
            source,
        )
    processor = load_processor(source, revision=revision, trust_remote_code=trust)
    named = None if parts is None else {str(part): paths for part, paths in parts.items()}
    family = family_for(config.model_type, parts=named, model=placed.model)
    return VLM(placed.model, processor, family, source, commit), placed


def _base_names_in(file: Path) -> frozenset[str]:
    """Names in the base model of an adapter file's tensors; those of the adapter match nothing."""
    if not file.is_file():
        return frozenset()  # with_adapter says so
    with safe_open(file, framework="pt") as opened:
        return frozenset(base_name(key).replace(".base_layer.", ".") for key in opened.keys())  # noqa: SIM118


@dataclass(frozen=True)
class OnDisk:
    """A target of `merge` whose base's weights are still in their files.

    `opened.vlm.model` is `placed.model`, wrapped by PEFT where there is an adapter. `carried` are
    the base weights that come with the adapter and replace the base's. `folder`: the base's other
    files.
    """

    opened: OpenTarget
    placed: Placed
    carried: frozenset[str]
    folder: Path
    trust_remote_code: bool


class Folding:
    """The weights of base + adapter by their names in the base model, in float32, one at a time."""

    def __init__(self, on_disk: OnDisk) -> None:
        self.placed = on_disk.placed
        self.carried = on_disk.carried
        self._heap = HeapKeeper()
        model: Any = on_disk.opened.vlm.model
        self._layers: dict[str, tuple[str, Any]] = {}
        # An alias: the model's own tensor is emptied after each use.
        self._saved = weights_at(base_of(model), on_disk.carried)
        if isinstance(model, PeftModel):
            self._saved |= dict(saved_weights(model))
            for path, layer in tuner_layers(model).items():
                self._layers |= {name: (path, layer) for name in changed_names(path, layer)}
        self.changed = frozenset(self._layers) | frozenset(self._saved)

    def base(self, name: str) -> Tensor:
        """The weight of the base, or what the adapter brings along for it; a copy."""
        if name in self.carried:
            return self._saved[name].to(torch.float32, copy=True)
        return self.placed.read(name)

    @torch.no_grad()
    def folded(self, name: str) -> Tensor:
        """The weight with the adapter in it, by PEFT's own merge of its layer."""
        if name in self._layers:
            path, layer = self._layers[name]
            with loaded(layer, path, self.placed.key_of, self.base):
                value = merge_layer(layer)[name.removeprefix(f"{path}.")]
            self._heap.passed(FOLD_TENSORS * value.nbytes)
            return value
        return self._saved[name].float() if name in self._saved else self.base(name)

    @torch.no_grad()
    def expected(self, name: str) -> Tensor | None:
        """The same by the closed formulas; None for a layer that they do not cover."""
        if name not in self._layers:
            return self._saved[name].float() if name in self._saved else self.base(name)
        path, layer = self._layers[name]
        if not has_formula(layer) or not name.endswith(".weight"):
            return None
        with loaded(layer, path, self.placed.key_of, self.base):
            value = folded_weight(layer)
        self._heap.passed(FOLD_TENSORS * value.nbytes)
        return value

    def is_saved(self, name: str) -> bool:
        """Whether the weight is written as the adapter holds it: trained in full, or carried."""
        return name in self._saved and name not in self._layers

    def origin(self, name: str) -> tuple[str, object]:
        """What decides the folded weight: names of one tied weight may part in it."""
        if name in self._layers:
            return "layer", self._layers[name][0]
        return ("saved", self._saved[name].data_ptr()) if name in self._saved else ("base", None)
