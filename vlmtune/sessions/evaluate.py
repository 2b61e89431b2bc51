"""`evaluate`: runs, adapters and models answer the questions of data files, and are scored.

EvalOptions -> settings over the first run's recipe, the data read, everything checked that needs
               no model: EvalPlan
            -> eval_targets.py: each target opened, asked, scored, and its report written
            -> EvalResult, or ComparisonResult where there are several targets

Imports no torch at its start: a wrong setting or a missing file is an error at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.errors import ErrorGroup, VlmtuneError
from vlmtune.sessions.preload import preload

if TYPE_CHECKING:
    from vlmtune.data.types import Conversation
    from vlmtune.evaluation.compare import Comparison
    from vlmtune.evaluation.guard import GuardVerdict
    from vlmtune.evaluation.metrics.base import Interval
    from vlmtune.evaluation.results import Result
    from vlmtune.recipe.data_section import DataEntry
    from vlmtune.recipe.schema import EvalSection, Recipe

logger = logging.getLogger("vlmtune")

ENTRY_KEYS = ("format", "columns", "image_dir", "prompt", "annotations", "split", "subset")
"""Keys of a data entry that may be set by these names alone; they are about all of `data`."""
COMPARED_KEYS = ("metrics", "max_new_tokens", "scorer", "subtract_prior", "embedding_prompt")
MEDIA_KEYS = (
    "allow_outside_paths",
    "allow_urls",
    "allow_private_addresses",
    "max_download_bytes",
    "url_timeout_seconds",
    "cache_dir",
)
RECIPE_KEYS = (
    *(f"eval.{key}" for key in ("task", "max_samples", "batch_size", "guard", *COMPARED_KEYS)),
    "eval.decoding.*",
    *(f"data.eval.{key}*" for key in ENTRY_KEYS),
    *(f"data.{key}" for key in MEDIA_KEYS),
    "seed",
    "quantization_bit",
    "trust_remote_code",
)
"""The recipe's keys that have an effect on an evaluation."""
OF_THE_RUN = {"data": {*MEDIA_KEYS}, "eval": {*COMPARED_KEYS, "task", "batch_size", "decoding"}}
"""The keys that have the value of the first run's recipe where they are not set."""

REPORT_FILES = ("metrics.json", "predictions.jsonl", "comparison.json", "targets.json")
"""Files that mark a folder as one that an evaluation wrote."""
OTHER_FILES = ("recipe.resolved.yaml", "config.json", "adapter_config.json")
"""Files that mark a folder as one that holds something else too."""


@dataclass(frozen=True)
class EvalOptions:
    """What is asked. `settings` are texts `key.sub=value` with the keys of a recipe, or with the
    bare keys of a data entry (`columns.image=photo`), which then say how `data` is read. `train`
    is the data that the guesser of `blind` takes its answers from, by default the run's."""

    targets: Sequence[str]
    data: Sequence[str | Path] = ()
    settings: Sequence[str] = ()
    blind: bool = False
    train: Sequence[str | Path] = ()
    output: Path | None = None
    dtype: str = "auto"
    quiet: bool = False


@dataclass(frozen=True)
class EvalPlan:
    """What every target is asked, checked. `section` is the `eval` section for all of them, `given`
    the keys that were set, `recipes` those of the targets that are runs, `finished` the targets
    that are reports already, `guesses` the majority answers, with `blind`."""

    options: EvalOptions
    recipe: Recipe
    section: EvalSection
    given: frozenset[str]
    recipes: Mapping[str, Recipe]
    finished: Mapping[str, Result]
    conversations: Sequence[Conversation]
    guesses: Sequence[str] | None

    @property
    def with_guard(self) -> bool:
        return "eval.guard" not in self.given

    @property
    def quantization_bit(self) -> int | None:
        """The width of the base models' weights; None: each target's own."""
        return self.recipe.quantization_bit if "quantization_bit" in self.given else None


@dataclass(frozen=True)
class Figures:
    """Metrics with their intervals, of all samples and of each question type."""

    metrics: Mapping[str, Interval]
    slices: Mapping[str, Mapping[str, Interval]]


