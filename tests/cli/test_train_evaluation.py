"""Held-out data of a recipe, checked before the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmtune.errors import VlmtuneError
from vlmtune.recipe.load import load_recipe
from vlmtune.sessions.train_evaluation import EvalSets, load_eval_sets


def held_out(folder: Path, rows: list[dict], evaluation: str) -> EvalSets:
    data = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(data)
    (folder / "recipe.yaml").write_text(
        f"model: org/model\noutput_dir: run\ndata: {{train: data.jsonl, eval: data.jsonl}}\n"
        f"eval: {evaluation}\n"
    )
    return load_eval_sets(load_recipe(folder / "recipe.yaml").recipe)


def row(**keys: object) -> dict:
    asked = {"role": "user", "content": "Which?"}
    return {"messages": [asked, {"role": "assistant", "content": "left"}], **keys}


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        (
            "{task: choice, before: false}",
            "data.jsonl:2: the reference matches none of the options",
        ),
        ("{task: grounding, before: false}", "nothing to measure"),
        ("{task: retrieval, before: false}", "row has no picture"),
        ("{guard: {data: data.jsonl, task: choice}}", "data.jsonl:2: the reference matches none"),
    ],
)
def test_what_cannot_be_scored_shows_before_training(
    evaluation: str, expected: str, tmp_path: Path
) -> None:
    rows = [row(options=["left", "right"]), row(options=["up", "down"])]
    with pytest.raises(VlmtuneError, match=expected):
        held_out(tmp_path, rows, evaluation)


def test_what_can_be_scored_is_taken(tmp_path: Path) -> None:
    rows = [row(options=["left", "right"]) for _ in range(2)]
    assert len(held_out(tmp_path, rows, "{task: choice, before: false}").samples) == 2
