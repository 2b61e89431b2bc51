"""`vlmtune data convert|preview|stats|split`: look at data, measure it, rewrite it.

DATA… or RECIPE, and KEY=VALUE… -> DataInput -> result of sessions/data_input or data/tools -> print
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlmtune.cli.common import (
    DebugOption,
    JsonOption,
    QuietOption,
    command,
    print_json,
    split_settings,
)
from vlmtune.cli.data_output import (
    conversion_json,
    preview_json,
    print_bad_rows,
    print_conversion,
    print_left_out,
    print_previews,
    print_split,
    print_statistics,
    split_json,
    statistics_json,
)
from vlmtune.errors import VlmtuneError

if TYPE_CHECKING:
    from vlmtune.sessions.data_input import DataInput


DataArguments = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA|KEY=VALUE",
        help="Data files, folders, shards (*, {000..009}) or hub:owner/name; or one recipe "
        "(.yaml). Settings are keys of a recipe (data.on_bad_sample=skip) and, for data files, "
        "keys of a data entry (format=table, columns.image=photo, image_dir=DIR, prompt=TEXT).",
        show_default=False,
    ),
]
SideOption = Annotated[
    Literal["train", "eval"], typer.Option("--of", help="Which set of the recipe to read.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Hub id or folder of the model whose processor is used. Default: the recipe's model.",
        show_default=False,
    ),
]
CopyOption = Annotated[
    bool,
    typer.Option(
        "--copy-images/--reference",
        help="Copy pictures into a folder next to the output, or write the paths of the original "
        "files. Pictures inside the rows (bytes, base64) become files in both cases.",
    ),
]
NewIdsOption = Annotated[
    bool,
    typer.Option("--new-ids", help="Replace each id by the name of the file and the line."),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an existing output, and start from the beginning."),
]


@command
def convert_command(
    data: DataArguments,
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="OUT.jsonl", help="The file to write.", show_default=False
        ),
    ],
    of: SideOption = "train",
    copy_images: CopyOption = False,
    new_ids: NewIdsOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write data of any format as JSONL that every other command reads.

    If it is stopped, run the same command again to continue.
    """
    from vlmtune.data.dataset import num_rows
    from vlmtune.data.tools.convert import convert
    from vlmtune.sessions.console import progress

    given = _input(data)
    files = given.files(of)
    try:
        with progress("converted", num_rows(files), quiet=quiet) as on_row:
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
        print("run the same command again to continue", file=sys.stderr)
        raise
    print_bad_rows(done.bad)
    if json:
        print_json(conversion_json(done))
    else:
        print_conversion(done, files)


@command
def preview_command(
    data: DataArguments,
    model: ModelOption = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Number of samples.")] = 3,
    ids: Annotated[
        list[str] | None,
        typer.Option(
            "--ids", help="Show the sample with this id; repeat for more.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="Choose samples at random. Default: evenly spaced rows.", min=0
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Also write an HTML page that shows the pictures.",
            show_default=False,
        ),
    ] = None,
    of: SideOption = "train",
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show samples with the chat template, what is supervised and what pictures cost in tokens.

    Needs the model's processor, not its weights.
    """
    from vlmtune.sessions.data_input import preview_rows

    found = preview_rows(_input(data, model), of, count=count, seed=seed, ids=ids)
    print_left_out(found.left_out)
    if html is not None:
        from vlmtune.report.preview import write_preview_page

        names = [Path(path).name for path in split_settings(data)[0]]
        write_preview_page(found.shown, html, title=", ".join(names[:3]))
    if json:
        print_json(preview_json(found, html))
        return
    print_previews([preview for _, preview in found.shown])
    if html is not None:
        print(html)


@command
def stats_command(
    data: DataArguments,
    model: ModelOption = None,
    tokens: Annotated[
        bool | None,
        typer.Option(
            "--tokens/--no-tokens",
            help="Count tokens with the model's processor. Default: if a model is given.",
            show_default=False,
        ),
    ] = None,
    max_samples: Annotated[
        int | None,
        typer.Option(
            "--max-samples",
            min=1,
            help="Read only this many rows of each set, evenly spaced. Default: all rows.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Count what is in the data. With a training and an evaluation set: also what they share."""
    from vlmtune.sessions.console import progress
    from vlmtune.sessions.data_input import statistics_of

    found = statistics_of(
        _input(data, model),
        with_tokens=tokens,
        max_samples=max_samples,
        show_progress=functools.partial(progress, quiet=quiet),
    )
    for of_set in found.sets.values():
        print_bad_rows(of_set.bad)
    if json:
        print_json(statistics_json(found))
    else:
        print_statistics(found)


@command
def split_command(
    data: DataArguments,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="DIR",
            help="The folder to write train.jsonl and eval.jsonl to.",
            show_default=False,
        ),
    ],
    eval_fraction: Annotated[
        float, typer.Option("--eval-fraction", help="Fraction of the samples for evaluation.")
    ] = 0.1,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Another seed gives another split.")
    ] = 42,
    of: SideOption = "train",
    copy_images: CopyOption = False,
    new_ids: NewIdsOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Split a set for training and evaluation, so that no picture is on both sides.

    Samples with the same picture, by content, stay together; samples without a picture stay
    together if they ask the same question.
    """
    from vlmtune.data.dataset import num_rows
    from vlmtune.data.tools.split import split
    from vlmtune.sessions.console import progress

    if not 0 < eval_fraction < 1:
        raise VlmtuneError(
            "--eval-fraction is out of range", got=eval_fraction, expected="above 0 and below 1"
        )
    given = _input(data)
    files = given.files(of)
    # Each row is read twice.
    with progress("rows read and written", 2 * num_rows(files), quiet=quiet) as on_row:
        done = split(
            files,
            output,
            eval_fraction=eval_fraction,
            seed=seed,
            copy_images=copy_images,
            new_ids=new_ids,
            on_bad_sample=given.section.on_bad_sample,
            overwrite=overwrite,
            on_row=on_row,
        )
    print_bad_rows(done.bad)
    if json:
        print_json(split_json(done, eval_fraction))
    else:
        print_split(done, files, eval_fraction)


def _input(arguments: list[str], model: str | None = None) -> DataInput:
    from vlmtune.sessions.data_input import read_input

    return read_input(*split_settings(arguments), model=model)
