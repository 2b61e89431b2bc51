"""What is asked and said about a scene: captions, naming, counting, places, and verification.

`draw_question(random, scene, weights)` picks a kind and gives one `Question`. Kinds are kept
apart in the held-out report. Yes and no are equally likely, and a wrong word is one of the words
that would fit another picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tiny_vlm.pictures import Scene, Thing
from tiny_vlm.words import COLORS, NUMBERS, SHAPES


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


# Shares at the start, and from 20, 45 and 62.5 % of the training on. What is left for the end is
# what comes late: shapes among several things, places.
CURRICULUM: list[tuple[float, dict[str, float]]] = [
    (
        0.0,
        {
            "name": 30,
            "caption": 14,
            "choose": 14,
            "pick": 8,
            "explained": 12,
            "verify": 14,
            "count": 4,
            "place": 2,
            "size": 2,
        },
    ),
    (
        0.2,
        {
            "name": 16,
            "caption": 8,
            "choose": 8,
            "pick": 6,
            "explained": 10,
            "verify": 32,
            "negated": 8,
            "pair": 4,
            "count": 3,
            "place": 3,
            "size": 2,
        },
    ),
    (
        0.45,
        {
            "name": 10,
            "caption": 6,
            "choose": 5,
            "pick": 4,
            "explained": 5,
            "verify": 26,
            "negated": 26,
            "pair": 6,
            "count": 4,
            "place": 5,
            "size": 3,
        },
    ),
    (
        0.625,
        {
            "name": 20,
            "caption": 8,
            "choose": 4,
            "pick": 6,
            "explained": 4,
            "verify": 17,
            "negated": 17,
            "pair": 5,
            "count": 6,
            "place": 12,
            "size": 5,
        },
    ),
]

NAME_SHAPE = [
    "name the figure.",
    "which form do you see here?",
    "what kind of figure did somebody draw?",
    "tell me the shape.",
    "the drawn shape is called",
    "what has been drawn?",
    "in one word, which figure is it?",
    "identify the outline.",
]
NAME_SHAPE_OF = [
    "which form has the {color} one?",
    "the {color} thing is a what?",
    "name the {color} figure.",
    "what did somebody paint in {color}?",
    "tell me which outline the {color} object has.",
]
NAME_COLOR = [
    "name the color.",
    "which color was used?",
    "how is the object painted?",
    "tell me its color.",
    "in one word, how is it colored?",
    "which paint did they take?",
    "the color of this object, please.",
]
NAME_COLOR_OF = [
    "how is the {shape} painted?",
    "which color did the {shape} get?",
    "name the {shape}'s color.",
    "tell me how the {shape} is colored.",
    "the paint on the {shape} is",
]
# {a} stands for an attribute with its article or noun: "a circle", "something red".
VERIFY = [
    "do you see {a}?",
    "can you find {a} here?",
    "look for {a}. found?",
    "did somebody draw {a}?",
    "can {a} be seen?",
    "tell me if you see {a}.",
    "would you say that this shows {a}?",
    "{a}: yes or no?",
    "am i right that {a} can be found?",
    "has {a} been drawn?",
]
VERIFY_WORD = [
    "{word}?",
    "is it {word}?",
    "does the word {word} fit?",
    "would {word} be right?",
    "could you call it {word}?",
    "is {word} in this scene?",
]
NEGATED = [
    "do you see no {n}?",
    "did nobody draw {a}?",
    "is this free of any {n}?",
    "have they left out {a}?",
    "can you not find {a} here?",
    "is it true that you see no {n}?",
    "would it be wrong to say that you see {a}?",
    "{a} is missing: yes or no?",
    "has no {n} been drawn?",
    "am i right that {a} can not be found?",
]
NEGATED_WORD = [
    "is it not {word}?",
    "not {word}?",
    "does the word {word} not fit?",
    "would {word} be wrong?",
    "is {word} not in this scene?",
]
CAPTION = [
    "describe the picture.",
    "what do you see?",
    "write a caption.",
    "tell me about this scene.",
    "say what was drawn.",
]
COUNT = [
    "how many things do you see?",
    "count the objects.",
    "how many figures were drawn?",
    "give the number of objects.",
]


def weights_at(progress: float) -> dict[str, float]:
    """The kinds' shares at `progress`, from 0 to 1, of the training."""
    return [weights for start, weights in CURRICULUM if progress >= start][-1]


