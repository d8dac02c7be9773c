"""
Hold what a subscriber received until it is known what became of it.

There are no finalizers here: a claim that was dropped is given back by the claim itself, one
of servers by its hold, and nothing else may be done wherever the garbage collector happens to run.
"""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Optional, TypeVar

import persipubsub.message
from persipubsub import _engines

ContentT = TypeVar("ContentT")

Take = Callable[[], Optional[_engines.Lease]]


def unwrap(lease: _engines.Lease) -> list[bytes]:
    """
    Give the bytes that were sent.

    :param lease: on messages
    :return: their bytes
    """
    return lease.messages


def describe(lease: _engines.Lease) -> list[persipubsub.message.Message]:
    """
    Give messages with all that is known of them.

    :param lease: on messages
    :return: messages
    """
    return lease.details()


class _Taking(Generic[ContentT]):
    """Acknowledge on a clean exit what was taken on entry; give it back on an exception."""

    __slots__ = ("_take", "_contents", "_lease")

    def __init__(self, take: Take, contents: Callable[[_engines.Lease], list[ContentT]]) -> None:
        """
        Initialize without taking anything.

        :param take: waits for messages and takes them
        :param contents: makes of them what the block gets
        """
        self._take = take
        self._contents = contents
        self._lease: _engines.Lease | None = None

    def _start(self) -> _engines.Lease | None:
        """
        Take messages and hold them.

        :return: on them; None if none came in time
        """
        self._lease = self._take()
        return self._lease

    def _end(self) -> _engines.Lease | None:
        """
        Let go of what is held.

        :return: to be acknowledged or given back; None if there is nothing
        """
        lease, self._lease = self._lease, None
        return lease

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        """Acknowledge the messages, or give them back if the block was left by an exception."""
        lease = self._end()
        if lease is None:
            return
        if kind is None:
            lease.acknowledge()
        else:
            lease.give_back(error)


class Receipt(_Taking[ContentT]):
    """
    Hold one message in a ``with`` block.

    Returned by :py:meth:`persipubsub.subscriber.Sub.receive`; to be entered once.
    """

    __slots__ = ()

    def __enter__(self) -> ContentT | None:
        """
        Wait for a message.

        :return: message; None if none came in time
        """
        lease = self._start()
        return None if lease is None else self._contents(lease)[0]


class BatchReceipt(_Taking[ContentT]):
    """
    Hold several messages in a ``with`` block.

    Returned by :py:meth:`persipubsub.subscriber.Sub.receive_many`; to be entered once.
    """

    __slots__ = ()

    def __enter__(self) -> list[ContentT]:
        """
        Wait for messages.

        :return: messages; empty if none came in time
        """
        lease = self._start()
        return [] if lease is None else self._contents(lease)


class Messages(_Taking[ContentT]):
    """
    Iterate over messages; each is acknowledged when the next one is asked for.

    Returned by :py:meth:`persipubsub.subscriber.Sub.messages`; for one thread. Nothing happens
    before the first message is asked for.

    A ``for`` loop does not tell the iterator whether it is left by ``break`` or by an exception. A
    message at which it is left stays and is delivered again, at once if nothing else refers to the
    iterator. Who uses ``break``, or wants errors to be counted and kept, tells it:

    - by ``with sub.messages() as msgs:`` around the loop. Leaving the block acknowledges the
      message at hand; an exception gives it back, and is recorded.
    - or by :py:meth:`acknowledge` before the ``break``.
    """

    __slots__ = ("_is_done", )

    def __init__(self, take: Take, contents: Callable[[_engines.Lease], list[ContentT]]) -> None:
        """
        Initialize without taking anything.

        :param take: waits for messages and takes them
        :param contents: makes of them what the loop gets
        """
        super().__init__(take, contents)
        self._is_done = False

    def __enter__(self) -> "Messages[ContentT]":
        """
        Let the end of the block decide on the last message.

        :return: itself
        """
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        """Acknowledge the message at hand, or give it back on an exception; the iterator ends."""
        self._is_done = True
        super().__exit__(kind, error, traceback)

    def __iter__(self) -> Iterator[ContentT]:
        """
        Iterate.

        :return: itself
        """
        return self

    def __next__(self) -> ContentT:
        """
        Acknowledge the message at hand, and wait for the next one.

        :return: message
        :raise StopIteration: if none came in time
        """
        self.acknowledge()
        lease = None if self._is_done else self._start()
        if lease is None:
            self._is_done = True
            raise StopIteration
        return self._contents(lease)[0]

    def acknowledge(self) -> None:
        """Acknowledge the message at hand before the next one is asked for; it may be repeated."""
        lease = self._end()
        if lease is not None:
            lease.acknowledge()

    def close(self) -> None:
        """Give the message at hand back as if it had not been delivered, and end."""
        self._is_done = True
        lease = self._end()
        if lease is not None:
            lease.give_back()
