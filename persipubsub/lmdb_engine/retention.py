"""
What may leave the log, and what has to: the low watermark, timeouts, dropping.

A message leaves when all its subscribers acknowledged it. It is dropped unread when it is older
than the queue's timeout, or to make room at a high-water mark: ``room`` decides at a mark, and this
module drops. Each subscriber counts its drops (``positions.leave``). Finished blocks are deleted by
``log.delete_head``: ``delete_finished`` and ``Room.tidy`` call it.
"""

import dataclasses
import operator
from typing import Final, NamedTuple

from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, meta, once, positions
from persipubsub.lmdb_engine.format import Tx
from persipubsub.lmdb_engine.log import LogEnd

#: Counters of subscribers: dropped since they were too old, at a high-water mark, by an operator.
BY_TIMEOUT: Final = "dropped_by_timeout"
BY_MARK: Final = "dropped_by_mark"
BY_OPERATOR: Final = "cleared"

#: The smallest number of messages between two looks at positions. A look and the deletion after it
#: take as long as a send: with 8 messages between two looks, they took a sixth of the time of all
#: sends.
_SMALLEST_INTERVAL: Final = 16

#: Most blocks, or ids of messages, that are deleted in one transaction, so that senders do not wait
#: for long.
CHUNK: Final = 256


# Not a named tuple, whose fields take five times as long to read: each send reads some.
@dataclasses.dataclass(frozen=True, slots=True)
class LowWatermark:
    """
    Low watermark: how far all subscribers have come.

    As long as the generation in the log stays the same, positions only go forward: a watermark that
    was found earlier is a safe lower bound. It is exact as long as the position of the slowest
    subscriber stays the same.
    """

    generation: int
    number: int  #: the first number that a subscriber still needs
    messages: int  #: how many the log has before ``number``
    size: int  #: their bytes
    interval: int  #: how many messages are sent until the positions are looked at again
    #: key (UTF-8) of a subscriber whose position is ``number``; empty if there is none, or if the
    #: log has audiences: then a position does not tell the first pending message
    slowest_key: bytes
    #: no message from ``number`` on was, or will be, committed before this time
    oldest_ns: int


class Dropped(NamedTuple):
    """Messages that were dropped unread for a subscriber."""

    subscriber: str
    messages: int


