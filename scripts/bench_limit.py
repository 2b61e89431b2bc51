"""How close a training step is to what this machine can do: the least work, at measured speeds.

    python scripts/bench_limit.py RECIPE [key=value …] [--steps 12] [--json FILE]

    one step, every matrix product and attention recorded with its shapes
      necessary     packed, features of a frozen tower kept, nothing recomputed, logits where
                    supervised
      first epoch   as the recipe says, the tower's features not yet kept
      later epochs  as the recipe says
      plain         padded rows, all logits, the tower each time, autograd as a plain trainer has it
    each product timed alone, at its shape  ->  operations a second
    necessary operations / these            ->  the least seconds of a step, the fraction reached

The operations of attention are taken at the speed of the products, which its kernels do not reach.
A product's speed is that of its shape, measured here and now with the recipe's dtype and threads,
so the limit moves with the machine's load as the step does: use a machine without other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from vlmtune.data.batches import make_batch, make_batches
from vlmtune.data.types import Batch, Sample
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.models.forward import base_of
from vlmtune.models.load import load_vlm
from vlmtune.recipe.load import load_recipe
from vlmtune.train import build
from vlmtune.train.feed import StepBatch
from vlmtune.train.optim import set_learning_rate
from vlmtune.train.runtime import DTYPES, build_accelerator
from vlmtune.train.step import train_step

aten = torch.ops.aten
GROUPS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "convolution"),
    "attention": ("_scaled_dot_product",),
    "copies and casts": ("copy_", "_to_copy", "cat", "contiguous", "clone", "fill_", "zero_"),
    "cross-entropy": ("log_softmax", "nll_loss"),
    "optimizer": ("_fused_adamw_", "_foreach", "linalg_vector_norm", "Optimizer"),
}
"""What an operator counts as, by how its name starts; anything else is "the rest"."""


@dataclass(frozen=True)
class Product:
    """(rows, inner) x (inner, columns), `count` of them at once where it is batched."""

    rows: int
    inner: int
    columns: int
    count: int = 1
    is_batched: bool = False

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inner * self.columns * self.count


@dataclass(frozen=True)
class Attention:
    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int
    is_causal: bool
    is_backward: bool

    @property
    def operations(self) -> int:
        """Two products forward, four backward (what the kernel recomputes is not counted); of a
        causal one, half."""
        square = 2 * self.heads * self.queries * self.keys * self.width
        return square * (4 if self.is_backward else 2) // (2 if self.is_causal else 1)


class Recorder(TorchDispatchMode):
    """Counts the matrix products and attentions that are computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Product | Attention] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        found = _recorded(func, args, kwargs or {})
        if found is not None:
            self.seen[found] += 1
        return func(*args, **(kwargs or {}))

    @property
    def operations(self) -> int:
        return sum(work.operations * count for work, count in self.seen.items())


def _recorded(func: Any, args: Sequence[Any], kwargs: Any) -> Product | Attention | None:
    name = func.overloadpacket
    if name in (aten.mm, aten.bmm):
        a, b = args[0], args[1]
    elif name in (aten.addmm, aten.addmm_, aten.baddbmm):
        a, b = args[1], args[2]
    elif name is aten.convolution:
        x, weight = args[0], args[1]
        return Product(x.shape[0], weight[0].numel(), weight.shape[0])
    elif "scaled_dot_product" in str(name):
        is_backward = "backward" in str(name)
        q, k = (args[1], args[2]) if is_backward else (args[0], args[1])
        at = 7 if is_backward else 4
        causal = bool(args[at]) if len(args) > at else bool(kwargs.get("is_causal", False))
        return Attention(
            q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], causal, is_backward
        )
    else:
        return None
    is_batched = a.dim() == 3
    count = a.shape[0] if is_batched else 1
    return Product(a.shape[-2], a.shape[-1], b.shape[-1], count, is_batched)


