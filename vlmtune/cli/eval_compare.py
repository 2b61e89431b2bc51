"""Several targets of `vlmtune eval`: one after the other on the same samples, then side by side.

OUTPUT/targets.json       what is compared, to know an interrupted comparison again
OUTPUT/NAME/              each target's report
OUTPUT/comparison.json    differences with intervals, McNemar's test
OUTPUT/changes.jsonl      the samples whose score changed, with every target's answer
"""

from __future__ import annotations

import glob
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.cli.eval_asked import Plan
from vlmtune.cli.eval_output import make_folder, new_folder, short_name
from vlmtune.cli.eval_tables import print_comparison, print_result
from vlmtune.cli.eval_target import evaluate_target, free_memory

if TYPE_CHECKING:
    from vlmtune.evaluation.results import Result

logger = logging.getLogger("vlmtune")

HOW = ("pixel_budget", "scorer", "subtract_prior", "max_new_tokens", "decoding")
"""What a report says of how its target was asked."""


def names_of(targets: Sequence[str]) -> dict[str, str]:
    """What each target is called: its last path component, or all of it where two share one."""
    short = [short_name(target) for target in targets]
    return {
        target: name if short.count(name) == 1 else target.rstrip("/")
        for target, name in zip(targets, short)
    }


def folders_of(names: Iterable[str]) -> dict[str, str]:
    """A folder name for each of `names`, all different and without a slash."""
    folders: dict[str, str] = {}
    for name in names:
        stem = free = name.replace("/", "_")
        number = 1
        while free in folders.values():
            number += 1
            free = f"{stem}-{number}"
        folders[name] = free
    return folders


def compare_targets(
    targets: Sequence[str],
    plan: Plan,
    finished: Mapping[str, Path],
    output: Path | None,
    *,
    as_json: bool,
) -> dict[str, Any]:
    """Evaluate what is not in `finished`, compare everything with the first target, write, and
    print unless `as_json`. What `--json` holds, the comparison on the main process alone. Contains
    collectives."""
    from vlmtune.evaluation.compare import compare
    from vlmtune.evaluation.results import read_result, write_whole

    names = names_of(targets)
    places = folders_of(names.values())
    what = {"targets": list(targets), "data": [str(file.absolute()) for file in plan.data]}
    main = plan.processes.is_main
    chosen = (output or _unfinished_or_new(what, plan)) if main else None
    folder: Path = plan.processes.from_main(chosen)
    make_folder(folder)
    if main:
        write_whole(folder / "targets.json", _as_text(what))
    results, folders = [], {}
    for target in targets:
        place = finished.get(target, folder / places[names[target]])
        folders[names[target]] = place
        if target in finished:
            summary = read_result(place, target).summary
            predictions = place.absolute() / "predictions.jsonl"
            results.append(summary | {"target": target, "predictions": str(predictions)})
            continue
        logger.info("%s:", target)
        results.append(evaluate_target(target, plan, place, reuse=True))
        free_memory()
    if not main:
        return {"targets": results, "comparison": None}
    read = [read_result(place, name) for name, place in folders.items()]
    _tell_differences(read)
    comparisons, changes = compare(read, metrics=plan.section.metrics, seed=plan.seed)
    summary = {
        "against": read[0].name,
        "task": read[0].task,
        "num_samples": len(read[0].rows),
        "comparisons": [comparison.as_dict() for comparison in comparisons],
        "num_changed": len(changes),
    }
    write_whole(folder / "comparison.json", json.dumps(summary, indent=2) + "\n")
    lines = [json.dumps(change.as_row(), ensure_ascii=False) + "\n" for change in changes]
    write_whole(folder / "changes.jsonl", "".join(lines))
    if not as_json:
        for result in results:
            print(result["target"])
            print_result(result)
        print_comparison(comparisons, changes)
        print(f"comparison: {folder}")
    changes_file = str((folder / "changes.jsonl").absolute())
    return {"targets": results, "comparison": summary | {"changes": changes_file}}


def _tell_differences(results: Sequence[Result]) -> None:
    """Say where reports were made otherwise than the first: then not only the models differ."""
    first = results[0]
    for other in results[1:]:
        common = first.summary.keys() & other.summary.keys()
        differing = [
            f"{name} {other.summary[name]} (not {first.summary[name]})"
            for name in HOW
            if name in common and first.summary[name] != other.summary[name]
        ]
        if differing:
            logger.warning(
                "%s was not evaluated as %s was: %s", other.name, first.name, ", ".join(differing)
            )


def _unfinished_or_new(what: Mapping[str, Any], plan: Plan) -> Path:
    """The newest folder in which this comparison was stopped, or a new one."""
    stem = f"compare-{plan.data[0].stem}" if plan.data else "compare"
    for folder in sorted(Path("eval").glob(f"{glob.escape(stem)}-*"), reverse=True):
        told = folder / "targets.json"
        if (folder / "comparison.json").exists() or not told.is_file():
            continue
        if told.read_text(encoding="utf-8") == _as_text(what):
            return folder
    return new_folder(Path("eval") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")


def _as_text(what: Mapping[str, Any]) -> str:
    return json.dumps(what, indent=2) + "\n"
