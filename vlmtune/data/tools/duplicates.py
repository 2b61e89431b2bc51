"""Finds what samples share: pictures by content, questions by words, both together, everything.

    Conversation -> Digests (8 bytes each) -> DigestTable -> Duplicates of one set
                                                          -> Overlap of two

A million samples take some 40 MB: nothing but the digests is kept.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from vlmtune.data.media import locate_image, reading_picture
from vlmtune.data.types import Conversation, Image, Media, Text
from vlmtune.errors import at
from vlmtune.files import file_state, short_digest

MAX_REMEMBERED = 100_000
"""Files of pictures whose digests are remembered, so that each is read once."""

NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Digests:
    """Of one sample. `pictures`: each picture's and video's bytes, in order. `question`: the words
    of all user turns. `asked`: pictures and question together. `sample`: every turn as well."""

    pictures: tuple[int, ...]
    question: int
    asked: int
    sample: int


@dataclass
class PictureDigests:
    """Digests of media by content; pickles into worker processes, each with a memory of its own."""

    _known: dict[tuple[str, int, int], int] = field(default_factory=dict, repr=False)

    def of(self, media: Media) -> tuple[int, ...]:
        """One digest; of a video given as frames, one for each. Raises VlmtuneError, or OSError
        where the file cannot be read."""
        refs = media.ref if isinstance(media.ref, tuple) else (media.ref,)
        return tuple(
            self._of(Image(ref, media.base_dir, media.content, media.media_policy)) for ref in refs
        )

    def _of(self, image: Image) -> int:
        found = locate_image(image)
        if isinstance(found, bytes):
            return short_digest(found)
        key = file_state(found)
        if key not in self._known:
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            self._known[key] = short_digest(found)
        return self._known[key]


@dataclass
class DigestTable:
    """The digests of a set of samples, in the order they were added."""

    questions: array[int] = field(default_factory=lambda: array("Q"))
    asked: array[int] = field(default_factory=lambda: array("Q"))
    samples: array[int] = field(default_factory=lambda: array("Q"))
    pictures: array[int] = field(default_factory=lambda: array("Q"))
    owners: array[int] = field(default_factory=lambda: array("Q"))
    """The sample (0-based) that holds each of `pictures`."""

    def __len__(self) -> int:
        return len(self.samples)

    def add(self, digests: Digests) -> None:
        self.pictures.extend(digests.pictures)
        self.owners.extend([len(self)] * len(digests.pictures))
        self.questions.append(digests.question)
        self.asked.append(digests.asked)
        self.samples.append(digests.sample)


@dataclass(frozen=True)
class Duplicates:
    """Samples that repeat an earlier one word for word, with the same pictures.

    `examples`: the first few as (number of the first, number of the repeated), both 0-based.
    `num_pictures` are the distinct pictures among `num_picture_uses`.
    """

    num_repeated: int
    examples: tuple[tuple[int, int], ...]
    num_pictures: int
    num_picture_uses: int


@dataclass(frozen=True)
class Overlap:
    """What two sets share: distinct pictures, and the samples of the second that have a picture,
    a question, or pictures and question together of the first. `examples` are numbers (0-based)
    in the second set, of the last kind where there are any, else of those with a picture."""

    num_pictures: int
    num_with_picture: int
    num_with_question: int
    num_with_both: int
    examples: tuple[int, ...]


def sample_digests(conversation: Conversation, known: PictureDigests) -> Digests:
    """The sample's digests. Raises SampleError, with its place, where a picture cannot be read."""
    pictures: list[int] = []
    held: tuple[Media, ...] = (*conversation.images, *conversation.videos)
    for media in held:
        with at(conversation.source), reading_picture():
            pictures += known.of(media)
    question = question_digest(conversation)
    both = np.array([question, *pictures], dtype="<u8").tobytes()
    turns = [
        (turn.role, [part.text if isinstance(part, Text) else None for part in turn.parts])
        for turn in conversation.turns
    ]
    everything = repr(turns).encode("utf-8", "surrogatepass") + both
    return Digests(tuple(pictures), question, short_digest(both), short_digest(everything))


def question_digest(conversation: Conversation) -> int:
    """Of the words of all user turns; case and white space make no difference."""
    asked = [
        " ".join(turn.text.casefold().split()) for turn in conversation.turns if turn.role == "user"
    ]
    return short_digest("\n".join(asked))


def duplicates(table: DigestTable) -> Duplicates:
    """The samples that are in one set more than once."""
    _, first, group = np.unique(_numbers(table.samples), return_index=True, return_inverse=True)
    numbers = np.arange(len(table))
    repeated = numbers[first[group] != numbers]
    examples = tuple((int(first[group[at]]), int(at)) for at in repeated[:NUM_EXAMPLES])
    return Duplicates(
        num_repeated=len(repeated),
        examples=examples,
        num_pictures=len(np.unique(_numbers(table.pictures))),
        num_picture_uses=len(table.pictures),
    )


def overlap(first: DigestTable, second: DigestTable) -> Overlap:
    """What `second` (the evaluation's samples) shares with `first` (the training's).

    A sample without a picture has its question alone: it counts as both.
    """
    pictures = _numbers(second.pictures)
    shared = np.isin(pictures, _numbers(first.pictures))
    with_picture = np.unique(_numbers(second.owners)[shared])
    questions = np.isin(_numbers(second.questions), _numbers(first.questions))
    both = np.flatnonzero(np.isin(_numbers(second.asked), _numbers(first.asked)))
    shown = both if len(both) else with_picture
    return Overlap(
        num_pictures=len(np.unique(pictures[shared])),
        num_with_picture=len(with_picture),
        num_with_question=int(questions.sum()),
        num_with_both=len(both),
        examples=tuple(int(at) for at in shown[:NUM_EXAMPLES]),
    )


def _numbers(values: array[int]) -> np.ndarray:
    return np.frombuffer(values, dtype=np.uint64) if values else np.empty(0, np.uint64)
