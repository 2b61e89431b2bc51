"""How long samples are, as `Encoder` has it, and how much work they will be, without pixel tensors.

    picture -> decoded once, its size (w, h) remembered
    size    -> what the processor writes for a picture of that size, asked once
    sample  -> the encoder itself, with blank pictures of those sizes and a processor that knows
               what to write for them -> Measure, or the encoder's own error

One thing is assumed: that what a processor writes for a picture depends on its size alone. It is
not trusted. The first samples with a number of pictures, and one in `AUDIT_EVERY` after them, are
encoded in full as well; where the two differ, `by_size` is False from then on and every sample is
encoded in full.

With several processes each encodes its share of a step only; who gets which sample is decided
before any is encoded, alike on all of them.
"""

from __future__ import annotations

import copy
import io
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import PIL.Image

from vlmtune.data.encode import Encoder
from vlmtune.data.locations import is_url
from vlmtune.data.media import locate_image, read_image, upright_size
from vlmtune.data.pairs import ImageTextPair, encode_pair
from vlmtune.data.types import IGNORED, Conversation, Image, Part, Sample
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.files import digest, file_state

AUDIT_FIRST = 3
AUDIT_EVERY = 251
MAX_REMEMBERED = 50_000
"""Pictures and sizes that are remembered."""

_OFFSETS = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}

Encode = Callable[[Encoder, Conversation], Sample | ImageTextPair]


@dataclass(frozen=True)
class Measure:
    """What an encoded sample holds; of a pair, both sides together.

    `lengths`: tokens of each row the model gets (one, or the two sides of a pair). `num_media`:
    the tokens that stand for pictures and videos. `media_bytes`: the tensors' size where the
    sample was encoded in full, else None.
    """

    lengths: tuple[int, ...]
    num_supervised: int
    num_media: int
    num_images: int
    notes: tuple[str, ...]
    media_bytes: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


class NotBySize(Exception):
    """The processor does something else with pictures than writing tokens in their place."""


class Measurer:
    """Measures samples with `encoder`. `by_size`: whether blank pictures have given the encoder's
    own results so far; `num_wrong` counts those that did not."""

    def __init__(self, encoder: Encoder, *, by_size: bool = True) -> None:
        self._full = encoder
        self._blank = copy.copy(encoder)
        self._blank.processor = SizedProcessor(encoder.processor)
        self._sizes = PictureSizes(encoder.max_image_pixels)
        self._media_ids = _media_ids(encoder.processor)
        self._seen: Counter[int] = Counter()
        self.by_size = by_size
        self.num_wrong = 0

    def measure(self, conversation: Conversation, *, pair_prompt: str | None = None) -> Measure:
        """What training makes of the sample; with `pair_prompt`, of its two sides.

        Raises SampleError and OverLength as `Encoder.encode` does.
        """
        if pair_prompt is None:
            return self._measure(conversation, Encoder.encode)
        prompt = pair_prompt
        return self._measure(conversation, lambda e, c: encode_pair(e, c, prompt=prompt))

    def measure_prompt(self, conversation: Conversation) -> Measure:
        """What is asked in an evaluation. Raises SampleError as `Encoder.encode_prompt` does."""
        return self._measure(conversation, Encoder.encode_prompt)

    def _measure(self, conversation: Conversation, encode: Encode) -> Measure:
        blank = self._with_blanks(conversation) if self.by_size else None
        if blank is None:
            return _or_raise(self._outcome(self._full, conversation, encode))
        try:
            found = self._outcome(self._blank, blank, encode)
        except NotBySize:
            self.by_size = False
            return _or_raise(self._outcome(self._full, conversation, encode))
        number = self._seen[len(conversation.images)]
        self._seen[len(conversation.images)] += 1
        if number >= AUDIT_FIRST and number % AUDIT_EVERY:
            return _or_raise(found)
        full = self._outcome(self._full, conversation, encode)
        if _comparable(full) != _comparable(found):
            self.by_size = False
            self.num_wrong += 1
        return _or_raise(full)

    def _outcome(
        self, encoder: Encoder, conversation: Conversation, encode: Encode
    ) -> Measure | SampleError:
        try:
            encoded = encode(encoder, conversation)
        except SampleError as error:
            return error
        samples = (
            [encoded.picture, encoded.text] if isinstance(encoded, ImageTextPair) else [encoded]
        )
        return Measure(
            lengths=tuple(sample.num_tokens for sample in samples),
            num_supervised=sum(int((sample.targets != IGNORED).sum()) for sample in samples),
            num_media=sum(
                int((sample.input_ids == token).sum())
                for sample in samples
                for token in self._media_ids
            ),
            num_images=sum(sample.num_images for sample in samples),
            notes=encoded.notes,
            media_bytes=None if encoder is self._blank else _media_bytes(samples),
        )

    def _with_blanks(self, conversation: Conversation) -> Conversation | None:
        """The conversation with a blank picture in the place of each of its own; None where one is
        broken, odd enough to be noted, or a video: the encoder says what is to be said of those."""
        if conversation.videos:
            return None
        sizes = {image: self._sizes.of(image) for image in conversation.images}
        if None in sizes.values():
            return None

        def blank(part: Part) -> Part:
            size = sizes[part] if isinstance(part, Image) else None
            if size is None or not isinstance(part, Image):
                return part
            return replace(part, content=blank_picture(size))

        turns = tuple(
            replace(turn, parts=tuple(blank(part) for part in turn.parts))
            for turn in conversation.turns
        )
        return replace(conversation, turns=turns)


