"""The tensors of a merged checkpoint, one by one, against the base's and the closed formulas.

    untouched by the adapter   the base's, bit for bit (rounded, where another dtype was asked for)
    trained in full            the trained one, rounded
    low-rank change            W + change by the formula, within the rounding of the dtype
    other layers               none: the logits alone speak for them

A second opinion: what was written came from PEFT's merge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from vlmtune.errors import plural
from vlmtune.models.merge_shards import OutputPlan
from vlmtune.models.merge_source import Folding
from vlmtune.models.source import quiet_transformers
from vlmtune.models.streamed import Placed
from vlmtune.models.tensor_files import (
    HeapKeeper,
    StoredTensor,
    read_tensor,
    stored_tensors,
    weight_files,
)

FORMULA_ERROR = 1e-5
"""Between two ways to fold in float32, relative to the largest number of the weight."""


def keys_error(folder: Path, plan: OutputPlan) -> str | None:
    """What is wrong with the set of tensors in `folder`; None where each is there exactly once.

    Raises VlmtuneError where a file is damaged or a tensor is in two of them.
    """
    written = stored_tensors(weight_files(str(folder)))
    missing, added = plan.tensors.keys() - written.keys(), written.keys() - plan.tensors.keys()
    if not missing and not added:
        return None
    names = ", ".join(sorted([*missing, *added])[:3])
    return f"{plural(len(missing), 'tensor')} missing and {len(added)} not the base's: {names}"


def tensor_errors(folder: Path, folding: Folding, plan: OutputPlan) -> Iterator[TensorError]:
    """One for each tensor in `folder`, named as in the model where that has it."""
    written = stored_tensors(weight_files(str(folder)))
    heap = HeapKeeper()
    for key in plan.tensors:
        if key not in written:
            continue
        name = plan.name_of.get(key)
        is_folded = name is not None and name in folding.changed
        expected = folding.expected(name) if name is not None and is_folded else None
        if is_folded and expected is None:
            continue
        if expected is None:
            expected = read_tensor(plan.stored_of[key])
        is_exact = not is_folded or folding.is_saved(str(name))
        yield error_of(name or key, read_tensor(written[key]), expected, is_exact=is_exact)
        heap.passed(expected.nbytes)


def loads_as_written(folder: Path, placed: Placed, dtype: torch.dtype, trust: bool) -> str | None:
    """Load `folder` with stock transformers; the first weight that is not the file's, or None.

    File by file: what was compared is dropped, so that no more than one file is mapped.
    """
    with quiet_transformers():
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust
        )
    state: dict[str, Tensor] = model.state_dict()
    by_file: dict[Path, list[tuple[str, StoredTensor]]] = {}
    for name, key in placed.key_of.items():
        by_file.setdefault(placed.stored[key].file, []).append((name, placed.stored[key]))
    owners = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for tensor in owners.values():
        tensor.data = torch.empty(0, dtype=tensor.dtype)
    owners.clear()
    for group in by_file.values():
        for name, stored in group:
            tensor = state.pop(name)
            if not torch.equal(tensor, read_tensor(stored).to(tensor.dtype)):
                return name
            del tensor
    return None


def error_of(name: str, written: Tensor, expected: Tensor, *, is_exact: bool) -> TensorError:
    """How far `written` is from `expected`, rounded to its dtype (bit for bit if `is_exact`)."""
    if written.shape != expected.shape:
        return TensorError(name, float("inf"), is_wrong=True)
    rounded = expected.to(written.dtype)
    if torch.equal(_bytes(rounded), _bytes(written)):
        return TensorError(name, 0.0, is_wrong=False)
    if not written.is_floating_point():
        return TensorError(name, float("inf"), is_wrong=True)
    gap = (written.float() - expected.float()).abs_()
    size = torch.linalg.norm(expected.float()).clamp(min=torch.finfo(torch.float32).tiny)
    relative = float(torch.linalg.norm(gap) / size)
    step = torch.finfo(written.dtype).eps
    largest = float(expected.abs().max())
    allowed = expected.float().abs().mul_(step).add_(FORMULA_ERROR * largest)
    is_near = bool((gap <= allowed).all())  # False for NaN
    return TensorError(name, relative, is_wrong=is_exact or not is_near)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class TensorError:
    """How far a written tensor is from what it should be: `relative` by norms."""

    name: str
    relative: float
    is_wrong: bool
