"""One entry's rows for ever: epochs of shuffled shards, in blocks of shuffled rows.

    epoch -> order of its shards -> their rows one after the other -> blocks of `block_rows`
      -> each block in an order of its own

Every order is a pure function of (seed, entry, epoch, block), so a cursor of five numbers says
where the entry stands. Held at a time: one block of rows that are not parsed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from vlmtune.data.order import permuted
from vlmtune.data.streams.shards import RawRow, Shard
from vlmtune.errors import VlmtuneError


@dataclass(frozen=True)
class EntryCursor:
    """The block an entry is in, and how much of it was taken. The block starts at `row` of the
    shard that is number `shard` in the epoch's order. All 0-based."""

    epoch: int = 0
    block: int = 0
    shard: int = 0
    row: int = 0
    taken: int = 0


class Placed(NamedTuple):
    """A row and its shard, as a number in the entry's list; `turn` is the shard's number in the
    epoch's order."""

    turn: int
    shard: int
    row: RawRow


class BlockReader:
    """Takes rows of `shards`, entry number `entry` of the data, from `cursor` on.

    A file is opened when its first row is due, and again at the start of each epoch.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        seed: int,
        entry: int,
        block_rows: int,
        cursor: EntryCursor | None = None,
    ) -> None:
        self._shards = shards
        self._key = f"vlmtune:{seed}:stream {entry}"
        self._block_rows = block_rows
        self.cursor = cursor or EntryCursor()
        self._rows: Iterator[Placed] | None = None
        self._block: list[Placed] = []
        self._order: list[int] = []

    def take(self) -> Placed:
        """The next row. Raises VlmtuneError where a file cannot be read on, where there is no row
        at all, or fewer than when `cursor` was made."""
        if self._rows is None:
            self._resume()
        while self.cursor.taken == len(self._block):
            self._next_block()
        at = self.cursor
        self.cursor = EntryCursor(at.epoch, at.block, at.shard, at.row, at.taken + 1)
        return self._block[self._order[at.taken]]

    def _resume(self) -> None:
        at = self.cursor
        self._rows = self._walk(at.epoch, turn=at.shard, row=at.row)
        self._begin(self._read(), at)
        if at.taken > len(self._block):
            raise VlmtuneError(
                "the data has fewer rows than when the run stopped",
                file=self._shards[0].file,
                do="restore it, or start over with --resume never",
            )

    def _next_block(self) -> None:
        at = self.cursor
        if not self._block and at.block == 0:
            raise VlmtuneError("there is no sample in the data", file=self._shards[0].file)
        block = self._read()
        if block:
            first = block[0]
            self._begin(block, EntryCursor(at.epoch, at.block + 1, first.turn, first.row.number))
        else:
            self._rows = self._walk(at.epoch + 1, turn=0, row=0)
            self._begin(self._read(), EntryCursor(at.epoch + 1))

    def _read(self) -> list[Placed]:
        assert self._rows is not None
        self._block = []  # let go of before the next is read: one block at a time
        return list(islice(self._rows, self._block_rows))

    def _begin(self, block: list[Placed], cursor: EntryCursor) -> None:
        self._block, self.cursor = block, cursor
        size = len(block)
        key = f"{self._key}:epoch {cursor.epoch}:block {cursor.block}"
        self._order = [permuted(place, size=size, key=key) for place in range(size)]

    def _walk(self, epoch: int, *, turn: int, row: int) -> Iterator[Placed]:
        """The rows of an epoch from row `row` of its shard number `turn` on."""
        size = len(self._shards)
        for later in range(turn, size):
            shard = permuted(later, size=size, key=f"{self._key}:epoch {epoch}:shards")
            for raw in self._shards[shard].rows(row if later == turn else 0):
                yield Placed(later, shard, raw)
