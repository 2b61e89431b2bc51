"""Questions and a finished run, for the tests of `vlmtune eval`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.evaluating import write_questions, write_run


@pytest.fixture(scope="session")
def data(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions in a file of its own."""
    return write_questions(tmp_path_factory.mktemp("data") / "questions.jsonl", sample_data, 4)


@pytest.fixture
def run_folder(tiny_vlm: Path, data: Path, tmp_path: Path) -> Path:
    """A finished run as training leaves it, with an untrained adapter."""
    evaluation = "{max_new_tokens: 3, batch_size: 2}"
    return write_run(tmp_path / "runs" / "receipts", tiny_vlm, data, evaluation)
