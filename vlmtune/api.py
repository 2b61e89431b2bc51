"""vlmtune from Python: a function per command, whose result is what the command's `--json` prints.

    from vlmtune import api

    summary = api.train("recipe.yaml", **{"train.max_steps": 3})

A recipe is a path, or the mapping that YAML would give. Overrides are keyword arguments by dotted
key, with Python values; None is null. Nothing is printed on stdout; progress goes to stderr, unless
`quiet`. What the user can put right is raised as `VlmtuneError`. See docs/python.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmtune.recipe.load import LoadedRecipe, load_recipe, override_texts
from vlmtune.sessions.merge import merge as merge
from vlmtune.sessions.preload import preload

if TYPE_CHECKING:
    from vlmtune.preflight.summary import CheckSummary
    from vlmtune.sessions.evaluate import EvalResult
    from vlmtune.sessions.train import TrainSummary

RecipeSource = str | Path | Mapping[str, Any]


def train(
    recipe: RecipeSource,
    *,
    resume: str | Path | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> TrainSummary:
    """Train a model from a recipe into its `output_dir`, as `vlmtune train` does.

    `resume`: `auto`, `never` or a checkpoint folder; None wants a folder without a run's work in
    it. Where Ctrl-C or SIGTERM stopped the run, after a checkpoint, `stopped_by` of the summary is
    not None. Whether the recipe's guard fell stands in `guard`.
    """
    loaded = _load(recipe, overrides)
    preload("vlmtune.sessions.train")
    from vlmtune.sessions.train import train as run

    return run(loaded, resume=None if resume is None else str(resume), quiet=quiet)


def check(
    recipe: RecipeSource,
    *,
    workers: int | None = None,
    max_samples: int | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> CheckSummary:
    """Check a recipe and every sample on the CPU, as `vlmtune check` does; see `verdict`.

    `workers`: processes that read rows (0: this one, None: one per core); `max_samples`: rows of
    each set that are read (None: all). Only a wrong recipe is raised as an error.
    """
    loaded = _load(recipe, overrides)
    preload("vlmtune.sessions.check")
    from vlmtune.sessions.check import check as run

    return run(loaded, workers=workers, max_samples=max_samples, quiet=quiet)


def evaluate(
    target: str | Path,
    *,
    data: str | Path | Sequence[str | Path],
    max_samples: int | None = None,
    output: str | Path | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    quiet: bool = False,
    **overrides: Any,
) -> EvalResult:
    """Evaluate a run, an adapter or a model on data files, as `vlmtune eval` does.

    `overrides` are the keys that the command takes, e.g. `**{"eval.task": "caption"}`, `seed=1`,
    `quantization_bit=4`, or a key of a data entry that says how `data` is read: `format="table"`.
    `max_samples`: only the first so many samples. A fallen guard is no error; see `guard`.
    """
    from vlmtune.sessions.evaluate import EvalOptions, EvalResult
    from vlmtune.sessions.evaluate import evaluate as run

    if max_samples is not None:
        overrides["eval.max_samples"] = max_samples
    options = EvalOptions(
        targets=[str(target)],
        data=[data] if isinstance(data, (str, Path)) else data,
        settings=override_texts(overrides),
        output=None if output is None else Path(output),
        dtype=dtype,
        quiet=quiet,
    )
    result = run(options)
    assert isinstance(result, EvalResult)  # several targets have a ComparisonResult
    return result


def _load(recipe: RecipeSource, overrides: Mapping[str, Any]) -> LoadedRecipe:
    return load_recipe(recipe if isinstance(recipe, Mapping) else Path(recipe), overrides)
