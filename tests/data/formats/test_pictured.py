"""Captions, classes and the question data sets: one picture, one question."""

from __future__ import annotations

import pytest

from tests.data.formats.examples import FOLDER, ROWS, read, said
from vlmtune.data.formats.flat import CAPTION_PROMPT, CLASS_PROMPT
from vlmtune.data.types import Image
from vlmtune.errors import SampleError


def test_a_cocos_caption_answers_the_prompt_without_the_space_at_its_end():
    conversation = read("coco_captions", ROWS["coco_captions"][0])
    assert conversation.id == "37"
    assert said(conversation) == [
        ("user", f"[000000000139.jpg]{CAPTION_PROMPT}"),
        ("assistant", "A room."),
    ]


def test_of_several_captions_the_first_is_learned_and_all_are_compared_with():
    row = {"image": "a.jpg", "captions": ["A room.\n", "A table."]}
    conversation = read("coco_captions", row, prompt="What?")
    assert said(conversation) == [("user", "[a.jpg]What?"), ("assistant", "A room.")]
    assert conversation.answers == ("A room.", "A table.")


def test_a_text_beside_a_picture_answers_the_prompt():
    row = {"image": "a.png", "text": "\nA cat.\n", "__key__": "a"}
    assert said(read("image_text", row)) == [
        ("user", f"[a.png]{CAPTION_PROMPT}"),
        ("assistant", "A cat."),
    ]


def test_the_folders_name_is_the_answer():
    row = {"image": "cat/1.png", "label": "cat"}
    assert said(read("class_folders", row)) == [
        ("user", f"[cat/1.png]{CLASS_PROMPT}"),
        ("assistant", "cat"),
    ]


def test_vqav2_learns_the_agreed_answer_and_keeps_all():
    agreed, counted, ten = (read("vqav2", row) for row in ROWS["vqav2"])
    assert said(agreed) == [
        ("user", "[COCO_val2014_000000000009.jpg]Is it red?"),
        ("assistant", "yes"),
    ]
    assert (agreed.id, agreed.answers) == ("1", ("no", "yes", "no"))
    assert agreed.question_type == "yes/no"
    assert said(counted)[1] == ("assistant", "no")
    assert ten.answers == ("no",) * 10


def test_answers_as_columns_of_a_list_are_the_same():
    row = ROWS["vqav2"][0]
    columns = {"answer": ["no", "yes", "no"], "answer_id": [0, 1, 2]}
    assert read("vqav2", {**row, "answers": columns}) == read("vqav2", row)


def test_without_an_answer_type_a_question_counts_in_its_own():
    row = {key: value for key, value in ROWS["vqav2"][0].items() if key != "answer_type"}
    assert read("vqav2", row).question_type == "is it"


def test_docvqa_learns_the_most_frequent_answer_and_finds_its_page():
    typed, counted, _ = (read("docvqa", row) for row in ROWS["docvqa"])
    unnamed = read("docvqa", {**ROWS["docvqa"][0], "image": None})
    assert (typed.id, typed.question_type) == ("1", "form, layout")
    assert (said(counted)[1], counted.answers) == (("assistant", "1"), ("one", "1", "1"))
    assert unnamed.images == typed.images == (Image("documents/xnbl0037_1.png", FOLDER),)


def test_chartqas_label_is_the_answer_and_its_writer_the_type():
    plain, typed, written = (read("chartqa", row) for row in ROWS["chartqa"])
    assert said(plain) == [("user", "[1.png]How many?"), ("assistant", "14")]
    assert (typed.answers, typed.question_type) == (("14",), "augmented")
    assert (said(written)[0], written.question_type) == (("user", "[3.png]How many?"), "human")
    machine = {**ROWS["chartqa"][2], "human_or_machine": 1}
    assert read("chartqa", machine).question_type == "machine"


PICTURED = ["table", "coco_captions", "image_text", "class_folders", "vqav2", "docvqa", "chartqa"]


