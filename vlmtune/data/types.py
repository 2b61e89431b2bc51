"""The records that everything passes: from a conversation in a file to a batch.

Letters for shapes: B rows of a micro-batch, T tokens of a sample (or of the longest row),
S supervised tokens of a micro-batch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


Role = Literal["system", "user", "assistant"]

IGNORED = -100
"""Target at a position that is not supervised."""


@dataclass(frozen=True)
class Source:
    """Where a conversation stands: `line` is 1-based; of what has no lines (a JSON array, parquet,
    a tar file), the row's number."""

    file: str
    line: int


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class MediaPolicy:
    """What pictures and videos may be read from; the recipe's `data` section says it.

    `allow_outside_paths`: files that are not below the sample's folder. `cache_dir`: where what
    was fetched is kept, by content.
    """

    allow_outside_paths: bool = False
    allow_urls: bool = False
    allow_private_addresses: bool = False
    max_download_bytes: int = 100_000_000
    url_timeout_seconds: float = 20.0
    cache_dir: Path | None = None

    @property
    def cache_folder(self) -> Path:
        """Where indexes, downloads and samples are kept: `cache_dir`, or `vlmtune` in the user's
        cache folder."""
        if self.cache_dir is not None:
            return self.cache_dir
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmtune"


LOCAL = MediaPolicy()
"""Files below the sample's own folder, and what the row itself holds."""


@dataclass(frozen=True)
class Image:
    """A picture not yet opened: a path relative to `base_dir`, a URL, a `data:` URL or bare base64.

    `content`: its bytes where the row holds them (a bytes column, a tar member's); `ref` is then
    only its name.
    """

    ref: str
    base_dir: Path
    content: bytes | None = field(default=None, repr=False)
    media_policy: MediaPolicy = field(default=LOCAL, repr=False)


@dataclass(frozen=True)
class Video:
    """A video not yet opened: a file, or the pictures that are its frames."""

    ref: str | tuple[str, ...]
    base_dir: Path
    content: bytes | None = field(default=None, repr=False)
    media_policy: MediaPolicy = field(default=LOCAL, repr=False)


Media = Image | Video
Part = Text | Image | Video


@dataclass(frozen=True)
class Turn:
    """`weight`: of an assistant turn, what each of its tokens counts in the loss; 0: nothing."""

    role: Role
    parts: tuple[Part, ...]
    weight: float = 1.0

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True)
class Conversation:
    """One sample as written by the user; no tensors.

    `answers` are the reference answers of an evaluation sample (ten in VQAv2), `question_type`
    the slice it counts in, `options` the choices of a multiple-choice question; all may be empty.
    """

    id: str
    turns: tuple[Turn, ...]
    source: Source
    answers: tuple[str, ...] = ()
    question_type: str | None = None
    options: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(p for turn in self.turns for p in turn.parts if isinstance(p, Image))

    @property
    def videos(self) -> tuple[Video, ...]:
        return tuple(p for turn in self.turns for p in turn.parts if isinstance(p, Video))


@dataclass(frozen=True)
class Skipped:
    """A row that is not used, and why; a line of `skipped.jsonl`."""

    id: str
    source: Source
    reason: str


@dataclass
class Sample:
    """A conversation as the model sees it.

    `targets[t]` is the id that position t must predict (already shifted by one), or `IGNORED`.
    `weights[t]` is what that target counts in the loss; None: each counts 1.
    `token_fields` are further integer tensors of shape (T,), one value a token
    (`mm_token_type_ids`); `media` are tensors concatenated over samples along dimension 0
    (`pixel_values`, `image_grid_thw`, …). `notes` say what was changed on the way ("pictures
    shrunk to fit max_tokens"): fixed wordings, to be counted and shown. `media_keys`: a digest of
    what each picture (of models that cut pictures into tiles, each tile), then each video, gives
    the vision tower; empty where nobody asked for them.
    """

    id: str
    source: Source
    input_ids: torch.Tensor  # (T,) int64
    targets: torch.Tensor  # (T,) int64
    token_fields: dict[str, torch.Tensor] = field(default_factory=dict)  # each (T,)
    media: dict[str, torch.Tensor] = field(default_factory=dict)
    num_images: int = 0
    num_videos: int = 0
    notes: tuple[str, ...] = ()
    weights: torch.Tensor | None = None  # (T,) float32
    media_keys: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_supervised(self) -> int:
        return int((self.targets != IGNORED).sum())


@dataclass
class Batch:
    """A micro-batch: one row of packed samples, or padded rows.

    `inputs` are the model's keyword arguments (`input_ids` (B, T), media, and of padded rows
    `attention_mask` (B, T)); `supervised` (B, T) marks the positions whose logits are computed;
    `targets` (S,) are the ids to predict there, in row-major order of `supervised`; `weights` (S,)
    are what they count in the loss, or None where each counts 1. `lengths` are the tokens of a
    pack's samples, in order (B is 1, their sum is T); None: padded rows. `media_keys` are the
    samples' own, in the order of the media. `positions` are those of `supervised` in the flattened
    rows: a device that is given them need not look for them, which its host would wait for.
    """

    inputs: dict[str, torch.Tensor]
    supervised: torch.Tensor  # (B, T) bool
    targets: torch.Tensor  # (S,) int64
    sample_ids: tuple[str, ...]
    num_tokens: int
    num_images: int
    weights: torch.Tensor | None = None  # (S,) float32
    lengths: tuple[int, ...] | None = None
    media_keys: tuple[str, ...] = ()
    positions: torch.Tensor | None = None  # (S,) int64; found where not given

    def __post_init__(self) -> None:
        if self.positions is None:
            self.positions = self.supervised.flatten().nonzero().squeeze(1)


@dataclass
class ContrastiveBatch:
    """A micro-batch of prompts whose embeddings are wanted: the pictures of some pairs, or texts.

    `last` (B,) are the positions of the rows' last tokens; row b is of pair `pairs[b]` of this
    process's share of the step, and `side` says which side of it.
    """

    inputs: dict[str, torch.Tensor]
    last: torch.Tensor  # (B,) int64
    modality: Literal[0, 1]  # 0: pictures, 1: texts
    pairs: tuple[int, ...]
    sample_ids: tuple[str, ...]
    num_tokens: int
    num_images: int
