"""
Say what a queue has to offer, and find the engine that keeps it by the scheme of its path.

:py:class:`persipubsub.publisher.Pub`, :py:class:`persipubsub.subscriber.Sub` and
:py:mod:`persipubsub.control` know queues only by what stands here. An engine is a module with the
functions of :py:class:`Engine`; a further one is a new module, one line in ``_MODULES``, and its
scheme in :py:mod:`persipubsub.config`.

Everything may be called by any number of threads at the same time, unless it says otherwise.
"""

import importlib
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Optional, Protocol, cast, runtime_checkable

import persipubsub.config
import persipubsub.errors
import persipubsub.statistics
from persipubsub import _fork_guard

if TYPE_CHECKING:
    # Not for who only counts: it loads logging, too.
    import concurrent.futures

    import persipubsub.message
    from persipubsub import _wakeup

#: Modules by the scheme of a queue's path; a plain path has none. A file may have no other: see
#: ``persipubsub.config``.
_MODULES: Final[dict[str, str]] = {
    "": "persipubsub.queue",
    "nats": "persipubsub.jetstream.engine",
}

#: Modules of a :py:class:`Counter`, where it is not the one of the engine: whoever only counts
#: loads nothing of what sends and receives, which would take longer than to count.
_COUNTERS: Final[dict[str, str]] = {"": "persipubsub.statistics"}

#: Largest id of a message, in bytes; LMDB takes keys of up to 511 bytes.
MAX_ID_BYTES: Final = 255

#: A timeout of more than 30 years is none; an integer may be too large for a float.
_FOREVER_SECS: Final = 1e9


def seconds_of(timeout: object) -> float | None:
    """
    Check how long somebody wants to wait.

    :param timeout: given by the user, in seconds
    :return: how long to wait; None: for ever
    :raise ValueError: if it is no such number
    """
    if not (isinstance(timeout, (int, float)) and timeout >= 0):
        raise ValueError(
            f"Expected timeout to be None or a number of seconds from 0 on, but got: {timeout!r}")
    return None if timeout > _FOREVER_SECS else timeout


class Lease(Protocol):
    """
    Hold messages that one consumer has and nobody else gets.

    Exactly one of :py:meth:`acknowledge` and :py:meth:`give_back` is to be called, once.
    """

    messages: list[bytes]  #: that were sent, at least one

    def acknowledge(self) -> None:
        """Let the messages leave the queue for this subscriber, all at once."""

    def give_back(self, error: BaseException | None = None) -> None:
        """
        Leave the messages where they were; they are delivered again, perhaps to another.

        :param error: why; None if they were not worked on
        """

    def details(self) -> "list[persipubsub.message.Message]":
        """
        Tell what is known of the messages.

        :return: messages, in order
        """

    def touch(self) -> None:
        """Say that the messages are still being worked on, where the engine has to be told."""


class Consumer(Protocol):
    """Take messages of one subscriber."""

    def take(self,
             timeout: float | None,
             longest_pause: float = 1.0,
             max_messages: int = 1) -> Lease | None:
        """
        Take the next message, or several; wait if there is none.

        :param timeout: how long to wait, in seconds; None: for ever
        :param longest_pause: time between two looks at the queue without a wake-up, in seconds
        :param max_messages: how many to take at most; all that are there at once, at least one
        :return: messages; None if there was none in time
        """

    def take_newest(self, timeout: float | None, longest_pause: float = 1.0) -> Lease | None:
        """
        Take the newest message and acknowledge all older ones as skipped; wait if there is none.

        :param timeout: how long to wait, in seconds; None: for ever
        :param longest_pause: time between two looks at the queue without a wake-up, in seconds
        :return: message; None if there was none in time
        """

    def front(self) -> bytes | None:
        """
        Look at the next message without taking it.

        :return: message that nobody has acknowledged or claimed; None if there is none
        """


@runtime_checkable
class WakingConsumer(Consumer, Protocol):
    """
    Wake who waits, instead of keeping a thread for each: for :py:mod:`persipubsub.aio`.

    An engine may do without; what waits for its messages then shares a few threads.
    """

    def take_now(self,
                 max_messages: int = 1,
                 is_newest: bool = False) -> tuple[Lease | None, float]:
        """
        Take the next message, or several, if there is one.

        :param max_messages: how many to take at most; all that are there at once, at least one
        :param is_newest: True to take the newest message instead, and to skip all older ones
        :return: messages or None; after how many seconds to look again without a wake-up
        """

    def prepare_wait(self) -> "_wakeup.Ticket":
        """
        Begin to wait. What comes after this, or after the ticket was armed, rings it.

        :return: to be armed before each further look, and to be closed by the caller
        """


