"""A picture from a path, a `data:` URL or bare base64 to upright RGB.

ref -> bytes or file -> header (size checked here) -> decode -> EXIF orientation -> RGB
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from vlmtune.data.text import shorten
from vlmtune.data.types import Image, Media
from vlmtune.errors import VlmtuneError

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_DATA_URL = re.compile(r"data:(?P<kind>[^;,]*)(?:;[^;,]+)*?(?P<base64>;base64)?,", re.IGNORECASE)
_HEADERS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def locate_image(image: Image) -> Path | bytes:
    """The file or the bytes that `image.ref` stands for; opens no file.

    Raises VlmtuneError where there is no such file or the reference is of an unknown kind.
    """
    ref = image.ref
    if image.content is not None:
        return image.content
    if ref[:8].lower().startswith(("http://", "https://")):
        raise VlmtuneError(
            "pictures are not fetched from the network",
            got=shorten(ref),
            do="download the picture and give its path",
        )
    if ref[:5].lower() == "file:":
        raise VlmtuneError(
            "file: URLs are not understood", got=shorten(ref), do="give the plain path"
        )
    if ref[:5].lower() == "data:":
        return _decode_data_url(ref)
    path = os.path.join(image.base_dir, ref)
    if os.path.isdir(path):
        raise VlmtuneError("the picture is a folder", got=shorten(path), expected="a picture file")
    if os.path.exists(path):
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            raise VlmtuneError("the picture file is empty", got=shorten(path))
        return Path(path)
    decoded = _decode_bare_base64(ref)
    if decoded is not None:
        return decoded
    raise VlmtuneError(
        "no such picture file",
        got=shorten(ref),
        expected=f"a file, relative to {image.base_dir}",
        do="correct the path, or skip such samples with data.on_bad_sample: skip",
    )


def locate_media(media: Media) -> None:
    """Look for a picture, a video file or a video's frames. Raises VlmtuneError."""
    if isinstance(media, Image):
        locate_image(media)
        return
    refs = media.ref if isinstance(media.ref, tuple) else (media.ref,)
    for ref in refs:
        locate_image(Image(ref, media.base_dir, media.content, media.access))


def open_image(image: Image, *, max_pixels: int) -> PIL.Image.Image:
    """Decode a picture: first frame, EXIF orientation applied, RGB (transparent on white).

    More than `max_pixels` pixels are refused from the header, before anything is decoded.
    Raises VlmtuneError with the reason.
    """
    found = locate_image(image)
    name = shorten(str(found)) if isinstance(found, Path) else f"{len(found)} bytes of base64"
    try:
        with warnings.catch_warnings():
            # The limit below is ours; Pillow warns at a fixed one.
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            source = found if isinstance(found, Path) else io.BytesIO(found)
            with PIL.Image.open(source) as opened:
                _check_size(opened, name, max_pixels)
                opened.load()
                upright = PIL.ImageOps.exif_transpose(opened)
                return _to_rgb(upright, name)
    except PIL.Image.DecompressionBombError as error:
        raise VlmtuneError(
            "the picture has too many pixels to be decoded safely",
            got=name,
            expected=f"at most {max_pixels} pixels (data.max_image_pixels)",
        ) from error
    except PIL.UnidentifiedImageError as error:
        raise VlmtuneError(
            "not a picture in a known format",
            got=name,
            expected="PNG, JPEG, WebP, GIF, BMP or TIFF",
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise VlmtuneError(
            f"the picture cannot be decoded ({str(error) or type(error).__name__})",
            got=name,
            do="replace the file; it may be cut off",
        ) from error


def _check_size(opened: PIL.Image.Image, name: str, max_pixels: int) -> None:
    width, height = opened.size
    if width * height > max_pixels:
        raise VlmtuneError(
            "the picture has too many pixels",
            got=f"{name}: {width} x {height} = {width * height}",
            expected=f"at most {max_pixels} (data.max_image_pixels)",
            do="make it smaller, or raise data.max_image_pixels",
        )


def _to_rgb(picture: PIL.Image.Image, name: str) -> PIL.Image.Image:
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
    # A palette or an RGB picture alike gives a new object, detached from the open file.
    return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()


def _decode_data_url(ref: str) -> bytes:
    match = _DATA_URL.match(ref)
    if match is None or not match["base64"]:
        raise VlmtuneError(
            "not a data: URL of a picture",
            got=shorten(ref, 60),
            expected="data:image/png;base64,…",
        )
    try:
        decoded = base64.b64decode("".join(ref[match.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise VlmtuneError(
            f"the data: URL does not hold base64 ({error})", got=shorten(ref, 60)
        ) from error
    if not decoded:
        raise VlmtuneError("the data: URL is empty", got=shorten(ref, 60))
    return decoded


def _decode_bare_base64(ref: str) -> bytes | None:
    """The bytes of `ref` where it is base64 of something that starts like a picture."""
    if len(ref) < 32 or not _BASE64.fullmatch(ref):
        return None
    try:
        decoded = base64.b64decode("".join(ref.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.startswith(_HEADERS) else None
