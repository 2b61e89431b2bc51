"""Make the sample task beside the embedded default: a sorting rule that nobody told the base.

    python scripts/make_sample_data.py --output data/sample

Writes `train.jsonl`, `eval.jsonl`, `captions_train.jsonl`, `captions_eval.jsonl` and `images/`. In
an imagined storeroom each shape has a shelf and each colour a drawer, whose names tell nothing
about them. A caption is a picture's label with both; `captions_eval.jsonl` has one picture a label,
each with two captions, so that a caption belongs to one picture only. No picture is on both sides.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from tiny_vlm.pictures import Thing, draw_scene
from tiny_vlm.words import SHAPES

# Words the base can say, in an order that no picture suggests: only the rule is new.
PLACES = "one left two top three right four bottom".split()
DRAWER_COLORS = ["red", "green", "blue", "black", "gray", "yellow", "orange", "pink"]
SHAPE_WORDS = dict(zip(SHAPES, PLACES, strict=True))
COLOR_WORDS = dict(zip(DRAWER_COLORS, reversed(PLACES), strict=True))
QUESTIONS = {
    "shape": [
        "Which shelf is this for?",
        "On which shelf does the shape belong?",
        "Name the shelf.",
    ],
    "color": [
        "Which drawer is this for?",
        "In which drawer does the color belong?",
        "Name the drawer.",
    ],
}
WORDS = {"shape": SHAPE_WORDS, "color": COLOR_WORDS}
CAPTIONS = ("{shelf} and {drawer}", "it is {shelf}, so {drawer}")
CAPTION_PROMPT = "Write a label: shelf and drawer."


def make_sample_data(output: Path, *, num_train: int, num_eval: int, seed: int) -> None:
    """Write both files and their pictures; the same seed gives the same bytes."""
    random = Random(seed)
    things: dict[str, Thing] = {}
    images = output / "images"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    train = [_question(random, images, f"train-{i:03d}", i, things) for i in range(num_train)]
    train += [_comparison(random, images, f"train-two-{i:02d}") for i in range(12)]
    train += [
        _written(f"train-text-{i:02d}", word) for i, word in enumerate([*SHAPE_WORDS, *COLOR_WORDS])
    ]
    random.shuffle(train)
    _write(output / "train.jsonl", train)
    evaluation = [_question(random, images, f"eval-{i:03d}", i, things) for i in range(num_eval)]
    _write(output / "eval.jsonl", evaluation)
    trained = {name: thing for name, thing in things.items() if name.startswith("train-")}
    _write(output / "captions_train.jsonl", _captions(trained))
    held_out = {name: thing for name, thing in things.items() if name.startswith("eval-")}
    # The last picture of each label stands for it.
    of_label = {(thing.shape, thing.color): name for name, thing in held_out.items()}
    chosen = {name: held_out[name] for name in sorted(of_label.values())}
    _write(output / "captions_eval.jsonl", _captions(chosen))


def _captions(things: dict[str, Thing]) -> list[dict[str, Any]]:
    """Both captions of each picture, a row each."""
    rows = []
    for name, thing in things.items():
        label = {"shelf": SHAPE_WORDS[thing.shape], "drawer": COLOR_WORDS[thing.color]}
        for number, wording in enumerate(CAPTIONS):
            content = [_image(name), {"type": "text", "text": CAPTION_PROMPT}]
            turns = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": wording.format(**label)},
            ]
            rows.append({"id": f"{name}-caption-{number}", "messages": turns})
    return rows


def _question(
    random: Random, images: Path, name: str, index: int, things: dict[str, Thing]
) -> dict[str, Any]:
    """One picture, one question; shapes and colours take turns. What is seen goes to `things`."""
    kind = ("shape", "color")[index % 2]
    thing = things[name] = _picture(random, images, name)
    text = random.choice(QUESTIONS[kind])
    content = [_image(name), {"type": "text", "text": text}]
    return _conversation(name, content, WORDS[kind][getattr(thing, kind)], question_type=kind)


def _comparison(random: Random, images: Path, name: str) -> dict[str, Any]:
    first = _picture(random, images, f"{name}-a")
    second = _picture(random, images, f"{name}-b")
    text = "Name both shelves."
    content = [_image(f"{name}-a"), _image(f"{name}-b"), {"type": "text", "text": text}]
    answer = f"{SHAPE_WORDS[first.shape]} and {SHAPE_WORDS[second.shape]}"
    return _conversation(name, content, answer, question_type="two")


def _written(name: str, word: str) -> dict[str, Any]:
    place = "shelf" if word in SHAPE_WORDS else "drawer"
    answer = SHAPE_WORDS.get(word) or COLOR_WORDS[word]
    return _conversation(name, f"Which {place} is for {word}?", answer, question_type="text")


def _picture(random: Random, images: Path, name: str) -> Thing:
    scene = draw_scene(random, 1, smallest=9.0, grain_fraction=0.0)
    while scene.things[0].color not in COLOR_WORDS:
        scene = draw_scene(random, 1, smallest=9.0, grain_fraction=0.0)
    Image.fromarray(scene.pixels).save(images / f"{name}.png", optimize=True)
    return scene.things[0]


def _image(name: str) -> dict[str, str]:
    return {"type": "image", "image": f"images/{name}.png"}


def _conversation(
    name: str, content: str | list[dict[str, str]], answer: str, *, question_type: str
) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": name, "question_type": question_type, "messages": turns}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("data/sample"))
    parser.add_argument("--num-train", type=int, default=400)
    parser.add_argument("--num-eval", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    make_sample_data(
        arguments.output,
        num_train=arguments.num_train,
        num_eval=arguments.num_eval,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
