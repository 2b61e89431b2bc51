"""Samples over `max_tokens`: refused, left out, with smaller pictures, or cut at the end."""

from __future__ import annotations

from dataclasses import replace

import PIL.Image
import pytest
import torch

from tests.data.conftest import cached_processor
from vlmtune.data.encode import SHRUNK, TRIMMED, TURNS_LEFT_OUT, OverLength
from vlmtune.data.types import IGNORED, Image
from vlmtune.errors import SampleError


@pytest.fixture
def large(tmp_path) -> Image:
    PIL.Image.linear_gradient("L").resize((640, 640)).convert("RGB").save(tmp_path / "large.png")
    return Image("large.png", tmp_path)


def _image_tokens(sample, kind) -> int:
    processor = cached_processor(kind)
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return sample.input_ids.tolist().count(image_id)


def _supervised_text(sample, kind) -> str:
    ids = sample.targets[sample.targets != IGNORED].tolist()
    return cached_processor(kind).tokenizer.decode(ids, skip_special_tokens=False).strip()


def test_error_names_the_place_and_the_counts(kind, make_encoder, make_conversation, picture):
    conversation = make_conversation(("user", picture, "What?"), ("assistant", "cat"))
    with pytest.raises(SampleError, match=r"train\.jsonl:7: .*too long.*at most 12") as caught:
        make_encoder(kind, max_tokens=12).encode(conversation)
    assert not isinstance(caught.value, OverLength)


def test_drop_is_told_apart_from_a_bad_sample(kind, make_encoder, make_conversation, picture):
    conversation = make_conversation(("user", picture, "What?"), ("assistant", "cat"))
    with pytest.raises(OverLength):
        make_encoder(kind, max_tokens=12, over_length="drop").encode(conversation)


def test_a_sample_of_exactly_max_tokens_is_left_alone(
    kind, make_encoder, make_conversation, picture
):
    conversation = make_conversation(("user", picture, "What?"), ("assistant", "cat"))
    whole = make_encoder(kind).encode(conversation)
    for policy in ("error", "drop", "shrink_images", "trim_text"):
        sample = make_encoder(kind, max_tokens=whole.num_tokens, over_length=policy).encode(
            conversation
        )
        assert torch.equal(sample.targets, whole.targets) and sample.notes == ()


@pytest.mark.parametrize("kind", ["qwen", "idefics"])
def test_shrinking_keeps_the_text_and_fits(kind, make_encoder, make_conversation, large):
    conversation = make_conversation(("user", large, "What?"), ("assistant", "a cat"))
    whole = make_encoder(kind).encode(conversation)
    limit = whole.num_tokens - 1
    encoder = make_encoder(kind, max_tokens=limit, over_length="shrink_images")
    sample = encoder.encode(conversation)
    assert sample.num_tokens <= limit
    assert 0 < _image_tokens(sample, kind) < _image_tokens(whole, kind)
    assert _supervised_text(sample, kind) == _supervised_text(whole, kind)
    assert sample.notes == (SHRUNK,)
    prompt = encoder.encode_prompt(conversation)
    assert prompt.num_tokens <= limit


def test_shrinking_does_not_overshoot(make_encoder, make_conversation, large):
    """A picture far above the processor's own budget still uses most of what is allowed."""
    conversation = make_conversation(("user", large, "What?"), ("assistant", "a cat"))
    whole = make_encoder("qwen").encode(conversation)  # 64 x 64 pixels: 16 tokens
    limit = whole.num_tokens - 1
    sample = make_encoder("qwen", max_tokens=limit, over_length="shrink_images").encode(
        conversation
    )
    assert _image_tokens(whole, "qwen") == 16
    assert _image_tokens(sample, "qwen") == 9  # 3 x 3, the largest square below 16


def test_shrinking_cannot_help_where_every_picture_takes_the_same(
    make_encoder, make_conversation, large
):
    conversation = make_conversation(("user", large, "What?"), ("assistant", "a cat"))
    limit = make_encoder("llava").encode(conversation).num_tokens - 1
    encoder = make_encoder("llava", max_tokens=limit, over_length="shrink_images")
    with pytest.raises(SampleError, match="smaller pictures do not make it fit"):
        encoder.encode(conversation)


