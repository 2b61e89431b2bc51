"""Objects around lists: COCO and VQAv2 joined as dictionaries would join them, and others."""

from __future__ import annotations

import json
import pickle
import random

import pytest

from vlmtune.data.sources.registry import open_rows
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.recipe.data_section import DataEntry


@pytest.fixture
def open_json(tmp_path, cache_dir):
    """`open_json(value)`: the rows of a JSON file; `annotations`: of a second one."""

    def open_value(value, *, annotations=None, indent=None, name="data.json"):
        entry = {"path": str(tmp_path / name)}
        for path, content in ((name, value), ("answers.json", annotations)):
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content, indent=indent)
                (tmp_path / path).write_text(text)
        if annotations is not None:
            entry["annotations"] = str(tmp_path / "answers.json")
        (rows,) = open_rows(DataEntry(**entry), cache_dir=cache_dir)
        return rows

    return open_value


def _read_all(rows) -> list:
    return [rows[index] for index in range(len(rows))]


def _coco(num_images: int = 20, *, key=lambda n: n * 7 % 1000) -> dict:
    images = [{"id": key(n), "file_name": f"{n}.jpg", "height": 3} for n in range(num_images)]
    annotations = [
        {"id": n, "image_id": key(n * 13 % num_images), "caption": f"é {n}"} for n in range(50)
    ]
    random.Random(0).shuffle(images)
    return {"info": {"year": [1]}, "images": images, "licenses": [1], "annotations": annotations}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("key", [lambda n: n * 7 % 1000, lambda n: f"name {n}"])
@pytest.mark.parametrize("images_last", [False, True])
def test_captions_are_joined_with_their_pictures(open_json, always_kept, indent, key, images_last):
    coco = _coco(key=key)
    if images_last:
        coco["images"] = coco.pop("images")
    by_id = {image["id"]: image["file_name"] for image in coco["images"]}
    expected = [
        {"id": a["id"], "image": by_id[a["image_id"]], "caption": a["caption"]}
        for a in coco["annotations"]
    ]
    rows = open_json(coco, indent=indent)
    assert _read_all(pickle.loads(pickle.dumps(rows))) == expected
    assert rows.place(4).line == 5
    in_order = [{**row, "image": f"{n}.jpg"} for n, row in enumerate(expected)]
    assert _read_all(rows) != in_order


def test_a_caption_that_cannot_be_joined_is_a_bad_row(open_json):
    coco = _coco()
    bad = [{"image_id": 5000}, {"image_id": None}, {}, {"image_id": 0}, 3]
    coco["annotations"] += [{"id": 100 + n, "caption": "x", **row} for n, row in enumerate(bad[:3])]
    coco["annotations"] += [bad[3], bad[4]]
    coco["images"].append({"id": 6000})
    coco["annotations"].append({"id": 200, "image_id": 6000, "caption": "x"})
    rows = open_json(coco)
    reasons = [
        "is not in images; got: image_id: a number: 5000",
        "is not in images; got: image_id: null",
        "is not in images",
        "the annotation has no caption",
        "not an object",
        "the picture has no file_name",
    ]
    for index, reason in enumerate(reasons, start=50):
        with pytest.raises(SampleError, match=reason) as caught:
            rows[index]
        assert caught.value.line == index + 1
    assert rows[49]["caption"] == "é 49"


def test_two_pictures_of_one_id_are_an_error(open_json):
    coco = _coco()
    coco["images"].append(coco["images"][0])
    with pytest.raises(VlmtuneError, match="1 of 21 objects have the id of another"):
        open_json(coco)


def _vqa(num: int = 12) -> tuple[dict, dict]:
    questions = [
        {"question_id": n * 10, "image_id": n % 5, "question": f"q{n}?"} for n in range(num)
    ]
    answers = [
        {
            "question_id": n * 10,
            "image_id": n % 5,
            "answers": [{"answer": f"a{n}", "answer_id": i} for i in range(10)],
            "multiple_choice_answer": f"a{n}",
            "question_type": "what",
            "answer_type": "other",
        }
        for n in reversed(range(num))
    ]
    about = {"data_type": "mscoco", "data_subtype": "val2014", "license": {"url": "x"}}
    return {**about, "questions": questions}, {**about, "annotations": answers}


