"""
The log of messages: append, search, shorten, all inside of a transaction.

The log is ``data_db``: blocks of messages in the order of commits. A number belongs to a message,
not to a block. Dropped numbers leave gaps, so that every search ends at the next block.
"""

import bisect
from collections.abc import Sequence
from typing import Final, NamedTuple

from persipubsub.errors import StoreCorruptError, StoreError
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine.format import Cursor, Tx

#: Nothing was committed later than at this time: no finished message stays.
RETAINS_NOTHING_NS: Final = 1 << 63


class LogEnd(NamedTuple):
    """End of the log, or a place in it: totals of everything before a number."""

    next_number: int  #: of the next message
    time_ns: int  #: of the last commit, 0 if there was none; of a place: when its message was sent
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


class Found(NamedTuple):
    """Block that a search found; the value is a view into the store."""

    first: int
    block: fmt.Block
    value: memoryview


def read_end(cursor: Cursor) -> LogEnd:
    """Read the end of the log."""
    found = last(cursor)
    if found is None:
        return EMPTY
    first, block, value = found
    time_ns, count, size, messages, _, audiences, generation, _ = block
    totals = fmt.unpack_totals(value, block) if audiences else ()
    log_end: LogEnd = fmt.new(LogEnd,
                              (first + (messages or 1), time_ns, count, size, generation, totals))
    return log_end


def append(tx: Tx, log_end: LogEnd, time_ns: int, audience: int,
           bodies: Sequence[fmt.Body]) -> LogEnd:
    """Add blocks at the end of the log."""
    number, last_ns, count, size, generation, totals = log_end
    # Not by ``max``, whose call takes as long as packing the record.
    time_ns = time_ns if time_ns > last_ns else last_ns
    for messages, added, encoded in bodies:
        count += messages
        size += added
        if audience:
            totals = _add_to_audience(totals, audience, messages)
        record = fmt.pack_block(time_ns, count, size, messages, audience, generation, totals)
        # By position: a key, a value, duplicates (there are none), to overwrite, to append. Named
        # arguments would be put into a dictionary first.
        if not tx.txn.put(fmt.pack_number(number), record + encoded, True, True, True, tx.db.data):
            raise StoreCorruptError(
                f"Expected the log to end before message {number}, but got: one after it")
        number += messages
    behind: LogEnd = fmt.new(LogEnd, (number, time_ns, count, size, generation, totals))
    return behind


def _add_to_audience(totals: tuple[int, ...], audience: int, count: int) -> tuple[int, ...]:
    """Add to the total of an audience."""
    longer = list(totals) + [0] * (audience - len(totals))
    longer[audience - 1] += count
    return tuple(longer)


def put_placeholder(cursor: Cursor, log_end: LogEnd) -> None:
    """Put a block without messages, which keeps the numbers below the next one and the totals."""
    record = fmt.pack_block(log_end.time_ns, log_end.total_count, log_end.total_bytes, 0,
                            fmt.EVERYONE, log_end.generation, log_end.totals)
    cursor.put(fmt.pack_number(log_end.next_number - 1), record)


def change_generation(cursor: Cursor) -> None:
    """Let every process forget, at its next write, what it remembers of positions."""
    found = last(cursor)
    if found is None:
        # A process can remember nothing wrong of an empty log, and no block could hold the change.
        return
    first, block, value = found
    record = fmt.pack_block(*block[:5], block.generation + 1 & 0xffffffff,
                            fmt.unpack_totals(value, block))
    cursor.put(fmt.pack_number(first), record + bytes(value[len(record):]))


def seek(cursor: Cursor, number: int) -> Found | None:
    """Find the block that holds a number, or the next block after it."""
    key = fmt.pack_number(number)
    if cursor.set_key(key):
        # A shortcut with the same result as the code below, which takes twice as long.
        value = cursor.value()
        found: Found = fmt.new(Found, (number, fmt.unpack_block(value, number), value))
        return found
    # The number may be inside of the last block that begins before it.
    if not (cursor.prev() if cursor.set_range(key) else cursor.last()):
        return head(cursor)
    before = _at(cursor)
    return before if fmt.end_of(before.first, before.block) > number else following(cursor)


def head(cursor: Cursor) -> Found | None:
    """Go to the first block."""
    return _at(cursor) if cursor.first() else None


def last(cursor: Cursor) -> Found | None:
    """Go to the last block."""
    return _at(cursor) if cursor.last() else None


def following(cursor: Cursor) -> Found | None:
    """Go to the next block."""
    return _at(cursor) if cursor.next() else None


def preceding(cursor: Cursor) -> Found | None:
    """Go to the previous block."""
    return _at(cursor) if cursor.prev() else None


def _at(cursor: Cursor) -> Found:
    """Decode the block at which a cursor stands."""
    key, value = cursor.item()
    first = fmt.unpack_number(key)
    found: Found = fmt.new(Found, (first, fmt.unpack_block(value, first), value))
    return found


