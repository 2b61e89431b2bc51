"""Reports from a model: against whole passes one by one, over processes, and their rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.retrieval.processes import run_processes
from vlmtune.data.batches import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.pairs import picture_side, text_side
from vlmtune.data.tokens import without_images
from vlmtune.data.types import Conversation, Image, Text, Turn
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.evaluation.results import EvalReport
from vlmtune.evaluation.retrieval.ranking import answered, retrieval_items
from vlmtune.evaluation.retrieval.runner import evaluate_retrieval
from vlmtune.models.forward import full_logits
from vlmtune.models.load import VLM, load_vlm
from vlmtune.recipe.schema import EvalSection

LIKELIHOOD = EvalSection(task="retrieval", batch_size=2)
EMBEDDING = EvalSection(task="retrieval", scorer="embedding", batch_size=5)


def mean_log_prob(vlm: VLM, encoder: Encoder, conversation: Conversation) -> float:
    batch = collate([encoder.encode(conversation)], pad_token_id=0, image_batching="flat")
    with torch.no_grad():
        logits = full_logits(vlm.model, batch.inputs)[batch.supervised]
    return float(logits.log_softmax(-1).gather(1, batch.targets[:, None]).mean())


@pytest.fixture(scope="module")
def by_hand(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, M) and prior (M,), every pair in a whole pass of its own."""
    items = retrieval_items(conversations)
    texts = [item.text for item in items.texts]
    scores = [
        [mean_log_prob(vlm, encoder, answered(picture, text)) for text in texts]
        for picture in items.pictures
    ]
    blind = without_images(items.pictures[0])
    prior = [mean_log_prob(vlm, encoder, answered(blind, text)) for text in texts]
    return np.array(scores), np.array(prior)


def first_right(scores: np.ndarray, right: tuple[int, ...]) -> int:
    """1 + the number of items above the best right one."""
    return 1 + int((scores > scores[list(right)].max()).sum())


@pytest.mark.parametrize("options", [{}, {"subtract_prior": True}])
def test_ranks_are_those_of_whole_passes_one_by_one(
    vlm: VLM,
    encoder: Encoder,
    conversations: list[Conversation],
    by_hand: tuple[np.ndarray, np.ndarray],
    options: dict[str, bool],
) -> None:
    """The text's own likelihood is subtracted only where that is asked for: trained models find
    far fewer texts with it."""
    scores, prior = by_hand
    section = LIKELIHOOD.model_copy(update=options)
    subtract_prior = "subtract_prior" in options
    done: list[int] = []
    report = evaluate_retrieval(
        vlm, conversations, encoder=encoder, section=section, on_progress=done.append
    )
    relevance = retrieval_items(conversations).relevance
    to_texts = scores - prior if subtract_prior else scores
    expected = [first_right(row, right) for row, right in zip(to_texts, relevance.texts_of)]
    expected += [first_right(c, right) for c, right in zip(scores.T, relevance.pictures_of)]
    assert [row.as_row()["rank"] for row in report.predictions] == expected
    best = report.predictions[0].top[0].score
    assert best == pytest.approx(to_texts[0].max(), abs=1e-5)
    wrong = scores if subtract_prior else scores - prior
    assert [first_right(row, right) for row, right in zip(wrong, relevance.texts_of)] != expected[
        :6
    ]
    assert done == [1, 2, 3, 4, 5, 6]
    queries = np.array(expected)
    figures = {name: interval.value for name, interval in report.metrics.items()}
    assert figures == pytest.approx(
        {
            f"{direction}_{name}": value
            for direction, ranks in [
                ("picture_to_text", queries[:6]),
                ("text_to_picture", queries[6:]),
            ]
            for name, value in [
                *((f"r{k}", float((ranks <= k).mean())) for k in (1, 5, 10)),
                ("median_rank", float(np.median(ranks))),
                ("mrr", float((1 / ranks).mean())),
            ]
        }
    )
    counts = {name: interval.count for name, interval in report.metrics.items()}
    assert counts["picture_to_text_r1"] == 6
    assert counts["text_to_picture_r1"] == 12


def test_pictures_are_asked_their_own_question(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation]
) -> None:
    asked = [with_question(c, "What is it?") if n >= 6 else c for n, c in enumerate(conversations)]
    section = LIKELIHOOD.model_copy(update={"subtract_prior": True})
    together = evaluate_retrieval(vlm, asked, encoder=encoder, section=section)
    items = retrieval_items(asked)
    for number in (0, 5):
        picture = items.pictures[number]
        blind = without_images(picture)
        for top in together.predictions[number].top:
            given, prior = (
                mean_log_prob(vlm, encoder, answered(prompt, top.item))
                for prompt in (picture, blind)
            )
            assert top.score == pytest.approx(given - prior, abs=1e-5)
    assert {row.question for row in together.predictions[:6]} == {
        "Write a label: shelf and drawer.",
        "What is it?",
    }


def with_question(conversation: Conversation, question: str) -> Conversation:
    user = conversation.turns[0]
    images = tuple(part for part in user.parts if isinstance(part, Image))
    return replace(
        conversation, turns=(Turn("user", (*images, Text(question))), *conversation.turns[1:])
    )


