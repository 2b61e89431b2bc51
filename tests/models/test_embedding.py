"""An embedding is the hidden state at a row's own last token, whatever it is batched with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_models import save_tiny_model
from vlmtune.models.embedding import EmbeddingForward
from vlmtune.models.load import load_vlm


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava", "idefics3"])
def forward(request, tmp_path_factory) -> EmbeddingForward:
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp("models") / request.param)
    vlm = load_vlm(str(folder), dtype=torch.float32, device="cpu")
    return EmbeddingForward(vlm.model, vlm.family).eval()


def rows_of(lengths: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 60, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    inputs = {"input_ids": ids * mask, "attention_mask": mask.long()}
    return inputs, torch.tensor(lengths) - 1


@torch.no_grad()
def test_a_padded_row_is_embedded_as_alone(forward: EmbeddingForward):
    lengths = [5, 9, 3]
    inputs, last = rows_of(lengths)
    together = forward(inputs, last)
    assert together.shape[0] == 3
    assert torch.allclose(together.norm(dim=-1), torch.ones(3), atol=1e-6)
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1, :length] for name, value in inputs.items()}
        expected = forward(alone, torch.tensor([length - 1]))[0]
        assert torch.allclose(together[row], expected, atol=1e-5)
    # The wrong variant: the last column is padding for the shorter rows.
    column = forward(inputs, torch.full((3,), max(lengths) - 1))
    assert torch.allclose(column[1], together[1], atol=1e-6)
    assert not torch.allclose(column[0], together[0], atol=1e-2)


def test_without_a_picture_the_trained_tower_stays_in_the_graph(tiny_vlm: Path):
    vlm = load_vlm(str(tiny_vlm), dtype=torch.float32, device="cpu")
    vlm.model.requires_grad_(True)
    forward = EmbeddingForward(vlm.model, vlm.family)
    forward(*rows_of([4, 6])).sum().backward()
    tower = [p.grad for n, p in vlm.model.named_parameters() if ".visual." in n]
    assert tower
    assert all(grad is not None and not grad.any() for grad in tower)
