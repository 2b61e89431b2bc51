"""What a conversation asks and what is right, as metrics and reports take it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from vlmtune.data.media import locate_image
from vlmtune.data.types import Conversation, Image
from vlmtune.errors import ErrorGroup, SampleError

MAX_ERRORS_SHOWN = 20


def check_references(conversations: Sequence[Conversation]) -> None:
    """Raise for conversations without an answer to compare with: a SampleError, or an ErrorGroup of
    the first `MAX_ERRORS_SHOWN`."""
    errors = [
        SampleError(
            "sample has no reference answer",
            file=conversation.source.file,
            line=conversation.source.line,
            got=f"a last turn of role '{conversation.turns[-1].role}' and no `answers`",
            expected="a last turn of role 'assistant', or `answers`",
        )
        for conversation in conversations
        if reference_answer(conversation) is None and not conversation.answers
    ]
    if errors:
        raise errors[0] if len(errors) == 1 else ErrorGroup(errors[:MAX_ERRORS_SHOWN])


def reference_answer(conversation: Conversation) -> str | None:
    last = conversation.turns[-1]
    return last.text.strip() if last.role == "assistant" else None


def question_of(conversation: Conversation) -> str:
    """The text of the last user turn."""
    asked = [turn.text.strip() for turn in conversation.turns if turn.role == "user"]
    return asked[-1] if asked else ""


def picture_name(image: Image) -> str:
    """A picture's full path, or a digest where the data file itself holds the picture."""
    found = locate_image(image)
    return (
        str(found.absolute())
        if isinstance(found, Path)
        else f"sha256:{sha256(found).hexdigest()[:16]}"
    )
