"""Lay out the statistics for people: in at most 100 columns, without zeros."""

import collections
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import persipubsub.statistics
from persipubsub.cli import text

__all__ = ["Line", "History", "draw"]

#: Pieces of a line, each with its color for :py:func:`click.style`, or none.
Line: TypeAlias = Sequence[tuple[str, str | None]]

_WIDTH: Final = 100
_NAME_WIDTH: Final = 32
_BAR_WIDTH: Final = 20
_LEVELS: Final = " ▁▂▃▄▅▆▇█"

#: From these shares on, a bar has that color.
_COLORS: Final = ((0.8, "red"), (0.5, "yellow"), (0.0, "green"))

_HEAD: Final = ("SUBSCRIBER", "LAG", "IN FLIGHT", "RECEIVED", "RATE", "LAST")

#: What has no column, and is told with this color if it is not zero.
_NOTES: Final = {
    "failed": ("failed", "yellow"),
    "dropped_by_timeout": ("dropped by timeout", "red"),
    "dropped_by_mark": ("dropped by mark", "red"),
    "dead_lettered": ("given up", "red"),
    "corrupt": ("damaged", "red"),
    "cleared": ("cleared", None),
    "skipped": ("skipped", None)
}


class History:
    """The last looks at one queue."""

    def __init__(self) -> None:
        """Initialize without a look."""
        self._looks: collections.deque[tuple[float, persipubsub.statistics.QueueStatistics]]
        self._looks = collections.deque(maxlen=_BAR_WIDTH + 1)

    def add(self, statistics: persipubsub.statistics.QueueStatistics) -> None:
        """Remember a look that was made now."""
        self._looks.append((time.monotonic(), statistics))

    def rates(self, total: Callable[[persipubsub.statistics.QueueStatistics], int]) -> list[float]:
        """Compute the growth a second of a total; one that went back was counted anew."""
        points = [(moment, total(look)) for moment, look in self._looks]
        return [
            max(0, count - before) / max(1e-9, moment - earlier)
            for (earlier, before), (moment, count) in itertools.pairwise(points)
        ]


def _sparkline(values: Sequence[float]) -> str:
    """Draw numbers as bars; what is not zero is seen."""
    top = max(values)
    return "".join(_LEVELS[max(1, round(value / top * 8)) if value else 0]
                   for value in values) if top else ""


def draw(statistics: Mapping[str, persipubsub.statistics.QueueStatistics],
         histories: Mapping[str, History], limit: int | None) -> list[Line]:
    """
    Lay out queues.

    :param statistics: by queue
    :param histories: of the queues that are watched
    :param limit: so many subscribers and consumers of each queue; None: all, with their whole names
    :return: lines
    """
    lines: list[Line] = []
    for key, figures in statistics.items():
        history = histories.get(key, History())
        name = _name(key, limit)
        path = text.printable(figures.path)
        if limit:
            path = text.shorten(path, _WIDTH - text.width_of(name) - 2)
        lines += [[], [(name, "bold"), (f"  {path}", "dim")]]
        lines += _draw_queue(figures, history.rates(lambda look: look.sent))
        lines += _draw_subscribers(figures, history, limit)
        lines += _draw_claims(figures, limit)
    return lines[1:]


def _name(name: str, limit: int | None) -> str:
    """Show a name, shortened where there is little room."""
    return text.shorten(text.printable(name), _NAME_WIDTH) if limit else text.printable(name)


def _draw_queue(figures: persipubsub.statistics.QueueStatistics,
                rates: Sequence[float]) -> Iterator[Line]:
    """Draw what is in a queue, and how much of its limits that is."""
    age = figures.oldest_age_seconds
    rows = [
        ("messages", f"{figures.messages:,}", figures.message_share, "MAX_MSGS_NUM"),
        ("bytes", text.show_bytes(figures.message_bytes), figures.byte_share,
         "HWM_LMDB_SIZE_BYTES"),
        ("oldest", text.show_seconds(age or 0.0), figures.age_share, "MSG_TIMEOUT_SECS"),
        ("store", text.show_bytes(figures.file_bytes), figures.file_share, "max_db_size_bytes"),
    ]
    if not figures.messages:
        yield [("  nothing waits", None)]
        rows = rows[3:]
    for name, value, share, limit in rows:
        line: list[tuple[str, str | None]] = [(f"  {name:<8} {value:>13}", None)]
        if share:
            color = [color for least, color in _COLORS if share >= least][0]
            filled = min(_BAR_WIDTH, max(1, round(share * _BAR_WIDTH)))
            line += [("  " + "━" * filled, color), ("┄" * (_BAR_WIDTH - filled), "dim"),
                     (f" {text.show_share(share):>5}", color), (f" of {limit}", "dim")]
        yield line
    if figures.journal_bytes:
        behind = text.show_bytes(figures.journal_lag_bytes)
        yield [(f"  journal  {text.show_bytes(figures.journal_bytes):>13}", None),
               (f"  {behind} not yet safe from a power failure" * bool(figures.journal_lag_bytes),
                "yellow")]
    if figures.disk_bytes:
        yield [(f"  on disk  {text.show_bytes(figures.disk_bytes):>13}", None)]
    if figures.sent:
        rate = f"  {_sparkline(rates):<20} {rates[-1]:,.0f}/s" if rates else ""
        yield [(f"  sent     {figures.sent:>13,}", None), (rate, "cyan")]


