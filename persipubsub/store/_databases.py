"""Name the handles of the sub-databases that every work on a store is given."""

from typing import Any, Final, NamedTuple

import lmdb

from persipubsub.store import _layout


class Databases(NamedTuple):
    """Hold the handles of the sub-databases."""

    data: "lmdb._Database"
    pending: "lmdb._Database"
    ahead: "lmdb._Database"
    meta: "lmdb._Database"
    attempts: "lmdb._Database"
    once: "lmdb._Database"


#: Names of the sub-databases, in the order of the handles.
NAMES: Final = (_layout.DATA_DB, _layout.PENDING_DB, _layout.AHEAD_DB, _layout.META_DB,
                _layout.ATTEMPTS_DB, _layout.ONCE_DB)


def count_bytes(txn: "lmdb.Transaction[Any]", database: "lmdb._Database") -> int:
    """
    Count what a sub-database takes.

    :param txn: any transaction
    :param database: handle
    :return: in bytes of whole pages
    """
    stat = txn.stat(database)
    return int(stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]))
