"""What is measured beside a target's figures: guessers that see no picture, and the guard."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmtune.cli.target import answering_encoder

if TYPE_CHECKING:
    from vlmtune.cli.eval_asked import Asked
    from vlmtune.data.encode import Encoder
    from vlmtune.data.types import Conversation
    from vlmtune.evaluation.guard import GuardVerdict
    from vlmtune.evaluation.types import EvalReport
    from vlmtune.recipe.schema import Recipe

logger = logging.getLogger("vlmtune")


def evaluate_blind(
    asked: Asked, guesses: Sequence[str], folder: Path
) -> tuple[dict[str, dict[str, object]], EvalReport]:
    """The figures of guessers that never see a picture, and the report of the one that is the
    model with blank pictures. A collective."""
    from vlmtune.evaluation.blind import blanked
    from vlmtune.evaluation.scoring import score_answers

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


def evaluate_guard(asked: Asked, folder: Path) -> tuple[GuardVerdict, EvalReport] | None:
    """Whether a run fell on its recipe's guard; None where there is none. A collective."""
    from vlmtune.evaluation import guard as guarding
    from vlmtune.train.build import build_encoder

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
    from vlmtune.data.source import access_of, load_conversations
    from vlmtune.evaluation.subset import fixed_subset
    from vlmtune.train.build import usable

    guard, policy = recipe.eval.guard, recipe.data.on_bad_sample
    assert guard is not None
    found, _ = load_conversations(guard.data, on_bad_sample=policy, access=access_of(recipe.data))
    chosen = fixed_subset(found, guard.max_samples, seed=recipe.seed)
    return usable(chosen, encoder=encoder, skip=policy == "skip")
