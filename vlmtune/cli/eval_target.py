"""One target evaluated: opened, asked, scored, beside the blind guessers and the guard, written."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmtune.cli.eval_asked import Asked, Plan
from vlmtune.cli.eval_beside import evaluate_blind, evaluate_guard
from vlmtune.cli.eval_output import make_folder
from vlmtune.cli.target import answering_encoder, open_for_answers

logger = logging.getLogger("vlmtune")

ChooseFolder = Callable[[str, Mapping[str, Any]], Path]
"""A target's kind and its answers' settings to the folder for its report."""


def evaluate_target(
    target: str, plan: Plan, place: Path | ChooseFolder, *, reuse: bool = False
) -> dict[str, Any]:
    """Evaluate one target and write its report into `place`; what `--json` holds of it. With
    `reuse`, a report that the folder holds of the same evaluation is taken. Contains collectives.
    """
    from vlmtune.evaluation.answers import remove_kept
    from vlmtune.evaluation.results import write_report

    opened = open_for_answers(
        target,
        dtype=plan.dtype,
        quantization_bit=plan.quantization_bit,
        trust_remote_code=plan.trust_remote_code,
        device=plan.processes.device,
    )
    asked = Asked(target, opened, plan)
    encoder = answering_encoder(opened)
    settings = asked.settings(plan.conversations, plan.section, encoder)
    main = plan.processes.is_main
    chosen = None
    if main:
        chosen = place if isinstance(place, Path) else place(opened.kind, settings)
    folder: Path = plan.processes.from_main(chosen)
    make_folder(folder)
    predictions = {"predictions": str((folder / "predictions.jsonl").absolute())}
    digest = asked.digest(settings)
    if reuse:
        found = _report_of(digest, folder) if main else {}
        found = plan.processes.from_main(found)
        if found:
            logger.info("the report in %s is of this evaluation", folder)
            return found | predictions
    began = time.monotonic()
    report = asked.report(plan.conversations, plan.section, encoder, folder)
    about = asked.about() | {"settings": digest, "seconds": time.monotonic() - began}
    reports = {folder: (report, about)}
    if plan.guesses is not None:
        about["blind"], blank = evaluate_blind(asked, plan.guesses, folder / "blank")
        reports[folder / "blank"] = blank, {"target": target, "pictures": "blank"}
    if plan.with_guard and (guarded := evaluate_guard(asked, folder / "guard")) is not None:
        verdict, on_guard = guarded
        about["guard"] = verdict.as_dict()
        reports[folder / "guard"] = on_guard, {"target": target, "kind": "run"}
    if main:
        # Only now: a kill before the last answer leaves every answer to go on with.
        for place, (written, what) in reports.items():
            write_report(written, place, about=what)
        for place in reports:
            remove_kept(place)
    return about | report.summary() | predictions


def _report_of(digest: str, folder: Path) -> dict[str, Any]:
    """What the finished report in `folder` says, empty where there is none of this digest."""
    from vlmtune.evaluation.results import is_finished, read_result

    if not is_finished(folder):
        return {}
    summary = read_result(folder, folder.name).summary
    return summary if summary.get("settings") == digest else {}


def free_memory() -> None:
    """Give back the memory of a model that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
