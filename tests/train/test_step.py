"""The loss of a step depends on its samples alone, not on how they are split or padded."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from tests.train.training import adapter_of, copy_sample, metrics_of, train_once, write_recipe
from vlmtune.errors import VlmtuneError
from vlmtune.models.forward import summed_cross_entropy


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_vlm: Path, sample_data: Path):
    def make(name: str, **keys: object) -> Path:
        data = copy_sample(sample_data, tmp_path / "data", keep=32)
        return write_recipe(tmp_path / name, tiny_vlm=tiny_vlm, data=data, rank=4, **keys)

    return make


def run(recipe: Path):
    train_once(recipe)
    return metrics_of(recipe.parent / "run")


def test_splitting_a_step_into_micro_batches_changes_nothing(make_recipe):
    """(8, 1) = (4, 2) = (2, 4): samples in a micro-batch, micro-batches in a step."""
    keys = {"train__max_steps": 3, "train__batch_size": 8, "train__max_grad_norm": 0.5}
    budgets = {"whole": 4000, "halves": 200, "single": 1}
    runs = {
        name: run(make_recipe(name, train__micro_batch_tokens=budget, **keys))
        for name, budget in budgets.items()
    }
    for name in ("halves", "single"):
        for expected, got in zip(runs["whole"], runs[name], strict=True):
            assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert got["grad_norm"]["total"] == pytest.approx(
                expected["grad_norm"]["total"], rel=1e-4
            )


def test_a_mean_of_micro_batch_means_is_another_loss():
    """The wrong variant that stock trainers compute: each micro-batch divided by its own count."""
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 5), torch.randint(5, (9,))
    whole = summed_cross_entropy(logits, targets) / 9
    split = (
        summed_cross_entropy(logits[:7], targets[:7])
        + summed_cross_entropy(logits[7:], targets[7:])
    ) / 9
    means = (
        summed_cross_entropy(logits[:7], targets[:7]) / 7
        + summed_cross_entropy(logits[7:], targets[7:]) / 2
    ) / 2
    assert torch.allclose(whole, split, atol=1e-6)
    assert not torch.allclose(whole, means, atol=1e-3)


def test_no_supervised_token_gives_zero_and_stays_in_the_graph():
    logits = torch.randn(0, 5, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0
    loss.backward()


def test_a_loss_that_is_not_finite_names_its_samples(make_recipe, tiny_vlm: Path, monkeypatch):
    from vlmtune.models import forward

    calls = []

    def broken(logits, targets, weights=None) -> torch.Tensor:
        calls.append(1)
        return summed_cross_entropy(logits, targets, weights) * (
            float("nan") if len(calls) > 3 else 1.0  # one call is the look before step 1
        )

    monkeypatch.setattr(forward, "summed_cross_entropy", broken)
    recipe = make_recipe("run", train__micro_batch_tokens=4000)
    with pytest.raises(VlmtuneError, match="step 3: the loss is not finite.*train-"):
        train_once(recipe)


def test_the_learning_rate_of_a_part_holds(make_recipe):
    recipe = make_recipe(
        "run", train__max_steps=2, train__part_learning_rates={"vision": 1e-9}, train__warmup=0.0
    )
    train_once(recipe)
    moved = {k: v.abs().max().item() for k, v in adapter_of(recipe.parent / "run").items()}
    vision = max(v for k, v in moved.items() if "visual" in k and "lora_B" in k)
    language = max(v for k, v in moved.items() if "language" in k and "lora_B" in k)
    assert vision < 1e-6 < 1e-4 < language


def test_epochs_count_every_sample_once(make_recipe):
    recipe = make_recipe("run", train__max_steps=None, train__epochs=1.0, train__batch_size=10)
    summary = train_once(recipe)
    assert (summary["steps"], summary["samples"]) == (4, 32)


def test_bad_samples_are_listed_counted_and_limited(make_recipe, tmp_path: Path):
    recipe = make_recipe("run", train__max_steps=8, data__on_bad_sample="skip")
    data = tmp_path / "data" / "train.jsonl"
    lines = data.read_text().splitlines()
    lines[3] = lines[3].replace(".png", ".gone")
    data.write_text("\n".join(lines) + "\n")
    with pytest.raises(VlmtuneError, match=r"train.jsonl:4: too many bad samples: 1 of 32"):
        train_once(recipe)
    summary = train_once(recipe, "data.max_bad_fraction=0.1", resume="auto")
    assert summary["skipped"] == 1
    (line,) = (tmp_path / "run" / "run" / "skipped.jsonl").read_text().splitlines()
    assert "train.jsonl" in line and '"line": 4' in line


def test_too_long_samples_are_dropped_from_training_and_evaluation(make_recipe, tmp_path, caplog):
    recipe = make_recipe("run", train__max_steps=8, data__over_length="drop")
    data = tmp_path / "data" / "train.jsonl"
    row = json.loads(data.read_text().splitlines()[0])
    row["id"] = "the-long-one"
    row["messages"][-1]["content"] = "word " * 300
    data.write_text(data.read_text() + json.dumps(row) + "\n")
    logging.getLogger("vlmtune").propagate = True
    with caplog.at_level("WARNING", logger="vlmtune"):
        summary = train_once(
            recipe, "train.batch_size=33", "train.max_steps=1", f"data.eval={data}"
        )
    assert (summary["skipped"], summary["samples"]) == (1, 32)
    assert "train.jsonl:33" in caplog.text and "too long" in caplog.text
    with pytest.raises(VlmtuneError, match="train.jsonl:33: the sample is too long"):
        train_once(recipe, "data.over_length=error", f"data.eval={data}", resume="never")
