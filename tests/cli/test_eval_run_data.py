"""`vlmtune eval RUN --data FILE` reads the file as the run's own data are read."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.evaluating import run_eval, write_run

SHORT = ["eval.max_new_tokens=1"]
HEADER = ["image", "question", "answer", "Frage", "kurz"]


def write_csv(file: Path, rows: list[list[str]], header: list[str] = HEADER) -> Path:
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file


def asked(*arguments: object, output: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of the report, and stderr."""
    code, _, stderr = run_eval(*arguments, *SHORT, "--output", output)
    assert code == 0, stderr
    lines = (output / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], stderr


@pytest.fixture(scope="module")
def picture(sample_data: Path) -> Path:
    return next((sample_data / "images").iterdir())


@pytest.fixture
def table(tmp_path: Path, picture: Path) -> Path:
    """`part/test.csv`: columns with usual names beside those that the run was trained on."""
    rows = [["a.png", "What is it?", "a long answer", "Was?", "ja"]]
    file = write_csv(tmp_path / "part" / "test.csv", rows)
    shutil.copyfile(picture, file.parent / "a.png")
    return file


def csv_run(folder: Path, tiny_vlm: Path, keys: str, *more: str) -> Path:
    """A run trained on a CSV with `keys`, and on more of them."""
    entries = []
    for number, text in enumerate([keys, *more]):
        file = write_csv(folder.parent / f"{folder.name}-{number}.csv", [["a", "b", "c", "d", "e"]])
        entries.append(f"{{path: {file}{text}}}")
    return write_run(folder, tiny_vlm, f"[{', '.join(entries)}]", "{}")


GERMAN = ", columns: {question: Frage, answer: kurz}"


def test_the_columns_of_a_runs_table_are_those_of_its_evaluation(
    tiny_vlm: Path, table: Path, tmp_path: Path
) -> None:
    run = csv_run(tmp_path / "run", tiny_vlm, GERMAN)
    rows, stderr = asked(run, "--data", table, output=tmp_path / "own")
    assert [(row["question"], row["answer"]) for row in rows] == [("Was?", "ja")]
    told = "read like data.train of " + str(run)
    assert f"{table}: {told}: columns {{question: Frage, answer: kurz}}" in stderr
    rows, stderr = asked(tiny_vlm, "--data", table, output=tmp_path / "model")
    assert [row["answer"] for row in rows] == ["a long answer"]
    assert "read as" not in stderr


def test_settings_go_over_the_runs_keys_and_serve_a_model_without_a_run(
    tiny_vlm: Path, table: Path, tmp_path: Path
) -> None:
    run = csv_run(tmp_path / "run", tiny_vlm, GERMAN)
    named = ["columns.question=question", "columns.answer=kurz"]
    for target in (run, tiny_vlm):
        rows, stderr = asked(
            target, "--data", table, *named, output=tmp_path / f"out-{target.name}"
        )
        assert [(row["question"], row["answer"]) for row in rows] == [("What is it?", "ja")]
        assert "read as" not in stderr
    code, _, stderr = run_eval(run, "--data", table, "columns.quest=kurz")
    assert code == 2
    assert "unknown key 'data.eval.columns.quest'" in stderr


def test_a_folder_of_classes_is_asked_the_runs_prompt(
    tiny_vlm: Path, picture: Path, tmp_path: Path
) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            shutil.copyfile(picture, tmp_path / part / name / "1.png")
    data = f"{{path: {tmp_path / 'train'}, prompt: 'Which animal?'}}"
    run = write_run(tmp_path / "run", tiny_vlm, data, "{}")
    rows, _ = asked(run, "--data", tmp_path / "test", output=tmp_path / "out")
    assert [(row["question"], row["answer"]) for row in rows] == [
        ("Which animal?", "cat"),
        ("Which animal?", "dog"),
    ]
    rows, _ = asked(tiny_vlm, "--data", tmp_path / "test", output=tmp_path / "model")
    assert rows[0]["question"] != "Which animal?"


def test_pictures_are_looked_for_in_the_runs_image_dir(
    tiny_vlm: Path, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    shutil.copyfile(picture, tmp_path / "pictures" / "a.png")
    turns = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]
    row = {"messages": turns, "images": ["a.png"]}
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    data = f"{{path: {tmp_path / 'train.jsonl'}, image_dir: {tmp_path / 'pictures'}}}"
    run = write_run(tmp_path / "run", tiny_vlm, data, "{}")
    rows, _ = asked(run, "--data", tmp_path / "test.jsonl", output=tmp_path / "out")
    assert rows[0]["images"] == [str(tmp_path / "pictures" / "a.png")]
    assert run_eval(tiny_vlm, "--data", tmp_path / "test.jsonl")[0] == 2


