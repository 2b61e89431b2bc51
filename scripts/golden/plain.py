"""What a command left, as plain values that two records can be compared by.

Texts become lists of lines, JSON stays JSON, tensors become hashes, pages become their visible
text. What differs from one run of the same program to the next (times, speeds, memory, versions,
absolute paths) is replaced by a word in <>, so that its absence would still show.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

LARGEST_JSON = 50_000
"""Bytes; larger ones (tokenizers) are recorded by their hash."""

MEASURED = re.compile(
    r".*_per_second|(paused_)?seconds|data_wait_fraction|peak_memory_bytes|(free_)?bytes"
)
"""Keys whose values are measured anew by each run."""
OF_THE_MACHINE = {"python", "platform", "cpu_capability", "num_threads", "peft_version"}
OF_THE_MACHINE |= {"transformers_version", "torch_version"}
HASH_OF_PATHS = {"settings", "data_sha256"}
"""Hashes of what names absolute paths: of all settings, and of data files that cases lay out."""
KEPT = "kept/"
"""The folder that cases call `data.cache_dir`."""
UNORDERED = {"target_modules"}
"""Lists of an adapter's configuration that PEFT makes from a set."""

REPLACED = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\b\d{4}-\d\d-\d\d([T _-]\d\d[:-]?\d\d([:-]?\d\d)?)?\b", "<DATE>"),
        (r"\b\d{8}-\d{6}\b", "<DATE>"),
        (r"\b\d\d:\d\d(:\d\d)?\b", "<TIME>"),
        (r"(_per_second) [\d.,]+", r"\1 <SPEED>"),
        (r"[\d.,]+ (samples|tokens|pictures|images)( per second|/s)", r"<SPEED> \1\2"),
        (r"left [\d.]+ min", "left <TIME>"),
        (r"[\d.]+ GB of memory at most", "<MEMORY> of memory at most"),
        (r"\b[\d.]+ (GB|MB) (free|of free)", r"<MEMORY> \2"),
        (r"\bin [\d.]+ (s|min|h|seconds)\b", "in <TIME>"),
    )
]
MEASURED_ON_A_PAGE = [
    (re.compile(pattern), by)
    for pattern, by in (
        (
            r"((per second|data wait fraction|peak memory bytes)\n)[\d.,]+( %| [kMG]?B)?",
            r"\1<SPEED>",
        ),
        (r"\b[\d.]+ (seconds?|minutes?|hours?)\b", "<TIME>"),
    )
]
PROGRESS = re.compile(r".* \d+ of \d+, .* left")
"""How far a long job is, told every two seconds: whether the line comes depends on the machine."""


def plain_text(text: str, places: Mapping[str, str]) -> list[str]:
    """The lines of `text`; `places`: absolute path -> what stands for it, longest first."""
    for path, word in places.items():
        text = text.replace(path, word)
    for pattern, by in REPLACED:
        text = pattern.sub(by, text)
    return [line.rstrip() for line in text.splitlines() if not PROGRESS.fullmatch(line)]


def plain_value(value: Any, places: Mapping[str, str], key: str = "") -> Any:
    """A JSON value without what a run measures anew."""
    if key == "versions":
        return sorted(value)
    if key in HASH_OF_PATHS:
        return _without_hashes(value, places)
    if key in OF_THE_MACHINE or (MEASURED.fullmatch(key) and value is not None):
        return "<LEFT OUT>"
    if isinstance(value, dict):
        named = {_with_words(name, places): (name, item) for name, item in value.items()}
        return {name: plain_value(item, places, own) for name, (own, item) in named.items()}
    if isinstance(value, list):
        items = [plain_value(item, places) for item in value]
        return sorted(items) if key in UNORDERED else items
    return _with_words(value, places) if isinstance(value, str) else value


def _without_hashes(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return "<LEFT OUT>"
    plain = plain_value(value, places)
    if not isinstance(plain, dict):
        return plain
    return {n: "<LEFT OUT>" if n.startswith("<CASE>") else item for n, item in plain.items()}


def plain_file(path: Path, places: Mapping[str, str]) -> Any:
    """What is recorded of a file: by its kind."""
    if path.suffix == ".safetensors":
        return tensor_hashes(path)
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [plain_value(json.loads(line), places) for line in lines]
    if path.suffix == ".json" and path.stat().st_size <= LARGEST_JSON:
        return plain_value(json.loads(path.read_text(encoding="utf-8")), places)
    if path.suffix == ".html":
        text = "\n".join(visible_text(path.read_text(encoding="utf-8")))
        for pattern, by in MEASURED_ON_A_PAGE:
            text = pattern.sub(by, text)
        return plain_text(text, places)
    if path.suffix in (".yaml", ".csv", ".txt"):
        return plain_text(path.read_text(encoding="utf-8"), places)
    return digest(path.read_bytes())


def is_read(name: str) -> bool:
    """Whether the file's content is recorded: of checkpoints only that of the tensors."""
    if "/checkpoints/" in name:
        return name.endswith(".safetensors")
    return not name.startswith(KEPT) and "/tensorboard/" not in name


def plain_name(name: str) -> str:
    """Without the time, the process and the hashes that TensorBoard and caches name files by."""
    for folder in ("tensorboard/", KEPT):
        if folder in name:
            return name.split(folder)[0] + folder + "files"
    (plain,) = plain_text(name, {})
    return plain


def tensor_hashes(path: Path) -> dict[str, str]:
    """Name -> dtype, shape and hash of each tensor, read off the file format itself."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    hashes = {}
    for name, tensor in sorted(header.items()):
        begin, end = tensor["data_offsets"]
        of_bytes = digest(content[start + begin : start + end])
        hashes[name] = f"{tensor['dtype']} {tensor['shape']} {of_bytes}"
    return hashes


def digest(content: bytes) -> str:
    return "sha256 " + hashlib.sha256(content).hexdigest()[:32]


def visible_text(page: str) -> list[str]:
    """The text of a page in its order, a heading with its tag; pictures by their hash."""
    reader = _PageText()
    reader.feed(page)
    return reader.lines


class _PageText(HTMLParser):
    UNSEEN = ("style", "script", "svg")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._unseen = 0
        self._tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self._unseen += tag in self.UNSEEN
        if tag == "img":
            self.lines.append(f"img {digest((dict(attrs).get('src') or '').encode())}")

    def handle_endtag(self, tag: str) -> None:
        self._unseen -= tag in self.UNSEEN

    def handle_data(self, data: str) -> None:
        if data.strip() and not self._unseen:
            heading = f"{self._tag}: " if re.fullmatch(r"h\d", self._tag) else ""
            self.lines.append(heading + " ".join(data.split()))


def _with_words(text: str, places: Mapping[str, str]) -> str:
    return "\n".join(plain_text(text, places)) if text.strip() else text
