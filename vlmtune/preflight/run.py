"""The whole preflight: checks everything about a run that needs no weights, on a CPU.

recipe -> processor, model on meta -> every row of train, eval, guard -> modules that train
       -> epoch, memory, disk -> problems and one verdict
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from transformers import ProcessorMixin

from vlmtune.data.dataset import cache_dir_of, media_policy_of
from vlmtune.data.encode import Encoder
from vlmtune.data.tools.duplicates import Overlap, overlap
from vlmtune.errors import VlmtuneError, plural
from vlmtune.evaluation.guard import guard_section, guarded_metric
from vlmtune.evaluation.references import check_references, check_some_left
from vlmtune.evaluation.retrieval.ranking import retrieval_items
from vlmtune.evaluation.runner import figure_names
from vlmtune.models.load import VLM, load_processor
from vlmtune.models.packing import can_pack
from vlmtune.models.precision import bfloat16_errors, capability_of
from vlmtune.preflight import epoch_stats
from vlmtune.preflight.epoch_stats import TrainingFigures, training_figures
from vlmtune.preflight.memory import Memory, optimizer_bytes
from vlmtune.preflight.model import MetaModel, Trained, check_weight_files, open_on_meta, trained_by
from vlmtune.preflight.problems import Problems
from vlmtune.preflight.rows import RowSettings
from vlmtune.preflight.sets import (
    GOOD,
    CheckedSet,
    SetName,
    ShowProgress,
    add_duplicates,
    add_failures,
    add_limit,
    errors_of_entries,
    evaluated_rows,
    look_at,
    look_at_repeated_ids,
    open_set,
)
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.explain import Place
from vlmtune.recipe.load import LoadedRecipe
from vlmtune.recipe.schema import Recipe
from vlmtune.recipe.yaml import dotted
from vlmtune.train.build import build_encoder, check_best_metric, embedding_prompt_of
from vlmtune.train.run_folder import choose_start, is_run

_QUOTED = re.compile(r"(?<!\w)(['\"]).*?\1(?!\w)")
_WORD = re.compile(r"(?<![\w./\\-])[a-z][a-z_]*(?:\.[a-z_]+)*(?![\w/\\-])")


class KeyLocations:
    """Where the keys of a recipe were written: a line of its file, or an override."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self._model = loaded.recipe.model
        self._places = {dotted(path): place for path, place in loaded.places.items()}

    def add_error(
        self,
        problems: Problems,
        error: VlmtuneError,
        *,
        about: Sequence[str] = ("model",),
    ) -> None:
        """Note `error`; one that names no file gets the place of the key that it names, or else
        of the first of the keys `about` that is written."""
        if error.file is None:
            place = self._place(error, about)
            error.file, error.line = place.file, place.line
        problems.add_error(error)

    def _place(self, error: VlmtuneError, about: Sequence[str]) -> Place:
        named = [key for text in (error.message, error.do or "") for key in self._named(text)]
        written = (key for key in (*named, *about, "model") if key in self._places)
        return self._places[next(written)]

    def _named(self, text: str) -> Iterator[str]:
        """The keys that `text` names. Values are none of them: the model's name or folder, what
        is quoted, paths. A key that is an English word (`model`, `train`) is meant as one only at
        the beginning or before a colon."""
        text = _QUOTED.sub("", text.replace(self._model, ""))
        for found in _WORD.finditer(text):
            key, rest = found.group(), text[found.end() :]
            is_no_english_word = "_" in key or "." in key
            if is_no_english_word or found.start() == 0 or rest.startswith(":"):
                yield key


def check_scorable(
    checked: CheckedSet, chosen: Set[int], recipe: Recipe, *, encoder: Encoder | None
) -> None:
    """Raise VlmtuneError where none of the `chosen` rows of a set is usable, where one cannot be
    scored, or where a figure that the recipe names is not measured on them."""
    left = chosen & set(checked.table.rows(GOOD).tolist())
    check_some_left(checked.name, num_left=len(left), num_given=len(chosen) or len(checked.table))
    conversations = checked.conversations(chosen)
    guard = recipe.eval.guard
    is_guard = checked.name == "eval.guard.data"
    section = guard_section(recipe.eval) if is_guard else recipe.eval
    if section.task == "retrieval":
        retrieval_items(conversations)
    else:
        check_references(conversations, task=section.task, metrics=section.metrics)
    names = figure_names(conversations, section)
    if is_guard and guard is not None:
        guarded_metric(dict.fromkeys(names), guard.metric)
    elif encoder is not None:
        check_best_metric(recipe, conversations, encoder=encoder, figures=names)


