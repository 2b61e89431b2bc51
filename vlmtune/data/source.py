"""Data files to conversations: every row is checked before any model is loaded.

JSONL line | item of a JSON array -> object -> format -> Conversation -> pictures exist
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from vlmtune.data.formats.registry import parse_row
from vlmtune.data.formats.rows import KNOWN_KEYS, Row, describe
from vlmtune.data.media import locate_image, shorten
from vlmtune.data.types import Conversation, Skipped, Source
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError

logger = logging.getLogger("vlmtune")

MAX_ERRORS_SHOWN = 20
_BOM = b"\xef\xbb\xbf"


def load_conversations(
    files: Sequence[str | Path],
    *,
    on_bad_sample: Literal["error", "skip"] = "error",
    check_media: bool = True,
) -> tuple[list[Conversation], list[Skipped]]:
    """All conversations of `files`, in order, and with `skip` the rows that cannot be used.

    With `error`, raises an ErrorGroup of every bad row (the first 20 in words). A file that
    cannot be read, or a broken JSON array, is an error either way. `check_media` looks for every
    picture file; none is decoded here.
    """
    paths = _checked_paths(files)
    labels = _labels(paths)
    conversations: list[Conversation] = []
    errors: list[SampleError] = []
    skipped: list[Skipped] = []
    places: dict[str, Source] = {}
    for path in paths:
        unused: Counter[str] = Counter()
        num_rows = 0
        for source, value in _read_rows(path):
            num_rows += 1
            fallback_id = f"{labels[path]}:{source.line}"
            try:
                row = _row(value, source, path.parent, fallback_id)
                unused.update(row.values.keys() - KNOWN_KEYS)
                conversation = parse_row(row)
                _check_id(conversation, places)
                if check_media:
                    _check_images(conversation)
            except SampleError as error:
                errors.append(error)
                skipped.append(Skipped(fallback_id, source, str(error)))
                continue
            conversations.append(conversation)
        if num_rows == 0:
            raise VlmtuneError("there is no sample in the file", file=path, expected="JSON lines")
        if unused:
            names = ", ".join(f"{key} ({count})" for key, count in sorted(unused.items()))
            logger.info("%s: keys kept out of training, with their rows: %s", path, names)
    if errors and on_bad_sample == "error":
        raise _group(errors)
    return conversations, skipped


def content_hash(files: Sequence[str | Path]) -> dict[str, str]:
    """The SHA-256 of each file's bytes, as a run folder records it."""
    hashes = {}
    for file in files:
        digest = hashlib.sha256()
        with Path(file).open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        hashes[str(file)] = digest.hexdigest()
    return hashes


def _checked_paths(files: Sequence[str | Path]) -> list[Path]:
    paths = [Path(file) for file in files]
    for path in paths:
        if path.is_dir():
            raise VlmtuneError("the data file is a folder", file=path, expected="a JSONL file")
        if not path.exists():
            raise VlmtuneError("no such data file", file=path, do="correct the path")
    twice = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise VlmtuneError("the data file is listed twice", file=twice[0], expected="once")
    return paths


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    """What the ids of a file's rows start with: its stem, or the whole path where stems repeat."""
    stems = Counter(path.stem for path in paths)
    return {path: path.stem if stems[path.stem] == 1 else str(path) for path in paths}


def _read_rows(path: Path) -> Iterator[tuple[Source, Any]]:
    """Each row with its place: its value, or the SampleError that says why it has none."""
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
            is_array = head.removeprefix(_BOM).lstrip().startswith(b"[")
            stream.seek(0)
            if is_array:
                yield from _read_array(stream.read(), path)
                return
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    source = Source(str(path), number)
                    yield source, _parse_line(line, source)
    except OSError as error:
        raise VlmtuneError(f"the data file cannot be read ({error.strerror})", file=path) from error


def _read_array(content: bytes, path: Path) -> Iterator[tuple[Source, Any]]:
    try:
        items = _load_json(content.removeprefix(_BOM))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SampleError("the file is not UTF-8", file=path, line=line) from error
    except json.JSONDecodeError as error:
        raise SampleError(
            f"not JSON ({error.msg}, column {error.colno})", file=path, line=error.lineno
        ) from error
    except (ValueError, RecursionError) as error:
        raise SampleError(f"not JSON ({_reason(error)})", file=path, line=1) from error
    for number, item in enumerate(items, start=1):
        yield Source(str(path), number), item


def _parse_line(line: bytes, source: Source) -> Any:
    file, number = source.file, source.line
    try:
        return _load_json(line)
    except UnicodeDecodeError as error:
        return SampleError(
            f"the line is not UTF-8 (byte {error.start + 1})",
            file=file,
            line=number,
            do="save the file as UTF-8",
        )
    except json.JSONDecodeError as error:
        return SampleError(
            f"not JSON ({error.msg}, column {error.colno})",
            file=file,
            line=number,
            got=shorten(line.decode("utf-8").strip(), 60),
            expected="one JSON object a line",
        )
    except (ValueError, RecursionError) as error:
        return SampleError(f"not JSON ({_reason(error)})", file=file, line=number)


def _load_json(content: bytes) -> Any:
    return json.loads(
        content.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
    )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is given twice")
    return values


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _row(value: Any, source: Source, base_dir: Path, fallback_id: str) -> Row:
    if isinstance(value, SampleError):
        raise value
    if not isinstance(value, dict):
        raise SampleError(
            "the row is not an object",
            file=source.file,
            line=source.line,
            got=describe(value),
            expected='{"messages": […]}',
        )
    return Row(value, source, base_dir, fallback_id)


def _check_id(conversation: Conversation, places: dict[str, Source]) -> None:
    first = places.setdefault(conversation.id, conversation.source)
    if first is not conversation.source:
        raise SampleError(
            f"the id {shorten(conversation.id, 60)!r} is taken",
            file=conversation.source.file,
            line=conversation.source.line,
            got=f"the same id at {first.file}:{first.line}",
            expected="an id of its own",
        )


def _check_images(conversation: Conversation) -> None:
    for image in conversation.images:
        try:
            locate_image(image)
        except VlmtuneError as error:
            raise SampleError(
                error.message,
                file=conversation.source.file,
                line=conversation.source.line,
                got=error.got,
                expected=error.expected,
                do=error.do,
            ) from error


def _group(errors: Sequence[SampleError]) -> ErrorGroup:
    shown: list[VlmtuneError] = list(errors[:MAX_ERRORS_SHOWN])
    if len(errors) > MAX_ERRORS_SHOWN:
        shown.append(VlmtuneError(f"and {len(errors) - MAX_ERRORS_SHOWN} more bad samples"))
    return ErrorGroup(shown)
