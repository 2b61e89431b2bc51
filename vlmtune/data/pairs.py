"""The two sides of a sample for retrieval: its pictures, and its answer, each with a prompt.

    conversation -> picture side: pictures + prompt       -> Encoder.encode_prompt
                 -> text side:    last answer + prompt    -> Encoder.encode_prompt
                 -> keys that tell whether two samples show the same picture or say the same text

The question of the sample is on neither side: what is compared is the picture and the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Literal

import torch

from vlmtune.data.batches import BatchLayout, collate, plan_padded
from vlmtune.data.encode import Encoder
from vlmtune.data.media import content_digest
from vlmtune.data.types import (
    ContrastiveBatch,
    Conversation,
    Image,
    Part,
    Sample,
    Source,
    Text,
    Turn,
)
from vlmtune.errors import SampleError, VlmtuneError


@dataclass(frozen=True)
class ImageTextPair:
    """A sample's two sides, encoded; pairs with an equal key show the same picture, or say the
    same text. Keys are 63 bits of a digest: they travel between processes as integers."""

    picture: Sample
    text: Sample
    picture_key: int
    text_key: int

    @property
    def id(self) -> str:
        return self.picture.id

    @property
    def source(self) -> Source:
        return self.picture.source

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.picture.notes, *self.text.notes)


def encode_pair(encoder: Encoder, conversation: Conversation, *, prompt: str) -> ImageTextPair:
    """Both sides of a sample. Raises SampleError where one is missing or cannot be encoded."""
    return ImageTextPair(
        encoder.encode_prompt(picture_side(conversation, prompt=prompt)),
        encoder.encode_prompt(text_side(conversation, prompt=prompt)),
        _as_integer(picture_key(conversation)),
        _as_integer(sha256(text_key(conversation).encode()).hexdigest()),
    )


def contrastive_batches(
    pairs: Sequence[ImageTextPair], *, layout: BatchLayout
) -> list[ContrastiveBatch]:
    """Micro-batches within the token budget: the pictures of `pairs`, then their texts, in padded
    rows."""
    batches = []
    modalities: tuple[Literal[0, 1], ...] = (0, 1)
    for modality in modalities:
        samples = [pair.picture if modality == 0 else pair.text for pair in pairs]
        lengths = [sample.num_tokens for sample in samples]
        for rows in plan_padded(lengths, [0] * len(samples), budget=layout.budget):
            batch = collate(
                [samples[row] for row in rows],
                pad_token_id=layout.pad_token_id,
                image_batching=layout.image_batching,
            )
            batches.append(
                ContrastiveBatch(
                    inputs=batch.inputs,
                    last=torch.tensor([samples[row].num_tokens - 1 for row in rows]),
                    modality=modality,
                    pairs=tuple(rows),
                    sample_ids=batch.sample_ids,
                    num_tokens=batch.num_tokens,
                    num_images=batch.num_images,
                )
            )
    return batches


def picture_side(conversation: Conversation, *, prompt: str) -> Conversation:
    """One user turn: the conversation's pictures, then `prompt`. Raises SampleError without one."""
    if not conversation.images:
        raise _error(conversation, "there is no picture to embed")
    return _asked(conversation, (*conversation.images, Text(prompt)))


def text_side(conversation: Conversation, *, prompt: str) -> Conversation:
    """One user turn: the last answer, a line break, then `prompt`. Raises SampleError without
    one."""
    return _asked(conversation, (Text(f"{text_of(conversation)}\n{prompt}"),))


def text_of(conversation: Conversation) -> str:
    """The text of the last assistant turn. Raises SampleError where the last turn is another."""
    last = conversation.turns[-1]
    if last.role != "assistant":
        raise _error(conversation, "there is no answer to embed")
    return last.text.strip()


def text_key(conversation: Conversation) -> str:
    """The same for two samples with the same answer."""
    return text_of(conversation)


def picture_key(conversation: Conversation) -> str:
    """The same for two samples whose pictures have the same content: a digest of their bytes.

    Raises SampleError for a picture that is not there.
    """
    digest = sha256()
    for image in conversation.images:
        digest.update(bytes.fromhex(_content_digest(image, conversation)))
    return digest.hexdigest()


def _as_integer(digest: str) -> int:
    return int(digest[:16], 16) >> 1


def _content_digest(image: Image, conversation: Conversation) -> str:
    try:
        return content_digest(image)
    except VlmtuneError as error:
        raise _error(conversation, error.message, got=error.got) from error


def _asked(conversation: Conversation, parts: tuple[Part, ...]) -> Conversation:
    return replace(conversation, turns=(Turn("user", parts),), answers=(), options=())


def _error(conversation: Conversation, message: str, *, got: object = None) -> SampleError:
    return SampleError(message, at=conversation.source, got=got)
