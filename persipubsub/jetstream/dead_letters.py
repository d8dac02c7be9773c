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

#: What can not be given up is delivered again after so long, and one warning is logged.
POSTPONED_NS: Final = 10**9
_WARNING_SECS: Final = 60.0

#: What is told of a delivery whose consumer did not say how it ended.
NO_WORD: Final = "its process ended, or dropped it, before it was done"


class Writer:
    """What becomes of the messages that one subscriber fails to work on."""

    def __init__(self, own: settings.Settings, subscriber: str,
                 open_target: Callable[[str], publishing.Publishing]) -> None:
        """Initialize for a subscriber; the queue of dead letters is opened at its first use."""
        self._settings = own
        self._subscriber = subscriber
        self._entry = own.entry(subscriber)
        self._open_target = open_target
        self._warned = -_WARNING_SECS

    def is_exhausted(self, deliveries: int) -> bool:
        """Tell whether no further delivery is allowed behind so many."""
        return 0 < self._entry.max_deliveries <= deliveries

    def retry_delay_ns(self, deliveries: int) -> int:
        """Tell how long a message waits for its next delivery after it failed."""
        first_ns = int(self._entry.retry_delay_secs * 1e9)
        return persipubsub.message.retry_delay_ns(first_ns, deliveries)

    async def write(self, message: persipubsub.message.Message, error: str) -> bool:
        """Put a message into the queue of dead letters; return True if it may be acknowledged."""
        if not self._entry.dead_letter_queue:
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
            target = self._open_target(self._entry.dead_letter_queue)
            await target.put([letter.encode()], None, 0, [msg_id.digest()])
        except (persipubsub.errors.PersipubsubError, errors.ApiError) as failure:
            if time.monotonic() >= self._warned + _WARNING_SECS:
                self._warned = time.monotonic()
                _LOGGER.warning(
                    "The message %s of the queue %s stays with %s, since it can not be moved into "
                    "the dead_letter_queue: %s", message.number, self._settings.path,
                    self._subscriber, failure)
            return False
        return True
