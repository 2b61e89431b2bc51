"""An opened picture to upright RGB, and what was changed or left out on the way.

first frame -> EXIF orientation -> 16 bit scaled to 8 -> transparency laid on white -> RGB
"""

from __future__ import annotations

import struct

import numpy as np
import PIL.Image
from PIL import ExifTags
from PIL.Image import Transpose

from vlmtune.errors import VlmtuneError

ANIMATED = "animated pictures: the first frame is used"
PAGES = "pictures of several pages: the first is used"
BROKEN_EXIF = "pictures with broken EXIF data: taken as upright"

_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_SIDES_SWAPPED = (5, 6, 7, 8)


def frame_notes(opened: PIL.Image.Image) -> tuple[str, ...]:
    """A note where the file holds more than the frame that is used."""
    notes = {"GIF": ANIMATED, "WEBP": ANIMATED, "PNG": ANIMATED, "TIFF": PAGES}
    # A JPEG's further pictures (format MPO) are previews and depth maps, no frames.
    if opened.format not in notes or not opened.is_animated:  # type: ignore[attr-defined]
        return ()
    return (notes[opened.format],)


def orientation_of(opened: PIL.Image.Image) -> tuple[int, tuple[str, ...]]:
    """The EXIF orientation, 1 to 8, and a note where the EXIF data cannot be read."""
    try:
        value = opened.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, EOFError, struct.error):
        return 1, (BROKEN_EXIF,)
    return (value if value in _TURNS else 1), ()


def upright(picture: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    turn = _TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def upright_sides(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) after `upright`."""
    return (size[1], size[0]) if orientation in _SIDES_SWAPPED else size


def to_rgb(picture: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """A new picture in RGB, detached from its file; `name` is for messages.

    Raises VlmtuneError for values whose brightness is not defined.
    """
    if picture.mode == "F":
        raise VlmtuneError(
            "a picture of floating-point values has no defined brightness",
            got=name,
            expected="8 or 16 bit per channel",
        )
    if picture.mode in _DEEP_MODES:
        values = np.asarray(picture).astype(np.int64)  # (height, width)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise VlmtuneError(
                "a picture of 32-bit values has no defined brightness",
                got=name,
                expected="8 or 16 bit per channel",
            )
        # Pillow's own conversion clips at 255: a 16-bit picture would come out white.
        scaled = ((values + 128) // 257).astype(np.uint8)
        return PIL.Image.fromarray(scaled).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layers = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", layers.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, layers).convert("RGB")
    return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()
