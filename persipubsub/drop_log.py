"""
Warn about messages that were dropped unread, without flooding the log.

The engines drop them: ``lmdb_engine.retention``, which also counts them for each subscriber, and
``jetstream.publishing``.
"""

import collections
import contextlib
import logging
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
        # A deque instead of a lock, which a signal handler or a forked child could wait for.
        self._dropped: collections.deque[tuple[str, int]] = collections.deque()
        self._last = -_WARNING_SECS

    def add(self, dropped: Iterable[tuple[str, int]]) -> None:
        """Count, and warn if the last warning is more than a second ago."""
        self._dropped.extend(dropped)
        if time.monotonic() - self._last >= _WARNING_SECS:
            self.report()

    def report(self) -> None:
        """Warn about all that was not reported yet."""
        counts: collections.Counter[str] = collections.Counter()
        # Until it is empty: another thread may report at the same time.
        with contextlib.suppress(IndexError):
            while True:
                subscriber, count = self._dropped.popleft()
                counts[subscriber] += count
        if counts:
            self._last = time.monotonic()
            _LOGGER.warning(
                "Messages of the queue %s were dropped unread: %s", self._path,
                ", ".join(f"{count} of {name}" for name, count in sorted(counts.items())))
