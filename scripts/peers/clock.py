"""What is put into the trainers that are built on transformers': when each step ended, and, in a
probe, which tokens and labels its first batches hold and where its LoRA sits.

Runs in the peers' environments: torch and transformers are theirs.
"""

from __future__ import annotations

import json
import time
from itertools import islice
from typing import Any

from transformers import TrainerCallback

from peers.case import Case

PROBED_BATCHES = 4


class StepClock(TrainerCallback):
    """Appends a line to the case's steps file at the end of each optimizer step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        case.steps_file.unlink(missing_ok=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.case.probes:
            batches = islice(given["train_dataloader"], PROBED_BATCHES)
            self.case.seen_file.write_text(json.dumps(what_is_seen(given["model"], batches)))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        with self.case.steps_file.open("a") as file:
            file.write(json.dumps({"step": state.global_step, "time": time.time()}) + "\n")


def what_is_seen(model: Any, batches: Any) -> dict[str, Any]:
    """The unpadded samples of `batches` and the trained tensors, as JSON takes them."""
    samples = []
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
            kept = mask.bool()
            samples.append({"ids": ids[kept].tolist(), "labels": labels[kept].tolist()})
    trained = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    return {"samples": samples, "trained": trained}
