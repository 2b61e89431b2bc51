"""Print what differs between two golden records; exit 1 where a difference is not expected.

    python scripts/golden/compare.py OLD.json NEW.json [--only PART …] [--expected FILE]

A key names a place in the record: `PART/CASE/commands/0/stderr`, `PART/CASE/files/out.jsonl/3/id`.
The file of expected differences (default `expected.yaml` beside this script) is a list of

    - keys: recipe_errors/*/stderr     # shell pattern; `*` reaches over slashes
      why: one line
      from: 'regular expression'       # optional: only where this, replaced in the old value,
      to: 'text'                       # makes it the new one
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

EXPECTED = Path(__file__).resolve().parent / "expected.yaml"
SHOWN_LINES = 40
SHOWN_PER_CASE = 15
ABSENT = "<ABSENT>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--expected", type=Path, default=EXPECTED)
    parser.add_argument("--only", nargs="+", metavar="PART", help="Compare these parts.")
    parser.add_argument("--all", action="store_true", help="Show every difference, also expected.")
    asked = parser.parse_args()
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (asked.old, asked.new))
    entries = yaml.safe_load(asked.expected.read_text(encoding="utf-8")) or []
    used = [0] * len(entries)
    unexpected = 0
    for part in asked.only or dict.fromkeys([*old, *new]):
        shown: Counter[str] = Counter()
        found = list(differences(old.get(part, ABSENT), new.get(part, ABSENT), part))
        print(f"== {part}: {len(found) or 'no'} differences")
        for key, before, after in found:
            number = find_expected(entries, key, before, after)
            if number is None:
                unexpected += 1
            else:
                used[number] += 1
            case = "/".join(key.split("/")[:2])
            shown[case] += number is None
            if asked.all or (number is None and shown[case] <= SHOWN_PER_CASE):
                print(f"-- {key}" + ("" if number is None else f" ({entries[number]['why']})"))
                show(before, after)
        for case, count in shown.items():
            if count > SHOWN_PER_CASE and not asked.all:
                print(f"-- … and {count - SHOWN_PER_CASE} more in {case} (--all shows them)")
    for entry, count in zip(entries, used):
        print(f"expected, {count} times: {entry['keys']}: {entry['why']}")
    print(f"{unexpected} differences that are not expected")
    sys.exit(1 if unexpected else 0)


def differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of each place that differs; texts as a whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from differences(old.get(name, ABSENT), new.get(name, ABSENT), f"{key}/{name}")
    elif isinstance(old, list) and isinstance(new, list) and not (is_text(old) and is_text(new)):
        for number in range(max(len(old), len(new))):
            before, after = (v[number] if number < len(v) else ABSENT for v in (old, new))
            yield from differences(before, after, f"{key}/{number}")
    elif type(old) is not type(new) or old != new:
        yield key, old, new


def is_text(value: list[Any]) -> bool:
    return all(isinstance(line, str) for line in value)


def find_expected(entries: list[dict[str, str]], key: str, old: Any, new: Any) -> int | None:
    """The number of the first entry that names this difference."""
    for number, entry in enumerate(entries):
        if not fnmatchcase(key, entry["keys"]):
            continue
        if "from" not in entry or re.sub(entry["from"], entry["to"], as_text(old)) == as_text(new):
            return number
    return None


def as_text(value: Any) -> str:
    if isinstance(value, list) and is_text(value):
        return "\n".join(value)
    return value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)


def show(old: Any, new: Any) -> None:
    lines = list(
        difflib.unified_diff(as_text(old).splitlines(), as_text(new).splitlines(), lineterm="", n=1)
    )[2:]
    for line in lines[:SHOWN_LINES]:
        print("   " + line)
    if len(lines) > SHOWN_LINES:
        print(f"   … {len(lines) - SHOWN_LINES} more lines")


if __name__ == "__main__":
    main()
