"""Collects everything about a run and writes it as one HTML page.

run folder -> record -> findings, charts, rank map, evaluations, gallery, data -> template -> file

Jinja escapes all text. The Content-Security-Policy allows the page's own style and script by their
hashes, and pictures from `data:` URLs; nothing else runs or loads.
"""

from __future__ import annotations

import base64
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vlmtune import __version__
from vlmtune.data.run_entries import RunData, run_data
from vlmtune.errors import VlmtuneError, plural
from vlmtune.files import write_file
from vlmtune.recipe.load import load_resolved
from vlmtune.recipe.schema import Recipe
from vlmtune.report.charts import Chart, draw_rank_map, metric_charts
from vlmtune.report.data_stats import PERCENTILES, DataStatistics, data_statistics
from vlmtune.report.format import format_bytes, format_name, number, sentence, short_number
from vlmtune.report.gallery import build_gallery, clipped, draw_scale, mixups
from vlmtune.report.headline import differences, findings, grouped_reasons, parse_recipe, value_at
from vlmtune.report.pictures import Thumbnails
from vlmtune.report.run import (
    RIGHT_FROM,
    Evaluation,
    Pair,
    RunRecord,
    choose_pair,
    choose_widest,
    format_age,
    guard_pair,
    read_evaluations,
    read_run,
)

MAX_SKIPPED_SHOWN = 50


@dataclass(frozen=True)
class WrittenReport:
    path: Path
    num_bytes: int
    state: str


def write_page(folder: Path, output: Path | None = None) -> WrittenReport:
    """Write the page of the run in `folder` to `output` (default: report.html in it).

    Raises VlmtuneError where `folder` is not a run folder or `output` cannot be written.
    """
    record = read_run(folder)
    output = folder / "report.html" if output is None else output
    content = render_page(record).encode("utf-8")
    try:
        write_file(output, content)
    except OSError as error:
        raise VlmtuneError(
            f"the report cannot be written: {error.strerror or error}",
            file=output,
            do="give another file with --output",
        ) from error
    return WrittenReport(output, len(content), record.state.name)


