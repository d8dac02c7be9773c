"""
Acknowledge messages of one subscriber, inside of a write transaction.

In order, the position moves over them. Otherwise they are a range ahead of it until it comes there.
"""

import lmdb

from persipubsub.store import _attempts, _blocks, _layout, _log, _pending, _positions
from persipubsub.store._databases import Databases


def acknowledge(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                pending: _pending.Pending, begin: int, numbers: list[int]) -> int:
    """
    Move the position over messages, or add a range ahead of it.

    :param txn: write transaction
    :param databases: handles
    :param pending: messages of the subscriber
    :param begin: everything from here to the first message is done or not for the subscriber
    :param numbers: of the messages, in order
    :return: position afterwards; 0 if the subscriber was removed
    """
    value = txn.get(pending.key, None, databases.pending)
    if value is None:
        return 0
    in_order = _layout.acknowledge_in_order(value, pending.ordinal, numbers, pending.now_ns())
    if in_order is not None:
        position = numbers[-1] + 1
        txn.put(pending.key, in_order, db=databases.pending)
    else:
        position = _acknowledge_out_of_order(txn, databases, pending, begin, numbers)
    if position >= pending.end:
        cursor = txn.cursor(db=databases.data)
        if cursor.last():
            key, last = cursor.item()
            pending.end = _layout.unpack_number(key) + _blocks.guess_messages(last)
    return position


def _acknowledge_out_of_order(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                              pending: _pending.Pending, begin: int, numbers: list[int]) -> int:
    """
    Acknowledge messages in any state of the subscriber.

    :param txn: write transaction
    :param databases: handles
    :param pending: messages of the subscriber
    :param begin: everything from here to the first message is done or not for the subscriber
    :param numbers: of the messages
    :return: position afterwards
    """
    subscriber = _positions.require(txn, databases, pending.key)
    if subscriber.ordinal != pending.ordinal:
        # It was removed and added again: another subscriber of the same name.
        return subscriber.position
    # Those that were neither dropped nor skipped while they were being worked on.
    count = sum(is_pending(txn, databases, subscriber, number) for number in numbers)
    runs = [(numbers[0], numbers[-1] + 1)]
    if (numbers[-1] - numbers[0] + 1 > len(numbers)
            and _count_pending(txn, databases, pending.key, subscriber, *runs[0]) > count):
        # A seek brought back what lies between them: others have it, or will.
        runs = _runs_of(numbers)
    moved = subscriber
    for first, end in runs:
        moved, _ = _positions.acknowledge(
            txn, databases, moved, begin_of(txn, databases, pending.key, moved, begin, first), end)
        begin = end
    if subscriber.flags & _layout.FLAG_MAY_HAVE_ATTEMPTS:
        for number in numbers:
            _attempts.forget(txn, databases, subscriber.ordinal, number)
    if count:
        moved = moved._replace(acknowledged=moved.acknowledged + count,
                               acknowledged_ns=pending.now_ns())
    if moved != subscriber:
        _positions.write(txn, databases, pending.key, moved)
    return moved.position


def begin_of(txn: "lmdb.Transaction[memoryview]", databases: Databases, key: bytes,
             subscriber: _layout.Subscriber, begin: int, number: int) -> int:
    """
    Look whether what lies in front of a message is still done or not for the subscriber.

    It is not after a seek to what lies in between, which is to be received again.

    :param txn: any transaction
    :param databases: handles
    :param key: id of the subscriber, in UTF-8
    :param subscriber: its record
    :param begin: everything from here to the message was, when it was taken
    :param number: of the message
    :return: from where on to acknowledge
    """
    if begin >= number or _count_pending(txn, databases, key, subscriber, begin, number):
        return number
    return begin


def is_pending(txn: "lmdb.Transaction[memoryview]", databases: Databases,
               subscriber: _layout.Subscriber, number: int) -> bool:
    """
    Tell whether a message was neither acknowledged, dropped nor skipped.

    :param txn: any transaction
    :param databases: handles
    :param subscriber: to whom it is addressed
    :param number: of the message
    :return: True if it is pending
    """
    if number < subscriber.position:
        return False
    found = _log.seek(txn.cursor(db=databases.data), number)
    return (found is not None and found.first <= number < found.first + found.block.messages
            and _positions.skip_ahead(txn, databases, subscriber.ordinal, number) == number)


def _count_pending(txn: "lmdb.Transaction[memoryview]", databases: Databases, key: bytes,
                   subscriber: _layout.Subscriber, begin: int, end: int) -> int:
    """
    Count what the subscriber still has to acknowledge in a range.

    :param txn: any transaction
    :param databases: handles
    :param key: id of the subscriber, in UTF-8
    :param subscriber: its record
    :param begin: first number
    :param end: number behind the last one
    :return: number of messages
    """
    own = _positions.audiences_of(_log.read_audiences(txn, databases), key)
    return _positions.count_pending(txn, databases, subscriber, own, begin, end)


def _runs_of(numbers: list[int]) -> list[tuple[int, int]]:
    """
    Split numbers where one is missing.

    :param numbers: in order
    :return: first number of each part, number behind its last one
    """
    runs = [(numbers[0], numbers[0] + 1)]
    for number in numbers[1:]:
        if number == runs[-1][1]:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