@dataclass(frozen=True)
class EvalResult:
    """A target's report: what its `metrics.json` holds, and the path of its predictions. None:
    does not apply, or is not known of a report that was made elsewhere."""

    target: str
    task: str
    num_samples: int
    metrics: Mapping[str, Interval]
    slices: Mapping[str, Mapping[str, Interval]]
    predictions: Path
    kind: str | None = None
    model_commit: str | None = None
    data: Sequence[str] | None = None
    dtype: str | None = None
    pixel_budget: Sequence[int] | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    decoding: Mapping[str, Any] | None = None
    scorer: str | None = None
    subtract_prior: bool | None = None
    blind: Mapping[str, Figures] | None = None
    guard: GuardVerdict | None = None
    settings: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ComparisonSummary:
    """Every target but the first against the first; `changes` is a file with a line for each of
    the `num_changed` samples that a target scores otherwise than the first."""

    against: str
    task: str
    num_samples: int
    comparisons: Sequence[Comparison]
    num_changed: int
    changes: Path


@dataclass(frozen=True)
class ComparisonResult:
    """Several targets; `comparison` is None on all processes but the main one."""

    targets: Sequence[EvalResult]
    comparison: ComparisonSummary | None


def evaluate(options: EvalOptions) -> EvalResult | ComparisonResult:
    """Evaluate every target, write the reports, and compare several targets with the first.

    Raises VlmtuneError for whatever is wrong with the options, before a model is loaded. Contains
    collectives.
    """
    plan = plan_evaluation(options)
    preload("vlmtune.sessions.eval_targets")
    from vlmtune.sessions.eval_targets import run

    return run(plan)


def plan_evaluation(options: EvalOptions) -> EvalPlan:
    """Everything but the models, loaded and checked. Raises VlmtuneError for what is wrong."""
    from vlmtune.evaluation.metrics.registry import metrics_for
    from vlmtune.evaluation.references import check_references
    from vlmtune.evaluation.results import is_finished, read_result
    from vlmtune.recipe.load import load_resolved

    folders = {target: Path(target).expanduser() for target in options.targets}
    finished = {t: read_result(folder, t) for t, folder in folders.items() if is_finished(folder)}
    _check_targets(options, finished)
    recipes = {
        target: load_resolved(file)
        for target, folder in folders.items()
        if (file := folder / "recipe.resolved.yaml").is_file()
    }
    recipe, section, given = choose_settings(options, recipes, finished)
    metrics_for(section.task, section.metrics)
    if options.output is not None:
        check_output(options.output)
    conversations: list[Conversation] = []
    if options.data:
        conversations = _load_conversations(options, recipe, recipes, given)
        conversations = conversations[: section.max_samples]
    if conversations and section.task != "retrieval":
        check_references(conversations, task=section.task, metrics=section.metrics)
    guesses = _guess(options, section.task, conversations, recipes)
    if "eval.guard" not in given:
        _check_guards(recipes)
    return EvalPlan(options, recipe, section, given, recipes, finished, conversations, guesses)


def choose_settings(
    options: EvalOptions, recipes: Mapping[str, Recipe], finished: Mapping[str, Result]
) -> tuple[Recipe, EvalSection, frozenset[str]]:
    """The recipe and its `eval` section for all targets: the first run's, or else the defaults,
    under the settings; and the keys that were set.

    Raises VlmtuneError for settings that are wrong or without effect, and for targets of different
    tasks.
    """
    from vlmtune.recipe.load import is_entry_setting, load_settings

    first = next(iter(recipes.values()), None)
    values: dict[str, Any] = {"seed": 0, "data": {}, "eval": {}}
    if first is not None:
        values |= first.model_dump(mode="json", include=OF_THE_RUN)
    tasks: dict[str, str] = {target: recipe.eval.task for target, recipe in recipes.items()}
    tasks |= {target: report.task for target, report in finished.items()}
    if tasks:
        values["eval"]["task"] = next(iter(tasks.values()))
    files = [str(file) for file in (*options.data, *options.train)]
    settings = [f"data.eval.{s}" if is_entry_setting(s) else s for s in options.settings]
    if options.data:
        values["data"]["eval"] = {"path": files.pop(0)}
    elif any(setting.startswith(("data.eval.", "eval.max_samples=")) for setting in settings):
        raise VlmtuneError(
            f"{', '.join(ENTRY_KEYS)} and eval.max_samples have no effect without --data",
            do="name the file with --data",
        )
    values["data"]["train"] = files or None
    recipe, given = load_settings(settings, taken=RECIPE_KEYS, values=values)
    section = recipe.eval
    if "eval.task" in given:
        tasks |= dict.fromkeys(recipes, section.task)
    if len({section.task, *tasks.values()}) > 1:
        raise VlmtuneError(
            "the targets have different tasks",
            got=", ".join(f"{task} ({target})" for target, task in tasks.items()),
            expected="one task for all",
            do="name it with --task",
        )
    _warn_of_other_settings(recipes, section, given)
    return recipe, section, given


