"""
Use one queue with very many threads, processes and subscribers.

``PERSIPUBSUB_ROUNDS`` is how many times a crowd of processes comes, ``PERSIPUBSUB_SUBSCRIBERS`` how
many subscribers one queue has.
"""

import collections
import contextlib
import functools
import logging
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from persipubsub import Pub, Sub, control
from tests import support

THREADS: Final = 1000
SUBSCRIBERS: Final = int(os.environ.get("PERSIPUBSUB_SUBSCRIBERS", "200"))
PROCESSES: Final = 30
ROUNDS: Final = int(os.environ.get("PERSIPUBSUB_ROUNDS", "4"))


@pytest.fixture(name="files")
def fixture_files() -> Iterator[None]:
    """Allow for a descriptor for each message that is being received."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * THREADS:
        pytest.skip(f"Not enough files may be opened: {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8 * THREADS)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def receive_in_threads(pipe: support.Connection, config_pth: Path) -> None:
    received: list[bytes] = []
    with Sub("sub", config_pth) as sub:
        pipe.send("ready")

        barrier = threading.Barrier(THREADS)

        def receive() -> None:
            with sub.receive(timeout=support.HANG_SECS) as msg:
                assert msg is not None
                received.append(msg)
                # All of them hold one at the same time.
                barrier.wait(support.HANG_SECS)

        support.in_threads([receive] * THREADS)
        pipe.send((received, sub.front()))


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_thousand_threads(tmp_path: Path, durability: str) -> None:
    config_pth = support.make_queue(tmp_path, durability=durability)
    with support.Child(receive_in_threads, config_pth) as child:
        assert child.get() == "ready"
        with Pub("pub", config_pth) as pub:
            barrier = threading.Barrier(THREADS)

            def send(number: int) -> None:
                barrier.wait(support.HANG_SECS)
                pub.send(msg=b"%d" % number)

            support.in_threads([functools.partial(send, number) for number in range(THREADS)])
        received, rest = child.get()
        child.end()
    # No two threads had the same message.
    assert collections.Counter(received) == {b"%d" % number: 1 for number in range(THREADS)}
    assert rest is None
    with support.open_queue(config_pth) as queue:
        assert not queue.check()
        found = queue.statistics()
        assert (found.messages, found.subscribers[0].acknowledged) == (0, THREADS)


def test_many_subscribers(tmp_path: Path) -> None:
    names = [f"sub{number:03}" for number in range(SUBSCRIBERS)]
    few = names[::7]
    config_pth = support.make_queue(tmp_path, publishers={"pub": names, "few": few},
                                      subscribers=names, durability="os")  # yapf: disable
    expected: dict[str, list[bytes]] = {name: [] for name in names}
    with Pub("pub", config_pth) as pub, Pub("few", config_pth) as pub_few:
        for number in range(10):
            sent = b"%d" % number
            (pub_few if number % 3 == 1 else pub).send(msg=sent)
            for name in few if number % 3 == 1 else names:
                expected[name].append(sent)
    with support.open_queue(config_pth) as queue:
        lags = {entry.subscriber: entry.lag for entry in queue.statistics().subscribers}
        assert lags == {name: len(msgs) for name, msgs in expected.items()}
        for name in names:
            with Sub(name, config_pth) as sub:
                with sub.receive(timeout=0) as msg:
                    assert msg == expected[name][0]
                with sub.receive_many(max_msgs=100, timeout=0) as msgs:
                    assert msgs == expected[name][1:]
                assert sub.front() is None
        assert queue.statistics().messages == 0
        assert not queue.check()


class _Warnings(logging.Handler):
    """Keep the texts of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """List the warnings of a logger in the block."""
    handler = _Warnings()
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)


def come_and_go(pipe: support.Connection, barrier: Any, config_pth: Path, name: str) -> None:
    """Initialize, open, send, receive and close, at the same moment as all others do."""
    received: list[bytes] = []
    with warnings_of("persipubsub") as texts:
        barrier.wait(support.HANG_SECS)
        control.initialize_all_dbs(config_pth)
        with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
            for number in range(3):
                pub.send(f"{name} {number}".encode())
            for _ in range(3):
                with sub.receive(timeout=support.HANG_SECS) as msg:
                    assert msg is not None
                    received.append(msg)
    pipe.send((received, texts))


def look_again(pipe: support.Connection, config_pth: Path) -> None:
    """Open the queue for the first time in a process."""
    with warnings_of("persipubsub") as texts:
        with Sub("sub", config_pth) as sub:
            left = sub.front()
        findings = control.verify(config_pth)["queue"]
        with support.open_queue(config_pth) as queue:
            findings += tuple(queue.check())
    pipe.send((texts, left, findings))


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "existing"])
@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_processes_that_come_and_go_at_once(tmp_path: Path, durability: str, is_new: bool) -> None:
    for turn in range(ROUNDS):
        directory = tmp_path / (str(turn) if is_new else "queue")
        directory.mkdir(exist_ok=True)
        config_pth = support.write_config(directory, durability=durability)
        if not is_new:
            control.initialize_all_dbs(config_pth)
        barrier = support.FORK.Barrier(PROCESSES)
        sent = [f"{turn}-{place}" for place in range(PROCESSES)]
        received: collections.Counter[bytes] = collections.Counter()
        with contextlib.ExitStack() as stack:
            children = [
                stack.enter_context(support.Child(come_and_go, barrier, config_pth, name))
                for name in sent
            ]
            for child in children:
                messages, texts = child.get()
                received.update(messages)
                assert not texts
                child.end()
        assert received == {f"{name} {number}".encode(): 1 for name in sent for number in range(3)}
        with support.Child(look_again, config_pth) as child:
            assert child.get() == ([], None, ())
            child.end()


def close_at_once(pipe: support.Connection, barrier: Any, config_pth: Path) -> None:
    """Close the queue, again and again, at the same moment as the other process."""
    marked = 0
    for _ in range(25 * ROUNDS):
        with Sub("sub", config_pth):
            barrier.wait(support.HANG_SECS)
        barrier.wait(support.HANG_SECS)
        marked += config_pth.with_name("queue").joinpath("running").exists()
        barrier.wait(support.HANG_SECS)
    pipe.send(marked)


def test_last_one_leaves_cleanly(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    barrier = support.FORK.Barrier(2)
    with support.Child(close_at_once, barrier, config_pth) as one:
        with support.Child(close_at_once, barrier, config_pth) as other:
            # The mark of a queue in use: with it, a reboot would rebuild the queue.
            assert (one.get(), other.get()) == (0, 0)
            one.end()
            other.end()
