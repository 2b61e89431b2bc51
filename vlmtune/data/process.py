"""One call of the processor: token ids and media of a rendered text, and where each token stands.

T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch

from vlmtune.data.alignment import Alignment, align_by_characters, align_by_tokens
from vlmtune.data.video import Clip
from vlmtune.errors import VlmtuneError

_NO_INPUT = {"input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets", "labels"}


class ProcessError(VlmtuneError):
    """The processor refuses the sample, or what it gives cannot be used; without a place."""


@dataclass(frozen=True)
class Processed:
    """`token_fields` are integers of shape (T,), `media` tensors of whatever shape."""

    input_ids: torch.Tensor  # (T,) int64
    token_fields: dict[str, torch.Tensor]
    media: dict[str, torch.Tensor]
    alignment: Alignment


def process(
    processor: Any,
    text: str,
    *,
    pictures: Sequence[PIL.Image.Image] = (),
    clips: Sequence[Clip] = (),
    scale: float = 1.0,
) -> Processed:
    """What `processor` makes of a rendered text with its pictures and videos, whose sides are
    scaled by `scale` first. Raises ProcessError."""
    options: dict[str, Any] = {}
    if "mm_token_type_ids" in processor.model_input_names:
        options["return_mm_token_type_ids"] = True
    if pictures:
        options["images"] = [_scaled(picture, scale) for picture in pictures]
        options.update(_scaled_size(processor, scale))
    if clips:
        options["videos"] = [[_scaled(frame, scale) for frame in clip.frames] for clip in clips]
        options["video_metadata"] = [clip.metadata() for clip in clips]
        options["do_sample_frames"] = False
    try:
        output = processor(
            text=[text],
            return_tensors="pt",
            add_special_tokens=adds_special_tokens(processor.tokenizer, text),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            **options,
        )
    except ValueError as error:
        raise ProcessError(f"the processor refuses the sample ({error})") from error
    input_ids = output["input_ids"][0].to(torch.int64)
    token_fields, media = _sorted(output, length=int(input_ids.shape[0]))
    return Processed(input_ids, token_fields, media, _alignment(processor, text, output))


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """A template that writes the BOS token itself must not get a second one."""
    bos = tokenizer.bos_token
    return bos is None or not text.startswith(bos)


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a rendered text and the characters of each."""
    encoded = tokenizer(
        text,
        add_special_tokens=adds_special_tokens(tokenizer, text),
        return_offsets_mapping=True,
        verbose=False,
    )
    return encoded["input_ids"], encoded["offset_mapping"]


def _alignment(processor: Any, text: str, output: Any) -> Alignment:
    if "text_replacement_offsets" in output:
        replacements = output["text_replacement_offsets"]
        written = [(int(a), int(b)) for a, b in output["offset_mapping"][0].tolist()]
        return align_by_characters(written, replacements[0] if len(replacements) else [])
    plain, offsets = tokenize(processor.tokenizer, text)
    image_id = int(processor.tokenizer.convert_tokens_to_ids(processor.image_token))
    processed = output["input_ids"][0].tolist()
    found = align_by_tokens(plain, offsets, processed, image_id, text=text)
    if found is None:
        raise ProcessError(
            "the processor and its tokenizer do not agree on the text",
            expected="the same tokens outside the pictures",
        )
    return found


def _sorted(output: Any, *, length: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The fields of one integer a token, (T,), and everything else."""
    token_fields, media = {}, {}
    for name, value in output.items():
        if name in _NO_INPUT:
            continue
        if not isinstance(value, torch.Tensor):
            raise ProcessError(
                f"the processor gives {name}, which is no tensor", got=type(value).__name__
            )
        if tuple(value.shape) == (1, length) and not value.is_floating_point():
            token_fields[name] = value[0].to(torch.int64)
        else:
            media[name] = value
    return token_fields, media


def _scaled(picture: PIL.Image.Image, scale: float) -> PIL.Image.Image:
    if scale == 1.0:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), PIL.Image.Resampling.LANCZOS)


def _scaled_size(processor: Any, scale: float) -> dict[str, Any]:
    """Where every picture is brought to one longest edge, a smaller edge; else nothing."""
    size = dict(processor.image_processor.size)
    given = {name: value for name, value in size.items() if value is not None}
    if scale == 1.0 or set(given) != {"longest_edge"}:
        return {}
    return {"size": {"longest_edge": max(1, round(given["longest_edge"] * scale))}}
