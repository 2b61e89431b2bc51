"""The tables of `bench_methods.py`: means over seeds, as a share of full fine-tuning's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "qdora": "QDoRA",
    "adalora": "AdaLoRA",
    "qadalora": "AdaLoRA on NF4",
}
FIGURES = {
    "vqa": {"exact_match": "exact match"},
    "retrieval": {
        "text_to_picture_r1": "R@1, picture for a text",
        "picture_to_text_r1": "R@1, text for a picture",
        "picture_to_text_r1_minus_prior": "R@1, text for a picture, `eval.subtract_prior=true`",
    },
}


@dataclass(frozen=True)
class Result:
    """One run of one method. `train` is empty for what was not trained, `evaluation` for what was
    only measured for memory."""

    part: str
    method: str
    seed: int | None
    train: Mapping[str, Any]
    evaluation: Mapping[str, Any]

    def interval(self, figure: str) -> Mapping[str, float]:
        found: Mapping[str, float] = self.evaluation["metrics"][figure]
        return found

    def figures(self) -> dict[str, Any]:
        """Without the folders it was made in."""
        kept = ("num_samples", "metrics", "slices", "seconds")
        return {
            "part": self.part,
            "method": self.method,
            "seed": self.seed,
            "train": {k: v for k, v in self.train.items() if isinstance(v, (int, float))},
            "evaluation": {k: self.evaluation[k] for k in kept if k in self.evaluation},
        }


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def score_cell(own: Sequence[Result], figure: str) -> str:
    """The mean over seeds and the hull of the seeds' 95 % intervals."""
    intervals = [result.interval(figure) for result in own]
    value = mean(interval["value"] for interval in intervals)
    low = min(interval["low"] for interval in intervals)
    high = max(interval["high"] for interval in intervals)
    return f"{percent(value)} ({100 * low:.1f} to {100 * high:.1f})"


def share_of_full(
    own: Sequence[Result], full: Sequence[Result], figure: str, *, floor: float = 0.0
) -> float | None:
    """The mean score above `floor` as a fraction of full fine-tuning's."""
    if not own or not full:
        return None
    gain = mean(r.interval(figure)["value"] for r in own) - floor
    full_gain = mean(r.interval(figure)["value"] for r in full) - floor
    return gain / full_gain if full_gain > 0 else None


def score_table(results: Sequence[Result], part: str, floor: Mapping[str, float]) -> str:
    """A row a method: each figure, its share of full fine-tuning's (and of the gain over `floor`
    where one is known), trained parameters, time."""
    header = ["method"]
    figures = measured_figures(results, part)
    for figure, name in figures.items():
        header += [f"{name} (95 % interval)", "of full's"]
        header += ["gain over blind, of full's"] if figure in floor else []
    header += ["trained parameters", "training, minutes"]
    full = [r for r in results if (r.part, r.method) == (part, "full")]
    rows = []
    for method, name in {"base": "base model", **METHODS}.items():
        own = [r for r in results if (r.part, r.method) == (part, method)]
        if not own:
            continue
        row = [name]
        for figure in figures:
            row += [score_cell(own, figure), _share(own, full, figure, 0.0)]
            row += [_share(own, full, figure, floor[figure])] if figure in floor else []
        rows.append([*row, *_costs(own)])
    return markdown_table(header, rows)


def _share(own: Sequence[Result], full: Sequence[Result], figure: str, floor: float) -> str:
    share = share_of_full(own, full, figure, floor=floor)
    return "" if share is None or not own[0].train else percent(share)


def _costs(own: Sequence[Result]) -> tuple[str, str]:
    if not own[0].train:
        return "", ""
    minutes = mean(result.train["seconds"] for result in own) / 60
    return f"{own[0].train['trainable_parameters']:,}", f"{minutes:.1f}"


def memory_table(results: Sequence[Result], baseline: int) -> str:
    """A row a method: peak memory of the process, and above the libraries' own; shares of full."""
    own = {r.method: r for r in results if r.part == "memory"}
    full = own["full"].train["peak_memory_bytes"] if "full" in own else None
    rows = []
    for method, name in METHODS.items():
        if method not in own:
            continue
        train = own[method].train
        peak = train["peak_memory_bytes"]
        rows.append(
            (
                name,
                f"{peak / 1e9:.2f}",
                "" if full is None else percent(peak / full),
                f"{(peak - baseline) / 1e9:.2f}",
                "" if full is None else percent((peak - baseline) / (full - baseline)),
                f"{train['trainable_parameters']:,}",
                f"{train['samples_per_second']:.1f}",
            )
        )
    header = (
        "method",
        "peak memory, GB",
        "of full's",
        "above the libraries, GB",
        "of full's",
        "trained parameters",
        "samples/s",
    )
    return markdown_table(header, rows)


