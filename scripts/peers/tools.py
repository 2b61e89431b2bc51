"""The tools by name: in which environment each runs, by what command, and where its steps are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peers import environments, vlmtune_tool
from peers.case import Case
from peers.process import Watched, watch

SCRIPTS = Path(__file__).resolve().parents[1]
ROOT = SCRIPTS.parent


@dataclass(frozen=True)
class Tool:
    """`command`: from a case and an interpreter; `steps_file`: gets a line a step."""

    name: str
    command: Callable[[Case, str], list[str]]
    steps_file: Callable[[Case], Path]


def _script(module: str) -> Callable[[Case, str], list[str]]:
    return lambda case, python: [python, "-m", f"peers.{module}", str(case.write())]


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("trainer", _script("train_plain"), lambda case: case.steps_file),
        Tool("vlmtune", vlmtune_tool.command_of, vlmtune_tool.steps_file),
        Tool("trl", _script("train_trl"), lambda case: case.steps_file),
        Tool("llamafactory", _script("train_llamafactory"), lambda case: case.steps_file),
        Tool("ms-swift", _script("train_swift"), lambda case: case.steps_file),
    )
}
BASELINE = "trainer"
"""What the ratios are to."""
PEERS = tuple(name for name in TOOLS if name != "vlmtune")


def find_python(tool: str, venvs: Path) -> str:
    """The interpreter for a tool: this one for vlmtune, its own environment's for a peer.

    Raises EnvironmentFailed where that cannot be made.
    """
    return sys.executable if tool == "vlmtune" else str(environments.prepare(venvs, tool))


def run_case(case: Case, python: str, *, threads: int, timeout_seconds: float) -> Watched:
    tool = TOOLS[case.tool]
    return watch(
        tool.command(case, python),
        steps_file=tool.steps_file(case),
        log=Path(case.output) / "log.txt",
        environment={
            "PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(ROOT)]),
            "OMP_NUM_THREADS": str(threads),
            # Threads that spin while a neighbour computes make a step several times as long.
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # A cache of its own: nothing of a run is there before it.
            "HF_DATASETS_CACHE": str(Path(case.output) / "datasets"),
            "HF_HOME": str(Path(case.output) / "hf"),
            "MODELSCOPE_CACHE": str(Path(case.output) / "modelscope"),
        },
        timeout_seconds=timeout_seconds,
    )
