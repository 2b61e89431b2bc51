"""A conversation as the model sees it: token ids, targets and media, checked by decoding.

    Conversation -> chat template with the answers' characters        template.py
      -> tokenizer alone: one token a picture, with offsets ---+
      -> processor: input_ids (T,), media ---------------------+      alignment.py
      -> targets (T,), decoded and compared with the answers          masks.py
      -> too long: refused, left out, shrunk or cut                   over_length.py

T tokens of a sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import PIL.Image
import torch

from vlmtune.data.alignment import align_segments
from vlmtune.data.masks import MaskError, label_targets
from vlmtune.data.media import open_image
from vlmtune.data.over_length import TURNS_LEFT_OUT, cut_text, shrink_images
from vlmtune.data.template import ChatTemplate, Rendered, TemplateError, special_tokens
from vlmtune.data.types import IGNORED, Conversation, Sample, Text
from vlmtune.errors import SampleError, VlmtuneError

OverLengthPolicy = Literal["error", "drop", "shrink_images", "trim_text"]

UNKNOWN = "characters that the tokenizer does not know"


class OverLength(SampleError):
    """The sample has more than `max_tokens` tokens and is to be left out."""


@dataclass(frozen=True)
class _Encoded:
    """A sample with what over-length handling asks for; `media_end`: after the last picture."""

    sample: Sample
    num_text_tokens: int
    media_end: int


class Encoder:
    """Turns conversations into samples with one processor; pickles into worker processes."""

    def __init__(
        self,
        processor: Any,
        *,
        max_tokens: int,
        over_length: OverLengthPolicy,
        max_image_pixels: int,
    ) -> None:
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise VlmtuneError(
                "the tokenizer gives no character offsets, which label masks are made from",
                got=type(tokenizer).__name__,
                expected="a fast tokenizer (tokenizer.json)",
            )
        if getattr(processor, "image_token", None) is None:
            raise VlmtuneError(
                "the processor does not say which token stands for a picture",
                got=type(processor).__name__,
                expected="processor.image_token",
            )
        self.processor = processor
        self.max_tokens = max_tokens
        self.over_length = over_length
        self.max_image_pixels = max_image_pixels
        self._template = ChatTemplate(processor)
        self.end_token_id = int(tokenizer.convert_tokens_to_ids(self._template.end_token))
        self._image_id = int(tokenizer.convert_tokens_to_ids(processor.image_token))
        self._reserved = re.compile(_any_of(processor))

    def encode(self, conversation: Conversation) -> Sample:
        """The sample with every assistant turn supervised, within `max_tokens`.

        Raises SampleError, with file and line, where the sample cannot be used, and OverLength
        where it is too long and `over_length` is "drop".
        """
        pictures = self._open(conversation)
        encoded = self._encode(conversation, pictures)
        if encoded.sample.num_tokens <= self.max_tokens:
            return encoded.sample
        if self.over_length == "trim_text":
            return self._trim(conversation, pictures, encoded)
        return self._shrink_or_refuse(conversation, pictures, encoded, prompt=False)

    def encode_prompt(self, conversation: Conversation) -> Sample:
        """The sample up to where the model starts to give the last answer; nothing supervised.

        A question is never cut: with `over_length: trim_text` too long a one is a SampleError.
        """
        if conversation.turns[-1].role == "assistant":
            conversation = replace(conversation, turns=conversation.turns[:-1])
        pictures = self._open(conversation)
        encoded = self._encode(conversation, pictures, prompt=True)
        if encoded.sample.num_tokens <= self.max_tokens:
            return encoded.sample
        return self._shrink_or_refuse(conversation, pictures, encoded, prompt=True)

    def assistant_text(self, conversation: Conversation) -> str:
        """The last answer, as written."""
        last = conversation.turns[-1]
        if last.role != "assistant":
            raise _error(conversation, "the last turn is not answered", expected="assistant")
        return last.text

    def _open(self, conversation: Conversation) -> list[PIL.Image.Image]:
        for turn in conversation.turns:
            for part in turn.parts:
                found = self._reserved.search(part.text) if isinstance(part, Text) else None
                if found is not None:
                    raise _error(
                        conversation,
                        f"the {turn.role}'s text holds a control token of the model",
                        got=found.group(),
                        expected="plain text; pictures as parts or in `images`",
                        do="rewrite it, or take the sample out",
                    )
        try:
            return [open_image(i, max_pixels=self.max_image_pixels) for i in conversation.images]
        except VlmtuneError as error:
            raise _placed(conversation, error) from error

    def _encode(
        self,
        conversation: Conversation,
        pictures: Sequence[PIL.Image.Image],
        *,
        scale: float = 1.0,
        prompt: bool = False,
    ) -> _Encoded:
        try:
            if prompt:
                rendered = Rendered(self._template.render_prompt(conversation.turns), ())
            else:
                rendered = self._template.render(conversation.turns)
        except TemplateError as error:
            raise _placed(conversation, error) from error
        plain, offsets = self._tokenize(rendered.text)
        sample = self._process(conversation, rendered, pictures, scale)
        ids = sample.input_ids.tolist()
        segments = align_segments(plain, ids, self._image_id)
        if segments is None:
            raise _error(
                conversation,
                "the processor and its tokenizer do not agree on the text",
                expected="the same tokens outside the pictures",
            )
        try:
            targets, label_notes = label_targets(
                rendered,
                offsets,
                segments,
                sample.input_ids,
                end_token=self._template.end_token,
                tokenizer=self.processor.tokenizer,
            )
        except MaskError as error:
            raise _placed(conversation, error) from error
        assert not bool((targets == self._image_id).any()), "a picture's token is supervised"
        notes = [*rendered.notes, *label_notes]
        unknown = self.processor.tokenizer.unk_token_id
        if unknown is not None and unknown in plain:
            notes.append(UNKNOWN)
        media_end = 0 if len(segments) == 1 else len(ids) - segments[-1].length
        return _Encoded(
            replace(sample, targets=targets, notes=tuple(dict.fromkeys(notes))),
            len(plain) - (len(segments) - 1),
            media_end,
        )

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.processor.tokenizer(
            text,
            add_special_tokens=self._adds_special_tokens(text),
            return_offsets_mapping=True,
            verbose=False,
        )
        return encoded["input_ids"], encoded["offset_mapping"]

    def _adds_special_tokens(self, text: str) -> bool:
        # A template that writes the BOS token itself must not get a second one.
        bos = self.processor.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _process(
        self,
        conversation: Conversation,
        rendered: Rendered,
        pictures: Sequence[PIL.Image.Image],
        scale: float,
    ) -> Sample:
        """The processor's tensors as a sample without targets."""
        processor = self.processor
        options: dict[str, Any] = {}
        if "mm_token_type_ids" in processor.model_input_names:
            options["return_mm_token_type_ids"] = True
        if pictures:
            options["images"] = [_scaled(picture, scale) for picture in pictures]
            options.update(_scaled_size(processor, scale))
        try:
            output = processor(
                text=[rendered.text],
                return_tensors="pt",
                add_special_tokens=self._adds_special_tokens(rendered.text),
                **options,
            )
        except ValueError as error:
            raise _error(conversation, f"the processor refuses the sample ({error})") from error
        length = int(output["input_ids"].shape[1])
        sample = Sample(
            id=conversation.id,
            source=conversation.source,
            input_ids=output["input_ids"][0].to(torch.int64),
            targets=torch.full((length,), IGNORED, dtype=torch.int64),
            num_images=len(pictures),
        )
        for name, value in output.items():
            if name in ("input_ids", "attention_mask"):
                continue
            if not isinstance(value, torch.Tensor):
                raise _error(
                    conversation,
                    f"the processor gives {name}, which is no tensor",
                    got=type(value).__name__,
                )
            if tuple(value.shape) == (1, length) and not value.is_floating_point():
                sample.token_fields[name] = value[0].to(torch.int64)
            else:
                sample.media[name] = value
        return sample

    def _trim(
        self, conversation: Conversation, pictures: list[PIL.Image.Image], encoded: _Encoded
    ) -> Sample:
        notes: tuple[str, ...] = ()
        kept = conversation
        while encoded.sample.num_tokens > self.max_tokens:
            trimmed = cut_text(
                encoded.sample, media_end=encoded.media_end, max_tokens=self.max_tokens
            )
            if trimmed is not None:
                return replace(trimmed, notes=(*trimmed.notes, *notes))
            if sum(turn.role == "assistant" for turn in kept.turns) == 1:
                raise self._too_long(conversation, encoded, "no answer is left where it is cut")
            # The last answer is out of reach, or a picture is in the way: without its exchange.
            kept = replace(kept, turns=kept.turns[:-2])
            notes = (TURNS_LEFT_OUT,)
            encoded = self._encode(kept, pictures[: len(kept.images)])
        return replace(encoded.sample, notes=(*encoded.sample.notes, *notes))

    def _shrink_or_refuse(
        self,
        conversation: Conversation,
        pictures: list[PIL.Image.Image],
        encoded: _Encoded,
        *,
        prompt: bool,
    ) -> Sample:
        if self.over_length != "shrink_images":
            raise self._too_long(conversation, encoded, None)
        shrunk = shrink_images(
            lambda scale: self._encode(conversation, pictures, scale=scale, prompt=prompt).sample,
            encoded.sample,
            num_text_tokens=encoded.num_text_tokens,
            shortest_side=min((min(picture.size) for picture in pictures), default=0),
            max_tokens=self.max_tokens,
        )
        if shrunk is None:
            raise self._too_long(conversation, encoded, "smaller pictures do not make it fit")
        return shrunk

    def _too_long(
        self, conversation: Conversation, encoded: _Encoded, reason: str | None
    ) -> SampleError:
        num_tokens, num_text = encoded.sample.num_tokens, encoded.num_text_tokens
        kind = OverLength if self.over_length == "drop" else SampleError
        return kind(
            "the sample is too long" + (f": {reason}" if reason else ""),
            file=conversation.source.file,
            line=conversation.source.line,
            got=f"{num_tokens} tokens, {num_tokens - num_text} of them for pictures",
            expected=f"at most {self.max_tokens} (data.max_tokens)",
            do="raise data.max_tokens, lower image.max_pixels, or choose another data.over_length",
        )


