"""Answers by batched decoding.

    conversations -> windows of WINDOW_BATCHES batches -> prompts, sorted by length in a window
                  -> left-padded batches -> generate -> text, in the order of the input

Left padding puts every prompt's last token in the last column, where the first answer token is
predicted; a batch then gives what its rows give one by one. Windows bound the memory that encoded
pictures take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from vlmtune.data.collate import collate_prompts
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Sample
from vlmtune.evaluation.decoding import (
    StopTexts,
    cut_before,
    decode_answers,
    decoding_config,
    sampling_processors,
)
from vlmtune.models.load import VLM
from vlmtune.models.processor import pad_token_id
from vlmtune.recipe.schema import DecodingSection

WINDOW_BATCHES = 32
GREEDY = DecodingSection()

Item = TypeVar("Item")


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
) -> list[str]:
    """The model's answer to each conversation's prompt, in the order given.

    The prompt is everything up to, not including, a final assistant turn. `numbers` are the
    conversations' places in a larger set, by default 0, 1, …: with `seed` they decide what is drawn
    where `decoding` samples. `on_answers` gets the answers of each batch by these numbers. Every
    module's training mode is restored afterwards. No collective: with several processes, each
    passes its share. Raises SampleError for a conversation that cannot be encoded.
    """
    decode = _Decode(vlm, encoder, decoding, max_new_tokens, seed)
    numbers = range(len(conversations)) if numbers is None else numbers
    answers = [""] * len(conversations)
    with evaluating(vlm.model):
        for window in _chunks(range(len(conversations)), WINDOW_BATCHES * batch_size):
            prompts = {index: encoder.encode_prompt(conversations[index]) for index in window}
            # Longest first: a batch that does not fit in memory shows at once.
            order = sorted(window, key=lambda index: -prompts[index].num_tokens)
            for batch in _chunks(order, batch_size):
                batch_numbers = [numbers[index] for index in batch]
                texts = decode([prompts.pop(index) for index in batch], batch_numbers)
                for index, text in zip(batch, texts):
                    answers[index] = text
                if on_answers is not None:
                    on_answers(dict(zip(batch_numbers, texts)))
    return answers


def prompt_inputs(vlm: VLM, prompts: Sequence[Sample]) -> dict[str, Tensor]:
    """The left-padded batch of `prompts` as keyword arguments for `generate`, on the model's
    device."""
    inputs = collate_prompts(
        prompts,
        pad_token_id=pad_token_id(vlm.processor),
        media_layout=vlm.family.media_layout,
    )
    device = next(vlm.model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


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
    """Prompts and their numbers to texts, a batch at a time."""

    vlm: VLM
    encoder: Encoder
    decoding: DecodingSection
    max_new_tokens: int
    seed: int

    def __call__(self, prompts: Sequence[Sample], numbers: Sequence[int]) -> list[str]:
        tokenizer = self.vlm.processor.tokenizer
        inputs = prompt_inputs(self.vlm, prompts)
        prompt_length = inputs["input_ids"].shape[1]
        extras: dict[str, object] = {}
        if self.decoding.method == "sample":
            extras["logits_processor"] = sampling_processors(
                self.decoding, seed=self.seed, samples=numbers, prompt_length=prompt_length
            )
        if self.decoding.stop:
            stop = StopTexts(self.decoding.stop, tokenizer=tokenizer, prompt_length=prompt_length)
            extras["stopping_criteria"] = StoppingCriteriaList([stop])
        config = decoding_config(
            self.vlm,
            encoder=self.encoder,
            decoding=self.decoding,
            max_new_tokens=self.max_new_tokens,
        )
        output = self.vlm.model.generate(**inputs, generation_config=config, **extras)
        texts = decode_answers(tokenizer, output[:, prompt_length:])
        return [cut_before(text, self.decoding.stop).strip() for text in texts]


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
