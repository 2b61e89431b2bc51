"""Paths in a recipe: relative to its folder, made absolute, and there before anything is loaded."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path as FolderPath
from typing import Any

from vlmtune.errors import VlmtuneError
from vlmtune.recipe.explain import Place, Settings
from vlmtune.recipe.yaml import Path

HUB = "hub:"
"""What the path of a data set of the hub starts with."""

_BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<choices>[^{}]*,[^{}]*))\}")
DATA_KEYS = (("data", "train"), ("data", "eval"), ("eval", "guard", "data"))


def resolve_paths(settings: Settings, *, folder: FolderPath) -> list[VlmtuneError]:
    """Make `model` (where it is a folder) and the data files absolute, in place; the errors.

    Runs before validation, so that a missing file is reported beside all other errors; what is
    no text is left for validation. `output_dir` stays relative to the working directory.
    """
    errors: list[VlmtuneError] = []
    values = settings.values
    model = values.get("model")
    if isinstance(model, str) and model:
        values["model"] = _resolve_model(model, settings, folder, errors)
    for *above, key in DATA_KEYS:
        holder: Any = values
        for name in above:
            holder = holder.get(name) if isinstance(holder, dict) else None
        if not isinstance(holder, dict):
            continue
        path, entries = (*above, key), holder.get(key)
        if isinstance(entries, list):
            holder[key] = [
                _resolve_entry(entry, (*path, at), settings, folder, errors)
                for at, entry in enumerate(entries)
            ]
        else:
            holder[key] = _resolve_entry(entries, path, settings, folder, errors)
        if holder[key] is None:
            del holder[key]
    cache_dir = values.get("data")
    if isinstance(cache_dir, dict) and isinstance(cache_dir.get("cache_dir"), str):
        cache_dir["cache_dir"] = _absolute(cache_dir["cache_dir"], folder)
    return errors


def expand_shards(pattern: str) -> list[str]:
    """The paths that a pattern of `*`, `?`, `[…]` and `{000..009}` or `{a,b}` stands for, sorted;
    a path without any of them, and one that is there as it stands, is itself."""
    if os.path.lexists(pattern):
        return [pattern]
    paths = []
    for written in _expand_braces(pattern):
        is_pattern = any(c in written for c in "*?[")
        paths += sorted(glob.glob(written)) if is_pattern else [written]
    return paths


def _expand_braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last = match["first"], match["last"]
    if first is None:
        choices = match["choices"].split(",")
    else:
        choices = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for choice in choices for path in _expand_braces(head + choice + tail)]


def _resolve_entry(
    entry: Any, path: Path, settings: Settings, folder: FolderPath, errors: list[VlmtuneError]
) -> Any:
    """An entry of data, a path or a mapping, with absolute paths."""
    if isinstance(entry, str) and entry:
        return _resolve_file(entry, settings.place(path), folder, errors)
    if isinstance(entry, dict):
        for name, is_folder in (("path", False), ("annotations", False), ("image_dir", True)):
            value = entry.get(name)
            if isinstance(value, str) and value:
                place = settings.place((*path, name))
                resolve = _resolve_folder if is_folder else _resolve_file
                entry[name] = resolve(value, place, folder, errors)
    return entry


def _resolve_model(
    name: str, settings: Settings, folder: FolderPath, errors: list[VlmtuneError]
) -> str:
    place = settings.place(("model",))
    path = _absolute(name, folder)
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            errors.append(_error("model: a folder without config.json", place, path))
        if (revision := settings.values.get("revision")) is not None:
            message = "revision has no effect with a model in a folder; remove it"
            errors.append(_error(message, settings.place(("revision",)), str(revision)))
        return path
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path or os.path.exists(path):
        what = "not a folder" if os.path.exists(path) else "no such folder"
        errors.append(_error(f"model: {what}", place, path, _elsewhere(name, folder)))
    return name


def _resolve_file(name: str, place: Place, folder: FolderPath, errors: list[VlmtuneError]) -> str:
    if name.startswith(HUB):
        return name
    path = _absolute(name, folder)
    missing = [shard for shard in expand_shards(path) or [path] if not os.path.exists(shard)]
    if missing:
        do = _elsewhere(name, folder)
        if do is None and name.count("/") == 1 and not name.startswith((".", "~")):
            do = f"for a data set of the hub write {HUB}{name}"
        errors.append(_error("no such data file", place, missing[0], do))
    return path


def _resolve_folder(name: str, place: Place, folder: FolderPath, errors: list[VlmtuneError]) -> str:
    path = _absolute(name, folder)
    if not os.path.isdir(path):
        errors.append(_error("no such folder of pictures", place, path, _elsewhere(name, folder)))
    return path


def _absolute(name: str, folder: FolderPath) -> str:
    return os.path.abspath(os.path.join(folder, os.path.expanduser(name)))


def _elsewhere(name: str, folder: FolderPath) -> str | None:
    """What to write instead where the path is there, but relative to the working directory."""
    if os.path.exists(name) and not os.path.isabs(name):
        return f"write {os.path.relpath(name, folder)}: paths are relative to the recipe's folder"
    return None


def _error(message: str, place: Place, got: str, do: str | None = None) -> VlmtuneError:
    return VlmtuneError(message, at=place, got=got, do=do)
