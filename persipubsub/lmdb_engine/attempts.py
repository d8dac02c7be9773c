"""
How often messages were delivered to a subscriber, inside of a transaction.

There is a record only for a message whose delivery failed, or is counted before it begins; a
subscriber without any record is not flagged, and pays nothing. A record leaves with its message:
when that is acknowledged, or when the position passes it.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine.format import Tx

#: Most records that are deleted at once, so that clearing a queue in which everything failed does
#: not hold up senders for long. Later transactions delete the rest.
_MOST_DELETED: Final = 4096


class Policy(NamedTuple):
    """
    How often a message is delivered to a subscriber, and how soon again.

    >>> policy = Policy(max_deliveries=3, delay_ns=10)
    >>> policy.is_exhausted(2), policy.is_exhausted(3)
    (False, True)
    """

    max_deliveries: int = 0  #: 0: any number
    delay_ns: int = 0  #: after the first failure, in nanoseconds; doubled with each further one

    def is_exhausted(self, count: int) -> bool:
        """Tell whether there is no further delivery after so many."""
        return 0 < self.max_deliveries <= count


def read(tx: Tx, ordinal: int, number: int) -> fmt.Attempts | None:
    """Read the record of a message; None if there is none."""
    value = tx.txn.get(fmt.pack_attempts_key(ordinal, number), db=tx.db.attempts)
    return None if value is None else fmt.unpack_attempts(value)


def write(tx: Tx, ordinal: int, number: int, attempts: fmt.Attempts) -> None:
    """Write the record of a message; the caller flags the subscriber."""
    tx.txn.put(fmt.pack_attempts_key(ordinal, number),
               fmt.pack_attempts(attempts),
               db=tx.db.attempts)


def forget(tx: Tx, ordinal: int, begin: int, end: int, most: int = _MOST_DELETED) -> bool:
    """
    Delete the records of a range of messages.

    :param most: how many records are deleted at most
    :return: True if the subscriber has more, in the range or after it
    """
    cursor = tx.txn.cursor(tx.db.attempts)
    first = fmt.pack_attempts_key(ordinal, begin)
    for _ in range(most):
        if not cursor.set_range(first):
            return False
        owner, number = fmt.unpack_attempts_key(cursor.key())
        if owner != ordinal or number >= end:
            return bool(owner == ordinal)
        cursor.delete()
    return True


def begin_anew(tx: Tx, time_ns: int) -> None:
    """Date the first delivery of all messages as of now; the deliveries stay counted."""
    cursor = tx.txn.cursor(db=tx.db.attempts)
    found = cursor.first()
    while found:  # the cursor moves forward
        attempts = fmt.unpack_attempts(cursor.value())
        # The record has as many bytes as before, so that no page is split.
        cursor.put(bytes(cursor.key()), fmt.pack_attempts(attempts._replace(since_ns=time_ns)))
        found = cursor.next()


def between(tx: Tx, ordinal: int, begin: int, end: int) -> Iterator[tuple[int, fmt.Attempts]]:
    """Iterate over the records of a range of messages."""
    cursor = tx.txn.cursor(db=tx.db.attempts)
    found = cursor.set_range(fmt.pack_attempts_key(ordinal, begin))
    while found:  # the cursor moves forward
        owner, number = fmt.unpack_attempts_key(cursor.key())
        if owner != ordinal or number >= end:
            return
        yield number, fmt.unpack_attempts(cursor.value())
        found = cursor.next()


def skip_retries(tx: Tx, ordinal: int, number: int, now_ns: int) -> tuple[int, int]:
    """
    Skip messages that may not be delivered again yet.

    :return: first number after them, and the earliest time at which one may (0: none was skipped)
    """
    earliest_ns = 0
    cursor = tx.txn.cursor(db=tx.db.attempts)
    found = cursor.set_range(fmt.pack_attempts_key(ordinal, number))
    while found:  # the cursor moves forward
        retry_at_ns = fmt.unpack_retry_at(cursor.value())
        if fmt.unpack_attempts_key(cursor.key()) != (ordinal, number) or retry_at_ns <= now_ns:
            break
        earliest_ns = min(earliest_ns or retry_at_ns, retry_at_ns)
        number += 1
        found = cursor.next()
    return number, earliest_ns
