"""Check all invariants of a store in one snapshot."""

import itertools
import struct
from collections.abc import Generator, Iterator

from persipubsub.errors import CorruptMessageError, StoreError
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, meta, positions
from persipubsub.lmdb_engine.format import Tx
from persipubsub.statistics import Progress


def check(tx: Tx, progress: Progress | None = None) -> list[str]:
    """Walk through the store; return what is wrong."""
    findings: list[str] = []
    try:
        end = log.read_end(tx.cursor()).next_number
        for finding in itertools.chain(_check_log(tx, end, progress or Progress()),
                                       _check_positions(tx, end), _check_attempts(tx, end),
                                       _check_ids(tx, end)):
            findings.append(finding)
    except StoreError as error:
        findings.append(str(error))
    except (struct.error, ValueError, IndexError) as error:
        # A record was cut, or is of another database.
        findings.append(f"Expected to decode every record, but got: {error}")
    return findings


def _check_log(tx: Tx, log_end: int, progress: Progress) -> Iterator[str]:
    """Check the blocks, their order, their totals and the checksums of their messages."""
    audiences = log.read_audiences(tx)
    cursor = tx.cursor()
    found = log.head(cursor)
    begin = found.first if found is not None else fmt.FIRST_NUMBER
    progress.begin("messages", total=log_end - begin)
    end, time_ns = fmt.FIRST_NUMBER, 0
    totals: tuple[int, int, list[int]] | None = None
    while found is not None:
        first, block, value = found
        where = f"the block at message {first}"
        if first < end:
            yield f"Expected {where} to begin at or after {end}"
        if block.time_ns < time_ns:
            yield f"Expected {where} not to be older than the one before it"
        if block.audience and block.audience not in audiences:
            yield f"Expected {where} to have a known audience, but got: {block.audience}"
        size = yield from _check_messages(found)
        given = (block.total_count, block.total_bytes, list(fmt.unpack_totals(value, block)))
        if totals is not None:
            of_audiences = totals[2] + [0] * (len(given[2]) - len(totals[2]))
            if block.audience:
                of_audiences[block.audience - 1] += block.messages
            expected = (totals[0] + block.messages, totals[1] + size, of_audiences)
            if given != expected:
                yield f"Expected {where} to have the totals {expected}, but got: {given}"
        totals = given
        end = fmt.end_of(first, block)
        time_ns = block.time_ns
        progress.done = end - begin
        found = log.following(cursor)


def _check_messages(found: log.Found) -> Generator[str, None, int]:
    """Check the messages of one block; return their size."""
    first, block, value = found
    for index in range(block.messages):
        try:
            fmt.copy_message(value, block, index, first + index)
        except CorruptMessageError as error:
            yield str(error)
    return fmt.size_before(value, block, block.messages)


def _check_positions(tx: Tx, log_end: int) -> Iterator[str]:
    """Check positions, and the ranges that were acknowledged ahead of them."""
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
            if not subscriber.flags & fmt.FLAG_MAY_HAVE_RANGES:
                yield f"Expected {where} to be flagged, since it has ranges"
            if begin <= previous or end <= begin or end > log_end:
                yield (f"Expected the range {begin}-{end} of {where} after {previous} and at most "
                       f"at {log_end}")
            previous = end
    for ahead_key, ahead_value in tx.txn.cursor(db=tx.db.ahead):
        ordinal, begin, _ = fmt.unpack_ahead(ahead_key, ahead_value)
        if ordinal not in ordinals:
            yield f"Expected no range at {begin} of the unknown subscriber {ordinal}"


def _check_attempts(tx: Tx, log_end: int) -> Iterator[str]:
    """Check that there are records of attempts only of messages that may be delivered again."""
    flagged = {
        subscriber.ordinal
        for subscriber in positions.read_all(tx) if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS
    }
    for key, value in tx.txn.cursor(db=tx.db.attempts):
        ordinal, number = fmt.unpack_attempts_key(key)
        where = f"the record of attempts for the subscriber {ordinal} at {number}"
        if ordinal not in flagged:
            yield f"Expected {where} to be one of a flagged subscriber"
        if number >= log_end:
            yield f"Expected {where} before {log_end}"
        if not fmt.unpack_attempts(value).deliveries:
            yield f"Expected {where} to count something"


def _check_ids(tx: Tx, log_end: int) -> Iterator[str]:
    """Check that each id is there twice, and is that of a message."""
    for key, value in tx.txn.cursor(db=tx.db.once):
        if bytes(key[:1]) == fmt.ONCE_ID_PREFIX:
            identifier = bytes(key[1:])
            number, time_ns = fmt.unpack_once(value)
            if not fmt.FIRST_NUMBER <= number < log_end:
                yield (f"Expected the id {identifier!r} to be of a message before {log_end}, but "
                       f"got: {number}")
            other = fmt.once_time_key(time_ns, identifier)
        elif bytes(key[:1]) == fmt.ONCE_TIME_PREFIX:
            time_ns, identifier = fmt.unpack_once_time_key(key)
            other = fmt.once_id_key(identifier)
        else:
            yield f"Expected an id or a time in once_db, but got: {bytes(key)!r}"
            continue
        there = tx.txn.get(other, db=tx.db.once)
        if there is None or there and fmt.unpack_once(there)[1] != time_ns:
            yield (f"Expected the id {identifier!r} by itself and by its time {time_ns}, but got: "
                   "one only")
