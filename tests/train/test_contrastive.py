"""Contrastive training: cached gradients equal plain ones; processes, resume and duplicates."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.tiny_models import save_tiny_model
from tests.train.test_processes import train_in_two
from tests.train.training import adapter_of, metrics_of, train_once, write_recipe
from vlmtune.data.batches import BatchLayout, Budget
from vlmtune.data.dataset import load_conversations
from vlmtune.data.order import Order
from vlmtune.data.types import ContrastiveBatch
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.models.embedding import EmbeddingForward
from vlmtune.models.load import load_vlm
from vlmtune.models.merge import merge
from vlmtune.recipe.load import load_recipe
from vlmtune.recipe.schema import EvalSection
from vlmtune.sessions.eval_targets import with_recorded_prompt
from vlmtune.train.build import build_encoder
from vlmtune.train.contrastive import Contrastive, info_nce
from vlmtune.train.feed import FeedSettings, StepBatch, StepBuilder, StepDataset
from vlmtune.train.probe import freeze_unreached
from vlmtune.train.runtime import build_accelerator

PROMPT = "In one word:"


def unique(num: int) -> Tensor:
    return torch.arange(2 * num).reshape(num, 2)


def points(seed: int, num: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(num, 4, generator=generator), dim=-1)


def test_the_loss_is_the_mean_of_both_cross_entropies_worked_by_hand():
    pictures = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    result = info_nce(pictures, texts, unique(2), torch.tensor(2.0))
    # Similarities times 2: [[2, 1.2], [0, 1.6]].
    first = (math.log(1 + math.exp(1.2 - 2)) + math.log(1 + math.exp(0.0 - 2))) / 2
    second = (math.log(1 + math.exp(0 - 1.6)) + math.log(1 + math.exp(1.2 - 1.6))) / 2
    assert result.losses.tolist() == pytest.approx([first, second], abs=1e-6)
    assert int(result.num_right) == 4
    # Similarities [[0, 0.6], [1, 0.8]]: only the second text is nearest to its own picture.
    texts = torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    assert int(info_nce(pictures, texts, unique(2), torch.ones(1)).num_right) == 1
    alike = torch.ones(3, 1)
    assert int(info_nce(alike, alike, unique(3), torch.ones(1)).num_right) == 0


def test_the_same_picture_or_text_is_no_negative():
    pictures, texts = points(0, 4), points(1, 4)
    keys = torch.tensor([[1, 10], [2, 11], [1, 12], [3, 11]])  # 0 and 2 share a picture, 1 and 3 a
    scale = torch.tensor(5.0)  # text
    losses = info_nce(pictures, texts, keys, scale).losses
    logits = scale * pictures @ texts.T
    kept = {0: [0, 1, 3], 1: [0, 1, 2], 2: [1, 2, 3], 3: [0, 2, 3]}
    for row, others in kept.items():
        there = torch.logsumexp(logits[row, others], 0) - logits[row, row]
        back = torch.logsumexp(logits[others, row], 0) - logits[row, row]
        assert losses[row].item() == pytest.approx(((there + back) / 2).item(), abs=1e-6)
    all_negative = info_nce(pictures, texts, unique(4), scale).losses
    assert not torch.allclose(losses, all_negative, atol=1e-3)


@pytest.fixture(scope="module")
def captions(sample_data: Path, tmp_path_factory) -> Path:
    """Twelve labels of twelve pictures, two of them of the same picture."""
    lines = (sample_data / "captions_train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:4] + lines[8:40:4]]
    folder = tmp_path_factory.mktemp("captions")
    (folder / "images").mkdir()
    for row in rows:
        part = row["messages"][0]["content"][0]
        shutil.copyfile(sample_data / part["image"], folder / part["image"])
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_vlm: Path, captions: Path):
    def make(name: str, **keys: Any) -> Path:
        settings: dict[str, Any] = {
            "objective": "contrastive",
            "eval": {"embedding_prompt": PROMPT},
            "train__max_steps": 6,
            "train__batch_size": 7,
            "rank": 4,
        }
        folder = tmp_path / name
        return write_recipe(folder, tiny_vlm=tiny_vlm, data=captions, **(settings | keys))

    return make


def step_of(
    recipe: Path, budget: int
) -> tuple[EmbeddingForward, StepBatch, dict[str, nn.Parameter]]:
    loaded = load_recipe(recipe).recipe
    vlm = load_vlm(loaded.model, dtype=torch.float32)
    torch.manual_seed(0)
    adapter = build_adapter(vlm, loaded, total_steps=6)
    for name, parameter in adapter.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    forward = EmbeddingForward(adapter.model, vlm.family).train()
    conversations, _ = load_conversations(loaded.data.train)
    settings = FeedSettings(
        batch_size=9,
        layout=BatchLayout(Budget(budget), 0, "flat", packs=False),
        skip_bad_samples=True,
        drop_over_length=False,
        rank=0,
        world_size=1,
        embedding_prompt=PROMPT,
    )
    builder = StepBuilder(build_encoder(loaded, vlm), settings)
    order = Order.uniform(0, len(conversations))
    data = StepDataset(conversations, builder, order=order, epochs=None)[1]
    assert isinstance(data, StepBatch)
    trained = {n: p for n, p in adapter.model.named_parameters() if p.requires_grad}
    return forward, data, trained


def cached(
    recipe: Path, budget: int, *, scaler: torch.amp.GradScaler | None = None
) -> tuple[float, dict[str, Tensor], Contrastive]:
    """Loss and gradients as training computes them, before fp16's scaler unscales them."""
    forward, data, trained = step_of(recipe, budget)
    objective = Contrastive(0.1, torch.device("cpu"))
    accelerator = build_accelerator("fp32")
    accelerator.scaler = scaler
    torch.manual_seed(1)
    losses = objective.backward(forward, data, accelerator, objective.num_terms(data))
    assert len(losses) == len(data.micro_batches)
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    scale = objective.tensors["log_scale"].grad
    assert scale is not None
    return losses.sum().item() / 9, gradients | {"log_scale": scale}, objective


