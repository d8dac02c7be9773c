"""Test that threads and tasks that share a commit get an exception each, and not one together."""

import asyncio
import concurrent.futures
import fcntl
import json
import os
import resource
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import persipubsub.aio
from persipubsub import Pub
from tests import support
from tests.faults import tracing

THREADS = 8


def raised_in_threads(send: Callable[[], object], rounds: int) -> list[BaseException]:
    """Send in several threads at the same time, and return what was raised."""
    barrier = threading.Barrier(THREADS)

    def send_always() -> list[BaseException]:
        raised: list[BaseException] = []
        for _ in range(rounds):
            barrier.wait(support.HANG_SECS)
            try:
                send()
            except BaseException as error:  # pylint: disable=broad-exception-caught
                raised.append(error)
        return raised

    with concurrent.futures.ThreadPoolExecutor(THREADS) as executor:
        futures = [executor.submit(send_always) for _ in range(THREADS)]
        return [error for future in futures for error in future.result(support.HANG_SECS)]


def raised_in_tasks(config_pth: Path) -> list[BaseException]:

    async def send_all() -> list[BaseException | None]:
        async with persipubsub.aio.Pub("pub", config_pth) as pub:
            return await asyncio.gather(*(pub.send(bytes(3000)) for _ in range(THREADS)),
                                        return_exceptions=True)

    return [error for error in asyncio.run(send_all()) if error is not None]


def describe(raised: Sequence[BaseException]) -> dict[str, object]:
    """Tell what exceptions have in common."""
    depths = [len(traceback.extract_tb(error.__traceback__)) for error in raised]
    contexts = [
        id(error.__context__) for error in raised
        if error.__context__ is not None and error.__context__ is not error.__cause__
    ]
    return {
        "kinds": sorted({type(error).__name__
                         for error in raised}),
        "count": len(raised),
        "distinct": len({id(error)
                         for error in raised}),
        "shared contexts": len(contexts) - len(set(contexts)),
        "caused": sum(type(error.__cause__) is type(error) for error in raised),
        "deepest": max(depths)
    }


def check(found: dict[str, object], kind: str, is_of_one_commit: bool = True) -> None:
    print(found)
    count, caused, deepest = found["count"], found["caused"], found["deepest"]
    assert isinstance(count, int) and isinstance(caused, int) and isinstance(deepest, int)
    assert found["kinds"] == [kind]
    assert 1 < count == found["distinct"]
    assert found["shared contexts"] == 0
    # Each thread or task adds its own calls to the traceback, of which there are few.
    assert deepest < 15
    # Only one that was alone in a commit has no other one as its cause.
    assert caused >= 2 or not is_of_one_commit


@pytest.mark.parametrize("is_in_tasks", [False, True])
def test_busy_timeout(tmp_path: Path, is_in_tasks: bool) -> None:
    config_pth = support.make_queue(tmp_path, busy_timeout_secs=0.2)
    # The first opening wants the lock.
    with Pub("pub", config_pth) as pub, open(tmp_path / "queue" / "write.lock", "rb") as lock:
        pub.send(b"before")
        fcntl.flock(lock, fcntl.LOCK_EX)
        raised = (raised_in_tasks(config_pth) if is_in_tasks else raised_in_threads(
            lambda: pub.send(bytes(3000)), 1))
        assert len(raised) == THREADS
        check(describe(raised), "BusyTimeoutError")


@pytest.mark.parametrize("is_in_tasks", [False, True])
def test_flush_that_fails(tmp_path: Path, is_in_tasks: bool) -> None:
    tracing.require()
    config_pth = support.make_queue(tmp_path, checkpoint_secs=3600)
    output = tmp_path / "output"

    def start() -> Callable[[], None]:
        pub = Pub("pub", config_pth)
        pub.send(b"before")

        def work() -> None:
            raised = (raised_in_tasks(config_pth) if is_in_tasks else raised_in_threads(
                lambda: pub.send(bytes(3000)), 3))
            output.write_text(json.dumps(describe(raised)))
            os._exit(0)

        return work

    assert tracing.inject(start, "fdatasync,fsync", "error=EIO") == 0
    # After the first one, each is refused before its commit.
    check(json.loads(output.read_text()), "FlushError", is_of_one_commit=is_in_tasks)


@pytest.mark.parametrize("is_in_tasks", [False, True])
def test_full_disk(tmp_path: Path, is_in_tasks: bool) -> None:
    """Each of them is tried by itself, and has an error of its own."""
    config_pth = support.make_queue(tmp_path, checkpoint_secs=3600)

    def run(pipe: support.Connection) -> None:
        with Pub("pub", config_pth) as pub:
            pub.send(b"before")
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, resource.RLIM_INFINITY))
            while support.outcome(lambda: pub.send(bytes(3000))) == "":
                pass
            raised = (raised_in_tasks(config_pth) if is_in_tasks else raised_in_threads(
                lambda: pub.send(bytes(3000)), 5))
            pipe.send(describe(raised))

    with support.Child(run) as child:
        check(child.get(), "DiskFullError", is_of_one_commit=False)
        child.end()
