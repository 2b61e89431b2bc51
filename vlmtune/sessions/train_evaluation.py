"""Evaluation during training: loss and figures on held-out data, and the guard's figures.

data.eval       -> fixed subset -> loss, answers -> eval_loss, eval_exact_match, …
                                                 -> RUN/eval/step-000100/
eval.guard.data -> fixed subset -> answers       -> guard_exact_match, …
                                                 -> RUN/eval/guard-step-000100/
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from vlmtune.data.dataset import load_conversations, media_policy_of
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.evaluation.guard import (
    BEFORE,
    GuardVerdict,
    guard_section,
    guard_verdict,
    guarded_metric,
    read_figures,
)
from vlmtune.evaluation.references import check_references, check_some_left, fixed_subset
from vlmtune.evaluation.results import EvalReport, write_report
from vlmtune.evaluation.retrieval.ranking import retrieval_items
from vlmtune.evaluation.runner import evaluate, figure_names, num_to_do
from vlmtune.models.load import VLM, pixel_budget
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.schema import EvalSection, Recipe
from vlmtune.train.build import check_best_metric, embedding_prompt_of, layout_of, usable
from vlmtune.train.contrastive import Contrastive, contrastive_loss
from vlmtune.train.loop import Progress
from vlmtune.train.state import TrainState
from vlmtune.train.step import evaluation_loss

logger = logging.getLogger("vlmtune")


@dataclasses.dataclass(frozen=True)
class EvalSets:
    """What is evaluated during training; either may be empty."""

    samples: list[Conversation]
    guard: list[Conversation]


def load_eval_sets(recipe: Recipe) -> EvalSets:
    """The fixed subsets of `data.eval` and `eval.guard.data`. Raises VlmtuneError for bad rows;
    with `data.on_bad_sample: skip` they are named and left out. Raises for rows that cannot be
    scored, which the first evaluation would find, hours later."""

    def load(key: str, entries: list[DataEntry] | None, num: int | None) -> list[Conversation]:
        found, bad = load_conversations(
            entries or [],
            on_bad_sample=recipe.data.on_bad_sample,
            media_policy=media_policy_of(recipe.data),
        )
        for row in bad:
            logger.warning("left out of the evaluation: %s", row.reason)
        check_some_left(key, num_left=len(found), num_given=len(found) + len(bad))
        return fixed_subset(found, num, seed=recipe.seed)

    guard = recipe.eval.guard
    samples = load("data.eval", recipe.data.eval, recipe.eval.max_samples)
    _check_scorable(samples, recipe.eval)
    if guard is None:
        return EvalSets(samples, [])
    guarded = load("eval.guard.data", guard.data, guard.max_samples)
    _check_scorable(guarded, guard_section(recipe.eval))
    return EvalSets(samples, guarded)


def _check_scorable(samples: Sequence[Conversation], section: EvalSection) -> None:

    if samples and section.task == "retrieval":
        retrieval_items(samples)
    elif samples:
        check_references(samples, task=section.task, metrics=section.metrics)


@dataclasses.dataclass(frozen=True)
class TrainingEvaluation:
    """The loop's `evaluate`: figures of the model as it is at a step. A collective."""

    recipe: Recipe
    vlm: VLM
    state: TrainState
    encoder: Encoder
    accelerator: Accelerator
    eval_sets: EvalSets
    folder: Path

    def __call__(self, step: int, on_progress: Progress) -> dict[str, float]:

        values: dict[str, float] = {}
        if self.eval_sets.samples and (step > 0 or self.recipe.eval.before):
            values |= {f"eval_{name}": value for name, value in self._losses().items()}
            report = self._report(
                self.eval_sets.samples,
                self.recipe.eval,
                step=step,
                name=f"step-{step:06d}",
                entries=self.recipe.data.eval,
                on_progress=on_progress,
            )
            values |= {f"eval_{name}": m.value for name, m in report.metrics.items()}
        if self.eval_sets.guard and self.recipe.eval.guard is not None:
            report = self._report(
                self.eval_sets.guard,
                guard_section(self.recipe.eval),
                step=step,
                name=f"guard-step-{step:06d}",
                entries=self.recipe.eval.guard.data,
                on_progress=on_progress,
            )
            guarded_metric(report.metrics, self.recipe.eval.guard.metric)  # now, not at the end
            values |= {f"guard_{name}": m.value for name, m in report.metrics.items()}
        return values

    def _losses(self) -> Mapping[str, float]:

        common: dict[str, Any] = {
            "encoder": self.encoder,
            "accelerator": self.accelerator,
            "layout": layout_of(self.recipe, self.vlm),
        }
        forward = self.accelerator.unwrap_model(self.state.forward)
        objective = self.state.objective
        prompt = embedding_prompt_of(self.recipe)
        if isinstance(objective, Contrastive) and prompt is not None:
            return contrastive_loss(
                forward,
                self.eval_sets.samples,
                temperature=objective.temperature,
                prompt=prompt,
                batch_size=self.recipe.train.batch_size,
                **common,
            )
        return evaluation_loss(forward, self.eval_sets.samples, **common)

    def _report(
        self,
        conversations: Sequence[Conversation],
        section: EvalSection,
        *,
        step: int,
        name: str,
        entries: list[DataEntry] | None,
        on_progress: Progress,
    ) -> EvalReport:

        accelerator = self.accelerator
        processes = {
            "rank": accelerator.process_index,
            "world_size": accelerator.num_processes,
        }
        num = num_to_do(conversations, section.task, **processes)
        with accelerator.autocast():
            report = evaluate(
                self.vlm,
                conversations,
                encoder=self.encoder,
                section=section,
                seed=self.recipe.seed,
                on_progress=lambda done: on_progress(done, num),
                gather=gather_object,
                **processes,
            )
        if accelerator.is_main_process:
            about: dict[str, Any] = {
                "target": str(self.folder),
                "kind": "run",
                "step": step,
                "data": [entry.path for entry in entries or []],
                "pixel_budget": pixel_budget(self.vlm.processor),
                "max_new_tokens": section.max_new_tokens,
            }
            write_report(report, self.folder / "eval" / name, about=about)
        return report


