"""A run folder as it is: finished, running or dead, whole or in part.

Nothing here fails on a missing or half-written file; what could not be read is counted in
`RunRecord.unreadable`, for the page to say so.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmtune.errors import VlmtuneError

RUN_FILES = ("recipe.resolved.yaml", "metrics.jsonl", "environment.json", "checkpoints")
RESULTS = ("adapter", "model")
STILL_SECONDS = 15 * 60
"""A run without a result that wrote nothing for so long is taken for dead."""
RESUMED_SECONDS = 2.0
"""metrics.jsonl this much newer than summary.json: the summary is of a session before."""

Line = dict[str, Any]


@dataclass(frozen=True)
class State:
    """`name` is `finished`, `running`, `stopped` (by a signal, with a checkpoint) or `failed` (no
    result, no word of a stop, nothing written lately)."""

    name: str
    text: str


@dataclass
class RunRecord:
    """What a run folder holds. `lines` are those of metrics.jsonl; `unreadable` counts the lines,
    or names the files, that are no JSON."""

    folder: Path
    lines: list[Line]
    skipped: list[Line]
    recipe_text: str | None
    resolved_text: str | None
    environment: Line | None
    modules: Line | None
    summary: Line | None
    state: State
    unreadable: dict[str, int] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)


def read_run(folder: Path, *, now: float | None = None) -> RunRecord:
    """The record of the run in `folder`. `now` in seconds since the epoch; None: the clock's.

    Raises VlmtuneError where `folder` is no run.
    """
    _check_is_run(folder)
    unreadable: dict[str, int] = {}
    lines = [
        line
        for line in read_lines(folder / "metrics.jsonl", unreadable)
        if isinstance(line.get("step"), int)
    ]
    record = RunRecord(
        folder=folder,
        lines=sorted(lines, key=lambda line: line["step"]),
        skipped=read_lines(folder / "skipped.jsonl", unreadable),
        recipe_text=_read_text(folder / "recipe.yaml"),
        resolved_text=_read_text(folder / "recipe.resolved.yaml"),
        environment=read_object(folder / "environment.json", unreadable),
        modules=read_object(folder / "modules.json", unreadable),
        summary=_current_summary(folder, unreadable),
        state=State("", ""),
        unreadable=unreadable,
    )
    record.state = _state_of(record, time.time() if now is None else now)
    return record


def read_lines(path: Path, unreadable: dict[str, int]) -> list[Line]:
    """The JSON objects of a JSONL file; empty without the file. Other lines (a last one that is
    half-written, say) are counted under the file's name."""
    text = _read_text(path) or ""
    found: list[Line] = []
    # Not splitlines: an answer may hold a character that Unicode counts as the end of a line.
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            unreadable[path.name] = unreadable.get(path.name, 0) + 1
    return found


def read_object(path: Path, unreadable: dict[str, int]) -> Line | None:
    """The JSON object in `path`; None without one."""
    text = _read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        unreadable[path.name] = unreadable.get(path.name, 0) + 1
        return None
    return value


def _check_is_run(folder: Path) -> None:
    expected = "a run folder, as `vlmtune train` writes it, with " + " or ".join(RUN_FILES)
    if not folder.is_dir():
        raise VlmtuneError(
            "a file, not a run folder" if folder.exists() else "no such run folder",
            file=folder,
            expected=expected,
        )
    if not any((folder / name).exists() for name in RUN_FILES):
        names = sorted(path.name for path in folder.iterdir())
        raise VlmtuneError(
            "not a run folder",
            file=folder,
            got=", ".join(names[:5]) + (", …" if len(names) > 5 else "") or "an empty folder",
            expected=expected,
            do="give the recipe's output_dir",
        )


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _current_summary(folder: Path, unreadable: dict[str, int]) -> Line | None:
    """summary.json, unless the run went on after it was written."""
    summary = read_object(folder / "summary.json", unreadable)
    written, logged = (_modified(folder / n) for n in ("summary.json", "metrics.jsonl"))
    if written is not None and logged is not None and logged > written + RESUMED_SECONDS:
        return None
    return summary


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _state_of(record: RunRecord, now: float) -> State:
    folder, summary, step = record.folder, record.summary, record.last_step
    result = next((name for name in RESULTS if (folder / name).is_dir()), None)
    if summary is not None and summary.get("stopped_by") is not None:
        stopped = summary.get("steps", step)
        return State("stopped", f"stopped at step {stopped} by a signal; a checkpoint is there")
    if result is not None:
        return State("finished", f"finished at step {step}; the result is in {result}/")
    times = [t for name in (*RUN_FILES, "skipped.jsonl", "eval") if (t := _modified(folder / name))]
    times += [t for path in folder.glob("eval/*") if (t := _modified(path))]
    still = now - max(times, default=now)
    if still < STILL_SECONDS:
        return State("running", f"running: step {step}, last written {spoken_time(still)} ago")
    checkpoints = sorted(path.name for path in folder.glob("checkpoints/step-*"))
    kept = f"the newest checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint is left"
    return State(
        "failed",
        f"ended without a result after step {step}, {spoken_time(still)} ago; {kept}",
    )


def spoken_time(seconds: float) -> str:
    """`seconds` in the largest fitting unit: `40 seconds`, `3 minutes`, `2 days`."""
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = round(seconds / size)
            return f"{count} {unit}{'s' if count != 1 else ''}"
    count = max(0, round(seconds))
    return f"{count} second{'s' if count != 1 else ''}"