class PictureSizes:
    """The upright sizes of pictures, each decoded once."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._known: OrderedDict[tuple[str | int, ...], tuple[int, int] | None] = OrderedDict()

    def of(self, image: Image) -> tuple[int, int] | None:
        """(width, height), or None where the picture cannot be used or has notes."""
        try:
            found = locate_image(image)
            key = (digest(found),) if isinstance(found, bytes) else file_state(found)
        except (VlmtuneError, OSError):
            return None
        if key not in self._known:
            self._known[key] = self._read(image)
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        return self._known[key]

    def _read(self, image: Image) -> tuple[int, int] | None:
        try:
            opened = read_image(image, max_pixels=self._max_pixels)
        except VlmtuneError:
            return None
        return None if opened.notes else opened.picture.size


class SizedProcessor:
    """Stands for a processor where only its token ids are wanted.

    A picture's tokens are those that the processor writes for a blank one of the same size, put
    into the text before it is tokenised. Raises NotBySize where that cannot be the whole story.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._written: OrderedDict[tuple[object, ...], str] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        if name == "_processor":  # asked for while a copy of this is made
            raise AttributeError(name)
        return getattr(self._processor, name)

    def __call__(
        self,
        *,
        text: Sequence[str],
        images: Sequence[PIL.Image.Image] = (),
        add_special_tokens: bool,
        **options: Any,
    ) -> dict[str, Any]:
        """The token ids, and with `return_offsets_mapping` the characters of each; what else is
        asked for is not made."""
        [rendered] = text
        pieces = rendered.split(self._processor.image_token)
        if len(pieces) - 1 != len(images):
            raise NotBySize
        size = {"size": options["size"]} if "size" in options else {}
        whole, spans = pieces[0], []
        for picture, piece in zip(images, pieces[1:], strict=True):
            tokens = self._tokens_of(picture.size, size)
            spans.append((len(whole), len(whole) + len(tokens)))
            whole += tokens + piece
        output = self._processor.tokenizer(
            whole,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=bool(options.get("return_offsets_mapping")),
            return_tensors="pt",
            verbose=False,
        )
        made = {name: output[name] for name in ("input_ids", "offset_mapping") if name in output}
        if options.get("return_text_replacement_offsets") and self._says_where:
            made["text_replacement_offsets"] = [self._replacements(rendered, spans)]
        return made

    @cached_property
    def _says_where(self) -> bool:
        """Whether the processor says which characters it wrote in place of which."""
        output = self._processor(text=["a"], **_OFFSETS)
        return "text_replacement_offsets" in output

    def _replacements(self, rendered: str, spans: Sequence[tuple[int, int]]) -> list[Any]:
        token, start, found = self._processor.image_token, 0, []
        for span in spans:
            start = rendered.index(token, start)
            found.append({"span": (start, start + len(token)), "new_span": span})
            start += len(token)
        return found

    def _tokens_of(self, sides: tuple[int, int], options: dict[str, Any]) -> str:
        """What the processor writes for a picture of these sides, as text."""
        key = (sides, repr(options))
        if key in self._written:
            return self._written[key]
        output = self._processor(
            text=[self._processor.image_token],
            images=[PIL.Image.new("RGB", sides)],
            return_tensors="pt",
            add_special_tokens=False,
            **options,
        )
        ids = output["input_ids"][0].tolist()
        tokenizer = self._processor.tokenizer
        text = str(
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        if tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != ids:
            raise NotBySize
        self._written[key] = text
        if len(self._written) > MAX_REMEMBERED:
            self._written.popitem(last=False)
        return text


@lru_cache(maxsize=1024)
def blank_picture(size: tuple[int, int]) -> bytes:
    """A black picture of `size` (width, height), as a PNG of one bit a pixel."""
    content = io.BytesIO()
    PIL.Image.new("1", size).save(content, "PNG")
    return content.getvalue()


def _media_ids(processor: Any) -> list[int]:
    tokenizer = processor.tokenizer
    names = {processor.image_token, getattr(processor, "video_token", None)} - {None}
    return [int(tokenizer.convert_tokens_to_ids(name)) for name in sorted(names)]


def _media_bytes(samples: Sequence[Sample]) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for sample in samples
        for tensor in sample.media.values()
    )


