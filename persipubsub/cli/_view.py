"""Draw the statistics on a terminal, once or again and again."""

import collections
import io
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import rich.box
import rich.console
import rich.live
import rich.measure
import rich.panel
import rich.table
import rich.text

import persipubsub.statistics
from persipubsub.cli import _text

Statistics = dict[str, persipubsub.statistics.QueueStatistics]

_BAR_WIDTH: Final = 20
_TREND_WIDTH: Final = 20

#: What a narrow terminal does not show of subscribers, until the rest fits: columns of figures that
#: are mostly zero are put together, and then those are left out that others tell something of.
_LEFT_OUT: Final = (
    {"dropped"},
    {"dropped", "trend"},
    {"trend", "timeout", "mark", "dead", "other"},
    {"trend", "timeout", "mark", "dead", "other", "received"},
    {"trend", "timeout", "mark", "dead", "other", "received", "last"},
    {"trend", "timeout", "mark", "dead", "other", "received", "last", "in flight"},
    {"trend", "timeout", "mark", "dead", "other", "received", "last", "in flight", "rate"},
    {
        "trend", "timeout", "mark", "dead", "other", "received", "last", "in flight", "rate",
        "failed"
    },
    {
        "trend", "timeout", "mark", "dead", "other", "received", "last", "in flight", "rate",
        "failed", "dropped"
    },
)

#: So much of the names of subscribers is shown in one line, in characters, before columns are left
#: out; longer ones are folded.
_NAME_WIDTH: Final = 24

#: Around what is in a panel, in characters.
_FRAME_WIDTH: Final = 4

_PICTURE_WIDTH: Final = 120
_LEVELS: Final = " ▁▂▃▄▅▆▇█"

#: Rows with a share from these on are drawn in that color.
_COLORS: Final = ((0.8, "red"), (0.5, "yellow"), (0.0, "green"))


class _Look(NamedTuple):
    """Hold the figures of one look."""

    time: float  #: on the monotonic clock, in seconds
    statistics: persipubsub.statistics.QueueStatistics


class History:
    """Remember the last looks at one queue."""

    def __init__(self) -> None:
        """Initialize without a look."""
        self._looks: collections.deque[_Look] = collections.deque(maxlen=_TREND_WIDTH + 1)

    def add(self, now: float, statistics: persipubsub.statistics.QueueStatistics) -> None:
        """
        Remember a look.

        :param now: on the monotonic clock, in seconds
        :param statistics: of the queue
        """
        self._looks.append(_Look(now, statistics))

    def is_moving(self) -> bool:
        """
        Tell whether there are rates.

        :return: True after two looks
        """
        return len(self._looks) > 1

    def sent(self) -> list[float]:
        """
        Compute how many messages were sent between the looks.

        :return: rates, in messages a second
        """
        return self._rates([float(look.statistics.next_number) for look in self._looks])

    def received(self, subscriber: str) -> list[float]:
        """
        Compute how many messages were acknowledged between the looks.

        :param subscriber: by whom
        :return: rates, in messages a second
        """
        return self._rates([
            float(
                next((one.acknowledged
                      for one in look.statistics.subscribers if one.subscriber == subscriber), 0))
            for look in self._looks
        ])

    def _rates(self, totals: Sequence[float]) -> list[float]:
        """
        Compute rates.

        :param totals: at each look
        :return: growth a second; a total that went back was counted anew
        """
        looks = list(self._looks)
        return [
            max(0.0, totals[index] - totals[index - 1]) /
            max(1e-3, looks[index].time - looks[index - 1].time) for index in range(1, len(totals))
        ]


def sparkline(values: Sequence[float]) -> str:
    """
    Draw numbers as a line of bars.

    :param values: to be drawn, the newest last
    :return: a character for each of the newest ones

    >>> sparkline([0, 1, 2, 4])[-4:]
    ' ▂▄█'
    """
    top = max(values, default=0.0)
    if top <= 0:
        return ("▁" * len(values[-_TREND_WIDTH:])).rjust(_TREND_WIDTH)
    # What is not nothing shall be seen.
    steps = [max(1, round(value / top * 8)) if value > 0 else 0 for value in values[-_TREND_WIDTH:]]
    return "".join(_LEVELS[step] for step in steps).rjust(_TREND_WIDTH)


