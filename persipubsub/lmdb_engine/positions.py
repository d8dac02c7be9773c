"""
What each subscriber has acknowledged, inside of a transaction.

A subscriber's position is the first number that it still has to acknowledge. What several consumers
of one subscriber acknowledge out of order is kept as ranges ahead of the position: as many as there
are messages in flight, however many were acknowledged meanwhile. For a subscriber, a message is

* *pending*: it is at or after the position, is addressed to the subscriber, and is in no range;
* *done*: it is not pending any more; *finished*: the positions of all subscribers are after it;
* *ahead*: it is done, and after the position;
* *left*: it is done without an acknowledgement; a counter of the subscriber says why;
* *dropped*: it left because it was too old, or to make room at a high-water mark;
* *skipped*: it left because the subscriber went on to a later message.
"""

import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from persipubsub.errors import NotInitializedError, StoreCorruptError, StoreError
from persipubsub.lmdb_engine import attempts
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, meta
from persipubsub.lmdb_engine.format import Cursor, Subscriber, Tx

#: A search walks over so many blocks for others. Then it goes on by bisection, which takes as long
#: as a walk over 20 blocks.
_NEAR_BLOCKS: Final = 4

# Records of subscribers


def read(tx: Tx, key: bytes, ordinal: int | None = None) -> Subscriber | None:
    """Read the record of a subscriber; None if it is missing, or another one of the same name."""
    value = tx.txn.get(key, None, tx.db.subscribers)
    if value is None:
        return None
    try:
        subscriber = Subscriber(*fmt.SUBSCRIBER.unpack(value) + (key, ))
    except struct.error:
        raise fmt.subscriber_error(value) from None
    # It may have been removed and added again.
    return subscriber if ordinal is None or subscriber.ordinal == ordinal else None


def require(tx: Tx, key: bytes, ordinal: int | None = None) -> Subscriber:
    """Read the record of a subscriber that has to be there, and to be the same as before."""
    subscriber = read(tx, key, ordinal)
    if subscriber is None:
        name = key.decode("utf-8", "replace")
        if read(tx, key) is not None:
            raise NotInitializedError(
                f"Expected the subscriber {name!r} to be the same as at init(), but got: it was "
                "removed and added again. Call init() again.")
        raise NotInitializedError(
            f"Expected the queue to have the subscriber {name!r}, but got: none of that id. Run "
            "persipubsub.control.initialize_all_dbs with the configuration file first.")
    return subscriber


def read_all(tx: Tx) -> list[Subscriber]:
    """Read the records of all subscribers."""
    cursor = tx.txn.cursor(tx.db.subscribers)
    return [require(tx, bytes(key)) for key in cursor.iternext(keys=True, values=False)]


def write(tx: Tx, subscriber: Subscriber) -> None:
    """Write a subscriber's record; delete records of attempts for messages before its position."""
    # Records are deleted here, and not in each of the many functions that move positions: so none
    # of them can forget it.
    if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS and not attempts.forget(
            tx, subscriber.ordinal, 0, subscriber.position):
        subscriber.flags &= ~fmt.FLAG_MAY_HAVE_ATTEMPTS
    value = fmt.SUBSCRIBER.pack(*msgspec.structs.astuple(subscriber)[:-1])
    tx.txn.put(subscriber.key, value, db=tx.db.subscribers)


def audiences_of(tx: Tx, subscriber: Subscriber) -> tuple[int, ...]:
    """List the audiences that a subscriber belongs to."""
    name = subscriber.name
    return tuple(audience for audience, members in log.read_audiences(tx).items()
                 if name in members)


# What is done


def ranges(tx: Tx, ordinal: int, number: int = 0) -> Iterator[tuple[int, int]]:
    """Iterate over ranges ahead of a position, from the last that begins at or before a number."""
    cursor = tx.txn.cursor(tx.db.ahead)
    is_behind = cursor.set_range(fmt.pack_ahead_key(ordinal, number + 1))
    is_there = (cursor.prev() if is_behind else cursor.last()) or cursor.first()
    while is_there:  # the cursor moves forward
        owner, begin, end = fmt.unpack_ahead(*cursor.item())
        if owner > ordinal:
            return
        if owner == ordinal:
            yield begin, end
        is_there = cursor.next()


