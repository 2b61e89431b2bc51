from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import PIL.Image
import pytest

from tests.report.runs import SCRIPT, make_run, write_evaluation, write_json, write_lines
from vlmtune.errors import VlmtuneError
from vlmtune.report.page import coded, write_page

MAX_BYTES = 5_000_000


class Elements(HTMLParser):
    """The tags of a page with their attributes, its text, and what its scripts hold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)
        self.text += data


def page_of(run: Path) -> Elements:
    return Elements(write_page(run).path.read_text())


@pytest.fixture
def run(tmp_path: Path, tiny_vlm: Path) -> Path:
    return make_run(tmp_path / "receipts", model=tiny_vlm, num_samples=6)


def test_the_page_says_what_a_reader_asks_first(run: Path) -> None:
    text = " ".join(page_of(run).text.split())
    assert "receipts" in text
    assert "Finished at step 30" in text
    assert "Exact match went from 0.0 % to 50.0 %" in text
    assert "Worst on shape (0.0 %)" in text
    assert "Was anything skipped? No." in text
    assert "1,200 parameters are trained" in text
    assert "All 6 predictions" in text


def test_nothing_is_loaded_and_only_the_pages_own_script_may_run(run: Path) -> None:
    page = page_of(run)
    addresses = [
        address
        for tag, attributes in page.tags
        for name, address in attributes.items()
        if name in ("src", "href", "action", "data", "poster", "srcset")
    ]
    assert addresses and all(str(a).startswith(("data:", "#")) for a in addresses)
    styles = [attributes for _, attributes in page.tags if "style" in attributes]
    assert styles == []  # the policy would refuse them
    policy = next(
        a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy and "http" not in policy
    handlers = [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    assert handlers == []


def test_text_from_the_run_is_shown_and_not_run(run: Path) -> None:
    data = run.parent / "receipts-data" / "data.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["messages"][0]["content"][1]["text"] = SCRIPT
    write_lines(data, rows)
    write_evaluation(run, 30, data, [SCRIPT] * 6)
    write_lines(run / "skipped.jsonl", [{"reason": SCRIPT}])
    write_lines(run / "metrics.jsonl", [{"step": 1, "loss": 1.0, SCRIPT: 2.0}])
    write_json(run / "environment.json", {"device": SCRIPT})
    write_json(run / "modules.json", {"trained": [{"part": SCRIPT}]})
    page = page_of(run)
    assert sum(tag == "script" for tag, _ in page.tags) == 2  # the data and ours
    assert not any("onerror" in attributes for _, attributes in page.tags)
    # answer, mix-up, headline, skipped twice, curve, environment, module, sample's text
    assert page.text.count("<script>") > 8
    assert all("</script" not in script for script in page.scripts)


def test_a_page_of_many_large_pictures_stays_small(tmp_path: Path, tiny_vlm: Path) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=300, num_steps=3000)
    images = tmp_path / "r-data" / "images"
    PIL.Image.effect_noise((320, 320), 100).convert("RGB").save(images / "0.png")
    for path in images.iterdir():
        if path.name != "0.png":
            path.write_bytes((images / "0.png").read_bytes())
    written = write_page(run)
    assert written.num_bytes == written.path.stat().st_size < MAX_BYTES
    text = " ".join(Elements(written.path.read_text()).text.split())
    assert "The page shows 200 of 300" in text


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    text = " ".join(page_of(tmp_path).text.split())
    assert "Running: step 0" in text
    assert "Nothing has been logged yet" in text
    assert "No predictions to show" in text
    assert "there is no modules.json" in text
    assert "1 line of metrics.jsonl could not be read" in text


def test_a_page_of_a_run_whose_data_and_model_are_gone_goes_on_without(run: Path) -> None:
    (run.parent / "receipts-data" / "data.jsonl").unlink()
    text = " ".join(page_of(run).text.split())
    assert "no such data file" in text
    assert "20.0 on average" not in text
    assert "All 6 predictions" in text


def test_a_recipe_of_another_version_is_shown_and_costs_the_data_only(run: Path) -> None:
    with (run / "recipe.resolved.yaml").open("a") as file:
        file.write("future_key: 3\n")
    text = " ".join(page_of(run).text.split())
    assert "future_key" in text
    assert "this version has no such key" in text
    assert "the data or the processor could not be read" in text


def test_ranks_over_time_are_drawn_where_they_are_logged(run: Path) -> None:
    assert "Ranks over time" not in page_of(run).text
    lines = [{"step": s, "ranks": {"m.q_proj": 9 - s, "m.v_proj": 3}} for s in (1, 2, 3)]
    write_lines(run / "metrics.jsonl", lines)
    page = page_of(run)
    assert "Ranks over time" in page.text
    assert sum(a.get("class") == "cell" for _, a in page.tags) == 4


def test_a_retrieval_run_has_a_page(run: Path) -> None:
    top = [{"item": "/pictures/7.png", "score": 0.4, "is_relevant": False}]
    rows = [
        {
            "id": f"{n}:text",
            "direction": "text_to_picture",
            "images": [],
            "question": "a cat",
            "answer": f"/pictures/{n}.png",
            "answers": [f"/pictures/{n}.png"],
            "prediction": "/pictures/7.png",
            "scores": {"r1": 0.0, "mrr": 0.5},
            "score": 0.0,
            "question_type": None,
            "rank": 2.0,
            "top": top,
        }
        for n in range(4)
    ]
    for step in (0, 30):
        folder = run / "eval" / f"step-{step:06d}"
        write_lines(folder / "predictions.jsonl", rows)
        figure = {"value": 0.0, "low": 0.0, "high": 0.2, "count": 4}
        names = ("picture_to_text_r1", "text_to_picture_r1", "text_to_picture_median_rank")
        metrics = dict.fromkeys(names, figure)
        summary = {"task": "retrieval", "num_samples": 4, "metrics": metrics, "slices": {}}
        write_json(folder / "metrics.json", summary)
    text = " ".join(page_of(run).text.split())
    assert "No clear change. Picture to text R@1 went from 0.0 % to 0.0 %" in text
    assert "Text to picture R@1 went from 0.0 % to 0.0 % (0.0 to 20.0 %)." in text
    assert "rank 2" in text
    assert "7.png" in text


def test_blind_guessers_stand_beside_the_figure(run: Path) -> None:
    path = run / "eval" / "step-000030" / "metrics.json"
    figures = {"exact_match": {"value": 0.4, "low": 0.3, "high": 0.5, "count": 6}}
    blind = {"majority_answer": {"metrics": figures, "slices": {}}}
    write_json(path, json.loads(path.read_text()) | {"blind": blind})
    text = " ".join(page_of(run).text.split())
    assert "Without the pictures (majority answer): 40.0 %." in text


def test_broken_figures_do_not_break_the_page(run: Path) -> None:
    path = run / "eval" / "step-000030" / "metrics.json"
    path.write_text('{"metrics": {"exact_match": {"value": NaN}}, "slices": null, "data": 3}')
    with (run / "eval" / "step-000030" / "predictions.jsonl").open("a") as file:
        file.write('{"id": "q-9", "images": null, "answers": 7, "score": "high"}\n[1]\n{"i')
    assert "receipts" in page_of(run).text


def test_the_page_goes_where_it_is_sent(run: Path, tmp_path: Path) -> None:
    written = write_page(run, tmp_path / "deep" / "page.html")
    assert written.path.is_file() and not (run / "report.html").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(VlmtuneError, match="cannot be written"):
        write_page(run, tmp_path / "file" / "page.html")


def test_words_between_backticks_are_code() -> None:
    assert coded("`a`: <b>, `c`") == "<code>a</code>: &lt;b&gt;, <code>c</code>"
    assert re.search("<b>", coded("<b>")) is None


def test_long_names_and_reasons_do_not_swell_the_page(run: Path) -> None:
    path = run / "eval" / "step-000030" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    long = {"question_type": "k" * 300_000, "images": []}
    write_lines(path, [row | long | {"id": "z" * 300_000 + row["id"]} for row in rows])
    reason = {"file": "f", "line": 1, "reason": "r" * 300_000}
    write_lines(run / "skipped.jsonl", [{"id": str(number), **reason} for number in range(60)])
    assert write_page(run).num_bytes < 500_000


def test_a_recipe_without_held_out_data_says_so(run: Path) -> None:
    resolved = run / "recipe.resolved.yaml"
    resolved.write_text(re.sub(r", eval: [^}]*", "", resolved.read_text()))
    shutil.rmtree(run / "eval")
    assert "the recipe has no data.eval" in page_of(run).text


@pytest.mark.parametrize("objective", ["next_token", "contrastive"])
def test_what_is_taught_is_said_of_the_objective(run: Path, objective: str) -> None:
    resolved = run / "recipe.resolved.yaml"
    resolved.write_text(resolved.read_text() + f"objective: {objective}\n")
    text = page_of(run).text
    assert ("The loss is computed on these tokens only" in text) is (objective == "next_token")
    assert ("which answer belongs to which pictures" in text) is (objective == "contrastive")
