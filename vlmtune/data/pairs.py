"""The two sides of a sample for retrieval: its pictures, and its answer, each with a prompt.

    conversation -> picture side: pictures + prompt       -> Encoder.encode_prompt
                 -> text side:    last answer + prompt    -> Encoder.encode_prompt
                 -> keys that tell whether two samples show the same picture or say the same text

The question of the sample is on neither side: what is compared is the picture and the text.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from vlmtune.data.media import locate_image
from vlmtune.data.types import Conversation, Image, Part, Text, Turn
from vlmtune.errors import SampleError, VlmtuneError


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
        digest.update(sha256(_bytes(image, conversation)).digest())
    return digest.hexdigest()


def _bytes(image: Image, conversation: Conversation) -> bytes:
    try:
        found = locate_image(image)
        return found.read_bytes() if isinstance(found, Path) else found
    except VlmtuneError as error:
        raise _error(conversation, error.message, got=error.got) from error
    except OSError as error:
        raise _error(conversation, f"the picture cannot be read ({error.strerror})") from error


def _asked(conversation: Conversation, parts: tuple[Part, ...]) -> Conversation:
    return replace(conversation, turns=(Turn("user", parts),), answers=(), options=())


def _error(conversation: Conversation, message: str, *, got: object = None) -> SampleError:
    return SampleError(
        message, file=conversation.source.file, line=conversation.source.line, got=got
    )
