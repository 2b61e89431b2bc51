"""WebDataset shards by number: as written; nothing is extracted or unpickled."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import pytest

from vlmtune.data.sources.tar import Member, open_tar, row_of, split_name
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError

HERE = Source("a.tar", 7)


def _shard(path, members, tar_format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _sample(n: int) -> list[tuple[str, bytes]]:
    key = f"{'d' * (n * 40)}/é{n:03}"  # short names, and such as need a header of their own
    return [
        (f"{key}.JPG", bytes([n]) * (n * 700)),
        (f"{key}.json", json.dumps({"id": n}).encode()),
        (f"{key}.txt", f"text {n}\n".encode()),
    ]


def _row(n: int) -> dict:
    (name, content), _, _ = _sample(n)
    image = {"bytes": content, "path": name}
    return {"__key__": name.removesuffix(".JPG"), "id": n, "text": f"text {n}", "image": image}


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("again", [False, True])
def test_samples_in_any_order_are_those_that_were_written(
    tmp_path, cache_dir, always_kept, tar_format, again
):
    path = _shard(tmp_path / "a.tar", [m for n in range(8) for m in _sample(n)], tar_format)
    if again:
        open_tar(path, cache_dir=cache_dir)
    rows = pickle.loads(pickle.dumps(open_tar(path, cache_dir=cache_dir)))
    assert len(rows) == 8
    assert [rows[n] for n in (5, 0, 7, 2)] == [_row(n) for n in (5, 0, 7, 2)]
    assert rows[1] != _row(2)
    assert rows.place(7).line == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "cache"]


class Trap:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize("again", [False, True])
def test_pickles_and_other_files_are_counted_and_left_alone(
    tmp_path, cache_dir, caplog, always_kept, again
):
    trap = pickle.dumps(Trap())
    members = []
    for n in range(2):
        members += [(f"{n}.png", b"p"), (f"{n}.pyd", trap), (f"{n}.pth", trap), (f"{n}.cls", b"3")]
    path = _shard(tmp_path / "a.tar", [(".hidden.png", b"x"), ("README", b"x"), *members])
    if again:
        open_tar(path, cache_dir=cache_dir)
        caplog.clear()
    with caplog.at_level("INFO", logger="vlmtune"):
        rows = open_tar(path, cache_dir=cache_dir)
    image = {"bytes": b"p", "path": "1.png"}
    assert rows[1] == {"__key__": "1", "label": "3", "image": image}
    (record,) = caplog.records
    for count in (".pth (2)", ".pyd (2)", "hidden or without an extension (2)"):
        assert count in record.getMessage()


def test_links_are_not_followed(tmp_path, cache_dir):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("0.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("0.png", "1.png"):
            tar.addfile(tarfile.TarInfo(name))
    rows = open_tar(path, cache_dir=cache_dir)
    assert [set(rows[n]) for n in range(len(rows))] == [{"__key__", "image"}] * 2


def test_files_of_a_sample_that_are_apart_are_an_error(tmp_path, cache_dir):
    path = _shard(tmp_path / "a.tar", [("0.png", b""), ("1.png", b""), ("0.txt", b"")])
    with pytest.raises(VlmtuneError, match="not next to each other.*got: 0.*--sort=name"):
        open_tar(path, cache_dir=cache_dir)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:700], "cannot be read as a tar file"),
        (lambda content: content[:1024] + b"x" * 512 + content[1536:], "broken at byte 1025"),
        (lambda content: b"no tar file" * 100, "cannot be read as a tar file"),
        (lambda content: b"", "cannot be read as a tar file"),
    ],
)
def test_a_broken_shard_is_named(tmp_path, cache_dir, damage, reason):
    path = _shard(tmp_path / "a.tar", [("0.png", b"a" * 300), ("0.txt", b"b" * 300)])
    assert len(open_tar(path, cache_dir=cache_dir)) == 1
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(VlmtuneError, match=reason) as caught:
        open_tar(path, cache_dir=cache_dir)
    assert caught.value.file == str(path)


def test_a_shard_without_its_mark_at_the_end_is_read_and_said(tmp_path, cache_dir, caplog):
    path = _shard(tmp_path / "a.tar", [("0.png", b"a"), ("1.png", b"b")])
    path.write_bytes(path.read_bytes()[:2048])
    with caplog.at_level("INFO", logger="vlmtune"):
        assert len(open_tar(path, cache_dir=cache_dir)) == 2
    assert "may be cut off" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("d.e/a.seg.PNG", ("d.e/a", "seg.png")),
        ("./a/b.json", ("./a/b", "json")),
        ("a/.jpg", None),
        (".a.jpg", None),
        ("a", None),
        ("d.e/a", None),
    ],
)
def test_a_name_is_cut_at_the_first_dot_of_its_last_part(name, expected):
    assert split_name(name) == expected


def _members(**files: bytes) -> list[Member]:
    return [
        Member(f"d/k.{ending.replace('_', '.')}", ending.replace("_", "."), content)
        for ending, content in files.items()
    ]


def test_several_pictures_are_in_the_order_of_their_names_or_of_the_json():
    def names(members):
        return [image["path"] for image in row_of("k", members, HERE)["images"]]

    pictures = {"b_png": b"B", "a_png": b"A"}
    assert names(_members(**pictures)) == ["d/k.a.png", "d/k.b.png"]
    listed = json.dumps({"images": ["k.b.png", "x/k.a.png"]}).encode()
    assert names(_members(json=listed, **pictures)) == ["d/k.b.png", "d/k.a.png"]


def test_a_json_list_is_messages_and_named_texts_are_fields():
    row = row_of(
        "k", _members(json=b'[{"role": "user"}]', question_txt="é?".encode(), mp4=b"V"), HERE
    )
    assert row == {"__key__": "k", "messages": [{"role": "user"}], "question": "é?", "video": b"V"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"json": b"{"}, "json cannot be read"),
        ({"json": b'{"a": NaN}'}, "NaN is not a JSON value"),
        ({"json": b"3"}, "the json is a number"),
        ({"json": b"\xff"}, "json is not UTF-8"),
        ({"txt": b"\xff"}, "text is not UTF-8"),
        ({"json": b'{"text": "a"}', "txt": b"b"}, "two values of text"),
        ({"json": b'{"image": "other.png"}', "png": b""}, "names a picture that the sample lacks"),
        ({"json": b'{"image": 3}', "png": b""}, "names a picture that the sample lacks"),
    ],
)
def test_a_bad_sample_is_an_error_at_its_number(files, reason):
    with pytest.raises(SampleError, match=reason) as caught:
        row_of("k", _members(**files), HERE)
    assert (caught.value.file, caught.value.line) == ("a.tar", 7)
