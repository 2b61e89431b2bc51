"""Base + adapter for a merge, and the merged checkpoint on the disk, one tensor at a time.

open_lazily: the model without its weights (streamed.py), the adapter loaded into it
Folding:      base(name), folded(name), expected(name): a weight in float32, made when asked for

plan_output:  every tensor of the base under its own key; a weight whose tie the adapter breaks
              under a new one
write_merged: the plan as shards, config.json, the base's other files, the processor
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from vlmtune.errors import VlmtuneError, plural
from vlmtune.models.adapters.base import WEIGHTS_FILE as ADAPTER_WEIGHTS
from vlmtune.models.adapters.base import tuner_layers
from vlmtune.models.adapters.merged_weight import (
    changed_names,
    has_formula,
    merge_layer,
    merged_weight,
    saved_weights,
)
from vlmtune.models.families import family_for
from vlmtune.models.forward import base_name, base_of
from vlmtune.models.load import ADAPTER_FILE, VLM, commit_of, load_processor, read_config
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
from vlmtune.models.streamed import (
    MallocTrimmer,
    PlannedTensor,
    StoredTensor,
    WeightMap,
    loaded,
    map_weights,
    materialize,
    read_tensor,
    stored_tensors,
    weight_files,
    weights_at,
    write_tensors,
)

logger = logging.getLogger("vlmtune")

CONFIG_FILE = "config.json"
FOLD_TENSORS = 4
"""Tensors of a weight's size that folding it makes: W, the change, the scaled change, the sum."""


def open_lazily(target: str | Path, *, trust_remote_code: bool = False) -> LazyCheckpoint:
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
        materialize(placed.model, candidates)
        vlm = with_adapter(vlm, result, trust)
        model: Any = vlm.model
        carried = candidates - {name for name, _ in saved_weights(model)}
    vlm.model.requires_grad_(False)
    kind: Kind = "adapter" if recipe is None else "run"
    config = cached_file(source, CONFIG_FILE, revision=vlm.commit)
    assert config is not None, "read_config has read it"
    return LazyCheckpoint(
        OpenTarget(vlm, kind, recipe), placed, carried, Path(config).parent, trust
    )


def _place_vlm(
    source: str, revision: str | None, trust: bool, parts: Mapping[Any, Any] | None
) -> tuple[VLM, WeightMap]:
    config = read_config(source, revision=revision, trust_remote_code=trust)
    commit = commit_of(config)
    revision = commit or revision
    stored = stored_tensors(weight_files(source, revision=revision))
    placed = map_weights(config, stored, source=source, trust_remote_code=trust)
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
class LazyCheckpoint:
    """A target of `merge` whose base's weights are still in their files.

    `opened.vlm.model` is `placed.model`, wrapped by PEFT where there is an adapter. `carried` are
    the base weights that come with the adapter and replace the base's. `folder`: the base's other
    files.
    """

    opened: OpenTarget
    placed: WeightMap
    carried: frozenset[str]
    folder: Path
    trust_remote_code: bool


class Folding:
    """The weights of base + adapter by their names in the base model, in float32, one at a time."""

    def __init__(self, on_disk: LazyCheckpoint) -> None:
        self.placed = on_disk.placed
        self.carried = on_disk.carried
        self._heap = MallocTrimmer()
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
            value = merged_weight(layer)
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


