"""`vlmtune eval TARGET … --data FILE`: answer every question of a file and score the answers.

options -> Request (eval_request.py): a run's recipe under the options (eval_section.py), data
        -> eval_target.py, a target at a time; eval_compare.py for several
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlmtune.cli.common import (
    DebugOption,
    DtypeOption,
    JsonOption,
    QuantizationOption,
    QuietOption,
    TrustOption,
    command,
    print_json,
    setup_logging,
)
from vlmtune.cli.data_input import ColumnsOption, FormatOption, ImageDirOption, PromptOption
from vlmtune.errors import CheckFailed


def _option(name: str, help: str, **settings: Any) -> Any:
    return typer.Option(name, help=help, show_default=False, **settings)


@command
def eval_command(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET…",
            help="Run folders, adapter folders, models (folder or hub id), or folders of finished "
            "evaluations. Several are compared with the first.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[Path] | None,
        _option(
            "--data",
            "What to evaluate on; give it again for more files. Read with the columns, prompt, "
            "image_dir and format of the run's own data, unless the next four options say how.",
            metavar="FILE",
        ),
    ] = None,
    columns: ColumnsOption = None,
    prompt: PromptOption = None,
    image_dir: ImageDirOption = None,
    format: FormatOption = None,
    task: Annotated[
        str | None,
        _option(
            "--task",
            "vqa, caption, choice, classification, grounding or retrieval. Default: the run's, "
            "else vqa.",
        ),
    ] = None,
    metrics: Annotated[
        str | None, _option("--metrics", "Names, with commas. Default: the task's own.")
    ] = None,
    scorer: Annotated[
        Literal["likelihood", "embedding"] | None,
        _option("--scorer", "Retrieval: how a text and a picture are scored."),
    ] = None,
    subtract_prior: Annotated[
        bool | None,
        _option(
            "--subtract-prior/--no-subtract-prior",
            "Retrieval by likelihood: whether log p(text) without a picture is subtracted where "
            "a picture's texts are ranked. Default: the run's, else not.",
        ),
    ] = None,
    embedding_prompt: Annotated[
        str | None,
        _option("--embedding-prompt", "Retrieval by embedding: what follows a picture or a text."),
    ] = None,
    decoding: Annotated[
        Literal["greedy", "sample", "beam"] | None,
        _option("--decoding", "How answers are generated. Default: the run's, else greedy."),
    ] = None,
    temperature: Annotated[
        float | None, _option("--temperature", "With sample: divides the logits.")
    ] = None,
    top_p: Annotated[
        float | None,
        _option("--top-p", "With sample: likeliest tokens of this probability together."),
    ] = None,
    top_k: Annotated[
        int | None, _option("--top-k", "With sample: so many likeliest tokens; 0: all.")
    ] = None,
    num_beams: Annotated[int | None, _option("--num-beams", "With beam: number of beams.")] = None,
    stop: Annotated[
        list[str] | None,
        _option("--stop", "An answer ends before this text; give it again for more."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        _option("--max-new-tokens", "Longest answer, in tokens. Default: the run's.", min=1),
    ] = None,
    batch_size: Annotated[
        int | None,
        _option("--batch-size", "Questions answered at once. Default: the run's.", min=1),
    ] = None,
    max_samples: Annotated[
        int | None, _option("--max-samples", "Only the first so many samples.", min=1)
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, max=2**32 - 1, help="Of sampled answers and of the bootstrap."
        ),
    ] = 0,
    blind: Annotated[
        bool,
        typer.Option("--blind", help="Also what guessers score that never see the picture."),
    ] = False,
    train: Annotated[
        list[Path] | None,
        _option(
            "--train",
            "With --blind: the training data to guess from. Default: the run's.",
            metavar="FILE",
        ),
    ] = None,
    no_guard: Annotated[
        bool, typer.Option("--no-guard", help="Leave out the run's eval.guard.")
    ] = False,
    allow_outside_paths: Annotated[
        bool,
        typer.Option(
            "--allow-outside-paths",
            help="Pictures may be outside the folder of --data. Default: the run's.",
        ),
    ] = False,
    allow_urls: Annotated[
        bool,
        typer.Option(
            "--allow-urls", help="Pictures may be fetched from http(s) URLs. Default: the run's."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        _option(
            "--output",
            "Folder for the report. Default: RUN/eval/DATA-TIME for a run, eval/TARGET-DATA-TIME "
            "here for anything else, eval/compare-DATA-TIME for several targets. An evaluation "
            "that was stopped goes on with the same command.",
            metavar="DIR",
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    quantization_bit: QuantizationOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure runs, adapters or models on a data file; compare several."""
    from vlmtune.sessions.data_input import DataOptions
    from vlmtune.sessions.eval_options import EvalOptions
    from vlmtune.sessions.eval_tables import guard_line
    from vlmtune.sessions.processes import is_main_process, joined_processes
    from vlmtune.sessions.target import check_bit

    quiet = quiet or not is_main_process()
    setup_logging(quiet)
    check_bit(quantization_bit)
    given = {
        "task": task,
        "metrics": None if metrics is None else [name.strip() for name in metrics.split(",")],
        "scorer": scorer,
        "subtract_prior": subtract_prior,
        "embedding_prompt": embedding_prompt,
        "method": decoding,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "num_beams": num_beams,
        "stop": stop,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    request = EvalOptions(
        targets=targets,
        data=data or [],
        reading=DataOptions([str(file) for file in data or []], format, columns, image_dir, prompt),
        options={key: value for key, value in given.items() if value is not None},
        max_samples=max_samples,
        blind=blind,
        train=train or [],
        output=output,
        allow_outside_paths=allow_outside_paths,
        allow_urls=allow_urls,
    )
    with joined_processes() as processes:
        plan = request.plan(
            processes,
            seed=seed,
            with_guard=not no_guard,
            dtype=dtype,
            quantization_bit=quantization_bit,
            trust_remote_code=trust_remote_code,
            quiet=quiet,
        )
        result = request.run(plan, as_json=json)
    if processes.is_main and json:
        print_json(result)
    evaluated = result.get("targets", [result])
    fallen = [
        f"{one['target']}: {guard_line(one['guard'])}"
        for one in evaluated
        if one["target"] not in request.finished and one.get("guard", {}).get("has_fallen")
    ]
    if fallen:
        raise CheckFailed("; ".join(fallen))
