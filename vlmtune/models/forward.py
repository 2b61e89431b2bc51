"""The one place that calls the model in training: the summed loss at supervised positions only.

    hidden states (S, D) -> a chunk of rows -> output layer -> logits (C, V) -> cross-entropy
                                                  -> gradient of the rows, kept; logits dropped

S supervised tokens, C of a chunk, D width, V vocabulary.

    inputs (B, T) -> backbone -> hidden states (B, T, D) -> rows that are supervised (S, D)
                  -> lm_head, cross-entropy, some rows at a time -> summed loss

The full (B, T, V) tensor, the largest of a step with a large vocabulary, is never made. Letters:
B rows, T tokens of the longest row, S supervised tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from vlmtune.data.types import Batch
from vlmtune.errors import VlmtuneError
from vlmtune.models.families import Family, part_of
from vlmtune.models.packing import pack_arguments

if TYPE_CHECKING:
    from vlmtune.models.vision import VisionFeatures


CHUNK_NUMBERS = {"cpu": 2**22}
LARGE_CHUNK_NUMBERS = 2**24
"""Logits at once. 16 MB in float32 stay in a CPU's cache: 1,000 rows of 8,192 took 49 ms, as a
whole 112 ms; elsewhere 64 MB."""


def summed_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the supervised tokens of -weight log p(target), in nats, float32.

    `logits` (S, V), `targets` (S,), `weights` (S,) or None where each is 1. With S = 0 it is 0 and
    still a function of `logits`, so that a micro-batch without a supervised token stays in the
    graph.
    """
    if targets.numel() == 0:
        return logits.sum() * 0.0
    if weights is None:
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def chunked_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    chunk_rows: int,
) -> Tensor:
    """`summed_cross_entropy(head(hidden), targets, weights)`, of which never more than `chunk_rows`
    rows of logits are there at once.

    `hidden` (S, D). The gradients are computed with the loss, chunk by chunk, and only scaled in
    the backward pass: nothing is computed twice.
    """
    if _takes_liger(head, hidden, targets, weights):
        return _liger_loss(head, hidden, targets)
    if len(targets) <= chunk_rows:
        return summed_cross_entropy(head(hidden), targets, weights)
    trained = [p for p in head.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        return torch.stack(
            [_loss_of(head, hidden, targets, weights, rows) for rows in _chunks(hidden, chunk_rows)]
        ).sum()
    loss: Tensor = _Chunked.apply(head, chunk_rows, targets, weights, hidden, *trained)
    return loss


def chunk_rows_of(vocabulary: int, device_type: str) -> int:
    """Rows of logits at once for an output layer of so many tokens."""
    return max(16, CHUNK_NUMBERS.get(device_type, LARGE_CHUNK_NUMBERS) // vocabulary)


def _takes_liger(head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None) -> bool:
    """Whether Liger's fused kernel computes this loss: CUDA, a plain output layer, tokens that
    all count 1, and the package is installed."""
    return (
        hidden.device.type == "cuda"
        and type(head) is nn.Linear
        and weights is None
        and targets.numel() > 0
        and find_spec("liger_kernel") is not None
    )


def _liger_loss(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same sum by Liger (Hsu et al. 2024, arXiv 2410.10989). Not run on a GPU yet."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    loss: Tensor = fused(head.weight, hidden.to(head.weight.dtype), targets, head.bias)
    return loss.float()


class _Chunked(torch.autograd.Function):
    """The loss of all chunks, and the gradients of `hidden` and of the head's trained tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        chunk_rows: int,
        targets: Tensor,
        weights: Tensor | None,
        hidden: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[4] else None
        of_trained = [torch.zeros_like(p) for p in trained]
        for rows in _chunks(hidden, chunk_rows):
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_(of_hidden is not None)
                some = None if weights is None else weights[rows]
                loss = summed_cross_entropy(head(part), targets[rows], some)
            wanted = [*([part] if of_hidden is not None else []), *trained]
            gradients = list(torch.autograd.grad(loss, wanted))
            if of_hidden is not None:
                of_hidden[rows] = gradients.pop(0)
            for kept, gradient in zip(of_trained, gradients, strict=True):
                kept += gradient
            total += loss.detach()
        ctx.gradients = (of_hidden, *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        # In float32: in the gradient's 16 bit the scale would be off by up to 0.39 %, and fp16 has
        # no number for a loss scale of 65536.
        scaled = [None if g is None else (g.float() * scale).to(g.dtype) for g in ctx.gradients]
        ctx.gradients = None
        return None, None, None, None, *scaled


def _loss_of(
    head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None, rows: slice
) -> Tensor:
    some = None if weights is None else weights[rows]
    return summed_cross_entropy(head(hidden[rows]), targets[rows], some)


def _chunks(hidden: Tensor, chunk_rows: int) -> list[slice]:
    return [slice(start, start + chunk_rows) for start in range(0, len(hidden), chunk_rows)]


def total_weight(targets: Tensor, weights: Tensor | None) -> float:
    """What the sum above is divided by: the weights of its terms, summed in float64; their number
    where each is 1."""
    return float(targets.numel() if weights is None else weights.sum(dtype=torch.float64))


MEDIA_PARTS = ("vision", "connector")


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_name(name: str) -> str:
    """A parameter's name in the transformers model, from its name in a PEFT wrapper."""
    return name.removeprefix("base_model.model.")


class SupervisedForward(nn.Module):
    """The trained model behind `forward(batch) -> loss`: the sum of the supervised tokens'
    cross-entropies, each counting by its weight, in nats, float32.

    A micro-batch without a picture leaves the vision part out of the graph; its trained tensors
    then enter with weight zero, so that every process sends the same gradients (DDP would wait for
    the missing ones for ever).

    `features`: what makes the features of pictures where the vision tower is frozen; None: the
    model itself, in each forward pass.
    """

    def __init__(
        self, model: nn.Module, family: Family, features: VisionFeatures | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.features = features
        base = base_of(model)
        for name in ("model", "lm_head"):
            if not hasattr(base, name):
                raise VlmtuneError(
                    f"the model class {type(base).__name__} has no `{name}`",
                    expected="a transformers …ForConditionalGeneration with `model` and `lm_head`",
                )
        self._media_names = trained_media_names(base, family)
        self._vocabulary = int(base.config.get_text_config().vocab_size)

    def forward(self, batch: Batch) -> Tensor:
        base = base_of(self.model)
        loss = chunked_cross_entropy(
            base.lm_head,
            self._hidden(batch),
            batch.targets,
            batch.weights,
            chunk_rows=chunk_rows_of(self._vocabulary, batch.targets.device.type),
        )
        if self._media_names and not has_media(batch.inputs):
            loss = loss + media_zero(base, self._media_names)
        return loss

    def logits(self, batch: Batch) -> Tensor:
        """The logits (S, V), float32, at the supervised positions."""
        return base_of(self.model).lm_head(self._hidden(batch)).float()

    def _hidden(self, batch: Batch) -> Tensor:
        """The last hidden states (S, D) at the supervised positions."""
        base = base_of(self.model)
        arguments: dict[str, Any] = dict(batch.inputs)
        if self.features is not None and has_media(batch.inputs):
            made, arguments = self.features.outputs(batch.inputs, batch.media_keys)
            arguments["mm_encoder_outputs"] = made
        if batch.lengths is not None:
            arguments |= pack_arguments(base.model, batch.inputs, batch.lengths, self.family)
        # use_cache=False: with a cache, packed or padded rows are not isolated (and it costs).
        hidden = base.model(**arguments, use_cache=False).last_hidden_state  # (B, T, D)
        assert batch.positions is not None
        return hidden.flatten(0, 1).index_select(0, batch.positions)


def trained_media_names(base: nn.Module, family: Family) -> list[str]:
    """The trained tensors of the vision tower and the connector, by name."""
    return [
        name
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and part_of(name, family) in MEDIA_PARTS
    ]


def media_zero(base: nn.Module, names: Sequence[str]) -> Tensor:
    """0, as a function of the tensors called `names`: they stay in the graph."""
    tensors = [base.get_parameter(name) for name in names]
    return torch.stack([t.flatten()[0].float() for t in tensors]).sum() * 0.0


def has_media(inputs: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("pixel_values") for name in inputs)


def full_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's own logits at every position, (B, T, V): the reference `SupervisedForward` is
    held against before training and in tests."""
    return base_of(model)(**inputs, use_cache=False).logits.float()


def set_gradient_checkpointing(model: nn.Module, family: Family) -> list[str]:
    """Switch on non-reentrant activation checkpointing in the parts that train; returns them.

    A frozen vision tower is left out: it keeps no activations for a backward pass, so recomputing
    it would cost time and save nothing. No hook makes embeddings ask for gradients: the
    non-reentrant kind needs none, and a frozen tower would record its graph.
    """
    base = base_of(model)
    trained = {part_of(n, family) for n, p in base.named_parameters() if p.requires_grad}
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()
    parts = {"language"}
    if trained & set(MEDIA_PARTS):
        parts |= {"vision", "connector"}
    switched = set()
    for name, module in base.named_modules():
        if not hasattr(module, "gradient_checkpointing"):
            continue
        part = part_of(name, family)
        if part in MEDIA_PARTS and part not in parts:
            module.gradient_checkpointing = False
        elif part is not None:
            switched.add(part)
    return sorted(switched)