class LoopLease(Lease, Protocol):
    """End a lease in the event loop that an engine has of its own, see :py:class:`LoopConsumer`."""

    def begin_acknowledge(self) -> "concurrent.futures.Future[None]":
        """
        Begin to let the messages leave the queue for this subscriber. Never blocks.

        :return: done when the engine has it, which is tried even if nobody waits for it
        """

    def begin_give_back(self,
                        error: BaseException | None = None) -> "concurrent.futures.Future[None]":
        """
        Begin to leave the messages where they were. Never blocks.

        :param error: why; None if they were not worked on
        :return: done when the engine has it, or it is to be had no more
        :raise ClosedError: if the queue was closed, which gave it back
        """


@runtime_checkable
class LoopConsumer(Consumer, Protocol):
    """
    Wait in the event loop that an engine has of its own: for :py:mod:`persipubsub.aio`.

    An engine may do without; see :py:class:`WakingConsumer`. All its leases are
    :py:class:`LoopLease`, and its queue is a :py:class:`LoopQueue`.
    """

    def begin_take(self,
                   timeout: float | None,
                   max_messages: int = 1,
                   is_newest: bool = False) -> "concurrent.futures.Future[Optional[Lease]]":
        """
        Begin to take the next message, or several. Never blocks.

        When the queue is closed, it fails with a ``ClosedError``.

        :param timeout: how long to wait, in seconds; None: for ever
        :param max_messages: how many to take at most; all that are there at once, at least one
        :param is_newest: True to take the newest message instead, and to skip all older ones
        :return:
            messages; None if there was none in time. If it could be cancelled, nothing was taken,
            or it is given back; otherwise the messages belong to who called
        """


