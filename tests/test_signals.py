"""
Test exceptions that signal handlers raise in the middle of calls.

A handler that raises interrupts the main thread between any two instructions. What it raises
reaches the caller; the call took effect or not; nothing is stored twice, nothing that was
acknowledged is lost, and no other thread notices.
"""

import collections
import gc
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import persipubsub.config
from persipubsub import Pub, Sub, control
from tests import stores, support


class Interrupt(Exception):
    """Raised by the handler of a test."""


KINDS: list[type[BaseException]] = [Interrupt, KeyboardInterrupt, TimeoutError, OSError]


class Timer:
    """Raise an exception in the main thread again and again, at moments of its own."""

    def __init__(self, kind: type[BaseException], seed: int) -> None:
        self.raised = 0
        self.is_on = False
        #: Raised in a finalizer, where Python itself can only print them.
        self.unraisable = 0
        self.where = ""
        # Of the test tools: what is raised in them is theirs to swallow.
        gc.callbacks.clear()
        # Python swallows what a handler raises in any __del__. A forked child inherits what tests
        # before it left to the garbage collector, also leases of messages: they are collected now,
        # and what else the parent has is never collected here.
        gc.collect()
        gc.freeze()
        self._kind = kind
        sys.unraisablehook = self._note
        self._random = random.Random(seed)
        signal.signal(signal.SIGALRM, self._handle)

    def _handle(self, *_: object) -> None:
        if self.is_on:
            self.is_on = False
            self.raised += 1
            raise self._kind("of the handler")

    def _note(self, found: "sys.UnraisableHookArgs") -> None:
        self.unraisable += 1
        self.where = repr(found.object)

    def call(self, work: Callable[[], object]) -> bool | None:
        """
        Call a function with a signal somewhere in it, or behind it.

        Return True if it returned, False if what the handler raised came out of it.
        """
        raised = self.raised - self.unraisable
        is_done = False
        try:
            self.is_on = True
            signal.setitimer(signal.ITIMER_REAL, self._random.uniform(0.000001, 0.0006))
            work()
            is_done = True
            self.is_on = False
        except BaseException as error:  # pylint: disable=broad-exception-caught
            # Nothing but what the handler raised comes out, and it does come out.
            if not isinstance(error, self._kind) or str(error) != "of the handler":
                raise
            return is_done
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.raised - self.unraisable != raised:
            raise AssertionError("The exception of the handler was swallowed.")
        return True


def publish(pipe: support.Connection, config_pth: Path, kind: type[BaseException], seconds: float,
            seed: int) -> None:
    """Send in the main thread, which is interrupted, and in two others, which are not."""
    pub = Pub("pub", config_pth)
    is_over = threading.Event()
    sent: list[bytes] = []
    failed: list[str] = []

    def send(name: int) -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            try:
                pub.send(b"%d-%d" % (name, number))
                sent.append(b"%d-%d" % (name, number))
            except BaseException as error:  # pylint: disable=broad-exception-caught
                failed.append(repr(error))

    threads = [threading.Thread(target=send, args=(name, ), daemon=True) for name in (1, 2)]
    for thread in threads:
        thread.start()
    timer = Timer(kind, seed)
    unknown: list[bytes] = []
    number = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        number += 1
        message = b"0-%d" % number
        try:
            is_sent = timer.call(lambda message=message: pub.send(message))  # type: ignore[misc]
            (sent if is_sent else unknown).append(message)
        except BaseException as error:  # pylint: disable=broad-exception-caught
            failed.append(repr(error))
            unknown.append(message)
    is_over.set()
    for thread in threads:
        thread.join(support.HANG_SECS)
        if thread.is_alive():
            failed.append("a thread hangs")
    pub.close()
    if timer.unraisable:
        failed.append(f"an exception of the handler was swallowed in {timer.where}")
    pipe.send((sent, unknown, failed, timer.raised))


@pytest.mark.parametrize("kind, durability",
                         [*((kind, "fsync") for kind in KINDS), (Interrupt, "os")])
