"""Draw results as SVG, for the documentation, and as PNG."""

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.lines
import matplotlib.pyplot as plt

from benchmarks import figures, report, roster, rounds
from benchmarks.contender import DURABILITIES

#: Ours stands out, the limit is black, the peers are quiet.
_COLORS = {
    roster.OURS: "#d6402b",
    roster.BARE: "#222222",
    "localqueue": "#1f77b4",
    "diskcache": "#2ca02c",
    "honker stream": "#9467bd",
    "honker queue": "#c5b0d5",
    "litequeue": "#17becf",
    "nque": "#8c564b",
    "persist-queue": "#e377c2",
    "SimpleBroker": "#bcbd22",
}
_OTHER = "#999999"


def _color(contender: str) -> str:
    """
    Choose a color.

    :param contender: as in tables
    :return: color
    """
    return _COLORS.get(contender, _OTHER)


def _bars(axes: Any, rows: Sequence[rounds.Row], title: str, unit: str, is_rate: bool) -> None:
    """
    Draw a bar for each contender, the best one on top.

    :param axes: to draw on
    :param rows: of one case and durability
    :param title: above the bars
    :param unit: of the values
    :param is_rate: whether more is better
    """
    ordered = sorted((row for row in rows if row.values),
                     key=lambda row: statistics.median(row.values),
                     reverse=not is_rate)
    medians = [statistics.median(row.values) for row in ordered]
    axes.barh([row.contender for row in ordered],
              medians,
              color=[_color(row.contender) for row in ordered])
    largest = max((value for row in ordered for value in row.values), default=1)
    for index, (row, median) in enumerate(zip(ordered, medians)):
        axes.plot([min(row.values), max(row.values)], [index, index], color="#888888", linewidth=1)
        axes.text(max(row.values) + 0.015 * largest,
                  index,
                  report.number(median),
                  fontsize=8,
                  verticalalignment="center")
    axes.set_xlim(0, largest * 1.22)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.10g}"))


def _draw_bars(rows: Sequence[rounds.Row], figure: figures.Figure) -> Any:
    """
    Draw bars: a line of panels for each durability, a panel for each case.

    :param rows: of the figure
    :param figure: its description
    :return: drawing
    """
    durabilities = [
        durability for durability in (*DURABILITIES, "")
        if any(row.durability == durability and row.contender != "Python alone" for row in rows)
    ]
    cases = list(dict.fromkeys(row.case for row in rows))
    across = min(4, len(cases))
    down = -(-len(cases) // across)
    height = max(1.8, 0.28 * len({row.contender for row in rows}) + 0.9)
    drawing, grid = plt.subplots(down * len(durabilities),
                                 across,
                                 figsize=(3.6 * max(across, 1.6),
                                          height * down * len(durabilities) + 0.5),
                                 squeeze=False,
                                 layout="constrained")
    for axes in grid.flat:
        axes.set_visible(False)
    for block, durability in enumerate(durabilities):
        for index, case in enumerate(cases):
            axes = grid[block * down + index // across][index % across]
            axes.set_visible(True)
            shown = [row for row in rows if row.case == case and row.durability in (durability, "")]
            _bars(axes, shown, ", ".join(filter(None, (case, durability))), figure.unit,
                  figure.is_rate)
    return drawing


def _groups(rows: Sequence[rounds.Row]) -> list[str]:
    """
    Find what the cases have in front of their number.

    :param rows: of a figure
    :return: such as ``send`` and ``receive``; an empty text if there is nothing
    """
    return list(dict.fromkeys(report.split(row.case)[0] for row in rows))


def _draw_lines(rows: Sequence[rounds.Row], figure: figures.Figure) -> Any:
    """
    Draw lines over the number that the cases are about.

    :param rows: of the figure
    :param figure: its description
    :return: drawing
    """
    groups = _groups(rows)
    drawing, grid = plt.subplots(len(groups),
                                 2,
                                 figsize=(9, 3.3 * len(groups) + 0.5),
                                 squeeze=False,
                                 layout="constrained")
    for group, line in zip(groups, grid):
        for durability, axes in zip(DURABILITIES, line):
            shown = [
                row for row in rows if row.values and row.durability == durability
                and report.split(row.case)[0] == group
            ]
            _draw_panel(axes, shown, figure, ", ".join(filter(None, (group, durability))))
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels())})
    drawing.legend(handles.values(),
                   handles.keys(),
                   loc="outside lower center",
                   ncols=6,
                   fontsize=9,
                   frameon=False)
    return drawing


