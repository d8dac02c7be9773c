"""
Write text for people: lines, tables and complaints.

It knows nothing of options: ``stat`` in its plain forms runs without click.
"""

import os
import re
import sys
from collections.abc import Sequence
from typing import Final, TextIO

#: What would change a terminal, or look like a line of ours, if a message or a name had it. It is
#: compiled at its first use: most runs of "stat" need it for nothing, and it takes half a
#: millisecond.
_UNPRINTABLE: Final = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"

#: Seconds after which a time is told in a larger unit, and that unit in seconds.
_TIME_UNITS: Final = ((172800, 86400, "d"), (7200, 3600, "h"), (120, 60, "min"))


def complain(text: str) -> None:
    """
    Write a line about what went wrong.

    :param text: what went wrong
    """
    # Errors tell programmers what to call; who reads this types it.
    text = text.replace("persipubsub.control.initialize_all_dbs", "persipubsub init")
    tell(f"persipubsub: {printable(text)}")


def tell(line: str) -> None:
    """
    Write a line to the standard error. If nobody reads it, the exit code has to do.

    :param line: without its end
    """
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """
    Write nothing to a standard stream any more, not even what is left of it at the exit.

    :param stream: that could not be written to
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
    r"""
    Show what would change a terminal instead of doing it.

    :param text: to be shown
    :return: text in which control characters are escaped

    >>> print(printable("a\nb"))
    a\nb
    """
    if text.isprintable():
        # Nothing of the pattern is. Of the rest, much is harmless.
        return text
    return re.sub(_UNPRINTABLE,
                  lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def show_bytes(size: float) -> str:
    """
    Show a size.

    :param size: in bytes
    :return: in a unit for people

    >>> show_bytes(1234567)
    '1.2 MB'
    """
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:,.1f} TB"


def show_seconds(seconds: float | None) -> str:
    """
    Show a time.

    :param seconds: how long; None if there is none
    :return: in a unit for people

    >>> show_seconds(7300.0)
    '2.0 h'
    """
    if seconds is None:
        return "-"
    for limit, unit, name in _TIME_UNITS:
        if seconds >= limit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s"


def show_share(share: float) -> str:
    """
    Show a share.

    :param share: 1.0 is all
    :return: percentage

    >>> show_share(0.123)
    '12 %'
    """
    if 0 < share < 0.01:
        return "<1 %"
    return f"{100 * share:.0f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    Lay out a table for what is not a terminal: nothing is cut, columns are two spaces apart.

    :param head: of the columns; the first one is text, the others are numbers
    :param rows: of the table
    :return: lines
    """
    cells = [list(head)] + [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def count(number: int, noun: str) -> str:
    """
    Show a number of things.

    :param number: how many
    :param noun: what, in the singular
    :return: number and noun

    >>> count(2, "delivery")
    '2 deliveries'
    """
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun}"
