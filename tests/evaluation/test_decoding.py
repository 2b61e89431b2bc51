from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from transformers import StoppingCriteriaList

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Batch, Conversation, Source, Text, Turn
from vlmtune.evaluation.generate import (
    StopTexts,
    cut_before,
    decoding_config,
    ends_answer,
    evaluating,
    generate_answers,
    gumbel_noise,
    sampling_processors,
)
from vlmtune.evaluation.prompts import prompt_inputs
from vlmtune.evaluation.running_batch import Row
from vlmtune.models.forward import SupervisedForward
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import DecodingSection

NUM_NEW = 6
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -6.0])
SAMPLE = DecodingSection(method="sample", temperature=3.0)

Answer = Callable[..., list[str]]


@pytest.fixture
def answer(vlm: VLM, encoder: Encoder) -> Answer:
    def run(
        conversations: Sequence[Conversation],
        decoding: DecodingSection,
        *,
        batch_size: int = 8,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> list[str]:
        return generate_answers(
            vlm,
            conversations,
            encoder=encoder,
            max_new_tokens=NUM_NEW,
            batch_size=batch_size,
            decoding=decoding,
            seed=seed,
            numbers=numbers,
        )

    return run


def frequencies(decoding: DecodingSection, *, num_draws: int = 20_000) -> torch.Tensor:
    """How often each token of LOGITS is the draw, over many samples."""
    prompts = torch.zeros((num_draws, 3), dtype=torch.int64)
    processors = sampling_processors(
        decoding, seed=5, samples=range(num_draws), prompt_length=prompts.shape[1]
    )
    scores = processors(prompts, LOGITS.repeat(num_draws, 1))
    return torch.bincount(scores.argmax(-1), minlength=len(LOGITS)) / num_draws


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        (DecodingSection(method="sample"), LOGITS.softmax(-1)),
        (DecodingSection(method="sample", temperature=2.0), (LOGITS / 2).softmax(-1)),
        # The two likeliest hold 0.643 + 0.237 = 0.880 of the whole.
        (
            DecodingSection(method="sample", top_p=0.85),
            torch.cat([LOGITS[:2].softmax(-1), torch.zeros(3)]),
        ),
        (
            DecodingSection(method="sample", top_k=3, temperature=0.5),
            torch.cat([(2 * LOGITS[:3]).softmax(-1), torch.zeros(2)]),
        ),
    ],
)
def test_samples_have_the_distribution_that_was_asked_for(
    decoding: DecodingSection, expected: torch.Tensor
) -> None:
    # 20,000 draws: a standard deviation of at most 0.0036.
    torch.testing.assert_close(frequencies(decoding), expected, atol=0.014, rtol=0)
    other = DecodingSection(method="sample", temperature=4.0)
    assert (frequencies(other) - expected).abs().max() > 0.05


def test_noise_differs_by_seed_sample_and_position_and_repeats() -> None:
    first = gumbel_noise(8, seed=1, sample=2, position=3)
    assert (first == gumbel_noise(8, seed=1, sample=2, position=3)).all()
    for changed in ({"seed": 2}, {"sample": 3}, {"position": 4}):
        other = gumbel_noise(8, **({"seed": 1, "sample": 2, "position": 3} | changed))
        assert abs(first - other).min() > 0


def test_a_sampled_answer_does_not_depend_on_batch_or_share(
    answer: Answer, conversations: list[Conversation]
) -> None:
    whole = answer(conversations, SAMPLE)
    assert whole == answer(conversations, SAMPLE, batch_size=1)
    shares = [range(rank, len(conversations), 2) for rank in (0, 1)]
    for share in shares:
        mine = [conversations[number] for number in share]
        assert answer(mine, SAMPLE, numbers=share) == [whole[number] for number in share]
    # Numbered by its place in the share, a sample would get another's noise.
    wrong = answer([conversations[number] for number in shares[1]], SAMPLE)
    assert wrong != [whole[number] for number in shares[1]]
    assert whole != answer(conversations, SAMPLE, seed=1)
    assert whole != answer(conversations, DecodingSection())


def test_the_same_question_asked_often_gets_different_answers(answer: Answer) -> None:
    asked = [
        Conversation(str(n), (Turn("user", (Text("Name a color."),)),), Source("q", n))
        for n in range(8)
    ]
    assert len(set(answer(asked, SAMPLE))) > 4
    assert len(set(answer(asked, DecodingSection()))) == 1


def log_probability(vlm: VLM, encoder: Encoder, asked: Conversation, new_ids: list[int]) -> float:
    """Of `new_ids` after the prompt, per token: what beam search maximises."""
    inputs = prompt_inputs(vlm, [encoder.encode_prompt(asked)])
    answer = torch.tensor([new_ids])
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    inputs = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer)], dim=1)
        inputs["mm_token_type_ids"] = kinds
    supervised = torch.zeros(ids.shape, dtype=torch.bool)
    supervised[0, -len(new_ids) - 1 : -1] = True
    with evaluating(vlm.model):
        batch = Batch(inputs, supervised, answer[0], ("",), ids.numel(), 1)
        logits = SupervisedForward(vlm.model, vlm.family).logits(batch)
    return float(logits.log_softmax(-1)[range(len(new_ids)), new_ids].mean())


