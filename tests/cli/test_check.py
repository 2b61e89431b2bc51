from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.signals import hears_ctrl_c
from tests.train.training import copy_sample, write_recipe
from vlmtune.cli.app import app


def run_check(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def data(sample_data: Path, tmp_path: Path) -> Path:
    return copy_sample(sample_data, tmp_path / "data", keep=30)


@pytest.fixture
def recipe(tiny_vlm: Path, data: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, tiny_vlm=tiny_vlm, data=data)


def test_json_holds_every_figure_and_nothing_else_is_on_stdout(recipe: Path) -> None:
    code, stdout, stderr = run_check(recipe, "--json")
    found = json.loads(stdout)
    assert code == 0
    assert (found["verdict"], found["problems"], found["samples"]) == ("ready", [], 30)
    assert found["tokens"] > found["image_tokens"] > 0
    assert found["memory_bytes"] == sum(found["memory"].values()) > 0
    assert found["steps"] == 12 and found["epoch"]["steps"] == 8
    assert found["run"]["samples"] == 48
    assert found["disk"]["free_bytes"] > found["disk"]["needed_bytes"] > 0
    assert found["parts"]["vision"]["trainable_parameters"] > 0
    assert "checking data.train 30 of 30" in stderr


def test_people_get_a_table_and_the_verdict_last(recipe: Path) -> None:
    code, stdout, _ = run_check(recipe, "--quiet")
    assert code == 0
    assert stdout.splitlines()[-1] == "ready"
    assert "30 of 30 rows usable" in " ".join(stdout.split())
    assert "memory, estimated" in stdout


def test_not_ready_is_exit_code_1_and_names_file_and_line(recipe: Path, data: Path) -> None:
    lines = data.read_text().splitlines()
    lines[6] = "{"
    data.write_text("\n".join(lines) + "\n")
    code, stdout, _ = run_check(recipe)
    assert code == 1
    assert f"error: {data}:7: not JSON" in stdout
    assert stdout.splitlines()[-1] == "not ready (1 error)"
    code, stdout, _ = run_check(recipe, "--json")
    assert code == 1
    [problem] = json.loads(stdout)["problems"]
    assert (problem["severity"], problem["file"], problem["line"]) == ("error", str(data), 7)
    assert json.loads(stdout)["verdict"] == "not_ready"


def test_of_a_kind_twenty_are_told_and_the_rest_is_counted(recipe: Path, data: Path) -> None:
    data.write_text("{}\n" * 30)
    code, stdout, _ = run_check(recipe)
    assert code == 1
    assert stdout.count("error: ") == 20 + 2, "and one that says how many more, and no sample left"
    assert "and 10 more like it" in stdout


def test_a_wrong_recipe_is_exit_code_2(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("lora_target", "lora_targets"))
    code, stdout, stderr = run_check(recipe, "--json")
    assert (code, stdout) == (2, "")
    assert "unknown key 'lora_targets'" in stderr


def test_overrides_count(recipe: Path) -> None:
    code, stdout, _ = run_check(recipe, "data.max_tokens=20", "--json")
    found = json.loads(stdout)
    assert (code, found["samples"]) == (1, 0)
    assert all("data.max_tokens" in p["message"] for p in found["problems"][:30])


def test_some_rows_are_looked_at_and_that_is_said(recipe: Path) -> None:
    code, stdout, _ = run_check(recipe, "--max-samples", 6, "--json")
    found = json.loads(stdout)
    assert (code, found["verdict"], found["samples"]) == (0, "warnings", 6)
    assert "only 6 of 30 rows were checked" in found["problems"][0]["message"]
    assert found["epoch"]["samples"] == 30
    whole = json.loads(run_check(recipe, "--json")[1])
    assert found["epoch"]["tokens"] == pytest.approx(whole["epoch"]["tokens"], rel=0.1)


def test_several_processes_find_what_one_finds(recipe: Path, data: Path) -> None:
    lines = data.read_text().splitlines() * 8
    for number in range(0, len(lines), 2):
        lines[number] = "{" if number % 4 else lines[number].replace("assistant", "asistant")
    data.write_text("\n".join(lines) + "\n")
    alone = run_check(recipe, "--json", "--workers", 0)
    together = run_check(recipe, "--json", "--workers", 2)
    free = [json.loads(out[1])["disk"].pop("free_bytes") for out in (alone, together)]
    assert len(free) == 2
    found = [json.loads(out[1]) for out in (alone, together)]
    for one in found:
        one["disk"] = None
    assert found[0] == found[1]
    assert len(found[0]["problems"]) > 100


def test_what_any_layer_warns_of_is_a_problem_too(recipe: Path) -> None:
    code, stdout, stderr = run_check(recipe, "rank=400", "--json")
    found = json.loads(stdout)
    assert (code, found["verdict"]) == (0, "warnings")
    assert "rank 400 is more than" in found["problems"][0]["message"]
    assert "rank 400" not in stderr, "told once"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_without_a_file_is_a_problem_of_the_recipe(
    recipe: Path, tiny_vlm: Path, tmp_path: Path, name: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_vlm, model)
    (model / name).unlink()
    code, stdout, stderr = run_check(recipe, f"model={model}", "--json")
    if name == "config.json":
        assert code == 2 and "config.json" in stderr
    else:
        assert code == 1
        assert any(str(model) in str(p) for p in json.loads(stdout)["problems"])
        assert json.loads(stdout)["sets"]["data.train"]["samples"] == 30, "rows are still read"


def test_a_weight_file_that_is_cut_off_is_found_by_its_header(
    recipe: Path, tiny_vlm: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_vlm, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, stdout, _ = run_check(recipe, f"model={model}", "--json")
    [problem] = json.loads(stdout)["problems"]
    assert code == 1
    assert problem["file"] == str(weights) and "damaged" in problem["message"]


def test_ctrl_c_ends_with_130_and_leaves_no_process(recipe: Path, data: Path) -> None:
    line = json.loads(data.read_text().splitlines()[0])
    del line["id"]
    data.write_text((json.dumps(line) + "\n") * 60_000)
    with subprocess.Popen(
        [sys.executable, "-m", "vlmtune", "check", str(recipe), "--workers", "2"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=hears_ctrl_c,
        text=True,
    ) as process:
        assert process.stderr is not None
        for told in process.stderr:
            if "checking data.train" in told:
                break
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert rest.splitlines()[-1] == "interrupted"
    assert "Traceback" not in rest
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
