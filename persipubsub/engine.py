"""
What a queue offers, and which engine keeps it.

The faces (:py:mod:`persipubsub.publisher`, :py:mod:`persipubsub.subscriber`,
:py:mod:`persipubsub.aio`) know queues only by the protocols here, and by what an engine has for
tasks. So does :py:mod:`persipubsub.control`, with three exceptions, which use the engine on LMDB
directly: the files of a queue (``_maintain``), dead letters (``letters``) and moving a queue
(``migration``).

An engine is a module with the functions of :py:class:`Engine`; the scheme of a queue's path says
which one keeps it. A further engine is a new module, a line in ``_MODULES``, and its scheme in
``names_of`` of :py:mod:`persipubsub.config`; ``migration`` moves queues to ``nats`` only.

Everything may be called by any number of threads at the same time, unless it says otherwise.
Timeouts are in seconds; None waits for ever.
"""

import importlib
from collections.abc import Generator, Sequence
from typing import Final, Protocol, cast

import persipubsub.config
from persipubsub.config import Config
from persipubsub.message import Message, Peeked
from persipubsub.statistics import QueueStatistics

#: Modules by the scheme of a queue's path; a directory has none.
_MODULES: Final = {"": "persipubsub.queue", "nats": "persipubsub.jetstream.engine"}

#: Largest id of a message, in bytes; LMDB takes keys of up to 511 bytes.
MAX_ID_BYTES: Final = 255

#: Ids of the subscribers that get a message; None: all of the queue's.
Recipients = tuple[str, ...] | None

#: Ids of messages, None for a message without one; None: no message has one.
MessageIds = Sequence[bytes | None] | None

#: What one put adds.
Sending = tuple[Sequence[bytes], Recipients, MessageIds]


class Lease(Protocol):
    """
    Messages that one consumer has, and no other gets. Each is ended once: by ``ack`` or ``nack``.

    Both end all messages, or the first ``count`` of those that are not ended yet. A lease that is
    garbage-collected gives the messages back; how their delivery ended is not recorded.
    """

    messages: list[bytes]  #: all that were taken, at least one

    def ack(self, count: int | None = None) -> None:
        """Acknowledge: on LMDB all of them in one transaction, on servers one by one."""

    def nack(self, error: BaseException | None = None, count: int | None = None) -> None:
        """Give the messages back to be delivered again. No error: nobody worked on them."""

    def details(self) -> list[Message]:
        """Return the messages with all that is known of them."""


class Consumer(Protocol):
    """Takes messages of one subscriber."""

    def take(self,
             timeout: float | None,
             poll_secs: float = 1.0,
             max_messages: int = 1,
             is_newest: bool = False) -> Lease | None:
        """
        Take what is there, at least one message, or wait; None if none came in time.

        The newest message is taken alone, and all older ones are acknowledged as skipped.
        """

    def front(self) -> bytes | None:
        """Return the next message that is neither acknowledged nor taken, and leave it there."""


class Queue(Protocol):
    """One open queue."""

    def put(self,
            messages: Sequence[bytes],
            recipients: Recipients = None,
            timeout: float | None = None,
            msg_ids: MessageIds = None) -> int:
        """
        Add messages; wait for room if the strategy says so.

        On LMDB: all or none. On servers the first ones may be stored, even after an error.

        :return: number of the first message
        """

    def check_sizes(self, messages: Sequence[bytes]) -> None:
        """Raise MessageTooLargeError if the queue could not hold the messages when empty."""

    def require_subscribers(self, subscribers: Sequence[str]) -> None:
        """Raise NotInitializedError if the queue lacks one of the subscribers."""

    def consumer(self, subscriber: str) -> Consumer:
        """Return what takes messages of the subscriber."""

    def skip_to_newest(self, subscriber: str) -> int:
        """Acknowledge all messages of a subscriber but the newest one; return how many."""

    def prune(self) -> int:
        """Drop messages that are too old; return how many deliveries were dropped."""

    def clear(self) -> int:
        """Drop all messages; return how many deliveries were dropped."""

    def statistics(self) -> QueueStatistics:
        """Count what is in the queue."""

    def close(self) -> None:
        """Close the queue, and give back what is held; may be repeated."""


class Engine(Protocol):
    """
    Keeps queues. A module.

    Its class ``Queue`` may have further methods for operators, and the module the functions
    ``stored_settings`` and ``check_durability``, see :py:mod:`persipubsub.control`.
    """

    def ensure_queue(self, config: Config, queue_key: str) -> None:
        """Create a queue and its subscribers, as far as they are not there."""

    def open_queue(self, config: Config, queue_key: str) -> Queue:
        """Open a queue that was initialized."""

    def statistics_of(self, config: Config, queue_key: str) -> QueueStatistics:
        """Count what is in a queue without taking part in it."""

    def peek(self, config: Config, queue_key: str, subscriber: str, count: int,
             start: int) -> Sequence[Peeked]:
        """Look at the next messages of a subscriber without taking them."""

    def follow(self, config: Config, queue_key: str,
               last: int) -> Generator[list[Peeked], None, None]:
        """Look at the messages of a queue as they are sent, for ever."""


# For aio, an engine whose calls block has methods that never wait for messages or for room:
# put_each of a queue, try_take and call_once of a consumer; waits_for_room of a queue tells whether
# its senders wait. The only such engine is that on LMDB.
#
# An engine with an event loop of its own offers coroutines beside put, take, ack and nack of the
# same arguments, to be awaited in any loop: aput of a queue, atake of a consumer (which has no
# poll_secs), aack and anack of a lease. A take that is cancelled keeps nothing; a put, an ack or a
# nack that is cancelled is carried out.


def of(config: Config, queue_key: str) -> Engine:
    """
    Import the engine of a queue.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: engine
    :raise ConfigError: if there is no such queue, or the engine needs an extra that is not
        installed
    """
    scheme = persipubsub.config.scheme_of(config.queue_path(queue_key))
    try:
        return cast(Engine, importlib.import_module(_MODULES[scheme]))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "persipubsub":
            raise
        missing = error.name
    # An extra has the name of its scheme.
    place = persipubsub.config.at(persipubsub.config.at("queues", queue_key), "path")
    persipubsub.config.fail(config.path, [
        f"{place}: Expected what {scheme}:// needs (pip install 'persipubsub[{scheme}]'), but got: "
        f"no module {missing!r}"
    ])
