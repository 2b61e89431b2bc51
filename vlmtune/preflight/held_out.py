"""Whether the rows that are evaluated on can be scored, as training asks before its first step."""

from __future__ import annotations

from collections.abc import Set

from vlmtune.data.types import Conversation
from vlmtune.evaluation.guard import guard_section
from vlmtune.evaluation.references import check_references
from vlmtune.evaluation.retrieval.items import retrieval_items
from vlmtune.preflight.rows import FileRows
from vlmtune.preflight.sets import CheckedSet
from vlmtune.recipe.schema import Recipe


def check_scorable(checked: CheckedSet, chosen: Set[int], recipe: Recipe) -> None:
    """Raise VlmtuneError where the `chosen` rows of a set cannot be scored."""
    conversations = _conversations(checked, chosen)
    section = guard_section(recipe.eval) if checked.name == "eval.guard.data" else recipe.eval
    if not conversations:
        return
    if section.task == "retrieval":
        retrieval_items(conversations)
    else:
        check_references(conversations, task=section.task, metrics=section.metrics)


def _conversations(checked: CheckedSet, chosen: Set[int]) -> list[Conversation]:
    limit = len(checked.table) if checked.is_partial else None
    rows = FileRows(checked.files, limit)()
    return [row.conversation() for number, row in enumerate(rows) if number in chosen]
