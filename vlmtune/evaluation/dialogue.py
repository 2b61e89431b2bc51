"""A continuing conversation with a model: pictures go with the next question, answers stream.

add_image* -> ask -> [history + pictures + question] -> prompt -> greedy decoding, text by text
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import TextStreamer

from vlmtune.data.encode import Encoder
from vlmtune.data.media import open_image
from vlmtune.data.types import Conversation, Image, MediaPolicy, Part, Source, Text, Turn
from vlmtune.evaluation.generate import evaluating, greedy_config
from vlmtune.evaluation.prompts import prompt_inputs
from vlmtune.models.load import VLM

AS_TYPED = MediaPolicy(allow_outside_paths=True)
"""A path that the user types may be a link to anywhere."""


@dataclass(frozen=True)
class Answer:
    """`is_complete` is False where Ctrl-C cut the answer short."""

    text: str
    is_complete: bool


class Dialogue:
    """The turns so far, and the pictures that go with the next question."""

    def __init__(
        self, vlm: VLM, *, encoder: Encoder, max_new_tokens: int, max_image_pixels: int
    ) -> None:
        self._vlm = vlm
        self._encoder = encoder
        self._max_new_tokens = max_new_tokens
        self._max_image_pixels = max_image_pixels
        self.turns: list[Turn] = []
        self.images: list[Image] = []

    def add_image(self, path: Path) -> None:
        """Show a picture with the next question. Raises VlmtuneError if it cannot be opened."""
        path = path.expanduser().absolute()
        image = Image(ref=str(path), base_dir=path.parent, media_policy=AS_TYPED)
        open_image(image, max_pixels=self._max_image_pixels)
        self.images.append(image)

    def reset(self) -> None:
        """Forget turns and pictures."""
        self.turns = []
        self.images = []

    def ask(self, question: str, *, on_text: Callable[[str], None]) -> Answer:
        """Answer greedily; `on_text` gets the text as it comes. On Ctrl-C what has come so far is
        the answer. The turns are kept. Raises VlmtuneError, keeping nothing, where the
        conversation has become too long or a picture cannot be used."""
        parts: tuple[Part, ...] = (*self.images, Text(question))
        turns = [*self.turns, Turn("user", parts)]
        conversation = Conversation("chat", tuple(turns), Source("chat", len(turns)))
        inputs = prompt_inputs(self._vlm, [self._encoder.encode_prompt(conversation)])
        config = greedy_config(
            self._vlm, encoder=self._encoder, max_new_tokens=self._max_new_tokens
        )
        streamer = _Streamer(self._vlm.processor.tokenizer, on_text)
        is_complete = False
        with evaluating(self._vlm.model), contextlib.suppress(KeyboardInterrupt):
            self._vlm.model.generate(**inputs, generation_config=config, streamer=streamer)
            is_complete = True
        text = "".join(streamer.pieces).strip()
        self.turns = [*turns, Turn("assistant", (Text(text),))]
        self.images = []
        return Answer(text, is_complete)


class _Streamer(TextStreamer):
    """transformers' streamer (whole words, prompt and special tokens left out) into a callback."""

    def __init__(self, tokenizer: object, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self.pieces:
            text = text.lstrip()  # many tokenizers' first word starts with a space
        if text:
            self.pieces.append(text)
            self._on_text(text)
