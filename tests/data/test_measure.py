"""A sample's measures are the encoder's own, found without pixel tensors."""

from __future__ import annotations

import os
import random
from pathlib import Path

import PIL.Image
import pytest
import torch

from tests.data.conftest import cached_processor
from tests.data.families import FAMILIES
from vlmtune.data.encode import Encoder, OverLength
from vlmtune.data.measure import AUDIT_EVERY, AUDIT_FIRST, Measurer, SizedProcessor
from vlmtune.data.pairs import encode_pair
from vlmtune.data.types import IGNORED, Conversation, Image, Source, Text, Turn
from vlmtune.errors import SampleError

SIZES = [(64, 48), (48, 64), (17, 90), (200, 30), (33, 33), (64, 64)]
WORDS = "What is in the picture? The cat is red, the dog is blue. 42 ü".split()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    folder = tmp_path_factory.mktemp("pictures")
    noise = random.Random(0)
    for number, size in enumerate(SIZES):
        pixels = bytes(noise.randrange(256) for _ in range(3 * size[0] * size[1]))
        PIL.Image.frombytes("RGB", size, pixels).save(folder / f"{number}.png")
    return [Image(f"{number}.png", folder) for number in range(len(SIZES))]


def conversations(pictures: list[Image], num: int, *, seed: int = 0) -> list[Conversation]:
    """Random ones: one to three exchanges, up to two pictures each, some with a system turn."""
    draw = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    found = []
    for number in range(num):
        turns = [Turn("system", (Text(words(5)),))] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            shown = draw.choices(pictures, k=draw.choice((0, 1, 1, 2)))
            turns.append(Turn("user", (*shown, Text(words(12)))))
            turns.append(Turn("assistant", (Text(words(8)),)))
        found.append(Conversation(f"c{number}", tuple(turns), Source("train.jsonl", number + 1)))
    return found


def outcome_of_encoder(encoder: Encoder, conversation: Conversation) -> object:
    try:
        sample = encoder.encode(conversation)
    except SampleError as error:
        return type(error), str(error)
    image_id = encoder.processor.tokenizer.convert_tokens_to_ids(encoder.processor.image_token)
    return (
        sample.num_tokens,
        int((sample.targets != IGNORED).sum()),
        int((sample.input_ids == image_id).sum()),
        sample.num_images,
        sample.notes,
    )


def outcome_of_measurer(measurer: Measurer, conversation: Conversation) -> object:
    try:
        found = measurer.measure(conversation)
    except SampleError as error:
        return type(error), str(error)
    return found.num_tokens, found.num_supervised, found.num_media, found.num_images, found.notes


def unaudited(encoder: Encoder) -> Measurer:
    """A measurer that has done its first audits already, so that blank pictures answer."""
    measurer = Measurer(encoder)
    measurer._seen.update({number: AUDIT_FIRST for number in range(10)})
    return measurer


@pytest.mark.parametrize("over_length", ["error", "drop", "shrink_images", "trim_text"])
def test_blank_pictures_measure_what_the_encoder_makes(kind, make_encoder, pictures, over_length):
    encoder = make_encoder(kind, max_tokens=110, over_length=over_length)
    measurer = unaudited(encoder)
    found = conversations(pictures, 60)
    measured = [outcome_of_measurer(measurer, c) for c in found]
    assert measurer.by_size and measurer.num_wrong == 0
    assert measured == [outcome_of_encoder(encoder, c) for c in found]
    fits = {isinstance(m[0], int) and not m[4] for m in measured}
    assert fits == {True, False}, "some are too long"


NOT_BY_SIZE = {"idefics2", "mllama"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_samples_are_measured_as_encoded(family, pictures):
    encoder = Encoder(
        FAMILIES[family](), max_tokens=400, over_length="error", max_image_pixels=10_000
    )
    measurer = Measurer(encoder)
    found = conversations(pictures, 20)
    assert [outcome_of_measurer(measurer, c) for c in found] == [
        outcome_of_encoder(encoder, c) for c in found
    ]
    assert measurer.by_size == (family not in NOT_BY_SIZE)


def test_most_samples_are_measured_without_the_pictures_processing(make_encoder, pictures):
    encoder = make_encoder("qwen")
    calls = []
    encoder.processor = Counting(encoder.processor, calls)
    measurer = unaudited(encoder)
    for conversation in conversations(pictures, 60):
        measurer.measure(conversation)
    assert 0 < len(calls) <= len(SIZES) + 1, "once for each size, and once for its way with offsets"


class Counting:
    """A processor that notes each call."""

    def __init__(self, processor, calls: list) -> None:
        self._processor = processor
        self._calls = calls

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._processor, name)

    def __call__(self, **options):
        self._calls.append(options)
        return self._processor(**options)


class ByContent(Counting):
    """One that writes more tokens for bright pictures: their size does not tell."""

    def __call__(self, **options):
        images = [
            i.resize((96, 96)) if i.getpixel((0, 0))[0] > 200 else i
            for i in options.get("images", [])
        ]
        return self._processor(**(options | ({"images": images} if images else {})))