def build_evaluation(
    recipe: Recipe,
    *,
    vlm: VLM,
    state: TrainState,
    encoder: Encoder,
    accelerator: Accelerator,
    eval_sets: EvalSets,
    folder: Path,
) -> TrainingEvaluation | None:
    """The evaluation of `state`, tried on every sample's encoding first; None without data.
    `vlm` has the trained model."""

    if not (eval_sets.samples or eval_sets.guard):
        return None
    skip = recipe.data.on_bad_sample == "skip"
    prompt = embedding_prompt_of(recipe)
    left = EvalSets(
        usable(eval_sets.samples, encoder=encoder, skip=skip, embedding_prompt=prompt),
        usable(eval_sets.guard, encoder=encoder, skip=skip),
    )
    for key, given, kept in (
        ("data.eval", eval_sets.samples, left.samples),
        ("eval.guard.data", eval_sets.guard, left.guard),
    ):
        check_some_left(key, num_left=len(kept), num_given=len(given))
    figures = figure_names(left.samples, recipe.eval)
    check_best_metric(recipe, left.samples, encoder=encoder, figures=figures)
    num_asked = sum(not encoder.is_supervised(sample) for sample in left.samples)
    if num_asked and prompt is None:
        logger.info(
            "%d of %d evaluation samples have no answer to train on: they count in the metrics, "
            "not in eval_loss",
            num_asked,
            len(left.samples),
        )
    return TrainingEvaluation(
        recipe=recipe,
        vlm=vlm,
        state=state,
        encoder=encoder,
        accelerator=accelerator,
        eval_sets=left,
        folder=folder,
    )


def _is_same_set(*reports: Path) -> bool:
    """Whether the reports in these folders are of the same task on the same data."""
    texts = [(folder / "metrics.json").read_text(encoding="utf-8") for folder in reports]
    about = [[json.loads(text).get(k) for k in ("task", "data", "num_samples")] for text in texts]
    return all(values == about[0] for values in about)


def verdict_of_run(recipe: Recipe, folder: Path, *, step: int) -> GuardVerdict | None:
    """Whether the guard's figure at `step` fell too far below the one before training; None where
    there is no guard, or one of the two was never measured on its data (said in a warning)."""

    guard = recipe.eval.guard
    if guard is None:
        return None
    after_folder = folder / "eval" / f"guard-step-{step:06d}"
    before, after = read_figures(folder / BEFORE), read_figures(after_folder)
    if after is None:
        logger.warning(
            "the guard could not be checked: there is no evaluation of it at the last step"
        )
        return None
    name = guarded_metric(after, guard.metric)
    # Both may be of another recipe: the keys of `eval` may change between a stop and its resume.
    if before is None or name not in before or not _is_same_set(folder / BEFORE, after_folder):
        logger.warning(
            "the guard could not be checked: %s was not measured on its data before training", name
        )
        return None
    return guard_verdict(before[name], after[name], metric=name, max_drop=guard.max_drop)
