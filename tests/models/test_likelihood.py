"""Scores over a shared cache are those of whole, uncached passes, one text at a time."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.tiny_models import MODEL_TYPES, save_tiny_model
from vlmtune.data.batches import collate, collate_prompts
from vlmtune.data.encode import Encoder
from vlmtune.data.tokens import AnswerTokenizer, without_images
from vlmtune.data.types import IGNORED, Conversation, Image, Source, Text, Turn
from vlmtune.models import likelihood
from vlmtune.models.forward import full_logits
from vlmtune.models.likelihood import score_texts
from vlmtune.models.load import VLM, load_vlm

TEXTS = ["a cat", "two dogs and a much longer answer", "none", "The cat is red, the dog is blue."]


@pytest.fixture(scope="module", params=MODEL_TYPES)
def vlm(request, tmp_path_factory) -> VLM:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    return load_vlm(str(folder), dtype=torch.float32)


@pytest.fixture
def encoder(vlm: VLM) -> Encoder:
    return Encoder(vlm.processor, max_tokens=512, over_length="error", max_image_pixels=10**6)


def asked(folder: Path, *, num_images: int = 1, seed: int = 0) -> Conversation:
    images = []
    for number in range(num_images):
        path = folder / f"{seed}-{number}.png"
        noise = PIL.Image.effect_noise((64, 48), 60 + 30 * number + 50 * seed)
        noise.convert("RGB").save(path)
        images.append(Image(path.name, folder))
    turns = (Turn("user", (*images, Text("what is it?"))),)
    return Conversation("one", turns, Source("eval.jsonl", 1))


def answered(conversation: Conversation, text: str) -> Conversation:
    return replace(conversation, turns=(*conversation.turns, Turn("assistant", (Text(text),))))


def prompt_of(vlm: VLM, encoder: Encoder, conversation: Conversation) -> dict[str, Tensor]:
    return collate_prompts(
        [encoder.encode_prompt(conversation)],
        pad_token_id=0,
        image_batching=vlm.family.image_batching,
    )


def whole_pass(vlm: VLM, encoder: Encoder, conversation: Conversation, text: str) -> float:
    """The sum of the log-probabilities of a sample's targets, as training computes them."""
    sample = encoder.encode(answered(conversation, text))
    batch = collate([sample], pad_token_id=0, image_batching=vlm.family.image_batching)
    with torch.no_grad():
        logits = full_logits(vlm.model, batch.inputs)[batch.supervised]
    return float(logits.double().log_softmax(-1).gather(1, batch.targets[:, None]).sum())


def shared(
    vlm: VLM, encoder: Encoder, conversation: Conversation, *, max_block_tokens: int = 10_000
) -> Tensor:
    tokens = AnswerTokenizer(vlm.processor).answers(conversation, TEXTS)
    inputs = prompt_of(vlm, encoder, conversation)
    return score_texts(vlm.model, inputs, tokens, max_block_tokens=max_block_tokens).log_probs


def reference(vlm: VLM, encoder: Encoder, conversation: Conversation) -> Tensor:
    sums = [whole_pass(vlm, encoder, conversation, text) for text in TEXTS]
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_shared_scores_are_those_of_whole_passes(
    vlm: VLM, encoder: Encoder, tmp_path: Path, num_images: int
) -> None:
    conversation = asked(tmp_path, num_images=num_images)
    expected = reference(vlm, encoder, conversation)
    if num_images == 0:
        shared(vlm, encoder, asked(tmp_path))  # leaves a picture's state behind in the model
    for max_block_tokens in (10_000, 200, 1):
        ours = shared(vlm, encoder, conversation, max_block_tokens=max_block_tokens)
        assert torch.allclose(ours, expected, rtol=0, atol=1e-5), max_block_tokens
    if num_images == 0:
        return
    other = shared(vlm, encoder, asked(tmp_path, num_images=num_images, seed=1))
    assert (other - expected).abs().max() > 1e-3  # the wrong picture's cache
    blind = shared(vlm, encoder, without_images(conversation))
    assert (blind - expected).abs().max() > 1e-3  # none


def test_positions_without_the_pictures_grid_are_seen(
    vlm: VLM, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = asked(tmp_path)
    right = shared(vlm, encoder, conversation)
    run = likelihood._Prompt.run

    def by_count(model: torch.nn.Module, inputs: dict[str, Tensor]) -> likelihood._Prompt:
        prompt = run(model, inputs)
        return replace(prompt, next_position=prompt.num_tokens)

    monkeypatch.setattr(likelihood._Prompt, "run", by_count)
    wrong = shared(vlm, encoder, conversation)
    has_grid = hasattr(vlm.model.model, "rope_deltas")
    assert ((wrong - right).abs().max() > 1e-4) == has_grid


def test_a_cache_that_a_block_has_written_to_gives_other_scores(
    vlm: VLM, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = asked(tmp_path)
    right = shared(vlm, encoder, conversation, max_block_tokens=1)
    monkeypatch.setattr(copy, "deepcopy", lambda cache: cache)
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        wrong = shared(vlm, encoder, conversation, max_block_tokens=1)
        assert torch.allclose(wrong, right, rtol=0, atol=1e-3)


def test_an_adapter_counts(vlm: VLM, encoder: Encoder, tmp_path: Path) -> None:
    conversation = asked(tmp_path)
    plain = shared(vlm, encoder, conversation)
    paths = [n for n, _ in vlm.model.named_modules() if n.endswith("q_proj") and "vis" not in n]
    adapted = get_peft_model(
        copy.deepcopy(vlm.model), LoraConfig(target_modules=paths, init_lora_weights=False)
    ).eval()
    wrapped = replace(vlm, model=adapted)
    ours = shared(wrapped, encoder, conversation)
    assert torch.allclose(ours, reference(wrapped, encoder, conversation), rtol=0, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


def test_texts_are_the_tokens_that_training_supervises(
    vlm: VLM, encoder: Encoder, tmp_path: Path
) -> None:
    conversation = asked(tmp_path, num_images=2)
    earlier = (Turn("user", (Text("Hi"),)), Turn("assistant", (Text("Yo"),)))
    for asked_before in (conversation, replace(conversation, turns=earlier + conversation.turns)):
        ours = AnswerTokenizer(vlm.processor).answers(asked_before, TEXTS)
        for text, tokens in zip(TEXTS, ours):
            targets = encoder.encode(answered(asked_before, text)).targets
            expected = targets[targets != IGNORED][-len(tokens) :]
            assert tokens.tolist() == expected.tolist()
            assert tokens[-1] == encoder.end_token_id
            if asked_before is conversation:
                assert len(tokens) == int((targets != IGNORED).sum())


def test_scores_per_token_divide_by_what_was_summed(
    vlm: VLM, encoder: Encoder, tmp_path: Path
) -> None:
    conversation = asked(tmp_path)
    tokens = AnswerTokenizer(vlm.processor).answers(conversation, TEXTS)
    inputs = prompt_of(vlm, encoder, conversation)
    scores = score_texts(vlm.model, inputs, tokens, max_block_tokens=1000)
    assert scores.num_tokens.tolist() == [len(text) for text in tokens]
    assert torch.equal(scores.per_token * scores.num_tokens, scores.log_probs)
    assert score_texts(vlm.model, inputs, [], max_block_tokens=1).log_probs.shape == (0,)
