"""Which tokens of a rendered conversation are supervised, and where each stands in its text.

A processor writes a picture or a video out as many tokens, with rows, columns, borders and times
in some families, where the text has one placeholder. Most processors say which characters they
wrote in place of which (`align_by_characters`). Of one that does not, the tokens between two
pictures are those that its tokenizer alone gives, which is what places them (`align_by_tokens`).

T tokens of a sample.

    conversation + text -> chat template -> tokenizer, one token a picture -> label mask -> tokens

No picture is opened. Texts are tokenised in their place in the conversation, since a token at a
text's start or end may depend on what stands beside it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import torch

from vlmtune.data.template import ChatTemplate, Rendered, Span, special_tokens
from vlmtune.data.types import IGNORED, Conversation, Source, Text, Turn
from vlmtune.errors import SampleError, VlmtuneError, at, shorten

Offsets = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Alignment:
    """`offsets`: of each token that the model sees, its characters [start, end) of the rendered
    text; (0, 0) for a picture's or a video's, for one that the tokenizer adds itself, and for one
    whose place is not certain. `media_end`: the position after the last picture or video."""

    offsets: Offsets
    num_media_tokens: int = 0
    media_end: int = 0


def align_by_characters(written: Offsets, replacements: Sequence[Mapping[str, Any]]) -> Alignment:
    """From the tokens' characters of the text as the processor wrote it out.

    `replacements`, in order, have the characters of a placeholder (`span`) and what stands in its
    place (`new_span`). Of a token that is part placeholder, part text, the text counts.
    """
    offsets: list[tuple[int, int]] = []
    num_media, media_end, number, shift = 0, 0, 0, 0
    for position, (start, end) in enumerate(written):
        while number < len(replacements) and replacements[number]["new_span"][1] <= start:
            shift = replacements[number]["new_span"][1] - replacements[number]["span"][1]
            number += 1
        if number == len(replacements) or end <= replacements[number]["new_span"][0]:
            offsets.append((start - shift, end - shift) if end > start else (0, 0))
            continue
        (old_start, old_end), (new_start, new_end) = (
            replacements[number][key] for key in ("span", "new_span")
        )
        media_end = position + 1
        if start >= new_start and end <= new_end:
            num_media += 1
            offsets.append((0, 0))
        else:
            first = start - shift if start < new_start else old_end
            last = old_start if end <= new_end else old_end + end - new_end
            offsets.append((first, max(first, last)))
    return Alignment(offsets, num_media, media_end)


def align_by_tokens(
    plain: Sequence[int],
    offsets: Offsets,
    processed: Sequence[int],
    image_token_id: int,
    *,
    text: str = "",
) -> Alignment | None:
    """From the tokens `plain` of `text`, one a picture, and their characters `offsets`; None where
    `processed`, the model's, are not the same outside the pictures.

    The first word after a picture may be others: some processors write a space before it. It then
    has no characters.
    """
    segments = align_segments(plain, processed, image_token_id)
    if segments is None:
        words = _first_words(plain, offsets, image_token_id, text)
        segments = align_segments(plain, processed, image_token_id, left_out=words)
    if segments is None:
        return None
    placed: list[tuple[int, int]] = [(0, 0)] * len(processed)
    for start, length, target in segments:
        if target is not None:
            placed[target : target + length] = offsets[start : start + length]
    has_media = len(segments) > 1
    return Alignment(
        placed,
        num_media_tokens=len(processed) - (len(plain) - len(segments) + 1),
        media_end=len(processed) - segments[-1].length if has_media else 0,
    )


class Segment(NamedTuple):
    """A text between pictures: its start and length in the plain tokens, its place in the others.

    `placed` is None where it could stand in several places (a line break between two pictures).
    """

    start: int
    length: int
    placed: int | None


def align_segments(
    plain: Sequence[int],
    processed: Sequence[int],
    image_token_id: int,
    *,
    left_out: Collection[int] = (),
) -> list[Segment] | None:
    """The texts between pictures, in order, without the tokens `left_out` (positions) at their
    starts; None where the two sequences do not agree.

    A text is placed where its leftmost and its rightmost possible place are the same.
    """
    bounds = [-1, *(i for i, token in enumerate(plain) if token == image_token_id), len(plain)]
    starts = [bound + 1 for bound in bounds[:-1]]
    starts = [next(i for i in count(start) if i not in left_out) for start in starts]
    texts = [list(plain[start:stop]) for start, stop in zip(starts, bounds[1:], strict=True)]
    leftmost = _place(texts, list(processed), image_token_id)
    backwards = _place([t[::-1] for t in texts[::-1]], list(processed[::-1]), image_token_id)
    if leftmost is None or backwards is None:
        return None
    rightmost = [
        len(processed) - start - len(text)
        for start, text in zip(backwards[::-1], texts, strict=True)
    ]
    return [
        Segment(start, len(text), left if left == right else None)
        for start, text, left, right in zip(starts, texts, leftmost, rightmost, strict=True)
    ]


def _first_words(
    plain: Sequence[int], offsets: Offsets, image_token_id: int, text: str
) -> set[int]:
    """The positions in `plain` of what directly follows a picture, up to the end of a word."""
    found: set[int] = set()
    for position, (start, _) in enumerate(offsets):
        if plain[position] == image_token_id or position == 0:
            continue
        follows = plain[position - 1] == image_token_id and not text[start : start + 1].isspace()
        if follows or (position - 1 in found and text[start : start + 1].isalnum()):
            found.add(position)
    return found


def _place(texts: list[list[int]], ids: list[int], image_token_id: int) -> list[int] | None:
    """The leftmost start of each text, with a picture's tokens between any two."""
    if len(texts) == 1:
        return [0] if texts[0] == ids else None
    if ids[: len(texts[0])] != texts[0]:
        return None
    placed = [0]
    position = len(texts[0])
    for number, text in enumerate(texts[1:], start=2):
        try:
            position = ids.index(image_token_id, position) + 1
        except ValueError:
            return None
        if number == len(texts):
            start = len(ids) - len(text)
            if start < position or ids[start:] != text:
                return None
        else:
            found = _find(ids, text, position)
            if found is None:
                return None
            start = found
        placed.append(start)
        position = start + len(text)
    return placed