def _comparable(outcome: Measure | SampleError) -> object:
    if isinstance(outcome, Measure):
        return replace(outcome, media_bytes=None)
    return type(outcome), str(outcome)


def _or_raise(outcome: Measure | SampleError) -> Measure:
    if isinstance(outcome, SampleError):
        raise outcome
    return outcome


CHARACTERS_PER_TOKEN = 4.0
TOKENS_PER_PICTURE = 500.0
PICTURES_PER_VIDEO = 8


@dataclass(frozen=True)
class WorkScale:
    """`pixels_per_token`: of a processor that sizes a picture by its area, within `least` and
    `most` pixels; None: each picture is taken for as much work as any other. `max_pixels`: above
    it, a picture is not opened."""

    pixels_per_token: float | None = None
    least: int = 0
    most: int = 0
    max_pixels: int = 0

    @classmethod
    def of(cls, processor: Any, *, pixel_budget: bool, max_pixels: int) -> WorkScale:
        """`pixel_budget`: whether the family's processor sizes pictures by their area."""
        if not pixel_budget:
            return cls()
        image = processor.image_processor
        side = image.patch_size * image.merge_size
        least, most = int(image.size["shortest_edge"]), int(image.size["longest_edge"])
        return cls(side**2, least, most, max_pixels)

    def tokens(self, conversation: Conversation) -> float:
        """About as many tokens as the model will get; never an error."""
        characters = sum(len(turn.text) for turn in conversation.turns)
        pictures = sum(self._of_picture(image) for image in conversation.images)
        videos = len(conversation.videos) * PICTURES_PER_VIDEO * TOKENS_PER_PICTURE
        return characters / CHARACTERS_PER_TOKEN + pictures + videos

    def _of_picture(self, image: Image) -> float:
        if self.pixels_per_token is None or is_url(image.ref):
            return TOKENS_PER_PICTURE
        try:
            width, height = upright_size(image, max_pixels=self.max_pixels)
        except VlmtuneError:
            return 0.0  # whoever gets it says what is wrong
        return min(max(width * height, self.least), self.most) / self.pixels_per_token
