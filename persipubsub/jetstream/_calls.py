"""
Hand over what is done in the loop's thread to those who wait for it elsewhere.

What is not said otherwise runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from persipubsub.jetstream import _link, _loop, _returns, _stream

ResultT = TypeVar("ResultT")


class Ports:
    """Be what a consumer needs of its queue. All of it runs in the loop's own thread."""

    def __init__(self, loop: _loop.Loop, link: _link.Link, stream: _stream.Stream) -> None:
        """
        Initialize with what is open.

        :param loop: of this process
        :param link: to the servers
        :param stream: of the queue
        """
        self.loop = loop
        self.link = link
        self.stream = stream


class Calls(Protocol):
    """Be what runs coroutines for one queue. Errors of them are translated."""

    def run(self, function: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """
        Run a coroutine in the loop and wait for it. For any thread but the loop's own.

        :param function: makes the coroutine
        :return: what it returned
        :raise ClosedError: if the queue was closed
        """

    def begin(
            self, function: Callable[[], Coroutine[Any, Any,
                                                   ResultT]]) -> concurrent.futures.Future[ResultT]:
        """
        Run a coroutine in the loop and do not wait for it. For any thread.

        :param function: makes the coroutine
        :return: of what it returns; cancelling it cancels the coroutine
        :raise ClosedError: if the queue was closed
        """

    async def ports(self) -> Ports:
        """
        Open the queue in this process, if it is not open there.

        :return: what is open
        """


class Takes:
    """Know what takes messages right now. All of it runs in the loop's own thread."""

    def __init__(self) -> None:
        """Initialize with nothing."""
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def behind_others(self) -> AsyncIterator[None]:
        """Take, behind those that were cancelled and leave their pulls, or give messages back."""
        task = asyncio.current_task()
        assert task is not None
        ending = [other for other in self._own() if other.cancelling()]
        self._tasks.add(task)
        try:
            if ending:
                await asyncio.wait(ending, timeout=_returns.SETTLE_SECS)
            yield
        finally:
            self._tasks.discard(task)

    async def wait(self) -> None:
        """Wait until nothing takes any more."""
        own = self._own()
        if own:
            await asyncio.wait(own)

    def _own(self) -> "list[asyncio.Task[Any]]":
        """Find what takes; a forked child knows of what its parent was in the middle of as well."""
        loop = asyncio.get_running_loop()
        return [task for task in self._tasks if task.get_loop() is loop]


class Handover(Generic[ResultT]):
    """Let a lease be with whoever waits for it, or with nobody, but never be forgotten."""

    def __init__(self) -> None:
        """Initialize without a lease."""
        # Guards the two below: one thread gives, while the other may be interrupted and leave.
        self._lock = threading.Lock()
        self._lease: ResultT | None = None
        self._has_left = False

    def give(self, lease: ResultT) -> bool:
        """
        Give the lease.

        :param lease: that was taken
        :return: False if nobody waits for it any more
        """
        with self._lock:
            self._lease = lease
            return not self._has_left

    def leave(self) -> ResultT | None:
        """
        Stop waiting.

        :return: lease that was given already
        """
        with self._lock:
            self._has_left = True
            return self._lease
