"""Computes the features of pictures and videos before the model's forward pass, and caches them.

    inputs -> units, one picture at a time          data/processing.py
      -> kept under its key?                        vision_cache.py
         else: tower -> the connector's inputs [-> connector -> features]
      [-> connector, with its gradient]  -> features -> `mm_encoder_outputs`

What is kept is the features where neither the tower nor the connector trains, and what the tower
gives the connector where only that trains. A frozen tower runs without a graph, in eval mode and
on one picture at a time: its features are the same bits whatever else is in the batch, and
whether they were kept or not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmtune.data.processing import Kind, MediaItem, kind_of_key, split_media_items, without_pixels
from vlmtune.models.families import Family, part_of
from vlmtune.models.forward import trained_media_names
from vlmtune.models.precision import autocast_dtype
from vlmtune.models.vision_cache import FeatureCache

VERSION = 1
"""Of what is kept of a picture, and how it is made."""

LIBRARIES = ("torch", "transformers", "bitsandbytes")
NOT_OF_THE_TOWER = ("text_config", "_name_or_path", "transformers_version", "architectures")
THREADS = 4


def vision_fingerprint(base: Any, family: Family, parts: Collection[str]) -> str:
    """A digest of the tensors of `parts` (`vision`, `connector`), quantisation constants among
    them, of the config, the kind of device and the versions of the libraries.

    All of these tensors are read: about a second for a gigabyte.
    """
    config = {k: v for k, v in base.config.to_dict().items() if k not in NOT_OF_THE_TOWER}
    described = {
        "version": VERSION,
        "libraries": {name: version(name) for name in LIBRARIES},
        "model": type(base).__name__,
        "config": config,
        "attention": base.config.vision_config._attn_implementation,
        "device": base.device.type,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    named = dict(_tensors_of(base, family, parts))  # a path may be in two parts
    with ThreadPoolExecutor(THREADS) as threads:  # hashing lets go of the interpreter's lock
        for name, content in zip(named, threads.map(_content_digest, named.values()), strict=True):
            digest.update(f"{name} {content} ".encode())
    return digest.hexdigest()[:32]


def _tensors_of(base: Any, family: Family, parts: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    for part in parts:
        for path in family.parts[part]:
            for name, value in base.get_submodule(path).state_dict(prefix=f"{path}.").items():
                if isinstance(value, Tensor) and part_of(name, family) in parts:
                    yield name, value


def _content_digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


Level = Literal["features", "tower"]
"""What of a picture can be kept: its features, or what the tower gives the connector."""


@dataclass
class PrecomputedFeatures(BaseModelOutputWithPooling):
    """What the model takes in place of pixels: `pooler_output`, the features (rows, D) of each
    picture, and of inner layers `deepstack_features`, a list like it for each layer."""

    deepstack_features: list[list[Tensor]] | None = None


def cacheable_stage(base: nn.Module, family: Family) -> Level | None:
    """What of a picture stays the same while `base` trains; None: nothing, or the model's family
    takes no features from outside."""
    if not family.supports_precomputed_features:
        return None
    trained = {part_of(name, family) for name in trained_media_names(base, family)}
    if "vision" in trained:
        return None
    return "tower" if "connector" in trained else "features"


class VisionFeatures:
    """The features of a model's pictures and videos, from `cache` where they are kept.

    `base` is the transformers model; `cache` belongs to it and its frozen weights (None: nothing
    is kept). What trains is read off `base` now, unless `level` says what is kept: outside of
    training, features do even where the tower trains, for as long as no weight changes.
    """

    def __init__(
        self,
        base: Any,
        family: Family,
        cache: FeatureCache | None = None,
        *,
        level: Level | None = None,
    ) -> None:
        level = level or cacheable_stage(base, family)
        assert level is not None, "kept_level says whether there is anything to make apart"
        self.level: Level = level
        self.cache = cache
        self._base = base
        self._family = family
        self._connectors = list(_connectors(base, family))
        paths = (*family.parts["vision"], *family.parts["connector"])
        self._parts = [base.get_submodule(path) for path in paths]

    def outputs(
        self, inputs: Mapping[str, Tensor], media_keys: Sequence[str] = ()
    ) -> tuple[dict[str, PrecomputedFeatures], dict[str, Tensor]]:
        """`mm_encoder_outputs` for the model's forward pass, and `inputs` without pixels.

        `media_keys`: the keys of the pictures, and of the videos, in their order (those of several
        samples one after the other); empty: they are made here, which reads all pixels.
        """
        units = split_media_items(inputs, self._family.image_batching)
        keys = self._keys(units, media_keys)
        made: dict[Kind, list[list[Tensor]]] = {}
        for unit, key in zip(units, keys, strict=True):
            made.setdefault(unit.kind, []).append(self._features(unit, key))
        return {kind: _together(found) for kind, found in made.items()}, without_pixels(inputs)

    def _keys(self, units: Sequence[MediaItem], media_keys: Sequence[str]) -> list[str | None]:
        """In the order of `units`, which is not that of the samples where videos are among them."""
        if self.cache is None:
            return [None] * len(units)
        if not media_keys:
            media_keys = [unit.key for unit in units]
        precision = _precision(self._device)
        by_kind = sorted(media_keys, key=lambda key: kind_of_key(key) == "video")  # stable
        assert [kind_of_key(k) for k in by_kind] == [u.kind for u in units], "keys of other media"
        return [_digest(f"{self.level} {precision} {key}".encode()) for key in by_kind]

    def _features(self, unit: MediaItem, key: str | None) -> list[Tensor]:
        """One picture's rows of features: of the connector, then of those of inner layers."""
        kept = None
        if self.cache is not None and key is not None:
            kept = self.cache.get(key)
        if kept is None:
            kept = self._run(unit)
            if self.cache is not None and key is not None:
                self.cache.put(key, kept)
        else:
            kept = {name: tensor.to(self._device) for name, tensor in kept.items()}
        if self.level == "features":
            return [kept[str(number)] for number in range(len(self._connectors))]
        return self._connect(kept, unit)

    @torch.no_grad()
    def _run(self, unit: MediaItem) -> dict[str, Tensor]:
        """What can be kept of one picture."""
        # A slice of the batch lies at another address, which can change a product's last bits.
        unit = MediaItem(unit.kind, {name: tensor.clone() for name, tensor in unit.tensors.items()})
        with _in_eval(self._parts), _uncached_autocast(self._device):
            given = self._connector_inputs(unit)
            if self.level == "tower":
                return given
            rows = self._connect(given, unit)
        return {str(number): tensor for number, tensor in enumerate(rows)}

    def _connector_inputs(self, unit: MediaItem) -> dict[str, Tensor]:
        """What the connector's modules are called with, as `0.hidden` and `0.<keyword>`.

        The model's own function is run, connector and all: it is what knows which layers of the
        tower are used.
        """
        given: dict[str, Tensor] = {}

        def note(number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given[f"{number}.hidden"] = args[0]
            named = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
            given.update({f"{number}.{name}": value for name, value in named.items()})

        with contextlib.ExitStack() as hooks:
            for number, module in enumerate(self._connectors):
                hooks.enter_context(_noted(module, number, note))
            backbone = self._base.model
            if unit.kind == "image":
                backbone.get_image_features(**unit.tensors, return_dict=True)
            else:
                backbone.get_video_features(**unit.tensors, return_dict=True)
        assert len({name.partition(".")[0] for name in given}) == len(self._connectors)
        return given

    def _connect(self, given: Mapping[str, Tensor], unit: MediaItem) -> list[Tensor]:
        """The rows (rows, D) that each of the connector's modules makes of `_connector_inputs`."""
        rows = []
        for number, module in enumerate(self._connectors):
            start = f"{number}."
            arguments = {n.removeprefix(start): t for n, t in given.items() if n.startswith(start)}
            output = module(arguments.pop("hidden"), **arguments)
            rows.append(output.reshape(-1, output.shape[-1]))
        if self._family.feature_order is not None:
            rows[0] = rows[0][self._family.feature_order(self._base.model, unit.tensors)]
        return rows

    @property
    def _device(self) -> torch.device:
        return next(self._connectors[0].parameters()).device


def _together(found: Sequence[list[Tensor]]) -> PrecomputedFeatures:
    """The pictures' features in the form that the models take."""
    first, *inner = (list(layer) for layer in zip(*found, strict=True))
    return PrecomputedFeatures(pooler_output=first, deepstack_features=inner or None)


def _connectors(base: nn.Module, family: Family) -> Iterator[nn.Module]:
    """The connector's modules, the one for the tower's last output first."""
    for path in family.parts["connector"]:
        module = base.get_submodule(path)
        if isinstance(module, nn.ModuleList):
            yield from module
        else:
            yield module


@contextlib.contextmanager
def _noted(module: nn.Module, number: int, note: Any) -> Iterator[None]:
    """`note(number, args, kwargs)` at each call of `module`."""

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        note(number, args, kwargs)

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _in_eval(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No dropout in `modules`: what is kept must not depend on the random state, nor change it."""
    switched = [m for module in modules for m in module.modules() if m.training]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


def _uncached_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast as it is, but for its memory of cast weights: torch 2.6 would give one that was
    cast here, without a graph, to the forward pass around this, and it would get no gradient."""
    dtype = autocast_dtype(device)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def _precision(device: torch.device) -> str:
    dtype = autocast_dtype(device)
    return "as the weights" if dtype is None else str(dtype)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
