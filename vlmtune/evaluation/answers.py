"""Answers kept while an evaluation runs, so that one that was killed goes on where it was.

FOLDER/answers-RANK.part.jsonl    {"settings": {…}}           whatever decides an answer
                                  {"number": 3, "answer": …}  in the order of answering

Each process appends to a file of its own and reads all of them, also those of a start with another
number of processes. A line that a kill cut in half is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

PATTERN = "answers-*.part.jsonl"

Settings = Mapping[str, object]


class KeptAnswers:
    """`texts` are the answers of earlier starts with the same `settings`, by the sample's number;
    `dropped` names the settings in which other kept answers differ (those are not used).

    Use as a context: entering opens this process's file, leaving closes it.
    """

    def __init__(self, folder: Path, settings: Settings, *, rank: int = 0) -> None:
        # As JSON has them, so that a comparison with what was read is one of equals.
        self._settings = json.loads(json.dumps(settings))
        self._path = folder / f"answers-{rank}.part.jsonl"
        self.texts: dict[int, str] = {}
        self.dropped: set[str] = set()
        for path in sorted(folder.glob(PATTERN)):
            settings, texts = _read(path)
            if settings == self._settings:
                self.texts |= texts
            elif texts:
                self.dropped |= differing(settings, self._settings)

    def __enter__(self) -> KeptAnswers:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        settings, texts = _read(self._path)
        mine = texts if settings == self._settings else {}
        # Written anew rather than appended to: half a last line would join the next one. Beside its
        # place, as a kill may come now too.
        unfinished = self._path.with_suffix(".new")
        self._file = unfinished.open("w", encoding="utf-8")
        self._write({"settings": self._settings})
        self.append(mine)
        os.replace(unfinished, self._path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, texts: Mapping[int, str]) -> None:
        """Write answers by number; they are on disk when this returns."""
        for number, text in texts.items():
            self._write({"number": number, "answer": text})
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, line: Mapping[str, object]) -> None:
        self._file.write(json.dumps(line) + "\n")


def remove_kept(folder: Path) -> None:
    """Remove every process's kept answers; for when the report is written."""
    for path in folder.glob("answers-*.part.*"):
        path.unlink(missing_ok=True)


def kept_settings(folder: Path) -> Iterator[Settings]:
    """The settings of each file of kept answers in `folder`."""
    for path in sorted(folder.glob(PATTERN)):
        yield _read(path)[0]


def differing(one: Settings, other: Settings) -> set[str]:
    return {name for name in {*one, *other} if one.get(name) != other.get(name)}


def _read(path: Path) -> tuple[Settings, dict[int, str]]:
    """Settings and answers of a file, empty where there is none or its first line is cut."""
    if not path.is_file():
        return {}, {}
    rows = list(_whole_lines(path))
    if not rows or "settings" not in rows[0]:
        return {}, {}
    return rows[0]["settings"], {row["number"]: row["answer"] for row in rows[1:]}


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        try:
            yield json.loads(line)
        except ValueError:  # after a power cut: a block of zeros
            return
