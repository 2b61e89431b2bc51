from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bench_peers
import pytest
from peers import agreement, environments, plots, results, studies, tools
from peers.bench import Bench, Prepared
from peers.case import TARGET_PATTERN, Case, read_case
from peers.process import Watched, watch
from peers.results import Figures, Key, Outcome
from peers.studies import ABLATIONS, GROWTH
from peers.template import CHAT_TEMPLATE, MARKED_TEMPLATE
from peers.vlmtune_tool import Encoded, command_of, padded_tokens, steps_file
from peers.workloads import WORKLOADS, draw_rows

from vlmtune.recipe.load import load_recipe


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    work = tmp_path_factory.mktemp("peers")
    return Bench(bench_peers.parse_arguments(["--quick", "--work", str(work), "--seed", "3"]))


@pytest.fixture(scope="module")
def mixed(bench: Bench) -> Prepared:
    return bench.prepare(WORKLOADS["mixed"], 12)


def as_seen(rows: tuple[Encoded, ...]) -> dict[str, Any]:
    """As a peer's probe writes it, with the line break that vlmtune's template ends on left out."""
    samples = [{"ids": list(row.ids[:-1]), "labels": list(row.labels[:-1])} for row in rows]
    names = ("lora_A", "lora_B")
    return {"samples": samples, "trained": {f"layers.0.q_proj.{n}": [4, 8] for n in names}}


def test_the_labels_of_every_row_decode_to_its_answer(bench: Bench, mixed: Prepared) -> None:
    assert len(mixed.encoded) == 12
    for row, encoded in zip(mixed.rows, mixed.encoded, strict=True):
        labelled = [label for label in encoded.labels if label >= 0]
        assert bench._tokenizer.decode(labelled) == row.answer + "<|im_end|>"


def test_pictures_have_many_tokens_and_text_only_rows_none(bench: Bench, mixed: Prepared) -> None:
    image_id = bench._image_token_id
    for row, encoded in zip(mixed.rows, mixed.encoded, strict=True):
        assert (encoded.ids.count(image_id) > 9) == bool(row.images)
    assert {bool(row.images) for row in mixed.rows} == {True, False}


def test_every_format_holds_the_same_rows(mixed: Prepared) -> None:
    marked = json.loads((mixed.folder / "sharegpt.json").read_text())
    own = [json.loads(line) for line in (mixed.folder / "rows.jsonl").read_text().splitlines()]
    assert len(marked) == len(own) == len(mixed.rows)
    for theirs, ours, row in zip(marked, own, mixed.rows, strict=True):
        assert theirs["messages"][0]["content"].count("<image>") == len(row.images)
        assert theirs["messages"][1]["content"] == ours["messages"][1]["content"] == row.answer
        assert all(Path(name).is_file() for name in theirs["images"])


def test_answers_are_as_long_as_the_workload_says() -> None:
    words = ["ba", "co", "du"]
    for workload in WORKLOADS.values():
        rows = draw_rows(workload, num_rows=40, lexicon=words, count=lambda word: 1, seed=1)
        lengths = [len(row.answer.split()) for row in rows]
        assert workload.answers[0] <= min(lengths) and max(lengths) <= workload.answers[1]
        assert rows[:20] == draw_rows(
            workload, num_rows=20, lexicon=words, count=lambda word: 1, seed=1
        )


def test_several_rows_ask_about_one_picture_only_where_they_are_to() -> None:
    def shared(name: str) -> float:
        rows = draw_rows(WORKLOADS[name], num_rows=80, lexicon=["ba"], count=lambda word: 1, seed=1)
        return len(rows) / len({row.images for row in rows})

    assert 4 <= shared("repeated") <= 8
    assert shared("short") == 1


def test_the_marked_template_writes_the_same_text(bench: Bench) -> None:
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "that"},
    ]
    texts = {
        bench._tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)
        for template in (CHAT_TEMPLATE, MARKED_TEMPLATE)
    }
    assert len(texts) == 1
    assert texts.pop().endswith("<|im_start|>assistant\nthat<|im_end|>\n")


def test_samples_that_are_vlmtunes_agree(bench: Bench, mixed: Prepared) -> None:
    seen = as_seen(mixed.encoded)
    found = agreement.compare(seen, mixed.encoded, image_token_id=bench._image_token_id)
    assert found.holds and found.difference is None
    assert (found.linears, found.trained_parameters) == (1, 64)


def test_a_label_too_many_a_missing_picture_and_a_labelled_prompt_are_said(
    bench: Bench, mixed: Prepared
) -> None:
    image_id = bench._image_token_id
    number = next(i for i, row in enumerate(mixed.rows) if row.images)

    def told(ids: list[int], labels: list[int]) -> str:
        seen = as_seen(mixed.encoded) | {"samples": [{"ids": ids, "labels": labels}]}
        found = agreement.compare(seen, mixed.encoded, image_token_id=image_id)
        assert not found.holds
        return str(found.difference)

    ids, labels = list(mixed.encoded[number].ids), list(mixed.encoded[number].labels)
    assert "beyond the answer's end" in told(ids, [*labels[:-1], ids[-1]])
    place = ids.index(image_id)
    assert "of pictures" in told(
        ids[:place] + ids[place + 1 :], labels[:place] + labels[place + 1 :]
    )
    assert "no answer of vlmtune's" in told(ids, ids)


