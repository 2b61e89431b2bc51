"""Where the assistant's words stand in a rendered chat template.

    turns -> the template with each answer replaced by a marker -> the constant text around the
    answers -> the same template with the real answers, walked along that text -> spans

Nothing about a template is assumed: whether it takes a turn's content as parts or as a string,
what follows an answer (`end_of_turn`), and what stands between the generation prompt and an answer
(`lead`), are read off a probe at the start.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from vlmtune.data.types import Image, Text, Turn
from vlmtune.errors import VlmtuneError, shorten

logger = logging.getLogger("vlmtune")

STRIPPED = "white space around an answer removed by the chat template"
_MARKER = "Xq7{salt}A{index}Z7qX"
_PROBE = "Xq7Z7qX"


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the rendered text that are supervised for one assistant turn.

    With `end_is_rendered` they include the end-of-turn token; without, the template puts none,
    and the end is taught as the target of the answer's last token. `weight` is the turn's.
    """

    start: int
    end: int
    end_is_rendered: bool
    weight: float = 1.0


@dataclass(frozen=True)
class Rendered:
    text: str
    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()


class TemplateError(VlmtuneError):
    """The chat template refuses or changes the turns; the caller adds the place."""


class ChatTemplate:
    """A processor's chat template with what a probe tells about it.

    `lead` is what an answer starts with after the generation prompt (a space, mostly nothing);
    `end_token` is the token that ends a turn, `end_of_turn` the characters up to its end, or None
    where the template writes none (LLaVA 1.5).
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._video_token = getattr(processor, "video_token", None) or ""
        tokenizer = processor.tokenizer
        probe = (Turn("user", (Text("Hi"),)), Turn("assistant", (Text(_PROBE),)))
        self._takes_parts = True
        if not self._reads_parts(probe):
            self._takes_parts = False
        full = self._render(probe, add_generation_prompt=False)
        before, marker, tail = full.partition(_PROBE)
        if not marker:
            raise VlmtuneError("the chat template leaves the assistant's text out")
        self.lead = self._find_lead(before, self.render_prompt(probe[:1]))
        self.end_of_turn, end_token = _find_end(tail, special_tokens(tokenizer))
        if end_token is None:
            end_token = tokenizer.eos_token
            if end_token is None:
                raise VlmtuneError(
                    "neither the chat template nor the tokenizer says how a turn ends",
                    expected="an end-of-turn token in the template, or tokenizer.eos_token",
                )
            logger.info(
                "the chat template writes no end-of-turn token; each answer is taught to end in %s",
                end_token,
            )
        self.end_token: str = end_token

    def render_prompt(self, turns: Sequence[Turn]) -> str:
        """The turns as text, ending where the model starts to answer."""
        return self._render(turns, add_generation_prompt=True)

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The turns as text, with the span of every assistant turn.

        Raises TemplateError where the template changes an answer by more than white space at its
        ends.
        """
        text = self._render(turns, add_generation_prompt=False)
        constants = self._constants(turns)
        answered = [turn for turn in turns if turn.role == "assistant"]
        spans: list[Span] = []
        notes: list[str] = []
        position = len(constants[0])
        intact = text.startswith(constants[0])
        for turn, after in zip(answered, constants[1:], strict=True):
            answer = turn.text
            written = next(
                (form for form in _forms(answer) if text.startswith(form + after, position)), None
            )
            if not intact or written is None:
                raise TemplateError(
                    "the chat template changes an answer",
                    got=repr(text[position : position + len(answer) + 20]),
                    expected=repr(answer),
                )
            if written != answer:
                notes.append(STRIPPED)
            end = position + len(written)
            spans.append(self._span(text, position, end, after, turn.weight))
            position = end + len(after)
        if position != len(text):
            raise TemplateError("the chat template changes an answer", got=repr(text[position:]))
        return Rendered(text, tuple(spans), tuple(notes))

    def _reads_parts(self, probe: Sequence[Turn]) -> bool:
        """Whether the template reads a content of parts; otherwise it fails on a list, or writes
        it out as such."""
        try:
            full = self._render(probe, add_generation_prompt=False)
        except TemplateError:
            return False
        return _PROBE in full and "'text'" not in full

    def _span(self, text: str, start: int, end: int, after: str, weight: float) -> Span:
        if self.lead and text.endswith(self.lead, 0, start):
            start -= len(self.lead)
        if self.end_of_turn is not None and after.startswith(self.end_of_turn):
            return Span(start, end + len(self.end_of_turn), True, weight)
        return Span(start, end, False, weight)

    def _constants(self, turns: Sequence[Turn]) -> list[str]:
        """What stands before, between and after the answers."""
        salt = 0
        written = "".join(turn.text for turn in turns)
        while _MARKER.format(salt=salt, index=0)[:-5] in written:
            salt += 1
        marked: list[Turn] = []
        markers: list[str] = []
        for turn in turns:
            if turn.role == "assistant":
                markers.append(_MARKER.format(salt=salt, index=len(markers)))
                turn = Turn("assistant", (Text(markers[-1]),))
            marked.append(turn)
        rest = self._render(marked, add_generation_prompt=False)
        constants = []
        for marker in markers:
            if rest.count(marker) != 1:
                raise TemplateError(
                    "the chat template repeats or leaves out an assistant turn",
                    got=f"{rest.count(marker)} times",
                    expected="once",
                )
            before, _, rest = rest.partition(marker)
            constants.append(before)
        return [*constants, rest]

    def _render(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        content = _parts if self._takes_parts else self._string
        messages = [{"role": turn.role, "content": content(turn)} for turn in turns]
        try:
            text = self._processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refuses the turns ({error})") from error
        except (ValueError, TypeError) as error:
            # TypeError: a template that adds a string to what is none.
            raise TemplateError(f"the chat template cannot be used ({error})") from error
        for turn in turns:
            _check_written(turn, text)
        return str(text)

    def _string(self, turn: Turn) -> str:
        """The turn as text, with the processor's placeholder for each picture and video."""
        placeholders = {"image": self._processor.image_token, "video": self._video_token}
        return "".join(
            part["text"] if part["type"] == "text" else placeholders[part["type"]]
            for part in _parts(turn)
        )

    def _find_lead(self, before: str, prompt: str) -> str:
        if before.startswith(prompt):
            return before[len(prompt) :]
        logger.warning(
            "the chat template's generation prompt differs from the start of its answers (%r, "
            "%r): prompts will have another form than in training",
            prompt[-40:],
            before[-40:],
        )
        return ""


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """Every text that the tokenizer reads as a control token."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | set(tokenizer.all_special_tokens))


def _find_end(tail: str, specials: frozenset[str]) -> tuple[str | None, str | None]:
    stripped = tail.lstrip()
    token = max((s for s in specials if s and stripped.startswith(s)), key=len, default=None)
    if token is None:
        return None, None
    return tail[: len(tail) - len(stripped)] + token, token


def _forms(answer: str) -> tuple[str, ...]:
    return (answer, answer.strip(), answer.rstrip(), answer.lstrip())


def _check_written(turn: Turn, text: str) -> None:
    """Some templates write a system turn in some conversations only, and say nothing."""
    if turn.role == "assistant":
        return
    for part in turn.parts:
        if isinstance(part, Text) and part.text.strip() not in text:
            raise TemplateError(
                f"the chat template leaves the {turn.role} turn's text out",
                got=repr(shorten(part.text)),
                do="put the text into a user turn" if turn.role == "system" else None,
            )


def _parts(turn: Turn) -> list[dict[str, str]]:
    if all(isinstance(part, Text) for part in turn.parts):
        # As one: some templates write something between two texts.
        return [{"type": "text", "text": turn.text}]
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else {"type": "image" if isinstance(part, Image) else "video"}
        for part in turn.parts
    ]
