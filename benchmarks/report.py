"""Compare, and write tables: on the terminal and as reStructuredText."""

import importlib
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table

from benchmarks import figures, roster, rounds
from benchmarks.contender import DURABILITIES

#: Cases of a figure whose axis is long: so many columns in a table.
_MAX_COLUMNS = 6


def rows_of(results: dict[str, Any], name: str) -> list[rounds.Row]:
    """
    Take the rows of a figure.

    :param results: of a run
    :param name: of the figure
    :return: rows
    """
    return [rounds.Row(**row) for row in results["figures"].get(name, ())]


def ratio(ours: rounds.Row, other: rounds.Row) -> float | None:
    """
    Compare two rows round by round, so that what slowed a whole round down cancels out.

    :param ours: dividend
    :param other: divisor
    :return: median of the ratios; None if there is nothing to compare
    """
    if not ours.values or len(ours.values) != len(other.values):
        return None
    return statistics.median(mine / theirs if theirs else math.inf
                             for mine, theirs in zip(ours.values, other.values))


def _find(rows: Sequence[rounds.Row], contender: str, durability: str,
          case: str) -> rounds.Row | None:
    """
    Find a row.

    :param rows: of a figure
    :param contender: of the row
    :param durability: of the row
    :param case: of the row
    :return: row with values; None if there is none
    """
    for row in rows:
        if row[:3] == (contender, durability, case) and row.values:
            return row
    return None


