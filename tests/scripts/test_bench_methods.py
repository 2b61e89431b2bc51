from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_methods as bench
import methods_page as pages
import pytest

from vlmtune.recipe.load import load_recipe

ABOUT = {
    "made": {
        "vqa": {"hardware": "a CPU, 2 cores", "command": "python x.py"},
        "retrieval": {"hardware": "a CPU, 4 cores", "command": "python x.py --parts retrieval"},
        "memory": {"hardware": "a CPU, 2 cores", "command": "python x.py"},
    },
    "blind": {"total": 0.67},
    "baseline_memory_bytes": 500_000_000,
}


def evaluation(part: str, value: float) -> dict[str, Any]:
    interval = {"value": value, "low": value - 0.01, "high": value + 0.01, "count": 9673}
    return {
        "num_samples": 9673,
        "predictions": "/somewhere/predictions.jsonl",
        "seconds": 60.0,
        "metrics": dict.fromkeys(pages.FIGURES[part], interval),
        "slices": {},
    }


def result(method: str, value: float, seed: int | None = 42, part: str = "vqa") -> pages.Result:
    train = {
        "run": "/somewhere/run",
        "steps": 900,
        "samples": 900 * 64,
        "seconds": 600.0,
        "samples_per_second": 96.0,
        "trainable_parameters": 123456,
        "peak_memory_bytes": 2_500_000_000 if method == "full" else 1_300_000_000,
    }
    measured = {} if part == "memory" else evaluation(part, value)
    return pages.Result(part, method, seed, {} if method == "base" else train, measured)


RESULTS = [result("base", 0.20, None), result("lora", 0.96), result("full", 0.97)]


def test_the_table_has_a_row_a_method_with_shares_of_full_fine_tuning() -> None:
    lines = pages.score_table(RESULTS, "vqa", {"exact_match": 0.67}).splitlines()
    assert len(lines) == 5  # heading, rule, base, full, LoRA
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells == [
        "LoRA",
        "96.0 % (95.0 to 97.0)",
        "99.0 %",  # 0.96 / 0.97
        "96.7 %",  # (0.96 - 0.67) / (0.97 - 0.67)
        "123,456",
        "10.0",
    ]
    assert "100.0 %" in lines[3]


def test_the_gain_is_over_blind_and_not_the_score() -> None:
    lora, full = [result("lora", 0.96)], [result("full", 0.97)]
    share = pages.share_of_full(lora, full, "exact_match", floor=0.67)
    assert share == pytest.approx(0.29 / 0.30)
    assert share != pytest.approx(pages.share_of_full(lora, full, "exact_match"))
    assert pages.share_of_full(lora, [], "exact_match") is None
    flat = [result("full", 0.67)]
    assert pages.share_of_full(lora, flat, "exact_match", floor=0.67) is None


def test_seeds_are_averaged_and_their_intervals_joined() -> None:
    own = [result("lora", 0.94, 1), result("lora", 0.98, 2)]
    assert pages.score_cell(own, "exact_match") == "96.0 % (93.0 to 99.0)"


def test_memory_is_given_whole_and_above_the_libraries() -> None:
    results = [result(m, 0.0, None, "memory") for m in ("full", "qlora")]
    row = pages.memory_table(results, 500_000_000).splitlines()[-1]
    # 1.3 of 2.5 GB; without the 0.5 GB of libraries 0.8 of 2.0.
    assert "| QLoRA | 1.30 | 52.0 % | 0.80 | 40.0 % |" in row


def test_the_page_holds_tables_hardware_and_command() -> None:
    text = pages.page([*RESULTS, result("lora", 0.5, 42, "retrieval")], ABOUT)
    for part in ("a CPU, 2 cores", "python x.py", "9,673", "900 steps of 64", "67.0 %", "R@1"):
        assert part in text
    assert "Memory:" not in text  # not measured
    assert "`python x.py` (memory, vqa) on: a CPU, 2 cores" in text
    assert "`python x.py --parts retrieval` (retrieval) on: a CPU, 4 cores" in text


def test_figures_hold_no_folders() -> None:
    assert "somewhere" not in json.dumps([result.figures() for result in RESULTS])


def test_what_is_there_with_the_same_settings_is_not_made_again(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"count": len(made)}

    path = tmp_path / "results" / "lora.json"
    assert bench.remembered(path, {"steps": 1}, make) == {"count": 1}
    assert bench.remembered(path, {"steps": 1}, make) == {"count": 1}
    assert bench.remembered(path, {"steps": 2}, make) == {"count": 2}


