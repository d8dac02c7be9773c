"""Give the blocking classes and those of ``persipubsub.aio`` one face, so that tests drive both."""

import asyncio
import concurrent.futures
import contextlib
import functools
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, NamedTuple, TypeVar

import uvloop

import persipubsub.aio
import persipubsub.publisher
import persipubsub.subscriber
from tests import support

ResultT = TypeVar("ResultT")


class Face(NamedTuple):
    """Hold the classes that a scenario uses, and what runs it."""

    name: str
    pub: Callable[[], Any]
    sub: Callable[[], Any]
    run: Callable[[Coroutine[Any, Any, Any]], Any]


class _BlockingReceipt:
    """Enter and leave the block of a blocking receipt in a thread."""

    def __init__(self, receipt: Any) -> None:
        self._receipt = receipt

    async def __aenter__(self) -> Any:
        return await asyncio.to_thread(self._receipt.__enter__)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: types.TracebackType | None) -> None:
        await asyncio.to_thread(self._receipt.__exit__, kind, error, traceback)


class _Blocking:
    """Call what blocks in threads."""

    def __init__(self, blocking: Any) -> None:
        self.blocking = blocking

    async def __aenter__(self) -> "_Blocking":
        assert self.blocking.__enter__() is self.blocking
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await asyncio.to_thread(self.blocking.__exit__, *exception)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return functools.partial(asyncio.to_thread, getattr(self.blocking, name))


class _BlockingSub(_Blocking):
    """Receive in threads."""

    def receive(self, *arguments: Any, **named: Any) -> _BlockingReceipt:
        """Receive a message in an ``async with`` block."""
        return _BlockingReceipt(self.blocking.receive(*arguments, **named))

    def receive_to_top(self, *arguments: Any, **named: Any) -> _BlockingReceipt:
        """Receive the newest message in an ``async with`` block."""
        return _BlockingReceipt(self.blocking.receive_to_top(*arguments, **named))

    def receive_many(self, *arguments: Any, **named: Any) -> _BlockingReceipt:
        """Receive messages in an ``async with`` block."""
        return _BlockingReceipt(self.blocking.receive_many(*arguments, **named))

    async def messages(self, *arguments: Any, **named: Any) -> AsyncIterator[Any]:
        """Receive one message after the other."""
        iterator: Iterator[Any] = iter(self.blocking.messages(*arguments, **named))
        end = object()
        # As at the end of a "for" statement, when the iterator is collected.
        with contextlib.closing(iterator):  # type: ignore[type-var]
            while (message := await asyncio.to_thread(next, iterator, end)) is not end:
                yield message


def _run_blocking(coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run a scenario with threads enough for all its tasks."""

    async def main() -> ResultT:
        asyncio.get_running_loop().set_default_executor(
            concurrent.futures.ThreadPoolExecutor(max_workers=64))
        return await coroutine

    return asyncio.run(main())


BLOCKING = Face("blocking",
                pub=lambda: _Blocking(persipubsub.publisher.Pub()),
                sub=lambda: _BlockingSub(persipubsub.subscriber.Sub()),
                run=_run_blocking)

ASYNCIO = Face("asyncio", persipubsub.aio.Pub, persipubsub.aio.Sub, asyncio.run)

UVLOOP = Face("uvloop", persipubsub.aio.Pub, persipubsub.aio.Sub, uvloop.run)

#: With an engine that neither puts together nor wakes.
PLAIN = ASYNCIO._replace(name="plain")


def scenario(function: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """
    Make a test of a coroutine function: it runs on the face it gets, and does not hang.

    :param function: of the face and other fixtures
    :return: test
    """

    @functools.wraps(function)
    def run(face: Face, **fixtures: Any) -> None:
        face.run(asyncio.wait_for(function(face=face, **fixtures), 2 * support.HANG_SECS))

    return run
