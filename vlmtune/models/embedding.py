"""Pictures and texts as points on one sphere: the hidden state after a prompt, normalised.

    inputs (B, T) -> backbone -> hidden states (B, T, D) -> each row's last token (B, D) -> length 1

What the last token of a prompt ("Summarize the above in one word:") is about to say is the
embedding (Jiang et al. 2024, arXiv 2407.12580). Letters: B rows, T tokens of the longest row, D
width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmtune.models.families import Family
from vlmtune.models.forward import base_of, has_media, media_zero, trained_media_names

if TYPE_CHECKING:
    from vlmtune.models.vision import VisionFeatures


RECORD_FILE = "contrastive.json"
"""Beside the weights of a model or adapter that was trained contrastively: its prompt."""


def write_embedding_record(folder: Path, *, temperature: float, prompt: str) -> None:
    values = {"temperature": temperature, "embedding_prompt": prompt}
    (folder / RECORD_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def recorded_prompt(folder: Path) -> str | None:
    """The prompt that the embeddings of a model or adapter folder were trained with, if any."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["embedding_prompt"])


class EmbeddingForward(nn.Module):
    """The model behind `forward(inputs, last) -> embeddings (B, D)`, float32, of length 1.

    Rows are padded on the right; `last` (B,) are the positions of their last tokens. A batch
    without a picture touches the trained vision tensors with weight zero, as `SupervisedForward`,
    and `features` are as there.
    """

    def __init__(
        self, model: nn.Module, family: Family, features: VisionFeatures | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.features = features
        self._media_names = trained_media_names(base_of(model), family)

    def forward(self, inputs: Mapping[str, Tensor], last: Tensor) -> Tensor:
        base = base_of(self.model)
        arguments: dict[str, Any] = dict(inputs)
        if self.features is not None and has_media(inputs):
            made, arguments = self.features.outputs(inputs)
            arguments["mm_encoder_outputs"] = made
        hidden = base.model(**arguments, use_cache=False).last_hidden_state  # (B, T, D)
        rows = torch.arange(len(last), device=hidden.device)
        embeddings = F.normalize(hidden[rows, last].float(), dim=-1)  # (B, D)
        if self._media_names and not has_media(inputs):
            embeddings = embeddings + media_zero(base, self._media_names)
        return embeddings
