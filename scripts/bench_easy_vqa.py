"""Train the embedded default on easy-VQA with every method, and write the table of results.

    pip install easy-vqa && python scripts/prepare_easy_vqa.py
    python scripts/bench_easy_vqa.py [--methods lora full …] [--seeds 42 43 44] [--max-steps N]

Runs one after the other, so that times compare:

    configs/easy_vqa_METHOD.yaml -> vlmtune train -> WORK/METHOD-SEED/        train.json
                                 -> vlmtune eval on all test questions        eval.json
    all of them -> REPORT.md (the table, printed too) and REPORT.json (every figure)

What is already there with the same settings is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("lora", "qlora", "dora", "qdora", "adalora", "full")
NAMES = {
    "blind": "blind guesser",
    "base": "base model",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "qdora": "QDoRA",
    "adalora": "AdaLoRA",
    "full": "full fine-tuning",
}
KINDS = ("yes/no", "shape", "color")
HEADER = (
    "method",
    "exact match (95 % interval)",
    *KINDS,
    "gain over blind, of full's",
    "trained parameters",
    "training, minutes",
    "peak memory, GB",
)


@dataclass(frozen=True)
class Result:
    """One evaluated model. `train` is empty for what was not trained."""

    method: str
    seed: int | None
    train: Mapping[str, Any]
    evaluation: Mapping[str, Any]

    @property
    def total(self) -> Mapping[str, float]:
        interval: Mapping[str, float] = self.evaluation["metrics"]["exact_match"]
        return interval

    def of_kind(self, kind: str) -> float:
        return float(self.evaluation["slices"][kind]["exact_match"]["value"])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def gain_share(results: Sequence[Result], full: Sequence[Result], blind: float) -> float | None:
    """The mean gain over the blind guesser as a fraction of full fine-tuning's."""
    if not results or not full:
        return None
    gain = mean([result.total["value"] for result in results]) - blind
    full_gain = mean([result.total["value"] for result in full]) - blind
    return gain / full_gain if full_gain > 0 else None


def table_rows(results: Sequence[Result], blind: Mapping[str, float]) -> list[tuple[str, ...]]:
    """The table's cells, a row a method: means over seeds, the hull of their intervals."""
    rows = [
        (
            NAMES["blind"],
            percent(blind["total"]),
            *(percent(blind[kind]) for kind in KINDS),
            "0.0 %",
            "",
            "",
            "",
        )
    ]
    full = [result for result in results if result.method == "full"]
    for method in ("base", *METHODS):
        own = [result for result in results if result.method == method]
        if not own:
            continue
        low = min(result.total["low"] for result in own)
        high = max(result.total["high"] for result in own)
        value = mean([result.total["value"] for result in own])
        share = gain_share(own, full, blind["total"])
        rows.append(
            (
                NAMES[method],
                f"{percent(value)} ({100 * low:.1f} to {100 * high:.1f})",
                *(percent(mean([result.of_kind(kind) for result in own])) for kind in KINDS),
                "" if share is None or method == "base" else percent(share),
                *_costs(own),
            )
        )
    return rows


