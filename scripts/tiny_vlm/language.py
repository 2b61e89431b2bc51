"""Train the language part on the tower: many questions per picture, the picture paid for once.

A row of the batch is one picture's prefix and several blocks behind it, one per question:

    <|im_start|>user\\n<|vision_start|> 16 picture tokens <|vision_end|>
        question<|im_end|>\\n<|im_start|>assistant\\nanswer<|im_end|>       block 1
        question<|im_end|>\\n<|im_start|>assistant\\nanswer<|im_end|>       block 2 ...

A block sees the prefix and itself, and its positions start where the prefix ends, so each block
is exactly the conversation that a user would have. Only answers are supervised.

Matching a word of the question to the picture does not come by itself in the time there is. So an
auxiliary linear reader, dropped afterwards, tells from the hidden state at each attribute word of
a question, half way up, whether the word is true of the picture.

B pictures, N tokens of a row, D width.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tiny_vlm.pictures import Scene, draw_scene
from tiny_vlm.tower import image_features, to_patches
from tiny_vlm.wording import CURRICULUM, Question, draw_question, weights_at
from tiny_vlm.words import COLORS, SHAPES

PICTURES, QUESTIONS = 16, 8
PEAK_RATE = 2e-3
TOWER_SHARE = 0.1
AUXILIARY_LAYER = 3  # of 6: what is known there can still be moved to the answer
GRID = 4


@dataclass(frozen=True)
class Rows:
    """A batch of packed rows."""

    input_ids: torch.Tensor  # (B, N)
    position_ids: torch.Tensor  # (3, B, N)
    blocks: torch.Tensor  # (B, N): 0 prefix, 1.. question, -1 padding
    targets: torch.Tensor  # (B, N): the next token where an answer is, else -100
    weights: torch.Tensor  # (B, N): weight of that target
    truths: torch.Tensor  # (B, N): 1 or 0 at attribute words of a question, else -1
    patches: torch.Tensor  # (B, 64, 384)


class RowBuilder:
    """Turns scenes and questions into `Rows` with the tokenizer's ids."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        self.encode = cache(lambda text: tuple(tokenizer(text).input_ids))
        self.prefix = [
            *self.encode("<|im_start|>user\n<|vision_start|>"),
            *self.encode("<|image_pad|>") * GRID**2,
            *self.encode("<|vision_end|>"),
        ]
        self.turn = self.encode("<|im_end|>\n<|im_start|>assistant\n")
        self.end = self.encode("<|im_end|>")
        self.attributes = {
            self.encode(form)[0]: word for word in SHAPES + COLORS for form in (word, f" {word}")
        }
        start = len(self.encode("<|im_start|>user\n<|vision_start|>"))
        cells = [[start + k, start + k, start + k] for k in (0,) for _ in range(GRID**2)]
        for k, cell in enumerate(cells):
            cell[1] += k // GRID
            cell[2] += k % GRID
        before = [[k] * 3 for k in range(start)]
        self.prefix_positions = [*before, *cells, [start + GRID] * 3]

    def build(self, scenes: list[Scene], questions: list[list[Question]]) -> Rows:
        rows = [self._row(s, qs) for s, qs in zip(scenes, questions, strict=True)]
        length = max(len(row["ids"]) for row in rows)
        fill = {"ids": 0, "blocks": -1, "targets": -100, "weights": 0.0, "truths": -1.0}

        def stack(key: str) -> torch.Tensor:
            return torch.tensor([r[key] + [fill[key]] * (length - len(r[key])) for r in rows])

        positions = [r["positions"] + [[0] * 3] * (length - len(r["ids"])) for r in rows]
        return Rows(
            input_ids=stack("ids"),
            position_ids=torch.tensor(positions).permute(2, 0, 1),
            blocks=stack("blocks"),
            targets=stack("targets"),
            weights=stack("weights"),
            truths=stack("truths"),
            patches=to_patches(np.stack([scene.pixels for scene in scenes])),
        )

    def _row(self, scene: Scene, questions: list[Question]) -> dict[str, list]:
        true_words = {t.shape for t in scene.things} | {t.color for t in scene.things}
        size = len(self.prefix)
        row: dict[str, list] = {
            "ids": list(self.prefix),
            "positions": list(self.prefix_positions),
            "blocks": [0] * size,
            "targets": [-100] * size,
            "weights": [0.0] * size,
            "truths": [-1.0] * size,
        }
        first = self.prefix_positions[-1][0] + 1
        for number, question in enumerate(questions, start=1):
            asked = self.encode(question.text)
            answer = [*self.encode(question.answer), *self.end]
            ids = [*asked, *self.turn, *answer[:-1]]
            silent = len(asked) + len(self.turn) - 1
            truths = [
                -1.0 if i not in self.attributes else float(self.attributes[i] in true_words)
                for i in asked
            ]
            row["ids"] += ids
            row["positions"] += [[first + k] * 3 for k in range(len(ids))]
            row["blocks"] += [number] * len(ids)
            row["targets"] += [-100] * silent + answer
            row["weights"] += [0.0] * silent + [len(answer) ** -0.5] * len(answer)
            row["truths"] += truths + [-1.0] * (len(ids) - len(asked))
        return row


