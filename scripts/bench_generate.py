"""Time to answer questions: one by one, in batches, and as rows that are refilled as they end.

    OMP_NUM_THREADS=1 python scripts/bench_generate.py [--questions 64] [--rounds 3]

    one by one   `generate`, a question at a time
    file order   `generate`, BATCH questions at a time as they stand in the file
    sorted       `generate`, BATCH questions at a time, prompts sorted by length
    shrinking    sorted; rows whose answer has ended leave the batch
    refilled F   sorted; new prompts enter as soon as the fraction F of the batch is free

On the embedded model, whose answers end by themselves, and on a random model of 46 M parameters
with answers of given lengths: all alike, geometric (a long tail), and mostly short with a few long.
Ways run in alternation; CPU seconds are counted, which a busy machine disturbs least. Prints each
one's median of `sorted`'s time over its own in the same round, and how many answers differ from
`sorted`'s. Then the same model on pictures of 320 x 280 pixels with several questions on each, or
one: with features shared (`prompts.py`), and with pixels given to the model for each question.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, StoppingCriteria, StoppingCriteriaList

from vlmtune.data.dataset import load_conversations
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Image, Sample, Source, Text, Turn
from vlmtune.evaluation.generate import ends_answer, evaluating, generate_answers, greedy_config
from vlmtune.evaluation.prompts import SharedPictures, prompt_inputs
from vlmtune.evaluation.running_batch import Row, RunningBatch, answer_rows
from vlmtune.models.load import VLM, load_vlm
from vlmtune.recipe.data_section import ImageSection

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
BATCH = 16
LONGEST = 96
QUESTIONS = (
    "what is it?",
    "is it red?",
    "what color is the shape on the left?",
    "how many circles are there in the picture?",
)

Answers = dict[int, list[int]]
Numbered = list[tuple[int, Sample]]


class Lengths(StoppingCriteria):
    """Ends row i of a batch after `lengths[i]` tokens."""

    def __init__(self, lengths: Sequence[int], prompt_length: int) -> None:
        self._lengths = torch.tensor(lengths)
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return self._lengths <= input_ids.shape[1] - self._prompt_length


class Case:
    """A model and questions; `lengths`: of the answers, or None where the model ends them."""

    def __init__(self, vlm: VLM, encoder: Encoder, prompts: Numbered, lengths: list[int] | None):
        self.vlm, self.encoder, self.prompts, self.lengths = vlm, encoder, prompts, lengths

    def by_generate(self, prompts: Numbered, size: int) -> Answers:
        answers: Answers = {}
        config = greedy_config(self.vlm, encoder=self.encoder, max_new_tokens=LONGEST)
        if self.lengths is not None:
            config.eos_token_id = []
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            inputs = prompt_inputs(self.vlm, [sample for _, sample in batch])
            width = inputs["input_ids"].shape[1]
            criteria = StoppingCriteriaList()
            if self.lengths is not None:
                criteria.append(Lengths([self.lengths[n] for n, _ in batch], width))
            output = self.vlm.model.generate(
                **inputs, generation_config=config, stopping_criteria=criteria
            )
            for (number, _), ids in zip(batch, output[:, width:].tolist()):
                answers[number] = self.cut(number, ids)
        return answers

    def by_rows(self, prompts: Numbered, refill_fraction: float) -> Answers:
        own_end = ends_answer(self.vlm, encoder=self.encoder, stops=(), max_new_tokens=LONGEST)
        lengths = self.lengths

        def has_ended(row: Row) -> bool:
            return own_end(row) if lengths is None else len(row.ids) >= lengths[row.number]

        ended = answer_rows(
            RunningBatch(self.vlm.model, self.vlm.family),
            iter(prompts),
            inputs_of=lambda samples: prompt_inputs(self.vlm, samples),
            choose=lambda logits, rows: logits.argmax(dim=-1),
            has_ended=has_ended,
            size=BATCH,
            refill_fraction=refill_fraction,
        )
        return {row.number: self.cut(row.number, row.ids) for rows in ended for row in rows}

    def cut(self, number: int, ids: list[int]) -> list[int]:
        """`ids` without the padding after their end."""
        if self.lengths is not None:
            return ids[: self.lengths[number]]
        end = self.encoder.end_token_id
        return ids[: ids.index(end)] if end in ids else ids


def ways(case: Case) -> dict[str, Callable[[], Answers]]:
    in_order = sorted(case.prompts, key=lambda pair: -pair[1].num_tokens)
    return {
        "one by one": lambda: case.by_generate(in_order, 1),
        "file order": lambda: case.by_generate(case.prompts, BATCH),
        "sorted": lambda: case.by_generate(in_order, BATCH),
        "shrinking": lambda: case.by_rows(in_order, 1.0),
        "refilled 1/2": lambda: case.by_rows(in_order, 0.5),
        "refilled 1/4": lambda: case.by_rows(in_order, 0.25),
        "refilled 1/16": lambda: case.by_rows(in_order, 1 / 16),
    }


def main() -> None:
    arguments = parse()
    image = ImageSection(min_pixels=3136, max_pixels=1_003_520)
    vlm = load_vlm(str(SAMPLE / "tiny-vlm"), dtype=torch.float32, image=image)
    encoder = Encoder(vlm.processor, max_tokens=2048, over_length="error", max_image_pixels=10**8)
    prompts = questions(encoder, SAMPLE / "eval.jsonl", arguments.questions)
    cases = {"embedded model": Case(vlm, encoder, prompts, None)}
    large = random_model(vlm)
    for name, lengths in answer_lengths(len(prompts)).items():
        cases[f"46 M random weights, {name}"] = Case(large, encoder, prompts, lengths)
    print(f"{len(prompts)} questions, {BATCH} rows, {torch.get_num_threads()} threads")
    for name, case in cases.items():
        measure(name, case, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        for num_pictures, num_questions in ((4, 4), (16, 1)):
            asked = on_pictures(Path(folder), num_pictures, num_questions)
            measure_sharing(large, encoder, asked, arguments.rounds)


class PixelsEachTime(SharedPictures):
    """The tower runs for each question."""

    def inputs(self, prompts: Sequence[Sample]) -> dict[str, Any]:
        return dict(prompt_inputs(self._vlm, prompts))


def measure_sharing(vlm: VLM, encoder: Encoder, asked: Sequence[Conversation], rounds: int) -> None:
    seconds: dict[str, list[float]] = {}
    answers = []
    for _ in range(rounds):
        for kind in (PixelsEachTime, SharedPictures):
            started = time.process_time()
            answers.append(
                generate_answers(
                    vlm,
                    asked,
                    encoder=encoder,
                    max_new_tokens=4,
                    batch_size=BATCH,
                    pictures=kind(vlm),
                )
            )
            seconds.setdefault(kind.__name__, []).append(time.process_time() - started)
    assert all(texts == answers[0] for texts in answers)
    pixels, shared = seconds["PixelsEachTime"], seconds["SharedPictures"]
    gain = statistics.median(p / s for p, s in zip(pixels, shared))
    num_pictures = len({conversation.images for conversation in asked})
    print(
        f"\n{len(asked)} questions on {num_pictures} pictures: shared features give the same"
        f" answers {gain:.2f} x as fast",
        flush=True,
    )


def on_pictures(folder: Path, num_pictures: int, num_questions: int) -> list[Conversation]:
    """So many questions on each of so many pictures of noise."""
    asked = []
    for number in range(num_pictures):
        name = f"{number}.jpg"
        PIL.Image.effect_noise((320, 280), 50 + number).convert("RGB").save(folder / name)
        for words in QUESTIONS[:num_questions]:
            turn = Turn("user", (Image(name, folder), Text(words)))
            asked.append(Conversation(str(len(asked)), (turn,), Source("noise", len(asked) + 1)))
    return asked


def measure(name: str, case: Case, rounds: int) -> None:
    seconds: dict[str, list[float]] = {}
    answers: dict[str, Answers] = {}
    print(f"\n{name}:", flush=True)
    with evaluating(case.vlm.model):
        case.by_generate(case.prompts[:BATCH], BATCH)  # warm
        for number in range(rounds):
            for way, run in ways(case).items():
                if way == "one by one" and number > 0:
                    continue  # slow, and far off: once is enough
                started = time.process_time()
                answers[way] = run()
                seconds.setdefault(way, []).append(time.process_time() - started)
    lengths = [len(ids) for ids in answers["sorted"].values()]
    mean = statistics.mean(lengths)
    print(f"  answers of {mean:.1f} tokens, longest {max(lengths)}")
    for way, own in seconds.items():
        gains = [base / mine for base, mine in zip(seconds["sorted"], own)]
        differ = sum(answers[way][n] != ids for n, ids in answers["sorted"].items())
        print(
            f"  {way:<14} {min(own):7.2f} CPU s at best, {statistics.median(gains):5.2f} x sorted's"
            f" speed, {differ} answers differ",
            flush=True,
        )


def questions(encoder: Encoder, path: Path, num: int) -> Numbered:
    conversations = load_conversations([path])[0][:num]
    return [(n, encoder.encode_prompt(asked)) for n, asked in enumerate(conversations)]


def answer_lengths(num: int) -> dict[str, list[int]]:
    """Lengths of `num` answers, in tokens, at most LONGEST."""
    generator = np.random.default_rng(0)
    geometric = np.minimum(generator.geometric(1 / 16, num), LONGEST)
    few_long = np.where(generator.random(num) < 0.05, LONGEST, generator.geometric(1 / 4, num))
    return {
        "all of 16 tokens": [16] * num,
        "geometric": geometric.tolist(),
        "short, 1 in 20 long": np.minimum(few_long, LONGEST).tolist(),
    }


def random_model(tiny: VLM) -> VLM:
    """A Qwen2.5-VL of some 46 M parameters with the embedded model's processor."""
    config = copy.deepcopy(tiny.model.config)
    text, vision = config.text_config, config.vision_config
    text.hidden_size = vision.out_hidden_size = 640
    text.intermediate_size, text.num_attention_heads, text.num_key_value_heads = 1792, 10, 2
    text.num_hidden_layers, text.layer_types = 10, ["full_attention"] * 10
    text.rope_parameters["mrope_section"] = [8, 12, 12]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config = tiny.model.generation_config
    vlm = copy.copy(tiny)
    vlm.model = model.eval()
    return vlm


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