def render_page(record: RunRecord) -> str:
    """The HTML of a run's page."""
    templates = files("vlmtune.report") / "templates"
    style, script = ((templates / name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (templates / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "spoken": format_name,
        "short": short_number,
        "bytes": format_bytes,
        "plural": plural,
        "sentence": sentence,
        "coded": coded,
        "clipped": clipped,
    }
    return environment.get_template("page.html").render(
        **page_values(record),
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )


def coded(text: str) -> Markup:
    """`text` as HTML, with the words between backticks as code."""
    words = text.split("`")
    marked = [Markup("<code>{}</code>").format(w) if i % 2 else w for i, w in enumerate(words)]
    return Markup("").join(marked)


def page_values(record: RunRecord) -> dict[str, Any]:
    """What the template shows, by name."""
    evaluations = read_evaluations(record)
    pair = choose_pair(evaluations, record)
    widest = choose_widest(evaluations, record, pair)
    guard = guard_pair(evaluations, record)
    values = parse_recipe(record.resolved_text)
    charts, charts_left_out = metric_charts(record.lines)
    thumbnails = Thumbnails()
    statistics = _data(record, thumbnails)
    return {
        "version": __version__,
        "made_at": time.strftime("%Y-%m-%d %H:%M"),
        "about": _about(record, values),
        "name": record.folder.absolute().name,
        "record": record,
        "recipe": values,
        "names_eval_data": value_at(values, "data.eval") is not None,
        "objective": value_at(values, "objective"),
        "findings": findings(record, values, pair=pair, widest=widest, guard=guard),
        "differences": None if values is None else differences(values),
        "environment": _flat(record.environment or {}),
        "statistics": statistics,
        "percentiles": PERCENTILES,
        "charts": charts,
        "charts_left_out": charts_left_out,
        "chart_data": [_chart_data(chart) for chart in charts],
        "rank_map": draw_rank_map(record.lines),
        "pair": pair,
        "scale": draw_scale(pair),
        "widest": widest,
        "mixups": [] if widest is None else mixups(widest),
        "evaluation_groups": _grouped(evaluations),
        "gallery": build_gallery(
            _gallery_pair(pair, widest), thumbnails=thumbnails, data=_run_data(record)
        ),
        "thumbnails": thumbnails,
        "right_from": RIGHT_FROM,
        "skipped_reasons": grouped_reasons(record.skipped),
        "skipped_shown": record.skipped[:MAX_SKIPPED_SHOWN],
    }


def _gallery_pair(pair: Pair, widest: Evaluation | None) -> Pair:
    """Predictions before training, and the largest set of predictions after it."""
    return pair if pair.after is None else Pair(pair.before, widest)


@dataclass(frozen=True)
class EvaluationGroup:
    """Evaluations of one task on the same data, and the names of all their figures. `pair` is the
    first and the last of them; `sliced_figures` are the figures that the last has for a slice."""

    title: str
    is_guard: bool
    evaluations: tuple[Evaluation, ...]
    figures: tuple[str, ...]
    pair: Pair
    slices: tuple[str, ...]
    sliced_figures: tuple[str, ...]


def _grouped(evaluations: Sequence[Evaluation]) -> list[EvaluationGroup]:
    groups: dict[tuple, list[Evaluation]] = defaultdict(list)
    for evaluation in evaluations:
        groups[(evaluation.is_guard, evaluation.task, evaluation.data)].append(evaluation)
    return [_group(is_guard, task, of) for (is_guard, task, _), of in groups.items()]


def _group(is_guard: bool, task: str, evaluations: list[Evaluation]) -> EvaluationGroup:
    slices = evaluations[-1].slices
    names = ", ".join(Path(file).name for file in evaluations[0].data) or "unnamed data"
    first = evaluations[0] if evaluations[0].step == 0 and len(evaluations) > 1 else None
    return EvaluationGroup(
        title=f"{task} on {names}",
        is_guard=is_guard,
        evaluations=tuple(evaluations),
        figures=tuple(dict.fromkeys(name for e in evaluations for name in e.figures)),
        pair=Pair(first, evaluations[-1]),
        slices=tuple(slices),
        sliced_figures=tuple(dict.fromkeys(name for of in slices.values() for name in of)),
    )


def _about(record: RunRecord, recipe: dict[str, Any] | None) -> list[str]:
    """Short facts about the run: model, trained parameters, samples, time."""
    words = []
    if isinstance(model := value_at(recipe, "model"), str):
        words.append(Path(model).name if Path(model).is_absolute() else model)
    trained = (record.modules or {}).get("trainable_parameters")
    if isinstance(trained, int):
        words.append(plural(trained, "trained parameter"))
    summary = record.summary or {}
    if isinstance(samples := summary.get("samples"), int) and samples:
        words.append(plural(samples, "sample") + " seen")
    if (seconds := number(summary.get("seconds"))) is not None and samples:
        words.append(format_age(seconds))
    return words


def _data(record: RunRecord, thumbnails: Thumbnails) -> DataStatistics:
    recipe: Recipe | None = None
    if record.resolved_text is not None:
        try:
            recipe = load_resolved(record.folder / "recipe.resolved.yaml")
        except VlmtuneError as error:
            return DataStatistics(0, 0, 0, (), (), str(error))
    return data_statistics(recipe, record.folder, thumbnails=thumbnails)


def _run_data(record: RunRecord) -> RunData | None:
    """None where the recipe cannot be read; the section on the data says so."""
    if record.resolved_text is None:
        return None
    try:
        recipe = load_resolved(record.folder / "recipe.resolved.yaml")
    except VlmtuneError:
        return None
    return run_data(str(record.folder), recipe)


def _chart_data(chart: Chart) -> dict[str, Any]:
    """The data that the page's script needs to zoom and to show values."""
    return {
        "id": chart.id,
        "unit": chart.unit,
        "x": chart.x_range,
        "y": chart.y_range,
        "lines": [
            [[float(f"{x:.6g}"), float(f"{y:.6g}")] for x, y in line.points] for line in chart.lines
        ],
    }


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            shown = value if number(value) is None else short_number(float(value))
            found.append((f"{prefix}{name}", str(shown)))
    return found


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(sha256(text.encode("utf-8")).digest()).decode("ascii")
