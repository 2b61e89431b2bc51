from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import PIL.Image
import pytest

from tests.report.runs import make_run
from vlmtune.data.dataset import load_conversations
from vlmtune.data.types import Image
from vlmtune.evaluation.references import picture_name
from vlmtune.recipe.data_section import DataEntry
from vlmtune.report.gallery import Gallery, build_gallery, outcome_of
from vlmtune.report.page import page_values
from vlmtune.report.pictures import SIDE, Thumbnails, encode_thumbnail, spread
from vlmtune.report.run import Pair, choose_pair, read_evaluations, read_run


def pair_of(run: Path) -> Pair:
    record = read_run(run)
    return choose_pair(read_evaluations(record), record)


def _top(item: str) -> dict[str, object]:
    return {"item": item, "score": 0.5, "is_relevant": False}


def gallery_of(run: Path, *, max_cards: int = 200) -> Gallery:
    gallery = build_gallery(pair_of(run), thumbnails=Thumbnails(), max_cards=max_cards)
    assert gallery is not None
    return gallery


@pytest.mark.parametrize(
    ("before", "after", "has_before", "expected"),
    [
        (False, True, True, "fixed"),
        (True, False, True, "broken"),
        (True, True, True, "right"),
        (False, False, True, "wrong"),
        (None, True, False, "right"),
        (None, False, True, "wrong"),
        (True, None, True, "unscored"),
    ],
)
def test_outcomes(before: bool | None, after: bool | None, has_before: bool, expected: str) -> None:
    assert outcome_of(before, after, has_before=has_before) == expected


def test_before_and_after_are_matched_by_id(tmp_path: Path, tiny_vlm: Path) -> None:
    run = make_run(
        tmp_path / "r",
        model=tiny_vlm,
        num_samples=4,
        before=["no", "yes", "no", "yes"],
        after=["yes", "no", "no", "yes"],
    )
    before = run / "eval" / "step-000000" / "predictions.jsonl"
    before.write_text("".join(reversed(before.read_text().splitlines(keepends=True))))
    cards = {card.id: card.outcome for card in gallery_of(run).cards}
    assert cards == {"q-000": "fixed", "q-001": "broken", "q-002": "wrong", "q-003": "right"}


def test_a_rare_outcome_is_not_crowded_out_and_the_choice_is_fixed(
    tmp_path: Path, tiny_vlm: Path
) -> None:
    run = make_run(
        tmp_path / "r",
        model=tiny_vlm,
        num_samples=300,
        before=["yes"] + ["no"] * 299,
        after=["no"] + ["yes"] * 299,
    )
    gallery = gallery_of(run, max_cards=20)
    assert gallery.totals == {"broken": 1, "fixed": 299}
    assert gallery.shown == {"broken": 1, "fixed": 19}
    assert gallery.num_predictions == 300
    assert {card.slice for card in gallery.cards} == {"color", "shape"}
    assert [c.id for c in gallery.cards] == [c.id for c in gallery_of(run, max_cards=20).cards]
    assert [c.id for c in gallery.cards] != [f"q-{n:03d}" for n in range(20)]


def test_a_picture_that_is_gone_leaves_its_place(tmp_path: Path, tiny_vlm: Path) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=2)
    (tmp_path / "r-data" / "images" / "1.png").unlink()
    pictures = {card.id: card.pictures[0] for card in gallery_of(run).cards}
    assert pictures["q-000"].src.startswith("data:image/webp;base64,")
    assert (pictures["q-001"].src, pictures["q-001"].missing) == ("", "no such picture file")


