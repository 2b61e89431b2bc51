"""TARGET of `eval`, `chat` and `merge` opened: a run, an adapter or a model, ready for inference.

    run folder      recipe.resolved.yaml, and adapter/ or model/
    adapter folder  adapter_config.json naming its base, adapter_model.safetensors; also where a
                    model lies beside them, which is then not used
    model           a folder with config.json, or a hub id

After an adapter is loaded, every tensor of its file is compared with the model: PEFT itself only
warns about keys that match nothing, and the adapter then has no effect.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmtune.errors import VlmtuneError
from vlmtune.models.adapters.base import WEIGHTS_FILE, adapter_tensors, expected_warnings
from vlmtune.models.adapters.lora_kernels import install_kernels
from vlmtune.models.load import (
    ADAPTER_FILE,
    TOKENIZER_FILES,
    VLM,
    check_source,
    first_line,
    load_processor,
    load_vlm,
)
from vlmtune.recipe.load import load_resolved
from vlmtune.recipe.schema import Recipe

logger = logging.getLogger("vlmtune")

RUN_FILE = "recipe.resolved.yaml"
PREFIX = "base_model.model."

Kind = Literal["run", "adapter", "model"]


@dataclass(frozen=True)
class OpenTarget:
    """`vlm.model` is a PeftModel where there is an adapter; `recipe` is a run's."""

    vlm: VLM
    kind: Kind
    recipe: Recipe | None


@dataclass(frozen=True)
class TargetFiles:
    """What a target consists of, before anything is loaded.

    `source` and `revision` are the base model's; `adapter` is the folder of the adapter, if there
    is one. `trust_remote_code`: the caller's word, or the recipe's.
    """

    kind: Kind
    recipe: Recipe | None
    source: str
    revision: str | None
    adapter: Path | None
    trust_remote_code: bool

    @property
    def parts(self) -> dict[str, list[str]] | None:
        parts = None if self.recipe is None else self.recipe.parts
        return None if parts is None else {str(part): paths for part, paths in parts.items()}


def open_target(
    target: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device | None = None,
    quantization_bit: int | None = None,
    trust_remote_code: bool = False,
) -> OpenTarget:
    """Load `target` in eval mode, all parameters frozen.

    `dtype` is that of what is not quantised. `quantization_bit` None: as the run was trained, 16
    for an adapter or a model. A run may use remote code if its recipe says so.

    Raises VlmtuneError for a target that is nothing of this, an unfinished run, and an adapter that
    does not fit its base in every key.
    """
    files = read_target(target, trust_remote_code=trust_remote_code)
    recipe = files.recipe
    vlm = load_vlm(
        files.source,
        revision=files.revision,
        trust_remote_code=files.trust_remote_code,
        quantization_bit=quantization_bit or (16 if recipe is None else recipe.quantization_bit),
        quantization=None if recipe is None else recipe.quantization,
        dtype=dtype,
        device=device,
        parts=files.parts,
    )
    if files.adapter is not None:
        vlm = with_adapter(vlm, files.adapter, files.trust_remote_code)
    vlm.model.requires_grad_(False)
    return OpenTarget(vlm, files.kind, recipe)


def read_target(target: str | Path, *, trust_remote_code: bool = False) -> TargetFiles:
    """Find a target's base model and adapter. Raises VlmtuneError as `open_target` does, but for
    what only loading shows."""
    check_target(target)
    folder = Path(target).expanduser()
    recipe = read_run_recipe(folder) if (folder / RUN_FILE).is_file() else None
    result = folder if recipe is None else result_of_run(folder)
    trust = trust_remote_code or (recipe is not None and recipe.trust_remote_code)
    if (result / ADAPTER_FILE).is_file():
        source, revision = base_of_adapter(result)
        say_unused_weights(result, source)
        kind: Kind = "adapter" if recipe is None else "run"
        return TargetFiles(kind, recipe, source, revision, result, trust)
    source = str(result) if result.is_dir() else str(target)
    return TargetFiles("model" if recipe is None else "run", recipe, source, None, None, trust)


def check_target(target: str | Path) -> None:
    """Raise VlmtuneError for a target of which its files' names show that it cannot be opened."""
    folder = Path(target).expanduser()
    if (folder / RUN_FILE).is_file():
        result_of_run(folder)
    elif (folder / ADAPTER_FILE).is_file():
        base_of_adapter(folder)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise VlmtuneError(
            "the folder is not a run, an adapter or a model",
            file=folder,
            expected=f"{RUN_FILE}, {ADAPTER_FILE} or config.json in it",
        )
    else:
        check_source(str(target))


