"""Which source an entry of the recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmtune.data.sources.json_array import open_json_array
from vlmtune.data.sources.jsonl import open_jsonl
from vlmtune.data.sources.rows import Rows
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.schema import DataEntry

_BOM = b"\xef\xbb\xbf"


def open_rows(entry: DataEntry, *, cache_dir: Path) -> Sequence[Rows]:
    """The files of an entry, in order: one, or the shards of a pattern.

    Raises VlmtuneError where there is none, or it is in no known form.
    """
    path = Path(entry.path)
    if path.is_dir():
        raise VlmtuneError("the data file is a folder", file=path, expected="a JSONL file")
    if not path.exists():
        raise VlmtuneError("no such data file", file=path, do="correct the path")
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise VlmtuneError(f"the data file cannot be read ({error.strerror})", file=path) from error
    if head.removeprefix(_BOM).lstrip().startswith(b"["):
        return [open_json_array(path, cache_dir=cache_dir)]
    return [open_jsonl(path, cache_dir=cache_dir)]
