"""A recipe file and overrides in, one checked `Recipe` out, or every error with its line.

text -> YAML 1.2 values and lines -> overrides -> keys that these leave without effect taken out
     -> paths made absolute -> strict validation -> rules between keys
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlmtune.errors import ErrorGroup, VlmtuneError, nearest
from vlmtune.recipe import yaml
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.explain import (
    Place,
    Settings,
    accepts_null,
    explain_errors,
    is_mapping_at,
    is_text_at,
    section_keys,
    type_name,
    unknown_key,
)
from vlmtune.recipe.paths import HUB, resolve_paths
from vlmtune.recipe.rules import (
    Idle,
    conflicts,
    effects,
    idle_conflicts,
    idle_keys,
    remove_key,
    values_in_effect,
    written_keys,
)
from vlmtune.recipe.schema import Recipe

logger = logging.getLogger("vlmtune")

NO_MODEL = "(no model)"
ENTRY = "data.train."
ENTRY_KEYS = sorted({*DataEntry.model_fields} - {*Recipe.model_fields, "path"})
"""Keys of a data entry that may be set by their bare names: the recipe has no such keys."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe with absolute paths, the file it came from, that file's text, and where
    each of its keys was written: there or in an override."""

    recipe: Recipe
    path: Path
    text: str
    places: Mapping[yaml.Path, Place]


NO_FILE = Path("recipe")
"""What messages call a recipe that is given as a mapping; its folder is the current one."""


def load_recipe(
    source: Path | Mapping[str, object], overrides: Sequence[str] | Mapping[str, object] = ()
) -> LoadedRecipe:
    """Read, override and check the recipe in a file, or given as the mapping that YAML would give.

    `overrides` are texts `key.sub=value` with a YAML value, or Python values by dotted key; null
    takes a key out of the recipe where null is no value of it. An override wins over the file:
    keys of the file that it leaves without effect are taken out and named in one log line. Paths
    are relative to the recipe's folder, those of a mapping and `output_dir` to the current folder.

    Raises `ErrorGroup` with every error, in the order of lines; or `VlmtuneError` where the file
    cannot be read.
    """
    overrides = override_texts(overrides)
    path = source if isinstance(source, Path) else NO_FILE
    text = _read(source) if isinstance(source, Path) else yaml.dump_yaml(dict(source))
    document, errors = yaml.parse_yaml(text, file=str(path))
    if not isinstance(source, Path):
        document.lines = dict.fromkeys(document.lines)
    settings = _settings(document, str(path))
    before = copy.deepcopy(settings.values)
    for override in overrides:
        errors += _apply_override(override, settings, Place(_override_name(override), None))
    idle = _take_out_idle(settings, before, file=str(path))
    errors += resolve_paths(settings, folder=path.parent)
    files = [str(path), *map(_override_name, overrides)]
    recipe = _checked(settings, errors, files)
    if idle:
        logger.info("keys of %s without effect: %s", path.name, _keys_and_reasons(idle))
    return LoadedRecipe(recipe, path, text, settings.places)


def override_texts(overrides: Sequence[str] | Mapping[str, object]) -> Sequence[str]:
    """Overrides as texts `key.sub=value`; of a mapping, the values are Python's."""
    if isinstance(overrides, Mapping):
        return [f"{key}={yaml.dump_line(value)}" for key, value in overrides.items()]
    return overrides


