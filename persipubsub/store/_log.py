"""
Walk, extend and shorten the log of messages, inside of a transaction.

The log is ``data_db``: blocks of messages in the order of commits. A number belongs to a message,
not to a block; numbers that were dropped leave gaps, so that every search lands on the next block.
"""

import itertools
from collections.abc import Sequence
from typing import Final, NamedTuple

import lmdb

import persipubsub.errors
from persipubsub.store import _blocks, _layout
from persipubsub.store._databases import Databases

#: Nothing was committed later than at this time: no finished message stays.
RETAINS_NOTHING_NS: Final = 1 << 63

#: Makes a named tuple of a tuple.
_new = tuple.__new__


class Tail(NamedTuple):
    """Hold what the end of the log says."""

    next_number: int  #: of the next message
    time_ns: int  #: of the last commit; 0 if there was none
    total_count: int
    total_bytes: int
    generation: int
    totals: tuple[int, ...]  #: of each audience but everybody


EMPTY: Final = Tail(next_number=_layout.FIRST_NUMBER,
                    time_ns=0,
                    total_count=0,
                    total_bytes=0,
                    generation=0,
                    totals=())


class Place(NamedTuple):
    """Hold the totals of everything in front of a number."""

    messages: int  #: how many
    size: int  #: their bytes
    totals: tuple[int, ...]  #: of each audience but everybody
    time_ns: int  #: everything from the number on was committed then or later, or will be


class Found(NamedTuple):
    """Hold a block that a search found. The value is a view into the store."""

    first: int
    block: _blocks.Block
    value: memoryview


def read_tail(cursor: "lmdb.Cursor[memoryview]") -> Tail:
    """
    Read the end of the log.

    :param cursor: of ``data_db``
    :return: end of the log
    """
    if not cursor.last():
        return EMPTY
    key, value = cursor.item()
    number = int.from_bytes(key, "big")
    block = _blocks.unpack_block(value, number)
    return Tail(number + (block.messages or 1), block.time_ns, block.total_count, block.total_bytes,
                block.generation, _blocks.unpack_totals(value, block))


def append(txn: "lmdb.Transaction[memoryview]", databases: Databases, tail: Tail, time_ns: int,
           audience: int, batches: Sequence[tuple[int, int, bytes]]) -> Tail:
    """
    Add blocks at the end of the log.

    Without a cursor: who knows the end of the log needs none, and making one takes longer than the
    search for the end.

    :param txn: write transaction
    :param databases: handles
    :param tail: end of the log
    :param time_ns: of the commit, on the queue's clock
    :param audience: whom the messages are for
    :param batches: encoded messages: how many, their bytes, body of their block
    :return: new end of the log
    """
    number, last_ns, count, size, generation, totals = tail
    # Not by max: a call of it takes as long as packing the record.
    time_ns = time_ns if time_ns > last_ns else last_ns
    for messages, added, body in batches:
        count += messages
        size += added
        if audience:
            totals = _add_to_audience(totals, audience, messages)
        record = _blocks.pack_block(time_ns, count, size, messages, audience, generation, totals)
        # By position: a key, a value, duplicates (there are none), to overwrite, to append. Named
        # arguments would be put into a dictionary first.
        if not txn.put(_layout.pack_number(number), record + body, True, True, True,
                       databases.data):
            raise persipubsub.errors.StoreCorruptError(
                f"Expected the log to end in front of message {number}, but got: one behind it")
        number += messages
    # Past the constructor, which is a function in Python.
    return _new(Tail, (number, time_ns, count, size, generation, totals))


def _add_to_audience(totals: tuple[int, ...], audience: int, count: int) -> tuple[int, ...]:
    """
    Add to the total of an audience.

    :param totals: of the audiences from 1 on
    :param audience: to be added to
    :param count: how many messages
    :return: new totals
    """
    longer = list(totals) + [0] * (audience - len(totals))
    longer[audience - 1] += count
    return tuple(longer)


