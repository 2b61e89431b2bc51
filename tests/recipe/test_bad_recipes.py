"""Bad recipes and overrides: each ends with a message that names the place and the way out."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from vlmtune.errors import ErrorGroup, VlmtuneError
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.load import load_recipe

GOOD = """\
model: org/some-vlm
output_dir: runs/test
data:
  train: train.jsonl
"""  # four lines: what a case adds starts on line 5

ADDED = {  # lines added to GOOD -> (line, every part that the message must have)
    # Unknown keys
    "rnak: 8": (5, "unknown key 'rnak'; did you mean 'rank'?"),
    "learning_rate: 1e-4": (5, "unknown key 'learning_rate'; did you mean 'train.learning_rate'?"),
    "lora_rank: 8": (5, "unknown key 'lora_rank'; did you mean 'rank'?"),
    "lora_alpha: 8": (5, "unknown key 'lora_alpha'; did you mean 'alpha'?"),
    "per_device_train_batch_size: 8": (5, "did you mean 'train.batch_size'?"),
    "train:\n  epochs: 1\n  lerning_rate: 1e-4": (7, "did you mean 'train.learning_rate'?"),
    "train: {rank: 4}": (5, "unknown key 'train.rank'; did you mean 'rank'?"),
    "qqq: 1": (5, "unknown key 'qqq'; expected: one of model, revision"),
    "<<: {rank: 8}": (5, "unknown key '<<'"),
    "train: {part_learning_rates: {visoin: 1e-5}}": (5, "visoin", "did you mean 'vision'?"),
    # Types and ranges
    "rank: '16'": (5, "bad value of rank; got: '16' (text); expected: an integer, at least 1"),
    "rank: true": (5, "bad value of rank; got: true (a boolean)"),
    "rank: 16.0": (5, "bad value of rank; got: 16.0; expected: an integer"),
    "rank: 0": (5, "got: 0; expected: an integer, at least 1"),
    "rank:": (5, "bad value of rank; got: null"),
    "dropout: 1": (5, "bad value of dropout", "at least 0 and below 1"),
    "use_dora: yes": (5, "got: 'yes' (text); expected: true or false"),
    "use_dora: 1": (5, "got: 1; expected: true or false"),
    "quantization_bit: 5": (5, "quantization_bit; got: 5; expected: one of 4, 8, 16"),
    "quantization_bit: '4'": (5, "quantization_bit; got: '4'"),
    "lora_target: 7": (5, "lora_target; got: 7", "non-empty text or a list of non-empty text"),
    "lora_target: ''": (5, "bad value of lora_target; got: ''"),
    "lora_target:": (5, "bad value of lora_target; got: null"),
    "lora_target:\n  - q_proj\n  - 7": (7, "bad value of lora_target[1]; got: 7"),
    "modules_to_save: ['']": (5, "bad value of modules_to_save[0]; got: ''"),
    "seed: -1": (5, "bad value of seed", "at least 0"),
    "train: 5": (5, "bad value of train; got: 5; expected: a mapping of epochs"),
    "train: {learning_rate: .inf}": (5, "bad value of train.learning_rate; got: inf"),
    "train: {learning_rate: .nan}": (5, "bad value of train.learning_rate; got: nan"),
    "train: {learning_rate: 0}": (5, "expected: a number, above 0"),
    "train: {schedule: cosin}": (5, "unknown value of train.schedule", "did you mean 'cosine'?"),
    "train: {warmup: 10.5}": (5, "train.warmup: a number of steps must be whole; got: 10.5"),
    "train: {part_learning_rates: {vision: 0}}": (5, "train.part_learning_rates.vision; got: 0"),
    "parts: {vision: []}": (5, "bad value of parts.vision", "a non-empty list"),
    # Keys that do not go together
    "adalora: {}\nrank: 8": (
        6,
        "rank has no effect because adalora is given; do: set adalora.initial_rank",
    ),
    "adalora: {}\nuse_dora: true": (6, "use_dora and adalora exclude each other; do: remove one"),
    "adalora:\n  target_rank: 16": (6, "adalora.target_rank (16) must be below"),
    "video:\n  fps: 1\n  max_frames: 3": (7, "video.min_frames (4) must not exceed"),
    "adalora:\n  warmup: 0.6\n  final: 0.5": (7, "leave no steps between them"),
    "quantization: {double_quant: false}": (
        5,
        "quantization.double_quant has no effect because quantization_bit is 16; do: remove "
        "quantization.double_quant, or set quantization_bit: 4",
    ),
    "quantization: {skip: lm_head}": (5, "or set quantization_bit: 4 or 8"),
    "quantization_bit: 8\nquantization: {double_quant: false}": (
        6,
        "quantization.double_quant has no effect because quantization_bit is 8",
    ),
    "train:\n  epochs: 1\n  max_steps: 5": (
        7,
        "train.max_steps and train.epochs exclude each other",
    ),
    "lora_target: []": (5, "nothing would be trained"),
    "lora_target: []\nmodules_to_save: [all]\nalpha: 8": (7, "alpha has no effect"),
    "lora_target: []\nmodules_to_save: [all]\nquantization_bit: 4": (7, "cannot be trained"),
    "modules_to_save: [all]\nlora_target: [q_proj]": (
        6,
        "lora_target and modules_to_save exclude each other; do: remove one of them",
    ),
    "objective: contrastive\nadalora: {}": (6, "adalora has no effect because objective is"),
    "data: {}": (5, "duplicate key 'data'"),
    "use_rslora: true\nadalora: {}": (5, "use_rslora has no effect because adalora is given"),
    "train: {eval_every: 0.5}": (5, "train.eval_every has no effect because data.eval is not"),
    "train: {vision_cache: off, vision_cache_bytes: 5}": (5, "because train.vision_cache is off"),
    "image:\n  min_pixels: 9\n  max_pixels: 4": (6, "must not exceed image.max_pixels (4)"),
    # YAML
    "rank: 8\nalpha: 4\nrank: 16": (7, "duplicate key 'rank'; got: lines 5 and 7"),
    "train: {epochs: 1, epochs: 2}": (5, "duplicate key 'train.epochs'"),
    "train:\n\tepochs: 1": (6, "not valid YAML: a tab; do: use spaces"),
    "lora_target: [a, b\nrank: 1": (6, "not valid YAML", "starts on line 5"),
    "rank 16": (5, "not valid YAML: could not find expected ':'"),
    "---\nrank: 16": (5, "a second document"),
    "lora_target: *names": (5, "undefined alias 'names'"),
    "lora_target: &names [*names]": (5, "an alias to itself"),
    "rank: !!python/name:os.system": (5, "a YAML tag that recipes do not use"),
    "? [a, b]\n: 1": (5, "a key must be a plain word"),
    'output_dir2: "\\ud800"': (5, "a value that cannot be read"),
    "rank: \x07": (5, "a character that YAML does not allow; got: U+0007"),
}

WHOLE = {  # a whole file -> (line or None, parts of the message)
    b"": (1, "the recipe is empty"),
    b"# only a comment\n": (1, "the recipe is empty"),
    b"- model: x\n": (1, "not a recipe; got: a list"),
    b"just text\n": (1, "not a recipe; got: 'just text' (text)"),
    b"rank: 1\nmodel: \xff\n": (2, "not UTF-8; got: byte 0xff"),
    "model: x\n".encode("utf-16"): (1, "not UTF-8"),
    b"data: {train: train.jsonl}\noutput_dir: o\n": (1, "missing key 'model'"),
    b"model: a/b\noutput_dir: o\n": (1, "missing key 'data'"),
    b"model: a/b\noutput_dir: o\ndata:\n  eval: train.jsonl\n": (3, "missing key 'data.train'"),
    b"model: a/b\noutput_dir: ''\ndata: {train: train.jsonl}\n": (2, "bad value of output_dir"),
    b"model: a/b\noutput_dir: o\ndata: {train: no.jsonl}\n": (3, "no such data file", "no.jsonl"),
    b"model: a/b\noutput_dir: o\ndata: {train: {path: no.jsonl}}\n": (3, "no such data file"),
    b"model: a/b\noutput_dir: o\ndata:\n  train: {path: train.jsonl,\n    wieght: 2}\n": (
        5,
        "unknown key 'data.train.wieght'; did you mean 'data.train.weight'?",
    ),
    b"model: a/b\noutput_dir: o\ndata:\n  train:\n  - path: train.jsonl\n    weight: 0\n": (
        6,
        "bad value of data.train[0].weight; got: 0; expected: a number, above 0",
    ),
    b"model: a/b\noutput_dir: o\ndata:\n  train:\n  - {path: train.jsonl, format: lava}\n": (
        5,
        "unknown value of data.train[0].format",
    ),
    b"model: a/b\noutput_dir: o\ndata: {train: org/name}\n": (3, "write hub:org/name"),
    b"model: a/b\noutput_dir: o\ndata: {train: []}\n": (3, "bad value of data.train"),
    b"model: a/b\noutput_dir: o\ndata:\n  train:\n    - train.jsonl\n    - no.jsonl\n": (
        6,
        "no such data file",
    ),
    b"model: ./gone\noutput_dir: o\ndata: {train: train.jsonl}\n": (1, "model: no such folder"),
    b"model: a/b/c\noutput_dir: o\ndata: {train: train.jsonl}\n": (1, "model: no such folder"),
    b"model: train.jsonl\noutput_dir: o\ndata: {train: train.jsonl}\n": (1, "not a folder"),
    b"model: .\noutput_dir: o\ndata: {train: train.jsonl}\n": (1, "without config.json"),
    b"revision: v1\nmodel: base\noutput_dir: o\ndata: {train: train.jsonl}\n": (
        1,
        "revision has no effect with a model in a folder",
    ),
    b"a: " + b"[" * 3_000: (1, "nested too deeply"),
}

OVERRIDES = {
    "rank": ("not an override; expected: key.sub=value",),
    "=5": ("not an override",),
    "rnak=8": ("unknown key 'rnak'; did you mean 'rank'?",),
    "lora_rank=8": ("unknown key 'lora_rank'; did you mean 'rank'?",),
    "trian.epochs=1": ("unknown key 'trian'; did you mean 'train'?",),
    "train.epoch=1": ("unknown key 'train.epoch'; did you mean 'train.epochs'?",),
    "rank.x=1": ("unknown key 'rank.x': rank has no keys below it",),
    "train.max_steps=x": ("bad value of train.max_steps; got: 'x' (text); expected: an integer",),
    "train.schedule=linaer": ("unknown value of train.schedule", "did you mean 'linear'?"),
    "train.part_learning_rates.visoin=1": ("did you mean 'vision'?",),
    "lora_target=[q_proj": ("not valid YAML",),
    "train={epochs: 1, epochs: 2}": ("duplicate key 'epochs'",),
    "data.train=no.jsonl": ("no such data file", "no.jsonl"),
    "model=null": ("missing key 'model'",),
    "adalora.target_rank=99": ("must be below adalora.initial_rank (12)",),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path


def failure(recipe: Path, *overrides: str) -> list[VlmtuneError]:
    with pytest.raises(VlmtuneError) as caught:
        load_recipe(recipe, overrides)
    assert caught.value.exit_code == 2
    return caught.value.errors if isinstance(caught.value, ErrorGroup) else [caught.value]


def test_the_good_recipe_loads(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(GOOD)
    assert load_recipe(folder / "recipe.yaml").recipe.output_dir == "runs/test"


@pytest.mark.parametrize("added", ADDED)
def test_bad_line_is_named(folder: Path, added: str) -> None:
    line, *parts = ADDED[added]
    recipe = folder / "recipe.yaml"
    recipe.write_text(GOOD + added + "\n")
    first = str(failure(recipe)[0])
    assert first.startswith(f"{recipe}:{line}: ")
    assert all(part in first for part in parts), first


@pytest.mark.parametrize("whole", WHOLE, ids=lambda whole: repr(whole[:40]))
def test_bad_file_is_named(folder: Path, whole: bytes) -> None:
    line, *parts = WHOLE[whole]
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(whole)
    first = str(failure(recipe)[0])
    assert first.startswith(f"{recipe}:{line}: ")
    assert all(part in first for part in parts), first


@pytest.mark.parametrize("override", OVERRIDES)
def test_bad_override_is_named(folder: Path, override: str) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(GOOD)
    errors = failure(recipe, override)
    text = str(errors[0])
    assert all(part in text for part in OVERRIDES[override]), text
    if override != "model=null":  # the key that is missing then has no override to point at
        assert text.startswith(f"override {override!r}: ")


def test_missing_recipe_and_folder_are_named(folder: Path) -> None:
    assert "gone.yaml: no such recipe" in str(failure(folder / "gone.yaml")[0])
    assert "a folder, not a recipe" in str(failure(folder)[0])


def test_all_errors_come_at_once_in_the_order_of_lines(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        textwrap.dedent("""\
            model: ./gone
            rnak: 8
            rank: 0
            dropout: yes
            use_dora: true
            adalora:
              initial_rank: 4
              target_rank: 8
            data:
              train: [5, train.jsonl]
            image: {min_pixels: 9, max_pixels: 4}
            rank: 16
            """)
    )
    errors = failure(recipe, "train.max_steps=x", "train.epochs=0")
    assert [error.line for error in errors] == [1, 1, 2, 3, 4, 6, 8, 10, 11, 12, None, None]
    assert "no such folder" in str(errors[0])
    assert "missing key 'output_dir'" in str(errors[1])
    assert "override 'train.epochs=0'" in str(errors[-1])


def test_a_bad_key_raises_no_false_conflict_with_its_default(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(GOOD + "quantization_bit: 5\nquantization: {double_quant: false}\n")
    assert len(failure(recipe)) == 1  # with the default, 16, `quantization` would be unused


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("eval: {scorer: embedding}", "eval.scorer has no effect because eval.task is vqa"),
        ("eval: {task: retrieval, scorer: embedding, subtract_prior: true}", "subtract_prior has"),
        ("eval: {embedding_prompt: x}", "eval.embedding_prompt has no effect"),
        ("eval: {task: retrieval, max_new_tokens: 4}", "eval.max_new_tokens has no effect"),
        ("eval: {decoding: {temperature: 0.5}}", "eval.decoding.temperature has no effect"),
        ("eval: {decoding: {method: sample, num_beams: 2}}", "eval.decoding.num_beams has no"),
        ("eval: {patience: 2}", "eval.patience has no effect because eval.best_metric is not"),
        (
            "eval: {best_metric: loss}",
            "eval.best_metric has no effect because data.eval is",
        ),
        ("eval: {task: vqaa}", "eval.task"),
        ("eval: {guard: {task: vqa}}", "eval.guard.data"),
        ("eval: {guard: {data: gone.jsonl}}", "no such data file"),
        (
            "contrastive: {initial_temperature: 0.1}",
            "initial_temperature has no effect",
        ),
    ],
)
def test_a_key_of_the_evaluation_without_effect_is_an_error(
    tmp_path: Path, lines: str, says: str
) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: org/name\noutput_dir: x\ndata: {{train: train.jsonl}}\n{lines}\n")
    with pytest.raises(ErrorGroup) as raised:
        load_recipe(recipe)
    assert says in str(raised.value)
    assert "recipe.yaml:4" in str(raised.value)


def test_what_is_null_is_turned_off_and_no_key_without_effect(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: org/name\noutput_dir: x\ndata: {train: train.jsonl, eval: train.jsonl}\n"
        "eval: {best_metric: loss, patience: 2}\n"
    )
    changed = load_recipe(recipe, ["eval.best_metric=null", "eval.patience=null"]).recipe
    assert (changed.eval.best_metric, changed.eval.patience) == (None, None)
    with pytest.raises(ErrorGroup, match=r"eval\.patience has no effect"):
        load_recipe(recipe, ["eval.best_metric=null", "eval.patience=3"])


def test_a_guard_with_answers_makes_their_keys_count_beside_retrieval(tmp_path: Path) -> None:
    for name in ("train.jsonl", "known.jsonl"):
        (tmp_path / name).write_text("{}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: org/name\noutput_dir: x\ndata: {train: train.jsonl}\n"
        "eval: {task: retrieval, max_new_tokens: 4, guard: {data: known.jsonl}}\n"
    )
    guard = load_recipe(recipe).recipe.eval.guard
    assert guard is not None
    assert guard.data == [DataEntry(path=str(tmp_path / "known.jsonl"))]