def find_low_watermark(tx: Tx,
                       log_end: LogEnd,
                       is_read_only: bool = False,
                       known: LowWatermark | None = None) -> LowWatermark:
    """
    Find the low watermark.

    :param is_read_only: True to move no position over messages for others
    :param known: an earlier one; it is exact as long as the slowest subscriber has not moved
    """
    found: list[tuple[int, fmt.Buffer]] = []
    if log_end.totals:
        for subscriber in positions.read_all(tx):
            number = positions.first_pending(tx, subscriber, log_end.next_number)
            if number > subscriber.position and not is_read_only:
                # The position moves over messages for others, so that the next look begins there.
                positions.finish(tx, subscriber, subscriber.position, number)
                positions.write(tx, subscriber)
            found.append((number, b""))
    else:
        if known is not None and known.generation == log_end.generation and known.slowest_key:
            value = tx.txn.get(known.slowest_key, db=tx.db.subscribers)
            if value is not None and fmt.unpack_position(value) == known.number:
                return known
        # To read only the positions takes a tenth of the time that all records take.
        found = [(fmt.unpack_position(data), key) for key, data in tx.txn.cursor(tx.db.subscribers)]
    number, slowest_key = min(found, key=operator.itemgetter(0), default=(log_end.next_number, b""))
    place = log.place_of(tx.cursor(), number)
    return LowWatermark(generation=log_end.generation,
                        number=number,
                        messages=place.total_count,
                        size=place.total_bytes,
                        interval=max(_SMALLEST_INTERVAL,
                                     len(found) // 4),
                        slowest_key=bytes(slowest_key),
                        oldest_ns=place.time_ns)


def describe(tx: Tx) -> tuple[int, int, str, int]:
    """
    Count what waits, and find the subscriber that needs the oldest message.

    :return: messages and bytes that wait; the subscriber, and how many it has to acknowledge
    """
    log_end = log.read_end(tx.cursor())
    end = log_end.next_number
    low = find_low_watermark(tx, log_end, is_read_only=True)
    slowest = min(positions.read_all(tx),
                  key=lambda subscriber: positions.first_pending(tx, subscriber, end),
                  default=None)
    name, lag = "", 0
    if slowest is not None:
        name, lag = slowest.name, positions.count_pending(tx, slowest, 0, end)
    return log_end.total_count - low.messages, log_end.total_bytes - low.size, name, lag


# Dropping


def drop(tx: Tx, begin: int, end: int, counter: str) -> list[Dropped]:
    """Drop a range of messages for every subscriber, and count them in its record."""
    dropped = []
    for subscriber in positions.read_all(tx):
        # A consumer may be at work on a message that is dropped. Its acknowledgement then finds the
        # message done, and does not count it a second time.
        if subscriber.position < end:
            count = positions.leave(tx, subscriber, begin, end, counter)
            if count:
                dropped.append(Dropped(subscriber.name, count))
    return dropped


def expired_before(tx: Tx, low: LowWatermark, log_end: LogEnd, time_ns: int) -> int:
    """Return the number of the first message that is not too old."""
    if low.oldest_ns >= time_ns:
        return low.number
    return log.number_at_time(tx.cursor(), low.number, log_end.next_number, time_ns)


def halve(tx: Tx, added: int, drops_newest: bool) -> list[Dropped]:
    """Drop the oldest or newest messages, so that half are left together with those to be added."""
    cursor = tx.cursor()
    log_end = log.read_end(cursor)
    low = find_low_watermark(tx, log_end)
    waiting = log_end.total_count - low.messages
    kept = max(0, (waiting + added) // 2 - added)
    cut = log.number_at_count(cursor, low.number, log_end.next_number,
                              low.messages + (kept if drops_newest else waiting - kept))
    if not drops_newest:
        return drop(tx, 0, cut, BY_MARK)
    dropped = drop(tx, cut, log_end.next_number, BY_MARK)
    log.truncate(cursor, log_end, cut)
    return dropped


def clear(tx: Tx) -> list[Dropped]:
    """Let all subscribers begin at the end of the queue."""
    return drop(tx, 0, log.read_end(tx.cursor()).next_number, BY_OPERATOR)


# Deleting


def is_any_finished(tx: Tx, oldest_id_ns: int, retained_ns: int) -> bool:
    """Tell whether an id, or the first block, may be deleted; the last block stays."""
    if once.is_any_before(tx, oldest_id_ns):
        return True
    found = log.head(tx.cursor())
    if found is None or found.block.time_ns > retained_ns:
        return False
    log_end = log.read_end(tx.cursor())
    end = fmt.end_of(found.first, found.block)
    return (end < log_end.next_number
            and end <= find_low_watermark(tx, log_end, is_read_only=True).number)


def delete_finished(tx: Tx, oldest_id_ns: int, retained_ns: int) -> None:
    """Forget some old ids, and delete some blocks that all subscribers are finished with."""
    once.forget(tx, oldest_id_ns, CHUNK)
    cursor = tx.cursor()
    low = find_low_watermark(tx, log.read_end(cursor))
    log.delete_head(cursor, low.number, CHUNK, retained_ns)


def empty_last(tx: Tx) -> None:
    """Replace the last block by a placeholder if it is the only one and finished."""
    # LMDB reuses pages only two commits after they were freed: let there be a commit in any case.
    meta.write_header(tx, meta.read_header(tx))
    cursor = tx.cursor()
    log_end = log.read_end(cursor)
    is_needed = find_low_watermark(tx, log_end).number < log_end.next_number
    found = log.head(cursor)
    if (found is not None and found.block.messages and not is_needed
            and fmt.end_of(found.first, found.block) == log_end.next_number):
        cursor.delete()
        log.put_placeholder(cursor, log_end)
