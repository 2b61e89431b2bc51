from __future__ import annotations

import json
import math
from pathlib import Path

from vlmtune.train.tracker import Tracker, drop_lines_from, flatten


def test_steps_that_are_done_again_and_half_lines_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    drop_lines_from(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_pipe_gets_a_line_a_logged_step(tmp_path: Path, capfd):
    with Tracker(tmp_path, total_steps=4, first_step=1, quiet=False, active=True) as tracker:
        tracker.advance(1, 2.0, 3.0)
        tracker.log(2, {"loss": 1.5, "grad_norm": {"total": 0.25}})
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("step 2/4  loss 1.5000  grad_norm 0.250")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.5
    assert list((tmp_path / "tensorboard").iterdir())


def test_other_processes_write_nothing(tmp_path: Path, capfd):
    with Tracker(tmp_path, total_steps=4, first_step=1, quiet=False, active=False) as tracker:
        tracker.log(2, {"loss": 1.5})
        tracker.say("hello")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_nested_numbers_get_path_names():
    values = {"a": 1, "b": {"c": 2.5, "d": {"e": 3}}, "f": "text", "g": True}
    assert flatten(values) == {"a": 1.0, "b/c": 2.5, "b/d/e": 3.0}


def test_a_number_that_is_none_is_null_in_the_log(tmp_path: Path):
    with Tracker(tmp_path, total_steps=4, first_step=1, quiet=True, active=True) as tracker:
        tracker.log(2, {"eval_loss": math.nan, "grad_norm": {"total": math.inf}, "loss": 1.5})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 2, "eval_loss": None, "grad_norm": {"total": None}, "loss": 1.5}