def add_overlap(train: CheckedSet, held_out: CheckedSet, problems: Problems) -> Overlap:
    """Warnings for pictures, and for pictures with their question, that both sets have."""
    found = overlap(train.table.digests, held_out.table.digests)
    table = held_out.table
    place = None
    if found.examples:
        place = table.source(table.digest_rows[found.examples[0]])
    file, line = (None, None) if place is None else (place.file, place.line)
    total = len(table.digests)
    if found.num_with_both:
        problems.add(
            "warning",
            f"{held_out.name}: {found.num_with_both:,} of {plural(total, 'sample')} have the "
            "question and the pictures of a training sample",
            file=file,
            line=line,
        )
    if found.num_with_picture:
        shown = (None, None) if found.num_with_both else (file, line)
        problems.add(
            "warning",
            f"{held_out.name}: {found.num_with_picture:,} of {plural(total, 'sample')} have a "
            f"picture of data.train ({plural(found.num_pictures, 'picture')}); "
            "`vlmtune data split` keeps each picture in one split",
            file=shown[0],
            line=shown[1],
        )
    return found


logger = logging.getLogger("vlmtune")


@dataclass
class Report:
    """What was found. What could not be worked out, because of a problem, is None."""

    problems: Problems
    sets: dict[SetName, CheckedSet] = field(default_factory=dict)
    duplicates: dict[SetName, int] = field(default_factory=dict)
    overlaps: dict[SetName, dict[str, int]] = field(default_factory=dict)
    figures: TrainingFigures | None = None
    trained: Trained | None = None
    memory: Memory | None = None
    disk: epoch_stats.Disk | None = None


@dataclass(frozen=True)
class Preflight:
    """One check of a recipe. `num_workers`: processes that look at rows, None: as many as there
    are cores; `max_samples`: rows of each set, None: all."""

    loaded: LoadedRecipe
    num_workers: int | None
    max_samples: int | None
    show_progress: ShowProgress

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    def run(self) -> Report:
        """Check everything; raises nothing that the user can put right."""
        report = Report(Problems())
        places = KeyLocations(self.loaded)
        with _collected_warnings(report.problems):
            self._check_folder(report)
            for error in bfloat16_errors(self.recipe, capability_of()):
                places.add_error(report.problems, error)
            processor, meta = self._open_model(report.problems, places)
            encoder = self._encoder(report.problems, places, processor, meta)
            self._check_sets(report, places, encoder)
            self._check_overlap(report)
            self._check_training(report, places, processor, meta)
        return report

    def _check_folder(self, report: Report) -> None:
        folder = Path(self.recipe.output_dir)
        with _noted(report.problems):
            epoch_stats.check_writable(folder)
        try:
            choose_start(folder, None)
        except VlmtuneError as error:
            # A run can be continued with --resume; nothing trains into another folder.
            report.problems.add_error(error, severity="warning" if is_run(folder) else "error")

    def _open_model(
        self, problems: Problems, places: KeyLocations
    ) -> tuple[ProcessorMixin | None, MetaModel | None]:
        recipe = self.recipe
        processor, meta = None, None
        with _noted(problems, places):
            meta = open_on_meta(recipe)
        with _noted(problems, places):
            check_weight_files(recipe.model)
        with _noted(problems, places):
            processor = load_processor(
                recipe.model,
                revision=recipe.revision if meta is None else meta.commit or recipe.revision,
                trust_remote_code=recipe.trust_remote_code,
                image=recipe.image,
            )
        return processor, meta

    def _encoder(
        self,
        problems: Problems,
        places: KeyLocations,
        processor: ProcessorMixin | None,
        meta: MetaModel | None,
    ) -> Encoder | None:
        if processor is None or meta is None:
            return None
        # What was measured may differ from what a cache of another time holds.
        data = self.recipe.data.model_copy(update={"cache": "off"})
        recipe = self.recipe.model_copy(update={"data": data})
        vlm = VLM(meta.model, processor, meta.family, recipe.model, meta.commit)
        with _noted(problems, places):
            return build_encoder(recipe, vlm)
        return None

    def _check_sets(self, report: Report, places: KeyLocations, encoder: Encoder | None) -> None:
        recipe = self.recipe
        guard = recipe.eval.guard
        wanted: list[tuple[SetName, Sequence[DataEntry] | None, int | None]] = [
            ("data.train", recipe.data.train, None),
            ("data.eval", recipe.data.eval, recipe.eval.max_samples),
        ]
        if guard is not None:
            wanted.append(("eval.guard.data", guard.data, guard.max_samples))
        for name, entries, num_evaluated in wanted:
            if entries is None:
                continue
            checked = self._look_at(name, entries, report.problems, encoder)
            if checked is None:
                continue
            report.sets[name] = checked
            look_at_repeated_ids(checked, report.problems)
            chosen = None
            if name != "data.train":
                chosen = evaluated_rows(checked, num_evaluated, seed=recipe.seed)
            add_failures(checked, report.problems, recipe=recipe, chosen=chosen)
            if name == "data.train":
                add_limit(checked, report.problems, recipe=recipe)
            elif chosen is not None:
                with _noted(report.problems, places, about=_scored_by(name)):
                    check_scorable(checked, chosen, recipe, encoder=encoder)
            if checked.is_partial:
                report.problems.add(
                    "warning",
                    f"{name}: only {len(checked.table):,} of {plural(checked.num_rows, 'row')} "
                    "were checked (--max-samples)",
                )
            report.duplicates[name] = add_duplicates(checked, report.problems)

    def _look_at(
        self,
        name: SetName,
        entries: Sequence[DataEntry],
        problems: Problems,
        encoder: Encoder | None,
    ) -> CheckedSet | None:
        recipe = self.recipe
        is_train = name == "data.train"
        streamed = is_train and recipe.data.streaming
        settings = RowSettings(
            encoder,
            recipe.data.max_image_pixels,
            with_prompt=not is_train,
            pair_prompt=None if name == "eval.guard.data" else embedding_prompt_of(recipe),
        )
        try:
            opened = open_set(entries, recipe, streamed=streamed)
        except VlmtuneError as error:
            for each in errors_of_entries(entries, recipe, streamed=streamed) or [error]:
                problems.add_error(each)
            return None
        try:
            return look_at(
                name,
                opened,
                settings,
                num_workers=self.num_workers,
                max_samples=self.max_samples,
                show_progress=self.show_progress,
            )
        except VlmtuneError as error:
            problems.add_error(error)
            return None

    def _check_overlap(self, report: Report) -> None:
        train = report.sets.get("data.train")
        held_out = report.sets.get("data.eval")
        if train is None or held_out is None:
            return
        found = add_overlap(train, held_out, report.problems)
        report.overlaps["data.eval"] = {
            "pictures": found.num_pictures,
            "samples_with_picture": found.num_with_picture,
            "samples_with_question": found.num_with_question,
            "samples_with_both": found.num_with_both,
        }

    def _check_training(
        self,
        report: Report,
        places: KeyLocations,
        processor: ProcessorMixin | None,
        meta: MetaModel | None,
    ) -> None:
        recipe, problems = self.recipe, report.problems
        train = report.sets.get("data.train")
        if train is not None:
            with _noted(problems, places):
                packs = (
                    meta is not None
                    and recipe.train.packing
                    and recipe.objective == "next_token"
                    and can_pack(meta.model, meta.family)
                )
                report.figures = training_figures(train, recipe, packs=packs)
        if meta is None or processor is None:
            return
        figures = report.figures
        steps = recipe.train.max_steps or (figures.steps if figures else None)
        if steps is None:
            return
        with _noted(problems, places):
            report.trained = trained_by(meta, recipe, processor=processor, total_steps=steps)
        trained = report.trained
        if trained is None or figures is None or train is None:
            return
        _check_pictures(trained, train, problems, places)
        report.memory = figures.memory(recipe, meta, trained, processor)
        cache_bytes = figures.cache_bytes if recipe.data.cache == "disk" else 0
        report.disk = epoch_stats.disk_of(
            recipe,
            trained,
            optimizer_bytes=optimizer_bytes(recipe, trained),
            cache_bytes=cache_bytes,
        )
        with _noted(problems):
            epoch_stats.check_room(report.disk, Path(recipe.output_dir))
        if recipe.data.cache == "disk":
            folder = cache_dir_of(media_policy_of(recipe.data))
            try:
                epoch_stats.check_cache_folder(folder)
            except VlmtuneError as error:
                problems.add_error(error, severity="warning")
            with _noted(problems):
                epoch_stats.check_cache_room(cache_bytes, folder)


