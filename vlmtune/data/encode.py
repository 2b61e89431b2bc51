"""A conversation as the model sees it: token ids, targets and media, checked by decoding.

    Conversation -> pictures and videos decoded                       media.py, video.py
      -> chat template with the answers' characters                   template.py
      -> processor: input_ids (T,), media, each token's characters    processing.py, tokens.py
      -> targets (T,), decoded and compared with the answers          tokens.py
      -> too long: refused, left out, shrunk or cut                   shrink_images, cut_text

T tokens of a sample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import PIL.Image

from vlmtune.data.batches import MediaLayout
from vlmtune.data.media import read_image
from vlmtune.data.processing import media_keys_of, process
from vlmtune.data.sample_cache import SampleCache, fingerprint_of, open_sample_cache
from vlmtune.data.template import ChatTemplate, Rendered, special_tokens
from vlmtune.data.tokens import label_targets
from vlmtune.data.types import IGNORED, Conversation, Sample, Text, Turn
from vlmtune.data.video import Clip, read_video
from vlmtune.errors import SampleError, VlmtuneError, at, plural
from vlmtune.recipe.data_section import VideoSection
from vlmtune.recipe.schema import Recipe

SHRUNK = "pictures shrunk to fit data.max_tokens"
TRIMMED = "text cut at the end to fit data.max_tokens"
TURNS_LEFT_OUT = "last turns left out to fit data.max_tokens"

_SMALLEST_SIDE = 4
_REFINEMENTS = 4


def shrink_images(
    encode: Callable[[float], Sample],
    sample: Sample,
    *,
    num_text_tokens: int,
    shortest_side: int,
    max_tokens: int,
) -> Sample | None:
    """The sample with its pictures' sides scaled down until it fits, or None if it never does.

    `encode(scale)` gives the sample at a scale in (0, 1]; `shortest_side` is that of the smallest
    picture, in pixels.
    """
    too_large, scale = 1.0, 1.0
    room = max_tokens - num_text_tokens
    if room <= 0 or not (sample.num_images or sample.num_videos):
        return None
    while sample.num_tokens > max_tokens:
        too_large = scale
        wanted = math.sqrt(room / (sample.num_tokens - num_text_tokens))
        scale *= min(wanted, 0.9)
        if scale * shortest_side < _SMALLEST_SIDE:
            return None
        sample = encode(scale)
    # The first guess may have overshot by far: the processor has a pixel budget of its own.
    for _ in range(_REFINEMENTS):
        middle = math.sqrt(too_large * scale)
        candidate = encode(middle)
        if candidate.num_tokens <= max_tokens:
            sample, scale = candidate, middle
        else:
            too_large = middle
    return replace(sample, notes=(*sample.notes, SHRUNK))


def cut_text(sample: Sample, *, media_end: int, max_tokens: int) -> Sample | None:
    """The first `max_tokens` tokens; None where that cuts a picture or leaves nothing to learn.

    `media_end` is the position after the last picture. The last token kept predicts nothing: an
    answer that was cut is not taught to end there.
    """
    if max_tokens < media_end:
        return None
    targets = sample.targets[:max_tokens].clone()
    targets[-1] = IGNORED
    if not bool((targets != IGNORED).any()):
        return None
    return replace(
        sample,
        input_ids=sample.input_ids[:max_tokens].clone(),
        targets=targets,
        weights=None if sample.weights is None else sample.weights[:max_tokens].clone(),
        token_fields={n: f[:max_tokens].clone() for n, f in sample.token_fields.items()},
        notes=(*sample.notes, TRIMMED),
    )


TrainOn = Literal["assistant", "last_turn"]
OverLengthPolicy = Literal["error", "drop", "shrink_images", "trim_text"]

UNKNOWN = "characters that the tokenizer does not know"


class OverLength(SampleError):
    """The sample has more than `max_tokens` tokens and is to be left out."""


@dataclass(frozen=True)
class _Media:
    """A conversation's pictures and videos, decoded, each in their order."""

    pictures: Sequence[PIL.Image.Image]
    clips: Sequence[Clip]
    notes: tuple[str, ...]

    @property
    def shortest_side(self) -> int:
        """In pixels; 0 where there is neither."""
        frames = (clip.frames[0] for clip in self.clips)
        return min((min(picture.size) for picture in (*self.pictures, *frames)), default=0)


