"""What a model still gets wrong, and a limited selection of predictions before and after training.

rows after (and before, matched by id) -> fixed | broken | wrong | right | unscored, and a slice
  -> one of each (outcome, slice) in turn, in an order fixed by the ids -> cards with thumbnails
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, zip_longest
from typing import Any

from vlmtune.data.dataset import load_conversations
from vlmtune.data.run_entries import RunData, entry_as_in_run
from vlmtune.data.types import Image
from vlmtune.errors import VlmtuneError
from vlmtune.report.charts import Tick, nice_range, tick_labels
from vlmtune.report.format import PER_CENT, Figure, number, short_number
from vlmtune.report.pictures import Thumbnail, Thumbnails
from vlmtune.report.run import Evaluation, Pair, is_right, row_key

MAX_ROWS = 40
MAX_MIXUPS = 8
MAX_WORDS = 60
"""The longest answer, in characters, that counts as confused with another."""


@dataclass(frozen=True)
class Spot:
    """A figure on the scale: value and interval as per cent of the width."""

    at: float
    low: float
    high: float
    figure: Figure


@dataclass(frozen=True)
class ScaleRow:
    label: str
    count: int | None
    before: Spot | None
    after: Spot | None


@dataclass(frozen=True)
class Scale:
    """The main figure before and after, over all samples and by slice."""

    figure: str
    rows: tuple[ScaleRow, ...]
    ticks: tuple[Tick, ...]
    num_left_out: int


@dataclass(frozen=True)
class Mixup:
    answered: str
    right: str
    count: int


def worst_slices(evaluation: Evaluation, figure: str) -> list[tuple[str, Figure]]:
    """The slices by a figure, worst first."""
    found = [(kind, of[figure]) for kind, of in evaluation.slices.items() if figure in of]
    return sorted(found, key=lambda s: s[1].value, reverse=any(f.lower_is_better for _, f in found))


def mixups(evaluation: Evaluation) -> list[Mixup]:
    """The most frequent wrong answers with the right one, at least twice each. Ranked queries are
    left out: they have many answers."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in evaluation.rows:
        answered, right = row.get("prediction"), row.get("answer")
        if is_right(row) is not False or "direction" in row or not isinstance(answered, str):
            continue
        if isinstance(right, str) and max(len(answered), len(right)) <= MAX_WORDS:
            counts[(answered.strip(), right)] += 1
    return [
        Mixup(answered, right, count)
        for (answered, right), count in counts.most_common(MAX_MIXUPS)
        if count > 1
    ]


def draw_scale(pair: Pair) -> Scale | None:
    """The main figure on one scale, all samples first, then the slices, worst first."""
    shown, name = pair.shown, pair.main_figure
    if shown is None or name is None:
        return None
    before, after = pair.before, pair.after
    rows = [("all", _figure(before, name), _figure(after, name))]
    for kind, _ in worst_slices(shown, name):
        rows.append((kind, _figure(before, name, kind), _figure(after, name, kind)))
    figures = [f for _, *of in rows for f in of if f is not None]
    low, high, ticks = _range_of(figures)
    drawn = [
        ScaleRow(
            label=label,
            count=next((f.count for f in (a, b) if f is not None), None),
            before=_spot(b, low, high),
            after=_spot(a, low, high),
        )
        for label, b, a in rows[:MAX_ROWS]
    ]
    return Scale(name, tuple(drawn), tuple(ticks), max(0, len(rows) - MAX_ROWS))


def _figure(evaluation: Evaluation | None, name: str, kind: str | None = None) -> Figure | None:
    if evaluation is None:
        return None
    return (evaluation.figures if kind is None else evaluation.slices.get(kind, {})).get(name)


def _range_of(figures: Sequence[Figure]) -> tuple[float, float, list[Tick]]:
    if all(figure.is_share for figure in figures):
        return 0.0, 1.0, [Tick(25.0 * n, f"{25 * n}{PER_CENT}") for n in range(5)]
    known = [x for f in figures for x in (f.value, f.low, f.high) if x is not None]
    (low, high), values = nice_range(min(known), max(known))
    labels = tick_labels(values, "number")
    places = [100 * (value - low) / (high - low) for value in values]
    ticks = [Tick(place, label) for place, label in zip(places, labels, strict=True)]
    return low, high, ticks


