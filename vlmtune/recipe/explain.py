"""Pydantic's errors as sentences that name the key, its place, what was got and expected."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from vlmtune.errors import VlmtuneError, nearest
from vlmtune.recipe.schema import Recipe
from vlmtune.recipe.yaml import Path, dotted

OTHER_TOOLS: Mapping[str, str] = {
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset": "data.train",
    "eval_dataset": "data.eval",
    "cutoff_len": "data.max_tokens",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "preprocessing_num_workers": "data.num_workers",
    "dataloader_num_workers": "data.num_workers",
    "load_in_4bit": "quantization_bit",
    "load_in_8bit": "quantization_bit",
    "double_quantization": "quantization.double_quant",
    "bnb_4bit_compute_dtype": "quantization.compute_dtype",
    "llm_int8_skip_modules": "quantization.skip",
    "target_modules": "lora_target",
    "additional_target": "modules_to_save",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_r": "adalora.initial_rank",
    "target_r": "adalora.target_rank",
    "tinit": "adalora.warmup",
    "tfinal": "adalora.final",
    "deltaT": "adalora.interval",
    "orth_reg_weight": "adalora.orthogonal_weight",
    "image_min_pixels": "image.min_pixels",
    "image_max_pixels": "image.max_pixels",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "optim": "train.optimizer",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "max_samples": "eval.max_samples",
    "per_device_eval_batch_size": "eval.batch_size",
}
"""What other fine-tuning tools call our keys; used for suggestions only."""


def section_of(annotation: object) -> type[BaseModel] | None:
    """The section that a field holds (`AdaLoraSection | None` holds one), or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((s for s in map(section_of, get_args(annotation)) if s is not None), None)
    return None


