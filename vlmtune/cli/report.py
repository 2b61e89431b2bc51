"""`vlmtune report RUN`: one self-contained HTML page of a run, finished or not."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli.common import DebugOption, JsonOption, QuietOption, command, print_json


@command
def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="File to write. Default: RUN/report.html.",
            show_default=False,
        ),
    ] = None,
    open_it: Annotated[
        bool, typer.Option("--open", help="Open the report in the browser.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write one self-contained HTML page about a run."""
    from vlmtune.report.page import write_page

    written = write_page(run, output)
    if open_it:
        webbrowser.open(written.path.absolute().as_uri())
    if json:
        print_json(
            {
                "report": written.path.absolute(),
                "bytes": written.num_bytes,
                "state": written.state,
            }
        )
    else:
        print(written.path)
