"""Targets evaluated: opened, asked, scored, beside the blind guessers and the guard, written.

OUTPUT/targets.json       what is compared, to know an interrupted comparison again
OUTPUT/NAME/              each target's report
OUTPUT/comparison.json    differences with intervals, McNemar's test
OUTPUT/changes.jsonl      the samples whose score changed, with every target's answer
"""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from vlmtune.evaluation.compare import compare
from vlmtune.evaluation.guard import GuardVerdict, blanked
from vlmtune.evaluation.references import fixed_subset
from vlmtune.evaluation.results import (
    EvalReport,
    Result,
    is_finished,
    read_result,
    write_report,
)
from vlmtune.evaluation.runner import evaluate, num_to_do, score_answers
from vlmtune.files import write_file
from vlmtune.models.load import pixel_budget
from vlmtune.models.open import OpenTarget, result_of_run
from vlmtune.recipe.schema import EvalSection, Recipe
from vlmtune.sessions.console import progress
from vlmtune.sessions.eval_tables import print_comparison, print_result
from vlmtune.sessions.processes import Processes
from vlmtune.sessions.target import answering_encoder, open_for_answers
from vlmtune.train.build import build_encoder, usable

OURS = ("metrics.json", "predictions.jsonl", "comparison.json", "targets.json")
"""What marks a folder as one that `vlmtune eval` wrote."""

NOT_FOR_REPORTS = ("recipe.resolved.yaml", "config.json", "adapter_config.json")


def check_output(folder: Path) -> None:
    """Raise VlmtuneError where `--output` is a folder of something else."""
    if not folder.exists():
        return
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    if names is None:
        raise VlmtuneError(
            "the output folder cannot be written: it is a file",
            file=folder,
            do="give another folder with --output",
        )
    is_ours = any(name in OURS for name in names) or any(folder.glob("answers-*.part.*"))
    if names and (not is_ours or any(name in NOT_FOR_REPORTS for name in names)):
        raise VlmtuneError(
            "the output folder is occupied",
            file=folder,
            got=", ".join(names[:3]) + (" …" if len(names) > 3 else ""),
            expected="a new folder, an empty one, or one of an evaluation",
            do="give another folder with --output",
        )


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


def default_parent(target: str, kind: str, data: Path) -> tuple[Path, str]:
    """The folder of a target's reports and how their names start. A model or adapter folder is for
    loading and serving; reports do not belong in it."""
    if kind == "run":
        return Path(target).expanduser() / "eval", data.stem
    return Path("eval"), f"{short_name(target)}-{data.stem}"


def short_name(target: str) -> str:
    """The last component of a target, with `.` and `..` resolved; links keep their own name."""
    return place_of(target).name or "root"


def place_of(target: str) -> Path:
    """The target as an absolute path, however it was written; equal where a target is the same.
    For a hub id the path means nothing but that."""
    return Path(os.path.abspath(Path(target).expanduser()))


def unfinished_or_new(
    parent: Path, stem: str, settings: Mapping[str, Any], started_at: str
) -> Path:
    """The newest folder in which an evaluation with these settings was stopped, or a new one."""

    for folder in sorted(parent.glob(f"{glob.escape(stem)}-*"), reverse=True):
        if any(kept == settings for kept in kept_settings(folder)):
            return folder
    return new_folder(parent / f"{stem}-{started_at}")


