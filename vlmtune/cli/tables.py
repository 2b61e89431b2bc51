"""Tables for people, on stderr."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
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