def seconds_alone(work: Product | Attention, dtype: torch.dtype) -> float:
    """The least of a few runs of `work` on random numbers."""
    if isinstance(work, Product):
        lead = (work.count,) if work.count > 1 else ()
        a = torch.randn(*lead, work.rows, work.inner, dtype=dtype)
        b = torch.randn(*lead, work.columns, work.inner, dtype=dtype).transpose(-1, -2)
        return _least(lambda: a @ b)
    shape = (1, work.queries, work.heads, work.width)
    q = torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_(work.is_backward)
    k, v = (
        torch.randn(1, work.keys, work.key_heads, work.width, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_(work.is_backward)
        for _ in range(2)
    )

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=work.is_causal, enable_gqa=work.heads != work.key_heads
        )

    if not work.is_backward:
        return _least(attend)
    output = attend()
    gradient = torch.randn_like(output)
    return _least(lambda: torch.autograd.grad(output, (q, k, v), gradient, retain_graph=True))


def _least(run: Callable[[], object], runs: int = 3) -> float:
    run()
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return min(taken)


class Bench:
    """A recipe's model and data, and single steps of it."""

    def __init__(self, recipe: Any, num_steps: int) -> None:
        self.recipe = recipe
        self.accelerator = build_accelerator(recipe.train.precision)
        self.dtype = DTYPES[recipe.train.precision]
        self.vlm = load_vlm(
            recipe.model,
            quantization_bit=recipe.quantization_bit,
            quantization=recipe.quantization,
            dtype=self.dtype,
            image=recipe.image,
        )
        self.data, _ = build.open_training_data(recipe)
        build.seed_everything(recipe.seed, 0)
        self.adapter = build_adapter(self.vlm, recipe, total_steps=num_steps)
        self.encoder = build.build_encoder(recipe, self.vlm)
        self.state = build.build_state(
            recipe,
            vlm=self.vlm,
            adapter=self.adapter,
            data=self.data,
            encoder=self.encoder,
            accelerator=self.accelerator,
        )
        self.steps = build.build_steps(
            recipe,
            data=self.data,
            encoder=self.encoder,
            vlm=self.vlm,
            accelerator=self.accelerator,
            start=None,
        )

    def samples(self, step: int) -> list[Sample]:
        """The samples of a step, encoded one by one."""
        order = self.data.order(seed=self.recipe.seed)  # type: ignore[union-attr]
        size = self.recipe.train.batch_size
        rows = [order.row_at(at) for at in range((step - 1) * size, step * size)]
        return [self.encoder.encode(self.data[row]) for row in rows]  # type: ignore[index]

    def run(self, step: int, data: StepBatch) -> None:
        set_learning_rate(self.state.optimizer.optimizer, 1e-3)
        train_step(
            self.state,
            data,
            step=step,
            accelerator=self.accelerator,
            max_grad_norm=self.recipe.train.max_grad_norm,
        )


def record(run: Callable[[], object]) -> Recorder:
    recorder = Recorder()
    with recorder:
        run()
    return recorder


def plain_step(bench: Bench, samples: Sequence[Sample], *, rows: int) -> None:
    """Rows padded to the longest of each `rows`, all logits, the model's own loss; with
    checkpointing, gradients from the embeddings on, as `enable_input_require_grads` has it."""
    base = base_of(bench.adapter.model)
    layout = build.layout_of(bench.recipe, bench.vlm)
    layout = type(layout)(layout.budget, layout.pad_token_id, layout.image_batching, packs=False)
    if bench.recipe.train.gradient_checkpointing:
        base.enable_input_require_grads()
    for start in range(0, len(samples), rows):
        batch: Batch = make_batch(samples[start : start + rows], layout)
        labels = torch.full(batch.supervised.shape, -100)
        labels[batch.supervised] = batch.targets
        labels = labels.roll(1, dims=1)  # the model shifts them itself
        with bench.accelerator.autocast():
            base(**batch.inputs, labels=labels, use_cache=False).loss.backward()
    if bench.recipe.train.gradient_checkpointing:
        base.disable_input_require_grads()
    bench.state.optimizer.zero_grad()