def new_ids_of(
    vlm: VLM, encoder: Encoder, asked: Sequence[Conversation], decoding: DecodingSection
) -> list[list[int]]:
    """The ids of each answer in one batch, NUM_NEW of them: nothing ends an answer early."""
    inputs = prompt_inputs(vlm, [encoder.encode_prompt(conversation) for conversation in asked])
    config = decoding_config(vlm, encoder=encoder, decoding=decoding, max_new_tokens=NUM_NEW)
    config.eos_token_id = []
    with evaluating(vlm.model):
        output = vlm.model.generate(**inputs, generation_config=config)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def undecided(vlm: VLM) -> Iterator[VLM]:
    """The model with flatter distributions: its own are so sharp that any search finds the same."""
    handle = vlm.model.lm_head.register_forward_hook(lambda module, args, logits: logits * 0.3)
    yield vlm
    handle.remove()


def test_beams_find_answers_that_are_likelier_than_greedy_ones(
    undecided: VLM, encoder: Encoder, conversations: list[Conversation]
) -> None:
    beam = DecodingSection(method="beam", num_beams=8)
    gains = []
    for asked in conversations:
        (greedy,) = new_ids_of(undecided, encoder, [asked], DecodingSection())
        (found,) = new_ids_of(undecided, encoder, [asked], beam)
        gains.append(
            log_probability(undecided, encoder, asked, found)
            - log_probability(undecided, encoder, asked, greedy)
        )
    assert min(gains) > -1e-5
    assert max(gains) > 1e-3


def test_beams_do_not_depend_on_the_batch(
    undecided: VLM, encoder: Encoder, answer: Answer, conversations: list[Conversation]
) -> None:
    beam = DecodingSection(method="beam", num_beams=8)
    assert answer(conversations, beam) == answer(conversations, beam, batch_size=1)
    together = new_ids_of(undecided, encoder, conversations, beam)
    alone = [new_ids_of(undecided, encoder, [asked], beam)[0] for asked in conversations]
    assert together == alone
    assert together != new_ids_of(undecided, encoder, conversations, DecodingSection())


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_an_answer_is_cut_before_the_first_stop_text(
    answer: Answer, conversations: list[Conversation], method: str
) -> None:
    whole = answer(conversations[:1], DecodingSection(method=method))[0]
    words = whole.split()
    assert len(words) > 1, whole
    stop = words[1]
    cut = answer(conversations[:1], DecodingSection(method=method, stop=["never", stop]))[0]
    assert cut == whole[: whole.index(stop)].strip() != whole


def test_generation_ends_where_the_stop_text_does(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation]
) -> None:
    inputs = prompt_inputs(vlm, [encoder.encode_prompt(conversations[0])])
    length = inputs["input_ids"].shape[1]
    config = decoding_config(
        vlm, encoder=encoder, decoding=DecodingSection(), max_new_tokens=NUM_NEW
    )
    config.eos_token_id = []
    tokenizer = vlm.processor.tokenizer

    def num_new(*stops: str) -> int:
        criterion = StopTexts(stops, tokenizer=tokenizer, prompt_length=length)
        with evaluating(vlm.model):
            output = vlm.model.generate(
                **inputs,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([criterion]),
            )
        return output.shape[1] - length

    (ids,) = new_ids_of(vlm, encoder, conversations[:1], DecodingSection())
    assert num_new(tokenizer.decode(ids[:1]).strip()) == 1
    prompt_end = tokenizer.decode(inputs["input_ids"][0, -2:])
    assert num_new(prompt_end) == NUM_NEW  # the prompt's text stops nothing


def test_a_row_ends_at_its_length_a_stop_token_or_a_stop_text(vlm: VLM, encoder: Encoder) -> None:
    ids = vlm.processor.tokenizer("red blue red", add_special_tokens=False).input_ids
    assert len(ids) >= 3

    def length_of(ids: list[int], *, stops: Sequence[str] = (), max_new_tokens: int = 10) -> int:
        """After how many tokens an answer of `ids` ends."""
        has_ended = ends_answer(vlm, encoder=encoder, stops=stops, max_new_tokens=max_new_tokens)
        ended = (n for n in range(1, len(ids) + 1) if has_ended(Row(0, ids[:n])))
        return next(ended, -1)

    assert length_of(ids) == -1
    assert length_of(ids, max_new_tokens=2) == 2
    assert length_of([ids[0], encoder.end_token_id, *ids]) == 2
    decoded = [vlm.processor.tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)]
    expected = next(n for n, text in enumerate(decoded, start=1) if "blue" in text)
    assert 1 < expected < len(ids)
    assert length_of(ids, stops=["green", "blue"]) == expected
    assert length_of(ids, stops=["green"]) == -1


def test_the_earliest_stop_counts() -> None:
    assert cut_before("a b c", ["c", "b"]) == "a "
    assert cut_before("a b c", ["d"]) == "a b c"
    assert cut_before("a b c", []) == "a b c"