class Queue(Protocol):
    """Be one open queue."""

    def put(self,
            messages: Sequence[bytes],
            audience: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> int:
        """
        Add messages at the end of the queue, all of them or none.

        :param messages: in the order in which they are to be received
        :param audience: ids of the subscribers that get them; everybody if not given
        :param timeout:
            how long to wait for room where the strategy is ``block``, in seconds; None: for ever
        :param msg_ids:
            of the messages, as many as these, None for those without, 1 to 255 bytes each; a
            message of an id that the queue knows is left out, the rest is added
        :return: number of the first message; of one that is left out, of the one that is stored
        :raise QueueFullError: if there is no room, and the strategy is to drop nothing
        """

    def check_sizes(self, messages: Sequence[bytes]) -> None:
        """
        Check that the queue could hold messages if it were empty.

        :param messages: to be put in one commit
        :raise MessageTooLargeError: if it could not
        """

    def require_subscribers(self, subscribers: Sequence[str]) -> None:
        """
        Check that subscribers were initialized.

        :param subscribers: ids
        :raise NotInitializedError: if one of them was not
        """

    def consumer(self, subscriber: str) -> Consumer:
        """
        Take part in the work of a subscriber.

        :param subscriber: its id
        :return: from which messages can be taken
        :raise NotInitializedError: if the queue has no such subscriber
        """

    def skip_to_newest(self, subscriber: str) -> int:
        """
        Acknowledge all messages of a subscriber but the newest one.

        :param subscriber: its id
        :return: how many were acknowledged by that
        """

    def prune(self) -> int:
        """
        Drop the messages that are too old, and delete those that everybody acknowledged.

        :return: how many deliveries were dropped
        """

    def clear(self) -> int:
        """
        Drop all messages; subscribers stay.

        :return: how many deliveries were dropped
        """

    def statistics(self) -> persipubsub.statistics.QueueStatistics:
        """
        Count what is in the queue, without a walk through the messages.

        :return: figures of the queue and of its subscribers
        """

    def close(self) -> None:
        """Close the queue; it may be closed twice. What was put stays."""


@runtime_checkable
class TogetherQueue(Queue, Protocol):
    """
    Put what several callers send with one wait for the disk: for :py:mod:`persipubsub.aio`.

    An engine may do without; each send then takes one of a few threads.
    """

    @property
    def waits_for_room(self) -> bool:
        """Tell whether publishers wait for room in a full queue."""

    def put_each(
        self, sendings: Sequence[tuple[Sequence[bytes], tuple[str, ...] | None,
                                       Sequence[bytes | None] | None]]
    ) -> list[BaseException | None]:
        """
        Do what a :py:meth:`Queue.put` of each would do, one after the other, but wait for no room.

        :param sendings: messages, audience and ids of each
        :return: error of each; None if it was put
        """


@runtime_checkable
class LoopQueue(Queue, Protocol):
    """Put in the event loop that an engine has of its own, see :py:class:`LoopConsumer`."""

    def begin_put(
            self,
            messages: Sequence[bytes],
            audience: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> "concurrent.futures.Future[int]":
        """
        Begin what :py:meth:`Queue.put` does. Never blocks.

        :param messages: in the order in which they are to be received
        :param audience: ids of the subscribers that get them; everybody if not given
        :param timeout: how long to wait for room, in seconds; None: for ever
        :param msg_ids: of the messages, None for those without
        :return: number of the first message
        """


class Counter(Protocol):
    """Count what is in queues. It is a module."""

    def statistics_of(self, config: persipubsub.config.Config,
                      queue_key: str) -> persipubsub.statistics.QueueStatistics:
        """
        Count what is in a queue, without taking part in it.

        :param config: that describes the queue
        :param queue_key: of the queue in ``queues``
        :return: figures of the queue and of its subscribers
        :raise NotInitializedError: if there is no queue yet
        """


class Engine(Protocol):
    """Keep queues. It is a module."""

    def ensure_queue(self, config: persipubsub.config.Config, queue_key: str) -> None:
        """
        Create a queue and its subscribers, as far as they are not there. It may be repeated.

        :param config: that describes the queue
        :param queue_key: of the queue in ``queues``
        """

    def open_queue(self, config: persipubsub.config.Config, queue_key: str) -> Queue:
        """
        Open a queue that was initialized.

        :param config: that describes the queue
        :param queue_key: of the queue in ``queues``
        :return: to be closed by the caller
        :raise NotInitializedError: if there is no queue yet
        """

    def check_durability(self, config: persipubsub.config.Config,
                         queue_key: str) -> tuple[str, ...]:
        """
        Look whether a queue is less durable than its configuration says.

        :param config: that describes the queue
        :param queue_key: of the queue in ``queues``
        :return: warnings
        """


def engine_of(config: persipubsub.config.Config, queue_key: str) -> Engine:
    """
    Find the engine of a queue, and import it if it was not used before.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: engine
    :raise ConfigError: if the path of the queue has a scheme that is not known, or one that needs
        an extra which is not installed
    """
    return cast(Engine, _import(config, queue_key, _MODULES))


def counter_of(config: persipubsub.config.Config, queue_key: str) -> Counter:
    """
    Find what counts the messages of a queue, and import it if it was not used before.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: counter
    :raise ConfigError: as that of :py:func:`engine_of`
    """
    return cast(Counter, _import(config, queue_key, {**_MODULES, **_COUNTERS}))


def _import(config: persipubsub.config.Config, queue_key: str,
            modules: Mapping[str, str]) -> types.ModuleType:
    """
    Import the module for a queue.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :param modules: names by scheme
    :return: module
    :raise ConfigError: as that of :py:func:`engine_of`
    """
    path = config.queues[queue_key].path or queue_key
    scheme = persipubsub.config.scheme_of(path)
    module = modules.get(scheme)
    if module is None:
        # Of a file that was read there is none; of the target of a migration, there may be.
        raise persipubsub.errors.ConfigError(
            "{}: queues.{}.path: Expected a path to a directory{}, but got: the unknown scheme "
            "{!r} in {!r}".format(config.path, queue_key, "".join(f" or {name}://..."
                                                                  for name in modules
                                                                  if name), scheme, path))
    try:
        with _fork_guard.LOCK:
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "persipubsub":
            raise
        # An extra has the name of its scheme.
        raise persipubsub.errors.ConfigError(
            "{}: queues.{}.path: Expected what {scheme}:// needs (pip install "
            "'persipubsub[{scheme}]'), but got: no module {!r}".format(config.path,
                                                                       queue_key,
                                                                       error.name,
                                                                       scheme=scheme)) from None
