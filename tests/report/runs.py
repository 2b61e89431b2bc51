"""Run folders made by hand: what training and evaluation leave behind, without either."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image

SCRIPT = "<script>document.title = 'stolen'</script><img src=x onerror=\"document.title='stolen'\">"
KINDS = ("color", "shape")
ENVIRONMENT = {"versions": {"torch": "2.6"}, "device": "cpu", "model_commit": None}
MODULES = {
    "trainable_parameters": 1200,
    "trained": [
        {"part": "language", "kind": "attn", "modules": 2, "rank": 4, "trainable_parameters": 1200}
    ],
    "linear_modules_by_bits": [
        {"part": "language", "linear_4bit": 42, "linear_8bit": 0, "linear_16bit": 0}
    ],
}


def make_run(
    folder: Path,
    *,
    model: Path,
    num_samples: int = 40,
    num_steps: int = 30,
    recipe: str = "",
    before: Sequence[str] | None = None,
    after: Sequence[str] | None = None,
) -> Path:
    """A finished run on `num_samples` questions, one picture each; the reference answer is always
    `yes`. `before` and `after` are the answers (default: `no`, then every second one `yes`)."""
    data = write_data(folder.parent / f"{folder.name}-data", num_samples)
    (folder / "adapter").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "adapter" / name).write_bytes((model / name).read_bytes())
    for path in model.glob("*processor_config.json"):
        (folder / "adapter" / path.name).write_bytes(path.read_bytes())
    text = (
        f"model: {model}\nrank: 4\noutput_dir: {folder}\n"
        f"data: {{train: {data}, eval: {data}}}\n{recipe}"
    )
    (folder / "recipe.yaml").write_text(text)
    (folder / "recipe.resolved.yaml").write_text(text)
    write_json(folder / "environment.json", ENVIRONMENT)
    write_json(folder / "modules.json", MODULES)
    write_lines(folder / "metrics.jsonl", metric_lines(num_steps))
    write_json(folder / "summary.json", {"steps": num_steps, "stopped_by": None, "notes": {}})
    write_evaluation(folder, 0, data, before or ["no"] * num_samples)
    write_evaluation(
        folder,
        num_steps,
        data,
        after or ["yes" if number % 2 == 0 else "no" for number in range(num_samples)],
    )
    return folder


def metric_lines(num_steps: int) -> list[dict[str, Any]]:
    """A loss that falls from 4 to 4 / (1 + num_steps), and what else a line holds."""
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 4.0, "eval_exact_match": 0.0}]
    for step in range(1, num_steps + 1):
        lines.append(
            {
                "step": step,
                "loss": 4 / (1 + step),
                "learning_rate": {"language": 1e-3 / step, "vision": 1e-4},
                "grad_norm": {"total": 1.5, "language": 1.2},
                "samples_per_second": 20.0,
                "tokens_per_second": 1500.0,
                "peak_memory_bytes": 1.5e9,
            }
        )
    lines[-1] |= {"eval_loss": 1.0, "eval_exact_match": 0.5}
    return lines


def write_data(folder: Path, num_samples: int) -> Path:
    """Questions on pictures of one colour each; the answer is `yes`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_samples):
        name = f"images/{number}.png"
        PIL.Image.new("RGB", (56, 56), (number % 256, 99, 120)).save(folder / name)
        rows.append(
            {
                "id": f"q-{number:03d}",
                "question_type": KINDS[number % 2],
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": name},
                            {"type": "text", "text": f"Is it number {number}?"},
                        ],
                    },
                    {"role": "assistant", "content": "yes"},
                ],
            }
        )
    write_lines(folder / "data.jsonl", rows)
    return folder / "data.jsonl"


def write_evaluation(
    run: Path, step: int, data: Path, predictions: Sequence[str], *, name: str | None = None
) -> Path:
    """RUN/eval/step-NNNNNN (or `name`) with exact match of `predictions` against `yes`."""
    folder = run / "eval" / (name or f"step-{step:06d}")
    rows = [
        {
            "id": f"q-{number:03d}",
            "images": [str(data.parent / f"images/{number}.png")],
            "question": f"Is it number {number}?",
            "answer": "yes",
            "answers": [],
            "options": [],
            "prediction": prediction,
            "scores": {"exact_match": float(prediction == "yes")},
            "question_type": KINDS[number % 2],
            "score": float(prediction == "yes"),
        }
        for number, prediction in enumerate(predictions)
    ]
    write_lines(folder / "predictions.jsonl", rows)
    summary = {"step": step, "data": [str(data)], "task": "vqa", "num_samples": len(rows)}
    summary["metrics"] = {"exact_match": _interval([row["score"] for row in rows])}
    summary["slices"] = {
        kind: {"exact_match": _interval([r["score"] for r in rows if r["question_type"] == kind])}
        for kind in KINDS[: len(rows)]
    }
    write_json(folder / "metrics.json", summary)
    return folder


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _interval(scores: Sequence[float]) -> dict[str, float]:
    mean = sum(scores) / len(scores)
    return {
        "value": mean,
        "low": max(0.0, mean - 0.1),
        "high": min(1.0, mean + 0.1),
        "count": len(scores),
    }
