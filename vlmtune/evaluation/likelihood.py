"""How likely texts are as answers to a conversation: mean log p per token.

conversation -> prompt with its pictures, run once -> every text's log p / its number of tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlmtune.data.answers import AnswerTokenizer
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.errors import SampleError
from vlmtune.evaluation.prompts import SharedPictures
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
                file=conversation.source.file,
                line=conversation.source.line,
                got=f"{prompt.num_tokens} and {longest} tokens",
                expected=f"at most {self.encoder.max_tokens}",
            )
        inputs = self.pictures.inputs(self.pictures.with_keys([prompt]))
        scores = score_texts(self.vlm.model, inputs, tokens, max_block_tokens=self.max_block_tokens)
        return scores.per_token.numpy().astype(np.float32)
