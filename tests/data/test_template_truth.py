"""Decoding what is supervised gives the assistant's text and the end of turn, in every family.

The templates are read, not known: nothing in the package names one of them.
"""

from __future__ import annotations

from functools import cache

import PIL.Image
import pytest
import torch

from tests.data.families import END, FAMILIES, LEAD
from vlmtune.data.encode import Encoder
from vlmtune.data.template import STRIPPED
from vlmtune.data.types import IGNORED, Image
from vlmtune.errors import SampleError


@cache
def encoder_of(family: str) -> Encoder:
    return Encoder(FAMILIES[family](), max_tokens=4096, over_length="error", max_image_pixels=10**6)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def other(tmp_path) -> Image:
    """A second picture, of another shape."""
    PIL.Image.new("RGB", (40, 72), "blue").save(tmp_path / "blue.png")
    return Image("blue.png", tmp_path)


CASES = {
    "text only": [("user", "What is red?"), ("assistant", "A colour")],
    "one picture": [("user", "I", "What is it?"), ("assistant", "A cat.")],
    "multi-turn": [
        ("user", "I", "Is it red?"),
        ("assistant", "yes"),
        ("user", "Sure?"),
        ("assistant", "yes, 42 times"),
        ("user", "Is it?"),
        ("assistant", "yes"),
    ],
    "system": [("system", "Be brief."), ("user", "I", "What?"), ("assistant", "A dog")],
    "system, text only": [("system", "Be brief."), ("user", "What?"), ("assistant", "A dog")],
    "two pictures": [("user", "I", "J", "Same?"), ("assistant", "no")],
    "pictures apart": [("user", "I", "and", "J", "the same?"), ("assistant", "no")],
    "picture in the second turn": [
        ("user", "Ready?"),
        ("assistant", "go on"),
        ("user", "J", "What is it?"),
        ("assistant", "blue"),
    ],
    "pictures in both turns": [
        ("user", "I", "Red?"),
        ("assistant", "red"),
        ("user", "J", "And this?"),
        ("assistant", "blue"),
    ],
    "answer in the question": [("user", "I", "Is it red or blue?"), ("assistant", "red")],
    "answer is a role": [("user", "Who?"), ("assistant", "assistant")],
    "line breaks": [("user", "I", "List\n\nthem"), ("assistant", "1.\n\n2. a\n3.")],
    "unicode": [("user", "I", "naïve 日本?"), ("assistant", "Ünï 日本語 😀👩‍👩‍👧 é")],
}


def conversation_of(case, make_conversation, picture, other):
    media = {"I": picture, "J": other}
    turns = [(role, *(media.get(part, part) for part in parts)) for role, *parts in CASES[case]]
    return make_conversation(*turns)


def supervised_text(ids: torch.Tensor, targets: torch.Tensor, tokenizer) -> list[str]:
    """The runs of supervised targets as texts, decoded behind a token before them: some decoders
    drop a text's first space. A run that starts where another ends is told apart by its input."""
    before = tokenizer.convert_tokens_to_ids("?")
    runs: list[list[int]] = []
    for position, target in enumerate(targets.tolist()):
        if target == IGNORED:
            continue
        if position == 0 or int(targets[position - 1]) == IGNORED:
            runs.append([])
        runs[-1].append(target)
    return [tokenizer.decode([before, *run], skip_special_tokens=False)[1:] for run in runs]


def expected_of(conversation, family: str) -> list[str]:
    answers = [turn.text for turn in conversation.turns if turn.role == "assistant"]
    return [LEAD[family] + answer + END[family] for answer in answers]


DROPS_SYSTEM = {"pixtral"}
"""Writes the system turn where a user turn is the last one, so never beside an answer."""


def skip_refused(case: str, family: str) -> None:
    if case.startswith("system") and family in DROPS_SYSTEM:
        pytest.skip("refused: see test_a_template_that_leaves_a_turn_out_is_refused")


