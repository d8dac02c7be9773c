"""
Record what became of a delivery that did not end well, inside of a transaction.

An acknowledgement is in :py:mod:`persipubsub.store._acknowledging`; here is all the rest:
deliveries that are counted before they begin, those that failed, and messages that are not
delivered any more.
"""

import datetime
import time
from collections.abc import Sequence
from typing import Final

import lmdb

import persipubsub.message
from persipubsub.store import (_acknowledging, _attempts, _blocks, _layout, _log, _pending,
                               _positions)
from persipubsub.store._databases import Databases

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def describe(copied: _pending.Copied,
             pending: _pending.Pending) -> list[persipubsub.message.Message]:
    """
    Tell what is known of messages. No store is touched.

    :param copied: messages
    :param pending: messages of the subscriber
    :return: the same with all that is known
    """
    # By their age: the queue's clock is not that of the wall, which somebody may have set.
    offset_ns = time.time_ns() - pending.now_ns()
    is_counted = pending.policy.max_deliveries > 0
    times: list[datetime.datetime] = []
    for count, time_ns in copied.runs:
        times += [_EPOCH + datetime.timedelta(microseconds=(time_ns + offset_ns) // 1000)] * count
    described = []
    for number, data, sent_at in zip(copied.numbers, copied.messages, times):
        attempts = copied.attempts.get(number)
        count = 0 if attempts is None else attempts.deliveries
        described.append(
            persipubsub.message.Message(data=data,
                                        number=number,
                                        sent_at=sent_at,
                                        attempts=count if is_counted else count + 1))
    return described


def begin(txn: "lmdb.Transaction[memoryview]",
          databases: Databases,
          pending: _pending.Pending,
          number: int,
          end: int,
          is_guess: bool = False) -> _pending.Copied:
    """
    Copy claimed messages, and count their delivery before it begins: crashes count, too.

    :param txn: write transaction
    :param databases: handles
    :param pending: messages of the subscriber
    :param number: of the first message
    :param end: number behind the last one to look at
    :param is_guess: True if it is the next one only if the position is still there
    :return: messages with what is known of their deliveries, this one included
    :raise CorruptMessageError: if the first one is damaged
    """
    copied = pending.copy(txn, databases, number, end, is_guess)
    if copied.is_spent or not copied.numbers:
        return copied
    counted: dict[int, _layout.Attempts] = {}
    for found in copied.numbers:
        before = copied.attempts.get(found)
        if before is None:
            before = _layout.Attempts(0, 0, pending.now_ns(), 0, "")
        counted[found] = before._replace(deliveries=before.deliveries + 1,
                                         flags=_layout.FLAG_IS_BEGUN)
        _attempts.write(txn, databases, pending.ordinal, found, counted[found])
    _flag(txn, databases, pending.key)
    return copied._replace(attempts=counted)


def _flag(txn: "lmdb.Transaction[memoryview]", databases: Databases, key: bytes) -> None:
    """
    Say that a subscriber has records of attempts.

    :param txn: write transaction
    :param databases: handles
    :param key: id of the subscriber, in UTF-8
    """
    subscriber = _positions.require(txn, databases, key)
    if not subscriber.flags & _layout.FLAG_MAY_HAVE_ATTEMPTS:
        _positions.write(
            txn, databases, key,
            subscriber._replace(flags=subscriber.flags | _layout.FLAG_MAY_HAVE_ATTEMPTS))


def fail(txn: "lmdb.Transaction[memoryview]", databases: Databases, pending: _pending.Pending,
         numbers: Sequence[int], error: str) -> list[int]:
    """
    Record that a delivery failed.

    :param txn: write transaction
    :param databases: handles
    :param pending: messages of the subscriber
    :param numbers: of the messages that were delivered
    :param error: what it ended with
    :return: numbers of those that are not to be delivered any more
    """
    subscriber = _positions.read(txn, databases, pending.key)
    if subscriber is None or subscriber.ordinal != pending.ordinal:
        return []
    spent: list[int] = []
    now_ns = pending.now_ns()
    flags = subscriber.flags
    for number in numbers:
        if not _acknowledging.is_pending(txn, databases, subscriber, number):
            continue
        before = _attempts.read(txn, databases, pending.ordinal, number)
        if before is None:
            before = _layout.Attempts(0, 0, now_ns, 0, "")
        # Counted when it began, unless nothing limits the deliveries. What began when something did
        # was another delivery, of a consumer that was killed.
        is_counted = pending.policy.max_deliveries and before.flags & _layout.FLAG_IS_BEGUN
        count = before.deliveries + (0 if is_counted else 1)
        is_spent = pending.policy.is_spent(count)
        due_ns = 0
        if pending.policy.delay_ns and not is_spent:
            due_ns = now_ns + pending.policy.delay_after(count)
        # Nobody is told the text of what is delivered for ever.
        text = error[:_attempts.ERROR_CHARACTERS] if pending.policy.max_deliveries else ""
        _attempts.write(txn, databases, pending.ordinal, number,
                        _layout.Attempts(count, 0, before.since_ns, due_ns, text))
        flags |= _layout.FLAG_MAY_HAVE_ATTEMPTS
        if is_spent:
            spent.append(number)
    _positions.write(txn, databases, pending.key,
                     subscriber._replace(failed=subscriber.failed + len(numbers), flags=flags))
    return spent


def copy_spent(txn: "lmdb.Transaction[memoryview]", databases: Databases, pending: _pending.Pending,
               number: int) -> _pending.Copied | None:
    """
    Copy a message whose last delivery failed, however old it is.

    It was in time when that delivery began. To look at its age again was rejected: it would stay
    until the timeout drops it, although it was delivered as often as it may be.

    :param txn: any transaction
    :param databases: handles
    :param pending: messages of the subscriber
    :param number: of the message, which is claimed
    :return: message with its record; None if it left the queue meanwhile, or begins anew
    :raise CorruptMessageError: if it is damaged
    """
    attempts = _attempts.read(txn, databases, pending.ordinal, number)
    if attempts is None:
        # The record left with the message, or with the subscriber.
        return None
    subscriber = _positions.require(txn, databases, pending.key)
    if not _acknowledging.is_pending(txn, databases, subscriber, number):
        return None
    found = _log.seek(txn.cursor(db=databases.data), number)
    assert found is not None, "The message was found in the same snapshot."
    message = _blocks.copy_message(found.value, found.block, number - found.first, number)
    return _pending.Copied([number], [message], [(1, found.block.time_ns)], {number: attempts},
                           is_spent=True)


def take_back(txn: "lmdb.Transaction[memoryview]", databases: Databases, pending: _pending.Pending,
              numbers: Sequence[int]) -> None:
    """
    Take the count of a delivery back: nobody worked on the messages.

    :param txn: write transaction
    :param databases: handles
    :param pending: messages of the subscriber
    :param numbers: of the messages
    """
    subscriber = _positions.read(txn, databases, pending.key)
    if subscriber is None or subscriber.ordinal != pending.ordinal:
        return
    for number in numbers:
        before = _attempts.read(txn, databases, pending.ordinal, number)
        if before is None or not before.flags & _layout.FLAG_IS_BEGUN:
            continue
        if before.deliveries > 1:
            _attempts.write(txn, databases, pending.ordinal, number,
                            before._replace(deliveries=before.deliveries - 1, flags=0))
        else:
            _attempts.forget(txn, databases, pending.ordinal, number)
    _positions.write(txn, databases, pending.key, subscriber)


def set_aside(txn: "lmdb.Transaction[memoryview]", databases: Databases, pending: _pending.Pending,
              begin_number: int, number: int) -> None:
    """
    Acknowledge a damaged message.

    :param txn: write transaction
    :param databases: handles
    :param pending: messages of the subscriber
    :param begin_number: everything from here to the message is done or not for the subscriber
    :param number: of the message
    """
    subscriber = _positions.read(txn, databases, pending.key)
    if subscriber is None or subscriber.ordinal != pending.ordinal:
        return
    _attempts.forget(txn, databases, subscriber.ordinal, number)
    start = _acknowledging.begin_of(txn, databases, pending.key, subscriber, begin_number, number)
    moved, fresh = _positions.acknowledge(txn, databases, subscriber, start, number + 1)
    if fresh:
        _positions.write(txn, databases, pending.key, moved._replace(corrupt=moved.corrupt + 1))


def give_up(txn: "lmdb.Transaction[memoryview]", databases: Databases, pending: _pending.Pending,
            number: int) -> None:
    """
    Acknowledge a message that is not delivered any more.

    :param txn: write transaction
    :param databases: handles
    :param pending: messages of the subscriber
    :param number: of the message
    """
    subscriber = _positions.read(txn, databases, pending.key)
    if subscriber is None or subscriber.ordinal != pending.ordinal:
        return
    if not _acknowledging.is_pending(txn, databases, subscriber, number):
        return
    _attempts.forget(txn, databases, subscriber.ordinal, number)
    # Gaps in front of it are passed: what lies behind a position counts as waiting.
    start = _acknowledging.begin_of(txn, databases, pending.key, subscriber, subscriber.position,
                                    number)
    moved, _ = _positions.acknowledge(txn, databases, subscriber, start, number + 1)
    _positions.write(txn, databases, pending.key,
                     moved._replace(dead_lettered=moved.dead_lettered + 1))
