"""
Remember the ids that publishers gave to messages, inside of a transaction.

An id is kept twice in ``once_db``: by itself, for the number of its message, and behind the time,
so that the oldest ids are found without a search. Every change is in the same transaction as that
of the log: a publisher that was killed finds its id exactly if its message is stored.
"""

from collections.abc import Sequence

import lmdb

from persipubsub.store import _layout
from persipubsub.store._databases import Databases


def find(txn: "lmdb.Transaction[memoryview]", databases: Databases, identifiers: Sequence[bytes],
         oldest_ns: int) -> list[int | None]:
    """
    Find the messages that were stored with ids.

    :param txn: any transaction
    :param databases: handles
    :param identifiers: to be found
    :param oldest_ns: ids that were given before are forgotten, whether they are still stored or not
    :return: number of the message of each id; None if there is none
    """
    numbers: list[int | None] = []
    for identifier in identifiers:
        value = txn.get(_layout.once_id_key(identifier), db=databases.once)
        number, time_ns = _layout.unpack_once(value) if value is not None else (0, 0)
        numbers.append(number if value is not None and time_ns >= oldest_ns else None)
    return numbers


def remember(txn: "lmdb.Transaction[memoryview]", databases: Databases, identifier: bytes,
             number: int, time_ns: int) -> None:
    """
    Remember an id; the same id of before the window is replaced.

    :param txn: write transaction
    :param databases: handles
    :param identifier: of the message
    :param number: of the message
    :param time_ns: on the queue's clock
    """
    key = _layout.once_id_key(identifier)
    value = txn.get(key, db=databases.once)
    if value is not None:
        _, before_ns = _layout.unpack_once(value)
        txn.delete(_layout.once_time_key(before_ns, identifier), db=databases.once)
    txn.put(key, _layout.pack_once(number, time_ns), db=databases.once)
    txn.put(_layout.once_time_key(time_ns, identifier), b"", db=databases.once)


def is_any_before(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                  oldest_ns: int) -> bool:
    """
    Tell whether there are ids to be forgotten.

    :param txn: any transaction
    :param databases: handles
    :param oldest_ns: ids that were given before are to be forgotten
    :return: True if there is one
    """
    cursor = txn.cursor(db=databases.once)
    return (cursor.set_range(_layout.ONCE_TIME_PREFIX)
            and _layout.unpack_once_time_key(cursor.key())[0] < oldest_ns)


def forget(txn: "lmdb.Transaction[memoryview]", databases: Databases, oldest_ns: int,
           budget: int) -> int:
    """
    Forget the oldest ids.

    :param txn: write transaction
    :param databases: handles
    :param oldest_ns: ids that were given before are forgotten
    :param budget: how many to forget at most
    :return: how many were forgotten
    """
    cursor = txn.cursor(db=databases.once)
    forgotten = 0
    while forgotten < budget and cursor.set_range(_layout.ONCE_TIME_PREFIX):
        time_ns, identifier = _layout.unpack_once_time_key(cursor.key())
        if time_ns >= oldest_ns:
            break
        cursor.delete()
        txn.delete(_layout.once_id_key(identifier), db=databases.once)
        forgotten += 1
    return forgotten
