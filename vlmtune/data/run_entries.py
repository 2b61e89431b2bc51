"""How a file that a run is evaluated on is read: as the run's own data are.

a file that is one of the run's   its entry, with every key
another file                      the keys (columns, prompt, …) of the run's entries of the same
                                  kind: those of the first of its sets that has some
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.data.sources.hf import is_dataset_folder
from vlmtune.errors import VlmtuneError, shorten
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.paths import HUB
from vlmtune.recipe.schema import Recipe

logger = logging.getLogger("vlmtune")

WITH_SETTINGS = "with columns.ROLE=NAME, prompt=TEXT, image_dir=DIR or format=NAME"
SHARED_KEYS = ("format", "columns", "image_dir", "prompt")
"""Keys that say as much of another file of the kind; the others are about one file."""

_KINDS = {
    "table": (".csv", ".tsv", ".tab", ".parquet", ".arrow", ".feather"),
    "json": (".json", ".jsonl", ".ndjson"),
    "tar": (".tar", ".tgz"),
}


@dataclass(frozen=True)
class RunData:
    """The entries of a run's recipe: `sets` by their keys in it, the one that counts first first,
    and `guard`, to which other files are not likened."""

    run: str
    sets: Mapping[str, Sequence[DataEntry]]
    guard: Sequence[DataEntry] = ()


@dataclass(frozen=True)
class RunEntry:
    """`note` says whose keys the file is read with, or is empty; `is_doubtful`: the entry may not
    be what the user means."""

    entry: DataEntry
    note: str
    is_doubtful: bool = False


def run_data(run: str, recipe: Recipe, *, training: bool = False) -> RunData:
    """For a file to evaluate on, or with `training` for one in the place of `data.train`."""
    sets = {"data.eval": recipe.data.eval or [], "data.train": recipe.data.train}
    ordered = dict(reversed(sets.items())) if training else sets
    return RunData(run, ordered, recipe.eval.guard.data if recipe.eval.guard else ())


def keys_of(entry: DataEntry) -> dict[str, Any]:
    """What an entry says of how its file is read."""
    return entry.model_dump(exclude_defaults=True, exclude={"path", "weight"})


def entry_as_in_run(file: str | Path, data: RunData) -> RunEntry:
    """Raises VlmtuneError where the run reads files of the kind in several ways, each with keys of
    its own."""
    file = str(file)
    for holder, entries in {**data.sets, "eval.guard.data": data.guard}.items():
        own = [keys_of(entry) for entry in entries if _is_same(file, entry.path)]
        if own:
            return _agreed(own, file, holder, data)
    kind = _kind(file)
    found = {
        name: [_shared_keys(entry) for entry in entries if _kind(entry.path) == kind]
        for name, entries in data.sets.items()
    }
    name = next((name for name, keys in found.items() if keys), None)
    if name is None:
        every = [_shared_keys(entry) for entries in data.sets.values() for entry in entries]
        return _plain(file, every, data, "are for files of another kind")
    chosen = _agreed(found[name], file, name, data)
    if chosen.note:
        return chosen
    others = [keys for other in data.sets if other != name for keys in found[other]]
    return _plain(file, others, data, f"do not apply: the file is read like {name}")


def entries_as_in_run(files: Sequence[str | Path], data: RunData) -> list[DataEntry]:
    """An entry for each of `files`; whose keys are used is logged. Raises as `entry_as_in_run`."""
    chosen = [entry_as_in_run(file, data) for file in files]
    for one in chosen:
        if one.note:
            logger.log(logging.WARNING if one.is_doubtful else logging.INFO, one.note)
    return [one.entry for one in chosen]


def _agreed(keys: Sequence[dict[str, Any]], file: str, name: str, data: RunData) -> RunEntry:
    """With the keys that are the same in all; where they differ and one has none, without."""
    different = [one for at, one in enumerate(keys) if one not in keys[:at]]
    if len(different) == 1:
        note = f"{file}: read like {name} of {data.run}: {_as_text(keys[0])}" if keys[0] else ""
        return RunEntry(DataEntry(path=file, **keys[0]), note)
    ways = " or ".join(_as_text(one) if one else "no keys" for one in different)
    if {} not in different:
        raise VlmtuneError(
            f"{data.run} reads files of this kind in several ways",
            file=file,
            got=f"in {name}: {ways}",
            expected="one way",
            do=f"say how to read the file, {WITH_SETTINGS}",
        )
    note = (
        f"{file}: read without keys, because {name} of {data.run} has several ways: {ways}; if "
        f"that is wrong, say how to read it, {WITH_SETTINGS}"
    )
    return RunEntry(DataEntry(path=file), note, is_doubtful=True)


def _plain(file: str, left: Sequence[Mapping[str, Any]], data: RunData, why: str) -> RunEntry:
    """Without keys; of the run's, `left` are not used."""
    names = [key for key in SHARED_KEYS if any(key in keys for keys in left)]
    note = f"{file}: read without {', '.join(names)} of {data.run}, which {why}" if names else ""
    return RunEntry(DataEntry(path=file), note, is_doubtful=True)


def _shared_keys(entry: DataEntry) -> dict[str, Any]:
    return {key: value for key, value in keys_of(entry).items() if key in SHARED_KEYS}


def _as_text(keys: Mapping[str, Any]) -> str:
    def text(value: object) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{role}: {column}" for role, column in value.items()) + "}"
        return repr(shorten(str(value), 60))

    return ", ".join(f"{key} {text(value)}" for key, value in keys.items())


def _is_same(file: str, path: str) -> bool:
    if path.startswith(HUB) or file.startswith(HUB):
        return path == file
    return os.path.realpath(file) == os.path.realpath(path)


def _kind(path: str) -> str:
    """What a file is, by its name alone, as a run's files may be gone: `table`, `json`, …"""
    if path.startswith(HUB) or is_dataset_folder(Path(path)):
        return "table"
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    if os.path.isdir(path) or not suffix:
        return "folder"
    return next((kind for kind, endings in _KINDS.items() if suffix in endings), suffix)
