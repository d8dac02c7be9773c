"""
What each subscriber has acknowledged, inside of a transaction.

A subscriber's position is the first number that it still has to acknowledge. What several consumers
of one subscriber acknowledge out of order is kept as ranges ahead of the position: as many as there
are messages in flight, however many were acknowledged meanwhile.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import persipubsub.errors
from persipubsub.lmdb_engine import attempts
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log
from persipubsub.lmdb_engine.format import Cursor, Tx

#: So many blocks for others are walked over before the next one for a subscriber is searched by
#: bisection, which takes as long as 20 of them.
_NEAR_BLOCKS: Final = 8


def read(tx: Tx, key: bytes) -> fmt.Subscriber | None:
    """Read the record of a subscriber."""
    value = tx.txn.get(key, db=tx.db.pending)
    return None if value is None else fmt.unpack_subscriber(value)


def read_position(tx: Tx, key: bytes) -> int | None:
    """Read the position of a subscriber."""
    value = tx.txn.get(key, db=tx.db.pending)
    return None if value is None else fmt.unpack_positions((value, ))[0]


def require(tx: Tx, key: bytes) -> fmt.Subscriber:
    """Read the record of a subscriber that has to be there."""
    subscriber = read(tx, key)
    if subscriber is None:
        raise persipubsub.errors.NotInitializedError(
            "Expected the queue to have the subscriber {!r}, but got: none of that id. Run "
            "persipubsub.control.initialize_all_dbs with the configuration file first.".format(
                key.decode("utf-8", "replace")))
    return subscriber


def require_position(tx: Tx, key: bytes) -> tuple[int, int, int, int]:
    """Read ordinal, flags, position, and how many messages were dropped unread."""
    value = tx.txn.get(key, None, tx.db.pending)
    if value is not None and len(value) == fmt.SUBSCRIBER_BYTES:
        # Not require(), which decodes all and takes three times as long.
        ordinal, flags, position, by_timeout, by_mark = fmt.SUBSCRIBER_BEGIN.unpack_from(value)
        return ordinal, flags, position, by_timeout + by_mark
    found = require(tx, key)
    return (found.ordinal, found.flags, found.position,
            found.dropped_by_timeout + found.dropped_by_mark)


def write(tx: Tx, key: bytes, subscriber: fmt.Subscriber) -> None:
    """Write the record of a subscriber; delete records of attempts behind its position."""
    # Here, and not where positions are moved: there are many of these, and none can forget it.
    if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS and not attempts.forget_before(
            tx, subscriber.ordinal, subscriber.position):
        subscriber = subscriber._replace(flags=subscriber.flags & ~fmt.FLAG_MAY_HAVE_ATTEMPTS)
    tx.txn.put(key, fmt.pack_subscriber(subscriber), db=tx.db.pending)


def read_all(tx: Tx) -> list[tuple[bytes, fmt.Subscriber]]:
    """Read the records of all subscribers."""
    return [(bytes(key), fmt.unpack_subscriber(value))
            for key, value in tx.txn.cursor(db=tx.db.pending)]


def audiences_of(audiences: dict[int, tuple[str, ...]], key: bytes) -> tuple[int, ...]:
    """List the audiences that a subscriber belongs to."""
    identifier = key.decode("utf-8")
    return tuple(audience for audience, members in audiences.items() if identifier in members)


def ranges(tx: Tx, ordinal: int) -> Iterator[tuple[int, int]]:
    """Iterate over the ranges that a subscriber acknowledged ahead of its position."""
    cursor = tx.txn.cursor(db=tx.db.ahead)
    if not cursor.set_range(fmt.pack_ahead_key(ordinal, 0)):
        return
    while True:
        key = cursor.key()
        if not key:
            return
        found, begin, end = fmt.unpack_ahead(key, cursor.value())
        if found != ordinal:
            return
        yield begin, end
        if not cursor.next():
            return


def skip_ahead(tx: Tx, ordinal: int, number: int) -> int:
    """Skip a range that was acknowledged ahead."""
    cursor = tx.txn.cursor(db=tx.db.ahead)
    if cursor.set_range(fmt.pack_ahead_key(ordinal, number + 1)):
        found = cursor.prev()
    else:
        found = cursor.last()
    if found:
        owner, begin, end = fmt.unpack_ahead(cursor.key(), cursor.value())
        if owner == ordinal and begin <= number < end:
            return end
    return number


def next_range(tx: Tx, ordinal: int, number: int) -> int:
    """Find the next range that was acknowledged ahead."""
    cursor = tx.txn.cursor(db=tx.db.ahead)
    if cursor.set_range(fmt.pack_ahead_key(ordinal, number + 1)):
        owner, begin, _ = fmt.unpack_ahead(cursor.key(), cursor.value())
        if owner == ordinal:
            return begin
    return fmt.MAX_NUMBER + 1


def add_range(tx: Tx, ordinal: int, begin: int, end: int) -> int:
    """Add a range that was acknowledged ahead; ranges that touch become one."""
    cursor = tx.txn.cursor(db=tx.db.ahead)
    known = 0
    new_begin, new_end = begin, end
    touching: list[int] = []
    found = (cursor.prev()
             if cursor.set_range(fmt.pack_ahead_key(ordinal, begin)) else cursor.last())
    if not found:
        found = cursor.first()
    while found:
        owner, other_begin, other_end = fmt.unpack_ahead(cursor.key(), cursor.value())
        if (owner, other_begin) > (ordinal, end):
            break
        if owner == ordinal and other_end >= begin:
            touching.append(other_begin)
            known += max(0, min(end, other_end) - max(begin, other_begin))
            new_begin, new_end = min(new_begin, other_begin), max(new_end, other_end)
        found = cursor.next()
    for other_begin in touching:
        if other_begin != new_begin:
            tx.txn.delete(fmt.pack_ahead_key(ordinal, other_begin), db=tx.db.ahead)
    tx.txn.put(fmt.pack_ahead_key(ordinal, new_begin),
               fmt.pack_ahead_value(new_end),
               db=tx.db.ahead)
    return known


def trim_ranges(tx: Tx, ordinal: int, position: int) -> int:
    """Forget ranges that a position has reached, and let the position skip them."""
    cursor = tx.txn.cursor(db=tx.db.ahead)
    while cursor.set_range(fmt.pack_ahead_key(ordinal, 0)):
        owner, begin, end = fmt.unpack_ahead(cursor.key(), cursor.value())
        if owner != ordinal or begin > position:
            break
        position = max(position, end)
        cursor.delete()
    return position


def drop_ranges(tx: Tx, ordinal: int, begin: int) -> None:
    """Forget ranges from a number on."""
    for first, end in list(ranges(tx, ordinal)):
        if end <= begin:
            continue
        if first >= begin:
            tx.txn.delete(fmt.pack_ahead_key(ordinal, first), db=tx.db.ahead)
        else:
            tx.txn.put(fmt.pack_ahead_key(ordinal, first),
                       fmt.pack_ahead_value(begin),
                       db=tx.db.ahead)


def count_pending(tx: Tx, subscriber: fmt.Subscriber, audiences: Sequence[int], begin: int,
                  end: int) -> int:
    """Count pending messages in a range, without a walk."""
    begin = max(begin, subscriber.position)
    if begin >= end:
        return 0
    cursor = tx.cursor()
    count = log.count_between(log.place_of(cursor, begin), log.place_of(cursor, end), audiences)
    for first, behind in ranges(tx, subscriber.ordinal):
        low, high = max(first, begin), min(behind, end)
        if low < high:
            count -= log.count_between(log.place_of(cursor, low), log.place_of(cursor, high),
                                       audiences)
    return count


def first_pending(tx: Tx, subscriber: fmt.Subscriber, audiences: Sequence[int], end: int) -> int:
    """Find the first pending message, without a long walk."""
    cursor = tx.cursor()
    number = subscriber.position
    steps = 0
    found = log.seek(cursor, number)
    while found is not None and number < end:
        first, block, _ = found
        if block.messages and (not block.audience or block.audience in audiences):
            number = max(number, first)
            behind = number
            if subscriber.flags:
                behind = skip_ahead(tx, subscriber.ordinal, number)
            if behind == number:
                return number
            number = behind
            found = log.seek(cursor, number)
        elif steps < _NEAR_BLOCKS:
            steps += 1
            number = max(number, fmt.end_of(first, block))
            found = log.following(cursor)
        else:
            number = log.number_addressed(cursor, number, end, audiences)
            found = log.seek(cursor, number)
    return end


def acknowledge_range(tx: Tx, subscriber: fmt.Subscriber, begin: int,
                      end: int) -> tuple[fmt.Subscriber, int]:
    """Acknowledge a range of numbers."""
    position = subscriber.position
    if end <= position:
        return subscriber, 0
    fresh = end - max(begin, position)
    # Numbers without a message, as behind a power failure, would hold the position up for ever.
    if begin > position and _stored_from(tx.cursor(), position) < begin:
        fresh -= add_range(tx, subscriber.ordinal, begin, end)
        return subscriber._replace(flags=subscriber.flags | fmt.FLAG_MAY_HAVE_RANGES), fresh
    flags = subscriber.flags
    if flags & fmt.FLAG_MAY_HAVE_RANGES:
        for first, behind in ranges(tx, subscriber.ordinal):
            fresh -= max(0, min(behind, end) - max(first, begin, position))
        end = trim_ranges(tx, subscriber.ordinal, end)
        if next(ranges(tx, subscriber.ordinal), None) is None:
            flags &= ~fmt.FLAG_MAY_HAVE_RANGES
    return subscriber._replace(position=end, flags=flags), fresh


def lacks(tx: Tx, keys: Sequence[bytes]) -> bool:
    """Tell whether a subscriber is missing."""
    return any(tx.txn.get(key, db=tx.db.pending) is None for key in keys)


def beginning(tx: Tx, oldest_ns: int) -> int:
    """Find the first message that is still stored and not too old."""
    cursor = tx.cursor()
    end = log.read_end(cursor).next_number
    found = log.head(cursor)
    first = found.first if found is not None else end
    return log.number_at_time(cursor, min(first, end), end, oldest_ns)


def seek(tx: Tx, key: bytes, number: int) -> int:
    """Move a subscriber to a message in front of or behind its position."""
    subscriber = require(tx, key)
    cursor = tx.cursor()
    number = _stored_from(cursor, number)
    audiences = audiences_of(log.read_audiences(tx), key)
    skipped = count_pending(tx, subscriber, audiences, 0, number)
    drop_ranges(tx, subscriber.ordinal, 0)
    if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
        # Those that were left to go little by little would count for messages that begin anew.
        attempts.forget_all(tx, subscriber.ordinal, subscriber.position)
    write(
        tx, key,
        subscriber._replace(position=number,
                            flags=subscriber.flags & ~fmt.FLAG_MAY_HAVE_RANGES,
                            skipped=subscriber.skipped + skipped))
    # Whoever remembers how far all subscribers have come looks again: positions went back.
    log.change_generation(cursor)
    return number


def _stored_from(cursor: Cursor, number: int) -> int:
    """Find the first message that is stored from a number on."""
    end = log.read_end(cursor).next_number
    found = log.seek(cursor, min(max(number, 0), end))
    while found is not None:
        if found.block.messages:
            return max(found.first, number)
        found = log.following(cursor)
    return end


def add(tx: Tx,
        keys: Sequence[bytes],
        from_beginning: Sequence[bytes] = (),
        oldest_ns: int = 0) -> None:
    """Add the subscribers that are missing, at the end of the queue or at its beginning."""
    value = tx.txn.get(fmt.HEADER_KEY, db=tx.db.meta)
    header = fmt.unpack_header(bytes(value or b""), "")
    cursor = tx.cursor()
    log_end = log.read_end(cursor)
    ordinal = header.next_ordinal
    for key in keys:
        if tx.txn.get(key, db=tx.db.pending) is not None:
            continue
        if ordinal > fmt.MAX_SUBSCRIBER_ORDINAL:
            raise persipubsub.errors.StoreError(
                "Expected at most {} subscribers in the life of a queue, but got: {!r} as one more".
                format(fmt.MAX_SUBSCRIBER_ORDINAL, key.decode("utf-8")))
        position = log_end.next_number
        if key in from_beginning:
            position = beginning(tx, oldest_ns)
        subscriber = fmt.Subscriber(ordinal, 0, position, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        write(tx, key, subscriber)
        ordinal += 1
    tx.txn.put(fmt.HEADER_KEY,
               fmt.pack_header(header._replace(next_ordinal=ordinal)),
               db=tx.db.meta)
    log.change_generation(cursor)


def acknowledge(tx: Tx, key: bytes, ordinal: int, begin: int, numbers: list[int],
                now_ns: int) -> int:
    """
    Move the position over messages, or add a range ahead of it.

    :param begin: all from here to the first message is done, or is not for the subscriber
    :return: position afterwards; 0 if the subscriber was removed
    """
    value = tx.txn.get(key, None, tx.db.pending)
    if value is None:
        return 0
    in_order = fmt.acknowledge_in_order(value, ordinal, numbers, now_ns)
    if in_order is not None:
        tx.txn.put(key, in_order, db=tx.db.pending)
        return numbers[-1] + 1
    subscriber = require(tx, key)
    if subscriber.ordinal != ordinal:
        # It was removed and added again: another subscriber of the same name.
        return subscriber.position
    # Those that were neither dropped nor skipped while they were being worked on.
    count = sum(is_pending(tx, subscriber, number) for number in numbers)
    runs = [(numbers[0], numbers[-1] + 1)]
    if (numbers[-1] - numbers[0] + 1 > len(numbers)
            and _count_pending(tx, key, subscriber, *runs[0]) > count):
        # A seek brought back what lies between them: others have it, or will.
        runs = _runs_of(numbers)
    moved = subscriber
    for first, end in runs:
        moved, _ = acknowledge_range(tx, moved, begin_of(tx, key, moved, begin, first), end)
        begin = end
    if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
        for number in numbers:
            attempts.forget(tx, ordinal, number)
    if count:
        moved = moved._replace(acknowledged=moved.acknowledged + count, acknowledged_ns=now_ns)
    if moved != subscriber:
        write(tx, key, moved)
    return moved.position


def begin_of(tx: Tx, key: bytes, subscriber: fmt.Subscriber, begin: int, number: int) -> int:
    """Look whether all before a message is still done, or is not for the subscriber."""
    if begin >= number or _count_pending(tx, key, subscriber, begin, number):
        return number
    return begin


def is_pending(tx: Tx, subscriber: fmt.Subscriber, number: int) -> bool:
    """Tell whether a message was neither acknowledged, dropped nor skipped."""
    if number < subscriber.position:
        return False
    found = log.seek(tx.cursor(), number)
    return (found is not None and found.first <= number < found.first + found.block.messages
            and skip_ahead(tx, subscriber.ordinal, number) == number)


def _count_pending(tx: Tx, key: bytes, subscriber: fmt.Subscriber, begin: int, end: int) -> int:
    """Count what the subscriber still has to acknowledge in a range."""
    own = audiences_of(log.read_audiences(tx), key)
    return count_pending(tx, subscriber, own, begin, end)


def _runs_of(numbers: list[int]) -> list[tuple[int, int]]:
    """Split numbers where one is missing."""
    runs = [(numbers[0], numbers[0] + 1)]
    for number in numbers[1:]:
        if number == runs[-1][1]:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def set_paused(tx: Tx, key: bytes, is_paused: bool) -> bool:
    """Let the consumers of a subscriber wait, or go on; return False if that is so already."""
    subscriber = require(tx, key)
    flags = subscriber.flags & ~fmt.FLAG_PAUSED | (fmt.FLAG_PAUSED if is_paused else 0)
    if flags != subscriber.flags:
        write(tx, key, subscriber._replace(flags=flags))
    return flags != subscriber.flags


def remove(tx: Tx, key: bytes) -> int:
    """Remove a subscriber; return how many messages it still had to acknowledge."""
    subscriber = require(tx, key)
    cursor = tx.cursor()
    audiences = audiences_of(log.read_audiences(tx), key)
    lag = count_pending(tx, subscriber, audiences, 0, log.read_end(cursor).next_number)
    drop_ranges(tx, subscriber.ordinal, 0)
    attempts.forget_all(tx, subscriber.ordinal)
    tx.txn.delete(key, db=tx.db.pending)
    log.change_generation(cursor)
    return lag


def acknowledge_one(tx: Tx, key: bytes, number: int) -> bool:
    """Let one message leave a subscriber as cleared; return False if it is not pending."""
    subscriber = require(tx, key)
    # It may be for others only.
    if (not is_pending(tx, subscriber, number)
            or not _count_pending(tx, key, subscriber, number, number + 1)):
        return False
    attempts.forget(tx, subscriber.ordinal, number)
    start = begin_of(tx, key, subscriber, subscriber.position, number)
    moved, _ = acknowledge_range(tx, subscriber, start, number + 1)
    write(tx, key, moved._replace(cleared=moved.cleared + 1))
    return True
