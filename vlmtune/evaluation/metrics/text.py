"""Metrics of short answers: exact match, VQA accuracy, token F1, ANLS, relaxed accuracy, yes or no.

Antol et al. 2015 (arXiv 1505.00468), Goyal et al. 2017 (arXiv 1612.00837);
https://visualqa.org/evaluation.html. The steps, on predictions and references alike:

    line breaks and tabs to spaces -> punctuation -> periods -> lower case
    -> number words to digits -> articles away -> missing apostrophes of contractions

Deviations from the reference script (GT-Vision-Lab/VQA, `vqaEval.py`):
- It normalises references only where the ten answers differ, and then only their punctuation, as
  the data set's answers come in lower case; here always and wholly, as the protocol's text says.
- It turns `somebody'd` into `somebodyd`, the pair written the wrong way round; here the other way.
- It strips at most 32 periods of an answer; here all.
- Of an answer that is nothing but articles or punctuation it leaves nothing, so that an empty
  answer equals the letter "A"; here its articles or marks stay.
- Its entries `Im`, `Ive`, `Id've`, `let's` and `she's` can never have an effect (answers are lower
  case by then, the last two map to themselves) and are left out.

Myers 1999 (Journal of the ACM 46(3)) in the form of Hyyrö 2003 ("A bit-vector algorithm for
computing Levenshtein and Damerau edit distances") and Hyyrö 2004 ("Bit-parallel LCS-length
computation revisited"). The usual table has len(a) x len(b) cells filled one by one; here bit i of
an integer stands for row i, so that a long answer costs no more than its length.

Normalised by the VQA protocol's rule. Not a benchmark's official figure: each
has its own normalisation (SQuAD's is in `token_f1.py`).

Antol et al. 2015 (arXiv 1505.00468), section 3, in the leave-one-out form of the evaluation
protocol: the mean, over the ten people, of min(others of the nine who gave this answer / 3, 1).

Deviation: the protocol has exactly ten answers; any number from `MIN_ANSWERS` is taken. With fewer,
not even a unanimous answer would score 1, and the sample is left out of the metric.

Rajpurkar et al. 2016 (SQuAD, arXiv 1606.05250), section 6.1, as the data set's script: lower case,
without punctuation and articles, split at spaces; the harmonic mean of the shared words' share of
the prediction and of the reference, words counted as often as they occur; best over references.

As version 2.0 of the script, and unlike 1.1: where one of the two texts has no word left, the score
is 1 if both have none, else 0. No deviation.

Average normalised Levenshtein similarity, Biten et al. 2019 (arXiv 1905.13648), section 5: the mean
over questions of the best, over the references, of

    1 - NL  if NL is below 0.5, else 0;   NL = edit distance / length of the longer text

on lower-case texts with single spaces, as the Robust Reading Competition's script does (DocVQA,
InfographicVQA; https://rrc.cvc.uab.es).

Deviations:
- From the paper, with the script: an NL of exactly 0.5 scores 0.5, not 0. That is common: one wrong
  digit of two. Figures of leaderboards are made by the script.
- From the script: lengths are those of the compared texts, not of the texts before spaces went.
- Two empty texts score 1.

Masry et al. 2022 (ChartQA, arXiv 2203.10244), end of section 5.1, after Methani et al. 2020; in the
form of pix2struct's `relaxed_correctness`, which the published figures use. Best over references:

- Prediction and reference are both numbers, the reference not 0: right if they differ by at most
  5 % of the reference. "12 %" is 0.12, so that "12" is not within 5 % of it.
- Otherwise: right if the texts are the same in lower case. "1,000" is a text, not a number.

Deviations: space around the texts, and before the percent sign, is ignored; "nan", "inf" and
"1_000" are texts.

Li et al. 2023 (POPE, arXiv 2305.10355), section 5.2. Applies to samples whose reference is yes or
no. POPE's script reads an answer so: of the text up to the first period, without commas, split at
spaces, "no" if one of the words is "No", "no" or "not", else "yes".

Deviations:
- An answer without a "no" is a "yes" for the script whatever it says ("a dog", an empty text). Here
  it must have the word "yes". An answer that is neither is wrong and counts in `yes_no_unparsed`:
  not as a "yes", so that precision and `yes_fraction` do not see it, but as a "yes" that was missed
  where "yes" was right.
- Words are compared in lower case and without the marks around them ("No!", "NO"); "n't" at the end
  of a word counts as "not".
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

from vlmtune.evaluation.metrics.base import Answered, Floats, Statistics, divided

ARTICLES = frozenset({"a", "an", "the"})

_NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBER_WORDS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}

# Neither the apostrophe (possessives) nor the colon (times of day) is among them.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_DIGIT_GROUPS = re.compile(r"\d,\d")
# The script means "not between digits", but its look-behind is misspelt and never holds: a period
# is kept if a digit follows it ("3.5", ".5") and goes otherwise ("3.", "st. louis").
_PERIOD = re.compile(r"\.(?!\d)")

# Forms whose apostrophe is put back when exactly one is missing ("couldnt've", "couldn'tve").
# Words that are words without it (we'll, he'll, it's, she'd) are not among them.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've
""".split()


