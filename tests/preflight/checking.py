"""A recipe checked in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmtune.preflight.run import Preflight, Report
from vlmtune.preflight.summary import summary_of
from vlmtune.recipe.load import load_recipe


@contextlib.contextmanager
def no_progress(what: str, total: int) -> Iterator[Any]:
    yield lambda done: None


def check(
    recipe: Path, *overrides: str, workers: int = 0, max_samples: int | None = None
) -> Report:
    """The report of `vlmtune check`."""
    loaded = load_recipe(recipe, overrides)
    return Preflight(loaded, workers, max_samples, show_progress=no_progress).run()


def check_summary(recipe: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """What `vlmtune check --json` prints."""
    return asdict(summary_of(check(recipe, *overrides, **options)))


def messages(summary: dict[str, Any], severity: str) -> list[str]:
    return [p["message"] for p in summary["problems"] if p["severity"] == severity]
