"""Samples packed into one row, kept apart: attention sample by sample, positions from 0 in each.

    a sample's queries, in blocks of `BLOCK`:
      scores (float32) = s q k^T, of the keys up to the block  ->  P = softmax  ->  P v

torch's own kernel for a CPU takes most of its time in the backward pass, several times that of the
matrix products it consists of: for samples of up to about `LONGEST` tokens these are faster
(scripts/bench_attention.py). Scores and softmax are float32, as in that kernel. P is kept for the
backward pass, H x T numbers a token.

Letters: H heads, K key heads, G = H / K, N tokens of the pack, T of a sample, B of a block, D width
of a head, s the scale.

One launch for all samples, in 16 bit, on devices from Ampere on, where torch has the kernel with
grouped keys; elsewhere the caller attends sample by sample. Not run on a GPU yet.

Letters: H heads, K key heads, N tokens of the pack, D width of a head.

    row (1, N) of samples with `lengths`  ->  position_ids, pack_lengths  ->  model
      attention layer: queries, keys, values (1, H, N, D)
        -> one causal attention a sample -> (1, N, H, D)

The cost of attention is the sum of the samples' squares, not the square of their sum, and no mask
is made. N tokens of a pack, T of the longest sample, B samples, H heads, D width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmtune.models.families import Family
from vlmtune.models.precision import without_autocast

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


AMPERE = (8, 0)
CAUSAL = (-1, 0)
"""The window of a query: any number of keys before it, none after."""


def can_use_varlen(query: Tensor) -> bool:
    """Whether the kernel takes a query (H, N, D) as it is."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= AMPERE
        and _has_kernel()
    )


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, *, lengths: Sequence[int], scale: float
) -> Tensor:
    """Of `query` (H, N, D), `key` and `value` (K, N, D): the output (H, N, D)."""
    from torch.nn.attention.varlen import varlen_attn

    starts = _starts(tuple(lengths), query.device)
    longest = max(lengths)
    output: Tensor = varlen_attn(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=CAUSAL,
        enable_gqa=len(query) != len(key),
    )  # (N, H, D)
    return output.transpose(0, 1)


@lru_cache(maxsize=4)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sample starts, and where the last one ends, int32: once for all layers."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


@lru_cache(maxsize=1)
def _has_kernel() -> bool:
    """Whether this torch has the kernel, with the arguments given above."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(
        varlen_attn
    ).parameters.keys()


HALF = (torch.bfloat16, torch.float16)
ATTENTION = "vlmtune_packed"
"""The name by which transformers finds the attention below."""

GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
"""What besides the tokens says where pictures and videos are in M-RoPE."""


def can_pack(model: Any, family: Family) -> bool:
    """Whether the language part keeps the samples of a row apart: its family is known to, and
    every layer is one of full causal attention."""
    if family.positions is None:
        return False
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        # Mistral's layers have no kinds: all of them slide where it has a window.
        return getattr(config, "sliding_window", None) is None
    return set(kinds) <= {"full_attention"}


def use_packed_attention(model: Any) -> None:
    """Let the language part of a transformers model attend sample by sample where it is given
    `pack_lengths`; without them, as padded rows and generation do, it works as before."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    model.set_attn_implementation({"text_config": ATTENTION})


def pack_arguments(
    model: Any, inputs: Mapping[str, Tensor], lengths: Sequence[int], family: Family
) -> dict[str, Any]:
    """What the model is given besides `inputs` for a pack. `model` has `get_rope_index` where the
    family's positions are "mrope"."""
    if family.positions == "mrope":
        positions = _grid_positions(model, inputs, lengths)  # (4, 1, N)
    else:
        positions = _text_positions(lengths, inputs["input_ids"].device)[None]  # (1, N)
    return {"position_ids": positions, "pack_lengths": tuple(lengths)}


def _text_positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """0, 1, … from anew in each sample, (N,)."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])


def _grid_positions(model: Any, inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
    """M-RoPE (Wang et al. 2024, arXiv 2409.12191, section 2.1): a row of plain positions, from
    which transformers tells the samples apart, then those in time, height and width. Without a
    picture all four are the same."""
    plain = _text_positions(lengths, inputs["input_ids"].device)  # (N,)
    given = [name for name in GRIDS if name in inputs]
    if not given:
        return plain.expand(4, 1, -1)
    ids = _rows(inputs["input_ids"][0], lengths)  # (B, T)
    is_token = _rows(torch.ones_like(inputs["input_ids"][0]), lengths)  # (B, T)
    positions, _ = model.get_rope_index(
        ids,
        mm_token_type_ids=_rows(inputs["mm_token_type_ids"][0], lengths),
        attention_mask=is_token,
        **{name: inputs[name] for name in given},
    )  # (3, B, T)
    return torch.cat([plain[None], positions[:, is_token.bool()]])[:, None]


def _rows(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """A pack's (N,) as (B, T), padded on the right with zeros."""
    return nn.utils.rnn.pad_sequence(list(values.split(list(lengths))), batch_first=True)


def _attention(
    module: nn.Module,
    query: Tensor,  # (1, H, N, D)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    pack_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In the signature of transformers' attention functions; the output is (1, N, H, D)."""
    if pack_lengths is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    assert attention_mask is None, "a pack has no mask"
    lengths = list(pack_lengths)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = None if dropout else _kernel_for(query[0], longest=max(lengths))
    if kernel is not None:
        by_head = kernel(query[0], key[0], value[0], lengths=lengths, scale=scale)  # (H, N, D)
        return by_head.transpose(0, 1)[None], None
    samples = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2))
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=True
        ).transpose(1, 2)
        for q, k, v in samples
    ]
    return torch.cat(outputs, dim=1), None


def _kernel_for(query: Tensor, *, longest: int) -> Callable[..., Tensor] | None:
    """What attends over a whole pack at once, for a query (H, N, D); None: sample by sample."""
    if query.device.type == "cpu" and query.dtype in HALF and longest <= LONGEST:
        return pack_attention
    return varlen_attention if can_use_varlen(query) else None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None where no mask is wanted: a pack (its attention needs none), or a row without padding."""
    if kwargs["attention_mask"] is None and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask
