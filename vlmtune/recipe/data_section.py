"""What every section of the recipe is, and the values and metadata that several of them have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], BeforeValidator(_as_list, json_schema_input_type=Name | list[Name])]
"""A list of names; a single name is a list of one."""


@dataclass(frozen=True)
class Not:
    """In a condition: any value but this one, and no list that holds it."""

    value: object

    def holds(self, value: object) -> bool:
        names = value if isinstance(value, list) else [value]
        return self.value not in (value, names) and self.value not in names


Condition = Mapping[str, object]
"""Dotted keys of the recipe, and of each the value, a tuple of values, or the `Not` it must be."""


@dataclass(frozen=True)
class Effect:
    """When a key has an effect: metadata of a field, read by `rules.py` alone.

    top_k: Annotated[int, Effect(needs={"eval.decoding.method": "sample"})] = Field(default=0)

    needs: the condition under which the key has an effect; of several, one must hold. A key in a
        section needs what the section needs, too.
    off: the value that turns the key off. A key that is off, or null, is never without effect.
    belongs_to: the key that this one was chosen for: its value says nothing about another value
        of that key, as the names of metrics say nothing about another task.
    changes_step: whether a step computes something else with another value (or: under which
        condition it does). A key that changes no step may change between a stop and its resume.
        None: as the section that it is in, which does if it does not say.
    do: what to do where it has no effect because of a key; without it, `needs` says enough.
    """

    needs: Condition | tuple[Condition, ...] = ()
    off: object = None
    belongs_to: str | None = None
    changes_step: bool | Condition | None = None
    do: Mapping[str, str] = field(default_factory=dict)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


FormatName = Literal[
    "messages",
    "sharegpt",
    "openai",
    "query_response",
    "alpaca",
    "table",
    "coco_captions",
    "vqav2",
    "docvqa",
    "chartqa",
    "image_text",
    "class_folders",
]
ColumnRole = Literal["id", "image", "question", "answer", "caption", "label"]


FREE = Effect(changes_step=False)
WITH_URLS = Effect(needs={"data.allow_urls": True})


class ImageSection(Section):
    """Between which sizes the processor scales pictures."""

    min_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Smaller pictures are enlarged to this number of pixels (width times height). "
        "Null: the processor's own minimum.",
    )
    max_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Larger pictures are shrunk to this number of pixels (width times height). "
        "Null: the processor's own maximum.",
    )


class DataEntry(Section):
    """One source of samples: a file, a folder, tar shards (`*`, `{000..009}`) or a hub data set."""

    path: Name = Field(
        description="A file, a folder, tar shards or `hub:owner/name`. Paths are relative to the "
        "recipe."
    )
    format: FormatName | None = Field(
        default=None,
        description="How a row becomes a sample. Null: recognised from the first rows.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        description="How often each row is used per epoch: 2 is twice; 0.5 is half of the rows, "
        "another half in each epoch. With `data.streaming`: the share of the samples that come "
        "from this entry, relative to the weights of the other entries.",
    )
    image_dir: Name | None = Field(
        default=None,
        description="Folder that the paths of pictures are relative to. Null: the folder of the "
        "file.",
    )
    columns: dict[ColumnRole, Name] = Field(
        default={},
        description="Names of the columns that hold what a sample needs; for example "
        "`{image: file_name, caption: text}`.",
    )
    prompt: Name | None = Field(
        default=None,
        description="The question that is asked where rows have none (captions, classes). Null: "
        "that of the format.",
    )
    annotations: Name | None = Field(
        default=None,
        description="VQAv2: the file with the answers; `path` is the file with the questions.",
    )
    split: Name | None = Field(
        default=None,
        description="Split of a hub data set, or of a folder that the library `datasets` wrote.",
    )
    subset: Name | None = Field(default=None, description="Configuration name of a hub data set.")
    revision: Name | None = Field(
        default=None, description="Branch, tag or commit of a hub data set."
    )


def _as_entries(value: object) -> object:
    """A path, an entry, or a list of both, as a list of entries."""
    if value is None:
        return None
    given = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in given]


def _as_written(entries: list[DataEntry] | None) -> object:
    """The shortest form that reads back the same: a path for an entry that is nothing else."""
    if entries is None:
        return None
    short: list[object] = [
        entry.path if entry.model_fields_set == {"path"} else entry.model_dump(exclude_unset=True)
        for entry in entries
    ]
    return short[0] if len(short) == 1 else short


Entries = Annotated[
    list[DataEntry],
    Field(min_length=1),
    BeforeValidator(_as_entries, json_schema_input_type=str | DataEntry | list[str | DataEntry]),
    PlainSerializer(_as_written),
]


class VideoSection(Section):
    """Which frames of a video are used. Videos need the extra `video`."""

    fps: float = Field(default=2.0, gt=0, description="Frames per second of video.")
    min_frames: int = Field(default=4, ge=2, description="Minimum number of frames of a video.")
    max_frames: int = Field(default=64, ge=2, description="Maximum number of frames of a video.")
    max_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Larger frames are shrunk to this number of pixels (width times height). "
        "Null: the processor's own maximum.",
    )


class DataSection(Section):
    """The data for training and evaluation, and how they are read."""

    train: Entries = Field(
        description="The training data: a path relative to the recipe, an entry `{path, format, "
        "weight, …}`, or a list of paths and entries."
    )
    eval: Annotated[Entries | None, FREE] = Field(
        default=None,
        description="The data for evaluation during training; written as `train`. Null: none.",
    )
    streaming: bool = Field(
        default=False,
        description="Read `train` from front to back, without an index of its rows: for files "
        "that cannot be indexed (`.gz`, hub data sets) or that should not be. Needs "
        "`train.max_steps`.",
    )
    shuffle_buffer: Annotated[int, Effect(needs={"data.streaming": True})] = Field(
        default=10_000,
        ge=1,
        description="With `streaming`: number of rows that are shuffled together.",
    )
    max_tokens: int = Field(
        default=2048,
        ge=8,
        description="Maximum length of a sample in tokens, image tokens included.",
    )
    over_length: Literal["error", "drop", "shrink_images", "trim_text"] = Field(
        default="error",
        description="What happens with a longer sample. `error`: the run stops. `drop`: the sample "
        "is left out and counted. `shrink_images`: its pictures are shrunk until it fits. "
        "`trim_text`: its text is cut at the end, but never within a picture.",
    )
    train_on: Literal["assistant", "last_turn"] = Field(
        default="assistant",
        description="Which answers are trained on. `assistant`: every answer of a conversation. "
        "`last_turn`: only the last one. A turn with `train: false` or `weight: 0` never is.",
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        default="error",
        description="What happens with a sample that cannot be used. `error`: the run stops. "
        "`skip`: the sample is left out and recorded in `skipped.jsonl`.",
    )
    max_bad_fraction: Annotated[Fraction, Effect(needs={"data.on_bad_sample": "skip"})] = Field(
        default=0.01,
        description="With `on_bad_sample: skip`: the run stops if a larger fraction of the samples "
        "cannot be used.",
    )
    max_image_pixels: int = Field(
        default=100_000_000,
        ge=1,
        description="Maximum number of pixels of a picture. A larger one is refused before it is "
        "decoded, as it could fill the memory.",
    )
    allow_outside_paths: bool = Field(
        default=False,
        description="Allow pictures outside the folder of their data file (or its `image_dir`): "
        "by absolute paths, `..`, or symbolic links.",
    )
    allow_urls: bool = Field(
        default=False, description="Allow pictures to be downloaded from http(s) URLs."
    )
    allow_private_addresses: Annotated[bool, WITH_URLS] = Field(
        default=False,
        description="With `allow_urls`: allow downloads from this machine and from private "
        "networks too.",
    )
    max_download_bytes: Annotated[int, WITH_URLS] = Field(
        default=100_000_000,
        ge=1,
        description="With `allow_urls`: maximum size of one download, in bytes.",
    )
    url_timeout_seconds: Annotated[
        float, Effect(needs={"data.allow_urls": True}, changes_step=False)
    ] = Field(
        default=20.0,
        gt=0,
        description="With `allow_urls`: maximum time of one download, in seconds.",
    )
    cache: Annotated[Literal["off", "disk"], FREE] = Field(
        default="off",
        description="`disk`: keep each sample on disk as the processor returned it, for later "
        "epochs and runs. This takes about 15 MB per megapixel (4 bytes per value).",
    )
    cache_dir: Annotated[Name | None, FREE] = Field(
        default=None,
        description="Folder for indexes, downloads and caches. Null: `vlmtune` in the user's cache "
        "folder.",
    )
    num_workers: Annotated[int, FREE] = Field(
        default=2,
        ge=0,
        description="Number of processes that prepare samples ahead of the step. 0: the training "
        "process prepares them itself.",
    )