def put_placeholder(cursor: "lmdb.Cursor[memoryview]", tail: Tail) -> None:
    """
    Keep all numbers below the next one taken, and remember the totals, with no message.

    :param cursor: of ``data_db``
    :param tail: end of the log; nothing may be stored at or behind its last number
    """
    record = _blocks.pack_block(tail.time_ns, tail.total_count, tail.total_bytes, 0,
                                _layout.EVERYONE, tail.generation, tail.totals)
    cursor.put(_layout.pack_number(tail.next_number - 1), record)


def change_generation(cursor: "lmdb.Cursor[memoryview]") -> None:
    """
    Tell every process, at its next write, to forget what it remembers of positions.

    :param cursor: of ``data_db``
    """
    tail = read_tail(cursor)
    tail = tail._replace(generation=(tail.generation + 1) & 0xffffffff)
    if tail.next_number == _layout.FIRST_NUMBER:
        # Of an empty log nothing wrong can be remembered, and there is no block to carry it.
        return
    cursor.last()
    value = bytes(cursor.value())
    key = bytes(cursor.key())
    block = _blocks.unpack_block(memoryview(value), 0)
    record = _blocks.pack_block(block.time_ns, block.total_count, block.total_bytes, block.messages,
                                block.audience, tail.generation, tail.totals)
    cursor.put(key, record + value[len(record):])


def seek(cursor: "lmdb.Cursor[memoryview]", number: int) -> Found | None:
    """
    Find the block that holds a number, or the next block behind it.

    :param cursor: of ``data_db``; stands at the block afterwards
    :param number: to be found
    :return: found block; None if the log ends before
    """
    key = _layout.pack_number(number)
    if cursor.set_key(key):
        return _found(cursor, number)
    if cursor.set_range(key):
        first = _layout.unpack_number(cursor.key())
        if not cursor.prev():
            cursor.first()
            return _found(cursor, first)
    elif not cursor.last():
        return None
    # The cursor stands at the last block that begins before the number.
    first = _layout.unpack_number(cursor.key())
    found = _found(cursor, first)
    if _blocks.end_of(first, found.block) > number:
        return found
    if not cursor.next():
        return None
    return _found(cursor, _layout.unpack_number(cursor.key()))


def following(cursor: "lmdb.Cursor[memoryview]") -> Found | None:
    """
    Go to the next block.

    :param cursor: of ``data_db``; stands at a block
    :return: next block; None at the end of the log
    """
    if not cursor.next():
        return None
    return _found(cursor, _layout.unpack_number(cursor.key()))


def preceding(cursor: "lmdb.Cursor[memoryview]") -> Found | None:
    """
    Go to the previous block.

    :param cursor: of ``data_db``; stands at a block
    :return: previous block; None at the beginning of the log
    """
    if not cursor.prev():
        return None
    return _found(cursor, _layout.unpack_number(cursor.key()))


def last(cursor: "lmdb.Cursor[memoryview]") -> Found | None:
    """
    Go to the last block.

    :param cursor: of ``data_db``
    :return: last block; None if the log is empty
    """
    if not cursor.last():
        return None
    return _found(cursor, _layout.unpack_number(cursor.key()))


def head(cursor: "lmdb.Cursor[memoryview]") -> Found | None:
    """
    Go to the first block.

    :param cursor: of ``data_db``
    :return: first block; None if the log is empty
    """
    if not cursor.first():
        return None
    return _found(cursor, _layout.unpack_number(cursor.key()))


def _found(cursor: "lmdb.Cursor[memoryview]", first: int) -> Found:
    """
    Decode the block at which a cursor stands.

    :param cursor: of ``data_db``
    :param first: number of its first message
    :return: decoded block
    """
    value = cursor.value()
    return Found(first, _blocks.unpack_block(value, first), value)


