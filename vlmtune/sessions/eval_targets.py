"""Targets opened, asked and scored, with the blind guessers and the guard, and their reports.

OUTPUT/targets.json       what is compared, to know an interrupted comparison again
OUTPUT/NAME/              each target's report
OUTPUT/comparison.json    differences with intervals, McNemar's test
OUTPUT/changes.jsonl      the samples whose score changed, with every target's answer
"""

from __future__ import annotations

import contextlib
import gc
import glob
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlmtune.data.dataset import load_conversations, media_policy_of
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation import guard as guarding
from vlmtune.evaluation.answer_log import (
    AnswerLog,
    answer_settings,
    decoding_in_effect,
    kept_settings,
    references_digest,
    remove_answer_log,
    settings_digest,
)
from vlmtune.evaluation.compare import check_same_samples, compare
from vlmtune.evaluation.guard import GuardVerdict, blanked
from vlmtune.evaluation.references import answered_sample, fixed_subset, question_of
from vlmtune.evaluation.results import (
    EvalReport,
    Result,
    is_finished,
    read_result,
    write_report,
)
from vlmtune.evaluation.retrieval.ranking import retrieval_items
from vlmtune.evaluation.retrieval.runner import wanted_figures
from vlmtune.evaluation.runner import evaluate, num_to_do, score_answers
from vlmtune.files import write_file
from vlmtune.models.embedding import recorded_prompt
from vlmtune.models.load import pixel_budget
from vlmtune.models.open import OpenTarget, check_target, result_of_run
from vlmtune.recipe.schema import EvalSection, Recipe
from vlmtune.sessions.console import progress
from vlmtune.sessions.evaluate import (
    ComparisonResult,
    ComparisonSummary,
    EvalPlan,
    EvalResult,
    absolute_path,
    as_result,
)
from vlmtune.sessions.processes import Processes, joined_processes
from vlmtune.sessions.target import answering_encoder, open_for_answers
from vlmtune.train.build import build_encoder, usable

logger = logging.getLogger("vlmtune")

HOW = ("pixel_budget", "scorer", "subtract_prior", "max_new_tokens", "decoding")
"""What a report says of how its target was asked."""


def run(plan: EvalPlan) -> EvalResult | ComparisonResult:
    """Evaluate the targets, write their reports and compare several. Contains collectives."""
    options, section = plan.options, plan.section
    if not plan.recipes and "eval.embedding_prompt" not in plan.given:
        plan = replace(plan, section=with_recorded_prompt(section, options.targets))
    if section.task == "retrieval":
        wanted_figures(section.metrics)
        if plan.conversations:
            retrieval_items(plan.conversations)
    elif plan.conversations:
        for report in plan.finished.values():
            check_same_samples(_as_rows(plan), report)
    for target in options.targets:
        if target not in plan.finished:
            check_target(target)  # the last one's mistake shows before the first is answered
    if options.output is not None:
        make_folder(options.output)
    with joined_processes() as processes:
        if len(options.targets) > 1:
            return compare_targets(plan, processes)
        return evaluate_target(options.targets[0], plan, processes, options.output)


def with_recorded_prompt(section: EvalSection, targets: Sequence[str]) -> EvalSection:
    """With the prompt that the first of `targets` whose folder records one was trained with."""
    for target in targets:
        if (prompt := recorded_prompt(Path(target).expanduser())) is not None:
            return section.model_copy(update={"embedding_prompt": prompt})
    return section


