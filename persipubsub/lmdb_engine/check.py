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
        if first < end or block.time_ns < time_ns:
            yield f"Expected {where} to begin at or after {end}, and not before the time {time_ns}"
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


def _check_attempts(tx: Tx, log_end: int) -> Iterator[str]:
    """Check that there are records of attempts only of messages that may be delivered again."""
    flagged = {
        subscriber.ordinal
        for subscriber in positions.read_all(tx) if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS
    }
    for key, value in tx.txn.cursor(db=tx.db.attempts):
        ordinal, number = fmt.unpack_attempts_key(key)
        deliveries = fmt.unpack_attempts(value).deliveries
        if ordinal not in flagged or number >= log_end or not deliveries:
            yield (
                f"Expected a record of attempts to be of a flagged subscriber, before {log_end}, "
                f"and to count something, but got: the subscriber {ordinal} at {number} with "
                f"{deliveries} deliveries")


def _check_ids(tx: Tx, log_end: int) -> Iterator[str]:
    """Check that each id is there twice, and is that of a message."""
    count = 0
    for key, value in tx.txn.cursor(db=tx.db.once):
        if bytes(key[:1]) == fmt.ONCE_ID_PREFIX:
            count += 1
            identifier = bytes(key[1:])
            number, time_ns = fmt.unpack_once(value)
            is_timed = tx.txn.get(fmt.once_time_key(time_ns, identifier), db=tx.db.once) is not None
            if not (fmt.FIRST_NUMBER <= number < log_end and is_timed):
                yield (
                    f"Expected the id {identifier!r} to be of a message before {log_end}, and to "
                    f"be found by its time {time_ns}, but got: the message {number}")
    entries = tx.txn.stat(tx.db.once)["entries"]
    if entries != 2 * count:
        yield f"Expected an entry and a time for {count} ids, but got: {entries} entries"
