"""The known keys, read off the schema: what each expects in plain words, and the nearest one."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vlmtune.errors import nearest
from vlmtune.recipe.schema import Recipe

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
    section: type[BaseModel] | None = Recipe
    for part in path:
        if isinstance(part, int):  # the place in a list of entries
            continue
        info = None if section is None else section.model_fields.get(part)
        section = None if info is None else _below(info)
    return None if section is None else list(section.model_fields)


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
    known = dict(walk_keys())
    info = known.get(".".join(map(str, path)))
    return info is not None and _mapping_arguments(info.annotation) is not None


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
        return ("a non-empty list of " if _minimum_length(metadata) else "a list of ") + item
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