@dataclass(frozen=True)
class EvalSession:
    """An opened target and what it is asked."""

    target: str
    opened: OpenTarget
    plan: EvalPlan
    processes: Processes

    def answer_settings(
        self, conversations: Sequence[Conversation], section: EvalSection, encoder: Encoder
    ) -> dict[str, Any]:
        """Whatever decides an answer."""
        opened = self.opened
        folder = Path(self.target).expanduser()
        trained_bit = 16 if opened.recipe is None else opened.recipe.quantization_bit
        return answer_settings(
            opened.vlm,
            conversations,
            folders=[
                result_of_run(folder) if opened.kind == "run" else folder,
                Path(opened.vlm.source).expanduser(),
            ],
            quantization_bit=self.plan.quantization_bit or trained_bit,
            encoder=encoder,
            section=section,
            seed=self.plan.recipe.seed,
        )

    def report(
        self,
        conversations: Sequence[Conversation],
        section: EvalSection,
        encoder: Encoder,
        folder: Path,
        *,
        what: str = "",
        shown: Sequence[Conversation] | None = None,
    ) -> EvalReport:
        """Answers and scores; `shown` are the conversations as the model sees them, where these
        are not the ones to score; `what` goes before the progress. A collective."""
        rank, world_size = self.processes.rank, self.processes.world_size
        is_retrieval = section.task == "retrieval"
        label = what + ("pictures scored" if is_retrieval else "answered")
        num_mine = num_to_do(conversations, section.task, rank=rank, world_size=world_size)
        with contextlib.ExitStack() as stack:
            kept = None
            if not is_retrieval:
                settings = self.answer_settings(shown or conversations, section, encoder)
                kept = stack.enter_context(AnswerLog(folder, settings, rank=rank))
                if self.processes.is_main:
                    _log_kept_answers(kept, len(conversations), folder)
            quiet = self.plan.options.quiet or not self.processes.is_main
            on_progress = stack.enter_context(progress(label, num_mine, quiet=quiet))
            return evaluate(
                self.opened.vlm,
                conversations,
                shown=shown,
                encoder=encoder,
                section=section,
                seed=self.plan.recipe.seed,
                on_progress=on_progress,
                rank=rank,
                world_size=world_size,
                gather=self.processes.gather,
                kept=kept,
            )

    def digest(self, settings: Mapping[str, Any]) -> str:
        """A short name for whatever decides the report."""
        plan = self.plan
        also = {
            "section": plan.section.model_dump(exclude={"batch_size", "guard", "max_samples"}),
            "references": references_digest(plan.conversations),
            "seed": plan.recipe.seed,
            "blind": plan.guesses,
            "guard": plan.with_guard,
        }
        return settings_digest({**settings, **also})

    def about(self) -> dict[str, Any]:
        """What was evaluated, on what, and how."""
        vlm, plan = self.opened.vlm, self.plan
        about = {
            "target": self.target,
            "kind": self.opened.kind,
            "model_commit": vlm.commit,
            "data": _data_of(plan),
            "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "pixel_budget": pixel_budget(vlm.processor),  # reports compare only at the same one
            "seed": plan.recipe.seed,
        }
        if plan.section.task == "retrieval":
            about["scorer"] = plan.section.scorer
            if plan.section.scorer == "likelihood":
                about["subtract_prior"] = plan.section.subtract_prior
            return about
        return about | {
            "max_new_tokens": plan.section.max_new_tokens,
            "decoding": decoding_in_effect(plan.section.decoding),
        }


def evaluate_target(
    target: str, plan: EvalPlan, processes: Processes, folder: Path | None, *, reuse: bool = False
) -> EvalResult:
    """Evaluate one target and write its report into `folder`; None: into the one in which this was
    stopped, or a new one. With `reuse`, a report of the same evaluation that is in the folder is
    taken. Contains collectives.
    """
    opened = open_for_answers(
        target,
        dtype=plan.options.dtype,
        quantization_bit=plan.quantization_bit,
        trust_remote_code=plan.recipe.trust_remote_code,
        device=processes.device,
    )
    session = EvalSession(target, opened, plan, processes)
    encoder = answering_encoder(opened)
    settings = session.answer_settings(plan.conversations, plan.section, encoder)
    if folder is None:
        chosen = _choose_folder(session, settings) if processes.is_main else None
        folder = processes.from_main(chosen)
    make_folder(folder)
    digest = session.digest(settings)
    if reuse:
        is_there = is_finished(folder) and read_result(folder, target).summary.get("settings")
        if processes.from_main(is_there == digest if processes.is_main else None):
            logger.info("the report in %s is of this evaluation", folder)
            return as_result(read_result(folder, target).summary, folder)
    began = time.monotonic()
    report = session.report(plan.conversations, plan.section, encoder, folder)
    about = session.about() | {"settings": digest, "seconds": time.monotonic() - began}
    reports = {folder: (report, about)}
    if plan.guesses is not None:
        about["blind"], blank = _evaluate_blind(session, plan.guesses, folder / "blank")
        reports[folder / "blank"] = blank, {"target": target, "pictures": "blank"}
    if plan.with_guard:
        guarded = _evaluate_guard(session, folder / "guard")
        if guarded is not None:
            about["guard"] = guarded[0].as_dict()
            reports[folder / "guard"] = guarded[1], {"target": target, "kind": "run"}
    if processes.is_main:
        # Only now: a kill before the last answer leaves every answer to go on with.
        for place, (written, what) in reports.items():
            write_report(written, place, about=what)
        for place in reports:
            remove_answer_log(place)
    return as_result(about | report.summary(), folder)


