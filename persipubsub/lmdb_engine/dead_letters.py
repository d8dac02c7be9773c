"""
Move messages whose deliveries are exhausted into a queue of dead letters.

First the message is put there, under an id that is the same however often it is repeated; then it
leaves the queue it comes from (``Consumer._move``). A process that is killed between the two leaves
it in both: the next consumer that comes across it puts it again, which changes nothing, and lets it
leave. Leaving first was rejected: the message would be in neither.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from persipubsub.errors import PersipubsubError
from persipubsub.lmdb_engine import attempts
from persipubsub.lmdb_engine import format as fmt
from persipubsub.message import NO_WORD, Message, give_up

_LOGGER = logging.getLogger("persipubsub.queue")

#: After a queue of dead letters refused a message, no other is put there for so long, in seconds.
_PAUSE_SECS: Final = 1.0

#: ... and one warning is logged in so many seconds.
_WARNING_SECS: Final = 60.0


class Target(Protocol):
    """The open queue of dead letters."""

    def put(self,
            messages: Sequence[bytes],
            recipients: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> int:
        """Add messages, each once for its id."""

    def secure(self) -> None:
        """Let what was put so far survive a power failure."""

    def close(self) -> None:
        """Close the queue."""


class Retries(NamedTuple):
    """What happens to the messages that a subscriber fails to work on."""

    policy: attempts.Policy = attempts.Policy()
    queue_key: str = ""  #: of the subscriber's queue in the configuration
    #: opens the queue of dead letters; None: messages are dropped
    open_dead_letters: Callable[[], Target] | None = None


class DeadLetterWriter:
    """Moves messages of one subscriber. Any thread may use it."""

    def __init__(self, path: str, subscriber: str, retries: Retries) -> None:
        """
        Initialize without opening anything.

        :param path: directory of the queue that messages are moved from
        """
        self._path = path
        self._subscriber = subscriber
        self._retries = retries
        # The first one is used; two threads may open it at the same time.
        self._targets: list[Target] = []
        self._is_closed = False
        self._ready_at = 0.0
        self._warned_at = -_WARNING_SECS

    def move(self, ordinal: int, message: Message, record: fmt.Attempts) -> bool:
        """Put a message into the queue of dead letters; return False if it has to stay for now."""
        error = NO_WORD if record.flags & fmt.FLAG_IS_BEGUN else record.error
        if self._retries.open_dead_letters is None:
            _LOGGER.warning(
                "The message %s of the queue %s was dropped for %s, which has no "
                "dead_letter_queue, after %s deliveries: %s", message.number, self._path,
                self._subscriber, record.deliveries, error)
            return True
        if time.monotonic() < self._ready_at:
            return False
        letter = give_up(message, self._retries.queue_key, self._subscriber, record.deliveries,
                         error)
        # The time of the first delivery distinguishes the message from one of the same number in a
        # queue that was dropped and created again, and from itself after an operator let it be
        # delivered again, by a seek or by restoring a backup, which sets that time.
        msg_id = make_id("dead letter", os.path.realpath(self._path), ordinal, message.number,
                         record.since_ns)
        try:
            if not self._targets:
                self._targets.append(self._retries.open_dead_letters())
            # It does not wait for room: the consumer has other messages to work on.
            self._targets[0].put([letter.encode()], timeout=0, msg_ids=[msg_id])
            # It is flushed with ``os``, too: the message may be old, and leaves its queue now.
            self._targets[0].secure()
        except PersipubsubError as failure:
            now = time.monotonic()
            self._ready_at = now + _PAUSE_SECS
            if now >= self._warned_at + _WARNING_SECS:
                self._warned_at = now
                _LOGGER.warning(
                    "The message %s of the queue %s stays with %s, since it can not be moved into the "
                    "dead_letter_queue: %s", message.number, self._path, self._subscriber, failure)
            return False
        finally:
            # The queue may have been closed while this opened the queue of dead letters.
            if self._is_closed:
                self.close()
        return True

    def close(self) -> None:
        """Close the queue of dead letters; it may be repeated."""
        self._is_closed = True
        # They stay in the list: another thread may be in the middle of a move.
        for target in self._targets:
            target.close()


def make_id(*parts: object) -> bytes:
    """Make the id under which a message is put once."""
    text = " ".join(str(part) for part in parts)
    # Importing hashlib loads OpenSSL, which takes longer than all that `persipubsub stat` does.
    import hashlib  # pylint: disable=import-outside-toplevel

    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest().encode("ascii")
