"""The pictures and videos among a model's inputs, one at a time, and a digest of each.

    inputs of a sample or a batch -> units, pictures first, each in its order -> keys

A unit is what the vision tower sees at once: a picture, a video or, where the layout is `stacked`
and a picture is cut into tiles, a tile. Padding is taken off, so that a unit is the same whatever
lies beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmtune.data.collate import MediaLayout

Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
MASK = "pixel_attention_mask"
BESIDE_ROWS = ("image_sizes",)
"""Tensors with a row for each picture."""


@dataclass(frozen=True)
class Unit:
    """`tensors` are the arguments of the model's `get_image_features` or `get_video_features`;
    views of the inputs where nothing was taken off."""

    kind: Kind
    tensors: dict[str, Tensor]

    @property
    def key(self) -> str:
        """The kind and a digest of the tensors: names, dtypes, shapes and bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return f"{self.kind}:{digest.hexdigest()}"


def kind_of_key(key: str) -> str:
    """`image` or `video`."""
    return key.partition(":")[0]


def split_units(inputs: Mapping[str, Tensor], layout: MediaLayout) -> list[Unit]:
    """The units of a sample's or a batch's `inputs`: its pictures, then its videos."""
    units: list[Unit] = []
    for kind in KINDS:
        if PIXELS[kind] in inputs:
            split = _tiles if layout == "stacked" else _rows
            units += [Unit(kind, tensors) for tensors in split(inputs, kind)]
    return units


def media_keys_of(inputs: Mapping[str, Tensor], layout: MediaLayout) -> tuple[str, ...]:
    """The key of each unit."""
    return tuple(unit.key for unit in split_units(inputs, layout))


def without_pixels(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` but for what only the vision tower reads; grids stay, positions need them."""
    dropped = {*PIXELS.values(), MASK}
    return {name: tensor for name, tensor in inputs.items() if name not in dropped}


def _rows(inputs: Mapping[str, Tensor], kind: Kind) -> Iterator[dict[str, Tensor]]:
    """`flat` media: as many rows as a unit's grid has cells; without a grid, one."""
    pixels = inputs[PIXELS[kind]]
    grids = inputs.get(GRIDS[kind])
    if grids is not None:
        parts = pixels.split(grids.prod(-1).tolist())
        for number, part in enumerate(parts):
            yield {PIXELS[kind]: part, GRIDS[kind]: grids[number : number + 1]}
        return
    beside = [name for name in BESIDE_ROWS if kind == "image" and name in inputs]
    for number in range(len(pixels)):
        row = slice(number, number + 1)
        yield {PIXELS[kind]: pixels[row]} | {name: inputs[name][row] for name in beside}


def _tiles(inputs: Mapping[str, Tensor], kind: Kind) -> Iterator[dict[str, Tensor]]:
    """`stacked` media, (rows, most tiles, 3, H, W): each tile as (1, 1, 3, h, w). A tile of zeros
    is padding, as the models take it; h and w are where the mask ends."""
    pixels, masks = inputs[PIXELS[kind]], inputs.get(MASK)
    for row in range(pixels.shape[0]):
        for column in range(pixels.shape[1]):
            tile = pixels[row, column]
            if not bool(tile.any()):
                continue
            if masks is None:
                yield {PIXELS[kind]: tile[None, None]}
                continue
            mask = masks[row, column]
            height, width = int(mask.any(1).sum()), int(mask.any(0).sum())
            yield {
                PIXELS[kind]: tile[None, None, :, :height, :width],
                MASK: mask[None, None, :height, :width],
            }
