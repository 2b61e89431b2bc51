"""What tells the content of an entry from any other, for the record of a run."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from vlmtune.data.index import Extra, Numbers, open_table, read_chunks, stamp_of
from vlmtune.data.sources.dataset_rows import open_hub
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.paths import HUB, expand_shards

_CHUNK_BYTES = 1 << 20


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
        digest = hashlib.sha256()
        for chunk in read_chunks(path, _CHUNK_BYTES):
            digest.update(chunk)
        return [np.frombuffer(digest.digest(), "<i8").reshape(1, 4)]

    table = open_table(
        "sha256", [(path, stamp_of(path))], columns=4, build=build, cache_dir=cache_dir
    )
    return np.asarray(table.values).astype("<i8").tobytes().hex()


def _of_folder(path: Path) -> str:
    digest = hashlib.sha256()
    found = []
    try:
        for above, _, files in os.walk(path):
            for name in files:
                file = os.path.join(above, name)
                status = os.lstat(file)
                found.append((os.path.relpath(file, path), status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise VlmtuneError(f"the folder cannot be read ({error.strerror})", file=path) from error
    for line in sorted(found):
        digest.update(repr(line).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
