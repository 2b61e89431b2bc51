"""The `vlmtune` command line: every command is registered here and lives in a file of its own.

A command file is cheap to import; what needs torch is imported inside the command.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vlmtune import __version__
from vlmtune.cli.chat import chat_command
from vlmtune.cli.check import check_command
from vlmtune.cli.data import convert_command, preview_command, split_command, stats_command
from vlmtune.cli.eval import eval_command
from vlmtune.cli.merge import merge_command
from vlmtune.cli.recipe import schema_command, show_command
from vlmtune.cli.report import report_command
from vlmtune.cli.train import train_command

app = typer.Typer(
    name="vlmtune",
    help="Fine-tune vision-language models from a YAML recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # drawing boxes would double the time that help takes
)
app.command("train")(train_command)
app.command("check")(check_command)
app.command("eval")(eval_command)
app.command("merge")(merge_command)
app.command("report")(report_command)
app.command("chat")(chat_command)
data_app = typer.Typer(
    help="Convert, preview, measure and split data.", no_args_is_help=True, rich_markup_mode=None
)
data_app.command("convert")(convert_command)
data_app.command("preview")(preview_command)
data_app.command("stats")(stats_command)
data_app.command("split")(split_command)
app.add_typer(data_app, name="data")
recipe_app = typer.Typer(
    help="Show a recipe or its schema.", no_args_is_help=True, rich_markup_mode=None
)
recipe_app.command("show")(show_command)
recipe_app.command("schema")(schema_command)
app.add_typer(recipe_app, name="recipe")


def main() -> int:
    """Run the command line; returns only through `SystemExit`, with the exit code."""
    app(prog_name="vlmtune")
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vlmtune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Fine-tune vision-language models from a YAML recipe."""
