"""
Read from a server's monitoring port whether it flushes each message.

A server writes a message to its files before it acknowledges it, but flushes them every two minutes
unless it is told otherwise. What is not flushed is lost in a power failure of all servers that have
it.
"""

import http.client
import json
import urllib.request
from typing import Any, Final

from persipubsub.jetstream import _address

#: How long the monitoring port is waited for, in seconds.
_PATIENCE_SECS: Final = 3.0

#: More than any server writes, in bytes.
_LARGEST_PAGE: Final = 1 << 20

_ADVICE: Final = ("durability \"fsync\" needs \"sync_interval: always\" in the block jetstream of "
                  "each server of {}")


def warnings_of(address: _address.Address) -> tuple[str, ...]:
    """
    Ask a server how often it flushes.

    :param address: of the queue
    :return: warnings; none if that server flushes each message
    """
    advice = _ADVICE.format(",".join(address.servers))
    if address.monitor is None:
        return (f"{advice} (not checked: the path has no monitor=http://host:8222)", )
    found = _read(f"{address.monitor}/varz")
    if found is None:
        return (f"{advice} (not checked: {address.monitor} does not answer)", )
    config = (found.get("jetstream") or {}).get("config") or {}
    if config.get("sync_always"):
        return ()
    return (advice + f", but {address.monitor} flushes every "
            f"{config.get('sync_interval', 0) / 1000000000.0:g} s", )


def _read(url: str) -> Any | None:
    """
    Read a page.

    :param url: http address
    :return: what is on it; None if nobody answers, or it is something else
    """
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE_SECS) as answer:
            found = json.loads(answer.read(_LARGEST_PAGE))
            return found if isinstance(found, dict) else None
    except (OSError, ValueError, http.client.HTTPException):
        return None
