"""Where a model comes from: a folder or a hub id, checked before transformers opens it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, PretrainedConfig
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from vlmtune.errors import VlmtuneError

ADAPTER_FILE = "adapter_config.json"


def check_source(source: str) -> None:
    """Raise VlmtuneError where `source` is neither a model folder nor could be a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            if (folder / ADAPTER_FILE).is_file():
                raise VlmtuneError(
                    "the folder is an adapter, and a base model is needed",
                    file=source,
                    do=f"merge it first (`vlmtune merge {source} --output DIR`) and give DIR, or "
                    "give the adapter's own base model",
                )
            raise VlmtuneError(
                "the folder is no model: it has no config.json",
                file=source,
                do="give the folder that save_pretrained wrote, or a hub id",
            )
        return
    if folder.exists():
        raise VlmtuneError("the model is a file", file=source, expected="a folder or a hub id")
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path or "\\" in source:
        raise VlmtuneError("no such model folder", file=source, expected="a folder or a hub id")


def read_config(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The config of a vision-language model; downloads nothing but small files.

    Raises VlmtuneError where it cannot be read, is no VLM's, is of a quantised checkpoint, or has
    an adapter beside it.
    """
    check_source(source)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                source, revision=revision, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise explained(
            error, source, what="the model's config cannot be loaded", do="check config.json"
        ) from error
    auto_map = getattr(config, "auto_map", None) or {}
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not known and "AutoModelForImageTextToText" not in auto_map:
        raise VlmtuneError(
            f"{source} is no vision-language model",
            got=f"model_type {config.model_type!r}",
            expected="a model that transformers loads with AutoModelForImageTextToText",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise VlmtuneError(
            f"the weights of {source} are quantised already",
            do="name the unquantised model and set quantization_bit in the recipe",
        )
    _check_without_adapter(source, revision=commit_of(config) or revision)
    return config


def _check_without_adapter(source: str, *, revision: str | None) -> None:
    """transformers attaches an adapter beside a base model in a folder, and loads, for a hub id,
    the base that the adapter names: both without a word."""
    with quiet_transformers():
        found = find_adapter_config_file(source, revision=revision)
    if found is None:
        return
    is_local = Path(source).is_dir()
    fetch = "" if is_local else f"`hf download {source} --local-dir FOLDER`, and in FOLDER "
    raise VlmtuneError(
        f"{'' if is_local else source + ': '}the base model has an adapter beside it, which would "
        "be loaded with it",
        file=source if is_local else None,
        got=ADAPTER_FILE,
        expected="a base model alone",
        do=f"{fetch}move {ADAPTER_FILE} and the adapter's weights to another folder: without them "
        "this is the bare base. To go on from the adapter, merge it first (`vlmtune merge "
        "ADAPTER_FOLDER --output DIR`) and give DIR as the model",
    )


def commit_of(config: PretrainedConfig) -> str | None:
    """The hub commit that a config was read from; None for a folder."""
    return getattr(config, "_commit_hash", None)


def explained(error: Exception, source: str, *, what: str, do: str | None = None) -> VlmtuneError:
    """A transformers error as one that says where it happened and what to do."""
    text = str(error)
    local = Path(source).is_dir()
    if "trust_remote_code" in text:
        do = "set trust_remote_code: true if you trust the authors of this model"
    elif "couldn't connect" in text or "connection error" in text or "offline" in text.lower():
        what += ": the hub cannot be reached and the model is not in the cache"
        do = "check the network and HF_HUB_OFFLINE, or download the model and give its folder"
    elif "gated repo" in text:
        do = "accept the model's terms on its hub page and log in with `hf auth login`"
    elif "not a valid model identifier" in text or "Repo id must" in text:
        do = "check the spelling of the hub id, or give a folder"
    elif "valid git identifier" in text:
        do = "check revision: a branch, a tag or a commit of this model"
    elif "does not recognize this architecture" in text or "model type" in text:
        do = "install a newer transformers, or check config.json"
    return VlmtuneError(
        what if local else f"{source}: {what}",
        file=source if local else None,
        got=first_line(text),
        do=do,
    )


def first_line(text: str, limit: int = 200) -> str:
    """The first line of an upstream message, short enough for ours."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= limit else line[: limit - 1] + "…"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' progress bars and warnings off: what they say is checked and said by us."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
