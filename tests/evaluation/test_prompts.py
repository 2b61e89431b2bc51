"""Questions on one picture share its features: the same answers, the tower run once a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch

from tests.tiny_models import MODEL_TYPES, save_tiny_model
from vlmtune.data.encode import Encoder
from vlmtune.data.processing import media_keys_of
from vlmtune.data.types import Conversation, Image, Sample, Source, Text, Turn, Video
from vlmtune.evaluation.generate import evaluating, generate_answers
from vlmtune.evaluation.prompts import SharedPictures, evaluation_order, prompt_inputs
from vlmtune.evaluation.runner import evaluate
from vlmtune.models.forward import full_logits
from vlmtune.models.likelihood import score_texts
from vlmtune.models.load import VLM, load_vlm
from vlmtune.recipe.schema import DecodingSection, EvalSection


@pytest.fixture(scope="module", params=MODEL_TYPES)
def vlm(request, tmp_path_factory) -> VLM:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    return load_vlm(str(folder), dtype=torch.float32)


@pytest.fixture
def encoder(vlm: VLM) -> Encoder:
    return Encoder(vlm.processor, max_tokens=1024, over_length="error", max_image_pixels=10**6)


@pytest.fixture
def asked(vlm: VLM, tmp_path: Path) -> list[Conversation]:
    """Three pictures, one of them in two files; two questions on each, one on two of them, one on
    none and, where the model takes one, two on a video."""
    for number in range(3):
        noise = PIL.Image.effect_noise((48, 48 if number else 40), 40 + 40 * number)
        noise.convert("RGB").save(tmp_path / f"{number}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    one, two, three, copy = (Image(f"{name}.png", tmp_path) for name in (0, 1, 2, "copy"))
    questions: list[tuple[Sequence[Image | Video], str]] = [
        ([one], "what is it?"),
        ([two], "is it red?"),
        ([], "a cat"),
        ([copy], "two dogs and a red cat, what is it?"),
        ([three, two], "is it blue?"),
        ([three], "what is the dog?"),
    ]
    if vlm.family.positions == "mrope":
        video = Video(("0.png", "copy.png"), tmp_path)
        questions += [([video], "is it a cat?"), ([video], "what is it?")]
    return [
        Conversation(
            str(number),
            (Turn("user", (*media, Text(text))), Turn("assistant", (Text("a cat"),))),
            Source("questions.jsonl", number + 1),
            options=("a cat", "red"),
        )
        for number, (media, text) in enumerate(questions)
    ]


def num_distinct(vlm: VLM, encoder: Encoder, asked: Sequence[Conversation]) -> int:
    """Pictures (tiles of them, where they are cut) and videos that differ."""
    layout = vlm.family.image_batching
    prompts = [encoder.encode_prompt(conversation) for conversation in asked]
    return len({key for prompt in prompts for key in media_keys_of(prompt.media, layout)})


@pytest.fixture
def tower_calls(vlm: VLM) -> Iterator[list[int]]:
    calls: list[int] = []
    tower = vlm.model.get_submodule(vlm.family.parts["vision"][0])
    handle = tower.register_forward_hook(lambda module, args, output: calls.append(1))
    yield calls
    handle.remove()


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes `generate_answers` give pixels to the model."""

    def switch() -> None:
        monkeypatch.setattr(
            SharedPictures, "inputs", lambda self, prompts: prompt_inputs(self._vlm, prompts)
        )

    return switch


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_answers_are_the_same_and_the_tower_runs_once_a_picture(
    vlm: VLM,
    encoder: Encoder,
    asked: list[Conversation],
    tower_calls: list[int],
    plainly: Callable[[], None],
    method: str,
) -> None:
    def answers() -> list[str]:
        return generate_answers(
            vlm,
            asked,
            encoder=encoder,
            max_new_tokens=5,
            batch_size=3,
            decoding=DecodingSection(method=method, temperature=0.5),
        )

    shared = answers()
    assert len(tower_calls) == num_distinct(vlm, encoder, asked)
    plainly()
    assert answers() == shared


def test_features_give_the_logits_of_the_pixels(
    vlm: VLM, encoder: Encoder, asked: list[Conversation]
) -> None:
    pictures = SharedPictures(vlm)
    prompts = pictures.with_keys([encoder.encode_prompt(conversation) for conversation in asked])
    with evaluating(vlm.model):
        expected = full_logits(vlm.model, prompt_inputs(vlm, prompts))
        for _ in range(2):  # made, and kept
            inputs = pictures.inputs(prompts)
            assert not any(name.startswith("pixel") for name in inputs)
            found = full_logits(vlm.model, inputs)
            is_token = inputs["attention_mask"].bool()
            torch.testing.assert_close(found[is_token], expected[is_token], atol=1e-5, rtol=1e-5)
        wrong = [replace(prompt, media_keys=prompt.media_keys[::-1]) for prompt in prompts]
        exchanged = full_logits(vlm.model, pictures.inputs(wrong))
    assert (exchanged - expected)[is_token].abs().max() > 1e-4


def test_texts_are_as_likely_after_features_as_after_pixels(
    vlm: VLM, encoder: Encoder, asked: list[Conversation]
) -> None:
    texts = [torch.tensor([100, 120, 140]), torch.tensor([150, 160])]
    pictures = SharedPictures(vlm)
    (prompt,) = pictures.with_keys([encoder.encode_prompt(asked[4])])
    plain = score_texts(vlm.model, prompt_inputs(vlm, [prompt]), texts, max_block_tokens=2000)
    inputs = pictures.inputs([prompt])
    assert "mm_encoder_outputs" in inputs
    found = score_texts(vlm.model, inputs, texts, max_block_tokens=2000)
    torch.testing.assert_close(found.log_probs, plain.log_probs, atol=1e-4, rtol=1e-6)


def test_a_choice_and_an_answer_share_the_pictures_too(
    vlm: VLM, encoder: Encoder, asked: list[Conversation], tower_calls: list[int]
) -> None:
    section = EvalSection(
        task="choice", metrics=["choice_likelihood", "multiple_choice"], max_new_tokens=2
    )
    evaluate(vlm, asked, encoder=encoder, section=section)
    assert len(tower_calls) == num_distinct(vlm, encoder, asked)


def test_features_are_not_kept_from_one_evaluation_to_the_next(
    vlm: VLM, encoder: Encoder, asked: list[Conversation], tower_calls: list[int]
) -> None:
    for _ in range(2):
        generate_answers(vlm, asked, encoder=encoder, max_new_tokens=1, batch_size=8)
    assert len(tower_calls) == 2 * num_distinct(vlm, encoder, asked)


def test_pictures_that_differ_go_to_the_model_together(
    vlm: VLM, encoder: Encoder, asked: list[Conversation], tower_calls: list[int]
) -> None:
    generate_answers(vlm, asked[:3], encoder=encoder, max_new_tokens=1, batch_size=8)
    assert len(tower_calls) == 1


def test_questions_of_one_length_are_sorted_by_their_picture() -> None:
    def prompt(num_tokens: int, *keys: str) -> Sample:
        ids = torch.zeros(num_tokens, dtype=torch.int64)
        return Sample("", Source("q", 1), ids, ids, media_keys=keys)

    prompts = [prompt(100, "b"), prompt(101, "a"), prompt(300, "b"), prompt(101, "b")]
    order = sorted(prompts, key=evaluation_order)
    assert [(p.num_tokens, *p.media_keys) for p in order] == [
        (300, "b"),
        (101, "a"),
        (101, "b"),
        (100, "b"),
    ]
