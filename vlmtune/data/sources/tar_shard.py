"""WebDataset shards: samples by their place in the tar file; nothing is extracted."""

from __future__ import annotations

import io
import logging
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.data.index import (
    Extra,
    Numbers,
    Stamp,
    Table,
    in_pieces,
    open_table,
    read_span,
    stamp_of,
    unreadable,
)
from vlmtune.data.sources.tar_sample import Member, is_read, members_of, row_of, split_name
from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError

logger = logging.getLogger("vlmtune")


@dataclass(frozen=True)
class TarRows:
    """The samples of a shard; `table` has the start and end of each, headers included."""

    path: Path
    stamp: Stamp
    table: Table

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return len(self.table)

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def read(self, index: int) -> Mapping[str, Any]:
        content = read_span(self.path, self.stamp, *self.table.row(index))
        # A piece of a tar file that starts at a header is itself one.
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            members = [
                (key, Member(member.name, ending, held.read()))
                for member, key, ending in _files(tar, Counter())
                if (held := tar.extractfile(member)) is not None
            ]
        return row_of(members[0][0], [member for _, member in members], self.place(index))


def open_tar(path: Path, *, cache_dir: Path) -> TarRows:
    """Raises VlmtuneError where the file is no tar file, is cut off, or its samples are not in one
    piece each. What is in it and not read is counted and said."""
    stamp = stamp_of(path)

    def build(extra: Extra) -> Iterable[Numbers]:
        return in_pieces(_scan(path, stamp.size, extra), columns=2)

    table = open_table("tar", [(path, stamp)], columns=2, build=build, cache_dir=cache_dir)
    if table.extra["not_read"]:
        kinds = ", ".join(
            f"{kind} ({num})" for kind, num in sorted(table.extra["not_read"].items())
        )
        logger.info("%s: files in it that are not read: %s", path, kinds)
    return TarRows(path, stamp, table)


def _scan(path: Path, size: int, extra: Extra) -> Iterator[tuple[int, int]]:
    not_read: Counter[str] = Counter()
    seen: set[int] = set()
    start, end, current = 0, 0, ""
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member, key, _ in _files(tar, not_read):
                if key != current:
                    if current:
                        yield start, end
                    start, current = member.offset, key
                    if hash(key) in seen:
                        raise VlmtuneError(
                            "the files of a sample are not next to each other",
                            file=path,
                            got=key,
                            do="write the tar file anew with --sort=name",
                        )
                    seen.add(hash(key))
                end = tar.offset
            _check_end(path, tar.offset, size)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise VlmtuneError(
            f"the file cannot be read as a tar file ({error})",
            file=path,
            do="fetch or write the file again; it may be cut off",
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if current:
        yield start, end
    extra["not_read"] = dict(not_read)


def _files(
    tar: tarfile.TarFile, not_read: Counter[str]
) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """The files that belong to samples, with key and ending; the others are counted."""
    for member in members_of(tar):
        named = split_name(member.name)
        if member.isdir():
            continue
        if not member.isreg():
            not_read["links and the like"] += 1
        elif named is None:
            not_read["hidden or without an ending"] += 1
        elif not is_read(named[1]):
            not_read[f".{named[1]}"] += 1
        else:
            yield member, *named


def _check_end(path: Path, offset: int, size: int) -> None:
    """tarfile takes whatever is no header for the end; that must be zeros, or the file's end."""
    with path.open("rb") as stream:
        stream.seek(offset)
        if any(stream.read(tarfile.BLOCKSIZE)):
            raise VlmtuneError(
                f"the tar file is broken at byte {offset + 1}",
                file=path,
                got=f"no header there, {size - offset} bytes before the end",
                do="fetch or write the file again",
            )
    if offset >= size:
        logger.info("%s: the tar file has no mark at its end; it may be cut off", path)
