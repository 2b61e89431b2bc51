"""A picture from a path, a URL, a `data:` URL, base64 or bytes to upright RGB.

first frame -> EXIF orientation -> 16 bit scaled to 8 -> transparency laid on white -> RGB

ref -> file below the row's folder        locations.py
    -> downloaded file, by content        fetch.py
    -> bytes in the row
file or bytes -> header (format and size checked here) -> decode -> upright RGB
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image
from PIL import ExifTags
from PIL.Image import Transpose

from vlmtune.data.fetch import check_url, fetch
from vlmtune.data.locations import (
    HEAD_BYTES,
    NoSuchFile,
    content_kind,
    find_file,
    format_url,
    is_readable_kind,
    is_url,
    printable,
)
from vlmtune.data.types import Image, Media, MediaPolicy, Video
from vlmtune.errors import VlmtuneError, shorten
from vlmtune.files import digest, file_state

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


_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_DATA_URL = re.compile(r"data:(?P<kind>[^;,]*)(?:;[^;,]+)*?(?P<base64>;base64)?,", re.IGNORECASE)
_HEADERS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


def decode_data_url(ref: str) -> bytes:
    """The bytes of a base64 `data:` URL. Raises VlmtuneError."""
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


def decode_bare_base64(ref: str) -> bytes | None:
    """The bytes of `ref` where it is base64 of something that starts like a picture."""
    if len(ref) < 32 or not _BASE64.fullmatch(ref):
        return None
    try:
        decoded = base64.b64decode("".join(ref.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.startswith(_HEADERS) else None


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may read: no format whose reader starts a program (EPS) or is rarely looked at."""

_UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,  # no such frame
    IndexError,  # GIF: a colour beyond the palette
    TypeError,  # TIFF: a tag of another type
    struct.error,  # GIF: cut off in the header of the second frame
)


@dataclass(frozen=True)
class OpenedImage:
    """A decoded picture and what is worth counting about it: fixed wordings, for `Sample.notes`."""

    picture: PIL.Image.Image
    notes: tuple[str, ...]


def locate_image(image: Image) -> Path | bytes:
    """The file or the bytes that `image` stands for; a URL is fetched, where that is allowed.

    Raises VlmtuneError where there is no such file, where it may not be read, or where the
    reference is of an unknown kind.
    """
    return _locate(image.ref, image.base_dir, image.content, image.media_policy, what="picture")


def locate_video(video: Video) -> Path | bytes:
    """As `locate_image`, of a video that is one file."""
    assert isinstance(video.ref, str), "a list of frames is no file"
    return _locate(video.ref, video.base_dir, video.content, video.media_policy, what="video")


def locate_media(media: Media) -> None:
    """Look for a picture, a video file or a video's frames; a URL is checked but not fetched.

    Raises VlmtuneError.
    """
    what = "picture" if isinstance(media, Image) else "video"
    refs = media.ref if isinstance(media.ref, tuple) else (media.ref,)
    for ref in refs:
        if media.content is None and is_url(ref):
            check_url(ref, media.media_policy)
        else:
            _locate(ref, media.base_dir, media.content, media.media_policy, what=what)


def open_image(image: Image, *, max_pixels: int) -> PIL.Image.Image:
    """`read_image`'s picture, without its notes."""
    return read_image(image, max_pixels=max_pixels).picture


def read_image(image: Image, *, max_pixels: int) -> OpenedImage:
    """Decode a picture: first frame, EXIF orientation applied, RGB (transparent on white).

    More than `max_pixels` pixels are refused from the header, before anything is decoded.
    Raises VlmtuneError with the reason.
    """
    with _opened(image, max_pixels) as (opened, name):
        notes = frame_notes(opened)
        opened.load()
        orientation, also = orientation_of(opened)
        picture = to_rgb(opened, name)
        return OpenedImage(upright(picture, orientation), (*notes, *also))


def verify_image(image: Image, *, max_pixels: int) -> tuple[int, int]:
    """Decode a picture in full; its upright (width, height). Raises as `read_image` does."""
    return read_image(image, max_pixels=max_pixels).picture.size


def upright_size(image: Image, *, max_pixels: int) -> tuple[int, int]:
    """The upright (width, height) from the header; nothing is decoded. Raises VlmtuneError."""
    with _opened(image, max_pixels) as (opened, _):
        orientation, _ = orientation_of(opened)
        # Of a TIFF, Pillow gives the sides as they will be.
        return opened.size if opened.format == "TIFF" else upright_sides(opened.size, orientation)


@contextlib.contextmanager
def reading_picture() -> Iterator[None]:
    """Within, an OSError becomes a VlmtuneError: a file gone or locked since it was found."""
    try:
        yield
    except OSError as error:
        raise VlmtuneError(f"a picture cannot be read ({error.strerror or error})") from error


