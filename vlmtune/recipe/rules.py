"""What must hold between the keys of a recipe, and which keys have no effect in it.

A field of the schema says when it has an effect (`data_section.Effect`); the functions below read
that for whoever needs it: loading, the resolved recipe, the options of an evaluation, the settings
of answers, and the check of a resume. They take plain values, as YAML or `model_dump` have them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vlmtune.recipe.data_section import Condition, Effect, Not
from vlmtune.recipe.explain import section_of, walk_keys
from vlmtune.recipe.schema import Recipe


@dataclass(frozen=True)
class Conflict:
    """Keys (dotted) that do not go together; the first is the one to change."""

    keys: tuple[str, ...]
    message: str
    do: str | None = None


@dataclass(frozen=True)
class Idle:
    """Why a key has no effect: `cause` has the value `value`, where `key` or the section `owner`
    that it is in needs `needed`."""

    key: str
    owner: str
    cause: str
    value: object
    needed: object
    do: str | None

    @property
    def reason(self) -> str:
        """`quantization_bit is 16`."""
        if self.value is None or isinstance(self.value, (dict, BaseModel)):
            return f"{self.cause} is {'not ' if self.value is None else ''}given"
        return f"{self.cause} is {_plain(self.value)}"

    @property
    def advice(self) -> str:
        if self.do is not None:
            return self.do
        if self.needed is None:
            return f"remove {self.key}, or {self.cause}"
        if isinstance(self.needed, Not):
            verb = "change" if self.value else "set"
            return f"remove {self.key}, or {verb} {self.cause}"
        needed = self.needed if isinstance(self.needed, tuple) else (self.needed,)
        return f"remove {self.key}, or set {self.cause}: {' or '.join(map(_plain, needed))}"


@functools.cache
def _known() -> dict[str, FieldInfo]:
    return dict(walk_keys())


@functools.cache
def effects() -> dict[str, Effect]:
    """The fields (dotted keys) that say when they have an effect."""
    return {
        key: effect
        for key, info in walk_keys()
        for effect in info.metadata
        if isinstance(effect, Effect)
    }


def idle_keys(
    values: Mapping[str, Any],
    given: Iterable[str] | None = None,
    *,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Idle]:
    """Those of the `given` keys (None: of all that `values` holds) that have no effect.

    `before`: the values without the overrides. Then a key has no effect either where another one
    that it belongs to has another value now.
    """
    fields = effects()
    idle = {}
    for key in written_keys(values) if given is None else given:
        for owner in _path_of(key):
            effect = fields.get(owner)
            if effect is None or value_at(values, owner) in (None, effect.off):
                continue
            unmet = _unmet_of_all(values, effect.needs)
            if unmet is None and before is not None and effect.belongs_to is not None:
                needed = value_at(before, effect.belongs_to)
                unmet = _unmet(values, {effect.belongs_to: needed})
            if unmet is not None:
                cause, needed = unmet
                value = value_at(values, cause)
                idle[key] = Idle(key, owner, cause, value, needed, effect.do.get(cause))
                break
    return idle


def idle_conflicts(values: Mapping[str, Any], given: Iterable[str] | None = None) -> list[Conflict]:
    """The `given` keys (None: all of `values`) that have no effect, as conflicts with what leaves
    them without. Two keys of which each leaves the other without effect are one conflict."""
    idle = idle_keys(values, given)
    found: dict[object, Conflict] = {}
    for key, why in idle.items():
        if any(why.cause == other.owner and other.cause == why.owner for other in idle.values()):
            message = f"{why.owner} and {why.cause} exclude each other"
            do = why.do or "remove one of them"
            found[frozenset((why.owner, why.cause))] = Conflict((why.owner, why.cause), message, do)
        else:
            message = f"{key} has no effect because {why.reason}"
            found[key] = Conflict((key, why.owner, why.cause), message, why.advice)
    return list(found.values())


def values_in_effect(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` without keys that have no effect."""
    kept = copy.deepcopy(dict(values))
    for key in idle_keys(values):
        remove_key(kept, key)
    return kept


