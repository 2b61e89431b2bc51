"""What must hold between keys of a recipe, and which keys a choice leaves without effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from vlmtune.recipe.schema import Recipe


@dataclass(frozen=True)
class Conflict:
    """Keys (dotted) that do not go together; the first is the one to change."""

    keys: tuple[str, ...]
    message: str


WRITTEN_BY_US = "written_by_us"
"""In the validation's context: whether the recipe is a resolved one of a run folder."""


def check_rules(recipe: Recipe, *, may_be_unused: bool) -> None:
    """Raise one error that carries every conflict of `recipe` in its context.

    `may_be_unused`: keys without effect are no conflict, as in the resolved recipe of a run that an
    earlier version wrote.
    """
    conflicts = [*_exclusive(recipe), *_ordered(recipe)]
    if not may_be_unused:
        conflicts = [*_unused(recipe), *conflicts]
    if conflicts:
        text = "; ".join(conflict.message for conflict in conflicts)
        raise PydanticCustomError(
            "conflicts", "{text}", {"text": text, "conflicts": tuple(conflicts)}
        )


def unused_keys(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Keys without effect in `recipe`: dotted key -> (the key that makes it so, what to do)."""
    unused: dict[str, tuple[str, str]] = {}
    if recipe.adalora is not None:
        unused["rank"] = ("adalora", "set adalora.initial_rank instead")
        unused["use_rslora"] = ("adalora", "remove it")
        unused["use_dora"] = ("adalora", "remove it")
    if not recipe.lora_target:
        for key in ("rank", "alpha", "dropout", "use_dora", "use_rslora", "adalora"):
            unused[key] = ("lora_target: []", "remove it")
    if recipe.quantization_bit == 16:
        unused["quantization"] = ("quantization_bit: 16", "set 4 or 8, or remove it")
    if recipe.quantization_bit == 8:
        for name in ("double_quant", "compute_dtype", "cache_dequantized"):
            unused[f"quantization.{name}"] = ("quantization_bit: 8", "remove it")
    if recipe.objective != "contrastive":
        unused["contrastive"] = ("objective: next_token", "set contrastive, or remove it")
    unused |= _unused_in_eval(recipe)
    if not recipe.data.streaming:
        unused["data.shuffle_buffer"] = ("data.streaming: false", "set streaming, or remove it")
    if not recipe.data.allow_urls:
        for key in ("allow_private_addresses", "max_download_bytes", "url_timeout_seconds"):
            unused[f"data.{key}"] = ("data.allow_urls: false", "set allow_urls, or remove it")
    if recipe.train.vision_cache == "off":
        unused["train.vision_cache_bytes"] = ("train.vision_cache: off", "remove it")
    if recipe.data.on_bad_sample == "error":
        unused["data.max_bad_fraction"] = ("data.on_bad_sample: error", "set skip, or remove it")
    return unused


def _unused_in_eval(recipe: Recipe) -> dict[str, tuple[str, str]]:
    section = recipe.eval
    unused: dict[str, tuple[str, str]] = {}
    method = section.decoding.method
    if method != "sample":
        for key in ("temperature", "top_p", "top_k"):
            unused[f"eval.decoding.{key}"] = (f"eval.decoding.method: {method}", "set sample")
    if method != "beam":
        unused["eval.decoding.num_beams"] = (f"eval.decoding.method: {method}", "set beam")
    tasks = {section.task} | ({section.guard.task} if section.guard is not None else set())
    where = f"eval.task: {section.task}"
    if "retrieval" not in tasks:
        unused["eval.scorer"] = (where, "set retrieval, or remove it")
        unused["eval.subtract_prior"] = (where, "set retrieval, or remove it")
    elif section.scorer == "embedding":
        unused["eval.subtract_prior"] = ("eval.scorer: embedding", "set likelihood, or remove it")
    if recipe.objective != "contrastive" and (
        "retrieval" not in tasks or section.scorer == "likelihood"
    ):
        unused["eval.embedding_prompt"] = (
            "objective: next_token",
            "set eval.scorer: embedding with eval.task: retrieval, or remove it",
        )
    if tasks == {"retrieval"}:
        unused["eval.max_new_tokens"] = (where, "remove it")
        unused["eval.decoding"] = (where, "remove it")
    if section.best_metric is None:
        unused["eval.patience"] = ("eval.best_metric: null", "name the metric to be patient with")
    return unused


def keys_without_data_eval(recipe: Recipe) -> list[str]:
    """Keys that were written and have no effect as `data.eval` is not given. Said, not refused:
    `data.eval=null` on the command line turns evaluation off for once."""
    if recipe.data.eval is not None:
        return []
    about_data = {"eval.max_samples", "eval.before"}
    if recipe.eval.guard is None:
        about_data |= {"train.eval_every"}
    return sorted(about_data & given_keys(recipe))


def given_keys(section: BaseModel, prefix: str = "") -> set[str]:
    """Dotted keys that were written rather than filled in from the defaults."""
    keys: set[str] = set()
    for name in section.model_fields_set:
        keys.add(prefix + name)
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            keys |= given_keys(value, f"{prefix}{name}.")
    return keys


def _value_at(recipe: Recipe, key: str) -> object:
    value: object = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _unused(recipe: Recipe) -> Iterator[Conflict]:
    given = given_keys(recipe)
    for key, (cause, advice) in unused_keys(recipe).items():
        if key not in given or _value_at(recipe, key) is None:  # null: it is turned off already
            continue
        if key == "use_dora" and recipe.lora_target:
            if recipe.use_dora:
                yield Conflict(("use_dora", "adalora"), "use_dora and adalora exclude each other")
            continue
        cause_key = cause.split(":")[0]
        yield Conflict((key, cause_key), f"{key} has no effect with {cause}; {advice}")


def _exclusive(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.eval.best_metric is not None and recipe.data.eval is None:
        yield Conflict(
            ("eval.best_metric", "data.eval"),
            "eval.best_metric is measured on data.eval, which is not given",
        )
    if recipe.objective == "contrastive" and recipe.adalora is not None:
        yield Conflict(
            ("adalora", "objective"),
            "adalora is not supported with objective: contrastive",
        )
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
    if recipe.video.min_frames > recipe.video.max_frames:
        yield Conflict(
            ("video.min_frames", "video.max_frames"),
            f"video.min_frames ({recipe.video.min_frames}) must not exceed video.max_frames "
            f"({recipe.video.max_frames})",
        )
    if recipe.train.epochs is not None and recipe.train.max_steps is not None:
        yield Conflict(
            ("train.max_steps", "train.epochs"),
            "train.epochs and train.max_steps exclude each other; give one",
        )
    if recipe.lora_target and "all" in recipe.modules_to_save:
        yield Conflict(
            ("modules_to_save", "lora_target"),
            "modules_to_save: [all] is full fine-tuning; set lora_target: []",
        )
    if not recipe.lora_target and not recipe.modules_to_save:
        yield Conflict(
            ("lora_target", "modules_to_save"),
            "nothing would be trained: lora_target and modules_to_save are both empty",
        )
    if not recipe.lora_target and "all" in recipe.modules_to_save and recipe.quantization_bit < 16:
        yield Conflict(
            ("quantization_bit", "modules_to_save", "lora_target"),
            "quantised weights cannot be trained: set quantization_bit: 16",
        )


def _ordered(recipe: Recipe) -> Iterator[Conflict]:
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
