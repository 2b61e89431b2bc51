"""Runs a model whose weights stay in their files: read before a module runs, dropped after it.

    weight_files -> stored_tensors: which tensor is in which file, from the headers alone
    load_lazily: from_pretrained onto "disk": transformers renames, ties and checks the weights,
                 and says where each is. Those that it makes out of others (fused experts, say)
                 it writes to a scratch folder, one at a time; all others stay where they are
    streaming(model, names, read): read(name) when a module runs; between, NaN of the right shape

Nothing else of the model is special: the forward pass, PEFT's layers and their hooks are stock. A
weight that was not read when it was needed makes NaN, never a plausible number.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.utils import cached_file

from vlmtune.errors import VlmtuneError
from vlmtune.models.families import lies_under
from vlmtune.models.forward import base_name
from vlmtune.models.load import VLM, commit_of, explained, load_vlm, quiet_transformers, read_config

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weight file: `key` is its name there."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


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
                    if key in found:
                        raise VlmtuneError(
                            f"tensor {key} is in two weight files",
                            file=file,
                            got=f"it is in {found[key].file.name} too",
                        )
                    tensor = opened.get_tensor(key)  # mapped, not read
                    found[key] = StoredTensor(file, key, tuple(tensor.shape), tensor.dtype)
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


def _located(source: str, name: str, revision: str | None) -> Path:
    with quiet_transformers():
        path = cached_file(source, name, revision=revision)
    assert path is not None, "cached_file raises where a file is missing"
    return Path(path)


BYTES_PER_TRIM = 32 * 10**6


class MallocTrimmer:
    """Gives memory that was freed back to the system, where the C library is glibc.

    It keeps the holes that tensors of many sizes, one after the other, leave in its heap: they grew
    to many times the live tensors. After every tensor, that would double the time of reading.
    """

    def __init__(self) -> None:
        self._num_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Count a tensor of `num_bytes` that was made."""
        self._num_bytes += num_bytes
        if self._num_bytes >= BYTES_PER_TRIM and sys.platform == "linux":
            self._num_bytes = 0
            library = ctypes.CDLL(None)
            if hasattr(library, "malloc_trim"):
                library.malloc_trim(0)


WRAPPERS = {"base_layer", "original_module"}
"""Path components that PEFT puts between a module and its base weights."""

Reader = Callable[[str], Tensor]


@dataclass(frozen=True)
class LazyModel:
    """A model without weights, and where they are.

    `stored`: the tensors of the model's files by key, those without a place in the model too.
    `weights`: every floating-point weight by its name in the model. `converted`: names of those
    that transformers made out of others, in files of their own. `ties`: names of one and the same
    weight.
    """

    vlm: VLM
    stored: Mapping[str, StoredTensor]
    weights: Mapping[str, StoredTensor]
    converted: frozenset[str]
    ties: tuple[frozenset[str], ...]
    trimmer: MallocTrimmer = dataclasses.field(default_factory=MallocTrimmer)

    def read(self, name: str) -> Tensor:
        """A weight in float32, read now, in memory of its own."""
        value = read_tensor(self.weights[name]).to(torch.float32, copy=True)
        self.trimmer.count(value.nbytes)
        return value


def load_lazily(
    source: str,
    scratch: Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    parts: Mapping[Any, Sequence[str]] | None = None,
) -> LazyModel:
    """The model on the CPU, in eval mode and frozen, with its weights left in the files.

    `scratch`: a folder for converted weights, which must outlive the model. Raises VlmtuneError as
    `load_vlm` does.
    """
    config = read_config(source, revision=revision, trust_remote_code=trust_remote_code)
    revision = commit_of(config) or revision
    stored = stored_tensors(weight_files(source, revision=revision))
    # In the files' own dtype nothing is read at loading; in a narrower one, converted weights would
    # be rounded.
    dtypes = {t.dtype for t in stored.values() if t.dtype.is_floating_point}
    vlm = load_vlm(
        source,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=functools.reduce(torch.promote_types, dtypes or {torch.float32}),
        parts=parts,
        offload_folder=scratch,
    )
    loaded: Any = vlm.model
    converted = stored_tensors(sorted(scratch.glob("*.safetensors")))
    weights = {
        name: converted[name] if name in converted else stored[place["weight_name"]]
        for name, place in _offload_index(loaded).items()
    }
    weights = {name: place for name, place in weights.items() if place.dtype.is_floating_point}
    # Built a second time: with buffers that were never rounded, and without accelerate's hooks.
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    model.tie_weights()  # without memory each module got a parameter of its own
    model._weight_conversions = loaded._weight_conversions
    parted = _part_unequal_ties(model, weights)
    shared: dict[object, nn.Parameter] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, attribute = name.rpartition(".")
        value = _absent(tensor.shape) if name in weights else loaded.state_dict()[name]
        if isinstance(tensor, nn.Parameter):
            tie = name if name in parted else id(tensor)
            value = shared.setdefault(tie, nn.Parameter(value, requires_grad=False))
        setattr(model.get_submodule(path), attribute, value)
    return LazyModel(
        dataclasses.replace(vlm, model=model.eval().requires_grad_(False)),
        stored,
        weights,
        frozenset(converted),
        _ties(model),
    )


