"""vlmtune from Python: a function per command, whose result is what the command's `--json` prints.

    from vlmtune import api

    summary = api.train("recipe.yaml", **{"train.max_steps": 3})

A recipe is a path, or the mapping that YAML would give. Overrides are keyword arguments by dotted
key, with Python values; None is null. Nothing is printed on stdout; progress goes to stderr, unless
`quiet`. What the user can put right is raised as `VlmtuneError`. See docs/python.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmtune.errors import VlmtuneError
from vlmtune.recipe.load import LoadedRecipe, load_recipe
from vlmtune.sessions.merge import merge as merge
from vlmtune.sessions.preload import preload

if TYPE_CHECKING:
    from vlmtune.preflight.summary import CheckSummary
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


@dataclass(frozen=True)
class EvalSummary:
    """Metrics of a target on data: each `{value, low, high}`, also by slices of the samples.
    `predictions` is the path of the answers; `guard` the verdict on a run's guard, if it has one.
    """

    target: str
    task: str
    num_samples: int
    metrics: Mapping[str, Mapping[str, float]]
    slices: Mapping[str, Mapping[str, Mapping[str, float]]]
    predictions: str
    guard: Mapping[str, Any] | None = None


def evaluate(
    target: str | Path,
    *,
    data: str | Path | Sequence[str | Path],
    max_samples: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    quantization_bit: int | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> EvalSummary:
    """Evaluate a run, an adapter or a model on data files, as `vlmtune eval` does.

    `overrides` are keys of the recipe's `eval` section, e.g. `**{"eval.task": "caption"}`.
    """
    preload("vlmtune.sessions.evaluate")
    from vlmtune.sessions.data_input import DataOptions
    from vlmtune.sessions.eval_options import EvalOptions
    from vlmtune.sessions.processes import joined_processes

    if wrong := [key for key in overrides if not key.startswith("eval.")]:
        raise VlmtuneError("not a key of an evaluation", got=wrong[0], expected="eval.…")
    files = [Path(file) for file in ([data] if isinstance(data, (str, Path)) else data)]
    request = EvalOptions(
        targets=[str(target)],
        data=files,
        reading=DataOptions([str(file) for file in files]),
        options={
            k.removeprefix("eval.").removeprefix("decoding."): overrides[k] for k in overrides
        },
        max_samples=max_samples,
        blind=False,
        train=(),
        output=None if output is None else Path(output),
    )
    with joined_processes() as processes:
        plan = request.plan(
            processes,
            seed=seed,
            with_guard=True,
            dtype=dtype,
            quantization_bit=quantization_bit,
            trust_remote_code=trust_remote_code,
            quiet=quiet,
        )
        result = request.run(plan, as_json=True)
    return EvalSummary(
        target=result["target"],
        task=result["task"],
        num_samples=result["num_samples"],
        metrics=result["metrics"],
        slices=result["slices"],
        predictions=result["predictions"],
        guard=result.get("guard"),
    )


def _load(recipe: RecipeSource, overrides: Mapping[str, Any]) -> LoadedRecipe:
    return load_recipe(recipe if isinstance(recipe, Mapping) else Path(recipe), overrides)
