"""Check all invariants of a store in one snapshot."""

import struct
from typing import Dict, List, Optional, Sequence, Set, Tuple

import lmdb

import persipubsub.errors
from persipubsub import _progress
from persipubsub.store import _blocks, _layout, _log, _positions
from persipubsub.store._databases import Databases


def check(txn: "lmdb.Transaction[memoryview]",
          databases: Databases,
          progress: Optional[_progress.Progress] = None) -> List[str]:
    """
    Walk through the store.

    :param txn: any transaction
    :param databases: handles
    :param progress: counts the numbers of messages that were walked over
    :return: what is wrong; nothing if it is sound
    """
    findings = []  # type: List[str]
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
        return findings + ["Expected to decode every record, but got: {}".format(error)]
    return findings


def _check_log(txn: "lmdb.Transaction[memoryview]", databases: Databases,
               audiences: Dict[int, Tuple[str, ...]], findings: List[str],
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
    previous = None  # type: "Tuple[int, int, Tuple[int, ...]] | None"
    while found is not None:
        first, block, value = found
        where = "the block at message {}".format(first)
        if first < previous_end:
            findings.append("Expected {} to begin at or behind {}".format(where, previous_end))
        if block.time_ns < previous_time:
            findings.append("Expected {} not to be older than the one before it".format(where))
        if block.audience and block.audience not in audiences:
            findings.append("Expected {} to have a known audience, but got: {}".format(
                where, block.audience))
        if not block.messages and _blocks.end_of(first, block) != _log.read_tail(
                txn.cursor(db=databases.data)).next_number and first < previous_end:
            findings.append("Expected {} to hold messages".format(where))
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
                    findings: List[str]) -> int:
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


def _check_totals(where: str, block: _blocks.Block, size: int, totals: Tuple[int, ...],
                  previous: Tuple[int, int, Tuple[int, ...]], findings: List[str]) -> None:
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
                     header: _layout.Header, findings: List[str]) -> None:
    """
    Check positions, and the ranges that were acknowledged ahead of them.

    :param txn: any transaction
    :param databases: handles
    :param header: of the store
    :param findings: to be extended
    """
    tail = _log.read_tail(txn.cursor(db=databases.data))
    ordinals = set()  # type: Set[int]
    for key, subscriber in _positions.read_all(txn, databases):
        where = "the subscriber {!r}".format(key.decode("utf-8", "replace"))
        if subscriber.ordinal in ordinals or subscriber.ordinal >= header.next_ordinal:
            findings.append("Expected {} to have an ordinal of its own, but got: {}".format(
                where, subscriber.ordinal))
        ordinals.add(subscriber.ordinal)
        if not _layout.FIRST_NUMBER <= subscriber.position <= tail.next_number:
            findings.append("Expected the position of {} to be at most {}, but got: {}".format(
                where, tail.next_number, subscriber.position))
        _check_ranges(where, subscriber, tail,
                      list(_positions.ranges(txn, databases, subscriber.ordinal)), findings)
    for ahead_key, ahead_value in txn.cursor(db=databases.ahead):
        ordinal, begin, _ = _layout.unpack_ahead(ahead_key, ahead_value)
        if ordinal not in ordinals:
            findings.append("Expected no range at {} of the unknown subscriber {}".format(
                begin, ordinal))
    _check_attempts(txn, databases, tail, findings)


def _check_attempts(txn: "lmdb.Transaction[memoryview]", databases: Databases, tail: _log.Tail,
                    findings: List[str]) -> None:
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
        where = "the record of attempts for the subscriber {} at {}".format(ordinal, number)
        if ordinal not in flagged:
            findings.append("Expected {} to be one of a flagged subscriber".format(where))
        if number >= tail.next_number:
            findings.append("Expected {} in front of {}".format(where, tail.next_number))
        if not attempts.deliveries:
            findings.append("Expected {} to count something".format(where))


def _check_ranges(where: str, subscriber: _layout.Subscriber, tail: _log.Tail,
                  ranges: Sequence[Tuple[int, int]], findings: List[str]) -> None:
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
        findings.append("Expected {} to be flagged, since it has ranges".format(where))
    for begin, end in ranges:
        if begin <= previous or end <= begin or end > tail.next_number:
            findings.append("Expected the range {}-{} of {} behind {} and at most at {}".format(
                begin, end, where, previous, tail.next_number))
        previous = end


def _check_ids(txn: "lmdb.Transaction[memoryview]", databases: Databases,
               findings: List[str]) -> None:
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
                findings.append(
                    "Expected the id {!r} to be of a message before {}, but got: {}".format(
                        identifier, tail.next_number, number))
            other = _layout.once_time_key(time_ns, identifier)
        elif bytes(key[:1]) == _layout.ONCE_TIME_PREFIX:
            time_ns, identifier = _layout.unpack_once_time_key(key)
            other = _layout.once_id_key(identifier)
        else:
            findings.append("Expected an id or a time in once_db, but got: {!r}".format(bytes(key)))
            continue
        there = txn.get(other, db=databases.once)
        if there is None or there and _layout.unpack_once(there)[1] != time_ns:
            findings.append("Expected the id {!r} by itself and by its time {}, but got: one "
                            "only".format(identifier, time_ns))
