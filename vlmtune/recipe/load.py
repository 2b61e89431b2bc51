"""A recipe file and overrides in, one checked `Recipe` out, or every error with its line.

text -> YAML 1.2 values and lines -> overrides -> paths made absolute -> strict validation
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.errors import ErrorGroup, VlmtuneError
from vlmtune.recipe import yaml
from vlmtune.recipe.explain import (
    Place,
    Settings,
    accepts_null,
    is_mapping_at,
    section_keys,
    type_name,
    unknown_key,
    validate,
)
from vlmtune.recipe.paths import resolve_paths
from vlmtune.recipe.rules import unused_keys
from vlmtune.recipe.schema import Recipe


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe with absolute paths, the file it came from, that file's text, and where
    each of its keys was written: there or in an override."""

    recipe: Recipe
    path: Path
    text: str
    places: Mapping[yaml.Path, Place]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override and check the recipe at `path`.

    `overrides` are `key.sub=value` with a YAML value; null takes a key out of the recipe where
    null is no value of it. Paths are relative to the recipe's folder, except `output_dir`.

    Raises `ErrorGroup` with every error, in the order of lines; or `VlmtuneError` where the file
    cannot be read.
    """
    text = _read(path)
    document, errors = yaml.parse_yaml(text, file=str(path))
    settings = _settings(document, str(path))
    for override in overrides:
        errors += _apply_override(override, settings)
    errors += resolve_paths(settings, folder=path.parent)
    files = [str(path), *map(_override_name, overrides)]
    return LoadedRecipe(_checked(settings, errors, files), path, text, settings.places)


def load_resolved(path: Path) -> Recipe:
    """The resolved recipe of a finished run; unlike for training, its data may be gone since."""
    document, errors = yaml.parse_yaml(_read(path), file=str(path))
    return _checked(_settings(document, str(path)), errors, [str(path)], written_by_us=True)


def resolved_values(recipe: Recipe) -> dict[str, Any]:
    """Every key with an effect and its value, plain: loads back to an equal recipe."""
    values = recipe.model_dump(mode="json")
    for key in unused_keys(recipe):
        *above, last = key.split(".")
        holder: Any = values
        for name in above:
            holder = holder.get(name, {})
        holder.pop(last, None)
    return values


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads back to an equal one."""
    return yaml.dump_yaml(resolved_values(recipe))


def recipe_json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()


def _checked(
    settings: Settings,
    errors: list[VlmtuneError],
    files: list[str],
    *,
    written_by_us: bool = False,
) -> Recipe:
    """The validated recipe, or all errors, sorted by the order of `files` and the line."""
    recipe, problems = validate(settings, written_by_us=written_by_us)
    errors = [*errors, *problems]
    if recipe is None or errors:
        raise ErrorGroup(sorted(errors, key=lambda e: (files.index(str(e.file)), e.line or 0)))
    return recipe


def _read(path: Path) -> str:
    if path.is_dir():
        raise VlmtuneError("a folder, not a recipe", file=path, expected="a YAML file")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise VlmtuneError("no such recipe", file=path, expected="a YAML file") from None
    except OSError as error:
        raise VlmtuneError(f"cannot be read: {error.strerror}", file=path) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise VlmtuneError(
            "not UTF-8", file=path, line=line, got=f"byte 0x{raw[error.start]:02x}"
        ) from None


def _settings(document: yaml.Document, file: str) -> Settings:
    if document.value is None:
        raise VlmtuneError("the recipe is empty", file=file, line=1, expected="keys and values")
    if not isinstance(document.value, dict):
        raise VlmtuneError(
            "not a recipe",
            file=file,
            line=1,
            got=type_name(document.value),
            expected="a mapping of keys to values, e.g. `model: …`",
        )
    places = {path: Place(file, line) for path, line in document.lines.items()}
    return Settings(document.value, places | {(): Place(file, 1)})


def _override_name(override: str) -> str:
    return f"override {override!r}"


def _apply_override(override: str, settings: Settings) -> list[VlmtuneError]:
    """Set one key in `settings`; errors instead where there is no such key or no such value."""
    place = Place(_override_name(override), None)
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [VlmtuneError("not an override", file=place.file, expected="key.sub=value")]
    path = tuple(key.split("."))
    *above, last = path
    known = section_keys(above)
    if (known is None or last not in known) and not is_mapping_at(above):
        return [unknown_key(path, place)]
    try:
        document, errors = yaml.parse_yaml(text, file=place.file)
    except VlmtuneError as error:
        document, errors = yaml.Document(None), [error]
    if errors:
        for problem in errors:
            problem.line = None
        return errors
    holder: dict[str, Any] = settings.values
    for depth, name in enumerate(above, start=1):
        if holder.get(name) is None:
            holder[name] = {}
            settings.places[path[:depth]] = place
        if not isinstance(holder[name], dict):
            return []  # the file's own error says that this is no section
        holder = holder[name]
    for old in [old for old in settings.places if old[: len(path)] == path]:
        del settings.places[old]
    if document.value is None and not is_mapping_at(above) and not accepts_null(path):
        holder.pop(last, None)
        return []
    holder[last] = document.value
    settings.places |= {(*path, *below): place for below in document.lines} | {path: place}
    return []
