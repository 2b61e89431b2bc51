"""Answers by batched greedy decoding.

    conversations -> windows of WINDOW_BATCHES batches -> prompts, sorted by length in a window
                  -> left-padded batches -> generate -> text, in the order of the input

Left padding puts every prompt's last token in the last column, where the first answer token is
predicted; a batch then gives what its rows give one by one. Windows bound the memory that encoded
pictures take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from vlmtune.data.collate import collate_prompts
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Sample
from vlmtune.models.load import VLM
from vlmtune.models.processor import pad_token_id

WINDOW_BATCHES = 32

Item = TypeVar("Item")


def generate_answers(
    vlm: VLM,
    conversations: Sequence[Conversation],
    *,
    encoder: Encoder,
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy answer to each conversation's prompt, in the order given.

    The prompt is everything up to, not including, a final assistant turn. `on_progress` is called
    with the number of answers so far. Every module's training mode is restored afterwards. No
    collective: with several processes, each passes its share. Raises SampleError for a
    conversation that cannot be encoded.
    """
    config = greedy_config(vlm, encoder=encoder, max_new_tokens=max_new_tokens)
    answers = [""] * len(conversations)
    num_done = 0
    with evaluating(vlm.model):
        for window in _chunks(range(len(conversations)), WINDOW_BATCHES * batch_size):
            prompts = {index: encoder.encode_prompt(conversations[index]) for index in window}
            # Longest first: a batch that does not fit in memory shows at once.
            order = sorted(window, key=lambda index: -prompts[index].num_tokens)
            for batch in _chunks(order, batch_size):
                texts = _answer_batch(vlm, [prompts.pop(index) for index in batch], config)
                for index, text in zip(batch, texts):
                    answers[index] = text
                num_done += len(batch)
                if on_progress is not None:
                    on_progress(num_done)
    return answers


def prompt_inputs(vlm: VLM, prompts: Sequence[Sample]) -> dict[str, Tensor]:
    """The left-padded batch of `prompts` as keyword arguments for `generate`, on the model's
    device."""
    inputs = collate_prompts(
        prompts,
        pad_token_id=pad_token_id(vlm.processor),
        media_layout=vlm.family.media_layout,
    )
    device = next(vlm.model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def greedy_config(vlm: VLM, *, encoder: Encoder, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding, whatever the checkpoint's generation config says.

    Every field is set: what is left out is filled in from the checkpoint, where a temperature or a
    repetition penalty would make answers random or different from the argmax.
    """
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        typical_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=stop_token_ids(vlm, encoder),
        pad_token_id=pad_token_id(vlm.processor),
    )


def stop_token_ids(vlm: VLM, encoder: Encoder) -> list[int]:
    """Where an answer ends: the checkpoint's and the tokenizer's end tokens, and the token that
    ends an assistant turn in the chat template.

    The last is what fine-tuning supervises; a base checkpoint often names only its end of text, and
    would run on through further turns of its own.
    """
    configured = vlm.model.generation_config.eos_token_id
    stops = [vlm.processor.tokenizer.eos_token_id, encoder.end_token_id]
    stops += configured if isinstance(configured, list) else [configured]
    return sorted({int(stop) for stop in stops if stop is not None})


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode comes back at the end (a frozen
    tower may have been in evaluation mode before)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _answer_batch(vlm: VLM, prompts: Sequence[Sample], config: GenerationConfig) -> list[str]:
    inputs = prompt_inputs(vlm, prompts)
    output = vlm.model.generate(**inputs, generation_config=config)
    new_ids = output[:, inputs["input_ids"].shape[1] :]
    texts = vlm.processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