def _draw_subscribers(figures: persipubsub.statistics.QueueStatistics, history: History,
                      limit: int | None) -> Iterator[Line]:
    """Draw the subscribers of a queue: a row for each, without columns of zeros."""
    # Those with most lag where not all can be seen.
    shown = sorted(figures.subscribers, key=lambda one: -one.lag)[:limit]
    shown.sort(key=lambda one: one.subscriber)
    behind = sorted(one.position for one in figures.subscribers if one.lag)
    rows = [_cells(one, history, limit) for one in shown]
    used = [column for column in zip(_HEAD, *rows) if any(column[1:])]
    head, *table = text.table([*zip(*used)]) if rows else [""]
    width = max(map(text.width_of, [head, *table])) + 2
    yield from ([], [("  " + head, "dim")]) if rows else ()
    for row, one in zip(table, shown):
        is_slowest = len(behind) > 1 and one.lag and one.position == behind[0] < behind[1]
        line: list[tuple[str, str | None]] = [(f"  {row}", None)]
        gap = width - text.width_of(row)
        end = width + 2
        for note, color in _notes(one, bool(is_slowest)):
            if end + len(note) > _WIDTH:
                yield line
                line, gap, end = [], 4, 6
            line.append((" " * gap + note, color))
            end, gap = end + len(note) + 2, 2
        yield line
    if hidden := len(figures.subscribers) - len(shown):
        yield [(f"  and {hidden:,} more, with less lag", "dim")]


def _cells(one: persipubsub.statistics.SubscriberStatistics, history: History,
           limit: int | None) -> list[str]:
    """Show the figures of a subscriber; nothing for a zero, but for the lag."""
    rates = history.rates(lambda look: sum(other.acknowledged for other in look.subscribers
                                           if other.subscriber == one.subscriber))
    last = one.seconds_since_acknowledged
    return [
        _name(one.subscriber, limit), f"{one.lag:,}",
        "?" if one.in_flight is None else f"{one.in_flight:,}" if one.in_flight else "",
        f"{one.acknowledged:,}" if one.acknowledged else "",
        f"{rates[-1]:,.0f}/s" if any(rates[-1:]) else "",
        "" if last is None else text.show_seconds(last)
    ]


def _notes(one: persipubsub.statistics.SubscriberStatistics,
           is_slowest: bool) -> Iterator[tuple[str, str | None]]:
    """Tell what else is to be known of a subscriber."""
    if one.is_paused:
        yield "paused", "magenta"
    if is_slowest:
        yield "slowest", "yellow"
    for field, (note, color) in _NOTES.items():
        if number := getattr(one, field):
            yield f"{number:,} {note}", color


def _draw_claims(figures: persipubsub.statistics.QueueStatistics,
                 limit: int | None) -> Iterator[Line]:
    """Draw which process holds which messages, and since when: the longest first."""
    claims = [claim for one in figures.subscribers for claim in one.claims]
    claims.sort(key=lambda claim: -(claim.seconds or 0.0))
    rows = [["IN FLIGHT", "NUMBER", "PROCESS", "SINCE"]]
    for claim in claims[:limit]:
        last = f" to {claim.number + claim.count - 1}" if claim.count > 1 else ""
        process = "?" if claim.process_id is None else str(claim.process_id)
        seconds = "?" if claim.seconds is None else text.show_seconds(claim.seconds)
        rows.append([_name(claim.subscriber, limit), f"{claim.number}{last}", process, seconds])
    if claims:
        head, *table = text.table(rows)
        yield from ([], [("  " + head, "dim")])
        for row in table:
            yield [("  " + row, None)]
        if hidden := len(claims) - len(table):
            yield [(f"  and {hidden:,} more, for less time", "dim")]
