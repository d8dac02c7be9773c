"""Test what tasks of asyncio do where there are no threads, or not any more."""

# pylint: disable=missing-function-docstring

import asyncio
import concurrent.futures
import contextlib
import functools
import pathlib
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import persipubsub.aio
import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.queue
from persipubsub import _workers
from tests import support

#: More than there are addresses.
_STACK_BYTES = 1 << 50


@pytest.fixture(name="config_pth")
def fixture_config_pth(tmp_path: pathlib.Path) -> pathlib.Path:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    return config_pth


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """Let the system start no thread."""
    size = threading.stack_size(_STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(size)


async def receive(sub: persipubsub.aio.Sub, timeout: float | None = 0) -> bytes | None:
    async with sub.receive(timeout=timeout) as msg:
        return msg


def in_flight(config_pth: pathlib.Path) -> bool:
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        return queue._claims.is_claimed(queue.consumer("sub")._pending.ordinal, 0, 1 << 40)


def test_no_thread_can_be_started(config_pth: pathlib.Path) -> None:

    async def main() -> None:
        async with persipubsub.aio.Pub() as pub, persipubsub.aio.Sub() as sub:
            await pub.init("pub", config_pth)
            await sub.init("sub", config_pth)
            with no_threads():
                # One after the other, and at the same time.
                for count in (1, 1, 5):
                    for calls in ([receive(sub, None) for _ in range(count)],
                                  [pub.send(b"lost")
                                   for _ in range(count)], [sub.front() for _ in range(count)]):
                        outcomes = await asyncio.wait_for(
                            asyncio.gather(*calls, return_exceptions=True), support.HANG_SECS)
                        for outcome in outcomes:
                            assert isinstance(outcome, persipubsub.errors.StoreError), outcome
            # Nothing of it is left.
            waiting = asyncio.ensure_future(receive(sub, support.HANG_SECS))
            await asyncio.wait_for(pub.send(b"one"), support.HANG_SECS)
            assert await waiting == b"one"
            assert await receive(sub) is None

    asyncio.run(main())


def test_no_thread_can_be_started_to_end_a_block(config_pth: pathlib.Path) -> None:

    async def main() -> None:
        async with persipubsub.aio.Sub() as sub:
            await sub.init("sub", config_pth)
            # Who has the error keeps what its traceback refers to.
            with pytest.raises(persipubsub.errors.StoreError) as refused:
                async with sub.receive(timeout=0) as msg:
                    stack.enter_context(no_threads())
            stack.close()
            assert msg == b"one" and refused is not None
            with pytest.raises(ValueError) as failed:
                async with sub.receive(timeout=0, details=True) as message:
                    stack.enter_context(no_threads())
                    raise ValueError("not a number")
            stack.close()
            assert message is not None and message.attempts == 1 and failed is not None
            async with sub.receive(timeout=0, details=True) as message:
                assert message is not None and message.attempts == 2

    with persipubsub.publisher.Pub() as pub, contextlib.ExitStack() as stack:
        pub.init("pub", config_pth)
        pub.send(b"one")
        asyncio.run(main())
    assert not in_flight(config_pth)


def test_job_is_done_once_where_no_thread_can_be_started() -> None:
    threads = threading.active_count()
    workers = _workers.Workers(most=4)
    may_go_on, goes_on = threading.Event(), threading.Event()
    done: list[int] = []

    def wait() -> None:
        goes_on.set()
        assert may_go_on.wait(support.HANG_SECS)

    workers.submit(wait)
    assert goes_on.wait(support.HANG_SECS)
    with no_threads():
        for number in range(3):
            # The only thread is busy.
            with pytest.raises(persipubsub.errors.StoreError):
                workers.submit(functools.partial(done.append, number))
    may_go_on.set()
    workers.submit(lambda: done.append(3))
    support.until(lambda: done, "a job is done")
    workers.close()
    support.until(lambda: threading.active_count() == threads, "the threads end")
    assert done == [3]


def test_loop_goes_on_behind_the_main_thread(config_pth: pathlib.Path) -> None:
    code = textwrap.dedent("""
        import asyncio, sys, threading
        import persipubsub.aio

        async def consume(sub):
            async for msg in sub.messages(timeout=None):
                print(msg.decode(), flush=True)
                if msg == b"2":
                    return

        async def main():
            async with persipubsub.aio.Pub() as pub, persipubsub.aio.Sub() as sub:
                await pub.init("pub", sys.argv[1])
                await sub.init("sub", sys.argv[1])
                consuming = asyncio.ensure_future(consume(sub))
                await pub.send(b"1")
                while threading.main_thread().is_alive():
                    await asyncio.sleep(0.01)
                await asyncio.gather(*(pub.send(b"2") for _ in range(100)))
                await consuming
                async with sub.receive_many(1000, timeout=0) as msgs:
                    print(len(msgs), flush=True)

        threading.Thread(target=lambda: asyncio.run(main())).start()
        """)
    process = support.run_python(code, config_pth)
    assert (process.stdout, process.stderr, process.returncode) == ("1\n2\n100\n", "", 0)


def test_no_thread_is_left_behind_a_close(config_pth: pathlib.Path) -> None:
    threads = threading.active_count()

    async def work(sub: persipubsub.aio.Sub, begun: list[bytes], may_end: asyncio.Event) -> None:
        async with sub.receive(timeout=0) as msg:
            assert msg is not None
            begun.append(msg)
            await may_end.wait()

    async def main() -> None:
        sub = persipubsub.aio.Sub()
        begun: list[bytes] = []
        # It may be opened again.
        for _ in range(2):
            await sub.init("sub", config_pth)
            names = [thread.name for thread in threading.enumerate()]
            assert any(name.startswith("persipubsub_") for name in names), "Threads are kept."
            begun.clear()
            may_end = asyncio.Event()
            working = asyncio.gather(*(work(sub, begun, may_end) for _ in range(20)),
                                     return_exceptions=True)
            await asyncio.to_thread(support.until, lambda: len(begun) == 20, "all have a message")
            await sub.close()
            may_end.set()
            outcomes = await asyncio.wait_for(working, support.HANG_SECS)
            assert {type(outcome) for outcome in outcomes} == {persipubsub.errors.ClosedError}
            await asyncio.to_thread(support.until, lambda: threading.active_count() <= threads + 1,
                                    "the threads end")

    with persipubsub.publisher.Pub() as pub:
        pub.init("pub", config_pth)
        pub.send_many([b"%d" % number for number in range(20)])
    asyncio.run(main())


def test_no_thread_is_left_behind_a_close_in_the_middle_of_a_job(
        monkeypatch: pytest.MonkeyPatch) -> None:
    threads = threading.active_count()
    workers = _workers.Workers(2)
    make = concurrent.futures.ThreadPoolExecutor

    def make_beside_a_close(*arguments: Any) -> concurrent.futures.ThreadPoolExecutor:
        # As a task of another loop may do it.
        workers.close()
        return make(*arguments)

    done = threading.Event()
    with monkeypatch.context() as context:
        context.setattr(concurrent.futures, "ThreadPoolExecutor", make_beside_a_close)
        workers.submit(done.set)
    assert done.wait(support.HANG_SECS)
    support.until(lambda: threading.active_count() <= threads, "the thread ends")
