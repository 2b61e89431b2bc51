"""Answers kept while an evaluation runs, and all that decides whether they hold for another.

The batch size and the number of processes are not among it: they change no answer.

FOLDER/answers-RANK.part.jsonl    {"settings": {…}}           whatever decides an answer
                                  {"number": 3, "answer": …}  in the order of answering

Each process appends to a file of its own and reads all of them, also those of a start with another
number of processes. A line that a kill cut in half is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from vlmtune import __version__
from vlmtune.data.encode import Encoder
from vlmtune.data.locations import is_url
from vlmtune.data.media import content_digest, locate_image
from vlmtune.data.types import Conversation, Image, Part, Text, Video
from vlmtune.evaluation.references import reference_answer
from vlmtune.models.load import VLM, pixel_budget
from vlmtune.recipe.schema import DecodingSection, EvalSection

VERSIONED = ("torch", "transformers", "peft")
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja")


def answer_settings(
    vlm: VLM,
    conversations: Iterable[Conversation],
    *,
    folders: Iterable[Path],
    quantization_bit: int,
    encoder: Encoder,
    section: EvalSection,
    seed: int,
) -> dict[str, Any]:
    """The settings of answers to `conversations`, as JSON has them. `folders` hold the model's
    files: adapter and base; a model of the hub is known by its commit."""
    decoding = decoding_in_effect(section.decoding)
    conversations = list(conversations)
    has_videos = any(conversation.videos for conversation in conversations)
    of_videos = {"video": encoder.video.model_dump(mode="json")} if has_videos else {}
    return of_videos | {
        "versions": {"vlmtune": __version__} | {name: metadata.version(name) for name in VERSIONED},
        "model": vlm.source,
        "commit": vlm.commit,
        "weights": {str(folder): model_files(folder) for folder in folders if folder.is_dir()},
        "dtype": str(vlm.model.dtype),
        "quantization_bit": quantization_bit,
        "pixel_budget": _plain(pixel_budget(vlm.processor)),
        "max_tokens": encoder.max_tokens,
        "over_length": encoder.over_length,
        "max_new_tokens": section.max_new_tokens,
        "decoding": decoding,
        "seed": seed if section.decoding.method == "sample" else None,
        "samples": samples_digest(conversations),
    }


def decoding_in_effect(decoding: DecodingSection) -> dict[str, Any]:
    """The keys of `decoding` that have an effect."""
    keys = {"greedy": (), "beam": ("num_beams",), "sample": ("temperature", "top_p", "top_k")}
    used = ("method", *keys[decoding.method], "stop")
    return {key: value for key, value in decoding.model_dump().items() if key in used}


def model_files(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of each file of a model or an adapter."""
    files = {path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}


def samples_digest(conversations: Iterable[Conversation]) -> str:
    """SHA-256 over what is asked: the prompts' texts, and of each picture and video, or its frames,
    the file, its size and time."""
    digest = hashlib.sha256()
    for conversation in conversations:
        turns = conversation.turns
        asked = turns[:-1] if turns[-1].role == "assistant" else turns
        parts = [[turn.role, *(_identity(part) for part in turn.parts)] for turn in asked]
        digest.update(json.dumps([conversation.id, parts]).encode())
    return digest.hexdigest()


def references_digest(conversations: Iterable[Conversation]) -> str:
    """SHA-256 over what the answers are scored by: no answer depends on it, every figure does."""
    digest = hashlib.sha256()
    for conversation in conversations:
        scored_by = (
            reference_answer(conversation),
            conversation.answers,
            conversation.options,
            conversation.question_type,
        )
        digest.update(json.dumps([conversation.id, *scored_by]).encode())
    return digest.hexdigest()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """A short name for settings, for `metrics.json`."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _identity(part: Part) -> object:
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Video):
        refs = part.ref if isinstance(part.ref, tuple) else (part.ref,)
        files = (Image(ref, part.base_dir, part.content, part.media_policy) for ref in refs)
        return ["video", *map(_identity, files)]
    if is_url(part.ref):  # downloaded anew, it has a new time
        return content_digest(part)
    found = locate_image(part)
    if isinstance(found, bytes):
        return hashlib.sha256(found).hexdigest()
    status = found.stat()
    return [str(found.absolute()), status.st_size, status.st_mtime_ns]


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))


PATTERN = "answers-*.part.jsonl"

Settings = Mapping[str, object]


class AnswerLog:
    """`texts` are the answers of earlier starts with the same `settings`, by the sample's number;
    `dropped` names the settings in which other kept answers differ (those are not used).

    Use as a context: entering opens this process's file, leaving closes it.
    """

    def __init__(self, folder: Path, settings: Settings, *, rank: int = 0) -> None:
        # As JSON has them, so that a comparison with what was read is one of equals.
        self._settings = json.loads(json.dumps(settings))
        self._path = folder / f"answers-{rank}.part.jsonl"
        self.texts: dict[int, str] = {}
        self.dropped: set[str] = set()
        for path in sorted(folder.glob(PATTERN)):
            settings, texts = _read(path)
            if settings == self._settings:
                self.texts |= texts
            elif texts:
                self.dropped |= differing(settings, self._settings)

    def __enter__(self) -> AnswerLog:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        settings, texts = _read(self._path)
        mine = texts if settings == self._settings else {}
        # Written anew rather than appended to: half a last line would join the next one. Beside its
        # place, as a kill may come now too.
        unfinished = self._path.with_suffix(".new")
        self._file = unfinished.open("w", encoding="utf-8")
        self._write({"settings": self._settings})
        self.append(mine)
        os.replace(unfinished, self._path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, texts: Mapping[int, str]) -> None:
        """Write answers by number; they are on disk when this returns."""
        for number, text in texts.items():
            self._write({"number": number, "answer": text})
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, line: Mapping[str, object]) -> None:
        self._file.write(json.dumps(line) + "\n")


def remove_answer_log(folder: Path) -> None:
    """Remove every process's kept answers; for when the report is written."""
    for path in folder.glob("answers-*.part.*"):
        path.unlink(missing_ok=True)


def kept_settings(folder: Path) -> Iterator[Settings]:
    """The settings of each file of kept answers in `folder`."""
    for path in sorted(folder.glob(PATTERN)):
        yield _read(path)[0]


def differing(one: Settings, other: Settings) -> set[str]:
    return {name for name in {*one, *other} if one.get(name) != other.get(name)}


def _read(path: Path) -> tuple[Settings, dict[int, str]]:
    """Settings and answers of a file, empty where there is none or its first line is cut."""
    if not path.is_file():
        return {}, {}
    rows = list(_whole_lines(path))
    if not rows or "settings" not in rows[0]:
        return {}, {}
    return rows[0]["settings"], {row["number"]: row["answer"] for row in rows[1:]}


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        try:
            yield json.loads(line)
        except ValueError:  # after a power cut: a block of zeros
            return
