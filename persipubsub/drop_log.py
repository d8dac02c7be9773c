"""
Warn about messages that were dropped unread, without flooding the log.

The engines drop and count them (``lmdb_engine.retention``, ``jetstream.publishing``).
"""

import logging
import threading
import time
from collections.abc import Iterable
from typing import Final

_LOGGER = logging.getLogger("persipubsub.queue")

#: Shortest time between two warnings, in seconds.
_WARNING_SECS: Final = 1.0


class DropLog:
    """Counts messages that were dropped unread, and warns at most once a second. For any thread."""

    def __init__(self, path: str) -> None:
        """Initialize with nothing dropped."""
        self._path = path
        self._counts: dict[str, int] = {}
        self._last = -_WARNING_SECS
        # Guards the counts. Re-entrant, as a signal handler may close the queue.
        self._lock = threading.RLock()

    def forget_parent(self) -> None:
        """Begin in a forked child with a lock that no thread of the parent holds."""
        self._lock = threading.RLock()

    def add(self, dropped: Iterable[tuple[str, int]]) -> None:
        """Count, and warn if the last warning is more than a second ago."""
        with self._lock:
            for subscriber, count in dropped:
                self._counts[subscriber] = self._counts.get(subscriber, 0) + count
        if time.monotonic() - self._last >= _WARNING_SECS:
            self.report()

    def report(self) -> None:
        """Warn about all that was not reported yet."""
        with self._lock:
            counts, self._counts = self._counts, {}
            if counts:
                self._last = time.monotonic()
        if counts:
            _LOGGER.warning(
                "Messages of the queue %s were dropped unread: %s", self._path,
                ", ".join(f"{count} of {name}" for name, count in sorted(counts.items())))
