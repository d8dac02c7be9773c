"""
List who is measured.

Whoever measures memory imports only the module of the contender that it needs.
"""

import importlib
from typing import Any, Final, List, Mapping, Type

from benchmarks.contender import Contender

OURS: Final = "persipubsub"
BARE: Final = "bare LMDB"

#: Module and class by name. This library first, then the limit, then the peers.
_PLACES = {
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
}  # type: Mapping[str, Any]

ALL = list(_PLACES)  # type: List[str]

PEERS = [name for name in ALL if name not in (OURS, BARE)]  # type: List[str]


def find(name: str) -> Type[Contender]:
    """
    Find a contender.

    :param name: as in tables
    :return: its class
    """
    module, kind = _PLACES[name]
    found = getattr(importlib.import_module("benchmarks." + module), kind)  # type: Type[Contender]
    return found
