"""The tokens by which given texts would answer a conversation: those that training supervises.

    conversation + text -> chat template -> tokenizer, one token a picture -> label mask -> tokens

No picture is opened. Texts are tokenised in their place in the conversation, since a token at a
text's start or end may depend on what stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vlmtune.data.masks import MaskError, label_targets
from vlmtune.data.placed import placed
from vlmtune.data.template import ChatTemplate, Rendered, TemplateError, special_tokens
from vlmtune.data.text import shorten
from vlmtune.data.types import IGNORED, Conversation, Source, Text, Turn
from vlmtune.errors import SampleError, VlmtuneError


class AnswerTokenizer:
    """Turns texts into answers' tokens with one processor."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer = processor.tokenizer
        self._template = ChatTemplate(processor)
        self._reserved = special_tokens(processor.tokenizer) | {processor.image_token}

    def prompt_text(self, conversation: Conversation) -> str:
        """The conversation as text up to where the last answer starts, one token a picture.

        Where it is the same, texts have the same tokens.
        """
        try:
            return self._template.render_prompt(_asked(conversation))
        except TemplateError as error:
            raise placed(error, conversation.source) from error

    def answers(
        self,
        conversation: Conversation,
        texts: Sequence[str],
        *,
        sources: Sequence[Source] | None = None,
    ) -> list[torch.Tensor]:
        """The tokens (n,) of each text as the last answer, its end-of-turn token included.

        `sources` say where the texts stand, by default where the conversation does. Raises
        SampleError where a text cannot be taught there, or where the tokens before it are not
        those of the prompt alone, so that its probability after that prompt is not defined.
        """
        prompt, _ = self._tokenize(self.prompt_text(conversation))
        if sources is None:
            sources = [conversation.source] * len(texts)
        return [
            self._answer(replace(conversation, source=source), text, prompt)
            for text, source in zip(texts, sources, strict=True)
        ]

    def _answer(self, conversation: Conversation, text: str, prompt: list[int]) -> torch.Tensor:
        found = next((token for token in self._reserved if token and token in text), None)
        if found is not None:
            error = VlmtuneError("a text holds a control token of the model", got=found)
            raise placed(error, conversation.source)
        try:
            rendered = self._template.render([*_asked(conversation), _answer_turn(text)])
            ids, offsets = self._tokenize(rendered.text)
            targets = label_targets(
                Rendered(rendered.text, rendered.spans[-1:]),
                offsets,
                torch.tensor(ids),
                end_token=self._template.end_token,
                tokenizer=self._tokenizer,
            ).targets
        except (TemplateError, MaskError) as error:
            raise placed(error, conversation.source) from error
        positions = (targets != IGNORED).nonzero().flatten()  # (n,)
        if ids[: int(positions[0]) + 1] != prompt:
            raise SampleError(
                "the tokens before an answer depend on the answer",
                file=conversation.source.file,
                line=conversation.source.line,
                got=repr(shorten(text)),
                expected="the prompt's own tokens before it",
                do="rewrite the text's start",
            )
        return targets[positions]

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        bos = self._tokenizer.bos_token
        encoded = self._tokenizer(
            text,
            # A template that writes the BOS token itself must not get a second one.
            add_special_tokens=bos is None or not text.startswith(bos),
            return_offsets_mapping=True,
            verbose=False,
        )
        return encoded["input_ids"], encoded["offset_mapping"]


def without_images(conversation: Conversation) -> Conversation:
    """The conversation with its texts only."""
    turns = tuple(
        Turn(turn.role, tuple(p for p in turn.parts if isinstance(p, Text)) or (Text(""),))
        for turn in conversation.turns
    )
    return replace(conversation, turns=turns)


def _asked(conversation: Conversation) -> tuple[Turn, ...]:
    turns = conversation.turns
    return turns[:-1] if turns[-1].role == "assistant" else turns


def _answer_turn(text: str) -> Turn:
    return Turn("assistant", (Text(text),))
