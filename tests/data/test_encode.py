"""The label mask of every processor kind: the answers, their end of turn, nothing else."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from tests.data.conftest import cached_processor
from vlmtune.data.encode import Encoder
from vlmtune.data.tokens import NORMALISED
from vlmtune.data.types import IGNORED
from vlmtune.errors import SampleError, VlmtuneError

# What a kind's answer starts with behind its generation prompt, and ends with.
LEAD = {"qwen": "", "llava": " ", "idefics": " "}
END = {"qwen": "<|im_end|>", "llava": "</s>", "idefics": "<end_of_utterance>"}

CASES = {
    "single turn": ["I", ("user", "What is it?"), ("assistant", "A cat.")],
    "text only": ["", ("user", "What is red?"), ("assistant", "A colour")],
    "multi-turn": [
        "I",
        ("user", "Is it red?"),
        ("assistant", "yes"),
        ("user", "Sure?"),
        ("assistant", "yes, 42 times"),
    ],
    "system": ["I", ("system", "Be brief."), ("user", "What?"), ("assistant", "A dog")],
    "two images": ["II", ("user", "Same?"), ("assistant", "no")],
    "unicode": ["I", ("user", "naïve 日本?"), ("assistant", "Ünï 日本語 😀👩‍👩‍👧 é")],
    "answer in question": ["I", ("user", "Is it red or blue?"), ("assistant", "red")],
    "answer is a role": ["", ("user", "Who are you?"), ("assistant", "assistant")],
    "line breaks": ["I", ("user", "List\n\nthem"), ("assistant", "1.\n\n2. a\n3.")],
    "digit first": ["I", ("user", "How many?"), ("assistant", "3")],
    "one space inside": ["", ("user", "Say"), ("assistant", "a  b   c")],
}


def _conversation(case, make_conversation, picture):
    images, *turns = CASES[case]
    first = next(i for i, turn in enumerate(turns) if turn[0] == "user")
    turns[first] = ("user", *[picture] * len(images), turns[first][1])
    return make_conversation(*turns)


def _decode_supervised(sample, processor) -> str:
    """The supervised targets as text; a space in front, that some decoders drop, kept."""
    before = processor.tokenizer.convert_tokens_to_ids("?")
    ids = sample.targets[sample.targets != IGNORED].tolist()
    return processor.tokenizer.decode([before, *ids], skip_special_tokens=False)[1:]


def _expected(conversation, kind) -> str:
    answers = [turn.text for turn in conversation.turns if turn.role == "assistant"]
    return "".join(LEAD[kind] + answer + END[kind] for answer in answers)


@pytest.mark.parametrize("case", CASES)
def test_decoding_the_supervised_ids_gives_the_answers_and_their_end_of_turn(
    case, kind, make_encoder, make_conversation, picture
):
    conversation = _conversation(case, make_conversation, picture)
    sample = make_encoder(kind).encode(conversation)
    assert _decode_supervised(sample, cached_processor(kind)) == _expected(conversation, kind)
    assert sample.notes == ()


@pytest.mark.parametrize("case", CASES)
def test_targets_are_the_ids_shifted_by_one(case, kind, make_encoder, make_conversation, picture):
    sample = make_encoder(kind).encode(_conversation(case, make_conversation, picture))
    end = cached_processor(kind).tokenizer.convert_tokens_to_ids(END[kind])
    for position in (sample.targets != IGNORED).nonzero().flatten().tolist():
        target = int(sample.targets[position])
        follows = position + 1 < sample.num_tokens and int(sample.input_ids[position + 1]) == target
        # LLaVA's template writes no end of turn: it is a target without being an input.
        assert follows or (kind == "llava" and target == end)


def _first_place_of(answer: str, ids: list[int], tokenizer) -> int:
    """The wrong variant of a mask: where the answer's text stands first."""
    return next(
        start
        for start in range(len(ids))
        if any(tokenizer.decode(ids[start : start + n]).strip() == answer for n in (1, 2, 3))
    )


