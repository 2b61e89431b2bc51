from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Image, Source, Text, Turn
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError
from vlmtune.evaluation.references import check_references, picture_name
from vlmtune.evaluation.results import EvalReport, write_report
from vlmtune.evaluation.runner import evaluate, score_answers
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import EvalSection


def asked(
    number: int,
    answer: str | None = "red",
    *,
    picture: str | None = None,
    folder: Path = Path("/data"),
    answers: tuple[str, ...] = (),
    question_type: str | None = None,
) -> Conversation:
    images = () if picture is None else (Image(picture, folder),)
    turns = [Turn("user", (*images, Text(f"question {number}?")))]
    if answer is not None:
        turns.append(Turn("assistant", (Text(answer),)))
    return Conversation(
        str(number), tuple(turns), Source("d.jsonl", number), answers, question_type
    )


def test_metrics_are_means_over_samples_and_slices_over_their_types() -> None:
    conversations = [
        asked(1, "red", question_type="color"),
        asked(2, "blue", question_type="color"),
        asked(3, "two", question_type="count"),
        asked(4, "yes"),
    ]
    report = score_answers(conversations, ["Red.", "green", "2", "yes"], task="vqa")
    assert report.metrics["exact_match"].value == 0.75
    assert report.slices["color"]["exact_match"].value == 0.5
    assert report.slices["count"]["exact_match"].count == 1
    assert set(report.slices) == {"color", "count"}
    assert [p.score for p in report.predictions] == [1.0, 0.0, 1.0, 1.0]


def test_vqa_accuracy_counts_only_samples_with_answers() -> None:
    conversations = [asked(1, None, answers=("red",) * 10), asked(2)]
    report = score_answers(conversations, ["red", "green"], task="vqa")
    assert report.metrics["vqa_accuracy"].value == 1.0
    assert report.metrics["vqa_accuracy"].count == 1
    assert report.metrics["exact_match"].count == 2


def test_a_metric_that_applies_to_no_sample_is_not_reported() -> None:
    assert set(score_answers([asked(1)], ["red"], task="vqa").metrics) == {
        "exact_match",
        "token_f1",
    }


def test_intervals_resample_pictures(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"-")
    conversations = [asked(n, picture="a.png", folder=tmp_path) for n in range(10)]
    conversations += [asked(n, picture="b.png", folder=tmp_path) for n in range(10, 20)]
    texts = ["red"] * 10 + ["blue"] * 10
    interval = score_answers(conversations, texts, task="vqa").metrics["exact_match"]
    assert (interval.low, interval.value, interval.high) == (0.0, 0.5, 1.0)
    alone = score_answers([asked(n) for n in range(20)], texts, task="vqa").metrics["exact_match"]
    assert alone.low > 0.2  # without pictures every sample stands alone


def test_a_sample_without_reference_is_an_error_with_its_line() -> None:
    with pytest.raises(SampleError, match=r"d\.jsonl:7: sample has no reference answer"):
        check_references([asked(1), asked(7, None)])
    with pytest.raises(ErrorGroup, match=r"(?s)d\.jsonl:7: .*d\.jsonl:8: "):
        check_references([asked(7, None), asked(8, None)])
    check_references([asked(1), asked(2, None, answers=("red",))])


def test_a_choice_needs_options_and_a_reference_that_is_one_of_them() -> None:
    letter, text, answers = asked(1, "B"), asked(2, "Blue."), asked(3, None, answers=("x", "red"))
    neither, twice, without = asked(7, "green"), asked(8, "red"), asked(9, "red")
    options = {1: ("red", "blue"), 8: ("red", "red")}
    good = [replace(c, options=options[1]) for c in (letter, text, answers)]
    check_references(good, task="choice")
    bad = [replace(neither, options=options[1]), replace(twice, options=options[8]), without]
    with pytest.raises(ErrorGroup) as caught:
        check_references([*good, *bad], task="choice", metrics=["choice_likelihood"])
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["7", "8", "9"]
    assert "none of the options" in lines[0] and "'green'" in lines[0]
    assert "no options" in lines[2]
    # Other metrics do not look at options.
    check_references(bad, task="choice", metrics=["exact_match"])
    check_references(bad, task="vqa")


