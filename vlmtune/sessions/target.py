"""TARGET of `eval` and `chat`: how it is opened, and what it may be shown."""

from __future__ import annotations

import logging

import torch

from vlmtune.data.encode import Encoder, encoder_for
from vlmtune.models.load import pixel_budget
from vlmtune.models.open import OpenTarget, open_target
from vlmtune.models.precision import inference_dtype
from vlmtune.recipe.data_section import DataSection

logger = logging.getLogger("vlmtune")


def open_for_answers(
    target: str,
    *,
    dtype: str,
    quantization_bit: int | None,
    trust_remote_code: bool,
    device: torch.device | None = None,
) -> OpenTarget:
    """Open TARGET for generation; a warning where its pixel budget is not the recipe's.

    Raises VlmtuneError where it cannot be opened.
    """
    opened = open_target(
        target,
        dtype=inference_dtype(dtype),
        device=device,
        quantization_bit=quantization_bit,
        trust_remote_code=trust_remote_code,
    )
    _compare_budgets(opened)
    return opened


def answering_encoder(opened: OpenTarget) -> Encoder:
    """An encoder that limits nothing but what the model and the picture decoder can take.

    Pictures and texts are cut down as in training where the recipe cuts; a sample that training
    would only drop is answered.
    """
    recipe = opened.recipe
    if recipe is not None and recipe.data.over_length in ("shrink_images", "trim_text"):
        return encoder_for(recipe, opened.vlm.processor)
    return Encoder(
        opened.vlm.processor,
        max_tokens=_context_length(opened),
        over_length="error",
        max_image_pixels=max_image_pixels(opened),
        video=None if recipe is None else recipe.video,
    )


def max_image_pixels(opened: OpenTarget) -> int:
    """The run's limit on a picture's pixels before decoding, or the schema's default."""
    if opened.recipe is not None:
        return opened.recipe.data.max_image_pixels
    return int(DataSection.model_fields["max_image_pixels"].default)


def _context_length(opened: OpenTarget) -> int:
    text_config = opened.vlm.model.config.get_text_config()
    return int(text_config.max_position_embeddings)


def _compare_budgets(opened: OpenTarget) -> None:
    """Warn where the processor that was loaded sizes pictures otherwise than in training."""
    if opened.recipe is None:
        return
    used = pixel_budget(opened.vlm.processor)
    image = opened.recipe.image
    for index, (key, trained) in enumerate(
        (("min_pixels", image.min_pixels), ("max_pixels", image.max_pixels))
    ):
        if trained is not None and (used is None or used[index] != trained):
            logger.warning(
                "pictures are not sized as in training: image.%s is %s in the run's recipe, %s in "
                "its processor",
                key,
                trained,
                None if used is None else used[index],
            )
