"""The golden record: what a user can see of vlmtune today, for a refactoring to be compared with.

    python scripts/golden/record.py --root TREE --output FILE.json [--only PART …]
    python scripts/golden/compare.py OLD.json NEW.json

The cases are data (`cases/*.yaml`, their form is told in `cases.py`): files laid out in an empty
folder, and commands run in it. Of each command the exit code, stdout and stderr are recorded, of
each case the files that it left: figures at full precision, tensors by their hash. Of the tree
only `vlmtune.cli.app.main` is called, in two worker processes with one thread each, as the start
of a fresh process costs seconds. Which worker runs a case depends on the case files alone.

Left out: GPUs, several processes of one job, kill and Ctrl-C, downloads and the hub, LLM.int8(),
videos, a terminal (progress bars, colours), the Python API, speed, memory, dates and versions,
what libraries say of themselves, TensorBoard's files, the content of optimizer states and
of caches, hashes of absolute paths, and charts in reports (of a page its text is recorded).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cases import Case, Command, cases_of, parts
from plain import is_read, plain_file, plain_name, plain_text, plain_value

NUM_WORKERS = 2
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "120",
    "TERM": "dumb",
    "NO_COLOR": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, metavar="TREE")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--only", nargs="+", choices=parts(), default=parts(), metavar="PART")
    parser.add_argument("--keep", action="store_true", help="Keep the scratch folder.")
    asked = parser.parse_args()
    root = asked.root.resolve()
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="golden-")).resolve()
    os.environ |= ENVIRONMENT | {"PYTHONPATH": str(root)}
    shutil.copytree(root / "data" / "sample", work / "data" / "sample")
    shutil.copytree(root / "configs", work / "configs")
    cases = [case for part in asked.only for case in cases_of(part)]
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(_worker()) for _ in range(NUM_WORKERS)]
        # One after the other in turn: two neighbours of a part cost about the same.
        running = [
            pools[number % NUM_WORKERS].submit(record_case, case, root, work)
            for number, case in enumerate(cases)
        ]
        record: dict[str, dict[str, Any]] = {part: {} for part in asked.only}
        seconds = dict.fromkeys(asked.only, 0.0)
        for case, future in zip(cases, running):
            record[case.part][case.name], spent = future.result()
            seconds[case.part] += spent
    asked.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if asked.keep:
        print(f"scratch folder: {work}", file=sys.stderr)
    else:
        shutil.rmtree(work)
    spent = ", ".join(f"{part} {value:.0f} s" for part, value in seconds.items())
    print(f"{len(cases)} cases in {time.monotonic() - began:.0f} s ({spent})", file=sys.stderr)


def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))


def record_case(case: Case, root: Path, work: Path) -> tuple[dict[str, Any], float]:
    """What the case's commands said and left, and how many seconds of this processor they took."""
    began = time.process_time()
    folder = work / "cases" / case.part / case.name.replace("/", "_")
    folder.mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(work / "caches" / case.part / folder.name)
    call = _entry_point(root)
    case.lay_out(folder, work)
    before = {path: path.lstat().st_mtime_ns for path in _files_below(folder)}
    places = {str(folder): "<CASE>", str(work): "<WORK>", str(root): "<ROOT>"}
    commands = [run(command, folder, places, call) for command in case.commands(work)]
    files = {}
    for path in sorted(_files_below(folder)):
        if before.get(path) != path.lstat().st_mtime_ns:
            name = plain_name(str(path.relative_to(folder)))
            files[name] = plain_file(path, places) if is_read(name) else "is there"
    shutil.rmtree(folder)
    return {"commands": commands, "files": files}, time.process_time() - began


def run(
    command: Command, folder: Path, places: dict[str, str], call: Callable[[], Any]
) -> dict[str, Any]:
    """One command in `folder`, in this process: exit code, stdout and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    if "accelerate.state" in sys.modules:  # one process has one precision; here many follow
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
    with _as_a_process(["vlmtune", *command.arguments], folder, command.stdin, stdout, stderr):
        try:
            code = call()
        except SystemExit as ending:
            code = ending.code
        except BaseException:  # noqa: BLE001  a crash is recorded too
            code = "traceback"
            stderr.write(traceback.format_exc().splitlines()[-1])
    said = stdout.getvalue()
    result: dict[str, Any] = {"run": command.text, "exit": code}
    try:
        result["json"] = plain_value(json.loads(said), places)
    except ValueError:
        result["stdout"] = plain_text(said, places)
    result["stderr"] = plain_text(stderr.getvalue(), places)
    return result


@contextlib.contextmanager
def _as_a_process(
    arguments: list[str], folder: Path, stdin: str, stdout: io.StringIO, stderr: io.StringIO
) -> Iterator[None]:
    """Arguments, working directory and streams as a command of its own has them."""
    before = sys.argv, sys.stdin, os.getcwd()
    logging.getLogger("vlmtune").handlers = []
    try:
        sys.argv, sys.stdin = arguments, io.StringIO(stdin)
        os.chdir(folder)
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            yield
    finally:
        sys.argv, sys.stdin = before[:2]
        os.chdir(before[2])


def _entry_point(root: Path) -> Callable[[], Any]:
    """The command line of the tree, the one thing of it that is known here."""
    if sys.path[0] != str(root):
        sys.path.insert(0, str(root))
    module = importlib.import_module("vlmtune.cli.app")
    assert Path(str(module.__file__)).is_relative_to(root), module.__file__
    return module.main


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


if __name__ == "__main__":
    main()
