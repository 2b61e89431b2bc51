"""`vlmtune eval TARGET --data FILE`: answer every question of a file and score the answers."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmtune.cli.common import (
    DebugOption,
    JsonOption,
    QuietOption,
    command,
    print_json,
)
from vlmtune.cli.target import (
    DtypeOption,
    QuantizationOption,
    TargetArgument,
    TrustOption,
    answering_encoder,
    open_for_answers,
)
from vlmtune.errors import VlmtuneError

if TYPE_CHECKING:
    from vlmtune.evaluation.metrics.bootstrap import Interval
    from vlmtune.evaluation.types import EvalReport


@command
def eval_command(
    target: TargetArgument,
    data: Annotated[
        list[Path],
        typer.Option("--data", metavar="FILE", help="JSONL or JSON; give it again for more files."),
    ],
    task: Annotated[str, typer.Option("--task", help="What is measured: vqa.")] = "vqa",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Folder for predictions.jsonl and metrics.json. Default: RUN/eval/DATA-TIME for a "
            "run, eval/TARGET-DATA-TIME here for anything else.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            min=1,
            help="Longest answer, in tokens. Default: the run's.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Questions answered at once. Default: the run's.",
            show_default=False,
        ),
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", min=1, help="Only the first so many samples.")
    ] = None,
    dtype: DtypeOption = "auto",
    quantization_bit: QuantizationOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a run, an adapter or a model on a data file."""
    from vlmtune.data.source import load_conversations
    from vlmtune.evaluation.metrics.registry import metrics_for

    metrics_for(task)
    conversations, _ = load_conversations(data)
    conversations = conversations[:max_samples]

    from vlmtune.evaluation.runner import check_references, evaluate, write_report
    from vlmtune.models.processor import pixel_budget
    from vlmtune.recipe.schema import EvalSection

    check_references(conversations)
    started_at = time.strftime("%Y%m%d-%H%M%S")
    if output is not None:
        _make_folder(output)
    opened = open_for_answers(
        target, dtype=dtype, quantization_bit=quantization_bit, trust_remote_code=trust_remote_code
    )
    folder = output or _default_folder(target, opened.kind, data, started_at)
    _make_folder(folder)
    section = EvalSection() if opened.recipe is None else opened.recipe.eval
    section = section.model_copy(
        update={
            "task": task,
            "max_new_tokens": max_new_tokens or section.max_new_tokens,
            "batch_size": batch_size or section.batch_size,
        }
    )
    started = time.monotonic()
    with _progress(len(conversations), quiet) as on_progress:
        report = evaluate(
            opened.vlm,
            conversations,
            encoder=answering_encoder(opened),
            section=section,
            on_progress=on_progress,
        )
    about = {
        "target": target,
        "kind": opened.kind,
        "model_commit": opened.vlm.commit,
        "data": [str(file.absolute()) for file in data],
        "dtype": str(opened.vlm.model.dtype).removeprefix("torch."),
        "pixel_budget": pixel_budget(opened.vlm.processor),  # reports compare only at the same one
        "max_new_tokens": section.max_new_tokens,
        "seconds": time.monotonic() - started,
    }
    write_report(report, folder, about=about)
    predictions = folder / "predictions.jsonl"
    if json:
        print_json(about | report.summary() | {"predictions": str(predictions.absolute())})
    else:
        _print_table(report)
        print(f"predictions: {predictions}")


def _default_folder(target: str, kind: str, data: list[Path], started_at: str) -> Path:
    stem = f"{data[0].stem}-{started_at}"
    if kind == "run":
        return Path(target) / "eval" / stem
    # A model or adapter folder is for loading and serving; reports do not belong in it.
    name = target.rstrip("/").rpartition("/")[2]
    return Path("eval") / f"{name}-{stem}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".probe").touch()
        (folder / ".probe").unlink()
    except OSError as error:
        raise VlmtuneError(
            f"the output folder cannot be written: {error.strerror}",
            file=folder,
            do="give another folder with --output",
        ) from error


@contextlib.contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar in a terminal, a line every tenth in a pipe, nothing with `--quiet`."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("answers", total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        shown = 0

        def line(done: int) -> None:
            nonlocal shown
            if done * 10 // total > shown:
                shown = done * 10 // total
                print(f"answered {done} of {total}", file=sys.stderr)

        yield line


def _print_table(report: EvalReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.task}, {report.num_samples} samples")
    table.add_column("question type")
    table.add_column("metric")
    for heading in ("value", "95 % interval", "n"):
        table.add_column(heading, justify="right")
    for name, interval in report.metrics.items():
        table.add_row("all", name, *_cells(interval))
    for kind, metrics in report.slices.items():
        for name, interval in metrics.items():
            table.add_row(kind, name, *_cells(interval))
    Console().print(table)


def _cells(interval: Interval) -> tuple[str, str, str]:
    value, low, high = (f"{100 * x:.2f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} %", f"{low} to {high}", str(interval.count)
