"""
Move messages that are not delivered any more into a queue of dead letters.

First it is put there, under an id that is the same whoever repeats it; then it leaves the queue it
comes from. A process that is killed between the two leaves it in both: the next consumer that comes
across it puts it again, which changes nothing, and lets it leave. Leaving first was rejected: the
message would be in neither.
"""

import contextlib
import datetime
import logging
import os
import threading
import time
from typing import Callable, Final, NamedTuple, Optional, Protocol, Sequence, Tuple

import persipubsub.dead_letter
import persipubsub.errors
import persipubsub.message
from persipubsub.store import _attempts, _layout

_LOGGER = logging.getLogger("persipubsub.queue")

#: After a queue of dead letters refused a message, it is left alone so long, in seconds.
_PAUSE_SECS: Final = 1.0

#: ... and one warning is logged in so many seconds.
_WARNING_SECS: Final = 60.0

#: What is told of a delivery whose consumer did not say how it ended.
_NO_WORD: Final = "its process ended, or dropped it, before it was done"


class Target(Protocol):
    """Be the open queue of dead letters."""

    def put(self,
            messages: Sequence[bytes],
            audience: Optional[Tuple[str, ...]] = None,
            msg_ids: Optional[Sequence[bytes]] = None) -> int:
        """
        Add messages, each once for its id.

        :param messages: to be added
        :param audience: ids of the subscribers that get them; everybody if not given
        :param msg_ids: of the messages
        :return: number of the first message
        """

    def close(self) -> None:
        """Close the queue."""


class Origin(NamedTuple):
    """Say where messages are moved from."""

    queue: str  #: key of the queue
    subscriber: str  #: id
    path: str  #: directory of the queue


class Mover:
    """
    Move messages of one subscriber; any thread may use it.

    Without a queue of dead letters the messages are dropped, with a warning for each of them.
    """

    def __init__(self, origin: Origin, open_target: Optional[Callable[[], Target]]) -> None:
        """
        Initialize without opening anything.

        :param origin: of the messages
        :param open_target: opens the queue of dead letters; None if there is none
        """
        self._origin = origin
        self._open_target = open_target
        self._target = None  # type: Optional[Target]
        self._ready_at = 0.0
        self._warned_at = -_WARNING_SECS
        # Guards the target. Locks of that queue are taken inside of it, and never those of the
        # queue that the messages come from.
        self._lock = threading.Lock()

    def is_ready(self) -> bool:
        """
        Tell whether messages can be moved, as far as is known.

        :return: False for a while after one could not be
        """
        return time.monotonic() >= self._ready_at

    def move(self, ordinal: int, message: persipubsub.message.Message,
             attempts: _layout.Attempts) -> bool:
        """
        Put a message into the queue of dead letters, durably. The caller has claimed it.

        :param ordinal: of the subscriber
        :param message: to be moved
        :param attempts: its record
        :return: True if it may leave its queue
        """
        error = _NO_WORD if attempts.flags & _layout.FLAG_IS_BEGUN else attempts.error
        if self._open_target is None:
            _LOGGER.warning(
                "The message %s of the queue %s was dropped for %s, which has no "
                "dead_letter_queue, after %s deliveries: %s", message.number, self._origin.path,
                self._origin.subscriber, attempts.count, error)
            return True
        if not self.is_ready():
            return False
        letter = persipubsub.dead_letter.DeadLetter(queue=self._origin.queue,
                                                    subscriber=self._origin.subscriber,
                                                    number=message.number,
                                                    sent_at=message.sent_at,
                                                    attempts=attempts.count,
                                                    error=error,
                                                    moved_at=datetime.datetime.now(
                                                        datetime.timezone.utc),
                                                    data=message.data)
        # The time of the first delivery tells it from the same number of a queue that was dropped
        # and created again, and from a message that an operator let be delivered again.
        msg_id = "dead letter {} {} {} {}".format(attempts.since_ns, ordinal, message.number,
                                                  os.path.realpath(self._origin.path))
        try:
            with self._lock:
                if self._target is None:
                    self._target = self._open_target()
                self._target.put([letter.encode()], msg_ids=[msg_id.encode("utf-8")])
        except persipubsub.errors.PersipubsubError as failure:
            self._postpone(message.number, failure)
            return False
        return True

    def _postpone(self, number: int, failure: Exception) -> None:
        """
        Leave a message where it is, and say so.

        :param number: of the message
        :param failure: why
        """
        now = time.monotonic()
        self._ready_at = now + _PAUSE_SECS
        if now >= self._warned_at + _WARNING_SECS:
            self._warned_at = now
            _LOGGER.warning(
                "The message %s of the queue %s stays with %s, since it can not be moved into the "
                "dead_letter_queue: %s", number, self._origin.path, self._origin.subscriber,
                failure)

    def close(self) -> None:
        """Close the queue of dead letters."""
        with self._lock:
            target, self._target = self._target, None
        if target is not None:
            target.close()


def text_of(error: BaseException) -> str:
    """
    Describe an error of the user's code, whatever that does.

    :param error: to be described
    :return: type and text, of a bounded length

    >>> text_of(ValueError("no greeting"))
    'ValueError: no greeting'
    """
    text = ""
    with contextlib.suppress(Exception):
        text = str(error)
    name = type(error).__qualname__
    return ("{}: {}".format(name, text) if text else name)[:_attempts.ERROR_CHARACTERS]
