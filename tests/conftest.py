"""Fixtures that every test may use: the embedded default, and a cache folder of their own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = tempfile.TemporaryDirectory(prefix="vlmtune-tests-", ignore_cleanup_errors=True)
"""Of the tests and the processes that they start, which leave the user's caches alone."""
os.environ["XDG_CACHE_HOME"] = CACHE.name


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_vlm(root: Path) -> Path:
    """The embedded default checkpoint (Qwen2.5-VL architecture)."""
    return root / "data" / "sample" / "tiny-vlm"


@pytest.fixture(scope="session")
def sample_data(root: Path) -> Path:
    """The folder with `train.jsonl`, `eval.jsonl` and their pictures."""
    return root / "data" / "sample"
