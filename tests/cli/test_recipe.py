"""`vlmtune recipe show`, `vlmtune recipe schema`, and the generated reference."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vlmtune.cli.app import app
from vlmtune.recipe.load import load_recipe, recipe_json_schema


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text("{}\n")
    path = tmp_path / "recipe.yaml"
    path.write_text("model: org/some-vlm\noutput_dir: o\ndata: {train: train.jsonl}\n")
    return path


def test_show_prints_the_resolved_recipe(recipe_file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["recipe", "show", str(recipe_file), "train.max_steps=7"])
    assert (result.exit_code, result.stderr) == (0, "")
    shown = tmp_path / "shown.yaml"
    shown.write_text(result.stdout)
    assert load_recipe(shown).recipe == load_recipe(recipe_file, ["train.max_steps=7"]).recipe


def test_show_as_json_is_a_recipe_too(recipe_file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["recipe", "show", str(recipe_file), "--json", "rank=3"])
    assert json.loads(result.stdout)["rank"] == 3
    shown = tmp_path / "shown.json"
    shown.write_text(result.stdout)
    assert load_recipe(shown).recipe == load_recipe(recipe_file, ["rank=3"]).recipe


def test_show_exits_2_with_every_error_on_stderr(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "rnak: 8\nalpha: x\n")
    result = CliRunner().invoke(app, ["recipe", "show", str(recipe_file), "seed=-1"])
    assert (result.exit_code, result.stdout) == (2, "")
    places = [line.split(": ")[0] for line in result.stderr.splitlines()]
    assert places == [f"{recipe_file}:4", f"{recipe_file}:5", "override 'seed=-1'"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_schema_is_json(options: list[str]) -> None:
    result = CliRunner().invoke(app, ["recipe", "schema", *options])
    assert "lora_target" in json.loads(result.stdout)["properties"]


def test_reference_is_current(root: Path, tmp_path: Path) -> None:
    script = root / "scripts" / "make_recipe_docs.py"
    command = [sys.executable, str(script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


def keys_of(schema: dict[str, Any], node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every (section, key) of a JSON schema, however deep, optional, or in a list."""
    if isinstance(node, list):
        for each in node:
            yield from keys_of(schema, each, path)
    elif isinstance(node, dict):
        yield from keys_of(schema, [node.get(name, []) for name in ("anyOf", "items")], path)
        if "$ref" in node:
            yield from keys_of(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[1]], path)
        for key, below in node.get("properties", {}).items():
            yield path, key
            yield from keys_of(schema, below, f"{path}.{key}".strip("."))


def keys_on(page: str) -> set[tuple[str, str]]:
    """Every (section, key) of the page's tables."""
    found = set()
    for part in page.split("\n## ")[1:]:
        title, text = part.split("\n", 1)
        keys = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
        found |= {(above, key) for above in re.findall(r"`(.+?)`", title) or [""] for key in keys}
    return found


def test_every_key_of_the_schema_is_on_the_page_and_every_link_leads_somewhere(root: Path) -> None:
    page, schema = (root / "docs" / "recipe.md").read_text(), recipe_json_schema()
    expected = set(keys_of(schema, schema))
    assert {("eval.guard", "max_drop"), ("eval.guard.data", "path"), ("", "rank")} <= expected
    assert keys_on(page) == expected
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([\w-]+)\)", page)) <= anchors


def test_check_finds_a_reference_that_is_not_current(root: Path, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "docs").mkdir()
    script = tmp_path / "scripts" / "make_recipe_docs.py"
    script.write_text((root / "scripts" / "make_recipe_docs.py").read_text())
    page = (root / "docs" / "recipe.md").read_text()
    (tmp_path / "docs" / "recipe.md").write_text(page.replace("`rank`", "`rnak`"))
    command = [sys.executable, str(script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 1
    assert "not current" in done.stderr
