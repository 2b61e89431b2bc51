"""Opening and feeding data of a thousand to a million rows: time, speed and memory.

    OMP_NUM_THREADS=1 python scripts/bench_data.py [--rows 1000 10000 100000 1000000] [--steps 40]

Each size runs in a process of its own, on a file made for it (a question about one of the sample's
pictures, every tenth row without one):

    open, first    the index is made          open, again    the index is there
    samples/s      of encoded steps, one after the other, from random places of the file
    memory         resident set when the feed stands, and its growth over the steps

The last rows feed the same file by other ways: front to back, with workers, from the disk cache.
Prints ratios to the smallest size; memory and speed are flat where they are near 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--steps", type=int, default=40, help=f"steps of {BATCH} samples")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(**arguments.one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print_table(Path(folder), arguments.rows, arguments.steps)


def print_table(folder: Path, sizes: list[int], steps: int) -> None:
    head = f"{'rows':>9}  {'way':<16} {'open, first':>11} {'open, again':>11} {'samples/s':>10}"
    print(f"{head} {'memory':>9} {'growth':>8}")
    ways: list[tuple[int, str]] = [(rows, "indexed") for rows in sizes]
    ways += [(sizes[-1], way) for way in ("streaming", "2 workers", "cache, first", "cache, again")]
    first: dict[str, Any] = {}
    for rows, way in ways:
        path = folder / f"{rows}.jsonl"
        if not path.exists():
            write_rows(path, rows)
        found = run({"path": str(path), "way": way, "steps": steps, "cache": str(folder / "cache")})
        first = first or found
        print(
            f"{rows:>9,}  {way:<16} {found['first']:>9.2f} s {found['again']:>9.2f} s "
            f"{found['speed']:>10.1f} {found['memory'] / 2**20:>6.0f} MB "
            f"{found['growth'] / 2**20:>5.0f} MB   "
            f"x {found['speed'] / first['speed']:.2f} speed, "
            f"x {found['memory'] / first['memory']:.2f} memory",
            flush=True,
        )


def write_rows(path: Path, rows: int) -> None:
    pictures = [str(SAMPLE / "images" / p.name) for p in sorted((SAMPLE / "images").iterdir())]
    with path.open("w") as file:
        for number in range(rows):
            question: list[dict[str, str]] = [{"type": "text", "text": f"What is it, {number}?"}]
            if number % 10:
                question.insert(0, {"type": "image", "image": pictures[number % len(pictures)]})
            row = {
                "id": f"row-{number}",
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": f"the red circle {number % 97}"},
                ],
            }
            file.write(json.dumps(row) + "\n")


def run(task: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(task)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)


def measure(path: str, way: str, steps: int, cache: str) -> dict[str, float]:
    """One way of feeding one file."""
    logging.getLogger("vlmtune").setLevel(logging.WARNING)
    recipe = write_recipe(Path(path), way, Path(cache))
    first = open_seconds(recipe)
    again = open_seconds(recipe)
    feed = steps_of(recipe, 4 + steps)
    for _ in range(4):  # the pictures' files and the tokenizer are warm
        next(feed)
    before, started = resident_bytes(), time.perf_counter()
    num_samples = sum(next(feed).num_step_samples for _ in range(steps))
    seconds = time.perf_counter() - started
    memory = resident_bytes()
    return {
        "first": first,
        "again": again,
        "speed": num_samples / seconds,
        "memory": memory,
        "growth": memory - before,
    }


def write_recipe(path: Path, way: str, cache: Path) -> Path:
    lines = [
        f"model: {SAMPLE / 'tiny-vlm'}",
        f"output_dir: {path.parent / 'run'}",
        "data:",
        f"  train: {path}",
        "  max_tokens: 256",
        "  allow_outside_paths: true",
        f"  cache_dir: {cache}",
        f"  num_workers: {2 if way == '2 workers' else 0}",
        f"  streaming: {str(way == 'streaming').lower()}",
        f"  cache: {'disk' if way.startswith('cache') else 'off'}",
        f"train: {{max_steps: 1000, batch_size: {BATCH}, precision: fp32}}",
    ]
    recipe = path.with_suffix(".yaml")
    recipe.write_text("\n".join(lines) + "\n")
    return recipe


def open_seconds(recipe: Path) -> float:
    from vlmtune.recipe.load import load_recipe
    from vlmtune.train.build import open_training_data

    loaded = load_recipe(recipe).recipe
    started = time.perf_counter()
    open_training_data(loaded)
    return time.perf_counter() - started


def steps_of(recipe_file: Path, num_steps: int) -> Iterator[Any]:
    """The training steps of the recipe, as the loop gets them."""
    from vlmtune.models.load import load_vlm
    from vlmtune.recipe.load import load_recipe
    from vlmtune.train import build
    from vlmtune.train.runtime import build_accelerator

    recipe = load_recipe(recipe_file).recipe
    vlm = load_vlm(recipe.model)
    make_steps = build.build_steps(
        recipe,
        data=build.open_training_data(recipe)[0],
        encoder=build.build_encoder(recipe, vlm),
        vlm=vlm,
        accelerator=build_accelerator(recipe.train.precision),
        start=None,
    )
    return make_steps(1, num_steps)


def resident_bytes() -> int:
    """This process and its workers."""
    me = psutil.Process()
    return sum(process.memory_info().rss for process in (me, *me.children(recursive=True)))


if __name__ == "__main__":
    main()
