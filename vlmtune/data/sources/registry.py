"""Finds the source that an entry of the recipe names, opens it, and digests its content.

A file of no known format is an error. Only CSV, TSV and JSON lines, which any text could be, are
recognised by file name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmtune.data.sources.arrow import (
    FILE_MAGIC,
    STREAM_MAGIC,
    open_arrow,
    open_parquet,
)
from vlmtune.data.sources.base import (
    Rows,
    open_table,
    stamp_of,
    unreadable,
)
from vlmtune.data.sources.csv import open_delimited
from vlmtune.data.sources.folder import open_picture_folder
from vlmtune.data.sources.hf import (
    is_dataset_folder,
    open_dataset_folder,
    open_hub,
    open_hub_files,
)
from vlmtune.data.sources.joined import open_coco, open_vqa
from vlmtune.data.sources.json_array import (
    Container,
    looks_like_container,
    open_container,
    open_json_array,
    rows_of,
)
from vlmtune.data.sources.json_text import BOM
from vlmtune.data.sources.jsonl import open_jsonl
from vlmtune.data.sources.tar import COMPRESSED, log_not_read, open_tar
from vlmtune.errors import VlmtuneError, escaped, shorten
from vlmtune.files import Extra, Numbers, digest
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.paths import HUB, expand_shards

_HEAD_BYTES = 1 << 16
_LINES = (".jsonl", ".ndjson")
_CELLS = (".csv", ".tsv", ".tab")
_COMPRESSED_LINES = (".jsonl.gz", ".ndjson.gz", ".json.gz")
_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
}
_KNOWN = "JSON lines, JSON, CSV, TSV, parquet, Arrow, a tar shard, or a folder of pictures"


def open_rows(entry: DataEntry, *, cache_dir: Path, streaming: bool = False) -> Sequence[Rows]:
    """The files of an entry, in order: one, or the shards of a pattern.

    For `streaming`, no index is made where the kind of file does without. Raises VlmtuneError
    where there is no file, or one is in no known form, or the entry has keys that have no effect
    on it.
    """
    if entry.path.startswith(HUB):
        _check_keys(entry, {"split", "subset", "revision"}, "a data set of the hub")
        return open_hub_files(entry) if streaming else [open_hub(entry)]
    paths = [Path(name) for name in expand_shards(entry.path)]
    if not paths:
        raise VlmtuneError("no file matches the pattern", file=entry.path, do="correct the path")
    opened = [_open_path(path, entry, cache_dir, streaming) for path in paths]
    if streaming and paths[0].name.lower().endswith((".tar", *COMPRESSED)):
        log_not_read(paths[0])
    return opened


def _open_path(path: Path, entry: DataEntry, cache_dir: Path, streaming: bool) -> Rows:
    if os.path.isdir(path):
        if is_dataset_folder(path):
            _check_keys(entry, {"split"}, "a datasets folder")
            return open_dataset_folder(path, split=entry.split)
        _check_keys(entry, set(), "a folder of pictures")
        return open_picture_folder(path, format_name=entry.format)
    head = _read_head(path)
    _check_keys(entry, {"annotations"}, "a file")
    if entry.annotations is not None:
        return _open_vqa(path, Path(entry.annotations), cache_dir)
    suffix, name = path.suffix.lower(), path.name.lower()
    if streaming and name.endswith(_COMPRESSED_LINES):
        return open_jsonl(path, cache_dir=cache_dir, streaming=True)
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return open_parquet(path, cache_dir=cache_dir, streaming=streaming)
    if head.startswith((FILE_MAGIC, STREAM_MAGIC)) or suffix in (".arrow", ".feather"):
        return open_arrow(path, cache_dir=cache_dir)
    if head[257:262] == b"ustar" or suffix == ".tar" or (streaming and name.endswith(COMPRESSED)):
        return open_tar(path, cache_dir=cache_dir, streaming=streaming)
    _check_text(path, head)
    if suffix in _CELLS:
        return open_delimited(path, cache_dir=cache_dir)
    start = head.removeprefix(BOM).lstrip()
    if start and not start.startswith((b"{", b"[")) and suffix not in (*_LINES, ".json"):
        raise VlmtuneError(
            "the file has no known format: it is text that does not start like JSON",
            file=path,
            got=escaped(shorten(start.split(b"\n")[0].decode("utf-8", "replace"), 60)),
            expected=_KNOWN,
            do="name a table .csv or .tsv",
        )
    if start.startswith(b"["):
        return open_json_array(path, cache_dir=cache_dir)
    if start.startswith(b"{") and suffix not in _LINES and looks_like_container(path):
        container = open_container(path, cache_dir=cache_dir)
        if container is not None:
            return _open_container(container, cache_dir)
    return open_jsonl(path, cache_dir=cache_dir, streaming=streaming)


def _open_container(container: Container, cache_dir: Path) -> Rows:
    if {"images", "annotations"} <= container.lists.keys():
        return open_coco(container, cache_dir=cache_dir)
    rows = rows_of(container)
    first = rows[0]
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


def _open_vqa(questions: Path, answers: Path, cache_dir: Path) -> Rows:
    opened = []
    for file in (questions, answers):
        _check_text(file, _read_head(file))
        is_known = looks_like_container(file)
        container = open_container(file, cache_dir=cache_dir) if is_known else None
        if container is None:
            raise VlmtuneError(
                "the file is not one of VQAv2",
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
    for magic, name in _MAGICS.items():
        if head.startswith(magic):
            is_streamed = path.name.lower().endswith((*_COMPRESSED_LINES, *COMPRESSED))
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
        raise VlmtuneError("the file has no known format", file=path, expected=_KNOWN)


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


def digests_of(entry: DataEntry, *, cache_dir: Path) -> dict[str, str]:
    """A SHA-256 for each file of an entry, by its path: of its bytes; of a folder, of the names,
    sizes and times of what is in it; of a data set of the hub, its fingerprint.

    Those of large files are kept in the cache, by size, time and inode. Raises VlmtuneError.
    """
    if entry.path.startswith(HUB):
        rows = open_hub(entry)
        return {rows.file: rows.fingerprint}
    names = expand_shards(entry.path)
    names += [] if entry.annotations is None else [entry.annotations]
    return {
        name: _of_folder(Path(name)) if os.path.isdir(name) else _of_file(Path(name), cache_dir)
        for name in names
    }


def _of_file(path: Path, cache_dir: Path) -> str:
    def build(extra: Extra) -> list[Numbers]:
        try:
            return [np.frombuffer(bytes.fromhex(digest(path)), "<i8").reshape(1, 4)]
        except OSError as error:
            raise unreadable(path, error) from error

    table = open_table(
        "sha256", [(path, stamp_of(path))], columns=4, build=build, cache_dir=cache_dir
    )
    return np.asarray(table.values).astype("<i8").tobytes().hex()


def _of_folder(path: Path) -> str:
    found = []
    try:
        for above, _, files in os.walk(path):
            for name in files:
                file = os.path.join(above, name)
                status = os.lstat(file)
                found.append((os.path.relpath(file, path), status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise VlmtuneError(f"the folder cannot be read ({error.strerror})", file=path) from error
    return digest("".join(map(repr, sorted(found))))