def short_table(results: Sequence[Result]) -> str:
    """The README's: the figures of both tasks with the share of full fine-tuning's, and memory."""
    names = {
        (part, figure): f"easy-VQA, {name}" if part == "vqa" else name
        for part in FIGURES
        for figure, name in measured_figures(results, part).items()
    }
    peaks = {r.method: r.train["peak_memory_bytes"] for r in results if r.part == "memory"}
    header = ["method", *names.values(), "peak memory of a larger model", "trained parameters"]
    rows = []
    for method, name in {"base": "base model", **METHODS}.items():
        of_method = [r for r in results if r.method == method]
        if not of_method:
            continue
        scores = [_short_cell(results, part, method, figure) for part, figure in names]
        memory = ""
        if method in peaks:
            share = 100 * peaks[method] / peaks["full"]
            memory = f"{peaks[method] / 1e9:.2f} GB ({share:.0f} %)"
        rows.append([name, *scores, memory, _costs(of_method)[0]])
    return markdown_table(header, rows)


def _short_cell(results: Sequence[Result], part: str, method: str, figure: str) -> str:
    """`96.0 % (99.0 %)`: the mean over seeds, and its share of full fine-tuning's."""
    own, full = ([r for r in results if (r.part, r.method) == (part, m)] for m in (method, "full"))
    if not own:
        return ""
    share = "" if method == "full" else _share(own, full, figure, 0.0)
    value = percent(mean(r.interval(figure)["value"] for r in own))
    return f"{value} ({share})" if share else value


def measured_figures(results: Sequence[Result], part: str) -> dict[str, str]:
    """Those of the part's figures that all its results have."""
    measured = [r.evaluation["metrics"] for r in results if r.part == part]
    return {
        figure: name
        for figure, name in FIGURES[part].items()
        if measured and all(figure in one for one in measured)
    }


def tables(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """Every table for which there are results, with its heading and how to read it."""
    sections = []
    if any(r.part == "vqa" for r in results):
        floor = {"exact_match": about["blind"]["total"]}
        sections.append(
            f"## Visual question answering: easy-VQA\n\n{lengths(results, 'vqa')}.\n"
            f"The blind guesser, which answers each question with its most frequent answer in the "
            f"training data, scores {percent(floor['exact_match'])}.\n\n"
            + score_table(results, "vqa", floor)
        )
    if any(r.part == "retrieval" for r in results):
        sections.append(
            f"## Retrieval: labels of data/sample\n\n{lengths(results, 'retrieval')}. Chance is "
            "1.6 % for a text and 3.2 % for a picture (63 pictures, two labels each). Scores are "
            "likelihoods; `eval.subtract_prior=true` subtracts the likelihood of the text without "
            "a picture.\n\n" + score_table(results, "retrieval", {})
        )
    if any(r.part == "memory" for r in results):
        baseline = about["baseline_memory_bytes"]
        sections.append(
            "## Memory: a language part of 205 million parameters, random weights\n\n"
            "Peak resident memory of the training process over four steps with gradient "
            f"checkpointing. The idle libraries take {baseline / 1e9:.2f} GB of it.\n\n"
            + memory_table(results, baseline)
        )
    return "\n\n".join(sections)


def lengths(results: Sequence[Result], part: str) -> str:
    """`250 steps of 64 samples for every method, 9,673 test samples; seed 42`."""
    trained = [r.train for r in results if r.part == part and r.train]
    steps = {f"{t['steps']} steps of {t['samples'] // t['steps']}" for t in trained}
    tested = max(r.evaluation["num_samples"] for r in results if r.part == part)
    seeds = sorted({r.seed for r in results if r.part == part and r.seed is not None})
    which = ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))
    return f"{', '.join(sorted(steps))} samples for every method, {tested:,} test samples; {which}"


def page(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """`docs/methods.md`."""
    return f"""# Methods compared

This page is for anyone who chooses a fine-tuning method: it compares quality, memory and time.

Every method fine-tuned the small model in `data/sample/` (3.4 million parameters) with the same
recipe, steps and data; only the method's keys differ (they are in `scripts/bench_methods.py`).

{tables(results, about)}

- Figures are means over the seeds. An interval is the hull of the seeds' 95 % bootstrap intervals
  over test images.
- The machine may be shared, so compare minutes only roughly. All figures: `methods.json`.
{made_by(about["made"])}
"""


def made_by(made: Mapping[str, Mapping[str, str]]) -> str:
    """A line for each command: which tables it made, and on what."""
    of_command: dict[tuple[str, str], list[str]] = {}
    for part, one in made.items():
        of_command.setdefault((one["command"], one["hardware"]), []).append(part)
    return "\n".join(
        f"- Made by `{command}` ({', '.join(sorted(parts))}) on: {hardware}."
        for (command, hardware), parts in of_command.items()
    )
