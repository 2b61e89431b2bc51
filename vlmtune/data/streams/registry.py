"""Which shards an entry of the recipe names, and how each is streamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmtune.data.index import stamp_of
from vlmtune.data.sources.registry import open_rows
from vlmtune.data.streams.by_number import NumberedShard
from vlmtune.data.streams.hub import open_hub_shards
from vlmtune.data.streams.lines import LineShard
from vlmtune.data.streams.parquet import ParquetShard
from vlmtune.data.streams.shards import Shard
from vlmtune.data.streams.tar import COMPRESSED, TarShard
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.paths import HUB, expand_shards

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")


def open_shards(entry: DataEntry, *, cache_dir: Path) -> Sequence[Shard]:
    """The shards of an entry, in order. Raises VlmtuneError where there is none, or one is in no
    form that can be read from front to back.

    Told by their endings: JSON lines and tar shards, plain or compressed, and parquet. Everything
    else is read through its index.
    """
    if entry.path.startswith(HUB):
        return open_hub_shards(entry)
    shards = [s for path in expand_shards(entry.path) for s in _open(path, entry, cache_dir)]
    if not shards:
        raise VlmtuneError("no file matches the pattern", file=entry.path, do="correct the path")
    if isinstance(shards[0], TarShard):
        shards[0].say_not_read()
    return shards


def _open(name: str, entry: DataEntry, cache_dir: Path) -> Sequence[Shard]:
    path, ending = Path(name), name.lower()
    if path.is_dir() or entry.annotations is not None:
        return _numbered(name, entry, cache_dir)
    if ending.endswith(LINES):
        shard: Shard = LineShard(path)
    elif ending.endswith((".tar", *COMPRESSED)):
        shard = TarShard(path)
    elif ending.endswith(".parquet"):
        shard = ParquetShard(path)
    else:
        return _numbered(name, entry, cache_dir)
    stamp_of(path)  # says what is no file, and opens no pipe
    for key in entry.model_fields_set & {"split", "subset", "revision"}:
        raise VlmtuneError(f"{key} has no effect on a file", file=path, do="remove it")
    return [shard]


def _numbered(path: str, entry: DataEntry, cache_dir: Path) -> list[Shard]:
    alone = entry.model_copy(update={"path": path})
    return [NumberedShard(rows) for rows in open_rows(alone, cache_dir=cache_dir)]
