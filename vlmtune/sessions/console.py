"""What a job shows while it runs, on stderr: tables, and how far it is."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table


def print_table(title: str, rows: Sequence[Any]) -> None:
    """Print records (dataclasses of one kind) as a table, a column a field; nothing for none."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    names = [field.name for field in dataclasses.fields(rows[0])]
    for name in names:
        is_number = isinstance(getattr(rows[0], name), (int, float))
        table.add_column(name.replace("_", " "), justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(_cell(getattr(row, name)) for name in names))
    Console(stderr=True).print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)


LINE_SECONDS = 2.0
Clock = Callable[[], float]


@contextlib.contextmanager
def progress(
    what: str, total: int, *, quiet: bool, clock: Clock = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """A function that is told how many of `total` are done; the first time, how many were done
    already. A bar on a terminal; in a pipe a line every tenth, but the last none within
    `LINE_SECONDS` of another; nothing with `quiet`."""
    if quiet or total == 0:
        yield lambda done: None
    elif sys.stderr.isatty():
        console = Console(stderr=True)
        columns = ("{task.description}", MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield _print_lines(what, total, clock)


def _print_lines(what: str, total: int, clock: Clock) -> Callable[[int], None]:
    first: tuple[int, float] | None = None
    shown, shown_at = 0, 0.0

    def on_progress(done: int) -> None:
        nonlocal first, shown, shown_at
        now, tenth = clock(), done * 10 // total
        if first is None:
            first, shown, shown_at = (done, now), tenth, now
            return
        if tenth <= shown or (now - shown_at < LINE_SECONDS and done < total):
            return
        shown, shown_at = tenth, now
        done_before, began = first
        left = (now - began) / max(1, done - done_before) * (total - done)
        text = f"{what} {done} of {total}"
        print(f"{text}, {format_duration(left)} left" if left else text, file=sys.stderr)

    return on_progress


def format_duration(seconds: float) -> str:
    """`48 s`, `2.5 min`, `1.2 h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
