"""A command that is refused leaves every file as it was: names, sizes and contents."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.cli.test_bad_inputs import Bench, run

STEPS = {"max_steps": 4, "save_every": 2, "keep_checkpoints": 5}


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below `folder` with the hash of its content, and every folder."""
    return {
        path.relative_to(folder).as_posix(): "folder"
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_vlm: Path) -> Path:
    """A folder with a finished run of four steps, saved after two and after four."""
    bench = Bench(tmp_path_factory.mktemp("trained"), tiny_vlm)
    bench.recipe["train"] |= STEPS
    bench.recipe["output_dir"] = "run"
    shutil.copy(bench.folder / "red.png", bench.folder / "last.png")
    bench.rows[-1]["messages"][0]["content"][0]["image"] = "last.png"
    bench.write()
    output = f"output_dir={bench.folder / 'run'}"
    assert run("train", bench.recipe_path, output, "--quiet") == (0, "")
    return bench.folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, the data where the recipe says; `run/` goes on from its checkpoints."""
    folder = shutil.copytree(trained, tmp_path / "work")
    for state in folder.glob("run/checkpoints/*/state.json"):
        state.write_text(state.read_text().replace(str(trained), str(folder)))
    return folder


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step-{step:06d}"


def foreign(folder: Path) -> None:
    """The output folder is somebody's folder of data, with names that runs use too."""
    shutil.rmtree(folder / "run")
    for name in ("checkpoints", "eval/step-000001", "adapter"):
        (folder / "run" / name).mkdir(parents=True)
    for name in ("recipe.yaml", "metrics.jsonl", "photo.jpg", "eval/step-000001/notes.txt"):
        (folder / "run" / name).write_text("mine\n")


def a_file(folder: Path) -> None:
    shutil.rmtree(folder / "run")
    (folder / "run").write_text("mine")


def break_picture(folder: Path) -> None:
    """One that the first step needs, and no check before it."""
    (folder / "last.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")


def no_run(folder: Path) -> None:
    shutil.rmtree(folder / "run")


def only_the_result(folder: Path) -> None:
    shutil.rmtree(folder / "run" / "checkpoints")


def two_processes(folder: Path) -> None:
    for step in (2, 4):
        file = checkpoint(folder, step) / "rng.pt"
        torch.save(2 * torch.load(file, weights_only=True), file)


def without_a_tensor(folder: Path) -> None:
    file = checkpoint(folder, 2) / "tensors.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)


