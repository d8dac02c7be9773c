"""
Decide what may leave the log and what has to, inside of a transaction.

A message leaves when all its subscribers acknowledged it. It is dropped unread when it is older
than the queue's timeout, or to make room at a high-water mark; each subscriber counts its losses.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import lmdb

from persipubsub.store import _blocks, _layout, _log, _positions
from persipubsub.store._databases import Databases


# Not a named tuple, whose fields take five times as long to read: each send reads some.
@dataclasses.dataclass(frozen=True, slots=True)
class Floor:
    """
    Hold how far all subscribers have come.

    Positions only go forward, so that a floor found earlier stays a safe lower bound until the
    generation in the log changes. It even stays what it is as long as the hindmost subscriber stays
    where it is.
    """

    generation: int
    number: int  #: the first number that anybody still needs
    everyone: int  #: the same, only for what is addressed to everybody
    audiences: dict[int, int]  #: the same, for each audience from 1 on
    messages: int  #: how many the log has in front of ``number``
    size: int  #: their bytes
    subscribers: int  #: how many there are
    interval: int  #: how many messages are sent until the positions are looked at again
    #: a subscriber whose position is ``everyone``, in UTF-8; None if that is not all that counts
    hindmost: bytes | None
    #: all messages from ``number`` on were committed then or later, also those that are yet to come
    oldest_ns: int


class Slowest(NamedTuple):
    """Hold who holds the queue up."""

    subscriber: str
    lag: int  #: messages that it still has to acknowledge


class Loss(NamedTuple):
    """Hold how many messages were dropped unread for a subscriber."""

    subscriber: str
    messages: int


#: The smallest number of messages between two looks at positions. A look and the deletion behind
#: it take as long as a send: with 8 of them between two looks it was a sixth of the time of all.
_SMALLEST_INTERVAL = 16


def interval_of(subscribers: int) -> int:
    """
    Choose how many messages are sent between two looks at the subscribers' positions.

    A look takes time with the number of subscribers. Spread over that many sends it costs each of
    them the same, be there one subscriber or 500.

    :param subscribers: how many there are
    :return: number of messages
    """
    return max(_SMALLEST_INTERVAL, subscribers // 4)


def find_floor(txn: "lmdb.Transaction[memoryview]",
               databases: Databases,
               tail: _log.Tail,
               is_look: bool = False,
               known: Floor | None = None) -> Floor:
    """
    Look at the positions of all subscribers, or only at the hindmost one if it did not move.

    :param txn: write transaction; positions may be moved over messages of others
    :param databases: handles
    :param tail: end of the log
    :param is_look: True to move none of them; any transaction will do then
    :param known: what a committed transaction found, or an earlier look in this one
    :return: how far all subscribers have come
    """
    if not tail.totals:
        if (known is not None and known.generation == tail.generation and known.hindmost is not None
                and known.everyone == _positions.read_position(txn, databases, known.hindmost)):
            return known
        found = _find_hindmost(txn, databases)
        if found is None:
            return _floor_at(txn, databases, tail, tail.next_number, 0)
        hindmost, position, count = found
        return _floor_at(txn, databases, tail, position, count, hindmost=hindmost)

    subscribers = _positions.read_all(txn, databases)
    audiences = _log.read_audiences(txn, databases)
    positions: dict[str, int] = {}
    for key, subscriber in subscribers:
        own = _positions.audiences_of(audiences, key)
        if is_look:
            position = _positions.first_pending(txn, databases, subscriber, own, tail.next_number)
        else:
            position = _settle(txn, databases, key, subscriber, tail, own)
        positions[key.decode("utf-8")] = position
    return _floor_at(txn,
                     databases,
                     tail,
                     everyone=min(positions.values(), default=tail.next_number),
                     subscribers=len(subscribers),
                     audiences={
                         audience: min((positions[member]
                                        for member in members if member in positions),
                                       default=tail.next_number)
                         for audience, members in audiences.items()
                     })


def _floor_at(  # pylint: disable=too-many-arguments,too-many-positional-arguments
        txn: "lmdb.Transaction[memoryview]",
        databases: Databases,
        tail: _log.Tail,
        everyone: int,
        subscribers: int,
        hindmost: bytes | None = None,
        audiences: dict[int, int] | None = None) -> Floor:
    """
    Count what lies in front of the first number that anybody still needs.

    :param txn: any transaction
    :param databases: handles
    :param tail: end of the log
    :param everyone: smallest position
    :param subscribers: how many there are
    :param hindmost: whose position that is, if it is all that counts
    :param audiences: first number that one of its subscribers still needs, for each from 1 on
    :return: how far all subscribers have come
    """
    number = min(everyone, tail.next_number)
    place = _log.place_of(txn.cursor(db=databases.data), number)
    return Floor(generation=tail.generation,
                 number=number,
                 everyone=everyone,
                 audiences=audiences or {},
                 messages=place.messages,
                 size=place.size,
                 subscribers=subscribers,
                 interval=interval_of(subscribers),
                 hindmost=hindmost if number == everyone else None,
                 oldest_ns=place.time_ns)


def _find_hindmost(txn: "lmdb.Transaction[memoryview]",
                   databases: Databases) -> tuple[bytes, int, int] | None:
    """
    Find the subscriber of the smallest position, in a tenth of the time of reading all records.

    :param txn: any transaction
    :param databases: handles
    :return: its id in UTF-8, its position, how many subscribers there are; None if there are none
    """
    cursor = txn.cursor(db=databases.pending)
    positions = _layout.unpack_positions(cursor.iternext(keys=False, values=True))
    if not positions:
        return None
    position = min(positions)
    cursor.first()
    keys = cursor.iternext(keys=True, values=False)
    key = bytes(next(itertools.islice(keys, positions.index(position), None)))
    return key, position, len(positions)


def _settle(txn: "lmdb.Transaction[memoryview]", databases: Databases, key: bytes,
            subscriber: _layout.Subscriber, tail: _log.Tail, audiences: Sequence[int]) -> int:
    """
    Move a position over messages that are not for the subscriber.

    All the way, since messages of others that it has not passed count as waiting: at a high-water
    mark they would be the reason to drop what need not be dropped.

    :param txn: write transaction
    :param databases: handles
    :param key: id of the subscriber, in UTF-8
    :param subscriber: its record
    :param tail: end of the log
    :param audiences: those it belongs to
    :return: new position
    """
    position = _positions.first_pending(txn, databases, subscriber, audiences, tail.next_number)
    if position == subscriber.position:
        return position
    position = _positions.trim_ranges(txn, databases, subscriber.ordinal, position)
    _positions.write(txn, databases, key, subscriber._replace(position=position))
    return position


def find_slowest(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> Slowest | None:
    """
    Find the subscriber that needs the oldest message.

    :param txn: any transaction
    :param databases: handles
    :return: who it is; None if all messages are finished
    """
    end = _log.read_tail(txn.cursor(db=databases.data)).next_number
    audiences = _log.read_audiences(txn, databases)
    oldest, slowest = end, None
    for key, subscriber in _positions.read_all(txn, databases):
        own = _positions.audiences_of(audiences, key)
        first = _positions.first_pending(txn, databases, subscriber, own, end)
        if first < oldest:
            lag = _positions.count_pending(txn, databases, subscriber, own, 0, end)
            oldest, slowest = first, Slowest(key.decode("utf-8"), lag)
    return slowest


Count = Callable[[_layout.Subscriber, int], _layout.Subscriber]


def count_timeout(subscriber: _layout.Subscriber, count: int) -> _layout.Subscriber:
    """
    Count messages that were dropped since they were too old.

    :param subscriber: whose messages
    :param count: how many
    :return: new record
    """
    return subscriber._replace(dropped_by_timeout=subscriber.dropped_by_timeout + count)


def count_mark(subscriber: _layout.Subscriber, count: int) -> _layout.Subscriber:
    """
    Count messages that were dropped at a high-water mark.

    :param subscriber: whose messages
    :param count: how many
    :return: new record
    """
    return subscriber._replace(dropped_by_mark=subscriber.dropped_by_mark + count)


def count_cleared(subscriber: _layout.Subscriber, count: int) -> _layout.Subscriber:
    """
    Count messages that were cleared by an operator.

    :param subscriber: whose messages
    :param count: how many
    :return: new record
    """
    return subscriber._replace(cleared=subscriber.cleared + count)


def drop_before(txn: "lmdb.Transaction[memoryview]", databases: Databases, cut: int,
                count: Count) -> list[Loss]:
    """
    Drop everything in front of a number, for every subscriber.

    Only positions are moved; the blocks are deleted little by little.

    :param txn: write transaction
    :param databases: handles
    :param cut: first number to be kept
    :param count: how to count the dropped messages
    :return: what was dropped unread
    """
    audiences = _log.read_audiences(txn, databases)
    losses: list[Loss] = []
    for key, subscriber in _positions.read_all(txn, databases):
        if subscriber.position >= cut:
            continue
        lost = _positions.count_pending(txn, databases, subscriber,
                                        _positions.audiences_of(audiences, key), 0, cut)
        position = _positions.trim_ranges(txn, databases, subscriber.ordinal, cut)
        _positions.write(txn, databases, key, count(subscriber, lost)._replace(position=position))
        if lost:
            losses.append(Loss(key.decode("utf-8"), lost))
    return losses


def drop_from(txn: "lmdb.Transaction[memoryview]", databases: Databases, tail: _log.Tail, cut: int,
              count: Count) -> tuple[_log.Tail, list[Loss]]:
    """
    Drop everything from a number on, for every subscriber.

    :param txn: write transaction
    :param databases: handles
    :param tail: end of the log
    :param cut: first number to be dropped
    :param count: how to count the dropped messages
    :return: new end of the log, what was dropped unread
    """
    audiences = _log.read_audiences(txn, databases)
    losses: list[Loss] = []
    for key, subscriber in _positions.read_all(txn, databases):
        lost = _positions.count_pending(txn, databases, subscriber,
                                        _positions.audiences_of(audiences, key), cut,
                                        tail.next_number)
        changed = count(subscriber, lost)
        if subscriber.position >= cut:
            _positions.drop_ranges(txn, databases, subscriber.ordinal, cut)
            changed = changed._replace(position=tail.next_number)
        else:
            # A consumer may be at work on what is dropped: its acknowledgement shall find it done,
            # or the same message would be counted twice.
            _positions.add_range(txn, databases, subscriber.ordinal, cut, tail.next_number)
            changed = changed._replace(flags=changed.flags | _layout.FLAG_MAY_HAVE_RANGES)
        _positions.write(txn, databases, key, changed)
        if lost:
            losses.append(Loss(key.decode("utf-8"), lost))
    shorter = _log.truncate(txn.cursor(db=databases.data), tail, cut)
    return shorter, losses


def expired_before(txn: "lmdb.Transaction[memoryview]", databases: Databases, floor: Floor,
                   tail: _log.Tail, time_ns: int) -> int:
    """
    Find the messages that are too old.

    :param txn: any transaction
    :param databases: handles
    :param floor: nothing in front of it is looked at
    :param tail: end of the log
    :param time_ns: everything that was committed before is too old
    :return: first number that is young enough
    """
    if floor.oldest_ns >= time_ns:
        return floor.number
    cursor = txn.cursor(db=databases.data)
    found = _log.seek(cursor, floor.number)
    if found is None or found.block.time_ns >= time_ns:
        return floor.number
    return _log.number_at_time(cursor, floor.number, tail.next_number, time_ns)


def halve(txn: "lmdb.Transaction[memoryview]", databases: Databases, floor: Floor, tail: _log.Tail,
          drops_newest: bool) -> tuple[_log.Tail, list[Loss]]:
    """
    Drop half of the messages, rounded up.

    :param txn: write transaction
    :param databases: handles
    :param floor: how far all subscribers have come, up to date
    :param tail: end of the log
    :param drops_newest: True for the newest half, False for the oldest
    :return: new end of the log, what was dropped unread
    """
    waiting = tail.total_count - floor.messages
    half = (waiting + 1) // 2
    cursor = txn.cursor(db=databases.data)
    kept = waiting - half if drops_newest else half
    cut = _log.number_at_count(cursor, floor.number, tail.next_number, floor.messages + kept)
    if drops_newest:
        return drop_from(txn, databases, tail, cut, count_mark)
    return tail, drop_before(txn, databases, cut, count_mark)


def delete_finished(txn: "lmdb.Transaction[memoryview]", databases: Databases, budget: int,
                    retained_ns: int) -> int:
    """
    Delete blocks that everybody acknowledged.

    :param txn: write transaction
    :param databases: handles
    :param budget: how many blocks to delete at most
    :param retained_ns: what was committed later stays, although it is finished
    :return: how many were deleted
    """
    cursor = txn.cursor(db=databases.data)
    floor = find_floor(txn, databases, _log.read_tail(cursor))
    return _log.delete_head(cursor,
                            floor.audiences,
                            floor.everyone,
                            budget=budget,
                            retained_ns=retained_ns)


def clear(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> list[Loss]:
    """
    Let all subscribers begin at the end of the queue.

    :param txn: write transaction
    :param databases: handles
    :return: what was dropped
    """
    tail = _log.read_tail(txn.cursor(db=databases.data))
    return drop_before(txn, databases, tail.next_number, count_cleared)


def empty_last(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> None:
    """
    Let a placeholder take the place of the last block if it is the only one and nobody needs it.

    Not while others are in front of it: who seeks back to them counts what was behind them, too.

    :param txn: write transaction
    :param databases: handles
    """
    cursor = txn.cursor(db=databases.data)
    tail = _log.read_tail(cursor)
    is_needed = find_floor(txn, databases, tail).number < tail.next_number
    found = _log.head(cursor)
    if (found is None or not found.block.messages or is_needed
            or _blocks.end_of(found.first, found.block) != tail.next_number):
        return
    cursor.delete()
    _log.put_placeholder(cursor, tail)


def make_reusable(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> None:
    """
    Commit without a change: LMDB uses the pages that a commit freed two commits later.

    :param txn: write transaction
    :param databases: handles
    """
    value = txn.get(_layout.HEADER_KEY, db=databases.meta)
    txn.put(_layout.HEADER_KEY, bytes(value or b""), db=databases.meta)
