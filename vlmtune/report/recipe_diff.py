"""What a run's recipe sets otherwise than the defaults of the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticUndefined

from vlmtune.errors import VlmtuneError
from vlmtune.recipe.keys import section_of, walk_keys
from vlmtune.recipe.yaml12 import parse_yaml

NO_DEFAULT = "required"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Difference:
    """A dotted key, its value and its default as text, and what the key means."""

    key: str
    value: str
    default: str
    meaning: str


def parse_recipe(text: str | None) -> dict[str, Any] | None:
    """The values of a resolved recipe as they stand, unchecked; None where it cannot be read.

    Not validated: a run of another version may have keys that this one does not know.
    """
    if text is None:
        return None
    try:
        document, errors = parse_yaml(text, file="recipe.resolved.yaml")
    except VlmtuneError:
        return None
    return document.value if not errors and isinstance(document.value, dict) else None


def differences(values: dict[str, Any]) -> list[Difference]:
    """The keys of `values` that differ from their defaults, in the schema's order; keys that the
    schema does not know come last."""
    known = dict(walk_keys())
    sections = {key for key, info in known.items() if section_of(info.annotation) is not None}
    given = dict(_flat(values, sections))
    found = []
    for key, info in known.items():
        if key not in given:
            continue
        default = info.get_default(call_default_factory=True)
        if key in sections and given[key] is None:
            continue  # a section that is absent, which is its default
        if default is PydanticUndefined:
            found.append(Difference(key, _shown(given[key]), NO_DEFAULT, info.description or ""))
        elif given[key] != default:
            found.append(
                Difference(key, _shown(given[key]), _shown(default), info.description or "")
            )
    found += [
        Difference(key, _shown(value), UNKNOWN, "not a key of this version")
        for key, value in given.items()
        if key not in known
    ]
    return found


def value_at(values: dict[str, Any] | None, key: str) -> Any:
    """The value of a dotted key, or None."""
    holder: Any = values
    for name in key.split("."):
        holder = holder.get(name) if isinstance(holder, dict) else None
    return holder


def _flat(values: dict[str, Any], sections: set[str], prefix: str = "") -> Iterator[tuple]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in sections and isinstance(value, dict):
            yield from _flat(value, sections, f"{key}.")
        else:
            yield key, value


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
