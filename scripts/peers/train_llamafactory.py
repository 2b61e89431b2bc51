"""LLaMA-Factory's own training function, given the arguments of its CLI and a callback.

    PYTHONPATH=scripts python -m peers.train_llamafactory CASE.json

Its `qwen2_vl` template also labels the line break after an answer's end token, so the same template
without that is registered: the labels are then those of the other tools.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llamafactory.data.formatter import StringFormatter
from llamafactory.data.mm_plugin import get_mm_plugin
from llamafactory.data.template import register_template
from llamafactory.train.tuner import run_exp

from peers.case import ALPHA, BATCH_SIZE, LEARNING_RATE, RANK, TARGETS, Case, read_case
from peers.clock import StepClock
from peers.template import SYSTEM

TEMPLATE = "bench_qwen"


def main() -> None:
    case = read_case(sys.argv[1])
    user = "<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"
    register_template(
        name=TEMPLATE,
        format_user=StringFormatter(slots=[user]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
        format_system=StringFormatter(slots=["<|im_start|>system\n{{content}}<|im_end|>\n"]),
        default_system=SYSTEM,
        stop_words=["<|im_end|>"],
        replace_eos=True,
        mm_plugin=get_mm_plugin(
            name="qwen2_vl", image_token="<|image_pad|>", video_token="<|video_pad|>"
        ),
    )
    run_exp(arguments(case), callbacks=[StepClock(case)])


def arguments(case: Case) -> dict[str, Any]:
    length = {"max_steps": case.max_steps} if case.max_steps else {"num_train_epochs": case.epochs}
    return {
        **length,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "model_name_or_path": case.model,
        "template": TEMPLATE,
        "dataset_dir": case.data,
        "dataset": "bench",
        "output_dir": str(Path(case.output) / "run"),
        "overwrite_output_dir": True,
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
        "cutoff_len": 32768,
        "image_max_pixels": 2048 * 2048,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_target": ",".join(TARGETS),
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
        "per_device_train_batch_size": case.peer_batch,
        "gradient_accumulation_steps": BATCH_SIZE // case.peer_batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": True,
        "use_cpu": True,
        "disable_gradient_checkpointing": not case.checkpointing,
        "dataloader_num_workers": case.num_workers,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": case.seed,
    }


if __name__ == "__main__":
    main()
