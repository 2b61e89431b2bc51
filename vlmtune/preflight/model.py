"""What would be loaded and trained, on the meta device: paths and shapes, no weight.

config -> model on meta -> family, parts -> quantised layers -> adapter, as training builds it
folder -> weight files: there, whole, by their headers
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from vlmtune.errors import VlmtuneError
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.models.families import Family, family_for, lies_under, part_of
from vlmtune.models.forward import base_name
from vlmtune.models.load import VLM, build_on_meta, commit_of, read_config
from vlmtune.models.quantize import check_skip_leaves_head, expand_skip
from vlmtune.models.targets import TrainedRow, linear_modules, resolve_modules_to_save, trained_rows
from vlmtune.recipe.schema import Recipe

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

_NUMBERED = re.compile(r".*?\.\d+(?=\.)")
"""A module path up to its first number: the layer that it lies in."""


@dataclass(frozen=True)
class Tower:
    """The layers of a part that stand one on the other: how many, how wide the token is between
    them, and the inputs and outputs of a layer's linear modules together, in numbers a token."""

    layers: int
    width: int
    linear_numbers: int


@dataclass(frozen=True)
class MetaModel:
    """A model without weights. `quantized` are the paths of the linear layers that would be,
    `largest_quantized` the numbers in the largest of their weights."""

    model: PreTrainedModel
    family: Family
    commit: str | None
    towers: dict[str, Tower]
    vocabulary: int
    quantized: frozenset[str]
    largest_quantized: int


@dataclass(frozen=True)
class PartCount:
    """Numbers of a part: of the base model, those of them in quantised layers, and trained ones
    (an adapter's included)."""

    parameters: int
    quantized_parameters: int
    trainable_parameters: int


@dataclass(frozen=True)
class Trained:
    """What the recipe trains. `in_full`: parameters of the base itself, kept in float32."""

    method: str
    rows: list[TrainedRow]
    parts: dict[str, PartCount]
    sizes: list[int]
    in_full: int

    @property
    def trainable_parameters(self) -> int:
        return sum(self.sizes)


def open_on_meta(recipe: Recipe) -> MetaModel:
    """The recipe's model on the meta device. Raises VlmtuneError as loading it would, as far as
    its config and the recipe go."""
    config = read_config(
        recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
    )
    model = build_on_meta(config, trust_remote_code=recipe.trust_remote_code)
    parts = None if recipe.parts is None else {str(k): v for k, v in recipe.parts.items()}
    family = family_for(config.model_type, parts=parts, model=model)
    quantized: frozenset[str] = frozenset()
    if recipe.quantization_bit != 16:
        skipped = expand_skip(model, recipe.quantization.skip, family=family)
        check_skip_leaves_head(model, skipped)
        quantized = frozenset(linear_modules(model)) - set(skipped)
    linear = linear_modules(model)
    return MetaModel(
        model=model,
        family=family,
        commit=commit_of(config),
        towers={part: _tower(part, linear, family) for part in family.parts},
        vocabulary=int(model.get_output_embeddings().weight.shape[0]),
        quantized=quantized,
        largest_quantized=max((linear[path].weight.numel() for path in quantized), default=0),
    )


def check_weight_files(source: str) -> int | None:
    """The bytes of a model folder's weight files; None for a hub id. Raises VlmtuneError where
    one is missing or cut off."""
    folder = Path(source)
    if not folder.is_dir():
        return None
    total = 0
    for name in _weight_names(folder):
        path = folder / name
        if not path.is_file():
            raise VlmtuneError(
                "a weight file is missing",
                file=path,
                do="copy it from the original model, or run save_pretrained again",
            )
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise VlmtuneError(
                f"a weight file is damaged ({error})", file=path, do="copy or download it again"
            ) from error
        total += path.stat().st_size
    return total


def trained_by(
    meta: MetaModel, recipe: Recipe, *, processor: ProcessorMixin, total_steps: int
) -> Trained:
    """What training would train, built as it builds it. Changes `meta.model`: call it once.

    Raises VlmtuneError for targets, modules or a schedule that cannot be.
    """
    _refuse_quantized(meta, recipe)
    counts = _base_counts(meta)
    vlm = VLM(meta.model, processor, meta.family, recipe.model, meta.commit)
    adapter = build_adapter(vlm, recipe, total_steps=total_steps)
    trained = {n: p.numel() for n, p in adapter.model.named_parameters() if p.requires_grad}
    parts: Counter[str] = Counter()
    for name, size in trained.items():
        parts[part_of(base_name(name), meta.family) or "language"] += size
    rows = trained_rows(adapter.model, meta.family)
    return Trained(
        method=adapter.name,
        rows=rows,
        parts={
            part: PartCount(total, quantized, parts[part])
            for part, (total, quantized) in counts.items()
        },
        sizes=list(trained.values()),
        in_full=sum(row.trainable_parameters for row in rows if row.rank is None),
    )


def _weight_names(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise VlmtuneError("the index of the weight files cannot be read", file=index) from error
    return sorted({str(name) for name in names})


def _refuse_quantized(meta: MetaModel, recipe: Recipe) -> None:
    """As `plan_modules` does on the loaded model, where layers show that they are quantised."""
    if not meta.quantized or not recipe.lora_target:
        return
    saved = resolve_modules_to_save(meta.model, recipe.modules_to_save, family=meta.family)
    for path in saved:
        found = next((q for q in sorted(meta.quantized) if lies_under(q, path)), None)
        if found is not None:
            raise VlmtuneError(
                f"modules_to_save: {found} is quantised and cannot be trained in full",
                got=f"{recipe.quantization_bit}-bit weights",
                expected="16-bit weights",
                do=f"add {path} (or its part) to quantization.skip",
            )


def _base_counts(meta: MetaModel) -> dict[str, tuple[int, int]]:
    totals: Counter[str] = Counter()
    quantized: Counter[str] = Counter()
    for name, parameter in meta.model.named_parameters():
        part = part_of(name, meta.family) or "language"
        totals[part] += parameter.numel()
        if name.removesuffix(".weight") in meta.quantized:
            quantized[part] += parameter.numel()
    return {part: (totals[part], quantized[part]) for part in totals}


def _tower(part: str, linear: Mapping[str, nn.Linear], family: Family) -> Tower:
    layers: dict[str, list[nn.Linear]] = {}
    for path, module in linear.items():
        numbered = _NUMBERED.match(path)
        if numbered is not None and part_of(path, family) == part:
            layers.setdefault(numbered.group(), []).append(module)
    if not layers:
        return Tower(0, 0, 0)
    sums = [sum(m.in_features + m.out_features for m in layer) for layer in layers.values()]
    first = next(iter(layers.values()))
    return Tower(len(layers), first[0].in_features, max(sums))
