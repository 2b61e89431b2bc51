"""Small processors of further families, with the structure of their own chat templates.

`FAMILIES[name]()` builds one. `LEAD`, `END`: what its answers start and end with, as text.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma3Processor,
    Idefics2ImageProcessor,
    Idefics2Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    MllamaImageProcessor,
    MllamaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

from tests.data.processors import build_processor, byte_level

SMALL = {"height": 32, "width": 32}

QWEN2_VL = (  # a default system turn, videos, no white space taken off
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif c['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in c %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_VL = (  # no default system turn; its text is joined first
    "{% if messages[0].role == 'system' %}<|im_start|>system\n"
    "{% for c in messages[0].content %}{{ c.text }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_NEXT = (  # Mistral's instructions: BOS in the template, EOS only behind an answer
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ '<<SYS>>\n' + m['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] }}{% endfor %}{{ ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)
LLAVA_ONEVISION = (  # pictures before the text; generation marks, that nothing depends on
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}"
    "{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}{% if m['role'] != 'assistant' %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + c['text'] }}"
    "{% endfor %}{% else %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + c['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA3 = (  # the system text inside the first user turn, the role `model`, text trimmed
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
    "{% if loop.first %}{{ first }}{% endif %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MLLAMA = (  # Llama 3 headers: a token for each, no line break behind the end of a turn
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
INTERNVL = (  # a line break behind each picture
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif c['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIXTRAL = (  # the system text inside the last user turn; no generation prompt at all
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'][0]['text'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST]' + system + '\n\n' }}"
    "{% else %}{{ '[INST]' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}{{ '[IMG]' }}{% endif %}{% endfor %}{{ '[/INST]' }}"
    "{% else %}{{ m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)
IDEFICS2 = (  # a colon without a space before a picture; text trimmed
    "{% for m in messages %}{{ m['role'].capitalize() }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PHI = (  # a content that is a string, with placeholders; one end token for every role
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + '\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
GLM4V = (  # a turn ends where the next role's token stands
    "[gMASK]<sop>\n{% for m in messages %}{% if m.role == 'system' %}<|system|>\n"
    "{{ m.content[0].text }}{% elif m.role == 'user' %}<|user|>\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% else %}<|assistant|>\n{{ m.content[0].text }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _tokenizer(specials: list[str], **named: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(specials),
        extra_special_tokens=dict(named.pop("extra", {}))
        or [t for t in specials if t not in named.values()],
        **named,
    )


def _qwen(kind: type, template: str, video: Any = None) -> Any:
    base = build_processor("qwen")
    return kind(
        image_processor=base.image_processor,
        tokenizer=base.tokenizer,
        video_processor=video or base.video_processor,
        chat_template=template,
    )


def _qwen3_vl() -> Any:
    budget = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    video = Qwen3VLVideoProcessor(size=budget, patch_size=8, merge_size=2)
    return _qwen(Qwen3VLProcessor, QWEN3_VL, video)


def _llava_next() -> Any:
    tokenizer = build_processor("llava").tokenizer
    sizes = {"size": {"shortest_edge": 32}, "crop_size": SMALL}
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]], **sizes
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT,
    )


def _llava_onevision() -> Any:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=SMALL, image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]]
        ),
        tokenizer=_tokenizer(specials, eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        video_processor=LlavaOnevisionVideoProcessor(size=SMALL),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_ONEVISION,
    )


def _gemma3() -> Any:
    extra = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    specials = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *extra.values()]
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = _tokenizer(specials, extra=extra, **named)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]},
    )
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size=SMALL),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=GEMMA3,
    )


def _mllama() -> Any:
    specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    specials += ["<|image|>", "<|python_tag|>", "<|pad|>"]
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"}
    return MllamaProcessor(
        image_processor=MllamaImageProcessor(size=SMALL, max_image_tiles=2),
        tokenizer=_tokenizer(specials, **named),
        chat_template=MLLAMA,
    )


def _internvl() -> Any:
    extra = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra.values()]
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=SMALL, max_patches=3),
        tokenizer=_tokenizer(specials, extra=extra, **named),
        video_processor=InternVLVideoProcessor(size=SMALL),
        image_seq_length=4,
        chat_template=INTERNVL,
    )


def _pixtral() -> Any:
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(size={"longest_edge": 64}, patch_size=16),
        tokenizer=_tokenizer(specials, **named),
        patch_size=16,
        chat_template=PIXTRAL,
    )


def _idefics2() -> Any:
    specials = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>"]
    specials += ["<end_of_utterance>"]
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return Idefics2Processor(
        image_processor=Idefics2ImageProcessor(
            size={"shortest_edge": 32, "longest_edge": 64}, do_image_splitting=False
        ),
        tokenizer=_tokenizer(specials, **named),
        image_seq_len=4,
        chat_template=IDEFICS2,
    )


def _phi() -> Any:
    specials = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"]
    named = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return _clip_processor(_tokenizer(specials, **named), PHI)


def _glm4v() -> Any:
    specials = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]
    named = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return _clip_processor(_tokenizer([*specials, "<image>"], **named), GLM4V)


def _clip_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    """One whose pictures are 16 times `<image>`: here the template is what counts."""
    base = build_processor("llava")
    return type(base)(
        image_processor=base.image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


FAMILIES = {
    "qwen2_vl": lambda: _qwen(Qwen2VLProcessor, QWEN2_VL),
    "qwen3_vl": _qwen3_vl,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "gemma3": _gemma3,
    "mllama": _mllama,
    "internvl": _internvl,
    "pixtral": _pixtral,
    "idefics2": _idefics2,
    "phi": _phi,
    "glm4v": _glm4v,
    "qwen2_5_vl": lambda: build_processor("qwen"),
    "llava": lambda: build_processor("llava"),
    "idefics3": lambda: build_processor("idefics"),
}
LEAD = {name: "" for name in FAMILIES} | {
    "llava": " ",
    "llava_next": " ",
    "idefics2": " ",
    "idefics3": " ",
}
END = {
    "qwen2_vl": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
    "llava_next": "</s>",
    "llava_onevision": "<|im_end|>",
    "gemma3": "<end_of_turn>",
    "mllama": "<|eot_id|>",
    "internvl": "<|im_end|>",
    "pixtral": "</s>",
    "idefics2": "<end_of_utterance>",
    "phi": "<|end|>",
    "glm4v": "<|endoftext|>",
    "qwen2_5_vl": "<|im_end|>",
    "llava": "</s>",
    "idefics3": "<end_of_utterance>",
}
