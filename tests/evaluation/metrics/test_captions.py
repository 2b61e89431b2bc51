"""CIDEr-D, BLEU and ROUGE-L, against numbers by hand and the COCO caption toolkit's.

`coco_captions.json` holds captions with the figures that pycocoevalcap 1.2 gave for them, its Java
tokenizer included. That package is 100 MB for the sake of METEOR and SPICE, so that it is not in
the `test` extra; where it is installed, its scorers run here too.
"""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu

from vlmtune.evaluation.metrics.base import Answered
from vlmtune.evaluation.metrics.captions import rouge_l, tokenize_caption
from vlmtune.evaluation.metrics.registry import METRICS

COCO = json.loads((Path(__file__).parent / "coco_captions.json").read_text(encoding="utf-8"))
SAMPLES = [Answered(row["prediction"], None, tuple(row["references"])) for row in COCO["samples"]]


def captioned(prediction: str, *references: str) -> Answered:
    return Answered(prediction, None, references)


def figures_of(name: str, samples: list[Answered]) -> dict[str, float]:
    entries = METRICS[name].statistics(samples)
    sums = np.sum([entry.sums for entry in entries if entry], axis=0)
    return {figure: float(value) for figure, value in METRICS[name].figures(sums).items()}


def scores_of(name: str, samples: list[Answered]) -> list[float]:
    return [entry.score for entry in METRICS[name].statistics(samples) if entry]


def test_cider_by_hand() -> None:
    samples = [captioned("a cat", "a cat"), captioned("a dog", "a cow")]
    # "a" is in every sample and weighs log(2/2) = 0. First: "cat" and "a cat" match wholly, there
    # are no longer n-grams: 10 * (1 + 1 + 0 + 0) / 4. Second: nothing that weighs matches.
    assert scores_of("cider", samples) == pytest.approx([5.0, 0.0], abs=1e-12)
    assert figures_of("cider", samples) == pytest.approx({"cider": 2.5})


def test_cider_d_clips_repeated_words_and_punishes_length() -> None:
    samples = [captioned("cat cat cat", "cat"), captioned("dog", "dog")]
    # min(3 w, w) * w / (3 w * w) = 1/3; three words against one.
    clipped = 10 / 4 * (1 / 3) * math.exp(-(2**2) / (2 * 6**2))
    assert scores_of("cider", samples)[0] == pytest.approx(clipped, abs=1e-12)
    assert clipped != pytest.approx(10 / 4)  # CIDEr without the D


def test_cider_is_the_mean_over_references() -> None:
    alone = [captioned("red cat", "red cat"), captioned("dog", "dog")]
    both = [captioned("red cat", "red cat", "blue bird"), captioned("dog", "dog")]
    assert scores_of("cider", both)[0] == pytest.approx(scores_of("cider", alone)[0] / 2)


def test_a_single_sample_has_cider_0() -> None:
    assert figures_of("cider", [captioned("a cat", "a cat")]) == {"cider": 0.0}


def test_bleu_by_hand() -> None:
    # Papineni et al., section 2.1: "the" counts twice, as often as in the first reference.
    repeated = captioned("the " * 7, "The cat is on the mat.", "There is a cat on the mat.")
    assert figures_of("bleu", [repeated]) == pytest.approx(
        {"bleu_1": 2 / 7, "bleu_2": 0.0, "bleu_3": 0.0, "bleu_4": 0.0}
    )
    # Two words of six: exp(1 - 6/2), and no trigram at all.
    short = figures_of("bleu", [captioned("the cat", "the cat is on the mat")])
    assert short == pytest.approx(
        {"bleu_1": math.exp(-2), "bleu_2": math.exp(-2), "bleu_3": 0.0, "bleu_4": 0.0}
    )


def test_bleu_takes_the_shorter_of_two_equally_close_references() -> None:
    figures = figures_of("bleu", [captioned("red cat sat", "red cat sat down now", "red")])
    assert figures["bleu_1"] == 1.0  # against the longer: exp(1 - 5/3)