def _spot(figure: Figure | None, low: float, high: float) -> Spot | None:
    if figure is None:
        return None

    def place(value: float | None) -> float:
        return 100 * ((figure.value if value is None else value) - low) / (high - low)

    return Spot(place(figure.value), place(figure.low), place(figure.high), figure)


MAX_CARDS = 200
MAX_CARD_PICTURES = 3
MAX_CHARACTERS = 500
MAX_RANKED = 3
OUTCOMES = ("broken", "wrong", "fixed", "right", "unscored")
"""The order of the cards: what went wrong comes first."""
EMBEDDED = "sha256:"


@dataclass(frozen=True)
class Answer:
    """An answer and how it counted; `is_right` is None without a score."""

    text: str
    is_right: bool | None
    score: str


@dataclass(frozen=True)
class Card:
    id: str
    outcome: str
    slice: str
    question: str
    reference: str
    before: Answer | None
    after: Answer | None
    pictures: tuple[Thumbnail, ...]
    num_pictures: int


@dataclass(frozen=True)
class Gallery:
    """`totals` counts all predictions by outcome, `shown` the cards."""

    cards: tuple[Card, ...]
    totals: dict[str, int]
    shown: dict[str, int]
    slices: tuple[str, ...]
    num_predictions: int
    has_both: bool


@dataclass(frozen=True)
class _Entry:
    key: tuple[str, str]
    outcome: str
    slice: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None

    @property
    def row(self) -> dict[str, Any]:
        row = self.after or self.before
        assert row is not None
        return row


def build_gallery(
    pair: Pair,
    *,
    thumbnails: Thumbnails,
    max_cards: int = MAX_CARDS,
    data: RunData | None = None,
) -> Gallery | None:
    """The gallery of a pair of evaluations; None without predictions. `data` says how the run reads
    the files that hold pictures."""
    entries = _entries(pair)
    if not entries:
        return None
    chosen = choose(entries, max_cards)
    embedded = _embedded_pictures(chosen, pair, data or RunData("", {}))
    cards = [_card(entry, thumbnails, embedded) for entry in chosen]
    totals = Counter(entry.outcome for entry in entries)
    shown = Counter(entry.outcome for entry in chosen)
    return Gallery(
        cards=tuple(cards),
        totals={name: totals[name] for name in OUTCOMES if totals[name]},
        shown={name: shown[name] for name in OUTCOMES if shown[name]},
        slices=tuple(sorted({entry.slice for entry in chosen if entry.slice})),
        num_predictions=len(entries),
        has_both=pair.before is not None and pair.after is not None,
    )


def outcome_of(before: bool | None, after: bool | None, *, has_before: bool) -> str:
    """`fixed` or `broken` where training changed the outcome, else `right` or `wrong`."""
    if after is None:
        return "unscored"
    if not has_before or before is None or before == after:
        return "right" if after else "wrong"
    return "fixed" if after else "broken"