def place_of(cursor: Cursor, number: int) -> LogEnd:
    """Count everything before a number, without a walk."""
    found = seek(cursor, number)
    if found is None:
        return read_end(cursor)
    first, block, value = found
    kept = max(0, min(number - first, block.messages))
    count = block.total_count - block.messages + kept
    size = (block.total_bytes - fmt.size_before(value, block, block.messages) +
            fmt.size_before(value, block, kept))
    totals = fmt.unpack_totals(value, block) if block.audiences else ()
    if block.audience:
        totals = _add_to_audience(totals, block.audience, kept - block.messages)
    place: LogEnd = fmt.new(LogEnd, (number, block.time_ns, count, size, block.generation, totals))
    return place


def count_between(begin: LogEnd, end: LogEnd, audiences: Sequence[int]) -> int:
    """Count the messages between two places that are for everybody or for some lists."""
    count = (end.total_count - sum(end.totals)) - (begin.total_count - sum(begin.totals))
    for audience in audiences:
        if audience <= len(end.totals):
            count += end.totals[audience - 1]
        if audience <= len(begin.totals):
            count -= begin.totals[audience - 1]
    return count


# Searches by bisection. ``bisect`` returns how many numbers of the range come before.


def number_at_count(cursor: Cursor, begin: int, end: int, count: int) -> int:
    """Find the number before which the log has a given count of messages."""
    return begin + bisect.bisect_left(
        range(begin, end), count, key=lambda number: place_of(cursor, number).total_count)


def number_at_time(cursor: Cursor, begin: int, end: int, time_ns: int) -> int:
    """Find the first message that was committed at or after a time."""
    return begin + bisect.bisect_left(
        range(begin, end), time_ns, key=lambda number: place_of(cursor, number).time_ns)


def number_addressed(cursor: Cursor, begin: int, end: int, audiences: Sequence[int]) -> int:
    """Find the first message for everybody or for some lists."""
    start = place_of(cursor, begin)

    def count_through(number: int) -> int:
        return count_between(start, place_of(cursor, number + 1), audiences)

    # Mostly there is none; otherwise it is often near. The steps double.
    step = 16 if begin < end and count_through(end - 1) else end - begin
    while begin + step < end and not count_through(begin + step - 1):
        begin, step = begin + step, 2 * step
    return begin + bisect.bisect_left(range(begin, min(begin + step, end)), 1, key=count_through)


def count_within(cursor: Cursor, begin: int, end: int, size: int) -> int:
    """Count the first numbers of a range whose messages have together at most so many bytes."""
    limit = place_of(cursor, begin).total_bytes + size
    return bisect.bisect_right(range(begin + 1, end + 1),
                               limit,
                               key=lambda number: place_of(cursor, number).total_bytes)


def delete_head(cursor: Cursor, low: int, budget: int, retained_ns: int) -> None:
    """Delete the blocks before a number at the beginning of the log; the last block stays."""
    if not cursor.last():
        return
    last_number = fmt.unpack_number(cursor.key())
    cursor.first()
    for _ in range(budget):
        first = fmt.unpack_number(cursor.key())
        block = fmt.unpack_block(cursor.value(), first)
        if (first == last_number or block.messages and
            (first + block.messages > low or block.time_ns > retained_ns)):
            break
        cursor.delete()


def truncate(cursor: Cursor, log_end: LogEnd, cut: int) -> LogEnd:
    """Remove all messages from a number on; their numbers stay taken."""
    place = place_of(cursor, cut)
    found = seek(cursor, cut)
    if found is not None and found.first < cut:
        # Its first messages stay.
        first, block, value = found
        record = fmt.pack_block(block.time_ns, place.total_count, place.total_bytes, cut - first,
                                block.audience, block.generation, place.totals)
        body = fmt.truncate_body(value, block, cut - first)
        shorter = record + body
        # Deleted first: if the value were overwritten, LMDB would keep all pages of a large value
        # of this transaction, which the verification of pages takes for damage.
        cursor.delete()
        cursor.put(fmt.pack_number(first), shorter)
        following(cursor)
    while True:  # each round deletes a block
        # After a deletion the cursor stands at the next block; at the end its key is empty.
        key = cursor.key()
        if not key or fmt.unpack_number(key) < cut or not cursor.delete():
            break
    log_end = log_end._replace(total_count=place.total_count,
                               total_bytes=place.total_bytes,
                               totals=place.totals)
    put_placeholder(cursor, log_end)
    return log_end


def read_audiences(tx: Tx) -> dict[int, tuple[str, ...]]:
    """Read all lists of recipients, by their index from 1 on; once in a transaction."""
    if tx.audiences is None:
        tx.audiences = {}
        # Up to the first index that is free.
        while (value := tx.txn.get(fmt.audience_key(len(tx.audiences) + 1),
                                   db=tx.db.meta)) is not None:
            tx.audiences[len(tx.audiences) + 1] = fmt.unpack_audience(bytes(value))
    return tx.audiences


def ensure_audience(tx: Tx, subscribers: Sequence[str]) -> int:
    """Find the index of a list of recipients; add the list if it is new."""
    wanted = tuple(sorted(subscribers))
    audiences = read_audiences(tx)
    for audience, members in audiences.items():
        if members == wanted:
            return audience
    audience = len(audiences) + 1
    if audience > 0xffff:
        raise StoreError(
            f"Expected at most {0xffff} different lists of subscribers, but got: one more")
    tx.txn.put(fmt.audience_key(audience), fmt.pack_audience(wanted), db=tx.db.meta)
    audiences[audience] = wanted
    return audience