def content_digest(image: Image) -> str:
    """The SHA-256 of a picture's bytes, as 64 hexadecimal digits. Raises VlmtuneError."""
    with _stream(locate_image(image)) as stream:
        return digest(stream)


def media_identity(media: Media) -> list[object]:
    """What changes where the content of a picture, a video or its frames does: a file's path, size
    and time of change; else the digest of the bytes. Raises VlmtuneError, or OSError where a file
    is gone meanwhile."""
    what = "picture" if isinstance(media, Image) or isinstance(media.ref, tuple) else "video"
    identity: list[object] = [type(media).__name__, what]
    for ref in media.ref if isinstance(media.ref, tuple) else (media.ref,):
        found = _locate(ref, media.base_dir, media.content, media.media_policy, what=what)
        if isinstance(found, bytes):
            identity.append(digest(found))
        else:  # a download is called by its content, and has another time when it comes anew
            identity.append(found.name if is_url(ref) else file_state(found))
    return identity


def _locate(
    ref: str, base_dir: Path, content: bytes | None, media_policy: MediaPolicy, *, what: str
) -> Path | bytes:
    if content is not None:
        if not content:
            raise VlmtuneError(f"the {what}'s bytes are empty", got=printable(ref) or "no bytes")
        return content
    if is_url(ref):
        return fetch(ref, media_policy)
    if ref[:5].lower() == "file:":
        raise VlmtuneError(
            "file: URLs are not supported", got=printable(ref), do="give the plain path"
        )
    if ref[:5].lower() == "data:":
        return decode_data_url(ref)
    try:
        return find_file(
            ref, base_dir=base_dir, allow_outside=media_policy.allow_outside_paths, what=what
        )
    except NoSuchFile:
        # Only now: base64 of a JPEG starts with "/9j/" and looks like a path.
        decoded = decode_bare_base64(ref)
        if decoded is None:
            raise
        return decoded


@contextlib.contextmanager
def _opened(image: Image, max_pixels: int) -> Iterator[tuple[PIL.Image.Image, str]]:
    """The picture with its header read and its size checked, and its name for messages; whatever
    Pillow finds wrong, here or in the body of `with`, is raised as a VlmtuneError."""
    found = locate_image(image)
    name = _name(image, found)
    with _stream(found) as stream, warnings.catch_warnings():
        # The pixel limit is ours (Pillow warns at a fixed one); what is broken is raised or noted.
        warnings.simplefilter("ignore")
        try:
            with PIL.Image.open(stream, formats=FORMATS) as opened:
                _check_size(opened, name, max_pixels)
                yield opened, name
        except PIL.Image.DecompressionBombError as error:
            raise VlmtuneError(
                "the picture has too many pixels to be decoded safely",
                got=f"{name}: {error}",
                expected=f"at most {max_pixels} pixels (data.max_image_pixels)",
            ) from error
        except PIL.UnidentifiedImageError as error:
            raise _unidentified(stream, name) from error
        except _UNDECODABLE as error:
            raise VlmtuneError(
                f"the picture cannot be decoded ({str(error) or type(error).__name__})",
                got=name,
                do="replace the file; it may be cut off",
            ) from error


def _stream(found: Path | bytes) -> BinaryIO:
    if isinstance(found, bytes):
        return io.BytesIO(found)
    try:
        return found.open("rb")
    except OSError as error:
        raise VlmtuneError(
            f"the picture file cannot be read ({error.strerror})", got=printable(str(found))
        ) from error


def _name(image: Image, found: Path | bytes) -> str:
    if image.content is not None:
        named = f" ({printable(image.ref)})" if image.ref else ""
        return f"{len(image.content)} bytes{named}"
    if is_url(image.ref):
        return format_url(image.ref)
    return printable(str(found)) if isinstance(found, Path) else f"{len(found)} bytes of base64"


def _unidentified(stream: BinaryIO, name: str) -> VlmtuneError:
    stream.seek(0)
    kind = content_kind(stream.read(HEAD_BYTES))
    if kind is not None and is_readable_kind(kind):
        return VlmtuneError(
            f"the picture cannot be decoded (it begins like {kind}, but its header is broken)",
            got=name,
            do="replace the file",
        )
    return VlmtuneError(
        "not a picture in a known format" + (f", but {kind}" if kind else ""),
        got=name,
        expected="PNG, JPEG, WebP, GIF, BMP or TIFF",
        do="convert it, or remove the sample",
    )


def _check_size(opened: PIL.Image.Image, name: str, max_pixels: int) -> None:
    width, height = opened.size
    if width * height == 0:
        raise VlmtuneError("the picture has no pixels", got=f"{name}: {width} x {height}")
    if width * height > max_pixels:
        raise VlmtuneError(
            "the picture has too many pixels",
            got=f"{name}: {width} x {height} = {width * height}",
            expected=f"at most {max_pixels} (data.max_image_pixels)",
            do="make it smaller, or raise data.max_image_pixels",
        )
