"""A folder of pictures: with a text file beside each, or in a folder for each class."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlmtune.data.sources.base import RawRow, iter_by_number
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError, escaped, plural, shorten
from vlmtune.files import Numbers
from vlmtune.recipe.data_section import FormatName

logger = logging.getLogger("vlmtune")

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".tar", ".gz")
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "eval", "test"})

Kind = Literal["image_text", "class_folders"]


class Names:
    """Many texts in little memory: their bytes in one piece."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends: Numbers = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._content = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._content[self._ends[index] : self._ends[index + 1]])


@dataclass(frozen=True)
class FolderRows:
    """The pictures below a folder, in the order of their names."""

    path: Path
    kind: Kind
    names: Names

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path

    def __len__(self) -> int:
        return len(self.names)

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        name, source = self.names[index], self.place(index)
        if self.kind == "image_text":
            return {"image": name, "text": _read_text(self.path, name, source)}
        label, separator, _ = name.partition("/")
        if not separator:
            raise SampleError(
                "the picture is not in a class folder",
                at=source,
                got=name,
                expected="CLASS/PICTURE",
            )
        return {"image": name, "label": label}

    def iter_from(self, start: int) -> Iterator[RawRow]:
        return iter_by_number(self, start)


def open_picture_folder(path: Path, *, format_name: FormatName | None) -> FolderRows:
    """The rows of a folder: `format_name` where the recipe names it, else what it looks like.

    Raises VlmtuneError where it holds no pictures, or what they are cannot be told. Files that are
    not used are counted and said.
    """
    pictures, texts, unused = _list(path)
    if format_name is None:
        kind = _detect(path, pictures, texts)
    elif format_name == "image_text" or format_name == "class_folders":
        kind = format_name
    else:
        raise _unknown(path, f"format: {format_name}")
    if not pictures:
        raise _unknown(path, "no picture in it")
    stems = {os.path.splitext(name)[0] for name in pictures} if kind == "image_text" else set()
    unused["texts without a picture"] += len(texts - stems)
    counts = ", ".join(f"{what} ({num:,})" for what, num in sorted(unused.items()) if num)
    if counts:
        logger.info("%s: unused files: %s", path, counts)
    if kind == "class_folders":
        _log_classes(path, pictures)
    return FolderRows(path, kind, Names(pictures))


def _list(path: Path) -> tuple[list[str], set[str], Counter[str]]:
    """Pictures in order, the texts' names without their ending, and what else is there."""
    pictures: list[str] = []
    texts: set[str] = set()
    unused: Counter[str] = Counter()

    def fail(error: OSError) -> None:
        raise VlmtuneError(
            f"the folder cannot be read ({error.strerror})", file=error.filename
        ) from error

    for above, folders, files in os.walk(path, onerror=fail):
        relative = "" if above == str(path) else os.path.relpath(above, path) + "/"
        hidden = [name for name in folders if name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        unused["hidden folders"] += len(hidden)
        unused["links to folders"] += len(links)
        folders[:] = [name for name in folders if name not in hidden]
        for name in files:
            stem, ending = os.path.splitext(name)
            if name.startswith("."):
                unused["hidden files"] += 1
            elif ending.lower() in PICTURES:
                pictures.append(relative + name)
            elif ending.lower() == ".txt":
                texts.add(relative + stem)
            else:
                unused[ending.lower() or "files without an extension"] += 1
    return sorted(pictures), texts, unused


def _detect(path: Path, pictures: list[str], texts: set[str]) -> Kind:
    data = sorted(name for name in os.listdir(path) if name.lower().endswith(DATA_FILES))
    if data:
        raise VlmtuneError(
            "the data file is a folder that holds data files",
            file=path,
            got=", ".join(data[:3]) + (", …" if len(data) > 3 else ""),
            do=f"give the path of the file: {path / data[0]}, or a pattern with * for several",
        )
    if not pictures:
        raise _unknown(path, "no picture in it")
    if any(os.path.splitext(name)[0] in texts for name in pictures):
        return "image_text"
    classes = {name.partition("/")[0] for name in pictures if "/" in name}
    if any("/" not in name for name in pictures):
        raise _unknown(path, "pictures with neither texts nor folders of their own")
    if classes <= _SPLITS:
        raise VlmtuneError(
            "the data file is a folder of splits",
            file=path,
            got=", ".join(sorted(classes)),
            do=f"name one: {path / min(classes)}; if they are classes, set format: class_folders",
        )
    if len(classes) == 1:
        raise VlmtuneError(
            "all pictures are in one folder: the class of each would be the same",
            file=path,
            got=", ".join(classes),
            do=f"give {path / min(classes)}, or set format: class_folders or image_text",
        )
    return "class_folders"


def _log_classes(path: Path, pictures: list[str]) -> None:
    """Name the classes: a folder too high or too low gives others than are meant."""
    classes = Counter(name.partition("/")[0] for name in pictures if "/" in name)
    names = ", ".join(f"{name} ({num:,})" for name, num in sorted(classes.items()))
    deeper = sum(name.count("/") > 1 for name in pictures)
    lost = plural(deeper, "picture is", "pictures are")
    more = f"; {lost} in folders of a class's folder" if deeper else ""
    logger.info(
        "%s: %s: %s%s",
        path,
        plural(len(classes), "class", "classes"),
        escaped(shorten(names, 300)),
        more,
    )


def _unknown(path: Path, got: str) -> VlmtuneError:
    return VlmtuneError(
        "the data file is a folder of an unknown kind",
        file=path,
        got=got,
        expected="pictures with a text file beside each (image_text), a folder of pictures for "
        "each class (class_folders), or what datasets' save_to_disk has written",
    )


def _read_text(folder: Path, name: str, source: Source) -> str:
    text = os.path.splitext(name)[0] + ".txt"
    try:
        content = (folder / text).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("the picture's text is not UTF-8", at=source, got=text) from error
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        raise SampleError(
            "the picture has no text"
            if is_missing
            else f"the picture's text cannot be read ({error.strerror})",
            at=source,
            got=name,
            expected=f"a file {text}",
        ) from error
    return content.strip()
