"""Where an evaluation's files go, and which folder an interrupted one left to go on in."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.errors import VlmtuneError

OURS = ("metrics.json", "predictions.jsonl", "comparison.json", "targets.json")
"""What marks a folder as one that `vlmtune eval` wrote."""

NOT_FOR_REPORTS = ("recipe.resolved.yaml", "config.json", "adapter_config.json")


def check_output(folder: Path) -> None:
    """Raise VlmtuneError where `--output` is a folder of something else."""
    if not folder.exists():
        return
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    if names is None:
        raise VlmtuneError(
            "the output folder cannot be written: it is a file",
            file=folder,
            do="give another folder with --output",
        )
    is_ours = any(name in OURS for name in names) or any(folder.glob("answers-*.part.*"))
    if names and (not is_ours or any(name in NOT_FOR_REPORTS for name in names)):
        raise VlmtuneError(
            "the output folder is occupied",
            file=folder,
            got=", ".join(names[:3]) + (" …" if len(names) > 3 else ""),
            expected="a new folder, an empty one, or one of an evaluation",
            do="give another folder with --output",
        )


def make_folder(folder: Path) -> None:
    """Make the folder and see that it can be written. Raises VlmtuneError where it cannot."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise VlmtuneError(
            f"the output folder cannot be written: {error.strerror}",
            file=folder,
            do="give another folder with --output",
        ) from error


def default_parent(target: str, kind: str, data: Path) -> tuple[Path, str]:
    """The folder of a target's reports and how their names start. A model or adapter folder is for
    loading and serving; reports do not belong in it."""
    if kind == "run":
        return Path(target).expanduser() / "eval", data.stem
    return Path("eval"), f"{short_name(target)}-{data.stem}"


def short_name(target: str) -> str:
    """The last component of a target, with `.` and `..` resolved; links keep their own name."""
    return place_of(target).name or "root"


def place_of(target: str) -> Path:
    """The target as an absolute path, however it was written; equal where a target is the same.
    For a hub id the path means nothing but that."""
    return Path(os.path.abspath(Path(target).expanduser()))


def unfinished_or_new(
    parent: Path, stem: str, settings: Mapping[str, Any], started_at: str
) -> Path:
    """The newest folder in which an evaluation with these settings was stopped, or a new one."""
    from vlmtune.evaluation.answers import kept_settings

    for folder in sorted(parent.glob(f"{glob.escape(stem)}-*"), reverse=True):
        if any(kept == settings for kept in kept_settings(folder)):
            return folder
    return new_folder(parent / f"{stem}-{started_at}")


def new_folder(folder: Path) -> Path:
    """`folder`, or where it is taken the first free `folder-N`."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free
