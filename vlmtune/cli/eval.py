"""`vlmtune eval TARGET … --data FILE`: answer every question of a file and score the answers."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmtune.cli.common import (
    DebugOption,
    DtypeOption,
    JsonOption,
    QuietOption,
    command,
    is_main_process,
    print_json,
    setup_logging,
    split_settings,
)
from vlmtune.errors import CheckFailed, VlmtuneError


def _option(name: str, help: str, **settings: Any) -> Any:
    return typer.Option(name, help=help, show_default=False, **settings)


@command
def eval_command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET|KEY.SUB=VALUE",
            help="Run folders, adapter folders, models (folder or hub id), or folders of finished "
            "evaluations; several are compared with the first. Then keys of the recipe to set "
            "(eval.max_new_tokens=32, eval.decoding.method=beam, quantization_bit=4); those that "
            "are not set have the run's values. Bare keys of a data entry (columns.image=photo, "
            "format=table) say how --data is read; otherwise it is read as the run's own data.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[Path] | None,
        _option("--data", "What to evaluate on; repeat it for more files.", metavar="FILE"),
    ] = None,
    task: Annotated[
        str | None,
        _option(
            "--task",
            "vqa, caption, choice, classification, grounding or retrieval. Short for eval.task.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        _option("--metrics", "Names, separated by commas. Short for eval.metrics."),
    ] = None,
    max_samples: Annotated[
        int | None,
        _option("--max-samples", "Evaluate only the first N samples.", metavar="N", min=1),
    ] = None,
    output: Annotated[
        Path | None,
        _option(
            "--output",
            "Folder for the report. Default: RUN/eval/DATA-TIME for a run, eval/TARGET-DATA-TIME "
            "here for anything else, eval/compare-DATA-TIME for several targets. The same command "
            "continues an evaluation that was stopped.",
            metavar="DIR",
        ),
    ] = None,
    blind: Annotated[
        bool,
        typer.Option("--blind", help="Also score guessers that never see the picture."),
    ] = False,
    train: Annotated[
        list[Path] | None,
        _option(
            "--train",
            "With --blind: the training data to guess from. Default: the run's.",
            metavar="FILE",
        ),
    ] = None,
    no_guard: Annotated[
        bool, typer.Option("--no-guard", help="Skip the run's eval.guard (eval.guard=null).")
    ] = False,
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure runs, adapters or models on a data file; compare several."""
    from vlmtune.evaluation.results import is_finished
    from vlmtune.sessions.evaluate import EvalOptions, EvalResult, evaluate

    quiet = quiet or not is_main_process()
    setup_logging(quiet)
    targets, settings = split_settings(arguments)
    names = None if metrics is None else [name.strip() for name in metrics.split(",")]
    shorthands = {
        "--task": ("eval.task", task),
        "--metrics": ("eval.metrics", names),
        "--max-samples": ("eval.max_samples", max_samples),
    }
    for option, (key, value) in shorthands.items():
        if value is not None:
            settings.append(_setting(option, key, jsonlib.dumps(value), settings))
    if no_guard:
        settings.append(_setting("--no-guard", "eval.guard", "null", settings))
    options = EvalOptions(
        targets=targets,
        data=data or (),
        settings=settings,
        blind=blind,
        train=train or (),
        output=output,
        dtype=dtype,
        quiet=quiet,
    )
    result = evaluate(options)
    if is_main_process():
        from vlmtune.cli.eval_tables import print_comparison, print_result

        if json:
            print_json(result)
        elif isinstance(result, EvalResult):
            print_result(result)
        else:
            print_comparison(result)
    fallen = [
        f"{one.target}: {one.guard}"
        for one in ([result] if isinstance(result, EvalResult) else result.targets)
        if one.guard is not None and one.guard.has_fallen and not is_finished(Path(one.target))
    ]
    if fallen:
        raise CheckFailed("; ".join(fallen))


def _setting(option: str, key: str, value: str, settings: list[str]) -> str:
    """The setting that `option` is short for. Raises VlmtuneError where it is set twice."""
    for setting in settings:
        if setting.startswith(f"{key}="):
            message = f"{option} and {key} are the same setting"
            raise VlmtuneError(message, got=setting, do="give one of the two")
    return f"{key}={value}"
