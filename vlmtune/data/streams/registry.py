"""Which shards an entry of the recipe names, and how each is streamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmtune.data.sources.registry import open_rows
from vlmtune.data.streams.by_number import NumberedShard
from vlmtune.data.streams.lines import LineShard
from vlmtune.data.streams.shards import Shard
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.paths import expand_shards
from vlmtune.recipe.schema import DataEntry

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")


def open_shards(entry: DataEntry, *, cache_dir: Path) -> Sequence[Shard]:
    """The shards of an entry, in order. Raises VlmtuneError where there is none, or one is in no
    form that can be read from front to back."""
    shards: list[Shard] = []
    for name in expand_shards(entry.path):
        path = Path(name)
        if path.is_dir() or entry.annotations is not None:
            shards += _numbered(entry, name, cache_dir)
        elif not path.exists():
            raise VlmtuneError("no such data file", file=path, do="correct the path")
        elif name.endswith(LINES):
            shards.append(LineShard(path))
        else:
            shards += _numbered(entry, name, cache_dir)
    if not shards:
        raise VlmtuneError("no file matches the pattern", file=entry.path, do="correct the path")
    return shards


def _numbered(entry: DataEntry, path: str, cache_dir: Path) -> list[Shard]:
    alone = entry.model_copy(update={"path": path})
    return [NumberedShard(rows) for rows in open_rows(alone, cache_dir=cache_dir)]
