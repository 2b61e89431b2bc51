"""What every section of the recipe is, and the values that several of them have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]


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


class ImageSection(Section):
    """The pixel budget of a picture, applied by the processor."""

    min_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Smaller pictures are enlarged to this area, in pixels. "
        "Unset: the processor's own.",
    )
    max_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Larger pictures are shrunk to this area, in pixels. "
        "Unset: the processor's own.",
    )


class DataEntry(Section):
    """One source of samples: a file, a folder, tar shards (`*`, `{000..009}`) or a hub data set."""

    path: Name = Field(
        description="File, folder, shards or `hub:owner/name`; relative to the recipe."
    )
    format: FormatName | None = Field(
        default=None, description="How a row becomes a sample. Unset: told from the first rows."
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        description="How often each row is seen in an epoch; 0.5: another half of the rows in "
        "every epoch. With `data.streaming`: the share of samples, relative to the other entries.",
    )
    image_dir: Name | None = Field(
        default=None, description="Folder that pictures are relative to. Unset: the file's own."
    )
    columns: dict[ColumnRole, Name] = Field(
        default={}, description="Names of columns, e.g. `{image: file_name, caption: text}`."
    )
    prompt: Name | None = Field(
        default=None,
        description="The question of rows that have none (captions, classes). "
        "Unset: the format's own.",
    )
    annotations: Name | None = Field(
        default=None, description="VQAv2: the file of the answers; `path` is that of the questions."
    )
    split: Name | None = Field(default=None, description="Split of a `datasets` folder or hub id.")
    subset: Name | None = Field(default=None, description="Configuration name of a hub data set.")
    revision: Name | None = Field(default=None, description="Revision of a hub data set.")


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
    """How a video becomes frames; used where samples have videos (the extra `video`)."""

    fps: float = Field(default=2.0, gt=0, description="Frames taken per second of video.")
    min_frames: int = Field(default=4, ge=2, description="At least so many frames.")
    max_frames: int = Field(default=64, ge=2, description="At most so many frames.")
    max_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Larger frames are shrunk to this area, in pixels. Unset: the processor's own.",
    )


class DataSection(Section):
    """What is trained and evaluated on."""

    train: Entries = Field(
        description="What is trained on: a path relative to the recipe, an entry `{path, format, "
        "weight, …}`, or a list of both."
    )
    eval: Entries | None = Field(
        default=None, description="What is evaluated on during training; as `train`."
    )
    streaming: bool = Field(
        default=False,
        description="Read `train` from front to back instead of by number: for files that cannot "
        "be indexed (`.gz`, hub data sets) or that are not to be. Needs `train.max_steps`.",
    )
    shuffle_buffer: int = Field(
        default=10_000,
        ge=1,
        description="With `streaming`: rows that are shuffled at a time.",
    )
    max_tokens: int = Field(
        default=2048, ge=8, description="Longest sample in tokens, image tokens included."
    )
    over_length: Literal["error", "drop", "shrink_images", "trim_text"] = Field(
        default="error",
        description="What happens to a longer sample: stop; leave it out and count it; shrink its "
        "pictures until it fits; cut text at the end. A cut never goes through a picture.",
    )
    train_on: Literal["assistant", "last_turn"] = Field(
        default="assistant",
        description="Which answers are supervised: all of a conversation, or its last. A turn with "
        "`train: false` or `weight: 0` never is.",
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        default="error",
        description="A sample that cannot be used: stop, or write it to `skipped.jsonl`.",
    )
    max_bad_fraction: Fraction = Field(
        default=0.01,
        description="With `skip`: the fraction of bad samples beyond which the run stops.",
    )
    max_image_pixels: int = Field(
        default=100_000_000,
        ge=1,
        description="A picture with more pixels than this is refused before it is decoded "
        "(decompression bombs).",
    )
    allow_outside_paths: bool = Field(
        default=False,
        description="Pictures may be outside the folder of their data file (or its `image_dir`): "
        "absolute paths, `..`, symbolic links that lead out.",
    )
    allow_urls: bool = Field(
        default=False, description="Pictures may be fetched from http(s) URLs."
    )
    allow_private_addresses: bool = Field(
        default=False,
        description="With `allow_urls`: also from this machine and private networks.",
    )
    max_download_bytes: int = Field(
        default=100_000_000, ge=1, description="With `allow_urls`: the largest download, in bytes."
    )
    url_timeout_seconds: float = Field(
        default=20.0, gt=0, description="With `allow_urls`: the longest one download may take."
    )
    cache: Literal["off", "disk"] = Field(
        default="off",
        description="`disk`: keep what the processor made of each sample, for later epochs and "
        "runs. About 4 bytes for each value the processor gives: some 15 MB a megapixel.",
    )
    cache_dir: Name | None = Field(
        default=None,
        description="Folder of indexes, downloads and the sample cache. Unset: `vlmtune` in the "
        "user's cache folder.",
    )
    num_workers: int = Field(
        default=2,
        ge=0,
        description="Processes that decode and encode ahead of the step; 0: in line.",
    )
