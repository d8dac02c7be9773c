"""
Warn about messages that were dropped unread, without flooding the log.

Logged under ``persipubsub.queue``; no handler is installed.
"""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Final

from persipubsub.store import _retention

_LOGGER = logging.getLogger("persipubsub.queue")

_PAUSE_SECS: Final = 1.0


class LossLog:
    """Collect losses and log them at most once a second."""

    def __init__(self, path: str) -> None:
        """
        Initialize with nothing lost.

        :param path: of the queue
        """
        self._path = path
        self._counts: dict[str, int] = {}
        self._last = -_PAUSE_SECS
        # Guards the counts; nothing else is done while it is held. Re-entrant for a signal handler
        # that closes the queue.
        self._lock = threading.RLock()

    def add(self, losses: Sequence[_retention.Loss]) -> None:
        """
        Add losses, and log if the last warning is more than a second ago.

        :param losses: to be added
        """
        with self._lock:
            for loss in losses:
                self._counts[loss.subscriber] = self._counts.get(loss.subscriber, 0) + loss.messages
        self.report()

    def report(self, force: bool = False) -> None:
        """
        Log what was not logged yet.

        :param force: True to log although a warning was just given
        """
        with self._lock:
            now = time.monotonic()
            if not self._counts or (not force and now - self._last < _PAUSE_SECS):
                return
            counts, self._counts = self._counts, {}
            self._last = now
        _LOGGER.warning(
            "Messages of the queue %s were dropped unread: %s", self._path,
            ", ".join(f"{count} of {subscriber}" for subscriber, count in sorted(counts.items())))
