"""The answer normalisation of the VQA evaluation protocol.

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
"""

from __future__ import annotations

import re

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
