"""What the data commands print: for people, and as JSON.

Of previews, supervised text is coloured on a terminal, and between ⟦ and ⟧ in a pipe or with
NO_COLOR.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.errors import escaped, plural

if TYPE_CHECKING:
    from rich.text import Text

    from vlmtune.data.dataset import BadRows, OpenFile
    from vlmtune.data.tools.convert import Converted
    from vlmtune.data.tools.duplicates import Overlap
    from vlmtune.data.tools.split import Split
    from vlmtune.report.data_stats import SetStatistics
    from vlmtune.report.preview import Preview
    from vlmtune.sessions.data_input import Previews, Statistics


logger = logging.getLogger("vlmtune")

STYLES = {"plain": "", "taught": "bold green", "picture": "cyan", "video": "cyan"}
OPEN, CLOSE = "⟦", "⟧"


def print_bad_rows(bad: BadRows) -> None:
    """Name the first rows that were left out, and count the others."""
    print_left_out(bad.named)
    if bad.count > len(bad.named):
        logger.warning("and %s more bad rows", f"{bad.count - len(bad.named):,}")


def print_left_out(errors: Sequence[str]) -> None:
    for error in errors:
        logger.warning("left out: %s", error)


def print_conversion(done: Converted, files: Sequence[OpenFile]) -> None:
    print(f"{done.output}: {plural(done.num_samples, 'sample')} of {plural(done.num_rows, 'row')}")
    if done.skipped is not None:
        print(f"{done.skipped}: {plural(done.bad.count, 'row')} left out, and why")
    if done.num_pictures_written:
        folder = done.output.with_name(f"{done.output.stem}_images")
        written = plural(done.num_pictures_written, "picture or video", "pictures and videos")
        print(f"{folder}: {written} written")
    _print_not_kept(done.unused, done.num_outside, files)


def conversion_json(done: Converted) -> dict[str, Any]:
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


def print_split(done: Split, files: Sequence[OpenFile], requested: float) -> None:
    for path, samples, groups in zip(done.outputs, done.num_samples, done.num_groups):
        print(f"{path}: {plural(samples, 'sample')} in {plural(groups, 'group')}")
    print(
        f"{100 * done.eval_fraction:.2f} % for evaluation ({100 * requested:g} % requested); "
        f"the largest group has {plural(done.largest_group, 'sample')}"
    )
    _print_not_kept(done.unused, done.num_outside, files)


def split_json(done: Split, requested: float) -> dict[str, Any]:
    return {
        "train": done.outputs[0],
        "eval": done.outputs[1],
        "train_samples": done.num_samples[0],
        "eval_samples": done.num_samples[1],
        "eval_fraction": done.eval_fraction,
        "asked_fraction": requested,
        "train_groups": done.num_groups[0],
        "eval_groups": done.num_groups[1],
        "largest_group": done.largest_group,
        "outside_references": done.num_outside,
        "unused_keys": done.unused,
        "bad_rows": done.bad.count,
        "bad_rows_named": done.bad.named,
    }


def _print_not_kept(unused: dict[str, int], num_outside: int, files: Sequence[OpenFile]) -> None:
    """What of the data is not in the output, and what reading the output needs."""
    if unused:
        names = ", ".join(f"{key} ({count:,})" for key, count in sorted(unused.items()))
        print(f"keys that are not in the output, with the number of rows: {names}")
    if num_outside:
        print(
            f"{plural(num_outside, 'path leads', 'paths lead')} out of the output's folder: to "
            "train on it, set data.allow_outside_paths: true (or convert with --copy-images)"
        )
    weights = {file.entry.path: file.entry.weight for file in files if file.entry.weight != 1}
    if weights:
        names = ", ".join(f"{path} ({weight:g})" for path, weight in weights.items())
        print(f"weights are not in the output, each row is written once: {names}")


def print_previews(previews: Sequence[Preview]) -> None:
    """On stdout: in colour on a terminal, with marks elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    in_colour = console.color_system is not None and not console.no_color
    for item in previews:
        console.print(Text(f"--- {escaped(f'{item.id} · {item.file}:{item.line}')}", "dim"))
        console.print(_rendered(item, in_colour=in_colour))
        for number, size in enumerate(item.sizes, start=1):
            console.print(Text(f"picture {number}: {size.text}", "cyan"))
        console.print(Text(item.counts, "bold"))
        for note in item.notes:
            console.print(Text(f"note: {note}"))
        console.print()


def _rendered(item: Preview, *, in_colour: bool) -> Text:
    from rich.text import Text

    text = Text()
    for piece in item.pieces:
        shown = escaped(piece.text)
        if in_colour:
            text.append(shown, STYLES[piece.kind])
        else:
            text.append(f"{OPEN}{shown}{CLOSE}" if piece.kind == "taught" else shown)
    return text


def preview_json(found: Previews, html: Path | None) -> dict[str, Any]:
    samples = [
        {
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
        for _, item in found.shown
    ]
    return {"samples": samples, "bad_rows_named": found.left_out, "html": html}


def print_statistics(found: Statistics) -> None:
    for name, of_set in found.sets.items():
        _print_set(name, of_set)
    if found.shared is not None:
        _print_overlap(found.shared, found.sets["eval"])


def _print_set(name: str, found: SetStatistics) -> None:
    rows = plural(found.num_rows, "row")
    if found.num_looked_at < found.num_rows:
        rows = f"{found.num_looked_at:,} of {rows}, evenly spaced"
    print(f"{name}: {plural(found.num_samples, 'sample')} in {rows}")
    if found.bad.count:
        print(f"{plural(found.bad.count, 'row')} cannot be used")
    if found.num_dropped:
        dropped = plural(found.num_dropped, "sample is", "samples are")
        print(f"{dropped} too long, and left out of training")
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
        pictures = plural(twice.num_pictures, "different picture")
        print(f"{pictures}, used {plural(twice.num_picture_uses, 'time')}")
    repeated = plural(twice.num_repeated, "sample repeats", "samples repeat")
    print(f"{repeated} another sample, with the same pictures and words")
    for first, again in twice.examples:
        one, other = found.place(first), found.place(again)
        print(f"  {other.file}:{other.line} repeats {one.file}:{one.line}")


def _print_overlap(shared: Overlap, eval_set: SetStatistics) -> None:
    print(
        f"train and eval share {plural(shared.num_pictures, 'picture')}; of "
        f"{plural(eval_set.num_samples, 'sample')} in eval, {shared.num_with_picture:,} have a "
        f"picture of train, {shared.num_with_question:,} a question of train, and "
        f"{shared.num_with_both:,} both of one sample of train"
    )
    what = "picture and question" if shared.num_with_both else "a picture"
    for number in shared.examples:
        place = eval_set.place(number)
        print(f"  {place.file}:{place.line}: {what} of train")


def statistics_json(found: Statistics) -> dict[str, Any]:
    sets = {name: _set_json(of_set) for name, of_set in found.sets.items()}
    shared = found.shared and {
        "pictures": found.shared.num_pictures,
        "eval_samples_with_picture": found.shared.num_with_picture,
        "eval_samples_with_question": found.shared.num_with_question,
        "eval_samples_with_both": found.shared.num_with_both,
    }
    return sets | {"overlap": shared}


def _set_json(found: SetStatistics) -> dict[str, Any]:
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