def case_of(tmp_path: Path, **changes: Any) -> Case:
    values: dict[str, Any] = {
        "tool": "vlmtune",
        "model": str(tmp_path),
        "data": str(tmp_path),
        "output": str(tmp_path / "out"),
        "checkpointing": True,
        "peer_batch": 4,
        "tokens": 512,
        "seed": 0,
        "num_workers": 0,
        "epochs": 3,
    }
    return Case(**values | changes)


def test_a_case_reads_back_as_it_was_written(tmp_path: Path) -> None:
    case = case_of(tmp_path, overrides=("train.packing=false",))
    assert read_case(str(case.write())) == case


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_recipe_loads_with_every_override(
    tmp_path: Path, bench: Bench, mixed: Prepared, name: str
) -> None:
    made = {"model": str(bench.model), "data": str(mixed.folder), "overrides": ABLATIONS[name]}
    command = command_of(case_of(tmp_path, **made), "python")
    assert set(ABLATIONS[name]) <= set(command)
    recipe = load_recipe(Path(command[4]), ABLATIONS[name]).recipe
    assert recipe.train.epochs == 3 and recipe.train.batch_size == 8
    assert recipe.train.micro_batch_tokens == 512 and recipe.train.gradient_checkpointing


def test_the_token_budget_is_what_padded_rows_hold() -> None:
    assert padded_tokens([10, 20, 30, 40, 5], 2) == round((40 + 80 + 5) / 3)


