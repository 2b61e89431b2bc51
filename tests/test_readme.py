"""The README's recipe loads as it stands there, its commands are commands, and the files that it,
the other documents, the recipes, the scripts and the code name exist."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
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


def test_the_recipes_it_names_exist(root: Path):
    text = (root / "README.md").read_text()
    named = {f"configs/{name}" for name in re.findall(r"`(\w+\.yaml)`", text)}
    assert len(named) > 4
    assert not [name for name in named - {"configs/my.yaml"} if not (root / name).exists()]


TEXTS = ("README.md", "CHANGELOG.md", "docs/*.md", "data/*/*.md", "configs/*", ".ci/*")
CODE = ("scripts/**/*.py", "scripts/*.sh", "vlmtune/**/*.py")
NAMED = re.compile(r"(?<![\w/.-])(?:scripts|configs|docs|tests|\.ci)/[\w/.-]*\w")
LINK = re.compile(r"\]\(([\w/.-]+)(?:#[\w-]*)?\)")


def paths_that_are_gone(root: Path, file: Path) -> list[str]:
    """The paths from the root, and the links of a document, that `file` names and that are not."""
    text = file.read_text(encoding="utf-8")
    named = {path: root / path for path in NAMED.findall(text)}
    if file.suffix == ".md":
        named |= {link: file.parent / link for link in LINK.findall(text)}
    return [name for name, path in named.items() if not path.exists()]


@pytest.mark.parametrize("pattern", [*TEXTS, *CODE])
def test_the_files_that_are_named_anywhere_exist(root: Path, pattern: str):
    files = [file for file in sorted(root.glob(pattern)) if file.is_file()]
    assert files
    gone = {str(f.relative_to(root)): g for f in files if (g := paths_that_are_gone(root, f))}
    assert not gone


@pytest.mark.parametrize("pattern", [*TEXTS, *CODE, "pyproject.toml"])
def test_what_is_to_be_installed_is_a_checkout_as_the_package_is_not_published(
    root: Path, pattern: str
):
    published = re.compile(r"pip install [^\n`]*(?<![/.\w])vlmtune")
    for file in root.glob(pattern):
        assert file.is_dir() or not published.search(file.read_text(encoding="utf-8")), file
    assert published.search("pip install 'vlmtune[video]'")


def test_a_file_that_is_gone_is_found(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "a.md"
    lost = "scripts/" + "lost.py"
    page.write_text(f"See [b](b.md#x) and [itself](a.md), docs/a.md and `{lost}`.")
    assert sorted(paths_that_are_gone(tmp_path, page)) == ["b.md", lost]


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
