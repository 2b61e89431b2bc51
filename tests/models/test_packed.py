"""Samples packed into one row give the loss and the gradients that they give one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, MistralConfig, Qwen2Config

from tests.models.test_forward import FAMILIES, conversation
from tests.tiny_models import save_tiny_model
from vlmtune.data.batches import collate, pack
from vlmtune.data.encode import Encoder
from vlmtune.data.types import IGNORED, Batch, Sample, Source
from vlmtune.models import packing
from vlmtune.models.families import LLAVA, part_of
from vlmtune.models.forward import SupervisedForward, set_gradient_checkpointing
from vlmtune.models.load import VLM, load_vlm
from vlmtune.models.packing import can_pack, use_packed_attention

GIVEN = [
    ("a", "a cat", 1),
    ("text", "none at all", 0),
    ("b", "two dogs and a much longer answer", 2),
    ("c", "yes", 1),
]


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request, tmp_path_factory) -> VLM:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    return load_vlm(str(folder), dtype=torch.float32)


@pytest.fixture
def samples(vlm: VLM, tmp_path: Path) -> list[Sample]:
    encoder = Encoder(vlm.processor, max_tokens=512, over_length="error", max_image_pixels=10**6)
    return [encoder.encode(conversation(tmp_path, n, t, num_images=k)) for n, t, k in GIVEN]


@pytest.fixture
def forward(vlm: VLM):
    """The language part's attention trains, the rest is frozen; afterwards as before."""
    assert can_pack(vlm.model, vlm.family)
    use_packed_attention(vlm.model)
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(part_of(name, vlm.family) == "language" and "_proj" in name)
    yield SupervisedForward(vlm.model, vlm.family).train()
    vlm.model.activation_checkpointing_disable()
    vlm.model.set_attn_implementation("sdpa")


def packed(vlm: VLM, samples: list[Sample]) -> Batch:
    return pack(samples, image_batching=vlm.family.image_batching)


def loss_and_gradients(forward, batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    trained = [p for p in forward.parameters() if p.requires_grad]
    loss = torch.stack([forward(batch) for batch in batches]).sum()
    return loss.item(), list(torch.autograd.grad(loss, trained))


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("text", "packs"),
    [
        (MistralConfig(sliding_window=4096), False),
        (MistralConfig(sliding_window=None), True),
        (Qwen2Config(num_hidden_layers=2, use_sliding_window=True, max_window_layers=1), False),
        (Qwen2Config(num_hidden_layers=2, use_sliding_window=False), True),
        (LlamaConfig(), True),
    ],
    ids=["mistral-window", "mistral", "qwen2-window", "qwen2", "llama"],
)
def test_layers_with_a_window_are_not_packed(text, packs: bool):
    """A pack's attention goes back to the sample's first token, a window does not."""
    model = SimpleNamespace(config=LlavaConfig(text_config=text))
    assert can_pack(model, LLAVA) is packs
    assert not can_pack(model, replace(LLAVA, positions=None))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_separate(vlm: VLM, samples, forward, checkpointing):
    alone = [
        collate([s], pad_token_id=0, image_batching=vlm.family.image_batching) for s in samples
    ]
    reference = loss_and_gradients(forward, alone)
    if checkpointing:
        set_gradient_checkpointing(vlm.model, vlm.family)
    for groups in ([samples], [samples[:2], samples[2:]], [samples[::-1]], [[s] for s in samples]):
        loss, gradients = loss_and_gradients(forward, [packed(vlm, group) for group in groups])
        assert loss == pytest.approx(reference[0], rel=1e-5)
        assert distance(gradients, reference[1]) < 1e-5
    padded = collate(samples, pad_token_id=0, image_batching=vlm.family.image_batching)
    loss, gradients = loss_and_gradients(forward, [padded])
    assert loss == pytest.approx(reference[0], rel=1e-5)
    assert distance(gradients, reference[1]) < 1e-5