def choose(entries: Sequence[_Entry], limit: int) -> list[_Entry]:
    """At most `limit` entries, in the order of OUTCOMES: one of each (outcome, slice) in turn, so
    that rare ones are not crowded out. The choice is the same every time."""
    groups: dict[tuple[str, str], list[_Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda e: sha256("\0".join(e.key).encode()).digest()):
        groups[(entry.outcome, entry.slice)].append(entry)
    turns = zip_longest(*(groups[name] for name in sorted(groups)))
    drawn = [entry for entry in chain.from_iterable(turns) if entry is not None][:limit]
    return sorted(drawn, key=lambda e: OUTCOMES.index(e.outcome))


def _entries(pair: Pair) -> list[_Entry]:
    before = {row_key(row): row for row in (pair.before.rows if pair.before else ())}
    if pair.after is None:
        rows = before
        return [_entry(key, None, row) for key, row in rows.items()]
    return [_entry(row_key(row), before.get(row_key(row)), row) for row in pair.after.rows]


def _entry(key: tuple[str, str], before: dict[str, Any] | None, after: dict[str, Any]) -> _Entry:
    outcome = outcome_of(is_right(before), is_right(after), has_before=before is not None)
    kind = after.get("question_type") or after.get("direction") or ""
    return _Entry(key, outcome, format_slice(kind), before, after)


def format_slice(kind: object) -> str:
    return clipped(kind).replace("_", " ")


def _card(entry: _Entry, thumbnails: Thumbnails, embedded: Mapping[tuple[str, int], Image]) -> Card:
    row = entry.row
    images = _images(row)
    pictures = []
    for index, name in enumerate(images[:MAX_CARD_PICTURES]):
        found = embedded.get((entry.key[0], index))
        pictures.append(thumbnails.of_path(name) if found is None else thumbnails.of(found))
    return Card(
        id=clipped(entry.key[0]),
        outcome=entry.outcome,
        slice=entry.slice,
        question=clipped(row.get("question")),
        reference=clipped(_reference(row)),
        before=_answer(entry.before),
        after=_answer(entry.after),
        pictures=tuple(pictures),
        num_pictures=len(images),
    )


def _images(row: Mapping[str, Any]) -> list[str]:
    images = row.get("images")
    return [str(image) for image in images] if isinstance(images, list) else []


def _reference(row: Mapping[str, Any]) -> str:
    answers = row.get("answers")
    if isinstance(answers, list) and answers:
        counts = Counter(map(str, answers))
        return " · ".join(
            f"{_short_path(answer)} (x{count})" if count > 1 else _short_path(answer)
            for answer, count in counts.most_common(10)
        )
    return "" if row.get("answer") is None else str(row["answer"])


def _answer(row: Mapping[str, Any] | None) -> Answer | None:
    if row is None:
        return None
    text = row.get("prediction")
    if isinstance(row.get("top"), list):
        text = " · ".join(_short_path(_ranked(entry)) for entry in row["top"][:MAX_RANKED])
    score, rank = number(row.get("score")), number(row.get("rank"))
    shown = "" if score is None or score in (0, 1) else f"score {short_number(score)}"
    if rank is not None:
        shown = f"rank {rank:g}"
    return Answer(clipped(text), is_right(dict(row)), shown)


def _ranked(entry: object) -> str:
    if isinstance(entry, Mapping):
        entry = entry.get("item", entry)
    return str(entry)


def _short_path(text: str) -> str:
    """The file name if `text` is a picture's path; else `text`."""
    return text.rpartition("/")[2] if text.startswith("/") and "\n" not in text else text


def clipped(text: object) -> str:
    words = "" if text is None else str(text)
    if len(words) <= MAX_CHARACTERS:
        return words
    return f"{words[:MAX_CHARACTERS]} … ({len(words):,} characters)"


def _embedded_pictures(
    chosen: Sequence[_Entry], pair: Pair, data: RunData
) -> dict[tuple[str, int], Image]:
    """Pictures stored in the data file itself, by (id, position). Predictions name them by digest;
    they are found where the file still exists and holds the same pictures."""
    wanted = {
        (entry.key[0], index): name
        for entry in chosen
        for index, name in enumerate(_images(entry.row)[:MAX_CARD_PICTURES])
        if name.startswith(EMBEDDED)
    }
    if not wanted or pair.shown is None:
        return {}
    try:
        entries = [entry_as_in_run(file, data).entry for file in pair.shown.data]
        conversations, _ = load_conversations(entries, on_bad_sample="skip", check_media=False)
    except VlmtuneError:
        return {}
    found = {}
    for conversation in conversations:
        for index, image in enumerate(conversation.images):
            key = (conversation.id, index)
            if key in wanted and _is_named(image, wanted[key]):
                found[key] = image
    return found


def _is_named(image: Image, name: str) -> bool:
    # Imported here: with it come transformers and bitsandbytes, which few pages need.
    from vlmtune.evaluation.references import picture_name

    try:
        return picture_name(image) == name
    except VlmtuneError:
        return False
