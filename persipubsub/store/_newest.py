"""Find the newest message of a subscriber and skip to it, inside of a transaction."""

import functools
from collections.abc import Callable, Iterator
from typing import AbstractSet

import lmdb

from persipubsub.store import _attempts, _blocks, _deliveries, _layout, _log, _pending, _positions
from persipubsub.store._databases import Databases


def find(
        txn: "lmdb.Transaction[memoryview]", databases: Databases, pending: _pending.Pending,
        stuck: AbstractSet[int]) -> _pending.Candidate | _pending.Expired | _pending.Resting | None:
    """
    Find the newest message that is pending. Messages for others behind it are walked over.

    :param txn: any transaction
    :param databases: handles
    :param pending: messages of the subscriber
    :param stuck: numbers to walk over, too, if they still are not to be delivered any more
    :return: message; that it is too old; when it is due; None if there is none
    :raise NotInitializedError: if the subscriber was removed, even if it was added again
    """
    subscriber = _positions.require(txn, databases, pending.key)
    if subscriber.ordinal != pending.ordinal:
        raise pending.replaced()
    is_own = functools.partial(pending.is_addressed, txn, databases)
    for number, block in _newest_first(txn, databases, subscriber, is_own):
        attempts = None
        if subscriber.flags & _layout.FLAG_MAY_HAVE_ATTEMPTS:
            attempts = _attempts.read(txn, databases, subscriber.ordinal, number)
        if (attempts is not None and number in stuck
                and pending.policy.is_spent(attempts.deliveries)):
            continue
        if block.time_ns < pending.now_ns() - pending.timeout_ns:
            return _pending.Expired()
        if attempts is not None and attempts.due_ns > pending.now_ns():
            return _pending.Resting(attempts.due_ns)
        return _pending.Candidate(begin=number, number=number, due_ns=0)
    return None


def _newest_first(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                  subscriber: _layout.Subscriber,
                  is_own: Callable[[int], bool]) -> Iterator[tuple[int, _blocks.Block]]:
    """
    Iterate over the messages that a subscriber still has to acknowledge, from the newest one on.

    :param txn: any transaction; nothing may be written to ``data_db`` or ``ahead_db`` meanwhile
    :param databases: handles
    :param subscriber: its record
    :param is_own: tells whether an audience is one of the subscriber's
    :return: number and block of each
    """
    ranges: list[tuple[int, int]] = []
    if subscriber.flags & _layout.FLAG_MAY_HAVE_RANGES:
        ranges = list(_positions.ranges(txn, databases, subscriber.ordinal))
    found = _log.last(cursor := txn.cursor(db=databases.data))
    while found is not None and found.first + found.block.messages > subscriber.position:
        if found.block.messages and is_own(found.block.audience):
            first = max(found.first, subscriber.position)
            number = found.first + found.block.messages - 1
            for begin, end in reversed(ranges):
                for other in range(number, max(first, end) - 1, -1):
                    yield other, found.block
                number = min(number, begin - 1)
            for other in range(number, first - 1, -1):
                yield other, found.block
        found = _log.preceding(cursor)


def skip_to(txn: "lmdb.Transaction[memoryview]", databases: Databases, pending: _pending.Pending,
            stuck: AbstractSet[int], take: Callable[[int], bool]) -> _pending.Copied | None:
    """
    Claim and copy the newest message, and acknowledge all in front of it.

    Nothing is skipped for a message that is not delivered.

    :param txn: write transaction
    :param databases: handles
    :param pending: messages of the subscriber
    :param stuck: numbers of newer ones that are not to be delivered any more
    :param take: claims a message, without waiting; tells whether it did
    :return: message; None if there is none, or somebody else has it
    :raise CorruptMessageError: if it is damaged
    """
    newest = find(txn, databases, pending, stuck)
    if not isinstance(newest, _pending.Candidate) or not take(newest.number):
        return None
    number = newest.number
    if pending.policy.max_deliveries:
        copied = _deliveries.begin(txn, databases, pending, number, number + 1)
    else:
        copied = pending.copy(txn, databases, number, number + 1)
    if copied.is_spent or not copied.numbers:
        return copied
    _skip(txn, databases, pending.key, number)
    return copied


def skip_to_newest(txn: "lmdb.Transaction[memoryview]", databases: Databases, key: bytes) -> int:
    """
    Acknowledge all messages of a subscriber but the newest one that it has not acknowledged yet.

    :param txn: write transaction
    :param databases: handles
    :param key: id of the subscriber, in UTF-8
    :return: how many messages were acknowledged
    """
    subscriber = _positions.require(txn, databases, key)
    own = {_layout.EVERYONE, *_positions.audiences_of(_log.read_audiences(txn, databases), key)}
    newest = next(_newest_first(txn, databases, subscriber, own.__contains__), None)
    return 0 if newest is None else _skip(txn, databases, key, newest[0])


def _skip(txn: "lmdb.Transaction[memoryview]", databases: Databases, key: bytes,
          number: int) -> int:
    """
    Acknowledge all messages in front of one, as skipped.

    :param txn: write transaction
    :param databases: handles
    :param key: id of the subscriber, in UTF-8
    :param number: of the message
    :return: how many were acknowledged
    """
    subscriber = _positions.require(txn, databases, key)
    audiences = _positions.audiences_of(_log.read_audiences(txn, databases), key)
    skipped = _positions.count_pending(txn, databases, subscriber, audiences, 0, number)
    if number > subscriber.position:
        moved, _ = _positions.acknowledge(txn, databases, subscriber, subscriber.position, number)
        _positions.write(txn, databases, key, moved._replace(skipped=moved.skipped + skipped))
    return skipped
