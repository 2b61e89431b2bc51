"""`vlmtune data preview DATA… --model M`: a few samples as the model sees them.

Supervised text is coloured on a terminal, and between ⟦ and ⟧ in a pipe or with NO_COLOR.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
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
    ModelOption,
    OutsideOption,
    PathsArgument,
    PromptOption,
    SideOption,
    SplitOption,
    UrlsOption,
)
from vlmtune.errors import SampleError, VlmtuneError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from vlmtune.data.dataset import OpenFile
    from vlmtune.data.types import Conversation
    from vlmtune.report.preview import Preview


logger = logging.getLogger("vlmtune")

STYLES = {"plain": "", "taught": "bold green", "picture": "cyan", "video": "cyan"}
OPEN, CLOSE = "⟦", "⟧"


@command
def preview_command(
    data: PathsArgument,
    model: ModelOption = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many samples.")] = 3,
    ids: Annotated[
        list[str] | None,
        typer.Option("--ids", help="These samples; give it again for more.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="A random choice. Default: evenly over the rows.", min=0),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Also write one page with the pictures.",
            show_default=False,
        ),
    ] = None,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    image_dir: ImageDirOption = None,
    prompt: PromptOption = None,
    annotations: AnnotationsOption = None,
    split: SplitOption = None,
    of: SideOption = "train",
    on_bad_sample: BadOption = None,
    allow_outside_paths: OutsideOption = False,
    allow_urls: UrlsOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show samples with the chat template, what is supervised and what pictures cost in tokens.

    Needs the model's processor, not its weights.
    """
    from vlmtune.sessions.data_input import DataOptions, load_encoder, open_input, read_input

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
        ),
        model=model,
    )
    if given.recipe is None:
        raise VlmtuneError("no model is given", do="name one with --model, or give a recipe")
    files = open_input(given, of)
    encoder = load_encoder(given.recipe)

    from vlmtune.data.encode import OverLength
    from vlmtune.report.preview import preview, write_preview_page

    shown: list[tuple[Conversation, Preview]] = []
    left_out: list[str] = []
    for file, index in choose_rows(files, count=count, seed=seed, ids=ids):
        try:
            conversation = file.conversation(index)
            shown.append((conversation, preview(conversation, encoder)))
        except SampleError as error:
            if given.section.on_bad_sample == "error" and not isinstance(error, OverLength):
                raise
            left_out.append(str(error))
            logger.warning("left out: %s", error)
    if html is not None:
        write_preview_page(shown, html, title=", ".join(Path(p).name for p in data[:3]))
    if json:
        samples = [_as_json(item) for _, item in shown]
        print_json({"samples": samples, "bad_rows_named": left_out, "html": html})
        return
    print_previews([item for _, item in shown])
    if html is not None:
        print(html)


def choose_rows(
    files: Sequence[OpenFile], *, count: int, seed: int | None, ids: Sequence[str] | None
) -> Iterator[tuple[OpenFile, int]]:
    """The rows to show, in their order: those with `ids`, a random choice, or evenly over all.

    Raises VlmtuneError where an id is not there.
    """
    from vlmtune.data.dataset import iter_rows, num_rows
    from vlmtune.report.pictures import spread

    if ids:
        yield from _with_ids(files, ids)
        return
    total = num_rows(files)
    if seed is None:
        numbers = list(spread(total, count))
    else:
        numbers = sorted(random.Random(seed).sample(range(total), min(count, total)))
    yield from ((row.file, row.index) for row in iter_rows(files, numbers))


def _with_ids(files: Sequence[OpenFile], ids: Sequence[str]) -> Iterator[tuple[OpenFile, int]]:
    from vlmtune.data.dataset import iter_rows

    wanted = set(ids)
    for row in iter_rows(files):
        if not wanted:
            return
        try:
            name = row.conversation().id
        except SampleError:
            continue
        if name in wanted:
            wanted.remove(name)
            yield row.file, row.index
    if wanted:
        raise VlmtuneError("no sample has this id", got=", ".join(sorted(wanted)))


def print_previews(previews: Sequence[Preview]) -> None:
    """On stdout: in colour where that is a terminal, with marks where not."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for item in previews:
        _rule(console, f"{item.id} · {item.file}:{item.line}")
        console.print(_rendered(item, in_colour=_has_colours(console)))
        for number, size in enumerate(item.sizes, start=1):
            console.print(Text(f"picture {number}: {size.text}", "cyan"))
        console.print(Text(item.counts, "bold"))
        for note in item.notes:
            console.print(Text(f"note: {note}"))
        console.print()


def _has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _rule(console: Console, title: str) -> None:
    from rich.text import Text

    from vlmtune.errors import escaped

    console.print(Text(f"--- {escaped(title)}", "dim"))


def _rendered(item: Preview, *, in_colour: bool) -> Text:
    from rich.text import Text

    from vlmtune.errors import escaped

    text = Text()
    for piece in item.pieces:
        shown = escaped(piece.text)
        if in_colour:
            text.append(shown, STYLES[piece.kind])
        else:
            text.append(f"{OPEN}{shown}{CLOSE}" if piece.kind == "taught" else shown)
    return text


def _as_json(item: Preview) -> dict[str, Any]:
    return {
        "id": item.id,
        "file": item.file,
        "line": item.line,
        "tokens": item.num_tokens,
        "media_tokens": item.num_media,
        "supervised_tokens": item.num_supervised,
        "pictures": item.sizes,
        "pieces": item.pieces,
        "notes": item.notes,
    }
