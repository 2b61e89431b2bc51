"""One training to be done by one tool: what the benchmark tells the process that does it.

Standard library only: it is read in every tool's environment.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Leaf names of the linears that LoRA is put on, in the language part only."""
TARGET_PATTERN = rf".*language_model\.layers\.\d+\.\w+\.(?:{'|'.join(TARGETS)})"
"""The same for tools that take one pattern over full module paths."""
BATCH_SIZE = 8
"""Samples per optimizer step."""
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4


@dataclass(frozen=True)
class Case:
    """`data`: the folder of a workload; `peer_batch`: rows of a peer's micro-batch; `tokens`:
    of vlmtune's. `overrides`: further keys of vlmtune's recipe. Either `epochs` or `max_steps` is
    set. `probes`: write what the tool sees of the first samples instead of being measured.
    """

    tool: str
    model: str
    data: str
    output: str
    checkpointing: bool
    peer_batch: int
    tokens: int
    seed: int
    num_workers: int
    epochs: int | None = None
    max_steps: int | None = None
    probes: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def steps_file(self) -> Path:
        """A line for each optimizer step done."""
        return Path(self.output) / "steps.jsonl"

    @property
    def seen_file(self) -> Path:
        """What a probe saw."""
        return Path(self.output) / "seen.json"

    def write(self) -> Path:
        path = Path(self.output) / "case.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path


def read_case(path: str) -> Case:
    values = json.loads(Path(path).read_text())
    return Case(**values | {"overrides": tuple(values["overrides"])})
