"""`vlmtune eval` killed and started again, and two processes that share the work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.evaluating import run_eval, write_questions

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": str(ROOT),
}
SAMPLE = ["eval.decoding.method=sample", "eval.decoding.temperature=3", "--dtype", "float32"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def eval_in_two(*arguments: object, cwd: Path) -> tuple[int, str, str]:
    """`accelerate launch` with two processes: exit code, stdout and stderr."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "--main_process_port", "0", "-m", "vlmtune", "eval"]
        + [str(argument) for argument in arguments],
        env=ENVIRONMENT,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def questions(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data") / "questions.jsonl", sample_data, 40)


@pytest.fixture(scope="module")
def uninterrupted(tiny_vlm: Path, questions: Path, tmp_path_factory) -> Path:
    """The report of one process that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = [tiny_vlm, "--data", questions, *SAMPLE, "--output", folder]
    assert run_eval(*arguments, "--quiet")[0] == 0
    return folder


@pytest.fixture(scope="module")
def killed(tiny_vlm: Path, questions: Path, tmp_path_factory) -> Path:
    """The working directory of an evaluation that got kill -9 after a few answers."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = [tiny_vlm, "--data", questions, *SAMPLE, "eval.batch_size=1", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmtune", "eval", *map(str, arguments)],
        env=ENVIRONMENT,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not any(
        path.read_bytes().count(b"\n") > 3 for path in folder.glob("eval/*/answers-0.part.jsonl")
    ):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return folder


@pytest.fixture
def place(killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the killed one left; the tests' working directory."""
    shutil.copytree(killed, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def num_kept(place: Path) -> int:
    (file,) = place.glob("eval/*/answers-0.part.jsonl")
    return file.read_bytes().count(b"\n") - 1


def test_a_killed_evaluation_goes_on_with_the_same_command(
    tiny_vlm: Path, questions: Path, uninterrupted: Path, place: Path
) -> None:
    command = [tiny_vlm, "--data", questions, *SAMPLE]
    (folder,) = (place / "eval").iterdir()
    kept = num_kept(place)
    with (folder / "answers-0.part.jsonl").open("a") as file:
        file.write('{"number": 39, "answ')  # as a kill in the middle of a line leaves it
    code, _, stderr = run_eval(*command)
    assert code == 0, stderr
    assert f"{kept} of 40 answers are kept from an earlier start" in stderr
    assert rows_of(folder) == rows_of(uninterrupted)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "predictions.jsonl"]
    # That one is finished: the same command again is an evaluation of its own.
    code, _, stderr = run_eval(*command)
    assert "are kept" not in stderr
    assert len(list((place / "eval").iterdir())) == 2


def test_other_settings_take_no_kept_answer(tiny_vlm: Path, questions: Path, place: Path) -> None:
    (folder,) = (place / "eval").iterdir()
    other = [tiny_vlm, "--data", questions, *SAMPLE, "seed=1", "--max-samples", 4]
    code, _, stderr = run_eval(*other, "--output", folder)
    assert code == 0, stderr
    assert "answers of an earlier start with other settings (samples, seed)" in stderr
    assert "are kept" not in stderr
    assert len(rows_of(folder)) == 4


def test_two_processes_go_on_where_one_was_killed_and_end_as_one_does(
    tiny_vlm: Path, questions: Path, uninterrupted: Path, place: Path
) -> None:
    kept = num_kept(place)
    code, stdout, stderr = eval_in_two(tiny_vlm, "--data", questions, *SAMPLE, "--json", cwd=place)
    assert code == 0, stderr
    result = json.loads(stdout)  # one JSON object: one process prints
    assert f"{kept} of 40 answers are kept" in stderr
    assert stderr.count("answered 20 of 20") == 1, "each has half of the samples, one says so"
    (folder,) = (place / "eval").iterdir()
    assert Path(result["predictions"]).parent == folder
    assert rows_of(folder) == rows_of(uninterrupted)
    assert result["metrics"] == json.loads((uninterrupted / "metrics.json").read_text())["metrics"]
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "predictions.jsonl"]


def test_two_processes_compare_and_speak_once(
    tiny_vlm: Path, questions: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    code, stdout, stderr = eval_in_two(
        uninterrupted, tiny_vlm, "--data", questions, "--json", cwd=tmp_path
    )
    assert code == 0, stderr
    result = json.loads(stdout)
    assert [one["num_samples"] for one in result["targets"]] == [40, 40]
    (comparison,) = result["comparison"]["comparisons"]
    assert comparison["target"] == "tiny-vlm"


def test_a_bad_picture_of_one_process_ends_both(
    tiny_vlm: Path, sample_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG and no more")
    data = write_questions(tmp_path / "data.jsonl", sample_data, 4)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[3]["messages"][0]["content"][0]["image"] = "bad.png"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, stdout, stderr = eval_in_two(tiny_vlm, "--data", data, cwd=tmp_path)
    assert code != 0
    assert stdout == ""
    assert stderr.count(f"{data}:4: ") == 1
