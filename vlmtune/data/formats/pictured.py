"""What the formats of one picture and one question share: captions, classes, benchmark rows."""

from __future__ import annotations

from collections.abc import Sequence

from vlmtune.data.formats.beside import MediaBeside, pictures
from vlmtune.data.formats.exchanges import build_exchanges
from vlmtune.data.formats.rows import Row, most_common
from vlmtune.data.text import describe
from vlmtune.data.types import Conversation

CAPTION_PROMPT = "Describe the picture."
CLASS_PROMPT = "What does the picture show? Answer with the name of its class."
"""Asked where the recipe's entry has no `prompt`."""


def asked_of_pictures(
    row: Row,
    images: object,
    *,
    question: str,
    answer: str | None,
    must_have_picture: bool = True,
    id_key: str = "id",
    answers: Sequence[str] | None = None,
    question_type: str | None = None,
) -> Conversation:
    """One question of the pictures in the value `images`, and its answer where there is one.

    The pictures stand in front of the question, or where `<image>` is in it. Raises SampleError.
    """
    given = [] if images == "" else pictures(images, row)
    if must_have_picture and not given:
        raise row.error("there is no picture", got=row.keys, expected="image")
    beside = MediaBeside(row, {"image": given, "video": []}, {"<image>": "image"} if given else {})
    return build_exchanges(
        row,
        [(question, answer)],
        beside=beside,
        id_key=id_key,
        answers=answers,
        question_type=question_type,
    )


def answers_of(row: Row, key: str) -> tuple[str, ...]:
    """The texts under `key`: one, a list, a list of `{"answer": …}`, or lists of columns
    `{"answer": […]}`, as `datasets` has them; numbers as text. Raises SampleError."""
    value = row.values.get(key)
    if isinstance(value, dict) and isinstance(value.get("answer"), list):
        value = value["answer"]
    given = value if isinstance(value, list) else [] if value is None else [value]
    texts = []
    for number, item in enumerate(given, start=1):
        if isinstance(item, dict):
            if "answer" not in item:
                raise row.error(
                    f"text {number} of {key} has no answer",
                    got=describe(item),
                    expected='a text or {"answer": …}',
                )
            item = item["answer"]
        texts.append(row.written(item, place=f"text {number} of {key}"))
    return tuple(texts)


def best_answer(row: Row, answers: Sequence[str], key: str) -> str:
    """The answer to learn: the one given most often. Raises SampleError where there is none."""
    if not answers:
        raise row.error(
            f"there is no text in {key}",
            got=describe(row.values.get(key)) if key in row.values else row.keys,
            expected="an answer to learn or to compare with",
        )
    return most_common(answers)
