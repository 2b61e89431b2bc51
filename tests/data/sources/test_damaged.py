"""Files of each kind with bytes changed or cut off: their rows, or an error in words."""

from __future__ import annotations

import random
import shutil
import struct

import pyarrow
import pyarrow.feather
import pytest

from tests.data.sources.test_registry import WRITERS
from vlmtune.data.sources.registry import open_rows
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.data_section import DataEntry

NUM_CASES = 150


def _damaged(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice([0, 1, 1, 3, 20])):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    if chance.random() < 0.3:
        del changed[chance.randrange(len(changed)) :]
    if chance.random() < 0.1:
        changed += bytes(changed[: chance.randrange(1 + len(changed))])
    return bytes(changed)


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "saved"])
def test_a_damaged_file_gives_rows_or_an_error_that_names_it(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path)
    whole, chance, endings = path.read_bytes(), random.Random(kind), set()
    for _ in range(NUM_CASES):
        path.write_bytes(_damaged(whole, chance))
        endings |= _endings(path)
    assert endings == {"row", "error"}


def test_a_damaged_dataset_folder_gives_rows_or_an_error_that_names_it(tmp_path):
    whole, path, chance, endings = tmp_path / "whole", tmp_path / "saved", random.Random(0), set()
    WRITERS["saved"](whole)
    for _ in range(NUM_CASES):
        shutil.copytree(whole, path)
        file = chance.choice(sorted(path.iterdir()))
        file.write_bytes(_damaged(file.read_bytes(), chance))
        endings |= _endings(path)
        shutil.rmtree(path)
    assert endings == {"row", "error"}


def test_a_damaged_length_that_asks_for_all_memory_is_an_error_that_names_the_file(tmp_path):
    path, length = tmp_path / "a.feather", 100_003
    pyarrow.feather.write_feather(pyarrow.table({"text": ["a" * length]}), path, compression="lz4")
    whole = path.read_bytes()
    assert whole.count(struct.pack("<q", length)) > 0
    path.write_bytes(whole.replace(struct.pack("<q", length), struct.pack("<q", 2**60)))
    assert _endings(path) == {"error"}


def _endings(path) -> set[str]:
    """How opening and reading ended; whatever is neither a row nor a VlmtuneError gets through."""
    endings = set()
    try:
        (rows,) = open_rows(DataEntry(path=str(path)), cache_dir=path.parent / "cache")
        count = len(rows)
    except VlmtuneError as error:
        assert error.file == str(path)
        return {"error"}
    for index in range(count):
        try:
            assert isinstance(rows[index], dict)
            endings.add("row")
        except VlmtuneError as error:
            assert error.file == str(path)
            endings.add("error")
    return endings
