"""Reading a chat template: what leads to an answer, what ends it, what it does to the text."""

from __future__ import annotations

import logging

import pytest

from tests.data.conftest import cached_processor
from tests.data.processors import QWEN_TEMPLATE, build_processor
from vlmtune.data.encode import Encoder
from vlmtune.data.template import STRIPPED, ChatTemplate
from vlmtune.data.types import IGNORED
from vlmtune.errors import SampleError, VlmtuneError


def _with_template(template: str):
    processor = build_processor("qwen")
    processor.chat_template = template
    return processor


def _encoder(template: str) -> Encoder:
    return Encoder(
        _with_template(template), max_tokens=999, over_length="error", max_image_pixels=9
    )


@pytest.mark.parametrize(
    ("kind", "lead", "end"),
    [
        ("qwen", "", "<|im_end|>"),
        ("llava", " ", None),
        ("idefics", " ", "<end_of_utterance>"),
    ],
)
def test_lead_and_end_of_turn_are_read_off_the_template(kind, lead, end):
    template = ChatTemplate(cached_processor(kind))
    assert (template.lead, template.end_of_turn) == (lead, end)


def test_spans_cover_lead_answer_and_end(make_conversation):
    turns = make_conversation(
        ("user", "red?"), ("assistant", "red"), ("user", "red"), ("assistant", "red red")
    ).turns
    for kind, expected in (
        ("qwen", ["red<|im_end|>", "red red<|im_end|>"]),
        ("llava", [" red", " red red"]),
        ("idefics", [" red<end_of_utterance>", " red red<end_of_utterance>"]),
    ):
        rendered = ChatTemplate(cached_processor(kind)).render(turns)
        assert [rendered.text[span.start : span.end] for span in rendered.spans] == expected


def test_stripping_white_space_is_noted_and_the_rest_still_supervised(make_conversation):
    encoder = _encoder(QWEN_TEMPLATE.replace("{{ c.text }}", "{{ c.text | trim }}"))
    sample = encoder.encode(make_conversation(("user", "Hi"), ("assistant", "  a cat\n")))
    assert sample.notes == (STRIPPED,)
    ids = sample.targets[sample.targets != IGNORED].tolist()
    assert encoder.processor.tokenizer.decode(ids) == "a cat<|im_end|>"


def test_a_template_that_changes_the_answer_is_refused(make_conversation):
    encoder = _encoder(QWEN_TEMPLATE.replace("{{ c.text }}", "{{ c.text | replace('a', 'b') }}"))
    conversation = make_conversation(("user", "Hi"), ("assistant", "a cat"))
    with pytest.raises(SampleError, match=r"train\.jsonl:7: .*changes an answer.*b cbt"):
        encoder.encode(conversation)


def test_a_template_that_is_not_prefix_stable_is_masked_right(make_conversation):
    """Thinking text of earlier turns left out, as Qwen3's template does."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = _encoder(template)
    sample = encoder.encode(
        make_conversation(("user", "Hi"), ("assistant", "a"), ("user", "Yo"), ("assistant", "b"))
    )
    ids = sample.targets[sample.targets != IGNORED].tolist()
    # The model will be asked after "assistant\n", so it has to learn the empty thought as well.
    expected = "a<|im_end|><think>\n\n</think>\n\nb<|im_end|>"
    assert encoder.processor.tokenizer.decode(ids) == expected


def test_a_generation_prompt_unlike_the_training_text_is_warned_of(caplog):
    template = QWEN_TEMPLATE.replace("<|im_start|>assistant\n{% endif %}", "Now:{% endif %}")
    with caplog.at_level(logging.WARNING, logger="vlmtune"):
        assert ChatTemplate(_with_template(template)).lead == ""
    assert "another form than in training" in caplog.text


def test_roles_that_a_template_refuses_are_a_sample_error(make_conversation):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}"
    encoder = _encoder(refusing + "{% endif %}" + QWEN_TEMPLATE)
    conversation = make_conversation(("system", "S"), ("user", "Hi"), ("assistant", "a"))
    with pytest.raises(SampleError, match=r"train\.jsonl:7: .*no system turns"):
        encoder.encode(conversation)


def test_a_missing_template_is_said_at_once():
    processor = build_processor("qwen")
    processor.chat_template = None
    with pytest.raises(VlmtuneError, match="chat template"):
        ChatTemplate(processor)


def test_an_answer_like_the_marker_is_told_apart(make_conversation):
    turns = make_conversation(("user", "Xq70A0Z7qX"), ("assistant", "Xq70A0Z7qX Xq70A")).turns
    rendered = ChatTemplate(cached_processor("qwen")).render(turns)
    (span,) = rendered.spans
    assert rendered.text[span.start : span.end] == "Xq70A0Z7qX Xq70A<|im_end|>"
    assert span.start > rendered.text.index("assistant\n")
