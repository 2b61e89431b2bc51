"""What the tests of sources share."""

from __future__ import annotations

import pytest

from vlmtune import files
from vlmtune.data.sources import base


@pytest.fixture
def always_kept(monkeypatch):
    """Every index goes through the cache, and every table is mapped, however small."""
    monkeypatch.setattr(base, "KEPT_FROM_BYTES", 1)
    monkeypatch.setattr(files, "MAPPED_FROM_BYTES", 1)


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"
