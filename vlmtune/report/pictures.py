"""Small copies of pictures as `data:` addresses, within a budget of bytes for the whole page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from vlmtune.data.media import open_image
from vlmtune.data.types import Image
from vlmtune.errors import VlmtuneError

SIDE = 160
QUALITY = 72
MAX_PIXELS = 100_000_000
BUDGET_BYTES = 2_500_000


@dataclass(frozen=True)
class Thumbnail:
    """`src` is empty where there is no picture to show; `missing` then says why."""

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
