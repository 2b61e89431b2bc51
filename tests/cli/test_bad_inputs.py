"""Bad inputs end with exit code 2 and a message that names the place, never in a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import yaml
from typer.testing import CliRunner

from vlmtune.cli.app import app


class Bench:
    """A folder with a good recipe, good data and a model, for a case to spoil."""

    def __init__(self, folder: Path, tiny_vlm: Path) -> None:
        self.folder = folder
        self.recipe_path = folder / "recipe.yaml"
        self.data_path = folder / "train.jsonl"
        PIL.Image.new("RGB", (32, 32), "red").save(folder / "red.png")
        self.rows = [
            {
                "id": f"row-{number}",
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": "red.png"},
                            {"type": "text", "text": "what is it?"},
                        ],
                    },
                    {"role": "assistant", "content": "red"},
                ],
            }
            for number in range(4)
        ]
        self.recipe: dict = {
            "model": str(tiny_vlm),
            "lora_target": ["q_proj"],
            "output_dir": str(folder / "run"),
            "data": {"train": "train.jsonl", "num_workers": 0},
            "train": {"max_steps": 1, "batch_size": 4, "precision": "fp32", "optimizer": "adamw"},
        }

    def write(self) -> None:
        if not self.recipe_path.exists():
            self.recipe_path.write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        if not self.data_path.exists():
            self.data_path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


@pytest.fixture
def bench(tmp_path: Path, tiny_vlm: Path) -> Bench:
    return Bench(tmp_path, tiny_vlm)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


Spoil = Callable[[Bench], object]


def with_text(text: str) -> Spoil:
    return lambda b: b.recipe_path.write_text(text)


def with_key(key: str, value: object) -> Spoil:
    def spoil(bench: Bench) -> None:
        *sections, leaf = key.split(".")
        target = bench.recipe
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value

    return spoil


def with_data(text: str | bytes) -> Spoil:
    raw = text.encode() if isinstance(text, str) else text
    return lambda b: b.data_path.write_bytes(raw)


def with_turns(turns: object) -> Spoil:
    def spoil(bench: Bench) -> None:
        bench.rows[1]["messages"] = turns

    return spoil


def with_picture(write: Callable[[Path], object]) -> Spoil:
    def spoil(bench: Bench) -> None:
        write(bench.folder / "bad.png")
        bench.rows[1]["messages"][0]["content"][0]["image"] = "bad.png"

    return spoil


def truncated(path: Path) -> None:
    PIL.Image.effect_noise((200, 200), 90).save(path)
    path.write_bytes(path.read_bytes()[:400])


ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}

# name: (what is spoiled, where and what the message must name)
TRAIN_CASES: dict[str, tuple[Spoil, list[str]]] = {
    "empty recipe": (with_text(""), ["recipe.yaml"]),
    "not a mapping": (with_text("- a\n- b\n"), ["recipe.yaml:1"]),
    "broken yaml": (with_text("model: [a\nrank: 2\n"), ["recipe.yaml:"]),
    "tab": (with_text("model: a\ntrain:\n\tepochs: 1\n"), ["recipe.yaml:3"]),
    "duplicate key": (with_text("model: a\nrank: 1\nrank: 2\n"), ["recipe.yaml:3", "rank"]),
    "misspelt key": (with_key("rnak", 4), ["recipe.yaml:", "rnak", "rank"]),
    "misspelt nested key": (with_key("train.epoch", 4), ["recipe.yaml:", "epochs"]),
    "another tool's key": (with_key("lora_rank", 4), ["recipe.yaml:", "rank"]),
    "key of a later issue": (with_key("train.loggers", ["wandb"]), ["recipe.yaml:", "loggers"]),
    "string for a number": (with_key("rank", "many"), ["recipe.yaml:", "rank", "many"]),
    "boolean for a number": (with_key("rank", True), ["recipe.yaml:", "rank"]),
    "zero rank": (with_key("rank", 0), ["recipe.yaml:", "rank"]),
    "negative rate": (with_key("train.learning_rate", -1.0), ["train.learning_rate"]),
    "unknown choice": (with_key("train.schedule", "cosin"), ["train.schedule", "cosine"]),
    "bits that do not exist": (with_key("quantization_bit", 3), ["quantization_bit", "4"]),
    "both lengths": (with_key("train.epochs", 2), ["epochs", "max_steps"]),
    "no output folder": (lambda b: b.recipe.pop("output_dir"), ["recipe.yaml", "output_dir"]),
    "rank with adalora": (
        lambda b: b.recipe.update(rank=4, adalora={"initial_rank": 4, "target_rank": 2}),
        ["recipe.yaml:", "rank", "adalora"],
    ),
    "growing adalora": (
        with_key("adalora", {"initial_rank": 2, "target_rank": 4}),
        ["recipe.yaml:", "target_rank"],
    ),
    "nothing to train": (with_key("lora_target", []), ["lora_target", "modules_to_save"]),
    "missing data file": (with_key("data.train", "gone.jsonl"), ["recipe.yaml:", "gone.jsonl"]),
    "data is a folder": (with_key("data.train", "."), ["a folder"]),
    "missing model folder": (with_key("model", "./no-model"), ["recipe.yaml:1", "no-model"]),
    "model without config": (
        lambda b: (b.folder.joinpath("m").mkdir(), with_key("model", "./m")(b)),
        ["recipe.yaml:1", "config.json"],
    ),
    "target that matches nothing": (with_key("lora_target", ["q_porj"]), ["q_porj", "q_proj"]),
    "path that matches nothing": (with_key("lora_target", ["model.visual.bloks.0"]), ["bloks"]),
    "bad pattern": (with_key("lora_target", ["re:("]), ["re:("]),
    "skip that matches nothing": (
        lambda b: b.recipe.update(quantization_bit=4, quantization={"skip": ["visul"]}),
        ["visul"],
    ),
    "unknown module to save": (with_key("modules_to_save", ["lm_haed"]), ["lm_haed"]),
    "empty data": (with_data(""), ["train.jsonl"]),
    "not json": (with_data('{"messages": []}\nnot json\n'), ["train.jsonl:2"]),
    "not an object": (with_data("[1]\n"), ["train.jsonl"]),
    "not text": (with_data(b"\xff\xfe\x00\x01\n"), ["train.jsonl"]),
    "no messages": (lambda b: b.rows[1].pop("messages"), ["train.jsonl:2", "messages"]),
    "empty messages": (with_turns([]), ["train.jsonl:2"]),
    "unknown role": (with_turns([{"role": "robot", "content": "x"}]), ["train.jsonl:2", "robot"]),
    "no answer": (with_turns([ASK]), ["train.jsonl:2"]),
    "two questions in a row": (with_turns([ASK, ASK, ANSWER]), ["train.jsonl:2"]),
    "empty answer": (
        with_turns([ASK, {"role": "assistant", "content": ""}]),
        ["train.jsonl:2"],
    ),
    "unknown part": (
        with_turns([{"role": "user", "content": [{"type": "sound"}]}, ANSWER]),
        ["train.jsonl:2", "sound"],
    ),
    "web address": (
        with_turns(
            [{"role": "user", "content": [{"type": "image", "image": "http://a/b.png"}]}, ANSWER]
        ),
        ["train.jsonl:2"],
    ),
    "placeholder in the text": (
        with_turns([{"role": "user", "content": "look: <|image_pad|>"}, ANSWER]),
        ["train.jsonl:2", "<|image_pad|>"],
    ),
    "twice the same id in what is evaluated on": (
        lambda b: (b.rows[1].update(id="row-0"), b.recipe["data"].update(eval="train.jsonl")),
        ["train.jsonl:2", "row-0"],
    ),
    "missing picture": (with_picture(lambda p: None), ["train.jsonl:2", "bad.png"]),
    "picture is a folder": (with_picture(lambda p: p.mkdir()), ["train.jsonl:2", "bad.png"]),
    "zero bytes": (with_picture(lambda p: p.write_bytes(b"")), ["train.jsonl:2", "bad.png"]),
    "text as picture": (with_picture(lambda p: p.write_text("hello")), ["train.jsonl:2"]),
    "truncated picture": (with_picture(truncated), ["train.jsonl:2"]),
    "picture bomb": (
        lambda b: (
            with_key("data.max_image_pixels", 2000)(b),
            with_picture(lambda p: PIL.Image.new("L", (50, 50)).save(p))(b),
        ),
        ["train.jsonl:2", "2500", "max_image_pixels"],
    ),
    "sample too long": (with_key("data.max_tokens", 12), ["train.jsonl:", "max_tokens"]),
    "occupied folder": (
        lambda b: (b.folder.joinpath("run").mkdir(), b.folder.joinpath("run/x").write_text("x")),
        ["run", "output_dir"],
    ),
    "output is a file": (lambda b: b.folder.joinpath("run").write_text("x"), ["run"]),
}


@pytest.mark.parametrize("name", list(TRAIN_CASES))
def test_train_names_the_place(bench: Bench, name: str):
    spoil, expected = TRAIN_CASES[name]
    spoil(bench)
    bench.write()
    code, stderr = run("train", bench.recipe_path, "--quiet")
    assert code == 2, stderr
    for words in expected:
        assert words in stderr, stderr
    assert not (bench.folder / "run" / "adapter").exists()


def test_the_unspoiled_recipe_trains(bench: Bench):
    """Beside the table: what it spoils is good."""
    bench.write()
    assert run("train", bench.recipe_path, "--quiet") == (0, "")


def test_a_missing_recipe(tmp_path: Path):
    code, stderr = run("train", tmp_path / "gone.yaml")
    assert code == 2
    assert "gone.yaml" in stderr


def test_an_unknown_override(bench: Bench):
    bench.write()
    code, stderr = run("train", bench.recipe_path, "train.max_stesp=3")
    assert code == 2
    assert "train.max_stesp" in stderr and "max_steps" in stderr


TARGETS: dict[str, Callable[[Path], object]] = {
    "missing": lambda p: None,
    "empty folder": lambda p: p.mkdir(),
    "unfinished run": lambda p: (p.mkdir(), (p / "recipe.resolved.yaml").write_text("model: x\n")),
    "adapter without weights": lambda p: (p.mkdir(), (p / "adapter_config.json").write_text("{}")),
}


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("command", ["eval", "merge", "chat"])
def test_a_bad_target_is_named(bench: Bench, command: str, name: str):
    bench.write()
    target = bench.folder / "target"
    TARGETS[name](target)
    arguments = {
        "eval": ["--data", str(bench.data_path), "--task", "vqa"],
        "merge": ["--output", str(bench.folder / "merged")],
        "chat": ["what?"],
    }
    code, stderr = run(command, target, *arguments[command])
    assert code == 2, stderr
    assert "target" in stderr
    assert not (bench.folder / "merged").exists()


def test_eval_of_a_missing_data_file(bench: Bench, tiny_vlm: Path):
    code, stderr = run("eval", tiny_vlm, "--data", bench.folder / "gone.jsonl", "--task", "vqa")
    assert code == 2
    assert "gone.jsonl" in stderr


def test_an_adapter_that_matches_no_key(bench: Bench, sample_data: Path):
    bench.write()
    assert run("train", bench.recipe_path, "--quiet")[0] == 0
    adapter = bench.folder / "run" / "adapter"
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers", "blocks"): tensor for name, tensor in weights.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    code, stderr = run("merge", bench.folder / "run", "--output", bench.folder / "merged")
    assert code == 2, stderr
    assert "adapter" in stderr
    shutil.rmtree(bench.folder / "run")
