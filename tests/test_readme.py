"""The README's recipe loads as it stands there, its files exist, and its commands are commands."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from vlmtune.cli.app import app
from vlmtune.recipe.load import load_recipe


def test_the_recipe_loads(root: Path, tmp_path: Path):
    blocks = re.findall(r"```yaml\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    assert blocks
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("{}\n")
    for block in blocks:
        (tmp_path / "recipe.yaml").write_text(block)
        load_recipe(tmp_path / "recipe.yaml")


def test_the_files_it_names_exist(root: Path):
    text = (root / "README.md").read_text()
    named = set(re.findall(r"\]\(([\w/.-]+\.md)\)", text))
    named |= set(re.findall(r"(?:bash|python) (scripts/[\w.]+)", text))
    named |= {f"configs/{name}" for name in re.findall(r"`(\w+\.yaml)`", text)} - {
        "configs/my.yaml"
    }
    assert len(named) > 8
    assert not [name for name in named if not (root / name).exists()]


def test_the_commands_it_names_exist(root: Path):
    named = set(re.findall(r"`?vlmtune (\w+)", (root / "README.md").read_text()))
    known = set(re.findall(r"^  (\w+)  ", CliRunner().invoke(app, ["--help"]).stdout, re.MULTILINE))
    assert named >= {"train", "eval", "merge", "chat", "recipe"}
    assert named <= known


def test_the_oldest_python_is_the_same_everywhere_and_one_that_transformers_takes(root: Path):
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    oldest = settings["project"]["requires-python"].removeprefix(">=")
    assert settings["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert settings["tool"]["mypy"]["python_version"] == oldest
    for file in ("README.md", "scripts/environment.sh"):
        assert re.findall(r"Python (\S+) or newer", (root / file).read_text()) == [oldest], file
    assert f"({oldest.replace('.', ', ')})" in (root / "scripts/environment.sh").read_text()
    assert oldest in SpecifierSet(metadata("transformers")["Requires-Python"])
    assert "3.10" not in SpecifierSet(metadata("transformers")["Requires-Python"])