def plain(recipe: Path, *, within: int | None = None) -> tuple[float, dict[str, Tensor]]:
    """The whole step in one graph. `within`: the wrong variant with negatives of so many pairs."""
    forward, data, trained = step_of(recipe, 100_000)
    embeddings = [forward(b.inputs, b.last) for b in data.micro_batches]
    pictures, texts = (
        e[torch.argsort(torch.tensor(b.pairs))]
        for e, b in zip(embeddings, data.micro_batches, strict=True)
    )
    log_scale = torch.tensor([-math.log(0.1)], requires_grad=True)
    keys = torch.tensor(data.pair_keys)
    size = within or len(keys)
    parts = [slice(i, i + size) for i in range(0, len(keys), size)]
    losses = [
        info_nce(pictures[part], texts[part], keys[part], log_scale.exp()).losses.sum()
        for part in parts
    ]
    loss = torch.stack(losses).sum() / len(keys)
    loss.backward()
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    return loss.item(), gradients | {"log_scale": log_scale.grad}


@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_cached_gradients_equal_those_of_one_graph(make_recipe, budget: int):
    recipe = make_recipe("run")
    loss, gradients, _ = cached(recipe, budget)
    expected_loss, expected = plain(recipe)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-5 * largest), name


@pytest.mark.parametrize("budget", [60, 100_000])
def test_under_a_loss_scaler_every_gradient_is_scaled_once(make_recipe, budget: int):
    recipe = make_recipe("run")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss, gradients, objective = cached(recipe, budget, scaler=scaler)
    expected_loss, expected = plain(recipe)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    unscaled = {name: gradient / 1024.0 for name, gradient in gradients.items()}
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        assert torch.allclose(unscaled[name], gradient, atol=1e-5 * max(largest, 1e-3)), name
    # What the optimizer is given, by the scaler itself.
    (log_scale,) = objective.tensors.values()
    optimizer = torch.optim.SGD([log_scale], 0.1)
    scaler.unscale_(optimizer)
    assert log_scale.grad is not None and expected["log_scale"].abs() > 1e-3
    assert torch.allclose(log_scale.grad, expected["log_scale"], rtol=1e-5)
    # The wrong variant: a temperature whose gradient was not scaled, and is unscaled.
    assert not torch.allclose(log_scale.grad, expected["log_scale"] / 1024.0, rtol=0.1)


def test_a_process_without_a_pair_takes_part_with_zeros(make_recipe, monkeypatch):
    monkeypatch.setattr(StepBuilder, "_encode", refused)
    forward, data, trained = step_of(make_recipe("run"), 60)
    objective = Contrastive(0.1, torch.device("cpu"))
    losses = objective.backward(forward, data, build_accelerator("fp32"), 5)
    assert (len(data.left_out), objective.num_terms(data), losses.tolist()) == (9, 0, [0.0])
    assert all(p.grad is not None and not p.grad.any() for p in trained.values())


