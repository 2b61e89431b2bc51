"""Keeps answers while an evaluation runs, with the settings that decide if they can be reused.

The batch size and the number of processes are not among the settings: they change no answer.

FOLDER/answers-RANK.part.jsonl    {"settings": {…}}           whatever decides an answer
                                  {"number": 3, "answer": …}  in the order of answering

Each process appends to a file of its own and reads all of them, also those of a start with another
number of processes. A line that a kill cut in half is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from vlmtune import __version__
from vlmtune.data.encode import Encoder
from vlmtune.data.media import media_identity
from vlmtune.data.types import Conversation, Part, Text
from vlmtune.evaluation.references import reference_answer
from vlmtune.files import json_digest, write_file
from vlmtune.models.load import VLM, pixel_budget
from vlmtune.recipe.rules import values_in_effect
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
        "decoding": decoding_in_effect(section.decoding),
        "seed": seed if section.decoding.method == "sample" else None,
        "samples": samples_digest(conversations),
    }


def decoding_in_effect(decoding: DecodingSection) -> dict[str, Any]:
    """The keys of `decoding` that have an effect where answers are generated."""
    kept = values_in_effect({"eval": {"decoding": decoding.model_dump()}})
    return dict(kept["eval"]["decoding"])


def model_files(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of each file of a model or an adapter."""
    files = {path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}


def samples_digest(conversations: Iterable[Conversation]) -> str:
    """SHA-256 of the prompts: their texts, and what changes where a picture or video does."""
    identities = []
    for conversation in conversations:
        turns = conversation.turns
        prompt = turns[:-1] if turns[-1].role == "assistant" else turns
        parts = [[turn.role, *(_identity(part) for part in turn.parts)] for turn in prompt]
        identities.append([conversation.id, parts])
    return json_digest(identities)


def references_digest(conversations: Iterable[Conversation]) -> str:
    """SHA-256 over what the answers are scored by: no answer depends on it, every figure does."""
    return json_digest(
        [(c.id, reference_answer(c), c.answers, c.options, c.question_type) for c in conversations]
    )


def settings_digest(settings: Mapping[str, Any]) -> str:
    """A short name for settings, for `metrics.json`."""
    return json_digest(settings)[:16]


def _identity(part: Part) -> object:
    return part.text if isinstance(part, Text) else media_identity(part)


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
        settings, texts = _read(self._path)
        mine = texts if settings == self._settings else {}
        # Written anew rather than appended to: half a last line would join the next one.
        write_file(self._path, _line({"settings": self._settings}) + _lines(mine))
        self._file = self._path.open("a", encoding="utf-8")
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
        self._file.write(_lines(texts))
        self._file.flush()
        os.fsync(self._file.fileno())


def _lines(texts: Mapping[int, str]) -> str:
    return "".join(_line({"number": n, "answer": text}) for n, text in texts.items())


def _line(value: Mapping[str, object]) -> str:
    return json.dumps(value) + "\n"


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