def draw_question(random: Random, scene: Scene, weights: dict[str, float]) -> Question:
    """One question that the scene answers without doubt; kinds that cannot be asked are redrawn."""
    kinds, shares = list(weights), list(weights.values())
    while True:
        kind = random.choices(kinds, shares)[0]
        asked = MAKERS[kind](random, scene)
        if asked is not None:
            name, text, answer = asked
            if random.random() < 0.25:
                text = text[0].upper() + text[1:]
            return Question(name, text, answer)


Asked = tuple[str, str, str] | None


def _name(random: Random, scene: Scene) -> Asked:
    thing = random.choice(scene.things)
    if random.random() < 0.6:
        if len(scene.things) == 1 and random.random() < 0.6:
            return "name shape", random.choice(NAME_SHAPE), thing.shape
        if sum(t.color == thing.color for t in scene.things) > 1:
            return None
        return "name shape", random.choice(NAME_SHAPE_OF).format(color=thing.color), thing.shape
    if len(scene.things) == 1 and random.random() < 0.6:
        return "name color", random.choice(NAME_COLOR), thing.color
    if sum(t.shape == thing.shape for t in scene.things) > 1:
        return None
    return "name color", random.choice(NAME_COLOR_OF).format(shape=thing.shape), thing.color


def _caption(random: Random, scene: Scene) -> Asked:
    things = sorted(scene.things, key=lambda t: t.x)
    if len(things) > 2 or (len(things) == 2 and things[1].x - things[0].x < 8):
        return None
    said = " and ".join(f"a {t.color} {t.shape}" for t in things)
    return "caption", random.choice(CAPTION), said


def _choose(random: Random, scene: Scene) -> Asked:
    attribute, right, wrong = _right_and_wrong(random, scene)
    pair = [right, wrong]
    random.shuffle(pair)
    forms = ["{} or {}?", "which word fits, {} or {}?", "would you say {} or {}?"]
    return f"choose {attribute}", random.choice(forms).format(*pair), right


def _pick(random: Random, scene: Scene) -> Asked:
    right = _words(scene)
    wrong = [w for w in SHAPES + COLORS if w not in right]
    listed = random.sample(right, min(len(right), random.randint(1, 2)))
    asked = listed + random.sample(wrong, random.randint(2, 4))
    random.shuffle(asked)
    said = " and ".join(word for word in asked if word in listed)
    forms = ["which of these fit: {}?", "pick the words that fit: {}."]
    return "pick", random.choice(forms).format(", ".join(asked)), said


def _verify(random: Random, scene: Scene, *, negated: bool = False) -> Asked:
    attribute, word, holds = _claim(random, scene)
    single = len(scene.things) == 1
    if random.random() < (0.35 if single else 0.15):
        forms = NEGATED_WORD if negated else VERIFY_WORD
        # "is it red?" needs one thing; the last wording asks about the whole scene.
        text = (random.choice(forms) if single else forms[-1]).format(word=word)
    else:
        text = random.choice(NEGATED if negated else VERIFY)
        text = text.format(a=_with_article(random, attribute, word), n=_noun(attribute, word))
    kind = "negated" if negated else "verify"
    return f"{kind} {attribute}", text, "yes" if holds != negated else "no"


def _negated(random: Random, scene: Scene) -> Asked:
    return _verify(random, scene, negated=True)