def refused(*_: object) -> None:
    raise SampleError("not usable")


def test_negatives_of_the_micro_batch_alone_are_another_loss(make_recipe):
    recipe = make_recipe("run")
    loss, gradients, _ = cached(recipe, 60)
    other, wrong = plain(recipe, within=3)
    assert abs(other - loss) > 0.1
    assert any(not torch.allclose(gradients[n], g, rtol=0.1) for n, g in wrong.items())


def test_dropout_is_the_same_in_both_passes(make_recipe, monkeypatch):
    import vlmtune.train.contrastive as module

    recipe = make_recipe("run", dropout=0.5)
    seen: list[Tensor] = []
    original = EmbeddingForward.forward

    def watched(self: EmbeddingForward, inputs: dict[str, Tensor], last: Tensor) -> Tensor:
        result = original(self, inputs, last)
        seen.append(result.detach().clone())
        return result

    monkeypatch.setattr(EmbeddingForward, "forward", watched)
    cached(recipe, 60)
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    seen.clear()
    monkeypatch.setattr(module, "restore_random_state", lambda state: None)
    cached(recipe, 60)
    assert not any(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_the_scale_stays_below_a_hundred_and_can_come_back_from_it():
    objective = Contrastive(0.001, torch.device("cpu"))
    (log_scale,) = objective.tensors.values()
    beyond = log_scale.detach().clone().requires_grad_()
    assert float(objective.scale().detach()) == pytest.approx(100.0)
    # No text is nearest to its picture: a lower scale is better.
    pictures, texts = points(0, 4), -points(0, 4)
    info_nce(pictures, texts, unique(4), objective.scale()).losses.sum().backward()
    assert log_scale.grad is not None and float(log_scale.grad) > 1.0
    # The wrong variant: clamped in the graph, it has no way back.
    clamped = beyond.clamp(max=math.log(100.0)).exp()
    info_nce(pictures, texts, unique(4), clamped).losses.sum().backward()
    assert beyond.grad is not None and float(beyond.grad) == 0.0


def test_the_temperature_is_learned_logged_and_saved_with_the_result(make_recipe):
    recipe = make_recipe("run", contrastive={"initial_temperature": 0.1})
    train_once(recipe)
    lines = metrics_of(recipe.parent / "run")
    temperatures = [line["temperature"] for line in lines]
    assert temperatures[0] == pytest.approx(0.1, rel=0.05)
    assert len(set(temperatures)) == 6
    assert [line["pairs"] for line in lines] == [7] * 6
    assert all(0 <= line["in_batch_accuracy"] <= 1 for line in lines)
    saved = json.loads((recipe.parent / "run" / "adapter" / "contrastive.json").read_text())
    assert saved == {
        "temperature": pytest.approx(temperatures[-1]),
        "embedding_prompt": PROMPT,
    }


ADAPTER_KEYS = ("rank", "alpha")
METHODS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "qlora": {"quantization_bit": 4, "train__optimizer": "paged_adamw_8bit"},
    "full": {"lora_target": [], "modules_to_save": ["all"]},
}


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_learns_to_tell_the_samples_apart(make_recipe, method: str):
    keys = METHODS[method] | {"train__batch_size": 12, "train__micro_batch_tokens": 2000}
    recipe = make_recipe(method, train__learning_rate=2e-3, train__max_steps=12, **keys)
    if method == "full":  # an adapter's keys would have no effect
        values = yaml.safe_load(recipe.read_text())
        recipe.write_text(yaml.safe_dump({k: values[k] for k in values if k not in ADAPTER_KEYS}))
    train_once(recipe)
    losses = [line["loss"] for line in metrics_of(recipe.parent / "run")]
    assert min(losses[-3:]) < losses[0] - 0.3


