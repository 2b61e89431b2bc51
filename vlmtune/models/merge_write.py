"""Base + adapter for a merge, and the merged checkpoint on the disk, one tensor at a time.

open_lazily:  the model without its weights (streamed.py), the adapter loaded into it -> Folding
Folding:      base(name), folded(name), expected(name): a weight in float32, made when asked for

plan_output:  every tensor of the base under its own key; a weight whose tie the adapter breaks
              under a new one
write_merged: the plan as shards; the base's other files as they are; config.json and the
              processor's files anew where they change
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from vlmtune.errors import VlmtuneError
from vlmtune.models.adapters.base import WEIGHTS_FILE as ADAPTER_WEIGHTS
from vlmtune.models.adapters.base import tuner_layers
from vlmtune.models.adapters.merged_weight import (
    changed_names,
    has_formula,
    merge_layer,
    merged_weight,
    saved_weights,
)
from vlmtune.models.forward import base_name, base_of
from vlmtune.models.load import VLM
from vlmtune.models.open import TargetFiles, read_target, with_adapter
from vlmtune.models.streamed import (
    INDEX_FILE,
    LazyModel,
    empty,
    fill,
    load_lazily,
    materialize,
    read_tensor,
    weight_units,
)

CONFIG_FILE = "config.json"


def open_lazily(target: str | Path, scratch: Path, *, trust_remote_code: bool = False) -> Folding:
    """Open a run or adapter folder for merging, without reading the base's weights.

    Raises VlmtuneError as `open_target` does, and for a model, which there is nothing to merge of.
    """
    files = read_target(target, trust_remote_code=trust_remote_code)
    if files.kind == "model":
        raise VlmtuneError(
            "nothing to merge: this is a model without an adapter",
            file=target,
            expected="a run folder or an adapter folder",
        )
    base = load_lazily(
        files.source,
        scratch,
        revision=files.revision,
        trust_remote_code=files.trust_remote_code,
        parts=files.parts,
    )
    vlm, carried = base.vlm, frozenset[str]()
    if files.adapter is not None:
        candidates = _base_names_in(files.adapter / ADAPTER_WEIGHTS) & base.weights.keys()
        materialize(vlm.model, candidates)
        vlm = with_adapter(vlm, files.adapter, files.trust_remote_code)
        model: Any = vlm.model
        carried = candidates - {name for name, _ in saved_weights(model)}
    return Folding(files, base, vlm, carried)


def _base_names_in(file: Path) -> frozenset[str]:
    """Names in the base model of an adapter file's tensors; those of the adapter match nothing."""
    if not file.is_file():
        return frozenset()  # with_adapter says so
    with safe_open(file, framework="pt") as opened:
        return frozenset(base_name(key).replace(".base_layer.", ".") for key in opened.keys())  # noqa: SIM118


class Folding:
    """The weights of base + adapter by their names in the base model, in float32, one at a time.

    `vlm.model` is `base_model.vlm.model`, wrapped by PEFT where there is an adapter; the two
    processors are the adapter's and the base's. `carried` are the base weights that come with the
    adapter and replace the base's.
    """

    def __init__(
        self, files: TargetFiles, base_model: LazyModel, vlm: VLM, carried: frozenset[str]
    ) -> None:
        self.files = files
        self.base_model = base_model
        self.vlm = vlm
        self._carried = carried
        model: Any = vlm.model
        self._units = weight_units(base_of(model), base_model.weights.keys())
        self._layers: dict[str, tuple[str, Any]] = {}
        # An alias: the model's own tensor is emptied after each use.
        self._saved = {
            name: tensor.detach()
            for unit in self._units.values()
            for name, tensor in unit.items()
            if name in carried
        }
        if isinstance(model, PeftModel):
            self._saved |= dict(saved_weights(model))
            for path, layer in tuner_layers(model).items():
                self._layers |= {name: (path, layer) for name in changed_names(path, layer)}
        self.changed = frozenset(self._layers) | frozenset(self._saved)

    def base(self, name: str) -> Tensor:
        """The weight of the base, or what the adapter brings along for it; a copy."""
        if name in self._carried:
            return self._saved[name].to(torch.float32, copy=True)
        return self.base_model.read(name)

    def folded(self, name: str) -> Tensor:
        """The weight with the adapter in it, by PEFT's own merge of its layer; a copy."""
        if name in self._layers:
            path, layer = self._layers[name]
            with self._loaded(layer):
                return merge_layer(layer)[name.removeprefix(f"{path}.")]
        return self._without_layer(name)

    def expected(self, name: str) -> Tensor | None:
        """The same by the closed formulas; None for a layer that they do not cover."""
        if name not in self._layers:
            return self._without_layer(name)
        _, layer = self._layers[name]
        if not has_formula(layer) or not name.endswith(".weight"):
            return None
        with self._loaded(layer):
            return merged_weight(layer)

    def is_saved(self, name: str) -> bool:
        """Whether the weight is written as the adapter holds it: trained in full, or carried."""
        return name in self._saved and name not in self._layers

    def origin(self, name: str) -> tuple[str, object]:
        """What decides the folded weight: names of one tied weight may part in it."""
        if name in self._layers:
            return "layer", self._layers[name][0]
        return ("saved", self._saved[name].data_ptr()) if name in self._saved else ("base", None)

    def _without_layer(self, name: str) -> Tensor:
        if name in self._saved:
            return self._saved[name].to(torch.float32, copy=True)
        return self.base(name)

    @contextlib.contextmanager
    def _loaded(self, layer: Any) -> Iterator[None]:
        """Within, the layer's base weights are in memory, and may be changed in place."""
        unit = self._units[layer]
        fill(unit, self.base)
        try:
            yield
        finally:
            empty(unit)


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


