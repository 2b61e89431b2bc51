"""Data sets of the `datasets` library: a folder it has saved, or one of the hub.

Columns come as they are stored: pictures are their bytes, not decoded here, classes their names.
No code of a data set is run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.data.sources.arrow import row_at
from vlmtune.data.text import shorten
from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError, nearest
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.paths import HUB

FOLDER_FILES = ("dataset_info.json", "dataset_dict.json")
"""What marks a folder that `save_to_disk` has written."""


class DatasetRows:
    """The rows of a `datasets.Dataset`, which maps its files rather than holding them."""

    def __init__(self, data: Any, *, file: str, base_dir: Path) -> None:
        import datasets

        self.file = file
        self.base_dir = base_dir
        # As Arrow tables: nothing is decoded.
        self._data = data.with_format("arrow")
        self._classes = {
            name: feature.names
            for name, feature in data.features.items()
            if isinstance(feature, datasets.ClassLabel) and feature.names
        }

    def __len__(self) -> int:
        return len(self._data)

    @property
    def fingerprint(self) -> str:
        """What `datasets` tells this content from others by."""
        return str(self._data._fingerprint)

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def read(self, index: int) -> Mapping[str, Any]:
        row = dict(row_at(self._data[index], 0, self.place(index)))
        for name, classes in self._classes.items():
            number = row[name]
            if isinstance(number, int) and 0 <= number < len(classes):
                row[name] = classes[number]
        return row


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
            do="give the folder as a path, or start elsewhere",
        )
    return load_hub(name, entry)


def load_hub(name: str, entry: DataEntry) -> DatasetRows:
    """The data set `name`: of the hub, or a folder of data files. Raises VlmtuneError."""
    import datasets

    try:
        splits = datasets.get_dataset_split_names(
            name, config_name=entry.subset, revision=entry.revision
        )
        split = choose_split(splits, entry.split, entry.path)
        loaded = datasets.load_dataset(
            name, name=entry.subset, split=split, revision=entry.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise VlmtuneError(
            f"the data set cannot be had from the hub ({_reason(error)})",
            file=entry.path,
            do="look at its name, subset and revision, at the connection, and, if it is private, "
            "log in with `hf auth login`",
        ) from error
    file = "/".join(part for part in (entry.path, entry.subset, split) if part)
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


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return shorten(text.split("\n")[0].rstrip("."), 200)
