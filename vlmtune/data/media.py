"""A picture from a path, a URL, a `data:` URL, base64 or bytes to upright RGB.

ref -> file below the row's folder        safe_path.py
    -> downloaded file, by content        fetch.py
    -> bytes in the row                   embedded.py
file or bytes -> header (format and size checked here) -> decode -> upright RGB    pixels.py
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import PIL.Image

from vlmtune.data.content_kind import HEAD_BYTES, content_kind, is_readable_kind
from vlmtune.data.embedded import decode_bare_base64, decode_data_url
from vlmtune.data.fetch import check_url, fetch, is_url, shown_url
from vlmtune.data.pixels import frame_notes, orientation_of, to_rgb, upright, upright_sides
from vlmtune.data.safe_path import NoSuchFile, find_file, printable
from vlmtune.data.types import Access, Image, Media, Video
from vlmtune.errors import VlmtuneError

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
    return _locate(image.ref, image.base_dir, image.content, image.access, what="picture")


def locate_video(video: Video) -> Path | bytes:
    """As `locate_image`, of a video that is one file."""
    assert isinstance(video.ref, str), "a list of frames is no file"
    return _locate(video.ref, video.base_dir, video.content, video.access, what="video")


def locate_media(media: Media) -> None:
    """Look for a picture, a video file or a video's frames; a URL is checked but not fetched.

    Raises VlmtuneError.
    """
    what = "picture" if isinstance(media, Image) else "video"
    refs = media.ref if isinstance(media.ref, tuple) else (media.ref,)
    for ref in refs:
        if media.content is None and is_url(ref):
            check_url(ref, media.access)
        else:
            _locate(ref, media.base_dir, media.content, media.access, what=what)


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


def content_digest(image: Image) -> str:
    """The SHA-256 of a picture's bytes, as 64 hexadecimal digits. Raises VlmtuneError."""
    found = locate_image(image)
    if isinstance(found, bytes):
        return hashlib.sha256(found).hexdigest()
    with _stream(found) as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _locate(
    ref: str, base_dir: Path, content: bytes | None, access: Access, *, what: str
) -> Path | bytes:
    if content is not None:
        if not content:
            raise VlmtuneError(f"the {what}'s bytes are empty", got=printable(ref) or "no bytes")
        return content
    if is_url(ref):
        return fetch(ref, access)
    if ref[:5].lower() == "file:":
        raise VlmtuneError(
            "file: URLs are not understood", got=printable(ref), do="give the plain path"
        )
    if ref[:5].lower() == "data:":
        return decode_data_url(ref)
    try:
        return find_file(
            ref, base_dir=base_dir, allow_outside=access.allow_outside_paths, what=what
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
        return shown_url(image.ref)
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
        do="convert it, or take the sample out",
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
