"""Writing a model folder that stock transformers loads: weights, configuration, processor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlmtune.models.load import VLM
from vlmtune.models.source import quiet_transformers

MAX_SHARD_SIZE = "5GB"


def save_model(
    vlm: VLM, folder: Path, *, dtype: torch.dtype, max_shard_size: str = MAX_SHARD_SIZE
) -> None:
    """Write `vlm` to `folder` with floating-point weights in `dtype`; `vlm` is unchanged.

    Safetensors shards, config, generation config, tokenizer, processor and chat template.
    """
    model = vlm.model
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        # One copy for tensors that share memory: transformers recognises tied weights by it.
        key = (tensor.data_ptr(), tensor.shape)
        if key not in cast:
            cast[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        state[name] = cast[key]
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    # save_pretrained notes the dtypes in memory; the file's are the ones that count.
    configs = [model.config, *(getattr(model.config, name) for name in model.config.sub_configs)]
    before = [config.dtype for config in configs]
    for config in configs:
        config.dtype = dtype
    model.config.save_pretrained(folder)
    for config, own in zip(configs, before, strict=True):
        config.dtype = own
    vlm.processor.save_pretrained(folder)
