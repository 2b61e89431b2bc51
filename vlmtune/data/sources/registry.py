"""Which source an entry of the recipe names: told by what a file starts with, then by its ending.

A file that is in no known form is an error; nothing is guessed from its name alone but CSV, TSV
and JSON lines, which every text could be.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vlmtune.data.index import stamp_of, unreadable
from vlmtune.data.sources.arrow import FILE_MAGIC, STREAM_MAGIC, open_arrow
from vlmtune.data.sources.containers import (
    Container,
    looks_like_container,
    open_container,
    open_items,
)
from vlmtune.data.sources.dataset_rows import is_dataset_folder, open_dataset_folder, open_hub
from vlmtune.data.sources.delimited import open_delimited
from vlmtune.data.sources.joined import open_coco, open_vqa
from vlmtune.data.sources.json_array import open_json_array
from vlmtune.data.sources.json_text import BOM
from vlmtune.data.sources.jsonl import open_jsonl
from vlmtune.data.sources.parquet import open_parquet
from vlmtune.data.sources.picture_folder import open_picture_folder
from vlmtune.data.sources.rows import Rows
from vlmtune.data.sources.tar_shard import open_tar
from vlmtune.data.text import escaped, shorten
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.paths import HUB, expand_shards

_HEAD_BYTES = 1 << 20
_LINES = (".jsonl", ".ndjson")
_CELLS = (".csv", ".tsv", ".tab")
_STREAMED = (".jsonl.gz", ".ndjson.gz", ".json.gz", ".tar.gz", ".tgz")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
}
_KNOWN = "JSON lines, JSON, CSV, TSV, parquet, Arrow, a tar shard, or a folder of pictures"


def open_rows(entry: DataEntry, *, cache_dir: Path) -> Sequence[Rows]:
    """The files of an entry, in order: one, or the shards of a pattern.

    Raises VlmtuneError where there is none, or it is in no known form, or the entry has keys that
    have no effect on it.
    """
    if entry.path.startswith(HUB):
        _check_keys(entry, {"split", "subset", "revision"}, "a data set of the hub")
        return [open_hub(entry)]
    paths = [Path(name) for name in expand_shards(entry.path)]
    if not paths:
        raise VlmtuneError("no file matches the pattern", file=entry.path, do="correct the path")
    return [_open(path, entry, cache_dir) for path in paths]


def _open(path: Path, entry: DataEntry, cache_dir: Path) -> Rows:
    if os.path.isdir(path):
        if is_dataset_folder(path):
            _check_keys(entry, {"split"}, "a datasets folder")
            return open_dataset_folder(path, split=entry.split)
        _check_keys(entry, set(), "a folder of pictures")
        return open_picture_folder(path, format_name=entry.format)
    head = _read_head(path)
    _check_keys(entry, {"annotations"}, "a file")
    if entry.annotations is not None:
        return _open_vqa(path, head, entry.annotations, cache_dir)
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return open_parquet(path, cache_dir=cache_dir)
    if head.startswith((FILE_MAGIC, STREAM_MAGIC)) or suffix in (".arrow", ".feather"):
        return open_arrow(path, cache_dir=cache_dir)
    if head[257:262] == b"ustar" or suffix == ".tar":
        return open_tar(path, cache_dir=cache_dir)
    _check_text(path, head)
    if suffix in _CELLS:
        return open_delimited(path, cache_dir=cache_dir)
    start = head.removeprefix(BOM).lstrip()
    if start and not start.startswith((b"{", b"[")) and suffix not in (*_LINES, ".json"):
        raise VlmtuneError(
            "the file is in no known form: a text that does not start as JSON",
            file=path,
            got=escaped(shorten(start.split(b"\n")[0].decode("utf-8", "replace"), 60)),
            expected=_KNOWN,
            do="call a file of cells .csv or .tsv, as what it is",
        )
    if start.startswith(b"["):
        return open_json_array(path, cache_dir=cache_dir)
    if start.startswith(b"{") and suffix not in _LINES and looks_like_container(head):
        container = open_container(path, cache_dir=cache_dir)
        if container is not None:
            return _open_container(container, cache_dir)
    return open_jsonl(path, cache_dir=cache_dir)


def _open_container(container: Container, cache_dir: Path) -> Rows:
    if {"images", "annotations"} <= container.lists.keys():
        return open_coco(container, cache_dir=cache_dir)
    rows = open_items(container, cache_dir=cache_dir)
    first = rows.read(0)
    has_answer = any("answer" in key for key in first)
    if "questions" in container.lists and not has_answer:
        raise VlmtuneError(
            "the questions have no answers",
            file=rows.file,
            got=f"keys {', '.join(first)}",
            do="name the file of the answers (VQAv2): {path: …, annotations: …}",
        )
    if "annotations" in container.lists and "question_id" in first and "question" not in first:
        raise VlmtuneError(
            "these are answers without their questions",
            file=rows.file,
            do="name both files (VQAv2): {path: the questions, annotations: the answers}",
        )
    return rows


def _open_vqa(path: Path, head: bytes, annotations: str, cache_dir: Path) -> Rows:
    opened = []
    for file in (path, Path(annotations)):
        start = head if file == path else _read_head(file)
        _check_text(file, start)
        known = looks_like_container(start)
        container = open_container(file, cache_dir=cache_dir) if known else None
        if container is None:
            raise VlmtuneError(
                "the file is no list of VQAv2",
                file=file,
                expected='{"questions": [{"question_id": …}, …]} as path and '
                '{"annotations": [{"question_id": …}, …]} as annotations',
            )
        opened.append(container)
    return open_vqa(*opened, cache_dir=cache_dir)


def _read_head(path: Path) -> bytes:
    stamp_of(path)  # says what is no file, and opens no pipe
    try:
        with path.open("rb") as stream:
            return stream.read(_HEAD_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error


def _check_text(path: Path, head: bytes) -> None:
    """Raises VlmtuneError where the file is no UTF-8 text, as far as one can tell."""
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            is_streamed = path.name.lower().endswith(_STREAMED)
            raise VlmtuneError(
                f"the file is compressed ({name}): its rows cannot be read by number",
                file=path,
                do="unpack it, or train on it with data.streaming: true (evaluation and the "
                "data commands read by number)"
                if is_streamed
                else "unpack it",
            )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise VlmtuneError("the file is UTF-16", file=path, do="save the file as UTF-8")
    if b"\0" in head[:4096]:
        raise VlmtuneError("the file is in no known form", file=path, expected=_KNOWN)


def _check_keys(entry: DataEntry, used: set[str], kind: str) -> None:
    given = {
        "split": entry.split,
        "subset": entry.subset,
        "revision": entry.revision,
        "annotations": entry.annotations,
    }
    unused = [name for name, value in given.items() if value is not None and name not in used]
    if unused:
        raise VlmtuneError(
            f"{', '.join(unused)} has no effect on {kind}", file=entry.path, do="remove it"
        )
