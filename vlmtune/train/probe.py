"""A look at one micro-batch before the first step: is the forward pass right, what gets a gradient?

samples from all over the data -> the first usable one, with a picture where there is one -> batch

Both are found in seconds here and not at all otherwise: a model whose logits are scaled after
`lm_head` would train on wrong ones, and an adapter on a layer that the model does not use (LLaVA
takes features from the last layer but one) would stay as it was for the whole run.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from vlmtune.data.batches import BatchLayout, make_batch
from vlmtune.data.dataset import ConversationSet
from vlmtune.data.encode import Encoder
from vlmtune.data.formats.base import check_trainable
from vlmtune.data.pairs import contrastive_batches, encode_pair
from vlmtune.data.stream import OpenStream, Stream
from vlmtune.data.types import Batch, ContrastiveBatch, Conversation
from vlmtune.errors import SampleError, VlmtuneError, plural
from vlmtune.models.forward import SupervisedForward, base_of, full_logits

MAX_PROBED = 1000
"""How many samples are read to find a usable one, with a picture if there is one."""

TrainingData = ConversationSet | Stream


def sample_evenly(data: TrainingData, problems: list[SampleError]) -> Iterator[Conversation]:
    """Up to `MAX_PROBED` samples from all over the data; of those that cannot be read, the errors
    are added to `problems`."""
    if isinstance(data, Stream):
        opened = OpenStream(data)
        unread = (opened.take().conversation for _ in range(MAX_PROBED))
        return _readable(unread, problems)
    apart = math.ceil(len(data) / MAX_PROBED)
    numbers = range(0, len(data), apart)
    return _readable((partial(data.__getitem__, at) for at in numbers), problems)


def _every_sample(data: TrainingData) -> Iterator[Conversation]:
    """All that can be read, in the order of the files; of a stream, which may be without end,
    none."""
    if isinstance(data, Stream):
        return iter(())
    return _readable((partial(data.__getitem__, at) for at in range(len(data))), [])


def _readable(
    unread: Iterable[Callable[[], Conversation]], problems: list[SampleError]
) -> Iterator[Conversation]:
    for read in unread:
        try:
            yield read()
        except SampleError as error:
            problems.append(error)


def first_batch(
    data: TrainingData,
    encoder: Encoder,
    layout: BatchLayout,
    *,
    needs_media: bool,
    embedding_prompt: str | None = None,
) -> Batch | ContrastiveBatch:
    """A micro-batch of the first usable sample, one with a picture or a video where there is one;
    with an embedding prompt, of its picture side.

    Raises a sample's SampleError where none is usable, and with `needs_media` a
    VlmtuneError where none has a picture or a video.
    """
    problems: list[SampleError] = []

    def batch_of(conversation: Conversation) -> Batch | ContrastiveBatch | None:
        try:
            if embedding_prompt is not None:
                pair = encode_pair(encoder, conversation, prompt=embedding_prompt)
                return contrastive_batches([pair], layout=layout)[0]
            check_trainable(conversation)
            return make_batch([encoder.encode(conversation)], layout)
        except SampleError as error:
            problems.append(error)
            return None

    num_looked_at = 0
    unreadable: list[SampleError] = []
    without_media: list[Conversation] = []
    # Where modules want a picture, one is looked for as long as there may be one.
    for conversation in chain(
        sample_evenly(data, unreadable), _every_sample(data) if needs_media else ()
    ):
        num_looked_at += 1
        if not (conversation.images or conversation.videos):
            if len(without_media) < MAX_PROBED:
                without_media.append(conversation)
        elif (batch := batch_of(conversation)) is not None:
            return batch
        elif len(problems) == MAX_PROBED:
            break
    if needs_media and not problems and num_looked_at:
        raise VlmtuneError(
            "modules of the vision tower or the connector are trained, but no sample has a picture "
            "or a video",
            got=f"{plural(num_looked_at, 'sample')} read",
            do="remove them from lora_target and modules_to_save",
        )
    for conversation in () if needs_media else without_media:
        if (batch := batch_of(conversation)) is not None:
            return batch
    raise (problems or unreadable)[0]


log = logging.getLogger("vlmtune")

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

IN_FRONT, PROBED = range(8, 20), range(1, 8)
"""Token ids of two made-up samples."""


def check_forward(forward: SupervisedForward, batch: Batch, dtype: torch.dtype) -> float:
    """Compare logits at supervised positions with the model's own; the largest difference relative
    to the largest logit. Raises `VlmtuneError` where they are not the same."""
    was_training = forward.training
    forward.eval()
    with torch.no_grad():
        ours = forward.logits(batch)
        reference = own_logits(forward.model, batch)
    forward.train(was_training)
    scale = reference.abs().max().clamp_min(1e-6)
    difference = float((ours - reference).abs().max() / scale)
    if not difference <= RELATIVE_TOLERANCE[dtype]:
        raise VlmtuneError(
            "this model class changes its logits after lm_head; training it would be wrong",
            got=f"a relative difference of {difference:.2g}",
            expected=f"at most {RELATIVE_TOLERANCE[dtype]:.0e}",
            do="report the model's class; it needs a family of its own",
        )
    return difference


def check_packs(forward: SupervisedForward, batch: Batch, dtype: torch.dtype) -> None:
    """Raise `VlmtuneError` where a sample's logits change with the one packed in front of it.

    A language model that does not hand `pack_lengths` or positions on to its attention, of which
    no config tells, would train on wrong ones. `batch`, a pack, tells what the model is given
    besides token ids; the samples are made up.
    """
    names = [n for n, t in batch.inputs.items() if t.shape == batch.inputs["input_ids"].shape]
    device = batch.targets.device

    def made_up(*ids: range) -> Batch:
        together = torch.tensor([token for some in ids for token in some], device=device)
        fields = {name: torch.zeros_like(together)[None] for name in names}
        supervised = torch.zeros_like(together, dtype=torch.bool)
        supervised[-len(ids[-1]) :] = True
        return Batch(
            inputs=fields | {"input_ids": together[None]},
            supervised=supervised[None],
            targets=together[supervised],
            sample_ids=("",) * len(ids),
            num_tokens=len(together),
            num_images=0,
            lengths=tuple(len(some) for some in ids),
        )

    was_training = forward.training
    forward.eval()
    with torch.no_grad():
        alone = forward.logits(made_up(PROBED))
        behind = forward.logits(made_up(IN_FRONT, PROBED))
    forward.train(was_training)
    difference = float((behind - alone).abs().max() / alone.abs().max().clamp_min(1e-6))
    if not difference <= RELATIVE_TOLERANCE[dtype]:
        raise VlmtuneError(
            "this model does not keep packed samples apart",
            got=f"logits that change with the sample in front by {difference:.2g} of the largest",
            expected=f"at most {RELATIVE_TOLERANCE[dtype]:.0e}",
            do="set train.packing: false",
        )


def own_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own logits at the supervised positions, (S, V).

    Those of other positions are not asked for where the model's class has `logits_to_keep`: of a
    long sample and a large vocabulary they take gigabytes, more than any step after.
    """
    if "logits_to_keep" not in inspect.signature(base_of(model).forward).parameters:
        return full_logits(model, batch.inputs)[batch.supervised]
    columns = batch.supervised.any(0).nonzero().flatten()  # positions supervised in any row
    kept = full_logits(model, {**batch.inputs, "logits_to_keep": columns})
    return kept[batch.supervised[:, columns]]


def freeze_unreached(
    forward: nn.Module, batch: Batch | ContrastiveBatch, parameters: Mapping[str, nn.Parameter]
) -> list[str]:
    """Freeze the trained tensors that get no gradient from `batch`, say so, return their names.

    Raises `VlmtuneError` where none gets one. Leaves the random state as it was.
    """
    was_training = forward.training
    forward.eval()
    with torch.random.fork_rng(devices=[]):
        if isinstance(batch, ContrastiveBatch):
            forward(batch.inputs, batch.last).sum().backward()
        else:
            forward(batch).backward()
    forward.train(was_training)
    unreached = [name for name, p in parameters.items() if p.grad is None]
    for parameter in parameters.values():
        parameter.grad = None
    if len(unreached) == len(parameters):
        raise VlmtuneError("no trained tensor gets a gradient", got=unreached[:5])
    for name in unreached:
        parameters[name].requires_grad_(False)
    if unreached:
        log.warning(
            "%d of %d trained tensors get no gradient, as the model does not use them; "
            "they stay unchanged: %s%s",
            len(unreached),
            len(parameters),
            ", ".join(unreached[:3]),
            ", …" if len(unreached) > 3 else "",
        )
    return unreached
