"""The layers of the package: imports point down, and model and method names stay where they belong.

errors < files < recipe < data < models < train | evaluation
       < report | preflight < sessions < api, cli
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = {
    "errors": 0,
    "files": 1,
    "recipe": 2,
    "data": 3,
    "models": 4,
    "train": 5,
    "evaluation": 5,
    "report": 6,
    "preflight": 6,
    "sessions": 7,
    "api": 8,
    "cli": 8,
}
TORCH_LIBRARIES = {"torch", "torchvision", "transformers", "peft", "bitsandbytes", "accelerate"}
FORBIDDEN_LIBRARIES = {  # anywhere in the layer, also inside functions
    "errors": TORCH_LIBRARIES,
    "files": TORCH_LIBRARIES,
    "recipe": TORCH_LIBRARIES,
    "data": TORCH_LIBRARIES - {"torch"},
}
# qwen-vl-utils is a library that any layer may read videos with.
MODEL_NAME = re.compile(r"qwen(?![_-]vl[_-]utils)|llava|idefics|smolvlm", re.IGNORECASE)
METHOD_NAME = re.compile(r"adalora|dora", re.IGNORECASE)
MODEL_NAME_HOMES = ("models/families.py",)
METHOD_NAME_HOMES = ("models/adapters/", "recipe/")


def violations(package: Path) -> list[str]:
    """Every breach of the layers in the package at `package`, as `file:line: what`."""
    found = []
    for file in sorted(package.rglob("*.py")):
        relative = file.relative_to(package).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        breaches = [*_import_breaches(relative, tree), *_name_breaches(relative, tree)]
        found += [f"{relative}:{line}: {what}" for line, what in sorted(breaches)]
    return found


def _import_breaches(relative: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    layer = relative.split("/")[0].removesuffix(".py")
    level = LAYERS.get(layer, len(LAYERS))  # __init__ and __main__ may see everything
    at_start = set(_run_at_import(tree))
    for node, module in _imports(tree):
        library, _, rest = module.partition(".")
        target = rest.split(".")[0]
        if library == "vlmtune" and target in LAYERS and target != layer:
            if LAYERS[target] >= level:
                yield node.lineno, f"{layer} imports {target}"
            if layer == "cli" and node in at_start and target != "errors":
                yield node.lineno, f"cli imports {target} at its start"
        is_from_package = library == "vlmtune" and rest == target
        if is_from_package and layer in LAYERS and target not in {*LAYERS, "__version__"}:
            yield node.lineno, f"takes {target!r} from vlmtune"
        if library in FORBIDDEN_LIBRARIES.get(layer, ()):
            yield node.lineno, f"{layer} imports {library}"
        if layer == "cli" and node in at_start and library in TORCH_LIBRARIES:
            yield node.lineno, f"cli imports {library} at its start"


def _imports(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            if node.module == "vlmtune":
                yield from ((node, f"vlmtune.{alias.name}") for alias in node.names)
            else:
                yield node, node.module or ""


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that importing a module runs: not functions, not `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _run_at_import(child)


def _name_breaches(relative: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, word in _words(tree):
        if MODEL_NAME.search(word) and not relative.startswith(MODEL_NAME_HOMES):
            yield line, f"names a model: {word!r}"
        if METHOD_NAME.search(word) and not relative.startswith(METHOD_NAME_HOMES):
            yield line, f"names a method: {word!r}"


def _words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Identifiers and strings that the code acts on; docstrings and comments may explain."""
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and id(node) not in documentation:
                yield line, node.value
            continue
        for field in ("id", "attr", "arg", "name", "module"):
            word = getattr(node, field, None)
            if isinstance(word, str):
                yield line, word


def test_package_keeps_its_layers(root: Path) -> None:
    assert violations(root / "vlmtune") == []


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("errors.py", "import vlmtune.recipe.schema", "errors imports recipe"),
        ("files.py", "def f():\n    import torch", "files imports torch"),
        ("files.py", "from vlmtune.recipe import yaml", "files imports recipe"),
        ("recipe/a.py", "def f():\n    import torch", "recipe imports torch"),
        ("recipe/a.py", "from vlmtune.data.types import Sample", "recipe imports data"),
        ("data/a.py", "from transformers import AutoProcessor", "data imports transformers"),
        ("data/a.py", "from vlmtune import models", "data imports models"),
        ("models/a.py", "def f():\n    from vlmtune.train import loop", "models imports train"),
        ("train/a.py", "from vlmtune.evaluation import runner", "train imports evaluation"),
        ("evaluation/a.py", "import vlmtune.train.loop", "evaluation imports train"),
        ("train/a.py", "from vlmtune.cli.common import command", "train imports cli"),
        ("evaluation/a.py", "from vlmtune.report import page", "evaluation imports report"),
        ("report/a.py", "from vlmtune.cli.common import command", "report imports cli"),
        ("sessions/a.py", "from vlmtune import api", "sessions imports api"),
        ("cli/a.py", "def f():\n    from vlmtune import api", "cli imports api"),
        ("models/a.py", "from vlmtune import train_model", "takes 'train_model' from vlmtune"),
        ("cli/a.py", "import torch", "cli imports torch at its start"),
        ("cli/a.py", "try:\n    import peft\nfinally:\n    pass", "cli imports peft at its start"),
        ("cli/a.py", "from vlmtune.train import loop", "cli imports train at its start"),
        ("cli/a.py", "import vlmtune.recipe.load", "cli imports recipe at its start"),
        ("train/a.py", "if model_type == 'qwen2_5_vl':\n    pass", "names a model"),
        ("data/a.py", "def collate_idefics(): pass", "names a model"),
        ("train/a.py", "recipe.adalora", "names a method"),
        ("models/forward.py", "x = {'use_dora': True}", "names a method"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, file: str, code: str, expected: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code)
    found = violations(tmp_path)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("cli/a.py", "def f():\n    import torch\n    from vlmtune.train import loop"),
        ("cli/a.py", "if TYPE_CHECKING:\n    import torch"),
        ("models/families.py", "x = 'qwen2_vl'"),
        ("models/adapters/a.py", "use_dora = True"),
        ("train/a.py", '"""Why: Qwen-VL needs it, AdaLoRA too."""\n# and so does LLaVA'),
        ("train/a.py", "from vlmtune.models import forward\nfrom vlmtune.data import types"),
        ("report/a.py", "from vlmtune.evaluation import guard\nfrom vlmtune.train import skips"),
    ],
)
def test_what_the_layers_allow_is_not_reported(tmp_path: Path, file: str, code: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code)
    assert violations(tmp_path) == []
