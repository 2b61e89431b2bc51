"""Paths in a recipe: relative to its folder, made absolute, and there before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlmtune.errors import VlmtuneError
from vlmtune.recipe.explain import Place, Settings

DATA_KEYS = (("data", "train"), ("data", "eval"), ("eval", "guard", "data"))


def resolve_paths(settings: Settings, *, folder: Path) -> list[VlmtuneError]:
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
        path, files = (*above, key), holder.get(key)
        if isinstance(files, str) and files:
            holder[key] = _resolve_file(files, settings.place(path), folder, errors)
        if isinstance(files, list):
            holder[key] = [
                _resolve_file(file, settings.place((*path, at)), folder, errors)
                if isinstance(file, str) and file
                else file
                for at, file in enumerate(files)
            ]
    return errors


def _resolve_model(name: str, settings: Settings, folder: Path, errors: list[VlmtuneError]) -> str:
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


def _resolve_file(name: str, place: Place, folder: Path, errors: list[VlmtuneError]) -> str:
    path = _absolute(name, folder)
    if not os.path.isfile(path):
        what = "a folder, not a file" if os.path.isdir(path) else "no such data file"
        errors.append(_error(what, place, path, _elsewhere(name, folder)))
    return path


def _absolute(name: str, folder: Path) -> str:
    return os.path.abspath(os.path.join(folder, os.path.expanduser(name)))


def _elsewhere(name: str, folder: Path) -> str | None:
    """What to write instead where the path is there, but relative to the working directory."""
    if os.path.exists(name) and not os.path.isabs(name):
        return f"write {os.path.relpath(name, folder)}: paths are relative to the recipe's folder"
    return None


def _error(message: str, place: Place, got: str, do: str | None = None) -> VlmtuneError:
    return VlmtuneError(message, file=place.file, line=place.line, got=got, do=do)
