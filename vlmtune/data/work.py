"""How much work a sample will be, told from its row and the headers of its pictures.

With several processes each encodes its share of a step only; who gets which sample is decided
before any is encoded, alike on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmtune.data.media import upright_size
from vlmtune.data.types import Conversation, Image
from vlmtune.data.url import is_url
from vlmtune.errors import VlmtuneError

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
