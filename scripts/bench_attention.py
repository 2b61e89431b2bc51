"""Attention within packs on a CPU: torch's kernel sample by sample, and ours.

    python scripts/bench_attention.py [--rounds 5] [--threads 2]

Forward and backward pass of one layer, eight heads on two, 64 wide; medians over rounds in which
both take their turn. In float32 training takes torch's kernel, in 16 bit ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmtune.models.packing import pack_attention

HEADS, KEY_HEADS, WIDTH = 8, 2, 64
PACKS = ([48] * 8, [180] * 8, [300] * 4, [600] * 2, [1200], [3000])

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def by_torch(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    parts = zip(*(x[None].split(list(lengths), 2) for x in (query, key, value)))
    return torch.cat(
        [F.scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True)[0] for p in parts],
        dim=1,
    )


def ours(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    return pack_attention(query, key, value, lengths=lengths, scale=WIDTH**-0.5)


def seconds(attend: Attend, given: Sequence[Tensor], lengths: Sequence[int]) -> float:
    started = time.perf_counter()
    output = attend(*given, lengths)
    torch.autograd.grad(output, given, torch.ones_like(output))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| samples | dtype | torch's kernel, ms | ours, ms | ratio |\n|---|---|---:|---:|---:|")
    for lengths in PACKS:
        for dtype in (torch.bfloat16, torch.float32):
            given = [
                torch.randn(sum(lengths), heads, WIDTH, dtype=dtype).transpose(0, 1)
                for heads in (HEADS, KEY_HEADS, KEY_HEADS)
            ]
            given = [x.requires_grad_() for x in given]
            taken: dict[Attend, list[float]] = {by_torch: [], ours: []}
            for _ in range(arguments.rounds + 1):
                for attend, times in taken.items():
                    times.append(seconds(attend, given, lengths))
            kernel, own = (1e3 * statistics.median(times[1:]) for times in taken.values())
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {len(lengths)} of {lengths[0]} | {name} "
                f"| {kernel:.1f} | {own:.1f} | {own / kernel:.2f} |"
            )


if __name__ == "__main__":
    main()