def test_a_format_that_the_run_names_is_that_of_the_file(tiny_vlm: Path, tmp_path: Path) -> None:
    row = {"query": "Q1", "response": "A1", "question": "Q2", "answer": "A2"}
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    data = f"{{path: {tmp_path / 'train.jsonl'}, format: table, columns: {{question: question}}}}"
    run = write_run(tmp_path / "run", tiny_vlm, data, "{}")
    rows, _ = asked(run, "--data", tmp_path / "test.jsonl", output=tmp_path / "out")
    assert (rows[0]["question"], rows[0]["answer"]) == ("Q2", "A2")
    rows, _ = asked(tiny_vlm, "--data", tmp_path / "test.jsonl", output=tmp_path / "model")
    assert (rows[0]["question"], rows[0]["answer"]) == ("Q1", "A1")


def test_a_file_that_the_runs_keys_do_not_fit_is_an_error_that_says_whose_they_are(
    tiny_vlm: Path, tmp_path: Path
) -> None:
    run = csv_run(tmp_path / "run", tiny_vlm, GERMAN)
    other = write_csv(tmp_path / "other.csv", [["Q", "A"]], ["question", "answer"])
    code, _, stderr = run_eval(run, "--data", other)
    assert code == 2
    assert re.search(r"other.csv:\d: there is no column Frage", stderr)
    assert "read with keys of the run's own data; got: columns" in stderr
    assert "columns.ROLE=NAME" in stderr
    named = ["columns.answer=answer"]
    assert asked(run, "--data", other, *named, output=tmp_path / "out")[0][0]["answer"] == "A"


def test_several_ways_of_a_run_are_refused_with_what_to_do(
    tiny_vlm: Path, table: Path, tmp_path: Path
) -> None:
    run = csv_run(tmp_path / "run", tiny_vlm, GERMAN, ", columns: {answer: answer}")
    code, _, stderr = run_eval(run, "--data", table)
    assert code == 2
    assert f"{table}: {run} reads files of this kind in several ways" in stderr


def test_several_runs_are_asked_as_the_first_reads_the_data_and_that_is_said(
    tiny_vlm: Path, table: Path, tmp_path: Path
) -> None:
    german = csv_run(tmp_path / "german", tiny_vlm, GERMAN)
    english = csv_run(tmp_path / "english", tiny_vlm, ", columns: {answer: answer}")
    alike = csv_run(tmp_path / "alike", tiny_vlm, GERMAN)
    command = ["--data", table, *SHORT, "--output"]
    code, _, stderr = run_eval(tiny_vlm, german, english, alike, *command, tmp_path / "out")
    assert code == 0, stderr
    for name in ("tiny-vlm", "german", "english", "alike"):
        row = json.loads((tmp_path / "out" / name / "predictions.jsonl").read_text())
        assert row["answer"] == "ja"
    assert f"read as {german} reads them; {english} reads its own otherwise" in stderr
    assert f"{alike} reads its own otherwise" not in stderr


def test_the_guessers_training_data_are_read_as_the_runs(
    tiny_vlm: Path, table: Path, tmp_path: Path
) -> None:
    run = csv_run(tmp_path / "run", tiny_vlm, GERMAN)
    rows = [["", "What is it?", "guess", "Was?", word] for word in ("ja", "nein", "ja")]
    training = write_csv(tmp_path / "more.csv", rows)
    command = [run, "--data", table, "--blind", "--train", training]
    code, stdout, stderr = run_eval(*command, *SHORT, "--json", "--output", tmp_path / "out")
    assert code == 0, stderr
    guessed = json.loads(stdout)["blind"]["majority_answer"]["metrics"]
    assert guessed["exact_match"]["value"] == 1.0
    other = write_csv(tmp_path / "other.csv", [["Q", "A"]], ["question", "answer"])
    code, _, stderr = run_eval(run, "--data", table, "--blind", "--train", other)
    assert code == 2
    assert "no row of the training data can be used to guess from" in stderr
    assert "Frage" in stderr
