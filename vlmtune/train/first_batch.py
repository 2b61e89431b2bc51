"""The micro-batch that a model is tried on before it is trained.

samples from all over the data -> the first usable one, with a picture where there is one -> batch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain

from vlmtune.data.batches import BatchLayout, make_batch
from vlmtune.data.dataset import ConversationSet
from vlmtune.data.encode import Encoder
from vlmtune.data.formats.rows import check_trainable
from vlmtune.data.pairs import encode_pair, side_batches
from vlmtune.data.stream import OpenStream, Stream
from vlmtune.data.types import Batch, Conversation, SideBatch
from vlmtune.errors import SampleError, VlmtuneError, plural

LOOKED_OVER = 1000
"""Samples that are looked at before training: has one a picture, which is the first to encode."""

TrainingData = ConversationSet | Stream


def looked_over(data: TrainingData, problems: list[SampleError]) -> Iterator[Conversation]:
    """Up to `LOOKED_OVER` samples from all over the data; of those that cannot be read, the errors
    are added to `problems`."""
    if isinstance(data, Stream):
        opened = OpenStream(data)
        unread = (opened.take().conversation for _ in range(LOOKED_OVER))
        return _readable(unread, problems)
    apart = math.ceil(len(data) / LOOKED_OVER)
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
) -> Batch | SideBatch:
    """A micro-batch of the first usable sample, one with a picture or a video where there is one;
    with an embedding prompt, of its picture side.

    Raises a sample's SampleError where none is usable, and with `needs_media` a
    VlmtuneError where none has a picture or a video.
    """
    problems: list[SampleError] = []

    def batch_of(conversation: Conversation) -> Batch | SideBatch | None:
        try:
            if embedding_prompt is not None:
                pair = encode_pair(encoder, conversation, prompt=embedding_prompt)
                return side_batches([pair], layout=layout)[0]
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
        looked_over(data, unreadable), _every_sample(data) if needs_media else ()
    ):
        num_looked_at += 1
        if not (conversation.images or conversation.videos):
            if len(without_media) < LOOKED_OVER:
                without_media.append(conversation)
        elif (batch := batch_of(conversation)) is not None:
            return batch
        elif len(problems) == LOOKED_OVER:
            break
    if needs_media and not problems and num_looked_at:
        raise VlmtuneError(
            "modules of the vision tower or the connector are trained, but no sample has a picture "
            "or a video",
            got=f"{plural(num_looked_at, 'sample')} looked at",
            do="leave them out of lora_target and modules_to_save",
        )
    for conversation in () if needs_media else without_media:
        if (batch := batch_of(conversation)) is not None:
            return batch
    raise (problems or unreadable)[0]
