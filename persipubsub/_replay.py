"""
Choose the place from which a subscriber is to go on.

Times are given on the wall clock, while the log has those of the queue's clock, which nobody sets.
They are compared by age: how long ago the time is, by the wall clock now.
"""

import datetime
import math
import time
from collections.abc import Callable
from typing import Union

import lmdb

from persipubsub.store import _layout, _positions
from persipubsub.store._databases import Databases

Place = Union[str, int, float, datetime.datetime]

#: A work that finds the number from which on to go.
Choose = Callable[["lmdb.Transaction[memoryview]", Databases], int]


def chooser(to: Place, timeout_ns: int, now_ns: Callable[[], int]) -> Choose:
    """
    Check a place, before anything is looked at, and make the work that finds it.

    :param to: ``"beginning"``, ``"end"``, a number, or a time
    :param timeout_ns: age at which messages are too old, in nanoseconds
    :param now_ns: reads the queue's clock
    :return: to be run in a transaction
    :raise TypeError: if it is of another type
    :raise ValueError: if it is another text, or a time that is none or has no time zone
    """
    if isinstance(to, str):
        if to == "end":
            return lambda txn, databases: _layout.MAX_NUMBER
        if to != "beginning":
            raise ValueError(f"Expected 'beginning', 'end', a number or a time, but got: {to!r}")
        return lambda txn, databases: _positions.beginning(txn, databases, now_ns() - timeout_ns)
    if isinstance(to, int) and not isinstance(to, bool):
        number = to
        return lambda txn, databases: number
    wall_ns = _wall_ns(to)

    def find(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> int:
        since_ns = now_ns() - (time.time_ns() - wall_ns)
        # What is too old would only be dropped.
        return _positions.beginning(txn, databases, max(since_ns, now_ns() - timeout_ns))

    return find


def _wall_ns(moment: object) -> int:
    """
    Convert a time.

    :param moment: seconds since 1970, or with its time zone
    :return: nanoseconds since 1970
    """
    if isinstance(moment, datetime.datetime):
        if moment.utcoffset() is None:
            raise ValueError(f"Expected a time with its time zone, but got: {moment!r}")
        since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
        return (since // datetime.timedelta(microseconds=1)) * 1000
    if not isinstance(moment, float):
        raise TypeError(f"Expected a place of type str, int, float or datetime, but got: "
                        f"{type(moment).__name__}")
    if not math.isfinite(moment * 1e9):
        raise ValueError(f"Expected a time in seconds since 1970, but got: {moment!r}")
    return int(moment * 1e9)