def new_folder(folder: Path) -> Path:
    """`folder`, or where it is taken the first free `folder-N`."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


logger = logging.getLogger("vlmtune")


@dataclass(frozen=True)
class EvalPlan:
    """What is asked of every target. `guesses` are the majority answers, with `--blind`."""

    conversations: Sequence[Conversation]
    data: Sequence[Path]
    section: EvalSection
    seed: int
    guesses: Sequence[str] | None
    with_guard: bool
    dtype: str
    quantization_bit: int | None
    trust_remote_code: bool
    quiet: bool
    processes: Processes


@dataclass(frozen=True)
class EvalSession:
    """An opened target and how it is asked."""

    target: str
    opened: OpenTarget
    plan: EvalPlan

    def settings(
        self, conversations: Sequence[Conversation], section: EvalSection, encoder: Encoder
    ) -> dict[str, Any]:

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
            seed=self.plan.seed,
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

        processes = self.plan.processes
        rank, world_size = processes.rank, processes.world_size
        told = f"{what}pictures scored" if section.task == "retrieval" else f"{what}answered"
        num_mine = num_to_do(conversations, section.task, rank=rank, world_size=world_size)
        with contextlib.ExitStack() as stack:
            kept = None
            if section.task != "retrieval":
                settings = self.settings(shown or conversations, section, encoder)
                kept = stack.enter_context(AnswerLog(folder, settings, rank=rank))
                if processes.is_main:
                    _log_kept_answers(kept, len(conversations), folder)
            quiet = self.plan.quiet or not processes.is_main
            on_progress = stack.enter_context(progress(told, num_mine, quiet=quiet))
            return evaluate(
                self.opened.vlm,
                conversations,
                shown=shown,
                encoder=encoder,
                section=section,
                seed=self.plan.seed,
                on_progress=on_progress,
                rank=rank,
                world_size=world_size,
                gather=processes.gather,
                kept=kept,
            )

    def digest(self, settings: Mapping[str, Any]) -> str:
        """A short name for whatever decides the report."""

        section = self.plan.section.model_dump(exclude={"batch_size", "guard"})
        also = {
            "section": section,
            "references": references_digest(self.plan.conversations),
            "seed": self.plan.seed,
            "blind": self.plan.guesses,
            "guard": self.plan.with_guard,
        }
        return settings_digest({**settings, **also})

    def about(self) -> dict[str, Any]:
        """What was evaluated, on what, and how."""

        vlm, plan = self.opened.vlm, self.plan
        about = {
            "target": self.target,
            "kind": self.opened.kind,
            "model_commit": vlm.commit,
            "data": [str(file.absolute()) for file in plan.data],
            "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "pixel_budget": pixel_budget(vlm.processor),  # reports compare only at the same one
            "seed": plan.seed,
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


def _log_kept_answers(kept: AnswerLog, total: int, folder: Path) -> None:
    if kept.texts:
        logger.info("%d of %d answers are kept from an earlier start", len(kept.texts), total)
    if kept.dropped:
        logger.warning(
            "%s holds answers of an earlier start with other settings (%s); they are made anew",
            folder,
            ", ".join(sorted(kept.dropped)),
        )


def evaluate_blind(
    asked: EvalSession, guesses: Sequence[str], folder: Path
) -> tuple[dict[str, dict[str, object]], EvalReport]:
    """The figures of guessers that never see a picture, and the report of the one that is the
    model with blank pictures. A collective."""

    plan = asked.plan
    guessed = score_answers(
        plan.conversations,
        guesses,
        task=plan.section.task,
        metrics=plan.section.metrics,
        seed=plan.seed,
    )
    shown = [blanked(conversation) for conversation in plan.conversations]
    blank = asked.report(
        plan.conversations,
        plan.section,
        answering_encoder(asked.opened),
        folder,
        what="blank pictures: ",
        shown=shown,
    )
    summaries = {
        "majority_answer": guessed.summary(),
        "blank_pictures": blank.summary(),
    }
    figures = {
        name: {key: summary[key] for key in ("metrics", "slices")}
        for name, summary in summaries.items()
    }
    return figures, blank


def evaluate_guard(asked: EvalSession, folder: Path) -> tuple[GuardVerdict, EvalReport] | None:
    """Whether a run fell on its recipe's guard; None where there is none. A collective."""

    recipe = asked.opened.recipe
    if recipe is None or recipe.eval.guard is None:
        return None
    before = guarding.read_figures(Path(asked.target).expanduser() / guarding.BEFORE)
    if before is None:
        logger.warning("the guard was not checked: it was not measured before training")
        return None
    encoder = build_encoder(recipe, asked.opened.vlm)  # takes and leaves out what training did
    report = asked.report(
        _guard_conversations(recipe, encoder),
        guarding.guard_section(recipe.eval).model_copy(
            update={"batch_size": asked.plan.section.batch_size}
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


ChooseFolder = Callable[[str, Mapping[str, Any]], Path]
"""A target's kind and its answers' settings to the folder for its report."""


def evaluate_target(
    target: str, plan: EvalPlan, place: Path | ChooseFolder, *, reuse: bool = False
) -> dict[str, Any]:
    """Evaluate one target and write its report into `place`; what `--json` holds of it. With
    `reuse`, a report that the folder holds of the same evaluation is taken. Contains collectives.
    """

    opened = open_for_answers(
        target,
        dtype=plan.dtype,
        quantization_bit=plan.quantization_bit,
        trust_remote_code=plan.trust_remote_code,
        device=plan.processes.device,
    )
    asked = EvalSession(target, opened, plan)
    encoder = answering_encoder(opened)
    settings = asked.settings(plan.conversations, plan.section, encoder)
    main = plan.processes.is_main
    chosen = None
    if main:
        chosen = place if isinstance(place, Path) else place(opened.kind, settings)
    folder: Path = plan.processes.from_main(chosen)
    make_folder(folder)
    predictions = {"predictions": str((folder / "predictions.jsonl").absolute())}
    digest = asked.digest(settings)
    if reuse:
        found = _report_of(digest, folder) if main else {}
        found = plan.processes.from_main(found)
        if found:
            logger.info("the report in %s is of this evaluation", folder)
            return found | predictions
    began = time.monotonic()
    report = asked.report(plan.conversations, plan.section, encoder, folder)
    about = asked.about() | {"settings": digest, "seconds": time.monotonic() - began}
    reports = {folder: (report, about)}
    if plan.guesses is not None:
        about["blind"], blank = evaluate_blind(asked, plan.guesses, folder / "blank")
        reports[folder / "blank"] = blank, {"target": target, "pictures": "blank"}
    if plan.with_guard and (guarded := evaluate_guard(asked, folder / "guard")) is not None:
        verdict, on_guard = guarded
        about["guard"] = verdict.as_dict()
        reports[folder / "guard"] = on_guard, {"target": target, "kind": "run"}
    if main:
        # Only now: a kill before the last answer leaves every answer to go on with.
        for place, (written, what) in reports.items():
            write_report(written, place, about=what)
        for place in reports:
            remove_answer_log(place)
    return about | report.summary() | predictions


def _report_of(digest: str, folder: Path) -> dict[str, Any]:
    """What the finished report in `folder` says, empty where there is none of this digest."""

    if not is_finished(folder):
        return {}
    summary = read_result(folder, folder.name).summary
    return summary if summary.get("settings") == digest else {}


def free_memory() -> None:
    """Give back the memory of a model that nothing refers to any more."""

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


HOW = ("pixel_budget", "scorer", "subtract_prior", "max_new_tokens", "decoding")
"""What a report says of how its target was asked."""


def names_of(targets: Sequence[str]) -> dict[str, str]:
    """What each target is called: its last path component, or all of it where two share one."""
    short = [short_name(target) for target in targets]
    return {
        target: name if short.count(name) == 1 else target.rstrip("/")
        for target, name in zip(targets, short)
    }


def folders_of(names: Iterable[str]) -> dict[str, str]:
    """A folder name for each of `names`, all different and without a slash."""
    folders: dict[str, str] = {}
    for name in names:
        stem = free = name.replace("/", "_")
        number = 1
        while free in folders.values():
            number += 1
            free = f"{stem}-{number}"
        folders[name] = free
    return folders


def compare_targets(
    targets: Sequence[str],
    plan: EvalPlan,
    finished: Mapping[str, Path],
    output: Path | None,
    *,
    as_json: bool,
) -> dict[str, Any]:
    """Evaluate what is not in `finished`, compare everything with the first target, write, and
    print unless `as_json`. What `--json` holds, the comparison on the main process alone. Contains
    collectives."""

    names = names_of(targets)
    places = folders_of(names.values())
    what = {"targets": list(targets), "data": [str(file.absolute()) for file in plan.data]}
    main = plan.processes.is_main
    chosen = (output or _unfinished_or_new(what, plan)) if main else None
    folder: Path = plan.processes.from_main(chosen)
    make_folder(folder)
    if main:
        write_file(folder / "targets.json", _as_text(what))
    results, folders = [], {}
    for target in targets:
        place = finished.get(target, folder / places[names[target]])
        folders[names[target]] = place
        if target in finished:
            summary = read_result(place, target).summary
            predictions = place.absolute() / "predictions.jsonl"
            results.append(summary | {"target": target, "predictions": str(predictions)})
            continue
        logger.info("%s:", target)
        results.append(evaluate_target(target, plan, place, reuse=True))
        free_memory()
    if not main:
        return {"targets": results, "comparison": None}
    read = [read_result(place, name) for name, place in folders.items()]
    _tell_differences(read)
    comparisons, changes = compare(read, metrics=plan.section.metrics, seed=plan.seed)
    summary = {
        "against": read[0].name,
        "task": read[0].task,
        "num_samples": len(read[0].rows),
        "comparisons": [comparison.as_dict() for comparison in comparisons],
        "num_changed": len(changes),
    }
    write_file(folder / "comparison.json", json.dumps(summary, indent=2) + "\n")
    lines = [json.dumps(change.as_row(), ensure_ascii=False) + "\n" for change in changes]
    write_file(folder / "changes.jsonl", "".join(lines))
    if not as_json:
        for result in results:
            print(result["target"])
            print_result(result)
        print_comparison(comparisons, changes)
        print(f"comparison: {folder}")
    changes_file = str((folder / "changes.jsonl").absolute())
    return {"targets": results, "comparison": summary | {"changes": changes_file}}


def _tell_differences(results: Sequence[Result]) -> None:
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


def _unfinished_or_new(what: Mapping[str, Any], plan: EvalPlan) -> Path:
    """The newest folder in which this comparison was stopped, or a new one."""
    stem = f"compare-{plan.data[0].stem}" if plan.data else "compare"
    for folder in sorted(Path("eval").glob(f"{glob.escape(stem)}-*"), reverse=True):
        told = folder / "targets.json"
        if (folder / "comparison.json").exists() or not told.is_file():
            continue
        if told.read_text(encoding="utf-8") == _as_text(what):
            return folder
    return new_folder(Path("eval") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")


def _as_text(what: Mapping[str, Any]) -> str:
    return json.dumps(what, indent=2) + "\n"
