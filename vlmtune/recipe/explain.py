"""Pydantic's errors turned into sentences that name the key, its place, what was got and expected.

A recipe's own rules (`rules.py`) run only once all values are well-typed, so a first round of
errors would hide them. `validate` therefore checks a second time without the bad keys and adds
the conflicts among the others.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vlmtune.errors import VlmtuneError, nearest
from vlmtune.recipe.keys import expected_at, section_keys, suggest
from vlmtune.recipe.rules import WRITTEN_BY_US, Conflict
from vlmtune.recipe.schema import Recipe
from vlmtune.recipe.yaml12 import Path, dotted


@dataclass(frozen=True)
class Place:
    """A line of the recipe, or an override (no line)."""

    file: str
    line: int | None


@dataclass
class Settings:
    """The values of a recipe before validation, and where each came from."""

    values: dict[str, object]
    places: dict[Path, Place]

    def place(self, path: Path) -> Place:
        """Where `path`, or the nearest thing above it, was written."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]


def validate(
    settings: Settings, *, written_by_us: bool = False
) -> tuple[Recipe | None, list[VlmtuneError]]:
    """The recipe, or every error in it. In one `written_by_us`, a key may be without effect."""
    try:
        return _validate(settings.values, written_by_us=written_by_us), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    bad = {path: detail for detail in details if (path := _path(detail, settings.values)) != ()}
    errors = [_explain(path, bad[path], settings) for path in bad if not _covered(path, bad)]
    errors += [_explain_conflict(c, settings) for detail in details for c in _conflicts(detail)]
    if bad:
        errors += _hidden_conflicts(settings, set(bad))
    return None, errors


def type_name(value: object) -> str:
    """A value as the user wrote it, with its type where that is not plain to see."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    if isinstance(value, str):
        return f"{value[:60]!r} (text)"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list" if value else "an empty list"
    return str(value)


def _validate(values: Mapping[str, object], *, written_by_us: bool) -> Recipe:
    context = {WRITTEN_BY_US: written_by_us}
    return Recipe.model_validate_json(json.dumps(values), strict=True, context=context)


def _path(detail: ErrorDetails, values: object) -> Path:
    """The error's location without the names of union members that pydantic puts into it."""
    path: Path = ()
    value: Any = values
    location = [part for part in detail["loc"] if part != "[key]"]
    for at, part in enumerate(location):
        is_last = at == len(location) - 1
        is_item = isinstance(value, list) and isinstance(part, int)
        if is_item or (isinstance(value, dict) and part in value):
            value = value[part]
        elif not (is_last and detail["type"] == "missing"):
            continue
        path = (*path, part)
    return path


def _covered(path: Path, bad: Mapping[Path, ErrorDetails]) -> bool:
    """Whether a deeper error says more: `data.train[0]` rather than `data.train` is no text."""
    return any(other[: len(path)] == path and other != path for other in bad)


def _explain(path: Path, detail: ErrorDetails, settings: Settings) -> VlmtuneError:
    key, kind = dotted(path), detail["type"]
    place = settings.place(path)
    if kind == "missing":
        return VlmtuneError(
            f"missing key {key!r}", file=place.file, line=place.line, expected=expected_at(path)
        )
    if kind == "extra_forbidden":
        return unknown_key(path, place)
    if detail["loc"][-1] == "[key]":
        return _unknown_choice(f"unknown key {key!r}", str(path[-1]), detail, place)
    got = _value(settings.values, path)
    if kind == "literal_error" and isinstance(got, str):
        return _unknown_choice(f"unknown value of {key}", got, detail, place)
    if kind == "value_error":
        return VlmtuneError(
            f"{key}: {detail['ctx']['error']}",
            file=place.file,
            line=place.line,
            got=type_name(got),
            expected=expected_at(path),
        )
    return VlmtuneError(
        f"bad value of {key}",
        file=place.file,
        line=place.line,
        got=type_name(got),
        expected=expected_at(path),
    )


def unknown_key(path: Path, place: Place) -> VlmtuneError:
    """`unknown key 'rnak'; did you mean 'rank'?`, or the list of known keys where none is near."""
    for depth in range(1, len(path)):  # only an override can go on below what is no section
        above = section_keys(path[: depth - 1]) or []
        if path[depth - 1] in above and section_keys(path[:depth]) is None:
            message = f"unknown key {dotted(path)!r}: {dotted(path[:depth])} has no keys below it"
            return VlmtuneError(message, file=place.file, line=place.line)
        if path[depth - 1] not in above:
            path = path[:depth]
            break
    close = suggest(path)
    if close is not None:
        message = f"unknown key {dotted(path)!r}; did you mean {close!r}?"
        return VlmtuneError(message, file=place.file, line=place.line)
    known = section_keys(path[:-1])
    return VlmtuneError(
        f"unknown key {dotted(path)!r}",
        file=place.file,
        line=place.line,
        expected=None if known is None else "one of " + ", ".join(known),
    )


def _unknown_choice(message: str, got: str, detail: ErrorDetails, place: Place) -> VlmtuneError:
    # pydantic words the choices as "'a', 'b' or 'c'".
    words = detail["ctx"]["expected"].replace(" or ", ", ").split(", ")
    choices = [word.strip("'") for word in words]
    close = nearest(got, choices)
    return VlmtuneError(
        message,
        file=place.file,
        line=place.line,
        got=repr(got[:60]),
        expected="one of " + ", ".join(choices),
        do=None if close is None else f"did you mean {close!r}?",
    )


def _conflicts(detail: ErrorDetails) -> tuple[Conflict, ...]:
    return detail["ctx"]["conflicts"] if detail["type"] == "conflicts" else ()


def _explain_conflict(conflict: Conflict, settings: Settings) -> VlmtuneError:
    paths: list[Path] = [tuple(key.split(".")) for key in conflict.keys]
    written = (path for path in paths if path in settings.places)
    place = settings.place(next(written, paths[0]))
    return VlmtuneError(conflict.message, file=place.file, line=place.line)


def _hidden_conflicts(settings: Settings, bad: set[Path]) -> list[VlmtuneError]:
    """Conflicts among the keys that are well-typed, found without the others."""
    values: Any = copy.deepcopy(settings.values)
    for path in sorted(bad, key=len, reverse=True):
        *above, last = path[: _depth_of_key(path)]
        holder = _value(values, tuple(above))
        if isinstance(holder, dict):
            holder.pop(last, None)
    for required in (("model",), ("output_dir",), ("data", "train")):
        holder = values.setdefault("data", {}) if required[0] == "data" else values
        holder.setdefault(required[-1], "placeholder")
    try:
        _validate(values, written_by_us=False)
    except ValidationError as error:
        doubtful = {str(part) for path in bad for part in (path[0], dotted(path))}
        return [
            _explain_conflict(conflict, settings)
            for detail in error.errors(include_url=False)
            for conflict in _conflicts(detail)
            if not doubtful.intersection(conflict.keys)
        ]
    return []


def _depth_of_key(path: Path) -> int:
    """How much of `path` names a key rather than a list position."""
    return next((at for at, part in enumerate(path) if isinstance(part, int)), len(path))


def _value(values: object, path: Path) -> object:
    for part in path:
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part]
        else:
            return None
    return values
