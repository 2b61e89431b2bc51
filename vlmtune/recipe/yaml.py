"""YAML 1.2 (core schema) with the place of every key, read off PyYAML's node tree.

PyYAML reads YAML 1.1, where `1e-4` is a string, `no` a boolean, `010` eight and `1:30` ninety; it
also keeps the last of two equal keys in silence. Here scalars follow the 1.2 core schema, equal
keys are errors, and each key and list item keeps its line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from vlmtune.errors import VlmtuneError

Path = tuple[str | int, ...]
"""Where a value stands: keys and list positions from the root."""

MAX_NODES = 100_000
"""Aliases can make a small file arbitrarily large; no recipe comes near this."""

_TAG = "tag:yaml.org,2002:"
_IMPLICIT: tuple[tuple[str, str, str], ...] = (
    ("null", r"(?:~|null|Null|NULL|)", "~nN"),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        "-+.0123456789",
    ),
)


class _Resolver(BaseResolver):
    """The 1.2 core schema."""


class _Dumper(yaml.SafeDumper):
    """Quotes a string that YAML 1.1 or 1.2 would take for something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Escapes where a line break or control character could be folded or lost.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar(_TAG + "str", text, style=style)


def _represent_path(dumper: _Dumper, path: PurePath) -> yaml.ScalarNode:
    return _represent_text(dumper, str(path))


_Dumper.add_representer(str, _represent_text)
_Dumper.add_multi_representer(PurePath, _represent_path)
for _name, _pattern, _first in _IMPLICIT:
    for _owner in (_Resolver, _Dumper):
        _owner.add_implicit_resolver(
            _TAG + _name,
            re.compile(rf"^{_pattern}$"),
            [*_first, *([""] if _name == "null" else [])],
        )


class _Composer(Reader, Scanner, Parser, Composer, _Resolver):
    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)


@dataclass
class Document:
    """Plain values, and the 1-based line of every key and list item; None where it has none."""

    value: object
    lines: dict[Path, int | None] = field(default_factory=dict)


def dump_yaml(value: object, *, width: float = 100, in_one_line: bool = False) -> str:
    """YAML that reads the same under 1.1 and 1.2, keys in the order given. Raises `VlmtuneError`
    for a value that YAML has no form of."""
    try:
        return yaml.dump(
            value,
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
            width=width,
            default_flow_style=in_one_line,
        )
    except yaml.representer.RepresenterError as error:
        raise VlmtuneError(
            "a value that a recipe cannot hold",
            got=f"{error.args[1]!r} ({type(error.args[1]).__name__})",
            expected="text, a number, true or false, None, or lists and mappings of them",
        ) from None


def dump_line(value: object) -> str:
    """The YAML of `value` in one line, as an override has it."""
    text = dump_yaml(value, width=math.inf, in_one_line=True)
    return text.removesuffix("...\n").rstrip("\n")  # a value alone is followed by `...`


def parse_yaml(text: str, *, file: str) -> tuple[Document, list[VlmtuneError]]:
    """The document in `text`, with equal keys and unusable values reported (the first one stays).

    Raises `VlmtuneError` where `text` is no YAML at all.
    """
    try:
        root = _Composer(text).get_single_node()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise VlmtuneError(
            "a character that YAML does not allow",
            file=file,
            line=line,
            got=f"U+{ord(text[error.position]):04X}",
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, file) from None
    except RecursionError:
        raise VlmtuneError("nested too deeply", file=file, line=1) from None
    if root is None:
        return Document(None), []
    builder = _Builder(file)
    value = builder.build(root, ())
    return Document(value, builder.lines), builder.errors


def _syntax_error(error: yaml.MarkedYAMLError, file: str) -> VlmtuneError:
    mark, start = error.problem_mark, error.context_mark
    problem = error.problem or "cannot be read"
    if error.context == "while scanning a simple key" and start is not None:
        mark, start = start, None  # the problem's own mark is on the line after
    if error.context == "expected a single document in the stream":
        problem, start = "a second document (`---`)", None
    line = 1 if mark is None else mark.line + 1
    if "'\\t'" in problem:
        return VlmtuneError("not valid YAML: a tab", file=file, line=line, do="use spaces")
    if start is not None and start.line + 1 != line:
        problem += f" ({error.context} that starts on line {start.line + 1})"
    return VlmtuneError(f"not valid YAML: {problem}", file=file, line=line)


class _Builder:
    """Values from nodes; collects lines and errors on the way."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[Path, int | None] = {}
        self.errors: list[VlmtuneError] = []
        self._open: list[int] = []
        self._num_nodes = 0

    def build(self, node: yaml.Node, path: Path) -> object:
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise VlmtuneError(
                "too large once its aliases are followed", file=self.file, line=_line(node)
            )
        if id(node) in self._open:
            raise VlmtuneError("an alias to itself", file=self.file, line=_line(node))
        self.lines.setdefault(path, _line(node))
        self._open.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self._item(item, path, at) for at, item in enumerate(node.value)]
            return self._scalar(node)
        finally:
            self._open.pop()

    def _item(self, node: yaml.Node, path: Path, at: int) -> object:
        return self.build(node, (*path, at))

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            line = _line(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._report("a key must be a plain word", line, got="a list or a mapping as key")
                continue
            key = str(key_node.value)
            place = (*path, key)
            if key in result:
                self._report(
                    f"duplicate key {dotted(place)!r}",
                    line,
                    got=f"lines {self.lines[place]} and {line}",
                    do="keep one of them",
                )
                continue
            self.lines[place] = line
            result[key] = self.build(value_node, place)
        return result

    def _scalar(self, node: yaml.Node) -> object:
        kind, text = node.tag.removeprefix(_TAG), node.value
        try:
            if kind == "null":
                return None
            if kind == "bool" and str(text).lower() in ("true", "false"):
                return str(text).lower() == "true"
            if kind == "int":
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            if kind == "float":
                return float(re.sub(r"\.(?=[a-zA-Z])", "", text))
            if kind == "str" and isinstance(text, str):
                text.encode()  # a lone surrogate (written as \ud800) has no UTF-8
                return text
        except ValueError:
            self._report("a value that cannot be read", _line(node), got=repr(text)[:60])
            return None
        self._report(f"a YAML tag that recipes do not use: {node.tag}", _line(node))
        return None

    def _report(
        self, message: str, line: int, *, got: str | None = None, do: str | None = None
    ) -> None:
        self.errors.append(VlmtuneError(message, file=self.file, line=line, got=got, do=do))


def dotted(path: Sequence[str | int]) -> str:
    """`train.max_steps`, `lora_target[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
