"""Answers by batched decoding.

    conversations -> windows of WINDOW_BATCHES batches -> prompts, longest first in a window
      -> rows under way, refilled as answers end (running_batch.py)  --+
      -> beams and models of other caches: batches, `generate`  -------+-> text, in input order

Left padding puts every prompt's last token in the last column, where the first answer token is
predicted; a batch then gives what its rows give one by one. Windows bound the memory that encoded
pictures take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Sample
from vlmtune.evaluation.decoding import (
    StopTexts,
    cut_before,
    decode_answers,
    decoding_config,
    ends_answer,
    sampling_processors,
    token_choice,
)
from vlmtune.evaluation.prompts import SharedPictures, evaluation_order
from vlmtune.evaluation.running_batch import RunningBatch, answer_rows, can_run_rows
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import DecodingSection

WINDOW_BATCHES = 32
GREEDY = DecodingSection()

Item = TypeVar("Item")
Numbered = tuple[int, Sample]
"""A conversation's place among those to answer, and its prompt."""


def generate_answers(
    vlm: VLM,
    conversations: Sequence[Conversation],
    *,
    encoder: Encoder,
    max_new_tokens: int,
    batch_size: int,
    decoding: DecodingSection = GREEDY,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    on_answers: Callable[[Mapping[int, str]], None] | None = None,
    pictures: SharedPictures | None = None,
) -> list[str]:
    """The model's answer to each conversation's prompt, in the order given.

    The prompt is everything up to, not including, a final assistant turn. `numbers` are the
    conversations' places in a larger set, by default 0, 1, …: with `seed` they decide what is drawn
    where `decoding` samples. `on_answers` gets some answers at a time by these numbers. `pictures`
    are those of the evaluation that this is part of. Every module's training mode is restored
    afterwards. No collective: with several processes, each
    passes its share. Raises SampleError for a conversation that cannot be encoded.
    """
    numbers = range(len(conversations)) if numbers is None else numbers
    pictures = pictures or SharedPictures(vlm)
    decode = _Decode(vlm, encoder, pictures, decoding, max_new_tokens, batch_size, seed, numbers)
    window_size = WINDOW_BATCHES * batch_size
    prompts = _prompts(conversations, encoder, pictures, window_size=window_size)
    answers = [""] * len(conversations)
    with evaluating(vlm.model):
        if decoding.method == "beam" or not can_run_rows(vlm.model, vlm.family):
            decoded = decode.in_batches(prompts)
        else:
            decoded = decode.in_rows(prompts)
        for indices, texts in decoded:
            for index, text in zip(indices, texts):
                answers[index] = text
            if on_answers is not None:
                on_answers({numbers[index]: text for index, text in zip(indices, texts)})
    return answers


def _prompts(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    pictures: SharedPictures,
    *,
    window_size: int,
) -> Iterator[Numbered]:
    """The prompts, each window's longest first: a batch that does not fit in memory shows at
    once, and prompts of similar length lie side by side."""
    for window in _chunks(range(len(conversations)), window_size):
        encoded = [encoder.encode_prompt(conversations[index]) for index in window]
        prompts = dict(zip(window, pictures.with_keys(encoded)))
        del encoded  # a prompt's pixels go once it has been taken
        for index in sorted(window, key=lambda index: evaluation_order(prompts[index])):
            yield index, prompts.pop(index)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode comes back at the end (a frozen
    tower may have been in evaluation mode before)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class _Decode:
    """Numbered prompts to texts: pairs of the places of some conversations and their answers."""

    vlm: VLM
    encoder: Encoder
    pictures: SharedPictures
    decoding: DecodingSection
    max_new_tokens: int
    batch_size: int
    seed: int
    numbers: Sequence[int]

    def in_rows(self, prompts: Iterator[Numbered]) -> Iterator[tuple[list[int], list[str]]]:
        """Each row from its own start to its own end."""
        ended = answer_rows(
            RunningBatch(self.vlm.model, self.vlm.family),
            prompts,
            inputs_of=self.pictures.inputs,
            choose=token_choice(self.decoding, seed=self.seed, numbers=self.numbers),
            has_ended=ends_answer(
                self.vlm,
                encoder=self.encoder,
                stops=self.decoding.stop,
                max_new_tokens=self.max_new_tokens,
            ),
            size=self.batch_size,
        )
        for rows in ended:
            yield [row.number for row in rows], self._texts([row.ids for row in rows])

    def in_batches(self, prompts: Iterator[Numbered]) -> Iterator[tuple[list[int], list[str]]]:
        """By transformers' `generate`; a batch ends with its longest answer."""
        while batch := list(islice(prompts, self.batch_size)):
            indices = [index for index, _ in batch]
            new_ids = self._generate([sample for _, sample in batch], indices)
            yield indices, self._texts(new_ids)

    def _generate(self, prompts: Sequence[Sample], indices: Sequence[int]) -> Tensor:
        """The answers' ids (B, T), padded on the right."""
        inputs = self.pictures.inputs(prompts)
        prompt_length = inputs["input_ids"].shape[1]
        extras: dict[str, object] = {}
        if self.decoding.method == "sample":
            extras["logits_processor"] = sampling_processors(
                self.decoding,
                seed=self.seed,
                samples=[self.numbers[index] for index in indices],
                prompt_length=prompt_length,
            )
        if self.decoding.stop:
            stop = StopTexts(
                self.decoding.stop,
                tokenizer=self.vlm.processor.tokenizer,
                prompt_length=prompt_length,
            )
            extras["stopping_criteria"] = StoppingCriteriaList([stop])
        config = decoding_config(
            self.vlm,
            encoder=self.encoder,
            decoding=self.decoding,
            max_new_tokens=self.max_new_tokens,
        )
        output: Tensor = self.vlm.model.generate(**inputs, generation_config=config, **extras)
        return output[:, prompt_length:]

    def _texts(self, new_ids: Tensor | Iterable[list[int]]) -> list[str]:
        texts = decode_answers(self.vlm.processor.tokenizer, new_ids)
        return [cut_before(text, self.decoding.stop).strip() for text in texts]


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
