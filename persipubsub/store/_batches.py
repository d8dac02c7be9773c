"""
Choose which messages of a subscriber are claimed together, inside of a transaction.

No more than will be taken: others pass over what is claimed, and would receive later messages
before those that are given back when the batch turns out to be smaller.
"""

import lmdb

import persipubsub.errors
from persipubsub.store import _blocks, _layout, _log, _pending, _positions
from persipubsub.store._databases import Databases


def search(
    txn: "lmdb.Transaction[memoryview]", databases: Databases, pending: _pending.Pending,
    start: int, max_messages: int
) -> tuple[_pending.Candidate | _pending.Expired | _pending.Resting | None, int]:
    """
    Find the next message, and how many may be claimed with it.

    Numbers that are not there yet must not be claimed: a message that gets one of them before the
    claim is narrowed would be passed over by others, and be received after later ones.

    :param txn: any transaction
    :param databases: handles
    :param pending: messages of the subscriber
    :param start: where to begin, as of :py:meth:`_pending.Pending.find`
    :param max_messages: how many are wanted at most
    :return: what ``find`` returns; how many to claim at most if it is a message
    """
    found = pending.find(txn, databases, start)
    if max_messages == 1 or not isinstance(found, _pending.Candidate):
        return found, 1
    cursor = txn.cursor(db=databases.data)
    cursor.last()
    key, value = cursor.item()
    # Not checked: a damaged record is for who comes to it, and must not stop who is in front.
    end = _layout.unpack_number(key) + _blocks.guess_messages(value)
    end = min(end, found.number + max_messages)
    _, flags, _, _ = _positions.require_position(txn, databases, pending.key)
    if flags:
        end, _, _ = pending.limit(txn, databases, flags, found.number, end)
    count = max(1, end - found.number)
    first = txn.get(_layout.pack_number(found.number), None, databases.data)
    if first is not None and (_blocks.guess_total_bytes(value) - _blocks.guess_total_bytes(first) +
                              len(first) <= _pending.BATCH_BYTES):
        # All that there is. What is below would do, and takes as long as the rest of this.
        return found, count
    try:
        return found, _fitting(cursor, found.number, count)
    except persipubsub.errors.StoreCorruptError:
        return found, count


def _fitting(cursor: "lmdb.Cursor[memoryview]", number: int, count: int) -> int:
    """
    Find how many messages have no more bytes than a batch.

    :param cursor: of ``data_db``
    :param number: of the first one
    :param count: how many at most
    :return: how many, at least one
    """
    limit = _log.place_of(cursor, number).size + _pending.BATCH_BYTES
    if _log.place_of(cursor, number + count).size <= limit:
        return count
    fitting, most = 1, count - 1
    while fitting < most:
        middle = (fitting + most + 1) // 2
        if _log.place_of(cursor, number + middle).size <= limit:
            fitting = middle
        else:
            most = middle - 1
    return fitting