def number(value: float) -> str:
    """
    Write a number with three digits that say something.

    :param value: to be written
    :return: text, with commas between thousands
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    if not digits:
        unit = 10**(math.floor(math.log10(abs(value))) - 2)
        return f"{round(value / unit) * unit:,}"
    return "{:.{}f}".format(value, digits)


def split(case: str) -> tuple[str, str]:
    """
    Split a case that ends with a number.

    :param case: of a row, such as ``send 256``
    :return: what stands before the number, the number; the whole case and nothing if there is none
    """
    before, _, last = case.rpartition(" ")
    return (before, last) if last.isdigit() else (case, "")


def _columns(rows: Sequence[rounds.Row]) -> list[str]:
    """
    Choose the columns of a table.

    :param rows: of a figure
    :return: numbers of the cases, or the cases
    """
    numbers = sorted({int(split(row.case)[1]) for row in rows if split(row.case)[1]})
    if not numbers:
        return list(dict.fromkeys(row.case for row in rows))
    if len(numbers) > _MAX_COLUMNS:
        # Those that most contenders have reached.
        steps = _MAX_COLUMNS - 1
        numbers = [numbers[round(step * (len(numbers) - 1) / steps)] for step in range(steps + 1)]
    return [str(count) for count in numbers]


def _label(case: str) -> str:
    """
    Write a case as the head of a column.

    :param case: of rows
    :return: text
    """
    return " ".join(f"{int(word):,}" if word.isdigit() and len(word) > 4 else word
                    for word in case.split())


def _cell(rows: Sequence[rounds.Row], contender: str, durability: str, case: str) -> str:
    """
    Write a median, and how this library compares.

    :param rows: of a figure
    :param contender: whose value it is
    :param durability: of the row
    :param case: of the row
    :return: text; why there is no value, if there is none
    """
    row = _find(rows, contender, durability, case)
    if row is None:
        return next((other.error for other in rows if other[:3] == (contender, durability, case)),
                    "")
    cell = number(statistics.median(row.values))
    ours = _find(rows, roster.OURS, durability, case)
    compared = None if ours is None or ours is row else ratio(ours, row)
    return cell if compared is None else f"{cell} ({number(compared)} x)"


def table(results: dict[str, Any], name: str) -> tuple[list[str], list[list[str]]]:
    """
    Lay the table of a figure out: a line for each contender, a column for each case.

    :param results: of a run
    :param name: of the figure
    :return: heads of the columns, lines of cells
    """
    rows = rows_of(results, name)
    columns = _columns(rows)
    groups = [""]
    if figures.FIGURES[name].axis:
        groups = list(dict.fromkeys(split(row.case)[0] for row in rows))
    lines: list[list[str]] = []
    for group in groups:
        for durability, contender in dict.fromkeys((row.durability, row.contender) for row in rows):
            cells = [
                _cell(rows, contender, durability, " ".join(filter(None, (group, case))))
                for case in columns
            ]
            lines.append([group, durability or "-", contender] + cells)
    head = ["", "durability", ""] + [_label(case) for case in columns]
    if not any(groups):
        head, lines = head[1:], [line[1:] for line in lines]
    return head, lines


def compare_with_peers(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """
    Compare this library with the best peer and with bare LMDB.

    :param results: of a run
    :return: durability, case, ratio to the best peer and its name, ratio to bare LMDB
    """
    rows = rows_of(results, "throughput")
    lines: list[tuple[str, str, str, str]] = []
    for durability in DURABILITIES:
        for case in _columns(rows):
            ours = _find(rows, roster.OURS, durability, case)
            if ours is None:
                continue
            others = [
                row for row in (_find(rows, name, durability, case) for name in roster.PEERS)
                if row is not None
            ]
            best = max(others, key=lambda row: statistics.median(row.values), default=None)
            bare = _find(rows, roster.BARE, durability, case)
            peer = "-" if best is None else f"{number(ratio(ours, best) or 0)} x ({best.contender})"
            limit = "-" if bare is None else f"{number(ratio(ours, bare) or 0)} x"
            lines.append((durability, case, peer, limit))
    return lines


def compare_with_itself(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """
    Compare the last case of each figure that scales with its first one, for this library.

    :param results: of a run
    :return: figure, durability, what is compared, ratio
    """
    lines: list[tuple[str, str, str, str]] = []
    for name, figure in figures.FIGURES.items():
        if not figure.own_ratio:
            continue
        rows = [row for row in rows_of(results, name) if row.contender == roster.OURS]
        for durability in DURABILITIES:
            groups: dict[str, list[rounds.Row]] = {}
            for row in rows:
                if row.durability == durability and row.values:
                    groups.setdefault(split(row.case)[0], []).append(row)
            for prefix, group in groups.items():
                for row in group[1:]:
                    compared = ratio(row, group[0])
                    what = (f"{prefix + ': ' if prefix else ''}{_label(split(row.case)[1])} "
                            f"against {split(group[0].case)[1]}")
                    lines.append((figure.title, durability, what, number(compared or 0)))
    return lines


def _rst_table(head: Sequence[str], lines: Sequence[Sequence[str]], title: str = "") -> str:
    """
    Write a table.

    :param head: of the columns
    :param lines: of cells
    :param title: of the table
    :return: reStructuredText
    """
    parts = [f".. list-table:: {title}".rstrip(), "    :header-rows: 1", ""]
    for line in [head, *lines]:
        for index, cell in enumerate(line):
            text = cell.replace("*", r"\*").replace("`", r"\`").replace("_", r"\_")
            parts.append(f"    {'* -' if index == 0 else '  -'} {text}".rstrip())
    return "\n".join(parts) + "\n"


def write(out: pathlib.Path, results: dict[str, Any]) -> None:
    """
    Write tables, and plots if matplotlib is there.

    :param out: directory
    :param results: of a run
    """
    mark = ("These are the results of a *quick* run, to be read as a sketch.\n\n"
            if results["profile"] == "quick" else "")
    for name in results["figures"]:
        figure = figures.FIGURES[name]
        text = f"{figure.explanation} In brackets: what persipubsub has, divided by that.\n\n"
        text += _rst_table(*table(results, name), title=f"{figure.title} ({figure.unit})")
        (out / (name + ".rst")).write_text(text, encoding="utf-8")
    text = mark + _rst_table(["", ""], [[key, value] for key, value in results["machine"].items()],
                             title="What was measured, and on what")
    (out / "machine.rst").write_text(text, encoding="utf-8")
    text = mark + _rst_table(["durability", "", "against the best peer", "against bare LMDB"],
                             compare_with_peers(results))
    scaling = compare_with_itself(results)
    if scaling:
        text += "\n" + _rst_table(["", "durability", "", "ratio"], scaling)
    (out / "summary.rst").write_text(text, encoding="utf-8")
    try:
        plots = importlib.import_module("benchmarks.plots")
    except ModuleNotFoundError as error:
        print(f"No plots: {error}")
        return
    plots.draw(out, results)


def show(console: rich.console.Console, results: dict[str, Any], name: str) -> None:
    """
    Print the table of a figure.

    :param console: to print on
    :param results: of a run
    :param name: of the figure
    """
    figure = figures.FIGURES[name]
    head, lines = table(results, name)
    shown = rich.table.Table(title=f"{figure.title} ({figure.unit})",
                             caption="In brackets: what persipubsub has, divided by that.")
    for cell in head:
        shown.add_column(cell, justify="left" if not cell or cell == "durability" else "right")
    for line in lines:
        shown.add_row(*line, style="bold" if roster.OURS in line else "")
    console.print(shown)


def show_summary(console: rich.console.Console, results: dict[str, Any]) -> None:
    """
    Print how this library compares with others and with itself.

    :param console: to print on
    :param results: of a run
    """
    shown = rich.table.Table("durability",
                             "",
                             "against the best peer",
                             "against bare LMDB",
                             title="persipubsub")
    for line in compare_with_peers(results):
        shown.add_row(*line)
    console.print(shown)
    shown = rich.table.Table("", "durability", "", "ratio", title="persipubsub against itself")
    for line in compare_with_itself(results):
        shown.add_row(*line)
    console.print(shown)
