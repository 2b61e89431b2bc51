"""log p(text | prompt) of many texts after one prompt, which is run once.

    prompt (1, P) --vision included--> key-value cache of P tokens, logits after its last token
    texts, by length -> blocks of n texts with n (P + T) <= max_block_tokens
    block (n, T), right-padded, over n copies of the cache -> hidden (n, T, D) -> log p of tokens

The first token of a text is predicted by the prompt's last; a text's last token is predicted and
never fed. Letters: P tokens of the prompt, n texts of a block, T tokens of its longest less one,
N texts, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from vlmtune.models.forward import base_of, has_media

# transformers 5.24 calls it `cache`, 5.23 `past_key_values`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
LOGIT_NUMBERS = 2**24
"""Logits held at once: bounds the memory of (rows, V)."""


@dataclass(frozen=True)
class TextScores:
    """`log_probs` (N,) float64 are sums over a text's tokens; `num_tokens` (N,) int64 counts
    them."""

    log_probs: Tensor
    num_tokens: Tensor

    @property
    def per_token(self) -> Tensor:
        return self.log_probs / self.num_tokens


@torch.no_grad()
def score_texts(
    model: nn.Module,
    inputs: Mapping[str, Any],
    texts: Sequence[Tensor],
    *,
    max_block_tokens: int,
) -> TextScores:
    """The log-probability of each text (1-d token ids, not empty) after one prompt.

    `inputs` are the model's arguments for the prompt, one row without padding, on its device, with
    pixels or with `mm_encoder_outputs`; `model` may be in a PEFT wrapper and should be in eval
    mode. A block holds at most `max_block_tokens` tokens, the prompt's counted once a text; a
    single text may exceed it.
    """
    assert inputs["input_ids"].shape[0] == 1, "one prompt at a time"
    assert all(len(text) > 0 for text in texts), "a text without a token has no probability"
    prompt = _Prompt.run(model, inputs)
    log_probs = torch.zeros(len(texts), dtype=torch.float64)
    if texts:
        first = torch.stack([text[0] for text in texts]).to(prompt.hidden.device)
        log_probs += prompt.first_log_probs(first).double().cpu()
    for numbers in _blocks(texts, prompt.num_tokens, max_block_tokens):
        log_probs[numbers] += prompt.rest_log_probs([texts[n] for n in numbers]).cpu()
    return TextScores(log_probs, torch.tensor([len(text) for text in texts], dtype=torch.int64))


@dataclass(frozen=True)
class _Prompt:
    """A prompt that has been run: its cache, the hidden state (D,) of its last token, and the
    position at which what follows begins (with pictures, not the number of tokens everywhere)."""

    base: Any
    cache: Any
    hidden: Tensor
    num_tokens: int
    next_position: int

    @classmethod
    def run(cls, model: nn.Module, inputs: Mapping[str, Any]) -> _Prompt:
        base: Any = base_of(model)
        output = base.model(**inputs, use_cache=True)
        num_tokens = int(inputs["input_ids"].shape[1])
        next_position = num_tokens
        # M-RoPE models place a picture's tokens on a grid, which takes fewer positions. The model
        # keeps the difference of its last prompt with pictures, so it is stale after one without.
        is_shown = has_media(inputs) or "mm_encoder_outputs" in inputs
        if is_shown and getattr(base.model, "rope_deltas", None) is not None:
            next_position += int(base.model.rope_deltas)
        return cls(base, output[CACHE], output.last_hidden_state[0, -1], num_tokens, next_position)

    def first_log_probs(self, tokens: Tensor) -> Tensor:
        """Of each of `tokens` (N,) right after the prompt."""
        logits = self.base.lm_head(self.hidden[None]).float()  # (1, V)
        return logits.log_softmax(dim=-1)[0, tokens]

    def rest_log_probs(self, texts: Sequence[Tensor]) -> Tensor:
        """The sum (n,) float64 over each text's tokens from the second on."""
        device = self.hidden.device
        lengths = torch.tensor([len(text) - 1 for text in texts], device=device)  # (n,)
        steps = torch.arange(int(lengths.max()), device=device)  # (T,)
        is_token = steps < lengths[:, None]  # (n, T)
        fed = torch.zeros_like(is_token, dtype=torch.int64)
        fed[is_token] = torch.cat([text[:-1] for text in texts]).to(device)
        seen = is_token.new_ones((len(texts), self.num_tokens))
        cache = copy.deepcopy(self.cache)  # a forward pass appends to it
        cache.batch_repeat_interleave(len(texts))
        output = self.base.model(
            input_ids=fed,
            attention_mask=torch.cat([seen, is_token], dim=1).long(),  # (n, P + T)
            position_ids=(self.next_position + steps).expand(len(texts), -1),
            use_cache=True,
            **{CACHE: cache},
        )
        targets = torch.cat([text[1:] for text in texts]).to(device)
        log_probs = self._log_probs(output.last_hidden_state[is_token], targets)
        rows = torch.arange(len(texts), device=device).repeat_interleave(lengths)
        sums = torch.zeros(len(texts), dtype=torch.float64, device=device)
        return sums.index_add_(0, rows, log_probs.double())

    def _log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of `targets` (R,) at the positions of `hidden` (R, D), a few rows of logits at a time."""
        chunk = max(1, LOGIT_NUMBERS // self.base.lm_head.weight.shape[0])
        return torch.cat(
            [
                -nn.functional.cross_entropy(
                    self.base.lm_head(some).float(), aims, reduction="none"
                )
                for some, aims in zip(hidden.split(chunk), targets.split(chunk))
            ]
        )


def _blocks(texts: Sequence[Tensor], num_prompt: int, max_tokens: int) -> Iterator[list[int]]:
    """The numbers of the texts with more than one token, in blocks of similar length."""
    block: list[int] = []
    for number in sorted(range(len(texts)), key=lambda n: len(texts[n])):
        length = len(texts[number]) - 1  # none in the block is longer
        if length == 0:
            continue
        if block and (len(block) + 1) * (num_prompt + length) > max_tokens:
            yield block
            block = []
        block.append(number)
    if block:
        yield block
