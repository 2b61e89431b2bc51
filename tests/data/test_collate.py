"""Padding is on the right for training, on the left for generation, and never counts."""

from __future__ import annotations

import torch

from vlmtune.data.batches import collate, collate_prompts
from vlmtune.data.types import IGNORED, Sample, Source

PAD = 0


def _sample(name: str, ids: list[int], targets: list[int], **media: torch.Tensor) -> Sample:
    return Sample(
        id=name,
        source=Source("f", 1),
        input_ids=torch.tensor(ids),
        targets=torch.tensor(targets),
        token_fields={"mm_token_type_ids": torch.tensor([1] + [0] * (len(ids) - 1))},
        media=media,
        num_images=len(media),
    )


# The pad token's id, 0, also occurs as a token and as a target: only positions tell padding.
LONG = ("long", [5, 6, 0, 8], [IGNORED, 0, 8, IGNORED])
SHORT = ("short", [5, 7], [7, IGNORED])


def test_rows_are_padded_right_and_padding_is_not_supervised():
    batch = collate([_sample(*LONG), _sample(*SHORT)], pad_token_id=PAD, image_batching="flat")
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 0, 8], [5, 7, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.inputs["mm_token_type_ids"].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert batch.supervised.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert batch.targets.tolist() == [0, 8, 7]
    assert (batch.num_tokens, batch.sample_ids) == (6, ("long", "short"))


def test_targets_go_with_their_positions_in_row_major_order():
    samples = [_sample(*SHORT), _sample(*LONG)]
    batch = collate(samples, pad_token_id=PAD, image_batching="flat")
    assert batch.targets.tolist() == [7, 0, 8]
    assert int(batch.supervised.sum()) == sum(sample.num_supervised for sample in samples) == 3


def test_wrong_variants_of_the_supervised_mask_differ():
    samples = [_sample(*LONG), _sample(*SHORT)]
    batch = collate(samples, pad_token_id=PAD, image_batching="flat")
    ids = batch.inputs["input_ids"]
    targets = torch.full_like(ids, PAD)  # padded with the pad token in place of IGNORED
    for row, sample in enumerate(samples):
        targets[row, : sample.num_tokens] = sample.targets
    assert not torch.equal(targets != IGNORED, batch.supervised)
    # Leaving out every target that is the pad token loses a real one.
    assert not torch.equal((targets != IGNORED) & (targets != PAD), batch.supervised)
    assert not torch.equal((ids != PAD).long(), batch.inputs["attention_mask"])


def test_prompts_are_padded_left():
    inputs = collate_prompts(
        [_sample(*LONG), _sample(*SHORT)], pad_token_id=PAD, image_batching="flat"
    )
    assert inputs["input_ids"].tolist() == [[5, 6, 0, 8], [0, 0, 5, 7]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert inputs["mm_token_type_ids"].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


def test_flat_media_are_concatenated_in_the_order_of_the_rows():
    samples = [
        _sample(*LONG, pixel_values=torch.full((3, 2), 1.0)),
        _sample(*SHORT),
        _sample(*SHORT, pixel_values=torch.full((1, 2), 2.0)),
    ]
    batch = collate(samples, pad_token_id=PAD, image_batching="flat")
    assert batch.inputs["pixel_values"].tolist() == [[1, 1], [1, 1], [1, 1], [2, 2]]
    assert batch.num_images == 2


def test_stacked_media_get_a_row_a_sample_padded_with_zeros():
    samples = [
        _sample(*LONG, pixel_values=torch.ones(1, 1, 2)),
        _sample(*SHORT),
        _sample(*SHORT, pixel_values=torch.full((1, 3, 1), 2.0)),
    ]
    values = collate(samples, pad_token_id=PAD, image_batching="stacked").inputs["pixel_values"]
    assert values.tolist() == [
        [[1, 1], [0, 0], [0, 0]],
        [[0, 0], [0, 0], [0, 0]],
        [[2, 0], [2, 0], [2, 0]],
    ]


def test_a_batch_of_text_has_no_media():
    for layout in ("flat", "stacked"):
        batch = collate([_sample(*SHORT)], pad_token_id=PAD, image_batching=layout)
        assert "pixel_values" not in batch.inputs


def test_a_stacked_batch_equals_what_the_processor_makes_of_both(
    make_encoder, make_conversation, picture
):
    """The reference: the Idefics3 processor padding the two samples itself."""
    import PIL.Image

    from tests.data.conftest import cached_processor

    one = make_conversation(("user", picture, "a"), ("assistant", "b"))
    two = make_conversation(("user", picture, picture, "a b c d"), ("assistant", "b"))
    encoder = make_encoder("idefics")
    processor = cached_processor("idefics")
    pad = processor.tokenizer.pad_token_id
    batch = collate(
        [encoder.encode(one), encoder.encode(two)], pad_token_id=pad, image_batching="stacked"
    )
    red = PIL.Image.open(picture.base_dir / picture.ref)
    ending = "<end_of_utterance>\nAssistant: b<end_of_utterance>\n"
    texts = [f"<|im_start|>User:{asked}{ending}" for asked in ("<image>a", "<image><image>a b c d")]
    own = processor(
        text=texts,
        images=[[red], [red, red]],
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    )
    assert set(own) == set(batch.inputs)
    for name, tensor in own.items():
        assert torch.equal(batch.inputs[name], tensor), name
