"""
What may leave the log, and what has to: the low watermark, timeouts, high-water marks.

A message leaves when all its subscribers acknowledged it. It is dropped unread when it is older
than the queue's timeout, or to make room at a high-water mark; each subscriber counts its drops.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, positions
from persipubsub.lmdb_engine.format import Tx
from persipubsub.lmdb_engine.log import LogEnd


# Not a named tuple, whose fields take five times as long to read: each send reads some.
@dataclasses.dataclass(frozen=True, slots=True)
class LowWatermark:
    """
    Low watermark: how far all subscribers have come.

    Positions only go forward, so that one found earlier stays a safe lower bound until the
    generation in the log changes. It holds as long as the slowest
    subscriber stays where it is.
    """

    generation: int
    number: int  #: the first number that anybody still needs
    everyone: int  #: the same, only for what is addressed to everybody
    audiences: dict[int, int]  #: the same, for each audience from 1 on
    messages: int  #: how many the log has in front of ``number``
    size: int  #: their bytes
    subscribers: int  #: how many there are
    interval: int  #: how many messages are sent until the positions are looked at again
    #: key (UTF-8) of a subscriber at ``everyone``; None if that position is not all that counts
    slowest_key: bytes | None
    #: all messages from ``number`` on were committed then or later, also those that are yet to come
    oldest_ns: int


class Slowest(NamedTuple):
    """The slowest subscriber."""

    subscriber: str
    lag: int  #: messages that it still has to acknowledge


class Dropped(NamedTuple):
    """Messages that were dropped unread for a subscriber."""

    subscriber: str
    messages: int


#: The smallest number of messages between two looks at positions. A look and the deletion behind
#: it take as long as a send: with 8 of them between two looks it was a sixth of the time of all.
_SMALLEST_INTERVAL = 16


def interval_of(subscribers: int) -> int:
    """Choose how many messages are sent between two looks at the subscribers' positions."""
    return max(_SMALLEST_INTERVAL, subscribers // 4)


def find_low_watermark(tx: Tx,
                       log_end: LogEnd,
                       is_read_only: bool = False,
                       known: LowWatermark | None = None) -> LowWatermark:
    """
    Find the low watermark.

    :param is_read_only: True to move no position over messages of others
    :param known: an earlier one; it holds as long as the slowest subscriber has not moved
    """
    if not log_end.totals:
        if (known is not None and known.generation == log_end.generation
                and known.slowest_key is not None
                and known.everyone == positions.read_position(tx, known.slowest_key)):
            return known
        found = _find_slowest_key(tx)
        if found is None:
            return _low_watermark_at(tx, log_end, log_end.next_number, 0)
        slowest_key, position, count = found
        return _low_watermark_at(tx, log_end, position, count, slowest_key=slowest_key)

    subscribers = positions.read_all(tx)
    audiences = log.read_audiences(tx)
    at: dict[str, int] = {}
    for key, subscriber in subscribers:
        own = positions.audiences_of(audiences, key)
        if is_read_only:
            position = positions.first_pending(tx, subscriber, own, log_end.next_number)
        else:
            position = _settle(tx, key, subscriber, log_end, own)
        at[key.decode("utf-8")] = position
    return _low_watermark_at(tx,
                             log_end,
                             everyone=min(at.values(), default=log_end.next_number),
                             subscribers=len(subscribers),
                             audiences={
                                 audience: min((at[member] for member in members if member in at),
                                               default=log_end.next_number)
                                 for audience, members in audiences.items()
                             })


def _low_watermark_at(  # pylint: disable=too-many-arguments,too-many-positional-arguments
        tx: Tx,
        log_end: LogEnd,
        everyone: int,
        subscribers: int,
        slowest_key: bytes | None = None,
        audiences: dict[int, int] | None = None) -> LowWatermark:
    """Count what lies in front of the first number that anybody still needs."""
    number = min(everyone, log_end.next_number)
    place = log.place_of(tx.cursor(), number)
    return LowWatermark(generation=log_end.generation,
                        number=number,
                        everyone=everyone,
                        audiences=audiences or {},
                        messages=place.messages,
                        size=place.size,
                        subscribers=subscribers,
                        interval=interval_of(subscribers),
                        slowest_key=slowest_key if number == everyone else None,
                        oldest_ns=place.time_ns)


def _find_slowest_key(tx: Tx) -> tuple[bytes, int, int] | None:
    """Find the smallest position, in a tenth of the time of reading all records."""
    cursor = tx.txn.cursor(db=tx.db.pending)
    at = fmt.unpack_positions(cursor.iternext(keys=False, values=True))
    if not at:
        return None
    position = min(at)
    cursor.first()
    keys = cursor.iternext(keys=True, values=False)
    key = bytes(next(itertools.islice(keys, at.index(position), None)))
    return key, position, len(at)


def _settle(tx: Tx, key: bytes, subscriber: fmt.Subscriber, log_end: LogEnd,
            audiences: Sequence[int]) -> int:
    """Move a position over messages that are not for the subscriber."""
    position = positions.first_pending(tx, subscriber, audiences, log_end.next_number)
    if position == subscriber.position:
        return position
    position = positions.trim_ranges(tx, subscriber.ordinal, position)
    positions.write(tx, key, subscriber._replace(position=position))
    return position


def find_slowest(tx: Tx) -> Slowest | None:
    """Find the subscriber that needs the oldest message."""
    end = log.read_end(tx.cursor()).next_number
    audiences = log.read_audiences(tx)
    oldest, slowest = end, None
    for key, subscriber in positions.read_all(tx):
        own = positions.audiences_of(audiences, key)
        first = positions.first_pending(tx, subscriber, own, end)
        if first < oldest:
            lag = positions.count_pending(tx, subscriber, own, 0, end)
            oldest, slowest = first, Slowest(key.decode("utf-8"), lag)
    return slowest


Count = Callable[[fmt.Subscriber, int], fmt.Subscriber]


def count_timeout(subscriber: fmt.Subscriber, count: int) -> fmt.Subscriber:
    """Count messages that were dropped because they were too old."""
    return subscriber._replace(dropped_by_timeout=subscriber.dropped_by_timeout + count)


def count_mark(subscriber: fmt.Subscriber, count: int) -> fmt.Subscriber:
    """Count messages that were dropped at a high-water mark."""
    return subscriber._replace(dropped_by_mark=subscriber.dropped_by_mark + count)


def count_cleared(subscriber: fmt.Subscriber, count: int) -> fmt.Subscriber:
    """Count messages that were cleared by an operator."""
    return subscriber._replace(cleared=subscriber.cleared + count)


def drop_before(tx: Tx, cut: int, count: Count) -> list[Dropped]:
    """Drop everything in front of a number, for every subscriber."""
    audiences = log.read_audiences(tx)
    dropped: list[Dropped] = []
    for key, subscriber in positions.read_all(tx):
        if subscriber.position >= cut:
            continue
        count_lost = positions.count_pending(tx, subscriber, positions.audiences_of(audiences, key),
                                             0, cut)
        position = positions.trim_ranges(tx, subscriber.ordinal, cut)
        positions.write(tx, key, count(subscriber, count_lost)._replace(position=position))
        if count_lost:
            dropped.append(Dropped(key.decode("utf-8"), count_lost))
    return dropped


def drop_from(tx: Tx, log_end: LogEnd, cut: int, count: Count) -> tuple[LogEnd, list[Dropped]]:
    """Drop everything from a number on, for every subscriber."""
    audiences = log.read_audiences(tx)
    dropped: list[Dropped] = []
    for key, subscriber in positions.read_all(tx):
        count_lost = positions.count_pending(tx, subscriber, positions.audiences_of(audiences, key),
                                             cut, log_end.next_number)
        changed = count(subscriber, count_lost)
        if subscriber.position >= cut:
            positions.drop_ranges(tx, subscriber.ordinal, cut)
            changed = changed._replace(position=log_end.next_number)
        else:
            # A consumer may be at work on what is dropped: its acknowledgement shall find it done,
            # or the same message would be counted twice.
            positions.add_range(tx, subscriber.ordinal, cut, log_end.next_number)
            changed = changed._replace(flags=changed.flags | fmt.FLAG_MAY_HAVE_RANGES)
        positions.write(tx, key, changed)
        if count_lost:
            dropped.append(Dropped(key.decode("utf-8"), count_lost))
    shorter = log.truncate(tx.cursor(), log_end, cut)
    return shorter, dropped


def expired_before(tx: Tx, low: LowWatermark, log_end: LogEnd, time_ns: int) -> int:
    """Find the messages that are too old."""
    if low.oldest_ns >= time_ns:
        return low.number
    cursor = tx.cursor()
    found = log.seek(cursor, low.number)
    if found is None or found.block.time_ns >= time_ns:
        return low.number
    return log.number_at_time(cursor, low.number, log_end.next_number, time_ns)


def halve(tx: Tx, low: LowWatermark, log_end: LogEnd, added: int,
          drops_newest: bool) -> tuple[LogEnd, list[Dropped]]:
    """Drop the oldest or newest messages, so that half are left together with those to be added."""
    waiting = log_end.total_count - low.messages
    kept = max(0, (waiting + added) // 2 - added)
    cursor = tx.cursor()
    if not drops_newest:
        kept = waiting - kept
    cut = log.number_at_count(cursor, low.number, log_end.next_number, low.messages + kept)
    if drops_newest:
        return drop_from(tx, log_end, cut, count_mark)
    return log_end, drop_before(tx, cut, count_mark)


def is_any_finished(tx: Tx, retained_ns: int) -> bool:
    """Tell whether the first block may be deleted; the last one stays."""
    cursor = tx.cursor()
    found = log.head(cursor)
    if found is None or found.block.time_ns > retained_ns:
        return False
    log_end = log.read_end(tx.cursor())
    end = fmt.end_of(found.first, found.block)
    low = find_low_watermark(tx, log_end, is_read_only=True)
    return end < log_end.next_number and end <= low.number


def delete_finished(tx: Tx, budget: int, retained_ns: int) -> int:
    """Delete blocks that everybody acknowledged."""
    cursor = tx.cursor()
    low = find_low_watermark(tx, log.read_end(cursor))
    return log.delete_head(cursor,
                           low.audiences,
                           low.everyone,
                           budget=budget,
                           retained_ns=retained_ns)


def clear(tx: Tx) -> list[Dropped]:
    """Let all subscribers begin at the end of the queue."""
    log_end = log.read_end(tx.cursor())
    return drop_before(tx, log_end.next_number, count_cleared)


def empty_last(tx: Tx) -> None:
    """Replace the last block by a placeholder if it is the only one and finished."""
    cursor = tx.cursor()
    log_end = log.read_end(cursor)
    is_needed = find_low_watermark(tx, log_end).number < log_end.next_number
    found = log.head(cursor)
    if (found is None or not found.block.messages or is_needed
            or fmt.end_of(found.first, found.block) != log_end.next_number):
        return
    cursor.delete()
    log.put_placeholder(cursor, log_end)


def make_reusable(tx: Tx) -> None:
    """Commit without a change: LMDB reuses pages two commits after they were freed."""
    value = tx.txn.get(fmt.HEADER_KEY, db=tx.db.meta)
    tx.txn.put(fmt.HEADER_KEY, bytes(value or b""), db=tx.db.meta)
