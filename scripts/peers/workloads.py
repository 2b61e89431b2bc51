"""The rows and pictures that every tool trains on, drawn from a seed.

workload + seed -> rows (pictures, question, answer) -> pictures/*.jpg, *.png
                -> rows.jsonl       vlmtune and the scripts of the plain trainer and TRL
                -> sharegpt.json    LLaMA-Factory, with its dataset_info.json
                -> swift.jsonl      ms-swift
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import PIL.Image

from peers.words import write_text

MAX_PICTURES = 1024
"""Files drawn for one workload at most; beyond, rows take them again."""


@dataclass(frozen=True)
class Workload:
    """`answers`: tokens of an answer; `sides`: of a picture, in pixels; `shared_by`: rows that ask
    about the same picture; each from the first to the second number."""

    name: str
    title: str
    answers: tuple[int, int]
    sides: tuple[int, int] = (100, 500)
    text_only_fraction: float = 0.0
    shared_by: tuple[int, int] = (1, 1)
    pictures_per_row: int = 1


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("short", "(a) short answers on many pictures", (1, 5)),
        Workload("long", "(b) long answers", (100, 400)),
        Workload("mixed", "(c) mixed, a third text only", (5, 200), text_only_fraction=1 / 3),
        Workload("repeated", "(d) several questions a picture", (5, 40), shared_by=(4, 8)),
    )
}


@dataclass(frozen=True)
class Row:
    """One question; `images` are paths relative to the workload's folder."""

    id: str
    images: tuple[str, ...]
    question: str
    answer: str


def write_workload(
    folder: Path,
    workload: Workload,
    *,
    num_rows: int,
    lexicon: Sequence[str],
    count: Callable[[str], int],
    seed: int,
) -> tuple[Row, ...]:
    """Draw rows and pictures and write them in each tool's format; `count` gives a text's number of
    tokens. Files that are there of the same workload, number of rows and seed are kept."""
    record = folder / "made.json"
    made = json.loads(json.dumps({"workload": asdict(workload), "rows": num_rows, "seed": seed}))
    rows = draw_rows(workload, num_rows=num_rows, lexicon=lexicon, count=count, seed=seed)
    if record.is_file() and json.loads(record.read_text()) == made:
        return tuple(rows)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name in sorted({name for row in rows for name in row.images}):
        picture = draw_picture(random.Random(f"{seed}-{name}"), workload.sides)
        picture.save(folder / name, quality=90)
    write_lines(folder / "rows.jsonl", [as_messages(row) for row in rows])
    marked = [as_marked(row, folder) for row in rows]
    write_lines(folder / "swift.jsonl", marked)
    (folder / "sharegpt.json").write_text(json.dumps(marked))
    (folder / "dataset_info.json").write_text(json.dumps({"bench": SHAREGPT}))
    record.write_text(json.dumps(made))
    return tuple(rows)


def draw_rows(
    workload: Workload,
    *,
    num_rows: int,
    lexicon: Sequence[str],
    count: Callable[[str], int],
    seed: int,
) -> list[Row]:
    """The rows of a workload: the first ones are the same whatever `num_rows` is."""
    rng = random.Random(f"{workload.name}-{seed}")
    rows: list[Row] = []
    next_picture = 0
    while len(rows) < num_rows:
        images: tuple[str, ...] = ()
        asked = rng.randint(*workload.shared_by)
        if rng.random() >= workload.text_only_fraction:
            numbers = range(next_picture, next_picture + workload.pictures_per_row)
            images = tuple(picture_name(n % MAX_PICTURES) for n in numbers)
            next_picture += workload.pictures_per_row
        for _ in range(asked):
            question = write_text(rng, lexicon, rng.randint(5, 20), count) + "?"
            answer = write_text(rng, lexicon, rng.randint(*workload.answers), count)
            rows.append(Row(f"row-{len(rows):06}", images, question, answer))
    return rows[:num_rows]


def picture_name(number: int) -> str:
    """Photographs are JPEG, screenshots PNG: half of each."""
    return f"pictures/{number:05}.{'jpg' if number % 2 else 'png'}"


def draw_picture(rng: random.Random, sides: tuple[int, int]) -> PIL.Image.Image:
    """A textured picture: soft blotches of colour, some rectangles, and fine noise."""
    width, height = rng.randint(*sides), rng.randint(*sides)
    noise = numpy.random.default_rng(rng.getrandbits(32))
    coarse = PIL.Image.fromarray(noise.integers(0, 256, (6, 6, 3), dtype=numpy.uint8))
    pixels = numpy.asarray(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC))
    grain = noise.integers(-12, 13, (height, width, 3))
    values = pixels.astype(numpy.int16) + grain
    for _ in range(8):
        left, top = rng.randrange(width), rng.randrange(height)
        right, bottom = left + rng.randint(5, width // 2), top + rng.randint(5, height // 2)
        values[top:bottom, left:right] = values[top:bottom, left:right] // 2 + rng.randrange(128)
    return PIL.Image.fromarray(values.clip(0, 255).astype(numpy.uint8))


def as_messages(row: Row) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "image", "image": name} for name in row.images]
    content.append({"type": "text", "text": row.question})
    return {
        "id": row.id,
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": row.answer},
        ],
    }


SHAREGPT = {
    "file_name": "sharegpt.json",
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    },
}


def as_marked(row: Row, folder: Path) -> dict[str, Any]:
    """The form of LLaMA-Factory and ms-swift, where `<image>` marks a picture's place."""
    return {
        "messages": [
            {"role": "user", "content": "<image>" * len(row.images) + row.question},
            {"role": "assistant", "content": row.answer},
        ],
        "images": [str((folder / name).absolute()) for name in row.images],
    }


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
