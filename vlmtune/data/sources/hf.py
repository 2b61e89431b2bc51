"""Data sets of the `datasets` library: a saved folder, or one of the hub, loaded or streamed.

Columns come as they are stored: pictures are their bytes, not decoded here, classes their names.
No code of a data set is run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlmtune.data.sources.arrow import row_at
from vlmtune.data.sources.base import RawRow, iter_by_number
from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError, nearest, shorten
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.paths import HUB

FOLDER_FILES = ("dataset_info.json", "dataset_dict.json")
"""What marks a folder that `save_to_disk` has written."""


class DatasetRows:
    """The rows of a `datasets.Dataset`, which maps its files rather than holding them."""

    def __init__(self, data: Any, *, file: str, base_dir: Path) -> None:
        self.file = file
        self.base_dir = base_dir
        # As Arrow tables: nothing is decoded.
        self._data = data.with_format("arrow")
        self._classes = _classes_of(data)

    def __len__(self) -> int:
        return len(self._data)

    @property
    def fingerprint(self) -> str:
        """What `datasets` tells this content from others by."""
        return str(self._data._fingerprint)

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = row_at(self._data[index], 0, self.place(index))
        return _with_class_names(row, self._classes)

    def iter_from(self, start: int) -> Iterator[RawRow]:
        return iter_by_number(self, start)


def is_dataset_folder(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in FOLDER_FILES)


def open_dataset_folder(path: Path, *, split: str | None) -> DatasetRows:
    """A folder that `save_to_disk` has written. Raises VlmtuneError where it cannot be read, or
    `split` is missing, unknown or has no effect."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
        parts = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
        for part in parts:
            # Offsets that lead out of a damaged file would take the process with them.
            part.data.validate(full=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise VlmtuneError(
            f"the folder cannot be read as a data set ({_reason(error)})",
            file=path,
            expected="what datasets' save_to_disk has written",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        name = choose_split(list(loaded), split, path)
        return DatasetRows(loaded[name], file=str(path / name), base_dir=path)
    if split is not None:
        raise VlmtuneError("the data set has no splits", file=path, got=f"split: {split}")
    return DatasetRows(loaded, file=str(path), base_dir=path)


def open_hub(entry: DataEntry) -> DatasetRows:
    """A data set of the hub, downloaded into the hub's own cache.

    Raises VlmtuneError where it is not there, or not to be reached, or the recipe does not say
    which split or subset of several.
    """
    name = entry.path.removeprefix(HUB)
    if os.path.isdir(name):
        raise VlmtuneError(
            f"a folder {name} is in the working directory, and would be read instead of the hub's",
            file=entry.path,
            do="give the folder as a path, or run from another directory",
        )
    return load_hub(name, entry)


def load_hub(name: str, entry: DataEntry) -> DatasetRows:
    """The data set `name`: of the hub, or a folder of data files. Raises VlmtuneError."""
    import datasets

    with _translated(entry.path, "loaded"):
        split = _split_of(name, entry)
        loaded = datasets.load_dataset(
            name, name=entry.subset, split=split, revision=entry.revision
        )
    file = _file_of(entry, split)
    return DatasetRows(loaded, file=file, base_dir=Path(file))


def choose_split(splits: list[str], wanted: str | None, path: str | Path) -> str:
    """The split that the recipe names, or the only one. Raises VlmtuneError."""
    if wanted is None and len(splits) == 1:
        return splits[0]
    if wanted in splits:
        assert wanted is not None
        return wanted
    close = nearest(wanted, splits) if wanted else None
    raise VlmtuneError(
        "the data set has several splits" if wanted is None else "no such split",
        file=path,
        got="no split" if wanted is None else wanted,
        expected=" | ".join(splits) or "a split",
        do=f"did you mean {close!r}?" if close else "name one: {path: …, split: …}",
    )


def _split_of(name: str, entry: DataEntry) -> str:
    import datasets

    splits = datasets.get_dataset_split_names(
        name, config_name=entry.subset, revision=entry.revision
    )
    return choose_split(splits, entry.split, entry.path)


def _file_of(entry: DataEntry, split: str) -> str:
    """What messages call a data set of the hub."""
    return "/".join(part for part in (entry.path, entry.subset, split) if part)


def _classes_of(data: Any) -> dict[str, list[str]]:
    """The names of the classes, by column."""
    import datasets

    return {
        name: feature.names
        for name, feature in (data.features or {}).items()
        if isinstance(feature, datasets.ClassLabel) and feature.names
    }


def _with_class_names(
    row: Mapping[str, Any], classes: Mapping[str, list[str]]
) -> Mapping[str, Any]:
    named = {
        name: names[number]
        for name, names in classes.items()
        if isinstance(number := row[name], int) and 0 <= number < len(names)
    }
    return {**row, **named}


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return shorten(text.split("\n")[0].rstrip("."), 200)


@contextmanager
def _translated(file: str, what: str) -> Iterator[None]:
    """What `datasets` raises while a data set of the hub is `loaded` or `streamed`, in words."""
    import datasets

    try:
        yield
    # OverflowError: a time that Python's have no room for.
    except (
        OSError, ValueError, RuntimeError, OverflowError, datasets.exceptions.DatasetsError
    ) as error:  # fmt: skip
        raise VlmtuneError(
            f"the data set cannot be {what} from the hub ({_reason(error)})",
            file=file,
            do="look at its name, subset and revision, at the connection, and, if it is private, "
            "log in with `hf auth login`",
        ) from error


logger = logging.getLogger("vlmtune")


@dataclass(frozen=True)
class HubRows:
    """File number `number` of the `count` that a split is stored in, which is streamed. `name`: of
    the data set, as the `datasets` library has it; a folder of data files is one too."""

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

    def __len__(self) -> int:
        raise self._not_by_number()

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        raise self._not_by_number()

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def iter_from(self, start: int) -> Iterator[RawRow]:
        with _translated(self.file, "streamed"):
            data = _load(self.name, self.subset, self.split, self.revision)
            classes = _classes_of(data)
            data = data.shard(num_shards=self.count, index=self.number).skip(start)
            for number, row in enumerate(data, start=start):
                yield RawRow(number, number + 1, partial(_with_class_names, row, classes))

    def _not_by_number(self) -> AssertionError:
        return AssertionError(f"{self.file}: opened for streaming")


def open_hub_files(entry: DataEntry) -> list[HubRows]:
    """The files of a data set of the hub, to be streamed. Raises VlmtuneError where it is not
    there, or not to be reached, or the recipe does not say which split or subset of several."""
    if entry.revision is None:
        logger.info(
            "%s: no revision is set; a resumed run reads whatever the hub holds by then",
            entry.path,
        )
    return files_of(entry.path.removeprefix(HUB), entry)


def files_of(name: str, entry: DataEntry) -> list[HubRows]:
    """The files of the data set `name`: of the hub, or a folder of data files."""
    with _translated(entry.path, "streamed"):
        split = _split_of(name, entry)
        count = _load(name, entry.subset, split, entry.revision).num_shards
    whole = _file_of(entry, split)
    return [
        HubRows(
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