def load_settings(
    overrides: Sequence[str], *, taken: Sequence[str], values: dict[str, Any]
) -> tuple[Recipe, frozenset[str]]:
    """The recipe of a command that is given none: `values` under `overrides`; and the keys set.

    `taken` are patterns of the keys that the command uses. To set another one is an error, and so
    is to set a key that has no effect with the rest. Values that belong to another value of a key
    that is set, as metrics to another task, are left out. `model`, `output_dir` and `data.train`
    may be missing. Paths are relative to the working directory.

    Raises `ErrorGroup` with every error.
    """
    place = Place("command line", None)
    settings = Settings(values, {(): place})
    before = copy.deepcopy(values)
    errors = [error for text in overrides for error in _apply_override(text, settings, place)]
    given = [yaml.dotted(path) for path in settings.places if _is_leaf(path, values)]
    for key in given:
        if not any(fnmatchcase(key, pattern) for pattern in taken):
            message = f"{key} has no effect on this command"
            errors.append(VlmtuneError(message, at=place, expected="one of " + ", ".join(taken)))
    for key in idle_keys(values, before=before).keys() - idle_keys(values).keys() - set(given):
        remove_key(values, key)
    errors += resolve_paths(settings, folder=Path())
    holders = {"model": values, "output_dir": values, "train": values.setdefault("data", {})}
    for key, holder in holders.items():
        if isinstance(holder, dict):
            holder.setdefault(key, "not given")
    recipe = _checked(settings, errors, [place.file], given)
    return recipe, frozenset(given)


def is_entry_setting(setting: str) -> bool:
    """Whether `key.sub=value` names a key of a data entry (`columns.image=photo`), or nearly so,
    and no key of the recipe."""
    word = re.split("[.=]", setting)[0]
    known = [*Recipe.model_fields, *ENTRY_KEYS]
    return (word if word in known else nearest(word, known)) in ENTRY_KEYS


def recipe_of_files(paths: Sequence[str], settings: Sequence[str]) -> Recipe:
    """A recipe that trains on `paths`, for commands that are given files instead of a recipe.

    `settings` are `key.sub=value` with keys of the recipe, or with the bare keys of a data entry,
    which hold for every file. Paths in them are relative to the working directory. Where no
    setting names a model, it is `NO_MODEL`. Raises `ErrorGroup` with every error in the settings.
    """
    placeholder = f"{HUB}files"
    train = {"path": placeholder}
    values = {"model": NO_MODEL, "output_dir": "unused", "data": {"train": train}}
    overrides = [f"{ENTRY}{text}" if is_entry_setting(text) else text for text in settings]
    try:
        recipe = load_recipe(values, overrides).recipe
    except ErrorGroup as group:
        for error in group.errors:  # name the settings as they were written
            error.message = error.message.replace(ENTRY, "")
            error.file = str(error.file).replace(ENTRY, "")
            error.do = error.do and error.do.replace(ENTRY, "")
        raise
    if [entry.path for entry in recipe.data.train] != [placeholder]:
        raise VlmtuneError("data.train is set, and files are given as well", do="leave one out")
    entries = [recipe.data.train[0].model_copy(update={"path": path}) for path in paths]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": entries})})


def load_resolved(path: Path) -> Recipe:
    """The resolved recipe of a finished run; unlike for training, its data may be gone since."""
    document, errors = yaml.parse_yaml(_read(path), file=str(path))
    return _checked(_settings(document, str(path)), errors, [str(path)])