def test_a_picture_inside_the_data_file_is_found_by_its_digest(
    tmp_path: Path, tiny_vlm: Path
) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=1)
    stream = io.BytesIO()
    PIL.Image.new("RGB", (20, 30), "red").save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    data = tmp_path / "r-data" / "data.jsonl"
    data.write_text(data.read_text().replace("images/0.png", url))
    name = picture_name(load_conversations([data])[0][0].images[0])
    for step in (0, 30):
        path = run / f"eval/step-{step:06d}/predictions.jsonl"
        row = json.loads(path.read_text()) | {"images": [name]}
        path.write_text(json.dumps(row) + "\n")
    picture = gallery_of(run).cards[0].pictures[0]
    assert (picture.width, picture.height) == (20, 30)
    data.unlink()
    assert gallery_of(run).cards[0].pictures[0].missing == "no such picture file"


def test_a_picture_inside_the_data_file_is_found_with_the_columns_of_the_run(
    tmp_path: Path, tiny_vlm: Path
) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=1)
    data = tmp_path / "r-data" / "data.jsonl"
    stream = io.BytesIO()
    PIL.Image.new("RGB", (20, 30), "red").save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    data.write_text(json.dumps({"id": "q-000", "photo": url, "kind": "yes"}) + "\n")
    columns = {"image": "photo", "label": "kind"}
    recipe = run / "recipe.resolved.yaml"
    entry = f"{{path: {data}, columns: {{image: photo, label: kind}}}}"
    recipe.write_text(recipe.read_text().replace(f"eval: {data}", f"eval: {entry}"))
    conversations, _ = load_conversations([DataEntry(path=str(data), columns=columns)])
    name = picture_name(conversations[0].images[0])
    for step in (0, 30):
        path = run / f"eval/step-{step:06d}/predictions.jsonl"
        row = json.loads(path.read_text()) | {"images": [name]}
        path.write_text(json.dumps(row) + "\n")
    gallery = page_values(read_run(run))["gallery"]
    picture = gallery.cards[0].pictures[0]
    assert (picture.width, picture.height) == (20, 30)


def test_thumbnails_are_small_and_stop_at_the_budget(tmp_path: Path) -> None:
    for number in range(3):
        PIL.Image.effect_noise((640, 320), 90).save(tmp_path / f"{number}.png")
    made = encode_thumbnail(PIL.Image.open(tmp_path / "0.png"))
    assert (made.width, made.height) == (SIDE, SIDE // 2)
    thumbnails = Thumbnails(budget_bytes=len(made.src) + 1)
    shown = [thumbnails.of_path(str(tmp_path / f"{n}.png")) for n in (0, 0, 1, 2)]
    assert [bool(thumbnail.src) for thumbnail in shown] == [True, True, True, False]
    assert thumbnails.num_over_budget == 1


def test_pictures_whose_bytes_the_data_holds_are_told_apart() -> None:
    thumbnails = Thumbnails()

    def source_of(colour: str) -> str:
        stream = io.BytesIO()
        PIL.Image.new("RGB", (4, 4), colour).save(stream, "PNG")
        return thumbnails.of(Image("", Path("."), content=stream.getvalue())).src

    assert source_of("red") == source_of("red") != source_of("blue")


def test_ranked_queries_are_cards_too(tmp_path: Path, tiny_vlm: Path) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=1)
    rows = [
        {
            "id": "a:picture",
            "direction": "picture_to_text",
            "rank": 1.0,
            "top": [_top("b"), _top("a")],
        },
        {"id": "a:text", "direction": "text_to_picture", "rank": 7.0, "top": [_top("/d/c.png")]},
    ]
    for step in (0, 30):
        path = run / f"eval/step-{step:06d}/predictions.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cards = gallery_of(run).cards
    assert [(card.outcome, card.slice) for card in cards] == [
        ("wrong", "text to picture"),
        ("right", "picture to text"),
    ]
    assert cards[1].after is not None
    assert (cards[1].after.text, cards[1].after.score) == ("b · a", "rank 1")
    assert cards[0].after is not None and cards[0].after.text == "c.png"


def test_positions_are_spread_from_the_first_to_the_last() -> None:
    assert list(spread(10, 4)) == [0, 3, 6, 9]
    assert list(spread(3, 4)) == [0, 1, 2]
    assert list(spread(9, 1)) == [0]
