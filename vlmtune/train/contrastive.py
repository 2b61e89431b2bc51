"""Contrastive training: a picture and its text are told from those of the step's other samples.

    micro-batches, no graph    -> embeddings (2, n, D), random state kept
    all processes' embeddings  -> InfoNCE over the whole step -> gradient of each embedding
    micro-batches, with graph, random state replayed -> backward of (embedding . its gradient)

Memory is that of one micro-batch and of (N, N) similarities, whatever the batch size; loss and
gradient are those of one pass with everything in it. InfoNCE: van den Oord et al. 2018 (arXiv
1807.03748, eq. 4), both ways with a learned temperature as in Radford et al. 2021 (arXiv
2103.00020, figure 3); the two passes: gradient caching, Gao et al. 2021 (arXiv 2101.06983).

Deviation: samples with the same picture, or the same text, are no negatives of each other.

Letters: n pairs of this process, N of all processes, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from vlmtune.data.batches import BatchLayout
from vlmtune.data.encode import Encoder
from vlmtune.data.pairs import contrastive_batches, encode_pair
from vlmtune.data.types import ContrastiveBatch, Conversation
from vlmtune.errors import SampleError
from vlmtune.train.checkpoint import random_state, restore_random_state
from vlmtune.train.feed import StepBatch
from vlmtune.train.runtime import prefetch_to_device, to_device
from vlmtune.train.step import reduced_at_last

MAX_SCALE = 100.0
"""Similarities are never multiplied by more (Radford et al. 2021, section 2.5)."""


@dataclass(frozen=True)
class PairLosses:
    """`losses` (N,): the mean of a pair's two cross-entropies; `num_right` counts the pictures and
    texts, of 2 N, whose own partner is more similar than every other."""

    losses: Tensor
    num_right: Tensor


def info_nce(pictures: Tensor, texts: Tensor, keys: Tensor, scale: Tensor) -> PairLosses:
    """InfoNCE, picture to text and text to picture, of embeddings (N, D) of length 1.

    `keys` (N, 2) are integers by which two pairs show the same picture or say the same text; they
    are no negatives of each other. float32.
    """
    logits = scale * pictures @ texts.T  # (N, N)
    same = (keys[:, None] == keys[None]).any(dim=-1)
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -math.inf)
    own = torch.arange(len(logits), device=logits.device)
    there = F.cross_entropy(logits, own, reduction="none")
    back = F.cross_entropy(logits.T, own, reduction="none")
    partner = logits.diagonal()
    as_good = (logits >= partner[:, None]).sum(dim=1), (logits >= partner).sum(dim=0)
    num_right = (as_good[0] == 1).sum() + (as_good[1] == 1).sum()
    return PairLosses((there + back) / 2, num_right)


@dataclass
class Contrastive:
    """The objective; its temperature is learned. `log_scale` (1,) is log(1 / temperature)."""

    initial_temperature: float
    device: torch.device
    unit: str = "pairs"
    tensors: dict[str, nn.Parameter] = field(init=False)
    _accuracy: Tensor | None = None

    def __post_init__(self) -> None:
        start = torch.tensor([-math.log(self.initial_temperature)], device=self.device)
        self.tensors = {"log_scale": nn.Parameter(start)}

    @property
    def temperature(self) -> float:
        return 1.0 / float(self.scale().detach())

    def scale(self) -> Tensor:
        """At most `MAX_SCALE`; the parameter itself is held there before it is used. Clamped in the
        graph, one step beyond would leave it without a gradient, and beyond for ever."""
        log_scale = self.tensors["log_scale"]
        with torch.no_grad():
            log_scale.clamp_(max=math.log(MAX_SCALE))
        return log_scale.exp()

    def num_terms(self, data: StepBatch) -> int:
        return len(data.pair_keys)

    def weight(self, data: StepBatch) -> float:
        return float(len(data.pair_keys))

    def backward(
        self,
        forward: nn.Module,
        data: StepBatch,
        accelerator: Accelerator,
        weight: float | Tensor,
    ) -> Tensor:
        batches = [batch for batch in data.micro_batches if isinstance(batch, ContrastiveBatch)]
        num_pairs = len(data.pair_keys)
        own, states = embed_modalities(forward, batches, num_pairs, accelerator.device)
        after = random_state()
        own.requires_grad_()
        everyone, start = gathered(own, accelerator)
        keys = _gathered_keys(data.pair_keys, accelerator)
        result = info_nce(everyone[0], everyone[1], keys, self.scale())
        # By accelerate: in fp16 the temperature's gradient and that of each embedding are scaled.
        accelerator.backward(result.losses.sum() / weight)
        self._keep_alike(accelerator)
        self._accuracy = result.num_right / (2 * weight)  # read where it is logged
        assert own.grad is not None
        on_device = prefetch_to_device(batches, accelerator.device)
        for number, (batch, state) in enumerate(zip(on_device, states, strict=True)):
            restore_random_state(state)
            with reduced_at_last(forward, accelerator, number=number, of=len(batches)):
                embeddings = forward(batch.inputs, batch.last)  # (B, D)
                wanted = torch.zeros_like(embeddings)
                if batch.pairs:
                    wanted = own.grad[batch.modality, list(batch.pairs)]
                # Every process has the whole loss; DDP takes the mean over processes. `wanted`
                # holds fp16's loss scale already.
                ((embeddings * wanted).sum() * accelerator.num_processes).backward()
        restore_random_state(after)
        losses = result.losses.detach()[start : start + num_pairs]
        return _by_micro_batch(losses, batches)

    def _keep_alike(self, accelerator: Accelerator) -> None:
        """Each process has the gradient of the whole loss; a rounding apart, they would drift."""
        if accelerator.num_processes > 1:
            for parameter in self.tensors.values():
                parameter.grad = accelerator.reduce(parameter.grad, "mean")

    def log(self) -> dict[str, float]:
        accuracy = 0.0 if self._accuracy is None else float(self._accuracy)
        return {"temperature": self.temperature, "in_batch_accuracy": accuracy}


@torch.no_grad()
def embed_modalities(
    forward: nn.Module, batches: Sequence[ContrastiveBatch], num_pairs: int, device: torch.device
) -> tuple[Tensor, list[dict[str, object]]]:
    """The embeddings of both sides, (2, n, D), and the random state before each micro-batch."""
    states, found = [], []
    for batch in batches:
        states.append(random_state())
        on_device = to_device(batch, device)  # one at a time: the step's pictures may be many
        found.append(forward(on_device.inputs, on_device.last))
    own = found[0].new_zeros((2, num_pairs, found[0].shape[-1]))
    for batch, embeddings in zip(batches, found, strict=True):
        if batch.pairs:
            own[batch.modality, list(batch.pairs)] = embeddings
    return own, states


def gathered(own: Tensor, accelerator: Accelerator) -> tuple[Tensor, int]:
    """All processes' embeddings (2, N, D) in order of rank, and where `own` (2, n, D) starts in
    them. A gradient reaches `own` alone. A collective."""
    if accelerator.num_processes == 1:
        return own, 0
    counts = accelerator.gather(torch.tensor([own.shape[1]], device=own.device)).tolist()
    padded = accelerator.pad_across_processes(own.detach(), dim=1)
    everyone = accelerator.gather(padded[None])  # (processes, 2, most pairs, D)
    parts = [everyone[rank, :, :count] for rank, count in enumerate(counts)]
    parts[accelerator.process_index] = own
    return torch.cat(parts, dim=1), sum(counts[: accelerator.process_index])


def _gathered_keys(keys: Sequence[tuple[int, int]], accelerator: Accelerator) -> Tensor:
    """(N, 2) int64, in the order of `gathered`."""
    own = torch.tensor(list(keys), dtype=torch.int64, device=accelerator.device).reshape(-1, 2)
    if accelerator.num_processes == 1:
        return own
    counts = accelerator.gather(torch.tensor([len(own)], device=own.device)).tolist()
    everyone = accelerator.gather(accelerator.pad_across_processes(own, dim=0)[None])
    return torch.cat([everyone[rank, :count] for rank, count in enumerate(counts)])


def _by_micro_batch(losses: Tensor, batches: Sequence[ContrastiveBatch]) -> Tensor:
    """The losses (n,) of this process as sums per micro-batch: half with each side of a pair."""
    sums = [losses[list(batch.pairs)].sum() / 2 for batch in batches]
    return torch.stack(sums)


@torch.no_grad()
def contrastive_loss(
    forward: nn.Module,
    conversations: Sequence[Conversation],
    *,
    temperature: float,
    prompt: str,
    batch_size: int,
    encoder: Encoder,
    accelerator: Accelerator,
    layout: BatchLayout,
) -> Mapping[str, float]:
    """`loss` (nats per pair) and `in_batch_accuracy` on held-out samples, told apart within chunks
    of `batch_size` in their order, the same for any number of processes. `skipped`: samples that
    could not be used. Contains one collective."""
    sums = torch.zeros(4, dtype=torch.float64)  # loss, right, pairs, skipped
    chunks = [conversations[i : i + batch_size] for i in range(0, len(conversations), batch_size)]
    scale = torch.tensor(1.0 / temperature, device=accelerator.device)
    for chunk in chunks[accelerator.process_index :: accelerator.num_processes]:
        pairs = []
        for conversation in chunk:
            try:
                pairs.append(encode_pair(encoder, conversation, prompt=prompt))
            except SampleError:
                sums[3] += 1
        if not pairs:
            continue
        batches = contrastive_batches(pairs, layout=layout)
        with accelerator.autocast():
            own, _ = embed_modalities(forward, batches, len(pairs), accelerator.device)
        keys = torch.tensor([(p.picture_key, p.text_key) for p in pairs], device=own.device)
        result = info_nce(own[0], own[1], keys, scale)
        sums += torch.tensor([float(result.losses.sum()), float(result.num_right), len(pairs), 0])
    everywhere = accelerator.reduce(sums.to(accelerator.device), "sum")
    loss, right, num_pairs, skipped = everywhere.tolist()
    values: dict[str, float] = {}
    if num_pairs:
        values = {"loss": loss / num_pairs, "in_batch_accuracy": right / (2 * num_pairs)}
    return values | ({"skipped": skipped} if skipped else {})
