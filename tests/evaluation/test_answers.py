from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.answer_log import AnswerLog, kept_settings, remove_answer_log
from vlmtune.evaluation.runner import evaluate
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import EvalSection

SETTINGS = {"weights": "a", "stop": ("x",), "dtype": "float32"}


def keep(folder: Path, texts: dict[int, str], *, rank: int = 0, **changed: object) -> None:
    with AnswerLog(folder, SETTINGS | changed, rank=rank) as kept:
        kept.append(texts)


def test_answers_of_every_process_are_found_again(tmp_path: Path) -> None:
    keep(tmp_path / "new", {0: "a", 2: "zwölf\nLinien"})
    keep(tmp_path / "new", {1: "b"}, rank=1)
    keep(tmp_path / "new", {4: "e"})
    found = AnswerLog(tmp_path / "new", SETTINGS)
    assert found.texts == {0: "a", 1: "b", 2: "zwölf\nLinien", 4: "e"}
    assert found.dropped == set()
    remove_answer_log(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_answers_are_on_disk_before_the_end(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, SETTINGS) as kept:
        kept.append({0: "a"})
        assert AnswerLog(tmp_path, SETTINGS).texts == {0: "a"}


def test_other_settings_start_over_and_are_named(tmp_path: Path) -> None:
    keep(tmp_path, {0: "a"})
    other = AnswerLog(tmp_path, SETTINGS | {"dtype": "bfloat16", "weights": "b"})
    assert other.texts == {}
    assert other.dropped == {"dtype", "weights"}
    with other:
        other.append({1: "b"})
    assert [dict(settings)["dtype"] for settings in kept_settings(tmp_path)] == ["bfloat16"]
    assert AnswerLog(tmp_path, SETTINGS).texts == {}


@pytest.mark.parametrize("lost", [1, 5, 25, 40])
def test_half_a_last_line_is_dropped(tmp_path: Path, lost: int) -> None:
    keep(tmp_path, {0: "a", 1: "the second answer, which is cut"})
    path = tmp_path / "answers-0.part.jsonl"
    os.truncate(path, path.stat().st_size - lost)
    assert AnswerLog(tmp_path, SETTINGS).texts == {0: "a"}
    keep(tmp_path, {1: "again"})
    assert AnswerLog(tmp_path, SETTINGS).texts == {0: "a", 1: "again"}
    for line in path.read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("content", [b"", b'{"settings": {"a', b"\0\0\0\n", b"[1]\n", b"{}\n"])
def test_a_file_without_settings_holds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "answers-0.part.jsonl").write_bytes(content)
    assert AnswerLog(tmp_path, SETTINGS).texts == {}


SECTION = EvalSection(max_new_tokens=3, batch_size=2)


def test_what_was_answered_is_not_answered_again(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation], tmp_path: Path
) -> None:
    whole = evaluate(vlm, conversations, encoder=encoder, section=SECTION)
    # Answers that the model would not give show that they were taken, by whoever's share they are.
    keep(tmp_path, {0: "kept 0", 3: "kept 3"}, rank=1)
    seen: list[int] = []
    with AnswerLog(tmp_path, SETTINGS) as kept:
        report = evaluate(
            vlm,
            conversations,
            encoder=encoder,
            section=SECTION,
            kept=kept,
            on_progress=seen.append,
        )
    texts = [row.as_row()["prediction"] for row in report.predictions]
    expected = [row.as_row()["prediction"] for row in whole.predictions]
    expected[0], expected[3] = "kept 0", "kept 3"
    assert texts == expected
    assert seen == [2, 4, 6]
    assert AnswerLog(tmp_path, SETTINGS).texts == dict(enumerate(expected))


def test_every_process_raises_what_one_of_them_met(
    vlm: VLM, conversations: list[Conversation], tmp_path: Path
) -> None:
    """Sample 3, of the second process's share, is too long."""
    short = Encoder(vlm.processor, max_tokens=50, over_length="error", max_image_pixels=10**6)
    shares: list[list[object]] = []

    def second() -> None:
        evaluate(
            vlm,
            conversations,
            encoder=short,
            section=SECTION,
            rank=1,
            world_size=2,
            gather=lambda mine: shares.append(mine) or mine,
        )

    def first() -> None:
        evaluate(
            vlm,
            conversations,
            encoder=short,
            section=SECTION,
            rank=0,
            world_size=2,
            gather=lambda mine: mine + shares[0],
        )

    for process in (second, first):
        with pytest.raises(VlmtuneError, match=r"too long") as raised:
            process()
        assert raised.value.exit_code == 2
