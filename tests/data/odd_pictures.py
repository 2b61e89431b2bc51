"""Pictures made for tests: any PNG by its chunks, pictures turned by EXIF, and damaged files."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import PIL.Image
from PIL.Image import Transpose

_INVERSE = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


def encoded(picture: PIL.Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png(*chunks: bytes, width: int = 1, height: int = 1) -> bytes:
    """A PNG of which only the first pixel is there, with `chunks` after its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0\0\0\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def turned(picture: PIL.Image.Image, orientation: int) -> tuple[PIL.Image.Image, PIL.Image.Exif]:
    """`picture` as a camera stores it, and the EXIF data that say how it is to be turned."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    turn = _INVERSE.get(orientation)
    return (picture if turn is None else picture.transpose(turn)), exif


def noise(mode: str = "RGB") -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).convert(mode)


def _still(kind: str, mode: str = "RGB", **options: object) -> bytes:
    return encoded(noise(mode), kind, **options)


def _deep(kind: str) -> bytes:
    values = np.random.default_rng(0).integers(0, 65536, (20, 24), dtype=np.uint16)
    return encoded(PIL.Image.fromarray(values), kind)


def _several(kind: str) -> bytes:
    frames = [noise(), noise().rotate(180)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=40)


def _with_exif(kind: str) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x010E] = "a description"
    return encoded(noise(), kind, exif=exif)


SEEDS: dict[str, Callable[[], bytes]] = {
    "PNG": partial(_still, "PNG"),
    "PNG palette": partial(_still, "PNG", "P"),
    "PNG 16 bit": partial(_deep, "PNG"),
    "PNG animated": partial(_several, "PNG"),
    "PNG EXIF": partial(_with_exif, "PNG"),
    "JPEG": partial(_still, "JPEG"),
    "JPEG progressive": partial(_still, "JPEG", progressive=True),
    "JPEG CMYK": partial(_still, "JPEG", "CMYK"),
    "JPEG EXIF": partial(_with_exif, "JPEG"),
    "GIF": partial(_still, "GIF"),
    "GIF animated": partial(_several, "GIF"),
    "WebP": partial(_still, "WEBP"),
    "WebP lossless": partial(_still, "WEBP", lossless=True),
    "WebP animated": partial(_several, "WEBP"),
    "TIFF": partial(_still, "TIFF"),
    "TIFF 16 bit": partial(_deep, "TIFF"),
    "TIFF LZW": partial(_still, "TIFF", compression="tiff_lzw"),
    "TIFF pages": partial(_several, "TIFF"),
    "BMP": partial(_still, "BMP"),
    "BMP palette": partial(_still, "BMP", "P"),
}
"""Makers of pictures of 24 x 20 pixels."""


def damaged(content: bytes, *, num: int, seed: str) -> Iterator[bytes]:
    """`num` copies with a few bytes changed, some cut off, the same ones for a `seed`; of a PNG
    each is followed by itself with right checksums."""
    chance = random.Random(seed)
    for _ in range(num):
        broken = bytearray(content)
        # Headers break in more ways than pixels do.
        end = chance.choice((len(broken), min(len(broken), 200)))
        for _ in range(chance.choice((1, 1, 2, 5, 20))):
            broken[chance.randrange(end)] = chance.randrange(256)
        if chance.random() < 0.2:
            del broken[chance.randrange(1, len(broken)) :]
        yield bytes(broken)
        if broken.startswith(b"\x89PNG"):
            yield with_checksums(bytes(broken))


def with_checksums(content: bytes) -> bytes:
    """A PNG with right checksums: else damage never gets further than them."""
    rest, whole = content[8:], content[:8]
    while len(rest) >= 12:
        end = 8 + struct.unpack(">I", rest[:4])[0]
        whole += chunk(rest[4:8], rest[8:end])
        rest = rest[end + 4 :]
    return whole + rest
