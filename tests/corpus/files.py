"""Odd data files: whole files that cannot be used, and odd ones that can.

A case writes its files below a folder and gives the value of `data.train`. `says`: words of the
error; None: the file is taken.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.corpus.pictures import PNG, zipped

ROW = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "red"}],
}
LINE = json.dumps(ROW).encode() + b"\n"
LLAVA = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "red"}]}


@dataclass(frozen=True)
class FileCase:
    make: Callable[[Path], Any]
    says: str | None


def case(content: bytes, says: str | None, *, name: str = "data.jsonl", **entry: Any) -> FileCase:
    """A case of one file; with `entry`, keys of the recipe's entry beside the path."""

    def make(folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return {"path": name, **entry} if entry else name

    return FileCase(make, says)


def named(value: Any, says: str) -> FileCase:
    return FileCase(lambda folder: value, says)


def empty_folder(folder: Path) -> str:
    (folder / "empty").mkdir()
    return "empty"


def linked(folder: Path) -> str:
    os.symlink("gone.jsonl", folder / "link.jsonl")
    return "link.jsonl"


def twice(folder: Path) -> list[str]:
    (folder / "data.jsonl").write_bytes(LINE)
    return ["data.jsonl", "./data.jsonl"]


def same_through_a_link(folder: Path) -> list[str]:
    (folder / "data.jsonl").write_bytes(LINE)
    os.symlink("data.jsonl", folder / "again.jsonl")
    return ["data.jsonl", "again.jsonl"]


def shards(folder: Path) -> str:
    for number in range(3):
        (folder / f"part-{number:03d}.jsonl").write_bytes(LINE)
    return "part-{000..002}.jsonl"


def a_shard_missing(folder: Path) -> str:
    shards(folder)
    return "part-{000..004}.jsonl"


def folders_per_class(folder: Path) -> str:
    for name in ("cat", "dog"):
        (folder / "animals" / name).mkdir(parents=True)
        (folder / "animals" / name / "a.png").write_bytes(PNG)
    return "animals"


def pictures_without_text(folder: Path) -> str:
    (folder / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        (folder / "pictures" / name).write_bytes(PNG)
    return "pictures"


def parquet(rows: dict[str, list[Any]]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(rows), stream)
    return stream.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


GOOD_PARQUET = parquet({"image": [PNG], "question": ["What?"], "answer": ["red"]})
GOOD_TAR = tar({"a.png": PNG, "a.txt": b"red"})

CASES: dict[str, FileCase] = {
    # taken
    "JSON lines": case(LINE * 3, None),
    "byte order mark": case(b"\xef\xbb\xbf" + LINE, None),
    "blank lines between": case(LINE + b"\n  \n" + LINE, None),
    "Windows line ends": case(LINE.replace(b"\n", b"\r\n") * 2, None),
    "no line end at the end": case(LINE.rstrip(), None),
    "no known file ending": case(LINE, None, name="data"),
    "JSON array": case(json.dumps([ROW, ROW]).encode(), None, name="data.json"),
    "JSON array over lines": case(json.dumps([ROW, ROW], indent=2).encode(), None, name="d.json"),
    "JSON array named JSONL": case(json.dumps([LLAVA]).encode(), None),
    "shards": FileCase(shards, None),
    "quoted line breaks": case(
        b'question,answer\n"a\nb?",red\n"c, ""d""?",blue\n', None, name="data.csv"
    ),
    "tabs": case(b"question\tanswer\na?\tred\n", None, name="data.tsv"),
    "named columns": case(
        b"frage;antwort\na?;red\n",
        None,
        name="data.csv",
        format="table",
        columns={"question": "frage", "answer": "antwort"},
    ),
    "parquet": case(GOOD_PARQUET, None, name="data.parquet"),
    "tar": case(GOOD_TAR, None, name="data.tar"),
    "folders per class": FileCase(folders_per_class, None),
    # refused
    "empty": case(b"", "no sample"),
    "blank lines only": case(b"\n \n\t\n", "no sample"),
    "empty array": case(b"[]", "no sample"),
    "missing": named("gone.jsonl", "no such data file"),
    "broken link": FileCase(linked, "no such data file"),
    "device": named("/dev/null", "no regular file"),
    "empty folder": FileCase(empty_folder, "empty"),
    "listed twice": FileCase(twice, "listed twice"),
    "listed twice through a link": FileCase(same_through_a_link, "listed twice"),
    "a shard is missing": FileCase(a_shard_missing, "no such data file"),
    "no shard": named("part-*.jsonl", "no such data file"),
    "pictures without text": FileCase(pictures_without_text, "text"),
    "a picture": case(PNG, r"."),
    "an archive": case(zipped(), "."),
    "UTF-16": case(LINE.decode().encode("utf-16"), "UTF-8|not JSON"),
    "broken array": case(b'[\n{"messages": []},\n{"messages": ]\n', r":3: not JSON", name="d.json"),
    "array of numbers": case(b"[1, 2]", "not an object", name="d.json"),
    "a text": case(b'"hello"\n', "not an object"),
    "a key without rows": case(b'{"version": 1}\n', "no messages|format"),
    "nested too deeply": case(b'{"messages":' + b"[" * 200_000, "nested too deeply"),
    "gzip": case(gzip.compress(LINE), "streaming", name="data.jsonl.gz"),
    "tar.gz": case(gzip.compress(GOOD_TAR), "streaming", name="data.tar.gz"),
    "gzip by content": case(gzip.compress(LINE), "."),
    "cut off tar": case(GOOD_TAR[:700], ".", name="data.tar"),
    "no tar": case(b"hello" * 300, ".", name="data.tar"),
    "empty tar": case(tar({}), "no sample", name="data.tar"),
    "tar without pictures": case(tar({"a.bin": b"1"}), ".", name="data.tar"),
    "pickle in a tar": case(tar({"a.pyd": b"cos\nsystem\n(S'true'\ntR."}), ".", name="data.tar"),
    "cut off parquet": case(GOOD_PARQUET[:-20], ".", name="data.parquet"),
    "no parquet": case(b"hello", ".", name="data.parquet"),
    "parquet without rows": case(
        parquet({"question": pyarrow.array([], pyarrow.string())}), "no sample", name="d.parquet"
    ),
    "no header": case(b"a?,red\nb?,blue\n", ".", name="data.csv"),
    "header only": case(b"question,answer\n", "no sample", name="data.csv"),
    "column twice": case(b"question,question,answer\na,b,c\n", "same name", name="data.csv"),
    "open quote": case(b'question,answer\n"a?,red\n', ".", name="data.csv"),
    "too few fields": case(b"question,answer\na?\n", ":2: ", name="data.csv"),
    "too many fields": case(b"question,answer\na?,b,c\n", ":2: ", name="data.csv"),
    "columns that are not there": case(
        b"a,b\n1,2\n", "frage", name="d.csv", format="table", columns={"question": "frage"}
    ),
    "wrong format named": case(LINE, ":1: ", format="sharegpt"),
    "key twice in a row": case(b'{"id": "a", "id": "b"}\n', "given twice"),
    "two objects in a line": case(LINE.rstrip() + LINE, "not JSON"),
    "a folder of pictures that is not there": case(
        LINE, "no such folder of pictures", image_dir="gone"
    ),
    "a weight of nothing": case(LINE, "weight", weight=0),
    "an unknown format": case(LINE, "format", format="lava"),
    "no data set of the hub": named("owner/name", "hub:owner/name"),
}
