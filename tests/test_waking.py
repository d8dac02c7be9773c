"""Test that consumers are woken: at once, from all processes, and without polling."""

import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import persipubsub.queue
from persipubsub import errors
from persipubsub.lmdb_engine import consuming
from tests import stores, support
from tests.faults import tracing

ROUNDS = int(os.environ.get("PERSIPUBSUB_WAKEUP_ROUNDS", "1000"))

#: Nobody looks without being woken within the time of a test.
FOR_EVER = 10 * support.HANG_SECS


@pytest.fixture(autouse=True)
def fixture_no_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consuming, "LONGEST_PAUSE_SECS", FOR_EVER)


def again(path: str) -> persipubsub.queue.Queue:
    return persipubsub.queue.Queue(path, stores.settings())


def receive(queue: persipubsub.queue.Queue, name: str = "sub") -> bytes:
    lease = queue.consumer(name).take(support.HANG_SECS, FOR_EVER)
    assert lease is not None, "Expected to be woken, but got: the time was over."
    lease.ack()
    return lease.messages[0]


def receive_in_child(pipe: support.Connection, path: str, name: str = "sub") -> None:
    with again(path) as queue:
        pipe.send("ready")
        while True:
            pipe.send(receive(queue, name))


def wait_in_thread(work: Callable[[], object], path: str) -> tuple[threading.Thread, list[object]]:
    """Call something in a thread, and wait until it sleeps."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(work())
        except errors.PersipubsubError as error:
            outcome.append(type(error).__name__)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    stores.until_somebody_waits(path)
    return thread, outcome


def test_no_wake_up_is_lost_however_the_two_meet(tmp_path: Path) -> None:
    """A ball goes back and forth, so that each process begins to wait while the other one sends."""

    def play(pipe: support.Connection, path: str) -> None:
        with again(path) as queue:
            pipe.send("ready")
            for _ in range(ROUNDS):
                queue.put([receive(queue, "there")], ("here", ))
            pipe.send("done")

    with stores.opened(tmp_path, subscribers=["here", "there"]) as queue:
        with support.Child(play, queue.path) as child:
            assert child.get() == "ready"
            for number in range(ROUNDS):
                queue.put([b"%d" % number], ("there", ))
                assert receive(queue, "here") == b"%d" % number
            assert child.get() == "done"
            child.end()


def test_all_who_wait_are_woken(tmp_path: Path) -> None:
    names = [f"sub{index}" for index in range(6)]
    with stores.opened(tmp_path, subscribers=names) as queue:
        threads = []
        for name in names[:3]:
            threads.append(wait_in_thread(functools.partial(receive, queue, name), queue.path))
        with contextlib.ExitStack() as stack:
            children = [
                stack.enter_context(support.Child(receive_in_child, queue.path, name))
                for name in names[3:]
            ]
            for child in children:
                assert child.get() == "ready"
            for _ in range(ROUNDS // 10):
                queue.put([b"message"])
                for child in children:
                    assert child.get() == b"message"
            for thread, outcome in threads:
                thread.join(support.HANG_SECS)
                assert outcome == [b"message"]


def test_waiter_that_is_killed_harms_nobody(tmp_path: Path) -> None:
    with stores.opened(tmp_path) as queue:
        for number in range(5):
            with support.Child(receive_in_child, queue.path) as child:
                assert child.get() == "ready"
                stores.until_somebody_waits(queue.path)
            thread, outcome = wait_in_thread(lambda: receive(queue), queue.path)
            queue.put([b"%d" % number])
            thread.join(support.HANG_SECS)
            assert outcome == [b"%d" % number]


def test_nobody_is_woken_where_nobody_waits(tmp_path: Path) -> None:
    """A notification is a look at the page then, and no system call."""
    tracing.require()
    with stores.opened(tmp_path):
        pass

    def start() -> Callable[[], None]:
        queue = again(stores.path_of(tmp_path))
        queue.put([b"first"])

        def work() -> None:
            for _ in range(100):
                queue.put([b"message"])
            os._exit(0)

        return work

    trace = tmp_path / "trace"
    assert tracing.run(start, ["-o", str(trace), "-e", "trace=futex"]) == 0
    # Not FUTEX_WAKE_PRIVATE, by which threads of the interpreter take turns.
    assert not re.findall(r"FUTEX_WAKE,", trace.read_text("utf-8"))


def _is_called(calls: list[int], times: int) -> bool:
    return len(calls) == times


def test_function_is_called_once_for_each_time_it_is_given(tmp_path: Path) -> None:
    with stores.opened(tmp_path) as queue:
        consumer = queue.consumer("sub")
        calls: list[int] = []
        call = functools.partial(calls.append, 1)
        queue.put([b"0"])
        for number in range(1, 20):
            consumer.call_once(call)
            # What was sent before it was given is found by the look behind it.
            lease, pause = consumer.try_take()
            assert lease is not None and pause > 0
            lease.ack()
            queue.put([b"%d" % number])
            support.until(functools.partial(_is_called, calls, number), what="the call")
        queue.put([b"nobody waits for it"])
        assert len(calls) == 19
    support.until(lambda: not any(thread.name == "persipubsub-notifier"
                                  for thread in threading.enumerate()),
                  what="the end of the thread")