def cut(name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        file = checkpoint(folder, 2) / name
        file.write_bytes(file.read_bytes()[:40])

    return spoil


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (checkpoint(folder, 2) / name).unlink()


def add_row(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[0]) | {"id": "new"}
    (folder / "train.jsonl").write_text("\n".join([*lines, json.dumps(row)]) + "\n")


def break_row(folder: Path) -> None:
    (folder / "train.jsonl").write_text("{no json\n")


def other_run(folder: Path) -> None:
    """`other/`, a run of the same recipe but for its learning rate, which the recipe now has."""
    shutil.copytree(folder / "run", folder / "other")
    for path in (folder / "other" / "checkpoints").iterdir():
        state = json.loads((path / "state.json").read_text())
        state["fingerprint"]["train.learning_rate"] = 0.5
        (path / "state.json").write_text(json.dumps(state))


def copy_model(folder: Path) -> None:
    model = yaml.safe_load((folder / "recipe.yaml").read_text())["model"]
    shutil.copytree(model, folder / "model")


def nothing(folder: Path) -> None:
    return None


AUTO, NEVER = ["--resume", "auto"], ["--resume", "never"]
OLDER = ["--resume", "run/checkpoints/step-000002"]
BAD_TARGET = "lora_target=[q_porj]"
OTHER = ["--resume", "other/checkpoints/step-000002", "train.learning_rate=0.5"]

# name: (what is spoiled, arguments, what the message must say)
REFUSED: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "occupied": (nothing, [], ["a finished run", "--resume auto", "--resume never"]),
    "changed recipe, auto": (nothing, [*AUTO, "train.learning_rate=0.5"], ["learning_rate"]),
    "changed recipe, older": (nothing, [*OLDER, "train.learning_rate=0.5"], ["learning_rate"]),
    "fewer steps than done": (nothing, [*AUTO, "train.max_steps=1"], ["train.max_steps"]),
    "fewer steps, older": (nothing, [*OLDER, "train.max_steps=1"], ["train.max_steps"]),
    "changed data, auto": (add_row, AUTO, ["train.jsonl changed"]),
    "changed data, older": (add_row, OLDER, ["train.jsonl changed"]),
    "no such checkpoint": (nothing, ["--resume", "run/checkpoints/step-000003"], ["step-000003"]),
    "no checkpoint": (nothing, ["--resume", "run"], ["not a complete checkpoint"]),
    "no state": (without("state.json"), OLDER, ["not a complete checkpoint"]),
    "no tensors": (without("tensors.safetensors"), OLDER, ["step-000002", "tensors.safetensors"]),
    "no optimizer": (without("optimizer.pt"), OLDER, ["step-000002", "optimizer.pt"]),
    "no random state": (without("rng.pt"), OLDER, ["step-000002", "rng.pt"]),
    "cut state": (cut("state.json"), OLDER, ["step-000002", "damaged"]),
    "cut tensors": (cut("tensors.safetensors"), OLDER, ["step-000002", "damaged"]),
    "cut optimizer": (cut("optimizer.pt"), OLDER, ["step-000002", "damaged"]),
    "cut random state": (cut("rng.pt"), OLDER, ["step-000002", "damaged"]),
    "a tensor is missing": (without_a_tensor, OLDER, ["belongs to another model or adapter"]),
    "more processes before": (two_processes, OLDER, ["number of processes"]),
    "more processes before, auto": (
        lambda f: (two_processes(f), shutil.rmtree(f / "run" / "adapter")),
        AUTO,
        ["number of processes"],
    ),
    "only the result is left": (only_the_result, AUTO, ["--resume never"]),
    "a checkpoint of another run": (other_run, OTHER, ["run", "learning_rate", "output_dir"]),
    "another run's, no own left": (
        lambda folder: (other_run(folder), only_the_result(folder)),
        OTHER,
        ["run", "output_dir"],
    ),
    "broken picture": (lambda f: (no_run(f), break_picture(f)), [], ["last.png"]),
    "broken picture, older": (break_picture, OLDER, ["last.png"]),
    "broken picture, never": (break_picture, NEVER, ["last.png"]),
    "broken row": (lambda f: (no_run(f), break_row(f)), [], ["train.jsonl:1"]),
    "broken row, never": (break_row, NEVER, ["train.jsonl:1"]),
    "bad target": (no_run, [BAD_TARGET], ["q_porj"]),
    "bad target, never": (nothing, [*NEVER, BAD_TARGET], ["q_porj"]),
    "wrong model, never": (nothing, [*NEVER, "model=./gone"], ["gone"]),
    "another model, older": (copy_model, [*OLDER, "model=./model"], ["model changed"]),
    "adapter beside the model, never": (
        lambda f: (copy_model(f), (f / "model" / "adapter_config.json").write_text("{}")),
        [*NEVER, "model=./model"],
        ["adapter_config.json", "vlmtune merge"],
    ),
} | {
    f"{what.__name__}, {arguments[-1:]}": (what, arguments, ["run", "another output_dir"])
    for what in (foreign, a_file)
    for arguments in ([], AUTO, NEVER)
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_refused_train_changes_nothing(folder: Path, monkeypatch, name: str):
    spoil, arguments, expected = REFUSED[name]
    spoil(folder)
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    code, stderr = run("train", "recipe.yaml", *arguments, "--quiet")
    assert code == 2, stderr
    for words in expected:
        assert words in stderr, stderr
    assert snapshot(folder) == before


@pytest.mark.parametrize("what", [foreign, a_file])
@pytest.mark.parametrize("arguments", [[], AUTO, NEVER])
def test_a_folder_that_is_no_run_is_not_said_to_start_over(
    folder: Path, monkeypatch, what: Callable[[Path], object], arguments: list[str]
):
    what(folder)
    monkeypatch.chdir(folder)
    _, stderr = run("train", "recipe.yaml", *arguments, "--quiet")
    assert "--resume never" not in stderr and "--resume auto" not in stderr


def test_a_foreign_folder_is_refused_for_a_checkpoint_from_elsewhere_too(folder: Path, monkeypatch):
    shutil.copytree(folder / "run", folder / "other")
    foreign(folder)
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    code, stderr = run("train", "recipe.yaml", *OTHER[:2], "--quiet")
    assert code == 2 and "another output_dir" in stderr
    assert snapshot(folder) == before


def test_what_is_not_refused_does_change_the_folder(folder: Path, monkeypatch):
    """Beside the tables: the same commands, nothing spoiled."""
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    assert run("train", "recipe.yaml", *OLDER, "--quiet") == (0, "")
    after = snapshot(folder)
    assert after != before and "run/superseded-adapter" in after
    assert run("train", "recipe.yaml", *NEVER, "--quiet") == (0, "")
    assert "run.previous-1/superseded-adapter" in snapshot(folder)


MERGE_OR_EVAL: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "merge into a folder": (foreign, ["merge", "other", "--output", "run"]),
    "merge into a file": (a_file, ["merge", "other", "--output", "run"]),
    "merge into its own run": (nothing, ["merge", "other", "--output", "other"]),
    "merge of an unfinished run": (
        lambda folder: shutil.rmtree(folder / "other" / "adapter"),
        ["merge", "other", "--output", "new/merged"],
    ),
    "merge of a model": (nothing, ["merge", "{model}", "--output", "new/merged"]),
    "merge on bad data": (
        break_row,
        ["merge", "other", "--output", "new/merged", "--data", "train.jsonl"],
    ),
    "merge below a file": (a_file, ["merge", "other", "--output", "run/new/merged"]),
    "eval into a folder": (
        foreign,
        ["eval", "other", "--data", "train.jsonl", "--output", "run"],
    ),
    "eval into a file": (a_file, ["eval", "other", "--data", "train.jsonl", "--output", "run"]),
    "eval into its own run": (
        nothing,
        ["eval", "other", "--data", "train.jsonl", "--output", "other"],
    ),
    "eval on bad data": (
        break_row,
        ["eval", "other", "--data", "train.jsonl", "--output", "new/eval"],
    ),
    "eval of a missing target": (
        nothing,
        ["eval", "./gone", "--data", "train.jsonl", "--output", "new/eval"],
    ),
    "eval by a metric there is not": (
        nothing,
        ["eval", "other", "--data", "train.jsonl", "--metrics", "blue", "--output", "new/eval"],
    ),
}


@pytest.mark.parametrize("name", list(MERGE_OR_EVAL))
def test_a_refused_merge_or_eval_changes_nothing(
    folder: Path, tiny_vlm: Path, monkeypatch, name: str
):
    spoil, arguments = MERGE_OR_EVAL[name]
    shutil.copytree(folder / "run", folder / "other")
    spoil(folder)
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    code, stderr = run(*(argument.format(model=tiny_vlm) for argument in arguments))
    assert code == 2, stderr
    assert "do:" in stderr or "expected:" in stderr, stderr
    assert snapshot(folder) == before
