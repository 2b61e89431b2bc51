"""The Python API: recipes and overrides as Python values, results as the commands print them."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import vlmtune
from tests.conftest import ROOT
from tests.train.training import adapter_of, copy_sample, write_recipe
from vlmtune import api
from vlmtune.errors import ErrorGroup, VlmtuneError
from vlmtune.recipe.load import load_recipe


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that runs no command; one leaves its handler, here for a closed stream."""
    monkeypatch.setattr(logging.getLogger("vlmtune"), "handlers", [])


@pytest.fixture
def recipe(tmp_path: Path, tiny_vlm: Path, sample_data: Path) -> Path:
    data = copy_sample(sample_data, tmp_path / "data", keep=16)
    return write_recipe(
        tmp_path, tiny_vlm=tiny_vlm, data=data, rank=4, train__max_steps=2, train__save_every=2
    )


def test_the_package_itself_holds_its_version_and_its_parts_alone() -> None:
    """A function at its top would hide the package of that name, or be hidden by it."""
    parts = {path.stem for path in (ROOT / "vlmtune").iterdir()}
    for name, value in vars(vlmtune).items():
        if not name.startswith("_") and name != "annotations":
            assert isinstance(value, ModuleType) and name in parts, name
    assert isinstance(vlmtune.train, ModuleType) and callable(api.train)  # type: ignore[attr-defined]


def test_importing_the_api_imports_no_torch() -> None:
    code = "import sys, vlmtune.api; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    wrong = "import sys, vlmtune.sessions.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", wrong]).returncode == 1


def test_training_by_path_and_by_mapping_is_training_by_the_command(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from vlmtune.cli.app import app

    as_mapping = yaml.safe_load(recipe.read_text())
    given = json.dumps(as_mapping)
    runs = [tmp_path / name for name in ("path", "mapping", "command", "seed")]
    first = api.train(recipe, quiet=True, output_dir=runs[0])
    second = api.train(as_mapping, quiet=True, output_dir=str(runs[1]))
    api.train(as_mapping, quiet=True, output_dir=runs[3], seed=1)
    assert capfd.readouterr() == ("", ""), "quiet"
    done = CliRunner().invoke(app, ["train", str(recipe), f"output_dir={runs[2]}", "--json"])
    assert json.dumps(as_mapping) == given
    printed = json.loads(done.stdout)
    assert list(printed) == [field.name for field in dataclasses.fields(first)]
    assert printed["loss"] == first.loss == second.loss
    assert (first.run, first.steps, first.result) == (runs[0], 2, runs[0] / "adapter")
    adapters = [adapter_of(run) for run in runs]
    for adapter in adapters[1:3]:
        assert all(torch.equal(adapter[name], adapters[0][name]) for name in adapters[0])
    assert not all(torch.equal(adapters[3][name], adapters[0][name]) for name in adapters[0])
    assert yaml.safe_load((runs[1] / "recipe.yaml").read_text()) == as_mapping
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.steps = 3  # type: ignore[misc]


def test_progress_goes_to_stderr_alone(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    api.train(recipe, **{"train.max_steps": 1})
    out, err = capfd.readouterr()
    assert out == "" and "step 1/1" in err


def test_one_process_trains_in_another_precision_and_in_a_thread(recipe: Path, tmp_path: Path):
    def train() -> None:
        summaries.append(
            api.train(
                recipe,
                quiet=True,
                output_dir=tmp_path / "bf16",
                **{"train.precision": "bf16", "train.max_steps": 1},
            )
        )

    summaries = [api.train(recipe, quiet=True, **{"train.max_steps": 1})]
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert [summary.steps for summary in summaries] == [1, 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.max_steps", 7),
        ("train.learning_rate", 1e-4),
        ("train.part_learning_rates", {"vision": 1e-5}),
        ("lora_target", ["q_proj", "re:.*v_proj"]),
        ("lora_target", ("q_proj",)),
        ("train.gradient_checkpointing", True),
        ("output_dir", Path("some where") / "no"),
        ("output_dir", "no"),
        ("eval.embedding_prompt", "a: b # c\n'd' \\ é\u2028"),
        ("train.max_grad_norm", None),
    ],
)
def test_a_python_value_is_what_the_recipe_holds(recipe: Path, key: str, value: object) -> None:
    if key == "eval.embedding_prompt":
        overrides = {"objective": "contrastive", key: value}
    else:
        overrides = {key: value}
    found: object = load_recipe(recipe, overrides).recipe
    for name in key.split("."):
        found = getattr(found, name)
    expected = str(value) if isinstance(value, Path) else value
    assert found == (list(expected) if isinstance(expected, tuple) else expected)


def test_none_takes_a_key_out(recipe: Path) -> None:
    loaded = load_recipe(recipe, {"train.max_steps": None, "train.epochs": 2.0})
    assert (loaded.recipe.train.max_steps, loaded.recipe.train.epochs) == (None, 2.0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"train.max_stps": 3}, "override 'train.max_stps=3': unknown key 'train.max_stps'; did"),
        ({"rank": "8"}, "override \"rank='8'\": bad value of rank; got: '8' (text)"),
        ({"train.max_steps": object()}, "a value that a recipe cannot hold; got: <object"),
        ({"lora_target": {"q_proj"}}, "a YAML tag that recipes do not use: tag:yaml.org,2002:set"),
    ],
)
def test_a_wrong_override_is_named(recipe: Path, overrides: dict, expected: str) -> None:
    for call in (api.train, api.check):
        with pytest.raises(VlmtuneError, match=re.escape(expected)):
            call(recipe, **overrides)


def test_a_wrong_mapping_is_named_without_a_line(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load(recipe.read_text())
    with pytest.raises(ErrorGroup) as caught:
        api.train(values | {"rnak": 3, "seed": "x"})
    assert str(caught.value).splitlines()[0].startswith("recipe: ")
    assert "recipe: unknown key 'rnak'; did you mean 'rank'?" in str(caught.value)
    assert all(error.line is None for error in caught.value.errors)
    monkeypatch.chdir(tmp_path / "data")
    values["data"]["train"] = "train.jsonl"
    assert load_recipe(values).recipe.data.train[0].path == str(tmp_path / "data" / "train.jsonl")
    values["data"]["train"] = "other.jsonl"
    found = api.check(values | {"data": {"train": str(tmp_path / "data" / "train.jsonl")}})
    assert found.verdict == "ready"


def test_a_check_finds_what_the_command_prints(
    recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from vlmtune.cli.common import print_json

    data = recipe.parent / "data" / "train.jsonl"
    data.write_text("{\n" + data.read_text())
    found = api.check(recipe, workers=0, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert found.verdict == "not_ready" and found.problems[0].line == 1
    print_json(found)
    printed = json.loads(capfd.readouterr().out)
    assert list(printed) == [field.name for field in dataclasses.fields(found)]
    assert printed["problems"][0] == dataclasses.asdict(found.problems[0])


def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    trained, evaluated, merged = done.stdout.splitlines()
    assert trained.startswith("3 ") and trained.endswith("runs/python/adapter")
    assert 0 <= float(evaluated.split()[0]) <= 1 and evaluated.endswith("predictions.jsonl")
    assert merged.startswith("True ")
    assert (tmp_path / "runs" / "python-merged" / "config.json").is_file()


def test_the_wheel_says_that_the_package_is_typed() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in settings["package-data"]["vlmtune"]
    assert (ROOT / "vlmtune" / "py.typed").is_file()