def _find(ids: list[int], text: list[int], position: int) -> int | None:
    for start in range(position, len(ids) - len(text) + 1):
        if ids[start : start + len(text)] == text:
            return start
    return None


def tokens_of_span(offsets: Offsets, start: int, end: int) -> tuple[int, int] | None:
    """First and last token that overlap the characters [start, end).

    Tokens without width between them (spaces, in some tokenizers) belong to the span; special
    tokens that the tokenizer adds itself have the offsets (0, 0) and never do.
    """
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
    return (inside[0], inside[-1]) if inside else None


NORMALISED = "characters replaced by the tokenizer's Unicode normalisation"


class MaskError(VlmtuneError):
    """An answer cannot be found among the tokens, or is not what they spell; without a place."""


@dataclass(frozen=True)
class Labels:
    """`targets` (T,) shifted by one; `weights` (T,) float32 of what each counts, or None where
    each counts 1."""

    targets: torch.Tensor
    weights: torch.Tensor | None
    notes: tuple[str, ...]


def label_targets(
    rendered: Rendered,
    offsets: Offsets,
    input_ids: torch.Tensor,
    *,
    end_token: str,
    tokenizer: Any,
) -> Labels:
    """The labels of every span of `rendered` with a weight; notes say what was changed.

    `offsets` are the characters of `rendered.text` of each of `input_ids` (T,). Raises MaskError
    where the targets, decoded, are not the answer and its end of turn.
    """
    targets = torch.full_like(input_ids, IGNORED)
    weights = torch.ones(input_ids.shape, dtype=torch.float32)
    notes: list[str] = []
    for span in rendered.spans:
        if span.weight == 0:
            continue
        first, last = _positions(span, offsets)
        taught = input_ids[first : last + 1]
        expected = rendered.text[span.start : span.end]
        if not span.end_is_rendered:
            # Taught in place of what the template goes on with, which is not an end.
            end_id = tokenizer.convert_tokens_to_ids(end_token)
            taught = torch.cat([taught, taught.new_tensor([end_id])])
            expected += end_token
        targets[first - 1 : first - 1 + len(taught)] = taught
        weights[first - 1 : first - 1 + len(taught)] = span.weight
        decoded = _decode_after(int(input_ids[first - 1]), taught.tolist(), tokenizer)
        if decoded != expected:
            _check_normalised(decoded, expected)
            notes.append(NORMALISED)
    is_weighted = any(span.weight not in (0, 1) for span in rendered.spans)
    return Labels(targets, weights if is_weighted else None, tuple(notes))


def _positions(span: Span, offsets: Offsets) -> tuple[int, int]:
    """The span's first and last position among the tokens."""
    found = tokens_of_span(offsets, span.start, span.end)
    if found is None:
        if span.start == span.end:
            raise MaskError("an answer is empty", expected="at least one character")
        raise MaskError("an answer matches two places in the tokens")
    if found[0] == 0:
        raise MaskError("an answer is at the very start", expected="a token before it")
    return found


def _decode_after(before: int, ids: list[int], tokenizer: Any) -> str:
    """`ids` as text, behind the token before them: decoders drop a text's first space."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    head = tokenizer.decode([before], **options)
    return str(tokenizer.decode([before, *ids], **options)).removeprefix(head)


def _check_normalised(decoded: str, expected: str) -> None:
    if decoded not in [unicodedata.normalize(form, expected) for form in ("NFC", "NFKC")]:
        raise MaskError(
            "the supervised tokens do not spell the answer",
            got=repr(shorten(decoded)),
            expected=repr(shorten(expected)),
            do="remove line breaks and spaces at both ends of the answer",
        )


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
        with at(conversation.source):
            return self._template.render_prompt(_asked(conversation))

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
            raise SampleError(
                "a text contains a control token of the model", at=conversation.source, got=found
            )
        with at(conversation.source):
            rendered = self._template.render([*_asked(conversation), _answer_turn(text)])
            ids, offsets = self._tokenize(rendered.text)
            targets = label_targets(
                Rendered(rendered.text, rendered.spans[-1:]),
                offsets,
                torch.tensor(ids),
                end_token=self._template.end_token,
                tokenizer=self._tokenizer,
            ).targets
        positions = (targets != IGNORED).nonzero().flatten()  # (n,)
        if ids[: int(positions[0]) + 1] != prompt:
            raise SampleError(
                "the tokens before an answer depend on the answer",
                at=conversation.source,
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
