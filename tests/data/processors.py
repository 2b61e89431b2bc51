"""Small processors of three kinds, with their families' chat templates; no download.

They share a corpus but not a tokenizer: Qwen's is byte-level, LLaVA's a SentencePiece-like one
that writes spaces as part of words and puts a BOS token itself, Idefics3's byte-level with every
digit a token of its own.
"""

from __future__ import annotations

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.clip.image_processing_clip import CLIPImageProcessor

CORPUS = [
    "What is in the picture? The cat is red, the dog is blue.",
    "Is there a red circle? yes no",
    "You are a helpful assistant. Answer in one word.",
    "user assistant system USER: ASSISTANT: User: Assistant:",
] * 4

QWEN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As llava-hf/llava-1.5-7b-hf: pictures first, a space after every text, no end-of-turn token.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As HuggingFaceTB/SmolVLM-256M-Instruct: the BOS in the template, no space before a picture.
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

KINDS = ("qwen", "llava", "idefics")


def build_processor(kind: str):
    """A processor of the kind `qwen`, `llava` or `idefics`."""
    return {"qwen": _qwen, "llava": _llava, "idefics": _idefics}[kind]()


def byte_level(specials: list[str], *, digits: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _qwen() -> Qwen2_5_VLProcessor:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
    names += ["<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    raw = byte_level(names)
    raw.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=names[1:2] + names[3:],
    )
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    budget = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(budget), **sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(budget), **sizes),
        chat_template=QWEN_TEMPLATE,
    )


def _llava() -> LlavaProcessor:
    names = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=[*names, *bytes_],
        initial_alphabet=[
            "▁",
            *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?",
        ],
        show_progress=False,
    )
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    raw.train_from_iterator(CORPUS, trainer)
    raw.pre_tokenizer = None
    raw = _plain_bytes(raw, names)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def _plain_bytes(raw: Tokenizer, names: list[str]) -> Tokenizer:
    """The same tokenizer with the byte tokens as vocabulary only: they are not control tokens."""
    import json

    state = json.loads(raw.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in names]
    return Tokenizer.from_str(json.dumps(state))


def _idefics() -> Idefics3Processor:
    names = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<image>"]
    names += ["<fake_token_around_image>", "<global-img>"]
    names += [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    raw = byte_level(names, digits=True)
    # Like a tokenizer that adds its BOS itself: with the template's there must not be two.
    raw.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=names[3:],
    )
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
