"""What is asked of an evaluation, checked before any model is loaded, and carried out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.errors import ErrorGroup, VlmtuneError, plural
from vlmtune.sessions.eval_tables import print_result
from vlmtune.sessions.evaluate import (
    ChooseFolder,
    EvalPlan,
    check_output,
    compare_targets,
    default_parent,
    evaluate_target,
    make_folder,
    place_of,
    unfinished_or_new,
)
from vlmtune.sessions.preload import preload

if TYPE_CHECKING:
    from vlmtune.data.types import Conversation, MediaPolicy
    from vlmtune.evaluation.results import Result
    from vlmtune.recipe.data_section import DataEntry
    from vlmtune.recipe.schema import EvalSection, Recipe
    from vlmtune.sessions.data_input import DataOptions
    from vlmtune.sessions.processes import Processes


logger = logging.getLogger("vlmtune")

Options = Mapping[str, Any]


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
    from vlmtune.recipe.schema import DecodingSection, EvalSection

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
    decoding = {key: options[key] for key in DecodingSection.model_fields if key in options}
    updates: dict[str, Any] = {key: options[key] for key in options.keys() - decoding.keys()}
    updates.setdefault("task", next(iter(tasks.values()), base.task))
    if updates["task"] != base.task:
        updates.setdefault("metrics", [])  # the recipe's are those of another task
    updates["decoding"] = base.decoding.model_dump() | decoding
    section = _validated(base, updates)
    _check_effects(section, options)
    _tell_differences(sections, section, options.keys() | ({"decoding"} if decoding else set()))
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
    from vlmtune.recipe.rules import idle_keys

    decoding = type(section.decoding).model_fields
    keys = [f"eval.{'decoding.' if key in decoding else ''}{key}" for key in options]
    for why in idle_keys({"eval": section.model_dump()}, keys).values():
        name = _option(why.key)
        value = ",".join(why.value) if isinstance(why.value, list) else why.value
        do = f"add {_option(why.cause)} {why.needed}, or " if isinstance(why.needed, str) else ""
        raise VlmtuneError(
            f"{name} has no effect with {_option(why.cause)} {value}", do=f"{do}leave {name} out"
        )


def _option(key: str) -> str:
    """The option that sets a key of `eval`."""
    name = key.rsplit(".", 1)[-1].replace("_", "-")
    return "--decoding" if name == "method" else f"--{name}"


def _tell_differences(
    sections: Mapping[str, EvalSection], used: EvalSection, given: Set[str]
) -> None:
    """Say where a run among several is evaluated otherwise than its own recipe and the `given`
    keys of `eval` say."""
    names = ("metrics", "max_new_tokens", "scorer", "subtract_prior", "embedding_prompt")
    for target, section in sections.items():
        other = [
            name
            for name in (*names, "decoding")
            if name not in given
            and section.task == used.task
            and getattr(section, name) != getattr(used, name)
        ]
        if other:
            logger.warning(
                "%s is evaluated as the first run's recipe says: its own eval.%s differ",
                target,
                ", eval.".join(other),
            )


@dataclass(frozen=True)
class EvalOptions:
    """`options` are the keys of `eval` and `eval.decoding` that were given, `reading` what was
    said of how `data` is read."""

    targets: Sequence[str]
    data: Sequence[Path]
    reading: DataOptions
    options: Options
    max_samples: int | None
    blind: bool
    train: Sequence[Path]
    output: Path | None
    allow_outside_paths: bool = False
    allow_urls: bool = False
    finished: dict[str, Path] = field(default_factory=dict)

    def plan(self, processes: Processes, **settings: Any) -> EvalPlan:
        """Everything but the models, loaded and checked. Raises VlmtuneError for whatever is wrong
        with it."""
        from vlmtune.evaluation.metrics.registry import metrics_for

        self._check_targets()
        reports = self._reports()
        preload("vlmtune.evaluation.runner", "vlmtune.models.open")
        recipes = read_recipes(self.targets)
        tasks = {target: report.task for target, report in reports.items()}
        prompt = prompt_of_folders(self.targets)
        section = choose_section(recipes, self.options, tasks, prompt=prompt)
        metrics_for(section.task, section.metrics)
        if self.output is not None:
            check_output(self.output)
        conversations: list[Conversation] = []
        if self.data:
            conversations = self._conversations(recipes)[: self.max_samples]
        for target, report in reports.items():
            if section.task != "retrieval":  # whose rows are queries
                _check_samples(conversations, report, target)
        guesses = self._guesses(section.task, conversations, recipes)
        if settings["with_guard"]:
            _check_guards(recipes)

        from vlmtune.evaluation.references import check_references
        from vlmtune.evaluation.retrieval.ranking import retrieval_items
        from vlmtune.evaluation.retrieval.runner import wanted_figures
        from vlmtune.models.open import check_target

        if section.task == "retrieval":
            wanted_figures(section.metrics)
            if conversations:
                retrieval_items(conversations)
        elif conversations:
            check_references(conversations, task=section.task, metrics=section.metrics)
        for target in self.targets:
            if target not in self.finished:
                check_target(target)  # the last one's mistake shows before the first is answered
        if self.output is not None:
            make_folder(self.output)
        return EvalPlan(
            conversations=conversations,
            data=self.data,
            section=section,
            guesses=guesses,
            processes=processes,
            **settings,
        )

    def run(self, plan: EvalPlan, *, as_json: bool) -> dict[str, Any]:
        """Evaluate and print unless `as_json`; what `--json` holds. Contains collectives."""
        if len(self.targets) > 1:
            return compare_targets(self.targets, plan, self.finished, self.output, as_json=as_json)
        (target,) = self.targets
        place = self.output or self._place(target)
        result = evaluate_target(target, plan, place)
        if plan.processes.is_main and not as_json:
            print_result(result)
            print(f"predictions: {result['predictions']}")
        return result

    def _place(self, target: str) -> ChooseFolder:
        started_at = time.strftime("%Y%m%d-%H%M%S")

        def choose_folder(kind: str, settings: Mapping[str, Any]) -> Path:
            parent, stem = default_parent(target, kind, self.data[0])
            return unfinished_or_new(parent, stem, settings, started_at)

        return choose_folder

    def _check_targets(self) -> None:
        from vlmtune.evaluation.results import is_finished

        places = [place_of(target) for target in self.targets]
        twice = [t for t, place in zip(self.targets, places) if places.count(place) > 1]
        if twice:
            raise VlmtuneError("a target is named twice", got=twice[-1], expected="each once")
        folders = {target: Path(target).expanduser() for target in self.targets}
        self.finished.update({t: folder for t, folder in folders.items() if is_finished(folder)})
        running = [target for target in self.targets if target not in self.finished]
        if len(self.targets) == 1 and not running:
            raise VlmtuneError(
                "the target is the report of an evaluation",
                file=self.targets[0],
                do="name a second target to compare it with, or a run, an adapter or a model",
            )
        if running and not self.data:
            raise VlmtuneError(
                f"Missing option '--data': there is nothing to evaluate {running[0]} on"
            )
        if self.reading.says_how and not self.data:
            raise VlmtuneError(
                "--columns, --prompt, --image-dir and --format have no effect without --data",
                do="name the file with --data",
            )
        if self.train and not self.blind:
            raise VlmtuneError("--train has no effect without --blind", do="add --blind")
        if self.blind and not running:
            raise VlmtuneError("--blind has no effect: every target is a report already")

    def _conversations(self, recipes: Mapping[str, Recipe]) -> list[Conversation]:
        """Those of `data`, read as the options say, or else as the first run's own data."""
        from vlmtune.data.dataset import load_conversations
        from vlmtune.data.run_entries import WITH_OPTIONS, keys_of
        from vlmtune.sessions.data_input import entries_of

        if self.reading.says_how:
            entries, taken = entries_of(self.reading), []
        else:
            entries = _entries_of_run(self.data, recipes)
            taken = [entry for entry in entries if keys_of(entry)]
        try:
            return load_conversations(entries, media_policy=self._access(recipes))[0]
        except VlmtuneError as error:
            hints = [
                VlmtuneError(
                    "this file is read with keys of the run's own data",
                    file=entry.path,
                    got=", ".join(keys_of(entry)),
                    do=f"where they do not fit it, say how it is read, {WITH_OPTIONS}",
                )
                for entry in taken
            ]
            if not hints:
                raise
            raise ErrorGroup([error, *hints]) from error

    def _access(self, recipes: Mapping[str, Recipe]) -> MediaPolicy:
        """What pictures may be read from: what the first run's recipe allows, and the options."""
        from vlmtune.data.dataset import media_policy_of
        from vlmtune.data.types import LOCAL

        of_run = next((media_policy_of(recipe.data) for recipe in recipes.values()), LOCAL)
        return replace(
            of_run,
            allow_outside_paths=of_run.allow_outside_paths or self.allow_outside_paths,
            allow_urls=of_run.allow_urls or self.allow_urls,
        )

    def _reports(self) -> dict[str, Result]:
        from vlmtune.evaluation.results import read_result

        return {target: read_result(folder, target) for target, folder in self.finished.items()}

    def _guesses(
        self, task: str, conversations: Sequence[Conversation], recipes: Mapping[str, Recipe]
    ) -> list[str] | None:
        """The majority answers, with `--blind`."""
        if not self.blind:
            return None
        if task == "retrieval":
            raise VlmtuneError(
                "--blind has no effect: retrieval without pictures is chance",
                do="leave --blind out; chance is k of the number of texts for R@k",
            )
        if any(conversation.videos for conversation in conversations):
            raise VlmtuneError(
                "--blind asks with blank pictures, which are not made of videos",
                do="leave --blind out, or leave out the samples with videos",
            )
        from vlmtune.data.dataset import load_conversations
        from vlmtune.evaluation.guard import majority_answers

        files = _entries_of_run(self.train, recipes, training=True)
        if not files:
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
            files = list(of_runs[0])
        training, bad = load_conversations(files, on_bad_sample="skip", check_media=False)
        if bad and not training:
            raise VlmtuneError(
                "no row of the training data can be used to guess from", got=bad[0].reason
            )
        return majority_answers(training, conversations)