@pytest.mark.parametrize("name", PICTURED)
@pytest.mark.parametrize("value", [b"\x89PNG", {"bytes": b"\x89PNG", "path": None}])
def test_pictures_may_be_bytes(name, value):
    row = {k: v for k, v in ROWS[name][0].items() if k not in ("image_path", "imgname")}
    (picture,) = read(name, {**row, "image": value}).images
    assert picture.content == b"\x89PNG"


@pytest.mark.parametrize("name", PICTURED)
def test_a_row_without_its_picture_is_an_error(name):
    lost = ("image", "image_path", "imgname", "ucsf_document_id")
    row = {k: v for k, v in ROWS[name][0].items() if k not in lost}
    reason = "the columns do not form a sample" if name == "table" else "there is no picture"
    with pytest.raises(SampleError, match=rf"^rows\.jsonl:7: {reason}"):
        read(name, row)


def _but(name, **keys):
    return name, {**ROWS[name][0], **keys}


BAD_ROWS = {
    "coco: no caption": ("coco_captions", {"image": "a"}, "there is no caption"),
    "coco: both": ("coco_captions", {"image": "a", "caption": "a", "captions": ["b"]}, "both"),
    "coco: captions empty": ("coco_captions", {"image": "a", "captions": []}, "captions is empty"),
    "coco: an empty caption": ("coco_captions", {"image": "a", "captions": [" "]}, "is empty"),
    "coco: captions of lists": ("coco_captions", {"image": "a", "captions": [["b"]]}, "text 1 of"),
    "coco: caption a number": (*_but("coco_captions", caption=3), "caption is not a text"),
    "coco: id true": (*_but("coco_captions", id=True), "the id cannot be used"),
    "text: none": (*_but("image_text", text=None), "there is no text; got: text: null"),
    "text: blank": (*_but("image_text", text="\n"), "is empty"),
    "class: a number": (*_but("class_folders", label=3), "the label is a number; got: a number: 3"),
    "class: a list": (*_but("class_folders", label=["cat"]), "label is not a text"),
    "class: none": (*_but("class_folders", label=""), "is empty"),
    "vqav2: no answer": (
        *_but("vqav2", answers=None, multiple_choice_answer=None),
        "there is no text in answers; got: null",
    ),
    "vqav2: answers of objects": (*_but("vqav2", answers=[{"text": "a"}]), "1 of answers has no"),
    "vqav2: answers of lists": (*_but("vqav2", answers=[["a"]]), "1 of answers is not a text"),
    "vqav2: question a list": (*_but("vqav2", question=["a"]), "question is not a text"),
    "vqav2: no question": (*_but("vqav2", question=None), "there is no question"),
    "vqav2: type a number": (*_but("vqav2", answer_type=1), "answer_type is not a text"),
    "vqav2: id a list": (*_but("vqav2", question_id=[1]), "the question_id cannot be used"),
    "docvqa: no answers": (*_but("docvqa", answers=None), "there is no text in answers"),
    "docvqa: types a text": (*_but("docvqa", question_types="form"), "question_types cannot"),
    "docvqa: page a list": (
        *_but("docvqa", image=None, ucsf_document_page_no=[1]),
        "the name of the page is not a text",
    ),
    "chartqa: no label": (*_but("chartqa", label=None), "there is no label"),
    "chartqa: label empty": (*_but("chartqa", label=[]), "there is no label"),
    "chartqa: label an object": (*_but("chartqa", label={}), "text 1 of label has no answer"),
    "chartqa: writer": (*_but("chartqa", human_or_machine=2), "human_or_machine cannot"),
    "chartqa: writer a list": (*_but("chartqa", human_or_machine=[0]), "human_or_machine cannot"),
    "chartqa: writer true": (*_but("chartqa", human_or_machine=True), "human_or_machine cannot"),
    "chartqa: no query": (*_but("chartqa", query=None), "there is no query"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_malformed_row_is_an_error_at_its_place(case):
    name, values, reason = BAD_ROWS[case]
    with pytest.raises(SampleError, match=rf"^rows\.jsonl:7: .*{reason}"):
        read(name, values)
