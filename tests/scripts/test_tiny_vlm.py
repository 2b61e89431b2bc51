"""The embedded default's trainer: its shortcuts give what the stock model gives."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from tiny_vlm.architecture import build_model, build_processor, train_tokenizer
from tiny_vlm.language import RowBuilder, hidden_states
from tiny_vlm.pictures import draw_scene
from tiny_vlm.tower import image_features, to_patches
from tiny_vlm.wording import CURRICULUM, draw_question
from tiny_vlm.words import ENGLISH, SINGLE_TOKENS, tokenizer_corpus


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(tokenizer_corpus())


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = build_model(tokenizer).eval()
    with torch.no_grad():  # wide enough that a wrong mask or position shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def test_words_are_single_tokens_and_any_text_round_trips(tokenizer):
    for word in SINGLE_TOKENS:
        assert len(tokenizer(word).input_ids) == len(tokenizer(f" {word}").input_ids) == 1, word
    assert sum(len(tokenizer(f" {word}").input_ids) for word in ENGLISH) < 1.2 * len(ENGLISH)
    text = "naïve 漢字 😀\t\n  Zażółć <gęślą> 12345 {jaźń}"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tower_over_a_batch_equals_the_stock_tower(model, tokenizer):
    scenes = [draw_scene(Random(seed), 2) for seed in range(3)]
    images = [Image.fromarray(scene.pixels) for scene in scenes]
    stock = build_processor(tokenizer).image_processor(images, return_tensors="pt")
    patches = to_patches(np.stack([scene.pixels for scene in scenes]))
    torch.testing.assert_close(patches.flatten(0, 1), stock["pixel_values"], rtol=0, atol=1e-5)
    with torch.no_grad():
        expected = torch.cat(list(model.get_image_features(**stock).pooler_output))
        got = image_features(model.model.visual, patches).flatten(0, 1)
        wrong = image_features(model.model.visual, patches.flip(1)).flatten(0, 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (wrong - expected).abs().max() > 1e-3


def test_blocks_of_a_row_equal_separate_conversations(model, tokenizer):
    random = Random(0)
    scene = draw_scene(random, 2)
    questions = [draw_question(random, scene, CURRICULUM[-1][1]) for _ in range(4)]
    rows = RowBuilder(tokenizer).build([scene], [questions])
    processor = build_processor(tokenizer)
    with torch.no_grad():
        features = image_features(model.model.visual, rows.patches)
        packed = model.lm_head(hidden_states(model, rows, features)[0][0])
        for number, question in enumerate(questions, start=1):
            user = [{"type": "image"}, {"type": "text", "text": question.text}]
            turns = [
                {"role": "user", "content": user},
                {"role": "assistant", "content": question.answer},
            ]
            text = processor.apply_chat_template(turns, tokenize=False)
            image = Image.fromarray(scene.pixels)
            separate = model(**processor(text=[text], images=[image], return_tensors="pt"))
            block = packed[rows.blocks[0] == number]
            start = int((rows.blocks[0] == 0).sum())
            expected = separate.logits[0, start : start + len(block)]
            torch.testing.assert_close(block, expected, rtol=0, atol=1e-4)
        rows.blocks.clamp_(max=1)  # every block sees the ones before it
        leaking = model.lm_head(hidden_states(model, rows, features)[0][0])
    assert (leaking[-5:] - packed[-5:]).abs().max() > 1e-2


def test_yes_and_no_are_equally_likely_for_each_kind():
    random = Random(1)
    tally: dict[str, list[int]] = {}
    for _ in range(6000):
        scene = draw_scene(random, random.choice([1, 1, 2]), grain_fraction=0.0)
        question = draw_question(random, scene, {"verify": 1, "negated": 1, "pair": 1})
        tally.setdefault(question.kind, []).append(question.answer == "yes")
    assert len(tally) == 5
    for kind, answers in tally.items():
        assert abs(sum(answers) / len(answers) - 0.5) < 0.06, kind
