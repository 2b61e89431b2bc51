"""What the training data looks like to the model: token counts, and samples with their masks.

recipe -> training files -> an even choice of samples -> encode with the run's own processor
       -> counts a sample -> percentiles and histograms
       -> a few samples as text, supervised tokens marked, runs of picture tokens collapsed

Needs the data and the processor, no weights; where one of them is gone, `reason` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmtune.data.encode import Encoder, encoder_for
from vlmtune.data.source import access_of, all_rows
from vlmtune.data.types import Conversation, Sample
from vlmtune.errors import VlmtuneError, plural
from vlmtune.report.marked_text import Piece, marked_pieces
from vlmtune.report.pictures import Thumbnail, Thumbnails, spread

if TYPE_CHECKING:
    from pathlib import Path

    from vlmtune.recipe.schema import Recipe

MAX_SAMPLES = 200
MAX_SHOWN = 6
MAX_PICTURES_SHOWN = 4
NUM_BINS = 20
WIDEST_BAR = 8
PERCENTILES = (0, 10, 50, 90, 100)
PROCESSOR_FOLDERS = ("adapter", "model")


@dataclass(frozen=True)
class ShownSample:
    id: str
    place: str
    pictures: tuple[Thumbnail, ...]
    num_pictures: int
    pieces: tuple[Piece, ...]
    num_tokens: int
    num_supervised: int


@dataclass(frozen=True)
class Bar:
    """Place, width and height in per cent of the drawing; `label` says what is counted."""

    left: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Bin:
    """How many samples have a count from `first` to `last`, both included."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class Distribution:
    """A count per sample: `percentiles` in the order of PERCENTILES."""

    name: str
    percentiles: tuple[int, ...]
    mean: float
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class DataStatistics:
    """`num_read` of `num_samples` were encoded; `num_refused` of them could not be."""

    num_samples: int
    num_read: int
    num_refused: int
    distributions: tuple[Distribution, ...]
    samples: tuple[ShownSample, ...]
    reason: str = ""


def data_statistics(
    recipe: Recipe | None,
    folder: Path,
    *,
    thumbnails: Thumbnails,
    max_samples: int = MAX_SAMPLES,
) -> DataStatistics:
    """The statistics of the training data of the run in `folder`; never raises for what is gone."""
    if recipe is None:
        return _none("recipe.resolved.yaml cannot be read")
    try:
        conversations = all_rows(recipe.data.train, access=access_of(recipe.data))
        encoder = encoder_for(recipe, _load_processor(recipe, folder))
    except VlmtuneError as error:
        return _none(str(error))
    return measure(conversations, encoder, thumbnails=thumbnails, max_samples=max_samples)


def measure(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    *,
    thumbnails: Thumbnails,
    max_samples: int,
) -> DataStatistics:
    """The statistics of at most `max_samples` of `conversations`, chosen evenly."""
    chosen = spread(len(conversations), max_samples)
    encoded: list[tuple[Conversation, Sample]] = []
    for number in chosen:
        try:
            conversation = conversations[number]
            encoded.append((conversation, encoder.encode(conversation)))
        except VlmtuneError:
            continue
    image_id = picture_token_id(encoder.processor)
    samples = [sample for _, sample in encoded]
    counts = {
        "tokens": [s.num_tokens for s in samples],
        "picture tokens": [int((s.input_ids == image_id).sum()) for s in samples],
        "supervised tokens": [s.num_supervised for s in samples],
        "pictures": [s.num_images for s in samples],
    }
    shown = [encoded[i] for i in spread(len(encoded), MAX_SHOWN)]
    return DataStatistics(
        num_samples=len(conversations),
        num_read=len(chosen),
        num_refused=len(chosen) - len(encoded),
        distributions=tuple(
            distribution(name, values) for name, values in counts.items() if values
        ),
        samples=tuple(
            ShownSample(
                id=conversation.id,
                place=f"{conversation.source.file}:{conversation.source.line}",
                pictures=tuple(map(thumbnails.of, conversation.images[:MAX_PICTURES_SHOWN])),
                num_pictures=len(conversation.images),
                pieces=marked_pieces(sample, encoder.processor.tokenizer, image_id),
                num_tokens=sample.num_tokens,
                num_supervised=sample.num_supervised,
            )
            for conversation, sample in shown
        ),
    )


def picture_token_id(processor: Any) -> int:
    """The id of the token that stands for a part of a picture."""
    return int(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


def distribution(name: str, values: Sequence[int]) -> Distribution:
    """The percentiles and the histogram of counts, at least one."""
    bins = histogram(values)
    highest = max(b.count for b in bins)
    width = min(90 / len(bins), WIDEST_BAR)
    bars = []
    for index, item in enumerate(bins):
        span = f"{item.first}" if item.first == item.last else f"{item.first} to {item.last}"
        bars.append(
            Bar(
                left=100 * (index + 0.5) / len(bins) - width / 2,
                width=width,
                height=100 * item.count / highest,
                label=f"{span} {name}: {plural(item.count, 'sample')}",
            )
        )
    array = np.asarray(values)
    return Distribution(name, percentiles(values), float(array.mean()), tuple(bars))


def histogram(values: Sequence[int]) -> tuple[Bin, ...]:
    """At most NUM_BINS bins of about the same width over counts, at least one of them."""
    array = np.asarray(values)
    low, high = int(array.min()), int(array.max())
    num_bins = min(NUM_BINS, high - low + 1)
    edges = np.linspace(low, high + 1, num_bins + 1)
    counts, _ = np.histogram(array, bins=edges)
    firsts = np.ceil(edges).astype(int)
    return tuple(
        Bin(int(firsts[at]), int(firsts[at + 1]) - 1, int(count)) for at, count in enumerate(counts)
    )


def percentiles(values: Sequence[int]) -> tuple[int, ...]:
    """Counts that are there, in the order of PERCENTILES."""
    points = np.percentile(np.asarray(values), PERCENTILES, method="nearest")
    return tuple(int(point) for point in points)


def _load_processor(recipe: Recipe, folder: Path) -> Any:
    """The processor that the run saved, or the base model's with the recipe's pixel budget."""
    from vlmtune.models.processor import load_processor

    saved = next((folder / name for name in PROCESSOR_FOLDERS if (folder / name).is_dir()), None)
    if saved is not None:
        return load_processor(str(saved), trust_remote_code=recipe.trust_remote_code)
    return load_processor(
        recipe.model,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        image=recipe.image,
    )


def _none(reason: str) -> DataStatistics:
    return DataStatistics(0, 0, 0, (), (), reason)
