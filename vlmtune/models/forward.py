"""The one place that calls the model in training: logits at supervised positions only.

    inputs (B, T) -> backbone -> hidden states (B, T, D) -> rows that are supervised (S, D)
                  -> lm_head, cross-entropy, some rows at a time -> summed loss

The full (B, T, V) tensor, the largest of a step with a large vocabulary, is never made. Letters:
B rows, T tokens of the longest row, S supervised tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from vlmtune.data.types import Batch
from vlmtune.errors import VlmtuneError
from vlmtune.models.family import Family, part_of
from vlmtune.models.loss import chunk_rows_of, chunked_cross_entropy
from vlmtune.models.packed import pack_arguments

if TYPE_CHECKING:
    from vlmtune.models.vision_features import VisionFeatures

MEDIA_PARTS = ("vision", "connector")


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_name(name: str) -> str:
    """A parameter's name in the transformers model, from its name in a PEFT wrapper."""
    return name.removeprefix("base_model.model.")


class SupervisedForward(nn.Module):
    """The trained model behind `forward(batch) -> loss`: the sum of the supervised tokens'
    cross-entropies, each counting by its weight, in nats, float32.

    A micro-batch without a picture leaves the vision part out of the graph; its trained tensors
    then enter with weight zero, so that every process sends the same gradients (DDP would wait for
    the missing ones for ever).

    `features`: what makes the features of pictures where the vision tower is frozen; None: the
    model itself, in each forward pass.
    """

    def __init__(
        self, model: nn.Module, family: Family, features: VisionFeatures | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.features = features
        base = base_of(model)
        for name in ("model", "lm_head"):
            if not hasattr(base, name):
                raise VlmtuneError(
                    f"the model class {type(base).__name__} has no `{name}`",
                    expected="a transformers …ForConditionalGeneration with `model` and `lm_head`",
                )
        self._media_names = trained_media_names(base, family)
        self._vocabulary = int(base.config.get_text_config().vocab_size)

    def forward(self, batch: Batch) -> Tensor:
        base = base_of(self.model)
        loss = chunked_cross_entropy(
            base.lm_head,
            self._hidden(batch),
            batch.targets,
            batch.weights,
            chunk_rows=chunk_rows_of(self._vocabulary, batch.targets.device.type),
        )
        if self._media_names and not has_media(batch.inputs):
            loss = loss + media_zero(base, self._media_names)
        return loss

    def logits(self, batch: Batch) -> Tensor:
        """The logits (S, V), float32, at the supervised positions."""
        return base_of(self.model).lm_head(self._hidden(batch)).float()

    def _hidden(self, batch: Batch) -> Tensor:
        """The last hidden states (S, D) at the supervised positions."""
        base = base_of(self.model)
        arguments: dict[str, Any] = dict(batch.inputs)
        if self.features is not None and has_media(batch.inputs):
            made, arguments = self.features.outputs(batch.inputs, batch.media_keys)
            arguments["mm_encoder_outputs"] = made
        if batch.lengths is not None:
            arguments |= pack_arguments(base.model, batch.inputs, batch.lengths, self.family)
        # use_cache=False: with a cache, packed or padded rows are not isolated (and it costs).
        hidden = base.model(**arguments, use_cache=False).last_hidden_state  # (B, T, D)
        assert batch.positions is not None
        return hidden.flatten(0, 1).index_select(0, batch.positions)


def trained_media_names(base: nn.Module, family: Family) -> list[str]:
    """The trained tensors of the vision tower and the connector, by name."""
    return [
        name
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and part_of(name, family) in MEDIA_PARTS
    ]


def media_zero(base: nn.Module, names: Sequence[str]) -> Tensor:
    """0, as a function of the tensors called `names`: they stay in the graph."""
    tensors = [base.get_parameter(name) for name in names]
    return torch.stack([t.flatten()[0].float() for t in tensors]).sum() * 0.0


def has_media(inputs: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("pixel_values") for name in inputs)


def full_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's own logits at every position, (B, T, V): the reference `SupervisedForward` is
    held against before training and in tests."""
    return base_of(model)(**inputs, use_cache=False).logits.float()


def set_gradient_checkpointing(model: nn.Module, family: Family) -> list[str]:
    """Switch on non-reentrant activation checkpointing in the parts that train; returns them.

    A frozen vision tower is left out: it keeps no activations for a backward pass, so recomputing
    it would cost time and save nothing. No hook makes embeddings ask for gradients: the
    non-reentrant kind needs none, and a frozen tower would record its graph.
    """
    base = base_of(model)
    trained = {part_of(n, family) for n, p in base.named_parameters() if p.requires_grad}
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()
    parts = {"language"}
    if trained & set(MEDIA_PARTS):
        parts |= {"vision", "connector"}
    switched = set()
    for name, module in base.named_modules():
        if not hasattr(module, "gradient_checkpointing"):
            continue
        part = part_of(name, family)
        if part in MEDIA_PARTS and part not in parts:
            module.gradient_checkpointing = False
        elif part is not None:
            switched.add(part)
    return sorted(switched)