def shares(profiled: profile) -> dict[str, float]:
    """The share of a step's seconds in each group of operators."""
    seconds: Counter[str] = Counter()
    for event in profiled.key_averages():
        name = event.key.removeprefix("aten::")
        found = (g for g, starts in GROUPS.items() if any(name.startswith(s) for s in starts))
        seconds[next(found, "the rest")] += event.self_cpu_time_total
    whole = sum(seconds.values())
    return {group: count / whole for group, count in seconds.most_common()}


def main() -> None:
    arguments = parse()
    loaded = load_recipe(arguments.recipe, arguments.overrides)
    recipe = loaded.recipe
    bench = Bench(recipe, arguments.steps)
    samples = bench.samples(1)
    layout = build.layout_of(recipe, bench.vlm)
    data = StepBatch(
        micro_batches=make_batches(samples, layout),
        left_out=[],
        notes=[],
        num_step_samples=len(samples),
        positions=range(len(samples)),
        epoch=0.0,
    )
    first = record(lambda: bench.run(1, data))
    plain = record(lambda: plain_step(bench, samples, rows=arguments.plain_rows))
    language = base_of(bench.adapter.model)
    language.activation_checkpointing_disable()
    necessary = record(lambda: bench.run(2, data))
    if recipe.train.gradient_checkpointing:
        language.activation_checkpointing_enable({"use_reentrant": False})
        language.disable_input_require_grads()
    executed = record(lambda: bench.run(3, data))
    linear, attending = by_kind(necessary)
    speed = speed_of(linear, bench.dtype)
    least = necessary.operations / speed
    taken = []
    bench.run(4, data)
    for step in range(5, 5 + arguments.steps):
        started = time.perf_counter()
        bench.run(step, data)
        taken.append(time.perf_counter() - started)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        bench.run(4, data)
    seconds = statistics.median(taken)
    result = {
        "recipe": str(arguments.recipe),
        "overrides": arguments.overrides,
        "threads": torch.get_num_threads(),
        "tokens": sum(sample.num_tokens for sample in samples),
        "supervised_tokens": sum(sample.num_supervised for sample in samples),
        "operations": {
            "plain": plain.operations,
            "first epoch": first.operations,
            "later epochs": executed.operations,
            "necessary": necessary.operations,
        },
        "products_per_second": speed,
        "attention_per_second": speed_of(attending, bench.dtype),
        "least_seconds": least,
        "step_seconds": seconds,
        "fraction_reached": least / seconds,
        "profile": shares(profiled),
        "largest": [asdict(w) | {"times": n} for w, n in _largest(necessary)],
    }
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


Seen = dict[Product | Attention, int]


def by_kind(recorder: Recorder) -> tuple[Seen, Seen]:
    """The products of linear layers, and attention: its kernels or the batched products of it."""
    linear: Seen = {}
    attending: Seen = {}
    for work, count in recorder.seen.items():
        is_linear = isinstance(work, Product) and not work.is_batched
        (linear if is_linear else attending)[work] = count
    return linear, attending


def speed_of(seen: Seen, dtype: torch.dtype) -> float:
    """Operations a second, each kind of work timed alone."""
    seconds = sum(seconds_alone(work, dtype) * n for work, n in seen.items())
    return sum(work.operations * n for work, n in seen.items()) / seconds


def _largest(recorder: Recorder) -> list[tuple[Product | Attention, int]]:
    by_operations = sorted(recorder.seen.items(), key=lambda item: -item[0].operations * item[1])
    return by_operations[:8]


def report(result: dict[str, Any]) -> None:
    print(f"a step of {result['tokens']} tokens, {result['supervised_tokens']} supervised")
    for name, operations in result["operations"].items():
        print(f"  {name:13} {operations / 1e12:6.3f} tera-operations")
    print(
        f"its products alone: {result['products_per_second'] / 1e9:.0f} giga-operations/s,", end=" "
    )
    print(f"its attention {result['attention_per_second'] / 1e9:.0f}")
    print(f"least {result['least_seconds']:.3f} s, taken {result['step_seconds']:.3f} s:", end=" ")
    print(f"{result['fraction_reached']:.0%} of the limit")
    for group, share in result["profile"].items():
        print(f"  {share:5.1%} {group}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, as for vlmtune train")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--plain-rows", type=int, default=4, help="rows of a plain micro-batch")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
