"""Every method on the same work: full fine-tuning, (Q)LoRA, (Q)DoRA, AdaLoRA on 16 and 4 bit.

    pip install -e ".[bench]" && python scripts/prepare_easy_vqa.py
    python scripts/bench_methods.py [--parts vqa retrieval memory] [--seeds 42 43 44] [--methods …]

    vqa        configs/easy_vqa_lora.yaml, exact match on easy-VQA's test questions
    retrieval  configs/captions_lora.yaml, R@1 of labels and pictures on data/sample
    memory     a few steps of a larger model of the same architecture with random weights

A method is a few keys over the same recipe, at the same number of steps. One run after the other:

    vlmtune train -> WORK/PART-METHOD-SEED/ -> vlmtune eval -> WORK/results/*.json
    all of them   -> docs/methods.md (the tables, printed too) and docs/methods.json (every figure)

Runs that exist with the same settings are not repeated. Parts that are not requested keep their
tables and figures in these files, with the command and the hardware that made them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from methods_page import METHODS, Result, page, short_table, tables

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data" / "sample" / "tiny-vlm"

NF4 = ("quantization_bit=4", "quantization.compute_dtype=float32")
ADALORA = (
    "rank=null",
    # Pruned to a mean of 16, the rank of the other methods.
    "adalora={initial_rank: 24, target_rank: 16, warmup: 0.1, final: 0.4, interval: 10}",
)
FULL = ("lora_target=[]", "modules_to_save=[all]", "rank=null", "alpha=null")
OVERRIDES: dict[str, tuple[str, ...]] = {
    "full": (*FULL, "train.learning_rate=1e-3"),
    "lora": (),
    "qlora": NF4,
    "dora": ("use_dora=true",),
    "qdora": (*NF4, "use_dora=true"),
    "adalora": ADALORA,
    "qadalora": (*NF4, *ADALORA),
}
assert OVERRIDES.keys() == METHODS.keys()


@dataclass(frozen=True)
class Part:
    """A task: the recipe that every method varies, for how many steps, and how its result is
    measured; `again` are options for further evaluations, by what their figures end in."""

    recipe: Path
    max_steps: int
    data: Path
    evaluation: tuple[str, ...]
    again: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


PARTS = {
    "vqa": Part(
        ROOT / "configs" / "easy_vqa_lora.yaml",
        120,
        ROOT / "data" / "easy_vqa" / "test.jsonl",
        (
            "--task",
            "vqa",
            "--metrics",
            "exact_match",
            "eval.max_new_tokens=8",
            "eval.batch_size=256",
        ),
    ),
    "retrieval": Part(
        ROOT / "configs" / "captions_lora.yaml",
        200,
        ROOT / "data" / "sample" / "captions_eval.jsonl",
        ("--task", "retrieval", "eval.scorer=likelihood", "eval.subtract_prior=false"),
        {
            "minus_prior": (
                "--task",
                "retrieval",
                "eval.scorer=likelihood",
                "eval.subtract_prior=true",
            )
        },
    ),
}


def run_method(part: str, method: str, seed: int, options: argparse.Namespace) -> Result:
    """Train and evaluate once; both are remembered."""
    train = train_method(part, method, seed, options)
    name = f"{part}-{method}-{seed}"
    evaluation = evaluate_all(part, name, str(options.work / name), {"train": train}, options)
    return Result(part, method, seed, train, evaluation)


def train_method(part: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    task = PARTS[part]
    folder = options.work / f"{part}-{method}-{seed}"
    # Evaluations and checkpoints during training would only blur its time.
    overrides = [f"output_dir={folder}", f"seed={seed}", "data.eval=null", "train.save_every=1.0"]
    overrides += OVERRIDES[method]
    overrides.append(f"train.max_steps={options.max_steps or task.max_steps}")
    settings = {"recipe": task.recipe.read_text(), "overrides": overrides}
    # `never`: a run that was interrupted starts over, so that its time is the whole run's.
    return remembered(
        options.work / "results" / f"{folder.name}.train.json",
        settings,
        lambda: vlmtune("train", str(task.recipe), *overrides, "--resume", "never"),
    )


def run_base(part: str, options: argparse.Namespace) -> Result:
    model = {"model": str(MODEL)}
    evaluation = evaluate_all(part, f"{part}-base", str(MODEL), model, options)
    return Result(part, "base", None, {}, evaluation)


def evaluate_all(
    part: str, name: str, target: str, of: Mapping[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Every evaluation of the part, each remembered: the first, with the figures of the others."""
    task, evaluation = PARTS[part], dict[str, Any]()
    for suffix, arguments in {"": task.evaluation, **task.again}.items():
        kept = options.work / "results" / "-".join(filter(None, (name, suffix)))
        made = remembered(
            kept.with_name(f"{kept.name}.eval.json"),
            {**of, "evaluation": [*arguments, options.max_samples]},
            partial(evaluate, target, task.data, arguments, kept, options),
        )
        if not suffix:
            evaluation = dict(made)
            continue
        again = {f"{figure}_{suffix}": value for figure, value in made["metrics"].items()}
        evaluation["metrics"] = {**evaluation["metrics"], **again}
    return evaluation


