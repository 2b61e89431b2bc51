"""Train the vision tower alone, by classification, before the language part sees it.

    pixels (B, 64, 64, 3) -> patches (B, 64, 384) -> tower -> merged features (B, 16, 192)
    first:  one thing per picture; the features' mean names its shape and its colour
    then:   one to four things; each feature names what is centred in its 16 x 16 cell, if anything

B pictures in a batch; the features are what `get_image_features` of the model returns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from tiny_vlm.pictures import SIDE, Scene, draw_scene
from tiny_vlm.words import COLORS, SHAPES

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
GRID = SIDE // 16
BATCH = 64


def to_patches(pixels: np.ndarray) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 64, 384) float32, in the image processor's order."""
    x = (torch.from_numpy(pixels).float() / 255 - MEAN) / STD
    x = x.view(-1, GRID, 2, 8, GRID, 2, 8, 3)  # (B, row, r, y, column, c, x, channel)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).unsqueeze(6)  # (B, row, column, r, c, channel, 1, y, x)
    return x.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(-1, 64, 384)


def image_features(visual: nn.Module, patches: torch.Tensor) -> torch.Tensor:
    """The tower over equal-sized pictures at once; upstream's forward takes them one by one.

    (B, 64, 384) -> (B, 16, 192)
    """
    batch, width, heads = len(patches), visual.config.hidden_size, visual.config.num_heads
    kernel = visual.patch_embed.proj.weight.reshape(width, -1)
    x = patches @ kernel.T
    cos, sin = visual.rotary_pos_emb(x, _patch_positions())
    for block in visual.blocks:
        qkv = block.attn.qkv(block.norm1(x)).view(batch, 64, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, 64, width)
        x = x + block.attn.proj(mixed)
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x.reshape(batch * 64, width)).view(batch, 16, -1)


def _patch_positions() -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    order = [p.view(4, 2, 4, 2).transpose(1, 2).flatten() for p in (rows, columns)]
    return torch.stack(order, dim=-1)  # (64, 2), merged cells together


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Heads(nn.Module):
    """Linear readers used for this training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.whole = nn.Linear(width, len(SHAPES) + len(COLORS))
        self.cell = nn.Linear(width, len(SHAPES) + len(COLORS) + 2)


def train_tower(
    model: Qwen2_5_VLForConditionalGeneration, *, steps: int, seed: int, work: Path
) -> None:
    """Train `model.model.visual` in place; the checkpoint in `work` makes it resumable."""
    cells_from = steps * 2 // 3
    visual = model.model.visual
    heads = Heads(visual.config.out_hidden_size)
    parameters = [*visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    saved = work / "tower.pt"
    start = 0
    if saved.exists():
        state = torch.load(saved)
        start = state["step"]
        visual.load_state_dict(state["visual"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
    began = time.perf_counter()
    for step in range(start, steps):
        several = step >= cells_from
        # Large things first: a radius of at least 11 pixels at the start, 5 after 30 %.
        smallest = max(5.0, 11.0 - 20.0 * step / steps)
        random = Random(f"{seed}/tower/{step}")
        scenes = list(_scenes(random, BATCH, several=several, smallest=smallest))
        _set_rate(optimizer, 1e-3, step, steps, warmup=100, decay=0.4)
        features = image_features(visual, to_patches(np.stack([s.pixels for s in scenes])))
        loss = _whole_loss(heads, features, scenes)
        if several:
            loss = loss + _cell_loss(heads, features, scenes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            shape, color = tower_accuracy(visual, heads, seed=seed)
            print(
                f"tower step {step + 1}/{steps} loss {loss.item():.3f} held-out shape {shape:.3f} "
                f"colour {color:.3f} seconds {time.perf_counter() - began:.0f}",
                flush=True,
            )
            state = {
                "step": step + 1,
                "visual": visual.state_dict(),
                "heads": heads.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, saved)


@torch.no_grad()
def tower_accuracy(visual: nn.Module, heads: Heads, *, seed: int) -> tuple[float, float]:
    """Shares of 512 held-out pictures of one thing whose shape and colour are named rightly."""
    scenes = list(_scenes(Random(f"{seed}/tower/held-out"), 512, several=False))
    features = image_features(visual, to_patches(np.stack([s.pixels for s in scenes])))
    shapes, colors = _whole_logits(heads, features)
    things = [scene.things[0] for scene in scenes]
    shape = torch.tensor([SHAPES.index(t.shape) for t in things])
    color = torch.tensor([COLORS.index(t.color) for t in things])
    return (
        (shapes.argmax(-1) == shape).float().mean().item(),
        (colors.argmax(-1) == color).float().mean().item(),
    )


def _scenes(random: Random, count: int, *, several: bool, smallest: float = 5.0) -> Iterator[Scene]:
    for _ in range(count):
        things = random.choice([1, 1, 2, 3, 4]) if several else 1
        yield draw_scene(random, things, smallest=smallest)


def _whole_logits(heads: Heads, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logits = heads.whole(heads.norm(features.mean(1)))
    return logits.split([len(SHAPES), len(COLORS)], dim=-1)


def _whole_loss(heads: Heads, features: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    alone = torch.tensor([len(scene.things) == 1 for scene in scenes])
    shapes, colors = _whole_logits(heads, features[alone])
    things = [scene.things[0] for scene in scenes if len(scene.things) == 1]
    shape = torch.tensor([SHAPES.index(t.shape) for t in things])
    color = torch.tensor([COLORS.index(t.color) for t in things])
    return F.cross_entropy(shapes, shape) + F.cross_entropy(colors, color)


def _cell_loss(heads: Heads, features: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    """Each cell names the thing centred in it, or none; things count more than empty cells."""
    shape = torch.full((len(scenes), GRID * GRID), len(SHAPES))
    color = torch.full((len(scenes), GRID * GRID), len(COLORS))
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            cell = int(thing.y // 16) * GRID + int(thing.x // 16)
            shape[row, cell] = SHAPES.index(thing.shape)
            color[row, cell] = COLORS.index(thing.color)
    logits = heads.cell(heads.norm(features)).flatten(0, 1)
    shapes, colors = logits.split([len(SHAPES) + 1, len(COLORS) + 1], dim=-1)
    weight = torch.where(shape.flatten() == len(SHAPES), 0.15, 1.0)
    each = F.cross_entropy(shapes, shape.flatten(), reduction="none")
    each = each + F.cross_entropy(colors, color.flatten(), reduction="none")
    return (each * weight).sum() / weight.sum()


def _set_rate(
    optimizer: torch.optim.Optimizer,
    peak: float,
    step: int,
    steps: int,
    *,
    warmup: int,
    decay: float,
) -> None:
    """Linear warm-up, a plateau, then linear decay over the last `decay` of the steps."""
    rate = peak * min(1.0, (step + 1) / warmup, (steps - step) / (steps * decay))
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)
