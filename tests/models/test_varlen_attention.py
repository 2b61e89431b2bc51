"""The variable-length kernel gets each sample's own tokens; the kernel itself needs CUDA."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlmtune.models.packing import can_use_varlen, varlen_attention

varlen = pytest.importorskip("torch.nn.attention.varlen")
LENGTHS = [3, 1, 6]


def by_sample(q, k, v, scale=0.3):
    """(H, N, D), each sample apart."""
    parts = zip(*(x.split(LENGTHS, 1) for x in (q, k, v)), strict=True)
    return torch.cat(
        [
            F.scaled_dot_product_attention(
                a[None], b[None], c[None], is_causal=True, scale=scale, enable_gqa=True
            )[0]
            for a, b, c in parts
        ],
        dim=1,
    )


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return [torch.randn(h, sum(LENGTHS), 8, device=device, dtype=dtype) for h in (4, 2, 2)]


def test_the_kernel_gets_the_samples_apart(monkeypatch):
    def kernel(q, k, v, starts, key_starts, longest, _, *, scale, window_size, enable_gqa):
        assert torch.equal(starts, key_starts) and starts.dtype == torch.int32
        assert longest == max(LENGTHS) and window_size == (-1, 0)
        outputs = []
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            parts = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
            outputs.append(
                F.scaled_dot_product_attention(
                    *parts, is_causal=True, scale=scale, enable_gqa=enable_gqa
                )[0].transpose(0, 1)
            )
        return torch.cat(outputs)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    q, k, v = inputs()
    found = varlen_attention(q, k, v, lengths=LENGTHS, scale=0.3)
    assert torch.allclose(found, by_sample(q, k, v), atol=1e-6)
    assert not torch.allclose(found, by_sample(q, k, v, scale=1.0), atol=1e-2)


def test_a_cpu_does_not_use_it():
    assert not can_use_varlen(torch.zeros(1, 1, 8, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_attention_of_each_sample():
    q, k, v = inputs("cuda", torch.bfloat16)
    assert can_use_varlen(q)
    found = varlen_attention(q, k, v, lengths=LENGTHS, scale=0.3)
    assert torch.allclose(found.float(), by_sample(q, k, v).float(), atol=2e-2)
