"""Whether the rows that are evaluated on can be scored, as training asks before its first step."""

from __future__ import annotations

from collections.abc import Set

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.evaluation.guard import guard_section, guarded_metric
from vlmtune.evaluation.references import check_references
from vlmtune.evaluation.retrieval.items import retrieval_items
from vlmtune.evaluation.runner import figure_names
from vlmtune.evaluation.subset import check_some_left
from vlmtune.preflight.rows import FileRows
from vlmtune.preflight.sets import CheckedSet
from vlmtune.preflight.table import GOOD
from vlmtune.recipe.schema import Recipe
from vlmtune.train.build import check_best_metric


def check_scorable(
    checked: CheckedSet, chosen: Set[int], recipe: Recipe, *, encoder: Encoder | None
) -> None:
    """Raise VlmtuneError where none of the `chosen` rows of a set is usable, where one cannot be
    scored, or where a figure that the recipe names is not measured on them."""
    left = chosen & set(checked.table.rows(GOOD).tolist())
    check_some_left(checked.name, num_left=len(left), num_given=len(chosen) or len(checked.table))
    conversations = _conversations(checked, chosen)
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


def _conversations(checked: CheckedSet, chosen: Set[int]) -> list[Conversation]:
    limit = len(checked.table) if checked.is_partial else None
    rows = FileRows(checked.files, limit)()
    return [row.conversation() for number, row in enumerate(rows) if number in chosen]