def write_program(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text("import json, pathlib, sys, time\n" + body)
    return [sys.executable, str(path)]


def run(tmp_path: Path, body: str, timeout: float = 30) -> Watched:
    return watch(
        write_program(tmp_path, body),
        steps_file=tmp_path / "steps.jsonl",
        log=tmp_path / "log.txt",
        environment={},
        timeout_seconds=timeout,
    )


def test_a_process_is_watched_step_by_step(tmp_path: Path) -> None:
    watched = run(
        tmp_path,
        "held = bytearray(200_000_000)\n"
        "with pathlib.Path('steps.jsonl').open('w', buffering=1) as file:\n"
        "    for step in range(3):\n"
        "        time.sleep(0.1)\n"
        "        print(json.dumps({'step': step}), file=file)\n",
    )
    assert watched.exit_code == 0 and watched.error is None
    assert len(watched.step_seconds) == 3
    assert watched.step_seconds == sorted(watched.step_seconds)
    assert watched.step_seconds[0] > 0 and watched.step_seconds[-1] <= watched.seconds
    assert watched.peak_bytes > 200_000_000


def test_with_resume_the_same_case_is_not_run_again(
    tmp_path: Path, mixed: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Case] = []

    def run_case(case: Case, python: str, **_: Any) -> Watched:
        Path(case.output).mkdir(parents=True)
        ran.append(case)
        return Watched([], seconds=9.0, step_seconds=[1.0, 2.0, 4.0])

    monkeypatch.setattr(tools, "run_case", run_case)
    for arguments, num_runs in (("", 1), ("", 2), ("--resume", 2), ("--resume --workers 1", 3)):
        options = ["--quick", "--work", str(tmp_path), *arguments.split()]
        bench = Bench(bench_peers.parse_arguments(options))
        key = Key("mixed", True, "vlmtune")
        bench.run(key, mixed, number=0)
        assert bench.outcome(key).rounds[0].step_seconds == 1.5
        assert len(ran) == num_runs


def test_a_tools_own_times_come_before_what_was_seen(tmp_path: Path) -> None:
    moment = time.time() + 100
    watched = run(
        tmp_path,
        f"pathlib.Path('steps.jsonl').write_text(json.dumps({{'time': {moment}}}) + '\\n')\n",
    )
    assert 90 < watched.step_seconds[0] < 110


def test_a_failure_says_its_error_and_not_a_progress_bar(tmp_path: Path) -> None:
    body = "print('10%|#   | 1/9 [00:01<00:09, 1.0s/it]')\nraise RuntimeError('no such key')\n"
    watched = run(tmp_path, body)
    assert (watched.exit_code, watched.error) == (1, "RuntimeError: no such key")


def test_a_run_beyond_its_time_is_ended_and_said(tmp_path: Path) -> None:
    watched = run(tmp_path, "time.sleep(60)\n", timeout=0.3)
    assert watched.error == "stopped after 0 s" and watched.seconds < 30


def figures(**changes: float) -> Figures:
    values: dict[str, Any] = {
        "step_seconds": 2.0,
        "first_epoch_seconds": 3.0,
        "later_epochs_seconds": None,
        "samples_per_second": 4.0,
        "supervised_per_second": 40.0,
        "first_step_seconds": 10.0,
        "wall_seconds": 100.0,
        "peak_bytes": 2e9,
        "tree_peak_bytes": 2e9,
    }
    return Figures(**values | changes)


def test_figures_leave_the_warm_up_out_and_part_the_epochs() -> None:
    # Steps of 5, 5, 5, then the first epoch's last of 4, then a second epoch of 1 each.
    ends = [20, 25, 30, 34, 35, 36, 37, 38]
    found = results.figures_of(
        Watched([], seconds=50.0, step_seconds=[float(end) for end in ends], peak_bytes=7),
        steps_per_epoch=4,
        supervised_per_sample=10.0,
        warm_up=3,
    )
    assert found.first_epoch_seconds == 4.0 and found.later_epochs_seconds == 1.0
    assert found.step_seconds == 1.0
    assert found.samples_per_second == pytest.approx(5 * 8 / 8.0)  # 5 steps of 8 in 8 seconds
    assert found.supervised_per_second == pytest.approx(50.0)
    assert (found.first_step_seconds, found.wall_seconds, found.peak_bytes) == (20.0, 50.0, 7.0)


def test_too_few_steps_are_no_figures() -> None:
    watched = Watched([], step_seconds=[1.0, 2.0])
    with pytest.raises(ValueError, match="2 steps seen"):
        results.figures_of(watched, steps_per_epoch=9, supervised_per_sample=1.0, warm_up=3)


def test_the_table_has_medians_ratios_and_what_failed() -> None:
    outcomes = [
        Outcome(Key("mixed", True, "trainer"), (figures(), figures(step_seconds=4.0))),
        Outcome(Key("mixed", True, "vlmtune"), (figures(step_seconds=1.5, peak_bytes=1e9),)),
        Outcome(Key("mixed", True, "trl"), (), ("OSError: a|b",)),
        Outcome(Key("mixed", False, "trainer"), (figures(),)),
    ]
    text = results.table(outcomes, {"mixed": "(c) mixed"})
    lines = [line for line in text.splitlines() if line]
    assert [line.strip("* ") for line in lines if line.startswith("**")] == [
        "(c) mixed, checkpointing on",
        "(c) mixed, checkpointing off",
    ]
    rows = [line for line in lines if line.startswith("| ")]
    assert len({row.count("|") for row in rows}) == 1
    vlmtune = next(row for row in rows if row.startswith("| vlmtune"))
    assert "| 1.50 (0.50) |" in vlmtune and "| 1000 (0.50) |" in vlmtune
    assert next(row for row in rows if row.startswith("| trl")).startswith(
        "| trl | failed: OSError: a/b |"
    )


def test_growth_starts_at_one_and_only_its_own_axis_grows() -> None:
    for axis in ("lengths", "rows", "pictures"):
        points = [point for point in GROWTH if point.axis == axis]
        assert points[0].factor == 1
        for point in points:
            grown = studies._BASE.answers[1] * (point.factor if axis == "lengths" else 1)
            assert point.workload.answers[1] == grown
            pictures = point.factor if axis == "pictures" else 1
            assert point.workload.pictures_per_row == pictures
            area = point.workload.sides[1] ** 2 / studies._BASE.sides[1] ** 2
            assert area == pytest.approx(point.factor if axis == "lengths" else 1, rel=0.02)


@pytest.mark.parametrize("tool", list(environments.REQUIREMENTS))
def test_what_is_installed_is_pinned(tool: str) -> None:
    assert all("==" in name or name == "qwen-vl-utils" for name in environments.REQUIREMENTS[tool])


def test_a_pattern_means_the_language_parts_linears_only() -> None:
    language = "model.language_model.layers.3.mlp.gate_proj"
    assert re.fullmatch(TARGET_PATTERN, language)
    assert not re.fullmatch(TARGET_PATTERN, "model.visual.blocks.3.mlp.gate_proj")


def test_drawings_are_well_formed_and_name_what_they_show() -> None:
    drawn = plots.bars("Speed & memory", {"(a)": {"trainer": 1.0, "vlmtune": 2.5}})
    curve = plots.lines(
        "Growth", {"vlmtune": [(100.0, 1.0), (800.0, 8.0)], "trainer": []}, x="tokens", y="s"
    )
    for drawing in (drawn, curve):
        ElementTree.fromstring(drawing)
    assert "vlmtune" in drawn and "2.50" in drawn and "Speed &amp; memory" in drawn
    assert "tokens" in curve and "vlmtune" in curve


def test_vlmtunes_steps_are_read_from_its_metrics(tmp_path: Path) -> None:
    assert steps_file(case_of(tmp_path)) == tmp_path / "out" / "run" / "metrics.jsonl"
