"""The merged checkpoint on the disk: planned from headers, written one tensor at a time.

plan_output:  every tensor of the base under its own key; a weight whose tie the adapter breaks
              under a new one
write_merged: the plan as shards, config.json, the base's other files, the processor
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from vlmtune.models.merge_source import CONFIG_FILE, Folding, OnDisk
from vlmtune.models.streamed import Placed
from vlmtune.models.tensor_files import (
    PlannedTensor,
    StoredTensor,
    read_tensor,
    write_tensors,
)

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
    on_disk: OnDisk,
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


def _key_on_disk(placed: Placed, name: str) -> str:
    tensor = torch.empty(0)
    return next(iter(revert_weight_conversion(placed.model, {name: tensor})))


def _copy_other_files(on_disk: OnDisk, folder: Path) -> None:
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