def _as_rows(plan: EvalPlan) -> Result:
    """The questions and references of the data, as a report of them would have them."""
    rows = {}
    for conversation in plan.conversations:
        sample = asdict(answered_sample(conversation, ""))
        question = {"question": question_of(conversation)}
        rows[conversation.id] = json.loads(json.dumps(sample | question))  # lists for tuples
    return Result("--data", Path(plan.options.data[0]), {"task": plan.section.task}, rows)


def _data_of(plan: EvalPlan) -> list[str]:
    return [str(Path(file).absolute()) for file in plan.options.data]


def _log_kept_answers(kept: AnswerLog, total: int, folder: Path) -> None:
    if kept.texts:
        logger.info("%d of %d answers are kept from an earlier start", len(kept.texts), total)
    if kept.dropped:
        logger.warning(
            "%s holds answers of an earlier start with other settings (%s); they are made again",
            folder,
            ", ".join(sorted(kept.dropped)),
        )


def _evaluate_blind(
    session: EvalSession, guesses: Sequence[str], folder: Path
) -> tuple[dict[str, dict[str, object]], EvalReport]:
    """The figures of guessers that never see a picture, and the report of the one that is the
    model with blank pictures. A collective."""
    plan = session.plan
    guessed = score_answers(
        plan.conversations,
        guesses,
        task=plan.section.task,
        metrics=plan.section.metrics,
        seed=plan.recipe.seed,
    )
    blank = session.report(
        plan.conversations,
        plan.section,
        answering_encoder(session.opened),
        folder,
        what="blank pictures: ",
        shown=[blanked(conversation) for conversation in plan.conversations],
    )
    guessers = {"majority_answer": guessed.summary(), "blank_pictures": blank.summary()}
    figures = {
        name: {key: summary[key] for key in ("metrics", "slices")}
        for name, summary in guessers.items()
    }
    return figures, blank


def _evaluate_guard(session: EvalSession, folder: Path) -> tuple[GuardVerdict, EvalReport] | None:
    """Whether a run fell on its recipe's guard; None where there is none. A collective."""
    recipe = session.opened.recipe
    if recipe is None or recipe.eval.guard is None:
        return None
    before = guarding.read_figures(Path(session.target).expanduser() / guarding.BEFORE)
    if before is None:
        logger.warning("the guard was not checked: it was not measured before training")
        return None
    encoder = build_encoder(recipe, session.opened.vlm)  # takes and leaves out what training did
    report = session.report(
        _guard_conversations(recipe, encoder),
        guarding.guard_section(recipe.eval).model_copy(
            update={"batch_size": session.plan.section.batch_size}
        ),
        encoder,
        folder,
        what="guard: ",
    )
    after = {name: interval.value for name, interval in report.metrics.items()}
    name = guarding.guarded_metric(after, recipe.eval.guard.metric)
    guarding.guarded_metric(before, name)
    verdict = guarding.guard_verdict(
        before[name], after[name], metric=name, max_drop=recipe.eval.guard.max_drop
    )
    return verdict, report


def _guard_conversations(recipe: Recipe, encoder: Encoder) -> list[Conversation]:
    """The samples on which the guard was measured in training."""
    guard, policy = recipe.eval.guard, recipe.data.on_bad_sample
    assert guard is not None
    found, _ = load_conversations(
        guard.data, on_bad_sample=policy, media_policy=media_policy_of(recipe.data)
    )
    chosen = fixed_subset(found, guard.max_samples, seed=recipe.seed)
    return usable(chosen, encoder=encoder, skip=policy == "skip")


