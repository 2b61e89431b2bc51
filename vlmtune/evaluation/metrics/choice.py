"""Metrics of a choice: the option or the class that an answer names.

There is no one rule. MMMU (arXiv 2311.16502), whose script is the nearest to this one, guesses at
random where it finds no option and takes the last of several; MMBench (arXiv 2307.06281) asks a
language model. The rule here, in this order, on the answer without a lead like "The answer is":

    1. the whole answer is an option's text -> that option
    2. letters marked as letters ("(B)", "B) …", "B.", "**B**", "option B", or nothing but the
       letter): the one that they all are
    3. capital letters that stand alone, and options' texts that occur as whole words (of texts
       inside one another the longer): the one option that they all are

An answer that names none or several options is wrong and counts in `choice_unparsed`; nothing is
guessed. So is one whose letter is followed by the text of another option. A small letter counts
only where it is marked; "A" before a noun is the article unless it is marked.

The classes are the references' (normalised as in `text.py`; the consensus where a sample has
several). For class k with right_k answers, given_k answers and wanted_k references of that class:

    F1_k = 2 right_k / (given_k + wanted_k);    macro-F1 = mean of F1_k over the classes

as in Sokolova & Lapalme 2009 (10.1016/j.ipm.2009.03.002), in the form that averages the classes' F1
(scikit-learn's `average="macro"`), not the F1 of averaged precision and recall.

An answer that is none of the classes is wrong and counts in `class_unparsed`.

What to know: scikit-learn also averages over classes that were only predicted; here an answer
outside the classes lowers its reference's F1 but is no class of its own. In a slice or a resample
the mean is over the classes that occur there as references. A class is the whole answer: "a cat."
is "cat", "It is a cat" is not.

Letters for shapes: C classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np

from vlmtune.evaluation.metrics.base import Answered, Floats, Statistics, divided
from vlmtune.evaluation.metrics.text import accepted_answers, normalize_answer

_LEAD = re.compile(
    r"^(?:so,?\s+|therefore,?\s+)?(?:the\s+|my\s+)?(?:(?:correct|right|best|final)\s+)?"
    r"(?:answer|option|choice)\b(?:\s+(?:is|would\s+be))?\s*:?\s*",
    re.IGNORECASE,
)
_WHOLE = re.compile(r"[\s(\[*\"']*([A-Za-z])[\s)\].:,*\"']*")
_LABEL = re.compile(r"[(\[*]*([A-Za-z])(?:[)\].:*]+(?=\s)|,?\n|\s+[-–—])\s*(.+)", re.DOTALL)
_MARKED = re.compile(
    r"\(([A-Za-z])\) | \[([A-Za-z])\] | \*\*\(?([A-Za-z])[).:]?\*\*"
    r"| (?<!\w)([A-Za-z])\)(?=\s|$)"
    r"| (?i:\b(?:answer|option|choice)(?:\s+is)?)\s*:?\s+\(?([A-Z])(?![\w'])",
    re.VERBOSE,
)
_ALONE = re.compile(
    r"(?<![\w'])(?:[B-HJ-Z](?![\w'-])|[AI](?=\W*$|[.,;:]|\s(?:and|or|is|because|since)\b))"
)
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)")
_MARKS = " \t.,:;!?\"'()[]*`"


def multiple_choice_statistics(samples: Sequence[Answered]) -> list[Statistics | None]:
    """Right answers, answers that name none or several options, answers."""
    return [_choice_counts(sample) for sample in samples]


def multiple_choice_figures(sums: Floats) -> dict[str, Floats]:
    return {
        "choice_accuracy": divided(sums[..., 0], sums[..., 2]),
        "choice_unparsed": divided(sums[..., 1], sums[..., 2]),
    }


def option_index(reference: str, options: Sequence[str]) -> int | None:
    """Which option `reference` is: an option's text or its letter (text first, where options are
    letters themselves). None where it is neither, or the text of several."""
    by_text = _index_of_text(reference, option_texts(options))
    if by_text is not None:
        return by_text
    letter = _WHOLE.fullmatch(reference)
    return None if letter is None else _index_of_letter(letter[1], len(options))


def reference_options(sample: Answered) -> set[int]:
    """The options that are right; empty without options or where no reference is one of them."""
    accepted = sample.answers if sample.answer is None else (sample.answer,)
    found = {option_index(reference, sample.options) for reference in accepted}
    return {index for index in found if index is not None}


def parse_choice(answer: str, options: Sequence[str]) -> int | None:
    """The one option that `answer` names; None where it names none or several."""
    texts = option_texts(options)
    for whole in (answer, said := _LEAD.sub("", answer.strip())):
        by_text = _index_of_text(whole, texts)
        if by_text is not None:
            return by_text
    label = _WHOLE.fullmatch(said) or _LABEL.match(said)
    marked = {letter for found in _MARKED.findall(answer) for letter in found if letter}
    named = _indices(marked | ({label[1]} if label else set()), len(options))
    if named and label and label.lastindex == 2:
        also = _index_of_text(label[2], texts)
        named |= set() if also is None else {also}
    if not named:
        named, rest = _take_texts(said, texts)
        named |= _indices(set(_ALONE.findall(rest)), len(options))
    return named.pop() if len(named) == 1 else None


def option_texts(options: Sequence[str]) -> list[str]:
    """The options as they are compared, without their own labels if all have them ("A. cat")."""
    labels = [_LABEL.match(option.strip()) for option in options]
    if all(
        label is not None and label[1].upper() == letter
        for label, letter in zip(labels, ascii_uppercase)
    ):
        options = [label[2] for label in labels if label is not None]
    return [_plain(option) for option in options]


def _choice_counts(sample: Answered) -> Statistics | None:
    right = reference_options(sample)
    if not right:
        return None
    chosen = parse_choice(sample.prediction, sample.options)
    is_right = float(chosen in right)
    return Statistics(is_right, (is_right, float(chosen is None), 1.0))


def _index_of_text(text: str, texts: Sequence[str]) -> int | None:
    """The one of `texts` that is `text`, with or without an article before it."""
    plain = _plain(text)
    for wanted in (plain, _ARTICLE.sub("", plain)):
        if wanted and texts.count(wanted) == 1:
            return texts.index(wanted)
    return None


def _take_texts(text: str, texts: Sequence[str]) -> tuple[set[int], str]:
    """Which of `texts` occur in `text` as whole words, and `text` with "_" in their places."""
    wanted = sorted((option for option in texts if _is_sought(option)), key=len, reverse=True)
    if not wanted:
        return set(), text
    found: set[str] = set()

    def take(match: re.Match[str]) -> str:
        found.add(_plain(match[0]))
        return "_"

    pattern = rf"(?<!\w)(?:{'|'.join(map(_as_pattern, wanted))})(?!\w)"
    rest = re.sub(pattern, take, " ".join(text.split()), flags=re.IGNORECASE)
    return {index for index, option in enumerate(texts) if option in found}, rest


def _as_pattern(option: str) -> str:
    """A number inside another is no word of its own: "1" is not in "1.5", "-1" or "1:30"."""
    before = r"(?<!\d[.,:/-])(?<!^[-\u2212])(?<!\W[-\u2212])" if option[0].isdigit() else ""
    after = r"(?![.,:/-]\d)" if option[-1].isdigit() else ""
    return before + re.escape(option) + after


def _is_sought(option: str) -> bool:
    """A single letter is looked for as a letter, not as a text."""
    return bool(option) and not (len(option) == 1 and option.isalpha())


def _indices(letters: set[str], num_options: int) -> set[int]:
    found = {_index_of_letter(letter, num_options) for letter in letters}
    return {index for index in found if index is not None}


def _index_of_letter(letter: str, num_options: int) -> int | None:
    index = ascii_uppercase.index(letter.upper())
    return index if index < num_options else None


def _plain(text: str) -> str:
    """Lower case, single spaces, no marks around; a text of nothing but marks stays as it is."""
    text = " ".join(text.casefold().split())
    return text.strip(_MARKS) or text


def classification_statistics(samples: Sequence[Answered]) -> list[Statistics | None]:
    """right_1 … right_C, given_1 … given_C, wanted_1 … wanted_C, answers outside the classes.

    A sample without a reference, or with several equally frequent ones, does not count.
    """
    wanted = [_only(accepted_answers(sample)) for sample in samples]
    numbers = {name: number for number, name in enumerate(sorted({n for n in wanted if n}))}
    known: dict[tuple[int, int | None], Statistics] = {}
    entries: list[Statistics | None] = []
    for sample, name in zip(samples, wanted):
        if not name:
            entries.append(None)
            continue
        outcome = (numbers[name], numbers.get(normalize_answer(sample.prediction)))
        if outcome not in known:  # at most C * (C + 1) of them, each with 3 C numbers
            known[outcome] = _class_counts(*outcome, num_classes=len(numbers))
        entries.append(known[outcome])
    return entries


def classification_figures(sums: Floats) -> dict[str, Floats]:
    num_classes = (sums.shape[-1] - 1) // 3
    right, given, wanted = (
        sums[..., part * num_classes : (part + 1) * num_classes] for part in range(3)
    )
    count = wanted.sum(axis=-1)
    f1 = np.where(wanted > 0, np.nan_to_num(divided(2 * right, given + wanted)), 0.0)
    return {
        "class_accuracy": divided(right.sum(axis=-1), count),
        "macro_f1": divided(f1.sum(axis=-1), (wanted > 0).sum(axis=-1).astype(float)),
        "class_unparsed": divided(sums[..., -1], count),
    }


def _class_counts(wanted: int, given: int | None, *, num_classes: int) -> Statistics:
    sums = [0.0] * (3 * num_classes + 1)
    sums[2 * num_classes + wanted] = 1.0
    if given is None:
        sums[-1] = 1.0
    else:
        sums[num_classes + given] = 1.0
        sums[given] = float(given == wanted)
    return Statistics(float(given == wanted), tuple(sums))


def _only(names: set[str]) -> str | None:
    return next(iter(names)) if len(names) == 1 else None
