"""How answers are decoded: greedily, sampled with a seed of their own, or by beams; where they end.

Sampling adds Gumbel noise to log-probabilities and takes the largest (the Gumbel-max trick:
Maddison et al. 2014, arXiv 1411.0030, section 2), which draws exactly from their distribution. The
noise of a token depends on (seed, sample, position) only, from a counter-based generator: the batch
a sample is in and the process that answers it change nothing, and two models compared on the same
samples get the same noise.

Letters for shapes: B rows of a batch (times beams), T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlmtune.data.encode import Encoder
from vlmtune.evaluation.running_batch import Row
from vlmtune.models.load import VLM
from vlmtune.models.processor import pad_token_id
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
