"""A sample with a video through the model: logits as the model's own, and a training step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.data.clips import write_clip, write_frames
from tests.tiny_models import save_tiny_model
from tests.train.training import adapter_of, copy_sample, metrics_of, train_once, write_recipe
from vlmtune.data.batches import collate, pack
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Sample, Source, Text, Turn, Video
from vlmtune.models.forward import SupervisedForward, full_logits
from vlmtune.models.load import load_vlm
from vlmtune.models.packing import use_packed_attention


def sample_of(encoder: Encoder, video: Video, name: str, *, answer: str) -> Sample:
    user = Turn("user", (video, Text("what is it?")))
    turns = (user, Turn("assistant", (Text(answer),)))
    return encoder.encode(Conversation(name, turns, Source(name, 1)))


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_logits_of_a_video_are_the_models_own_alone_and_in_a_batch(model_type, tmp_path: Path):
    vlm = load_vlm(str(save_tiny_model(model_type, tmp_path / "model")), dtype=torch.float32)
    encoder = Encoder(vlm.processor, max_tokens=512, over_length="error", max_image_pixels=10**6)
    clip = Video(write_clip(tmp_path / "clip.mp4").name, tmp_path)
    frames = Video(write_frames(tmp_path, count=6, size=(32, 32)), tmp_path)
    samples = [
        sample_of(encoder, clip, "clip", answer="a clip"),
        sample_of(encoder, frames, "frames", answer="six frames, longer"),
    ]
    forward = SupervisedForward(vlm.model, vlm.family).eval()

    def logits_of(given: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate(given, pad_token_id=0, image_batching=vlm.family.image_batching)
        with torch.no_grad():
            reference = full_logits(vlm.model, batch.inputs)
            return forward.logits(batch), reference[batch.supervised]

    alone = []
    for sample in samples:
        ours, reference = logits_of([sample])
        assert torch.allclose(ours, reference, atol=1e-5)
        alone.append(ours)
    together, reference = logits_of(samples)
    assert torch.allclose(together, reference, atol=1e-5)
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    use_packed_attention(vlm.model)
    with torch.no_grad():
        in_one_row = forward.logits(pack(samples, image_batching=vlm.family.image_batching))
    assert torch.allclose(in_one_row, torch.cat(alone), atol=1e-4)
    # The video is looked at: another one gives other logits.
    other = Video(write_clip(tmp_path / "other.mp4", num_frames=12, fps=6).name, tmp_path)
    ours, _ = logits_of([sample_of(encoder, other, "other", answer="a clip")])
    assert not torch.allclose(ours, alone[0], atol=1e-3)


@pytest.mark.parametrize("pictures", [2, 0])
def test_a_run_trains_on_videos_beside_pictures_or_alone(
    tiny_vlm: Path, sample_data: Path, tmp_path: Path, pictures: int
):
    data = copy_sample(sample_data, tmp_path / "data", keep=pictures)
    write_clip(tmp_path / "data" / "clip.mp4")
    asked = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "what is it?"}]
    row = {
        "id": "clip",
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "grey"},
        ],
    }
    data.write_text(data.read_text() + json.dumps(row) + "\n" + json.dumps(row | {"id": "b"}))
    recipe = write_recipe(
        tmp_path / "run", tiny_vlm=tiny_vlm, data=data, rank=4, train__max_steps=3
    )
    assert train_once(recipe)["samples"] == 12
    losses = [line["loss"] for line in metrics_of(tmp_path / "run" / "run")]
    assert losses[-1] < losses[0]
    moved = adapter_of(tmp_path / "run" / "run")
    assert any(
        float(t.abs().max()) > 0 for n, t in moved.items() if "visual" in n and "lora_B" in n
    )
