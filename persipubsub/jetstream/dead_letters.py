"""
Give messages up that were delivered as often as ``max_deliveries`` allows.

First a message is put into the queue of dead letters, under an id that is the same in every
process; then it is acknowledged. A process that is killed between the two leaves it in both: the
next consumer that gets it puts it again, which changes nothing, and acknowledges it.

All of it runs in the thread of :py:mod:`persipubsub.jetstream.loop`.
"""

import datetime
import hashlib
import logging
import time
from collections.abc import Callable
from typing import Final

import persipubsub.errors
import persipubsub.message
from persipubsub.jetstream import errors, publishing, settings

_LOGGER = logging.getLogger("persipubsub.queue")

#: A failed message rests for an hour at most.
_LONGEST_REST_SECS: Final = 3600.0

#: What can not be given up is delivered again after so many seconds, and one warning is logged.
POSTPONED_SECS: Final = 1.0
_WARNING_SECS: Final = 60.0

#: What is told of a delivery whose consumer did not say how it ended.
NO_WORD: Final = "its process ended, or dropped it, before it was done"


class Writer:
    """What becomes of the messages that one subscriber fails to work on."""

    def __init__(self, own: settings.Settings, subscriber: str,
                 open_target: Callable[[str], publishing.Publishing]) -> None:
        """Initialize for a subscriber; the queue of dead letters is opened at its first use."""
        entry = own.entry(subscriber)
        self._settings = own
        self._subscriber = subscriber
        self._most = 0 if entry is None else entry.max_deliveries or 0
        self._delay_secs = 0.0 if entry is None else entry.retry_delay_secs
        self._key = "" if entry is None else entry.dead_letter_queue or ""
        self._open_target = open_target
        self._warned = -_WARNING_SECS

    def is_exhausted(self, deliveries: int) -> bool:
        """Tell whether no further delivery is allowed behind so many."""
        return 0 < self._most <= deliveries

    def rest_secs(self, deliveries: int) -> float:
        """Tell how long a message rests after it failed: twice as long each time."""
        return min(self._delay_secs * 2.0**min(deliveries - 1, 64), _LONGEST_REST_SECS)

    async def write(self, message: persipubsub.message.Message, error: str) -> bool:
        """Put a message into the queue of dead letters; return True if it may be acknowledged."""
        if not self._key:
            _LOGGER.warning(
                "The message %s of the queue %s was dropped for %s, which has no "
                "dead_letter_queue, after %s deliveries: %s", message.number, self._settings.path,
                self._subscriber, message.attempts, error)
            return True
        letter = persipubsub.message.DeadLetter(queue=self._settings.key,
                                                subscriber=self._subscriber,
                                                number=message.number,
                                                sent_at=message.sent_at,
                                                attempts=message.attempts,
                                                error=error,
                                                moved_at=datetime.datetime.now(datetime.UTC),
                                                data=message.data)
        # The time tells it from the same number of a stream that was deleted and made again.
        parts = ("dead letter", self._settings.address.stream, self._subscriber, message.number,
                 message.sent_at)
        msg_id = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape"))
        try:
            # No time to wait for room: the consumer has other messages to work on.
            await self._open_target(self._key).put([letter.encode()], None, 0, [msg_id.digest()])
        except (persipubsub.errors.PersipubsubError, errors.ApiError) as failure:
            if time.monotonic() >= self._warned + _WARNING_SECS:
                self._warned = time.monotonic()
                _LOGGER.warning(
                    "The message %s of the queue %s stays with %s, since it can not be moved into "
                    "the dead_letter_queue: %s", message.number, self._settings.path,
                    self._subscriber, failure)
            return False
        return True
