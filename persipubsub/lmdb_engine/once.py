"""
The ids that publishers gave to messages, inside of a transaction.

An id is kept twice in ``once_db``: by itself, for the number of its message, and after the time,
so that the oldest ids are found without a search. Every change is in the same transaction as that
of the log: after a kill, an id is there exactly if its message is stored.
"""

from collections.abc import Sequence

from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine.format import Tx


def find(tx: Tx, identifiers: Sequence[bytes], oldest_ns: int) -> list[int | None]:
    """Find the messages that were stored with ids."""
    numbers: list[int | None] = []
    for identifier in identifiers:
        value = tx.txn.get(fmt.once_id_key(identifier), db=tx.db.once)
        number, time_ns = fmt.unpack_once(value) if value is not None else (0, 0)
        numbers.append(number if value is not None and time_ns >= oldest_ns else None)
    return numbers


def remember(tx: Tx, identifier: bytes, number: int, time_ns: int) -> None:
    """Remember an id; the same id from before the window is replaced."""
    key = fmt.once_id_key(identifier)
    value = tx.txn.get(key, db=tx.db.once)
    if value is not None:
        _, before_ns = fmt.unpack_once(value)
        tx.txn.delete(fmt.once_time_key(before_ns, identifier), db=tx.db.once)
    tx.txn.put(key, fmt.pack_once(number, time_ns), db=tx.db.once)
    tx.txn.put(fmt.once_time_key(time_ns, identifier), b"", db=tx.db.once)


def is_any_before(tx: Tx, oldest_ns: int) -> bool:
    """Tell whether there are ids to be forgotten."""
    cursor = tx.txn.cursor(db=tx.db.once)
    return (cursor.set_range(fmt.ONCE_TIME_PREFIX)
            and fmt.unpack_once_time_key(cursor.key())[0] < oldest_ns)


def forget(tx: Tx, oldest_ns: int, budget: int) -> int:
    """Forget the oldest ids."""
    cursor = tx.txn.cursor(db=tx.db.once)
    forgotten = 0
    while forgotten < budget and cursor.set_range(fmt.ONCE_TIME_PREFIX):
        time_ns, identifier = fmt.unpack_once_time_key(cursor.key())
        if time_ns >= oldest_ns:
            break
        cursor.delete()
        tx.txn.delete(fmt.once_id_key(identifier), db=tx.db.once)
        forgotten += 1
    return forgotten


def since(tx: Tx, time_ns: int, begin: int, end: int) -> list[tuple[bytes, int, int]]:
    """List ids with number and time of the messages in a range, from the ids of a time on."""
    found: list[tuple[bytes, int, int]] = []
    cursor = tx.txn.cursor(db=tx.db.once)
    is_there = cursor.set_range(fmt.once_time_key(time_ns, b""))
    while is_there:
        id_ns, identifier = fmt.unpack_once_time_key(cursor.key())
        number = find(tx, [identifier], 0)[0]
        if number is not None and begin <= number < end:
            found.append((identifier, number, id_ns))
        is_there = cursor.next()
    return found