def resolved_values(recipe: Recipe) -> dict[str, Any]:
    """Every key with an effect and its value, plain: loads back to an equal recipe."""
    return values_in_effect(recipe.model_dump(mode="json"))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads back to an equal one."""
    return yaml.dump_yaml(resolved_values(recipe))


def recipe_json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()


def _take_out_idle(settings: Settings, before: Mapping[str, Any], *, file: str) -> dict[str, Idle]:
    """Take out of `settings` the keys of `file` that had an effect `before` the overrides and have
    none with them. A key with a value that turns it off gets that, also where it has its default.
    """
    values, fields = settings.values, effects()
    idle_before = idle_keys(before)
    with_off = [key for key, effect in fields.items() if effect.off is not None]
    taken_out: dict[str, Idle] = {}
    while True:
        written = written_keys(values)
        idle = {
            key: why
            for key, why in idle_keys(values, [*written, *with_off], before=before).items()
            if key not in idle_before and settings.place(tuple(key.split("."))).file == file
        }
        if not idle:  # taking one out can leave another one without effect
            return taken_out
        taken_out |= {key: why for key, why in idle.items() if key in written}
        for key in idle:
            if key in with_off:
                values[key] = fields[key].off
            else:
                remove_key(values, key)


def _keys_and_reasons(idle: Mapping[str, Idle]) -> str:
    """`rank, alpha (lora_target is []); train.max_steps (train.epochs is 1)`."""
    keys: dict[str, list[str]] = {}
    for key, why in idle.items():
        keys.setdefault(why.reason, []).append(key)
    return "; ".join(f"{', '.join(of_reason)} ({reason})" for reason, of_reason in keys.items())


def _checked(
    settings: Settings,
    errors: list[VlmtuneError],
    files: list[str],
    given: Sequence[str] | None = None,
) -> Recipe:
    """The validated recipe, or all errors, sorted by the order of `files` and the line. The keys
    that must have an effect are those `given` (None: all)."""
    recipe, bad = None, set[yaml.Path]()
    try:
        recipe = _parse(settings.values)
    except ValidationError as error:
        explained, bad = explain_errors(error, settings)
        errors = [*errors, *explained]
    errors = [*errors, *_broken_rules(settings, recipe, bad, given)]
    if recipe is None or errors:
        raise ErrorGroup(sorted(errors, key=lambda e: (files.index(str(e.file)), e.line or 0)))
    return recipe


def _parse(values: Mapping[str, Any]) -> Recipe:
    return Recipe.model_validate_json(json.dumps(values), strict=True)


def _broken_rules(
    settings: Settings,
    recipe: Recipe | None,
    bad: set[yaml.Path],
    given: Sequence[str] | None,
) -> Iterator[VlmtuneError]:
    """The conflicts between keys; without a `recipe`, those between keys that are not `bad`."""
    found = idle_conflicts(settings.values, given)
    recipe = recipe or _recipe_without(bad, settings.values)
    if recipe is not None:
        found += conflicts(recipe)
    doubtful = {str(part) for path in bad for part in (path[0], yaml.dotted(path))}
    for conflict in found:
        if doubtful.isdisjoint(conflict.keys):
            paths: list[yaml.Path] = [tuple(key.split(".")) for key in conflict.keys]
            written = next((path for path in paths if path in settings.places), paths[0])
            yield VlmtuneError(conflict.message, at=settings.place(written), do=conflict.do)


def _recipe_without(bad: set[yaml.Path], values: Mapping[str, Any]) -> Recipe | None:
    """The recipe with defaults for the `bad` keys, so that conflicts of the others show too."""
    kept: Any = copy.deepcopy(values)
    for path in sorted(bad, key=len, reverse=True):
        names = list(itertools.takewhile(lambda part: isinstance(part, str), path))
        holder = kept
        for name in names[:-1]:
            holder = holder.get(name) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            holder.pop(names[-1], None)
    for *above, name in (("model",), ("output_dir",), ("data", "train")):
        (kept.setdefault("data", {}) if above else kept).setdefault(name, "placeholder")
    try:
        return _parse(kept)
    except ValidationError:
        return None


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
    return Settings(document.value, places)


def _override_name(override: str) -> str:
    return f"override {override!r}"


def _is_leaf(path: yaml.Path, values: object) -> bool:
    """Whether `path` names a key that holds no further keys, and no place in a list."""
    for part in path:
        if isinstance(part, int) or not isinstance(values, dict):
            return False
        values = values.get(part)
    return not isinstance(values, dict)


def _apply_override(override: str, settings: Settings, place: Place) -> list[VlmtuneError]:
    """Set one key in `settings`; errors instead where there is no such key or no such value."""
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
    if is_text_at(path) and (errors or not isinstance(document.value, str | None)):
        document, errors = yaml.Document(text), []  # `in one word:` needs no quotes
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