def test_an_output_layer_that_no_embedding_reaches_is_frozen_and_said(tmp_path: Path, caplog):
    folder = save_tiny_model("llava", tmp_path / "llava", tied=False)
    vlm = load_vlm(str(folder), dtype=torch.float32)
    vlm.model.requires_grad_(False)
    trained = {n: p for n, p in vlm.model.named_parameters() if "lm_head" in n or "q_proj" in n}
    trained = {n: p.requires_grad_() for n, p in trained.items() if "vision" not in n}
    ids = torch.arange(10, 18).reshape(2, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = ContrastiveBatch(inputs, torch.tensor([3, 3]), 1, (0, 1), ("a", "b"), 8, 0)
    with caplog.at_level("WARNING", logger="vlmtune"):
        unreached = freeze_unreached(EmbeddingForward(vlm.model, vlm.family), batch, trained)
    assert unreached == ["lm_head.weight"]
    assert [p.requires_grad for p in trained.values()] == [True, True, False]


def test_a_resumed_run_equals_an_uninterrupted_one(make_recipe):
    keys = {"dropout": 0.2, "train__save_every": 3, "train__keep_checkpoints": 9}
    whole, cut = make_recipe("whole", **keys), make_recipe("cut", **keys)
    train_once(whole)
    train_once(cut)
    checkpoints = cut.parent / "run" / "checkpoints"
    (checkpoints / "step-000006" / "state.json").unlink()  # as after a kill before it was complete
    train_once(cut, resume="auto")
    for name, tensor in adapter_of(whole.parent / "run").items():
        assert torch.equal(tensor, adapter_of(cut.parent / "run")[name]), name
    last = [metrics_of(r.parent / "run")[-1]["temperature"] for r in (whole, cut)]
    assert last[0] == last[1]
    with pytest.raises(VlmtuneError, match="embedding_prompt"):
        train_once(cut, "eval.embedding_prompt=Briefly:", resume="auto")


def test_two_processes_equal_one(make_recipe):
    one, two = make_recipe("one"), make_recipe("two")
    train_once(one)
    train_in_two(two)
    expected, got = metrics_of(one.parent / "run"), metrics_of(two.parent / "run")
    for a, b in zip(expected, got, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["temperature"] == pytest.approx(a["temperature"], rel=1e-5)
        assert b["in_batch_accuracy"] == a["in_batch_accuracy"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    # AdamW makes a step of the whole rate, 1e-3, of a gradient that is nothing but rounding: a few
    # elements of 54,000 may differ.
    other = adapter_of(two.parent / "run")
    differences = [(t - other[name]).abs() for name, t in adapter_of(one.parent / "run").items()]
    assert float(torch.cat([d.flatten() for d in differences]).quantile(0.999)) < 1e-5


def test_held_out_pairs_are_measured_too(make_recipe, captions: Path):
    recipe = make_recipe(
        "run",
        data__eval=str(captions),
        eval={"embedding_prompt": PROMPT, "task": "caption", "max_new_tokens": 2},
        train__learning_rate=3e-3,
        train__max_steps=30,
    )
    train_once(recipe)
    lines = metrics_of(recipe.parent / "run")
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert losses[30] < losses[0] - 0.3
    assert lines[0]["eval_in_batch_accuracy"] <= 1


def test_a_sample_without_a_picture_is_an_error_with_its_place(make_recipe, captions: Path):
    recipe = make_recipe("run")
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    rows[3]["messages"][0]["content"] = "no picture"
    data = captions.with_name("data.jsonl")  # beside the pictures
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(VlmtuneError, match="data.jsonl:4: there is no picture"):
        train_once(recipe, f"data.train={data}")


def test_what_does_not_go_with_it_is_refused(make_recipe):
    with pytest.raises(ErrorGroup, match="adalora.initial_rank has no effect"):
        load_recipe(make_recipe("b", adalora={"initial_rank": 4, "target_rank": 2}))
    with pytest.raises(ErrorGroup, match="train.batch_size 1 there are none"):
        load_recipe(make_recipe("d", train__batch_size=1))
    with pytest.raises(ErrorGroup, match="no effect"):
        load_recipe(make_recipe("c", objective="next_token", contrastive={}))


def test_the_prompt_goes_with_the_adapter_and_the_merged_model(make_recipe, tmp_path: Path):
    recipe = make_recipe("run")
    train_once(recipe, "train.max_steps=1")
    run = recipe.parent / "run"
    merge(run, tmp_path / "merged")
    for folder in (run / "adapter", tmp_path / "merged"):
        section = with_recorded_prompt(EvalSection(), ["a model of the hub", str(folder)])
        assert section == EvalSection(embedding_prompt=PROMPT)
    assert with_recorded_prompt(EvalSection(), [str(tmp_path)]) == EvalSection()
