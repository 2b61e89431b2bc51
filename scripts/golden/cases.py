"""The case files: what is laid out in an empty folder, and which commands are then run in it.

A part of the record is one file `cases/PART.yaml`:

    run: [train recipe.yaml <KEYS>]     # commands of every case that has none of its own
    files: {recipe.yaml: …}             # laid out for every case; text, or !!binary
    cases:
      NAME:
        keys: use_dora=true             # stands for <KEYS>
        files: {data.jsonl: …}          # beside those of the part
        copies: {red.png: odd/red.png}  # name -> file or folder in cases/
        pictures: [a.png]               # each one of the sample's pictures under this name
        folders: [empty]
        links: {link.jsonl: gone.jsonl} # name -> what it points to
        pipes: [fifo.png]
        run: [data convert data.jsonl --output out.jsonl]

A command is one text, split as a shell does, or `{run: …, stdin: …}`. `<WORK>` in texts and
commands is the scratch folder, in which `data/sample` and `configs` of the tree lie; the folder of
a case is `<WORK>/cases/PART/NAME`.
"""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent / "cases"
PICTURE = "data/sample/images/train-000.png"


@dataclass(frozen=True)
class Command:
    text: str
    arguments: list[str]
    stdin: str


@dataclass(frozen=True)
class Case:
    part: str
    name: str
    values: dict[str, Any]

    def lay_out(self, folder: Path, work: Path) -> None:
        """Write what the case starts from into the new `folder`."""
        for name in self.values.get("folders", []):
            (folder / name).mkdir(parents=True)
        for name, content in self.values["files"].items():
            _make_parent(folder / name)
            raw = content if isinstance(content, bytes) else _placed(content, work).encode()
            (folder / name).write_bytes(raw)
        for name, source in self.values.get("copies", {}).items():
            if (FOLDER / source).is_dir():
                shutil.copytree(FOLDER / source, folder / name, dirs_exist_ok=True)
            else:
                raw = (FOLDER / source).read_bytes().replace(b"<WORK>", str(work).encode())
                _make_parent(folder / name).write_bytes(raw)
        for name in self.values.get("pictures", []):
            shutil.copyfile(work / PICTURE, _make_parent(folder / name))
        for name, target in self.values.get("links", {}).items():
            os.symlink(_placed(target, work), _make_parent(folder / name))
        for name in self.values.get("pipes", []):
            os.mkfifo(folder / name)

    def commands(self, work: Path) -> list[Command]:
        keys = self.values.get("keys", "")
        found = []
        for entry in self.values["run"]:
            text, stdin = (entry, "") if isinstance(entry, str) else (entry["run"], entry["stdin"])
            text = text.replace("<KEYS>", keys)
            found.append(Command(text, shlex.split(_placed(text, work)), stdin))
        return found


def parts() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def cases_of(part: str) -> list[Case]:
    """The cases of `cases/PART.yaml` in their order."""
    whole = yaml.load((FOLDER / f"{part}.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    shared = whole.get("files", {})
    found = []
    for name, own in whole["cases"].items():
        files = {**shared, **own.get("files", {})}
        found.append(Case(part, name, {"run": whole.get("run"), **own, "files": files}))
    return found


def _placed(text: str, work: Path) -> str:
    return text.replace("<WORK>", str(work))


def _make_parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
