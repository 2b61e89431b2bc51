"""`vlmtune eval` in this process, and what it is run on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from typer.testing import CliRunner

from vlmtune.cli.app import app
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.models.load import load_vlm
from vlmtune.recipe.load import dump_recipe, load_recipe


def run_eval(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def write_questions(file: Path, sample_data: Path, num: int) -> Path:
    """The first `num` questions of the sample data with their pictures, in a file of their own."""
    lines = (sample_data / "eval.jsonl").read_text().splitlines()[:num]
    return write_with_pictures(file, "\n".join(lines) + "\n", sample_data)


def write_with_pictures(file: Path, rows: str, sample_data: Path) -> Path:
    """Rows of the sample data, in a file of their own with their pictures beside it."""
    (file.parent / "images").mkdir(exist_ok=True)
    for name in set(re.findall(r'"(images/[^"]+)"', rows)):
        shutil.copyfile(sample_data / name, file.parent / name)
    file.write_text(rows)
    return file


def write_run(folder: Path, tiny_vlm: Path, data: Path | str, evaluation: str) -> Path:
    """A finished run as training leaves it, with an untrained adapter; `data` is the value of
    `data.train` in its recipe, `evaluation` that of `eval`."""
    folder.mkdir(parents=True)
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(
        f"model: {tiny_vlm}\nlora_target: [q_proj]\nrank: 2\noutput_dir: {folder}\n"
        f"image: {{max_pixels: 2304}}\ndata: {{train: {data}}}\neval: {evaluation}\n"
    )
    recipe = load_recipe(recipe_file).recipe
    (folder / "recipe.resolved.yaml").write_text(dump_recipe(recipe))
    vlm = load_vlm(str(tiny_vlm), dtype=torch.float32, device="cpu", image=recipe.image)
    build_adapter(vlm, recipe, total_steps=1).save(folder / "adapter")
    return folder