@dataclass(frozen=True)
class OutputPlan:
    """What the merged checkpoint holds, by key.

    `tensors`: the shape and dtype of each, on the meta device. `names_of`: the weights that it is
    made of, where it is not the base's. `dtype_of`: what each weight of the model is rounded to.
    `wanted`: the dtype for all, or None. `unties`: the adapter changes one end of a tied pair, and
    both are written.
    """

    wanted: torch.dtype | None
    tensors: dict[str, Tensor]
    names_of: dict[str, list[str]]
    dtype_of: dict[str, torch.dtype]
    unties: bool

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """That of most of the bytes."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])


def plan_output(folding: Folding, dtype: torch.dtype | None) -> OutputPlan:
    """Every tensor of the base once, under its own key. `dtype` None: each in its own.

    The keys of converted weights, and the one that the files lack where the adapter parts a tied
    pair, are those that transformers would save them under.
    """
    base = folding.base_model

    def planned(shape: tuple[int, ...], own: torch.dtype) -> Tensor:
        written = dtype if dtype is not None and own.is_floating_point else own
        return torch.empty(shape, dtype=written, device="meta")

    tensors = {key: planned(stored.shape, stored.dtype) for key, stored in base.stored.items()}
    ties = [tie for tie in base.ties if len({folding.origin(name) for name in tie}) > 1]
    parted = frozenset[str]().union(*ties)
    names_of: dict[str, list[str]] = {}
    dtype_of = {name: dtype or place.dtype for name, place in base.weights.items()}
    for name in sorted(folding.changed | parted):
        place = base.weights[name]
        keys = [place.key]
        if name in parted or name in base.converted:
            weight = {name: torch.empty(place.shape, device="meta")}
            keys = list(revert_weight_conversion(base.vlm.model, weight))
        for key in keys:
            names_of.setdefault(key, []).append(name)
            if key not in tensors:
                assert name in parted, (name, key)
                tensors[key] = planned(place.shape, place.dtype)
            dtype_of[name] = tensors[key].dtype
    return OutputPlan(dtype, tensors, names_of, dtype_of, unties=bool(ties))


def output_tensors(folding: Folding, plan: OutputPlan, key: str) -> dict[str, Tensor]:
    """The tensor to write under `key`, and those that are made with it, in their dtypes; bit for
    bit the base's where unchanged."""
    names, base = plan.names_of.get(key), folding.base_model
    if names is None:
        made = {key: read_tensor(base.stored[key])}
    elif names[0] in base.converted:
        weights = {name: folding.folded(name) for name in names}
        made = revert_weight_conversion(base.vlm.model, weights)
    else:
        made = {key: folding.folded(names[0])}
    return {key: value.to(plan.tensors[key].dtype) for key, value in made.items()}


def write_merged(folding: Folding, plan: OutputPlan, folder: Path, *, shard_size: str) -> None:
    """Write the planned weights, and all that a server needs beside them, to the new `folder`.

    Holds one shard at a time (and what folding a tensor takes). Raises OSError for a full disk.
    """
    folder.mkdir(parents=True)
    split = split_torch_state_dict_into_shards(plan.tensors, max_shard_size=shard_size)
    for file, keys in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for key in keys:
            if key not in shard:
                shard |= output_tensors(folding, plan, key)
        contents = {key: shard.pop(key).contiguous() for key in keys}
        save_file(contents, folder / file, metadata={"format": "pt"})
        del shard, contents
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_other_files(folding, folder, plan)


def _write_other_files(folding: Folding, folder: Path, plan: OutputPlan) -> None:
    """Licence, custom code, processor, generation config: what lies beside the base's weights, as
    it is; but config.json and the processor's files anew where they change."""
    vlm, base = folding.vlm, folding.base_model.vlm
    if vlm.commit is not None:
        with contextlib.suppress(OSError):  # a model without one
            cached_file(vlm.source, GENERATION_FILE, revision=vlm.commit)
    config_file = cached_file(vlm.source, CONFIG_FILE, revision=vlm.commit)
    assert config_file is not None, "load_vlm has read it"
    ours: set[str] = set()
    if _processor_state(vlm.processor) != _processor_state(base.processor):
        vlm.processor.save_pretrained(folder)
        ours |= set(PROCESSOR_FILES)
        if _tokenizer_state(vlm.processor) != _tokenizer_state(base.processor):
            ours |= {path.name for path in folder.iterdir()}
    for path in sorted(Path(config_file).parent.iterdir()):
        if path.name in ours or path.name.endswith(WEIGHT_SUFFIXES) or path.name.startswith("."):
            continue
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
        elif path.name == TEMPLATES_FOLDER:
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
    if plan.wanted is not None or plan.unties:
        config = json.loads(Path(config_file).read_text(encoding="utf-8"))
        text = json.dumps(_config_for(config, plan.wanted, unties=plan.unties), indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _processor_state(processor: ProcessorMixin) -> tuple[object, ...]:
    return processor.to_dict(), processor.chat_template, _tokenizer_state(processor)


def _tokenizer_state(processor: ProcessorMixin) -> tuple[object, ...]:
    tokenizer = processor.tokenizer
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
    return tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.padding_side, backend


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
