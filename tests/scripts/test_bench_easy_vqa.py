from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bench_easy_vqa as bench
import pytest

BLIND = {"total": 0.67, "yes/no": 0.825, "shape": 0.348, "color": 0.12}


def evaluation(value: float) -> dict[str, Any]:
    interval = {"value": value, "low": value - 0.01, "high": value + 0.01}
    return {
        "num_samples": 9673,
        "predictions": "/somewhere/predictions.jsonl",
        "seconds": 60.0,
        "metrics": {"exact_match": interval},
        "slices": {kind: {"exact_match": interval} for kind in bench.KINDS},
    }


def result(method: str, value: float, seed: int | None = 42) -> bench.Result:
    train = {
        "run": "/somewhere/run",
        "steps": 900,
        "samples": 900 * 64,
        "seconds": 600.0,
        "trainable_parameters": 123456,
        "peak_memory_bytes": 1_500_000_000,
    }
    return bench.Result(method, seed, {} if method == "base" else train, evaluation(value))


RESULTS = [
    result("base", 0.20, None),
    result("lora", 0.96),
    result("full", 0.97),
]


def test_the_table_has_the_blind_guesser_first_and_a_row_a_method() -> None:
    rows = bench.table_rows(RESULTS, BLIND)
    assert [row[0] for row in rows] == ["blind guesser", "base model", "LoRA", "full fine-tuning"]
    assert all(len(row) == len(bench.HEADER) for row in rows)
    assert rows[2] == (
        "LoRA",
        "96.0 % (95.0 to 97.0)",
        "96.0 %",
        "96.0 %",
        "96.0 %",
        "96.7 %",  # (0.96 - 0.67) / (0.97 - 0.67)
        "123,456",
        "10.0",
        "1.50",
    )
    assert rows[3][5] == "100.0 %"


def test_the_share_is_of_the_gain_over_blind_not_of_the_score() -> None:
    share = bench.gain_share([result("lora", 0.96)], [result("full", 0.97)], 0.67)
    assert share == pytest.approx(0.29 / 0.30)
    assert share != pytest.approx(0.96 / 0.97)
    assert bench.gain_share([result("lora", 0.96)], [], 0.67) is None
    assert bench.gain_share([result("lora", 0.6)], [result("full", 0.6)], 0.67) is None


def test_seeds_are_averaged_and_their_intervals_joined() -> None:
    rows = bench.table_rows([result("lora", 0.94, 1), result("lora", 0.98, 2)], BLIND)
    assert rows[1][1] == "96.0 % (93.0 to 99.0)"


def test_the_page_holds_table_hardware_and_command() -> None:
    text = bench.page(RESULTS, BLIND, hardware="a CPU, 2 cores", command="python x.py")
    assert "| LoRA | 96.0 %" in text
    for part in ("a CPU, 2 cores", "python x.py", "9,673", "900 of 64 questions", "seeds:\n  42"):
        assert part in text


def test_figures_hold_no_folders() -> None:
    assert "somewhere" not in json.dumps([bench.figures_of(result) for result in RESULTS])


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
        return dict(RESULTS[1].train) if arguments[0] == "train" else evaluation(0.9)

    monkeypatch.setattr(bench, "vlmtune", run)
    options = argparse.Namespace(work=tmp_path, data=tmp_path, max_steps=5, max_samples=7)
    first = bench.run_method("qlora", 3, options)
    assert [call[0] for call in calls] == ["train", "eval"]
    assert {"seed=3", "train.max_steps=5", f"output_dir={tmp_path / 'qlora-3'}"} <= set(calls[0])
    assert str(tmp_path / "qlora-3") in calls[1]
    assert bench.run_method("qlora", 3, options) == first
    assert len(calls) == 2


def test_every_method_has_a_recipe_that_differs_in_the_method_only(root: Path) -> None:
    def common(method: str) -> str:
        text = (root / "configs" / f"easy_vqa_{method}.yaml").read_text()
        kept = text.partition("\ndata:")[2]
        return "\n".join(line for line in kept.splitlines() if "learning_rate" not in line)

    assert {common(method) for method in bench.METHODS} == {common("lora")}
    assert "max_steps" in common("lora")
