"""Statistics of a data set as the model sees it: counts per sample, duplicates, label masks.

recipe -> training files -> evenly spaced samples -> encode with the run's own processor
       -> counts a sample -> percentiles and histograms
       -> a few samples as text, supervised tokens marked, runs of picture tokens collapsed

Needs the data and the processor, no weights; if one of them is missing, `reason` says so.

    rows (all, or some evenly spaced) -> counts, digests, and tokens if there is a measurer
         -> SetStatistics -> percentiles and histograms (data_stats.py), Duplicates, Overlap

Only counts and digests of a sample are kept, about 100 bytes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmtune.data.dataset import (
    BadRows,
    OpenFile,
    UniqueIds,
    all_rows,
    iter_rows,
    media_policy_of,
    num_rows,
)
from vlmtune.data.encode import Encoder, OverLength, encoder_for
from vlmtune.data.measure import Measure, Measurer
from vlmtune.data.tools.duplicates import (
    DigestTable,
    Duplicates,
    PictureDigests,
    duplicates,
    sample_digests,
)
from vlmtune.data.types import Conversation, Sample, Source
from vlmtune.errors import SampleError, VlmtuneError, plural
from vlmtune.report.pictures import Thumbnail, Thumbnails, spread
from vlmtune.report.preview import Piece, marked_pieces

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
    """Position, width and height in per cent of the drawing; `label` says what is counted."""

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
    """The statistics of the training data of the run in `folder`; missing files never raise."""
    if recipe is None:
        return _none("recipe.resolved.yaml cannot be read")
    try:
        conversations = all_rows(recipe.data.train, media_policy=media_policy_of(recipe.data))
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
    """Percentiles that are values of the data, in the order of PERCENTILES."""
    points = np.percentile(np.asarray(values), PERCENTILES, method="nearest")
    return tuple(int(point) for point in points)


def _load_processor(recipe: Recipe, folder: Path) -> Any:
    """The processor that the run saved, or the base model's with the recipe's pixel budget."""
    from vlmtune.models.load import load_processor

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


BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass
class SetStatistics:
    """`num_rows` are in the files, `num_looked_at` were read. `counts`: by name, one value for each
    sample. `num_dropped`: samples left out of training as too long. `notes`: what encoding
    changed, and in how many samples."""

    num_rows: int
    num_looked_at: int
    files: Sequence[OpenFile] = field(repr=False)
    counts: dict[str, array[int]] = field(default_factory=dict)
    rows: array[int] = field(default_factory=lambda: array("q"))
    table: DigestTable = field(default_factory=DigestTable)
    bad: BadRows = field(default_factory=BadRows)
    notes: Counter[str] = field(default_factory=Counter)
    num_dropped: int = 0

    @property
    def num_samples(self) -> int:
        return len(self.rows)

    @property
    def duplicates(self) -> Duplicates:
        return duplicates(self.table)

    def place(self, sample: int) -> Source:
        """The file and line of sample `sample` (0-based)."""
        return next(iter_rows(self.files, [self.rows[sample]])).source

    def figures(self) -> dict[str, Figures]:
        """The figures by name; empty if there are no samples."""
        return {name: figures(values) for name, values in self.counts.items() if values}

    def add(self, row: int, conversation: Conversation, measure: Measure | None) -> None:
        values = {
            "turns": len(conversation.turns),
            "pictures": len(conversation.images),
            "videos": len(conversation.videos),
        }
        answers = [turn.text for turn in conversation.turns if turn.role == "assistant"]
        values["answer characters"] = sum(map(len, answers))
        values["answer words"] = sum(len(answer.split()) for answer in answers)
        if measure is not None:
            values["tokens"] = measure.num_tokens
            values["media tokens"] = measure.num_media
            values["supervised tokens"] = measure.num_supervised
            self.notes.update(measure.notes)
        for name, value in values.items():
            self.counts.setdefault(name, array("q")).append(value)
        self.rows.append(row)


@dataclass(frozen=True)
class Figures:
    """The distribution of a count per sample. `percentiles` in the order of PERCENTILES; `bins` as
    (first, last, samples)."""

    mean: float
    percentiles: tuple[int, ...]
    bins: tuple[tuple[int, int, int], ...]

    @property
    def bars(self) -> str:
        """The histogram as a line of text; only an empty bin is blank."""
        highest = max(count for *_, count in self.bins)
        top = len(BLOCKS) - 1
        return "".join(BLOCKS[-(-count * top // highest)] for *_, count in self.bins)


def figures(values: Sequence[int]) -> Figures:
    """The figures of at least one value."""
    bins = tuple((item.first, item.last, item.count) for item in histogram(values))
    return Figures(sum(values) / len(values), percentiles(values), bins)


def set_statistics(
    files: Sequence[OpenFile],
    *,
    measurer: Measurer | None = None,
    pair_prompt: str | None = None,
    max_samples: int | None = None,
    on_row: Callable[[int], None] = lambda done: None,
) -> SetStatistics:
    """The statistics of the rows of `files`, or of `max_samples` evenly spaced ones.

    Rows that cannot be used are counted in `bad`. `on_row` gets the number of rows done.
    """
    ids, known, total = UniqueIds(), PictureDigests(), num_rows(files)
    numbers = range(total) if max_samples is None else spread(total, max_samples)
    found = SetStatistics(num_rows=total, num_looked_at=len(numbers), files=files)
    on_row(0)
    for done, row in enumerate(iter_rows(files, numbers), start=1):
        try:
            conversation = ids.conversation(row)
            digests = sample_digests(conversation, known)
            measure = None if measurer is None else _measured(conversation, measurer, pair_prompt)
        except OverLength:
            found.num_dropped += 1
        except SampleError as error:
            found.bad.add(error)
        else:
            ids.take(conversation.id)
            found.table.add(digests)
            found.add(row.number, conversation, measure)
        on_row(done)
    return found


def _measured(conversation: Conversation, measurer: Measurer, pair_prompt: str | None) -> Measure:
    if conversation.turns[-1].role != "assistant":  # rows with `answers`, for evaluation
        return measurer.measure_prompt(conversation)
    return measurer.measure(conversation, pair_prompt=pair_prompt)