def _costs(own: Sequence[Result]) -> tuple[str, str, str]:
    if not own[0].train:
        return ("", "", "")
    return (
        f"{own[0].train['trainable_parameters']:,}",
        f"{mean([result.train['seconds'] for result in own]) / 60:.1f}",
        f"{max(result.train['peak_memory_bytes'] for result in own) / 1e9:.2f}",
    )


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(HEADER) - 1)
    lines = [HEADER, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(
    results: Sequence[Result], blind: Mapping[str, float], *, hardware: str, command: str
) -> str:
    """The Markdown page: table, hardware, how it was made and how to read it."""
    seeds = sorted({result.seed for result in results if result.seed is not None})
    lengths = sorted(
        {
            f"{result.train['steps']} of {result.train['samples'] // result.train['steps']}"
            for result in results
            if result.train
        }
    )
    num_questions = max((result.evaluation["num_samples"] for result in results), default=0)
    means = " Figures are means over the seeds, intervals their hull." if len(seeds) > 1 else ""
    return f"""# easy-VQA

The embedded default fine-tuned on [easy-VQA](https://github.com/vzhou842/easy-VQA) (Zhou 2019),
measured on all {num_questions:,} test questions by exact match.

{markdown_table(table_rows(results, blind))}

- Hardware: {hardware}.
- Steps: {", ".join(lengths)} questions, for every method; seeds:
  {", ".join(map(str, seeds))}.{means}
- The 95 % intervals are bootstraps over the test pictures; they hold no variation of training.
- The blind guesser gives each question's text its most frequent answer in training. The gain over
  it is what a model sees in the picture; an adapter's is given as a share of full fine-tuning's.
- The dataset's author reports 93.8 % for a small and 99.5 % for a larger convolutional network.
- The minutes hold the evaluations and checkpoints during training; peak memory is the training
  process's resident memory, libraries included.
- Made by: `{command}`. All figures: `easy_vqa.json`.
"""


def figures_of(result: Result) -> dict[str, Any]:
    """A result without the folders it was made in."""
    return {
        "method": result.method,
        "seed": result.seed,
        "train": {k: v for k, v in result.train.items() if isinstance(v, (int, float))},
        "evaluation": {
            key: result.evaluation[key] for key in ("num_samples", "metrics", "slices", "seconds")
        },
    }


def describe_hardware() -> str:
    """CPU name, cores and memory of this machine, and the library versions that set the speed."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GB of memory, no GPU used; {versions}"


def vlmtune(*arguments: str) -> dict[str, Any]:
    """Run a vlmtune command and return its JSON; its stderr passes through."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "vlmtune", *arguments, "--json"]
    print("$ vlmtune " + " ".join(arguments), file=sys.stderr)
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def remembered(path: Path, settings: Mapping[str, Any], make: Any) -> dict[str, Any]:
    """The result kept in `path` if made with the same settings; otherwise `make()`, kept."""
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["settings"] == settings:
            print(f"already there: {path}", file=sys.stderr)
            return dict(kept["result"])
    result: dict[str, Any] = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "result": result}, indent=1) + "\n")
    return result


def run_method(method: str, seed: int, options: argparse.Namespace) -> Result:
    folder = options.work / f"{method}-{seed}"
    recipe = ROOT / "configs" / f"easy_vqa_{method}.yaml"
    overrides = [f"output_dir={folder}", f"seed={seed}"]
    if options.max_steps is not None:
        overrides.append(f"train.max_steps={options.max_steps}")
    settings = {"recipe": recipe.read_text(), "overrides": overrides}
    kept = options.work / "results"
    # `never`: a run that was interrupted starts over, so that its time is the whole run's.
    train = remembered(
        kept / f"{method}-{seed}-train.json",
        settings,
        lambda: vlmtune("train", str(recipe), *overrides, "--resume", "never"),
    )
    evaluation = remembered(
        kept / f"{method}-{seed}-eval.json",
        settings | questions(options),
        lambda: evaluate(str(folder), kept / f"{method}-{seed}", options),
    )
    return Result(method, seed, train, evaluation)


def run_base(options: argparse.Namespace) -> Result:
    kept = options.work / "results"
    model = ROOT / "data" / "sample" / "tiny-vlm"
    evaluation = remembered(
        kept / "base-eval.json",
        {"model": str(model)} | questions(options),
        lambda: evaluate(str(model), kept / "base", options),
    )
    return Result("base", None, {}, evaluation)


def questions(options: argparse.Namespace) -> dict[str, Any]:
    return {"data": str(options.data), "max_samples": options.max_samples}


def evaluate(target: str, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    arguments = ["--data", str(options.data / "test.jsonl"), "--task", "vqa"]
    arguments += ["--max-new-tokens", "8", "--batch-size", "128", "--output", str(output)]
    if options.max_samples is not None:
        arguments += ["--max-samples", str(options.max_samples)]
    return vlmtune("eval", target, *arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--max-steps", type=int, help="instead of the recipes' number")
    parser.add_argument("--max-samples", type=int, help="only the first so many test questions")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "easy_vqa")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "easy_vqa")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "easy_vqa.md")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    options.data, options.work = options.data.absolute(), options.work.absolute()
    if not (options.data / "blind.json").is_file():
        sys.exit(f"no data in {options.data}; do: python scripts/prepare_easy_vqa.py")
    blind = json.loads((options.data / "blind.json").read_text())
    results = [run_base(options)]
    for seed in options.seeds:
        results += [run_method(method, seed, options) for method in options.methods]
    hardware = describe_hardware()
    command = " ".join(["python", "scripts/bench_easy_vqa.py", *sys.argv[1:]])
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(page(results, blind, hardware=hardware, command=command))
    figures = {
        "hardware": hardware,
        "command": command,
        "blind": blind,
        "results": [figures_of(result) for result in results],
    }
    options.report.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(markdown_table(table_rows(results, blind)))


if __name__ == "__main__":
    main()
