"""Places in a queue, from which a subscriber goes on: :py:func:`persipubsub.control.seek`."""

import datetime
import math
from typing import Final, TypeAlias

__all__ = ["Place", "since_ns"]

#: The beginning, the end, the number of a message, or a time.
Place: TypeAlias = str | int | float | datetime.datetime

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def since_ns(to: Place) -> int | None:
    """
    Check a place.

    >>> since_ns("end"), since_ns(7), since_ns(1.5)
    (None, None, 1500000000)

    :param to: given by the user
    :return: a time in nanoseconds since 1970; None if it is no time
    :raise TypeError: if it is of another type
    :raise ValueError: if it is another text, or a time without a time zone
    """
    if isinstance(to, str):
        if to not in ("beginning", "end"):
            raise ValueError(f"Expected 'beginning', 'end', a number or a time, but got: {to!r}")
        return None
    if isinstance(to, int) and not isinstance(to, bool):
        return None
    if isinstance(to, datetime.datetime):
        if to.utcoffset() is None:
            raise ValueError(f"Expected a time with its time zone, but got: {to!r}")
        return (to - _EPOCH) // datetime.timedelta(microseconds=1) * 1000
    if not isinstance(to, float):
        raise TypeError("Expected a place of type str, int, float or datetime, but got: "
                        f"{type(to).__name__}")
    if not math.isfinite(to * 1e9):
        raise ValueError(f"Expected a time in seconds since 1970, but got: {to!r}")
    return int(to * 1e9)
