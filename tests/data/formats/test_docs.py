"""The examples of docs/data.md, run: written out, loaded by their recipe, told by their format."""

from __future__ import annotations

import logging
import re

import PIL.Image
import pytest

from tests.conftest import ROOT
from vlmtune.data.dataset import load_conversations, open_conversations
from vlmtune.data.formats.registry import FORMATS
from vlmtune.data.formats.table import USUAL_NAMES
from vlmtune.recipe.load import load_recipe

PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCK = re.compile(r"^```(?P<language>\w+) ?(?P<name>\S*)\n(?P<content>.*?)^```$", re.M | re.S)


def section(title: str) -> str:
    """The text below a heading `### title`, up to the next heading."""
    (text,) = re.findall(rf"^### {title}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    return text


def write_examples(text, folder) -> None:
    """The files of a section, and its recipe as `recipe.yaml`."""
    for block in BLOCK.finditer(text):
        content = block["content"]
        if block["name"] == "tree":
            for line in content.splitlines():
                path, _, said = line.partition(" ")
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                _write(folder / path, said.strip())
        elif block["language"] == "yaml":
            (folder / "recipe.yaml").write_text(f"model: any/model\noutput_dir: run\n{content}")
        else:
            (folder / block["name"]).write_text(content)


def _write(path, said: str) -> None:
    if path.suffix == ".png":
        PIL.Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_text(said + "\n")


def test_every_format_has_a_section():
    titles = re.findall(r"^### (\w+)$", PAGE.partition("## Formats")[2], re.M)
    assert set(FORMATS) <= set(titles)
    assert re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \|", PAGE, re.M) == list(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_an_example_gives_three_conversations_in_its_format(name, tmp_path, caplog):
    write_examples(section(name), tmp_path)
    for folder in ("train2014", "png", "val2017"):
        (tmp_path / folder).mkdir()
    entries = load_recipe(tmp_path / "recipe.yaml").recipe.data.train
    with caplog.at_level(logging.INFO, logger="vlmtune"):
        conversations, _ = load_conversations(entries, check_media=False)
    assert len(conversations) == 3
    messages = [record.getMessage() for record in caplog.records]
    assert f"3 rows, format {name} (detected)" in "\n".join(messages)
    assert not any("unused keys" in message for message in messages)
    for image in (image for conversation in conversations for image in conversation.images):
        path = image.base_dir / image.ref
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8)).save(path)
    kept, skipped = open_conversations(entries, on_bad_sample="error")
    assert (list(kept), skipped) == (conversations, [])


def test_the_usual_names_of_columns_are_those_of_the_page():
    rows = re.findall(r"^\| `(\w+)` \| (`.*`) \|$", section("table"), re.M)
    assert {role: tuple(re.findall(r"`(\w+)`", names)) for role, names in rows} == USUAL_NAMES
