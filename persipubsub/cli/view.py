"""Lay out the statistics for people: in at most 100 columns, without zeros."""

import collections
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import click

from persipubsub.cli import text
from persipubsub.statistics import QueueStatistics, SubscriberStatistics

_WIDTH: Final = 100
_NAME_WIDTH: Final = 32
_BAR_WIDTH: Final = 20
_LEVELS: Final = " ▁▂▃▄▅▆▇█"

#: From these shares on, a bar has that color.
_COLORS: Final = ((0.8, "red"), (0.5, "yellow"), (0.0, "green"))

_HEAD: Final = ("SUBSCRIBER", "LAG", "IN FLIGHT", "RECEIVED", "RATE", "LAST")

#: Figures without a column: they follow the row in this color, unless they are zero.
_NOTES: Final = {
    "is_paused": ("paused", "magenta"),
    "failed": ("{:,} failed", "yellow"),
    "dropped_by_timeout": ("{:,} dropped by timeout", "red"),
    "dropped_by_mark": ("{:,} dropped by mark", "red"),
    "dead_lettered": ("{:,} given up", "red"),
    "corrupt": ("{:,} damaged", "red"),
    "cleared": ("{:,} cleared", None),
    "skipped": ("{:,} skipped", None)
}


class History:
    """The last looks at one queue: when they were, and what had been sent and acknowledged."""

    def __init__(self) -> None:
        """Initialize without a look."""
        self._looks = collections.deque[tuple[float, dict[str, int]]](maxlen=_BAR_WIDTH + 1)

    def add(self, figures: QueueStatistics) -> None:
        """Add a look that was made now."""
        totals = {one.subscriber: one.acknowledged for one in figures.subscribers}
        totals[""] = figures.sent
        self._looks.append((time.monotonic(), totals))

    def rates(self, name: str) -> list[float]:
        """Messages a second between looks, the newest rate last; those sent have the name ""."""
        # If a total went back, the rate of this look is 0.
        return [
            max(0, totals[name] - before[name]) / max(1e-9, now - last)
            for (last, before), (now, totals) in itertools.pairwise(self._looks)
            if name in before and name in totals
        ]


def draw(statistics: Mapping[str, QueueStatistics], histories: Mapping[str, History],
         limit: int | None) -> list[str]:
    """
    Lay out queues.

    :param statistics: by queue
    :param histories: of the queues
    :param limit: most subscribers, and most consumers, that are shown of each queue; None: all,
        with their whole names
    :return: lines, with the colors of :py:func:`click.style`
    """
    lines: list[str] = []
    for key, figures in statistics.items():
        name = _name(key, limit)
        path = _name(figures.path, limit, _WIDTH - len(name) - 2)
        lines += ["", f"{click.style(name, bold=True)}  {click.style(path, dim=True)}"]
        lines += _draw_queue(figures, histories[key].rates(""))
        lines += _draw_subscribers(figures, histories[key], limit)
        lines += _draw_claims(figures, limit)
    return lines[1:]


def _name(name: str, limit: int | None, width: int = _NAME_WIDTH) -> str:
    """Show a name, shortened where there is little room."""
    return text.shorten(text.printable(name), width) if limit else text.printable(name)


def _bar(share: float | None, limit: str) -> str:
    """Draw how much of a limit is used."""
    if not share:
        return ""
    color = next(color for least, color in _COLORS if share >= least)
    filled = min(_BAR_WIDTH, max(1, round(share * _BAR_WIDTH)))
    shown = "<1 %" if share < 0.01 else f"{100 * share:,.0f} %"
    drawn = click.style("━" * filled, fg=color) + click.style("┄" * (_BAR_WIDTH - filled), dim=True)
    return f"{drawn}{click.style(f' {shown:>5}', fg=color)}{click.style(f' of {limit}', dim=True)}"


