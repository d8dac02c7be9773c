"""Check all invariants of a store in one snapshot."""

import struct
from collections.abc import Sequence

import lmdb

import persipubsub.errors
from persipubsub import _progress
from persipubsub.store import _blocks, _layout, _log, _positions
from persipubsub.store._databases import Databases


def check(txn: "lmdb.Transaction[memoryview]",
          databases: Databases,
          progress: _progress.Progress | None = None) -> list[str]:
    """
    Walk through the store.

    :param txn: any transaction
    :param databases: handles
    :param progress: counts the numbers of messages that were walked over
    :return: what is wrong; nothing if it is sound
    """
    findings: list[str] = []
    try:
        value = txn.get(_layout.HEADER_KEY, db=databases.meta)
        header = _layout.unpack_header(bytes(value if value is not None else b""), "")
        audiences = _log.read_audiences(txn, databases)
        _check_log(txn, databases, audiences, findings, progress or _progress.Progress())
        _check_positions(txn, databases, header, findings)
        _check_ids(txn, databases, findings)
    except persipubsub.errors.StoreError as error:
        return findings + [str(error)]
    except (struct.error, ValueError, IndexError) as error:
        # A record that was cut, or is of another database.
        return findings + [f"Expected to decode every record, but got: {error}"]
    return findings


def _check_log(txn: "lmdb.Transaction[memoryview]", databases: Databases,
               audiences: dict[int, tuple[str, ...]], findings: list[str],
               progress: _progress.Progress) -> None:
    """
    Check the blocks, their order, their totals and the checksums of their messages.

    :param txn: any transaction
    :param databases: handles
    :param audiences: those that exist
    :param findings: to be extended
    :param progress: to be counted up
    """
    cursor = txn.cursor(db=databases.data)
    found = _log.head(cursor)
    begin = found.first if found is not None else _layout.FIRST_NUMBER
    progress.begin("messages",
                   total=_log.read_tail(txn.cursor(db=databases.data)).next_number - begin)
    previous_end = _layout.FIRST_NUMBER
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
        if not block.messages and _blocks.end_of(first, block) != _log.read_tail(
                txn.cursor(db=databases.data)).next_number and first < previous_end:
            findings.append(f"Expected {where} to hold messages")
        size = _check_messages(first, block, value, findings)
        totals = _blocks.unpack_totals(value, block)
        if previous is not None:
            _check_totals(where, block, size, totals, previous, findings)
        previous = (block.total_count, block.total_bytes, totals)
        previous_end = _blocks.end_of(first, block)
        previous_time = block.time_ns
        progress.done = previous_end - begin
        found = _log.following(cursor)


def _check_messages(first: int, block: _blocks.Block, value: memoryview,
                    findings: list[str]) -> int:
    """
    Check the messages of one block.

    :param first: number of its first message
    :param block: its record
    :param value: of the block
    :param findings: to be extended
    :return: bytes of its messages
    """
    size = 0
    for index in range(block.messages):
        try:
            size += len(_blocks.copy_message(value, block, index, first + index))
        except persipubsub.errors.CorruptMessageError as error:
            findings.append(str(error))
            size = _blocks.size_before(value, block, index + 1)
    return size


def _check_totals(where: str, block: _blocks.Block, size: int, totals: tuple[int, ...],
                  previous: tuple[int, int, tuple[int, ...]], findings: list[str]) -> None:
    """
    Check that the totals of a block are those of the block before it and its own messages.

    :param where: the block is, for findings
    :param block: its record
    :param size: bytes of its messages
    :param totals: of its audiences
    :param previous: totals of the block before it
    :param findings: to be extended
    """
    expected = list(previous[2]) + [0] * (len(totals) - len(previous[2]))
    if block.audience:
        expected[block.audience - 1] += block.messages
    if (block.total_count, block.total_bytes, list(totals)) != (previous[0] + block.messages,
                                                                previous[1] + size, expected):
        findings.append("Expected {} to have the totals {}, but got: {}".format(
            where, (previous[0] + block.messages, previous[1] + size, expected),
            (block.total_count, block.total_bytes, list(totals))))


