"""Answers by batched decoding: greedily, sampled with a seed of their own, or by beams.

Sampling adds Gumbel noise to log-probabilities and takes the largest (the Gumbel-max trick:
Maddison et al. 2014, arXiv 1411.0030, section 2), which draws exactly from their distribution. The
noise of a token depends on (seed, sample, position) only, from a counter-based generator: the batch
a sample is in and the process that answers it change nothing, and two models compared on the same
samples get the same noise.

Letters for shapes: B rows of a batch (times beams), T tokens so far, V vocabulary.

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

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Sample
from vlmtune.evaluation.prompts import SharedPictures, evaluation_order
from vlmtune.evaluation.running_batch import Row, RunningBatch, answer_rows, can_run_rows
from vlmtune.models.load import VLM, pad_token_id
from vlmtune.recipe.schema import DecodingSection


def decoding_config(
    vlm: VLM, *, encoder: Encoder, decoding: DecodingSection, max_new_tokens: int
) -> GenerationConfig:
    """The generation config of `decoding`. For `sample` it is the greedy one: the choice is in
    `sampling_processors`."""
    config = greedy_config(vlm, encoder=encoder, max_new_tokens=max_new_tokens)
    if decoding.method == "beam":
        config.num_beams = decoding.num_beams
    return config


def greedy_config(vlm: VLM, *, encoder: Encoder, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding, whatever the checkpoint's generation config says.

    Every field is set: what is left out is filled in from the checkpoint, where a temperature or a
    repetition penalty would make answers random or different from the argmax.
    """
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        length_penalty=1.0,
        early_stopping=False,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        typical_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=stop_token_ids(vlm, encoder),
        pad_token_id=pad_token_id(vlm.processor),
    )


def stop_token_ids(vlm: VLM, encoder: Encoder) -> list[int]:
    """Where an answer ends: the checkpoint's and the tokenizer's end tokens, and the token that
    ends an assistant turn in the chat template.

    The last is what fine-tuning supervises; a base checkpoint often names only its end of text, and
    would run on through further turns of its own.
    """
    configured = vlm.model.generation_config.eos_token_id
    stops = [vlm.processor.tokenizer.eos_token_id, encoder.end_token_id]
    stops += configured if isinstance(configured, list) else [configured]
    return sorted({int(stop) for stop in stops if stop is not None})


def sampling_processors(
    decoding: DecodingSection, *, seed: int, samples: Sequence[int], prompt_length: int
) -> LogitsProcessorList:
    """What makes greedy decoding draw from the distribution that `decoding` describes: temperature,
    then top-k, then top-p, then noise. `samples[i]` numbers the sample in row i."""
    noise = SeededNoise(seed=seed, samples=samples, prompt_length=prompt_length)
    return LogitsProcessorList([*_warpers(decoding), noise])


def token_choice(
    decoding: DecodingSection, *, seed: int, numbers: Sequence[int]
) -> Callable[[Tensor, Sequence[Row]], Tensor]:
    """The next token of each row from its logits, greedily or by the draw that
    `sampling_processors` makes; `numbers` are the samples' numbers by `Row.number`."""
    if decoding.method != "sample":
        return lambda logits, rows: logits.argmax(dim=-1)
    warpers = _warpers(decoding)

    def draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
        scores = warpers(None, logits)
        places = [(numbers[row.number], len(row.ids)) for row in rows]
        return _with_noise(scores, seed=seed, places=places).argmax(dim=-1)

    return draw


def ends_answer(
    vlm: VLM, *, encoder: Encoder, stops: Sequence[str], max_new_tokens: int
) -> Callable[[Row], bool]:
    """Whether a row's answer is at its end: a stop token, one of the texts `stops`, or its
    length."""
    stop_ids = set(stop_token_ids(vlm, encoder))
    tokenizer = vlm.processor.tokenizer

    def has_ended(row: Row) -> bool:
        if row.ids[-1] in stop_ids or len(row.ids) >= max_new_tokens:
            return True
        return bool(stops) and _holds_any(decode_answers(tokenizer, [row.ids])[0], stops)

    return has_ended


def _warpers(decoding: DecodingSection) -> LogitsProcessorList:
    warpers: list[LogitsProcessor] = []
    if decoding.temperature != 1:
        warpers.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k > 0:
        warpers.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        warpers.append(TopPLogitsWarper(decoding.top_p))
    return LogitsProcessorList(warpers)


class SeededNoise(LogitsProcessor):
    """Adds each row's own Gumbel noise, so that the largest score is a draw."""

    def __init__(self, *, seed: int, samples: Sequence[int], prompt_length: int) -> None:
        self._seed = seed
        self._samples = samples
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids` (B, T), `scores` (B, V) up to a constant the log-probabilities."""
        position = input_ids.shape[1] - self._prompt_length
        places = [(sample, position) for sample in self._samples]
        return _with_noise(scores, seed=self._seed, places=places)


def _with_noise(scores: Tensor, *, seed: int, places: Sequence[tuple[int, int]]) -> Tensor:
    """`scores` (B, V) and each row's noise; `places` are the rows' samples and positions."""
    noise = np.stack(
        [
            gumbel_noise(scores.shape[1], seed=seed, sample=sample, position=position)
            for sample, position in places
        ]
    )
    return scores + torch.from_numpy(noise).to(scores)


def gumbel_noise(size: int, *, seed: int, sample: int, position: int) -> np.ndarray:
    """Standard Gumbel noise (size,) of one answer's token number `position`."""
    bits = np.random.Philox(key=[seed, sample], counter=[0, position, 0, 0])
    return -np.log(np.random.Generator(bits).standard_exponential(size))


class StopTexts(StoppingCriteria):
    """Ends a row once its answer's text contains one of `texts`.

    transformers' own `stop_strings` looks at the prompt too: a stop text that the prompt's end and
    the first token make together would end every answer at once.
    """

    def __init__(
        self, texts: Sequence[str], *, tokenizer: PreTrainedTokenizerBase, prompt_length: int
    ) -> None:
        self._texts = texts
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """(B, T) to (B,), whether each row is at its end."""
        answers = decode_answers(self._tokenizer, input_ids[:, self._prompt_length :])
        ended = [_holds_any(answer, self._texts) for answer in answers]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _holds_any(answer: str, texts: Sequence[str]) -> bool:
    return any(text in answer for text in texts)


def decode_answers(
    tokenizer: PreTrainedTokenizerBase, new_ids: Tensor | Iterable[list[int]]
) -> list[str]:
    """The texts of generated ids, (B, T) or a list a row, control tokens left out."""
    return list(tokenizer.batch_decode(new_ids, skip_special_tokens=True))


def cut_before(answer: str, stops: Sequence[str]) -> str:
    """`answer` up to the first of `stops` in it."""
    found = [at for stop in stops if (at := answer.find(stop)) >= 0]
    return answer[: min(found)] if found else answer


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
