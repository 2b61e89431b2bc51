"""Causal attention within each sample of a pack, for 16-bit numbers on a CPU.

    a sample's queries, in blocks of `BLOCK`:
      scores (float32) = s q k^T, of the keys up to the block  ->  P = softmax  ->  P v

torch's own kernel for a CPU takes most of its time in the backward pass, several times that of the
matrix products it consists of: for samples of up to about `LONGEST` tokens these are faster
(scripts/bench_attention.py). Scores and softmax are float32, as in that kernel. P is kept for the
backward pass, H x T numbers a token.

Letters: H heads, K key heads, G = H / K, N tokens of the pack, T of a sample, B of a block, D width
of a head, s the scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmtune.models.autocast import without_autocast

BLOCK = 256
LONGEST = 1024
"""Tokens of a sample up to which this is the faster way, and P is kept."""


def pack_attention(
    query: Tensor, key: Tensor, value: Tensor, *, lengths: Sequence[int], scale: float
) -> Tensor:
    """Of `query` (H, N, D), `key` and `value` (K, N, D): the output (H, N, D), in their dtype.

    No sample has more than `LONGEST` tokens.
    """
    assert max(lengths) <= LONGEST
    output: Tensor = _PackAttention.apply(query, key, value, tuple(lengths), scale)
    return output


class _PackAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        keeps = any(ctx.needs_input_grad)
        output = _rows_first(query)
        kept: list[Tensor] = []
        with without_autocast(query.device):
            for tokens in _samples(lengths):
                q, k, v = query[:, tokens], key[:, tokens], value[:, tokens]
                wide = _wide(k)
                for block in _blocks(tokens):
                    p = _probabilities(q[:, block], wide, block, scale)
                    output[:, tokens][:, block] = _by_head(p @ v[:, : block.stop], len(q))
                    if keeps:
                        kept.append(p)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        query, key, value, *kept = ctx.saved_tensors
        of_query, of_key, of_value = _rows_first(query), _rows_first(key), _rows_first(value)
        probabilities = iter(kept)
        with without_autocast(query.device):
            for tokens in _samples(ctx.lengths):
                q, k, v = query[:, tokens], key[:, tokens], value[:, tokens]
                sums = torch.zeros(2, *k.shape, dtype=torch.float32, device=k.device)
                for block in _blocks(tokens):
                    p = next(probabilities)
                    g = _by_key_head(gradient[:, tokens][:, block], len(k))  # (K, G B, D)
                    seen = slice(block.stop)
                    of_p = g @ v[:, seen].transpose(1, 2)
                    # P (dP - rowsum(dP P)): the scores' gradient
                    of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype)
                    of_block = _by_head(of_scores @ k[:, seen], len(q))
                    of_query[:, tokens][:, block] = of_block.mul_(ctx.scale)
                    sums[0, :, seen] += of_scores.transpose(1, 2) @ _by_key_head(
                        q[:, block], len(k)
                    )
                    sums[1, :, seen] += p.transpose(1, 2) @ g
                of_key[:, tokens] = sums[0].mul_(ctx.scale)
                of_value[:, tokens] = sums[1]
        return of_query, of_key, of_value, None, None


def _probabilities(q: Tensor, wide: Tensor, block: slice, scale: float) -> Tensor:
    """(K, G B, keys up to the block's end) of a block's queries (H, B, D), in their dtype; `wide`:
    a sample's keys as `_wide` has them."""
    heads, rows, _ = q.shape
    scores = (_by_key_head(q, len(wide)).float() * scale) @ wide[:, :, : block.stop]
    scores = scores.view(heads, rows, block.stop)
    scores[:, :, block] += _future(q.device)[:rows, :rows]
    return torch.softmax(scores, dim=-1).to(q.dtype).view(len(wide), -1, block.stop)


def _wide(key: Tensor) -> Tensor:
    """Keys (K, T, D) as (K, D, T) in float32."""
    return key.float().transpose(1, 2)


@lru_cache(maxsize=2)
def _future(device: torch.device) -> Tensor:
    """(B, B): minus infinity where a key comes after the query."""
    return torch.full((BLOCK, BLOCK), float("-inf"), device=device).triu(1)


def _by_key_head(values: Tensor, key_heads: int) -> Tensor:
    """(H, B, D) as (K, G B, D): the heads that share keys, one below the other."""
    return values.reshape(key_heads, -1, values.shape[-1])


def _by_head(values: Tensor, heads: int) -> Tensor:
    """(K, G B, D) as (H, B, D)."""
    return values.view(heads, -1, values.shape[-1])


def _samples(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _blocks(tokens: slice) -> Iterator[slice]:
    """The blocks of a sample, counted from its start."""
    length = tokens.stop - tokens.start
    for start in range(0, length, BLOCK):
        yield slice(start, min(start + BLOCK, length))


def _rows_first(like: Tensor) -> Tensor:
    """An empty (H, N, D) that lies as (N, H, D): the output projection takes it without a copy."""
    heads, tokens, width = like.shape
    return like.new_empty((tokens, heads, width)).transpose(0, 1)