def _warn_of_other_settings(
    recipes: Mapping[str, Recipe], section: EvalSection, given: frozenset[str]
) -> None:
    """Say where a run among several is evaluated otherwise than its own recipe says."""
    for target, recipe in recipes.items():
        other = [
            f"eval.{name}"
            for name in (*COMPARED_KEYS, "decoding")
            if not any(key.startswith(f"eval.{name}") for key in given)
            and recipe.eval.task == section.task
            and getattr(recipe.eval, name) != getattr(section, name)
        ]
        if other:
            logger.warning(
                "%s is evaluated as the first run's recipe says: its own %s differ",
                target,
                ", ".join(other),
            )


def as_result(summary: Mapping[str, Any], folder: Path) -> EvalResult:
    """What the `metrics.json` of a report in `folder` holds; any evaluation may have written it."""
    from vlmtune.evaluation.guard import GuardVerdict

    known = {field.name for field in fields(EvalResult)}
    values = {key: value for key, value in summary.items() if key in known}
    if "blind" in values:
        values["blind"] = {name: _as_figures(guesser) for name, guesser in values["blind"].items()}
    if "guard" in values:
        values["guard"] = GuardVerdict(**values["guard"])
    predictions = (folder / "predictions.jsonl").absolute()
    return EvalResult(**values | vars(_as_figures(summary)) | {"predictions": predictions})


def _as_figures(summary: Mapping[str, Any]) -> Figures:
    from vlmtune.evaluation.metrics.base import Interval

    def intervals(metrics: Mapping[str, Any]) -> dict[str, Interval]:
        return {name: Interval(**interval) for name, interval in metrics.items()}

    slices = summary.get("slices", {})
    return Figures(
        intervals(summary["metrics"]), {kind: intervals(slices[kind]) for kind in slices}
    )


def absolute_path(target: str) -> Path:
    """The target as an absolute path, however it was written; equal where a target is the same.
    Links keep their own name. For a hub id the path means nothing but that."""
    return Path(os.path.abspath(Path(target).expanduser()))


