"""Prompts side by side as the model's inputs; several questions on one picture share its features.

    prompts -> left-padded inputs -> pictures known by their pixels? -> kept features  --+
                                     else the tower, one picture at a time -> kept  -----+-> model

Features are kept for one evaluation: while it runs no weight changes, so this holds where the
vision tower trains too. What was used longest ago gives way; prompts in an order that keeps the
questions on a picture together (`evaluation_order`) need little room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmtune.data.batches import collate_prompts
from vlmtune.data.processing import media_keys_of
from vlmtune.data.types import Sample
from vlmtune.models.forward import base_of, has_media
from vlmtune.models.load import VLM, pad_token_id
from vlmtune.models.vision import VisionFeatures
from vlmtune.models.vision_cache import FeatureCache, open_memory_store

MAX_BYTES = 2**30
SIMILAR = 1.1
"""Prompts whose lengths differ by less than this factor may lie side by side."""


def prompt_inputs(vlm: VLM, prompts: Sequence[Sample]) -> dict[str, Tensor]:
    """The left-padded batch of `prompts` as keyword arguments for `generate`, on the model's
    device."""
    inputs = collate_prompts(
        prompts,
        pad_token_id=pad_token_id(vlm.processor),
        image_batching=vlm.family.image_batching,
    )
    device = next(vlm.model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def evaluation_order(prompt: Sample) -> tuple[int, tuple[str, ...], int]:
    """Sorts prompts longest first, and those of about one length by their pictures."""
    return -int(math.log(prompt.num_tokens, SIMILAR)), prompt.media_keys, -prompt.num_tokens


class SharedPictures:
    """The inputs of prompts, with the features of pictures and videos in place of their pixels
    where the family takes them. The weights must not change while it is used.

    Where no picture has been seen twice, a batch's pixels go to the model as they are: a tower may
    be faster with several pictures at a time.
    """

    def __init__(self, vlm: VLM, *, max_bytes: int = MAX_BYTES) -> None:
        self._vlm = vlm
        self._features = None
        if vlm.family.supports_precomputed_features:
            cache = FeatureCache([open_memory_store(max_bytes, drops_oldest=True)])
            base = base_of(vlm.model)
            self._features = VisionFeatures(base, vlm.family, cache, level="features")
        self._is_repeated = False

    def with_keys(self, prompts: Sequence[Sample]) -> list[Sample]:
        """`prompts` that `inputs` will be asked for, with the keys of their pictures."""
        if self._features is None:
            return list(prompts)
        layout = self._vlm.family.image_batching
        keyed = [replace(p, media_keys=media_keys_of(p.media, layout)) for p in prompts]
        keys = [key for prompt in keyed for key in prompt.media_keys]
        self._is_repeated |= len(set(keys)) < len(keys)
        return keyed

    def inputs(self, prompts: Sequence[Sample]) -> dict[str, Any]:
        """What `prompt_inputs` gives, or its like with `mm_encoder_outputs` for the pixels."""
        inputs = prompt_inputs(self._vlm, prompts)
        is_shared = self._is_repeated or len(prompts) == 1
        if self._features is None or not is_shared or not has_media(inputs):
            return inputs
        keys = [key for prompt in prompts for key in prompt.media_keys]
        outputs, others = self._features.outputs(inputs, keys)
        return {**others, "mm_encoder_outputs": outputs}
