"""`datasets` folders and data sets of the hub: stored values, splits named, errors in words."""

from __future__ import annotations

import io
import pickle
import socket

import datasets
import huggingface_hub.constants
import PIL.Image
import pytest

from vlmtune.data.sources.hf import load_hub, open_dataset_folder, open_hub
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.data_section import DataEntry


def _png(value: int) -> bytes:
    held = io.BytesIO()
    PIL.Image.new("RGB", (2, 2), (value, 0, 0)).save(held, "png")
    return held.getvalue()


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def data():
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "several": [datasets.Image()],
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    rows = {
        "image": [{"bytes": _png(n), "path": f"{n}.png"} for n in range(4)],
        "several": [[{"bytes": _png(n), "path": None}] * (n % 3) for n in range(4)],
        "label": [0, 1, 1, None],
        "text": [f"t{n}" for n in range(4)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def _expected(n: int) -> dict:
    return {
        "image": {"bytes": _png(n), "path": f"{n}.png"},
        "several": [{"bytes": _png(n), "path": None}] * (n % 3),
        "label": ["cat", "dog", "dog", None][n],
        "text": f"t{n}",
    }


def test_a_saved_folder_gives_bytes_and_the_names_of_classes(data, tmp_path):
    data.save_to_disk(tmp_path / "saved")
    rows = open_dataset_folder(tmp_path / "saved", split=None)
    assert [rows[n] for n in range(len(rows))] == [_expected(n) for n in range(4)]
    assert rows[0] != _expected(1)
    assert rows.file == str(tmp_path / "saved") and rows.place(2).line == 3
    again = pickle.loads(pickle.dumps(rows))
    assert again[3] == _expected(3)


def test_of_several_splits_one_must_be_named(data, tmp_path):
    folder = tmp_path / "saved"
    both = datasets.DatasetDict({"train": data.select([0, 2]), "test": data.select([1])})
    both.save_to_disk(folder)
    train = open_dataset_folder(folder, split="train")
    test = open_dataset_folder(folder, split="test")
    assert train.file == str(folder / "train") and test.file == str(folder / "test")
    assert [row[len(row) - 1] for row in (train, test)] == [_expected(2), _expected(1)]
    with pytest.raises(VlmtuneError, match=r"several splits.*train \| test.*split: …"):
        open_dataset_folder(folder, split=None)
    with pytest.raises(VlmtuneError, match="no such split.*got: tset.*did you mean 'test'"):
        open_dataset_folder(folder, split="tset")


def test_a_split_of_a_folder_without_any_is_an_error(data, tmp_path):
    data.save_to_disk(tmp_path / "saved")
    with pytest.raises(VlmtuneError, match="no splits"):
        open_dataset_folder(tmp_path / "saved", split="train")


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_damaged_folder_is_named(data, tmp_path, name):
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_bytes(b"{")
    with pytest.raises(VlmtuneError, match="cannot be read as a data set") as caught:
        open_dataset_folder(tmp_path / "saved", split=None)
    assert caught.value.file == str(tmp_path / "saved")


@pytest.fixture
def repository(data, tmp_path, monkeypatch):
    """A folder as a data set of the hub has it, and a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    data.select([1]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def test_parquet_files_of_a_repository_are_read_by_split(repository):
    entry = DataEntry(path="hub:owner/name", split="train")
    rows = load_hub(str(repository), entry)
    assert [rows[n] for n in range(len(rows))] == [_expected(n) for n in range(4)]
    assert rows.file == "hub:owner/name/train"
    other = load_hub(str(repository), DataEntry(path="hub:owner/name", split="test"))
    assert len(other) == 1 and other.fingerprint != rows.fingerprint
    assert load_hub(str(repository), entry).fingerprint == rows.fingerprint
    with pytest.raises(VlmtuneError, match="several splits"):
        load_hub(str(repository), DataEntry(path="hub:owner/name"))


def test_code_in_a_repository_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    folder = tmp_path / "name"
    folder.mkdir()
    (folder / "name.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    with pytest.raises(VlmtuneError, match="cannot be loaded"):
        load_hub(str(folder), DataEntry(path="hub:owner/name"))
    assert not (tmp_path / "was_run").exists()


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(VlmtuneError, match="cannot be loaded from the hub.*connection") as caught:
        open_hub(DataEntry(path="hub:owner/no-such-set"))
    assert caught.value.file == "hub:owner/no-such-set"


def test_a_connection_that_fails_is_said(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(VlmtuneError, match="no route"):
        open_hub(DataEntry(path="hub:owner/no-such-set"))


def test_a_folder_of_the_same_name_is_not_taken_for_the_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(VlmtuneError, match="in the working directory"):
        open_hub(DataEntry(path="hub:owner/name"))
