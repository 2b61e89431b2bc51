"""From a recipe and a loaded model to what the loop trains."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from vlmtune.data.batches import BatchLayout, Budget, num_steps
from vlmtune.data.dataset import ConversationSet, cache_dir_of, media_policy_of, open_conversations
from vlmtune.data.encode import Encoder, OverLength, encoder_for
from vlmtune.data.measure import WorkScale
from vlmtune.data.pairs import encode_pair
from vlmtune.data.stream import Stream, StreamCursor, open_stream
from vlmtune.data.types import Batch, Conversation, Skipped
from vlmtune.errors import SampleError, VlmtuneError, plural
from vlmtune.files import MemoryStore
from vlmtune.models.adapters.base import Adapter
from vlmtune.models.adapters.lora_kernels import needs_autocast
from vlmtune.models.embedding import EmbeddingForward, write_embedding_record
from vlmtune.models.families import part_of
from vlmtune.models.forward import (
    MEDIA_PARTS,
    SupervisedForward,
    base_name,
    base_of,
    set_gradient_checkpointing,
    trained_media_names,
)
from vlmtune.models.load import VLM, pad_token_id
from vlmtune.models.packing import can_pack, use_packed_attention
from vlmtune.models.vision import Level, VisionFeatures, cacheable_stage, vision_fingerprint
from vlmtune.models.vision_cache import (
    FeatureCache,
    FeatureStore,
    open_disk_store,
    open_memory_store,
)
from vlmtune.recipe.schema import Recipe
from vlmtune.train.checkpoint import CheckpointMeta, updated
from vlmtune.train.contrastive import Contrastive
from vlmtune.train.feed import (
    FeedSettings,
    SkippedSample,
    StepBatch,
    StepBuilder,
    StepDataset,
    steps_from,
    stream_steps,
)
from vlmtune.train.optim import build_optimizer, own_group, parameter_groups
from vlmtune.train.probe import (
    TrainingData,
    check_forward,
    check_packs,
    first_batch,
    freeze_unreached,
)
from vlmtune.train.run_folder import SkipLog
from vlmtune.train.runtime import DTYPES, disable_autocast, to_device
from vlmtune.train.state import Objective, TrainState
from vlmtune.train.step import NextToken

log = logging.getLogger("vlmtune")

KEPT_PARTS: dict[Level, tuple[str, ...]] = {
    "features": ("vision", "connector"),
    "tower": ("vision",),
}
"""The parts whose weights decide what is kept."""


def keeps_features(recipe: Recipe, vlm: VLM) -> bool:
    """Whether something of each picture is kept: the recipe wants it and the tower is frozen."""
    level = cacheable_stage(base_of(vlm.model), vlm.family)
    return recipe.train.vision_cache != "off" and level is not None


def build_vision_features(
    recipe: Recipe, *, vlm: VLM, accelerator: Accelerator
) -> VisionFeatures | None:
    """What makes the features of pictures, and keeps them as `train.vision_cache` says; None where
    the model makes them in each forward pass. Says which, in one line.

    `vlm.model` is adapted already, and on its device. Raises VlmtuneError where the recipe wants
    features kept that change while the model trains.
    """
    base, mode = base_of(vlm.model), recipe.train.vision_cache
    level = cacheable_stage(base, vlm.family)
    if level is None:
        _refuse(recipe, vlm)
        return None
    if mode == "off":
        return VisionFeatures(base, vlm.family)
    stores: list[FeatureStore] = []
    bound, num_processes = recipe.train.vision_cache_bytes, accelerator.num_processes
    if mode != "disk":
        free = int(psutil.virtual_memory().available) // 2
        stores.append(open_memory_store(min(bound, free) // num_processes))
    if mode != "memory":
        store = open_disk_store(
            cache_dir_of(media_policy_of(recipe.data)),
            vision_fingerprint(base, vlm.family, KEPT_PARTS[level]),
            max_bytes=bound,
            num_processes=num_processes,
        )
        stores.append(store)
    if num_processes > 1:
        # Each process sees other samples in the next epoch: what they share is asked first.
        stores.reverse()
    what = "picture features" if level == "features" else "outputs of the vision tower"
    places = ", then ".join(_place(store, num_processes) for store in stores)
    log.info("vision cache: %s are kept %s", what, places)
    return VisionFeatures(base, vlm.family, FeatureCache(stores))


def _place(store: FeatureStore, num_processes: int) -> str:
    """Where a store keeps what it is given, and how much more of it, over all processes."""
    name = "in memory" if isinstance(store, MemoryStore) else "on disk"
    return f"{name} (up to {max(0, store.max_bytes) * num_processes / 1e9:.1f} GB)"


def _refuse(recipe: Recipe, vlm: VLM) -> None:
    """Say why nothing is kept; raise where the recipe wants it kept."""
    mode = recipe.train.vision_cache
    trained = trained_media_names(base_of(vlm.model), vlm.family)
    if not vlm.family.supports_precomputed_features:
        reason = f"the family {vlm.family.name} takes no precomputed features"
        if recipe.parts is not None:
            reason += " when the recipe states parts"
    else:
        reason = (
            f"the vision tower trains ({plural(len(trained), 'tensor')} of it and the connector)"
        )
    if mode in ("memory", "disk"):
        raise VlmtuneError(
            f"picture features cannot be cached: {reason}",
            got=f"train.vision_cache: {mode}; trained is {', '.join(trained[:3]) or 'none of it'}",
            expected="a frozen vision tower and connector",
            do="set train.vision_cache: auto or off, or remove the tower's modules from "
            "lora_target and modules_to_save",
        )
    if mode == "auto":
        log.info("vision cache: off, %s", reason)


DEFAULT_EPOCHS = 3.0


def open_training_data(recipe: Recipe) -> tuple[TrainingData, list[Skipped]]:
    """What is trained on, by number or as a stream, and the rows known to be unusable.

    Raises VlmtuneError for files that cannot be used, an ErrorGroup for bad rows.
    """
    section = recipe.data
    media_policy = media_policy_of(section)
    if not section.streaming:
        return open_conversations(
            section.train, on_bad_sample=section.on_bad_sample, media_policy=media_policy
        )
    stream = open_stream(
        section.train,
        seed=recipe.seed,
        block_rows=section.shuffle_buffer,
        media_policy=media_policy,
        cache_dir=cache_dir_of(media_policy),
    )
    return stream, []


def num_samples_of(data: TrainingData) -> int | None:
    """How many samples there are; None where they are streamed."""
    return None if isinstance(data, Stream) else len(data)


def total_steps_of(recipe: Recipe, data: TrainingData) -> int:
    """Optimizer steps of the run. Raises VlmtuneError where no sample is left to train on."""
    epochs = epochs_of(recipe)
    if isinstance(data, ConversationSet):
        order = data.order(seed=recipe.seed)
        if epochs is not None:
            return num_steps(epochs, order.num_per_epoch, recipe.train.batch_size)
    assert recipe.train.max_steps is not None, "a stream needs it"
    return recipe.train.max_steps


def epochs_of(recipe: Recipe) -> float | None:
    """Passes over the data, or None where `max_steps` says how long to train."""
    if recipe.train.max_steps is not None:
        return None
    return recipe.train.epochs or DEFAULT_EPOCHS


def build_skip_log(
    recipe: Recipe, *, folder: Path, data: TrainingData, num_skipped: int
) -> SkipLog:
    """`num_skipped`: bad rows that are not part of `data`. How many rows a stream has is not
    known: bad ones count against the samples of the whole run, each time they come."""
    known = num_samples_of(data)
    drawn = total_steps_of(recipe, data) * recipe.train.batch_size
    return SkipLog(
        folder / "skipped.jsonl",
        num_samples=drawn if known is None else known + num_skipped,
        max_bad_fraction=recipe.data.max_bad_fraction,
        counts_repeats=known is None,
    )


def left_out(skipped: Sequence[Skipped]) -> list[SkippedSample]:
    """The rows that the reader skipped, as the log lists them."""
    return [
        SkippedSample(s.id, s.source.file, s.source.line, s.reason, is_bad=True) for s in skipped
    ]


def build_encoder(recipe: Recipe, vlm: VLM) -> Encoder:
    """What makes samples as the recipe says, from its cache where it asks for one, with the keys
    of their pictures where features are kept. `vlm.model` is adapted already."""
    data = recipe.data
    cache_dir = cache_dir_of(media_policy_of(data)) if data.cache == "disk" else None
    image_batching = vlm.family.image_batching if keeps_features(recipe, vlm) else None
    return encoder_for(recipe, vlm.processor, cache_dir=cache_dir, image_batching=image_batching)


def layout_of(recipe: Recipe, vlm: VLM) -> BatchLayout:
    """How samples lie side by side in training and in the loss on held-out data."""
    section = recipe.train
    return BatchLayout(
        budget=Budget(section.micro_batch_tokens, section.micro_batch_supervised_tokens),
        pad_token_id=pad_token_id(vlm.processor),
        image_batching=vlm.family.image_batching,
        packs=section.packing and can_pack(base_of(vlm.model), vlm.family),
    )


def build_steps(
    recipe: Recipe,
    *,
    data: TrainingData,
    encoder: Encoder,
    vlm: VLM,
    accelerator: Accelerator,
    start: CheckpointMeta | None,
) -> Callable[[int, int], Iterator[StepBatch]]:
    """What gives this process its part of the steps from a first to a last one; of a stream, the
    first is the one after `start`.

    Raises `VlmtuneError` for fewer samples a step than processes: some would have nothing to do.
    """
    if recipe.train.batch_size < accelerator.num_processes:
        raise VlmtuneError(
            "train.batch_size is smaller than the number of processes",
            got=recipe.train.batch_size,
            expected=f"at least {accelerator.num_processes}",
        )
    settings = FeedSettings(
        batch_size=recipe.train.batch_size,
        layout=layout_of(recipe, vlm),
        skip_bad_samples=recipe.data.on_bad_sample == "skip",
        drop_over_length=recipe.data.over_length == "drop",
        work=WorkScale.of(
            vlm.processor,
            pixel_budget=vlm.family.pixel_budget,
            max_pixels=recipe.data.max_image_pixels,
        ),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        embedding_prompt=embedding_prompt_of(recipe),
    )
    builder = StepBuilder(encoder, settings)
    num_workers = recipe.data.num_workers
    if isinstance(data, Stream):
        cursor = None
        if start is not None:
            assert start.cursor is not None, "the fingerprint tells streams from rows by number"
            cursor = StreamCursor.from_dict(start.cursor)
        return partial(stream_steps, data, builder, cursor=cursor, num_workers=num_workers)
    dataset = StepDataset(
        data, builder, order=data.order(seed=recipe.seed), epochs=epochs_of(recipe)
    )
    return partial(steps_from, dataset, num_workers=num_workers)


def embedding_prompt_of(recipe: Recipe) -> str | None:
    """What follows the sides of a sample in contrastive training; None for another objective."""
    return recipe.eval.embedding_prompt if recipe.objective == "contrastive" else None


def build_objective(recipe: Recipe, device: torch.device) -> Objective:
    if recipe.objective == "next_token":
        return NextToken()
    return Contrastive(recipe.contrastive.initial_temperature, device)


def usable(
    conversations: Sequence[Conversation],
    *,
    encoder: Encoder,
    skip: bool,
    embedding_prompt: str | None = None,
) -> list[Conversation]:
    """The held-out conversations that can be encoded, tried before the first step: the question,
    the answer where there is one to learn, and with an embedding prompt the pair.

    Otherwise the first evaluation, hours later, would find the bad one. Raises its `SampleError`
    or, with `skip`, leaves it out with a warning.
    """
    kept = []
    for conversation in conversations:
        try:
            if encoder.is_supervised(conversation):
                encoder.encode(conversation)
            encoder.encode_prompt(conversation)
            if embedding_prompt is not None:
                encode_pair(encoder, conversation, prompt=embedding_prompt)
        except SampleError as error:
            # OverLength: the recipe says to drop what is too long, here as in training.
            if not (skip or isinstance(error, OverLength)):
                raise
            log.warning("left out of the evaluation: %s", error)
            continue
        kept.append(conversation)
    return kept


def check_best_metric(
    recipe: Recipe, samples: Sequence[Conversation], *, encoder: Encoder, figures: Sequence[str]
) -> None:
    """Raise VlmtuneError where `eval.best_metric` is none of `figures`, which answers to the
    held-out `samples` have, and no loss on them."""
    metric = recipe.eval.best_metric
    if metric is None or not samples:
        return
    losses = ["loss", "in_batch_accuracy"]
    if embedding_prompt_of(recipe) is None:
        losses = ["loss"] if any(encoder.is_supervised(c) for c in samples) else []
    updated(None, metric=metric, step=0, values=dict.fromkeys([*losses, *figures], 0.0))


def build_state(
    recipe: Recipe,
    *,
    vlm: VLM,
    adapter: Adapter,
    data: TrainingData,
    encoder: Encoder,
    accelerator: Accelerator,
) -> TrainState:
    """Wrap, probe, checkpoint activations, build the optimizer, prepare for the processes."""
    dtype = DTYPES[recipe.train.precision]
    prompt = embedding_prompt_of(recipe)
    kind = SupervisedForward if prompt is None else EmbeddingForward
    adapter.model.to(accelerator.device)
    if recipe.train.precision == "bf16" and not needs_autocast(adapter.model, dtype):
        disable_autocast(accelerator)
    features = build_vision_features(recipe, vlm=vlm, accelerator=accelerator)
    forward = kind(adapter.model, vlm.family, features)
    layout = layout_of(recipe, vlm)
    if layout.packs:
        use_packed_attention(base_of(adapter.model))
    trained = {n: p for n, p in adapter.model.named_parameters() if p.requires_grad}
    parts = {name: part_of(base_name(name), vlm.family) or "language" for name in trained}
    batch = first_batch(
        data,
        encoder,
        layout,
        needs_media=bool(set(parts.values()) & set(MEDIA_PARTS)),
        embedding_prompt=prompt,
    )
    batch = to_device(batch, accelerator.device)
    with accelerator.autocast():
        if isinstance(forward, SupervisedForward) and isinstance(batch, Batch):
            check_forward(forward, batch, dtype)
            if layout.packs:
                check_packs(forward, batch, dtype)
    # Anew: autocast may remember weights that were cast without a graph.
    with accelerator.autocast():
        unreached = set(freeze_unreached(forward, batch, trained))
    trained = {n: p for n, p in trained.items() if n not in unreached}
    if recipe.train.gradient_checkpointing:
        set_gradient_checkpointing(adapter.model, vlm.family)
    groups = parameter_groups(
        trained,
        part_of_name=parts,
        section=recipe.train,
        no_decay=adapter.no_decay_names(),
    )
    objective = build_objective(recipe, accelerator.device)
    if objective.tensors:
        groups.append(own_group(objective.tensors, recipe.contrastive.temperature_learning_rate))
    optimizer = build_optimizer(groups, kind=recipe.train.optimizer, device=accelerator.device)
    forward.train()
    prepared, optimizer = accelerator.prepare(forward, optimizer)
    return TrainState(prepared, adapter, trained, parts, optimizer, objective, features)


def saver(recipe: Recipe, state: TrainState) -> Callable[[Path], None]:
    """What writes the result into a folder: the adapter's files and, after contrastive training,
    `contrastive.json` with what else makes an embedding."""

    def save(folder: Path) -> None:
        state.adapter.save(folder)
        if isinstance(state.objective, Contrastive):
            write_embedding_record(
                folder,
                temperature=state.objective.temperature,
                prompt=recipe.eval.embedding_prompt,
            )

    return save


def seed_everything(seed: int, rank: int) -> None:
    """Seed torch and Python; each process draws its own dropout masks."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)