@pytest.mark.parametrize("about_last", [False, True])
def test_questions_are_joined_with_their_answers(open_json, always_kept, about_last):
    questions, answers = _vqa()
    if about_last:
        questions["data_subtype"] = questions.pop("data_subtype")
    rows = pickle.loads(pickle.dumps(open_json(questions, annotations=answers)))
    by_id = {answer["question_id"]: answer for answer in answers["annotations"]}
    expected = [
        {**by_id[q["question_id"]], **q, "image": f"COCO_val2014_{q['image_id']:012d}.jpg"}
        for q in questions["questions"]
    ]
    assert _read_all(rows) == expected
    assert expected[3]["image"] == "COCO_val2014_000000000003.jpg"
    assert expected[3]["multiple_choice_answer"] == "a3" != rows[4]["multiple_choice_answer"]


def test_braces_in_the_name_of_a_subset_are_letters(open_json):
    questions, answers = _vqa()
    questions["data_subtype"] = "{0}a{image_id}"
    rows = open_json(questions, annotations=answers)
    assert rows[3]["image"] == "COCO_{0}a{image_id}_000000000003.jpg"


def test_a_question_without_answers_or_picture_is_a_bad_row(open_json):
    questions, answers = _vqa()
    del answers["annotations"][0]  # of the last question
    questions["questions"][1]["image_id"] = "x"
    questions["questions"][2]["image"] = "own.png"
    rows = open_json(questions, annotations=answers)
    with pytest.raises(
        SampleError, match="no answers in .*answers.json.*question_id.*110"
    ) as caught:
        rows[11]
    assert caught.value.line == 12
    with pytest.raises(SampleError, match="does not name its picture"):
        rows[1]
    assert rows[2]["image"] == "own.png"
    del questions["data_subtype"], answers["data_subtype"]
    with pytest.raises(SampleError, match="the file does not say how the pictures are named"):
        open_json(questions, annotations=answers)[0]


def test_files_of_vqa_in_the_wrong_place_are_errors(open_json):
    questions, answers = _vqa()
    for value, given, reason in (
        (answers, questions, "no list of questions"),
        (questions, questions, "no list of annotations"),
        (questions, [1], "not one of VQAv2"),
        ('{"question": "a"}\n', answers, "not one of VQAv2"),
        (questions, None, "the questions have no answers.*annotations: …"),
        (answers, None, "answers without their questions"),
    ):
        with pytest.raises(VlmtuneError, match=reason):
            open_json(value, annotations=given)


def test_two_answers_to_one_question_are_an_error(open_json):
    questions, answers = _vqa()
    answers["annotations"].append(answers["annotations"][0])
    with pytest.raises(VlmtuneError, match="have the question_id of another") as caught:
        open_json(questions, annotations=answers)
    assert caught.value.file.endswith("answers.json")


@pytest.mark.parametrize("name", ["data", "annotations", "questions"])
@pytest.mark.parametrize("indent", [None, 2])
def test_the_only_list_of_an_object_is_its_rows(open_json, name, indent):
    items = [{"question": f"é{n}", "answers": ["a"] * n} for n in range(5)]
    rows = open_json({"version": 1, "empty": [], "tags": ["a"], name: items}, indent=indent)
    assert _read_all(rows) == items


def test_several_lists_of_an_object_are_an_error(open_json):
    with pytest.raises(VlmtuneError, match=r"several lists of objects.*data \(1\), rows \(2\)"):
        open_json({"data": [{}], "rows": [{}, {}]})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user"}]},
        {"images": [{"path": "a"}], "messages": [{"role": "user"}]},
        {"data": {"a": 1}, "images": ["a"]},
        {},
    ],
)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_rows_of_their_own_are_not_taken_for_a_container(open_json, row, times, name):
    assert _read_all(open_json((json.dumps(row) + "\n") * times, name=name)) == [row] * times


def test_lines_that_each_hold_a_list_stay_lines(open_json):
    row = {"data": [{"a": 1}, {"a": 2}]}
    assert _read_all(open_json((json.dumps(row) + "\n") * 2)) == [row, row]
    assert _read_all(open_json(json.dumps(row), name="one.jsonl")) == [row]
    assert _read_all(open_json(json.dumps(row))) == row["data"]


def test_a_container_that_is_cut_off_is_an_error_at_its_line(open_json):
    text = json.dumps(_coco(), indent=1)
    cut = text[: text.index('"caption": "\\u00e9 30"')]
    with pytest.raises(SampleError, match="not JSON") as caught:
        open_json(cut)
    assert caught.value.line == cut.count("\n") + 1