def compare_targets(plan: EvalPlan, processes: Processes) -> ComparisonResult:
    """Evaluate what is no report already, compare everything with the first target, and write.
    Contains collectives."""
    targets = plan.options.targets
    names = names_of(targets)
    subfolders = folders_of(names.values())
    chosen = None
    if processes.is_main:
        chosen = plan.options.output or _choose_comparison_folder(plan)
    folder: Path = processes.from_main(chosen)
    make_folder(folder)
    if processes.is_main:
        write_file(folder / "targets.json", _targets_text(plan))
    results, reports = [], {}
    for target in targets:
        name = names[target]
        if target in plan.finished:
            report = plan.finished[target]
            reports[name] = report.folder
            results.append(as_result(report.summary | {"target": target}, report.folder))
            continue
        logger.info("%s:", target)
        reports[name] = folder / subfolders[name]
        results.append(evaluate_target(target, plan, processes, reports[name], reuse=True))
        _free_memory()
    if not processes.is_main:
        return ComparisonResult(results, None)
    read = [read_result(report, name) for name, report in reports.items()]
    _warn_of_differences(read)
    comparisons, changes = compare(read, metrics=plan.section.metrics, seed=plan.recipe.seed)
    summary = ComparisonSummary(
        against=read[0].name,
        task=read[0].task,
        num_samples=len(read[0].rows),
        comparisons=comparisons,
        num_changed=len(changes),
        changes=(folder / "changes.jsonl").absolute(),
    )
    written = {key: value for key, value in asdict(summary).items() if key != "changes"}
    write_file(folder / "comparison.json", json.dumps(written, indent=2) + "\n")
    lines = [json.dumps(change.as_row(), ensure_ascii=False) + "\n" for change in changes]
    write_file(folder / "changes.jsonl", "".join(lines))
    return ComparisonResult(results, summary)


def _free_memory() -> None:
    """Give back the memory of a model that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _warn_of_differences(results: Sequence[Result]) -> None:
    """Say where reports were made otherwise than the first: then not only the models differ."""
    first = results[0]
    for other in results[1:]:
        common = first.summary.keys() & other.summary.keys()
        differing = [
            f"{name} {other.summary[name]} (not {first.summary[name]})"
            for name in HOW
            if name in common and first.summary[name] != other.summary[name]
        ]
        if differing:
            logger.warning(
                "%s was not evaluated as %s was: %s", other.name, first.name, ", ".join(differing)
            )


def names_of(targets: Sequence[str]) -> dict[str, str]:
    """What each target is called: its last path component, or all of it where two share one."""
    short = [_short_name(target) for target in targets]
    return {
        target: name if short.count(name) == 1 else target.rstrip("/")
        for target, name in zip(targets, short)
    }


def _short_name(target: str) -> str:
    return absolute_path(target).name or "root"


def folders_of(names: Iterable[str]) -> dict[str, str]:
    """A folder name for each of `names`, all different and without a slash."""
    folders: dict[str, str] = {}
    for name in names:
        folders[name] = _first_free(name.replace("/", "_"), lambda n: n in folders.values())
    return folders


def _first_free(name: str, is_taken: Callable[[str], bool]) -> str:
    """`name`, or where it is taken the first of NAME-2, NAME-3, … that is not."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if not is_taken(free))


def make_folder(folder: Path) -> None:
    """Make the folder and see that it can be written. Raises VlmtuneError where it cannot."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise VlmtuneError(
            f"the output folder cannot be written: {error.strerror}",
            file=folder,
            do="give another folder with --output",
        ) from error


def _choose_folder(session: EvalSession, settings: Mapping[str, Any]) -> Path:
    """The folder of a target's report. A model or adapter folder is for loading and serving;
    reports do not belong in it."""
    stem = Path(session.plan.options.data[0]).stem
    if session.opened.kind == "run":
        parent = Path(session.target).expanduser() / "eval"
    else:
        parent, stem = Path("eval"), f"{_short_name(session.target)}-{stem}"
    return _stopped_or_new(
        parent, stem, lambda folder: any(kept == settings for kept in kept_settings(folder))
    )


def _choose_comparison_folder(plan: EvalPlan) -> Path:
    """The folder of a comparison and its reports."""

    def is_stopped(folder: Path) -> bool:
        file = folder / "targets.json"
        if (folder / "comparison.json").exists() or not file.is_file():
            return False
        return file.read_text(encoding="utf-8") == _targets_text(plan)

    data = plan.options.data
    stem = f"compare-{Path(data[0]).stem}" if data else "compare"
    return _stopped_or_new(Path("eval"), stem, is_stopped)


def _targets_text(plan: EvalPlan) -> str:
    what = {"targets": list(plan.options.targets), "data": _data_of(plan)}
    return json.dumps(what, indent=2) + "\n"


def _stopped_or_new(parent: Path, stem: str, is_stopped: Callable[[Path], bool]) -> Path:
    """The newest folder STEM-TIME in which this was stopped, or a new one."""
    for folder in sorted(parent.glob(f"{glob.escape(stem)}-*"), reverse=True):
        if is_stopped(folder):
            return folder
    new = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return parent / _first_free(new, lambda name: (parent / name).exists())
