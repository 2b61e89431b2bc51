"""Rows with one question or caption: query and response, Alpaca, captions, classes, benchmarks.

    {"query": "<image>What is it?", "response": "A cat.", "images": ["a.png"],
     "history": [["Hello.", "Hello!"]], "system": "Be brief."}

Pictures of rows without `<image>` stand in front of the first query. A row with `answers` may
leave the response out: it is then for evaluation only.

    {"instruction": "<image>Name the animal.", "input": "One word.", "output": "Cat",
     "images": ["a.png"]}

The question is the instruction and, on a line of its own, the input. `history` and `system` are as
in query/response. A row with `answers` may leave the output out: it is then for evaluation only.

    {"imgname": "41699051005347.png", "query": "How many bars are there?", "label": "14"}

The picture is `image` where there is one, or else `imgname`; give its folder as `image_dir`.
`label` may be a list: the first is learned, all are compared with. A sample counts in its `type`,
or by `human_or_machine` (0: human, 1: machine).

    {"image": "cat/001.png", "label": "cat"}

The question is the entry's `prompt`, the answer the class.

    {"id": 37, "image": "000000000139.jpg", "caption": "A room with a table."}
    {"image": "000000000139.jpg", "captions": ["A room with a table.", "A living room."]}

The question is the entry's `prompt`. Of `captions` the first is learned, and all are compared with.

    {"questionId": 337, "question": "What is the date?", "image": "documents/xnbl0037_1.png",
     "docId": 279, "ucsf_document_id": "xnbl0037", "ucsf_document_page_no": "1",
     "answers": ["1/8/93"], "question_types": ["handwritten", "form"]}

Learned is the answer given most often; all are compared with. A row without `image` is of the
picture `documents/<ucsf_document_id>_<ucsf_document_page_no>.png`.

    {"image": "a.png", "text": "A red ball on the grass."}

The question is the entry's `prompt`.

    {"question_id": 458752000, "image_id": 458752, "image": "COCO_train2014_000000458752.jpg",
     "question": "What is this photo taken looking through?",
     "multiple_choice_answer": "net", "answers": [{"answer": "net", "answer_id": 1}, …],
     "question_type": "what is this", "answer_type": "other"}

Learned is `multiple_choice_answer`, or else the answer given most often; all are compared with. The
type a sample counts in is `answer_type`, or else `question_type`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data.formats.base import (
    MEDIA_KEYS,
    MediaPlaceholders,
    Row,
    build_conversation,
    media_placeholders,
    most_common,
    pictures,
)
from vlmtune.data.types import Conversation, Part, Text, Turn
from vlmtune.errors import describe
from vlmtune.recipe.data_section import DataEntry

Exchange = tuple[str, str | None]
"""A question and its answer; None: it is not answered."""


def qa_pairs_of(row: Row, *, question: str, answer: str | None) -> list[Exchange]:
    """The exchanges of the row's `history`, then the one given. Raises SampleError."""
    history = row.values.get("history")
    if history is None:
        history = []
    if not isinstance(history, list):
        raise row.error("history is not a list", got=describe(history), expected="[[question, …]]")
    earlier: list[Exchange] = []
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.error(
                f"exchange {number} of history cannot be used",
                got=f"{len(pair)} values" if isinstance(pair, list) else describe(pair),
                expected="[question, answer]",
            )
        place = f"exchange {number} of history"
        earlier.append(
            (
                row.text(pair[0], place=f"the question of {place}"),
                row.text(pair[1], place=f"the answer of {place}"),
            )
        )
    return [*earlier, (question, answer)]


def build_qa_pairs(
    row: Row,
    exchanges: Sequence[Exchange],
    *,
    media: MediaPlaceholders,
    system: str | None = None,
    id_key: str = "id",
    answers: Sequence[str] | None = None,
    question_type: str | None = None,
) -> Conversation:
    """The conversation of `exchanges`; pictures and videos go where their placeholders are, or in
    front of the first question where no question has any. Raises SampleError."""
    turns = [Turn("system", (Text(system),))] if system else []
    are_placed = any(media.has_placeholder(question) for question, _ in exchanges)
    for number, (question, answer) in enumerate(exchanges):
        in_front: list[Part] = [] if are_placed or number else list(media.in_front())
        turns.append(Turn("user", (*in_front, *media.split(question))))
        if answer is not None:
            turns.append(Turn("assistant", (Text(answer),)))
    media.check_all_taken()
    return build_conversation(
        row, turns, id_key=id_key, answers=answers, question_type=question_type
    )


