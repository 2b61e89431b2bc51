from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.report.runs import make_run, write_json
from vlmtune.errors import VlmtuneError
from vlmtune.report.run import STILL_SECONDS, format_age, read_run


def written(folder: Path) -> float:
    """When the run last wrote anything."""
    return max(path.stat().st_mtime for path in folder.rglob("*"))


@pytest.fixture
def run(tmp_path: Path, tiny_vlm: Path) -> Path:
    return make_run(tmp_path / "run", model=tiny_vlm, num_samples=2, num_steps=5)


def without_result(run: Path) -> Path:
    for path in (run / "adapter").iterdir():
        path.unlink()
    (run / "adapter").rmdir()
    return run


def test_a_run_with_a_result_is_finished(run: Path) -> None:
    record = read_run(run)
    assert record.state.name == "finished"
    assert "step 5" in record.state.text
    assert record.last_step == 5


def test_a_run_without_a_result_is_running_while_it_writes_and_failed_afterwards(
    run: Path,
) -> None:
    without_result(run)
    (run / "checkpoints" / "step-000004").mkdir(parents=True)
    now = written(run)
    assert read_run(run, now=now + STILL_SECONDS - 5).state.name == "running"
    failed = read_run(run, now=now + STILL_SECONDS + 5).state
    assert failed.name == "failed"
    assert "step-000004" in failed.text


def test_a_run_stopped_by_a_signal_says_at_which_step(run: Path) -> None:
    write_json(without_result(run) / "summary.json", {"steps": 5, "stopped_by": 130})
    state = read_run(run).state
    assert (state.name, "step 5" in state.text) == ("stopped", True)


def test_a_summary_older_than_the_log_is_of_another_session(run: Path) -> None:
    write_json(without_result(run) / "summary.json", {"steps": 3, "stopped_by": 130})
    os.utime(run / "summary.json", (1000, 1000))
    record = read_run(run)
    assert record.summary is None
    assert record.state.name == "running"


def test_a_half_written_last_line_is_counted_and_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    record = read_run(run)
    assert record.last_step == 5
    assert record.unreadable == {"metrics.jsonl": 1}


def test_only_metrics_is_enough_to_be_a_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    record = read_run(tmp_path)
    assert (record.lines, record.skipped, record.modules) == ([], [], None)
    assert record.state.name == "running"


@pytest.mark.parametrize("kind", ["absent", "file", "empty", "other"])
def test_what_is_no_run_is_refused_with_what_was_expected(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    if kind == "file":
        folder.write_text("")
    elif kind != "absent":
        folder.mkdir()
    if kind == "other":
        (folder / "notes.txt").write_text("")
    with pytest.raises(VlmtuneError, match="expected: a run folder"):
        read_run(folder)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 seconds"),
        (1, "1 second"),
        (89, "1 minute"),
        (7200, "2 hours"),
        (200_000, "2 days"),
    ],
)
def test_a_time_is_told_in_its_largest_unit(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
