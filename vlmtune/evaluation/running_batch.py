"""Generates answers side by side, each row from its own start to its own end.

    prompts, left-padded (b, P) -> key-value cache of P columns --+
    cache of the rows under way (B, L), its padding cut ----------+--> cache (B + b, max(L, P))
    a token of each row (B,) -> cache of L + 1 columns, logits (B, V)
    ended rows leave the cache, so that no row waits for the longest answer beside it

A row's logits are those that it has alone: padding on the left is masked, and positions count from
the row's own first token. Letters: B rows under way, b rows that enter, P tokens of the longest
prompt that enters, L columns of the cache, H heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmtune.models.families import Family
from vlmtune.models.forward import base_of
from vlmtune.models.likelihood import CACHE
from vlmtune.models.packing import GRIDS, can_pack

REFILL_FRACTION = 0.25
"""Prompts enter once this share of the batch is free: a prompt alone wastes a forward pass."""

Prompt = TypeVar("Prompt")


@dataclass
class Row:
    """An answer under way: `number` says whose, `ids` are its tokens so far."""

    number: int
    ids: list[int] = field(default_factory=list)


Choose = Callable[[Tensor, Sequence[Row]], Tensor]
"""The next token (B,) of each row from its logits (B, V), float32."""


def can_run_rows(model: nn.Module, family: Family) -> bool:
    """Whether `RunningBatch` knows the model's positions and may cut its cache into rows."""
    return can_pack(base_of(model), family)


def answer_rows(
    batch: RunningBatch,
    prompts: Iterator[tuple[int, Prompt]],
    *,
    inputs_of: Callable[[list[Prompt]], Mapping[str, Any]],
    choose: Choose,
    has_ended: Callable[[Row], bool],
    size: int,
    refill_fraction: float = REFILL_FRACTION,
) -> Iterator[list[Row]]:
    """Answer numbered prompts, at most `size` at a time; yields the rows that have ended whenever
    prompts enter, and at the end.

    `inputs_of` makes the left-padded batch of some prompts; `prompts` are taken as there is room.
    """
    logits: list[Tensor] = []
    ended: list[Row] = []
    refill_rows = max(1, int(size * refill_fraction))
    is_more = True
    while True:
        free = size - len(batch.rows)
        if is_more and (free >= refill_rows or not batch.rows):
            if ended:
                yield ended
                ended = []
            entering = list(islice(prompts, free))
            is_more = len(entering) == free
            if entering:
                rows = [Row(number) for number, _ in entering]
                logits.append(batch.enter(inputs_of([prompt for _, prompt in entering]), rows))
        if not batch.rows:
            break
        tokens = choose(torch.cat(logits), batch.rows)  # (B,)
        for row, token in zip(batch.rows, tokens.tolist()):
            row.ids.append(token)
        going_on = []
        for index, row in enumerate(batch.rows):
            if has_ended(row):
                ended.append(row)
            else:
                going_on.append(index)
        if len(going_on) < len(batch.rows):
            batch.keep(going_on)
        logits = [batch.step(tokens[going_on])] if going_on else []
    if ended:
        yield ended


class RunningBatch:
    """The cache of the answers under way, and what each row needs to go on.

    `model` may be in a PEFT wrapper and should be in eval mode, under no_grad.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        assert can_run_rows(model, family), "the cache of this model is not one of plain rows"
        self.rows: list[Row] = []
        self._base: Any = base_of(model)
        self._family = family
        self._cache: Any = None
        self._mask: Tensor = torch.zeros(0)  # (B, L), whether a column is a token of the row
        self._next: Tensor = torch.zeros(0)  # (B,), the position of the token to come

    def enter(self, inputs: Mapping[str, Any], rows: Sequence[Row]) -> Tensor:
        """Run left-padded prompts and add them as `rows`, behind those under way. The logits
        (b, V), float32, of their first tokens."""
        positions, following = self._positions(inputs)
        output = self._base(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
        cache, mask = output[CACHE], inputs["attention_mask"].bool()
        if self.rows:
            self._cut_padding()
            length = max(self._mask.shape[1], mask.shape[1])
            for ours, new in zip(self._cache.layers, cache.layers):
                ours.keys = torch.cat([_padded(ours.keys, length), _padded(new.keys, length)])
                ours.values = torch.cat([_padded(ours.values, length), _padded(new.values, length)])
            pair = [F.pad(m, (length - m.shape[1], 0)) for m in (self._mask, mask)]
            mask = torch.cat(pair)
            following = torch.cat([self._next, following])
            cache = self._cache
        self._cache, self._mask, self._next = cache, mask, following
        self.rows += rows
        return output.logits[:, -1].float()

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token (B,) to each row. The logits (B, V), float32, of the next ones."""
        self._mask = F.pad(self._mask, (0, 1), value=True)
        output = self._base(
            input_ids=tokens[:, None],
            attention_mask=self._mask.long(),
            position_ids=self._next[:, None],
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: self._cache},
        )
        self._next = self._next + 1
        return output.logits[:, -1].float()

    def keep(self, indices: Sequence[int]) -> None:
        """Drop the rows that are not at `indices`."""
        self.rows = [self.rows[index] for index in indices]
        if not indices:
            self._cache = None
            return
        kept = torch.tensor(indices)
        self._mask = self._mask[kept.to(self._mask.device)]
        self._next = self._next[kept.to(self._next.device)]
        for layer in self._cache.layers:
            layer.keys = layer.keys[kept.to(layer.keys.device)]
            layer.values = layer.values[kept.to(layer.values.device)]

    def _cut_padding(self) -> None:
        """Leave out the columns on the left that are padding in every row."""
        first = int(self._mask.any(dim=0).int().argmax())
        if first == 0:
            return
        self._mask = self._mask[:, first:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[:, :, first:]
            layer.values = layer.values[:, :, first:]

    def _positions(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The positions (b, P), or on M-RoPE's grid (3, b, P), and those that follow, (b,)."""
        mask = inputs["attention_mask"]  # (b, P)
        following = mask.sum(dim=1)  # (b,)
        grids = {name: inputs[name] for name in GRIDS if name in inputs}
        if self._family.positions == "mrope" and grids:
            positions, deltas = self._base.model.get_rope_index(
                inputs["input_ids"],
                mm_token_type_ids=inputs["mm_token_type_ids"],
                attention_mask=mask,
                **grids,
            )
            return positions, following + deltas[:, 0]
        return (mask.cumsum(dim=1) - 1).clamp(min=0), following


def _padded(rows: Tensor, length: int) -> Tensor:
    """Keys or values (B, H, L, D) as (B, H, length, D), zeros on the left."""
    return F.pad(rows, (0, 0, length - rows.shape[2], 0))
