"""The model that every tool trains: Qwen2.5-VL's architecture in small, random weights, a tokenizer
learnt on made-up words, and Qwen's own processor classes and kind of chat template.

    lexicon -> byte-level BPE -> config -> weights from the seed -> folder in bfloat16
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from peers.template import CHAT_TEMPLATE, SYSTEM
from peers.words import corpus, make_lexicon

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PIXEL_BUDGET = {"shortest_edge": 56 * 56, "longest_edge": 2048 * 2048}


@dataclass(frozen=True)
class Size:
    """What a model is made of; `layers` of seven linears each are what LoRA is put on."""

    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    vision_width: int
    vision_mlp_width: int
    vision_layers: int


SIZES = {
    "62m": Size(8192, 512, 1408, 10, 512, 1344, 8),
    "tiny": Size(1024, 64, 128, 2, 64, 128, 2),
}
"""`62m` is what is measured; `tiny` shows in seconds that a tool runs."""


def make_model(folder: Path, *, size: Size, seed: int) -> int:
    """Write model, tokenizer and processor to `folder` unless they are there; the number of
    parameters."""
    record = folder / "made.json"
    made = {"size": vars(size), "seed": seed, "template": CHAT_TEMPLATE}
    if record.is_file():
        kept = json.loads(record.read_text())
        if kept["made"] == made:
            return int(kept["parameters"])
    tokenizer = train_tokenizer(make_lexicon(2 * size.vocabulary, seed=seed), size.vocabulary)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer, size)).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(PIXEL_BUDGET), **sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(PIXEL_BUDGET), **sizes),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    record.write_text(json.dumps({"made": made, "parameters": parameters}) + "\n")
    return parameters


def train_tokenizer(lexicon: list[str], vocabulary_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE of exactly `vocabulary_size` tokens, the special ones last."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([SYSTEM, *corpus(lexicon)], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe.get_vocab(),
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=[SPECIAL_TOKENS[1], *SPECIAL_TOKENS[3:]],
        model_max_length=32768,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == vocabulary_size, len(tokenizer)
    return tokenizer


def build_config(tokenizer: Qwen2Tokenizer, size: Size) -> Qwen2_5_VLConfig:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.width,
            "intermediate_size": size.mlp_width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": max(2, size.width // 64),
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": _sections(size.width // max(2, size.width // 64) // 2),
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_width,
            "intermediate_size": size.vision_mlp_width,
            "num_heads": max(2, size.vision_width // 64),
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(1, size.vision_layers, 2)),
            "out_hidden_size": size.width,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def _sections(half: int) -> list[int]:
    """Qwen2.5-VL's split of half a head over time, height and width: 2 to 3 to 3."""
    time = half // 4
    return [time, (half - time) // 2, half - time - (half - time) // 2]
