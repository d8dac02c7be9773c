"""
Check all invariants of a store, in steps.

Each step is a read transaction of its own and looks at a bounded number of records: a long one would
keep other threads from reading, and LMDB's pages in use. Others may write between two steps. What is
compared with the step before is therefore compared only if that is still there.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from persipubsub.errors import CorruptMessageError, StoreError
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, meta, positions
from persipubsub.lmdb_engine.format import Tx
from persipubsub.statistics import Progress

#: A step ends after so many records, or bytes of messages.
_STEP_RECORDS: Final = 256
_STEP_BYTES: Final = 1 << 20


class _Place(NamedTuple):
    """Where the walk through the log goes on."""

    end: int = fmt.FIRST_NUMBER  #: number after the last block
    time_ns: int = 0  #: of the last block
    first: int = 0  #: number of the last block; 0: there is none
    crc: int = 0  #: checksum of its record
    totals: tuple[int, int, list[int]] | None = None  #: up to the last block


def check(read: Callable[..., Any], progress: Progress | None = None) -> list[str]:
    """
    Walk through the store; return what is wrong.

    :param read: runs a function in a read transaction, perhaps more than once
    """
    progress = progress or Progress()
    findings: list[str] = []
    try:
        begin, end = read(_span, None)
        progress.begin("messages", total=end - begin)
        for step in (_check_log, _check_positions, _check_attempts, _check_ids):
            place: Any = None
            while True:  # each step goes on after the one before it, up to the end
                found, place = read(step, place)
                findings += found
                if place is None:
                    break
                if isinstance(place, _Place):
                    progress.done = place.end - begin
    except StoreError as error:
        findings.append(str(error))
    except (struct.error, ValueError, IndexError) as error:
        # A record was cut, or is of another database.
        findings.append(f"Expected to decode every record, but got: {error}")
    return findings


def _span(tx: Tx, _: None) -> tuple[int, int]:
    """Find the first number in the log, and the next one."""
    head = log.head(tx.cursor())
    return head.first if head else fmt.FIRST_NUMBER, log.read_end(tx.cursor()).next_number


def _check_log(tx: Tx, place: _Place | None) -> tuple[list[str], _Place | None]:
    """Check the blocks, their order, their totals and the checksums of their messages."""
    findings: list[str] = []
    audiences = log.read_audiences(tx)
    cursor = tx.cursor()
    end, time_ns, last, crc, totals = place or _Place()
    if last:
        value = tx.txn.get(fmt.pack_number(last), db=tx.db.data)
        if value is None or fmt.unpack_block(value, last).crc != crc:
            totals = None
    found = log.seek(cursor, end) if place else log.head(cursor)
    read_bytes = 0
    for _ in range(_STEP_RECORDS):
        if found is None or read_bytes > _STEP_BYTES:
            break
        first, block, value = found
        where = f"the block at message {first}"
        if first < end or block.time_ns < time_ns:
            findings.append(
                f"Expected {where} to begin at or after {end}, and not before the time {time_ns}")
        if block.audience and block.audience not in audiences:
            findings.append(f"Expected {where} to have a known audience, but got: {block.audience}")
        findings += _check_messages(found)
        size = fmt.size_before(value, block, block.messages)
        read_bytes += size
        given = (block.total_count, block.total_bytes, list(fmt.unpack_totals(value, block)))
        if totals is not None:
            of_audiences = totals[2] + [0] * (len(given[2]) - len(totals[2]))
            if block.audience:
                of_audiences[block.audience - 1] += block.messages
            expected = (totals[0] + block.messages, totals[1] + size, of_audiences)
            if given != expected:
                findings.append(f"Expected {where} to have the totals {expected}, but got: {given}")
        end, time_ns, last, crc, totals = (fmt.end_of(first, block), block.time_ns, first,
                                           block.crc, given)
        found = log.following(cursor)
    return findings, _Place(end, time_ns, last, crc, totals) if found is not None else None


def _check_messages(found: log.Found) -> Iterator[str]:
    """Check the messages of one block."""
    first, block, value = found
    for index in range(block.messages):
        try:
            fmt.copy_message(value, block, index, first + index)
        except CorruptMessageError as error:
            yield str(error)


def _check_positions(tx: Tx, _: None) -> tuple[list[str], None]:
    """Check positions, and the ranges ahead of them: as few as subscribers and messages in flight."""
    return list(_find_in_positions(tx, log.read_end(tx.cursor()).next_number)), None


def _find_in_positions(tx: Tx, log_end: int) -> Iterator[str]:
    """Say what is wrong with positions and ranges."""
    next_ordinal = meta.read_header(tx).next_ordinal
    ordinals: set[int] = set()
    for subscriber in positions.read_all(tx):
        where = f"the subscriber {subscriber.key.decode('utf-8', 'replace')!r}"
        if subscriber.ordinal in ordinals or subscriber.ordinal >= next_ordinal:
            yield f"Expected {where} to have an ordinal of its own, but got: {subscriber.ordinal}"
        ordinals.add(subscriber.ordinal)
        if not fmt.FIRST_NUMBER <= subscriber.position <= log_end:
            yield (f"Expected the position of {where} to be at most {log_end}, but got: "
                   f"{subscriber.position}")
        previous = subscriber.position
        for begin, end in positions.ranges(tx, subscriber.ordinal):
            is_flagged = subscriber.flags & fmt.FLAG_MAY_HAVE_RANGES
            if not is_flagged or not previous < begin < end <= log_end:
                yield (
                    f"Expected the range {begin}-{end} of {where}, with a flag, after {previous} "
                    f"and at most at {log_end}")
            previous = end
    for ahead_key, ahead_value in tx.txn.cursor(db=tx.db.ahead):
        ordinal, begin, _ = fmt.unpack_ahead(ahead_key, ahead_value)
        if ordinal not in ordinals:
            yield f"Expected no range at {begin} of the unknown subscriber {ordinal}"


def _check_attempts(tx: Tx, place: bytes | None) -> tuple[list[str], bytes | None]:
    """Check that there are records of attempts only of messages that may be delivered again."""
    findings = []
    log_end = log.read_end(tx.cursor()).next_number
    flagged = {
        subscriber.ordinal
        for subscriber in positions.read_all(tx) if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS
    }
    records, place = _take(tx, tx.db.attempts, place)
    for key, value in records:
        ordinal, number = fmt.unpack_attempts_key(key)
        deliveries = fmt.unpack_attempts(value).deliveries
        if ordinal not in flagged or number >= log_end or not deliveries:
            findings.append(
                f"Expected a record of attempts to be of a flagged subscriber, before {log_end}, "
                f"and to count something, but got: the subscriber {ordinal} at {number} with "
                f"{deliveries} deliveries")
    return findings, place


def _check_ids(tx: Tx, place: bytes | None) -> tuple[list[str], bytes | None]:
    """Check that each id is there twice, and is that of a message."""
    findings = []
    log_end = log.read_end(tx.cursor()).next_number
    records, place = _take(tx, tx.db.once, place)
    for key, value in records:
        if bytes(key[:1]) == fmt.ONCE_ID_PREFIX:
            identifier = bytes(key[1:])
            number, time_ns = fmt.unpack_once(value)
            is_timed = tx.txn.get(fmt.once_time_key(time_ns, identifier), db=tx.db.once) is not None
            if not (fmt.FIRST_NUMBER <= number < log_end and is_timed):
                findings.append(
                    f"Expected the id {identifier!r} to be of a message before {log_end}, and to "
                    f"be found by its time {time_ns}, but got: the message {number}")
        else:
            time_ns, identifier = fmt.unpack_once_time_key(key)
            other = tx.txn.get(fmt.once_id_key(identifier), db=tx.db.once)
            if other is None or fmt.unpack_once(other)[1] != time_ns:
                findings.append(
                    f"Expected the time {time_ns} of the id {identifier!r} to be found by "
                    "the id, but got: none, or another time")
    return findings, place


def _take(tx: Tx, database: Any,
          place: bytes | None) -> tuple[list[tuple[memoryview, memoryview]], bytes | None]:
    """Take the next records of a sub-database, and the key of the one after them."""
    cursor = tx.txn.cursor(database)
    is_there = cursor.first() if place is None else cursor.set_range(place)
    records: list[tuple[memoryview, memoryview]] = []
    while is_there and len(records) < _STEP_RECORDS:  # up to the last record
        records.append(cursor.item())
        is_there = cursor.next()
    return records, bytes(cursor.key()) if is_there else None
