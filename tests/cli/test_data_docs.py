"""The commands of docs/data.md's section on `vlmtune data` run, and print what it shows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import ROOT
from vlmtune.cli.app import app

SECTION = (ROOT / "docs" / "data.md").read_text().partition("\n## The data commands\n")[2]
SECTION = re.split(r"^## ", SECTION, flags=re.M)[0]
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", SECTION, re.M | re.S)
    for line in block.splitlines()
]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the project's, to write into."""
    for name in ("data", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_group_is_shown():
    shown = {shlex.split(line)[2] for line in COMMANDS}
    assert shown == {"convert", "preview", "stats", "split"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_runs(checkout: Path, line: str):
    program, *arguments = shlex.split(line)
    assert program == "vlmtune"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout
    if "--json" in arguments:
        json.loads(result.stdout)
    for name in re.findall(r"out/\S+", line):
        assert (checkout / name).exists()


def test_the_preview_shown_is_what_is_printed(checkout: Path):
    [shown] = re.findall(r"^```text\n(.*?)^```$", SECTION, re.M | re.S)
    [line] = [line for line in COMMANDS if "--ids" in line]
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.stdout.strip() == shown.strip()