def finish(tx: Tx, subscriber: Subscriber, begin: int, end: int) -> None:
    """
    Let a range of numbers be done: move the position over it, or keep it ahead of the position.

    The caller writes the record of the subscriber.
    """
    if end <= subscriber.position:
        return
    near = [(0, subscriber.position)]
    if subscriber.flags & fmt.FLAG_MAY_HAVE_RANGES:
        for one in ranges(tx, subscriber.ordinal, begin):
            near = [one] if one[0] <= begin else [*near, one]
            if one[0] > end:
                break
    # The range grows up to the range or position before it, and up to the range after it, if what
    # lies between is for others, or was never sent: so there are no more ranges than messages in
    # flight.
    cursor = tx.cursor()
    for first, behind in near:
        low, high = (behind, begin) if behind < begin else (end, first)
        if low >= high or next_run(tx, subscriber, cursor, low, high) is None:
            begin, end = min(begin, first), max(end, behind)
            if first:
                tx.txn.delete(fmt.pack_ahead_key(subscriber.ordinal, first), db=tx.db.ahead)
    if begin:
        subscriber.flags |= fmt.FLAG_MAY_HAVE_RANGES
        tx.txn.put(fmt.pack_ahead_key(subscriber.ordinal, begin),
                   fmt.pack_ahead_value(end),
                   db=tx.db.ahead)
        if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
            attempts.forget(tx, subscriber.ordinal, begin, end)
        return
    subscriber.position = end
    if (subscriber.flags & fmt.FLAG_MAY_HAVE_RANGES
            and next(ranges(tx, subscriber.ordinal), None) is None):
        subscriber.flags &= ~fmt.FLAG_MAY_HAVE_RANGES


def _forget(tx: Tx, subscriber: Subscriber, end: int) -> None:
    """Forget what was acknowledged ahead of the position, and all attempts before a number."""
    attempts.forget(tx, subscriber.ordinal, 0, end, sys.maxsize)
    for begin, _ in list(ranges(tx, subscriber.ordinal)):
        tx.txn.delete(fmt.pack_ahead_key(subscriber.ordinal, begin), db=tx.db.ahead)
    subscriber.flags &= ~fmt.FLAG_MAY_HAVE_RANGES


def leave(tx: Tx, subscriber: Subscriber, begin: int, end: int, counter: str) -> int:
    """
    Let all pending messages in a range of numbers leave a subscriber unread, and write its record.

    :param counter: field of the record in which they are counted
    :return: how many
    """
    count = count_pending(tx, subscriber, begin, end)
    finish(tx, subscriber, begin, end)
    setattr(subscriber, counter, getattr(subscriber, counter) + count)
    write(tx, subscriber)
    return count


def leave_one(tx: Tx, key: bytes, number: int, counter: str, ordinal: int | None = None) -> bool:
    """Let one message leave a subscriber unread; return False if it is not pending."""
    subscriber = require(tx, key, ordinal)
    return is_pending(tx, subscriber, number) and leave(tx, subscriber, number, number + 1,
                                                        counter) > 0


# What is pending


class Run(NamedTuple):
    """Pending messages of one block, one after the other."""

    number: int  #: of the first one
    stop: int  #: number after the last one
    found: log.Found  #: the block


def next_run(tx: Tx,
             subscriber: Subscriber,
             cursor: Cursor,
             number: int,
             end: int = fmt.MAX_NUMBER) -> Run | None:
    """Find the first pending messages in a range of numbers, without a long walk."""
    number = max(number, subscriber.position)
    steps, foreign = 0, -1
    found = log.seek(cursor, number)
    # Each round ends the search, or ``number`` goes forward.
    while found is not None and found.first < end and number < end:
        first, block, _ = found
        number, stop = max(number, first), min(fmt.end_of(first, block), end)
        if block.messages and block.audience != foreign and (not block.audience or _is_addressed(
                tx, subscriber, block.audience)):
            if subscriber.flags & fmt.FLAG_MAY_HAVE_RANGES:
                number, stop = free_part(tx, subscriber.ordinal, number, stop)
            if number < stop:
                run: Run = fmt.new(Run, (number, stop, found))
                return run
            found = log.seek(cursor, number)
        elif steps < _NEAR_BLOCKS:
            steps += 1
            number, foreign = stop, block.audience or -1
            found = log.following(cursor)
        else:
            behind = min(end, log.read_end(cursor).next_number)
            begin = number
            number = log.number_addressed(cursor, number, behind, audiences_of(tx, subscriber))
            if number == begin:
                # The message at ``number`` is not for the subscriber.
                raise StoreCorruptError(
                    f"Expected the totals of the log to leave out message {number} for "
                    f"{subscriber.name!r}, but got: they count it. Run 'persipubsub verify', and "
                    "restore a backup.")
            found = log.seek(cursor, number)
    return None


