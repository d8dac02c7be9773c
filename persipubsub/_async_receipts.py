"""
Hold what a task received until it is known what became of it; as ``_receipts`` does for a thread.

There are no finalizers here either: what was dropped is given back by the claim or lease itself.
"""

import contextlib
import functools
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Generic, Optional, Protocol, cast

import persipubsub.errors
from persipubsub import _begun, _engines, _workers
from persipubsub._receipts import ContentT

Take = Callable[[], Awaitable[Optional[_engines.Lease]]]


class Ending(Protocol):
    """End leases. What is begun is done to its end even if the task is cancelled meanwhile."""

    async def acknowledge(self, lease: _engines.Lease) -> None:
        """
        Let messages leave the queue, and wait for it.

        :param lease: on them
        """

    async def give_back(self, lease: _engines.Lease, error: BaseException | None = None) -> None:
        """
        Leave messages where they were, and wait for it.

        :param lease: on them
        :param error: why; None if they were not worked on
        """


class InWorkers:
    """End leases in a few threads."""

    def __init__(self, workers: _workers.Workers) -> None:
        """
        Initialize without any lease.

        :param workers: acknowledge and give back
        """
        self._workers = workers

    async def acknowledge(self, lease: _engines.Lease) -> None:
        """Acknowledge in a worker thread."""
        try:
            await self._workers.run(lease.acknowledge)
        except _workers.NoThreadError:
            # In the loop's thread, for once: who has the error may keep the lease with it.
            lease.give_back()
            raise

    async def give_back(self, lease: _engines.Lease, error: BaseException | None = None) -> None:
        """Give back in a worker thread."""
        try:
            await self._workers.run(functools.partial(lease.give_back, error))
        except _workers.NoThreadError:
            lease.give_back(error)  # what the block raised matters more


class InLoop:
    """End leases in the loop that an engine has of its own."""

    async def acknowledge(self, lease: _engines.Lease) -> None:
        """Acknowledge in the loop of the engine."""
        await _begun.result_of(cast(_engines.LoopLease, lease).begin_acknowledge())

    async def give_back(self, lease: _engines.Lease, error: BaseException | None = None) -> None:
        """Give back in the loop of the engine."""
        # A queue that was closed has given it back, and what the block raised matters more.
        with contextlib.suppress(persipubsub.errors.ClosedError):
            await _begun.result_of(cast(_engines.LoopLease, lease).begin_give_back(error))


class _Taking(Generic[ContentT]):
    """Acknowledge on a clean exit what was taken on entry; give it back on an exception."""

    __slots__ = ("_take", "_contents", "_ending", "_lease")

    def __init__(self, take: Take, contents: Callable[[_engines.Lease], list[ContentT]],
                 ending: Ending) -> None:
        """
        Initialize without taking anything.

        :param take: waits for messages and takes them
        :param contents: makes of them what the block gets
        :param ending: acknowledges and gives back
        """
        self._take = take
        self._contents = contents
        self._ending = ending
        self._lease: _engines.Lease | None = None

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        """Acknowledge the messages, or give them back if the block was left by an exception."""
        lease, self._lease = self._lease, None
        if lease is None:
            return
        if kind is None:
            await self._ending.acknowledge(lease)
        else:
            await self._ending.give_back(lease, error)


class Receipt(_Taking[ContentT]):
    """
    Hold one message in an ``async with`` block.

    Returned by :py:meth:`persipubsub.aio.Sub.receive`; to be entered once.
    """

    __slots__ = ()

    async def __aenter__(self) -> ContentT | None:
        """
        Wait for a message.

        :return: message; None if none came in time
        """
        lease = self._lease = await self._take()
        return None if lease is None else self._contents(lease)[0]


class BatchReceipt(_Taking[ContentT]):
    """
    Hold several messages in an ``async with`` block.

    Returned by :py:meth:`persipubsub.aio.Sub.receive_many`; to be entered once.
    """

    __slots__ = ()

    async def __aenter__(self) -> list[ContentT]:
        """
        Wait for messages.

        :return: messages; empty if none came in time
        """
        lease = self._lease = await self._take()
        return [] if lease is None else self._contents(lease)


class Messages(_Taking[ContentT]):
    """
    Iterate over messages; each is acknowledged when the next one is asked for.

    Returned by :py:meth:`persipubsub.aio.Sub.messages`; for one task. Nothing happens before the
    first message is asked for.

    An ``async for`` loop does not tell the iterator whether it is left by ``break`` or by an
    exception. A message at which it is left stays and is delivered again, at once if nothing else
    refers to the iterator. Who uses ``break``, or wants errors to be counted and kept, tells it:

    - by ``async with sub.messages() as msgs:`` around the loop. Leaving the block acknowledges the
      message at hand; an exception gives it back, and is recorded.
    - or by :py:meth:`acknowledge` before the ``break``.
    """

    __slots__ = ("_is_done", )

    def __init__(self, take: Take, contents: Callable[[_engines.Lease], list[ContentT]],
                 ending: Ending) -> None:
        """
        Initialize without taking anything.

        :param take: waits for messages and takes them
        :param contents: makes of them what the loop gets
        :param ending: acknowledges and gives back
        """
        super().__init__(take, contents, ending)
        self._is_done = False

    async def __aenter__(self) -> "Messages[ContentT]":
        """
        Let the end of the block decide on the last message.

        :return: itself
        """
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        """Acknowledge the message at hand, or give it back on an exception; the iterator ends."""
        self._is_done = True
        await super().__aexit__(kind, error, traceback)

    def __aiter__(self) -> "Messages[ContentT]":
        """
        Iterate.

        :return: itself
        """
        return self

    async def __anext__(self) -> ContentT:
        """
        Acknowledge the message at hand, and wait for the next one.

        :return: message
        :raise StopAsyncIteration: if none came in time
        """
        await self.acknowledge()
        lease = None if self._is_done else await self._take()
        if lease is None:
            self._is_done = True
            raise StopAsyncIteration
        self._lease = lease
        return self._contents(lease)[0]

    async def acknowledge(self) -> None:
        """Acknowledge the message at hand before the next one is asked for; it may be repeated."""
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._ending.acknowledge(lease)

    async def aclose(self) -> None:
        """Give the message at hand back as if it had not been delivered, and end."""
        self._is_done = True
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._ending.give_back(lease)
