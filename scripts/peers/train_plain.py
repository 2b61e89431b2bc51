"""The baseline: transformers' Trainer and PEFT, as one would write it by hand.

PYTHONPATH=scripts python -m peers.train_plain CASE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peers.case import ALPHA, BATCH_SIZE, LEARNING_RATE, RANK, TARGET_PATTERN, Case, read_case
from peers.clock import StepClock


def main() -> None:
    case = read_case(sys.argv[1])
    set_seed(case.seed)
    processor = AutoProcessor.from_pretrained(case.model)
    model = AutoModelForImageTextToText.from_pretrained(case.model, dtype=torch.bfloat16)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGET_PATTERN)
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(**training_arguments(case)),
        data_collator=Collator(processor, Path(case.data)),
        train_dataset=read_rows(Path(case.data)),
        callbacks=[StepClock(case)],
    )
    trainer.train()
    trainer.save_model(str(Path(case.output) / "adapter"))


def training_arguments(case: Case) -> dict[str, Any]:
    """What the plain trainer and TRL are told alike."""
    length = {"max_steps": case.max_steps} if case.max_steps else {"num_train_epochs": case.epochs}
    return {
        **length,
        "output_dir": str(Path(case.output) / "run"),
        "per_device_train_batch_size": case.peer_batch,
        "gradient_accumulation_steps": BATCH_SIZE // case.peer_batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": True,
        "use_cpu": True,
        "gradient_checkpointing": case.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "remove_unused_columns": False,
        "dataloader_num_workers": case.num_workers,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": case.seed,
    }


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


class Collator:
    """Rows to a padded batch whose labels are the answers with their end token."""

    def __init__(self, processor: Any, folder: Path) -> None:
        self.processor = processor
        self.folder = folder
        self.header = processor.tokenizer.encode("<|im_start|>assistant\n")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        texts = self.processor.apply_chat_template([r["messages"] for r in rows], tokenize=False)
        pictures = [
            Image.open(self.folder / part["image"]).convert("RGB")
            for row in rows
            for part in row["messages"][0]["content"]
            if part["type"] == "image"
        ]
        batch = self.processor(
            text=texts, images=pictures or None, padding=True, return_tensors="pt"
        )
        labels = torch.full_like(batch["input_ids"], -100)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            start = self._answer_start(ids)
            end = ids.index(self.processor.tokenizer.eos_token_id, start) + 1
            labels[row, start:end] = batch["input_ids"][row, start:end]
        return {**batch, "labels": labels}

    def _answer_start(self, ids: list[int]) -> int:
        size = len(self.header)
        return next(i + size for i in range(len(ids)) if ids[i : i + size] == self.header)


if __name__ == "__main__":
    main()