def place_of(cursor: "lmdb.Cursor[memoryview]", number: int) -> Place:
    """
    Count everything in front of a number, without a walk.

    :param cursor: of ``data_db``
    :param number: to be counted up to
    :return: totals in front of the number
    """
    found = seek(cursor, number)
    if found is None:
        tail = read_tail(cursor)
        return Place(tail.total_count, tail.total_bytes, tail.totals, tail.time_ns)
    first, block, value = found
    kept = max(0, min(number - first, block.messages))
    count = block.total_count - block.messages + kept
    size = (block.total_bytes - _blocks.size_before(value, block, block.messages) +
            _blocks.size_before(value, block, kept))
    totals = _blocks.unpack_totals(value, block)
    if block.audience:
        totals = _add_to_audience(totals, block.audience, kept - block.messages)
    return Place(count, size, totals, block.time_ns)


def count_between(begin: Place, end: Place, audiences: Sequence[int]) -> int:
    """
    Count the messages between two places that are for somebody.

    :param begin: first place
    :param end: place behind the last message to count
    :param audiences: those from 1 on that the somebody belongs to
    :return: number of messages
    """
    count = (end.messages - sum(end.totals)) - (begin.messages - sum(begin.totals))
    for audience in audiences:
        if audience <= len(end.totals):
            count += end.totals[audience - 1]
        if audience <= len(begin.totals):
            count -= begin.totals[audience - 1]
    return count


def number_at_count(cursor: "lmdb.Cursor[memoryview]", begin: int, end: int, count: int) -> int:
    """
    Find the number in front of which the log has a given count of messages, by bisection.

    :param cursor: of ``data_db``
    :param begin: smallest possible number
    :param end: largest possible number
    :param count: total in front of the number
    :return: smallest number in front of which there are at least ``count`` messages
    """
    while begin < end:
        middle = (begin + end) // 2
        if place_of(cursor, middle).messages < count:
            begin = middle + 1
        else:
            end = middle
    return begin


def number_at_time(cursor: "lmdb.Cursor[memoryview]", begin: int, end: int, time_ns: int) -> int:
    """
    Find the first message that was committed at or after a time, by bisection.

    :param cursor: of ``data_db``
    :param begin: smallest possible number
    :param end: largest possible number, returned if all messages are older
    :param time_ns: on the queue's clock
    :return: its number
    """
    while begin < end:
        middle = (begin + end) // 2
        found = seek(cursor, middle)
        if found is not None and found.block.time_ns < time_ns:
            begin = max(middle, found.first) + 1
        else:
            end = middle
    return begin


def number_addressed(cursor: "lmdb.Cursor[memoryview]", begin: int, end: int,
                     audiences: Sequence[int]) -> int:
    """
    Find the first message that is for somebody, by bisection.

    :param cursor: of ``data_db``
    :param begin: smallest possible number
    :param end: largest possible number, returned if no message is for them
    :param audiences: those from 1 on that the somebody belongs to
    :return: its number
    """
    start = place_of(cursor, begin)
    while begin < end:
        middle = (begin + end) // 2
        if count_between(start, place_of(cursor, middle + 1), audiences) == 0:
            begin = middle + 1
        else:
            end = middle
    return begin


def delete_head(cursor: "lmdb.Cursor[memoryview]", floors: dict[int, int], everyone: int,
                budget: int, retained_ns: int) -> int:
    """
    Delete finished blocks at the beginning of the log; the last block stays.

    :param cursor: of ``data_db``
    :param floors: by audience from 1 on: the first number that one of its subscribers still needs
    :param everyone: the first number that any subscriber still needs of what is for everybody
    :param budget: how many blocks to delete at most
    :param retained_ns: what was committed later stays, although it is finished
    :return: how many were deleted
    """
    if budget <= 0 or not cursor.first():
        return 0
    if not floors and _layout.unpack_number(cursor.key()) >= everyone:
        return 0
    cursor.last()
    last_number = _layout.unpack_number(cursor.key())
    cursor.first()
    deleted = 0
    if not floors and retained_ns == RETAINS_NOTHING_NS:
        deleted = _delete_passed(cursor, everyone, budget)
    while deleted < budget:
        number = _layout.unpack_number(cursor.key())
        if number == last_number:
            break
        block = _blocks.unpack_block(cursor.value(), number)
        floor = floors.get(block.audience, everyone) if block.audience else everyone
        if block.messages and (number + block.messages > floor or block.time_ns > retained_ns):
            break
        cursor.delete()
        deleted += 1
    return deleted