def read_run_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run folder; unlike for training, its data may be gone since."""
    return load_resolved(folder / RUN_FILE)


def result_of_run(folder: Path) -> Path:
    """`adapter/` or `model/` of a run. Raises VlmtuneError where the run has not finished."""
    for name, file in (("adapter", ADAPTER_FILE), ("model", "config.json")):
        if (folder / name / file).is_file():
            return folder / name
    checkpoints = sorted(p.name for p in (folder / "checkpoints").glob("step-*"))
    raise VlmtuneError(
        "the run has not finished: it has no adapter/ and no model/",
        file=folder,
        got=f"checkpoints {', '.join(checkpoints)}" if checkpoints else "no checkpoint either",
        do="finish it with `vlmtune train RECIPE --resume auto`"
        if checkpoints
        else "train it again: `vlmtune train RECIPE`",
    )


def base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """The base model's source and revision that an adapter folder names."""
    path = folder / ADAPTER_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VlmtuneError(f"not JSON: {error}", file=path) from error
    base = config.get("base_model_name_or_path")
    if not base:
        raise VlmtuneError(
            "the adapter does not name its base model",
            file=path,
            expected="base_model_name_or_path: a hub id or a folder",
            do="write it into the file",
        )
    return base, config.get("revision")


def say_unused_weights(folder: Path, source: str) -> None:
    """Warn where a model lies beside the adapter in `folder`, which is opened on its base `source`
    all the same."""
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        logger.warning(
            "%s holds an adapter and a model: the adapter is opened on the base that its %s names, "
            "%s; the model beside it is not used",
            folder,
            ADAPTER_FILE,
            source,
        )


def with_adapter(vlm: VLM, folder: Path, trust_remote_code: bool = False) -> VLM:
    """`vlm` with the adapter in `folder` (changes `vlm.model` in place), and its processor.

    The processor is the adapter's own, which has the pixel budget of training, if it has one.
    Raises VlmtuneError unless every tensor of the adapter's file is in the model, equal, and none
    is missing.
    """
    tensors = _read_tensors(folder)
    _check_paths(vlm.model, tensors, folder)
    try:
        with expected_warnings():
            model = PeftModel.from_pretrained(vlm.model, str(folder))
    except (ValueError, KeyError, RuntimeError) as error:
        raise VlmtuneError(
            "the adapter does not fit its base model",
            file=folder,
            got=first_line(str(error)),
            do="use the base model, and the library versions, that it was trained with",
        ) from error
    _set_exact(adapter_tensors(model), tensors)
    carried = {n: t for n, t in model.state_dict().items() if ".base_layer." in n and n in tensors}
    _check_loaded(adapter_tensors(model) | carried, tensors, folder)
    install_kernels(model)
    model.eval().requires_grad_(False)
    processor = vlm.processor
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        processor = load_processor(str(folder), trust_remote_code=trust_remote_code)
    # A PeftModel passes on whatever a PreTrainedModel is asked for.
    return dataclasses.replace(vlm, model=cast(PreTrainedModel, model), processor=processor)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        return load_file(path)
    except FileNotFoundError:
        raise VlmtuneError("the adapter's weights are missing", file=path) from None
    except SafetensorError as error:
        raise VlmtuneError(
            f"the adapter's weights are damaged: {error}",
            file=path,
            do="copy or download them again",
        ) from error


def _check_paths(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Every tensor belongs to a module that the base has."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    lost = [name for name in tensors if _module_of(name) not in modules]
    if not tensors:
        raise VlmtuneError("the adapter is empty", file=folder / WEIGHTS_FILE)
    if lost:
        which = "none" if len(lost) == len(tensors) else f"only {len(tensors) - len(lost)}"
        raise VlmtuneError(
            f"{which} of the adapter's {len(tensors)} tensors match a module of the base model",
            file=folder / WEIGHTS_FILE,
            got=", ".join(lost[:3]) + (" …" if len(lost) > 3 else ""),
            do="use the base model that it was trained on; if it is the same, the module paths "
            "changed with a transformers version: rename the keys",
        )


def _module_of(name: str) -> str:
    """Path in the base model of the module that an adapter tensor belongs to."""
    path = name.removeprefix(PREFIX)
    if ".lora_" in path:
        return path.partition(".lora_")[0]
    # An adapter on the embeddings or the head comes with their base weight.
    return path.rpartition(".")[0].removesuffix(".base_layer")


def _set_exact(loaded: dict[str, Tensor], file: dict[str, Tensor]) -> None:
    """Undo a rounding: PEFT makes pruned tensors anew in the base's dtype, then float32 again."""
    with torch.no_grad():
        for name, tensor in file.items():
            if name in loaded and loaded[name].shape == tensor.shape:
                loaded[name].copy_(tensor)


def _check_loaded(loaded: dict[str, Tensor], file: dict[str, Tensor], folder: Path) -> None:
    """What PEFT loaded is what the file holds, tensor by tensor (up to the model's dtype)."""
    wrong = [n for n, t in file.items() if n not in loaded or not _is_equal(loaded[n], t)]
    missing = sorted(set(loaded) - set(file))
    if wrong or missing:
        raise VlmtuneError(
            f"{len(wrong)} of the adapter's {len(file)} tensors did not arrive in the model, and "
            f"{len(missing)} of the model's are not in its file",
            file=folder / WEIGHTS_FILE,
            got=", ".join([*wrong, *missing][:3]),
            do="the adapter's config and weights do not belong together: export it again",
        )


def _is_equal(loaded: Tensor, tensor: Tensor) -> bool:
    return loaded.shape == tensor.shape and torch.equal(loaded.cpu(), tensor.to(loaded.dtype))
