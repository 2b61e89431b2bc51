"""vlmtune beside the tools that one would use instead, on the same work.

    pip install -e ".[bench]"
    python scripts/bench_peers.py              every tool, four workloads, three rounds
    python scripts/bench_peers.py --quick      a few steps of everything, on a tiny model
    python scripts/bench_peers.py --ablate     vlmtune without each of its tricks
    python scripts/bench_peers.py --growth     longer, more and many-picture samples

Tools: a plain transformers Trainer with PEFT, vlmtune, TRL, LLaMA-Factory, ms-swift, each in an
environment of its own (`--venvs`, made at the first run: torch once for all of them, 5.5 GB, and
0.2 to 1.2 GB for each). Same model (Qwen2.5-VL's architecture, 63 million random weights), rows,
seed, LoRA, bf16, threads and samples a step.

    model, rows -> probe of each tool: same tokens and labels? -> rounds, tools in alternation
                -> medians and ratios on stdout, everything in --output, drawings in --plots

A tool that cannot be installed or run is a row that says how it failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_methods import describe_hardware
from peers import plots, results
from peers.bench import Bench, Prepared
from peers.case import BATCH_SIZE
from peers.model import SIZES
from peers.results import Key, Outcome
from peers.studies import ABLATIONS, GROWTH
from peers.tools import BASELINE, TOOLS
from peers.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTING = {"on": (True,), "off": (False,), "both": (True, False)}


def main() -> None:
    options = parse_arguments()
    bench = Bench(options)
    titles = {name: workload.title for name, workload in WORKLOADS.items()}
    about: dict[str, Any] = {
        "hardware": describe_hardware(),
        "command": " ".join(["python", "scripts/bench_peers.py", *sys.argv[1:]]),
        "parameters": bench.num_parameters,
        "peer_batch": options.peer_batch,
        "rows": options.rows,
        "epochs": options.epochs,
    }
    if options.growth:
        found = run_growth(bench, options)
        drawings = growth_plots(found)
        print(growth_table(found))
    else:
        prepared = [bench.prepare(WORKLOADS[name], options.rows) for name in options.workloads]
        about["micro_batch_tokens"] = {p.workload.name: bench.tokens(p) for p in prepared}
        found = run_ablation(bench, prepared) if options.ablate else run_tools(bench, prepared)
        drawings = tool_plots(bench.outcomes(), titles)
        print(results.table(bench.outcomes(), titles))
    about |= {"environments": bench.versions()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(about | found, indent=1) + "\n")
    if options.plots is not None:
        plots.write(options.plots, drawings)


def run_tools(bench: Bench, prepared: Sequence[Prepared]) -> dict[str, Any]:
    """The probes, then the rounds: workload by workload, tool after tool."""
    options = bench.options
    seen = []
    for work in prepared if options.probes else ():
        seen += [bench.probe(tool, work) for tool in options.tools if tool != "vlmtune"]
    for number in range(options.rounds):
        for work in prepared:
            for checkpointing in CHECKPOINTING[options.checkpointing]:
                for tool in options.tools:
                    key = Key(work.workload.name, checkpointing, tool)
                    bench.run(key, work, number=number)
    return {"agreement": seen, "outcomes": [outcome.as_dict() for outcome in bench.outcomes()]}


def run_ablation(bench: Bench, prepared: Sequence[Prepared]) -> dict[str, Any]:
    options = bench.options
    for number in range(options.rounds):
        for work in prepared:
            for checkpointing in CHECKPOINTING[options.checkpointing]:
                for name, overrides in ABLATIONS.items():
                    key = Key(work.workload.name, checkpointing, "vlmtune", name)
                    bench.run(key, work, number=number, overrides=overrides)
    return {"outcomes": [outcome.as_dict() for outcome in bench.outcomes()]}


def run_growth(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """A few steps at each point of each curve, for the plain trainer and vlmtune; no picture comes
    twice, so that no cache of features helps."""
    points = []
    for point in GROWTH:
        num_rows = BATCH_SIZE * options.growth_steps
        if point.axis == "rows":
            num_rows = options.rows * point.factor
        work = bench.prepare(point.workload, num_rows)
        for checkpointing in CHECKPOINTING[options.checkpointing]:
            for tool in (BASELINE, "vlmtune"):
                key = Key(point.workload.name, checkpointing, tool)
                for number in range(options.rounds):
                    bench.run(key, work, number=number, max_steps=options.growth_steps)
                outcome = bench.outcome(key)
                points.append(
                    outcome.as_dict()
                    | {"axis": point.axis, "factor": point.factor, "rows": len(work.rows)}
                    | {"tokens_per_step": work.tokens_per_step}
                )
    return {"growth": points}


def growth_table(found: dict[str, Any]) -> str:
    head = "| what grows | x | tool | tokens a step | s / step | ms / 1,000 tokens | peak MB |"
    lines = [head, results.rule(head)]
    for point in found["growth"]:
        start = f"| {point['axis']} | {point['factor']} | {point['tool']}"
        if point["checkpointing"]:
            start += ", checkpointing"
        figures, tokens = point["median"], point["tokens_per_step"]
        if figures is None:
            lines.append(f"{start} | {tokens:.0f} | failed: {point['errors'][0]} | | |")
            continue
        seconds = figures["step_seconds"]
        lines.append(
            f"{start} | {tokens:.0f} | {seconds:.2f} | {1e6 * seconds / tokens:.0f} "
            f"| {figures['peak_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def tool_plots(outcomes: Sequence[Outcome], titles: dict[str, str]) -> dict[str, str]:
    """Bars of samples a second and of peak memory, relative to the plain trainer's or, where it
    was not run, to the first that was."""
    drawings = {}
    for state in results.unique(outcome.key.checkpointing for outcome in outcomes):
        speed: dict[str, dict[str, float]] = {}
        memory: dict[str, dict[str, float]] = {}
        for workload in results.unique(outcome.key.workload for outcome in outcomes):
            ran = [
                (o.key, results.medians(o.rounds))
                for o in outcomes
                if o.rounds and o.key.group == (workload, state)
            ]
            if not ran:
                continue
            base = next((figures for key, figures in ran if key.tool == BASELINE), ran[0][1])
            names = [key.variant or key.tool for key, _ in ran]
            rates = [figures.samples_per_second / base.samples_per_second for _, figures in ran]
            peaks = [figures.peak_bytes / base.peak_bytes for _, figures in ran]
            speed[titles[workload]] = dict(zip(names, rates))
            memory[titles[workload]] = dict(zip(names, peaks))
        word = "on" if state else "off"
        drawings[f"speed-checkpointing-{word}"] = plots.bars(
            f"Samples a second, relative; checkpointing {word}", speed
        )
        drawings[f"memory-checkpointing-{word}"] = plots.bars(
            f"Peak resident memory, relative; checkpointing {word}", memory
        )
    return drawings


def growth_plots(found: dict[str, Any]) -> dict[str, str]:
    """For each axis and state of checkpointing: seconds a step and peak memory."""
    drawings = {}
    ran = [point for point in found["growth"] if point["median"] is not None]
    for axis, state in results.unique((p["axis"], p["checkpointing"]) for p in ran):
        chosen = [p for p in ran if (p["axis"], p["checkpointing"]) == (axis, state)]
        x, x_name = ("rows", "rows") if axis == "rows" else ("tokens_per_step", "tokens a step")
        for figure, scale, y_name in (
            ("step_seconds", 1.0, "seconds a step"),
            ("peak_bytes", 1e-6, "peak resident MB"),
        ):
            series: dict[str, list[tuple[float, float]]] = {}
            for point in chosen:
                place = (float(point[x]), scale * point["median"][figure])
                series.setdefault(point["tool"], []).append(place)
            word = "on" if state else "off"
            drawings[f"growth-{axis}-{figure}-checkpointing-{word}"] = plots.lines(
                f"{y_name} as {axis} grow; checkpointing {word}", series, x=x_name, y=y_name
            )
    return drawings


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="both")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-steps", type=int, help="instead of epochs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--peer-batch", type=int, choices=(1, 2, 4, 8), default=4)
    parser.add_argument(
        "--tokens", type=int, help="vlmtune's micro-batch; else what --peer-batch padded rows hold"
    )
    parser.add_argument("--workers", type=int, default=0, help="of every tool's data loader")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=SIZES, default="62m", help="of the model")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--growth-steps", type=int, default=8)
    parser.add_argument("--no-probes", dest="probes", action="store_false")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "peers")
    parser.add_argument("--venvs", type=Path, help="else WORK/venvs")
    parser.add_argument("--output", type=Path, help="else WORK/results.json")
    parser.add_argument("--plots", type=Path)
    parser.add_argument(
        "--resume", action="store_true", help="take what the same command has run before"
    )
    parser.add_argument("--quick", action="store_true", help="see that everything runs")
    options = parser.parse_args(arguments)
    options.work = options.work.absolute()
    options.venvs = (options.venvs or options.work / "venvs").absolute()
    options.output = options.output or options.work / "results.json"
    if options.quick:
        options.size, options.rows, options.rounds = "tiny", 24, 1
        options.max_steps, options.warm_up, options.growth_steps = 3, 1, 3
    return options


if __name__ == "__main__":
    main()
