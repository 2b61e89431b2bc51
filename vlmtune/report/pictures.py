"""Thumbnails for the page, and the size that the processor gives each picture.

the sample's own grid of patches (t, h, w), where the processor gives one
else each picture is processed alone, and its size is used only if the tokens add up
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from vlmtune.data.encode import Encoder
from vlmtune.data.media import open_image
from vlmtune.data.types import Conversation, Image, Sample
from vlmtune.errors import VlmtuneError, plural

SIDE = 160
QUALITY = 72
MAX_PIXELS = 100_000_000
BUDGET_BYTES = 2_500_000


@dataclass(frozen=True)
class Thumbnail:
    """`src` is empty if there is no picture to show; `missing` then says why."""

    src: str
    width: int
    height: int
    missing: str = ""


@dataclass
class Thumbnails:
    """Makes thumbnails until `budget_bytes` of text are used; each picture once."""

    budget_bytes: int = BUDGET_BYTES
    used_bytes: int = 0
    num_over_budget: int = 0
    _made: dict[Image, Thumbnail] = field(default_factory=dict)

    def of_path(self, path: str) -> Thumbnail:
        """Of a picture file by its full path."""
        return self.of(Image(path, Path("/")))

    def of(self, image: Image) -> Thumbnail:
        if image not in self._made:
            self._made[image] = self._make(image)
        return self._made[image]

    def _make(self, image: Image) -> Thumbnail:
        if self.used_bytes >= self.budget_bytes:
            self.num_over_budget += 1
            return Thumbnail("", SIDE, SIDE, "left out to keep the page small")
        try:
            picture = open_image(image, max_pixels=MAX_PIXELS)
        except VlmtuneError as error:
            return Thumbnail("", SIDE, SIDE, error.message)
        thumbnail = encode_thumbnail(picture)
        self.used_bytes += len(thumbnail.src)
        return thumbnail


def encode_thumbnail(picture: PIL.Image.Image) -> Thumbnail:
    """`picture` with its longer side at most SIDE pixels, as a WebP `data:` address."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=QUALITY, method=4)
    encoded = base64.b64encode(stream.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/webp;base64,{encoded}", small.width, small.height)


def spread(total: int, wanted: int) -> Sequence[int]:
    """`wanted` positions (or all) evenly over range(total), the first and the last among them."""
    if total <= wanted:
        return range(total)
    if wanted == 1:
        return [0]
    return [number * (total - 1) // (wanted - 1) for number in range(wanted)]


GRID = "image_grid_thw"
PIXELS = "pixel_values"


@dataclass(frozen=True)
class PictureSize:
    """`width` and `height` in pixels, upright. `processed`: what the model sees, as `616 x 476` or
    `5 tiles of 512 x 512`. It and `num_tokens` are None where unknown for a single picture."""

    width: int
    height: int
    processed: str | None
    num_tokens: int | None

    @property
    def text(self) -> str:
        """`640 x 480 -> 616 x 476, 374 tokens`."""
        text = f"{self.width} x {self.height}"
        if self.processed is not None:
            text += f" -> {self.processed}"
        return text if self.num_tokens is None else f"{text}, {plural(self.num_tokens, 'token')}"


def picture_sizes(
    conversation: Conversation, sample: Sample, encoder: Encoder
) -> tuple[PictureSize, ...]:
    """Of each picture that is in `sample`, in order."""
    images = conversation.images[: sample.num_images]  # the last ones may have been left out
    pictures = [open_image(image, max_pixels=encoder.max_image_pixels) for image in images]
    processor = encoder.processor
    grid = sample.media.get(GRID)
    if grid is not None and len(grid) == len(pictures):
        seen = [_of_grid(row, processor.image_processor) for row in grid.tolist()]
    else:
        seen = [_alone(picture, processor) for picture in pictures]
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if sum(tokens for _, tokens in seen) != int((sample.input_ids == image_id).sum()):
        return tuple(PictureSize(p.width, p.height, None, None) for p in pictures)
    return tuple(
        PictureSize(picture.width, picture.height, processed, tokens)
        for picture, (processed, tokens) in zip(pictures, seen)
    )


def _of_grid(grid: Sequence[int], image_processor: Any) -> tuple[str, int]:
    frames, rows, columns = grid  # in patches
    side = image_processor.patch_size
    tokens = frames * rows * columns // image_processor.merge_size**2
    return f"{columns * side} x {rows * side}", tokens


def _alone(picture: PIL.Image.Image, processor: Any) -> tuple[str, int]:
    output = processor(text=[processor.image_token], images=[picture], return_tensors="pt")
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    tokens = int((output["input_ids"] == image_id).sum())
    *count, _, height, width = output[PIXELS].shape  # (…, channels, height, width)
    tiles = 1
    for number in count:
        tiles *= number
    size = f"{width} x {height}"
    return (size if tiles == 1 else f"{tiles} tiles of {size}"), tokens
