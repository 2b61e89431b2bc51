"""The processor of a model, with the recipe's pixel budget set, read back and ready to be saved.

The budget is the image processor's own `size` (areas in pixels), so that `save_pretrained` writes
it and serving shrinks a picture exactly as training did.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoProcessor, ProcessorMixin
from transformers.image_utils import SizeDict

from vlmtune.errors import VlmtuneError
from vlmtune.models.families.registry import FAMILIES
from vlmtune.models.source import check_source, explained, quiet_transformers

if TYPE_CHECKING:
    from vlmtune.recipe.data_section import ImageSection

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def load_processor(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    image: ImageSection | None = None,
) -> ProcessorMixin:
    """The processor (tokenizer, image processor, chat template) of a hub id or folder.

    Raises VlmtuneError where files are missing or the pixel budget cannot be applied.
    """
    if not Path(source).is_dir():  # an adapter's folder has a processor and no config.json
        check_source(source)
    _check_tokenizer_files(source)
    try:
        with quiet_transformers():
            processor = AutoProcessor.from_pretrained(
                source, revision=revision, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise explained(
            error,
            source,
            what="the processor cannot be loaded",
            do="copy the processor's files (preprocessor_config.json or processor_config.json, "
            "the tokenizer and the chat template) of the original model beside the weights",
        ) from error
    _check_complete(processor, source)
    if image is not None:
        set_pixel_budget(processor, min_pixels=image.min_pixels, max_pixels=image.max_pixels)
    return processor


def pixel_budget(processor: ProcessorMixin) -> tuple[int, int] | None:
    """Smallest and largest area of a picture in pixels, or None where areas are not limited."""
    size = _area_size(processor)
    return None if size is None else (size["shortest_edge"], size["longest_edge"])


def set_pixel_budget(
    processor: ProcessorMixin, *, min_pixels: int | None, max_pixels: int | None
) -> None:
    """Set the areas between which pictures are resized, in pixels; None keeps the processor's own.

    Raises VlmtuneError for a processor that does not size pictures by area, and where the two
    cross.
    """
    if min_pixels is None and max_pixels is None:
        return
    own = pixel_budget(processor)
    if own is None:
        families = sorted({f.name for f in FAMILIES.values() if f.pixel_budget})
        raise VlmtuneError(
            f"image.min_pixels and image.max_pixels have no effect on a "
            f"{type(processor.image_processor).__name__}",
            expected="a processor that sizes pictures by area: " + ", ".join(families),
            do="remove the image section",
        )
    low = own[0] if min_pixels is None else min_pixels
    high = own[1] if max_pixels is None else max_pixels
    if low > high:
        raise VlmtuneError(
            "the pixel budget is empty: min_pixels is above max_pixels",
            got=f"min_pixels {low}, max_pixels {high}"
            + (" (the processor's own)" if max_pixels is None or min_pixels is None else ""),
            do="set both image.min_pixels and image.max_pixels",
        )
    # The names are historical: for these processors the "edges" are areas.
    processor.image_processor.size = SizeDict(shortest_edge=low, longest_edge=high)
    assert pixel_budget(processor) == (low, high), "the image processor ignored its size"


def _area_size(processor: ProcessorMixin) -> dict[str, int] | None:
    """The image processor's `size` as it would be saved, if it means areas."""
    image_processor = processor.image_processor
    # CLIP's and Idefics' sizes have the same keys and mean lengths; only a processor that also
    # knows the (older) pixel arguments takes areas.
    if not {"min_pixels", "max_pixels"} <= set(image_processor.valid_kwargs.__annotations__):
        return None
    size = image_processor.to_dict()["size"]
    return size if {"shortest_edge", "longest_edge"} <= set(size) else None


def _check_tokenizer_files(source: str) -> None:
    # Without them transformers makes an empty tokenizer in silence.
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise VlmtuneError(
            "the folder has no tokenizer",
            file=source,
            expected="one of " + ", ".join(TOKENIZER_FILES),
            do="copy the tokenizer's files of the original model into it",
        )


def _check_complete(processor: object, source: str) -> None:
    for what in ("image_processor", "tokenizer"):
        if not hasattr(processor, what):
            raise VlmtuneError(
                f"no {what.replace('_', ' ')} in the processor of {source}",
                got=f"a {type(processor).__name__}",
                do="use a model for pictures and text, with all its processor files",
            )
    assert isinstance(processor, ProcessorMixin)
    if processor.chat_template is None:
        # Older checkpoints keep it with the tokenizer only.
        processor.chat_template = processor.tokenizer.chat_template
    if processor.chat_template is None:
        raise VlmtuneError(
            f"{source} has no chat template",
            expected="chat_template.jinja, chat_template.json or one in tokenizer_config.json",
            do="use the instruction-tuned model, or copy its chat template beside the tokenizer",
        )


def pad_token_id(processor: ProcessorMixin) -> int:
    """The tokenizer's padding token, or its end token where it has none; padding is masked."""
    tokenizer = processor.tokenizer
    chosen = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return int(chosen)
