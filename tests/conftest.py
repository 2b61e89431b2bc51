"""Fixtures that every test may use: the embedded default, and one thread per process."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
