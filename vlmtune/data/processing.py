"""One call of the processor, and the pictures and videos among its outputs, one at a time.

T tokens of a sample.

    inputs of a sample or a batch -> units, pictures first, each in its order -> keys

A unit is what the vision tower sees at once: a picture, a video or, where the layout is `stacked`
and a picture is cut into tiles, a tile. Padding is taken off, so that a unit is the same whatever
lies beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import PIL.Image
import torch
from torch import Tensor

from vlmtune.data.batches import MediaLayout
from vlmtune.data.tokens import Alignment, align_by_characters, align_by_tokens
from vlmtune.data.video import Clip
from vlmtune.errors import VlmtuneError

_NO_INPUT = {"input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets", "labels"}


class ProcessError(VlmtuneError):
    """The processor refuses the sample, or what it gives cannot be used; without a place."""


@dataclass(frozen=True)
class Processed:
    """`token_fields` are integers of shape (T,), `media` tensors of whatever shape."""

    input_ids: torch.Tensor  # (T,) int64
    token_fields: dict[str, torch.Tensor]
    media: dict[str, torch.Tensor]
    alignment: Alignment


def process(
    processor: Any,
    text: str,
    *,
    pictures: Sequence[PIL.Image.Image] = (),
    clips: Sequence[Clip] = (),
    scale: float = 1.0,
) -> Processed:
    """What `processor` makes of a rendered text with its pictures and videos, whose sides are
    scaled by `scale` first. Raises ProcessError."""
    options: dict[str, Any] = {}
    if "mm_token_type_ids" in processor.model_input_names:
        options["return_mm_token_type_ids"] = True
    if pictures:
        options["images"] = [_scaled(picture, scale) for picture in pictures]
        options.update(_scaled_size(processor, scale))
    if clips:
        options["videos"] = [[_scaled(frame, scale) for frame in clip.frames] for clip in clips]
        options["video_metadata"] = [clip.metadata() for clip in clips]
        options["do_sample_frames"] = False
    try:
        output = processor(
            text=[text],
            return_tensors="pt",
            add_special_tokens=adds_special_tokens(processor.tokenizer, text),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            **options,
        )
    except ValueError as error:
        raise ProcessError(f"the processor refuses the sample ({error})") from error
    input_ids = output["input_ids"][0].to(torch.int64)
    token_fields, media = _sorted(output, length=int(input_ids.shape[0]))
    return Processed(input_ids, token_fields, media, _alignment(processor, text, output))


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """A template that writes the BOS token itself must not get a second one."""
    bos = tokenizer.bos_token
    return bos is None or not text.startswith(bos)


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a rendered text and the characters of each."""
    encoded = tokenizer(
        text,
        add_special_tokens=adds_special_tokens(tokenizer, text),
        return_offsets_mapping=True,
        verbose=False,
    )
    return encoded["input_ids"], encoded["offset_mapping"]


def _alignment(processor: Any, text: str, output: Any) -> Alignment:
    if "text_replacement_offsets" in output:
        replacements = output["text_replacement_offsets"]
        written = [(int(a), int(b)) for a, b in output["offset_mapping"][0].tolist()]
        return align_by_characters(written, replacements[0] if len(replacements) else [])
    plain, offsets = tokenize(processor.tokenizer, text)
    image_id = int(processor.tokenizer.convert_tokens_to_ids(processor.image_token))
    processed = output["input_ids"][0].tolist()
    found = align_by_tokens(plain, offsets, processed, image_id, text=text)
    if found is None:
        raise ProcessError(
            "the processor and its tokenizer do not agree on the text",
            expected="the same tokens outside the pictures",
        )
    return found


def _sorted(output: Any, *, length: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The fields of one integer a token, (T,), and everything else."""
    token_fields, media = {}, {}
    for name, value in output.items():
        if name in _NO_INPUT:
            continue
        if not isinstance(value, torch.Tensor):
            raise ProcessError(
                f"the processor returns {name}, which is not a tensor", got=type(value).__name__
            )
        if tuple(value.shape) == (1, length) and not value.is_floating_point():
            token_fields[name] = value[0].to(torch.int64)
        else:
            media[name] = value
    return token_fields, media


def _scaled(picture: PIL.Image.Image, scale: float) -> PIL.Image.Image:
    if scale == 1.0:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), PIL.Image.Resampling.LANCZOS)


def _scaled_size(processor: Any, scale: float) -> dict[str, Any]:
    """Where every picture is brought to one longest edge, a smaller edge; else nothing."""
    size = dict(processor.image_processor.size)
    given = {name: value for name, value in size.items() if value is not None}
    if scale == 1.0 or set(given) != {"longest_edge"}:
        return {}
    return {"size": {"longest_edge": max(1, round(given["longest_edge"] * scale))}}


Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
MASK = "pixel_attention_mask"
BESIDE_ROWS = ("image_sizes",)
"""Tensors with a row for each picture."""


@dataclass(frozen=True)
class MediaItem:
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


def split_media_items(inputs: Mapping[str, Tensor], layout: MediaLayout) -> list[MediaItem]:
    """The units of a sample's or a batch's `inputs`: its pictures, then its videos."""
    units: list[MediaItem] = []
    for kind in KINDS:
        if PIXELS[kind] in inputs:
            split = _tiles if layout == "stacked" else _rows
            units += [MediaItem(kind, tensors) for tensors in split(inputs, kind)]
    return units


def media_keys_of(inputs: Mapping[str, Tensor], layout: MediaLayout) -> tuple[str, ...]:
    """The key of each unit."""
    return tuple(unit.key for unit in split_media_items(inputs, layout))


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