def _check_positions(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                     header: _layout.Header, findings: list[str]) -> None:
    """
    Check positions, and the ranges that were acknowledged ahead of them.

    :param txn: any transaction
    :param databases: handles
    :param header: of the store
    :param findings: to be extended
    """
    tail = _log.read_tail(txn.cursor(db=databases.data))
    ordinals: set[int] = set()
    for key, subscriber in _positions.read_all(txn, databases):
        where = f"the subscriber {key.decode('utf-8', 'replace')!r}"
        if subscriber.ordinal in ordinals or subscriber.ordinal >= header.next_ordinal:
            findings.append(
                f"Expected {where} to have an ordinal of its own, but got: {subscriber.ordinal}")
        ordinals.add(subscriber.ordinal)
        if not _layout.FIRST_NUMBER <= subscriber.position <= tail.next_number:
            findings.append(
                f"Expected the position of {where} to be at most {tail.next_number}, but got: "
                f"{subscriber.position}")
        _check_ranges(where, subscriber, tail,
                      list(_positions.ranges(txn, databases, subscriber.ordinal)), findings)
    for ahead_key, ahead_value in txn.cursor(db=databases.ahead):
        ordinal, begin, _ = _layout.unpack_ahead(ahead_key, ahead_value)
        if ordinal not in ordinals:
            findings.append(f"Expected no range at {begin} of the unknown subscriber {ordinal}")
    _check_attempts(txn, databases, tail, findings)


def _check_attempts(txn: "lmdb.Transaction[memoryview]", databases: Databases, tail: _log.Tail,
                    findings: list[str]) -> None:
    """
    Check that there are records of attempts only of messages that may be delivered again.

    Those in front of a position go little by little: as long as any are left, the subscriber is
    flagged, and each time its record is written some of them go.

    :param txn: any transaction
    :param databases: handles
    :param tail: end of the log
    :param findings: to be extended
    """
    flagged = {
        subscriber.ordinal
        for _, subscriber in _positions.read_all(txn, databases)
        if subscriber.flags & _layout.FLAG_MAY_HAVE_ATTEMPTS
    }
    for key, value in txn.cursor(db=databases.attempts):
        ordinal, number = _layout.unpack_attempts_key(key)
        attempts = _layout.unpack_attempts(value)
        where = f"the record of attempts for the subscriber {ordinal} at {number}"
        if ordinal not in flagged:
            findings.append(f"Expected {where} to be one of a flagged subscriber")
        if number >= tail.next_number:
            findings.append(f"Expected {where} in front of {tail.next_number}")
        if not attempts.deliveries:
            findings.append(f"Expected {where} to count something")


def _check_ranges(where: str, subscriber: _layout.Subscriber, tail: _log.Tail,
                  ranges: Sequence[tuple[int, int]], findings: list[str]) -> None:
    """
    Check that ranges are ahead of the position, in order and apart from each other.

    :param where: whose ranges they are
    :param subscriber: record
    :param tail: end of the log
    :param ranges: first number and number behind each
    :param findings: to be extended
    """
    previous = subscriber.position
    if ranges and not subscriber.flags & _layout.FLAG_MAY_HAVE_RANGES:
        findings.append(f"Expected {where} to be flagged, since it has ranges")
    for begin, end in ranges:
        if begin <= previous or end <= begin or end > tail.next_number:
            findings.append(
                f"Expected the range {begin}-{end} of {where} behind {previous} and at most at "
                f"{tail.next_number}")
        previous = end


def _check_ids(txn: "lmdb.Transaction[memoryview]", databases: Databases,
               findings: list[str]) -> None:
    """
    Check that each id of a message is found by itself and by its time, and was given to a message.

    :param txn: any transaction
    :param databases: handles
    :param findings: to be extended
    """
    tail = _log.read_tail(txn.cursor(db=databases.data))
    for key, value in txn.cursor(db=databases.once):
        if bytes(key[:1]) == _layout.ONCE_ID_PREFIX:
            identifier = bytes(key[1:])
            number, time_ns = _layout.unpack_once(value)
            if not _layout.FIRST_NUMBER <= number < tail.next_number:
                findings.append(f"Expected the id {identifier!r} to be of a message before "
                                f"{tail.next_number}, but got: {number}")
            other = _layout.once_time_key(time_ns, identifier)
        elif bytes(key[:1]) == _layout.ONCE_TIME_PREFIX:
            time_ns, identifier = _layout.unpack_once_time_key(key)
            other = _layout.once_id_key(identifier)
        else:
            findings.append(f"Expected an id or a time in once_db, but got: {bytes(key)!r}")
            continue
        there = txn.get(other, db=databases.once)
        if there is None or there and _layout.unpack_once(there)[1] != time_ns:
            findings.append(
                f"Expected the id {identifier!r} by itself and by its time {time_ns}, but got: "
                f"one only")
