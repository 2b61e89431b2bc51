"""TRL's SFTTrainer with its own collator for pictures; only the answers are labelled, which it does
by marks in the chat template.

    PYTHONPATH=scripts python -m peers.train_trl CASE.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from trl import SFTConfig, SFTTrainer

from peers.case import ALPHA, RANK, TARGET_PATTERN, read_case
from peers.clock import StepClock
from peers.template import MARKED_TEMPLATE
from peers.train_plain import read_rows, training_arguments


def main() -> None:
    case = read_case(sys.argv[1])
    set_seed(case.seed)
    processor = AutoProcessor.from_pretrained(case.model)
    processor.chat_template = processor.tokenizer.chat_template = MARKED_TEMPLATE
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(case.model, dtype=torch.bfloat16),
        args=SFTConfig(**training_arguments(case), assistant_only_loss=True, max_length=None),
        train_dataset=read_dataset(Path(case.data)),
        processing_class=processor,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGET_PATTERN),
        callbacks=[StepClock(case)],
    )
    trainer.train()
    trainer.save_model(str(Path(case.output) / "adapter"))


def read_dataset(folder: Path) -> datasets.Dataset:
    """Rows as TRL documents them: plain messages, and the pictures, which it puts before the
    question."""
    rows = [as_trl(row, folder) for row in read_rows(folder)]
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.Sequence(datasets.Image()),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


def as_trl(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    question, answer = row["messages"]
    parts = question["content"]
    return {
        "messages": [{"role": "user", "content": parts[-1]["text"]}, answer],
        "images": [str(folder / part["image"]) for part in parts if part["type"] == "image"],
    }


if __name__ == "__main__":
    main()