def _draw_dots(rows: Sequence[rounds.Row], figure: figures.Figure) -> Any:
    """
    Draw quantiles as dots on a line for each contender and situation.

    :param rows: of the figure; cases are a situation, a comma and a quantile
    :param figure: its description
    :return: drawing
    """
    lines = list(
        dict.fromkeys((row.contender, row.case.rpartition(", ")[0]) for row in rows if row.values))
    lines.sort(key=lambda line: line[1], reverse=True)
    quantiles = list(dict.fromkeys(row.case.rpartition(", ")[2] for row in rows))
    is_alone = len({contender for contender, _ in lines}) == 1
    labels = [line[1] if is_alone else "{}, {}".format(*line) for line in lines]
    drawing, panels = plt.subplots(1,
                                   2,
                                   figsize=(11, 0.36 * len(lines) + 1.8),
                                   sharex=True,
                                   sharey=True,
                                   layout="constrained")
    for durability, axes in zip(DURABILITIES, panels):
        for quantile, marker in zip(quantiles, "o>sD"):
            shown = [
                row for row in rows if row.values and row.durability == durability
                and row.case.rpartition(", ")[2] == quantile
            ]
            axes.scatter(
                [statistics.median(row.values) for row in shown],
                [lines.index((row.contender, row.case.rpartition(", ")[0])) for row in shown],
                color=[_color(row.contender) for row in shown],
                marker=marker,
                s=36)
        if any(value > 0 for row in rows for value in row.values):
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.10g}"))
        axes.set_yticks(range(len(lines)), labels)
        axes.set_ylim(-0.6, len(lines) - 0.4)
        axes.set_title(durability, fontsize=10)
        axes.set_xlabel(figure.unit, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    # The shapes only: the colors are named by the labels.
    handles = [
        matplotlib.lines.Line2D([], [], linestyle="", marker=marker, color="#666666")
        for _, marker in zip(quantiles, "o>sD")
    ]
    drawing.legend(handles,
                   quantiles,
                   loc="outside lower center",
                   ncols=4,
                   frameon=False,
                   fontsize=9)
    return drawing


def _draw_panel(axes: Any, rows: Sequence[rounds.Row], figure: figures.Figure, title: str) -> None:
    """
    Draw a line for each contender.

    :param axes: to draw on
    :param rows: of one durability
    :param figure: description of the figure
    :param title: above the lines
    """
    is_dense = len({row.position for row in rows}) > 10
    for contender in dict.fromkeys(row.contender for row in rows):
        points = [(row.position or 0.0, statistics.median(row.values), row) for row in rows
                  if row.contender == contender]
        points.sort(key=lambda point: point[0])
        horizontal = [point[0] for point in points]
        axes.plot(horizontal, [point[1] for point in points],
                  marker="" if is_dense else "o",
                  markersize=4,
                  linewidth=2 if contender == roster.OURS else 1.2,
                  color=_color(contender),
                  label=contender)
        axes.fill_between(horizontal, [min(point[2].values) for point in points],
                          [max(point[2].values) for point in points],
                          color=_color(contender),
                          alpha=0.12,
                          linewidth=0)
    positions = sorted({row.position or 0.0 for row in rows})
    if not is_dense:
        if positions and positions[-1] > 50 * max(1.0, positions[0]):
            axes.set_xscale("symlog", linthresh=max(1.0, min(filter(None, positions), default=1.0)))
        axes.set_xticks(positions, [_short(position) for position in positions])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.xaxis.set_major_formatter(
            matplotlib.ticker.FuncFormatter(lambda value, _: _short(value)))
    values = [value for row in rows for value in row.values]
    if values and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.10g}"))
    else:
        axes.set_ylim(0, max(values, default=1) * 1.1)
        axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.10g}"))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(figure.axis, fontsize=9)
    axes.set_ylabel(figure.unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _short(value: float) -> str:
    """
    Write a number on an axis.

    :param value: to be written
    :return: short text, such as ``64 Ki`` or ``10 M``
    """
    count = int(value)
    for factor, letter in ((1 << 20, "Mi"), (1 << 10, "Ki")):
        if count >= 4096 and count % factor == 0:
            return f"{count // factor} {letter}"
    for factor, letter in ((10**6, "M"), (10**3, "k")):
        if count >= factor:
            return f"{count / factor:g} {letter}"
    return str(count)


def draw(out: pathlib.Path, results: dict[str, Any]) -> None:
    """
    Draw all figures that there are results of.

    :param out: directory
    :param results: of a run
    """
    # Without a window, and the same bytes for the same results.
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "persipubsub"
    for name in results["figures"]:
        figure = figures.FIGURES[name]
        rows = report.rows_of(results, name)
        draw_figure = _draw_lines if figure.axis else _draw_bars
        if any(row.case.endswith(", p50") for row in rows):
            draw_figure = _draw_dots
        drawing = draw_figure(rows, figure)
        title = f"{figure.title} ({figure.unit})"
        if results["profile"] == "quick":
            title += f" - {results['profile']} run"
        drawing.suptitle(title, fontsize=12)
        drawing.savefig(out / (f"{name}.svg"), metadata={"Date": None})
        drawing.savefig(out / (f"{name}.png"), dpi=110, metadata={"Software": None})
        plt.close(drawing)
