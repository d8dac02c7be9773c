"""Name the handles of the sub-databases that every work on a store is given."""

from typing import NamedTuple

import lmdb


class Databases(NamedTuple):
    """Hold the handles of the sub-databases."""

    data: "lmdb._Database"
    pending: "lmdb._Database"
    ahead: "lmdb._Database"
    meta: "lmdb._Database"
