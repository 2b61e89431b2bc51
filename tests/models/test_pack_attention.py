"""Our attention for packs is the plain formula's, sample by sample, with its gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlmtune.models import packing
from vlmtune.models.packing import BLOCK, LONGEST, pack_attention

HEADS, KEY_HEADS, WIDTH = 6, 2, 8
LENGTHS = [1, 5, BLOCK + 3, 3 * BLOCK, LONGEST, 17]


def inputs(lengths, dtype=torch.float64):
    torch.manual_seed(0)
    num_tokens = sum(lengths)
    return [
        torch.randn(heads, num_tokens, WIDTH, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def by_formula(q, k, v, lengths):
    """Each sample apart, with a mask written out."""
    outputs = []
    parts = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
    for one, keys, values in parts:
        keys, values = (x.repeat_interleave(HEADS // KEY_HEADS, dim=0) for x in (keys, values))
        scores = one @ keys.transpose(1, 2) * 0.3
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ values)
    return torch.cat(outputs, dim=1)


def with_gradients(output, given):
    torch.manual_seed(1)
    gradient = torch.randn(output.shape, dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad(output, given, gradient)]


def largest_difference(one, other) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(one, other))


def test_output_and_gradients_are_the_formulas():
    given = inputs(LENGTHS, torch.float32)
    found = with_gradients(pack_attention(*given, lengths=LENGTHS, scale=0.3), given)
    expected = with_gradients(by_formula(*given, LENGTHS), given)
    assert largest_difference(found, expected) < 2e-5
    # The wrong variants: two samples as one, the scale left out.
    merged = [LENGTHS[0] + LENGTHS[1], *LENGTHS[2:]]
    as_one = with_gradients(pack_attention(*given, lengths=merged, scale=0.3), given)
    assert largest_difference(as_one, expected) > 0.1
    unscaled = with_gradients(pack_attention(*given, lengths=LENGTHS, scale=1.0), given)
    assert largest_difference(unscaled, expected) > 0.1


def test_in_bf16_it_is_as_close_to_the_formula_as_torchs_kernel():
    lengths = [40, BLOCK + 30, LONGEST - 40]
    exact = inputs(lengths)
    expected = with_gradients(by_formula(*exact, lengths), exact)
    given = [x.detach().bfloat16().requires_grad_() for x in exact]
    found = with_gradients(pack_attention(*given, lengths=lengths, scale=0.3), given)
    parts = zip(*(x.split(lengths, 1) for x in given), strict=True)
    kernel = torch.cat(
        [
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=0.3, enable_gqa=True
            )[0]
            for q, k, v in parts
        ],
        dim=1,
    )
    torchs = with_gradients(kernel, given)
    for ours, theirs, right in zip(found, torchs, expected):
        error, allowed = ((x.double() - right).norm() / right.norm() for x in (ours, theirs))
        assert error < 1.5 * allowed + 1e-3


def test_under_autocast_scores_stay_in_float32():
    given = [x.detach().bfloat16() for x in inputs([50])]
    plain = pack_attention(*given, lengths=[50], scale=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pack_attention(*given, lengths=[50], scale=0.3), plain)


def test_longer_samples_are_left_to_torch_and_say_the_same():
    """At the bound the two ways meet."""
    for tokens in (LONGEST, LONGEST + 1):
        given = [x.detach().bfloat16() for x in inputs([tokens])]
        output, _ = attend(*(x[None] for x in given), tokens)
        expected = by_formula(*(x.float() for x in given), [tokens])
        assert torch.allclose(output[0].transpose(0, 1).float(), expected, atol=2e-2)
    with pytest.raises(AssertionError):
        pack_attention(*given, lengths=[LONGEST + 1], scale=0.3)


def attend(query, key, value, tokens):
    """As a layer of a packed model does."""
    return packing._attention(
        torch.nn.Identity(), query, key, value, None, scaling=0.3, pack_lengths=(tokens,)
    )


def test_a_sample_of_the_future_is_not_seen_before_the_block_either(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 4)
    packing._future.cache_clear()
    lengths = [3, 4, 5, 11]
    given = inputs(lengths, torch.float32)
    found = with_gradients(pack_attention(*given, lengths=lengths, scale=0.3), given)
    packing._future.cache_clear()
    assert largest_difference(found, with_gradients(by_formula(*given, lengths), given)) < 1e-5
