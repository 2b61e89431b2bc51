"""Texts as answers: in their place, checked, without opening pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.data.conftest import cached_processor
from vlmtune.data.tokens import AnswerTokenizer, without_images
from vlmtune.data.types import Image, Text
from vlmtune.errors import SampleError


@pytest.fixture
def tokenizer(kind: str) -> AnswerTokenizer:
    return AnswerTokenizer(cached_processor(kind))


def test_pictures_are_not_opened(tokenizer, make_conversation, tmp_path, kind):
    missing = Image("no-such.png", tmp_path)
    conversation = make_conversation(("user", missing, "What is it?"), ("assistant", "a cat"))
    (tokens,) = tokenizer.answers(conversation, ["red"])
    decoded = cached_processor(kind).tokenizer.decode(tokens)
    assert "red" in decoded
    assert "cat" not in decoded


def test_a_control_token_in_a_text_is_an_error_with_its_place(tokenizer, make_conversation, kind):
    conversation = make_conversation(("user", "What is it?"))
    with pytest.raises(SampleError, match=r"train\.jsonl:7: a text contains a control token"):
        tokenizer.answers(conversation, ["red", f"a {cached_processor(kind).image_token}"])


def qwen_with(template: str) -> AnswerTokenizer:
    processor = cached_processor("qwen")
    return AnswerTokenizer(
        type(processor)(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            video_processor=processor.video_processor,
            chat_template=template,
        )
    )


def test_a_text_that_merges_with_the_prompt_is_an_error(make_conversation):
    # A prompt that ends in an ordinary letter: `p` and `icture` are the tokens `pict` and `ure`.
    template = cached_processor("qwen").chat_template
    template = template.replace("<|im_start|>assistant\n", "<|im_start|>p").replace(
        "<|im_start|>{{ m.role }}\n",
        "<|im_start|>{{ 'p' if m.role == 'assistant' else m.role + '\\n' }}",
    )
    tokenizer = qwen_with(template)
    conversation = make_conversation(("user", "What is it?"))
    assert tokenizer.answers(conversation, [" red"])
    with pytest.raises(SampleError, match=r"train\.jsonl:7: .*do not spell the answer"):
        tokenizer.answers(conversation, ["icture"])


def test_a_prompt_that_answers_are_not_taught_after_is_an_error(make_conversation):
    template = cached_processor("qwen").chat_template.replace(
        "{% if add_generation_prompt %}<|im_start|>assistant\n",
        "{% if add_generation_prompt %}<|im_start|>assistant\nthe ",
    )
    with pytest.raises(SampleError, match=r"train\.jsonl:7: the tokens before an answer"):
        qwen_with(template).answers(make_conversation(("user", "What is it?")), ["red"])


def test_prompts_differ_with_their_number_of_pictures(tokenizer, make_conversation, picture):
    one = make_conversation(("user", picture, "What is it?"), ("assistant", "a cat"))
    asked = replace(one, turns=one.turns[:1])
    assert tokenizer.prompt_text(one) == tokenizer.prompt_text(asked)
    assert tokenizer.prompt_text(one) != tokenizer.prompt_text(without_images(one))


def test_a_turn_of_pictures_alone_keeps_an_empty_text(make_conversation, picture):
    bare = without_images(make_conversation(("user", picture), ("assistant", "a cat")))
    assert bare.turns[0].parts == (Text(""),)
    assert bare.images == ()
