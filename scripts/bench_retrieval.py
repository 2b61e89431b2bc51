"""Time to score every text after every picture: over a shared cache, and as whole passes.

    OMP_NUM_THREADS=1 python scripts/bench_retrieval.py [--pictures 40] [--model FOLDER]

    one by one   each pair encoded (picture included) and run alone
    in batches   the same, each picture processed once, BATCH rows a pass, logits at the text only
    shared       each picture's prompt run once, texts over copies of its key-value cache

Prints seconds, the ratios of one run, and the largest difference between the scores. All three
give the mean log-probability per token; none subtracts the prior.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlmtune.data.batches import collate
from vlmtune.data.dataset import load_conversations
from vlmtune.data.encode import Encoder
from vlmtune.data.types import IGNORED, Sample
from vlmtune.evaluation.generate import evaluating
from vlmtune.evaluation.likelihood import LikelihoodScorer
from vlmtune.evaluation.retrieval.ranking import RetrievalItems, answered, retrieval_items
from vlmtune.models.forward import SupervisedForward
from vlmtune.models.load import VLM, load_vlm, pad_token_id

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
BATCH = 16


def main() -> None:
    arguments = parse()
    vlm = load_vlm(arguments.model, dtype=torch.float32)
    encoder = Encoder(
        vlm.processor, max_tokens=2048, over_length="error", max_image_pixels=100_000_000
    )
    items = first_items(arguments.data, arguments.pictures)
    num_pictures, num_texts = len(items.pictures), len(items.texts)
    print(f"{num_pictures} pictures, {num_texts} texts, {torch.get_num_threads()} threads")
    scores: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    ways: dict[str, Callable[[VLM, Encoder, RetrievalItems], np.ndarray]] = {
        "shared": shared,
        "in batches": in_batches,
        "one by one": one_by_one,
    }
    with evaluating(vlm.model):
        shared(vlm, encoder, first_items(arguments.data, 1))  # warm
        for name, score in ways.items():
            started = time.perf_counter()
            scores[name] = score(vlm, encoder, items)
            seconds[name] = time.perf_counter() - started
    for name in ways:
        ratio = seconds[name] / seconds["shared"]
        gap = np.abs(scores[name] - scores["shared"]).max()
        print(f"{name:<12} {seconds[name]:8.2f} s {ratio:6.1f} x shared, scores within {gap:.1e}")


def shared(vlm: VLM, encoder: Encoder, items: RetrievalItems) -> np.ndarray:
    scorer = LikelihoodScorer.build(vlm, encoder=encoder, batch_size=BATCH)
    tokens = scorer.tokenizer.answers(items.pictures[0], [item.text for item in items.texts])
    return np.stack([scorer.per_token(picture, tokens) for picture in items.pictures])


def one_by_one(vlm: VLM, encoder: Encoder, items: RetrievalItems) -> np.ndarray:
    return np.stack(
        [
            [
                float(means(vlm, [encoder.encode(answered(picture, item.text))]))
                for item in items.texts
            ]
            for picture in items.pictures
        ]
    )


def in_batches(vlm: VLM, encoder: Encoder, items: RetrievalItems) -> np.ndarray:
    rows = []
    texts = None
    for picture in items.pictures:
        prompt = encoder.encode_prompt(picture)
        if texts is None:
            scorer = LikelihoodScorer.build(vlm, encoder=encoder, batch_size=BATCH)
            texts = scorer.tokenizer.answers(picture, [item.text for item in items.texts])
        samples = [continued(prompt, tokens) for tokens in texts]
        parts = [means(vlm, samples[n : n + BATCH]) for n in range(0, len(samples), BATCH)]
        rows.append(torch.cat(parts).numpy())
    return np.stack(rows)


def continued(prompt: Sample, tokens: Tensor) -> Sample:
    """The prompt with a text after it, the text supervised."""
    ids = torch.cat([prompt.input_ids, tokens])
    targets = torch.full_like(ids, IGNORED)
    targets[prompt.num_tokens - 1 : -1] = tokens
    return replace(
        prompt,
        input_ids=ids,
        targets=targets,
        token_fields={
            name: torch.cat([field, field.new_zeros(len(tokens))])
            for name, field in prompt.token_fields.items()
        },
    )


def means(vlm: VLM, samples: list[Sample]) -> Tensor:
    """The mean log-probability of each sample's targets, in one uncached pass."""
    batch = collate(
        samples, pad_token_id=pad_token_id(vlm.processor), image_batching=vlm.family.image_batching
    )
    logits = SupervisedForward(vlm.model, vlm.family).logits(batch)
    log_probs = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    counts = batch.supervised.sum(dim=1).tolist()
    return torch.stack([part.mean() for part in log_probs.split(counts)])


def first_items(data: Path, num_pictures: int) -> RetrievalItems:
    """The first pictures of a file and their texts."""
    items = retrieval_items(load_conversations([data])[0])
    wanted = sorted({n for texts in items.relevance.texts_of[:num_pictures] for n in texts})
    return replace(
        items,
        pictures=items.pictures[:num_pictures],
        texts=tuple(items.texts[n] for n in wanted),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(SAMPLE / "tiny-vlm"))
    parser.add_argument("--data", type=Path, default=SAMPLE / "captions_eval.jsonl")
    parser.add_argument("--pictures", type=int, default=40)
    return parser.parse_args()


if __name__ == "__main__":
    main()
