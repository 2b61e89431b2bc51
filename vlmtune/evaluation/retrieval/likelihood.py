"""Scores by likelihood: mean log p of a text's tokens after a picture and its question.

    picture + its row's turns (P tokens, run once) -> log p of every text / its number of tokens
    prior: the same turns without pictures         -> the same, once per question

The mean over tokens, the end of turn included, keeps short texts from winning by being short. With
`subtract_prior` a picture's ranking of texts is by pointwise mutual information per token, so that
it is not led by texts that are likely whatever the picture. That is for models that were not
trained on such texts; of a trained model's score it takes away what the model has learned
(docs/methods.md has both). A text's ranking of pictures does not need it where all pictures are
asked the same question. Where they are not, a question under which every text is likely favours its
picture: give all rows one question.

A row of scores is written to a file as soon as it is there, since ranking passes over the rows
twice and the matrix does not belong in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import IO

import numpy as np

from vlmtune.data.answers import without_images
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.evaluation.likelihood import LikelihoodScorer
from vlmtune.evaluation.retrieval.items import RetrievalItems, TextItem
from vlmtune.evaluation.retrieval.ranking import Block, Scores
from vlmtune.models.load import VLM


def write_likelihoods(
    vlm: VLM,
    items: RetrievalItems,
    file: IO[bytes],
    *,
    encoder: Encoder,
    batch_size: int,
    subtract_prior: bool,
    on_progress: Callable[[int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Callable[[], Iterator[Block]]:
    """Score every `world_size`-th picture into `file`; the blocks that are read back from it.

    No collective. The model should be in eval mode. `on_progress` counts this process's pictures.
    Raises SampleError for what cannot be encoded, VlmtuneError for a score that is NaN.
    """
    scorer = LikelihoodScorer.build(vlm, encoder=encoder, batch_size=batch_size)
    num_blocks = 0
    for block in _score(scorer, items, subtract_prior, rank, world_size):
        block.check()
        _write(file, block)
        num_blocks += 1
        if on_progress is not None:
            on_progress(num_blocks)

    def blocks() -> Iterator[Block]:
        file.seek(0)
        for _ in range(num_blocks):
            yield _read(file)

    return blocks


def _score(
    scorer: LikelihoodScorer,
    items: RetrievalItems,
    subtract_prior: bool,
    rank: int,
    world_size: int,
) -> Iterator[Block]:
    """A block a picture; pictures with the same prompt one after the other, so that the texts'
    tokens and prior are made once for each prompt and held for one."""
    prompts: dict[str, list[int]] = {}
    for picture, conversation in enumerate(items.pictures):
        prompts.setdefault(scorer.tokenizer.prompt_text(conversation), []).append(picture)
    grouped = [(prompt, picture) for prompt, group in prompts.items() for picture in group]
    current = None
    for prompt, picture in grouped[rank::world_size]:
        conversation = items.pictures[picture]
        if prompt != current:
            current = prompt
            tokens = _tokens(scorer, conversation, items.texts)
            prior = _prior(scorer, conversation, items.texts) if subtract_prior else None
        scores = scorer.per_token(conversation, tokens)[None]  # (1, M)
        yield Block(np.array([picture]), scores, prior)


def _prior(
    scorer: LikelihoodScorer, conversation: Conversation, texts: Sequence[TextItem]
) -> Scores:
    blind = without_images(conversation)
    return scorer.per_token(blind, _tokens(scorer, blind, texts))


def _tokens(
    scorer: LikelihoodScorer, conversation: Conversation, texts: Sequence[TextItem]
) -> list:
    return scorer.tokenizer.answers(
        conversation,
        [item.text for item in texts],
        sources=[item.conversation.source for item in texts],
    )


def _write(file: IO[bytes], block: Block) -> None:
    for array in (block.pictures, block.scores):
        np.save(file, array, allow_pickle=False)
    prior = np.zeros(0, np.float32) if block.prior is None else block.prior
    np.save(file, prior, allow_pickle=False)


def _read(file: IO[bytes]) -> Block:
    pictures, scores, prior = (np.load(file, allow_pickle=False) for _ in range(3))
    return Block(pictures, scores, prior if len(prior) else None)