def test_where_no_metric_applies_there_is_an_error_not_an_empty_table() -> None:
    with pytest.raises(VlmtuneError, match="nothing to measure: no sample has what grounding"):
        check_references([asked(1), asked(2)], task="grounding")
    with pytest.raises(VlmtuneError, match="vqa_accuracy"):
        check_references([asked(1)], metrics=["vqa_accuracy", "yes_no"])
    check_references([asked(1), asked(2, "[0, 0, 1, 1]")], task="grounding")
    check_references([asked(1), asked(2, "yes")], metrics=["vqa_accuracy", "yes_no"])


def test_an_unknown_metric_is_an_error(vlm: VLM, encoder: Encoder) -> None:
    section = EvalSection(metrics=["exakt_match"])
    with pytest.raises(VlmtuneError, match="unknown metric"):
        evaluate(vlm, [asked(1)], encoder=encoder, section=section)


def test_shares_of_two_processes_make_the_whole_report(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation]
) -> None:
    def run(rank: int = 0, world_size: int = 1) -> EvalReport:
        def gather(mine: list[tuple[int, str]]) -> list[tuple[int, str]]:
            shares[rank] = mine
            return shares[0] + shares.get(1, [])

        return evaluate(
            vlm,
            conversations,
            encoder=encoder,
            section=EvalSection(max_new_tokens=4, batch_size=2),
            rank=rank,
            world_size=world_size,
            gather=gather,
        )

    shares: dict[int, list[tuple[int, str]]] = {}
    with pytest.raises(AssertionError):  # half the answers are missing
        run(rank=0, world_size=2)
    assert run(rank=1, world_size=2) == run()
    assert sorted(index for index, _ in shares[0]) == [0, 2, 4]
    assert run(rank=0, world_size=2) == run()


def test_the_report_holds_picture_question_answers_prediction_and_score(
    tmp_path: Path, sample_data: Path
) -> None:
    conversation = asked(
        1,
        "red",
        picture="images/eval-000.png",
        folder=sample_data,
        answers=("red",) * 4,
        question_type="color",
    )
    report = score_answers([conversation, asked(2)], ["Red", "blé"], task="vqa")
    write_report(report, tmp_path / "new" / "folder", about={"target": "runs/x"})
    folder = tmp_path / "new" / "folder"
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "id": "1",
        "images": [str(sample_data / "images/eval-000.png")],
        "question": "question 1?",
        "answer": "red",
        "answers": ["red"] * 4,
        "options": [],
        "prediction": "Red",
        "score": 1.0,
        "scores": {"exact_match": 1.0, "vqa_accuracy": 1.0, "token_f1": 1.0},
        "question_type": "color",
    }
    assert rows[1]["prediction"] == "blé"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["target"] == "runs/x"
    assert metrics["num_samples"] == 2
    assert metrics["metrics"]["exact_match"]["value"] == 0.5
    assert metrics["slices"]["color"]["exact_match"]["count"] == 1
    assert sorted(file.name for file in folder.iterdir()) == ["metrics.json", "predictions.jsonl"]


def test_a_picture_inside_the_data_file_is_named_by_its_digest(sample_data: Path) -> None:
    content = (sample_data / "images" / "eval-000.png").read_bytes()
    inline = Image("data:image/png;base64," + base64.b64encode(content).decode(), sample_data)
    other = Image(inline.ref[:-8] + "AAAAAAAA", sample_data)
    assert picture_name(inline).startswith("sha256:")
    assert len(picture_name(inline)) < 40
    assert picture_name(inline) != picture_name(other)
