"""A check's report for people, on stdout: problems by kind, one table, one verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmtune.errors import plural

if TYPE_CHECKING:
    from vlmtune.preflight.problems import Group
    from vlmtune.preflight.run import Report


SHOWN_PER_KIND = 20
VERDICTS = {
    "ready": ("ready", "bold green"),
    "warnings": ("ready with warnings", "bold yellow"),
    "not_ready": ("not ready", "bold red"),
}


def print_report(report: Report, summary: dict[str, Any]) -> None:
    """Print what a check found; the verdict last, where the eye is."""
    from vlmtune.preflight.problems import grouped

    console = Console(highlight=False, soft_wrap=True)
    for group in grouped(report.problems):
        _print_group(console, group)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _lines(report, summary):
        table.add_row(name, value)
    console.print(table)
    words, style = VERDICTS[summary["verdict"]]
    counts = [
        plural(summary[key], name)
        for key, name in (("num_errors", "error"), ("num_warnings", "warning"))
        if summary[key]
    ]
    end = f" ({', '.join(counts)})" if counts else ""
    console.print(Text(words, style=style) + Text(end))


def _print_group(console: Console, group: Group) -> None:
    style = "red" if group.severity == "error" else "yellow"
    for problem in group.kept[:SHOWN_PER_KIND]:
        place = f"{problem.place}: " if problem.place else ""
        console.print(Text(f"{problem.severity}: ", style=style) + Text(place + problem.message))
    more = group.count - min(len(group.kept), SHOWN_PER_KIND)
    if more:
        console.print(Text(f"{group.severity}: ", style=style) + Text(f"and {more:,} more like it"))


def _lines(report: Report, summary: dict[str, Any]) -> list[tuple[str, str]]:
    from vlmtune.preflight.epoch_stats import format_bytes

    lines = [(name, _of_set(found)) for name, found in summary["sets"].items()]
    for name, found in summary["sets"].items():
        for what, key in (("left out of", "dropped"), ("changed in", "changed")):
            counts = [f"{count:,} {reason}" for reason, count in found[key].items()]
            if counts:
                lines.append((f"{what} {name}", "; ".join(counts)))
    if report.figures is not None:
        epoch, run = summary["epoch"], summary["run"]
        lines.append(("an epoch", f"{plural(epoch['steps'], 'step')}: {_of_counts(epoch)}"))
        epochs = f"{summary['epochs']:.3g} {'epoch' if summary['epochs'] == 1 else 'epochs'}"
        lines.append(
            (
                "the run",
                f"{plural(summary['steps'], 'step')}, {epochs}: {_of_counts(run)}",
            )
        )
    if report.trained is not None:
        parts = [
            f"{part} {figures['trainable_parameters']:,}"
            for part, figures in summary["parts"].items()
            if figures["trainable_parameters"]
        ]
        total = f"{summary['trainable_parameters']:,}"
        lines.append(("trained parameters", f"{total} ({summary['method']}): {', '.join(parts)}"))
    if report.memory is not None:
        parts = [f"{k} {format_bytes(v)}" for k, v in summary["memory"].items() if v]
        total = format_bytes(summary["memory_bytes"])
        lines.append(("memory, estimated", f"{total}: {', '.join(parts)}"))
    if report.disk is not None:
        disk = report.disk
        text = f"{format_bytes(disk.needed_bytes)} of {format_bytes(disk.free_bytes)} free"
        checkpoints = plural(disk.checkpoints, "checkpoint")
        text += f": {checkpoints} of {format_bytes(disk.checkpoint_bytes)}, result"
        if disk.cache_bytes:
            text += f"; sample cache about {format_bytes(disk.cache_bytes)}"
        lines.append(("disk", text))
    return lines


def _of_set(found: dict[str, Any]) -> str:
    text = f"{found['samples']:,} of {plural(found['rows_looked_at'], 'row')} usable"
    if found["rows_looked_at"] < found["rows"]:
        text += f" (of {found['rows']:,} in all)"
    text += f": {_of_counts(found)}"
    spread = found["tokens_per_sample"]
    if spread:
        text += f"; tokens a sample: median {spread['p50']:,}, longest {spread['p100']:,}"
    formats = sorted(set(found["files"].values()))
    return text + (f"; format {', '.join(formats)}" if formats else "")


def _of_counts(found: dict[str, Any]) -> str:
    return (
        f"{plural(found['tokens'], 'token')}, {found['supervised_tokens']:,} supervised, "
        f"{plural(found['images'], 'picture')} in {plural(found['image_tokens'], 'token')}"
    )
