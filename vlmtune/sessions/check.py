"""A recipe and its data checked on the CPU, from the loaded recipe to the summary."""

from __future__ import annotations

from functools import partial

from vlmtune.preflight.run import Preflight
from vlmtune.preflight.summary import CheckSummary, summary_of
from vlmtune.recipe.load import LoadedRecipe
from vlmtune.sessions.console import progress


def check(
    loaded: LoadedRecipe,
    *,
    workers: int | None = None,
    max_samples: int | None = None,
    quiet: bool = False,
) -> CheckSummary:
    """Check a recipe and every sample without loading a weight.

    `workers`: processes that read rows (0: this one, None: one per core). `max_samples`: how many
    rows of each set are read (None: all). Whatever is wrong is a problem in the summary.
    """
    show_progress = partial(progress, quiet=quiet)
    return summary_of(Preflight(loaded, workers, max_samples, show_progress).run())