def _bar(share: float) -> rich.text.Text:
    """
    Draw a share.

    :param share: 1.0 is all
    :return: bar with the percentage
    """
    color = next(color for limit, color in _COLORS if share >= limit)
    filled = min(_BAR_WIDTH, max(1 if share > 0 else 0, round(share * _BAR_WIDTH)))
    text = rich.text.Text()
    text.append("━" * filled, style=color)
    text.append("┄" * (_BAR_WIDTH - filled), style="bright_black")
    text.append(f" {_text.show_share(share):>4}", style=color if share >= 0.5 else "default")
    return text


def _width_of(table: rich.table.Table) -> int:
    """
    Measure a table.

    :param table: to be measured
    :return: width at which nothing is folded or cut, in characters
    """
    console = rich.console.Console(width=1 << 16)
    return rich.measure.Measurement.get(console, console.options, table).maximum


def _draw_marks(figures: persipubsub.statistics.QueueStatistics, history: History,
                width: int) -> rich.table.Table:
    """
    Draw what is in a queue.

    :param figures: of the queue
    :param history: of the queue
    :param width: that there is, in characters
    :return: five rows
    """
    rows = [
        ("messages", f"{figures.messages:,}", _bar(figures.message_share), "of MAX_MSGS_NUM"),
        ("bytes", _text.show_bytes(figures.message_bytes), _bar(figures.byte_share),
         "of HWM_LMDB_SIZE_BYTES"),
        ("oldest", _text.show_seconds(figures.oldest_age_seconds), _bar(figures.age_share),
         "of MSG_TIMEOUT_SECS"),
        ("file", _text.show_bytes(figures.file_bytes), _bar(figures.file_share),
         "of max_db_size_bytes"),
    ]
    if history.is_moving():
        rates = history.sent()
        rows.append(("sent", f"{rates[-1]:,.0f}/s", rich.text.Text(sparkline(rates), style="cyan"),
                     f"{figures.commits:,} commits"))
    else:
        rows.append(("commits", f"{figures.commits:,}", rich.text.Text(), ""))
    # In a narrow terminal, without what the shares are of; then without the shares.
    for columns in (4, 3, 2):
        grid = rich.table.Table.grid(padding=(0, 2))
        for justify in ("left", "right", "left", "left")[:columns]:
            grid.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for name, value, share, limit in rows:
            cells = (rich.text.Text(name, style="bold"), value, share,
                     rich.text.Text(limit, style="bright_black"))
            grid.add_row(*cells[:columns])
        if _width_of(grid) <= width:
            break
    return grid


def _draw_subscribers(figures: persipubsub.statistics.QueueStatistics, history: History, limit: int,
                      width: int) -> rich.table.Table:
    """
    Draw the subscribers of a queue.

    :param figures: of the queue
    :param history: of the queue
    :param limit: how many to draw at most: those with the largest lag
    :param width: that there is, in characters
    :return: a row for each
    """
    drawn = sorted(figures.subscribers, key=lambda one: -one.lag)[:limit]
    drawn.sort(key=lambda one: one.subscriber)
    names = [rich.text.Text(_text.printable(one.subscriber), style="bold") for one in drawn]
    rows = [_cells_of(one, history) for one in drawn]
    longest = max((name.cell_len for name in names), default=0)
    for left_out in _LEFT_OUT:
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("subscriber", overflow="fold", min_width=10)
        for head in rows[0] if rows else ():
            if head not in left_out:
                table.add_column("" if head == "trend" else head, justify="right", no_wrap=True)
        for name, cells in zip(names, rows):
            table.add_row(name, *(cell for head, cell in cells.items() if head not in left_out))
        if _width_of(table) - max(0, longest - _NAME_WIDTH) <= width:
            break
    hidden = len(figures.subscribers) - len(drawn)
    if hidden:
        table.add_row(rich.text.Text(f"and {hidden} more, with less lag", style="italic"))
    return table