@dataclass(frozen=True)
class _Encoded:
    """A sample with what over-length handling needs; `media_end`: after the last picture."""

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
        train_on: TrainOn = "assistant",
        video: VideoSection | None = None,
        cache_dir: Path | None = None,
        image_batching: MediaLayout | None = None,
    ) -> None:
        """`video`: how videos become frames; None: as by the recipe's defaults. `cache_dir`: where
        what `encode` gives is kept; None: nowhere. `media_layout`: how the model's media lie, where
        samples are to have `media_keys`; None: they get none."""
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
        self.train_on = train_on
        self.video = video or VideoSection()
        self.image_batching = image_batching
        self._template = ChatTemplate(processor)
        self.end_token_id = int(tokenizer.convert_tokens_to_ids(self._template.end_token))
        self._image_id = int(tokenizer.convert_tokens_to_ids(processor.image_token))
        self._takes_videos = (
            getattr(processor, "video_token", None) is not None
            and getattr(processor, "video_processor", None) is not None
        )
        self._reserved = re.compile(_any_of(processor))
        self._cache = None if cache_dir is None else self._open_cache(cache_dir)

    def encode(self, conversation: Conversation) -> Sample:
        """The sample within `max_tokens`, its assistant turns (or the last) supervised by weight.

        Raises SampleError, with file and line, where the sample cannot be used, and OverLength
        where it is too long and `over_length` is "drop".
        """
        conversation = replace(conversation, turns=self._weighted(conversation.turns))
        if not _is_supervised(conversation.turns):
            raise _error(
                conversation,
                "there is nothing to learn: no answer is supervised",
                expected="an assistant turn with a weight",
            )
        if self._cache is None:
            return self._with_keys(self._make(conversation))
        return self._with_keys(self._cache.sample(conversation, self._make))

    def _with_keys(self, sample: Sample) -> Sample:
        if self.image_batching is None:
            return sample
        return replace(sample, media_keys=media_keys_of(sample.media, self.image_batching))

    def _make(self, conversation: Conversation) -> Sample:
        media = self._open(conversation)
        encoded = self._encode(conversation, media)
        if encoded.sample.num_tokens <= self.max_tokens:
            return encoded.sample
        if self.over_length == "trim_text":
            return self._trim(conversation, media, encoded)
        return self._shrink_or_refuse(conversation, media, encoded, prompt=False)

    def is_supervised(self, conversation: Conversation) -> bool:
        """Whether there is an answer to learn. A conversation to evaluate needs none."""
        return _is_supervised(self._weighted(conversation.turns))

    def encode_prompt(self, conversation: Conversation) -> Sample:
        """The sample up to where the model starts to give the last answer; nothing supervised.

        A question is never cut: with `over_length: trim_text`, one that is too long is an error.
        """
        if conversation.turns[-1].role == "assistant":
            conversation = replace(conversation, turns=conversation.turns[:-1])
        media = self._open(conversation)
        encoded = self._encode(conversation, media, prompt=True)
        if encoded.sample.num_tokens <= self.max_tokens:
            return self._with_keys(encoded.sample)
        return self._with_keys(self._shrink_or_refuse(conversation, media, encoded, prompt=True))

    def assistant_text(self, conversation: Conversation) -> str:
        """The last answer, as written."""
        last = conversation.turns[-1]
        if last.role != "assistant":
            raise _error(conversation, "the last turn is not answered", expected="assistant")
        return last.text

    def _open_cache(self, folder: Path) -> SampleCache:
        settings = {
            "max_tokens": self.max_tokens,
            "over_length": self.over_length,
            "max_image_pixels": self.max_image_pixels,
            "video": self.video.model_dump(mode="json"),
        }
        return open_sample_cache(folder, fingerprint_of(self.processor, settings))

    def _weighted(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """The turns with the weights that `train_on` leaves them."""
        if self.train_on == "assistant":
            return tuple(turns)
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        return tuple(
            replace(turn, weight=0.0) if index in answers[:-1] else turn
            for index, turn in enumerate(turns)
        )

    def _open(self, conversation: Conversation) -> _Media:
        for turn in conversation.turns:
            for part in turn.parts:
                found = self._reserved.search(part.text) if isinstance(part, Text) else None
                if found is not None:
                    raise _error(
                        conversation,
                        f"the {turn.role}'s text contains a control token of the model",
                        got=found.group(),
                        expected="plain text; pictures as parts or in `images`",
                        do="rewrite it, or remove the sample",
                    )
        if conversation.videos and not self._takes_videos:
            raise _error(
                conversation,
                "the model does not accept videos",
                got=type(self.processor).__name__,
                expected="a processor with a video token and a video processor",
                do="remove the sample, or give some frames as pictures",
            )
        limit = self.max_image_pixels
        with at(conversation.source):
            pictures = [read_image(image, max_pixels=limit) for image in conversation.images]
            clips = [
                read_video(video, section=self.video, max_pixels=limit)
                for video in conversation.videos
            ]
        notes = [note for picture in pictures for note in picture.notes]
        notes += [note for clip in clips for note in clip.notes]
        return _Media([p.picture for p in pictures], clips, tuple(dict.fromkeys(notes)))

    def _encode(
        self, conversation: Conversation, media: _Media, *, scale: float = 1.0, prompt: bool = False
    ) -> _Encoded:
        tokenizer = self.processor.tokenizer
        with at(conversation.source):
            if prompt:
                rendered = Rendered(self._template.render_prompt(conversation.turns), ())
            else:
                rendered = self._template.render(conversation.turns)
            processed = process(
                self.processor,
                rendered.text,
                pictures=media.pictures,
                clips=media.clips,
                scale=scale,
            )
            alignment = processed.alignment
            labels = label_targets(
                rendered,
                alignment.offsets,
                processed.input_ids,
                end_token=self._template.end_token,
                tokenizer=tokenizer,
            )
        assert not bool((labels.targets == self._image_id).any()), "a picture's token is supervised"
        notes = [*media.notes, *rendered.notes, *labels.notes]
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown in processed.input_ids:
            notes.append(UNKNOWN)
        sample = Sample(
            id=conversation.id,
            source=conversation.source,
            input_ids=processed.input_ids,
            targets=labels.targets,
            weights=labels.weights,
            token_fields=processed.token_fields,
            media=processed.media,
            num_images=len(media.pictures),
            num_videos=len(media.clips),
            notes=tuple(dict.fromkeys(notes)),
        )
        num_text_tokens = sample.num_tokens - alignment.num_media_tokens
        return _Encoded(sample, num_text_tokens, alignment.media_end)

    def _trim(self, conversation: Conversation, media: _Media, encoded: _Encoded) -> Sample:
        notes: tuple[str, ...] = ()
        kept = conversation
        while encoded.sample.num_tokens > self.max_tokens:
            trimmed = cut_text(
                encoded.sample, media_end=encoded.media_end, max_tokens=self.max_tokens
            )
            if trimmed is not None:
                return replace(trimmed, notes=(*trimmed.notes, *notes))
            # The last answer is out of reach, or a picture is in the way: without its exchange.
            kept = replace(kept, turns=kept.turns[:-2])
            if not _is_supervised(kept.turns):
                raise self._too_long(conversation, encoded, "cutting it leaves no answer")
            notes = (TURNS_LEFT_OUT,)
            left = _Media(
                media.pictures[: len(kept.images)], media.clips[: len(kept.videos)], media.notes
            )
            encoded = self._encode(kept, left)
        return replace(encoded.sample, notes=(*encoded.sample.notes, *notes))

    def _shrink_or_refuse(
        self,
        conversation: Conversation,
        media: _Media,
        encoded: _Encoded,
        *,
        prompt: bool,
    ) -> Sample:
        if self.over_length != "shrink_images":
            raise self._too_long(conversation, encoded, None)
        shrunk = shrink_images(
            lambda scale: self._encode(conversation, media, scale=scale, prompt=prompt).sample,
            encoded.sample,
            num_text_tokens=encoded.num_text_tokens,
            shortest_side=media.shortest_side,
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
            got=f"{plural(num_tokens, 'token')}, {num_tokens - num_text} of them for pictures",
            expected=f"at most {self.max_tokens} (data.max_tokens)",
            do="raise data.max_tokens, lower image.max_pixels, or choose another data.over_length",
        )


def encoder_for(
    recipe: Recipe,
    processor: Any,
    *,
    cache_dir: Path | None = None,
    image_batching: MediaLayout | None = None,
) -> Encoder:
    """An encoder that makes samples as training by `recipe` does, kept in `cache_dir` if given and
    with `media_keys` if `media_layout` is."""
    return Encoder(
        processor,
        max_tokens=recipe.data.max_tokens,
        over_length=recipe.data.over_length,
        max_image_pixels=recipe.data.max_image_pixels,
        train_on=recipe.data.train_on,
        video=recipe.video,
        cache_dir=cache_dir,
        image_batching=image_batching,
    )


def _is_supervised(turns: Sequence[Turn]) -> bool:
    return any(turn.role == "assistant" and turn.weight > 0 for turn in turns)


def _any_of(processor: Any) -> str:
    """A pattern of every text that the tokenizer or the processor reads as a control token."""
    reserved = set(special_tokens(processor.tokenizer))
    for name in ("image_token", "video_token", "audio_token"):
        reserved.add(getattr(processor, name, None) or processor.image_token)
    return "|".join(re.escape(token) for token in sorted(reserved, key=len, reverse=True) if token)


def _error(
    conversation: Conversation,
    message: str,
    *,
    got: object = None,
    expected: object = None,
    do: str | None = None,
) -> SampleError:
    source = conversation.source
    return SampleError(message, at=source, got=got, expected=expected, do=do)
