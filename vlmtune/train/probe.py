"""A look at one micro-batch before the first step: is the forward pass the model's own, and does a
gradient reach everything that is to be trained?

Both are found in seconds here and not at all otherwise: a model whose logits are scaled after
`lm_head` would train on wrong ones, and an adapter on a layer that the model does not use (LLaVA
takes features from the last layer but one) would stay as it was for the whole run.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlmtune.data.types import Batch, SideBatch
from vlmtune.errors import VlmtuneError
from vlmtune.models.forward import SupervisedForward, base_of, full_logits

log = logging.getLogger("vlmtune")

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

IN_FRONT, PROBED = range(8, 20), range(1, 8)
"""Token ids of two made-up samples."""


def check_forward(forward: SupervisedForward, batch: Batch, dtype: torch.dtype) -> float:
    """Compare logits at supervised positions with the model's own; the largest difference relative
    to the largest logit. Raises `VlmtuneError` where they are not the same."""
    was_training = forward.training
    forward.eval()
    with torch.no_grad():
        ours = forward.logits(batch)
        reference = own_logits(forward.model, batch)
    forward.train(was_training)
    scale = reference.abs().max().clamp_min(1e-6)
    difference = float((ours - reference).abs().max() / scale)
    if not difference <= RELATIVE_TOLERANCE[dtype]:
        raise VlmtuneError(
            "this model class changes its logits after lm_head; training it would be wrong",
            got=f"a relative difference of {difference:.2g}",
            expected=f"at most {RELATIVE_TOLERANCE[dtype]:.0e}",
            do="report the model's class; it needs a family of its own",
        )
    return difference


def check_packs(forward: SupervisedForward, batch: Batch, dtype: torch.dtype) -> None:
    """Raise `VlmtuneError` where a sample's logits change with the one packed in front of it.

    A language model that does not hand `pack_lengths` or positions on to its attention, of which
    no config tells, would train on wrong ones. `batch`, a pack, tells what the model is given
    besides token ids; the samples are made up.
    """
    names = [n for n, t in batch.inputs.items() if t.shape == batch.inputs["input_ids"].shape]
    device = batch.targets.device

    def made_up(*ids: range) -> Batch:
        together = torch.tensor([token for some in ids for token in some], device=device)
        fields = {name: torch.zeros_like(together)[None] for name in names}
        supervised = torch.zeros_like(together, dtype=torch.bool)
        supervised[-len(ids[-1]) :] = True
        return Batch(
            inputs=fields | {"input_ids": together[None]},
            supervised=supervised[None],
            targets=together[supervised],
            sample_ids=("",) * len(ids),
            num_tokens=len(together),
            num_images=0,
            lengths=tuple(len(some) for some in ids),
        )

    was_training = forward.training
    forward.eval()
    with torch.no_grad():
        alone = forward.logits(made_up(PROBED))
        behind = forward.logits(made_up(IN_FRONT, PROBED))
    forward.train(was_training)
    difference = float((behind - alone).abs().max() / alone.abs().max().clamp_min(1e-6))
    if not difference <= RELATIVE_TOLERANCE[dtype]:
        raise VlmtuneError(
            "this model does not keep packed samples apart",
            got=f"logits that the sample in front changes by {difference:.2g} of the largest",
            expected=f"at most {RELATIVE_TOLERANCE[dtype]:.0e}",
            do="set train.packing: false",
        )


def own_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own logits at the supervised positions, (S, V).

    Those of other positions are not asked for where the model's class has `logits_to_keep`: of a
    long sample and a large vocabulary they take gigabytes, more than any step after.
    """
    if "logits_to_keep" not in inspect.signature(base_of(model).forward).parameters:
        return full_logits(model, batch.inputs)[batch.supervised]
    columns = batch.supervised.any(0).nonzero().flatten()  # positions supervised in any row
    kept = full_logits(model, {**batch.inputs, "logits_to_keep": columns})
    return kept[batch.supervised[:, columns]]


def freeze_unreached(
    forward: nn.Module, batch: Batch | SideBatch, parameters: Mapping[str, nn.Parameter]
) -> list[str]:
    """Freeze the trained tensors that get no gradient from `batch`, say so, return their names.

    Raises `VlmtuneError` where none gets one. Leaves the random state as it was.
    """
    was_training = forward.training
    forward.eval()
    with torch.random.fork_rng(devices=[]):
        if isinstance(batch, SideBatch):
            forward(batch.inputs, batch.last).sum().backward()
        else:
            forward(batch).backward()
    forward.train(was_training)
    unreached = [name for name, p in parameters.items() if p.grad is None]
    for parameter in parameters.values():
        parameter.grad = None
    if len(unreached) == len(parameters):
        raise VlmtuneError("no trained tensor gets a gradient", got=unreached[:5])
    for name in unreached:
        parameters[name].requires_grad_(False)
    if unreached:
        log.warning(
            "%d of %d trained tensors get no gradient, as the model does not use them; "
            "they stay as they are: %s%s",
            len(unreached),
            len(parameters),
            ", ".join(unreached[:3]),
            ", …" if len(unreached) > 3 else "",
        )
    return unreached
