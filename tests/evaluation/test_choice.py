"""Multiple choice by likelihood."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlmtune.data.batches import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Text, Turn
from vlmtune.errors import SampleError
from vlmtune.evaluation.likelihood import choice_statistics, choose_by_likelihood
from vlmtune.evaluation.metrics.base import Mean
from vlmtune.evaluation.metrics.registry import CHOICE_LIKELIHOOD
from vlmtune.models.forward import full_logits
from vlmtune.models.load import VLM

OPTIONS = ("red", "a green triangle", "it is blue", "two")


def answered(conversation: Conversation, text: str) -> Conversation:
    turns = (*conversation.turns[:-1], Turn("assistant", (Text(text),)))
    return replace(conversation, turns=turns)


def test_the_choice_is_the_option_with_the_highest_mean_log_probability(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation]
) -> None:
    asked = [
        replace(c, options=OPTIONS[n % 2 :]) for n, c in enumerate(conversations) if n != 4
    ]  # number 4 has an earlier answer, which is supervised too

    def log_probs(conversation: Conversation, option: str) -> torch.Tensor:
        sample = encoder.encode(answered(conversation, option))
        batch = collate([sample], pad_token_id=0, image_batching="flat")
        with torch.no_grad():
            logits = full_logits(vlm.model, batch.inputs)[batch.supervised]
        return logits.log_softmax(-1).gather(1, batch.targets[:, None])

    def best(of) -> list[int]:
        return [
            int(np.argmax([float(of(log_probs(c, option))) for option in c.options])) for c in asked
        ]

    done: list[int] = []
    chosen = choose_by_likelihood(
        vlm, asked, encoder=encoder, batch_size=2, on_progress=done.append
    )
    assert chosen == best(torch.mean)
    assert done == [1, 2, 3, 4, 5]


def test_a_choice_is_right_where_a_reference_is_that_option_or_its_letter(
    conversations: list[Conversation],
) -> None:
    conversation = replace(conversations[0], options=OPTIONS)
    rows = [answered(conversation, text) for text in ("red", "B", "Two.", "purple")]
    statistics = choice_statistics(rows, [0, 1, 0, 0])
    assert [None if s is None else s.score for s in statistics] == [1.0, 1.0, 0.0, None]
    sums = np.array([s.sums for s in statistics if s is not None]).sum(axis=0)
    figures = Mean(CHOICE_LIKELIHOOD, lambda sample: None).figures(sums)
    assert figures["choice_likelihood"] == pytest.approx(2 / 3)


def test_a_sample_without_options_is_an_error_with_its_place(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation]
) -> None:
    with pytest.raises(SampleError, match=r"questions\.jsonl:1: sample has no options"):
        choose_by_likelihood(vlm, conversations[:1], encoder=encoder, batch_size=1)
