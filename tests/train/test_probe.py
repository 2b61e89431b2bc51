"""What the look at one sample before the first step finds."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
import torch

from tests.tiny_models import save_tiny_model
from vlmtune.data.batches import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Batch, Conversation, Image, Source, Text, Turn
from vlmtune.errors import VlmtuneError
from vlmtune.models import packing
from vlmtune.models.forward import SupervisedForward, full_logits
from vlmtune.models.load import VLM, load_vlm
from vlmtune.models.packing import use_packed_attention
from vlmtune.train.probe import check_forward, check_packs, freeze_unreached, own_logits


@pytest.fixture
def llava(tmp_path: Path) -> VLM:
    save_tiny_model("llava", tmp_path / "llava")
    return load_vlm(str(tmp_path / "llava"), dtype=torch.float32)


@pytest.fixture
def batch(llava: VLM, tmp_path: Path) -> Batch:
    PIL.Image.effect_noise((48, 56), 60).convert("RGB").save(tmp_path / "a.png")
    user = Turn("user", (Image("a.png", tmp_path), Text("what is it?")))
    conversation = Conversation("a", (user, Turn("assistant", (Text("a cat"),))), Source("data", 1))
    encoder = Encoder(llava.processor, max_tokens=512, over_length="error", max_image_pixels=10**6)
    return collate([encoder.encode(conversation)], pad_token_id=0, image_batching="flat")


def test_the_layer_that_the_model_skips_is_frozen_and_said(llava: VLM, batch: Batch, caplog):
    """LLaVA takes its features from the last vision layer but one."""
    llava.model.requires_grad_(False)
    trained = {
        name: parameter
        for name, parameter in llava.model.named_parameters()
        if "vision_tower" in name and "fc1.weight" in name
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    before = torch.get_rng_state()
    forward = SupervisedForward(llava.model, llava.family)
    with caplog.at_level("WARNING", logger="vlmtune"):
        unreached = freeze_unreached(forward, batch, trained)
    assert len(trained) == 3
    assert [name.split("layers.")[1][0] for name in unreached] == ["2"]
    assert "1 of 3 trained tensors get no gradient" in caplog.text
    assert [p.requires_grad for p in trained.values()] == [True, True, False]
    assert all(p.grad is None for p in trained.values())
    assert torch.equal(before, torch.get_rng_state())


def test_logits_changed_after_the_head_are_refused(llava: VLM, batch: Batch):
    forward = SupervisedForward(llava.model, llava.family)
    assert check_forward(forward, batch, torch.float32) < 1e-5

    def soft_cap(module, inputs, output):
        output.logits = torch.tanh(output.logits / 0.01) * 0.01
        return output

    llava.model.register_forward_hook(soft_cap)
    with pytest.raises(VlmtuneError, match="changes its logits after lm_head"):
        check_forward(forward, batch, torch.float32)


def test_a_model_that_does_not_keep_packed_samples_apart_is_refused(
    llava: VLM, batch: Batch, monkeypatch
):
    """One whose attention never gets the lengths."""
    use_packed_attention(llava.model)
    del batch.inputs["attention_mask"]
    forward = SupervisedForward(llava.model, llava.family)
    check_packs(forward, batch, torch.float32)
    right = packing.pack_arguments

    def without_lengths(*args):
        return {"position_ids": right(*args)["position_ids"]}

    monkeypatch.setattr("vlmtune.models.forward.pack_arguments", without_lengths)
    with pytest.raises(VlmtuneError, match="does not keep packed samples apart"):
        check_packs(forward, batch, torch.float32)


@pytest.mark.parametrize("has_argument", [True, False])
def test_only_supervised_positions_get_logits_where_the_class_can(
    llava: VLM, batch: Batch, monkeypatch: pytest.MonkeyPatch, has_argument: bool
):
    whole = full_logits(llava.model, batch.inputs)
    if not has_argument:
        forward = llava.model.forward

        def without_argument(**inputs):
            return forward(**inputs)

        monkeypatch.setattr(llava.model, "forward", without_argument)
    rows = []
    llava.model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    reference = own_logits(llava.model, batch)
    torch.testing.assert_close(reference, whole[batch.supervised])
    num_tokens, num_supervised = batch.supervised.numel(), int(batch.supervised.sum())
    assert rows == [num_supervised if has_argument else num_tokens]
    assert num_supervised < num_tokens / 2
