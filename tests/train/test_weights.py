"""A turn's weight: a term counts that often, however the step is split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch.nn import functional as F

from tests.tiny_models import save_tiny_model
from tests.train.test_processes import train_in_two
from tests.train.training import copy_sample, metrics_of, train_once, write_recipe
from vlmtune.data.batches import BatchLayout, Budget, collate
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Image, Sample, Source, Text, Turn
from vlmtune.models.forward import SupervisedForward, summed_cross_entropy, total_weight
from vlmtune.models.load import VLM, load_vlm
from vlmtune.train.feed import StepBatch
from vlmtune.train.runtime import build_accelerator
from vlmtune.train.step import NextToken, evaluation_loss

# Answers of different lengths: a mean over tokens is none over answers.
ANSWERS = [("a cat", 2.0), ("two dogs and a much longer answer", 1.0), ("no", 0.25), ("red", 3.0)]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> VLM:
    folder = tmp_path_factory.mktemp("qwen")
    return load_vlm(str(save_tiny_model("qwen2_5_vl", folder)), dtype=torch.float32)


@pytest.fixture
def encoder(vlm: VLM) -> Encoder:
    return Encoder(vlm.processor, max_tokens=512, over_length="error", max_image_pixels=10**6)


def asked(folder: Path, number: int, answer: str, weight: float) -> Conversation:
    path = folder / f"{number}.png"
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    user = Turn("user", (Image(path.name, folder), Text("what is it?")))
    return Conversation(
        str(number), (user, Turn("assistant", (Text(answer),), weight)), Source("f", number + 1)
    )


@pytest.fixture
def samples(encoder: Encoder, tmp_path: Path) -> list[Sample]:
    return [encoder.encode(asked(tmp_path, n, *given)) for n, given in enumerate(ANSWERS)]


def unweighted(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, weights=None) for sample in samples]


def step_of(vlm: VLM, groups: list[list[Sample]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of a step whose micro-batches are `groups`."""
    forward = SupervisedForward(vlm.model, vlm.family).train()
    forward.zero_grad()
    data = StepBatch(
        micro_batches=[collate(g, pad_token_id=0, image_batching="flat") for g in groups],
        left_out=[],
        notes=[],
        num_step_samples=sum(len(g) for g in groups),
        positions=range(sum(len(g) for g in groups)),
        epoch=0.0,
    )
    objective = NextToken()
    weight = objective.weight(data)
    losses = objective.backward(forward, data, build_accelerator("fp32"), weight)
    gradients = {n: p.grad.clone() for n, p in forward.named_parameters() if p.grad is not None}
    return losses.sum().item() / weight, gradients


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_the_weighted_sum_is_that_of_the_terms_by_hand():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5), torch.tensor([1, 4, 0])
    weights = torch.tensor([2.0, 0.5, 1.0])
    terms = -logits.log_softmax(-1)[range(3), targets]
    expected = 2 * terms[0] + 0.5 * terms[1] + terms[2]
    assert torch.allclose(summed_cross_entropy(logits, targets, weights), expected)
    assert total_weight(targets, weights) == 3.5
    assert total_weight(targets, None) == 3.0
    # torch's own class weights are of the classes, not of the terms.
    by_class = F.cross_entropy(logits, targets, weight=torch.ones(5), reduction="sum")
    assert not torch.allclose(by_class, expected, atol=1e-2)


def test_without_weights_the_loss_is_bitwise_the_plain_sum():
    torch.manual_seed(0)
    logits, targets = torch.randn(64, 50), torch.randint(50, (64,))
    plain = F.cross_entropy(logits.float(), targets, reduction="sum")
    assert torch.equal(summed_cross_entropy(logits, targets), plain)