@pytest.mark.parametrize("case", CASES)
def test_what_is_supervised_is_the_answers_and_their_end_of_turn(
    case, family, make_conversation, picture, other
):
    skip_refused(case, family)
    conversation = conversation_of(case, make_conversation, picture, other)
    encoder = encoder_of(family)
    sample = encoder.encode(conversation)
    tokenizer = encoder.processor.tokenizer
    found = supervised_text(sample.input_ids, sample.targets, tokenizer)
    assert found == expected_of(conversation, family)
    assert sample.notes == ()
    # The wrong variant: the mask one token further on.
    shifted = torch.full_like(sample.targets, IGNORED)
    where = (sample.targets != IGNORED).nonzero().flatten()
    for position in where[where + 2 < sample.num_tokens].tolist():
        shifted[position + 1] = sample.input_ids[position + 2]
    assert supervised_text(sample.input_ids, shifted, tokenizer) != found


@pytest.mark.parametrize("case", CASES)
def test_each_target_is_the_token_that_follows(case, family, make_conversation, picture, other):
    skip_refused(case, family)
    encoder = encoder_of(family)
    sample = encoder.encode(conversation_of(case, make_conversation, picture, other))
    end = encoder.processor.tokenizer.convert_tokens_to_ids(END[family])
    ids = sample.input_ids.tolist()
    for position in (sample.targets != IGNORED).nonzero().flatten().tolist():
        target = int(sample.targets[position])
        follows = position + 1 < len(ids) and ids[position + 1] == target
        # Where the template writes no end of turn, it is a target without being an input.
        assert follows or (family in ("llava", "glm4v") and target == end)


@pytest.mark.parametrize("case", ["multi-turn", "system", "pictures in both turns"])
def test_a_prompt_is_what_the_sample_starts_with(case, family, make_conversation, picture, other):
    skip_refused(case, family)
    if family == "llava_onevision":
        pytest.skip("its template asks in another form than it answers, which is warned of")
    encoder = encoder_of(family)
    conversation = conversation_of(case, make_conversation, picture, other)
    prompt = encoder.encode_prompt(conversation)
    sample = encoder.encode(conversation)
    assert prompt.input_ids.tolist() == sample.input_ids[: prompt.num_tokens].tolist()
    assert int(sample.targets[prompt.num_tokens - 1]) != IGNORED


def test_a_template_that_leaves_a_turn_out_is_refused(make_conversation, picture, other):
    conversation = conversation_of("system", make_conversation, picture, other)
    with pytest.raises(SampleError, match=r"train\.jsonl:7: .*leaves the system turn's text out"):
        encoder_of("pixtral").encode(conversation)
    asked = encoder_of("pixtral").encode_prompt(conversation)
    assert "Be brief." in encoder_of("pixtral").processor.tokenizer.decode(asked.input_ids)


def test_white_space_that_a_template_takes_off_is_noted(make_conversation):
    for family in ("gemma3", "mllama"):
        encoder = encoder_of(family)
        sample = encoder.encode(make_conversation(("user", "Hi"), ("assistant", "  a cat\n")))
        tokenizer = encoder.processor.tokenizer
        found = supervised_text(sample.input_ids, sample.targets, tokenizer)
        assert found == ["a cat" + END[family]] and sample.notes == (STRIPPED,)


def test_several_texts_of_an_answer_are_one(family, make_conversation):
    encoder = encoder_of(family)
    parts = encoder.encode(make_conversation(("user", "Hi"), ("assistant", "a ", "cat")))
    whole = encoder.encode(make_conversation(("user", "Hi"), ("assistant", "a cat")))
    assert torch.equal(parts.targets, whole.targets)


def test_the_templates_differ_in_what_is_read_off_them():
    """Or the families above would be one."""
    read = {
        (t._takes_parts, t.lead, t.end_of_turn, t.end_token)
        for t in (encoder_of(family)._template for family in FAMILIES)
    }
    assert len(read) >= 8