def test_bleu_is_of_sums_over_the_set() -> None:
    samples = [captioned("red cat", "red cat"), captioned("big dog ran off", "a bird flew away")]
    assert figures_of("bleu", samples)["bleu_1"] == pytest.approx(2 / 6)  # mean of scores: 1/2


def test_bleu_is_nltks() -> None:
    # nltk counts an n-gram for captions too short to have one.
    samples = [s for s in SAMPLES if len(tokenize_caption(s.prediction)) >= 4]
    references = [[tokenize_caption(text) for text in sample.answers] for sample in samples]
    given = [tokenize_caption(sample.prediction) for sample in samples]
    figures = figures_of("bleu", samples)
    for order in (1, 2, 3, 4):
        theirs = corpus_bleu(references, given, weights=[1 / order] * order)
        assert figures[f"bleu_{order}"] == pytest.approx(theirs, abs=1e-12)
    first = [texts[:1] for texts in references]
    assert figures["bleu_4"] != pytest.approx(corpus_bleu(first, given), abs=1e-3)


def test_rouge_l_by_hand() -> None:
    # 3 of 4 words, 3 of 3.
    score = rouge_l(captioned("red cat sat down", "red sat down"))
    assert score == pytest.approx(2.44 * 0.75 / (1 + 1.44 * 0.75), abs=1e-12)
    assert score != pytest.approx(2 * 0.75 / 1.75)  # beta = 1
    # The order of words counts.
    assert rouge_l(captioned("down sat cat red", "red cat sat down")) == pytest.approx(0.25)
    assert rouge_l(captioned("", "red")) == rouge_l(captioned("red", "...")) == 0.0


def test_rouge_l_takes_precision_and_recall_from_different_references() -> None:
    # The first has recall 1, the second precision 1.
    score = rouge_l(captioned("red cat sat down", "red sat down", "big red cat sat down"))
    assert score == 1.0
    best = max(
        rouge_l(captioned("red cat sat down", reference)) or 0.0
        for reference in ("red sat down", "big red cat sat down")
    )
    assert best < 0.9


def test_captions_score_as_in_the_coco_toolkit() -> None:
    for name in ("cider", "rouge_l"):
        wanted = [row[name] for row in COCO["samples"]]
        np.testing.assert_allclose(scores_of(name, SAMPLES), wanted, atol=1e-12)
        assert figures_of(name, SAMPLES)[name] == pytest.approx(COCO[name], abs=1e-12)
    # The toolkit adds 1e-9 to each denominator.
    assert list(figures_of("bleu", SAMPLES).values()) == pytest.approx(COCO["bleu"], abs=1e-10)
    # With the first reference only, all of them are others.
    first = [captioned(sample.prediction, sample.answers[0]) for sample in SAMPLES]
    for name in ("cider", "rouge_l"):
        assert figures_of(name, first)[name] != pytest.approx(COCO[name], abs=1e-3)


def test_captions_score_as_by_pycocoevalcap_where_it_is_installed() -> None:
    pytest.importorskip("pycocoevalcap", reason="100 MB; its figures are in coco_captions.json")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    generator = random.Random(0)
    words = [f"w{number}" for number in range(3)]
    samples = [
        captioned(*(" ".join(generator.choices(words, k=generator.randint(1, 9))) for _ in "abc"))
        for _ in range(50)
    ]
    references = {row: list(sample.answers) for row, sample in enumerate(samples)}
    given = {row: [sample.prediction] for row, sample in enumerate(samples)}
    for name, scorer in (("cider", Cider()), ("rouge_l", Rouge())):
        _, theirs = scorer.compute_score(references, given)
        np.testing.assert_allclose(scores_of(name, samples), theirs, atol=1e-12)
    bleu, _ = Bleu(4).compute_score(references, given, verbose=0)
    assert list(figures_of("bleu", samples).values()) == pytest.approx(bleu, abs=1e-9)