GENERATION_FILE = "generation_config.json"
TEMPLATES_FOLDER = "additional_chat_templates"
WEIGHT_SUFFIXES = tuple(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .onnx .index.json".split()
)
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""Written by the processor, with the pixel budget of training: another one beside would win."""


def plan_output(folding: Folding, dtype: torch.dtype | None) -> OutputPlan:
    """Every tensor of the base once, under its own key. `dtype` None: each in its own.

    Where the adapter parts a tied pair, the one that the files lack gets the key that transformers
    would save it under.
    """
    placed = folding.placed
    names_of: dict[str, list[str]] = {}
    for name, key in placed.key_of.items():
        names_of.setdefault(key, []).append(name)
    tensors: dict[str, PlannedTensor] = {}
    name_of: dict[str, str] = {}
    stored_of: dict[str, StoredTensor] = {}
    for key, stored in placed.stored.items():
        written = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        names = names_of.get(key, [])
        keys = {key: names[0]} if names else {}
        if len({folding.origin(name) for name in names}) > 1:
            keys = {_key_on_disk(placed, name): name for name in names}
            assert key in keys, (key, keys)
        for own in keys or [key]:
            tensors[own] = PlannedTensor(own, stored.shape, written)
            stored_of[own] = stored
        name_of |= keys
    unties = any(len({folding.origin(name) for name in tie}) > 1 for tie in placed.ties)
    return OutputPlan(tensors, name_of, stored_of, unties)


def write_merged(
    folding: Folding,
    plan: OutputPlan,
    on_disk: LazyCheckpoint,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    """Write the planned weights, and all that a server needs beside them, to the new `folder`.

    Holds one tensor at a time (and what folding it takes). Raises OSError for a full disk.
    """
    folder.mkdir(parents=True)
    write_tensors(
        folder,
        list(plan.tensors.values()),
        lambda key: output_tensor(folding, plan, key),
        shard_bytes=shard_bytes,
    )
    _copy_other_files(on_disk, folder)
    config = json.loads((on_disk.folder / CONFIG_FILE).read_text(encoding="utf-8"))
    (folder / CONFIG_FILE).write_text(
        json.dumps(_config_for(config, dtype, unties=plan.unties), indent=2) + "\n",
        encoding="utf-8",
    )
    on_disk.opened.vlm.processor.save_pretrained(folder)


def output_tensor(folding: Folding, plan: OutputPlan, key: str) -> Tensor:
    """The tensor to write under `key`, in its dtype; bit for bit the base's where unchanged."""
    name = plan.name_of.get(key)
    is_changed = name is not None and name in folding.changed
    value = folding.folded(str(name)) if is_changed else read_tensor(plan.stored_of[key])
    return value.to(plan.tensors[key].dtype)


def _key_on_disk(placed: WeightMap, name: str) -> str:
    tensor = torch.empty(0)
    return next(iter(revert_weight_conversion(placed.model, {name: tensor})))


def _copy_other_files(on_disk: LazyCheckpoint, folder: Path) -> None:
    """Licence, custom code, tokenizer, generation config: what lies beside the base's weights."""
    vlm = on_disk.opened.vlm
    if vlm.commit is not None:
        with contextlib.suppress(OSError):  # a model without one
            cached_file(vlm.source, GENERATION_FILE, revision=vlm.commit)
    for path in sorted(on_disk.folder.iterdir()):
        if path.name == TEMPLATES_FOLDER and path.is_dir():
            shutil.copytree(path, folder / path.name)
        is_ours = path.name.endswith(WEIGHT_SUFFIXES) or path.name in PROCESSOR_FILES
        if path.is_file() and not is_ours and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)


def _config_for(config: Any, dtype: torch.dtype | None, *, unties: bool) -> Any:
    """`config` with the written dtype wherever it names one, and without a tie that was parted."""
    changed = dict(config)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        changed |= {key: name for key in ("dtype", "torch_dtype") if key in config}
        if not {"dtype", "torch_dtype"} & config.keys():
            changed["dtype"] = name
    if unties:
        changed["tie_word_embeddings"] = False
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            changed[key] = _config_for(value, dtype, unties=unties)
    return changed


@dataclass(frozen=True)
class OutputPlan:
    """What the merged checkpoint holds, by key.

    `name_of`: the name in the model, for keys that have a place there. `stored_of`: the tensor of
    the base. `unties`: the adapter changes one end of a tied pair, and both are written.
    """

    tensors: dict[str, PlannedTensor]
    name_of: dict[str, str]
    stored_of: dict[str, StoredTensor]
    unties: bool

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """That of most of the bytes."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])
