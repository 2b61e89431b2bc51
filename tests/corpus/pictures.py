"""Odd picture files, made anew: what becomes of each is stated beside it.

`USED` are trained on; `BAD` are refused, with words of the reason. A maker writes the file(s) of
one case below a folder and gives the reference that a row names.
"""

from __future__ import annotations

import base64
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

Make = Callable[[Path], str]


def photo(width: int = 40, height: int = 30, mode: str = "RGB") -> PIL.Image.Image:
    """A gradient, so that cutting and turning it shows."""
    x = np.linspace(0, 255, width, dtype=np.uint8)
    y = np.linspace(0, 255, height, dtype=np.uint8)
    rgb = np.stack(
        [np.tile(x, (height, 1)), np.tile(y[:, None], (1, width)), np.full((height, width), 90)], 2
    )
    return PIL.Image.fromarray(rgb.astype(np.uint8)).convert(mode)


def encoded(picture: PIL.Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format=kind, **options)
    return stream.getvalue()


def saved(name: str, content: bytes) -> Make:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return name

    return make


def png_chunk(kind: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png_of(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG header of any size over a few bytes of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(b"\0" * 100))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")


def with_wrong_checksum() -> bytes:
    content = bytearray(encoded(photo(), "PNG"))
    at = content.index(b"IDAT")
    content[at + 20] ^= 0xFF
    return bytes(content)


def animated(kind: str) -> bytes:
    frames = [photo(), photo().rotate(180), photo().rotate(90)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def turned(orientation: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(), "JPEG", exif=exif)


def with_alpha_palette() -> bytes:
    picture = photo(mode="RGBA")
    picture.putalpha(PIL.Image.linear_gradient("L").resize(picture.size))
    return encoded(picture.quantize(16), "PNG")


def deep_grey(dtype: type, kind: str) -> bytes:
    values = np.linspace(0, 60_000, 40 * 30).reshape(30, 40).astype(dtype)
    return encoded(PIL.Image.fromarray(values), kind)


def link(name: str, target: str) -> Make:
    def make(folder: Path) -> str:
        os.symlink(target, folder / name)
        return name

    return make


def outside(reference: str) -> Make:
    """A good picture beside the folder, reached by `reference`."""

    def make(folder: Path) -> str:
        (folder.parent / "outside.png").write_bytes(encoded(photo(), "PNG"))
        return reference.format(above=folder.parent)

    return make


def linked_outside(folder: Path) -> str:
    outside("")(folder)
    os.symlink(folder.parent / "outside.png", folder / "leads_out.png")
    return "leads_out.png"


def linked_inside(folder: Path) -> str:
    (folder / "real.png").write_bytes(encoded(photo(), "PNG"))
    os.symlink("real.png", folder / "link_inside.png")
    return "link_inside.png"


def absolute_inside(folder: Path) -> str:
    (folder / "inside.png").write_bytes(encoded(photo(), "PNG"))
    return str(folder / "inside.png")


def folder_named(folder: Path) -> str:
    (folder / "folder.png").mkdir()
    return "folder.png"


def fifo(folder: Path) -> str:
    os.mkfifo(folder / "fifo.png")
    return "fifo.png"


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "text")
    return stream.getvalue()


def just(reference: str) -> Make:
    return lambda folder: reference


BOMB = zlib.compress(b"0" * 10**8)
PNG = encoded(photo(), "PNG")
JPEG = encoded(photo(), "JPEG")

USED: dict[str, Make] = {
    "JPEG": saved("plain.jpg", JPEG),
    "progressive JPEG": saved("progressive.jpg", encoded(photo(), "JPEG", progressive=True)),
    "CMYK": saved("cmyk.jpg", encoded(photo(mode="CMYK"), "JPEG")),
    "grey": saved("grey.jpg", encoded(photo(mode="L"), "JPEG")),
    "one bit": saved("onebit.png", encoded(photo(mode="1"), "PNG")),
    "16-bit PNG": saved("deep.png", deep_grey(np.uint16, "PNG")),
    "16-bit TIFF": saved("deep.tif", deep_grey(np.uint16, "TIFF")),
    "palette with alpha": saved("palette.png", with_alpha_palette()),
    "grey with alpha": saved("la.png", encoded(photo(mode="LA"), "PNG")),
    "colour with alpha": saved("rgba.png", encoded(photo(mode="RGBA"), "PNG")),
    "animated GIF": saved("animated.gif", animated("GIF")),
    "animated WebP": saved("animated.webp", animated("WEBP")),
    "animated PNG": saved("animated.png", animated("PNG")),
    "several pages": saved("pages.tif", animated("TIFF")),
    "BMP": saved("plain.bmp", encoded(photo(), "BMP")),
    "one pixel": saved("pixel.png", encoded(photo(1, 1), "PNG")),
    "PNG named JPEG": saved("png.jpg", PNG),
    "JPEG without a name's ending": saved("picture", JPEG),
    "bytes after the end": saved("tail.jpg", JPEG + b"garbage" * 99),
    "link inside": linked_inside,
    "absolute path inside": absolute_inside,
    "blanks and umlauts in the name": saved("ä picture .png", PNG),
    "data URL": just("data:image/png;base64," + base64.b64encode(PNG).decode()),
    "bare base64": just(base64.b64encode(JPEG).decode()),
    **{f"EXIF orientation {n}": saved(f"turned{n}.jpg", turned(n)) for n in range(1, 9)},
}

BAD: dict[str, tuple[Make, str]] = {
    "PNG cut off": (saved("cut.png", PNG[: len(PNG) // 2]), "cannot be decoded"),
    "JPEG cut off": (saved("cut.jpg", JPEG[: len(JPEG) // 2]), "cannot be decoded"),
    "GIF cut off": (saved("cut.gif", animated("GIF")[:60]), "cannot be decoded|not a picture"),
    "WebP cut off": (saved("cut.webp", animated("WEBP")[:60]), "cannot be decoded|not a picture"),
    "only a header": (saved("header.png", PNG[:8]), "cannot be decoded|not a picture"),
    "wrong checksum": (saved("crc.png", with_wrong_checksum()), "cannot be decoded"),
    "zero bytes": (saved("empty.png", b""), "is empty"),
    "text": (saved("text.png", b"hello"), "not a picture"),
    "web page": (saved("page.png", b"<!DOCTYPE html><html></html>"), "not a picture"),
    "SVG": (
        saved("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'></svg>"),
        "not a picture",
    ),
    "PDF": (saved("page.pdf.png", b"%PDF-1.7\n%%EOF"), "not a picture"),
    "PostScript": (saved("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n"), "not a picture"),
    "archive": (saved("zip.png", zipped()), "not a picture"),
    "HEIC": (saved("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), "not a picture"),
    "30,000 x 30,000": (saved("huge.png", png_of(30_000, 30_000)), "too many pixels"),
    "no pixel": (saved("nothing.png", png_of(0, 0)), "cannot be decoded|not a picture"),
    "decompression bomb": (
        saved(
            "bomb.png", png_of(40, 30, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"0" * 10**8)))
        ),
        "cannot be decoded|too",
    ),
    "floating-point": (saved("float.tif", deep_grey(np.float32, "TIFF")), "floating-point"),
    "folder": (folder_named, "is a folder"),
    "broken link": (link("broken.png", "gone.png"), "link"),
    "link to itself": (link("circle.png", "circle.png"), "link"),
    "link that leads out": (linked_outside, "allow_outside_paths"),
    "path that leads out": (outside("../outside.png"), "allow_outside_paths"),
    "absolute path outside": (outside("{above}/outside.png"), "allow_outside_paths"),
    "device": (just("/dev/zero"), "allow_outside_paths"),
    "pipe": (fifo, "not a (plain|regular) file|not a file"),
    "missing": (just("missing.png"), "no such picture file"),
    "name too long": (just("a" * 5000 + ".png"), "."),
    "NUL in the name": (just("a\0b.png"), "."),
    "blank name": (just("  "), "reference cannot be used"),
    "http URL": (just("http://example.org/a.png"), "allow_urls"),
    "https URL": (just("https://example.org/a.png"), "allow_urls"),
    "file URL": (just("file:///etc/hostname"), "plain path"),
    "ftp URL": (just("ftp://example.org/a.png"), "."),
    "data URL of text": (just("data:text/plain,Hi"), "not a data: URL"),
    "data URL without content": (just("data:image/png;base64,"), "empty"),
    "data URL with broken base64": (just("data:image/png;base64,AAA"), "does not hold base64"),
    "data URL of no picture": (
        just("data:image/png;base64," + base64.b64encode(b"hello").decode()),
        "not a picture",
    ),
}