def runs(tx: Tx, subscriber: Subscriber, number: int, end: int) -> Iterator[Run]:
    """Iterate over the pending messages in a range of numbers."""
    cursor = tx.cursor()
    # Each run begins behind the one before.
    while number < end and (run := next_run(tx, subscriber, cursor, number, end)) is not None:
        yield run
        number = run.stop


def _is_addressed(tx: Tx, subscriber: Subscriber, audience: int) -> bool:
    """Tell whether the messages of a list of recipients are for a subscriber."""
    members = tx.txn.get(fmt.audience_key(audience), b"", tx.db.meta)
    return subscriber.name in fmt.unpack_audience(bytes(members))


def free_part(tx: Tx, ordinal: int, number: int, stop: int) -> tuple[int, int]:
    """Find the first numbers that were not acknowledged ahead; none if they begin at the stop."""
    for begin, end in ranges(tx, ordinal, number):
        if begin > number:
            return number, min(stop, begin)
        number = max(number, end)
    return number, stop


def is_pending(tx: Tx, subscriber: Subscriber, number: int) -> bool:
    """Tell whether a message was neither acknowledged, dropped nor skipped."""
    return next_run(tx, subscriber, tx.cursor(), number, number + 1) is not None


def first_pending(tx: Tx, subscriber: Subscriber, end: int) -> int:
    """Find the first pending message; the end if there is none."""
    run = next_run(tx, subscriber, tx.cursor(), 0, end)
    return end if run is None else run.number


def newest_first(tx: Tx, subscriber: Subscriber) -> Iterator[tuple[int, fmt.Block]]:
    """Iterate over pending messages, from the newest one on."""
    found = log.last(cursor := tx.cursor())
    # The cursor moves backward.
    while found is not None and (end := fmt.end_of(found.first, found.block)) > subscriber.position:
        for run in reversed(list(runs(tx, subscriber, found.first, end))):
            for number in range(run.stop - 1, run.number - 1, -1):
                yield number, found.block
        found = log.preceding(cursor)


def count_pending(tx: Tx, subscriber: Subscriber, begin: int, end: int) -> int:
    """Count pending messages in a range of numbers, without a walk."""
    begin = max(begin, subscriber.position)
    if begin >= end:
        return 0
    cursor = tx.cursor()
    own = audiences_of(tx, subscriber)
    count = log.count_between(log.place_of(cursor, begin), log.place_of(cursor, end), own)
    if subscriber.flags & fmt.FLAG_MAY_HAVE_RANGES:
        for first, behind in ranges(tx, subscriber.ordinal, begin):
            low, high = max(first, begin), min(behind, end)
            if first >= end:
                break
            if low < high:
                count -= log.count_between(log.place_of(cursor, low), log.place_of(cursor, high),
                                           own)
    return count


# Acknowledging


def acknowledge(tx: Tx, key: bytes, ordinal: int, numbers: list[int], now_ns: int) -> int:
    """
    Let messages be done that were worked on.

    :return: position afterwards; 0 if the subscriber was removed
    """
    subscriber = read(tx, key, ordinal)
    if subscriber is None:
        return 0
    count = len(numbers)
    if (subscriber.flags or subscriber.position != numbers[0]
            or numbers[-1] - numbers[0] + 1 != count):
        count = _finish_each(tx, subscriber, numbers)
    else:
        # A shortcut with the same result as ``_finish_each``, which takes twice as long.
        subscriber.position += count
    if count:
        subscriber.acknowledged += count
        subscriber.acknowledged_ns = now_ns
    write(tx, subscriber)
    return subscriber.position


