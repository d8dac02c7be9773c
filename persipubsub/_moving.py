"""
Move messages that are not delivered any more into a queue of dead letters.

First it is put there, under an id that is the same whoever repeats it; then it leaves the queue it
comes from. A process that is killed between the two leaves it in both: the next consumer that comes
across it puts it again, which changes nothing, and lets it leave. Leaving first was rejected: the
message would be in neither.
"""

import contextlib
import datetime
import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

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
            audience: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> int:
        """
        Add messages, each once for its id.

        :param messages: to be added
        :param audience: ids of the subscribers that get them; everybody if not given
        :param timeout: how long to wait for room, in seconds
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

    def __init__(self, origin: Origin, open_target: Callable[[], Target] | None) -> None:
        """
        Initialize without opening anything.

        :param origin: of the messages
        :param open_target: opens the queue of dead letters; None if there is none
        """
        self._origin = origin
        self._open_target = open_target
        # The first one is used; two threads may open it at the same time. A lock was rejected: a
        # child that is forked meanwhile would wait for it for ever.
        self._targets: list[Target] = []
        self._ready_at = 0.0
        self._warned_at = -_WARNING_SECS

    def is_ready(self) -> bool:
        """
        Tell whether messages can be moved, as far as is known.

        :return: False for a while after one could not be
        """
        return time.monotonic() >= self._ready_at

    def move(self, ordinal: int, message: persipubsub.message.Message,
             attempts: _layout.Attempts) -> bool:
        """
        Put a message into the queue of dead letters, as durably as that queue is.

        The caller has claimed it.

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
                self._origin.subscriber, attempts.deliveries, error)
            return True
        if not self.is_ready():
            return False
        letter = persipubsub.message.DeadLetter(queue=self._origin.queue,
                                                    subscriber=self._origin.subscriber,
                                                    number=message.number,
                                                    sent_at=message.sent_at,
                                                    attempts=attempts.deliveries,
                                                    error=error,
                                                    moved_at=datetime.datetime.now(datetime.UTC),
                                                    data=message.data)
        # The time of the first delivery tells it from the same number of a queue that was dropped
        # and created again, and from a message that an operator let be delivered again, be it by a
        # seek or by restoring a backup, which sets that time.
        msg_id = make_id("dead letter", os.path.realpath(self._origin.path), ordinal,
                         message.number, attempts.since_ns)
        try:
            if not self._targets:
                self._targets.append(self._open_target())
            # No time to wait for room: the consumer has other messages to work on.
            self._targets[0].put([letter.encode()], timeout=0, msg_ids=[msg_id])
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
        with contextlib.suppress(IndexError):
            while True:
                self._targets.pop().close()


def make_id(*parts: object) -> bytes:
    """
    Make the id under which a message is put once.

    :param parts: what tells the message from all others
    :return: id of a bounded length, as paths may be longer than ids

    >>> make_id("dead letter", 1) == make_id("dead letter", 1) != make_id("dead letter", 2)
    True
    """
    text = " ".join(str(part) for part in parts)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest().encode("ascii")


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
    return (f"{name}: {text}" if text else name)[:_attempts.ERROR_CHARACTERS]
