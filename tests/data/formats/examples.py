"""Three rows of each format, as its own data has them, and how a test reads one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmtune.data.formats.base import Row
from vlmtune.data.formats.registry import parse_row
from vlmtune.data.types import Conversation, Source
from vlmtune.recipe.data_section import DataEntry, FormatName

FOLDER = Path("/data")


def row_of(values: dict[str, Any], **entry: Any) -> Row:
    """A row as line 7 of a file; `entry`: what the recipe says beside the path."""
    return Row(
        values=values,
        source=Source("rows.jsonl", 7),
        base_dir=FOLDER,
        fallback_id="rows:7",
        entry=DataEntry(path="rows.jsonl", **entry),
    )


def read(name: FormatName, values: dict[str, Any], **entry: Any) -> Conversation:
    return parse_row(row_of(values, **entry), name)


def said(conversation: Conversation) -> list[tuple[str, str]]:
    """Role and text of each turn, with `[ref]` for a picture or a video."""
    return [
        (
            turn.role,
            "".join(p.text if hasattr(p, "text") else f"[{p.ref}]" for p in turn.parts),
        )
        for turn in conversation.turns
    ]


USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Yo"}
PERSON = {"from": "human", "value": "Hi"}
MODEL = {"from": "gpt", "value": "Yo"}


def _image_url(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def _asked(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ASSISTANT]}


def _vqa(number: int, **keys: Any) -> dict[str, Any]:
    return {
        "question_id": number,
        "image_id": 9,
        "image": "COCO_val2014_000000000009.jpg",
        "question": "Is it red?",
        "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(("no", "yes", "no"))],
        "multiple_choice_answer": "yes",
        "question_type": "is it",
        "answer_type": "yes/no",
        **keys,
    }


def _page(number: int, **keys: Any) -> dict[str, Any]:
    return {
        "questionId": number,
        "question": "What is the date?",
        "image": "documents/xnbl0037_1.png",
        "docId": 279,
        "ucsf_document_id": "xnbl0037",
        "ucsf_document_page_no": "1",
        "answers": ["1/8/93"],
        "data_split": "train",
        **keys,
    }


ROWS: dict[FormatName, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [USER, ASSISTANT]},
        _asked({"type": "image", "image": "a.png"}, {"type": "text", "text": "Hi"}),
        {"messages": [USER, {**ASSISTANT, "train": False}, USER, ASSISTANT]},
    ],
    "openai": [
        _asked({"type": "text", "text": "Hi"}, _image_url({"url": "a.png", "detail": "low"})),
        _asked(_image_url("a.png")),
        {"messages": [USER, ASSISTANT]},
    ],
    "sharegpt": [
        {"conversations": [PERSON, MODEL]},
        {"conversations": [{**PERSON, "value": "<image>\nHi"}, MODEL], "image": "a.png"},
        {"conversations": [{"from": "system", "value": "S"}, PERSON, MODEL]},
    ],
    "query_response": [
        {"query": "Hi", "response": "Yo"},
        {"query": "<image>Hi", "response": "Yo", "images": ["a.png"]},
        {"query": "Hi", "response": "Yo", "history": [["A?", "B."]], "system": "S"},
    ],
    "alpaca": [
        {"instruction": "Do it.", "input": "", "output": "Done."},
        {"instruction": "Do it.", "input": "Now.", "output": "Done."},
        {"instruction": "<image>Name it.", "output": "Cat", "images": ["a.png"]},
    ],
    "table": [
        {"image_path": "a.png", "caption": "A cat."},
        {"image_path": "b.png", "caption": "A dog."},
        {"image_path": "c.png", "caption": "A hen."},
    ],
    "coco_captions": [
        {"id": 37, "image": "000000000139.jpg", "caption": "A room. "},
        {"id": 38, "image": "000000000139.jpg", "caption": "A table."},
        {"id": 39, "image": "000000000140.jpg", "caption": "A dog."},
    ],
    "vqav2": [_vqa(1), _vqa(2, multiple_choice_answer=None), _vqa(3, answers=["no"] * 10)],
    "docvqa": [
        _page(1, question_types=["form", "layout"]),
        _page(2, answers=["one", "1", "1"]),
        _page(3, answers=["one"], question_types=None),
    ],
    "chartqa": [
        {"imgname": "1.png", "query": "How many?", "label": "14"},
        {"imgname": "2.png", "query": "How many?", "label": 14, "type": "augmented"},
        {"image": "3.png", "query": "How many?", "label": ["14"], "human_or_machine": 0},
    ],
    "image_text": [
        {"image": "a.png", "text": "A cat.\n"},
        {"image": "b.png", "text": "A dog."},
        {"image": "c.png", "text": "A hen."},
    ],
    "class_folders": [
        {"image": "cat/1.png", "label": "cat"},
        {"image": "cat/2.png", "label": "cat"},
        {"image": "dog/1.png", "label": "dog"},
    ],
}
