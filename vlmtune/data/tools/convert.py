r"""Converts rows of any format to one JSONL file of the project's own; resumable at any row.

    row -> Conversation -> line of OUT.partial ... -> OUT
                       \-> a bad one: line of OUT_skipped.jsonl.partial

OUT.state.json says, for a moment at which everything was on disk, how many rows were done and how
long the files were. A run that finds it truncates the files to that length and continues with the
next row: the result is byte for byte the same as without the stop. Files of pictures appear whole
or not at all, and are named by content.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from vlmtune.data.dataset import BadRows, OnBadSample, OpenFile, UniqueIds, iter_rows, num_rows
from vlmtune.data.tools.message_rows import MediaFiles, check_free, line_of, row_of, writing
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.files import file_state, finish_file, json_digest, write_file

VERSION = 1
_SUFFIXES = (".jsonl", ".ndjson", ".json")
SAVE_SECONDS = 1.0
"""Time between two moments that a killed run can go on from."""


@dataclass(frozen=True)
class Converted:
    """`num_started_at`: rows that an earlier, stopped run had done. `num_outside`: uses of files
    outside the output's folder."""

    output: Path
    num_rows: int
    num_samples: int
    num_started_at: int
    num_pictures_written: int
    num_outside: int
    unused: dict[str, int]
    bad: BadRows
    skipped: Path | None


@dataclass
class _State:
    """What OUT.state.json holds."""

    fingerprint: str
    num_rows: int = 0
    num_samples: int = 0
    output_bytes: int = 0
    skipped_bytes: int = 0
    num_outside: int = 0
    bad: BadRows = field(default_factory=BadRows)
    unused: dict[str, int] = field(default_factory=dict)
    version: int = VERSION


def convert(
    files: Sequence[OpenFile],
    output: Path,
    *,
    copy_images: bool = False,
    new_ids: bool = False,
    on_bad_sample: OnBadSample = "error",
    overwrite: bool = False,
    on_row: Callable[[int], None] = lambda done: None,
) -> Converted:
    """Write the rows of `files` to `output`; continues where a stopped run ended. `new_ids`: each
    id is replaced by the name of the file and the line.

    With `error`, raises an ErrorGroup of all bad rows, and there is no output; with `skip` they
    are written to OUT_skipped.jsonl with their reasons. Raises VlmtuneError where the output
    exists and is not to be overwritten, where an unfinished one is of other data, where no sample
    is left, and CannotWrite. `on_row` gets the number of rows done.
    """
    names = _Names(output)
    _check_output(output, files, overwrite=overwrite)
    with ExitStack() as stack:
        lines = stack.enter_context(_open(names.partial))
        skipped = stack.enter_context(_open(names.skipped_partial))
        options = [copy_images, new_ids, on_bad_sample]
        print_of = _fingerprint(files, output, options)
        state = _start(names, print_of, (lines, skipped), overwrite=overwrite)
        run = _Run(
            files=files,
            ids=UniqueIds(new_ids),
            state=state,
            places=MediaFiles(output, copy_images, num_outside=state.num_outside),
            names=names,
            lines=lines,
            skipped=skipped,
        )
        started_at = state.num_rows
        run.go_back()
        run.go_on(on_row)
        if state.bad.count and (on_bad_sample == "error" or not state.num_samples):
            names.remove()
            raise state.bad.as_error()
        run.finish()
    return Converted(
        output=output,
        num_rows=state.num_rows,
        num_samples=state.num_samples,
        num_started_at=started_at,
        num_pictures_written=run.places.num_written,
        num_outside=run.places.num_outside,
        unused=dict(run.unused),
        bad=state.bad,
        skipped=names.skipped if state.bad.count else None,
    )


@dataclass(frozen=True)
class _Names:
    output: Path

    @property
    def skipped(self) -> Path:
        return self.output.with_name(f"{self.output.stem}_skipped.jsonl")

    @property
    def partial(self) -> Path:
        return self.output.with_name(f"{self.output.name}.partial")

    @property
    def skipped_partial(self) -> Path:
        return self.skipped.with_name(f"{self.skipped.name}.partial")

    @property
    def state(self) -> Path:
        return self.output.with_name(f"{self.output.name}.state.json")

    def remove(self) -> None:
        for path in (self.state, self.partial, self.skipped_partial):
            path.unlink(missing_ok=True)


