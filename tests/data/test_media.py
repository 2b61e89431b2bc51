"""Pictures come out upright, in RGB, and only from files that are worth decoding."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from vlmtune.data.media import open_image
from vlmtune.data.types import Image
from vlmtune.errors import VlmtuneError

LIMIT = 1_000_000


def _open(ref: object, folder: Path = Path("."), *, max_pixels: int = LIMIT) -> PIL.Image.Image:
    return open_image(Image(str(ref), folder), max_pixels=max_pixels)


def _png_bytes(picture: PIL.Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def halves() -> PIL.Image.Image:
    """Left half red, right half blue; 8 x 4."""
    picture = PIL.Image.new("RGB", (8, 4), "red")
    picture.paste("blue", (4, 0, 8, 4))
    return picture


@pytest.mark.parametrize("name", ["a.png", "with spaces.png", "ünïcödé 図.png", "sub/a.png"])
def test_a_relative_path_is_found_beside_the_data_file(name, tmp_path, halves):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    halves.save(tmp_path / name)
    assert _open(name, tmp_path).tobytes() == halves.tobytes()
    assert _open(tmp_path / name, Path("/nowhere")).tobytes() == halves.tobytes()


def test_a_data_url_and_bare_base64_hold_the_picture(halves):
    encoded = base64.b64encode(_png_bytes(halves)).decode()
    wrapped = "\n".join(encoded[i : i + 76] for i in range(0, len(encoded), 76))
    for ref in (
        f"data:image/png;base64,{encoded}",
        f"DATA:image/png;charset=utf-8;BASE64,{encoded}",
        encoded,
        wrapped,
    ):
        assert _open(ref).tobytes() == halves.tobytes()


def test_a_file_with_a_base64_like_name_is_a_file(tmp_path, halves):
    name = (
        base64.b64encode(_png_bytes(PIL.Image.new("RGB", (1, 1))))[:60].decode().replace("/", "a")
    )
    halves.save(tmp_path / name, "PNG")
    assert _open(name, tmp_path).size == (8, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path, halves):
    stored = {
        1: halves,
        2: halves.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT),
        3: halves.transpose(PIL.Image.Transpose.ROTATE_180),
        4: halves.transpose(PIL.Image.Transpose.FLIP_TOP_BOTTOM),
        5: halves.transpose(PIL.Image.Transpose.TRANSPOSE),
        6: halves.transpose(PIL.Image.Transpose.ROTATE_90),
        7: halves.transpose(PIL.Image.Transpose.TRANSVERSE),
        8: halves.transpose(PIL.Image.Transpose.ROTATE_270),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert _open("a.png", tmp_path).tobytes() == halves.tobytes()


def test_transparency_is_laid_on_white(tmp_path):
    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        PIL.Image.new(mode, (2, 2), colour).save(tmp_path / "a.png")
        picture = _open("a.png", tmp_path)
        # The wrong variant, Pillow's own conversion, leaves it black.
        assert PIL.Image.open(tmp_path / "a.png").convert("RGB").getpixel((0, 0)) == (0, 0, 0)
        assert (picture.mode, picture.getpixel((0, 0))) == ("RGB", (255, 255, 255))
    PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert _open("half.png", tmp_path).getpixel((0, 0)) == (255, 127, 127)


def test_a_palette_with_a_transparent_entry_is_laid_on_white(tmp_path):
    picture = PIL.Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, 0, 200, 0])
    picture.putdata([0, 1])
    picture.save(tmp_path / "p.png", transparency=0)
    opened = _open("p.png", tmp_path)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 200, 0)]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        PIL.Image.fromarray(values).save(tmp_path / name)
        opened = _open(name, tmp_path)
        assert [opened.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode, tmp_path):
    PIL.Image.new("RGB", (4, 4), "white").convert(mode).save(tmp_path / "a.tif")
    opened = _open("a.tif", tmp_path)
    assert (opened.mode, opened.getpixel((1, 1))) == ("RGB", (255, 255, 255))


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert _open("a.gif", tmp_path).getpixel((0, 0)) == (255, 0, 0)


def _png_header(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"0"))


def _chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize("side", [1001, 10_000, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(side, tmp_path):
    (tmp_path / "bomb.png").write_bytes(_png_header(side, side))
    with pytest.raises(VlmtuneError, match="too many pixels.*at most 1000000"):
        _open("bomb.png", tmp_path)


def test_the_pixel_limit_is_inclusive(tmp_path, halves):
    halves.save(tmp_path / "a.png")
    assert _open("a.png", tmp_path, max_pixels=32).size == (8, 4)
    with pytest.raises(VlmtuneError, match="8 x 4 = 32"):
        _open("a.png", tmp_path, max_pixels=31)


def test_a_file_cut_off_is_refused(tmp_path):
    noise = PIL.Image.effect_noise((64, 64), 80).convert("RGB")
    for name in ("a.png", "a.jpg"):
        noise.save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(VlmtuneError, match="cannot be decoded"):
            _open(name, tmp_path)


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("http://example.org/a.png", "not fetched from the network"),
        ("HTTPS://example.org/a.png", "not fetched from the network"),
        ("file:///tmp/a.png", "plain path"),
        ("missing.png", "no such picture"),
        ("nul\0.png", "no such picture"),
        ("x" * 5000, "no such picture"),
        ("data:image/png,abc", "not a data: URL"),
        ("data:image/png;base64,a!b", "does not hold base64"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,aGVsbG8=", "not a picture in a known format"),
        (".", "is a folder"),
    ],
)
def test_references_that_lead_nowhere_are_refused(ref, reason, tmp_path):
    with pytest.raises(VlmtuneError, match=reason) as caught:
        _open(ref, tmp_path)
    assert len(str(caught.value)) < 1000