def _any_of(processor: Any) -> str:
    """A pattern of every text that the tokenizer or the processor reads as a control token."""
    reserved = set(special_tokens(processor.tokenizer))
    for name in ("image_token", "video_token", "audio_token"):
        reserved.add(getattr(processor, name, None) or processor.image_token)
    return "|".join(re.escape(token) for token in sorted(reserved, key=len, reverse=True) if token)


def _scaled(picture: PIL.Image.Image, scale: float) -> PIL.Image.Image:
    if scale == 1.0:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), PIL.Image.Resampling.LANCZOS)


def _scaled_size(processor: Any, scale: float) -> dict[str, Any]:
    """Where every picture is brought to one longest edge, a smaller edge; else nothing."""
    size = dict(processor.image_processor.size)
    given = {name: value for name, value in size.items() if value is not None}
    if scale == 1.0 or set(given) != {"longest_edge"}:
        return {}
    return {"size": {"longest_edge": max(1, round(given["longest_edge"] * scale))}}


def _error(
    conversation: Conversation,
    message: str,
    *,
    got: object = None,
    expected: object = None,
    do: str | None = None,
) -> SampleError:
    source = conversation.source
    return SampleError(
        message, file=source.file, line=source.line, got=got, expected=expected, do=do
    )


def _placed(conversation: Conversation, error: VlmtuneError) -> SampleError:
    """`error` with the sample's place."""
    return _error(conversation, error.message, got=error.got, expected=error.expected, do=error.do)
