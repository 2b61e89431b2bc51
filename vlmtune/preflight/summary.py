"""A report as plain values: what `--json` prints and the table for people is made of."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from vlmtune.preflight.memory import Memory
from vlmtune.preflight.problems import kind_of
from vlmtune.preflight.run import Report
from vlmtune.preflight.sets import GOOD, NO_MEDIA, NOT_A_ROW, NOT_ENCODED, TOO_LONG, CheckedSet

PERCENTILES = (50, 90, 99, 100)


def summary_of(report: Report) -> dict[str, Any]:
    """The verdict, the problems, and every figure; null where a problem was in the way."""
    sets = {name: set_figures(checked) for name, checked in report.sets.items()}
    train = sets.get("data.train", {})
    figures, memory, trained = report.figures, report.memory, report.trained
    return {
        "verdict": report.problems.verdict,
        "problems": [
            {"severity": p.severity, "file": p.file, "line": p.line, "message": p.message}
            for p in report.problems.found
        ],
        "num_errors": report.problems.num("error"),
        "num_warnings": report.problems.num("warning"),
        "samples": train.get("samples", 0),
        "tokens": train.get("tokens", 0),
        "supervised_tokens": train.get("supervised_tokens", 0),
        "image_tokens": train.get("image_tokens", 0),
        "images": train.get("images", 0),
        "dropped": train.get("dropped", {}),
        "changed": train.get("changed", {}),
        "sets": sets,
        "duplicates": report.duplicates,
        "overlap": report.overlaps,
        "steps": None if figures is None else figures.steps,
        "epochs": None if figures is None else figures.epochs,
        "epoch": None if figures is None else asdict(figures.epoch),
        "run": None if figures is None else figures.run,
        "method": None if trained is None else trained.method,
        "trainable_parameters": None if trained is None else trained.trainable_parameters,
        "trained": [] if trained is None else [asdict(row) for row in trained.rows],
        "parts": {} if trained is None else {k: asdict(v) for k, v in trained.parts.items()},
        "memory_bytes": None if memory is None else memory.total,
        "memory": None if memory is None else memory_figures(memory),
        "disk": None
        if report.disk is None
        else asdict(report.disk) | {"needed_bytes": report.disk.needed_bytes},
    }


def memory_figures(memory: Memory) -> dict[str, int]:
    """The parts of the estimate, in bytes."""
    return asdict(memory)


def set_figures(checked: CheckedSet) -> dict[str, Any]:
    """What was found in one set. `dropped` counts rows by reason, `left_out` names those whose
    place is kept; `changed` counts what was done to samples."""
    table = checked.table
    good = table.rows(GOOD)
    tokens = table.num_tokens()[good]
    dropped: Counter[str] = Counter()
    left_out = []
    for (_, kind), kept in table.failures.items():
        dropped[kind] += kept.count
        for failed in kept.failed:
            left_out.append(
                {
                    "id": failed.id,
                    "file": failed.source.file,
                    "line": failed.source.line,
                    "reason": kind_of(failed.error.message),
                    "is_bad": failed.state != TOO_LONG,
                }
            )
    return {
        "rows": checked.num_rows,
        "rows_looked_at": len(table),
        "files": {file.rows.file: file.format for file in checked.files},
        "samples": len(good),
        "bad": table.count(NOT_A_ROW, NO_MEDIA, NOT_ENCODED),
        "too_long": table.count(TOO_LONG),
        "tokens": int(tokens.sum()),
        "supervised_tokens": _total(table.supervised, good),
        "image_tokens": _total(table.media, good),
        "images": _total(table.images, good),
        "tokens_per_sample": _percentiles(tokens),
        "dropped": dict(dropped),
        "left_out": left_out,
        "changed": dict(table.notes),
        "encoded_in_full": not checked.by_size,
    }


def _total(column: Any, rows: np.ndarray) -> int:
    return int(np.frombuffer(column, np.uint32)[rows].sum()) if len(rows) else 0


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    found = np.percentile(values, PERCENTILES, method="higher")
    return {f"p{share}": int(value) for share, value in zip(PERCENTILES, found, strict=True)}