def optional_text(row: Row, key: str) -> str | None:
    """The text under `key`, or None where there is none or it is null or empty."""
    value = row.values.get(key)
    return None if value is None else row.text(value, place=key) or None


def required_text(row: Row, key: str) -> str:
    """The text under `key`. Raises SampleError where there is none."""
    if row.values.get(key) is None:
        got = f"{key}: null" if key in row.values else row.keys
        raise row.error(f"there is no {key}", got=got, expected="a text")
    return row.text(row.values[key], place=key)


CAPTION_PROMPT = "Describe the picture."
CLASS_PROMPT = "What does the picture show? Answer with the name of its class."
"""Asked where the recipe's entry has no `prompt`."""


def image_qa(
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
    media = MediaPlaceholders(
        row, {"image": given, "video": []}, {"<image>": "image"} if given else {}
    )
    return build_qa_pairs(
        row,
        [(question, answer)],
        media=media,
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


QUERY_RESPONSE_KEYS = MEDIA_KEYS | {"query", "response", "history", "system"}
ALPACA_KEYS = MEDIA_KEYS | {"instruction", "input", "output", "history", "system"}


def matches_query_response(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a query and a response, or answers in its place."""
    return "query" in values and ("response" in values or "answers" in values)


def matches_alpaca(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has an instruction and an output, or answers in its place."""
    return "instruction" in values and ("output" in values or "answers" in values)


def parse_query_response(row: Row) -> Conversation:
    """The conversation of a row with `query` and `response`."""
    return _with_history(row, required_text(row, "query"), answer_key="response")


def parse_alpaca(row: Row) -> Conversation:
    """The conversation of a row with `instruction`, `input` and `output`."""
    question = required_text(row, "instruction")
    more = optional_text(row, "input")
    return _with_history(row, f"{question}\n{more}" if more else question, answer_key="output")


def _with_history(row: Row, question: str, *, answer_key: str) -> Conversation:
    has_answer = row.values.get(answer_key) is not None or not row.values.get("answers")
    answer = required_text(row, answer_key) if has_answer else None
    exchanges = qa_pairs_of(row, question=question, answer=answer)
    media = media_placeholders(row, always=True)
    return build_qa_pairs(row, exchanges, media=media, system=optional_text(row, "system"))


CHARTQA_KEYS = frozenset({"imgname", "image", "query", "label", "type", "human_or_machine"})
WRITERS = ("human", "machine")


def matches_chartqa(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a query, a label and a picture."""
    return {"query", "label"} <= values.keys() and bool({"imgname", "image"} & values.keys())


def parse_chartqa(row: Row) -> Conversation:
    """The conversation of a question of a chart."""
    labels = answers_of(row, "label")
    if not labels:
        raise row.error("there is no label", got=row.keys, expected="a text or a list of texts")
    image = row.values.get("image")
    return image_qa(
        row,
        row.values.get("imgname") if image is None else image,
        question=required_text(row, "query"),
        answer=labels[0],
        answers=labels,
        question_type=optional_text(row, "type") or _writer(row),
    )


def _writer(row: Row) -> str | None:
    value = row.values.get("human_or_machine")
    if value is None or value in WRITERS:
        return value
    if isinstance(value, bool) or value not in (0, 1):
        raise row.error(
            "human_or_machine cannot be used", got=describe(value), expected="0 (human) | 1"
        )
    return WRITERS[int(value)]


CLASS_FOLDERS_KEYS = frozenset({"image", "label"})
_ONLY_TEXTS = (".csv", ".tsv", ".tab", ".tar", ".tar.gz", ".tgz")


def matches_class_folders(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a picture and a label, and no question."""
    return {"image", "label"} <= values.keys() and not {"question", "query"} & values.keys()


def parse_class_folders(row: Row) -> Conversation:
    """The conversation of a picture and its class."""
    label = row.values.get("label")
    if _is_number(label, row.source.file.lower()):
        raise row.error(
            "the label is a number",
            got=describe(label),
            expected="the name of the class",
            do="give the name of the class, or set format: table to learn the number",
        )
    return image_qa(
        row,
        row.values.get("image"),
        question=row.entry.prompt or CLASS_PROMPT,
        answer=required_text(row, "label"),
    )


def _is_number(label: object, file: str) -> bool:
    """Whether a label is a number, or a text that is one where all numbers are texts. The names of
    folders and of a data set's classes are names, also 7."""
    if isinstance(label, (int, float)):
        return True
    return isinstance(label, str) and label.strip().isdecimal() and file.endswith(_ONLY_TEXTS)


COCO_CAPTIONS_KEYS = frozenset({"image", "image_id", "caption", "captions"})


def matches_coco_captions(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a picture and captions, or one caption under an annotation's number."""
    if "image" not in values or "question" in values:
        return False
    return "captions" in values or ("caption" in values and isinstance(values.get("id"), int))


def parse_coco_captions(row: Row) -> Conversation:
    """The conversation of a picture and what it shows."""
    # The data set's own captions often end in a space or a line break.
    captions = tuple(caption.strip() for caption in answers_of(row, "captions"))
    if not captions and "captions" in row.values:
        raise row.error("captions is empty", expected="at least one text")
    if captions and row.values.get("caption") is not None:
        raise row.error("both caption and captions are given", expected="one of them")
    return image_qa(
        row,
        row.values.get("image"),
        question=row.entry.prompt or CAPTION_PROMPT,
        answer=captions[0] if captions else required_text(row, "caption").strip(),
        answers=captions or None,
    )


DOCVQA_OWN_KEYS = frozenset({"questionId", "docId", "ucsf_document_id", "ucsf_document_page_no"})
DOCVQA_KEYS = DOCVQA_OWN_KEYS | {"question", "image", "question_types", "data_split"}


def matches_docvqa(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a question and one of this data set's own keys."""
    return "question" in values and bool(DOCVQA_OWN_KEYS & values.keys())


def parse_docvqa(row: Row) -> Conversation:
    """The conversation of a question of a page."""
    answers = answers_of(row, "answers")
    kinds = row.texts(row.values.get("question_types"), place="question_types")
    return image_qa(
        row,
        _page(row),
        question=required_text(row, "question"),
        answer=best_answer(row, answers, "answers"),
        id_key="questionId",
        answers=answers,
        question_type=", ".join(kinds) or None,
    )


def _page(row: Row) -> object:
    """The picture, or the name it has in the data set's own folder."""
    if row.values.get("image") is not None:
        return row.values["image"]
    names = [row.values.get(key) for key in ("ucsf_document_id", "ucsf_document_page_no")]
    if None in names:
        return None
    document, page = (row.written(name, place="the name of the page") for name in names)
    return f"documents/{document}_{page}.png"


IMAGE_TEXT_KEYS = frozenset({"image", "text"})


def matches_image_text(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a picture and a text, and no question."""
    return {"image", "text"} <= values.keys() and "question" not in values


def parse_image_text(row: Row) -> Conversation:
    """The conversation of a picture and what is written beside it."""
    return image_qa(
        row,
        row.values.get("image"),
        question=row.entry.prompt or CAPTION_PROMPT,
        answer=required_text(row, "text").strip(),
    )


VQAV2_KEYS = frozenset(
    {"question_id", "image_id", "image", "question", "multiple_choice_answer", "answer_type"}
)


def matches_vqav2(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a question with its number, of a numbered picture or with an agreed
    answer."""
    if not {"question", "question_id"} <= values.keys():
        return False
    return "multiple_choice_answer" in values or {"image_id", "answers"} <= values.keys()


def parse_vqav2(row: Row) -> Conversation:
    """The conversation of a question of VQAv2."""
    answers = answers_of(row, "answers")
    agreed = optional_text(row, "multiple_choice_answer")
    return image_qa(
        row,
        row.values.get("image"),
        question=required_text(row, "question"),
        answer=best_answer(row, answers, "answers") if agreed is None else agreed,
        id_key="question_id",
        answers=answers,
        question_type=optional_text(row, "answer_type"),
    )
