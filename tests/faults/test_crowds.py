"""Use one queue with very many threads and subscribers."""

import collections
import functools
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from persipubsub import Pub, Sub
from tests import support

THREADS: Final = 1000
SUBSCRIBERS: Final = int(os.environ.get("PERSIPUBSUB_SUBSCRIBERS", "200"))


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