def test_a_mask_from_searching_the_answer_fails_where_the_question_holds_it(
    kind, make_encoder, make_conversation, picture
):
    sample = make_encoder(kind).encode(
        _conversation("answer in question", make_conversation, picture)
    )
    right = (sample.targets != IGNORED).nonzero().flatten().tolist()
    tokenizer = cached_processor(kind).tokenizer
    searched = _first_place_of("red", sample.input_ids.tolist(), tokenizer)
    assert searched < right[0]
    assert _decode_supervised(sample, cached_processor(kind)).strip() == "red" + END[kind]


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_processors_own_chat_template(
    case, kind, make_encoder, make_conversation, picture
):
    import PIL.Image

    conversation = _conversation(case, make_conversation, picture)
    red = PIL.Image.new("RGB", (64, 48), "red")
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": p.text}
                if hasattr(p, "text")
                else {"type": "image", "image": red}
                for p in turn.parts
            ],
        }
        for turn in conversation.turns
    ]
    own = cached_processor(kind).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt"
    )
    sample = make_encoder(kind).encode(conversation)
    assert sample.input_ids.tolist() == own["input_ids"][0].tolist()
    if conversation.images:
        assert torch.equal(sample.media["pixel_values"], own["pixel_values"])


def test_a_bos_stands_once(make_encoder, make_conversation):
    for kind in ("llava", "idefics"):
        tokenizer = cached_processor(kind).tokenizer
        sample = make_encoder(kind).encode(
            make_conversation(("user", "Hi"), ("assistant", "Hello"))
        )
        assert sample.input_ids.tolist().count(tokenizer.bos_token_id) == 1
        # The wrong variant: the tokenizer's default on a text that has the BOS already.
        text = "<|im_start|>User: Hi"
        assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == (kind == "idefics") + 1


def test_image_tokens_are_never_supervised(kind, make_encoder, make_conversation, picture):
    sample = make_encoder(kind).encode(_conversation("two images", make_conversation, picture))
    processor = cached_processor(kind)
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert image_id in sample.input_ids.tolist()
    assert image_id not in sample.targets.tolist()
    assert sample.num_images == 2


def test_mm_token_type_ids_come_with_qwen_for_text_too(make_encoder, make_conversation, picture):
    encoder = make_encoder("qwen")
    text = encoder.encode(make_conversation(("user", "Hi"), ("assistant", "Yo")))
    seen = encoder.encode(make_conversation(("user", picture, "Hi"), ("assistant", "Yo")))
    assert text.token_fields["mm_token_type_ids"].sum() == 0
    assert seen.token_fields["mm_token_type_ids"].sum() == 12  # 64 x 48 in patches of 16 x 16
    assert set(seen.media) == {"pixel_values", "image_grid_thw"}


def test_a_prompt_is_what_the_training_sample_starts_with(
    kind, make_encoder, make_conversation, picture
):
    encoder = make_encoder(kind)
    conversation = _conversation("multi-turn", make_conversation, picture)
    prompt, sample = encoder.encode_prompt(conversation), encoder.encode(conversation)
    length = prompt.num_tokens
    assert prompt.input_ids.tolist() == sample.input_ids[:length].tolist()
    assert bool((prompt.targets == IGNORED).all())
    # The first target of the last answer belongs to the prompt's last position.
    assert int(sample.targets[length - 1]) != IGNORED
    assert encoder.assistant_text(conversation) == "yes, 42 times"


def test_a_prompt_without_an_answer_is_the_whole_conversation(
    kind, make_encoder, make_conversation
):
    encoder = make_encoder(kind)
    asked = make_conversation(("user", "Hi"))
    answered = make_conversation(("user", "Hi"), ("assistant", "Yo"))
    assert torch.equal(
        encoder.encode_prompt(asked).input_ids, encoder.encode_prompt(answered).input_ids
    )
    with pytest.raises(SampleError, match="not answered"):
        encoder.assistant_text(asked)


def test_an_encoder_survives_pickling(kind, make_encoder, make_conversation, picture):
    encoder = make_encoder(kind)
    conversation = _conversation("multi-turn", make_conversation, picture)
    there = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(there.encode(conversation).targets, encoder.encode(conversation).targets)


@pytest.mark.parametrize("token", ["end", "image_token"])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_control_token_in_a_text_is_refused(token, role, kind, make_encoder, make_conversation):
    written = END[kind] if token == "end" else cached_processor(kind).image_token
    texts = {"system": "Be", "user": "Hi", "assistant": "Yo"}
    texts[role] += f" {written} there"
    with pytest.raises(SampleError, match=r"train\.jsonl:7: .*control token") as caught:
        make_encoder(kind).encode(make_conversation(*texts.items()))
    assert written in str(caught.value)


def test_decomposed_characters_are_noted_where_the_tokenizer_composes_them(
    make_encoder, make_conversation
):
    conversation = make_conversation(("user", "Drink?"), ("assistant", "cafe\u0301"))
    sample = make_encoder("qwen").encode(conversation)
    assert sample.notes == (NORMALISED,)
    assert _decode_supervised(sample, cached_processor("qwen")) == "caf\u00e9<|im_end|>"