def attention_mask(blocks: torch.Tensor) -> torch.Tensor:
    """(B, N) block numbers -> (B, 1, N, N), true where a query (row) may see a key (column)."""
    query, key = blocks[:, :, None], blocks[:, None, :]
    causal = torch.ones(blocks.shape[1], blocks.shape[1], dtype=torch.bool).tril()
    return (((key == query) | (key == 0)) & causal).unsqueeze(1)


def hidden_states(
    model: Qwen2_5_VLForConditionalGeneration, rows: Rows, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The final hidden states and those after layer `AUXILIARY_LAYER`, each (B, N, D)."""
    language = model.model.language_model
    places = rows.input_ids == model.config.image_token_id
    x = language.embed_tokens(rows.input_ids)
    x = x.masked_scatter(places.unsqueeze(-1), features.flatten(0, 1))
    mask = torch.zeros(attention_mask(rows.blocks).shape)
    mask.masked_fill_(~attention_mask(rows.blocks), torch.finfo(torch.float32).min)
    rotary = language.rotary_emb(x, rows.position_ids)
    middle = x
    for number, layer in enumerate(language.layers, start=1):
        x = layer(x, attention_mask=mask, position_embeddings=rotary)
        if number == AUXILIARY_LAYER:
            middle = x
    return language.norm(x), middle


def match_embeddings(model: Qwen2_5_VLForConditionalGeneration, patches: torch.Tensor) -> None:
    """Shift and scale the tower's output to zero mean and the embeddings' spread."""
    last = model.model.visual.merger.mlp[2]
    with torch.no_grad():
        features = image_features(model.model.visual, patches).flatten(0, 1)
        scale = 2 * model.get_input_embeddings().weight.std() / features.std(0).mean()
        last.bias.copy_((last.bias - features.mean(0)) * scale)
        last.weight.mul_(scale)


def train_language(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    *,
    steps: int,
    seed: int,
    work: Path,
) -> None:
    """Train everything, the tower at a lower rate; resumable from `work`."""
    builder = RowBuilder(tokenizer)
    reader = nn.Linear(model.config.text_config.hidden_size, 1)
    match_embeddings(model, _scenes_and_rows(builder, Random(f"{seed}/match"), 0.0, 64)[2].patches)
    optimizer = _optimizer(model, reader)
    saved = work / "language.pt"
    start = 0
    if saved.exists():
        state = torch.load(saved)
        start = state["step"]
        model.load_state_dict(state["model"])
        reader.load_state_dict(state["reader"])
        optimizer.load_state_dict(state["optimizer"])
    began = time.perf_counter()
    for step in range(start, steps):
        progress = step / steps
        rows = _scenes_and_rows(builder, Random(f"{seed}/language/{step}"), progress, PICTURES)[2]
        frozen = progress < 0.25
        _set_rate(optimizer, step, steps)
        with torch.set_grad_enabled(not frozen):
            features = image_features(model.model.visual, rows.patches)
        loss, truth_loss, truth = _losses(model, reader, rows, features)
        (loss + 0.5 * truth_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(
                f"language step {step + 1}/{steps} loss {loss.item():.3f} words' truth "
                f"{truth:.3f} seconds {time.perf_counter() - began:.0f}",
                flush=True,
            )
        if (step + 1) % 250 == 0 or step + 1 == steps:
            for kind, (right, count) in held_out_accuracy(model, builder, seed=seed).items():
                print(f"  {kind:16} {right / count:.3f} of {count}", flush=True)
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "reader": reader.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, saved)


@torch.no_grad()
def held_out_accuracy(
    model: Qwen2_5_VLForConditionalGeneration,
    builder: RowBuilder,
    *,
    seed: int,
    pictures: int = 384,
) -> dict[str, tuple[int, int]]:
    """Exact answers and questions of each kind, on pictures that no training step draws.

    An answer is exact if every token of it is the likeliest one: what greedy decoding would write.
    """
    random = Random(f"{seed}/language/held-out")
    tally: dict[str, tuple[int, int]] = {}
    for _ in range(pictures // 32):
        _, questions, rows = _scenes_and_rows(builder, random, 1.0, 32)
        hidden, _ = hidden_states(model, rows, image_features(model.model.visual, rows.patches))
        wrong = torch.zeros_like(rows.targets, dtype=torch.bool)
        places = rows.targets != -100
        guess = model.lm_head(hidden[places]).argmax(-1)
        wrong[places] = guess != rows.targets[places]
        for row, asked in enumerate(questions):
            for number, question in enumerate(asked, start=1):
                right = not wrong[row][rows.blocks[row] == number].any().item()
                for kind in (question.kind, "all"):
                    old = tally.get(kind, (0, 0))
                    tally[kind] = (old[0] + right, old[1] + 1)
    return dict(sorted(tally.items()))


def _scenes_and_rows(
    builder: RowBuilder, random: Random, progress: float, count: int
) -> tuple[list[Scene], list[list[Question]], Rows]:
    several = 0.15 if progress < CURRICULUM[1][0] else 0.35
    scenes = [
        draw_scene(random, random.randint(2, 4) if random.random() < several else 1)
        for _ in range(count)
    ]
    weights = weights_at(progress)
    questions = [[draw_question(random, s, weights) for _ in range(QUESTIONS)] for s in scenes]
    return scenes, questions, builder.build(scenes, questions)


def _losses(
    model: Qwen2_5_VLForConditionalGeneration,
    reader: nn.Linear,
    rows: Rows,
    features: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The answers' loss, the words' truth loss, and the share of words judged rightly."""
    hidden, middle = hidden_states(model, rows, features)
    places = rows.targets != -100
    logits = model.lm_head(hidden[places])
    each = F.cross_entropy(logits, rows.targets[places], reduction="none")
    weights = rows.weights[places]
    known = rows.truths >= 0
    judged = reader(F.layer_norm(middle[known], middle.shape[-1:])).squeeze(-1)
    truth_loss = F.binary_cross_entropy_with_logits(judged, rows.truths[known])
    truth = ((judged > 0) == (rows.truths[known] > 0.5)).float().mean().item()
    return (each * weights).sum() / weights.sum(), truth_loss, truth


def _optimizer(model: nn.Module, reader: nn.Module) -> torch.optim.Optimizer:
    tower = [p for n, p in model.named_parameters() if "visual" in n and "merger" not in n]
    known = {id(p) for p in tower}
    rest = [p for p in [*model.parameters(), *reader.parameters()] if id(p) not in known]
    groups = [{"params": tower, "share": TOWER_SHARE}, {"params": rest, "share": 1.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.02)


def _set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Warm-up over 100 steps, then a cosine to 2 % of the peak."""
    curve = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = PEAK_RATE * min(1.0, (step + 1) / 100) * curve * group["share"]
