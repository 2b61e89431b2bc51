"""Data sets of the hub, read over the network from front to back; nothing is kept on disk.

Pictures come as they are stored, classes as their names. No code of a data set is run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.data.sources.dataset_rows import choose_split
from vlmtune.data.streams.shards import RawRow
from vlmtune.data.text import shorten
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.paths import HUB

logger = logging.getLogger("vlmtune")

# OverflowError: a time that Python's have no room for.
_ERRORS = (OSError, ValueError, RuntimeError, OverflowError)


@dataclass(frozen=True)
class HubShard:
    """File number `number` of the `count` that a split is stored in. `name`: of the data set, as
    the `datasets` library has it; a folder of data files is one too."""

    file: str
    name: str
    subset: str | None
    split: str
    revision: str | None
    number: int
    count: int

    @property
    def base_dir(self) -> Path:
        return Path(self.file)

    def rows(self, start: int) -> Iterator[RawRow]:
        with _translated(self.file):
            data = _load(self.name, self.subset, self.split, self.revision)
            classes = _classes(data)
            data = data.shard(num_shards=self.count, index=self.number).skip(start)
            for number, values in enumerate(data, start=start):
                for name, names in classes.items():
                    if isinstance(values[name], int) and 0 <= values[name] < len(names):
                        values[name] = names[values[name]]
                yield RawRow(number, number + 1, values)

    def parse(self, row: RawRow) -> Mapping[str, Any]:
        values: Mapping[str, Any] = row.content
        return values


def open_hub_shards(entry: DataEntry) -> list[HubShard]:
    """The files of a data set of the hub. Raises VlmtuneError where it is not there, or not to be
    reached, or the recipe does not say which split or subset of several."""
    if entry.revision is None:
        logger.info(
            "%s: no revision is named; a run that is resumed takes what the hub then holds",
            entry.path,
        )
    return shards_of(entry.path.removeprefix(HUB), entry)


def shards_of(name: str, entry: DataEntry) -> list[HubShard]:
    """The files of the data set `name`: of the hub, or a folder of data files."""
    import datasets

    with _translated(entry.path):
        splits = datasets.get_dataset_split_names(
            name, config_name=entry.subset, revision=entry.revision
        )
        split = choose_split(splits, entry.split, entry.path)
        count = _load(name, entry.subset, split, entry.revision).num_shards
    whole = "/".join(part for part in (entry.path, entry.subset, split) if part)
    return [
        HubShard(
            file=whole if count == 1 else f"{whole}/{number + 1}-of-{count}",
            name=name,
            subset=entry.subset,
            split=split,
            revision=entry.revision,
            number=number,
            count=count,
        )
        for number in range(count)
    ]


def _load(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    import datasets

    data = datasets.load_dataset(name, name=subset, split=split, revision=revision, streaming=True)
    return data.decode(False)


def _classes(data: Any) -> dict[str, list[str]]:
    import datasets

    return {
        name: feature.names
        for name, feature in (data.features or {}).items()
        if isinstance(feature, datasets.ClassLabel) and feature.names
    }


@contextmanager
def _translated(file: str) -> Iterator[None]:
    """What `datasets` raises, as a VlmtuneError."""
    import datasets

    try:
        yield
    except (*_ERRORS, datasets.exceptions.DatasetsError) as error:
        reason = shorten((str(error) or type(error).__name__).split("\n")[0].rstrip("."), 200)
        raise VlmtuneError(
            f"the data set cannot be streamed from the hub ({reason})",
            file=file,
            do="look at its name, subset and revision, at the connection, and, if it is private, "
            "log in with `hf auth login`",
        ) from error