def _draw_queue(figures: QueueStatistics, rates: Sequence[float]) -> Iterator[str]:
    """Draw what is in a queue, and how much of its limits that is."""
    count, size = figures.messages, text.show_bytes
    age = text.show_seconds(figures.oldest_age_seconds or 0.0)
    behind = f"{size(figures.journal_lag_bytes)} not yet safe from a power failure"
    top = max(rates, default=0.0) or 1.0
    # Every rate but zero is seen.
    bars = "".join(_LEVELS[math.ceil(8 * rate / top)] for rate in rates)
    rate = f"{bars:<20} {rates[-1]:,.0f}/s" if rates else ""
    # yapf: disable
    rows: list[tuple[str, float, str, str]] = [
        ("messages", count, f"{count:,}", _bar(figures.message_share, "MAX_MSGS_NUM")),
        ("bytes", count, size(figures.message_bytes),
         _bar(figures.byte_share, "HWM_LMDB_SIZE_BYTES")),
        ("oldest", count, age, _bar(figures.age_share, "MSG_TIMEOUT_SECS")),
        ("store", 1, size(figures.file_bytes), _bar(figures.file_share, "max_db_size_bytes")),
        ("journal", figures.journal_bytes, size(figures.journal_bytes),
         click.style(behind if figures.journal_lag_bytes else "", fg="yellow")),
        ("on disk", figures.disk_bytes, size(figures.disk_bytes), ""),
        ("sent", figures.sent, f"{figures.sent:,}", click.style(rate, fg="cyan")),
    ]
    # yapf: enable
    if not figures.messages:
        yield "  nothing waits"
    for name, is_shown, value, note in rows:
        if is_shown:
            yield f"  {name:<8} {value:>13}{'  ' if click.unstyle(note) else ''}{note}"


def _draw_subscribers(figures: QueueStatistics, history: History,
                      limit: int | None) -> Iterator[str]:
    """Draw the subscribers of a queue: a row for each, without columns of zeros."""
    # If not all fit, those with most lag.
    shown = sorted(figures.subscribers, key=lambda one: -one.lag)[:limit]
    shown.sort(key=lambda one: one.subscriber)
    behind = sorted(one.position for one in figures.subscribers if one.lag)
    if not shown:
        return
    rows = [_cells(one, history, limit) for one in shown]
    used = [column for column in zip(_HEAD, *rows) if any(column[1:])]
    head, *table = text.table([*zip(*used)])
    width = max(map(len, [head, *table])) + 2
    yield from ("", f"  {click.style(head, dim=True)}")
    for row, one in zip(table, shown):
        notes = [
            click.style(note.format(getattr(one, field)), fg=color)
            for field, (note, color) in _NOTES.items() if getattr(one, field)
        ]
        if one.lag and behind[1:2] > [one.position]:  # only one is before the second one
            notes.insert(one.is_paused, click.style("slowest", fg="yellow"))
        told = "  ".join(notes)
        fits = width + len(click.unstyle(told)) <= _WIDTH - 2
        yield f"  {row:<{width}}{told if fits else ''}".rstrip()
        for begin in range(0, 0 if fits else len(notes), 3):
            yield f"    {'  '.join(notes[begin:begin + 3])}"
    if hidden := len(figures.subscribers) - len(shown):
        yield f"  {click.style(f'and {hidden:,} more, with less lag', dim=True)}"


def _cells(one: SubscriberStatistics, history: History, limit: int | None) -> list[str]:
    """Show the figures of a subscriber; nothing for a zero, but for the lag."""
    rate = (history.rates(one.subscriber) or [0.0])[-1]
    last = one.seconds_since_acknowledged
    return [
        _name(one.subscriber, limit), f"{one.lag:,}", f"{one.in_flight:,}" if one.in_flight else "",
        f"{one.acknowledged:,}" if one.acknowledged else "", f"{rate:,.0f}/s" if rate else "",
        "" if last is None else text.show_seconds(last)
    ]


def _draw_claims(figures: QueueStatistics, limit: int | None) -> Iterator[str]:
    """Draw which process holds which messages, and since when: the longest first."""
    claims = [claim for one in figures.subscribers for claim in one.claims]
    if not claims:
        return
    claims.sort(key=lambda claim: -(claim.seconds or 0.0))
    rows = [["IN FLIGHT", "NUMBER", "PROCESS", "SINCE"]]
    for claim in claims[:limit]:
        last = f" to {claim.number + claim.count - 1}" if claim.count > 1 else ""
        process = "?" if claim.process_id is None else str(claim.process_id)
        seconds = "?" if claim.seconds is None else text.show_seconds(claim.seconds)
        rows.append([_name(claim.subscriber, limit), f"{claim.number}{last}", process, seconds])
    head, *table = text.table(rows)
    yield from ("", f"  {click.style(head, dim=True)}", *(f"  {row}" for row in table))
    if hidden := len(claims) - len(table):
        yield f"  {click.style(f'and {hidden:,} more, for less time', dim=True)}"
