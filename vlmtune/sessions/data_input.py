"""What `vlmtune data` is given, data files with options or a recipe, as one section of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from vlmtune.errors import ErrorGroup, VlmtuneError, nearest
from vlmtune.sessions.preload import preload

if TYPE_CHECKING:
    from vlmtune.data.dataset import OpenFile
    from vlmtune.data.encode import Encoder
    from vlmtune.recipe.data_section import DataEntry, DataSection
    from vlmtune.recipe.schema import Recipe


RECIPE_SUFFIXES = (".yaml", ".yml")
Side = Literal["train", "eval"]


@dataclass(frozen=True)
class DataOptions:
    """The options that say what the data is, as given."""

    paths: Sequence[str]
    format: str | None = None
    columns: Sequence[str] | None = None
    image_dir: Path | None = None
    prompt: str | None = None
    annotations: Path | None = None
    split: str | None = None
    allow_outside_paths: bool = False
    allow_urls: bool = False
    on_bad_sample: Literal["error", "skip"] | None = None

    @property
    def says_how(self) -> bool:
        """Whether something is said of how a file is read."""
        given = (self.format, self.columns, self.image_dir, self.prompt)
        return any(value is not None for value in given)


@dataclass(frozen=True)
class DataInput:
    """`recipe` is None where neither a recipe nor a model was given."""

    section: DataSection
    recipe: Recipe | None
    is_recipe: bool


def read_input(options: DataOptions, *, model: str | None = None) -> DataInput:
    """The data section that the options stand for. Raises VlmtuneError for what is wrong in it."""
    for name, texts in (("the path of the data", options.paths), ("--model", [model])):
        if "" in texts:
            raise VlmtuneError(f"{name} is an empty text", expected="a name")
    if _is_recipe(options.paths):
        return _of_recipe(options, model)
    from vlmtune.recipe.data_section import DataSection
    from vlmtune.recipe.schema import Recipe

    given: dict[str, Any] = {} if not options.allow_urls else {"allow_urls": True}
    section = DataSection(
        train=entries_of(options),
        allow_outside_paths=options.allow_outside_paths,
        on_bad_sample=options.on_bad_sample or "error",
        **given,
    )
    recipe = None
    if model is not None:
        recipe = Recipe(model=model, output_dir="unused", data=section)
    return DataInput(section, recipe, is_recipe=False)


def open_input(given: DataInput, side: Side = "train") -> list[OpenFile]:
    """The files of one of the sets. Raises VlmtuneError where the recipe names none."""
    from vlmtune.data.dataset import cache_dir_of, media_policy_of, open_files

    entries = given.section.train if side == "train" else given.section.eval
    if entries is None:
        what = "the recipe has no data.eval" if given.is_recipe else "only a recipe has two sets"
        raise VlmtuneError(what, do="leave out --of eval")
    media_policy = media_policy_of(given.section)
    return open_files(entries, media_policy=media_policy, cache_dir=cache_dir_of(media_policy))


def load_encoder(recipe: Recipe) -> Encoder:
    """What makes samples of conversations as training does; loads the processor, no weights."""
    preload("vlmtune.data.encode", "vlmtune.models.load")
    from vlmtune.data.encode import encoder_for
    from vlmtune.models.load import load_processor

    processor = load_processor(
        recipe.model,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        image=recipe.image,
    )
    return encoder_for(recipe, processor)


def _is_recipe(paths: Sequence[str]) -> bool:
    return Path(paths[0]).suffix.lower() in RECIPE_SUFFIXES


def _of_recipe(options: DataOptions, model: str | None) -> DataInput:
    from vlmtune.recipe.load import load_recipe

    for name in ("format", "columns", "image_dir", "prompt", "annotations", "split"):
        if getattr(options, name) is not None:
            raise VlmtuneError(
                f"--{name.replace('_', '-')} has no effect with a recipe",
                do="write it into the recipe's data entries",
            )
    overrides = [*options.paths[1:]]
    if options.on_bad_sample is not None:
        overrides.append(f"data.on_bad_sample={options.on_bad_sample}")
    if options.allow_outside_paths:
        overrides.append("data.allow_outside_paths=true")
    if options.allow_urls:
        overrides.append("data.allow_urls=true")
    recipe = load_recipe(Path(options.paths[0]), overrides).recipe
    if model is not None:
        recipe = recipe.model_copy(update={"model": model, "revision": None})
    return DataInput(recipe.data, recipe, is_recipe=True)


def entries_of(options: DataOptions) -> list[DataEntry]:
    """The paths as entries with the keys that were given. Raises VlmtuneError for what is wrong in
    them."""
    from vlmtune.recipe.data_section import DataEntry, FormatName

    recipes = [p for p in options.paths if Path(p).suffix.lower() in RECIPE_SUFFIXES]
    if recipes:
        raise VlmtuneError("a recipe stands first and alone", got=" ".join(options.paths))
    formats = get_args(FormatName)
    if options.format is not None and options.format not in formats:
        close = nearest(options.format, formats)
        raise VlmtuneError(
            "--format is not known",
            got=options.format,
            expected=", ".join(formats),
            do=f"did you mean {close!r}?" if close else None,
        )
    if options.image_dir is not None and not options.image_dir.is_dir():
        raise VlmtuneError("no such folder of pictures", file=options.image_dir)
    settings: dict[str, Any] = {
        "format": options.format,
        "image_dir": options.image_dir,
        "prompt": options.prompt,
        "annotations": options.annotations,
        "split": options.split,
        "columns": _columns(options.columns) or None,
    }
    kept: dict[str, Any] = {
        k: str(v) if isinstance(v, Path) else v for k, v in settings.items() if v
    }
    return [DataEntry(path=path, **kept) for path in options.paths]


def _columns(given: Sequence[str] | None) -> dict[str, str]:
    from vlmtune.recipe.data_section import ColumnRole

    roles, columns = get_args(ColumnRole), dict[str, str]()
    errors: list[VlmtuneError] = []
    for text in given or ():
        role, equals, name = text.partition("=")
        if role not in roles or not equals or not name:
            expected = f"ROLE=NAME with a role of {', '.join(roles)}"
            errors.append(VlmtuneError("--columns is not understood", got=text, expected=expected))
        elif role in columns:
            errors.append(VlmtuneError(f"--columns names the {role} twice", got=text))
        columns[role] = name
    if errors:
        raise ErrorGroup(errors)
    return columns