def _explained(random: Random, scene: Scene) -> Asked:
    if len(scene.things) != 1:
        return None
    attribute, word, holds = _claim(random, scene)
    seen = getattr(scene.things[0], attribute)
    forms = ["do you see {a}? explain.", "is it {word}? give a reason.", "{word}? say why."]
    text = random.choice(forms).format(a=_with_article(random, attribute, word), word=word)
    if random.random() < 0.5:
        text = "think first. " + text
        return "explained", text, f"it is {seen}, so {'yes' if holds else 'no'}"
    return "explained", text, f"{'yes' if holds else 'no'}, it is {seen}"


def _pair(random: Random, scene: Scene) -> Asked:
    """A colour and a shape together; wrong pairs share one of the two."""
    thing = random.choice(scene.things)
    color, shape = thing.color, thing.shape
    holds = random.random() < 0.5
    if not holds:
        if random.random() < 0.5:
            color = random.choice([c for c in COLORS if c != color])
        else:
            shape = random.choice([s for s in SHAPES if s != shape])
        if any((t.color, t.shape) == (color, shape) for t in scene.things):
            return None
    article = "an" if color == "orange" else "a"
    text = random.choice(VERIFY).format(a=f"{article} {color} {shape}")
    return "verify pair", text, "yes" if holds else "no"


def _count(random: Random, scene: Scene) -> Asked:
    return "count", random.choice(COUNT), NUMBERS[len(scene.things)]


def _place(random: Random, scene: Scene) -> Asked:
    thing, name = _point_out(random, scene)
    if name is None:
        return None
    axis = random.choice("xy")
    value = thing.x if axis == "x" else thing.y
    if abs(value - 32) < 6:
        return None
    if axis == "x":
        text = random.choice(["left or right: where is {}?", "on which side is {}, left or right?"])
        return "place", text.format(name), "left" if value < 32 else "right"
    text = random.choice(["top or bottom: where is {}?", "is {} near the top or the bottom?"])
    return "place", text.format(name), "top" if value < 32 else "bottom"


def _size(random: Random, scene: Scene) -> Asked:
    thing, name = _point_out(random, scene)
    if name is None or thing.size == "medium":
        return None
    text = random.choice(["large or small: how big is {}?", "is {} large or small?"])
    return "size", text.format(name), thing.size


MAKERS: dict[str, Callable[[Random, Scene], Asked]] = {
    "name": _name,
    "caption": _caption,
    "choose": _choose,
    "pick": _pick,
    "verify": _verify,
    "negated": _negated,
    "explained": _explained,
    "pair": _pair,
    "count": _count,
    "place": _place,
    "size": _size,
}


def _words(scene: Scene) -> list[str]:
    return sorted({t.shape for t in scene.things} | {t.color for t in scene.things})


def _right_and_wrong(random: Random, scene: Scene) -> tuple[str, str, str]:
    attribute = random.choice(["shape", "color"])
    words = SHAPES if attribute == "shape" else COLORS
    right = [getattr(t, attribute) for t in scene.things]
    return attribute, random.choice(right), random.choice([w for w in words if w not in right])


def _claim(random: Random, scene: Scene) -> tuple[str, str, bool]:
    """An attribute, a word for it, and whether something in the scene has it."""
    attribute, right, wrong = _right_and_wrong(random, scene)
    holds = random.random() < 0.5
    return attribute, right if holds else wrong, holds


def _with_article(random: Random, attribute: str, word: str) -> str:
    article = "an" if word == "orange" else "a"
    if attribute == "shape":
        return f"{article} {word}"
    return random.choice(
        [f"{article} {word} thing", f"anything {word}", f"{article} {word} object", word]
    )


def _noun(attribute: str, word: str) -> str:
    return word if attribute == "shape" else f"{word} thing"


def _point_out(random: Random, scene: Scene) -> tuple[Thing, str | None]:
    thing = random.choice(scene.things)
    if len(scene.things) == 1:
        return thing, random.choice(["it", f"the {thing.shape}", f"the {thing.color} one"])
    if sum(t.shape == thing.shape for t in scene.things) == 1:
        return thing, f"the {thing.shape}"
    if sum(t.color == thing.color for t in scene.things) == 1:
        return thing, f"the {thing.color} one"
    return thing, None
