"""`vlmtune merge RUN --output DIR`: adapter and base model into one verified checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlmtune.cli.common import (
    DebugOption,
    JsonOption,
    QuietOption,
    TrustOption,
    command,
    print_json,
)
from vlmtune.errors import plural


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
        typer.Option("--dtype", help="Dtype of the merged weights. auto: that of the base model."),
    ] = "auto",
    shard_size: Annotated[
        str,
        typer.Option(
            "--shard-size", "--max-shard-size", help="Size limit of a weight file, e.g. 5GB."
        ),
    ] = "2GB",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Samples on which logits are compared. Default: those of the run.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Merge a run's adapter into its base model, and verify the result against base + adapter.

    The base model is loaded again, without quantization. If the merged model's logits differ from
    those of base + adapter, the command exits with 1 and leaves no output.
    """
    from vlmtune.sessions.merge import merge

    report = merge(
        run,
        output,
        dtype=dtype,
        shard_size=shard_size,
        data=data or (),
        trust_remote_code=trust_remote_code,
    )
    if json:
        print_json(report)
        return
    print(
        f"{report.output}: verified on {plural(report.num_positions, 'position')} of "
        f"{plural(report.num_samples, 'sample')}; logits differ by at most "
        f"{report.max_difference:.3g} (tolerance {report.tolerance:.3g}, {report.dtype}); "
        f"peak memory {report.peak_memory_bytes / 1e9:.1f} GB"
    )
