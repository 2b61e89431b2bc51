"""The figures of a whole set: counts per sample, what is there twice, what two sets share.

    rows (all, or so many chosen evenly) -> counts, digests, with a measurer tokens
         -> SetStatistics -> percentiles and histograms (data_stats.py), Duplicates, Overlap

Of a sample its counts and digests are kept, some 100 bytes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vlmtune.data.dataset import OpenFile
from vlmtune.data.duplicates import DigestTable, Duplicates, PictureDigests, digests_of, duplicates
from vlmtune.data.encode import OverLength
from vlmtune.data.measure import Measure, Measurer
from vlmtune.data.row_walk import BadRows, RowWalk
from vlmtune.data.types import Conversation, Source
from vlmtune.errors import SampleError
from vlmtune.report.data_stats import histogram, percentiles
from vlmtune.report.pictures import spread

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass
class SetStatistics:
    """`num_rows` are in the files, `num_looked_at` were read. `counts`: by name, a value of each
    sample. `num_dropped`: too long, and left out of training for it; `notes`: what is changed on
    the way, with its samples."""

    num_rows: int
    num_looked_at: int
    walk: RowWalk = field(repr=False)
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
        """Where sample `sample` (0-based) stands."""
        return self.walk.place(self.rows[sample])

    def figures(self) -> dict[str, Figures]:
        """By name; nothing where there are no samples."""
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
    """Of a count per sample. `percentiles` in the order of PERCENTILES; `bins` as (first, last,
    samples)."""

    mean: float
    percentiles: tuple[int, ...]
    bins: tuple[tuple[int, int, int], ...]

    @property
    def bars(self) -> str:
        """The histogram as a line of text; a bin with any sample is not blank."""
        highest = max(count for *_, count in self.bins)
        top = len(BLOCKS) - 1
        return "".join(BLOCKS[-(-count * top // highest)] for *_, count in self.bins)


def figures(values: Sequence[int]) -> Figures:
    """Of at least one value."""
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
    """Look at the rows of `files`; of more than `max_samples` at so many, chosen evenly.

    Rows that cannot be used are counted in `bad`. `on_row` is told how many are done.
    """
    walk, known = RowWalk(files), PictureDigests()
    total = len(walk)
    numbers = range(total) if max_samples is None else spread(total, max_samples)
    found = SetStatistics(num_rows=total, num_looked_at=len(numbers), walk=walk)
    on_row(0)
    for done, (number, (_, item)) in enumerate(zip(numbers, walk.rows(only=numbers)), start=1):
        try:
            if isinstance(item, SampleError):
                raise item
            digests = digests_of(item, known)
            measure = None if measurer is None else _measured(item, measurer, pair_prompt)
        except OverLength:
            found.num_dropped += 1
        except SampleError as error:
            found.bad.add(error)
        else:
            walk.take_id(item.id)
            found.table.add(digests)
            found.add(number, item, measure)
        on_row(done)
    return found


def _measured(conversation: Conversation, measurer: Measurer, pair_prompt: str | None) -> Measure:
    if conversation.turns[-1].role != "assistant":  # rows with `answers`, for evaluation
        return measurer.measure_prompt(conversation)
    return measurer.measure(conversation, pair_prompt=pair_prompt)
