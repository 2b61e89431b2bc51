"""What a command imports before it answers, told by the modules that are there at its end."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.sessions.preload import KERNEL_CACHES

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs" / "quickstart.yaml")

LIGHT_COMMANDS = [
    (["--help"], 260),
    (["--version"], 260),
    (["data", "--help"], 400),
    (["train", "--help"], 400),
    (["recipe", "show", RECIPE], 430),
    (["recipe", "schema"], 430),
]
"""Arguments, and a bound on the modules that are there at the end, Python's own among them."""
HEAVY = {"torch", "transformers", "numpy", "PIL", "rich", "pandas", "datasets", "pyarrow"}
NOT_FOR_TRAINING = {"pandas", "pyarrow", "datasets", "tensorflow"}

RUN = """
import sys
from vlmtune.cli.app import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


def python(code: str, *arguments: str, path: Path | None = None) -> str:
    """What `code` prints on stderr; `path` is where Python looks for packages first."""
    # Other tests in this process may have called `preload`, which sets them.
    environment = {k: v for k, v in os.environ.items() if k not in KERNEL_CACHES}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def modules_after(arguments: list[str], *, first: str = "", path: Path | None = None) -> set[str]:
    """The modules that are imported once the command has run, after the statement `first`."""
    return set(python(first + RUN, *arguments, path=path).splitlines()[-1].split())


def assert_light(modules: set[str], bound: int) -> None:
    assert not modules & HEAVY
    assert len(modules) < bound


@pytest.mark.parametrize(("arguments", "bound"), LIGHT_COMMANDS)
def test_a_light_command_imports_little(arguments: list[str], bound: int) -> None:
    assert_light(modules_after(arguments), bound)


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "./model", "--data", "gone.jsonl"],
        ["eval", "./model", "--data", RECIPE, "eval.metrics=[exact_mach]"],
        ["chat", "./model", "question", "eval.max_new_token=4"],
    ],
)
def test_wrong_settings_and_missing_files_are_found_without_torch(arguments: list[str]) -> None:
    assert not modules_after(arguments) & {"torch", "transformers"}


@pytest.mark.parametrize("first", ["import numpy", "import vlmtune.recipe.load"])
def test_one_import_too_many_is_seen(first: str) -> None:
    arguments, bound = LIGHT_COMMANDS[0]
    with pytest.raises(AssertionError):
        assert_light(modules_after(arguments, first=first), bound)


def test_training_imports_no_library_of_tables_and_compiles_nothing(
    sample_data: Path, tmp_path: Path
) -> None:
    assert importlib.util.find_spec("datasets") and importlib.util.find_spec("pandas")
    packages = tmp_path / "packages"
    (packages / "tensorflow").mkdir(parents=True)
    # TensorBoard takes TensorFlow where it finds one; this one is found.
    (packages / "tensorflow" / "__init__.py").write_text("__version__ = '2.0'\n")
    modules = modules_after(
        [
            "train",
            RECIPE,
            f"output_dir={tmp_path / 'run'}",
            f"data.train={sample_data / 'train.jsonl'}",
            "data.eval=null",
            "data.num_workers=0",
            "train.max_steps=1",
            "train.batch_size=2",
            "--quiet",
        ],
        path=packages,
    )
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= modules
    assert not modules & NOT_FOR_TRAINING
    assert "torch._inductor.compile_fx" not in modules


def test_preload_leaves_garbage_collection_and_compilation_as_they_were() -> None:
    python("""
import gc, os
before = gc.get_threshold(), dict(os.environ)
from vlmtune.sessions.preload import KERNEL_CACHES, KEPT_KERNELS, preload
preload("bitsandbytes")
assert [os.environ.pop(name) for name in KERNEL_CACHES] == [KEPT_KERNELS] * 2
import sys, torch
assert "torch._inductor.compile_fx" not in sys.modules
assert (gc.get_threshold(), dict(os.environ)) == before and gc.isenabled()
assert gc.get_freeze_count() > 100_000
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph
torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
assert len(graphs) == 1
frozen = gc.get_freeze_count()
preload("torch", "wave")
assert "wave" in sys.modules and gc.get_freeze_count() <= frozen
""")


def test_bitsandbytes_alone_loads_the_compiler() -> None:
    """What `preload` is there for; where this fails, its variable can go."""
    python("""
import bitsandbytes, sys
assert "torch._inductor.compile_fx" in sys.modules
""")
