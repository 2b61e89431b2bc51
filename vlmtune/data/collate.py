"""Samples side by side: a pack or padded rows for training, left-padded rows for generation.

Letters: B rows, T tokens of the longest row, N tokens of a pack, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from vlmtune.data.types import IGNORED, Batch, Sample

MediaLayout = Literal["flat", "stacked"]


def pack(samples: Sequence[Sample], *, media_layout: MediaLayout) -> Batch:
    """One row without padding, (1, N): the samples one after the other.

    What keeps them apart is up to the model's caller, who gets their `lengths`.
    """
    targets = torch.cat([sample.targets for sample in samples])  # (N,)
    supervised = targets != IGNORED
    names = _token_field_names(samples)
    inputs = {"input_ids": torch.cat([sample.input_ids for sample in samples])[None]}
    for name in names:
        inputs[name] = torch.cat([sample.token_fields[name] for sample in samples])[None]
    inputs.update(_media(samples, media_layout, one_row=True))
    return Batch(
        inputs=inputs,
        supervised=supervised[None],
        targets=targets[supervised],
        sample_ids=tuple(sample.id for sample in samples),
        num_tokens=int(targets.numel()),
        num_images=sum(sample.num_images for sample in samples),
        weights=_weights(samples),
        lengths=tuple(sample.num_tokens for sample in samples),
        media_keys=_media_keys(samples),
    )


def collate(samples: Sequence[Sample], *, pad_token_id: int, media_layout: MediaLayout) -> Batch:
    """Right-padded rows; padding is neither attended to nor supervised.

    `flat` media are concatenated over the samples on dimension 0; `stacked` media get one row a
    sample, (B, most pictures, …), padded with zeros.
    """
    targets = _pad([sample.targets for sample in samples], IGNORED, left=False)  # (B, T)
    supervised = targets != IGNORED  # (B, T)
    return Batch(
        inputs=_inputs(samples, pad_token_id, media_layout, left=False),
        supervised=supervised,
        targets=targets[supervised],
        sample_ids=tuple(sample.id for sample in samples),
        num_tokens=sum(sample.num_tokens for sample in samples),
        num_images=sum(sample.num_images for sample in samples),
        weights=_weights(samples),
        media_keys=_media_keys(samples),
    )


def _media_keys(samples: Sequence[Sample]) -> tuple[str, ...]:
    return tuple(key for sample in samples for key in sample.media_keys)


def _weights(samples: Sequence[Sample]) -> torch.Tensor | None:
    """The weights (S,) of the supervised tokens, row by row; None where no sample has any."""
    if all(sample.weights is None for sample in samples):
        return None
    rows = []
    for sample in samples:
        weights = sample.weights
        if weights is None:
            weights = torch.ones(sample.num_tokens, dtype=torch.float32)
        rows.append(weights[sample.targets != IGNORED])
    return torch.cat(rows)


def collate_prompts(
    samples: Sequence[Sample], *, pad_token_id: int, media_layout: MediaLayout
) -> dict[str, torch.Tensor]:
    """Left-padded rows, as `generate` needs them: every row's last token is its prompt's."""
    return _inputs(samples, pad_token_id, media_layout, left=True)


def _inputs(
    samples: Sequence[Sample], pad_token_id: int, media_layout: MediaLayout, *, left: bool
) -> dict[str, torch.Tensor]:
    names = _token_field_names(samples)
    ids = [sample.input_ids for sample in samples]
    inputs = {
        "input_ids": _pad(ids, pad_token_id, left=left),  # (B, T)
        "attention_mask": _pad([torch.ones_like(row) for row in ids], 0, left=left),  # (B, T)
    }
    for name in names:
        inputs[name] = _pad([sample.token_fields[name] for sample in samples], 0, left=left)
    inputs.update(_media(samples, media_layout))
    return inputs


def _token_field_names(samples: Sequence[Sample]) -> list[str]:
    assert samples, "an empty micro-batch"
    names = set(samples[0].token_fields)
    assert all(set(sample.token_fields) == names for sample in samples), "token fields differ"
    return sorted(names)


def _pad(rows: Sequence[torch.Tensor], value: int, *, left: bool) -> torch.Tensor:
    longest = max(row.shape[0] for row in rows)
    padded = rows[0].new_full((len(rows), longest), value)  # (B, T)
    for index, row in enumerate(rows):
        length = row.shape[0]
        padded[index, longest - length if left else 0 : longest if left else length] = row
    return padded


def _media(
    samples: Sequence[Sample], layout: MediaLayout, *, one_row: bool = False
) -> dict[str, torch.Tensor]:
    """`one_row`: of a pack; `stacked` media are then (1, all pictures, …)."""
    names = sorted({name for sample in samples for name in sample.media})
    if layout == "flat":
        return {
            name: torch.cat([sample.media[name] for sample in samples if name in sample.media])
            for name in names
        }
    if one_row:
        return {name: _in_one_row([s.media[name] for s in samples if s.media]) for name in names}
    return {name: _stack([sample.media.get(name) for sample in samples]) for name in names}


def _in_one_row(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows (1, pictures, …) as one (1, all pictures, …), each picture padded with zeros."""
    pictures = [picture for row in rows for picture in row[0]]
    sizes = [max(sizes) for sizes in zip(*(picture.shape for picture in pictures))]
    together = pictures[0].new_zeros((1, len(pictures), *sizes))
    for index, picture in enumerate(pictures):
        corner = together[0, index]
        for dim, size in enumerate(picture.shape):
            corner = corner.narrow(dim, 0, size)
        corner.copy_(picture)
    return together


def _stack(rows: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Rows of shape (1, pictures, …) as (B, most pictures, …); a missing row is all zeros.

    Idefics3-style models drop pictures that are zero throughout, so a text-only row costs nothing.
    """
    present = [row for row in rows if row is not None]
    sizes = [max(row.shape[dim] for row in present) for dim in range(1, present[0].dim())]
    stacked = present[0].new_zeros((len(rows), *sizes))
    for index, row in enumerate(rows):
        if row is not None:
            assert row.shape[0] == 1, "a stacked sample has one row"
            corner = stacked[index]
            for dim, size in enumerate(row.shape[1:]):
                corner = corner.narrow(dim, 0, size)
            corner.copy_(row[0])
    return stacked
