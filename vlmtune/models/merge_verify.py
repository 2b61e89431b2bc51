"""Does a merged checkpoint answer as base + adapter do? Logits on samples, and tensor by tensor.

Letters: K compared positions of a sample, V vocabulary.

    base + adapter, float32            A    PEFT's forward pass, nothing folded
    the same folded, float32           F    |F - A| <= float32's own error: nothing was lost
    F rounded to the checkpoint dtype  R    |R - F| is what the rounding costs, measured
    the checkpoint on the disk         C    |C - A| <= 2 float32's error + |R - F|,
                                            and nearer to A than to the base alone

All of them are computed in float32 on the CPU. Letters: K compared positions of a sample, V
vocabulary.

    untouched by the adapter   the base's, bit for bit (rounded, where another dtype was asked for)
    trained in full            the trained one, rounded
    low-rank change            W + change by the formula, within the rounding of the dtype
    other layers               none: the logits alone speak for them

A second opinion: what was written came from PEFT's merge.
"""

from __future__ import annotations

import base64
import inspect
import io
import logging
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from vlmtune.data.batches import collate
from vlmtune.data.dataset import all_rows, load_conversations, media_policy_of
from vlmtune.data.encode import Encoder
from vlmtune.data.types import LOCAL, Conversation, Image, Part, Sample, Source, Text, Turn
from vlmtune.errors import CheckFailed, SampleError, VlmtuneError, plural
from vlmtune.models.forward import base_of, full_logits
from vlmtune.models.load import VLM, pad_token_id
from vlmtune.models.merge_write import Folding, OutputPlan
from vlmtune.models.streamed import (
    LazyModel,
    read_tensor,
    stored_tensors,
    weight_files,
)
from vlmtune.recipe.data_section import DataSection
from vlmtune.recipe.schema import Recipe

logger = logging.getLogger("vlmtune")

NUM_PROBES = 4
MAX_POSITIONS = 64
MAX_TOKENS = 4096


@dataclass(frozen=True)
class Probe:
    """One sample and the positions of it that are compared."""

    id: str
    inputs: dict[str, Tensor]
    positions: Tensor  # (K,) int64


def build_probes(vlm: VLM, recipe: Recipe | None, data: Sequence[Path]) -> list[Probe]:
    """Samples to compare on: of `data`; else of the run's data; else a text and a picture of ours.

    Raises VlmtuneError where `data` is given and cannot be used.
    """
    encoder = Encoder(
        vlm.processor,
        max_tokens=MAX_TOKENS,
        over_length="drop",
        max_image_pixels=int(DataSection.model_fields["max_image_pixels"].default),
    )
    if data:
        media_policy = LOCAL if recipe is None else media_policy_of(recipe.data)
        conversations, _ = load_conversations(data, media_policy=media_policy)
        samples = [encoder.encode(c) for c in conversations[:NUM_PROBES]]
    else:
        samples = _samples_of_run(encoder, recipe)
    if not samples:
        logger.info("compared on a text and a picture made for it: give --data for samples")
        samples = [encoder.encode(c) for c in synthetic_conversations()]
    return [_probe(sample, vlm) for sample in samples]


@torch.no_grad()
def probe_logits(model: nn.Module, probes: Sequence[Probe]) -> list[Tensor]:
    """The logits of every probe at its positions, each (K, V) float32.

    Where the model can, it computes no others: with a large vocabulary they are larger than it.
    """
    model.eval()
    base = base_of(model)
    if "logits_to_keep" not in inspect.signature(type(base).forward).parameters:
        return [full_logits(model, probe.inputs)[0, probe.positions] for probe in probes]
    return [
        base(**probe.inputs, use_cache=False, logits_to_keep=probe.positions).logits[0].float()
        for probe in probes
    ]


def synthetic_conversations() -> Iterator[Conversation]:
    """A question without and one with a picture, for a target that comes without data."""
    picture = PIL.Image.new("RGB", (64, 64), (200, 30, 30))
    picture.paste((20, 60, 200), (8, 8, 40, 40))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    for name, parts in (
        ("text", (Text("What is the capital of France?"),)),
        ("picture", (Image(url, Path()), Text("What is in this picture?"))),
    ):
        yield _conversation(f"made:{name}", parts)


def _conversation(name: str, parts: tuple[Part, ...]) -> Conversation:
    turns = (Turn("user", parts), Turn("assistant", (Text("A blue square on red, I think."),)))
    return Conversation(id=name, turns=turns, source=Source(name, 1))


def _samples_of_run(encoder: Encoder, recipe: Recipe | None) -> list[Sample]:
    """A few of the run's evaluation data, or of its training data; none where both are gone, or
    cannot be read by number."""
    if recipe is None:
        return []
    for files in (recipe.data.eval, recipe.data.train):
        try:
            rows = all_rows(files or [], media_policy=media_policy_of(recipe.data))
        except VlmtuneError as error:
            logger.debug("not compared on the run's own data: %s", error)
            continue
        samples = _encodable(encoder, rows)
        if samples:
            return samples
    return []


def _encodable(encoder: Encoder, conversations: Sequence[Conversation]) -> list[Sample]:
    """The first few that can be encoded: pictures of an old run may be gone."""
    samples: list[Sample] = []
    for number in range(min(len(conversations), 10 * NUM_PROBES)):
        try:
            samples.append(encoder.encode(conversations[number]))
        except SampleError:
            continue
        if len(samples) == NUM_PROBES:
            break
    return samples


