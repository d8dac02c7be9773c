"""Test that writers wait for each other with a limit, and that nobody is kept out for ever."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from persipubsub import Pub, Sub, control, errors
from tests import stores, support
from tests.faults import tracing

LOCKS = ["write.lock", "open.lock", "journal.lock"]


def hold(pipe: support.Connection, path: str) -> None:
    """Hold a lock of a queue, as a process does that is stopped in the middle of something."""
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        pipe.send("locked")
        pipe.recv()


@contextlib.contextmanager
def locked(directory: Path, name: str) -> Iterator[None]:
    with support.Child(hold, str(directory / "queue" / name)) as child:
        assert child.get() == "locked"
        yield


@pytest.mark.parametrize("name", LOCKS)
def test_wait_ends_with_an_error_that_names_queue_and_key(tmp_path: Path, name: str) -> None:
    config_pth = support.make_queue(tmp_path, busy_timeout_secs=0.2)
    with support.open_queue(config_pth) as queue:
        # So that the journal has room for the next one.
        queue.put([b"before"])
        stores.take_all(queue)
        with locked(tmp_path, name):
            if name == "open.lock":
                code = "import sys, persipubsub; persipubsub.Pub('pub', sys.argv[1])"
                found = support.run_python(code, config_pth).stderr
            else:
                with pytest.raises(errors.BusyTimeoutError) as info:
                    queue.put([b"message"])
                found = f"BusyTimeoutError: {info.value}"
            assert re.search("BusyTimeoutError: .*queue.*busy_timeout_secs", found), found
        # That process was killed, and the kernel gave it back.
        queue.put([b"again"])
        # What could not be flushed in time is stored all the same, as the error says.
        expected = [b"message", b"again"] if name == "journal.lock" else [b"again"]
        assert stores.take_all(queue) == expected


def send_forever(pipe: support.Connection, config_pth: Path) -> None:
    with Pub("pub", config_pth) as pub:
        pipe.send("begun")
        while True:
            pub.send(b"x" * 100)


def test_writer_that_waits_gets_its_turn(tmp_path: Path) -> None:
    """A process that writes without a pause comes back within microseconds."""
    config_pth = support.make_queue(tmp_path, durability="os", busy_timeout_secs=support.HANG_SECS)
    with support.open_queue(config_pth) as queue, support.Child(send_forever, config_pth) as child:
        child.get()
        before = queue.statistics().next_number
        for _ in range(200):
            queue.put([b"ours"])
        # If it were unfair, there were many thousands of theirs by now.
        assert queue.statistics().next_number - before < 200 * 100


def test_threads_wait_with_a_limit_as_well(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, busy_timeout_secs=0.3)
    with support.open_queue(config_pth) as queue, locked(tmp_path, "write.lock"):
        outcomes: list[str] = []
        support.in_threads(4 *
                           [lambda: outcomes.append(support.outcome(lambda: queue.put([b"x"])))])
        assert outcomes == ["BusyTimeoutError"] * 4


def test_reading_waits_for_no_writer(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    with support.open_queue(config_pth) as queue:
        queue.put([b"message"])
        consumer = queue.consumer("sub")
        with locked(tmp_path, "write.lock"), locked(tmp_path, "journal.lock"):
            lease = consumer.take(timeout=0)
            assert lease is not None and lease.messages == [b"message"]
            assert queue.statistics().messages == 1
            assert queue.check() == []
        lease.ack()


def test_each_lock_is_refused_once(tmp_path: Path) -> None:
    """As by a kernel that has no memory for one more lock, and by many file systems."""
    tracing.require()
    config_pth = support.make_queue(tmp_path)

    def work() -> None:
        with Pub("pub", config_pth) as pub:
            pub.send(b"message")
        with Sub("sub", config_pth) as sub:
            with sub.receive(timeout=0):
                pass

    def check() -> None:
        outcome = support.outcome(work)
        # FlushError: the message was stored before a lock was refused.
        codes = {"": 0, "StoreError": 3, "FlushError": 3, "BusyTimeoutError": 4}
        os._exit(codes.get(outcome, 1))

    refused = 0
    for place in range(1, 12):
        code = tracing.inject(lambda: check, "flock", "error=ENOLCK", place)
        assert code in (0, 3, 4), f"Failed at lock {place}: {code}"
        refused += code == 3
    assert refused
    assert control.verify(config_pth) == {"queue": ()}
