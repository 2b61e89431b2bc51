from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from vlmtune.data.batches import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Sample
from vlmtune.evaluation.generate import evaluating, generate_answers, greedy_config, stop_token_ids
from vlmtune.evaluation.prompts import prompt_inputs
from vlmtune.models.load import VLM, pad_token_id

NUM_NEW = 6

Answer = Callable[..., list[str]]


@pytest.fixture
def prompts(encoder: Encoder, conversations: list[Conversation]) -> list[Sample]:
    return [encoder.encode_prompt(conversation) for conversation in conversations]


@pytest.fixture
def answer(vlm: VLM, encoder: Encoder) -> Answer:
    def run(conversations: list[Conversation], *, batch_size: int = 8) -> list[str]:
        return generate_answers(
            vlm,
            conversations,
            encoder=encoder,
            max_new_tokens=NUM_NEW,
            batch_size=batch_size,
        )

    return run


def generate_logits(vlm: VLM, encoder: Encoder, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of each generated token, (steps, B, V)."""
    config = greedy_config(vlm, encoder=encoder, max_new_tokens=NUM_NEW)
    config.eos_token_id = []  # never stop: every row gives NUM_NEW rows of logits
    config.output_logits = config.return_dict_in_generate = True
    with evaluating(vlm.model):
        output = vlm.model.generate(**inputs, generation_config=config)
    return torch.stack(output.logits)


def one_by_one(vlm: VLM, encoder: Encoder, prompts: list[Sample]) -> torch.Tensor:
    rows = [generate_logits(vlm, encoder, prompt_inputs(vlm, [prompt])) for prompt in prompts]
    return torch.cat(rows, dim=1)


def test_left_padded_batches_give_the_logits_of_single_prompts(
    vlm: VLM, encoder: Encoder, prompts: list[Sample]
) -> None:
    assert len({prompt.num_tokens for prompt in prompts}) > 3
    alone = one_by_one(vlm, encoder, prompts)
    batched = generate_logits(vlm, encoder, prompt_inputs(vlm, prompts))
    assert batched.shape == alone.shape
    torch.testing.assert_close(batched, alone, atol=1e-5, rtol=1e-5)


def test_right_padding_would_not(vlm: VLM, encoder: Encoder, prompts: list[Sample]) -> None:
    batch = collate(
        prompts, pad_token_id=pad_token_id(vlm.processor), image_batching=vlm.family.image_batching
    )
    alone = one_by_one(vlm, encoder, prompts)
    wrong = generate_logits(vlm, encoder, batch.inputs)
    assert (wrong - alone).abs().max() > 1e-2


def test_padding_that_is_attended_to_would_not(
    vlm: VLM, encoder: Encoder, prompts: list[Sample]
) -> None:
    inputs = prompt_inputs(vlm, prompts)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    alone = one_by_one(vlm, encoder, prompts)
    assert (generate_logits(vlm, encoder, inputs) - alone).abs().max() > 1e-2


def test_answers_do_not_depend_on_the_batch_size_and_keep_their_order(
    answer: Answer, conversations: list[Conversation]
) -> None:
    single = [answer([conversation])[0] for conversation in conversations]
    assert len(set(single)) > 1, "the order shows only where answers differ"
    for batch_size in (1, 2, 4, 64):
        assert answer(conversations, batch_size=batch_size) == single
    assert answer(conversations[::-1]) == single[::-1]


def test_windows_do_not_change_the_answers(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, conversations: list[Conversation]
) -> None:
    whole = answer(conversations, batch_size=2)
    monkeypatch.setattr("vlmtune.evaluation.generate.WINDOW_BATCHES", 1)
    assert answer(conversations, batch_size=2) == whole


def test_the_last_assistant_turn_is_not_in_the_prompt(
    encoder: Encoder, conversations: list[Conversation], vlm: VLM
) -> None:
    ids = encoder.encode_prompt(conversations[0]).input_ids
    text = vlm.processor.tokenizer.decode(ids)
    assert "What color is it?" in text
    assert "red" not in text


def test_modes_and_random_state_survive(
    vlm: VLM, answer: Answer, conversations: list[Conversation]
) -> None:
    vlm.model.train()
    vlm.model.model.visual.eval()
    random_state = torch.get_rng_state()
    answer(conversations[:2])
    modes = {module.training for module in vlm.model.model.visual.modules()}
    language_modes = {module.training for module in vlm.model.model.language_model.modules()}
    vlm.model.eval()
    assert modes == {False}
    assert language_modes == {True}
    assert torch.equal(random_state, torch.get_rng_state())


def test_modes_survive_an_error(vlm: VLM) -> None:
    vlm.model.train()
    with pytest.raises(RuntimeError), evaluating(vlm.model):
        assert not vlm.model.training
        raise RuntimeError
    assert vlm.model.training
    vlm.model.eval()


@pytest.fixture
def sampling_checkpoint(vlm: VLM) -> Iterator[VLM]:
    """A checkpoint whose generation config asks for random answers and a strong penalty."""
    own = vlm.model.generation_config
    vlm.model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_p=0.9,
        top_k=3,
        repetition_penalty=50.0,
        no_repeat_ngram_size=1,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    yield vlm
    vlm.model.generation_config = own


def test_decoding_is_greedy_whatever_the_checkpoint_says(
    vlm: VLM,
    encoder: Encoder,
    prompts: list[Sample],
    sampling_checkpoint: VLM,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs = prompt_inputs(vlm, prompts)
    config = greedy_config(vlm, encoder=encoder, max_new_tokens=NUM_NEW)
    config.eos_token_id = []
    config.output_logits = config.return_dict_in_generate = True
    transformers_logging.enable_propagation()
    with evaluating(vlm.model), caplog.at_level(logging.WARNING):
        output = vlm.model.generate(**inputs, generation_config=config)
        checkpoints_own = vlm.model.generate(**inputs, max_new_tokens=NUM_NEW)
    transformers_logging.disable_propagation()
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, torch.stack(output.logits).argmax(-1).T)
    wrong = checkpoints_own[:, inputs["input_ids"].shape[1] :]
    assert new.shape != wrong.shape or not torch.equal(new, wrong)
    assert not caplog.records


def test_answers_end_at_the_end_of_a_turn(vlm: VLM, encoder: Encoder) -> None:
    tokenizer = vlm.processor.tokenizer
    own = vlm.model.generation_config.eos_token_id
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    try:
        vlm.model.generation_config.eos_token_id = [end_of_text]  # as base checkpoints have it
        assert {end_of_turn, end_of_text} <= set(stop_token_ids(vlm, encoder))
    finally:
        vlm.model.generation_config.eos_token_id = own


def test_each_batch_reports_its_answers_by_number(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation]
) -> None:
    seen: list[dict[int, str]] = []
    texts = generate_answers(
        vlm,
        conversations,
        encoder=encoder,
        max_new_tokens=1,
        batch_size=4,
        numbers=[10, 20, 30, 40, 50, 60],
        on_answers=lambda answers: seen.append(dict(answers)),
    )
    assert [len(batch) for batch in seen] == [4, 2]
    by_number = seen[0] | seen[1]
    assert [by_number[number] for number in (10, 20, 30, 40, 50, 60)] == texts


def test_no_conversation_gives_no_answer(answer: Answer) -> None:
    assert answer([]) == []
