"""
Keep what each subscriber has acknowledged, inside of a transaction.

A subscriber's position is the first number that it still has to acknowledge. What several consumers
of one subscriber acknowledge out of order is kept as ranges ahead of the position: as many as there
are messages in flight, however many were acknowledged meanwhile.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import lmdb

import persipubsub.errors
from persipubsub.store import _attempts, _blocks, _layout, _log
from persipubsub.store._databases import Databases

#: So many blocks for others are walked over before the next one for a subscriber is searched by
#: bisection, which takes as long as 20 of them.
_NEAR_BLOCKS: Final = 8


def read(txn: "lmdb.Transaction[memoryview]", databases: Databases,
         key: bytes) -> _layout.Subscriber | None:
    """
    Read the record of a subscriber.

    :param txn: any transaction
    :param databases: handles
    :param key: its id, in UTF-8
    :return: its record; None if there is no such subscriber
    """
    value = txn.get(key, db=databases.pending)
    return None if value is None else _layout.unpack_subscriber(value)


def read_position(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                  key: bytes) -> int | None:
    """
    Read the position of a subscriber.

    :param txn: any transaction
    :param databases: handles
    :param key: its id, in UTF-8
    :return: its position; None if there is no such subscriber
    """
    value = txn.get(key, db=databases.pending)
    return None if value is None else _layout.unpack_positions((value, ))[0]


def require(txn: "lmdb.Transaction[memoryview]", databases: Databases,
            key: bytes) -> _layout.Subscriber:
    """
    Read the record of a subscriber that has to be there.

    :param txn: any transaction
    :param databases: handles
    :param key: its id, in UTF-8
    :return: its record
    :raise NotInitializedError: if there is no such subscriber
    """
    subscriber = read(txn, databases, key)
    if subscriber is None:
        raise persipubsub.errors.NotInitializedError(
            "Expected the queue to have the subscriber {!r}, but got: none of that id. Run "
            "persipubsub.control.initialize_all_dbs with the configuration file first.".format(
                key.decode("utf-8", "replace")))
    return subscriber


def require_position(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                     key: bytes) -> tuple[int, int, int, int]:
    """
    Read where a subscriber that has to be there is.

    :param txn: any transaction
    :param databases: handles
    :param key: its id, in UTF-8
    :return: ordinal, flags, position, how many it acknowledged
    :raise NotInitializedError: if there is no such subscriber
    """
    value = txn.get(key, None, databases.pending)
    if value is not None and len(value) == _layout.SUBSCRIBER_BYTES:
        return _layout.unpack_position(value)
    return require(txn, databases, key)[:4]


def write(txn: "lmdb.Transaction[memoryview]", databases: Databases, key: bytes,
          subscriber: _layout.Subscriber) -> None:
    """
    Write the record of a subscriber; records of attempts that its position has passed are deleted.

    :param txn: write transaction
    :param databases: handles
    :param key: its id, in UTF-8
    :param subscriber: its record
    """
    # Here, and not where positions are moved: there are many of these, and none can forget it.
    if subscriber.flags & _layout.FLAG_MAY_HAVE_ATTEMPTS and not _attempts.forget_before(
            txn, databases, subscriber.ordinal, subscriber.position):
        subscriber = subscriber._replace(flags=subscriber.flags & ~_layout.FLAG_MAY_HAVE_ATTEMPTS)
    txn.put(key, _layout.pack_subscriber(subscriber), db=databases.pending)


def read_all(txn: "lmdb.Transaction[memoryview]",
             databases: Databases) -> list[tuple[bytes, _layout.Subscriber]]:
    """
    Read the records of all subscribers.

    :param txn: any transaction
    :param databases: handles
    :return: ids in UTF-8 and records
    """
    return [(bytes(key), _layout.unpack_subscriber(value))
            for key, value in txn.cursor(db=databases.pending)]


def audiences_of(audiences: dict[int, tuple[str, ...]], key: bytes) -> tuple[int, ...]:
    """
    List the audiences that a subscriber belongs to.

    :param audiences: subscriber ids by audience
    :param key: id of the subscriber, in UTF-8
    :return: audiences from 1 on
    """
    identifier = key.decode("utf-8")
    return tuple(audience for audience, members in audiences.items() if identifier in members)


def ranges(txn: "lmdb.Transaction[memoryview]", databases: Databases,
           ordinal: int) -> Iterator[tuple[int, int]]:
    """
    Iterate over the ranges that a subscriber acknowledged ahead of its position.

    :param txn: any transaction; nothing may be written to ``ahead_db`` meanwhile
    :param databases: handles
    :param ordinal: of the subscriber
    :return: first number and number behind each range, in order
    """
    cursor = txn.cursor(db=databases.ahead)
    if not cursor.set_range(_layout.pack_ahead_key(ordinal, 0)):
        return
    while True:
        key = cursor.key()
        if not key:
            return
        found, begin, end = _layout.unpack_ahead(key, cursor.value())
        if found != ordinal:
            return
        yield begin, end
        if not cursor.next():
            return


def skip_ahead(txn: "lmdb.Transaction[memoryview]", databases: Databases, ordinal: int,
               number: int) -> int:
    """
    Skip a range that was acknowledged ahead.

    :param txn: any transaction
    :param databases: handles
    :param ordinal: of the subscriber
    :param number: from which on to look
    :return: smallest number from there on that was not acknowledged ahead
    """
    cursor = txn.cursor(db=databases.ahead)
    if cursor.set_range(_layout.pack_ahead_key(ordinal, number + 1)):
        found = cursor.prev()
    else:
        found = cursor.last()
    if found:
        owner, begin, end = _layout.unpack_ahead(cursor.key(), cursor.value())
        if owner == ordinal and begin <= number < end:
            return end
    return number


def next_range(txn: "lmdb.Transaction[memoryview]", databases: Databases, ordinal: int,
               number: int) -> int:
    """
    Find the next range that was acknowledged ahead.

    :param txn: any transaction
    :param databases: handles
    :param ordinal: of the subscriber
    :param number: behind which to look
    :return: first number of the range; a number larger than all if there is none
    """
    cursor = txn.cursor(db=databases.ahead)
    if cursor.set_range(_layout.pack_ahead_key(ordinal, number + 1)):
        owner, begin, _ = _layout.unpack_ahead(cursor.key(), cursor.value())
        if owner == ordinal:
            return begin
    return _layout.MAX_NUMBER + 1


def add_range(txn: "lmdb.Transaction[memoryview]", databases: Databases, ordinal: int, begin: int,
              end: int) -> int:
    """
    Add a range that was acknowledged ahead; ranges that touch become one.

    :param txn: write transaction
    :param databases: handles
    :param ordinal: of the subscriber
    :param begin: first number of the range
    :param end: number behind the range
    :return: how many numbers of it had been acknowledged before
    """
    cursor = txn.cursor(db=databases.ahead)
    known = 0
    new_begin, new_end = begin, end
    touching: list[int] = []
    found = (cursor.prev()
             if cursor.set_range(_layout.pack_ahead_key(ordinal, begin)) else cursor.last())
    if not found:
        found = cursor.first()
    while found:
        owner, other_begin, other_end = _layout.unpack_ahead(cursor.key(), cursor.value())
        if (owner, other_begin) > (ordinal, end):
            break
        if owner == ordinal and other_end >= begin:
            touching.append(other_begin)
            known += max(0, min(end, other_end) - max(begin, other_begin))
            new_begin, new_end = min(new_begin, other_begin), max(new_end, other_end)
        found = cursor.next()
    for other_begin in touching:
        if other_begin != new_begin:
            txn.delete(_layout.pack_ahead_key(ordinal, other_begin), db=databases.ahead)
    txn.put(_layout.pack_ahead_key(ordinal, new_begin),
            _layout.pack_ahead_value(new_end),
            db=databases.ahead)
    return known


def trim_ranges(txn: "lmdb.Transaction[memoryview]", databases: Databases, ordinal: int,
                position: int) -> int:
    """
    Forget ranges that a position has reached, and let the position skip them.

    :param txn: write transaction
    :param databases: handles
    :param ordinal: of the subscriber
    :param position: new position
    :return: position behind all ranges that touch it
    """
    cursor = txn.cursor(db=databases.ahead)
    while cursor.set_range(_layout.pack_ahead_key(ordinal, 0)):
        owner, begin, end = _layout.unpack_ahead(cursor.key(), cursor.value())
        if owner != ordinal or begin > position:
            break
        position = max(position, end)
        cursor.delete()
    return position


def drop_ranges(txn: "lmdb.Transaction[memoryview]", databases: Databases, ordinal: int,
                begin: int) -> None:
    """
    Forget ranges from a number on.

    :param txn: write transaction
    :param databases: handles
    :param ordinal: of the subscriber
    :param begin: first number to forget
    """
    for first, end in list(ranges(txn, databases, ordinal)):
        if end <= begin:
            continue
        if first >= begin:
            txn.delete(_layout.pack_ahead_key(ordinal, first), db=databases.ahead)
        else:
            txn.put(_layout.pack_ahead_key(ordinal, first),
                    _layout.pack_ahead_value(begin),
                    db=databases.ahead)


def count_pending(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                  subscriber: _layout.Subscriber, audiences: Sequence[int], begin: int,
                  end: int) -> int:
    """
    Count the messages in a range that a subscriber still has to acknowledge, without a walk.

    :param txn: any transaction
    :param databases: handles
    :param subscriber: its record
    :param audiences: those it belongs to
    :param begin: first number
    :param end: number behind the last one
    :return: number of messages
    """
    begin = max(begin, subscriber.position)
    if begin >= end:
        return 0
    cursor = txn.cursor(db=databases.data)
    count = _log.count_between(_log.place_of(cursor, begin), _log.place_of(cursor, end), audiences)
    for first, behind in ranges(txn, databases, subscriber.ordinal):
        low, high = max(first, begin), min(behind, end)
        if low < high:
            count -= _log.count_between(_log.place_of(cursor, low), _log.place_of(cursor, high),
                                        audiences)
    return count


def first_pending(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                  subscriber: _layout.Subscriber, audiences: Sequence[int], end: int) -> int:
    """
    Find the first message that a subscriber still has to acknowledge, without a long walk.

    The position itself may lie in a gap, or at messages for others.

    :param txn: any transaction
    :param databases: handles
    :param subscriber: its record
    :param audiences: those it belongs to
    :param end: number behind the last message
    :return: number of the message; ``end`` if there is none
    """
    cursor = txn.cursor(db=databases.data)
    number = subscriber.position
    steps = 0
    found = _log.seek(cursor, number)
    while found is not None and number < end:
        first, block, _ = found
        if block.messages and (not block.audience or block.audience in audiences):
            number = max(number, first)
            behind = number
            if subscriber.flags:
                behind = skip_ahead(txn, databases, subscriber.ordinal, number)
            if behind == number:
                return number
            number = behind
            found = _log.seek(cursor, number)
        elif steps < _NEAR_BLOCKS:
            steps += 1
            number = max(number, _blocks.end_of(first, block))
            found = _log.following(cursor)
        else:
            number = _log.number_addressed(cursor, number, end, audiences)
            found = _log.seek(cursor, number)
    return end


def acknowledge(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                subscriber: _layout.Subscriber, begin: int,
                end: int) -> tuple[_layout.Subscriber, int]:
    """
    Acknowledge a range of numbers.

    :param txn: write transaction
    :param databases: handles
    :param subscriber: its record
    :param begin: first number
    :param end: number behind the last one
    :return: new record, to be written by the caller; how many numbers were not acknowledged before
    """
    position = subscriber.position
    if end <= position:
        return subscriber, 0
    fresh = end - max(begin, position)
    if begin > position:
        fresh -= add_range(txn, databases, subscriber.ordinal, begin, end)
        return subscriber._replace(flags=subscriber.flags | _layout.FLAG_MAY_HAVE_RANGES), fresh
    flags = subscriber.flags
    if flags:
        for first, behind in ranges(txn, databases, subscriber.ordinal):
            fresh -= max(0, min(behind, end) - max(first, position))
        end = trim_ranges(txn, databases, subscriber.ordinal, end)
        if next(ranges(txn, databases, subscriber.ordinal), None) is None:
            flags &= ~_layout.FLAG_MAY_HAVE_RANGES
    return subscriber._replace(position=end, flags=flags), fresh


def lacks(txn: "lmdb.Transaction[memoryview]", databases: Databases, keys: Sequence[bytes]) -> bool:
    """
    Tell whether a subscriber is missing.

    :param txn: any transaction
    :param databases: handles
    :param keys: ids in UTF-8
    :return: True if one of them is not there
    """
    return any(txn.get(key, db=databases.pending) is None for key in keys)


def beginning(txn: "lmdb.Transaction[memoryview]", databases: Databases, oldest_ns: int) -> int:
    """
    Find the first message that is still stored and not too old.

    :param txn: any transaction
    :param databases: handles
    :param oldest_ns: everything that was committed before is too old
    :return: its number; the next number if there is none
    """
    cursor = txn.cursor(db=databases.data)
    end = _log.read_tail(cursor).next_number
    found = _log.head(cursor)
    first = found.first if found is not None else end
    return _log.number_at_time(cursor, min(first, end), end, oldest_ns)


def seek(txn: "lmdb.Transaction[memoryview]", databases: Databases, key: bytes, number: int) -> int:
    """
    Let a subscriber go on from a message, which may lie behind or in front of its position.

    Whatever it acknowledged from there on is delivered again; what it passes counts as skipped.

    :param txn: write transaction
    :param databases: handles
    :param key: id of the subscriber, in UTF-8
    :param number: of the message
    :return: new position, which is at most the next number and not in front of what is stored
    """
    subscriber = require(txn, databases, key)
    cursor = txn.cursor(db=databases.data)
    number = _stored_from(cursor, number)
    audiences = audiences_of(_log.read_audiences(txn, databases), key)
    skipped = count_pending(txn, databases, subscriber, audiences, 0, number)
    drop_ranges(txn, databases, subscriber.ordinal, 0)
    if subscriber.flags & _layout.FLAG_MAY_HAVE_ATTEMPTS:
        # Those that were left to go little by little would count for messages that begin anew.
        _attempts.forget_all(txn, databases, subscriber.ordinal, subscriber.position)
    write(
        txn, databases, key,
        subscriber._replace(position=number,
                            flags=subscriber.flags & ~_layout.FLAG_MAY_HAVE_RANGES,
                            skipped=subscriber.skipped + skipped))
    # Whoever remembers how far all subscribers have come looks again: positions went back.
    _log.change_generation(cursor)
    return number


def _stored_from(cursor: "lmdb.Cursor[memoryview]", number: int) -> int:
    """
    Find the first message that is stored from a number on.

    A position must not rest on a number whose message is gone: somebody may still be at work on it,
    and would be taken for one who acknowledges the next message.

    :param cursor: of ``data_db``
    :param number: to be found
    :return: its number; the next number if there is none
    """
    end = _log.read_tail(cursor).next_number
    found = _log.seek(cursor, min(max(number, 0), end))
    while found is not None:
        if found.block.messages:
            return max(found.first, number)
        found = _log.following(cursor)
    return end


def add(txn: "lmdb.Transaction[memoryview]",
        databases: Databases,
        keys: Sequence[bytes],
        from_beginning: Sequence[bytes] = (),
        oldest_ns: int = 0) -> None:
    """
    Add the subscribers that are missing, at the end of the queue or at its beginning.

    :param txn: write transaction
    :param databases: handles
    :param keys: ids in UTF-8
    :param from_beginning: those of them that get what is still stored
    :param oldest_ns: ... and was not committed before
    """
    value = txn.get(_layout.HEADER_KEY, db=databases.meta)
    header = _layout.unpack_header(bytes(value or b""), "")
    cursor = txn.cursor(db=databases.data)
    tail = _log.read_tail(cursor)
    ordinal = header.next_ordinal
    for key in keys:
        if txn.get(key, db=databases.pending) is not None:
            continue
        if ordinal > _layout.MAX_SUBSCRIBER_ORDINAL:
            raise persipubsub.errors.StoreError(
                "Expected at most {} subscribers in the life of a queue, but got: {!r} as one more".
                format(_layout.MAX_SUBSCRIBER_ORDINAL, key.decode("utf-8")))
        position = tail.next_number
        if key in from_beginning:
            position = beginning(txn, databases, oldest_ns)
        subscriber = _layout.Subscriber(ordinal, 0, position, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        write(txn, databases, key, subscriber)
        ordinal += 1
    txn.put(_layout.HEADER_KEY,
            _layout.pack_header(header._replace(next_ordinal=ordinal)),
            db=databases.meta)
    _log.change_generation(cursor)
