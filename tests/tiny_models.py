"""Random models of the real architectures, tiny: built on a CPU in well under a second each.

    build_tiny_model("qwen3_vl")                 a model in memory
    save_tiny_model("llava", tmp_path / "llava") a folder that load_vlm opens, with its processor

Language: 2 layers, 64 wide, 4 heads, 2 kv heads, MLP 128. Vision: 2 layers, 64 wide, MLP 128.
The vocabulary is the size of the processor's; special tokens are the processor's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.data.processors import build_processor

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
PROCESSOR_KINDS = {
    "qwen2_vl": "qwen",
    "qwen2_5_vl": "qwen",
    "qwen3_vl": "qwen",
    "llava": "llava",
    "smolvlm": "idefics",
    "idefics3": "idefics",
}
MODEL_TYPES = tuple(PROCESSOR_KINDS)


def build_tiny_processor(model_type: str) -> ProcessorMixin:
    """The processor of a tiny model, pictures of at most 64 x 64 pixels."""
    processor = build_processor(PROCESSOR_KINDS[model_type])
    shared = {
        "image_processor": processor.image_processor,
        "tokenizer": processor.tokenizer,
        "chat_template": processor.chat_template,
    }
    if model_type == "qwen2_vl":
        return Qwen2VLProcessor(video_processor=processor.video_processor, **shared)
    if model_type == "qwen3_vl":
        budget = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
        video = Qwen3VLVideoProcessor(size=budget, patch_size=8, merge_size=2)
        return Qwen3VLProcessor(video_processor=video, **shared)
    if model_type == "smolvlm":
        own = processor.image_processor
        shared["image_processor"] = SmolVLMImageProcessor(
            size=own.size, max_image_size=own.max_image_size
        )
        return SmolVLMProcessor(
            video_processor=SmolVLMVideoProcessor(),
            image_seq_len=processor.image_seq_len,
            **shared,
        )
    return processor


def tiny_config(
    model_type: str, *, processor: ProcessorMixin | None = None, tied: bool = True
) -> PretrainedConfig:
    """The config of a tiny model; `tied`: `lm_head` is the embeddings' matrix."""
    tokenizer = (processor or build_tiny_processor(model_type)).tokenizer
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    build = {"qwen": _qwen, "llava": _llava, "idefics": _idefics}[PROCESSOR_KINDS[model_type]]
    parts = build(model_type, text, tokenizer.convert_tokens_to_ids)
    return AutoConfig.for_model(model_type, tie_word_embeddings=tied, **parts)


def build_tiny_model(
    model_type: str,
    *,
    processor: ProcessorMixin | None = None,
    tied: bool = True,
    seed: int = 0,
) -> PreTrainedModel:
    """A random float32 model in eval mode, the same for the same seed."""
    config = tiny_config(model_type, processor=processor, tied=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        eos_token_id=config.get_text_config().eos_token_id,
        pad_token_id=config.get_text_config().pad_token_id,
        do_sample=False,
    )
    return model.eval()


def save_tiny_model(model_type: str, folder: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Write a tiny model and its processor to `folder`, as the hub would hold them."""
    processor = build_tiny_processor(model_type)
    model = build_tiny_model(model_type, processor=processor, tied=tied, seed=seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _qwen(model_type: str, text: dict, id_of) -> dict:
    vision = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**text, "rope_parameters": rope}
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": 64, "mlp_ratio": 2, "hidden_size": 64}
    elif model_type == "qwen2_5_vl":
        vision |= {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64}
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    else:
        text |= {"head_dim": 16}
        vision |= {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": id_of("<|image_pad|>"),
        "video_token_id": id_of("<|video_pad|>"),
        "vision_start_token_id": id_of("<|vision_start|>"),
        "vision_end_token_id": id_of("<|vision_end|>"),
    }


def _llava(model_type: str, text: dict, id_of) -> dict:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "projection_dim": 64,
        "num_hidden_layers": 3,  # the last one is not used: features come from the one before it
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return {
        "text_config": {"model_type": "llama", **text},
        "vision_config": vision,
        "image_token_id": id_of("<image>"),
        "image_seq_length": 16,
    }


def _idefics(model_type: str, text: dict, id_of) -> dict:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return {
        "text_config": {"model_type": "llama", **text},
        "vision_config": vision,
        "scale_factor": 2,
        "image_token_id": id_of("<image>"),
        "pad_token_id": text["pad_token_id"],
    }