def materialize(model: nn.Module, names: Collection[str]) -> None:
    """Give the named weights of a lazily loaded model memory of their own, to be loaded into."""
    for name in names:
        tensor = model.get_parameter(name)
        tensor.data = torch.full(tensor.shape, float("nan"))


Unit = dict[str, Tensor]
"""The weights that one module reads, by their names in the base model."""


def weight_units(
    model: nn.Module, names: Collection[str], *, at_once: bool = False
) -> dict[nn.Module, Unit]:
    """Which module of `model`, which may be wrapped by PEFT, reads which of the weights `names`.

    Each its own; PEFT's layers and torch's attention, which reach into their children, those of the
    children too. `at_once`: `model` itself reads all.
    """
    units: dict[nn.Module, Unit] = {}
    reaching: tuple[str, nn.Module] | None = None
    for path, module in model.named_modules():  # a module before its children
        if reaching is None or not (at_once or lies_under(path, reaching[0])):
            reaches = at_once or isinstance(module, (BaseTunerLayer, nn.MultiheadAttention))
            reaching = (path, module) if reaches else None
        unit = module if reaching is None else reaching[1]
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for attribute, tensor in tensors:
            components = base_name(f"{path}.{attribute}").split(".")
            name = ".".join(c for c in components if c and c not in WRAPPERS)
            if name in names:
                units.setdefault(unit, {})[name] = tensor
    return units


def fill(unit: Unit, read: Reader) -> None:
    # All are read before the first is filled in: reading one may use the unit itself.
    values = {name: read(name) for name in unit}
    for name, tensor in unit.items():
        # The tensor object stays: a tied one is shared with another module.
        tensor.data = values[name]


def empty(unit: Unit) -> None:
    for tensor in unit.values():
        tensor.data = _absent(tensor.shape)


@contextlib.contextmanager
def streaming(
    model: nn.Module, names: Collection[str], read: Reader, *, at_once: bool = False
) -> Iterator[None]:
    """Within, a module's weights among `names` are `read` when it runs, and dropped after.

    `at_once`: all are read when `model` itself runs, for a model whose modules reach for each
    other's weights.
    """
    handles = []
    try:
        for module, unit in weight_units(model, names, at_once=at_once).items():
            empty(unit)
            handles += [
                module.register_forward_pre_hook(lambda *_, unit=unit: fill(unit, read)),
                module.register_forward_hook(lambda *_, unit=unit: empty(unit), always_call=True),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _absent(shape: Sequence[int]) -> Tensor:
    """NaN of any shape in the memory of one number."""
    return torch.tensor(float("nan")).expand(shape)


def _offload_index(model: nn.Module) -> Mapping[str, Mapping[str, str]]:
    """Where each weight of a model on "disk" is, as accelerate's hooks have it."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            index: Mapping[str, Mapping[str, str]] = weights.dataset.index
            return index
    raise AssertionError("a model that was loaded onto the disk has hooks")


def _ties(model: nn.Module) -> tuple[frozenset[str], ...]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return tuple(frozenset(names) for names in groups.values() if len(names) > 1)


def _part_unequal_ties(model: Any, weights: dict[str, StoredTensor]) -> set[str]:
    """Names of weights that the config ties and the files hold with different values.

    transformers leaves such a pair untied, but does not compare what it did not load. The other
    names of a tie get the one place that the files have for it.
    """
    parted: set[str] = set()
    for names in _ties(model):
        places = list({weights[name] for name in sorted(names & weights.keys())})
        first = read_tensor(places[0])
        if all(torch.equal(first, read_tensor(other)) for other in places[1:]):
            weights |= {name: places[0] for name in names - weights.keys()}
        else:
            parted |= names
    for name in parted:
        model.all_tied_weights_keys.pop(name, None)
    return parted