def _entries_of_run(
    files: Sequence[Path], recipes: Mapping[str, Recipe], *, training: bool = False
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


def _check_guards(recipes: Mapping[str, Recipe]) -> None:
    """The guard's data may be gone since training; that shows before hours of answering."""
    for target, recipe in recipes.items():
        if recipe.eval.guard is None:
            continue
        for file in [entry.path for entry in recipe.eval.guard.data]:
            if not Path(file).exists():
                raise VlmtuneError(
                    "the data of the run's eval.guard is gone",
                    file=target,
                    got=file,
                    do="bring it back, or leave the guard out with --no-guard",
                )


def _check_samples(conversations: Sequence[Conversation], report: Result, target: str) -> None:
    """A finished report must be of the data that the other targets are about to be evaluated on."""
    from vlmtune.evaluation.references import answered_sample, question_of

    ids = {conversation.id for conversation in conversations}
    if conversations and ids != report.rows.keys():
        raise VlmtuneError(
            "the report is not of the samples in --data",
            file=target,
            got=f"{plural(len(report.rows), 'sample')}, "
            f"{len(ids & report.rows.keys())} of them in --data",
            expected=f"the {len(ids)} of --data",
        )
    for conversation in conversations:
        sample, row = answered_sample(conversation, ""), report.rows[conversation.id]
        in_data = {
            "question": question_of(conversation),
            "answer": sample.answer,
            "answers": list(sample.answers),
            "options": list(sample.options),
        }
        changed = [key for key, value in in_data.items() if row[key] != value]
        if changed:
            raise VlmtuneError(
                f"the report is of another {changed[0]} than --data has",
                file=target,
                got=f"sample {conversation.id!r}",
                do="evaluate its target anew: name that instead of the report",
            )
