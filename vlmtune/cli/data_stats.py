"""`vlmtune data stats DATA… [--model M]`: counts per sample, duplicates, overlap of two sets."""

from __future__ import annotations

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
    SplitOption,
    UrlsOption,
    print_bad_rows,
)
from vlmtune.errors import VlmtuneError, plural

if TYPE_CHECKING:
    from vlmtune.data.measure import Measurer
    from vlmtune.data.tools.duplicates import Overlap
    from vlmtune.report.data_stats import SetStatistics
    from vlmtune.sessions.data_input import DataInput, Side


@command
def stats_command(
    data: PathsArgument,
    model: ModelOption = None,
    tokens: Annotated[
        bool | None,
        typer.Option(
            "--tokens/--no-tokens",
            help="Count tokens, with the model's processor. Default: where a model is known.",
            show_default=False,
        ),
    ] = None,
    max_samples: Annotated[
        int | None,
        typer.Option(
            "--max-samples",
            min=1,
            help="Look at so many rows of each set, chosen evenly. Default: all.",
            show_default=False,
        ),
    ] = None,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    image_dir: ImageDirOption = None,
    prompt: PromptOption = None,
    annotations: AnnotationsOption = None,
    split: SplitOption = None,
    on_bad_sample: BadOption = None,
    allow_outside_paths: OutsideOption = False,
    allow_urls: UrlsOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Count what is in the data; of a recipe in both sets, and what these share."""
    from vlmtune.sessions.data_input import DataOptions, read_input

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
    measurer = _measurer(given, tokens)
    sides: list[Side] = ["train"] if given.section.eval is None else ["train", "eval"]
    found = {
        side: _look_at(given, side, measurer=measurer, max_samples=max_samples, quiet=quiet)
        for side in sides
    }
    shared = None
    if len(found) == 2:
        from vlmtune.data.tools.duplicates import overlap

        shared = overlap(found["train"].table, found["eval"].table)
    for of_side in found.values():
        print_bad_rows(of_side.bad)
    if json:
        sets = {side if given.is_recipe else "data": _as_json(s) for side, s in found.items()}
        print_json(sets | {"overlap": shared if shared is None else _overlap_json(shared)})
        return
    for side, of_side in found.items():
        _print_set(side if given.is_recipe else "data", of_side)
    if shared is not None:
        _print_overlap(shared, found["eval"])


def _measurer(given: DataInput, tokens: bool | None) -> Measurer | None:
    from vlmtune.sessions.data_input import load_encoder

    if tokens is False:
        return None
    if given.recipe is None:
        if tokens:
            raise VlmtuneError("no model is given", do="name one with --model, or give a recipe")
        return None
    encoder = load_encoder(given.recipe)
    from vlmtune.data.measure import Measurer

    return Measurer(encoder)


def _look_at(
    given: DataInput, side: Side, *, measurer: Measurer | None, max_samples: int | None, quiet: bool
) -> SetStatistics:
    from vlmtune.report.data_stats import set_statistics
    from vlmtune.sessions.console import progress
    from vlmtune.sessions.data_input import open_input

    files = open_input(given, side)
    total = sum(len(file.rows) for file in files)
    if max_samples is not None:
        total = min(total, max_samples)
    recipe = given.recipe
    is_paired = recipe is not None and recipe.objective == "contrastive" and side == "train"
    name = side if given.is_recipe else "data"
    with progress(f"rows of {name} read", total, quiet=quiet) as on_row:
        found = set_statistics(
            files,
            measurer=measurer,
            pair_prompt=recipe.eval.embedding_prompt if recipe and is_paired else None,
            max_samples=max_samples,
            on_row=on_row,
        )
    if found.bad.count and (given.section.on_bad_sample == "error" or not found.num_samples):
        raise found.bad.as_error()
    return found


def _print_set(name: str, found: SetStatistics) -> None:
    rows = plural(found.num_rows, "row")
    if found.num_looked_at < found.num_rows:
        rows = f"{found.num_looked_at:,} of {rows}, chosen evenly"
    print(f"{name}: {plural(found.num_samples, 'sample')} in {rows}")
    if found.bad.count:
        print(f"{plural(found.bad.count, 'row')} cannot be used")
    if found.num_dropped:
        dropped = plural(found.num_dropped, "sample is", "samples are")
        print(f"{dropped} too long and dropped in training")
    for note, count in sorted(found.notes.items()):
        print(f"{plural(count, 'sample')}: {note}")
    if found.num_samples:
        _print_figures(found)
        _print_duplicates(found)
    print()


def _print_figures(found: SetStatistics) -> None:
    from vlmtune.report.data_stats import PERCENTILES

    ends = {0: "lowest", 50: "median", 100: "highest"}
    names = ["per sample", *(ends.get(p, f"{p} %") for p in PERCENTILES), "mean"]
    rows = [
        ([name, *(f"{p:,}" for p in of.percentiles), f"{of.mean:,.1f}"], of.bars)
        for name, of in found.figures().items()
        if of.percentiles[-1]  # videos, mostly
    ]
    widths = [max(len(cells[at]) for cells in (names, *(r for r, _ in rows))) for at in range(7)]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths)
        return first[0].ljust(first[1]) + "".join(f"  {cell:>{width}}" for cell, width in rest)

    print(line(names))
    for cells, bars in rows:
        print(f"{line(cells)}  {bars}")


def _print_duplicates(found: SetStatistics) -> None:
    twice = found.duplicates
    if twice.num_picture_uses:
        print(
            f"{plural(twice.num_pictures, 'distinct picture')} in "
            f"{plural(twice.num_picture_uses, 'place')}"
        )
    repeated = plural(twice.num_repeated, "sample repeats", "samples repeat")
    print(f"{repeated} another one, pictures and words")
    for first, again in twice.examples:
        one, other = found.place(first), found.place(again)
        print(f"  {other.file}:{other.line} repeats {one.file}:{one.line}")


def _print_overlap(shared: Overlap, held: SetStatistics) -> None:
    print(
        f"train and eval share {plural(shared.num_pictures, 'picture')}; of "
        f"{plural(held.num_samples, 'sample')} of eval {shared.num_with_picture:,} with a picture "
        f"of train, {shared.num_with_question:,} with a question, "
        f"{shared.num_with_both:,} both together"
    )
    for number in shared.examples:
        place = held.place(number)
        what = "asked in train" if shared.num_with_both else "with a picture of train"
        print(f"  {place.file}:{place.line}: {what}")


def _as_json(found: SetStatistics) -> dict[str, Any]:
    from vlmtune.report.data_stats import PERCENTILES

    twice = found.duplicates
    return {
        "rows": found.num_rows,
        "looked_at": found.num_looked_at,
        "samples": found.num_samples,
        "bad_rows": found.bad.count,
        "bad_rows_named": found.bad.named,
        "dropped": found.num_dropped,
        "notes": found.notes,
        "per_sample": {
            name: {
                "mean": of.mean,
                "percentiles": dict(zip(PERCENTILES, of.percentiles)),
                "histogram": [{"from": a, "to": b, "samples": n} for a, b, n in of.bins],
            }
            for name, of in found.figures().items()
        },
        "distinct_pictures": twice.num_pictures,
        "picture_uses": twice.num_picture_uses,
        "repeated_samples": twice.num_repeated,
        "repeated_examples": [[found.place(a), found.place(b)] for a, b in twice.examples],
    }


def _overlap_json(shared: Overlap) -> dict[str, int]:
    return {
        "pictures": shared.num_pictures,
        "eval_samples_with_picture": shared.num_with_picture,
        "eval_samples_with_question": shared.num_with_question,
        "eval_samples_with_both": shared.num_with_both,
    }
