from __future__ import annotations

from pathlib import Path

import pytest
from prepare_easy_vqa import Question, blind_scores, write_split

from vlmtune.data.dataset import load_conversations


def test_the_kind_of_a_question_follows_from_its_answer() -> None:
    kinds = [Question("?", answer, 0).kind for answer in ("yes", "no", "circle", "teal")]
    assert kinds == ["yes/no", "yes/no", "shape", "color"]


def test_the_blind_guesser_gives_a_texts_most_frequent_answer() -> None:
    train = [
        Question("is it red?", "no", 0),
        Question("is it red?", "no", 1),
        Question("is it red?", "yes", 2),
        Question("what shape?", "circle", 0),
    ]
    test = [
        Question("is it red?", "no", 5),
        Question("is it red?", "yes", 6),
        Question("what shape?", "circle", 7),
        Question("a new text?", "no", 8),
    ]
    scores = blind_scores(train, test)
    assert scores == {"yes/no": pytest.approx(2 / 3), "shape": 1.0, "total": 0.75}


def test_written_rows_are_conversations_with_type_answer_and_picture(tmp_path: Path) -> None:
    picture = tmp_path / "package.png"
    picture.write_bytes(b"\x89PNG")
    questions = [Question("what shape?", "circle", 4), Question("is it red?", "no", 4)]
    write_split("test", questions, {4: picture, 5: picture}, tmp_path / "out")
    conversations, skipped = load_conversations([tmp_path / "out" / "test.jsonl"])
    assert not skipped
    assert [c.question_type for c in conversations] == ["shape", "yes/no"]
    assert [turn.text for turn in conversations[0].turns] == ["what shape?", "circle"]
    assert conversations[0].images[0].ref == "images/test/4.png"
    assert [p.name for p in (tmp_path / "out" / "images" / "test").iterdir()] == ["4.png"]


def test_the_package_gives_the_counts_and_the_blind_score_it_is_known_for() -> None:
    pytest.importorskip("easy_vqa")
    from prepare_easy_vqa import read_split

    train, _ = read_split("train")
    test, pictures = read_split("test")
    assert (len(train), len(test), len(pictures)) == (38575, 9673, 1000)
    scores = blind_scores(train, test)
    assert {kind: round(100 * score, 1) for kind, score in scores.items()} == {
        "total": 67.0,
        "yes/no": 82.5,
        "shape": 34.8,
        "color": 12.0,
    }