def test_shrinking_cannot_help_where_the_text_alone_is_too_long(
    kind, make_encoder, make_conversation, picture
):
    conversation = make_conversation(("user", picture, "What? " * 50), ("assistant", "a cat"))
    encoder = make_encoder(kind, max_tokens=40, over_length="shrink_images")
    with pytest.raises(SampleError, match="smaller pictures do not make it fit"):
        encoder.encode(conversation)


def test_a_trimmed_answer_is_not_taught_to_end(kind, make_encoder, make_conversation, picture):
    answer = "a b c d e f g h i j"
    conversation = make_conversation(("user", picture, "What?"), ("assistant", answer))
    whole = make_encoder(kind).encode(conversation)
    limit = whole.num_tokens - 6
    sample = make_encoder(kind, max_tokens=limit, over_length="trim_text").encode(conversation)
    assert sample.num_tokens == limit
    text = _supervised_text(sample, kind)
    assert text and answer.startswith(text) and text != answer
    assert int(sample.targets[-1]) == IGNORED
    assert torch.equal(sample.targets[:-1], whole.targets[: limit - 1])
    assert sample.notes == (TRIMMED,)
    for name, field in sample.token_fields.items():
        assert len(field) == limit, name
    for name, tensor in sample.media.items():
        assert torch.equal(tensor, whole.media[name])


def test_an_exchange_out_of_reach_goes_with_its_picture(
    kind, make_encoder, make_conversation, picture
):
    first = [("user", picture, "What?"), ("assistant", "a cat")]
    second = [("user", picture, "And here?"), ("assistant", "a dog")]
    alone = make_encoder(kind).encode(make_conversation(*first))
    encoder = make_encoder(kind, max_tokens=alone.num_tokens + 3, over_length="trim_text")
    sample = encoder.encode(make_conversation(*first, *second))
    assert torch.equal(sample.input_ids, alone.input_ids)
    assert torch.equal(sample.targets, alone.targets)
    assert sample.num_images == 1
    assert torch.equal(sample.media["pixel_values"], alone.media["pixel_values"])
    assert sample.notes == (TURNS_LEFT_OUT,)


@pytest.mark.parametrize("limit", [8, 14, 20])
def test_a_cut_never_goes_through_a_picture_or_leaves_nothing(
    limit, kind, make_encoder, make_conversation, picture
):
    conversation = make_conversation(
        ("user", "Look at it", picture, "What is it? " * 9), ("assistant", "a cat")
    )
    encoder = make_encoder(kind, max_tokens=limit, over_length="trim_text")
    with pytest.raises(SampleError, match="leaves no answer"):
        encoder.encode(conversation)


def test_a_question_is_never_cut(kind, make_encoder, make_conversation):
    conversation = make_conversation(("user", "What is it? " * 20), ("assistant", "a cat"))
    with pytest.raises(SampleError, match="too long"):
        make_encoder(kind, max_tokens=20, over_length="trim_text").encode_prompt(conversation)


def test_cutting_keeps_weights_beside_their_targets(kind, make_encoder, make_conversation):
    conversation = make_conversation(("user", "Hi"), ("assistant", "word " * 40))
    turns = (conversation.turns[0], replace(conversation.turns[1], weight=2.0))
    weighted = replace(conversation, turns=turns)
    sample = make_encoder(kind, max_tokens=30, over_length="trim_text").encode(weighted)
    assert sample.notes[0] == TRIMMED and sample.weights is not None
    assert sample.weights.shape == sample.targets.shape == (30,)
    assert sample.weights[sample.targets != IGNORED].unique().tolist() == [2.0]


def test_cutting_never_supervises_a_turn_that_was_not_to_be(kind, make_encoder, make_conversation):
    """The last turn is out of reach: the one before it must not take its place."""
    conversation = make_conversation(
        ("user", "Hi"), ("assistant", "Yo"), ("user", "word " * 60), ("assistant", "end")
    )
    trimmed = make_encoder(kind, max_tokens=40, over_length="trim_text").encode(conversation)
    assert "Yo" in _supervised_text(trimmed, kind)
    encoder = make_encoder(kind, max_tokens=40, over_length="trim_text", train_on="last_turn")
    with pytest.raises(SampleError, match="leaves no answer"):
        encoder.encode(conversation)