def test_interrupted_publisher_with_threads(tmp_path: Path, kind: type[BaseException],
                                            durability: str) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    config_pth = support.make_queue(tmp_path, durability=durability)
    with support.Child(publish, config_pth, kind, 1.0, seed) as child:
        sent, unknown, failed, raised = child.get()
        # ... and close does not hang behind it.
        child.end()
    assert not failed, failed[:3]
    assert raised > 50
    with support.open_queue(config_pth) as queue:
        assert queue.check() == []
        counts = collections.Counter(stores.take_all(queue))
    assert [message for message, count in counts.items() if count > 1] == []
    assert set(sent) <= set(counts) <= set(sent) | set(unknown)
    assert control.verify(config_pth) == {"queue": ()}


def consume(pipe: support.Connection, config_pth: Path, kind: type[BaseException],
            seed: int) -> None:
    """Receive until there is nothing, interrupted all the time."""
    sub = Sub("sub", config_pth)
    timer = Timer(kind, seed)
    seen: list[bytes] = []
    acknowledged: list[bytes] = []

    def receive() -> None:
        with sub.receive(timeout=0) as message:
            if message is not None:
                seen.append(message)
        if message is not None:
            acknowledged.append(message)

    while control.statistics(config_pth)["queue"].messages:
        for _ in range(20):
            timer.call(receive)
    sub.close()
    pipe.send((seen, acknowledged, timer.raised))


@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind.__name__)
def test_interrupted_subscriber(tmp_path: Path, kind: type[BaseException]) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    config_pth = support.make_queue(tmp_path, durability="os")
    messages = [b"%d" % number for number in range(600)]
    with support.open_queue(config_pth) as queue:
        queue.put(messages[:300])
        for message in messages[300:]:
            queue.put([message])
    with support.Child(consume, config_pth, kind, seed) as child:
        seen, acknowledged, raised = child.get()
        child.end()
    assert raised > 20
    # None is lost; one comes again only if its acknowledgement was interrupted.
    assert set(seen) == set(messages)
    assert max(collections.Counter(acknowledged).values()) == 1
    with support.open_queue(config_pth) as queue:
        assert queue.check() == []
        assert stores.figures(queue).lag == 0


def open_and_close(pipe: support.Connection, config_pth: Path, seed: int) -> None:
    timer = Timer(Interrupt, seed)

    # Read before: msgspec, in C, swallows what comes out of functions of Python that it calls.
    config = persipubsub.config.read(config_pth)

    def use() -> None:
        with Pub("pub", config) as pub:
            pub.send(b"message")

    for _ in range(150):
        timer.call(use)
    # Whatever was left open by that: it works, in the end.
    with Pub("pub", config_pth) as pub:
        pub.send(b"last")
    pipe.send(timer.raised)


def test_interrupted_opening_and_closing(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, durability="os", busy_timeout_secs=10)
    with support.Child(open_and_close, config_pth, random.randrange(1 << 32)) as child:
        assert child.get() > 20
        child.end()
    with Sub("sub", config_pth) as sub:
        with sub.receive_many(max_msgs=1000, timeout=0) as messages:
            assert messages[-1] == b"last"
    assert control.verify(config_pth) == {"queue": ()}


def test_handler_that_uses_the_queue_in_the_middle_of_a_write_gets_an_error(tmp_path: Path) -> None:
    """Or its message is sent; it is neither lost without a word, nor does anything hang."""
    config_pth = support.make_queue(tmp_path, durability="os")

    def run(pipe: support.Connection) -> None:
        pub = Pub("pub", config_pth)
        outcomes: list[str] = []

        def handle(*_: object) -> None:
            outcomes.append(support.outcome(lambda: pub.send(b"handler")))

        signal.signal(signal.SIGALRM, handle)
        for _ in range(2000):
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.000001, 0.0002))
            pub.send(b"main")
        signal.setitimer(signal.ITIMER_REAL, 0)
        pub.close()
        pipe.send(outcomes)

    with support.Child(run) as child:
        outcomes = child.get()
        child.end()
    assert outcomes and set(outcomes) <= {"", "StoreError"}
    with support.open_queue(config_pth) as queue:
        counts = collections.Counter(stores.take_all(queue))
        assert counts == {b"main": 2000, b"handler": outcomes.count("")}
