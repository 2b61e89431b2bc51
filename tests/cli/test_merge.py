"""`vlmtune merge`: what it prints and its exit codes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.models.adapted import adapted, recipe_for, write_run
from tests.tiny_models import save_tiny_model
from vlmtune.cli.app import app


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    model = save_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("model"))
    return write_run(tmp_path_factory.mktemp("run"), adapted(model), recipe_for(model))


def invoke(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def test_json_is_the_only_thing_on_stdout(run_folder, tmp_path):
    result = invoke(run_folder, "--output", tmp_path / "merged", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["output"] == str(tmp_path / "merged")
    assert report["verified"] is True
    assert 0 <= report["max_difference"] <= report["tolerance"]
    again = invoke(run_folder, "--output", tmp_path / "merged")
    assert again.exit_code == 2
    assert "not empty" in again.stderr and again.stdout == ""


def test_a_person_reads_what_was_verified(run_folder, tmp_path):
    result = invoke(run_folder, "--output", tmp_path / "merged", "--dtype", "float32")
    assert result.exit_code == 0
    assert "verified on" in result.stdout and "float32" in result.stdout


def test_a_merge_that_does_not_verify_exits_1_and_says_so_in_json(tiny_vlm, tmp_path):
    targets = {"lora_target": ["q_proj", "v_proj"]}
    run = write_run(
        tmp_path / "run", adapted(tiny_vlm, size=1e-4, **targets), recipe_for(tiny_vlm, **targets)
    )
    result = invoke(run, "--output", tmp_path / "merged", "--json", "--dtype", "bfloat16")
    assert result.exit_code == 1, result.stderr
    assert json.loads(result.stdout)["verified"] is False
    assert "loses the adapter" in result.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shard-size", "huge"], "--shard-size"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_wrong_input_exits_2(run_folder, tmp_path, arguments, message):
    result = invoke(run_folder, "--output", tmp_path / "merged", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_no_run_exits_2(tmp_path):
    (tmp_path / "empty").mkdir()
    result = invoke(tmp_path / "empty", "--output", tmp_path / "merged")
    assert result.exit_code == 2
    assert "not a run, an adapter or a model" in result.stderr
