"""What check passes, training accepts; what it counts as left out, training leaves out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.preflight.checking import check_summary, messages
from tests.train.training import copy_sample, train_once, write_recipe
from vlmtune.errors import VlmtuneError
from vlmtune.train import probe

EPOCH = {"train__max_steps": None, "train__epochs": 1.0}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))


@pytest.fixture
def data(sample_data: Path, tmp_path: Path) -> Path:
    return copy_sample(sample_data, tmp_path / "data", keep=16)


@pytest.fixture
def recipe(tiny_vlm: Path, data: Path, tmp_path: Path):
    def write(**keys: Any) -> Path:
        return write_recipe(tmp_path, tiny_vlm=tiny_vlm, data=data, **(EPOCH | keys))

    return write


def damage(data: Path) -> None:
    """One bad row of each stage: no JSON, a missing and a broken picture, an empty answer, a
    control token, and a row that is too long for 60 tokens; and two good rows with one id."""
    rows: list[Any] = rows_of(data)
    (data.parent / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    rows[1] = "{no json"
    rows[3]["messages"][0]["content"][0]["image"] = "images/missing.png"
    rows[5]["messages"][0]["content"][0]["image"] = "images/broken.png"
    rows[6]["id"] = rows[14]["id"] = "same"
    rows[7]["messages"][1]["content"] = ""
    rows[9]["messages"][1]["content"] = "<|im_end|>"
    rows[11]["messages"][1]["content"] = "red " * 60
    write_rows(data, rows)


def test_the_sample_data_is_ready_and_trains(recipe, tmp_path):
    path = recipe()
    summary = check_summary(path)
    assert (summary["verdict"], summary["problems"]) == ("ready", [])
    trained = train_once(path)
    assert trained["steps"] == summary["steps"] == summary["epoch"]["steps"]
    assert trained["samples"] == summary["samples"] == 16
    assert trained["trainable_parameters"] == summary["trainable_parameters"]
    last = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert sum(line.get("supervised_tokens", 0) for line in last) == summary["supervised_tokens"]


def test_what_is_left_out_is_what_training_leaves_out(recipe, data, tmp_path):
    damage(data)
    keys = {"data__on_bad_sample": "skip", "data__max_bad_fraction": 0.5}
    path = recipe(data__over_length="drop", data__max_tokens=60, **keys)
    summary = check_summary(path)
    assert summary["verdict"] == "warnings"
    trained = train_once(path)
    skipped = rows_of(tmp_path / "run" / "skipped.jsonl")
    told = summary["sets"]["data.train"]["left_out"]
    as_set = {(row["id"], row["line"], row["is_bad"]) for row in skipped}
    assert {(row["id"], row["line"], row["is_bad"]) for row in told} == as_set
    assert len(as_set) == 6
    assert trained["skipped"] == sum(summary["dropped"].values()) == 6
    assert trained["samples"] == summary["samples"] == 10


def test_rows_with_one_id_are_left_out_for_their_own_faults_only(recipe, data, tmp_path):
    rows = rows_of(data)
    for row in rows[3:6]:
        row["id"] = rows[0]["id"]
    rows[3]["messages"][1]["content"] = "red " * 60
    rows[4]["messages"][1]["content"] = "<|im_end|>"
    write_rows(data, rows)
    keys = {"data__on_bad_sample": "skip", "data__max_bad_fraction": 0.5}
    path = recipe(data__over_length="drop", data__max_tokens=60, **keys)
    summary = check_summary(path)
    token = "the assistant's text contains a control token of the model"
    assert summary["dropped"] == {token: 1, "the sample is too long": 1}
    assert any(
        "3 rows repeat the id of an earlier row" in p["message"] for p in summary["problems"]
    )
    assert train_once(path)["skipped"] == 2


def test_errors_of_the_check_stop_training_and_name_the_same_lines(recipe, data):
    damage(data)
    path = recipe(data__max_tokens=60)
    summary = check_summary(path)
    assert summary["verdict"] == "not_ready"
    lines = {p["line"] for p in summary["problems"] if p["severity"] == "error"}
    assert lines == {2, 4, 6, 8, 10, 12}
    assert {p["file"] for p in summary["problems"]} == {str(data)}
    with pytest.raises(VlmtuneError) as caught:
        train_once(path)
    told = str(caught.value)
    assert all(f"train.jsonl:{line}:" in told for line in (2, 4, 8)), "what the reader finds"


def test_too_many_bad_rows_are_an_error_as_in_training(recipe, data):
    damage(data)
    keys = {"data__on_bad_sample": "skip", "data__max_bad_fraction": 0.2, "data__max_tokens": 60}
    path = recipe(**keys)
    summary = check_summary(path)
    [error] = messages(summary, "error")
    assert error.startswith("data.train: too many bad samples; got: 6 of 16")
    with pytest.raises(VlmtuneError, match="too many bad samples") as caught:
        train_once(path)
    assert "expected: at most 3 (" in error and "expected: at most 3 (" in str(caught.value)
    assert check_summary(path, "data.max_bad_fraction=0.375")["verdict"] == "warnings"


@pytest.mark.parametrize(("policy", "max_tokens"), [("shrink_images", 35), ("trim_text", 56)])
def test_what_is_changed_is_counted_as_training_counts_it(recipe, data, policy, max_tokens):
    if policy == "trim_text":
        rows = rows_of(data)
        for number, row in enumerate(rows[:5]):
            row["messages"][1]["content"] = f"red {number} " * 20
        write_rows(data, rows)
    path = recipe(data__over_length=policy, data__max_tokens=max_tokens)
    summary = check_summary(path)
    assert summary["verdict"] == "ready"
    assert sum(summary["changed"].values()) >= 5
    assert summary["changed"] == train_once(path)["notes"]


def test_a_target_that_matches_nothing_is_trainings_own_error(recipe):
    path = recipe(lora_target=["q_prj"])
    summary = check_summary(path)
    [error] = messages(summary, "error")
    with pytest.raises(VlmtuneError) as caught:
        train_once(path)
    assert error == str(caught.value)
    line = path.read_text().splitlines().index("lora_target:") + 1
    assert (summary["problems"][0]["file"], summary["problems"][0]["line"]) == (str(path), line)


def test_a_schedule_that_cannot_be_is_trainings_own_error(recipe):
    path = recipe(adalora={"initial_rank": 4, "target_rank": 2, "warmup": 3, "final": 3})
    [error] = messages(check_summary(path), "error")
    with pytest.raises(VlmtuneError) as caught:
        train_once(path)
    assert error == str(caught.value)


def test_modules_for_pictures_without_a_picture_are_an_error(recipe, data):
    rows = rows_of(data)
    for row in rows:
        row["messages"][0]["content"] = "Say something."
    write_rows(data, rows)
    path = recipe()
    assert any("no sample has a picture" in m for m in messages(check_summary(path), "error"))
    with pytest.raises(VlmtuneError, match="no sample has a picture"):
        train_once(path)
    assert check_summary(path, "lora_target=[q_proj]")["verdict"] == "warnings", "they repeat"


def test_modules_for_pictures_train_on_videos_alone(recipe, data):
    frames = [f"images/{path.name}" for path in sorted((data.parent / "images").iterdir())[:2]]
    rows = rows_of(data)
    for row in rows:
        row["messages"][0]["content"][0] = {"type": "video", "video": frames}
    write_rows(data, rows)
    path = recipe()
    assert messages(check_summary(path), "error") == []
    assert train_once(path)["samples"] == 16


@pytest.mark.parametrize("reason", ["too long", "bad"])
def test_rows_left_out_at_the_start_keep_nobody_from_training(recipe, data, reason, tmp_path):
    """More of them than are tried before a run that stops at bad rows gives up."""
    rows = rows_of(data)
    bad = {"too long": "red " * 60, "bad": "<|im_end|>"}[reason]
    refused = [row | {"id": f"no-{n}"} for n, row in enumerate(rows * 2)]
    for row in refused:
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": bad}]
    write_rows(data, refused + rows)
    keys = {"data__max_tokens": 60, "data__over_length": "drop", "data__on_bad_sample": "skip"}
    path = recipe(**keys, data__max_bad_fraction=0.9)
    summary = check_summary(path)
    assert (messages(summary, "error"), summary["samples"]) == ([], 16)
    trained = train_once(path)
    assert (trained["samples"], trained["skipped"]) == (16, 32)


def test_samples_with_pictures_may_all_be_left_out_where_nothing_wants_them(recipe, data):
    rows = rows_of(data)
    text_only = [json.loads(json.dumps(row)) | {"id": f"text-{n}"} for n, row in enumerate(rows)]
    for row in text_only:
        row["messages"][0]["content"] = "Say something."
    for row in rows:
        row["messages"][1]["content"] = "red " * 60
    write_rows(data, rows + text_only)
    path = recipe(data__max_tokens=60, data__over_length="drop", lora_target=["q_proj"])
    assert messages(check_summary(path), "error") == []
    assert train_once(path)["samples"] == 16
    path = recipe(data__max_tokens=60, data__over_length="drop", output_dir=str(data.parent / "x"))
    assert any("no sample has a picture" in m for m in messages(check_summary(path), "error"))
    with pytest.raises(VlmtuneError, match="too long"):
        train_once(path)


def test_a_picture_is_looked_for_in_every_row_where_modules_want_one(recipe, data, monkeypatch):
    monkeypatch.setattr(probe, "MAX_PROBED", 3)
    rows = rows_of(data)
    for row in [*rows[:7], *rows[8:]]:
        row["messages"][0]["content"] = "Say something."
    write_rows(data, rows)
    path = recipe()
    assert messages(check_summary(path), "error") == []
    assert train_once(path)["samples"] == 16


@pytest.mark.parametrize("length", [{"train__epochs": 1.0}, {"train__max_steps": 2}])
def test_a_set_of_which_nothing_is_left_is_trainings_own_error(recipe, data, length):
    length = {"train__epochs": None, "train__max_steps": None} | length
    second = data.with_name("second.jsonl")
    rows = rows_of(data)
    write_rows(second, [row | {"id": f"second-{n}"} for n, row in enumerate(rows)])
    never = {"path": str(second), "weight": 0.03}
    for entries in ([never], [str(data), never]):
        path = recipe(data__train=entries, **length)
        [error] = messages(check_summary(path), "error")
        assert "gives an epoch without samples" in error and "second.jsonl: 16 samples" in error
        with pytest.raises(VlmtuneError) as caught:
            train_once(path)
        assert str(caught.value) == error
    write_rows(data, ["{no json"] * 3)
    path = recipe(data__on_bad_sample="skip", data__max_bad_fraction=1.0, **length)
    [error] = messages(check_summary(path), "error")
    with pytest.raises(VlmtuneError) as caught:
        train_once(path)
    assert str(caught.value) == error
    assert error == (
        "data.train: no sample is left to train on; got: 3 rows, none of which can be used"
    )


def test_a_folder_with_a_run_is_a_warning_that_says_how_to_go_on(recipe, tmp_path):
    path = recipe()
    train_once(path)
    [warning] = messages(check_summary(path), "warning")
    assert "the output folder is occupied" in warning and "--resume auto" in warning


def test_a_folder_of_something_else_is_trainings_own_error(recipe, tmp_path):
    path = recipe()
    (tmp_path / "run").mkdir()
    assert check_summary(path)["verdict"] == "ready"
    (tmp_path / "run" / "photo.jpg").write_text("mine")
    [error] = messages(check_summary(path), "error")
    for resume in (None, "auto", "never"):
        with pytest.raises(VlmtuneError) as caught:
            train_once(path, resume=resume)
        assert error in str(caught.value) and "--resume" not in error


def test_a_base_with_an_adapter_beside_it_is_trainings_own_error(recipe, tiny_vlm, tmp_path):
    base = shutil.copytree(tiny_vlm, tmp_path / "base")
    path = recipe(model=str(base))
    assert check_summary(path)["verdict"] == "ready"
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    [error] = messages(check_summary(path), "error")
    assert "vlmtune merge" in error and "adapter_config.json" in error
    with pytest.raises(VlmtuneError) as caught:
        train_once(path)
    assert error in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_held_out_rows_that_cannot_be_scored_are_trainings_own_error(recipe, data):
    held_out = data.with_name("eval.jsonl")
    rows = rows_of(data)[:3]
    write_rows(held_out, [row | {"options": ["never", "ever"]} for row in rows])
    path = recipe(data__eval=str(held_out), eval={"task": "choice"})
    errors = messages(check_summary(path), "error")
    assert len(errors) == 3 and all("none of the options" in error for error in errors)
    with pytest.raises(VlmtuneError, match="none of the options"):
        train_once(path)


def test_a_bad_row_that_is_never_evaluated_on_in_training_is_a_warning(recipe, data):
    held_out = data.with_name("eval.jsonl")
    rows = rows_of(data)
    rows[4]["messages"][1]["content"] = "<|im_end|>"
    write_rows(held_out, rows)
    found = {}
    for num in (1, 16):
        path = recipe(data__eval=str(held_out), eval={"max_samples": num, "max_new_tokens": 2})
        summary = check_summary(path)
        found[num] = [p["severity"] for p in summary["problems"] if p["line"] == 5]
    assert found == {1: ["warning"], 16: ["error"]}
    train_once(recipe(data__eval=str(held_out), eval={"max_samples": 1, "max_new_tokens": 2}))


def test_a_contrastive_run_is_checked_by_its_pairs(recipe, data):
    rows = rows_of(data)
    rows[2]["messages"][0]["content"] = "No picture here"
    write_rows(data, rows)
    path = recipe(objective="contrastive")
    errors = messages(check_summary(path), "error")
    assert errors == ["there is no picture to embed"]
    with pytest.raises(VlmtuneError, match="no picture to embed"):
        train_once(path)


def test_a_cache_that_cannot_be_is_a_warning_and_training_goes_on_without(recipe, data, tmp_path):
    (tmp_path / "file").write_text("no folder")
    keys = {"data__cache": "disk", "lora_target": ["q_proj"]}
    path = recipe(data__cache_dir=str(tmp_path / "file" / "cache"), **keys)
    [warning] = messages(check_summary(path), "warning")
    assert "training goes on without it" in warning and f"a file at {tmp_path / 'file'}" in warning
    assert train_once(path)["samples"] == 16
    path = recipe(data__cache_dir=str(tmp_path / "new" / "cache"), **keys, output_dir="other")
    assert check_summary(path)["verdict"] == "ready"


def test_streamed_rows_are_read_through(recipe, data, tmp_path):
    damage(data)
    keys = {"data__streaming": True, "train__max_steps": 2, "train__epochs": None}
    summary = check_summary(recipe(**keys, data__max_tokens=60))
    lines = {p["line"] for p in summary["problems"] if p["severity"] == "error"}
    assert lines == {2, 4, 6, 8, 10, 12}
    write_rows(data, ["{no json"] * 3)
    with pytest.raises(VlmtuneError, match=r"train\.jsonl:\d: not JSON"):
        train_once(recipe(**keys))