def _missing_one_apostrophe(word: str) -> list[str]:
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {
    broken: whole for whole in _CONTRACTIONS for broken in _missing_one_apostrophe(whole)
}


def normalize_answer(text: str) -> str:
    """`text` as the VQA protocol compares it."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    words = [NUMBER_WORDS.get(word, word) for word in _strip_punctuation(text).lower().split()]
    kept = [CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(kept or words) or text.lower()


def _strip_punctuation(text: str) -> str:
    """Each mark goes: without a trace if it touches a space anywhere in the answer or the answer
    has a digit group like 1,000; otherwise it leaves a space."""
    has_digit_group = _DIGIT_GROUPS.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if touches_space or has_digit_group else " ")
    return _PERIOD.sub("", result)


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The fewest insertions, deletions and substitutions that turn `a` into `b` (Levenshtein)."""
    if not a:
        return len(b)
    rows = _rows_of(a)
    every = (1 << len(a)) - 1
    last = 1 << (len(a) - 1)
    # Bit i: the cell of row i is one more (up) or one less (down) than that of row i - 1.
    up, down = every, 0
    distance = len(a)
    for item in b:
        equal = rows.get(item, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right = down | (every & ~(diagonal | up))  # one more than the cell to the left
        left = up & diagonal  # one less
        distance += bool(right & last) - bool(left & last)
        right = (right << 1) | 1  # row 0 grows by one a column
        left <<= 1
        vertical = equal | down
        up = every & (left | ~(vertical | right))
        down = every & right & vertical
    return distance


def common_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence of `a` and `b`."""
    rows = _rows_of(a)
    every = (1 << len(a)) - 1
    # Bit i is 0 where the length grows from row i - 1 to row i.
    flat = every
    for item in b:
        matched = flat & rows.get(item, 0)
        flat = every & ((flat + matched) | (flat - matched))
    return len(a) - flat.bit_count()


def _rows_of(a: Sequence[Hashable]) -> dict[Hashable, int]:
    """For each item the rows it stands in, as bits."""
    rows: dict[Hashable, int] = {}
    for number, item in enumerate(a):
        rows[item] = rows.get(item, 0) | (1 << number)
    return rows


def exact_match(sample: Answered) -> float | None:
    """1.0 or 0.0; None where the sample has no reference.

    `answer` is the conversation's last assistant turn. Without one, the most frequent of `answers`
    counts, and each of several equally frequent ones: the consensus of ten people, or any entry of
    a list of accepted answers.
    """
    accepted = accepted_answers(sample)
    if not accepted:
        return None
    return float(normalize_answer(sample.prediction) in accepted)


def accepted_answers(sample: Answered) -> set[str]:
    """Normalised: `answer`, or else the most frequent of `answers`; empty without a reference."""
    if sample.answer is not None:
        return {normalize_answer(sample.answer)}
    counts = Counter(normalize_answer(answer) for answer in sample.answers)
    return {answer for answer, count in counts.items() if count == max(counts.values())}


MIN_ANSWERS = 4


def vqa_accuracy(sample: Answered) -> float | None:
    """Between 0.0 and 1.0; None where the sample has fewer than `MIN_ANSWERS` answers.

    `answer` is not used: the people's answers are the reference.
    """
    if len(sample.answers) < MIN_ANSWERS:
        return None
    normalized = normalize_answer(sample.prediction)
    matches = [normalize_answer(given) == normalized for given in sample.answers]
    total = sum(matches)
    return sum(min((total - is_match) / 3, 1.0) for is_match in matches) / len(matches)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def token_f1(sample: Answered) -> float | None:
    """Between 0.0 and 1.0; None where the sample has no reference."""
    if not sample.references:
        return None
    given = _words(sample.prediction)
    return max(_f1(given, _words(reference)) for reference in sample.references)


def _f1(given: list[str], reference: list[str]) -> float:
    if not given or not reference:
        return float(given == reference)
    shared = (Counter(given) & Counter(reference)).total()
    return 2 * shared / (len(given) + len(reference))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


THRESHOLD = 0.5


def anls(sample: Answered) -> float | None:
    """0.0, or 0.5 to 1.0; None where the sample has no reference."""
    if not sample.references:
        return None
    given = _plain(sample.prediction)
    return max(_similarity(given, _plain(reference)) for reference in sample.references)


def _similarity(given: str, reference: str) -> float:
    longer = max(len(given), len(reference))
    if longer == 0:
        return 1.0
    similarity = 1 - edit_distance(given, reference) / longer
    return similarity if similarity >= THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


TOLERANCE = 0.05


def relaxed_accuracy(sample: Answered) -> float | None:
    """1.0 or 0.0; None where the sample has no reference."""
    if not sample.references:
        return None
    return float(any(_is_right(sample.prediction, reference) for reference in sample.references))


def _is_right(given: str, reference: str) -> bool:
    value, target = _number(given), _number(reference)
    if value is None or not target:
        return given.strip().lower() == reference.strip().lower()
    return abs(value - target) / abs(target) <= TOLERANCE


def _number(text: str) -> float | None:
    text = text.strip()
    digits = text.rstrip("%")
    try:
        value = float(digits) if "_" not in digits else math.nan
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100 if digits != text else value


_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


def yes_no_statistics(samples: Sequence[Answered]) -> list[Statistics | None]:
    """Right and wrong "yes", missed "yes", right "no", answers that are neither, answers."""
    return [_yes_no_counts(sample) for sample in samples]


def yes_no_figures(sums: Floats) -> dict[str, Floats]:
    right_yes, wrong_yes, missed_yes, right_no, unparsed, count = (
        sums[..., number] for number in range(6)
    )
    return {
        "yes_no_accuracy": divided(right_yes + right_no, count),
        "yes_no_precision": divided(right_yes, right_yes + wrong_yes),
        "yes_no_recall": divided(right_yes, right_yes + missed_yes),
        "yes_no_f1": divided(2 * right_yes, 2 * right_yes + wrong_yes + missed_yes),
        "yes_fraction": divided(right_yes + wrong_yes, count),
        "yes_no_unparsed": divided(unparsed, count),
    }


def parse_yes_no(text: str) -> Literal["yes", "no"] | None:
    """What the first sentence of `text` says; None where it says neither."""
    words = _WORD.findall(text.replace("\u2019", "'").lower().partition(".")[0])
    if any(word in ("no", "not") or word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else None


def _yes_no_counts(sample: Answered) -> Statistics | None:
    accepted = accepted_answers(sample)
    if accepted not in ({"yes"}, {"no"}):
        return None
    said = parse_yes_no(sample.prediction)
    is_right = said in accepted
    outcomes = (
        is_right and said == "yes",
        not is_right and said == "yes",
        not is_right and "yes" in accepted,
        is_right and said == "no",
        said is None,
        True,
    )
    return Statistics(float(is_right), tuple(float(outcome) for outcome in outcomes))