@dataclass
class _Run:
    files: Sequence[OpenFile]
    ids: UniqueIds
    state: _State
    places: MediaFiles
    names: _Names
    lines: FileIO
    skipped: FileIO
    unused: Counter[str] = field(default_factory=Counter)
    saved_at: float = field(default_factory=time.monotonic)

    def go_back(self) -> None:
        """To where the state was: shorter files, the ids and keys of the rows before."""
        for partial, length in (
            (self.lines, self.state.output_bytes),
            (self.skipped, self.state.skipped_bytes),
        ):
            partial.truncate(length)
            partial.seek(length)
        self.unused.update(self.state.unused)
        if self.state.num_samples:
            with self.names.partial.open("rb") as stream:
                for line in stream:
                    self.ids.take(json.loads(line)["id"])

    def go_on(self, on_row: Callable[[int], None]) -> None:
        state = self.state
        on_row(state.num_rows)
        left = range(state.num_rows, num_rows(self.files))
        for row in iter_rows(self.files, left, unused=self.unused):
            try:
                conversation = self.ids.conversation(row)
                line = line_of(row_of(conversation, self.places))
            except SampleError as error:
                state.bad.add(error)
                refused = {
                    "file": row.source.file,
                    "line": row.source.line,
                    "reason": str(error),
                }
                state.skipped_bytes += self._write(self.skipped, line_of(refused))
            else:
                self.ids.take(conversation.id)
                state.num_samples += 1
                state.output_bytes += self._write(self.lines, line)
            state.num_rows += 1
            on_row(state.num_rows)
            if time.monotonic() - self.saved_at >= SAVE_SECONDS:
                self.save()

    def save(self) -> None:
        """Make this a moment to go on from."""
        with writing(self.names.state):
            for stream in (self.lines, self.skipped):
                os.fsync(stream.fileno())
            self.state.unused = dict(self.unused)
            self.state.num_outside = self.places.num_outside
            bad = {"count": self.state.bad.count, "named": self.state.bad.named}
            write_file(self.names.state, json.dumps({**vars(self.state), "bad": bad}))
        self.saved_at = time.monotonic()

    def finish(self) -> None:
        with writing(self.names.output):
            if self.state.bad.count:
                finish_file(self.names.skipped_partial, self.names.skipped)
            else:
                self.names.skipped.unlink(missing_ok=True)
            finish_file(self.names.partial, self.names.output)
            self.names.remove()

    def _write(self, stream: FileIO, line: bytes) -> int:
        written = 0
        with writing(self.names.partial):
            while written < len(line):
                written += stream.write(line[written:])
        return written


def _check_output(output: Path, files: Sequence[OpenFile], *, overwrite: bool) -> None:
    if output.is_dir():
        raise VlmtuneError("the output is a folder", file=output, expected="a file's name")
    if output.suffix.lower() not in _SUFFIXES:  # CSV, say: it would be read as what it is called
        raise VlmtuneError(
            "the output is a JSONL file",
            file=output,
            expected=f"a name that ends in {_SUFFIXES[0]}",
        )
    check_free(output, files, overwrite=overwrite)


def _open(path: Path) -> FileIO:
    """`path` for writing, kept as it is, and this process's alone. Raises VlmtuneError."""
    with writing(path):
        # Unbuffered: what was written is with the system, whatever becomes of this process.
        stream = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise VlmtuneError(
            "another conversion is writing here", file=path, do="wait for it, or stop it"
        ) from error
    return stream


def _start(
    names: _Names, fingerprint: str, streams: Sequence[FileIO], *, overwrite: bool
) -> _State:
    """The state to go on from; a new one where there is none, or where its files are not whole."""
    if overwrite:
        names.state.unlink(missing_ok=True)
    try:
        values: dict[str, Any] = json.loads(names.state.read_bytes())
    except FileNotFoundError:
        return _State(fingerprint)
    except (OSError, ValueError) as error:
        raise VlmtuneError(
            "the state of an unfinished conversion cannot be read",
            file=names.state,
            do="start over with --overwrite",
        ) from error
    if values.get("fingerprint") != fingerprint:
        raise VlmtuneError(
            "the output belongs to an unfinished conversion of other data or options",
            file=names.partial,
            got="other inputs or options than when it was stopped",
            do="finish it with the same inputs and options, or start over with --overwrite",
        )
    bad = BadRows(values["bad"]["count"], [VlmtuneError(text) for text in values["bad"]["named"]])
    state = _State(**{**values, "bad": bad})
    lengths = (state.output_bytes, state.skipped_bytes)
    if any(os.fstat(s.fileno()).st_size < length for s, length in zip(streams, lengths)):
        return _State(fingerprint)
    return state


def _fingerprint(files: Sequence[OpenFile], output: Path, options: Sequence[object]) -> str:
    """Of everything that decides the output's bytes."""
    read = [
        {
            "entry": file.entry.model_dump(mode="json", exclude={"weight"}),
            "format": file.format,
            "rows": len(file.rows),
            "files": [_identity(path) for path in (file.rows.file, file.entry.annotations) if path],
        }
        for file in files
    ]
    written = [VERSION, os.path.realpath(output), *options]
    return json_digest([read, written])


def _identity(path: str) -> tuple[str | int, ...]:
    try:
        return file_state(Path(path))
    except OSError:  # a data set of the hub
        return (path,)