def check_output(folder: Path) -> None:
    """Raise VlmtuneError where `--output` is a folder of something else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise VlmtuneError(
            "the output folder cannot be written: it is a file",
            file=folder,
            do="give another folder with --output",
        )
    names = sorted(path.name for path in folder.iterdir())
    is_ours = any(name in REPORT_FILES for name in names) or any(folder.glob("answers-*.part.*"))
    if names and (not is_ours or any(name in OTHER_FILES for name in names)):
        raise VlmtuneError(
            "the output folder is occupied",
            file=folder,
            got=", ".join(names[:3]) + (" …" if len(names) > 3 else ""),
            expected="a new folder, an empty one, or one of an evaluation",
            do="give another folder with --output",
        )


def _check_targets(options: EvalOptions, finished: Mapping[str, Result]) -> None:
    if not options.targets:
        raise VlmtuneError("no target is named", expected="a run, an adapter or a model")
    paths = [absolute_path(target) for target in options.targets]
    twice = [t for t, path in zip(options.targets, paths) if paths.count(path) > 1]
    if twice:
        raise VlmtuneError("a target is named twice", got=twice[-1], expected="each once")
    running = [target for target in options.targets if target not in finished]
    if len(options.targets) == 1 and not running:
        raise VlmtuneError(
            "the target is the report of an evaluation",
            file=options.targets[0],
            do="name a second target to compare it with, or a run, an adapter or a model",
        )
    if running and not options.data:
        raise VlmtuneError(
            f"there is no data to evaluate {running[0]} on", do="name a file with --data"
        )
    if options.train and not options.blind:
        raise VlmtuneError("--train has no effect without --blind", do="add --blind")
    if options.blind and not running:
        raise VlmtuneError("--blind has no effect: every target is a report already")


def _load_conversations(
    options: EvalOptions, recipe: Recipe, recipes: Mapping[str, Recipe], given: frozenset[str]
) -> list[Conversation]:
    """Those of `options.data`: read as the settings say, or else as the data of the runs are."""
    from vlmtune.data.dataset import load_conversations, media_policy_of
    from vlmtune.data.run_entries import WITH_SETTINGS, keys_of

    as_set = any(key.startswith("data.eval.") for key in given)
    if as_set and recipe.data.eval:
        (entry,) = recipe.data.eval
        entries = [entry.model_copy(update={"path": str(file)}) for file in options.data]
    else:
        entries = _entries_of_runs(options.data, recipes)
    try:
        return load_conversations(entries, media_policy=media_policy_of(recipe.data))[0]
    except VlmtuneError as error:
        hints = [
            VlmtuneError(
                "this file is read with keys of the run's own data",
                file=entry.path,
                got=", ".join(keys_of(entry)),
                do=f"where they do not fit it, say how it is read, {WITH_SETTINGS}",
            )
            for entry in entries
            if not as_set and keys_of(entry)
        ]
        if not hints:
            raise
        raise ErrorGroup([error, *hints]) from error


def _entries_of_runs(
    files: Sequence[str | Path], recipes: Mapping[str, Recipe], *, training: bool = False
) -> list[DataEntry]:
    """`files` as the first run's own data are read; with `training`, as its `data.train` first."""
    from vlmtune.data.dataset import as_entries
    from vlmtune.data.run_entries import entries_as_in_run, entry_as_in_run, run_data

    if not recipes:
        return as_entries(files)
    first, *others = (run_data(run, recipe, training=training) for run, recipe in recipes.items())
    entries = entries_as_in_run(files, first)
    for other in others:
        try:
            own = [entry_as_in_run(file, other).entry for file in files]
        except VlmtuneError:
            own = []
        if own != entries:
            logger.warning(
                "the data are read as %s reads them; %s reads its own otherwise",
                first.run,
                other.run,
            )
    return entries


def _guess(
    options: EvalOptions,
    task: str,
    conversations: Sequence[Conversation],
    recipes: Mapping[str, Recipe],
) -> list[str] | None:
    """The majority answers, with `options.blind`."""
    if not options.blind:
        return None
    if task == "retrieval":
        raise VlmtuneError(
            "--blind has no effect: retrieval without pictures is chance",
            do="leave --blind out; chance is k of the number of texts for R@k",
        )
    if any(conversation.videos for conversation in conversations):
        raise VlmtuneError(
            "--blind cannot be used with videos: only a picture can be made blank",
            do="leave --blind out, or leave out the samples with videos",
        )
    from vlmtune.data.dataset import load_conversations
    from vlmtune.evaluation.guard import majority_answers

    entries = _entries_of_runs(options.train, recipes, training=True)
    if not entries:
        of_runs = [recipe.data.train for recipe in recipes.values()]
        if not of_runs:
            raise VlmtuneError(
                "--blind needs the training data to guess from",
                got="no run among the targets, and no --train",
                do="name the data with --train FILE",
            )
        if any(of_run != of_runs[0] for of_run in of_runs):
            logger.warning(
                "--blind guesses from the training data of the first run; the others' differ"
            )
        entries = list(of_runs[0])
    training, bad = load_conversations(entries, on_bad_sample="skip", check_media=False)
    if bad and not training:
        raise VlmtuneError(
            "no row of the training data can be used to guess from", got=bad[0].reason
        )
    return majority_answers(training, conversations)


def _check_guards(recipes: Mapping[str, Recipe]) -> None:
    """The guard's data may be gone since training; that shows before hours of answering."""
    for target, recipe in recipes.items():
        for entry in recipe.eval.guard.data if recipe.eval.guard else ():
            if not Path(entry.path).exists():
                raise VlmtuneError(
                    "the data of the run's eval.guard is gone",
                    file=target,
                    got=entry.path,
                    do="bring it back, or leave the guard out with --no-guard",
                )
