"""
Keep how often messages were delivered to a subscriber, inside of a transaction.

There is a record only for a message whose delivery failed, or is counted before it begins; who has
none of them is not flagged, and pays nothing. A record leaves with its message: when that one is
acknowledged, or when the position passes it.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import lmdb

from persipubsub.store import _layout
from persipubsub.store._databases import Databases

#: So many records are deleted in one transaction, so that clearing a queue in which everything
#: failed does not hold up senders for long. What is left goes with the next ones.
_MOST_DELETED: Final = 4096

#: The delay between two deliveries does not grow further, in nanoseconds.
LONGEST_DELAY_NS: Final = 3600 * 10**9

#: Of the text of an error, so many characters are kept.
ERROR_CHARACTERS: Final = 500


class Policy(NamedTuple):
    """
    Say how often a message is delivered to a subscriber, and how soon again.

    >>> policy = Policy(max_deliveries=3, delay_ns=10)
    >>> policy.is_spent(2), policy.is_spent(3), policy.delay_after(1), policy.delay_after(3)
    (False, True, 10, 40)
    """

    max_deliveries: int = 0  #: 0: any number
    delay_ns: int = 0  #: after the first failure, in nanoseconds; doubled with each further one

    def is_spent(self, count: int) -> bool:
        """
        Tell whether there is no further delivery.

        :param count: deliveries so far
        :return: True if so
        """
        return 0 < self.max_deliveries <= count

    def delay_after(self, count: int) -> int:
        """
        Compute how long a message rests.

        :param count: deliveries that failed, at least 1
        :return: in nanoseconds; at most an hour, or as long as the first delay is
        """
        # Shifted no further than that any delay from a nanosecond on has reached the limit.
        return min(self.delay_ns << min(count - 1, 42), max(LONGEST_DELAY_NS, self.delay_ns))


def read(txn: "lmdb.Transaction[memoryview]", databases: Databases, ordinal: int,
         number: int) -> _layout.Attempts | None:
    """
    Read the attempts to deliver a message.

    :param txn: any transaction
    :param databases: handles
    :param ordinal: of the subscriber
    :param number: of the message
    :return: record; None if there is none
    """
    value = txn.get(_layout.pack_attempts_key(ordinal, number), db=databases.attempts)
    return None if value is None else _layout.unpack_attempts(value)


def write(txn: "lmdb.Transaction[memoryview]", databases: Databases, ordinal: int, number: int,
          attempts: _layout.Attempts) -> None:
    """
    Write the attempts to deliver a message. The subscriber is to be flagged by the caller.

    :param txn: write transaction
    :param databases: handles
    :param ordinal: of the subscriber
    :param number: of the message
    :param attempts: record
    """
    txn.put(_layout.pack_attempts_key(ordinal, number),
            _layout.pack_attempts(attempts),
            db=databases.attempts)


def forget(txn: "lmdb.Transaction[memoryview]", databases: Databases, ordinal: int,
           number: int) -> None:
    """
    Delete the record of a message, if there is one.

    :param txn: write transaction
    :param databases: handles
    :param ordinal: of the subscriber
    :param number: of the message
    """
    txn.delete(_layout.pack_attempts_key(ordinal, number), db=databases.attempts)


def forget_before(txn: "lmdb.Transaction[memoryview]", databases: Databases, ordinal: int,
                  position: int) -> bool:
    """
    Delete records of messages in front of a position, a bounded number of them.

    :param txn: write transaction
    :param databases: handles
    :param ordinal: of the subscriber
    :param position: of the subscriber
    :return: True if there are any records left, wherever
    """
    cursor = txn.cursor(db=databases.attempts)
    first = _layout.pack_attempts_key(ordinal, 0)
    for _ in range(_MOST_DELETED):
        if not cursor.set_range(first):
            return False
        owner, number = _layout.unpack_attempts_key(cursor.key())
        if owner != ordinal or number >= position:
            return bool(owner == ordinal)
        cursor.delete()
    return True


def forget_all(txn: "lmdb.Transaction[memoryview]",
               databases: Databases,
               ordinal: int,
               position: int = _layout.MAX_NUMBER + 1) -> None:
    """
    Delete all records of messages in front of a position, however many there are.

    :param txn: write transaction
    :param databases: handles
    :param ordinal: of the subscriber
    :param position: of the subscriber; behind everything if not given, for one that is removed
    """
    while next(between(txn, databases, ordinal, 0, position), None) is not None:
        forget_before(txn, databases, ordinal, position)


def begin_anew(txn: "lmdb.Transaction[memoryview]", databases: Databases, time_ns: int) -> None:
    """
    Let all records look as if the first deliveries were recorded just now; they stay counted.

    By that time a message that was given up is told from itself, see ``_moving``.

    :param txn: write transaction
    :param databases: handles
    :param time_ns: on the queue's clock
    """
    cursor = txn.cursor(db=databases.attempts)
    found = cursor.first()
    while found:
        attempts = _layout.unpack_attempts(cursor.value())
        # As many bytes as before: no page is split.
        cursor.put(bytes(cursor.key()), _layout.pack_attempts(attempts._replace(since_ns=time_ns)))
        found = cursor.next()


def between(txn: "lmdb.Transaction[memoryview]", databases: Databases, ordinal: int, begin: int,
            end: int) -> Iterator[tuple[int, _layout.Attempts]]:
    """
    Iterate over the records of a range of messages.

    :param txn: any transaction; nothing may be written to ``attempts_db`` meanwhile
    :param databases: handles
    :param ordinal: of the subscriber
    :param begin: first number
    :param end: number behind the last one
    :return: number and record of each, in order
    """
    cursor = txn.cursor(db=databases.attempts)
    found = cursor.set_range(_layout.pack_attempts_key(ordinal, begin))
    while found:
        owner, number = _layout.unpack_attempts_key(cursor.key())
        if owner != ordinal or number >= end:
            return
        yield number, _layout.unpack_attempts(cursor.value())
        found = cursor.next()