def test_an_answer_that_the_tokenizer_cannot_spell_is_refused(make_conversation):
    from tokenizers import normalizers

    from tests.data.processors import build_processor

    processor = build_processor("qwen")
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    encoder = Encoder(processor, max_tokens=99, over_length="error", max_image_pixels=9)
    with pytest.raises(SampleError, match="do not spell the answer") as caught:
        encoder.encode(make_conversation(("user", "Hi"), ("assistant", "A Cat")))
    assert "a cat" in str(caught.value) and "A Cat" in str(caught.value)


def test_an_extreme_aspect_ratio_is_a_sample_error(make_encoder, make_conversation, tmp_path):
    import PIL.Image

    from vlmtune.data.types import Image

    PIL.Image.new("RGB", (4000, 4)).save(tmp_path / "thin.png")
    conversation = make_conversation(
        ("user", Image("thin.png", tmp_path), "?"), ("assistant", "thin")
    )
    with pytest.raises(SampleError, match=r"train\.jsonl:7: .*aspect ratio"):
        make_encoder("qwen").encode(conversation)


def _weighted(conversation, *weights):
    """The conversation with its assistant turns' weights."""
    given = iter(weights)
    turns = tuple(
        replace(turn, weight=next(given)) if turn.role == "assistant" else turn
        for turn in conversation.turns
    )
    return replace(conversation, turns=turns)


def test_only_the_last_answer_is_supervised_with_last_turn(
    kind, make_encoder, make_conversation, picture
):
    conversation = _conversation("multi-turn", make_conversation, picture)
    sample = make_encoder(kind, train_on="last_turn").encode(conversation)
    processor = cached_processor(kind)
    assert _decode_supervised(sample, processor) == LEAD[kind] + "yes, 42 times" + END[kind]
    both = make_encoder(kind).encode(conversation)
    assert torch.equal(sample.input_ids, both.input_ids)
    assert sample.num_supervised < both.num_supervised and sample.weights is None


def test_a_turn_of_weight_0_is_not_supervised_and_the_others_weigh_as_said(
    kind, make_encoder, make_conversation, picture
):
    conversation = _conversation("multi-turn", make_conversation, picture)
    processor, encoder = cached_processor(kind), make_encoder(kind)
    first = encoder.encode(_weighted(conversation, 1.0, 0.0))
    assert _decode_supervised(first, processor) == LEAD[kind] + "yes" + END[kind]
    assert first.weights is None
    sample = encoder.encode(_weighted(conversation, 0.5, 3.0))
    number = first.num_supervised
    assert sample.weights is not None and sample.weights.dtype == torch.float32
    weights = sample.weights[sample.targets != IGNORED].tolist()
    assert weights == [0.5] * number + [3.0] * (sample.num_supervised - number)
    last = make_encoder(kind, train_on="last_turn").encode(_weighted(conversation, 0.5, 3.0))
    assert last.weights is not None
    assert last.weights[last.targets != IGNORED].unique().tolist() == [3.0]


def test_a_sample_with_nothing_supervised_is_refused(
    kind, make_encoder, make_conversation, picture
):
    conversation = _conversation("multi-turn", make_conversation, picture)
    with pytest.raises(SampleError, match=r"train\.jsonl:7: there is nothing to learn"):
        make_encoder(kind).encode(_weighted(conversation, 0.0, 0.0))
    with pytest.raises(SampleError, match="nothing to learn"):
        make_encoder(kind, train_on="last_turn").encode(_weighted(conversation, 1.0, 0.0))
    with pytest.raises(SampleError, match="nothing to learn"):
        make_encoder(kind).encode(make_conversation(("user", "Hi")))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    class Processor:
        tokenizer = Slow()

    with pytest.raises(VlmtuneError, match="offsets"):
        Encoder(Processor(), max_tokens=9, over_length="error", max_image_pixels=9)


def test_a_processor_that_names_no_image_token_is_refused():
    class Fast:
        is_fast = True

    class Processor:
        tokenizer = Fast()

    with pytest.raises(VlmtuneError, match="stands for a picture"):
        Encoder(Processor(), max_tokens=9, over_length="error", max_image_pixels=9)


def test_the_embedded_default_is_masked_like_the_others(tiny_vlm, make_conversation, picture):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_vlm)
    encoder = Encoder(processor, max_tokens=999, over_length="error", max_image_pixels=10_000)
    for case in CASES:
        conversation = _conversation(case, make_conversation, picture)
        sample = encoder.encode(conversation)
        assert _decode_supervised(sample, processor) == _expected(conversation, "qwen"), case