def _delete_passed(cursor: "lmdb.Cursor[memoryview]", everyone: int, budget: int) -> int:
    """
    Delete the blocks whose next block is not needed in full either, by their keys alone.

    Decoding each of them takes five times as long. What this leaves over (a gap in the numbers,
    the last finished block) is for the closer look.

    :param cursor: of ``data_db``; stands at the first block, and afterwards at the first one left
    :param everyone: the first number that any subscriber still needs; all is for everybody
    :param budget: how many blocks to delete at most
    :return: how many were deleted
    """
    finished = -1
    for key in itertools.islice(cursor.iternext(keys=True, values=False), budget + 1):
        if int.from_bytes(key, "big") > everyone:
            break
        finished += 1
    cursor.first()
    for _ in range(finished):
        cursor.delete()
    return max(finished, 0)


def truncate(cursor: "lmdb.Cursor[memoryview]", tail: Tail, cut: int) -> Tail:
    """
    Remove all messages from a number on; their numbers stay taken.

    :param cursor: of ``data_db``
    :param tail: end of the log
    :param cut: first number to be removed
    :return: new end of the log
    """
    place = place_of(cursor, cut)
    found = seek(cursor, cut)
    if found is not None and found.first < cut:
        _shorten_block(cursor, found, cut - found.first)
        following(cursor)
    while True:
        # After a deletion the cursor stands at the next block; at the end its key is empty.
        key = cursor.key()
        if not key or _layout.unpack_number(key) < cut:
            break
        if not cursor.delete():
            break
    shorter = tail._replace(total_count=place.messages, total_bytes=place.size, totals=place.totals)
    put_placeholder(cursor, shorter)
    return shorter


def _shorten_block(cursor: "lmdb.Cursor[memoryview]", found: Found, count: int) -> None:
    """
    Keep only the first messages of a block.

    :param cursor: of ``data_db``; stands at the block
    :param found: the block
    :param count: how many to keep, at least one
    """
    first, block, value = found
    place = place_of(cursor, first + count)
    batch = _blocks.truncate_body(value=value, block=block, count=count)
    record = _blocks.pack_block(block.time_ns, place.messages, place.size, count, block.audience,
                                block.generation, place.totals)
    cursor.put(_layout.pack_number(first), record + batch.body)


def read_audiences(txn: "lmdb.Transaction[memoryview]",
                   databases: Databases) -> dict[int, tuple[str, ...]]:
    """
    Read whom publishers addressed so far.

    :param txn: any transaction
    :param databases: handles
    :return: subscriber ids by audience, from 1 on
    """
    audiences: dict[int, tuple[str, ...]] = {}
    while True:
        value = txn.get(_layout.audience_key(len(audiences) + 1), db=databases.meta)
        if value is None:
            return audiences
        audiences[len(audiences) + 1] = _layout.unpack_audience(value)


def ensure_audience(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                    subscribers: Sequence[str]) -> int:
    """
    Find the audience of a list of subscribers; add it if nobody addressed just them before.

    :param txn: write transaction
    :param databases: handles
    :param subscribers: ids
    :return: audience
    """
    wanted = tuple(sorted(subscribers))
    audiences = read_audiences(txn, databases)
    for audience, members in audiences.items():
        if members == wanted:
            return audience
    audience = len(audiences) + 1
    if audience > 0xffff:
        raise persipubsub.errors.StoreError(
            f"Expected at most {0xffff} different lists of subscribers, but got: one more")
    txn.put(_layout.audience_key(audience), _layout.pack_audience(wanted), db=databases.meta)
    return audience


def list_blocks(cursor: "lmdb.Cursor[memoryview]") -> list[Found]:
    """
    List all blocks; for checks only, since it takes time with the length of the log.

    :param cursor: of ``data_db``
    :return: blocks in order
    """
    blocks: list[Found] = []
    found = head(cursor)
    while found is not None:
        blocks.append(found)
        found = following(cursor)
    return blocks
