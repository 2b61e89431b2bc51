"""The options of `vlmtune eval` that say how a data file is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _option(name: str, help: str, **settings: Any) -> Any:
    return typer.Option(name, help=help, show_default=False, **settings)


FormatOption = Annotated[
    str | None, _option("--format", "How a row becomes a sample. Default: told from the rows.")
]
ColumnsOption = Annotated[
    list[str] | None,
    _option("--columns", "A column's name; give it again for more.", metavar="ROLE=NAME"),
]
ImageDirOption = Annotated[
    Path | None,
    _option("--image-dir", "Folder that pictures are relative to. Default: the data's own."),
]
PromptOption = Annotated[
    str | None, _option("--prompt", "The question of rows that have none (captions, classes).")
]