def test_a_processor_that_looks_at_content_is_found_out_and_asked_in_full(
    make_encoder, make_conversation, tmp_path
):
    for name, colour in (("dark", 0), ("bright", 255)):
        PIL.Image.new("RGB", (32, 32), (colour,) * 3).save(tmp_path / f"{name}.png")
    encoder = make_encoder("qwen")
    encoder.processor = ByContent(encoder.processor, [])
    samples = [
        make_conversation(("user", "Hi", Image(f"{name}.png", tmp_path)), ("assistant", "Yo"))
        for name in ("dark", "bright", "bright")
    ]
    truth = [outcome_of_encoder(encoder, c) for c in samples]
    assert truth[0] != truth[1]
    measurer = Measurer(encoder)
    assert [outcome_of_measurer(measurer, c) for c in samples] == truth
    assert not measurer.by_size and measurer.num_wrong == 1
    wrong = unaudited(encoder)
    assert [outcome_of_measurer(wrong, c) for c in samples] != truth, "without the audit"


def test_the_audit_comes_back(make_encoder, make_conversation, picture):
    encoder = make_encoder("qwen")
    calls = []
    encoder.processor = Counting(encoder.processor, calls)
    measurer = Measurer(encoder)
    sample = make_conversation(("user", "Hi", picture), ("assistant", "Yo"))
    audited = []
    for number in range(AUDIT_EVERY + 1):
        before = len(calls)
        measurer.measure(sample)
        if len(calls) > before:
            audited.append(number)
    assert audited == [*range(AUDIT_FIRST), AUDIT_EVERY]


def test_a_processor_without_a_placeholder_a_picture_is_asked_in_full(
    make_encoder, make_conversation, picture
):
    encoder = make_encoder("llava")
    measurer = unaudited(encoder)
    measurer._blank.processor = SizedProcessor(Swallowing(encoder.processor, []))
    sample = make_conversation(("user", "Hi", picture), ("assistant", "Yo"))
    assert outcome_of_measurer(measurer, sample) == outcome_of_encoder(encoder, sample)
    assert not measurer.by_size


class Swallowing(Counting):
    """One whose placeholder, written out, does not read back the same."""

    def __call__(self, **options):
        letters = self._processor.tokenizer.convert_tokens_to_ids(["t", "h", "e"])
        return {"input_ids": torch.tensor([letters])}


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"x" * 40])
def test_a_broken_picture_is_the_encoders_own_error(
    make_encoder, make_conversation, tmp_path: Path, content: bytes
):
    (tmp_path / "broken.png").write_bytes(content)
    encoder = make_encoder("qwen")
    sample = make_conversation(("user", "Hi", Image("broken.png", tmp_path)), ("assistant", "Yo"))
    found = outcome_of_measurer(unaudited(encoder), sample)
    assert found == outcome_of_encoder(encoder, sample)
    assert found[0] is SampleError and "train.jsonl:7" in found[1]


def test_a_picture_that_the_processor_refuses_is_refused(make_encoder, make_conversation, tmp_path):
    PIL.Image.new("RGB", (3, 900)).save(tmp_path / "thin.png")
    encoder = make_encoder("qwen")
    sample = make_conversation(("user", "Hi", Image("thin.png", tmp_path)), ("assistant", "Yo"))
    found = outcome_of_measurer(unaudited(encoder), sample)
    assert found == outcome_of_encoder(encoder, sample)
    assert "the processor refuses the sample" in found[1]


def test_a_changed_picture_file_is_looked_at_again(make_encoder, make_conversation, tmp_path):
    path = tmp_path / "a.png"
    sample = make_conversation(("user", "Hi", Image("a.png", tmp_path)), ("assistant", "Yo"))
    measurer = unaudited(make_encoder("qwen"))
    PIL.Image.new("RGB", (32, 32)).save(path)
    small = measurer.measure(sample).num_tokens
    PIL.Image.new("RGB", (64, 64)).save(path)
    os.utime(path, ns=(1, 1))
    assert measurer.measure(sample).num_tokens > small


def test_prompts_and_pairs_are_measured_as_they_are_encoded(make_encoder, pictures):
    encoder = make_encoder("qwen")
    measurer = unaudited(encoder)
    asked = [c for c in conversations(pictures, 20) if c.images]
    prompts = [measurer.measure_prompt(c).num_tokens for c in asked]
    assert prompts == [encoder.encode_prompt(c).num_tokens for c in asked]
    pairs = [measurer.measure(c, pair_prompt="In a word:").lengths for c in asked]
    encoded = [encode_pair(encoder, c, prompt="In a word:") for c in asked]
    assert pairs == [(p.picture.num_tokens, p.text.num_tokens) for p in encoded]


def test_what_is_dropped_for_its_length_is_told_apart(make_encoder, pictures):
    measurer = unaudited(make_encoder("qwen", max_tokens=60, over_length="drop"))
    with pytest.raises(OverLength):
        for conversation in conversations(pictures, 30):
            measurer.measure(conversation)


def test_the_processor_of_the_encoder_is_left_as_it_was(make_encoder):
    encoder = make_encoder("qwen")
    Measurer(encoder)
    assert encoder.processor is cached_processor("qwen")
