"""
The ids that publishers gave to messages, inside of a transaction.

An id is kept twice in ``once_db``: by itself, for the number of its message, and after the time,
so that the oldest ids are found without a search. Every change is in the same transaction as that
of the log: after a kill, an id is there exactly if its message is stored.
"""

from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine.format import Tx


def find(tx: Tx, identifier: bytes, oldest_ns: int) -> int:
    """Find the message that was stored with an id since a time; 0: there is none."""
    value = tx.txn.get(fmt.once_id_key(identifier), db=tx.db.once)
    number, time_ns = (0, 0) if value is None else fmt.unpack_once(value)
    return number if time_ns >= oldest_ns else 0


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


def forget(tx: Tx, oldest_ns: int, budget: int) -> None:
    """Forget the oldest ids."""
    cursor = tx.txn.cursor(db=tx.db.once)
    for _ in range(budget):
        if not cursor.set_range(fmt.ONCE_TIME_PREFIX):
            break
        time_ns, identifier = fmt.unpack_once_time_key(cursor.key())
        if time_ns >= oldest_ns:
            break
        cursor.delete()
        tx.txn.delete(fmt.once_id_key(identifier), db=tx.db.once)


def since(tx: Tx, time_ns: int, begin: int, end: int) -> list[tuple[bytes, int, int]]:
    """List ids with number and time of the messages in a range, from the ids of a time on."""
    found: list[tuple[bytes, int, int]] = []
    cursor = tx.txn.cursor(db=tx.db.once)
    is_there = cursor.set_range(fmt.once_time_key(time_ns, b""))
    while is_there:  # the cursor moves forward
        id_ns, identifier = fmt.unpack_once_time_key(cursor.key())
        number = find(tx, identifier, 0)
        if begin <= number < end:
            found.append((identifier, number, id_ns))
        is_there = cursor.next()
    return found
