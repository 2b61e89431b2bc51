"""Samples that a merged checkpoint and base + adapter are compared on.

Letters: K compared positions of a sample, V vocabulary.
"""

from __future__ import annotations

import base64
import inspect
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor, nn

from vlmtune.data.collate import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.source import access_of, all_rows, load_conversations
from vlmtune.data.types import LOCAL, Conversation, Image, Part, Sample, Source, Text, Turn
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.models.forward import base_of, full_logits
from vlmtune.models.load import VLM
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
        access = LOCAL if recipe is None else access_of(recipe.data)
        conversations, _ = load_conversations(data, access=access)
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
            rows = all_rows(files or [], access=access_of(recipe.data))
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
    tokenizer = vlm.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = collate([sample], pad_token_id=pad, media_layout=vlm.family.media_layout)
    positions = batch.supervised[0].nonzero().squeeze(1)[:MAX_POSITIONS]
    if positions.numel() == 0:
        raise VlmtuneError(
            "a sample to compare on has no answer",
            file=sample.source.file,
            line=sample.source.line,
            expected="an assistant turn",
        )
    return Probe(sample.id, batch.inputs, positions)
