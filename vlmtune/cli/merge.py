"""`vlmtune merge RUN --output DIR`: adapter and unquantised base become one verified checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from vlmtune.cli.common import DebugOption, JsonOption, QuietOption, command, print_json
from vlmtune.errors import VlmtuneError, plural

SHARD_SIZE = re.compile(r"\d+(\.\d+)?(KB|MB|GB|TB)")


@command
def merge_command(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run or adapter folder.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", metavar="DIR", help="New folder for the merged model."),
    ],
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option("--dtype", help="Of the merged weights. auto: the base's own."),
    ] = "auto",
    shard_size: Annotated[
        str,
        typer.Option("--shard-size", "--max-shard-size", help="Largest weight file, e.g. 5GB."),
    ] = "2GB",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Samples to compare logits on. Default: the run's own.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Merge a run's adapter into its base model, and check the result against base + adapter.

    The base is loaded again without quantisation. Exits 1, and leaves no output, where the written
    model's logits are not those of base + adapter.
    """
    from vlmtune.sessions.preload import preload

    if SHARD_SIZE.fullmatch(shard_size) is None:
        raise VlmtuneError(
            "wrong value for --shard-size", got=shard_size, expected="a size, e.g. 5GB"
        )
    preload("vlmtune.models.merge")
    from vlmtune.models.merge import merge
    from vlmtune.models.merge_verify import MergeFailed

    try:
        report = merge(
            run,
            output,
            dtype=dtype,
            shard_size=shard_size,
            data=data or (),
            trust_remote_code=trust_remote_code,
        )
    except MergeFailed as error:
        if json:
            print_json(error.report)
        raise
    if json:
        print_json(report)
        return
    print(
        f"{report.output}: verified on {plural(report.num_positions, 'position')} of "
        f"{plural(report.num_samples, 'sample')}; logits differ by at most "
        f"{report.max_difference:.3g} (tolerance {report.tolerance:.3g}, {report.dtype}); "
        f"{report.peak_memory_bytes / 1e9:.1f} GB of memory at most"
    )
