"""What a check found wrong: named at file and line, counted by kind, ending in one verdict."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlmtune.errors import ErrorGroup, VlmtuneError

Severity = Literal["error", "warning"]
Verdict = Literal["ready", "warnings", "not_ready"]

KEPT_PER_KIND = 1000
"""Problems of a kind that are kept with their place; the others are counted."""

_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\([^)]*\)|(?<![\w-])\d[\d,.]*")


@dataclass(frozen=True)
class Problem:
    """`file` and `line` are None where it is of no place in a file; `kind` is what it is counted
    with."""

    severity: Severity
    file: str | None
    line: int | None
    message: str
    kind: str

    @property
    def place(self) -> str:
        if self.file is None:
            return ""
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class ProblemKind:
    """Problems that differ in names and numbers only."""

    severity: Severity
    kind: str
    count: int


@dataclass
class Problems:
    """Problems in the order they were found; of one kind, `KEPT_PER_KIND` are kept, all counted."""

    found: list[Problem] = field(default_factory=list)
    counts: Counter[tuple[Severity, str]] = field(default_factory=Counter)

    def add(
        self,
        severity: Severity,
        message: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        kind: str | None = None,
    ) -> None:
        """Note a problem. `kind`: what it is counted with; None: told from the message."""
        kind = kind or kind_of(message)
        self.counts[severity, kind] += 1
        if self.counts[severity, kind] <= KEPT_PER_KIND:
            place = None if file is None else str(file)
            self.found.append(Problem(severity, place, line, message, kind))

    def add_uncounted(self, severity: Severity, kind: str, number: int) -> None:
        """Count `number` more of a kind, whose places are not kept."""
        if number:
            self.counts[severity, kind] += number

    def add_error(self, error: VlmtuneError, *, severity: Severity = "error") -> None:
        """Note an error, or each of a group, with its place apart from its text."""
        if isinstance(error, ErrorGroup):
            for inner in error.errors:
                self.add_error(inner, severity=severity)
            return
        text = VlmtuneError(error.message, got=error.got, expected=error.expected, do=error.do)
        self.add(severity, str(text), file=error.file, line=error.line, kind=kind_of(error.message))

    def kinds(self) -> list[ProblemKind]:
        """How many there are of each kind, errors first, the most frequent first."""
        found = [ProblemKind(severity, kind, n) for (severity, kind), n in self.counts.items()]
        return sorted(found, key=lambda kind: (kind.severity != "error", -kind.count))

    def num(self, severity: Severity) -> int:
        return sum(count for (of, _), count in self.counts.items() if of == severity)

    @property
    def verdict(self) -> Verdict:
        if self.num("error"):
            return "not_ready"
        return "warnings" if self.num("warning") else "ready"


def kind_of(message: str) -> str:
    """What messages of one kind have in common: the words without names and numbers."""
    return re.sub("…( …)+", "…", _VARIABLE.sub("…", message.split("; got:")[0]))