def test_a_method_is_trained_and_evaluated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []

    def run(*arguments: str) -> dict[str, Any]:
        calls.append(arguments)
        if arguments[0] == "train":
            return dict(RESULTS[1].train)
        return evaluation("retrieval", 0.9)

    monkeypatch.setattr(bench, "vlmtune", run)
    options = bench.parse_arguments(
        ["--work", str(tmp_path), "--max-steps", "5", "--max-samples", "7"]
    )
    first = bench.run_method("retrieval", "qlora", 3, options)
    assert [call[0] for call in calls] == ["train", "eval", "eval"]
    folder = tmp_path / "retrieval-qlora-3"
    assert {"seed=3", "train.max_steps=5", f"output_dir={folder}"} <= set(calls[0])
    assert str(folder) in calls[1]
    assert bench.run_method("retrieval", "qlora", 3, options) == first
    assert len(calls) == 3


def test_retrieval_is_measured_with_and_without_the_texts_own_likelihood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> dict[str, Any]:
        how = {"eval.subtract_prior=true": 0.4, "eval.subtract_prior=false": 0.8}
        value = next(how[name] for name in arguments if name in how)
        figures = {"picture_to_text_r1": {"value": value}, "text_to_picture_r1": {"value": 0.7}}
        return {"metrics": figures, "num_samples": 126}

    monkeypatch.setattr(bench, "vlmtune", run)
    options = bench.parse_arguments(["--work", str(tmp_path)])
    metrics = bench.run_base("retrieval", options).evaluation["metrics"]
    assert metrics["picture_to_text_r1"] == {"value": 0.8}
    assert metrics["picture_to_text_r1_minus_prior"] == {"value": 0.4}
    assert pages.FIGURES["retrieval"].keys() <= metrics.keys()


def test_a_part_alone_leaves_the_others_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "methods.md"
    results = [*RESULTS, *(result(m, 0.5, 42, "retrieval") for m in ("full", "lora"))]
    figures = {**ABOUT, "results": [one.figures() for one in results]}
    report.with_suffix(".json").write_text(json.dumps(figures))
    before = pages.page(results, ABOUT)
    new = [result(m, 0.75, 42, "retrieval") for m in ("full", "lora")]
    monkeypatch.setattr(bench, "run_all", lambda options: new)
    monkeypatch.setattr(
        "sys.argv", ["bench_methods.py", "--parts", "retrieval", "--report", str(report)]
    )
    bench.main()
    text = report.read_text()
    vqa = before[before.index("## Visual") : before.index("## Retrieval")]
    assert vqa in text
    assert "75.0 %" in text and "50.0 %" not in text
    assert "`python x.py` (memory, vqa) on: a CPU, 2 cores" in text
    assert f"--parts retrieval --report {report}` (retrieval)" in text
    written = json.loads(report.with_suffix(".json").read_text())
    assert [one["part"] for one in written["results"]] == ["vqa"] * 3 + ["retrieval"] * 2


@pytest.mark.parametrize("method", bench.METHODS)
def test_every_method_is_a_recipe_that_loads(root: Path, method: str) -> None:
    recipe = load_recipe(root / "configs" / "captions_lora.yaml", bench.OVERRIDES[method]).recipe
    assert (recipe.quantization_bit == 4) == method.startswith("q")
    assert recipe.use_dora == method.endswith("dora")
    assert (recipe.adalora is not None) == method.endswith("adalora")
    assert (recipe.lora_target == []) == (method == "full")


def test_the_docs_hold_what_the_figures_say(root: Path) -> None:
    results, about = bench.kept_results(root / "docs" / "methods.md", [])
    assert (root / "docs" / "methods.md").read_text() == pages.page(results, about)
    assert pages.short_table(results) in (root / "README.md").read_text()


def test_the_short_table_has_the_shares_of_full_in_brackets() -> None:
    results = [*RESULTS, *(result(m, 0.0, None, "memory") for m in ("full", "lora"))]
    base, full, lora = pages.short_table(results).splitlines()[2:5]
    assert base == "| base model | 20.0 % |  |  |"
    assert full == "| full fine-tuning | 97.0 % | 2.50 GB (100 %) | 123,456 |"
    assert lora == "| LoRA | 96.0 % (99.0 %) | 1.30 GB (52 %) | 123,456 |"