def entry_section_of(annotation: object) -> type[BaseModel] | None:
    """The section of which a field holds a list (`data.train`), or None."""
    if get_origin(annotation) is Annotated:
        return entry_section_of(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return section_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        found = map(entry_section_of, get_args(annotation))
        return next((section for section in found if section is not None), None)
    return None


def walk_keys(
    section: type[BaseModel] = Recipe, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Every known key, dotted, in the schema's order; a section before its keys."""
    for name, info in section.model_fields.items():
        yield prefix + name, info
        below = section_of(info.annotation)
        if below is not None:
            yield from walk_keys(below, f"{prefix}{name}.")


def section_keys(path: Sequence[str | int]) -> list[str] | None:
    """The key names of the section at `path`, or None where there is no section."""
    info = _field_at(path)
    section = Recipe if not path else None if info is None else _below(info)
    return None if section is None else list(section.model_fields)


def _field_at(path: Sequence[str | int]) -> FieldInfo | None:
    section: type[BaseModel] | None = Recipe
    info = None
    for part in path:
        if isinstance(part, int):  # the place in a list of entries
            continue
        info = None if section is None else section.model_fields.get(part)
        section = None if info is None else _below(info)
    return info


def expected_at(path: Sequence[str | int]) -> str:
    """What the schema expects at `path`, in plain words."""
    section: type[BaseModel] = Recipe
    for depth, part in enumerate(path):
        if isinstance(part, int):  # the place in a list of entries
            continue
        info = section.model_fields[part]
        below = _below(info)
        if below is None or depth == len(path) - 1:
            return describe(info.annotation, info.metadata, rest=path[depth + 1 :])
        section = below
    return "a mapping of keys"


def _below(info: FieldInfo) -> type[BaseModel] | None:
    return section_of(info.annotation) or entry_section_of(info.annotation)


def is_mapping_at(path: Sequence[str | int]) -> bool:
    """Whether the value at `path` is a free mapping (`train.part_learning_rates`)."""
    info = _field_at(path)
    return info is not None and _mapping_arguments(info.annotation) is not None


def is_text_at(path: Sequence[str | int]) -> bool:
    """Whether only a text, or null, is a value of the key at `path` (`eval.embedding_prompt`)."""
    info = _field_at(path)
    return info is not None and set(get_args(info.annotation) or [info.annotation]) <= {
        str,
        type(None),
    }


def accepts_null(path: Sequence[str | int]) -> bool:
    """Whether null is a value of the key at `path`."""
    return expected_at(path).endswith("or null")


def describe(
    annotation: Any, metadata: Sequence[object] = (), *, rest: Sequence[str | int] = ()
) -> str:
    """A type and its limits in plain words; `rest` goes on into lists and free mappings."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        rules = [
            r for a in arguments[1:] for r in (a.metadata if isinstance(a, FieldInfo) else [a])
        ]
        return describe(arguments[0], [*rules, *metadata], rest=rest)
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        if rest:
            kinds = [kind for kind in kinds if kind is not str]
        words = list(dict.fromkeys(describe(kind, metadata, rest=rest) for kind in kinds))
        if type(None) in arguments and not rest:
            words.append("null")
        return (", or " if any("," in word for word in words) else " or ").join(words)
    if origin is list and section_of(arguments[0]) is not None:
        return f"a path, {describe(arguments[0])}, or a list of them"
    if origin is list:
        item = describe(arguments[0])
        if rest:
            return item
        items = ("a non-empty list of " if _minimum_length(metadata) else "a list of ") + item
        takes_one = any(isinstance(rule, BeforeValidator) for rule in metadata)
        return f"{item} or {items}" if takes_one else items
    if origin is dict:
        if rest:
            return describe(arguments[1], rest=rest[1:])
        return f"a mapping from {describe(arguments[0])} to {describe(arguments[1])}"
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in arguments)
    if section_of(annotation) is not None:
        return "a mapping of " + ", ".join(annotation.model_fields)
    if annotation is str:
        return "non-empty text" if _minimum_length(metadata) else "text"
    name = {bool: "true or false", int: "an integer", float: "a number"}[annotation]
    return name + _limits(metadata)


def suggest(path: Sequence[str | int]) -> str | None:
    """The known key, dotted, that an unknown `path` most likely means."""
    known = [key for key, _ in walk_keys()]
    *above, last = map(str, path)
    prefix = "".join(f"{part}." for part in above)
    elsewhere = [key for key in known if key.rsplit(".", 1)[-1] == last]
    if elsewhere:
        return elsewhere[0]
    here = section_keys(above) or []
    close = nearest(last, here)
    if last in OTHER_TOOLS:
        return OTHER_TOOLS[last]
    if close is not None:
        return prefix + close
    leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    close = nearest(last, [*leaves, *OTHER_TOOLS])
    return None if close is None else leaves.get(close, OTHER_TOOLS.get(close))


def _mapping_arguments(annotation: object) -> tuple[object, ...] | None:
    if get_origin(annotation) is dict:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        found = (_mapping_arguments(kind) for kind in get_args(annotation))
        return next((arguments for arguments in found if arguments is not None), None)
    return None


def _minimum_length(metadata: Sequence[object]) -> int:
    return max((rule.min_length for rule in metadata if isinstance(rule, at.MinLen)), default=0)


def _limits(metadata: Sequence[object]) -> str:
    words = []
    for rule in metadata:
        if isinstance(rule, at.Ge):
            words.append(f"at least {rule.ge}")
        elif isinstance(rule, at.Gt):
            words.append(f"above {rule.gt}")
        elif isinstance(rule, at.Le):
            words.append(f"at most {rule.le}")
        elif isinstance(rule, at.Lt):
            words.append(f"below {rule.lt}")
    return ", " + " and ".join(words) if words else ""


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


def explain_errors(
    error: ValidationError, settings: Settings
) -> tuple[list[VlmtuneError], set[Path]]:
    """Pydantic's errors as ours, and the paths of the values that they are about."""
    details = error.errors(include_url=False)
    bad = {_path(detail, settings.values): detail for detail in details}
    errors = [_explain(path, bad[path], settings) for path in bad if not _covered(path, bad)]
    return errors, set(bad)


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


def _path(detail: ErrorDetails, values: object) -> Path:
    """The error's location without the names of union members that pydantic puts into it."""
    path: Path = ()
    value: Any = values
    location = [part for part in detail["loc"] if part != "[key]"]
    for index, part in enumerate(location):
        is_last = index == len(location) - 1
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
        return VlmtuneError(f"missing key {key!r}", at=place, expected=expected_at(path))
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
            at=place,
            got=type_name(got),
            expected=expected_at(path),
        )
    return VlmtuneError(
        f"bad value of {key}",
        at=place,
        got=type_name(got),
        expected=expected_at(path),
    )


def unknown_key(path: Path, place: Place) -> VlmtuneError:
    """`unknown key 'rnak'; did you mean 'rank'?`, or the list of known keys where none is near."""
    for depth in range(1, len(path)):  # only an override can go on below what is no section
        above = section_keys(path[: depth - 1]) or []
        if path[depth - 1] in above and section_keys(path[:depth]) is None:
            message = f"unknown key {dotted(path)!r}: {dotted(path[:depth])} has no keys below it"
            return VlmtuneError(
                message,
                at=place,
            )
        if path[depth - 1] not in above:
            path = path[:depth]
            break
    close = suggest(path)
    if close is not None:
        message = f"unknown key {dotted(path)!r}; did you mean {close!r}?"
        return VlmtuneError(
            message,
            at=place,
        )
    known = section_keys(path[:-1])
    return VlmtuneError(
        f"unknown key {dotted(path)!r}",
        at=place,
        expected=None if known is None else "one of " + ", ".join(known),
    )


def _unknown_choice(message: str, got: str, detail: ErrorDetails, place: Place) -> VlmtuneError:
    # pydantic words the choices as "'a', 'b' or 'c'".
    words = detail["ctx"]["expected"].replace(" or ", ", ").split(", ")
    choices = [word.strip("'") for word in words]
    close = nearest(got, choices)
    return VlmtuneError(
        message,
        at=place,
        got=repr(got[:60]),
        expected="one of " + ", ".join(choices),
        do=None if close is None else f"did you mean {close!r}?",
    )


def _value(values: object, path: Path) -> object:
    for part in path:
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part]
        else:
            return None
    return values
