"""
List who is measured.

Whoever measures memory imports only the module of the contender that it needs.
"""

import importlib
from collections.abc import Mapping
from typing import Any, Final

from benchmarks.contender import Contender

OURS: Final = "persipubsub"
BARE: Final = "bare LMDB"

#: Module and class by name. This library first, then the limit, then the peers.
_PLACES: Mapping[str, Any] = {
    OURS: ("library", "Library"),
    BARE: ("bare", "Bare"),
    "localqueue": ("peers", "LocalQueue"),
    "litequeue": ("peers", "LiteQueue"),
    "honker stream": ("peers_of_honker", "HonkerStream"),
    "honker queue": ("peers_of_honker", "HonkerQueue"),
    "persist-queue": ("peers", "PersistQueue"),
    "diskcache": ("peers", "DiskCache"),
    "nque": ("peers", "Nque"),
    "SimpleBroker": ("peers", "SimpleBroker"),
}

ALL: list[str] = list(_PLACES)

PEERS: list[str] = [name for name in ALL if name not in (OURS, BARE)]


def find(name: str) -> type[Contender]:
    """
    Find a contender.

    :param name: as in tables
    :return: its class
    """
    module, kind = _PLACES[name]
    found: type[Contender] = getattr(importlib.import_module(f"benchmarks.{module}"), kind)
    return found
