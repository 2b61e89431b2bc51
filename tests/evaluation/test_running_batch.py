"""Rows that start and end on their own give the answers of `generate`, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tiny_models import MODEL_TYPES, save_tiny_model
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Image, Sample, Source, Text, Turn, Video
from vlmtune.evaluation.generate import evaluating, greedy_config, sampling_processors, token_choice
from vlmtune.evaluation.prompts import prompt_inputs
from vlmtune.evaluation.running_batch import Choose, Row, RunningBatch, answer_rows, can_run_rows
from vlmtune.models.forward import full_logits
from vlmtune.models.load import VLM, load_vlm
from vlmtune.recipe.schema import DecodingSection

LENGTHS = [1, 9, 2, 5, 1, 3, 12, 4]
"""Of the answers: some wait for none, some outlive several refills."""


@pytest.fixture(scope="module", params=MODEL_TYPES)
def vlm(request, tmp_path_factory) -> VLM:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    return load_vlm(str(folder), dtype=torch.float32)


@pytest.fixture
def prompts(vlm: VLM, tmp_path: Path) -> list[Sample]:
    """With one picture, two, none, and, where the model takes one, a video."""
    encoder = Encoder(vlm.processor, max_tokens=1024, over_length="error", max_image_pixels=10**6)
    pictures = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        noise = PIL.Image.effect_noise((56, 48), 40 + 30 * number)
        noise.convert("RGB").save(path)
        pictures.append(Image(path.name, tmp_path))
    video = Video(tuple(picture.ref for picture in pictures), tmp_path)
    takes_videos = vlm.family.positions == "mrope"
    asked = [
        (pictures[:1], "what is it?"),
        ([], "a cat"),
        (pictures[1:3], "two dogs and a red cat, what is it?"),
        (pictures[3:], "what is the dog?"),
        ([], "two dogs and a much longer answer, the cat is red, the dog is blue"),
        ([video] if takes_videos else pictures[:1], "is it red?"),
        (pictures[:1], "is it blue?"),
        ([], "red"),
    ]
    return [
        encoder.encode_prompt(
            Conversation(str(n), (Turn("user", (*media, Text(text))),), Source("q", n + 1))
        )
        for n, (media, text) in enumerate(asked)
    ]


def run(
    vlm: VLM,
    prompts: list[Sample],
    choose: Choose,
    *,
    size: int,
    batch_kind: type[RunningBatch] = RunningBatch,
) -> list[list[int]]:
    with evaluating(vlm.model):
        ended = answer_rows(
            batch_kind(vlm.model, vlm.family),
            iter(list(enumerate(prompts))),
            inputs_of=lambda samples: prompt_inputs(vlm, samples),
            choose=choose,
            has_ended=lambda row: len(row.ids) == LENGTHS[row.number],
            size=size,
        )
        answers = {row.number: row.ids for rows in ended for row in rows}
    return [answers[number] for number in range(len(prompts))]


def written(number: int) -> list[int]:
    """Answer `number`, of tokens that no model would choose."""
    return [100 + (37 * number + 11 * position) % 150 for position in range(LENGTHS[number])]


def running_logits(
    vlm: VLM,
    prompts: list[Sample],
    *,
    size: int,
    batch_kind: type[RunningBatch] = RunningBatch,
) -> Tensor:
    """The logits (all answers' tokens, V) before each token of the written answers."""
    seen: dict[tuple[int, int], Tensor] = {}

    def choose(logits: Tensor, rows: Sequence[Row]) -> Tensor:
        for row, own in zip(rows, logits, strict=True):
            seen[row.number, len(row.ids)] = own
        return torch.tensor([written(row.number)[len(row.ids)] for row in rows])

    answers = run(vlm, prompts, choose, size=size, batch_kind=batch_kind)
    assert answers == [written(number) for number in range(len(prompts))]
    return torch.stack([seen[place] for place in sorted(seen)])


def whole_logits(vlm: VLM, prompts: list[Sample]) -> Tensor:
    """The same from one pass over each prompt and its answer, alone and without a cache."""
    rows = []
    for number, prompt in enumerate(prompts):
        answer = torch.tensor(written(number))
        fields = {n: F.pad(v, (0, len(answer))) for n, v in prompt.token_fields.items()}
        ids = torch.cat([prompt.input_ids, answer])
        inputs = prompt_inputs(vlm, [replace(prompt, input_ids=ids, token_fields=fields)])
        with torch.no_grad():
            logits = full_logits(vlm.model, inputs)[0]  # (T, V)
        rows.append(logits[prompt.num_tokens - 1 : -1])
    return torch.cat(rows)


class PaddingAttended(RunningBatch):
    """Wrong: what enters beside longer rows attends to its padding."""

    def enter(self, inputs: Mapping[str, Any], rows: Sequence[Row]) -> Tensor:
        logits = super().enter(inputs, rows)
        self._mask = torch.ones_like(self._mask)
        return logits


class PositionsOfColumns(RunningBatch):
    """Wrong: a token's position is its column, not its place in the row."""

    def step(self, tokens: Tensor) -> Tensor:
        self._next = torch.full_like(self._next, self._mask.shape[1])
        return super().step(tokens)


class OthersKept(RunningBatch):
    """Wrong: the masks and positions of the rows that go on, but not their keys and values."""

    def keep(self, indices: Sequence[int]) -> None:
        caches = [(layer.keys, layer.values) for layer in self._cache.layers]
        super().keep(indices)
        for layer, (keys, values) in zip(self._cache.layers if indices else (), caches):
            layer.keys, layer.values = keys[: len(indices)], values[: len(indices)]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_each_row_has_the_logits_that_it_has_alone(
    vlm: VLM, prompts: list[Sample], size: int
) -> None:
    expected = whole_logits(vlm, prompts)
    torch.testing.assert_close(
        running_logits(vlm, prompts, size=size), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("wrong", [PaddingAttended, PositionsOfColumns, OthersKept])
def test_a_row_among_others_can_go_wrong(
    vlm: VLM, prompts: list[Sample], wrong: type[RunningBatch]
) -> None:
    found = running_logits(vlm, prompts, size=3, batch_kind=wrong)
    assert (found - whole_logits(vlm, prompts)).abs().max() > 1e-4


def test_columns_that_are_padding_in_every_row_leave_the_cache(
    vlm: VLM, prompts: list[Sample]
) -> None:
    lengths = []

    class Watched(RunningBatch):
        def enter(self, inputs: Mapping[str, Any], rows: Sequence[Row]) -> Tensor:
            logits = super().enter(inputs, rows)
            assert self._mask.any(dim=0).all()
            lengths.append(self._mask.shape[1])
            assert all(layer.keys.shape[2] == lengths[-1] for layer in self._cache.layers)
            return logits

    running_logits(vlm, prompts, size=3, batch_kind=Watched)
    assert any(later < sooner for sooner, later in zip(lengths, lengths[1:]))


def test_sampled_answers_are_those_of_generate(vlm: VLM, prompts: list[Sample]) -> None:
    decoding = DecodingSection(method="sample", temperature=0.7, top_k=40)
    encoder = Encoder(vlm.processor, max_tokens=1024, over_length="error", max_image_pixels=10)
    expected = []
    for number, (prompt, length) in enumerate(zip(prompts, LENGTHS)):
        config = greedy_config(vlm, encoder=encoder, max_new_tokens=length)
        config.eos_token_id = []
        processors = sampling_processors(
            decoding, seed=3, samples=[number], prompt_length=prompt.num_tokens
        )
        with evaluating(vlm.model):
            output = vlm.model.generate(
                **prompt_inputs(vlm, [prompt]),
                generation_config=config,
                logits_processor=processors,
            )
        expected.append(output[0, prompt.num_tokens :].tolist())
    numbers = range(len(prompts))
    choose = token_choice(decoding, seed=3, numbers=numbers)
    assert run(vlm, prompts, choose, size=3) == expected
    wrong = token_choice(decoding, seed=3, numbers=[number + 1 for number in numbers])
    assert run(vlm, prompts, wrong, size=3) != expected


def test_a_cache_that_is_no_plain_rows_is_left_to_generate(vlm: VLM) -> None:
    assert can_run_rows(vlm.model, vlm.family)
    assert not can_run_rows(vlm.model, replace(vlm.family, positions=None))