def test_logits_of_a_pack_are_those_of_its_samples(vlm: VLM, samples, forward):
    forward.eval()
    with torch.no_grad():
        together = forward.logits(packed(vlm, samples))
        separate = torch.cat([forward.logits(packed(vlm, [s])) for s in samples])
    assert torch.allclose(together, separate, atol=2e-5)


def test_a_sample_without_token_fields_adds_nothing(vlm: VLM, forward):
    """The one that a process gets which has nothing to train on."""
    ids = torch.zeros(2, dtype=torch.int64)
    empty = Sample("", Source("", 0), ids, torch.full_like(ids, IGNORED))
    loss, gradients = loss_and_gradients(forward, [packed(vlm, [empty])])
    assert loss == 0.0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


def test_positions_of_text_are_those_of_the_model(vlm: VLM, samples, forward):
    if vlm.family.positions != "mrope":
        return
    text = packed(vlm, [samples[1], samples[1]])
    lengths = text.lengths or ()
    by_model, _ = vlm.model.model.get_rope_index(
        text.inputs["input_ids"].reshape(2, -1),
        mm_token_type_ids=text.inputs["mm_token_type_ids"].reshape(2, -1),
    )
    ours = packing.pack_arguments(vlm.model.model, text.inputs, lengths, vlm.family)
    assert torch.equal(ours["position_ids"][1:, 0], by_model.reshape(3, -1))


def test_a_sample_in_front_is_not_seen(vlm: VLM, samples, forward, monkeypatch):
    """The wrong variants: one causal attention over the row, and other positions."""
    reference = loss_and_gradients(forward, [packed(vlm, samples)])
    whole = packed(vlm, samples)
    num_tokens = whole.num_tokens

    def as_one(model, inputs, lengths, family):
        return packing.pack_arguments(model, inputs, lengths, family) | {
            "pack_lengths": (num_tokens,)
        }

    def halved(model, inputs, lengths, family):
        right = packing.pack_arguments(model, inputs, lengths, family)
        return right | {"position_ids": right["position_ids"] // 2}

    for wrong in (as_one, halved):
        monkeypatch.setattr("vlmtune.models.forward.pack_arguments", wrong)
        loss, gradients = loss_and_gradients(forward, [whole])
        assert abs(loss - reference[0]) > 1e-3 or distance(gradients, reference[1]) > 1e-3


def test_no_saved_config_names_the_attention(vlm: VLM, forward):
    assert vlm.model.config.get_text_config()._attn_implementation == packing.ATTENTION
    assert vlm.model.config.vision_config._attn_implementation == "sdpa"
    assert packing.ATTENTION not in vlm.model.config.to_json_string(use_diff=False)


def test_attention_scales_and_drops_as_the_layer_says():
    """The models tested above have the usual scale and no dropout."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 7, 4).unbind()
    layer = torch.nn.Module()
    output, _ = packing._attention(layer, q, k, v, None, scaling=0.1, pack_lengths=(3, 4))
    for rows in (slice(0, 3), slice(3, 7)):
        scores = 0.1 * q[:, :, rows] @ k[:, :, rows].transpose(2, 3)
        seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
        expected = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, :, rows]
        torch.testing.assert_close(output[:, rows], expected.transpose(1, 2))
    dropped, _ = packing._attention(layer, q, k, v, None, dropout=0.9, pack_lengths=(3, 4))
    # A token that sees only itself loses its value whole, or has it ten times.
    first = dropped[0, 0] / v[0, :, 0]
    assert all(bool((row - row[0]).abs().max() < 1e-5) for row in first)
    assert {round(float(row[0])) for row in first} <= {0, 10}


def test_padded_rows_and_generation_are_as_with_the_stock_attention(vlm: VLM, samples, forward):
    forward.eval()
    layout = vlm.family.image_batching
    batch = collate(samples, pad_token_id=0, image_batching=layout)
    with torch.no_grad():
        ours = forward.logits(batch)
        written = vlm.model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
        vlm.model.set_attn_implementation("sdpa")
        stock = forward.logits(batch)
        by_stock = vlm.model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(ours, stock)
    assert torch.equal(written, by_stock)
