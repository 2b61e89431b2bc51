"""A tool's process, watched from outside: wall time, memory of the tree, when each step ended.

command -> started in a session of its own -> every 0.05 s: new lines of the steps file?
        -> every 5 s: memory of the process and its children -> exit code, last error line
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from peers.environments import last_line

LOOK_EVERY, WEIGH_EVERY = 0.05, 5.0
"""Weighing walks the pages of a process, which waits meanwhile: more often, it slows every tool."""


@dataclass
class Watched:
    """Times in seconds since the start. `peak_bytes`: most that the main process was resident,
    from the kernel; `tree_peak_bytes`: most seen of it and its children, shared pages once."""

    command: list[str]
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    tree_peak_bytes: int = 0
    exit_code: int = 0
    error: str | None = None


def watch(
    command: Sequence[str],
    *,
    steps_file: Path,
    log: Path,
    environment: Mapping[str, str],
    timeout_seconds: float,
) -> Watched:
    """Run `command` to its end, its output in `log`; a failure is in the result."""
    watched = Watched(list(command))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        began, began_at = time.monotonic(), time.time()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
            cwd=log.parent,
        )
        tree = psutil.Process(process.pid)
        weighed, size, timed_out = began, 0, False
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.monotonic()
            size = _look(steps_file, size, began_at, watched)
            if pid:
                break
            if now - weighed >= WEIGH_EVERY:
                watched.tree_peak_bytes = max(watched.tree_peak_bytes, proportional_bytes(tree))
                weighed = time.monotonic()
            if now - began > timeout_seconds and not timed_out:
                os.killpg(process.pid, signal.SIGKILL)
                timed_out = True
            time.sleep(LOOK_EVERY)
        process.returncode = os.waitstatus_to_exitcode(status)
    watched.seconds = time.monotonic() - began
    watched.peak_bytes = usage.ru_maxrss * 1024
    watched.tree_peak_bytes = max(watched.tree_peak_bytes, watched.peak_bytes)
    watched.exit_code = process.returncode
    if own := own_times(steps_file):
        watched.step_seconds = [moment - began_at for moment in own]
    if process.returncode != 0:
        said = last_line(log.read_text(errors="replace"))
        watched.error = f"stopped after {timeout_seconds:.0f} s" if timed_out else said
    return watched


def own_times(steps_file: Path) -> list[float]:
    """The times that the tool's own lines hold, by the machine's clock; none for vlmtune's."""
    return [line["time"] for line in read_lines(steps_file) if "time" in line]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file, none where it is not there."""
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _look(steps_file: Path, size: int, began_at: float, watched: Watched) -> int:
    """Note when the file was last written, for each line that is new in it; its size."""
    if not steps_file.is_file():
        return size
    state = steps_file.stat()
    if state.st_size != size and state.st_mtime >= began_at:
        new = steps_file.read_bytes().count(b"\n") - len(watched.step_seconds)
        watched.step_seconds += [state.st_mtime - began_at] * new
    return state.st_size


def proportional_bytes(tree: psutil.Process) -> int:
    """Resident memory of a process and its children; a page that several share counts once."""
    total = 0
    for process in [tree, *_children(tree)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return total


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