def test_a_weight_of_two_is_the_sample_twice(vlm, samples):
    two, one = samples[0], samples[1]
    loss, gradients = step_of(vlm, [[two, one]])
    twice, expected = step_of(vlm, [unweighted([two, two, one])])
    assert loss == pytest.approx(twice, rel=1e-6)
    assert distance(gradients, expected) < 1e-6
    # The wrong variants: without weights, and divided by the number of tokens.
    once, plain = step_of(vlm, [unweighted([two, one])])
    assert abs(once - loss) > 1e-3 and distance(gradients, plain) > 1e-4
    count = sum(sample.num_supervised for sample in (two, one))
    assert abs(loss * (2 * two.num_supervised + one.num_supervised) / count - twice) > 1e-2


def test_a_weighted_step_is_the_same_in_any_micro_batches(vlm, samples):
    loss, gradients = step_of(vlm, [samples])
    for groups in ([samples[:1], samples[1:]], [[sample] for sample in samples]):
        split, other = step_of(vlm, groups)
        assert split == pytest.approx(loss, rel=1e-6)
        assert distance(gradients, other) < 1e-6
    # A mean of the micro-batches' own means is another loss.
    means = [step_of(vlm, [[sample]])[0] for sample in samples]
    assert abs(sum(means) / len(means) - loss) > 1e-3


def test_the_loss_on_held_out_data_is_weighted_alike(vlm, encoder, samples, tmp_path):
    conversations = [asked(tmp_path, n, *given) for n, given in enumerate(ANSWERS)]
    forward = SupervisedForward(vlm.model, vlm.family).eval()

    def measured(given: list[Conversation]) -> float:
        return evaluation_loss(
            forward,
            given,
            encoder=encoder,
            accelerator=build_accelerator("fp32"),
            layout=BatchLayout(Budget(100), 0, "flat", packs=False),
        )["loss"]

    assert measured(conversations) == pytest.approx(step_of(vlm, [samples])[0], rel=1e-5)
    plain = [asked(tmp_path, n, answer, 1.0) for n, (answer, _) in enumerate(ANSWERS)]
    assert abs(measured(plain) - measured(conversations)) > 1e-3


def test_weights_stand_beside_their_targets(samples):
    batch = collate(samples, pad_token_id=0, image_batching="flat")
    expected = [w for sample, (_, w) in zip(samples, ANSWERS) for _ in range(sample.num_supervised)]
    assert batch.weights is not None and batch.weights.tolist() == expected
    assert len(expected) == batch.targets.numel()
    assert collate(unweighted(samples), pad_token_id=0, image_batching="flat").weights is None
    assert samples[1].weights is None  # a turn of weight 1 leaves the sample without


def test_two_processes_weigh_as_one(tiny_vlm: Path, sample_data: Path, tmp_path: Path):
    """Each process has weights of its own: a mean of the processes' means would be another."""
    data = copy_sample(sample_data, tmp_path / "data", keep=12)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["messages"][-1]["weight"] = (1.0, 0.25, 3.0, 2.0, 0.5)[number % 5]
        row["messages"][-1]["content"] += " and more" * (number % 2)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"rank": 4, "train__max_steps": 3, "train__batch_size": 3}
    one = write_recipe(tmp_path / "one", tiny_vlm=tiny_vlm, data=data, **keys)
    two = write_recipe(tmp_path / "two", tiny_vlm=tiny_vlm, data=data, **keys)
    train_once(one)
    train_in_two(two)
    expected, got = metrics_of(tmp_path / "one" / "run"), metrics_of(tmp_path / "two" / "run")
    for a, b in zip(expected, got, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["supervised_tokens"] == a["supervised_tokens"]  # a count, whatever they weigh
        assert b["grad_norm"]["total"] == pytest.approx(a["grad_norm"]["total"], rel=1e-4)
    for row in rows:
        del row["messages"][-1]["weight"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_once(one, f"output_dir={tmp_path / 'plain'}")
    plain = metrics_of(tmp_path / "plain")
    assert [m["supervised_tokens"] for m in plain] == [m["supervised_tokens"] for m in expected]
    pairs = zip(plain, expected, strict=True)
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs) > 1e-2
