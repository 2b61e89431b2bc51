"""The text that the tokenizer is trained on: words that should be one token, and English."""

from __future__ import annotations

SHAPES = ["circle", "rectangle", "triangle", "star", "cross", "ring", "heart", "moon"]
COLORS = [
    "red",
    "green",
    "blue",
    "black",
    "gray",
    "teal",
    "brown",
    "yellow",
    "orange",
    "purple",
    "pink",
]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
SINGLE_TOKENS = (
    SHAPES
    + COLORS
    + NUMBERS
    + """
    white grey square oval line dot figure object thing shape shapes color colour image picture
    photo scene drawing size small large big medium little left right top bottom middle center
    upper lower corner side above below yes no not none nothing something any true false correct
    wrong right is are was has have do does can you i it its this that there here the a an and or
    of in on at to for with without by from as but so if what which who where how why when many
    much number count name tell describe say see show look find contain contains contained include
    present absent missing appear appears answer question word words user assistant system same
    different other only just both all each every some more less than
    """.split()
)
ENGLISH = """
    about after again always another ask back because become before begin best better between book
    boy bring call came car change child city clear close cold come could country cut dark day deep
    did draw dry each early earth easy eat end enough even ever eye face fact family far fast father
    feel few fire first fish fly follow food foot form found friend full game gave get girl give go
    gold good great green group grow had half hand hard he head hear help her high him his home
    horse hot hour house hundred idea into key kind king know land last late laugh law lead learn
    leave let letter life light like live long love made make man map may me mean men might mile
    mind money month morning most mother mountain move mr music must my near need never new next
    night noon north note now off often oh old once open order our out over own page paper part
    people person place plan plant play point port pound power problem product pull put quick rain
    ran read ready real rest river road rock room round rule run sail school science sea second
    seem self set she ship short should simple sing sit sleep slow snow song soon sound south spell
    stand start state stay step stop story street strong study such sun sure table take talk ten
    test their them then these they thought thousand three through time together too took town
    travel tree try turn under unit until up us use very voice vowel wait walk want warm watch water
    way we week well went were west wheel while wind window winter wonder wood work world would
    write year young your
    model train data learn language vision text token label file example sample value result task
    """.split()


def tokenizer_corpus() -> list[str]:
    """The words, weighted so that those of `SINGLE_TOKENS` become one token each.

    A word counts with a leading space, without one, and with a capital letter.
    """
    corpus = []
    for word in SINGLE_TOKENS:
        corpus += [f" {word}"] * 400 + [word] * 200
    for word in SINGLE_TOKENS[len(SHAPES + COLORS + NUMBERS) :]:
        corpus += [word.capitalize()] * 4
    for word in ENGLISH:
        corpus += [f" {word}"] * 8 + [word] * 2
    return corpus + [str(number) for number in range(100)]
