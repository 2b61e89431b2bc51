"""ms-swift's own `sft`, given the arguments of its CLI, a callback and a template.

    PYTHONPATH=scripts python -m peers.train_swift CASE.json

Its templates hold the token ids of Qwen's own vocabulary: with another one, pictures are trained on
in silence with a single token each. A template with this model's ids is registered, which also ends
an answer at its end token, as the other tools do.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("USE_HF", "1")

from swift.callbacks import callbacks_map
from swift.pipelines import sft_main
from swift.template import register_template
from swift.template.templates.qwen import Qwen2_5VLTemplate, QwenTemplateMeta

from peers.case import ALPHA, BATCH_SIZE, LEARNING_RATE, RANK, TARGET_PATTERN, Case, read_case
from peers.clock import StepClock

TEMPLATE, CLOCK = "bench_qwen", "bench_clock"


def main() -> None:
    case = read_case(sys.argv[1])
    config = json.loads((Path(case.model) / "config.json").read_text())
    ids = {name: config[name] for name in ("image_token_id", "video_token_id")}
    own_ids = type("BenchTemplate", (Qwen2_5VLTemplate,), ids)
    register_template(QwenTemplateMeta(TEMPLATE, template_cls=own_ids, suffix=["<|im_end|>"]))
    callbacks_map[CLOCK] = lambda args, trainer: StepClock(case)
    sft_main(as_flags(arguments(case)))


def arguments(case: Case) -> dict[str, Any]:
    length = {"max_steps": case.max_steps} if case.max_steps else {"num_train_epochs": case.epochs}
    return {
        **length,
        "model": case.model,
        "model_type": "qwen2_5_vl",
        "template": TEMPLATE,
        "dataset": str(Path(case.data) / "swift.jsonl"),
        "split_dataset_ratio": 0,
        "output_dir": str(Path(case.output) / "run"),
        "add_version": False,
        "tuner_type": "lora",
        "target_regex": TARGET_PATTERN,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "freeze_vit": True,
        "freeze_aligner": True,
        "torch_dtype": "bfloat16",
        "bf16": True,
        "use_cpu": True,
        "max_length": 32768,
        "per_device_train_batch_size": case.peer_batch,
        "gradient_accumulation_steps": BATCH_SIZE // case.peer_batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "weight_decay": 0.0,
        "gradient_checkpointing": case.checkpointing,
        "dataloader_num_workers": case.num_workers,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": case.seed,
        "data_seed": case.seed,
        "callbacks": CLOCK,
    }


def as_flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", _flag(value))]


def _flag(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