def evaluate(
    target: str, data: Path, how: Sequence[str], output: Path, options: argparse.Namespace
) -> dict[str, Any]:
    arguments = ["--data", str(data), *how, "--output", str(output)]
    if options.max_samples is not None:
        arguments += ["--max-samples", str(options.max_samples)]
    return vlmtune("eval", target, *arguments)


def run_memory(method: str, options: argparse.Namespace) -> Result:
    """A few steps of the larger model: its peak memory, and the speed of a step."""
    model = options.work / "large"
    if not (model / "config.json").is_file():
        make_large_model(model)
    recipe = PARTS["retrieval"].recipe
    overrides = [
        f"model={model}",
        f"output_dir={options.work / f'memory-{method}'}",
        "data.eval=null",
        "train.max_steps=4",
        "train.batch_size=16",
        "train.micro_batch_tokens=512",
        "train.gradient_checkpointing=true",
        "train.save_every=1.0",
        *OVERRIDES[method],
        f"train.precision={options.memory_precision}",
    ]
    settings = {"recipe": recipe.read_text(), "overrides": overrides}
    train = remembered(
        options.work / "results" / f"memory-{method}.train.json",
        settings,
        lambda: vlmtune("train", str(recipe), *overrides, "--resume", "never"),
    )
    return Result("memory", method, None, train, {})


def make_large_model(folder: Path) -> None:
    """The embedded default's architecture and processor with a language part of 24 layers, 768
    wide: random weights, bfloat16. Nothing is measured on it but memory and speed."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(MODEL)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 768, 3072, 24
    text.num_attention_heads, text.num_key_value_heads = 16, 4
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    config.vision_config.out_hidden_size = text.hidden_size
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(MODEL).save_pretrained(folder)


def baseline_memory() -> int:
    """Resident bytes of a process that has only imported what a training imports."""
    code = (
        "import resource, torch, peft, bitsandbytes, vlmtune.train.build;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def describe_hardware() -> str:
    """CPU name, cores and memory of this machine, and the library versions that set the speed."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return (
        f"{cpu}, {os.cpu_count()} cores ({threads} thread(s) a run), {memory:.0f} GB of memory, "
        f"no GPU used; {versions}"
    )


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


def remembered(
    path: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result kept in `path` if made with the same settings; otherwise `make()`, kept."""
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["settings"] == settings:
            print(f"already there: {path}", file=sys.stderr)
            return dict(kept["result"])
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "result": result}, indent=1) + "\n")
    return result


def run_all(options: argparse.Namespace) -> list[Result]:
    results: list[Result] = []
    for part in options.parts:
        if part == "memory":
            results += [run_memory(method, options) for method in options.methods]
            continue
        results.append(run_base(part, options))
        for seed in options.seeds:
            results += [run_method(part, method, seed, options) for method in options.methods]
    return results


def kept_results(report: Path, parts: Sequence[str]) -> tuple[list[Result], dict[str, Any]]:
    """The results and the rest of what the report holds of other parts than `parts`."""
    file = report.with_suffix(".json")
    if not file.is_file():
        return [], {"made": {}}
    about = json.loads(file.read_text())
    results = [Result(**figures) for figures in about.pop("results")]
    about["made"] = {name: made for name, made in about["made"].items() if name not in parts}
    return [result for result in results if result.part not in parts], about


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = (*PARTS, "memory")
    parser.add_argument("--parts", nargs="+", choices=known, default=list(known))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--max-steps", type=int, help="instead of each part's own number")
    parser.add_argument("--max-samples", type=int, help="only the first so many test rows")
    parser.add_argument("--memory-precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "methods.md")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    options.work = options.work.absolute()
    blind_file = ROOT / "data" / "easy_vqa" / "blind.json"
    if "vqa" in options.parts and not blind_file.is_file():
        sys.exit(f"no data in {blind_file.parent}; do: python scripts/prepare_easy_vqa.py")
    results = run_all(options)
    kept, about = kept_results(options.report, options.parts)
    results = sorted([*results, *kept], key=lambda result: [*PARTS, "memory"].index(result.part))
    made = {
        "hardware": describe_hardware(),
        "command": " ".join(["python", "scripts/bench_methods.py", *sys.argv[1:]]),
    }
    about["made"] |= dict.fromkeys(options.parts, made)
    if "vqa" in options.parts:
        about["blind"] = json.loads(blind_file.read_text())
    if "memory" in options.parts:
        about["baseline_memory_bytes"] = baseline_memory()
    options.report.write_text(page(results, about))
    figures = about | {"results": [result.figures() for result in results]}
    options.report.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(tables(results, about))
    print(f"\nThe README's table:\n\n{short_table(results)}")


if __name__ == "__main__":
    main()
