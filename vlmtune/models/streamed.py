"""Runs a model whose weights stay in their files: read before a module runs, dropped after it.

source -> weight_files -> stored_tensors: what is where, from the headers alone
                               read_tensor: one tensor; its pages go when it goes
write_tensors: model.safetensors, or shards and an index; a tensor is asked for when it is due

    headers of the weight files -> stand-ins of one number each, which is the tensor's number
        -> from_pretrained: transformers renames, ties and converts them as it does the weights
        -> which number arrived where: {name in the model: key in the files}
    streaming(model, read): read(name) when a module runs; between, NaN of the right shape

Nothing else of the model is special: the forward pass, PEFT's layers and their hooks are stock. A
weight that was not read when it was needed makes NaN, never a plausible number.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.utils import cached_file

from vlmtune.errors import VlmtuneError, plural
from vlmtune.models.load import build_on_meta, explained, quiet_transformers

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEADER_ALIGNMENT = 8
BYTES_PER_TRIM = 64 * 10**6

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weight file: `key` is its name there."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a checkpoint to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def weight_files(source: str, *, revision: str | None = None) -> list[Path]:
    """The safetensors files of a folder or hub id, in order; downloads what is not in the cache.

    Raises VlmtuneError where there are none, or an index names a file that is not there.
    """
    try:
        return [_located(source, WEIGHTS_FILE, revision)]
    except OSError:
        pass  # sharded, or nothing that we read: the index tells
    try:
        index = json.loads(_located(source, INDEX_FILE, revision).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        return [_located(source, name, revision) for name in names]
    except (json.JSONDecodeError, KeyError) as error:
        raise VlmtuneError(
            f"{INDEX_FILE} is damaged: {error}", file=source, do="copy or download it again"
        ) from error
    except OSError as error:
        raise explained(
            error,
            source,
            what="the weights cannot be read",
            do=f"the model needs {WEIGHTS_FILE}, or the shards and {INDEX_FILE}",
        ) from error


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Every tensor of `files` by its key; reads headers only.

    Raises VlmtuneError for a damaged file, and a key that is in two files.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a mapping)
                    part = opened.get_slice(key)
                    if key in found:
                        raise VlmtuneError(
                            f"tensor {key} is in two weight files",
                            file=file,
                            got=f"it is in {found[key].file.name} too",
                        )
                    found[key] = StoredTensor(
                        file, key, tuple(part.get_shape()), DTYPES[part.get_dtype()]
                    )
        except SafetensorError as error:
            raise VlmtuneError(
                f"a weight file is damaged: {error}", file=file, do="copy or download it again"
            ) from error
    return found


def read_tensor(stored: StoredTensor) -> Tensor:
    """The tensor, in its own dtype. The file is mapped for as long as the tensor lives."""
    with safe_open(stored.file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(stored.key)
    return tensor


def write_tensors(
    folder: Path,
    planned: Sequence[PlannedTensor],
    tensor_of: Callable[[str], Tensor],
    *,
    shard_bytes: int,
) -> list[Path]:
    """Write a checkpoint's weights: files of at most `shard_bytes` (a larger tensor has its own).

    `tensor_of(key)` is called once for each tensor, in order, and its result is written at once.
    Raises OSError where the disk does not take it.
    """
    shards = list(_shards(planned, shard_bytes))
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
    heap = MallocTrimmer()
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, tensor_of, heap)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(p.num_bytes for p in planned)},
            "weight_map": {
                p.key: name for name, shard in zip(names, shards, strict=True) for p in shard
            },
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def size_in_bytes(size: str) -> int:
    """`2GB` as a number of bytes; units are powers of 1000. Raises ValueError for another form."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB|TB)", size)
    if match is None:
        raise ValueError(f"not a size: {size!r}")
    return int(float(match[1]) * UNITS[match[2]])


def _located(source: str, name: str, revision: str | None) -> Path:
    with quiet_transformers():
        path = cached_file(source, name, revision=revision)
    assert path is not None, "cached_file raises where a file is missing"
    return Path(path)


def _shards(planned: Sequence[PlannedTensor], limit: int) -> Iterator[list[PlannedTensor]]:
    shard: list[PlannedTensor] = []
    size = 0
    for tensor in planned:
        if shard and size + tensor.num_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.num_bytes
    if shard:
        yield shard