def _probe(sample: Sample, vlm: VLM) -> Probe:
    """The supervised positions, where the answers are; of many, the first."""
    batch = collate(
        [sample],
        pad_token_id=pad_token_id(vlm.processor),
        image_batching=vlm.family.image_batching,
    )
    positions = batch.supervised[0].nonzero().squeeze(1)[:MAX_POSITIONS]
    if positions.numel() == 0:
        raise VlmtuneError(
            "a sample to compare on has no answer",
            at=sample.source,
            expected="an assistant turn",
        )
    return Probe(sample.id, batch.inputs, positions)


FLOAT32_ERROR = 1e-4
"""Of a logit, relative to the largest one (1 where that is smaller)."""


def require(
    logits: list[Tensor], reference: Reference, *, what: str, blame: Callable[[], str]
) -> MergeReport:
    """The report on `logits`; raises MergeFailed unless they are base + adapter's.

    `blame()` names the weight at fault; it is asked only then.
    """
    report = report_on(logits, reference)
    if report.max_difference > report.tolerance:
        raise MergeFailed(
            f"{what} does not answer as base + adapter: logits differ by "
            f"{report.max_difference:.3g} in sample {report.worst_sample}, position "
            f"{report.worst_position}" + blame(),
            report,
            expected=f"at most {report.tolerance:.3g}",
        )
    if not report.verified:
        raise MergeFailed(
            f"{what} is not nearer to base + adapter than to the base alone: rounding to "
            f"{report.dtype} loses the adapter",
            report,
            got=f"logits off by {report.max_difference:.3g}, where the adapter moves them by "
            f"{report.adapter_effect:.3g}",
            do="merge with --dtype float32",
        )
    return report


def report_on(logits: list[Tensor], reference: Reference) -> MergeReport:
    """How far `logits` are from base + adapter's; verified if they are near enough, and nearer than
    the base alone."""
    probes, adapted, base = reference.probes, reference.adapted, reference.base
    worst, sample, position = largest_difference(logits, adapted, probes)
    effect, is_lost = None, False
    if base is not None:
        effect = largest_difference(base, adapted, probes)[0]
        is_lost = effect > float32_tolerance(adapted) and (
            _mean_difference(logits, adapted) >= 0.5 * _mean_difference(base, adapted)
        )
    same = [a.argmax(1) == b.argmax(1) for a, b in zip(logits, adapted, strict=True)]
    return MergeReport(
        output="",
        verified=worst <= reference.tolerance and not is_lost,
        max_difference=worst,
        tolerance=reference.tolerance,
        dtype=str(reference.dtype).removeprefix("torch."),
        rounding=reference.rounding,
        adapter_effect=effect,
        same_tokens_fraction=float(torch.cat(same).float().mean()),
        num_samples=len(probes),
        num_positions=sum(p.positions.numel() for p in probes),
        worst_sample=sample,
        worst_position=position,
        peak_memory_bytes=peak_memory_bytes(),
    )


def largest_difference(
    first: Sequence[Tensor], second: Sequence[Tensor], probes: Sequence[Probe]
) -> tuple[float, str, int]:
    """The largest difference of two sets of logits, its sample and its position there; a NaN counts
    as infinitely far."""
    worst = (-1.0, "", 0)
    for a, b, probe in zip(first, second, probes, strict=True):
        gaps = (a - b).abs().amax(dim=1).nan_to_num(nan=float("inf"))  # (K,)
        at = int(gaps.argmax())
        if float(gaps[at]) > worst[0]:
            worst = (float(gaps[at]), probe.id, int(probe.positions[at]))
    return worst


def _mean_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    gaps = [(a - b).abs().flatten() for a, b in zip(first, second, strict=True)]
    return float(torch.cat(gaps).mean())


def float32_tolerance(logits: Sequence[Tensor]) -> float:
    """What two orders of the same float32 sums may differ by, for logits of this size."""
    return FLOAT32_ERROR * max(1.0, max(float(x.abs().max()) for x in logits))


def peak_memory_bytes() -> int:
    """The most memory that this process ever had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and how far its logits are from base + adapter (largest over all).

    `rounding` is the part that the checkpoint's dtype explains, `adapter_effect` how far the base
    alone is away (None for a run without an adapter), `same_tokens_fraction` of the compared
    positions have the same most likely token. `peak_memory_bytes`: the most that the process ever
    had resident, libraries included.
    """

    output: str
    verified: bool
    max_difference: float
    tolerance: float
    dtype: str
    rounding: float
    adapter_effect: float | None
    same_tokens_fraction: float
    num_samples: int
    num_positions: int
    worst_sample: str
    worst_position: int
    peak_memory_bytes: int


class MergeFailed(CheckFailed):
    """The merged model is not base + adapter; nothing was left at the output. Exits 1."""

    def __init__(self, message: str, report: MergeReport, **details: Any) -> None:
        super().__init__(message, **details)
        self.report = report


@dataclass(frozen=True)
class Reference:
    """Logits to hold the checkpoint against; each list has a (K, V) tensor per probe."""

    dtype: torch.dtype
    probes: list[Probe]
    adapted: list[Tensor]
    base: list[Tensor] | None
    rounding: float
    tolerance: float


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


def tensor_errors(merged: LazyModel, folding: Folding, plan: OutputPlan) -> Iterator[TensorError]:
    """One for each tensor that was copied, by its key, and each weight that was changed, by its
    name in the model."""
    for key in plan.tensors.keys() - plan.names_of.keys():
        expected = read_tensor(folding.base_model.stored[key])
        yield error_of(key, read_tensor(merged.stored[key]), expected, is_exact=True)
    for name in {name for names in plan.names_of.values() for name in names}:
        value = folding.expected(name)
        if value is not None:
            is_exact = folding.is_saved(name) or name not in folding.changed
            written = read_tensor(merged.weights[name])
            yield error_of(name, written.to(plan.dtype_of[name]), value, is_exact=is_exact)


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
