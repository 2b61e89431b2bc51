"""The command line's options over a run's `eval` section."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.errors import VlmtuneError

if TYPE_CHECKING:
    from vlmtune.recipe.schema import EvalSection, Recipe

logger = logging.getLogger("vlmtune")

Options = Mapping[str, Any]

RETRIEVAL = ("scorer", "subtract_prior", "embedding_prompt")
SCORED_BY = {"subtract_prior": "likelihood", "embedding_prompt": "embedding"}
GENERATION = ("max_new_tokens",)
DECODING = {
    "method": (),
    "temperature": ("sample",),
    "top_p": ("sample",),
    "top_k": ("sample",),
    "num_beams": ("beam",),
    "stop": (),
}
"""Keys of `eval.decoding`, and the methods with which they have an effect (none: all)."""


def read_recipes(targets: Sequence[str]) -> dict[str, Recipe]:
    """The resolved recipes of those targets that are runs."""
    from vlmtune.models.open import RUN_FILE, read_run_recipe

    folders = {target: Path(target).expanduser() for target in targets}
    return {
        target: read_run_recipe(folder)
        for target, folder in folders.items()
        if (folder / RUN_FILE).is_file()
    }


def prompt_of_folders(targets: Sequence[str]) -> str | None:
    """What the embeddings of the first of `targets` that says so were trained with."""
    from vlmtune.models.embedding import recorded_prompt

    prompts = (recorded_prompt(Path(target).expanduser()) for target in targets)
    return next((prompt for prompt in prompts if prompt is not None), None)


def choose_section(
    recipes: Mapping[str, Recipe],
    options: Options,
    finished_tasks: Mapping[str, str],
    *,
    prompt: str | None = None,
) -> EvalSection:
    """One section for all targets: the first run's, or the defaults with the embedding `prompt`
    of a model's or adapter's folder, under `options`.

    `options` are the keys of `eval` and `eval.decoding` that were given on the command line;
    `finished_tasks` are the tasks of targets that are reports. Raises VlmtuneError for options
    without effect or out of range, and for targets of different tasks.
    """
    from vlmtune.evaluation.metrics.registry import metrics_for
    from vlmtune.recipe.schema import EvalSection

    if "task" in options:
        metrics_for(options["task"])  # names the nearest task that there is
    sections = {target: recipe.eval for target, recipe in recipes.items()}
    defaults = EvalSection() if prompt is None else EvalSection(embedding_prompt=prompt)
    base = next(iter(sections.values()), defaults)
    tasks: dict[str, str] = {target: section.task for target, section in sections.items()}
    if "task" in options:
        tasks = {target: options["task"] for target in tasks}
    tasks.update(finished_tasks)
    if len(set(tasks.values())) > 1:
        raise VlmtuneError(
            "the targets have different tasks",
            got=", ".join(f"{task} ({target})" for target, task in tasks.items()),
            expected="one task for all",
            do="name it with --task",
        )
    updates: dict[str, Any] = {key: value for key, value in options.items() if key not in DECODING}
    updates.setdefault("task", next(iter(tasks.values()), base.task))
    if updates["task"] != base.task:
        updates.setdefault("metrics", [])  # the recipe's are those of another task
    updates["decoding"] = base.decoding.model_dump() | {
        key: value for key, value in options.items() if key in DECODING
    }
    section = _validated(base, updates)
    _check_effects(section, options)
    _tell_differences(sections, section, options)
    return section


def _validated(base: EvalSection, updates: Mapping[str, Any]) -> EvalSection:
    from pydantic import ValidationError

    try:
        return type(base).model_validate(base.model_dump() | dict(updates))
    except ValidationError as error:
        first = error.errors()[0]
        name = [part for part in first["loc"] if isinstance(part, str)][-1].replace("_", "-")
        raise VlmtuneError(
            f"wrong value for --{name}", got=repr(first["input"]), expected=first["msg"]
        ) from error


def _check_effects(section: EvalSection, options: Options) -> None:
    """An option that would change nothing is a mistake."""
    from vlmtune.evaluation.metrics.registry import CHOICE_LIKELIHOOD

    method = section.decoding.method
    is_retrieval = section.task == "retrieval"
    generates = not is_retrieval and section.metrics != [CHOICE_LIKELIHOOD]
    for key in options:
        name = f"--{key.replace('_', '-')}"
        needed = DECODING.get(key, ())
        if needed and method not in needed:
            raise VlmtuneError(
                f"{name} has no effect with --decoding {method}",
                do=f"add --decoding {needed[0]}, or leave {name} out",
            )
        if not generates and (key in DECODING or key in GENERATION):
            shown = "--decoding" if key == "method" else name
            what = section.task if is_retrieval else CHOICE_LIKELIHOOD
            raise VlmtuneError(f"{shown} has no effect: {what} generates no answers")
        if not is_retrieval and key in RETRIEVAL:
            raise VlmtuneError(
                f"{name} has no effect with --task {section.task}",
                do=f"add --task retrieval, or leave {name} out",
            )
        scorer = SCORED_BY.get(key, section.scorer)
        if section.scorer != scorer:
            raise VlmtuneError(
                f"{name} has no effect with --scorer {section.scorer}",
                do=f"add --scorer {scorer}, or leave {name} out",
            )


def _tell_differences(
    sections: Mapping[str, EvalSection], used: EvalSection, options: Options
) -> None:
    """Say where a run among several is evaluated otherwise than its own recipe says."""
    names = ("metrics", "max_new_tokens", *RETRIEVAL, "decoding")
    for target, section in sections.items():
        other = [
            name
            for name in names
            if name not in options
            and not (name == "decoding" and options.keys() & DECODING.keys())
            and section.task == used.task
            and getattr(section, name) != getattr(used, name)
        ]
        if other:
            logger.warning(
                "%s is evaluated as the first run's recipe says: its own eval.%s differ",
                target,
                ", eval.".join(other),
            )
