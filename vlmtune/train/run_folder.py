"""The run folder: who may write into it, what it records, and the samples not trained on.

recipe.yaml            as given
recipe.resolved.yaml   every key, paths absolute
environment.json       versions, hardware, the base model's commit, the data's hashes
modules.json           what is trained and what is quantised, read off the built model
metrics.jsonl  skipped.jsonl  tensorboard/
eval/step-000100/      figures and answers on held-out data; step-000000: before training
summary.json           what came of it, written at the end
checkpoints/           see checkpoint.py
adapter/ or model/     the result
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmtune.errors import VlmtuneError
from vlmtune.files import whole_folder, write_file
from vlmtune.models.quantize import BitsRow
from vlmtune.models.targets import TrainedRow
from vlmtune.train.checkpoint import (
    Best,
    Checkpoint,
    check_fingerprint,
    checkpoint_path,
    complete_checkpoints,
    is_complete,
    load_checkpoint,
    read_state,
)
from vlmtune.train.feed import SkippedSample
from vlmtune.train.tracker import finite_or_null

RESULTS = ("adapter", "model")
EVALUATION = re.compile(r"(?:guard-)?step-(\d+)")
"""Names of the folders in eval/ that training writes."""


def is_run(folder: Path) -> bool:
    """Whether a run wrote this folder: it has the records that every run writes first."""
    return all((folder / name).is_file() for name in ("recipe.resolved.yaml", "environment.json"))


def holds_work(folder: Path) -> bool:
    """Whether a run left something here that took training: a checkpoint, also one that is set
    aside or not complete, or a result."""
    checkpoints = [p for p in folder.glob("checkpoints/*") if not p.name.startswith(".")]
    superseded = [p for name in RESULTS for p in folder.glob(f"superseded-{name}")]
    return bool(checkpoints or superseded) or finished_result(folder) is not None


def finished_result(folder: Path) -> Path | None:
    """The finished adapter or model of a run, if there is one."""
    return next((folder / name for name in RESULTS if (folder / name).is_dir()), None)


def choose_start(folder: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start at step 1. Reads, changes nothing.

    `resume`: None (a folder without work in it is wanted), `auto` (newest complete checkpoint, or a
    start), `never` (start over), or a checkpoint folder. Raises VlmtuneError for a folder of
    something else, whatever `resume` is.
    """
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and not is_run(folder):
        raise VlmtuneError(
            "the folder is not empty, and no run wrote it"
            if folder.is_dir()
            else "a file, not a folder",
            file=folder,
            expected="a new or empty folder, or one of a run",
            do="set another output_dir",
        )
    if resume == "never":
        return None
    found = complete_checkpoints(folder / "checkpoints")
    if resume == "auto" and found:
        return load_checkpoint(found[-1])
    is_own = (
        resume is not None and Path(resume).resolve().parent == (folder / "checkpoints").resolve()
    )
    if holds_work(folder) and (resume is None or not (found or is_own)):
        go_on = "continue with --resume auto, " if found else ""
        raise VlmtuneError(
            "the output folder is occupied",
            file=folder,
            got=_describe(folder, found),
            do=f"{go_on}start over with --resume never (the old run is kept under another name), "
            "or set another output_dir",
        )
    if resume is None or resume == "auto":
        return None
    path = Path(resume)
    if not path.is_dir():
        raise VlmtuneError("no such checkpoint", file=path, expected="auto, never or a folder")
    return load_checkpoint(path)


def _describe(folder: Path, found: Sequence[Path]) -> str:
    what = "a finished run" if finished_result(folder) else "a run"
    if not found:
        return f"{what} without a complete checkpoint"
    return what if finished_result(folder) else f"a run stopped after {found[-1].name}"