def test_embedding_scores_are_cosines_of_sides_embedded_one_by_one(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation]
) -> None:
    report = evaluate_retrieval(vlm, conversations, encoder=encoder, section=EMBEDDING)
    items = retrieval_items(conversations)

    def state(side: Conversation) -> np.ndarray:
        batch = collate([encoder.encode_prompt(side)], pad_token_id=0, image_batching="flat")
        with torch.no_grad():
            output = vlm.model.model(**batch.inputs, use_cache=False)
        vector = output.last_hidden_state[0, -1].numpy()
        return vector / np.linalg.norm(vector)

    prompt = EMBEDDING.embedding_prompt
    pictures = np.stack([state(picture_side(p, prompt=prompt)) for p in items.pictures])
    texts = np.stack([state(text_side(t.conversation, prompt=prompt)) for t in items.texts])
    cosines = pictures @ texts.T
    for number, row in enumerate(report.predictions[:6]):
        best = np.sort(cosines[number])[::-1][:5]
        assert [top.score for top in row.top] == pytest.approx(list(best), abs=1e-5)
    for number, row in enumerate(report.predictions[6:]):
        best = np.sort(cosines[:, number])[::-1][:5]
        assert [top.score for top in row.top] == pytest.approx(list(best), abs=1e-5)
    assert not np.allclose(cosines, (pictures - pictures.mean(0)) @ texts.T, atol=1e-3)


@pytest.mark.parametrize("section", [LIKELIHOOD, EMBEDDING])
def test_two_processes_make_the_report_of_one(
    vlm: VLM,
    encoder: Encoder,
    tiny_vlm: Path,
    conversations: list[Conversation],
    section: EvalSection,
) -> None:
    # A model keeps state from one call to the next: each thread has its own, as a process would.
    models = [vlm, load_vlm(str(tiny_vlm), dtype=torch.float32, device="cpu")]
    done: list[list[int]] = [[], []]

    def run(rank: int, gather) -> EvalReport:
        return evaluate_retrieval(
            models[rank],
            conversations,
            encoder=encoder,
            section=section,
            on_progress=done[rank].append,
            rank=rank,
            world_size=2,
            gather=gather,
        )

    first, second = run_processes(run)
    assert first == second
    assert [counts[-1] for counts in done] == [3, 3]
    alone = evaluate_retrieval(vlm, conversations, encoder=encoder, section=section)
    assert first.metrics == alone.metrics
    assert [r.as_row()["id"] for r in first.predictions] == [
        r.as_row()["id"] for r in alone.predictions
    ]


def test_all_processes_raise_what_one_met(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    user = Turn("user", (Image("broken.png", tmp_path), Text("Write a label: shelf and drawer.")))
    rows = [
        *conversations[:2],
        replace(conversations[2], turns=(user, *conversations[2].turns[1:])),
    ]
    caught: list[str] = []

    def run(rank: int, gather) -> None:
        with pytest.raises(SampleError, match=r"captions_eval\.jsonl:3: not a picture") as raised:
            evaluate_retrieval(
                vlm if rank == 0 else other,
                rows,
                encoder=encoder,
                section=LIKELIHOOD,
                rank=rank,
                world_size=2,
                gather=gather,
            )
        caught.append(str(raised.value))

    other = load_vlm(vlm.source, dtype=torch.float32, device="cpu")
    run_processes(run)
    assert len(caught) == 2


def test_rows_have_the_fields_that_readers_of_answers_know(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation], sample_data: Path
) -> None:
    report = evaluate_retrieval(vlm, conversations, encoder=encoder, section=LIKELIHOOD)
    rows = [row.as_row() for row in report.predictions]
    assert len({row["id"] for row in rows}) == len(rows) == 18
    picture = str(sample_data / conversations[0].images[0].ref)
    texts = tuple(c.turns[-1].text for c in conversations)
    assert rows[0]["direction"] == "picture_to_text"
    assert rows[0]["images"] == (picture,)
    assert rows[0]["answers"] == texts[:2]
    assert rows[0]["prediction"] in texts
    assert rows[6]["direction"] == "text_to_picture"
    assert rows[6]["question"] == texts[0]
    assert rows[6]["answer"] == picture
    for row in rows:
        assert len(row["top"]) == 5
        assert row["prediction"] == row["top"][0]["item"]
        assert row["score"] == float(row["rank"] == 1) == float(row["top"][0]["is_relevant"])
    assert report.summary()["task"] == "retrieval"
    assert report.num_samples == 12


def test_figures_can_be_chosen_and_unknown_ones_are_errors(
    vlm: VLM, encoder: Encoder, conversations: list[Conversation]
) -> None:
    chosen = EMBEDDING.model_copy(update={"metrics": ["text_to_picture_r1"]})
    report = evaluate_retrieval(vlm, conversations, encoder=encoder, section=chosen)
    assert list(report.metrics) == ["text_to_picture_r1"]
    wrong = EMBEDDING.model_copy(update={"metrics": ["text_to_picture_mr"]})
    with pytest.raises(VlmtuneError, match=r"did you mean 'text_to_picture_mrr'"):
        evaluate_retrieval(vlm, conversations, encoder=encoder, section=wrong)


def test_a_model_that_gives_no_number_is_an_error_and_gets_its_mode_back(
    encoder: Encoder, tiny_vlm: Path, conversations: list[Conversation]
) -> None:
    broken = load_vlm(str(tiny_vlm), dtype=torch.float32, device="cpu")
    broken.model.train()
    with torch.no_grad():
        broken.model.model.language_model.norm.weight.fill_(float("nan"))
    for section in (LIKELIHOOD, EMBEDDING):
        with pytest.raises(VlmtuneError, match="not a number"):
            evaluate_retrieval(broken, conversations, encoder=encoder, section=section)
    assert broken.model.training
