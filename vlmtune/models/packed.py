"""Samples packed into one row, kept apart: attention sample by sample, positions from 0 in each.

    row (1, N) of samples with `lengths`  ->  position_ids, pack_lengths  ->  model
      attention layer: queries, keys, values (1, H, N, D)
        -> one causal attention a sample -> (1, N, H, D)

The cost of attention is the sum of the samples' squares, not the square of their sum, and no mask
is made. N tokens of a pack, T of the longest sample, B samples, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmtune.models.family import Family
from vlmtune.models.pack_attention import LONGEST, pack_attention
from vlmtune.models.varlen_attention import can_use_varlen, varlen_attention

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
