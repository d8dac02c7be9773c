"""Check all invariants of a store in one snapshot."""

import struct
from collections.abc import Sequence

import persipubsub.errors
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, positions
from persipubsub.lmdb_engine.format import Tx
from persipubsub.statistics import Progress


def check(tx: Tx, progress: Progress | None = None) -> list[str]:
    """Walk through the store; return what is wrong."""
    findings: list[str] = []
    try:
        value = tx.txn.get(fmt.HEADER_KEY, db=tx.db.meta)
        header = fmt.unpack_header(bytes(value if value is not None else b""), "")
        audiences = log.read_audiences(tx)
        _check_log(tx, audiences, findings, progress or Progress())
        _check_positions(tx, header, findings)
        _check_ids(tx, findings)
    except persipubsub.errors.StoreError as error:
        return findings + [str(error)]
    except (struct.error, ValueError, IndexError) as error:
        # A record that was cut, or is of another database.
        return findings + [f"Expected to decode every record, but got: {error}"]
    return findings


def _check_log(tx: Tx, audiences: dict[int, tuple[str, ...]], findings: list[str],
               progress: Progress) -> None:
    """Check the blocks, their order, their totals and the checksums of their messages."""
    cursor = tx.cursor()
    found = log.head(cursor)
    begin = found.first if found is not None else fmt.FIRST_NUMBER
    progress.begin("messages", total=log.read_end(tx.cursor()).next_number - begin)
    previous_end = fmt.FIRST_NUMBER
    previous_time = 0
    previous: "tuple[int, int, tuple[int, ...]] | None" = None
    while found is not None:
        first, block, value = found
        where = f"the block at message {first}"
        if first < previous_end:
            findings.append(f"Expected {where} to begin at or behind {previous_end}")
        if block.time_ns < previous_time:
            findings.append(f"Expected {where} not to be older than the one before it")
        if block.audience and block.audience not in audiences:
            findings.append(f"Expected {where} to have a known audience, but got: {block.audience}")
        if not block.messages and fmt.end_of(first, block) != log.read_end(
                tx.cursor()).next_number and first < previous_end:
            findings.append(f"Expected {where} to hold messages")
        size = _check_messages(first, block, value, findings)
        totals = fmt.unpack_totals(value, block)
        if previous is not None:
            _check_totals(where, block, size, totals, previous, findings)
        previous = (block.total_count, block.total_bytes, totals)
        previous_end = fmt.end_of(first, block)
        previous_time = block.time_ns
        progress.done = previous_end - begin
        found = log.following(cursor)


def _check_messages(first: int, block: fmt.Block, value: memoryview, findings: list[str]) -> int:
    """Check the messages of one block."""
    size = 0
    for index in range(block.messages):
        try:
            size += len(fmt.copy_message(value, block, index, first + index))
        except persipubsub.errors.CorruptMessageError as error:
            findings.append(str(error))
            size = fmt.size_before(value, block, index + 1)
    return size


def _check_totals(where: str, block: fmt.Block, size: int, totals: tuple[int, ...],
                  previous: tuple[int, int, tuple[int, ...]], findings: list[str]) -> None:
    """Check the totals of a block against those of the block before it."""
    expected = list(previous[2]) + [0] * (len(totals) - len(previous[2]))
    if block.audience:
        expected[block.audience - 1] += block.messages
    if (block.total_count, block.total_bytes, list(totals)) != (previous[0] + block.messages,
                                                                previous[1] + size, expected):
        findings.append("Expected {} to have the totals {}, but got: {}".format(
            where, (previous[0] + block.messages, previous[1] + size, expected),
            (block.total_count, block.total_bytes, list(totals))))


def _check_positions(tx: Tx, header: fmt.Header, findings: list[str]) -> None:
    """Check positions, and the ranges that were acknowledged ahead of them."""
    log_end = log.read_end(tx.cursor())
    ordinals: set[int] = set()
    for subscriber in positions.read_all(tx):
        where = f"the subscriber {subscriber.key.decode('utf-8', 'replace')!r}"
        if subscriber.ordinal in ordinals or subscriber.ordinal >= header.next_ordinal:
            findings.append(
                f"Expected {where} to have an ordinal of its own, but got: {subscriber.ordinal}")
        ordinals.add(subscriber.ordinal)
        if not fmt.FIRST_NUMBER <= subscriber.position <= log_end.next_number:
            findings.append(
                f"Expected the position of {where} to be at most {log_end.next_number}, but got: "
                f"{subscriber.position}")
        _check_ranges(where, subscriber, log_end, list(positions.ranges(tx, subscriber.ordinal)),
                      findings)
    for ahead_key, ahead_value in tx.txn.cursor(db=tx.db.ahead):
        ordinal, begin, _ = fmt.unpack_ahead(ahead_key, ahead_value)
        if ordinal not in ordinals:
            findings.append(f"Expected no range at {begin} of the unknown subscriber {ordinal}")
    _check_attempts(tx, log_end, findings)


def _check_attempts(tx: Tx, log_end: log.LogEnd, findings: list[str]) -> None:
    """Check that there are records of attempts only of messages that may be delivered again."""
    flagged = {
        subscriber.ordinal
        for subscriber in positions.read_all(tx) if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS
    }
    for key, value in tx.txn.cursor(db=tx.db.attempts):
        ordinal, number = fmt.unpack_attempts_key(key)
        attempts = fmt.unpack_attempts(value)
        where = f"the record of attempts for the subscriber {ordinal} at {number}"
        if ordinal not in flagged:
            findings.append(f"Expected {where} to be one of a flagged subscriber")
        if number >= log_end.next_number:
            findings.append(f"Expected {where} in front of {log_end.next_number}")
        if not attempts.deliveries:
            findings.append(f"Expected {where} to count something")


def _check_ranges(where: str, subscriber: fmt.Subscriber, log_end: log.LogEnd,
                  ranges: Sequence[tuple[int, int]], findings: list[str]) -> None:
    """Check that ranges are ahead of the position, in order and apart from each other."""
    previous = subscriber.position
    if ranges and not subscriber.flags & fmt.FLAG_MAY_HAVE_RANGES:
        findings.append(f"Expected {where} to be flagged, since it has ranges")
    for begin, end in ranges:
        if begin <= previous or end <= begin or end > log_end.next_number:
            findings.append(
                f"Expected the range {begin}-{end} of {where} behind {previous} and at most at "
                f"{log_end.next_number}")
        previous = end


def _check_ids(tx: Tx, findings: list[str]) -> None:
    """Check that each id is there twice, and is that of a message."""
    log_end = log.read_end(tx.cursor())
    for key, value in tx.txn.cursor(db=tx.db.once):
        if bytes(key[:1]) == fmt.ONCE_ID_PREFIX:
            identifier = bytes(key[1:])
            number, time_ns = fmt.unpack_once(value)
            if not fmt.FIRST_NUMBER <= number < log_end.next_number:
                findings.append(f"Expected the id {identifier!r} to be of a message before "
                                f"{log_end.next_number}, but got: {number}")
            other = fmt.once_time_key(time_ns, identifier)
        elif bytes(key[:1]) == fmt.ONCE_TIME_PREFIX:
            time_ns, identifier = fmt.unpack_once_time_key(key)
            other = fmt.once_id_key(identifier)
        else:
            findings.append(f"Expected an id or a time in once_db, but got: {bytes(key)!r}")
            continue
        there = tx.txn.get(other, db=tx.db.once)
        if there is None or there and fmt.unpack_once(there)[1] != time_ns:
            findings.append(
                f"Expected the id {identifier!r} by itself and by its time {time_ns}, but got: "
                f"one only")
