"""The lines of a retrieval's `predictions.jsonl`: what each query found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlmtune.evaluation.references import picture_name, question_of
from vlmtune.evaluation.retrieval.figures import RECALLS
from vlmtune.evaluation.retrieval.items import RetrievalItems
from vlmtune.evaluation.retrieval.ranking import Ranked, Rankings

Direction = Literal["picture_to_text", "text_to_picture"]
DIRECTIONS: tuple[Direction, ...] = ("picture_to_text", "text_to_picture")


@dataclass(frozen=True)
class TopItem:
    """A text, or the name of a picture (of several joined by commas), among a query's best."""

    item: str
    score: float
    is_relevant: bool


@dataclass(frozen=True)
class RankedQuery:
    """One query. `images` are the picture that asks, or the pictures a text should find; `answers`
    are the texts, or the pictures' names, that are right. `scores` are R@1, R@5, R@10 and the
    reciprocal rank; all are expectations where scores are tied."""

    id: str
    direction: Direction
    images: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    rank: float
    scores: dict[str, float]
    top: tuple[TopItem, ...]

    def as_row(self) -> dict[str, object]:
        """With the fields of a `Prediction`, so that its readers can show it: the first of `top`
        as `prediction`, R@1 as `score`."""
        return {
            "id": self.id,
            "direction": self.direction,
            "images": self.images,
            "question": self.question,
            "answer": self.answers[0],
            "answers": self.answers,
            "options": (),
            "prediction": self.top[0].item,
            "score": self.scores["r1"],
            "scores": self.scores,
            "question_type": None,
            "rank": self.rank,
            "top": [
                {"item": top.item, "score": top.score, "is_relevant": top.is_relevant}
                for top in self.top
            ],
        }


def ranked_queries(rankings: Rankings, items: RetrievalItems) -> list[RankedQuery]:
    """A row a query: first the pictures', then the texts'."""
    images = [
        tuple(picture_name(image) for image in conversation.images)
        for conversation in items.pictures
    ]
    names = [", ".join(shown) for shown in images]
    texts = [item.text for item in items.texts]
    pictures_of = items.relevance.pictures_of
    rows = []
    for picture, ranked in enumerate(rankings.texts):
        conversation, right = items.pictures[picture], items.relevance.texts_of[picture]
        rows.append(
            RankedQuery(
                id=f"{conversation.id}:picture",
                direction="picture_to_text",
                images=images[picture],
                question=question_of(conversation),
                answers=tuple(texts[number] for number in right),
                rank=ranked.rank,
                scores=_scores(ranked),
                top=_top(ranked, texts, right),
            )
        )
    for number, ranked in enumerate(rankings.pictures):
        item, right = items.texts[number], pictures_of[number]
        suffix = f":{item.number}" if item.number else ""
        rows.append(
            RankedQuery(
                id=f"{item.conversation.id}:text{suffix}",
                direction="text_to_picture",
                images=tuple(name for picture in right for name in images[picture]),
                question=item.text,
                answers=tuple(names[picture] for picture in right),
                rank=ranked.rank,
                scores=_scores(ranked),
                top=_top(ranked, names, right),
            )
        )
    return rows


def _scores(ranked: Ranked) -> dict[str, float]:
    return {**dict(zip(RECALLS, ranked.recalls)), "mrr": ranked.reciprocal_rank}


def _top(ranked: Ranked, names: Sequence[str], right: Sequence[int]) -> tuple[TopItem, ...]:
    return tuple(TopItem(names[number], score, number in right) for number, score in ranked.top)
