"""A base model in 4 bit (NF4) or 8 bit (LLM.int8()): asked for, then read back off the model.

    skip (parts, groups, paths) --expand_skip--> full module paths --> BitsAndBytesConfig
    loaded model --check_quantization--> every linear layer has the bits it should have

transformers matches skip patterns from the start of the full module path or as its end, reports
none that match nothing, and drops its own default (`lm_head`) when a list is given. So patterns
are full paths here, every entry must match, and the result is checked.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from vlmtune.errors import VlmtuneError, nearest, plural
from vlmtune.models.families import Family, lies_under, part_of
from vlmtune.models.targets import (
    GROUPS,
    group_paths,
    has_tied_embeddings,
    linear_modules,
    lm_head_path,
)
from vlmtune.recipe.schema import QuantizationSection

logger = logging.getLogger("vlmtune")


@dataclass(frozen=True)
class BitsRow:
    """Linear layers of one part, by the width of their weights."""

    part: str
    linear_4bit: int
    linear_8bit: int
    linear_16bit: int


def bits_of(module: nn.Module) -> int:
    """Bits of a module's own weights: 4, 8, or 16 where they are not quantised (float32 too)."""
    if isinstance(module, bnb.nn.Linear4bit):
        return 4
    if isinstance(module, bnb.nn.Linear8bitLt):
        return 8
    return 16


def expand_skip(model: nn.Module, skip: Sequence[str], *, family: Family) -> list[str]:
    """The full paths that `skip` keeps in 16 bit: prefixes that cover exactly what was named.

    `model` may be on the meta device. An entry is a part, a group of linear layers
    (`vision.attn`), or a full module path.

    Raises VlmtuneError for an entry that matches no linear layer.
    """
    linear = list(linear_modules(model))
    paths: list[str] = []
    for entry in skip:
        if entry in family.parts:
            matched = [p for p in linear if part_of(p, family) == entry]
        elif entry in GROUPS:
            matched = group_paths(entry, linear=linear, family=family)
        else:
            matched = [p for p in linear if lies_under(p, entry)]
        if not matched:
            known = [*family.parts, *GROUPS, *(path for path, _ in model.named_modules() if path)]
            close = nearest(entry, known)
            raise VlmtuneError(
                f"quantization.skip: {entry!r} matches no linear layer",
                expected=f"a part ({', '.join(family.parts)}), a group ({', '.join(GROUPS)}) or a "
                "full module path" + (f"; did you mean {close!r}?" if close else ""),
            )
        paths.extend(p for p in matched if p not in paths)
    return paths


def quantization_config(
    bit: int, section: QuantizationSection, *, skip_paths: Sequence[str]
) -> BitsAndBytesConfig:
    """The bitsandbytes config for 4 or 8 bit, read back argument by argument.

    `BitsAndBytesConfig` swallows arguments that it does not know; one that upstream renamed would
    silently fall back to its default.
    """
    wanted: dict[str, object] = {"llm_int8_skip_modules": list(skip_paths)}
    if bit == 4:
        wanted |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": section.double_quant,
            "bnb_4bit_compute_dtype": getattr(torch, section.compute_dtype),
        }
    else:
        wanted["load_in_8bit"] = True
    config = BitsAndBytesConfig(**wanted)
    for name, value in wanted.items():
        assert getattr(config, name) == value, f"bitsandbytes config ignored {name}"
    return config


def check_skip_leaves_head(model: nn.Module, skip_paths: Sequence[str]) -> None:
    """Raise VlmtuneError where a tied `lm_head` would be quantised: the embeddings cannot be."""
    if not has_tied_embeddings(model):
        return
    head = lm_head_path(model)
    if head not in skip_paths:
        raise VlmtuneError(
            f"quantization.skip: {head} shares its weight with the embeddings of this model, which "
            "cannot be quantised",
            got=f"a skip list without {head}",
            do="add lm_head to quantization.skip",
        )


def finish_quantized(model: nn.Module) -> None:
    """Settings on the loaded layers that have no argument at load time.

    On a CPU with bf16 instructions, NF4's eval forward repacks the weight for a kernel of its own.
    That one computes in bfloat16 whatever `compute_dtype` says, has no gradient (the look before
    training needs one), and fails where `in_features` is not a multiple of 64: it is not used.
    LLM.int8() logs its cast to float16 once per product; it is said once, here.
    """
    num_8bit = 0
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
        num_8bit += bits_of(module) == 8
    if num_8bit:
        logger.info("%d 8-bit layers compute in int8 and float16", num_8bit)
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def check_quantization(
    model: nn.Module, bit: int, section: QuantizationSection, *, skip_paths: Sequence[str]
) -> None:
    """Read off the loaded model that every linear layer has the bits and settings asked for.

    Raises VlmtuneError naming the first layers that differ.
    """
    wrong = []
    for path, module in linear_modules(model).items():
        expected = 16 if path in skip_paths else bit
        if bits_of(module) != expected:
            wrong.append(f"{path} ({bits_of(module)} bit, expected {expected})")
        elif isinstance(module, bnb.nn.Linear4bit):
            settings = _wrong_settings(module, section)
            if settings:
                wrong.append(f"{path} ({', '.join(settings)})")
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise VlmtuneError(
            f"{plural(len(wrong), 'linear layer was', 'linear layers were')} not quantised as the "
            f"recipe says: {shown}",
            do="this model's class keeps or converts layers on its own: name those that stay in 16 "
            "bit in quantization.skip, or set quantization_bit: 16",
        )


def quantization_report(model: nn.Module, family: Family) -> list[BitsRow]:
    """Linear layers per part and width, counted by their classes on the built model."""
    counts: dict[str, dict[int, int]] = {}
    for path, module in linear_modules(model).items():
        part = part_of(path, family) or "other"
        widths = counts.setdefault(part, {4: 0, 8: 0, 16: 0})
        widths[bits_of(module)] += 1
    return [
        BitsRow(part, linear_4bit=c[4], linear_8bit=c[8], linear_16bit=c[16])
        for part, c in counts.items()
    ]


def _wrong_settings(module: bnb.nn.Linear4bit, section: QuantizationSection) -> list[str]:
    weight = cast(bnb.nn.Params4bit, module.weight)
    wrong = []
    if weight.quant_type != "nf4":
        wrong.append(f"quantised as {weight.quant_type}, expected nf4")
    if weight.compress_statistics != section.double_quant:
        wrong.append(f"double quantisation is {weight.compress_statistics}")
    if module.compute_dtype != getattr(torch, section.compute_dtype):
        wrong.append(f"computes in {module.compute_dtype}, expected {section.compute_dtype}")
    return wrong


def base_weight(layer: nn.Linear) -> Tensor:
    """The weight (O, I) of a linear layer, dequantised where it is quantised: that of PEFT's
    `dequantize_module_weight`, which on a CPU leaves an 8-bit layer unusable."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return dequantize_4bit(layer.weight.data, _quant_state(layer))
    if isinstance(layer, bnb.nn.Linear8bitLt):
        weight = cast(bnb.nn.Int8Params, layer.weight)
        # The scales move from the weight to the state in the first forward pass.
        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        assert scales is not None
        return int8_vectorwise_dequant(weight.data, scales)
    return layer.weight


def _quant_state(layer: bnb.nn.Linear4bit) -> QuantState:
    state = cast(bnb.nn.Params4bit, layer.weight).quant_state
    assert state is not None, "the layer is quantised when it is loaded"
    return state
