"""Pictures come out upright, in RGB, and only from files that are worth decoding."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.conftest import ROOT
from tests.data.odd_pictures import SEEDS, chunk, damaged, encoded, png, turned
from vlmtune.data.dataset import media_policy_of
from vlmtune.data.media import (
    ANIMATED,
    BROKEN_EXIF,
    PAGES,
    content_digest,
    locate_image,
    locate_media,
    open_image,
    read_image,
    upright_size,
    verify_image,
)
from vlmtune.data.types import LOCAL, Image, MediaPolicy, Video
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.load import load_recipe

LIMIT = 1_000_000


def _open(ref: object, folder: Path = Path("."), *, max_pixels: int = LIMIT) -> PIL.Image.Image:
    return open_image(Image(str(ref), folder), max_pixels=max_pixels)


def _bytes(content: bytes) -> Image:
    return Image("row's bytes", Path("."), content=content)


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
    assert _open(tmp_path / name, tmp_path).tobytes() == halves.tobytes()


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
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind, halves):
    stored, exif = turned(halves, orientation)
    options = {"lossless": True} if kind == "WEBP" else {}
    image = _bytes(encoded(stored, kind, exif=exif, **options))
    assert open_image(image, max_pixels=LIMIT).tobytes() == halves.tobytes()
    assert upright_size(image, max_pixels=LIMIT) == (8, 4)
    assert verify_image(image, max_pixels=LIMIT) == (8, 4)


def test_a_jpeg_is_turned_upright(halves):
    stored, exif = turned(halves.resize((80, 40)), 6)
    image = _bytes(encoded(stored, "JPEG", exif=exif, quality=95))
    with PIL.Image.open(io.BytesIO(image.content)) as untouched:
        assert untouched.size == (40, 80)
    opened = open_image(image, max_pixels=LIMIT)
    assert opened.size == (80, 40) == upright_size(image, max_pixels=LIMIT)
    assert opened.getpixel((5, 20))[0] > 200 and opened.getpixel((75, 20))[2] > 200


def test_a_picture_with_broken_exif_is_taken_as_upright_and_noted(halves):
    good = read_image(_bytes(encoded(halves, "PNG")), max_pixels=LIMIT)
    assert good.notes == ()
    broken = read_image(_bytes(png(chunk(b"eXIf", b"nonsense"))), max_pixels=LIMIT)
    assert broken.notes == (BROKEN_EXIF,)


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


@pytest.mark.parametrize(
    ("kind", "note"), [("GIF", ANIMATED), ("WEBP", ANIMATED), ("PNG", ANIMATED), ("TIFF", PAGES)]
)
def test_the_first_of_several_frames_is_taken_and_noted(kind, note):
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    several = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    opened = read_image(_bytes(several), max_pixels=LIMIT)
    assert opened.picture.getpixel((0, 0)) == (255, 0, 0)
    assert opened.notes == (note,)
    alone = read_image(_bytes(encoded(frames[0], kind, **options)), max_pixels=LIMIT)
    assert alone.notes == ()


def test_the_preview_in_a_camera_jpeg_is_no_second_frame(halves):
    camera = encoded(halves, "MPO", save_all=True, append_images=[halves.resize((2, 1))])
    opened = read_image(_bytes(camera), max_pixels=LIMIT)
    assert (opened.picture.size, opened.notes) == ((8, 4), ())


@pytest.mark.parametrize("side", [1001, 10_000, 30_000, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(side, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(width=side, height=side))
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
        ("nul\0.png", "no such picture file: no file name has such characters"),
        ("half \ud800.png", "no such picture file: no file name has such characters"),
        ("x" * 5000, "no such picture file: too long"),
        ("x" * 300 + ".png", "no such picture file: too long"),
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
    str(caught.value).encode()  # can be printed


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!DOCTYPE html><p>Not found", "an HTML page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "an AVIF picture"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "a video"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript program"),
        (b"PK\3\4" + b"\0" * 60, "a ZIP archive"),
        (b"\x80\4\x95" + b"." * 40, "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "a Git LFS pointer"),
        (b'{"error": "gone"}', "JSON"),
    ],
)
def test_what_is_no_picture_is_called_by_its_name(content, reason, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(VlmtuneError, match=f"not a picture in a known format, but {reason}"):
        _open("a.png", tmp_path)


def test_formats_outside_the_list_are_not_read(halves):
    for kind in ("PPM", "ICO", "TGA", "PCX"):  # Pillow would
        content = encoded(halves.resize((16, 16)), kind)
        with PIL.Image.open(io.BytesIO(content)) as opened:
            opened.load()
        with pytest.raises(VlmtuneError, match="not a picture in a known format"):
            open_image(_bytes(content), max_pixels=LIMIT)


def test_the_name_of_a_file_says_nothing_about_its_format(tmp_path, halves):
    (tmp_path / "a.jpg").write_bytes(encoded(halves, "PNG"))
    (tmp_path / "b.eps").write_bytes(encoded(halves, "PNG"))
    assert _open("a.jpg", tmp_path).tobytes() == halves.tobytes()
    assert _open("b.eps", tmp_path).tobytes() == halves.tobytes()


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_bomb_in_a_text_or_profile_of_a_png_is_refused(kind):
    def with_text(num_bytes: int) -> Image:
        packed = zlib.compress(b"0" * num_bytes)
        head = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
        return _bytes(png(chunk(kind, head + packed)))

    assert open_image(with_text(1000), max_pixels=LIMIT).size == (1, 1)
    with pytest.raises(VlmtuneError, match="cannot be decoded"):
        open_image(with_text(50_000_000), max_pixels=LIMIT)


def test_a_checksum_that_is_wrong_is_refused(halves):
    good = encoded(halves, "PNG")
    for name in (b"IHDR", b"IDAT"):
        broken = bytearray(good)
        broken[broken.index(name) + 6] ^= 1
        with pytest.raises(VlmtuneError, match="cannot be decoded"):
            open_image(_bytes(bytes(broken)), max_pixels=LIMIT)


def test_bytes_after_the_end_and_progressive_jpegs_are_read(halves):
    plain = encoded(halves, "JPEG")
    wanted = open_image(_bytes(plain), max_pixels=LIMIT).tobytes()
    assert open_image(_bytes(plain + b"garbage" * 50), max_pixels=LIMIT).tobytes() == wanted
    progressive = encoded(halves, "JPEG", progressive=True)
    assert progressive != plain
    assert open_image(_bytes(progressive), max_pixels=LIMIT).tobytes() == wanted


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_any_shape_is_opened(size):
    content = encoded(PIL.Image.new("RGB", size, "red"), "PNG")
    assert verify_image(_bytes(content), max_pixels=LIMIT) == size


def test_floating_point_and_wide_values_are_refused():
    for dtype, reason in ((np.float32, "floating-point"), (np.int32, "32-bit")):
        content = encoded(PIL.Image.fromarray(np.full((2, 2), 70_000, dtype)), "TIFF")
        with pytest.raises(VlmtuneError, match=reason):
            open_image(_bytes(content), max_pixels=LIMIT)


def test_a_palette_of_several_transparencies_is_laid_on_white():
    layers = PIL.Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    layers.putpixel((1, 0), (0, 0, 200, 0))
    content = encoded(layers.quantize(4), "PNG")
    with PIL.Image.open(io.BytesIO(content)) as stored:
        assert stored.mode == "P"
    opened = open_image(_bytes(content), max_pixels=LIMIT)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_files_end_in_a_picture_or_in_a_user_error(name):
    content = SEEDS[name]()
    assert verify_image(_bytes(content), max_pixels=LIMIT) == (24, 20)
    refused = 0
    for broken in damaged(content, num=150, seed=name):
        try:
            picture = open_image(_bytes(broken), max_pixels=LIMIT)
        except VlmtuneError:
            refused += 1
        else:
            assert picture.mode == "RGB"
            assert picture.size == upright_size(_bytes(broken), max_pixels=LIMIT)
    assert refused > 0


def test_an_animation_cut_off_anywhere_ends_in_a_picture_or_in_a_user_error():
    content = SEEDS["GIF animated"]()
    endings: list[type[BaseException] | None] = []
    for length in range(1, len(content)):
        try:
            endings.append(read_image(_bytes(content[:length]), max_pixels=LIMIT) and None)
        except VlmtuneError as error:
            endings.append(type(error.__cause__))
    assert {None, struct.error, OSError} <= set(endings)


@pytest.mark.parametrize("kind", [2, 5, 7, 11, 12])  # text, a fraction, bytes, two sorts of float
def test_a_tiff_whose_offsets_are_no_numbers_is_refused(kind):
    content = bytearray(SEEDS["TIFF"]())
    offsets = struct.pack("<HH", 273, 4)  # where the strips begin, as a LONG
    content[content.index(offsets) + 2] = kind
    with pytest.raises(VlmtuneError, match="cannot be decoded"):
        open_image(_bytes(bytes(content)), max_pixels=LIMIT)


def test_a_digest_is_of_the_bytes_wherever_they_are(tmp_path, halves):
    content = encoded(halves, "PNG")
    (tmp_path / "a.png").write_bytes(content)
    wanted = hashlib.sha256(content).hexdigest()
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    for image in (_bytes(content), Image("a.png", tmp_path), Image(url, tmp_path)):
        assert content_digest(image) == wanted
    assert content_digest(_bytes(content + b"x")) != wanted


def test_bytes_of_the_row_go_before_the_name(tmp_path, halves):
    image = Image("gone/a.png", tmp_path, content=encoded(halves, "PNG"))
    assert open_image(image, max_pixels=LIMIT).tobytes() == halves.tobytes()
    with pytest.raises(VlmtuneError, match="bytes are empty"):
        locate_image(Image("a.png", tmp_path, content=b""))
    with pytest.raises(VlmtuneError, match=r"5 bytes \(gone/a.png\)"):
        open_image(Image("gone/a.png", tmp_path, content=b"hello"), max_pixels=LIMIT)


def test_a_picture_outside_is_opened_where_that_is_allowed(tmp_path, halves):
    (tmp_path / "data").mkdir()
    halves.save(tmp_path / "a.png")
    for ref in ("../a.png", str(tmp_path / "a.png")):
        with pytest.raises(VlmtuneError, match="outside.*allow_outside_paths"):
            open_image(Image(ref, tmp_path / "data", media_policy=LOCAL), max_pixels=LIMIT)
        allowed = Image(ref, tmp_path / "data", media_policy=MediaPolicy(allow_outside_paths=True))
        assert open_image(allowed, max_pixels=LIMIT).tobytes() == halves.tobytes()


def test_videos_and_their_frames_are_looked_for_by_the_same_rules(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.mp4").write_bytes(b"clip")
    (tmp_path / "out.mp4").write_bytes(b"clip")
    locate_media(Video("a.mp4", tmp_path / "data"))
    locate_media(Video(("a.mp4", "a.mp4"), tmp_path / "data"))
    with pytest.raises(VlmtuneError, match="no such video file"):
        locate_media(Video(("a.mp4", "b.mp4"), tmp_path / "data"))
    with pytest.raises(VlmtuneError, match="the video is outside"):
        locate_media(Video("../out.mp4", tmp_path / "data"))


def test_the_pages_examples_allow_what_they_say(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text().partition("## Pictures and what is safe")[2]
    examples = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    allowed = []
    (tmp_path / "data").mkdir()
    for name in ("ours.jsonl", "web.jsonl"):
        (tmp_path / "data" / name).touch()
    for example in examples:
        (tmp_path / "recipe.yaml").write_text(f"model: any/model\noutput_dir: run\n{example}")
        allowed.append(media_policy_of(load_recipe(tmp_path / "recipe.yaml").recipe.data))
    assert allowed == [
        MediaPolicy(allow_outside_paths=True),
        MediaPolicy(allow_urls=True, max_download_bytes=20_000_000, url_timeout_seconds=10),
    ]


def test_looking_for_a_url_asks_no_network(tmp_path):
    url = "http://nowhere.invalid/a.png"
    locate_media(Image(url, tmp_path, media_policy=MediaPolicy(allow_urls=True)))
    with pytest.raises(VlmtuneError, match="allow_urls"):
        locate_media(Image(url, tmp_path))
    private = Image("http://192.168.0.1/a.png", tmp_path, media_policy=MediaPolicy(allow_urls=True))
    with pytest.raises(VlmtuneError, match="not public"):
        locate_media(private)