def _finish_each(tx: Tx, subscriber: Subscriber, numbers: list[int]) -> int:
    """Let messages be done; count those that were neither dropped nor skipped meanwhile."""
    begin, end = numbers[0], numbers[-1] + 1
    others: list[int] = []
    # For a single one the walk is half as long as the count.
    if 1 < end - begin == len(numbers):
        count = count_pending(tx, subscriber, begin, end)
    else:
        pending: set[int] = set()
        for run in runs(tx, subscriber, begin, end):
            pending.update(range(run.number, run.stop))
        # A seek made messages between them pending again: other consumers have these, or will get
        # them.
        others = sorted(pending.difference(numbers))
        count = len(pending) - len(others)
    for other in [*others, end]:
        if begin < other:
            finish(tx, subscriber, begin, other)
        begin = other + 1
    return count


def skip_to_newest(tx: Tx, key: bytes) -> int:
    """Skip all pending messages of a subscriber but the newest one; return how many."""
    subscriber = require(tx, key)
    newest, _ = next(newest_first(tx, subscriber), (0, None))
    return leave(tx, subscriber, 0, newest, "skipped")


# What operators do


def lacks(tx: Tx, keys: Sequence[bytes]) -> bool:
    """Tell whether a subscriber is missing."""
    return any(tx.txn.get(key, db=tx.db.subscribers) is None for key in keys)


def beginning(tx: Tx, oldest_ns: int) -> int:
    """Find the first message that is still stored and not too old."""
    cursor = tx.cursor()
    end = log.read_end(cursor).next_number
    found = log.head(cursor)
    return log.number_at_time(cursor, end if found is None else found.first, end, oldest_ns)


def seek(tx: Tx, key: bytes, number: int) -> int:
    """Move a subscriber to a message before or after its position."""
    subscriber = require(tx, key)
    cursor = tx.cursor()
    end = log.read_end(cursor).next_number
    # Go on to the next message that is stored.
    number = min(max(number, 0), end)
    found = log.seek(cursor, number)
    while found is not None and not found.block.messages:  # the cursor moves forward
        found = log.following(cursor)
    number = end if found is None else max(found.first, number)
    subscriber.skipped += count_pending(tx, subscriber, 0, number)
    # ``write`` deletes only a bounded number of records of attempts. Those that it has left before
    # the position would count for messages that are delivered again.
    _forget(tx, subscriber, subscriber.position)
    subscriber.position = number
    write(tx, subscriber)
    # Senders that remember the low watermark look again: a position may have gone back.
    log.change_generation(cursor)
    return number


def add(tx: Tx,
        keys: Sequence[bytes],
        from_beginning: Sequence[bytes] = (),
        oldest_ns: int = 0) -> None:
    """Add the subscribers that are missing, at the end of the queue or at its beginning."""
    header = meta.read_header(tx)
    cursor = tx.cursor()
    ordinal = header.next_ordinal
    for key in keys:
        if not lacks(tx, [key]):
            continue
        if ordinal > fmt.MAX_SUBSCRIBER_ORDINAL:
            raise StoreError(
                "Expected at most {} subscribers in the life of a queue, but got: {!r} as one more".
                format(fmt.MAX_SUBSCRIBER_ORDINAL, key.decode("utf-8")))
        position = (beginning(tx, oldest_ns)
                    if key in from_beginning else log.read_end(cursor).next_number)
        write(tx, Subscriber(ordinal, 0, position, key=key))
        ordinal += 1
    meta.write_header(tx, header._replace(next_ordinal=ordinal))
    log.change_generation(cursor)


def set_paused(tx: Tx, key: bytes, is_paused: bool) -> bool:
    """Let the consumers of a subscriber wait, or go on; return False if that is so already."""
    subscriber = require(tx, key)
    if bool(subscriber.flags & fmt.FLAG_PAUSED) == is_paused:
        return False
    subscriber.flags ^= fmt.FLAG_PAUSED
    write(tx, subscriber)
    return True


def remove(tx: Tx, key: bytes) -> int:
    """Remove a subscriber; return how many messages it still had to acknowledge."""
    subscriber = require(tx, key)
    cursor = tx.cursor()
    lag = count_pending(tx, subscriber, 0, log.read_end(cursor).next_number)
    _forget(tx, subscriber, fmt.MAX_NUMBER + 1)
    tx.txn.delete(key, db=tx.db.subscribers)
    log.change_generation(cursor)
    return lag
