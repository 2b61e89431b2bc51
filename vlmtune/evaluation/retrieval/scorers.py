"""Scores of every picture and text: by likelihood, or by the cosine of two embeddings.

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

    picture, then the prompt -> (D,) ---+
    text, then the prompt    -> (D,) ---+--> dot product of unit vectors

The prompt asks for one word, so that the state before it sums up what came before (Jiang et al.
2023, PromptEOL, arXiv 2307.16645; with pictures Jiang et al. 2024, E5-V, arXiv 2407.12580).
Embeddings are held, (N / processes + M, D); the score matrix is made a block at a time, anew in
each pass. Letters: b pictures of a block, M texts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from torch import nn

from vlmtune.data.batches import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.pairs import picture_side, text_side
from vlmtune.data.tokens import without_images
from vlmtune.data.types import Conversation
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.likelihood import LikelihoodScorer
from vlmtune.evaluation.retrieval.ranking import (
    Block,
    Gather,
    Integers,
    RetrievalItems,
    Scores,
    TextItem,
)
from vlmtune.models.embedding import EmbeddingForward
from vlmtune.models.load import VLM, pad_token_id


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


BLOCK_NUMBERS = 2**22
"""Scores held at once, (b, M)."""


@dataclass(frozen=True)
class Embedded:
    """This process's embeddings (…, D) of the pictures and texts numbered so."""

    pictures: Integers
    picture_vectors: Scores
    texts: Integers
    text_vectors: Scores

    def blocks(self, *, gather: Gather) -> Callable[[], Iterator[Block]]:
        """The blocks of this process's pictures and all processes' texts. One collective."""
        parts = gather([(self.texts, self.text_vectors)])
        order = np.argsort(np.concatenate([numbers for numbers, _ in parts]))
        texts = np.concatenate([vectors for _, vectors in parts if len(vectors)])[order]  # (M, D)
        rows = max(1, BLOCK_NUMBERS // len(texts))

        def blocks() -> Iterator[Block]:
            for start in range(0, len(self.pictures), rows):
                some = slice(start, start + rows)
                yield Block(self.pictures[some], self.picture_vectors[some] @ texts.T)

        return blocks


def embed_items(
    vlm: VLM,
    items: RetrievalItems,
    *,
    encoder: Encoder,
    prompt: str,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Embedded:
    """Embed every `world_size`-th text and picture.

    No collective. The model should be in eval mode. `on_progress` counts this process's pictures.
    Raises SampleError for what cannot be encoded, VlmtuneError for an embedding that is NaN.
    """
    forward = EmbeddingForward(vlm.model, vlm.family).eval()
    embedder = _Embedder(vlm, encoder, forward, batch_size)
    texts = np.arange(rank, len(items.texts), world_size)
    text_sides = [text_side(items.texts[n].conversation, prompt=prompt) for n in texts]
    text_vectors = embedder(text_sides, None)
    pictures = np.arange(rank, len(items.pictures), world_size)
    picture_sides = [picture_side(items.pictures[n], prompt=prompt) for n in pictures]
    picture_vectors = embedder(picture_sides, on_progress)
    return Embedded(pictures, picture_vectors, texts, text_vectors)


@dataclass(frozen=True)
class _Embedder:
    """One-turn conversations to unit vectors (n, D), a batch at a time."""

    vlm: VLM
    encoder: Encoder
    forward: nn.Module
    batch_size: int

    def __call__(
        self, sides: Sequence[Conversation], on_progress: Callable[[int], None] | None
    ) -> Scores:
        parts = [np.zeros((0, 0), dtype=np.float32)]
        for start in range(0, len(sides), self.batch_size):
            batch = sides[start : start + self.batch_size]
            parts.append(self._embed(batch))
            if on_progress is not None:
                on_progress(start + len(batch))
        return np.concatenate(parts[1:] or parts)

    def _embed(self, sides: Sequence[Conversation]) -> Scores:
        device = next(self.vlm.model.parameters()).device
        batch = collate(
            [self.encoder.encode_prompt(side) for side in sides],
            pad_token_id=pad_token_id(self.vlm.processor),
            image_batching=self.vlm.family.image_batching,
        )
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        last = inputs["attention_mask"].sum(dim=1) - 1  # (B,)
        vectors: Scores = self.forward(inputs, last).cpu().numpy()  # (B, D)
        for side, vector in zip(sides, vectors):
            if np.isnan(vector).any():
                raise VlmtuneError(
                    "an embedding is not a number (NaN)",
                    at=side.source,
                    do="check for overflow: use --dtype float32, or lower train.learning_rate",
                )
        return vectors
