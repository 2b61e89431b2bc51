"""The state of a benchmark: model, rows and environments that are made, and what has been run."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from peers import agreement, environments, tools, vlmtune_tool
from peers.case import BATCH_SIZE, Case
from peers.model import SIZES, make_model
from peers.process import Watched
from peers.results import Figures, Key, Outcome, figures_of
from peers.vlmtune_tool import Encoded
from peers.words import make_lexicon
from peers.workloads import Row, Workload, write_workload

WATCHED = "watched.json"
"""What a run gave, in its folder."""
ENCODED_ROWS = 512
"""Rows at most that are encoded to know their lengths and compare them with a peer's."""


@dataclass(frozen=True)
class Prepared:
    """A workload's files in `folder`; `encoded` are its first rows as vlmtune sees them."""

    workload: Workload
    folder: Path
    rows: tuple[Row, ...]
    encoded: tuple[Encoded, ...]

    @property
    def tokens_per_step(self) -> float:
        return BATCH_SIZE * sum(len(row.ids) for row in self.encoded) / len(self.encoded)

    @property
    def supervised_per_sample(self) -> float:
        return sum(row.num_supervised for row in self.encoded) / len(self.encoded)


class Bench:
    """Makes what is needed once and keeps every run's figures or error under its key."""

    def __init__(self, options: argparse.Namespace) -> None:
        size = SIZES[options.size]
        self.options = options
        self.model = options.work / f"model-{options.size}"
        self.num_parameters = make_model(self.model, size=size, seed=options.seed)
        self._image_token_id = int(
            json.loads((self.model / "config.json").read_text())["image_token_id"]
        )
        self._tokenizer = AutoTokenizer.from_pretrained(self.model)
        self._lexicon = make_lexicon(2 * size.vocabulary, seed=options.seed)
        self._lengths: dict[str, int] = {}
        self._pythons: dict[str, str] = {}
        self._missing: dict[str, str] = {}
        self._rounds: dict[Key, list[Figures]] = defaultdict(list)
        self._errors: dict[Key, list[str]] = defaultdict(list)

    def prepare(self, workload: Workload, num_rows: int) -> Prepared:
        folder = self.options.work / f"data-{self.options.size}" / f"{workload.name}-{num_rows}"
        rows = write_workload(
            folder,
            workload,
            num_rows=num_rows,
            lexicon=self._lexicon,
            count=self._num_tokens,
            seed=self.options.seed,
        )
        encoded = vlmtune_tool.encode_rows(str(self.model), folder, limit=ENCODED_ROWS)
        return Prepared(workload, folder, rows, tuple(encoded))

    def tokens(self, work: Prepared) -> int:
        """Of vlmtune's micro-batch: as asked, or as many as a peer's padded one holds."""
        lengths = [len(row.ids) for row in work.encoded]
        asked: int | None = self.options.tokens
        return asked or vlmtune_tool.padded_tokens(lengths, self.options.peer_batch)

    def run(
        self,
        key: Key,
        work: Prepared,
        *,
        number: int,
        overrides: Sequence[str] = (),
        max_steps: int | None = None,
    ) -> None:
        """One process; its figures, or why there are none, are kept."""
        steps = max_steps or self.options.max_steps
        case = self._case(key, work, str(number), overrides=overrides, max_steps=steps)
        watched = self._taken_up(case) or self._watched(case)
        told = f"{work.workload.name:10} {'on ' if key.checkpointing else 'off'} "
        told += f"{key.tool} {key.variant}".ljust(24)
        try:
            if watched.error is not None:
                raise ValueError(watched.error)
            figures = figures_of(
                watched,
                steps_per_epoch=math.ceil(len(work.rows) / BATCH_SIZE),
                supervised_per_sample=work.supervised_per_sample,
                warm_up=self.options.warm_up,
            )
        except ValueError as error:
            self._errors[key].append(str(error))
            print(f"{told} failed: {error}", file=sys.stderr, flush=True)
            return
        self._rounds[key].append(figures)
        print(
            f"{told} {figures.step_seconds:7.2f} s/step "
            f"{figures.samples_per_second:7.2f} samples/s "
            f"{figures.peak_bytes / 1e6:6.0f} MB {figures.wall_seconds:7.1f} s",
            file=sys.stderr,
            flush=True,
        )

    def probe(self, tool: str, work: Prepared) -> dict[str, Any]:
        """What a peer sees of the workload beside what vlmtune sees; said on stderr."""
        key = Key(work.workload.name, False, tool, "probe")
        case = self._case(key, work, "", max_steps=1, probes=True)
        watched = self._watched(case)
        line: dict[str, Any] = {"tool": tool, "workload": work.workload.name}
        told = f"probe {work.workload.name:10} {tool:13}"
        if watched.error is not None or not case.seen_file.is_file():
            error = watched.error or "the tool called no callback"
            print(f"{told} failed: {error}", file=sys.stderr, flush=True)
            return line | {"error": error}
        found = agreement.compare(
            agreement.read_seen(case.seen_file), work.encoded, image_token_id=self._image_token_id
        )
        text = f"{told} {found.equal} of {found.checked} samples equal, {found.linears} linears"
        if found.difference is not None:
            text += f"; differs: {found.difference}"
        print(text, file=sys.stderr, flush=True)
        return line | asdict(found)

    def outcome(self, key: Key) -> Outcome:
        return Outcome(key, tuple(self._rounds[key]), tuple(self._errors[key]))

    def outcomes(self) -> list[Outcome]:
        """By workload, checkpointing and tool, in the order in which they were first run."""
        keys = list(dict.fromkeys([*self._rounds, *self._errors]))
        places = {name: place for place, name in enumerate(tools.TOOLS)}
        groups = list(dict.fromkeys(key.group for key in keys))
        keys.sort(key=lambda k: (groups.index(k.group), places[k.tool]))
        return [self.outcome(key) for key in keys]

    def versions(self) -> dict[str, Any]:
        """Of the packages of each environment, or why there is none."""
        found: dict[str, Any] = {
            tool: environments.versions(python) for tool, python in self._pythons.items()
        }
        return found | {tool: {"error": error} for tool, error in self._missing.items()}

    def _num_tokens(self, text: str) -> int:
        if text not in self._lengths:
            self._lengths[text] = len(self._tokenizer(text).input_ids)
        return self._lengths[text]

    def _case(
        self,
        key: Key,
        work: Prepared,
        round_name: str,
        *,
        max_steps: int | None,
        overrides: Sequence[str] = (),
        probes: bool = False,
    ) -> Case:
        options = self.options
        named = f"{key.workload}-{'on' if key.checkpointing else 'off'}-{key.tool}-{key.variant}"
        output = options.work / "cases" / f"{named}-{round_name}".replace(" ", "_")
        return Case(
            tool=key.tool,
            model=str(self.model),
            data=str(work.folder),
            output=str(output),
            checkpointing=key.checkpointing,
            peer_batch=options.peer_batch,
            tokens=self.tokens(work),
            seed=options.seed,
            num_workers=options.workers,
            epochs=None if max_steps else options.epochs,
            max_steps=max_steps,
            probes=probes,
            overrides=tuple(overrides),
        )

    def _watched(self, case: Case) -> Watched:
        """The case's process, run anew; kept beside its files if it succeeded."""
        python = self._python(case.tool)
        if python is None:
            return Watched([], exit_code=1, error=f"not installed: {self._missing[case.tool]}")
        options = self.options
        if Path(case.output).exists():
            shutil.rmtree(case.output)
        watched = tools.run_case(
            case, python, threads=options.threads, timeout_seconds=options.timeout
        )
        if watched.error is None:
            kept = {"settings": self._settings(case), "watched": asdict(watched)}
            (Path(case.output) / WATCHED).write_text(json.dumps(kept))
        return watched

    def _taken_up(self, case: Case) -> Watched | None:
        """With `--resume`, the same case as run before, if it succeeded."""
        path = Path(case.output) / WATCHED
        if not self.options.resume or not path.is_file() or self._python(case.tool) is None:
            return None
        kept = json.loads(path.read_text())
        return Watched(**kept["watched"]) if kept["settings"] == self._settings(case) else None

    def _settings(self, case: Case) -> dict[str, Any]:
        """What a run depends on, as JSON reads it back."""
        settings = {"case": asdict(case), "threads": self.options.threads}
        found: dict[str, Any] = json.loads(json.dumps(settings))
        return found

    def _python(self, tool: str) -> str | None:
        if tool not in self._pythons and tool not in self._missing:
            try:
                self._pythons[tool] = tools.find_python(tool, self.options.venvs)
            except environments.EnvironmentFailed as error:
                self._missing[tool] = str(error)
        return self._pythons.get(tool)
