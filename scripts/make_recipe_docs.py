"""Write `docs/recipe.md` from the schema, or with `--check` say whether it is current.

python scripts/make_recipe_docs.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vlmtune.recipe.explain import describe, entry_section_of, section_of, walk_keys
from vlmtune.recipe.schema import Recipe

TARGET = Path(__file__).resolve().parent.parent / "docs" / "recipe.md"

INTRODUCTION = """\
# The recipe

*Generated from `vlmtune/recipe/schema.py` by `scripts/make_recipe_docs.py`; do not edit.*

A recipe is one YAML file. `vlmtune recipe show RECIPE` prints it with every default filled in;
`vlmtune recipe schema` prints its JSON schema, which editors use to complete and check keys.

- Numbers and booleans are those of YAML 1.2: `1e-4` is a number; `yes` and `on` are text.
- Unknown keys, keys given twice and keys without effect are errors. All errors come at once, each
  with its line.
- Any key can be set on the command line: `vlmtune train recipe.yaml train.max_steps=100`. The
  value is YAML. `key=null` removes a key from the recipe where null is not a value of that key.
- The command line wins over the file: if it leaves keys of the file without effect, one log line
  names them, and they are left out. `train.epochs=1` works on a recipe with `train.max_steps`.
- Where a list of names is expected, a single name is a list of one: `lora_target: all-linear`.
- `model` and the data files are relative to the recipe's folder, `output_dir` to the working
  directory.
"""


def main(arguments: list[str]) -> int:
    text = recipe_docs()
    if arguments == ["--check"]:
        if TARGET.read_text(encoding="utf-8") == text:
            return 0
        print(f"{TARGET}: not current; run python scripts/make_recipe_docs.py", file=sys.stderr)
        return 1
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    TARGET.write_text(text, encoding="utf-8")
    return 0


def recipe_docs() -> str:
    """The whole page: every section, whatever it lies in, and what lists are of at the end."""
    sections = [_section("Top level", Recipe)]
    lists: dict[type[BaseModel], list[str]] = {}
    for key, info in walk_keys():
        below, entry = section_of(info.annotation), entry_section_of(info.annotation)
        if below is not None:
            sections.append(_section(f"`{key}`", below, key=key))
        if entry is not None:
            lists.setdefault(entry, []).append(f"`{key}`")
    for entry, keys in lists.items():
        sections.append(_section(f"An entry of {', '.join(keys)}", entry))
    return "\n".join([INTRODUCTION, *sections])


def _section(title: str, section: type[BaseModel], *, key: str = "") -> str:
    """The table of `section`, which is at `key`."""
    rows = [_row(name, info, above=key) for name, info in section.model_fields.items()]
    head = ["| key | value | default | |", "|---|---|---|---|"]
    return "\n".join([f"## {title}", "", str(section.__doc__), "", *head, *rows, ""])


def _row(name: str, info: FieldInfo, *, above: str) -> str:
    below = section_of(info.annotation)
    if below is not None:
        default = "not present" if info.default is None else ""
        if info.is_required():
            default = "**required**"
        words = info.description or str(below.__doc__)
        anchor = f"{above}{name}".replace(".", "")  # a link leaves dots of a title out
        return f"| `{name}` | a section, [below](#{anchor}) | {default} | {_cell(words)} |"
    default = "**required**" if info.is_required() else f"`{_plain(info.default)}`"
    value = describe(info.annotation, info.metadata)
    return f"| `{name}` | {_cell(value)} | {default} | {_cell(info.description or '')} |"


def _plain(value: object) -> str:
    """A default as it would stand in a recipe; JSON is YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
