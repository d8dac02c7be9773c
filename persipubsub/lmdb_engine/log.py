"""
The log of messages: append, search, shorten, all inside of a transaction.

The log is ``data_db``: blocks of messages in the order of commits. A number belongs to a message,
not to a block. Dropped numbers leave gaps, so that every search ends at the next block.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import persipubsub.errors
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine.format import Cursor, Tx

#: Nothing was committed later than at this time: no finished message stays.
RETAINS_NOTHING_NS: Final = 1 << 63

#: Makes a named tuple of a tuple.
_new: Callable[..., Any] = tuple.__new__


class LogEnd(NamedTuple):
    """End of the log."""

    next_number: int  #: of the next message
    time_ns: int  #: of the last commit; 0 if there was none
    total_count: int
    total_bytes: int
    generation: int
    totals: tuple[int, ...]  #: of each audience but everybody


EMPTY: Final = LogEnd(next_number=fmt.FIRST_NUMBER,
                      time_ns=0,
                      total_count=0,
                      total_bytes=0,
                      generation=0,
                      totals=())


class Place(NamedTuple):
    """Totals of everything in front of a number."""

    messages: int  #: how many
    size: int  #: their bytes
    totals: tuple[int, ...]  #: of each audience but everybody
    time_ns: int  #: everything from the number on was committed then or later, or will be


class Found(NamedTuple):
    """Block that a search found; the value is a view into the store."""

    first: int
    block: fmt.Block
    value: memoryview


def read_end(cursor: Cursor) -> LogEnd:
    """Read the end of the log."""
    if not cursor.last():
        return EMPTY
    key, value = cursor.item()
    number = int.from_bytes(key, "big")
    block = fmt.unpack_block(value, number)
    time_ns, count, size, messages, _, audiences, generation, _ = block
    totals = fmt.unpack_totals(value, block) if audiences else ()
    found: LogEnd = _new(LogEnd,
                         (number + (messages or 1), time_ns, count, size, generation, totals))
    return found


def append(tx: Tx, log_end: LogEnd, time_ns: int, audience: int,
           batches: Sequence[tuple[int, int, bytes]]) -> LogEnd:
    """Add blocks at the end of the log."""
    number, last_ns, count, size, generation, totals = log_end
    # Not by max: a call of it takes as long as packing the record.
    time_ns = time_ns if time_ns > last_ns else last_ns
    for messages, added, body in batches:
        count += messages
        size += added
        if audience:
            totals = _add_to_audience(totals, audience, messages)
        record = fmt.pack_block(time_ns, count, size, messages, audience, generation, totals)
        # By position: a key, a value, duplicates (there are none), to overwrite, to append. Named
        # arguments would be put into a dictionary first.
        if not tx.txn.put(fmt.pack_number(number), record + body, True, True, True, tx.db.data):
            raise persipubsub.errors.StoreCorruptError(
                f"Expected the log to end in front of message {number}, but got: one behind it")
        number += messages
    # Past the constructor, which is a function in Python.
    behind: LogEnd = _new(LogEnd, (number, time_ns, count, size, generation, totals))
    return behind


def _add_to_audience(totals: tuple[int, ...], audience: int, count: int) -> tuple[int, ...]:
    """Add to the total of an audience."""
    longer = list(totals) + [0] * (audience - len(totals))
    longer[audience - 1] += count
    return tuple(longer)


def put_placeholder(cursor: Cursor, log_end: LogEnd) -> None:
    """Keep all numbers below the next one taken, and remember the totals, with no message."""
    record = fmt.pack_block(log_end.time_ns, log_end.total_count, log_end.total_bytes, 0,
                            fmt.EVERYONE, log_end.generation, log_end.totals)
    cursor.put(fmt.pack_number(log_end.next_number - 1), record)


def change_generation(cursor: Cursor) -> None:
    """Let every process forget, at its next write, what it remembers of positions."""
    log_end = read_end(cursor)
    log_end = log_end._replace(generation=(log_end.generation + 1) & 0xffffffff)
    if log_end.next_number == fmt.FIRST_NUMBER:
        # Of an empty log nothing wrong can be remembered, and there is no block to carry it.
        return
    cursor.last()
    value = bytes(cursor.value())
    key = bytes(cursor.key())
    block = fmt.unpack_block(memoryview(value), 0)
    record = fmt.pack_block(block.time_ns, block.total_count, block.total_bytes, block.messages,
                            block.audience, log_end.generation, log_end.totals)
    cursor.put(key, record + value[len(record):])


def seek(cursor: Cursor, number: int) -> Found | None:
    """Find the block that holds a number, or the next block behind it."""
    key = fmt.pack_number(number)
    if cursor.set_key(key):
        return _found(cursor, number)
    if cursor.set_range(key):
        first = fmt.unpack_number(cursor.key())
        if not cursor.prev():
            cursor.first()
            return _found(cursor, first)
    elif not cursor.last():
        return None
    # The cursor stands at the last block that begins before the number.
    first = fmt.unpack_number(cursor.key())
    found = _found(cursor, first)
    if fmt.end_of(first, found.block) > number:
        return found
    if not cursor.next():
        return None
    return _found(cursor, fmt.unpack_number(cursor.key()))


def following(cursor: Cursor) -> Found | None:
    """Go to the next block."""
    if not cursor.next():
        return None
    return _found(cursor, fmt.unpack_number(cursor.key()))


def preceding(cursor: Cursor) -> Found | None:
    """Go to the previous block."""
    if not cursor.prev():
        return None
    return _found(cursor, fmt.unpack_number(cursor.key()))


def last(cursor: Cursor) -> Found | None:
    """Go to the last block."""
    if not cursor.last():
        return None
    return _found(cursor, fmt.unpack_number(cursor.key()))


def head(cursor: Cursor) -> Found | None:
    """Go to the first block."""
    if not cursor.first():
        return None
    return _found(cursor, fmt.unpack_number(cursor.key()))


def _found(cursor: Cursor, first: int) -> Found:
    """Decode the block at which a cursor stands."""
    value = cursor.value()
    return Found(first, fmt.unpack_block(value, first), value)


def place_of(cursor: Cursor, number: int) -> Place:
    """Count everything in front of a number, without a walk."""
    found = seek(cursor, number)
    if found is None:
        log_end = read_end(cursor)
        return Place(log_end.total_count, log_end.total_bytes, log_end.totals, log_end.time_ns)
    first, block, value = found
    kept = max(0, min(number - first, block.messages))
    count = block.total_count - block.messages + kept
    size = (block.total_bytes - fmt.size_before(value, block, block.messages) +
            fmt.size_before(value, block, kept))
    totals = fmt.unpack_totals(value, block)
    if block.audience:
        totals = _add_to_audience(totals, block.audience, kept - block.messages)
    return Place(count, size, totals, block.time_ns)


def count_between(begin: Place, end: Place, audiences: Sequence[int]) -> int:
    """Count the messages between two places that are for everybody or for some lists."""
    count = (end.messages - sum(end.totals)) - (begin.messages - sum(begin.totals))
    for audience in audiences:
        if audience <= len(end.totals):
            count += end.totals[audience - 1]
        if audience <= len(begin.totals):
            count -= begin.totals[audience - 1]
    return count


def number_at_count(cursor: Cursor, begin: int, end: int, count: int) -> int:
    """Find the number in front of which the log has a given count of messages, by bisection."""
    while begin < end:
        middle = (begin + end) // 2
        if place_of(cursor, middle).messages < count:
            begin = middle + 1
        else:
            end = middle
    return begin


def number_at_time(cursor: Cursor, begin: int, end: int, time_ns: int) -> int:
    """Find the first message that was committed at or after a time, by bisection."""
    while begin < end:
        middle = (begin + end) // 2
        found = seek(cursor, middle)
        if found is not None and found.block.time_ns < time_ns:
            begin = max(middle, found.first) + 1
        else:
            end = middle
    return begin


def number_addressed(cursor: Cursor, begin: int, end: int, audiences: Sequence[int]) -> int:
    """Find the first message for everybody or for some lists, by bisection."""
    start = place_of(cursor, begin)
    while begin < end:
        middle = (begin + end) // 2
        if count_between(start, place_of(cursor, middle + 1), audiences) == 0:
            begin = middle + 1
        else:
            end = middle
    return begin


def delete_head(cursor: Cursor, lows: dict[int, int], everyone: int, budget: int,
                retained_ns: int) -> int:
    """Delete finished blocks at the beginning of the log; the last block stays."""
    if budget <= 0 or not cursor.first():
        return 0
    if not lows and fmt.unpack_number(cursor.key()) >= everyone:
        return 0
    cursor.last()
    last_number = fmt.unpack_number(cursor.key())
    cursor.first()
    deleted = 0
    if not lows and retained_ns == RETAINS_NOTHING_NS:
        deleted = _delete_passed(cursor, everyone, budget)
    while deleted < budget:
        number = fmt.unpack_number(cursor.key())
        if number == last_number:
            break
        block = fmt.unpack_block(cursor.value(), number)
        low = lows.get(block.audience, everyone) if block.audience else everyone
        if block.messages and (number + block.messages > low or block.time_ns > retained_ns):
            break
        cursor.delete()
        deleted += 1
    return deleted


def _delete_passed(cursor: Cursor, everyone: int, budget: int) -> int:
    """Delete the blocks whose next block is not needed in full either, by their keys alone."""
    finished = -1
    for key in itertools.islice(cursor.iternext(keys=True, values=False), budget + 1):
        if int.from_bytes(key, "big") > everyone:
            break
        finished += 1
    cursor.first()
    for _ in range(finished):
        cursor.delete()
    return max(finished, 0)


def truncate(cursor: Cursor, log_end: LogEnd, cut: int) -> LogEnd:
    """Remove all messages from a number on; their numbers stay taken."""
    place = place_of(cursor, cut)
    found = seek(cursor, cut)
    if found is not None and found.first < cut:
        _shorten_block(cursor, found, cut - found.first)
        following(cursor)
    while True:
        # After a deletion the cursor stands at the next block; at the end its key is empty.
        key = cursor.key()
        if not key or fmt.unpack_number(key) < cut:
            break
        if not cursor.delete():
            break
    shorter = log_end._replace(total_count=place.messages,
                               total_bytes=place.size,
                               totals=place.totals)
    put_placeholder(cursor, shorter)
    return shorter


def _shorten_block(cursor: Cursor, found: Found, count: int) -> None:
    """Keep only the first messages of a block."""
    first, block, value = found
    place = place_of(cursor, first + count)
    batch = fmt.truncate_body(value=value, block=block, count=count)
    record = fmt.pack_block(block.time_ns, place.messages, place.size, count, block.audience,
                            block.generation, place.totals)
    shorter = record + batch.body
    # Not put in its place: LMDB would keep all pages of a large value of this transaction, which
    # the verification of pages takes for damage.
    cursor.delete()
    cursor.put(fmt.pack_number(first), shorter)


def read_audiences(tx: Tx) -> dict[int, tuple[str, ...]]:
    """Read all lists of recipients, by their index from 1 on."""
    audiences: dict[int, tuple[str, ...]] = {}
    while True:
        value = tx.txn.get(fmt.audience_key(len(audiences) + 1), db=tx.db.meta)
        if value is None:
            return audiences
        audiences[len(audiences) + 1] = fmt.unpack_audience(value)


def ensure_audience(tx: Tx, subscribers: Sequence[str]) -> int:
    """Find the index of a list of recipients; add the list if it is new."""
    wanted = tuple(sorted(subscribers))
    audiences = read_audiences(tx)
    for audience, members in audiences.items():
        if members == wanted:
            return audience
    audience = len(audiences) + 1
    if audience > 0xffff:
        raise persipubsub.errors.StoreError(
            f"Expected at most {0xffff} different lists of subscribers, but got: one more")
    tx.txn.put(fmt.audience_key(audience), fmt.pack_audience(wanted), db=tx.db.meta)
    return audience
