"""Whether a tool trains on the same tokens and labels, and the same linears, as vlmtune.

    probe of the tool (its first batches, unpadded) -> each sample looked up among vlmtune's rows
    -> the number that agree, and the first that does not, in words

Line breaks after an answer's end token, which no tool labels, may be there or not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.vlmtune_tool import Encoded


@dataclass(frozen=True)
class Agreement:
    """`checked` samples of a tool, of which `equal` are among vlmtune's; `linears` trained with
    `trained_parameters`; `difference`: of the first sample that is not."""

    checked: int
    equal: int
    linears: int
    trained_parameters: int
    difference: str | None

    @property
    def holds(self) -> bool:
        return self.checked > 0 and self.equal == self.checked


def compare(seen: Mapping[str, Any], rows: Sequence[Encoded], *, image_token_id: int) -> Agreement:
    own = {_trimmed(row.ids, row.labels): row for row in rows}
    differing = [
        sample
        for sample in seen["samples"]
        if _trimmed(tuple(sample["ids"]), tuple(sample["labels"])) not in own
    ]
    shapes = seen["trained"].values()
    return Agreement(
        checked=len(seen["samples"]),
        equal=len(seen["samples"]) - len(differing),
        linears=sum("lora_A" in name for name in seen["trained"]),
        trained_parameters=sum(_product(shape) for shape in shapes),
        difference=_told(differing[0], rows, image_token_id) if differing else None,
    )


def read_seen(path: Path) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads(path.read_text())
    return seen


def _trimmed(
    ids: tuple[int, ...], labels: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Without what follows the last label: it is neither learnt nor seen by what is."""
    end = max((i + 1 for i, label in enumerate(labels) if label >= 0), default=0)
    # The first token predicts nothing that is counted: what it is labelled makes no difference.
    return ids[:end], (-100, *labels[1:end])


def _told(sample: Mapping[str, Any], rows: Sequence[Encoded], image_token_id: int) -> str:
    """How the sample differs from the row whose answer it has, or else from all."""
    labelled = tuple(label for label in sample["labels"] if label >= 0)
    for row in rows:
        answer = tuple(label for label in row.labels if label >= 0)
        if answer == labelled:
            return (
                f"input ids differ: {len(sample['ids'])} tokens, "
                f"{sample['ids'].count(image_token_id)} of pictures; vlmtune "
                f"{len(row.ids)} and {row.ids.count(image_token_id)}"
            )
        if answer and answer == labelled[: len(answer)]:
            return f"labels {labelled[len(answer) :]} beyond the answer's end"
    return f"{len(labelled)} labels that are no answer of vlmtune's"


def _product(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
