"""The figures as drawings: bars of the tools, and lines of growth. Files of SVG, no library.

Colours are told apart by those who see few of them, and every bar and line is named in text.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmtune.report.charts import BOX, Chart, Point, Series, draw_chart

COLORS = {
    "trainer": "#6b7280",
    "vlmtune": "#0072b2",
    "trl": "#e69f00",
    "llamafactory": "#009e73",
    "ms-swift": "#cc79a7",
}
OTHER = "#000000"
WIDTH, LEFT, BAR, GAP = 760, 190, 20, 6


def bars(title: str, groups: Mapping[str, Mapping[str, float]], *, form: str = "{:.2f}") -> str:
    """Horizontal bars: a group for each name (a workload), in it one for each tool."""
    top = max((v for values in groups.values() for v in values.values()), default=1.0) or 1.0
    parts, y = [], 40
    for group, values in groups.items():
        parts.append(_text(10, y + 14, group, weight="bold"))
        y += BAR + GAP
        for name, value in values.items():
            length = (WIDTH - LEFT - 90) * value / top
            parts.append(_text(LEFT - 8, y + 14, name, anchor="end"))
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" '
                f'fill="{COLORS.get(name, OTHER)}"/>'
            )
            parts.append(_text(round(LEFT + length + 6), y + 14, form.format(value)))
            y += BAR + GAP
        y += 2 * GAP
    return _svg(y + 10, title, parts)


def lines(title: str, series: Mapping[str, Sequence[Point]], *, x: str, y: str) -> str:
    """Curves through points over a common axis that starts at 0; `x` and `y` name the axes."""
    known = [Series(name, tuple(points)) for name, points in series.items() if points]
    right = max(point[0] for one in known for point in one.points)
    # The origin of both axes is part of the range, so that proportional growth looks so.
    origin = Series("", ((0.0, 0.0),))
    chart = draw_chart("growth", title, [*known, origin], x_range=(0.0, right))
    return _svg(420, title, [*_axes(chart), *_curves(chart), *_names(known, x, y)])


PLOT_TOP, PLOT_HEIGHT, PLOT_LEFT, PLOT_WIDTH = 60, 280, 80, 640


def _axes(chart: Chart) -> list[str]:
    parts = [
        f'<rect x="{PLOT_LEFT}" y="{PLOT_TOP}" width="{PLOT_WIDTH}" height="{PLOT_HEIGHT}" '
        'fill="none" stroke="#9ca3af"/>'
    ]
    for tick in chart.y_ticks:
        y = round(PLOT_TOP + PLOT_HEIGHT * tick.percent / 100)
        parts.append(_text(PLOT_LEFT - 8, y + 4, tick.label, anchor="end"))
    for tick in chart.x_ticks:
        x = round(PLOT_LEFT + PLOT_WIDTH * tick.percent / 100)
        parts.append(_text(x, PLOT_TOP + PLOT_HEIGHT + 18, tick.label, anchor="middle"))
    return parts


def _curves(chart: Chart) -> list[str]:
    parts = [
        f'<svg x="{PLOT_LEFT}" y="{PLOT_TOP}" width="{PLOT_WIDTH}" height="{PLOT_HEIGHT}" '
        f'viewBox="0 0 {BOX} {BOX}" preserveAspectRatio="none" overflow="visible">'
    ]
    for line in chart.lines:
        if line.name:
            color = COLORS.get(line.name, OTHER)
            style = 'fill="none" vector-effect="non-scaling-stroke" stroke-linecap="round"'
            parts.append(f'<path d="{line.path}" stroke="{color}" stroke-width="2" {style}/>')
            parts.append(f'<path d="{line.dots}" stroke="{color}" stroke-width="7" {style}/>')
    return [*parts, "</svg>"]


def _names(series: Sequence[Series], x: str, y: str) -> list[str]:
    parts = [_text(PLOT_LEFT, 52, y), _text(PLOT_LEFT + PLOT_WIDTH, 376, x, anchor="end")]
    for place, one in enumerate(series):
        left = PLOT_LEFT + 150 * place
        color = COLORS.get(one.name, OTHER)
        parts.append(f'<rect x="{left}" y="394" width="14" height="4" fill="{color}"/>')
        parts.append(_text(left + 20, 400, one.name))
    return parts


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">'
        f'<title>{html.escape(title)}</title><rect width="100%" height="100%" fill="#ffffff"/>'
    )
    return "\n".join([head, _text(10, 24, title, weight="bold"), *parts, "</svg>"]) + "\n"


def _text(x: int, y: int, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" fill="#111827">'
        f"{html.escape(text)}</text>"
    )


def write(folder: Path, drawings: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings.items():
        (folder / f"{name}.svg").write_text(drawing)
