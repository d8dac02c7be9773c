"""Text for people: lines, tables, sizes and times, and what people type for times."""

import datetime
import os
import re
import sys
from collections.abc import Sequence
from typing import Final, TextIO

#: Characters of messages and names that would change a terminal, or begin a line like ours.
_UNPRINTABLE: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

#: Shortest time that is shown in a unit, and the unit, both in seconds; its name.
_SHOWN_UNITS: Final = ((172800, 86400, "d"), (7200, 3600, "h"), (120, 60, "min"))

_UNITS: Final = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}

#: A century. Waiting for longer is waiting for ever, and clocks overflow.
_MAX_SECONDS: Final = 3_200_000_000


def complain(text: str) -> None:
    """Write a line about what went wrong to the standard error."""
    # Errors name the function that a program calls. A reader of the terminal types the command.
    text = text.replace("persipubsub.control.initialize_all_dbs", "persipubsub init")
    tell(f"persipubsub: {printable(text)}")


def tell(line: str) -> None:
    """Write a line to the standard error. If nobody reads it, the exit code has to do."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Discard what is still to be written to a standard stream, also at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
    r"""
    Escape what would change a terminal.

    >>> print(printable("a\nb"))
    a\nb
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def shorten(text: str, width: int) -> str:
    """
    Cut the middle out of a text that is too long.

    >>> shorten("archive-service-eu", 12)
    'archiv…ce-eu'
    """
    end = (width - 1) // 2
    return text if len(text) <= width else f"{text[:width - 1 - end]}…{text[-end:]}"


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0, )) -> list[str]:
    """
    Lay out a table: columns are two spaces apart, and numbers stand on the right.

    >>> table([["QUEUE", "LAG"], ["q", "1,234"]])
    ['QUEUE    LAG', 'q      1,234']

    :param rows: cells, the head first
    :param left: columns with text
    :return: lines
    """
    columns = []
    for index, column in enumerate(zip(*rows)):
        cells = list(map(printable, column))
        width = max(map(len, cells))
        columns.append(
            [cell.ljust(width) if index in left else cell.rjust(width) for cell in cells])
    return ["  ".join(row).rstrip() for row in zip(*columns)]


def count(number: int, noun: str) -> str:
    """
    Show a number of things.

    >>> count(2, "delivery")
    '2 deliveries'
    """
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun}"


def show_bytes(size: float) -> str:
    """
    Show a size.

    >>> show_bytes(1234567)
    '1.2 MB'
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.95 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:,.{int(units[0] != 'B')}f} {units[0]}"


def show_seconds(seconds: float) -> str:
    """
    Show a time.

    >>> show_seconds(7300.0)
    '2.0 h'
    """
    for limit, unit, name in _SHOWN_UNITS:
        if seconds >= limit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s"


def parse_seconds(text: str) -> float:
    """
    Read a time as people write it.

    >>> parse_seconds("1h30m"), parse_seconds("1.5"), parse_seconds("inf")
    (5400.0, 1.5, inf)

    :raise ValueError: if it is none
    """
    number = r"(\d+(?:\.\d*)?|\.\d+)"
    if text == "inf":
        return float("inf")
    if re.fullmatch(number, text, re.ASCII):
        text += "s"
    parts = re.findall(f"{number}(ms|s|min|m|h|d|w)", text, re.ASCII)
    seconds = sum(float(count) * _UNITS[unit] for count, unit in parts)
    if not parts or "".join(map("".join, parts)) != text or seconds > _MAX_SECONDS:
        raise ValueError(text)
    return seconds


def parse_time(text: str) -> datetime.datetime:
    """
    Read a point in time: ``-1h`` (ago), ISO 8601, a time of the last 24 hours, ``@`` and seconds.

    Without a time zone it is on the clock of this machine.

    :raise ValueError: if it is none
    :raise OverflowError: if no clock goes that far
    """
    now = datetime.datetime.now(datetime.UTC)
    if text.startswith("-"):
        return now - datetime.timedelta(seconds=parse_seconds(text[1:]))
    if text.startswith("@"):
        return datetime.datetime.fromtimestamp(float(text[1:]), datetime.UTC)
    if re.fullmatch(r"\d\d?:\d\d(:\d\d)?", text, re.ASCII):
        today = now.astimezone().date()
        moment = datetime.datetime.fromisoformat(f"{today}T{text:0>5}").astimezone()
        return moment if moment <= now else moment - datetime.timedelta(days=1)
    return datetime.datetime.fromisoformat(text).astimezone()