def values_of_steps(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide what a step computes, dotted, and their values."""
    values = values_in_effect(recipe.model_dump(mode="json"))
    fields = effects()
    kept = {}
    for key in written_keys(values):
        said = [fields[owner].changes_step for owner in _path_of(key) if owner in fields]
        changes = next((each for each in reversed(said) if each is not None), True)
        if changes if isinstance(changes, bool) else _unmet(values, changes) is None:
            kept[key] = value_at(values, key)
    return kept


def written_keys(values: Mapping[str, Any]) -> list[str]:
    """The dotted keys that `values` holds; of a section with keys, these alone."""
    sections = {key for key, info in _known().items() if section_of(info.annotation) is not None}

    def walk(holder: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, value in holder.items():
            key = prefix + name
            if key in sections and isinstance(value, dict) and value:
                yield from walk(value, f"{key}.")
            else:
                yield key

    return list(walk(values, ""))


def value_at(values: Mapping[str, Any], key: str) -> object:
    """The value at a dotted key, or its default; None in a section that is not there."""
    known = _known()
    value: object = values
    for path in _path_of(key):
        name = path.rsplit(".", 1)[-1]
        if isinstance(value, BaseModel):
            value = getattr(value, name)
        elif isinstance(value, Mapping):
            value = value.get(name, known[path].default)
        else:
            return None
    return value


def remove_key(values: dict[str, Any], key: str) -> None:
    """Remove a dotted key, and sections that have no other key."""
    name, _, below = key.partition(".")
    if below:
        remove_key(values[name], below)
        if values[name]:
            return
    del values[name]


def _unmet_of_all(
    values: Mapping[str, Any], needs: Condition | tuple[Condition, ...]
) -> tuple[str, object] | None:
    """What the first of several conditions lacks, where none of them holds."""
    unmet = [_unmet(values, each) for each in (needs if isinstance(needs, tuple) else (needs,))]
    return unmet[0] if unmet and None not in unmet else None


def _unmet(values: Mapping[str, Any], condition: Condition) -> tuple[str, object] | None:
    """The first key of `condition` that does not have the value it must have, and that value."""
    for key, needed in condition.items():
        value = value_at(values, key)
        if isinstance(needed, Not):
            holds = needed.holds(value)
        else:
            holds = value in needed if isinstance(needed, tuple) else value == needed
        if not holds:
            return key, needed
    return None


def _path_of(key: str) -> list[str]:
    """`eval.decoding.top_k` -> `eval`, `eval.decoding`, `eval.decoding.top_k`."""
    names = key.split(".")
    return [".".join(names[:depth]) for depth in range(1, len(names) + 1)]


def _plain(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What the values of `recipe` break, apart from keys without effect."""
    if recipe.objective == "contrastive" and recipe.train.batch_size == 1:
        yield Conflict(
            ("train.batch_size", "objective"),
            "objective: contrastive tells a sample from the others of its step; with "
            "train.batch_size 1 there are none",
        )
    if recipe.data.streaming and recipe.train.max_steps is None:
        yield Conflict(
            ("data.streaming", "train.max_steps"),
            "data.streaming does not know how many samples there are; set train.max_steps",
        )
    if not recipe.lora_target and not recipe.modules_to_save:
        yield Conflict(
            ("lora_target", "modules_to_save"),
            "nothing would be trained: lora_target and modules_to_save are both empty",
        )
    if recipe.video.min_frames > recipe.video.max_frames:
        yield Conflict(
            ("video.min_frames", "video.max_frames"),
            f"video.min_frames ({recipe.video.min_frames}) must not exceed video.max_frames "
            f"({recipe.video.max_frames})",
        )
    low, high = recipe.image.min_pixels, recipe.image.max_pixels
    if low is not None and high is not None and low > high:
        yield Conflict(
            ("image.min_pixels", "image.max_pixels"),
            f"image.min_pixels ({low}) must not exceed image.max_pixels ({high})",
        )
    adalora = recipe.adalora
    if adalora is None:
        return
    if adalora.target_rank >= adalora.initial_rank:
        yield Conflict(
            ("adalora.target_rank", "adalora.initial_rank"),
            f"adalora.target_rank ({adalora.target_rank}) must be below adalora.initial_rank "
            f"({adalora.initial_rank}): ranks are only taken away",
        )
    if adalora.warmup < 1 and adalora.final < 1 and adalora.warmup + adalora.final >= 1:
        yield Conflict(
            ("adalora.final", "adalora.warmup"),
            f"adalora.warmup ({adalora.warmup}) and adalora.final ({adalora.final}) leave no "
            "steps between them; their sum must be below 1",
        )
