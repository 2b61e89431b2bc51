"""`vlmtune data split DATA… --output DIR`: two sets that have no picture in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmtune.cli.common import DebugOption, JsonOption, QuietOption, command, print_json
from vlmtune.cli.data_convert import (
    CopyOption,
    NewIdsOption,
    OverwriteOption,
    print_outside,
    print_unused,
    print_weights,
)
from vlmtune.cli.data_input import (
    AnnotationsOption,
    BadOption,
    ColumnsOption,
    FormatOption,
    ImageDirOption,
    OutsideOption,
    PathsArgument,
    PromptOption,
    SideOption,
    SplitOption,
    UrlsOption,
    print_bad_rows,
)
from vlmtune.errors import VlmtuneError, plural

if TYPE_CHECKING:
    from vlmtune.data.tools.split import Split


@command
def split_command(
    data: PathsArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Gets train.jsonl and eval.jsonl.",
            show_default=False,
        ),
    ],
    eval_fraction: Annotated[
        float, typer.Option("--eval-fraction", help="Share of the samples for evaluation.")
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides the sides.")] = 42,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    image_dir: ImageDirOption = None,
    prompt: PromptOption = None,
    annotations: AnnotationsOption = None,
    split: SplitOption = None,
    of: SideOption = "train",
    copy_images: CopyOption = False,
    new_ids: NewIdsOption = False,
    on_bad_sample: BadOption = None,
    allow_outside_paths: OutsideOption = False,
    allow_urls: UrlsOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Split a set for training and evaluation, so that no picture is on both sides.

    Samples that share a picture, by content, stay together; text-only ones by their question.
    """
    from vlmtune.data.tools.split import split as split_files
    from vlmtune.sessions.console import progress
    from vlmtune.sessions.data_input import DataOptions, open_input, read_input

    if not 0 < eval_fraction < 1:
        raise VlmtuneError(
            "--eval-fraction is out of range", got=eval_fraction, expected="above 0 and below 1"
        )
    given = read_input(
        DataOptions(
            data,
            format=format,
            columns=columns,
            image_dir=image_dir,
            prompt=prompt,
            annotations=annotations,
            split=split,
            allow_outside_paths=allow_outside_paths,
            allow_urls=allow_urls,
            on_bad_sample=on_bad_sample,
        )
    )
    files = open_input(given, of)
    # Every row is gone through twice.
    with progress("rows read and written", 2 * sum(len(f.rows) for f in files), quiet=quiet) as on:
        done = split_files(
            files,
            output,
            eval_fraction=eval_fraction,
            seed=seed,
            copy_images=copy_images,
            new_ids=new_ids,
            on_bad_sample=given.section.on_bad_sample,
            overwrite=overwrite,
            on_row=on,
        )
    print_bad_rows(done.bad)
    if json:
        print_json(_as_json(done, eval_fraction))
        return
    for path, samples, groups in zip(done.outputs, done.num_samples, done.num_groups):
        print(f"{path}: {plural(samples, 'sample')} in {plural(groups, 'group')}")
    print(
        f"{100 * done.eval_fraction:.2f} % for evaluation ({100 * eval_fraction:g} % asked); "
        f"the largest group has {plural(done.largest_group, 'sample')}"
    )
    print_unused(done.unused)
    print_outside(done.num_outside)
    print_weights(files)


def _as_json(done: Split, asked: float) -> dict[str, Any]:
    return {
        "train": done.outputs[0],
        "eval": done.outputs[1],
        "train_samples": done.num_samples[0],
        "eval_samples": done.num_samples[1],
        "eval_fraction": done.eval_fraction,
        "asked_fraction": asked,
        "train_groups": done.num_groups[0],
        "eval_groups": done.num_groups[1],
        "largest_group": done.largest_group,
        "outside_references": done.num_outside,
        "unused_keys": done.unused,
        "bad_rows": done.bad.count,
        "bad_rows_named": done.bad.named,
    }
