"""Turn the `easy-vqa` package (Zhou 2019, MIT) into JSONL and pictures.

    pip install easy-vqa
    python scripts/prepare_easy_vqa.py [--output data/easy_vqa] [--limit N]

    OUTPUT/train.jsonl  OUTPUT/test.jsonl     one question per conversation, with question_type
    OUTPUT/images/train/0.png …               the package's pictures, 64 x 64

Also prints how many questions there are, and how often a guesser is right that never looks at the
picture: it gives each question's text its most frequent answer in training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHAPES = frozenset({"circle", "rectangle", "triangle"})
KINDS = ("yes/no", "shape", "color")


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    picture: int

    @property
    def kind(self) -> str:
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "shape" if self.answer in SHAPES else "color"


def read_split(split: str) -> tuple[list[Question], dict[int, Path]]:
    """The package's questions and pictures of `train` or `test`."""
    try:
        import easy_vqa
    except ImportError:
        sys.exit("the package easy-vqa is not installed; do: pip install easy-vqa")
    questions, pictures = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }[split]
    paths = {number: Path(path) for number, path in pictures().items()}
    return [Question(*row) for row in zip(*questions())], paths


def write_split(
    split: str, questions: Sequence[Question], pictures: dict[int, Path], output: Path
) -> None:
    folder = output / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    for number in sorted({question.picture for question in questions}):
        shutil.copyfile(pictures[number], folder / f"{number}.png")
    with (output / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for index, question in enumerate(questions):
            file.write(json.dumps(conversation_row(split, index, question)) + "\n")


def conversation_row(split: str, index: int, question: Question) -> dict[str, object]:
    picture = {"type": "image", "image": f"images/{split}/{question.picture}.png"}
    text = {"type": "text", "text": question.text}
    return {
        "id": f"{split}-{index:05d}",
        "question_type": question.kind,
        "messages": [
            {"role": "user", "content": [picture, text]},
            {"role": "assistant", "content": question.answer},
        ],
    }


def blind_scores(train: Iterable[Question], test: Sequence[Question]) -> dict[str, float]:
    """Exact match on `test` of each question text's majority answer in `train`, per kind and in
    `total`; a text never seen gets the majority answer of all."""
    of_text: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question in train:
        of_text[question.text][question.answer] += 1
        overall[question.answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for question in test:
        guess = of_text.get(question.text, overall).most_common(1)[0][0]
        right[question.kind].append(guess == question.answer)
        right["total"].append(guess == question.answer)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("data/easy_vqa"))
    parser.add_argument("--limit", type=int, help="only the first so many questions of a split")
    options = parser.parse_args()
    splits = {}
    for split in ("train", "test"):
        questions, pictures = read_split(split)
        splits[split] = questions[: options.limit]
        write_split(split, splits[split], pictures, options.output)
        kinds = Counter(question.kind for question in splits[split])
        counts = ", ".join(f"{kind} {kinds[kind]}" for kind in KINDS)
        num_pictures = len({question.picture for question in splits[split]})
        print(f"{split}: {len(splits[split])} questions on {num_pictures} pictures ({counts})")
    scores = blind_scores(splits["train"], splits["test"])
    (options.output / "blind.json").write_text(json.dumps(scores, indent=1) + "\n")
    shares = ", ".join(f"{kind} {100 * scores.get(kind, 0):.1f} %" for kind in ("total", *KINDS))
    print(f"blind guesser on test: {shares}")


if __name__ == "__main__":
    main()
