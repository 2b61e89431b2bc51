"""Two gloo processes on the CPU give the losses and the adapter of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.training import METHODS, adapter_of, copy_sample, metrics_of, write_recipe
from tests.train.training import train_once as train_alone
from vlmtune.data.batches import BatchLayout, Budget
from vlmtune.data.dataset import load_conversations
from vlmtune.data.order import Order
from vlmtune.models.forward import SupervisedForward
from vlmtune.models.load import load_vlm
from vlmtune.recipe.load import load_recipe
from vlmtune.train.build import build_encoder
from vlmtune.train.feed import FeedSettings, StepBatch, StepBuilder, StepDataset


def train_in_two(recipe: Path, *arguments: str) -> str:
    """`accelerate launch` with two processes; what they wrote to stdout."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    done = subprocess.run(
        [*launch, "--num_processes", "2", "--main_process_port", "0"]
        + ["-m", "vlmtune", "train", str(recipe), "--json", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_vlm: Path, sample_data: Path):
    """Text-only and picture samples mixed, so that a step often has pictures on one process only,
    and answers of different lengths, so that a mean of local means would be another loss."""

    def make(name: str, **keys: object) -> Path:
        data = copy_sample(sample_data, tmp_path / "data", keep=24)
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        for number, row in enumerate(rows):
            if number % 2:
                row["messages"][0]["content"] = "say something"
            if number % 3 == 0:
                row["messages"][-1]["content"] += " and then some more words of it"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"train__max_steps": 6, "train__batch_size": 3, "train__max_grad_norm": 0.5}
        return write_recipe(tmp_path / name, tiny_vlm=tiny_vlm, data=data, **(settings | keys))

    return make


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_two_processes_equal_one(make_recipe, method: str):
    keys = dict(METHODS[method])
    if method == "adalora":
        keys["adalora"] = METHODS[method]["adalora"] | {"warmup": 1, "final": 1}
    one, two = make_recipe("one", **keys), make_recipe("two", **keys)
    train_alone(one)
    stdout = train_in_two(two)
    assert json.loads(stdout)["steps"] == 6  # one JSON object: one process prints
    expected, got = metrics_of(one.parent / "run"), metrics_of(two.parent / "run")
    assert [m["step"] for m in got] == [m["step"] for m in expected]
    for a, b in zip(expected, got, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["supervised_tokens"] == a["supervised_tokens"]
        assert b["grad_norm"]["total"] == pytest.approx(a["grad_norm"]["total"], rel=1e-4)
        assert b.get("orthogonal_penalty", 0) == pytest.approx(
            a.get("orthogonal_penalty", 0), rel=1e-4
        )
        assert b.get("ranks") == a.get("ranks")
    adapters = adapter_of(one.parent / "run"), adapter_of(two.parent / "run")
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], atol=1e-5), name


def test_a_mean_of_the_processes_means_would_be_another_loss(make_recipe):
    """The wrong variant: each process divides by its own count, DDP takes the mean."""
    recipe = make_recipe("run", **METHODS["lora"])
    train_alone(recipe)
    loaded = load_recipe(recipe).recipe
    conversations, _ = load_conversations(loaded.data.train)
    vlm = load_vlm(loaded.model, dtype=torch.float32)
    forward = SupervisedForward(vlm.model, vlm.family).eval()
    sums, counts = [], []
    for rank in (0, 1):
        settings = FeedSettings(
            batch_size=3,
            layout=BatchLayout(Budget(4000), 0, "flat", packs=False),
            skip_bad_samples=False,
            drop_over_length=False,
            rank=rank,
            world_size=2,
        )
        builder = StepBuilder(build_encoder(loaded, vlm), settings)
        order = Order.uniform(loaded.seed, len(conversations))
        data = StepDataset(conversations, builder, order=order, epochs=None)[1]
        assert isinstance(data, StepBatch)
        (batch,) = data.micro_batches
        with torch.no_grad():
            sums.append(forward(batch).item())
        counts.append(batch.targets.numel())
    logged = metrics_of(recipe.parent / "run")[0]["loss"]  # an untrained adapter: the base's loss
    assert sum(sums) / sum(counts) == pytest.approx(logged, rel=1e-5)
    local_means = [s / c for s, c in zip(sums, counts)]
    assert sum(local_means) / 2 != pytest.approx(logged, rel=1e-3)