def check_same_run(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Raise VlmtuneError where `folder` holds checkpoints of another run than the one with this
    fingerprint, which goes on from a checkpoint that lies elsewhere."""
    for path in complete_checkpoints(folder / "checkpoints")[-1:]:
        try:
            check_fingerprint(read_state(path).fingerprint, fingerprint, path=path)
        except VlmtuneError as error:
            raise VlmtuneError(
                "the checkpoint belongs to another run than the output folder holds",
                file=folder,
                got=error.got,
                do="set another output_dir",
            ) from error


def set_aside(folder: Path) -> Path | None:
    """Rename an existing run folder to the first free `NAME.previous-N`; where it went."""
    if not is_run(folder):
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.previous-{number}")).exists():
        number += 1
    try:
        folder.rename(target)
    except OSError as error:
        raise VlmtuneError(
            f"the old run cannot be renamed: {error.strerror}",
            file=folder,
            do="rename it, or set another output_dir",
        ) from error
    return target


def drop_records(folder: Path) -> bool:
    """Remove what a run that left no work wrote down, so that it does not mix into the next one;
    whether there was such a run."""
    if not is_run(folder) or holds_work(folder):
        return False
    for name in ("summary.json", "modules.json", "metrics.jsonl", "skipped.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "tensorboard", folder / "checkpoints", *evaluations(folder)):
        shutil.rmtree(path, ignore_errors=True)
    return True


def find_best(folder: Path, best: Best, *, resume: str | None, step: int) -> Path:
    """The checkpoint of the best step so far, of the run that is gone on with from `step`: the
    result, should nothing better come. Raises `VlmtuneError` where it is gone."""
    candidates = [checkpoint_path(folder / "checkpoints", best.step)]
    if resume not in (None, "auto"):
        start = Path(str(resume)).resolve()
        candidates.insert(0, checkpoint_path(start.parent, best.step))
        if best.step == step:  # whatever it is called
            candidates.insert(0, start)
    found = [path for path in candidates if is_complete(path)]
    if not found:
        raise VlmtuneError(
            f"the checkpoint of the best step so far, {best.step}, is gone",
            file=candidates[0].parent,
            expected=candidates[0].name,
            do="put it back, go on from a checkpoint before it, or set eval.best_metric: null",
        )
    return found[0]


def bring_from(other: Path, folder: Path, *, step: int, best: Path | None) -> None:
    """Copy what a run goes on with from the run folder `other`: the best checkpoint, and the
    evaluations up to `step`, with which later ones are compared. Raises `VlmtuneError` where the
    disk refuses."""
    try:
        for path in evaluations(other):
            target = folder / "eval" / path.name
            if evaluated_step(path) <= step and not target.exists():
                shutil.copytree(path, target)
        if best is None:
            return
        target = checkpoint_path(folder / "checkpoints", read_state(best).step)
        if best.resolve() != target.resolve():
            with whole_folder(target) as writing:
                shutil.copytree(best, writing, dirs_exist_ok=True)
    except OSError as error:
        raise VlmtuneError(
            f"the best checkpoint so far and the evaluations could not be copied: {error}",
            file=folder,
            do="free space and run again",
        ) from error


def evaluations(folder: Path) -> list[Path]:
    """The folders in eval/ that training wrote."""
    return [path for path in folder.glob("eval/*") if EVALUATION.fullmatch(path.name)]


def evaluated_step(path: Path) -> int:
    """The step of one of `evaluations`."""
    return int(path.name.rpartition("-")[2])


def drop_evaluations_after(folder: Path, step: int) -> None:
    """Remove the evaluations of steps that are about to be done again. The lines of metrics.jsonl
    go too; left, they would be taken for those of the new steps."""
    for path in evaluations(folder):
        if evaluated_step(path) > step:
            shutil.rmtree(path)


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename checkpoints after `step`, and the result they led to, to `superseded-…`.

    A resume from an older checkpoint goes another way from there: left in place, the newer ones
    would be the next `--resume auto`, and would push its own checkpoints out.
    """
    newer = [
        path
        for path in complete_checkpoints(folder / "checkpoints")
        if int(path.name.removeprefix("step-")) > step
    ]
    result = finished_result(folder)
    for path in [*newer, *([result] if newer and result else [])]:
        target = path.with_name(f"superseded-{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)


def write_records(
    folder: Path, *, recipe_text: str, resolved_text: str, environment: dict[str, Any]
) -> None:
    """Record what this run is. Raises `VlmtuneError` where the folder cannot be written."""
    try:
        write_file(folder / "recipe.yaml", recipe_text)
        write_file(folder / "recipe.resolved.yaml", resolved_text)
        write_file(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    except OSError as error:
        raise VlmtuneError(
            f"the run folder cannot be written: {error.strerror}",
            file=folder,
            do="set output_dir to a folder you may write to",
        ) from error


def write_modules(
    folder: Path, *, trained: Sequence[TrainedRow], linear_modules: Sequence[BitsRow]
) -> None:
    """`modules.json`: the tables that are shown at the start."""
    values = {
        "trainable_parameters": sum(row.trainable_parameters for row in trained),
        "trained": [asdict(row) for row in trained],
        "linear_modules_by_bits": [asdict(row) for row in linear_modules],
    }
    write_file(folder / "modules.json", json.dumps(values, indent=1) + "\n")


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """`summary.json`: the figures of a finished or stopped session."""
    content = json.dumps(finite_or_null(summary), indent=1, default=str)
    write_file(folder / "summary.json", content + "\n")


def write_result(folder: Path, name: str, save: Callable[[Path], None]) -> Path:
    """Let `save` write the adapter or model into a folder that is there whole, or not at all; its
    final path."""
    final = folder / name
    try:
        with whole_folder(final) as writing:
            save(writing)
    except OSError as error:
        raise VlmtuneError(
            f"the result could not be written: {error.strerror or error}",
            file=final,
            do="free space and run again with --resume auto: the last step's checkpoint is there",
        ) from error
    return final


def allowed_bad(max_bad_fraction: float, num_samples: int) -> int:
    """How many of the samples may be bad."""
    # 0.29 * 100 is 28.999999999999996.
    return math.floor(round(max_bad_fraction * num_samples, 6))


_Place = tuple[str, str, int]


class SkipLog:
    """Every sample left out, once, in order of appearance; the same on all processes.

    Bad samples count against `max_bad_fraction` of `num_samples`; samples dropped for their length
    (`over_length: drop`) are listed and counted, not limited. `counts_repeats`: `num_samples` are
    those that the run draws, not those there are, and a bad one counts each time it is drawn.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_samples: int,
        max_bad_fraction: float,
        counts_repeats: bool = False,
    ) -> None:
        self._path = path
        self._num_samples = num_samples
        self._limit = allowed_bad(max_bad_fraction, num_samples)
        self._counts_repeats = counts_repeats
        self._entries: dict[_Place, SkippedSample] = {}
        self.num_bad = 0

    @property
    def num_left_out(self) -> int:
        return len(self._entries)

    def add(self, entries: Iterable[SkippedSample], *, write: bool) -> None:
        """Note what is new; raises `VlmtuneError` beyond the limit, on every process alike."""
        drawn = list(entries)
        new = list({_place(e): e for e in drawn if _place(e) not in self._entries}.values())
        self._entries |= {_place(e): e for e in new}
        if write:
            self._append(new)
        bad = [e for e in (drawn if self._counts_repeats else new) if e.is_bad]
        self.num_bad += len(bad)
        if bad and self.num_bad > self._limit:
            last = bad[-1]
            raise VlmtuneError(
                f"too many bad samples: {self.num_bad} of {self._num_samples}; "
                f"the last: {last.reason}",
                at=last,
                expected=f"at most {self._limit} (data.max_bad_fraction)",
                do="fix the data (data.on_bad_sample: error lists the bad rows) or raise "
                "data.max_bad_fraction",
            )

    def as_list(self) -> list[dict[str, Any]]:
        """For the checkpoint."""
        return [entry.as_dict() for entry in self._entries.values()]

    def restore(self, entries: Iterable[dict[str, Any]], *, num_bad: int | None = None) -> None:
        """Start from a checkpoint's entries, without those of an attempt after it. `num_bad`:
        where it is more than one for each bad entry."""
        restored = [SkippedSample(**entry) for entry in entries]
        self._entries = {_place(entry): entry for entry in restored}
        counted = sum(entry.is_bad for entry in restored)
        self.num_bad = counted if num_bad is None else num_bad

    def write(self) -> None:
        """Make the file list exactly what is known; afterwards `add` appends to it."""
        self._path.unlink(missing_ok=True)
        self._append(self._entries.values())

    def _append(self, entries: Iterable[SkippedSample]) -> None:
        lines = [json.dumps(e.as_dict(), ensure_ascii=False) + "\n" for e in entries]
        if lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)


def _place(entry: SkippedSample) -> _Place:
    """What tells samples apart: of large sets and of streams nobody checks that ids are unique."""
    return entry.id, entry.file, entry.line