def _check_pictures(
    trained: Trained, train: CheckedSet, problems: Problems, places: KeyLocations
) -> None:
    """Modules for pictures want pictures, or videos."""
    parts = [p for p, count in trained.parts.items() if count.trainable_parameters]
    has_media = any(train.table.media[int(row)] for row in train.table.rows(GOOD))
    if set(parts) & {"vision", "connector"} and not has_media and train.table.count(GOOD):
        places.add_error(
            problems,
            VlmtuneError(
                "modules of the vision tower or the connector are trained, but no sample has a "
                "picture or a video",
                do="remove them from lora_target and modules_to_save",
            ),
        )


def _scored_by(name: SetName) -> tuple[str, ...]:
    """The keys that say what is measured on a set."""
    section, metrics = ("eval.guard", "metric") if "guard" in name else ("eval", "metrics")
    return f"{section}.{metrics}", f"{section}.task", name


@contextlib.contextmanager
def _noted(
    problems: Problems, places: KeyLocations | None = None, *, about: Sequence[str] = ("model",)
) -> Iterator[None]:
    """Errors of the body become problems. One without a file gets its place from `places`: that of
    the key that it names, or else of a key it is `about`."""
    try:
        yield
    except VlmtuneError as error:
        if places is None:
            problems.add_error(error)
        else:
            places.add_error(problems, error, about=about)


class _WarningsToProblems(logging.Handler):
    def __init__(self, problems: Problems) -> None:
        super().__init__(logging.WARNING)
        self._problems = problems

    def emit(self, record: logging.LogRecord) -> None:
        self._problems.add("warning", record.getMessage())


@contextlib.contextmanager
def _collected_warnings(problems: Problems) -> Iterator[None]:
    """Warnings logged while the body runs become problems, and are not logged as well."""
    own = _WarningsToProblems(problems)
    others = list(logger.handlers)

    def below_warning(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    for handler in others:
        handler.addFilter(below_warning)
    logger.addHandler(own)
    try:
        yield
    finally:
        logger.removeHandler(own)
        for handler in others:
            handler.removeFilter(below_warning)
