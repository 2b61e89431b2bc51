"""`vlmtune data convert DATA… --output OUT.jsonl`: any format in, the project's own out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmtune.cli.common import DebugOption, JsonOption, QuietOption, command, print_json
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
from vlmtune.errors import plural

if TYPE_CHECKING:
    from vlmtune.data.dataset import OpenFile
    from vlmtune.data.tools.convert import Converted


CopyOption = Annotated[
    bool,
    typer.Option(
        "--copy-images/--reference",
        help="Copy pictures beside the output, or refer to where they are. What the rows hold "
        "themselves (bytes, base64) becomes files either way.",
    ),
]
NewIdsOption = Annotated[
    bool,
    typer.Option("--new-ids", help="Call rows by file and line, whatever ids they have."),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an output that is there, and start anew."),
]


@command
def convert_command(
    data: PathsArgument,
    output: Annotated[
        Path,
        typer.Option("--output", metavar="OUT.jsonl", help="Written whole.", show_default=False),
    ],
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
    """Write data of any format as JSONL that every other command reads.

    Stopped, it goes on where it was when the same command is given again.
    """
    from vlmtune.data.tools.convert import convert
    from vlmtune.sessions.console import progress
    from vlmtune.sessions.data_input import DataOptions, open_input, read_input

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
    try:
        with progress("converted", sum(len(f.rows) for f in files), quiet=quiet) as on_row:
            done = convert(
                files,
                output,
                copy_images=copy_images,
                new_ids=new_ids,
                on_bad_sample=given.section.on_bad_sample,
                overwrite=overwrite,
                on_row=on_row,
            )
    except KeyboardInterrupt:
        print("the same command goes on where this one was", file=sys.stderr)
        raise
    print_bad_rows(done.bad)
    if json:
        print_json(_as_json(done))
        return
    print(f"{done.output}: {plural(done.num_samples, 'sample')} of {plural(done.num_rows, 'row')}")
    if done.skipped is not None:
        print(f"{done.skipped}: {plural(done.bad.count, 'row')} left out, with their reasons")
    if done.num_pictures_written:
        folder = done.output.with_name(f"{done.output.stem}_images")
        written = plural(done.num_pictures_written, "picture or video", "pictures and videos")
        print(f"{folder}: {written} written")
    print_unused(done.unused)
    print_outside(done.num_outside)
    print_weights(files)


def print_unused(unused: dict[str, int]) -> None:
    """Say which keys of the rows are not in the output."""
    if unused:
        names = ", ".join(f"{key} ({count:,})" for key, count in sorted(unused.items()))
        print(f"keys not kept, with their rows: {names}")


def print_outside(num_outside: int) -> None:
    """Say what it takes to read an output whose pictures are elsewhere."""
    if num_outside:
        print(
            f"{num_outside:,} references lead out of the output's folder: training on it needs "
            "data.allow_outside_paths: true (or convert with --copy-images)"
        )


def print_weights(files: Sequence[OpenFile]) -> None:
    """Say which entries' weights are no part of the output, where each row is once."""
    weights = {file.entry.path: file.entry.weight for file in files if file.entry.weight != 1}
    if weights:
        names = ", ".join(f"{path} ({weight:g})" for path, weight in weights.items())
        print(f"weights not kept, each row is written once: {names}")


def _as_json(done: Converted) -> dict[str, Any]:
    return {
        "output": done.output,
        "rows": done.num_rows,
        "samples": done.num_samples,
        "went_on_from_row": done.num_started_at,
        "pictures_written": done.num_pictures_written,
        "outside_references": done.num_outside,
        "unused_keys": done.unused,
        "bad_rows": done.bad.count,
        "bad_rows_named": done.bad.named,
        "skipped": done.skipped,
    }