def _cells_of(one: persipubsub.statistics.SubscriberStatistics,
              history: History) -> dict[str, rich.text.Text]:
    """
    Show the figures of a subscriber.

    :param one: its figures
    :param history: of its queue
    :return: all that can be shown in a row, by the head of the column
    """
    cells = {
        "lag": _number(one.lag, ""),
        "in flight": _number(one.in_flight, ""),
        "received": _number(one.acknowledged, "")
    }
    rates = history.received(one.subscriber)
    if history.is_moving():
        cells["rate"] = rich.text.Text(f"{rates[-1]:,.0f}/s")
    dropped = [one.dropped_by_timeout, one.dropped_by_mark, one.dead_lettered]
    cells["last"] = rich.text.Text(_text.show_seconds(one.seconds_since_acknowledged))
    cells["failed"] = _number(one.failed, "yellow")
    cells["dropped"] = _number(sum(dropped), "red")
    for head, count in zip(("timeout", "mark", "dead"), dropped):
        cells[head] = _number(count, "red")
    cells["other"] = _number(one.cleared + one.skipped + one.corrupt, "yellow")
    if history.is_moving():
        cells["trend"] = rich.text.Text(sparkline(rates), style="cyan")
    return cells


def _number(number: int | None, style: str) -> rich.text.Text:
    """
    Show a number.

    :param number: to be shown; None if it is not known
    :param style: if it is not zero
    :return: text, dim for zero
    """
    if number is None:
        return rich.text.Text("?", style="bright_black")
    return rich.text.Text(f"{number:,}", style=style if number else "bright_black")


def draw(statistics: Statistics, errors: Mapping[str, str], histories: Mapping[str, History],
         limit: int, width: int) -> rich.console.Group:
    """
    Draw queues.

    :param statistics: by queue
    :param errors: of those that can not be looked at, by queue
    :param histories: by queue
    :param limit: how many subscribers of a queue to draw at most
    :param width: of the terminal, in characters
    :return: a panel for each
    """
    panels = []
    for key, figures in statistics.items():
        panels.append(
            rich.panel.Panel(rich.console.Group(
                _draw_marks(figures, histories[key], width - _FRAME_WIDTH),
                _draw_subscribers(figures, histories[key], limit, width - _FRAME_WIDTH)),
                             title=rich.text.Text(_text.printable(key), style="bold"),
                             subtitle=rich.text.Text(_text.printable(figures.path),
                                                     style="bright_black"),
                             title_align="left",
                             subtitle_align="right",
                             expand=False))
    for key, text in errors.items():
        panels.append(
            rich.panel.Panel(rich.text.Text(_text.printable(text)),
                             title=rich.text.Text(_text.printable(key), style="bold"),
                             title_align="left",
                             border_style="red",
                             expand=False))
    if not panels:
        panels.append(rich.panel.Panel("There are no queues.", expand=False))
    return rich.console.Group(*panels)


def show(collect: Callable[[], tuple[Statistics, dict[str, str]]], interval: float, looks: int,
         svg: pathlib.Path | None) -> bool:
    """
    Look at queues and draw them.

    :param collect: looks
    :param interval: between two looks, in seconds
    :param looks: how many; 0: until Ctrl-C
    :param svg: where to write the last view as a picture
    :return: True if a queue could not be looked at
    """
    console = rich.console.Console()
    histories: dict[str, History] = collections.defaultdict(History)
    done = 0
    with rich.live.Live(console=console, auto_refresh=False, screen=False,
                        vertical_overflow="crop") as live:
        while True:
            statistics, errors = collect()
            for key, figures in statistics.items():
                histories[key].add(time.monotonic(), figures)
            # A look has to fit into the terminal, or it could not be drawn over.
            room = console.height if looks != 1 else 1 << 20
            limit = max(1, room // max(1, len(statistics)) - 12)
            view = draw(statistics, errors, histories, limit, console.width)
            live.update(view, refresh=True)
            done += 1
            if done == looks:
                break
            time.sleep(interval)
    if svg is not None:
        picture = rich.console.Console(record=True, width=_PICTURE_WIDTH, file=io.StringIO())
        picture.print(draw(statistics, errors, histories, len(statistics) * 100, _PICTURE_WIDTH))
        picture.save_svg(str(svg), title="persipubsub stat")
    return bool(errors)
