"""What `vlmtune data` reads, and what it finds out: data files with settings, or a recipe."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.sessions.preload import preload

if TYPE_CHECKING:
    from vlmtune.data.dataset import DataRow, OpenFile
    from vlmtune.data.encode import Encoder
    from vlmtune.data.tools.duplicates import Overlap
    from vlmtune.data.types import Conversation
    from vlmtune.recipe.data_section import DataSection
    from vlmtune.recipe.schema import Recipe
    from vlmtune.report.data_stats import SetStatistics
    from vlmtune.report.preview import Preview


RECIPE_SUFFIXES = (".yaml", ".yml")
Side = Literal["train", "eval"]


@dataclass(frozen=True)
class DataInput:
    """`recipe` is the given one, or stands for files with settings (`is_recipe` is then False)."""

    recipe: Recipe
    is_recipe: bool

    @property
    def section(self) -> DataSection:
        return self.recipe.data

    @property
    def has_model(self) -> bool:
        from vlmtune.recipe.load import NO_MODEL

        return self.recipe.model != NO_MODEL

    @property
    def sides(self) -> list[Side]:
        """The sets that are given."""
        return ["train"] if self.section.eval is None else ["train", "eval"]

    def files(self, side: Side = "train") -> list[OpenFile]:
        """The files of one of the sets. Raises VlmtuneError where it is not given."""
        from vlmtune.data.dataset import media_policy_of, open_files

        entries = self.section.train if side == "train" else self.section.eval
        if entries is None:
            raise VlmtuneError("data.eval is not given", do="leave out --of eval")
        media_policy = media_policy_of(self.section)
        return open_files(entries, media_policy=media_policy, cache_dir=media_policy.cache_folder)

    def encoder(self) -> Encoder:
        """What makes samples of conversations as training does: loads the processor, no weights.
        Raises VlmtuneError where no model is given."""
        if not self.has_model:
            raise VlmtuneError("no model is given", do="name one with --model, or give a recipe")
        preload("vlmtune.data.encode", "vlmtune.models.load")
        from vlmtune.data.encode import encoder_for
        from vlmtune.models.load import load_processor

        recipe = self.recipe
        processor = load_processor(
            recipe.model,
            revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
            image=recipe.image,
        )
        return encoder_for(recipe, processor)


def read_input(
    paths: Sequence[str], settings: Sequence[str], *, model: str | None = None
) -> DataInput:
    """A recipe with `key.sub=value` settings, or data files with settings of a recipe and of a
    data entry. Raises VlmtuneError, or an ErrorGroup of all that is wrong in the settings."""
    from vlmtune.recipe.load import is_entry_setting, load_recipe, recipe_of_files

    if not paths:
        raise VlmtuneError("no data is given", expected="data files, or a recipe")
    for name, texts in (("the path of the data", paths), ("--model", [model])):
        if "" in texts:
            raise VlmtuneError(f"{name} is empty", expected="a name")
    is_recipe = any(Path(path).suffix.lower() in RECIPE_SUFFIXES for path in paths)
    if is_recipe:
        of_entry = [text for text in settings if is_entry_setting(text)]
        if len(paths) > 1:
            what = "a recipe is given together with other files"
            raise VlmtuneError(what, got=" ".join(paths), expected="one recipe, or data files")
        if of_entry:
            raise VlmtuneError(
                "keys of a data entry have no effect with a recipe",
                got=" ".join(of_entry),
                do="write them into the recipe's data entries",
            )
        recipe = load_recipe(Path(paths[0]), settings).recipe
    else:
        recipe = recipe_of_files(paths, settings)
    if model is not None:
        recipe = recipe.model_copy(update={"model": model, "revision": None})
    return DataInput(recipe, is_recipe)


@dataclass(frozen=True)
class Previews:
    """`left_out` are the errors of chosen rows that cannot be shown."""

    shown: list[tuple[Conversation, Preview]]
    left_out: list[str]


def preview_rows(
    given: DataInput, side: Side, *, count: int, seed: int | None, ids: Sequence[str] | None
) -> Previews:
    """Some samples as the model sees them: those with `ids`, or `count` of them.

    Raises SampleError at the first row that cannot be used, unless `data.on_bad_sample` is skip
    or the sample is only too long.
    """
    files, encoder = given.files(side), given.encoder()
    from vlmtune.data.encode import OverLength
    from vlmtune.report.preview import preview

    found = Previews([], [])
    for row in choose_rows(files, count=count, seed=seed, ids=ids):
        try:
            conversation = row.conversation()
            found.shown.append((conversation, preview(conversation, encoder)))
        except SampleError as error:
            if given.section.on_bad_sample == "error" and not isinstance(error, OverLength):
                raise
            found.left_out.append(str(error))
    return found


def choose_rows(
    files: Sequence[OpenFile], *, count: int, seed: int | None, ids: Sequence[str] | None
) -> Iterator[DataRow]:
    """The rows with `ids`, or `count` rows: evenly spaced, or with `seed` at random; in their
    order. Raises VlmtuneError where there is no row with an id."""
    from vlmtune.data.dataset import iter_rows, num_rows
    from vlmtune.report.pictures import spread

    if not ids:
        total = num_rows(files)
        if seed is None:
            yield from iter_rows(files, spread(total, count))
        else:
            numbers = random.Random(seed).sample(range(total), min(count, total))
            yield from iter_rows(files, sorted(numbers))
        return
    wanted = set(ids)
    for row in iter_rows(files):
        if not wanted:
            return
        try:
            name = row.conversation().id
        except SampleError:
            continue
        if name in wanted:
            wanted.remove(name)
            yield row
    if wanted:
        raise VlmtuneError("no sample has this id", got=", ".join(sorted(wanted)))


@dataclass(frozen=True)
class Statistics:
    """Of each set by its name (`data` where there is only one, of files), and what two share."""

    sets: dict[str, SetStatistics]
    shared: Overlap | None


def statistics_of(
    given: DataInput,
    *,
    with_tokens: bool | None,
    max_samples: int | None,
    show_progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]],
) -> Statistics:
    """Of all sets that are given. `with_tokens` None: where a model is known.

    Raises an ErrorGroup of the bad rows, unless `data.on_bad_sample` is skip and a row is left.
    """
    from vlmtune.data.dataset import num_rows
    from vlmtune.data.tools.duplicates import overlap
    from vlmtune.report.data_stats import set_statistics

    measurer = None
    if with_tokens or (with_tokens is None and given.has_model):
        encoder = given.encoder()
        from vlmtune.data.measure import Measurer

        measurer = Measurer(encoder)
    sets: dict[str, SetStatistics] = {}
    for side in given.sides:
        files = given.files(side)
        total = num_rows(files)
        is_paired = given.recipe.objective == "contrastive" and side == "train"
        name = side if given.is_recipe or len(given.sides) == 2 else "data"
        with show_progress(f"rows of {name} read", min(total, max_samples or total)) as on_row:
            found = set_statistics(
                files,
                measurer=measurer,
                pair_prompt=given.recipe.eval.embedding_prompt if is_paired else None,
                max_samples=max_samples,
                on_row=on_row,
            )
        if found.bad.count and (given.section.on_bad_sample == "error" or not found.num_samples):
            raise found.bad.as_error()
        sets[name] = found
    shared = overlap(sets["train"].table, sets["eval"].table) if len(sets) == 2 else None
    return Statistics(sets, shared)
