"""Give the blocking classes and those of ``persipubsub.aio`` one face, so that tests drive both."""

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import uvloop

import persipubsub.aio
import persipubsub.publisher
import persipubsub.subscriber
from persipubsub import control, statistics
from tests import jetstream_server, support

ResultT = TypeVar("ResultT")


class Face(NamedTuple):
    name: str
    pub: Callable[..., Any]
    sub: Callable[..., Any]
    run: Callable[[Coroutine[Any, Any, Any]], Any]


class _BlockingReceipt:
    """Enter and leave the block of a blocking receipt in a thread."""

    def __init__(self, receipt: Any) -> None:
        self._receipt = receipt

    def __bool__(self) -> bool:
        return bool(self._receipt)

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

    def __repr__(self) -> str:
        return repr(self.blocking)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.blocking.__reduce_ex__(protocol)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return functools.partial(asyncio.to_thread, getattr(self.blocking, name))


class _BlockingSub(_Blocking):

    def receive(self, *arguments: Any, **named: Any) -> _BlockingReceipt:
        return _BlockingReceipt(self.blocking.receive(*arguments, **named))

    def receive_to_top(self, *arguments: Any, **named: Any) -> _BlockingReceipt:
        return _BlockingReceipt(self.blocking.receive_to_top(*arguments, **named))

    def receive_many(self, *arguments: Any, **named: Any) -> _BlockingReceipt:
        return _BlockingReceipt(self.blocking.receive_many(*arguments, **named))

    async def messages(self, *arguments: Any, **named: Any) -> AsyncIterator[Any]:
        iterator: Iterator[Any] = iter(self.blocking.messages(*arguments, **named))
        end = object()
        # As at the end of a "for" statement, when the iterator is collected.
        with contextlib.closing(iterator):  # type: ignore[type-var]
            while (message := await asyncio.to_thread(next, iterator, end)) is not end:
                yield message


def _run_blocking(coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:

    async def main() -> ResultT:
        asyncio.get_running_loop().set_default_executor(
            concurrent.futures.ThreadPoolExecutor(max_workers=64))
        return await coroutine

    return asyncio.run(main())


BLOCKING = Face("blocking",
                pub=lambda *given: _Blocking(persipubsub.publisher.Pub(*given)),
                sub=lambda *given: _BlockingSub(persipubsub.subscriber.Sub(*given)),
                run=_run_blocking)

ASYNCIO = Face("asyncio", persipubsub.aio.Pub, persipubsub.aio.Sub, asyncio.run)

UVLOOP = Face("uvloop", persipubsub.aio.Pub, persipubsub.aio.Sub, uvloop.run)


def scenario(function: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test of a coroutine function: it runs on the face it gets, and does not hang."""

    @functools.wraps(function)
    def run(face: Face, **fixtures: Any) -> None:
        face.run(asyncio.wait_for(function(face=face, **fixtures), 2 * support.HANG_SECS))

    return run


_COUNTER = itertools.count()


@pytest.fixture(name="config_pth",
                params=["lmdb", pytest.param("nats", marks=jetstream_server.needs_server)])
def fixture_config_pth(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    changes: dict[str, Any] = {}
    if request.param == "nats":
        changes = {
            "path": request.getfixturevalue("servers").path(f"queue{next(_COUNTER)}",
                                                            ack_wait=30.0),
            "busy_timeout_secs": 10
        }
    return deploy(tmp_path, **changes)


@pytest.fixture(name="lmdb_pth")
def fixture_lmdb_pth(tmp_path: Path) -> Path:
    return deploy(tmp_path)


def deploy(directory: Path, **changes: Any) -> Path:
    publishers = {"pub": ("sub", "other"), "pub_other": ("other", )}
    return support.make_queue(directory, publishers, ("sub", "other"), **changes)


def shorten_ack_wait(config_pth: Path) -> None:
    """On servers, let messages of a killed consumer come again soon."""
    text = config_pth.read_text(encoding="utf-8")
    config_pth.write_text(text.replace("ack_wait=30", "ack_wait=2"), encoding="utf-8")
    control.initialize_all_dbs(config_pth)


#: Both faces.
on_faces = pytest.mark.parametrize("face", [BLOCKING, ASYNCIO, UVLOOP], ids=lambda face: face.name)

#: For tests of what only tasks can do; all loops are alike to them.
on_loops = pytest.mark.parametrize("face", [ASYNCIO, UVLOOP], ids=lambda face: face.name)


@contextlib.asynccontextmanager
async def opened(face: Face, config_pth: Path) -> AsyncIterator[tuple[Any, Any]]:
    async with face.pub() as pub, face.sub() as sub:
        await pub.init(pub_id="pub", config_pth=config_pth)
        await sub.init(sub_id="sub", config_pth=config_pth)
        yield pub, sub


async def receive(sub: Any, timeout: float | None = 0) -> bytes | None:
    async with sub.receive(timeout=timeout) as msg:
        message: bytes | None = msg
    return message


async def receive_newest(sub: Any) -> bytes | None:
    async with sub.receive_to_top(timeout=None) as msg:
        message: bytes | None = msg
    return message


async def drain(sub: Any) -> list[bytes]:
    received: list[bytes] = []
    while (msg := await receive(sub)) is not None:
        received.append(msg)
    return received


def figures(config_pth: Path) -> statistics.SubscriberStatistics:
    found = control.statistics(config_pth)["queue"].subscribers
    return next(entry for entry in found if entry.subscriber == "sub")


def in_flight(config_pth: Path) -> int:
    return figures(config_pth).in_flight


def commits(config_pth: Path) -> int:
    return control.statistics(config_pth)["queue"].commits
