"""Whether and where a run keeps the features of its pictures, as the recipe and the model allow."""

from __future__ import annotations

import logging

import psutil
from accelerate import Accelerator

from vlmtune.data.source import access_of, cache_dir_of
from vlmtune.errors import VlmtuneError, plural
from vlmtune.models.forward import base_of, trained_media_names
from vlmtune.models.load import VLM
from vlmtune.models.vision_cache import DiskStore, FeatureCache, MemoryStore, open_disk_store
from vlmtune.models.vision_digest import tower_digest
from vlmtune.models.vision_features import Level, VisionFeatures, kept_level
from vlmtune.recipe.schema import Recipe

log = logging.getLogger("vlmtune")

KEPT_PARTS: dict[Level, tuple[str, ...]] = {
    "features": ("vision", "connector"),
    "tower": ("vision",),
}
"""The parts whose weights decide what is kept."""


def keeps_features(recipe: Recipe, vlm: VLM) -> bool:
    """Whether something of each picture is kept: the recipe wants it and the tower is frozen."""
    level = kept_level(base_of(vlm.model), vlm.family)
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
    level = kept_level(base, vlm.family)
    if level is None:
        _refuse(recipe, vlm)
        return None
    if mode == "off":
        return VisionFeatures(base, vlm.family)
    stores: list[MemoryStore | DiskStore] = []
    bound, num_processes = recipe.train.vision_cache_bytes, accelerator.num_processes
    if mode != "disk":
        free = int(psutil.virtual_memory().available) // 2
        stores.append(MemoryStore(min(bound, free) // num_processes))
    if mode != "memory":
        store = open_disk_store(
            cache_dir_of(access_of(recipe.data)),
            tower_digest(base, vlm.family, KEPT_PARTS[level]),
            max_bytes=bound,
            num_processes=num_processes,
        )
        stores.append(store)
    if num_processes > 1:
        # Each process sees other samples in the next epoch: what they share is asked first.
        stores.reverse()
    what = "pictures' features" if level == "features" else "what the tower gives the connector"
    places = ", then ".join(_place(store, num_processes) for store in stores)
    log.info("vision cache: %s kept %s", what, places)
    return VisionFeatures(base, vlm.family, FeatureCache(stores))


def _place(store: MemoryStore | DiskStore, num_processes: int) -> str:
    """Where a store keeps what it is given, and how much more of it, over all processes."""
    name = "in memory" if isinstance(store, MemoryStore) else "on disk"
    return f"{name} (up to {max(0, store.max_bytes) * num_processes / 1e9:.1f} GB)"


def _refuse(recipe: Recipe, vlm: VLM) -> None:
    """Say why nothing is kept; raise where the recipe wants it kept."""
    mode = recipe.train.vision_cache
    trained = trained_media_names(base_of(vlm.model), vlm.family)
    if not vlm.family.takes_features:
        reason = f"a model of the family {vlm.family.name} makes them itself"
        if recipe.parts is not None:
            reason += " where the recipe states its parts"
    else:
        reason = (
            f"the vision tower trains ({plural(len(trained), 'tensor')} of it and the connector)"
        )
    if mode in ("memory", "disk"):
        raise VlmtuneError(
            f"pictures' features cannot be kept: {reason}",
            got=f"train.vision_cache: {mode}; trained is {', '.join(trained[:3]) or 'none of it'}",
            expected="a vision tower without a trained module",
            do="set train.vision_cache: auto or off, or take the tower's modules out of "
            "lora_target and modules_to_save",
        )
    if mode == "auto":
        log.info("vision cache: off, %s", reason)