def _write_file(
    path: Path,
    planned: Sequence[PlannedTensor],
    tensor_of: Callable[[str], Tensor],
    heap: MallocTrimmer,
) -> None:
    """The safetensors format: the header's length, the header as JSON, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in planned:
        header[tensor.key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in planned:
            value = tensor_of(tensor.key).detach()
            assert (tuple(value.shape), value.dtype) == (tensor.shape, tensor.dtype), tensor.key
            stream.write(value.contiguous().reshape(-1).view(torch.uint8).numpy())
            del value
            heap.passed(tensor.num_bytes)


class MallocTrimmer:
    """Gives memory that was freed back to the system, where the C library is glibc.

    It keeps the holes that tensors of many sizes, one after the other, leave in its heap: they grew
    to many times the live tensors. After every tensor, that would double the time of reading.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._num_bytes = 0

    def passed(self, num_bytes: int) -> None:
        """Count tensors of `num_bytes` that were made and dropped."""
        self._num_bytes += num_bytes
        if self._num_bytes >= BYTES_PER_TRIM:
            self._num_bytes = 0
            if self._library is not None and hasattr(self._library, "malloc_trim"):
                self._library.malloc_trim(0)


WRAPPERS = {"base_layer", "original_module"}
"""Path components that PEFT puts between a module and its base weights."""

Reader = Callable[[str], Tensor]


@dataclass(frozen=True)
class WeightMap:
    """A model without weights, and where they are.

    `key_of`: the key in the files of every weight that is there as the model has it. `ties`: names
    of one and the same weight. `converted`: weights that transformers makes out of others when it
    loads. `unused`: keys that have no place in the model.
    """

    model: PreTrainedModel
    stored: Mapping[str, StoredTensor]
    key_of: Mapping[str, str]
    ties: tuple[frozenset[str], ...]
    converted: tuple[str, ...]
    unused: frozenset[str]

    def read(self, name: str) -> Tensor:
        """A weight in float32, read now, in memory of its own."""
        return read_tensor(self.stored[self.key_of[name]]).to(torch.float32, copy=True)


@dataclass(frozen=True)
class _Slot:
    owner: nn.Module
    attribute: str
    name: str

    def fill(self, value: Tensor) -> None:
        # The tensor object stays: a tied one is shared with another module.
        getattr(self.owner, self.attribute).data = value


def map_weights(
    config: PretrainedConfig,
    stored: Mapping[str, StoredTensor],
    *,
    source: str,
    trust_remote_code: bool = False,
) -> WeightMap:
    """The model of `config`, on the CPU, in eval mode, with its weights left in the files.

    Tensors that are not floating-point are loaded. Raises VlmtuneError where the files lack a
    weight, or have one of another shape.
    """
    keys = list(stored)
    assert len(keys) < 2**24, "numbers that float32 tells apart"
    stand_ins = {
        key: torch.tensor(float(number)).expand(stored[key].shape)
        if stored[key].dtype.is_floating_point
        else read_tensor(stored[key])
        for number, key in enumerate(keys)
    }
    kind: Any = type(build_on_meta(config, trust_remote_code=trust_remote_code))
    with quiet_transformers():
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=stand_ins,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    lost = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
    if lost:
        raise VlmtuneError(
            plural(len(lost), f"weight of {source} is", f"weights of {source} are")
            + " missing, or not of the shape in config.json",
            got=", ".join(lost[:3]),
            do="use the weights and the config.json of the same model",
        )
    key_of: dict[str, str] = {}
    converted = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        key = keys[int(tensor.detach().flatten()[0])] if _is_stand_in(tensor) else None
        if key is None or stored[key].shape != tuple(tensor.shape):
            converted.append(name)
        else:
            key_of[name] = key
    # A conversion may keep the shape (a transposed square): no stand-in shows that.
    if any(isinstance(used, WeightConverter) for used in model._weight_conversions):
        converted = converted or list(key_of)
    if not converted:
        _tie_equal(model, key_of, stored)
        for name in key_of:
            slot = _slot(model, name)
            slot.fill(_absent(stored[key_of[name]].shape))
    model.eval().requires_grad_(False)
    return WeightMap(
        model, stored, key_of, _ties(model), tuple(converted), frozenset(info["unexpected_keys"])
    )


def materialize(model: nn.Module, names: Collection[str]) -> None:
    """Give the named weights of a placed model memory of their own, to be loaded into."""
    for name in names:
        slot = _slot(model, name)
        slot.fill(torch.full(getattr(slot.owner, slot.attribute).shape, float("nan")))


