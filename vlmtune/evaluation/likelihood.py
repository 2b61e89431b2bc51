"""The likelihood of texts as answers, and the most likely option.

conversation -> prompt with its pictures, run once -> every text's log p / its number of tokens

    question with pictures (run once) -> mean log p per token of each option -> the highest

The mean over an option's tokens, its end of turn included, is what language-model harnesses call
length-normalised accuracy (they divide by characters or bytes; here by tokens, as the loss does).
Nothing is generated, so no answer can miss the options. Of equally likely options the first is
chosen: with different texts that happens where a model is broken, not where it guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlmtune.data.encode import Encoder
from vlmtune.data.tokens import AnswerTokenizer
from vlmtune.data.types import Conversation
from vlmtune.errors import SampleError
from vlmtune.evaluation.generate import evaluating
from vlmtune.evaluation.metrics.base import Statistics
from vlmtune.evaluation.metrics.choice import reference_options
from vlmtune.evaluation.prompts import SharedPictures
from vlmtune.evaluation.references import answered_sample
from vlmtune.models.likelihood import score_texts
from vlmtune.models.load import VLM

TOKENS_PER_ROW = 1024
"""What `eval.batch_size` counts, in tokens: a prompt with pictures and a text are seldom longer."""


@dataclass(frozen=True)
class LikelihoodScorer:
    """Scores all texts after one conversation's prompt."""

    vlm: VLM
    encoder: Encoder
    tokenizer: AnswerTokenizer
    max_block_tokens: int
    pictures: SharedPictures

    @classmethod
    def build(
        cls,
        vlm: VLM,
        *,
        encoder: Encoder,
        batch_size: int,
        pictures: SharedPictures | None = None,
    ) -> LikelihoodScorer:
        """`pictures` are those of the evaluation that this is part of."""
        tokenizer = AnswerTokenizer(vlm.processor)
        max_block_tokens = batch_size * TOKENS_PER_ROW
        return cls(vlm, encoder, tokenizer, max_block_tokens, pictures or SharedPictures(vlm))

    def per_token(
        self, conversation: Conversation, tokens: Sequence[Tensor]
    ) -> NDArray[np.float32]:
        """Mean log-probabilities (M,) of texts' `tokens`. Raises SampleError where the prompt
        cannot be encoded or leaves no room for the longest text."""
        prompt = self.encoder.encode_prompt(conversation)
        longest = max(len(text) for text in tokens)
        if prompt.num_tokens + longest > self.encoder.max_tokens:
            raise SampleError(
                "the prompt and the longest text are too long together",
                at=conversation.source,
                got=f"{prompt.num_tokens} and {longest} tokens",
                expected=f"at most {self.encoder.max_tokens}",
            )
        inputs = self.pictures.inputs(self.pictures.with_keys([prompt]))
        scores = score_texts(self.vlm.model, inputs, tokens, max_block_tokens=self.max_block_tokens)
        return scores.per_token.numpy().astype(np.float32)


def choose_by_likelihood(
    vlm: VLM,
    conversations: Sequence[Conversation],
    *,
    encoder: Encoder,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
    pictures: SharedPictures | None = None,
) -> list[int]:
    """The number of the likeliest option of each conversation, as an answer after its own turns.

    `batch_size` bounds memory as for retrieval. `pictures` are those of the evaluation that this is
    part of. Every module's training mode is restored. No
    collective: with several processes, each passes its share. Raises SampleError for a conversation
    without options or one that cannot be encoded, and for a likelihood that is NaN.
    """
    scorer = LikelihoodScorer.build(vlm, encoder=encoder, batch_size=batch_size, pictures=pictures)
    chosen = []
    with evaluating(vlm.model):
        for conversation in conversations:
            chosen.append(_likeliest(scorer, conversation))
            if on_progress is not None:
                on_progress(len(chosen))
    return chosen


def choice_statistics(
    conversations: Sequence[Conversation], chosen: Sequence[int]
) -> list[Statistics | None]:
    """Whether each choice is right, as the statistics of a `Mean`: its figure is the mean.
    None where no reference is one of the options."""
    statistics: list[Statistics | None] = []
    for conversation, index in zip(conversations, chosen, strict=True):
        right = reference_options(answered_sample(conversation, ""))
        score = float(index in right)
        statistics.append(Statistics(score, (score, 1.0)) if right else None)
    return statistics


def _likeliest(scorer: LikelihoodScorer, conversation: Conversation) -> int:
    source = conversation.source
    if not conversation.options:
        raise SampleError(
            "sample has no options to choose from",
            at=source,
            expected="`options`",
        )
    tokens = scorer.tokenizer.answers(conversation, conversation.options)
    scores = scorer.per_token(conversation, tokens)
    if np.isnan(scores).any():
        raise SampleError(
            "an option's likelihood is not a number (NaN)",
            at=source,
        )
    return int(scores.argmax())
