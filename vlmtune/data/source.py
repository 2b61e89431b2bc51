"""Data files to conversations: rows are checked before any model is loaded.

entries -> dataset.open_files -> scan: parse, unique ids, pictures exist -> ConversationSet
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vlmtune.data.dataset import (
    SCANNED_OUTRIGHT,
    ConversationSet,
    OnBadSample,
    OpenFile,
    open_files,
)
from vlmtune.data.formats.registry import parse_row, unused_keys
from vlmtune.data.formats.rows import check_trainable
from vlmtune.data.media import locate_media
from vlmtune.data.placed import placed
from vlmtune.data.sources.digest import digests_of
from vlmtune.data.text import shorten
from vlmtune.data.types import LOCAL, Access, Conversation, Media, Skipped, Source
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError, plural
from vlmtune.recipe.data_section import DataEntry, DataSection

logger = logging.getLogger("vlmtune")

MAX_ERRORS_SHOWN = 20

NEW_IDS = "change it, or take ids out; `vlmtune data convert --new-ids` gives new ones"

Files = Sequence[str | Path | DataEntry]


def load_conversations(
    files: Files,
    *,
    on_bad_sample: OnBadSample = "error",
    check_media: bool = True,
    access: Access = LOCAL,
) -> tuple[list[Conversation], list[Skipped]]:
    """All conversations of `files`, in order and in memory, and with `skip` the rows that cannot
    be used. For evaluation; training asks `open_conversations`.

    With `error`, raises an ErrorGroup of every bad row (the first 20 in words). A file that
    cannot be read, or a broken JSON array, is an error either way. `check_media` looks for every
    picture file; none is decoded here.
    """
    conversations: list[Conversation] = []
    opened = open_files(as_entries(files), access=access, cache_dir=cache_dir_of(access))
    _, skipped = _scan(opened, on_bad_sample, check_media=check_media, into=conversations)
    return conversations, skipped


def open_conversations(
    files: Files, *, on_bad_sample: OnBadSample, access: Access = LOCAL
) -> tuple[ConversationSet, list[Skipped]]:
    """The samples of `files` by number, and with `skip` the rows that are not among them.

    A set of up to `SCANNED_OUTRIGHT` rows is checked as `load_conversations` does; of a larger one
    a bad row raises when it is asked for, and that is said.
    """
    opened = open_files(as_entries(files), access=access, cache_dir=cache_dir_of(access))
    num_rows = sum(len(file.rows) for file in opened)
    if num_rows > SCANNED_OUTRIGHT:
        logger.info(
            "%s rows are checked when their turn comes; `vlmtune check` looks at all of them first",
            f"{num_rows:,}",
        )
        return ConversationSet(tuple(opened), (None,) * len(opened)), []
    kept, skipped = _scan(opened, on_bad_sample, check_media=True, into=None)
    return ConversationSet(tuple(opened), tuple(kept)), skipped


def access_of(section: DataSection) -> Access:
    """What the recipe allows pictures and videos to be read from."""
    return Access(
        allow_outside_paths=section.allow_outside_paths,
        allow_urls=section.allow_urls,
        allow_private_addresses=section.allow_private_addresses,
        max_download_bytes=section.max_download_bytes,
        url_timeout_seconds=section.url_timeout_seconds,
        cache_dir=None if section.cache_dir is None else Path(section.cache_dir),
    )


def all_rows(files: Files, *, access: Access = LOCAL) -> ConversationSet:
    """Every row of `files` by number, unchecked: a bad one raises SampleError when asked for."""
    opened = open_files(as_entries(files), access=access, cache_dir=cache_dir_of(access))
    return ConversationSet(tuple(opened), (None,) * len(opened))


def as_entries(files: Files) -> list[DataEntry]:
    """Paths as entries that are nothing else."""
    return [file if isinstance(file, DataEntry) else DataEntry(path=str(file)) for file in files]


def cache_dir_of(access: Access) -> Path:
    """Where indexes and downloads are kept: the recipe's `data.cache_dir`, or the user's cache."""
    return access.cache_folder


def content_hash(files: Files, *, cache_dir: Path | None = None) -> dict[str, str]:
    """A digest of each file, shard, folder or data set, as a run folder records it."""
    folder = cache_dir or cache_dir_of(LOCAL)
    return {
        path: digest
        for entry in as_entries(files)
        for path, digest in digests_of(entry, cache_dir=folder).items()
    }


def _scan(
    files: Sequence[OpenFile],
    on_bad_sample: OnBadSample,
    *,
    check_media: bool,
    into: list[Conversation] | None,
) -> tuple[list[list[int]], list[Skipped]]:
    """The good rows of each file and, with `skip`, the bad ones; raises an ErrorGroup otherwise."""
    kept: list[list[int]] = []
    errors: list[SampleError] = []
    skipped: list[Skipped] = []
    places: dict[str, Source] = {}
    for file in files:
        unused: Counter[str] = Counter()
        kept.append([])
        for index in range(len(file.rows)):
            source = file.rows.place(index)
            try:
                row = file.row(index)
                unused.update(unused_keys(row.values, file.entry, file.format))
                conversation = parse_row(row, file.format)
                if into is None:
                    check_trainable(conversation)
                else:  # answers are told apart by id; training goes by place
                    _check_id(conversation, places)
                if check_media:
                    check_located(conversation)
            except SampleError as error:
                errors.append(error)
                skipped.append(Skipped(f"{file.label}:{source.line}", source, str(error)))
                continue
            kept[-1].append(index)
            if into is not None:
                into.append(conversation)
        if unused:
            names = ", ".join(f"{key} ({count})" for key, count in sorted(unused.items()))
            logger.info("%s: keys kept out of training, with their rows: %s", file.rows.file, names)
    if errors and on_bad_sample == "error":
        raise _group(errors)
    return kept, skipped


def check_located(conversation: Conversation) -> None:
    """Look for every picture and video. Raises SampleError with the row's place."""
    everything: tuple[Media, ...] = (*conversation.images, *conversation.videos)
    for media in everything:
        try:
            locate_media(media)
        except VlmtuneError as error:
            raise placed(error, conversation.source) from error


def _check_id(conversation: Conversation, places: dict[str, Source]) -> None:
    first = places.setdefault(conversation.id, conversation.source)
    if first is not conversation.source:
        raise SampleError(
            f"the id {shorten(conversation.id, 60)!r} is taken",
            file=conversation.source.file,
            line=conversation.source.line,
            got=f"the same id at {first.file}:{first.line}",
            expected="an id of its own",
            do=NEW_IDS,
        )


def _group(errors: Sequence[SampleError]) -> ErrorGroup:
    shown: list[VlmtuneError] = list(errors[:MAX_ERRORS_SHOWN])
    if len(errors) > MAX_ERRORS_SHOWN:
        shown.append(
            VlmtuneError(f"and {plural(len(errors) - MAX_ERRORS_SHOWN, 'more bad sample')}")
        )
    return ErrorGroup(shown)