@contextlib.contextmanager
def streaming(
    model: nn.Module, names: Collection[str], read: Reader, *, at_once: bool = False
) -> Iterator[None]:
    """Within, a module's weights among `names` are `read` when it runs, and dropped after.

    `model` may be wrapped by PEFT. `at_once`: all are read when `model` itself runs, for a model
    whose modules reach for each other's weights.
    """
    units: dict[nn.Module, list[_Slot]] = {}
    _collect(model, "", model if at_once else None, set(names), units)
    handles = []
    heap = MallocTrimmer()

    def counted(name: str) -> Tensor:
        value = read(name)
        heap.passed(value.nbytes)
        return value

    try:
        for unit, slots in units.items():
            _emptying(slots)()
            handles.append(unit.register_forward_pre_hook(_filling(slots, counted)))
            handles.append(unit.register_forward_hook(_emptying(slots), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def loaded(module: nn.Module, path: str, names: Collection[str], read: Reader) -> Iterator[None]:
    """Within, the weights of the one `module` at `path` (in the base model) are in memory, as
    `read` gives them: they may be changed in place, if they are nobody else's."""
    units: dict[nn.Module, list[_Slot]] = {}
    _collect(module, path, module, set(names), units)
    slots = units.get(module, [])
    for slot in slots:
        slot.fill(read(slot.name))
    try:
        yield
    finally:
        _emptying(slots)()


def weights_at(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The weights that `model`, which may be wrapped by PEFT, has in memory at base names."""
    units: dict[nn.Module, list[_Slot]] = {}
    _collect(model, "", None, set(names), units)
    return {
        slot.name: getattr(slot.owner, slot.attribute).detach()
        for slots in units.values()
        for slot in slots
    }


def _collect(
    module: nn.Module,
    path: str,
    unit: nn.Module | None,
    names: set[str],
    units: dict[nn.Module, list[_Slot]],
) -> None:
    """Which module reads which weights: each its own; PEFT's layers and torch's attention, which
    reach into their children, those of the children too."""
    if unit is None and isinstance(module, (BaseTunerLayer, nn.MultiheadAttention)):
        unit = module
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for attribute, _ in tensors:
        name = f"{path}.{attribute}" if path else attribute
        if name in names:
            units.setdefault(unit or module, []).append(_Slot(module, attribute, name))
    for child_name, child in module.named_children():
        below = path if child_name in WRAPPERS else f"{path}.{child_name}".lstrip(".")
        _collect(child, below, unit, names, units)


def _filling(slots: list[_Slot], read: Reader) -> Callable[..., None]:
    def fill(*_: Any) -> None:
        # All are read before the first is filled in: reading one may use the module's slots.
        values = [read(slot.name) for slot in slots]
        for slot, value in zip(slots, values, strict=True):
            slot.fill(value)

    return fill


def _emptying(slots: list[_Slot]) -> Callable[..., None]:
    def empty(*_: Any) -> None:
        for slot in slots:
            slot.fill(_absent(getattr(slot.owner, slot.attribute).shape))

    return empty


def _absent(shape: tuple[int, ...]) -> Tensor:
    """NaN of any shape in the memory of one number."""
    return torch.tensor(float("nan")).expand(shape)


def _is_stand_in(tensor: Tensor) -> bool:
    """One number, at every place: still a stand-in, whole (a few numbers may have been copied)."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    if all(stride == 0 for size, stride in strides if size > 1):
        return True
    return bool((tensor == tensor.flatten()[0]).all())


def _slot(model: nn.Module, name: str) -> _Slot:
    path, _, attribute = name.rpartition(".")
    return _Slot(model.get_submodule(path), attribute, name)


def _ties(model: nn.Module) -> tuple[frozenset[str], ...]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return tuple(frozenset(names) for names in groups.values() if len(names) > 1)


def _tie_equal(
    model: PreTrainedModel, key_of: Mapping[str, str], stored: Mapping[str, StoredTensor]
) -> None:
    """Tie what the files hold twice: transformers compares the two, and stand-ins differ."""
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    doubled = [(a, b) for a, b in pairs if a in key_of and b in key_of and key_of[a] != key_of[b]]
    if doubled and all(
        torch.equal(read_tensor(stored[key_of[a]]), read_tensor(stored[key_of[b]]))
        for a, b in doubled
    ):
        model.tie_weights()
