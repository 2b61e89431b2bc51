"""What `vlmtune data` is given: data files with options, or a recipe, as one section of a recipe.

DATA… --format …  or  RECIPE key=value … -> DataInput -> open_input -> files; load_encoder -> tokens
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from vlmtune.data.dataset import BadRows


logger = logging.getLogger("vlmtune")


def _option(name: str, help: str, **settings: Any) -> Any:
    return typer.Option(name, help=help, show_default=False, **settings)


PathsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA…",
        help="Data files, folders, shards (*, {000..009}) or hub:owner/name; or a RECIPE (.yaml), "
        "and keys of it to set (key.sub=value).",
        show_default=False,
    ),
]
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
AnnotationsOption = Annotated[
    Path | None, _option("--annotations", "VQAv2: the file of the answers.")
]
SplitOption = Annotated[
    str | None, _option("--split", "Split of a `datasets` folder or of a hub data set.")
]
OutsideOption = Annotated[
    bool,
    typer.Option("--allow-outside-paths", help="Pictures may be outside the folder of the data."),
]
UrlsOption = Annotated[
    bool, typer.Option("--allow-urls", help="Pictures may be fetched from http(s) URLs.")
]
BadOption = Annotated[
    Literal["error", "skip"] | None,
    _option(
        "--on-bad-sample",
        "A row that cannot be used: stop and name it, or leave it out and count it. Default: the "
        "recipe's, else error.",
    ),
]
SideOption = Annotated[
    Literal["train", "eval"],
    typer.Option("--of", help="Of a recipe: which of its sets."),
]
ModelOption = Annotated[
    str | None,
    _option("--model", "Hub id or folder whose processor is used. Default: the recipe's."),
]


def print_bad_rows(bad: BadRows) -> None:
    """Name the rows that were left out, the first in words."""
    if not bad.count:
        return
    for line in bad.named:
        logger.warning("left out: %s", line)
    if bad.count > len(bad.named):
        logger.warning("and %s more bad rows", f"{bad.count - len(bad.named):,}")
