"""Splits a set in two, so that no picture is on both sides.

    rows -> digests of pictures (or of the question, where there is none)
         -> groups: rows that share a picture, directly or through others (union-find)
         -> groups in an order made from the seed and their pictures -> eval until it is full
         -> train.jsonl, eval.jsonl

The order of the rows and the names of the files play no part in which side a group is on.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlmtune.data.dataset import BadRows, OnBadSample, OpenFile, UniqueIds, iter_rows
from vlmtune.data.tools.duplicates import Digests, PictureDigests, sample_digests
from vlmtune.data.tools.message_rows import MediaFiles, check_free, line_of, row_of, writing
from vlmtune.errors import SampleError, VlmtuneError, plural
from vlmtune.files import whole_file

_TRAIN, _EVAL, _BAD = range(3)
_CHANGED = "the data changed while it was read"


@dataclass(frozen=True)
class Split:
    """`num_samples` of each side and `num_groups` that were kept together, train first."""

    outputs: tuple[Path, Path]
    num_samples: tuple[int, int]
    num_groups: tuple[int, int]
    largest_group: int
    num_outside: int
    unused: dict[str, int]
    bad: BadRows

    @property
    def eval_fraction(self) -> float:
        return self.num_samples[1] / sum(self.num_samples)


@dataclass
class Groups:
    """Rows that share a picture, directly or through others. `owners` are numbers of pictures, one
    a row; `parents` join pictures that stand in one row."""

    owners: array[int] = field(default_factory=lambda: array("q"))
    parents: array[int] = field(default_factory=lambda: array("q"))
    digests: array[int] = field(default_factory=lambda: array("Q"))
    _numbers: dict[int, int] = field(default_factory=dict, repr=False)

    def add(self, digests: Digests) -> None:
        """Add a row; rows without pictures are grouped by their question."""
        numbers = [self._number(d) for d in digests.pictures or (digests.question,)]
        for number in numbers[1:]:
            first, other = self._root(numbers[0]), self._root(number)
            self.parents[max(first, other)] = min(first, other)
        self.owners.append(numbers[0])

    def resolve(self) -> tuple[np.ndarray, np.ndarray]:
        """The group of each row (N,), and what stands for each group (G,): its lowest digest."""
        roots = np.array([self._root(number) for number in range(len(self.parents))], np.int64)
        lowest = np.full(len(roots), np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(lowest, roots, np.array(self.digests, np.uint64))
        used, groups = np.unique(roots[np.array(self.owners, np.int64)], return_inverse=True)
        return groups, lowest[used]

    def _number(self, digest: int) -> int:
        if digest not in self._numbers:
            self._numbers[digest] = len(self.parents)
            self.parents.append(len(self.parents))
            self.digests.append(digest)
        return self._numbers[digest]

    def _root(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = self.parents[self.parents[number]]
            number = self.parents[number]
        return number


def choose_eval(sizes: np.ndarray, names: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    """Which groups are for evaluation (G,) bool: taken in the order of a digest of seed and name
    while they fit into `fraction` of all rows. Where none fits, the smallest one.

    `sizes` (G,) are rows, `names` (G,) uint64. Raises VlmtuneError for fewer than two groups.
    """
    if len(sizes) < 2:
        raise VlmtuneError(
            "the set cannot be split: all rows share their pictures",
            got=f"{plural(int(sizes.sum()), 'row')} in one group",
            expected="at least two groups of rows with no picture in common",
        )
    keys = [_key(int(name), seed) for name in names]
    order = sorted(range(len(sizes)), key=keys.__getitem__)
    room = round(fraction * int(sizes.sum()))
    chosen = np.zeros(len(sizes), bool)
    for group in order:
        if sizes[group] <= room:
            chosen[group] = True
            room -= int(sizes[group])
    if not chosen.any():
        chosen[min(order, key=lambda group: (sizes[group], keys[group]))] = True
    if chosen.all():
        chosen[order[-1]] = False
    return chosen


def split(
    files: Sequence[OpenFile],
    folder: Path,
    *,
    eval_fraction: float,
    seed: int,
    copy_images: bool = False,
    new_ids: bool = False,
    on_bad_sample: OnBadSample = "error",
    overwrite: bool = False,
    on_row: Callable[[int], None] = lambda done: None,
) -> Split:
    """Write train.jsonl and eval.jsonl into `folder`; both appear at the end. `new_ids`: each id is
    replaced by the name of the file and the line.

    Each row is read twice: `on_row` gets the number of reads done. Raises an
    ErrorGroup of all bad rows with `error`, VlmtuneError where the set cannot be split or an
    output exists, CannotWrite.
    """
    outputs = (folder / "train.jsonl", folder / "eval.jsonl")
    for output in outputs:
        check_free(output, files, overwrite=overwrite)
    bad, groups = BadRows(), Groups()
    usable = _read(files, new_ids, groups, bad, on_row)
    if bad.count and (on_bad_sample == "error" or not groups.owners):
        raise bad.as_error()
    of_row, names = groups.resolve()
    sizes = np.bincount(of_row)
    chosen = choose_eval(sizes, names, fraction=eval_fraction, seed=seed)
    sides = np.full(len(usable), _BAD, np.int8)
    sides[np.frombuffer(usable, bool)] = np.where(chosen[of_row], _EVAL, _TRAIN)
    places = [MediaFiles(output, copy_images) for output in outputs]
    counts, unused = _write(files, new_ids, sides, places, on_row)
    return Split(
        outputs=outputs,
        num_samples=(counts[_TRAIN], counts[_EVAL]),
        num_groups=(int((~chosen).sum()), int(chosen.sum())),
        largest_group=int(sizes.max()),
        num_outside=sum(place.num_outside for place in places),
        unused=unused,
        bad=bad,
    )


def _read(
    files: Sequence[OpenFile],
    new_ids: bool,
    groups: Groups,
    bad: BadRows,
    on_row: Callable[[int], None],
) -> bytearray:
    """Fill `groups` with the usable rows; a byte for each row, 1 where it is usable."""
    ids, known, usable = UniqueIds(new_ids), PictureDigests(), bytearray()
    on_row(0)
    for row in iter_rows(files):
        try:
            conversation = ids.conversation(row)
            groups.add(sample_digests(conversation, known))
        except SampleError as error:
            bad.add(error)
            usable.append(False)
        else:
            ids.take(conversation.id)
            usable.append(True)
        on_row(len(usable))
    return usable


def _write(
    files: Sequence[OpenFile],
    new_ids: bool,
    sides: np.ndarray,
    places: Sequence[MediaFiles],
    on_row: Callable[[int], None],
) -> tuple[list[int], dict[str, int]]:
    """The number of samples of each side, and the keys that were not used."""
    counts, ids = [0, 0], UniqueIds(new_ids)
    unused: Counter[str] = Counter()
    with ExitStack() as stack:
        streams = []
        for place in places:
            stack.enter_context(writing(place.output))
            streams.append(stack.enter_context(whole_file(place.output)))
        for row in iter_rows(files, unused=unused):
            side = int(sides[row.number])
            try:
                conversation = ids.conversation(row)
            except SampleError as error:
                if side != _BAD:
                    raise VlmtuneError(_CHANGED, got=str(error)) from error
            else:
                if side != _BAD:
                    streams[side].write(line_of(row_of(conversation, places[side])))
                    counts[side] += 1
            on_row(len(sides) + row.number + 1)
    return counts, dict(unused)


def _key(name: int, seed: int) -> bytes:
    content = f"{seed}:{name}".encode("ascii")
    return hashlib.blake2b(content, digest_size=16).digest()
