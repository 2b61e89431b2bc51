"""Logits at supervised positions only are the model's own, whatever the family and the split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch

from tests.tiny_models import save_tiny_model
from vlmtune.data.batches import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Image, Source, Text, Turn
from vlmtune.models.families import part_of
from vlmtune.models.forward import (
    MEDIA_PARTS,
    SupervisedForward,
    full_logits,
    set_gradient_checkpointing,
)
from vlmtune.models.load import VLM, load_vlm

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "smolvlm"]


def conversation(folder: Path, name: str, answer: str, *, num_images: int) -> Conversation:
    images = []
    for number in range(num_images):
        path = folder / f"{name}-{number}.png"
        PIL.Image.effect_noise((48, 56), 60 + 20 * number).convert("RGB").save(path)
        images.append(Image(path.name, folder))
    user = Turn("user", (*images, Text("what is it?")))
    return Conversation(name, (user, Turn("assistant", (Text(answer),))), Source(name, 1))


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request, tmp_path_factory) -> VLM:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    return load_vlm(str(folder), dtype=torch.float32)


@pytest.fixture
def encoded(vlm: VLM, tmp_path: Path):
    encoder = Encoder(vlm.processor, max_tokens=512, over_length="error", max_image_pixels=10**6)
    given = [("a", "a cat", 1), ("b", "two dogs and a much longer answer", 1), ("c", "none", 0)]
    return [encoder.encode(conversation(tmp_path, n, t, num_images=k)) for n, t, k in given]


def batch_of(vlm: VLM, samples):
    return collate(samples, pad_token_id=0, image_batching=vlm.family.image_batching)


def test_supervised_logits_equal_the_models_own(vlm: VLM, encoded):
    batch = batch_of(vlm, encoded)
    forward = SupervisedForward(vlm.model, vlm.family).eval()
    with torch.no_grad():
        ours = forward.logits(batch)
        reference = full_logits(vlm.model, batch.inputs)
    assert torch.allclose(ours, reference[batch.supervised], atol=1e-5)
    off_by_one = torch.roll(batch.supervised, 1, dims=1)
    assert not torch.allclose(ours, reference[off_by_one], atol=1e-2)


def test_padding_does_not_change_a_samples_logits(vlm: VLM, encoded):
    forward = SupervisedForward(vlm.model, vlm.family).eval()
    with torch.no_grad():
        together = batch_of(vlm, encoded)
        padded = forward.logits(together)
        alone = [batch_of(vlm, [s]) for s in encoded]
        separate = torch.cat([forward.logits(b) for b in alone])
    assert torch.allclose(padded, separate, atol=2e-5)
    assert torch.equal(together.targets, torch.cat([b.targets for b in alone]))
    # The wrong variant: padding on the left that the mask does not hide.
    length = together.supervised.shape[1]
    shifts = (length - together.inputs["attention_mask"].sum(dim=1)).tolist()
    assert max(shifts) > 0

    def moved(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.roll(by) for row, by in zip(rows, shifts, strict=True)])

    inputs = {k: moved(v) if v.shape == (3, length) else v for k, v in together.inputs.items()}
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with torch.no_grad():
        wrong = forward.logits(
            replace(together, inputs=inputs, supervised=moved(together.supervised), positions=None)
        )
    assert not torch.allclose(wrong, separate, atol=1e-3)


def test_a_text_only_batch_still_gives_every_vision_tensor_a_gradient(vlm: VLM, encoded):
    vision = [p for n, p in vlm.model.named_parameters() if "vis" in n and p.ndim > 1]
    for parameter in vlm.model.parameters():
        parameter.requires_grad_(False)
    for parameter in vision:
        parameter.requires_grad_(True)
    forward = SupervisedForward(vlm.model, vlm.family)
    batch = batch_of(vlm, encoded[2:])
    forward(batch).backward()
    assert vision
    assert all(p.grad is not None and not p.grad.any() for p in vision)


def test_checkpointing_changes_no_gradient_and_leaves_a_frozen_tower_alone(vlm: VLM, encoded):
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(part_of(name, vlm.family) == "language" and "q_proj" in name)
    forward = SupervisedForward(vlm.model, vlm.family).train()
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    batch = batch_of(vlm, encoded)

    def gradients():
        return torch.autograd.grad(forward(batch), trained)

    plain = gradients()
    assert set_gradient_checkpointing(vlm.model, vlm.family) == ["language"]
    recorded = []
    hooks = [
        module.register_forward_hook(lambda *args: recorded.append(args[-1].requires_grad))
        for name, module in vlm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and part_of(name, vlm.family) in MEDIA_PARTS
    ]
    checkpointed = gradients()
    assert recorded and not any(recorded), "a frozen tower recorded its graph"
    for hook in hooks:
        hook.remove()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, checkpointed))
    vlm.model.activation_checkpointing_disable()
