from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmtune.cli.app import app


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n')
    return folder


def test_the_page_is_written_into_the_run_and_its_path_printed(run_folder: Path) -> None:
    code, stdout, _ = run(run_folder)
    assert (code, stdout) == (0, f"{run_folder / 'report.html'}\n")
    assert "<!doctype html>" in (run_folder / "report.html").read_text()


def test_json_holds_path_size_and_state(run_folder: Path, tmp_path: Path) -> None:
    code, stdout, _ = run(run_folder, "--output", tmp_path / "page.html", "--json")
    result = json.loads(stdout)
    assert code == 0
    assert result == {
        "report": str(tmp_path / "page.html"),
        "bytes": (tmp_path / "page.html").stat().st_size,
        "state": "running",
    }


def test_open_shows_the_page(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    assert run(run_folder, "--open")[0] == 0
    assert shown == [(run_folder / "report.html").as_uri()]


def test_a_folder_that_is_no_run_is_an_input_error(tmp_path: Path) -> None:
    code, stdout, stderr = run(tmp_path)
    assert (code, stdout) == (2, "")
    assert "not a run folder" in stderr
    assert "expected: a run folder" in stderr
