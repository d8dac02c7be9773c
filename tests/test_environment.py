"""Test transactions: groups, interrupts, stopped processes, the size of the map, closing."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import collections
import functools
import os
import pathlib
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Counter

import lmdb
import pytest

import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.queue
import persipubsub.subscriber
from persipubsub.environment import _environment, _gate, _line, _registry
from tests import stores, support

INTERRUPTS = int(os.environ.get("PERSIPUBSUB_INTERRUPTS", "150"))


@pytest.fixture(name="config_pth", params=["fsync", "os"])
def fixture_config_pth(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    config_pth = support.write_config(tmp_path, durability=request.param, busy_timeout_secs=20)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    return config_pth


@pytest.fixture(name="environment")
def fixture_environment(config_pth: pathlib.Path) -> Iterator[_environment.Environment]:
    settings = support.settings(config_pth)
    environment = _registry.acquire(settings.path, settings.options())
    yield environment
    _registry.release(environment)


def last_transaction(environment: _environment.Environment) -> int:
    handles = environment._handles
    assert handles is not None
    return int(handles.environment.info()["last_txnid"])


def nothing(txn: Any, databases: Any) -> int:
    del databases
    return int(txn.id())


class Threads:
    """Run functions in threads and keep what came of them, by name."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}
        self._threads: list[threading.Thread] = []

    def start(self, name: str, function: Callable[[], object]) -> None:

        def run() -> None:
            try:
                self.results[name] = function()
            except BaseException as error:  # pylint: disable=broad-exception-caught
                self.results[name] = error

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self) -> dict[str, Any]:
        for thread in self._threads:
            thread.join(support.HANG_SECS)
            assert not thread.is_alive(), "Expected all threads to end, but one hangs."
        return self.results


class Dam:
    """Hold the write lock in a thread until the others wait, so that they make one group."""

    def __init__(self, environment: _environment.Environment, threads: Threads) -> None:
        self._environment = environment
        self._is_inside = threading.Event()
        self._is_open = threading.Event()
        threads.start("dam", lambda: environment.write(self._work))
        assert self._is_inside.wait(support.HANG_SECS)

    def _work(self, txn: Any, databases: Any) -> None:
        nothing(txn, databases)
        self._is_inside.set()
        assert self._is_open.wait(support.HANG_SECS)

    def open(self, waiting: int) -> None:
        support.until(lambda: len(self._environment._line.requests) >= waiting, "waiting requests")
        self._is_open.set()


# Groups


def test_threads_share_a_commit(config_pth: pathlib.Path,
                                environment: _environment.Environment) -> None:
    threads = Threads()
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        before = last_transaction(environment)
        dam = Dam(environment, threads)
        for number in range(40):
            threads.start(str(number),
                          lambda number=number: pub.send(b"%d" % number))  # type: ignore
        dam.open(waiting=40)
        assert set(threads.join().values()) == {None}
        # One of the dam, which changed nothing, and one for all of the others.
        assert last_transaction(environment) - before <= 2

    received: list[int] = []
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id="sub", config_pth=config_pth)
        for _ in range(40):
            with sub.receive(timeout=0) as message:
                assert message is not None
                received.append(int(message))
        assert sub.front() is None
    assert sorted(received) == list(range(40))


def fill_map(txn: Any, databases: Any) -> None:
    txn.put(b"key", bytes(1 << 29), db=databases.meta)


def put_long_key(txn: Any, databases: Any) -> None:
    txn.put(b"k" * 1000, b"value", db=databases.meta)


def use_missing_subscriber(txn: Any, databases: Any) -> None:
    del txn, databases
    raise persipubsub.errors.NotInitializedError("mine")


def lack_memory(txn: Any, databases: Any) -> None:
    txn.put(b"must not be committed", b"value", db=databases.meta)
    raise MemoryError("mine")


def divide_by_zero(txn: Any, databases: Any) -> None:
    txn.put(b"must not be committed", b"value", db=databases.meta)
    raise ZeroDivisionError("mine")


FAULTS: dict[str, Any] = {
    "map": (fill_map, persipubsub.errors.DiskFullError),
    "key": (put_long_key, persipubsub.errors.StoreError),
    "own": (use_missing_subscriber, persipubsub.errors.NotInitializedError),
    "memory": (lack_memory, MemoryError),
    "bug": (divide_by_zero, ZeroDivisionError),
}


@pytest.mark.parametrize("faults", [["map"], ["key"], ["own"], ["memory"], ["bug"],
                                    sorted(FAULTS)],
                         ids="-".join)
def test_each_gets_its_own_error(environment: _environment.Environment, faults: list[str]) -> None:
    threads = Threads()
    dam = Dam(environment, threads)

    def put(name: str) -> Callable[[Any, Any], str]:

        def work(txn: Any, databases: Any) -> str:
            txn.put(name.encode(), name.encode(), db=databases.meta)
            return name

        return work

    names = [f"good {number}" for number in range(10)]
    for place, name in enumerate(names):
        threads.start(name, functools.partial(environment.write, put(name)))
        if place < len(faults):
            fault = faults[place]
            threads.start(fault, functools.partial(environment.write, FAULTS[fault][0]))
    dam.open(waiting=len(names) + len(faults))
    results = threads.join()
    for name in names:
        assert results[name] == name
    for fault in faults:
        assert isinstance(results[fault], FAULTS[fault][1]), results

    def look(txn: Any, databases: Any) -> list[bytes]:
        assert txn.get(b"must not be committed", db=databases.meta) is None
        return [bytes(txn.get(name.encode(), db=databases.meta)) for name in names]

    assert environment.read(look) == [name.encode() for name in names]


def test_error_of_a_work_is_raised_alone(environment: _environment.Environment) -> None:
    for work, error in FAULTS.values():
        with pytest.raises(error):
            environment.write(work)
        assert environment.write(nothing) > 0
        assert environment.read(nothing) > 0


def committed(commit: int) -> _line.Request:
    """Make the request of a thread whose work was committed, and that waits for the flush."""
    request = _line.Request(nothing, is_flushed=True)
    request.commit = commit
    return request


def test_commit_during_a_flush_gets_a_flush_of_its_own(environment: _environment.Environment,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    commits: list[int] = []
    flushes: list[int] = []
    sync = environment._sync

    def sync_slowly() -> None:
        sync()
        if not flushes:
            # The flush has begun before this commit: it may have missed it.
            threads = Threads()
            threads.start("late", lambda: environment.write(stores.rewrite))
            commits.append(threads.join()["late"])
        flushes.append(len(commits))

    monkeypatch.setattr(environment, "_sync", sync_slowly)

    environment._flush(committed(environment.write(stores.rewrite)))
    environment._flush(committed(commits[0]))
    assert len(flushes) == 2
    environment._flush(committed(commits[0]))
    assert len(flushes) == 2


def test_who_is_flushed_waits_for_no_later_flush(environment: _environment.Environment,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    early = committed(environment.write(stores.rewrite))
    environment._flush(early)
    sync = environment._sync

    def sync_and_look() -> None:
        # As a follower that was woken when the next flush had begun.
        threads = Threads()
        threads.start("early", lambda: environment._flush(early))
        assert threads.join() == {"early": None}
        sync()

    monkeypatch.setattr(environment, "_sync", sync_and_look)
    environment._flush(committed(environment.write(stores.rewrite)))


def test_write_makes_way_for_a_process_that_waits(environment: _environment.Environment) -> None:
    handles = environment._handles
    assert handles is not None
    page = handles.gate._page
    assert page is not None
    page[0] = 1  # as another process does while it waits
    environment.write(nothing)
    assert page[0] == 0


# Interrupts


class Interrupts:
    """
    Raise KeyboardInterrupt at SIGINT, at most once for each arming.

    So it comes only while the library works, and not in the lines of the test around it.
    """

    def __init__(self) -> None:
        self.is_armed = False
        self.count = 0
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, *_: object) -> None:
        if self.is_armed:
            self.is_armed = False
            self.count += 1
            raise KeyboardInterrupt

    def run(self, function: Callable[[], object]) -> bool:
        """Return True if the function was not interrupted."""
        try:
            self.is_armed = True
            function()
            self.is_armed = False
            return True
        except KeyboardInterrupt:
            self.is_armed = False
            return False


def send_interrupted(pipe: support.Connection, config_pth: pathlib.Path, others: int) -> None:
    """Send until told to stop; then tell what was sent for sure, and what perhaps."""
    interrupts = Interrupts()
    pub = persipubsub.publisher.Pub()
    pub.init(pub_id="pub", config_pth=config_pth)
    sure, perhaps = [], []  # type: list[bytes], list[bytes]
    is_over = threading.Event()

    def send_beside(name: int) -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            message = b"%d-%d" % (name, number)
            pub.send(message)
            sure.append(message)

    threads = Threads()
    for name in range(others):
        threads.start(str(name), lambda name=name: send_beside(name + 1))  # type: ignore[misc]
    pipe.send("ready")
    number = 0
    while not pipe.poll():
        number += 1
        message = b"0-%d" % number
        (sure if interrupts.run(lambda: pub.send(message)) else perhaps).append(message)
    pipe.recv()
    is_over.set()
    failed = [result for result in threads.join().values() if result is not None]
    pub.send(b"last")
    sure.append(b"last")
    pipe.send((sure, perhaps, interrupts.count, [repr(error) for error in failed]))
    pipe.recv()
    # The process is still there: nothing that it holds keeps others from going on.
    pub.send(b"very last")
    pipe.send(None)
    pub.close()


def has_pending(child: support.Child, number: int) -> bool:
    """Tell whether a signal is on its way to a process: another one of its number would be lost."""
    status = pathlib.Path(f"/proc/{child.process.pid}/status").read_text("ascii")
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def fire(child: support.Child, generator: random.Random, count: int) -> None:
    for _ in range(count):
        time.sleep(generator.uniform(0, 0.004))
        support.until(lambda: not has_pending(child, signal.SIGINT), "the interrupt before")
        child.kill(signal.SIGINT)


@pytest.mark.parametrize("others", [0, 4])
def test_interrupted_send(config_pth: pathlib.Path, others: int) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    with support.Child(send_interrupted, config_pth, others) as child:
        child.get()
        fire(child, random.Random(seed), INTERRUPTS)
        child.pipe.send("stop")
        sure, perhaps, count, failed = child.get()
        print("interrupts", count)
        assert count > INTERRUPTS // 10
        assert not failed

        with persipubsub.publisher.Pub() as pub:
            pub.init(pub_id="pub", config_pth=config_pth)
            pub.send(b"from another process")
        received: Counter[bytes] = collections.Counter()
        with persipubsub.subscriber.Sub() as sub:
            sub.init(sub_id="sub", config_pth=config_pth)
            message: bytes | None = None
            while message != b"from another process":
                with sub.receive(timeout=support.HANG_SECS) as message:
                    assert message is not None
                    received[message] += 1
            child.pipe.send("go on")
            child.get()
            with sub.receive(timeout=support.HANG_SECS) as message:
                assert message == b"very last"
        child.end()

    del received[b"from another process"]
    assert set(sure) <= set(received) <= set(sure) | set(perhaps)
    assert not [message for message, times in received.items() if times > 1]


def send_from_a_handler(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Send, while other threads do so, and a signal handler does in the midst of it."""
    pub = persipubsub.publisher.Pub()
    pub.init(pub_id="pub", config_pth=config_pth)
    from_handler, refused = [], []  # type: list[bytes], list[str]
    is_over = threading.Event()

    def handle(*_: object) -> None:
        message = b"handler-%d" % (len(from_handler) + len(refused))
        try:
            pub.send(message)
            from_handler.append(message)
        except persipubsub.errors.StoreError as error:
            refused.append(str(error))
        finally:
            # Not by itself again and again: on a busy machine handlers that interrupt each other
            # would end in a RecursionError.
            if not is_over.is_set():
                signal.setitimer(signal.ITIMER_REAL, 0.001)

    def send_beside(name: int) -> int:
        number = 0
        while not is_over.is_set():
            pub.send(b"%d-%d" % (name, number))
            number += 1
        return number

    threads = Threads()
    for name in range(3):
        threads.start(str(name), lambda name=name: send_beside(name))  # type: ignore[misc]
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    number = 0
    deadline = time.monotonic() + support.HANG_SECS
    environment = support.queue_of(pub)._environment
    line = environment._line
    while time.monotonic() < deadline and (not from_handler or number < 200):
        pub.send(b"main-%d" % number)
        number += 1
        if number % 10 == 0:
            # The timer may never meet a write of this thread, since others do its work: it does
            # theirs now, and is interrupted in the midst of it.
            with line.lock:
                support.until(lambda: len(line.requests) == 3, "waiting threads")
                environment.write(lambda txn, databases: signal.raise_signal(signal.SIGALRM))
    is_over.set()
    signal.setitimer(signal.ITIMER_REAL, 0)
    pipe.send((number, from_handler, refused, threads.join()))
    pub.close()


def test_signal_handler_that_sends(config_pth: pathlib.Path) -> None:
    with support.Child(send_from_a_handler, config_pth) as child:
        number, from_handler, refused, beside = child.get()
        child.end()
    # What it interrupts it can not wait for; nobody else has a part in that.
    assert refused and all("signal handler" in text for text in refused)
    assert [count for count in beside.values() if not isinstance(count, int)] == []
    expected = [b"main-%d" % index for index in range(number)] + from_handler
    for name, count in beside.items():
        expected.extend(b"%s-%d" % (name.encode("ascii"), index) for index in range(count))
    received: list[bytes] = []
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id="sub", config_pth=config_pth)
        while len(received) < len(expected):
            with sub.receive_many(max_msgs=1000, timeout=support.HANG_SECS) as messages:
                assert messages
                received.extend(messages)
        assert sub.front() is None
    assert sorted(received) == sorted(expected)


class InterruptedDeque(collections.deque[Any]):
    """Be interrupted once, when the entries are removed and nobody has them yet."""

    is_interrupted = False

    def popleft(self) -> Any:
        if not self.is_interrupted:
            self.is_interrupted = True
            # All of them, as nobody knows whose thread gets the lock first.
            self.clear()
            raise KeyboardInterrupt
        return super().popleft()


def write_interrupted(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Write in three threads, one of which is interrupted; tell what came of each."""
    settings = support.settings(config_pth)
    environment = _registry.acquire(settings.path, settings.options())
    threads = Threads()
    dam = Dam(environment, threads)
    environment._line.requests = InterruptedDeque()
    for name in ("one", "two", "three"):
        threads.start(name, lambda: environment.write(stores.rewrite))
    dam.open(waiting=3)
    pipe.send(sorted(type(result).__name__ for result in threads.join().values()))
    _registry.release(environment)


def test_interrupt_loses_no_work_of_another_thread(config_pth: pathlib.Path) -> None:
    # In another process, which can be killed: a thread whose work is lost would hang for good.
    with support.Child(write_interrupted, config_pth) as child:
        assert child.get() == ["KeyboardInterrupt", "NoneType", "int", "int"]
        child.end()


def receive_interrupted(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Receive until told to stop; then tell what was received."""
    interrupts = Interrupts()
    sub = persipubsub.subscriber.Sub()
    sub.init(sub_id="sub", config_pth=config_pth)
    received: list[bytes] = []

    def receive() -> None:
        with sub.receive(timeout=0.002) as message:
            if message is not None:
                received.append(message)

    pipe.send("ready")
    while not pipe.poll():
        interrupts.run(receive)
    pipe.recv()
    pipe.send((received, interrupts.count))
    pipe.recv()
    with sub.receive(timeout=support.HANG_SECS) as message:
        pipe.send(message)
    sub.close()


def test_interrupted_receive(config_pth: pathlib.Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    sent = [b"%d" % number for number in range(2000)]
    with support.Child(receive_interrupted,
                       config_pth) as child, persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        child.get()
        pub.send_many(sent)
        fire(child, random.Random(seed), INTERRUPTS)
        child.pipe.send("stop")
        received, count = child.get()
        print("interrupts", count)
        assert count > INTERRUPTS // 10

        # All others are there for another process, although the first one is still alive.
        with persipubsub.subscriber.Sub() as sub:
            sub.init(sub_id="sub", config_pth=config_pth)
            pub.send(b"mark")
            rest: list[bytes] = []
            while not rest or rest[-1] != b"mark":
                with sub.receive(timeout=support.HANG_SECS) as message:
                    assert message is not None
                    rest.append(message)
            assert sub.front() is None
        child.pipe.send("go on")
        pub.send(b"very last")
        assert child.get() == b"very last"
        child.end()
    assert set(received) | set(rest[:-1]) == set(sent)
    twice = collections.Counter(received + rest)
    assert sum(twice.values()) - len(twice) <= count
    assert rest[:-1] == sorted(rest[:-1], key=int)


# A process that stops in the middle of a write


def stop_inside(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Stop this process in a transaction, when told."""
    pipe.recv()
    settings = support.settings(config_pth)
    environment = _registry.acquire(settings.path, settings.options())

    def work(txn: Any, databases: Any) -> None:
        txn.put(b"key", b"value", db=databases.meta)
        pipe.send("inside")
        os.kill(os.getpid(), signal.SIGSTOP)

    environment.write(work)
    pipe.send("done")
    pipe.recv()


def is_stopped(child: support.Child) -> bool:
    stat = pathlib.Path(f"/proc/{child.process.pid}/stat").read_text("ascii")
    return stat.rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
def test_stopped_writer(tmp_path: pathlib.Path, end: int) -> None:
    config_pth = support.write_config(tmp_path, busy_timeout_secs=0.5)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.publisher.Pub() as pub, persipubsub.subscriber.Sub() as sub, support.Child(
            stop_inside, config_pth) as child:
        pub.init(pub_id="pub", config_pth=config_pth)
        sub.init(sub_id="sub", config_pth=config_pth)
        pub.send(b"before")
        child.pipe.send("go")
        assert child.get() == "inside"
        support.until(lambda: is_stopped(child), "stopped process")

        start = time.monotonic()
        with pytest.raises(persipubsub.errors.BusyTimeoutError, match="within 0.5 seconds"):
            pub.send(b"refused")
        assert 0.4 < time.monotonic() - start < 20
        assert sub.front() == b"before"
        with pytest.raises(persipubsub.errors.BusyTimeoutError):
            with sub.receive(timeout=1) as message:
                assert message == b"before"
        # Many threads wait no longer, one after the other, than a few of them would.
        threads = Threads()
        for number in range(8):
            threads.start(str(number), lambda: pub.send(b"refused"))
        start = time.monotonic()
        assert {type(error)
                for error in threads.join().values()} == {persipubsub.errors.BusyTimeoutError}
        assert time.monotonic() - start < 20
        with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
            assert queue.statistics() is not None

        # Who is to open it needs a write transaction of LMDB, and a forked child opens it again.
        with persipubsub.publisher.Pub() as other:
            use = functools.partial(other.init, pub_id="pub", config_pth=config_pth)
            assert support.outcomes_in_child(sub.front, use) == ["BusyTimeoutError"] * 2

        child.kill(end)
        if end == signal.SIGCONT:
            assert child.get() == "done"
        else:
            child.end(-signal.SIGKILL)
        pub.send(b"after")
        for expected in (b"before", b"after"):
            with sub.receive(timeout=support.HANG_SECS) as message:
                assert message == expected
        assert sub.front() is None


def test_timeout_says_the_truth(tmp_path: pathlib.Path) -> None:
    """Nothing was written if a thread gets BusyTimeoutError, although others write for it."""
    config_pth = support.write_config(tmp_path, busy_timeout_secs=0.5)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    settings = support.settings(config_pth)
    environment = _registry.acquire(settings.path, settings.options())
    gate = _gate.Gate(os.path.join(settings.path, "write.lock"))
    assert gate.enter(deadline=0)
    is_over = threading.Event()

    def slow(txn: Any, databases: Any) -> None:
        nothing(txn, databases)
        is_over.wait(2)

    threads = Threads()
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)

        def send() -> None:
            try:
                pub.send(b"message")
            finally:
                is_over.set()

        # The slow one leads a group with the other one in it, which waits too long.
        threads.start("slow", lambda: environment.write(slow))
        support.until(lambda: len(environment._line.requests) == 1, "slow request")
        threads.start("send", send)
        support.until(lambda: len(environment._line.requests) == 2, "request")
        gate.close()
        results = threads.join()
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id="sub", config_pth=config_pth)
        found = sub.front()
    _registry.release(environment)
    if results["send"] is None:
        assert found == b"message"
    else:
        assert isinstance(results["send"], persipubsub.errors.BusyTimeoutError)
        assert found is None


# The size of the map


def count_following() -> int:
    """Count the threads that are about to map as much as another process does."""
    return [name for names in stacks() for name in names].count("_follow_map_size")


def stacks() -> Iterator[list[str]]:
    """Give the names of the functions that each thread is in."""
    for innermost in sys._current_frames().values():
        yield [frame.f_code.co_name for frame, _ in traceback.walk_stack(innermost)]


def send_large(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Open the queue with a larger map and fill it with more than the smaller one holds."""
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        pipe.send("open")
        pipe.recv()
        for _ in range(8):
            pub.send(bytes(1 << 18))
        pipe.send("sent")
        pipe.recv()
        pub.send(b"beside")
    pipe.send("sent again")


def test_map_made_larger_by_another_process(tmp_path: pathlib.Path) -> None:
    small = support.write_config(tmp_path, name="small.json", max_db_size_bytes=1 << 20)
    large = support.write_config(tmp_path, name="large.json", max_db_size_bytes=1 << 24)
    persipubsub.control.initialize_all_dbs(config_pth=small)
    with persipubsub.publisher.Pub() as pub, persipubsub.subscriber.Sub() as sub:
        # Forked first: a child opens again what it inherited as its parent opened it.
        with support.Child(send_large, large) as child:
            assert child.get() == "open"
            pub.init(pub_id="pub", config_pth=small)
            sub.init(sub_id="sub", config_pth=small)
            pub.send(b"first")
            assert sub.front() == b"first"
            child.pipe.send("go")
            assert child.get() == "sent"
            threads = Threads()
            # A copy that is being made, which reads the map and may take long.
            with support.queue_of(pub)._environment._copy_lock:
                for number in range(4):
                    threads.start(f"read {number}", sub.front)
                    threads.start(f"write {number}", lambda: pub.send(b"last"))
                support.until(lambda: count_following() == 8 or threads.results, "who waits for it")
                # Nobody who waits for it keeps other processes from writing.
                child.pipe.send("go")
                assert child.get() == "sent again"
                assert not threads.results
            child.end()
        results = threads.join()
        assert set(results.values()) == {b"first", None}, results
        sizes: list[int] = []
        while True:
            with sub.receive(timeout=0) as message:
                if message is None:
                    break
                sizes.append(len(message))
        assert sizes == [5] + [1 << 18] * 8 + [6] + [4] * 4


def fork() -> None:
    """Fork a process that ends at once."""
    process_id = os.fork()
    if process_id == 0:
        os._exit(0)
    os.waitpid(process_id, 0)


@pytest.mark.parametrize("is_forking", [False, True])
def test_signal_handler_that_reads_beside_a_larger_map(tmp_path: pathlib.Path,
                                                       is_forking: bool) -> None:
    """
    What the interrupted read looks at must not be unmapped: that ends in SIGBUS.

    And a thread that forks waits for the end of the read with all other locks held.
    """
    small = support.write_config(tmp_path, name="small.json", max_db_size_bytes=1 << 20)
    large = support.write_config(tmp_path, name="large.json", max_db_size_bytes=1 << 24)
    persipubsub.control.initialize_all_dbs(config_pth=small)
    with support.Child(send_large, large) as sender:
        assert sender.get() == "open"

        def run(pipe: support.Connection) -> None:
            with persipubsub.queue.Queue(support.settings(small)) as queue:
                queue.put([b"first"])
                environment = queue._environment
                forking = threading.Thread(target=fork)

                def is_locked() -> bool:
                    if environment._flush_lock.acquire(blocking=False):
                        environment._flush_lock.release()
                        return False
                    return True

                def work(txn: Any, databases: Any) -> tuple[str, bytes]:
                    cursor = txn.cursor(db=databases.data)
                    assert cursor.first()
                    value = cursor.value()
                    sender.pipe.send("go")
                    assert sender.get() == "sent"
                    if is_forking:
                        forking.start()
                        support.until(is_locked, "the locks of a fork")
                    # As by a handler of a signal that arrives now.
                    nested = support.outcome(lambda: environment.read(lambda *_: None))
                    return nested, bytes(value[-5:])

                pipe.send(environment.read(work))
                pipe.send(queue.front("sub"))
                if is_forking:
                    forking.join(support.HANG_SECS)

        with support.Child(run) as child:
            assert child.get() == ("StoreError", b"first")
            assert child.get() == b"first"
            child.end()
        sender.pipe.send("go")
        assert sender.get() == "sent again"
        sender.end()


def send_until_told(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Write more than those map who open the queue meanwhile, again and again."""
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        pipe.send("open")
        while not pipe.poll():
            pub.send(bytes(1 << 17))
    pipe.send("sent")


def test_opening_while_another_process_makes_the_map_larger(tmp_path: pathlib.Path) -> None:
    changes: dict[str, Any] = {"durability": "os", "checkpoint_secs": 0}
    small = support.write_config(tmp_path, name="small.json", max_db_size_bytes=1 << 20, **changes)
    large = support.write_config(tmp_path, name="large.json", max_db_size_bytes=1 << 32, **changes)
    persipubsub.control.initialize_all_dbs(config_pth=small)
    with support.Child(send_until_told, large) as child:
        assert child.get() == "open"
        for _ in range(300):
            with persipubsub.subscriber.Sub() as sub:
                sub.init(sub_id="sub", config_pth=small)
        child.pipe.send("end")
        assert child.get() == "sent"
        child.end()


def test_copy_while_another_process_makes_the_map_larger(tmp_path: pathlib.Path) -> None:
    small = support.write_config(tmp_path, name="small.json", max_db_size_bytes=1 << 20)
    large = support.write_config(tmp_path, name="large.json", max_db_size_bytes=1 << 24)
    persipubsub.control.initialize_all_dbs(config_pth=small)
    with support.Child(send_large, large) as child:
        assert child.get() == "open"

        def send(_: lmdb.Environment) -> None:
            child.pipe.send("go")
            assert child.get() == "sent"

        with persipubsub.queue.Queue(support.settings(small)) as queue, open(
                tmp_path / "copy", "wb") as fid:
            queue._environment.copy(fid.fileno(), verify=send)
        assert os.stat(tmp_path / "copy").st_size > 8 << 18
        child.pipe.send("go")
        assert child.get() == "sent again"
        child.end()


def show_map(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Look at the queue when told; tell how much of it is mapped, and how much is written."""
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        pipe.send("open")
        pipe.recv()
        queue.front("sub")
        handles = queue._environment._open_handles()
        info = handles.environment.info()
        pipe.send((info["map_size"], (info["last_pgno"] + 1) * handles.environment.stat()["psize"]))


def test_room_that_was_made_is_nobody_elses(tmp_path: pathlib.Path) -> None:
    """Others map what was written into a full map to make room, and no more."""
    config_pth = support.write_config(tmp_path, max_db_size_bytes=1 << 20)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with support.Child(show_map, config_pth) as child:
        assert child.get() == "open"
        with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
            environment = queue._environment

            def fill(txn: Any, databases: Any) -> None:
                for number in range(1 << 20):
                    txn.put(b"%08d" % number, bytes(1000), db=databases.once)

            with pytest.raises(persipubsub.errors.DiskFullError):
                environment.write(fill)
            environment.write(lambda txn, databases: txn.put(
                b"filling", bytes((1 << 20) + 4096), db=databases.once),
                              may_grow=True)
            child.pipe.send("go")
            mapped, written = child.get()
            assert mapped == written > 1 << 20
            assert environment._open_handles().environment.info()["map_size"] == written
            environment.write(lambda txn, databases: txn.delete(b"filling", db=databases.once),
                              may_grow=True)
        child.end()


# Closing


def use_until_closed(config_pth: pathlib.Path) -> None:
    """Use a publisher and a subscriber in many threads, and close them meanwhile."""
    pub = persipubsub.publisher.Pub()
    pub.init(pub_id="pub", config_pth=config_pth)
    sub = persipubsub.subscriber.Sub()
    sub.init(sub_id="sub", config_pth=config_pth)
    threads = Threads()
    counts: Counter[str] = collections.Counter()

    def send() -> None:
        pub.send(b"message")

    def receive() -> None:
        with sub.receive(timeout=0.01):
            pass

    def repeat(name: str, function: Callable[[], object]) -> None:
        while True:
            function()
            counts[name] += 1

    for number in range(3):
        for name, function in (("send", send), ("front", sub.front), ("receive", receive)):
            threads.start(f"{name} {number}", functools.partial(repeat, name, function))
    support.until(lambda: len(counts) == 3, "all three uses")
    pub.close()
    sub.close()
    results = threads.join()
    assert {type(error) for error in results.values()} == {persipubsub.errors.ClosedError}


def test_close_while_others_work(config_pth: pathlib.Path) -> None:
    for _ in range(10):
        use_until_closed(config_pth)
    assert not _registry._REGISTRY


def test_closed_environment(environment: _environment.Environment) -> None:
    handles = environment._handles
    _registry.acquire(environment.directory, environment.options)
    _registry.release(environment)
    assert environment.write(nothing)
    assert environment._handles is handles
    environment.close()
    environment.close()
    for use in (lambda: environment.read(nothing), lambda: environment.write(nothing),
                environment.flush_now, environment.check_readers):
        with pytest.raises(persipubsub.errors.ClosedError, match="closed"):
            use()


def test_dead_readers_are_found(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, max_reader_num=2)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    settings = support.settings(config_pth)
    environment = _registry.acquire(settings.path, settings.options())

    def read(pipe: support.Connection) -> None:

        def work(txn: Any, databases: Any) -> None:
            nothing(txn, databases)
            pipe.send("inside")
            pipe.recv()

        environment.read(work)

    for _ in range(2):
        with support.Child(read) as child:
            assert child.get() == "inside"
            child.kill(signal.SIGKILL)
            child.end(-signal.SIGKILL)
    assert environment.read(nothing) >= 0
    _registry.release(environment)


def test_error_of_lmdb_never_gets_through(environment: _environment.Environment) -> None:

    def fail(txn: Any, databases: Any) -> None:
        del txn, databases
        # A store that is damaged in such a way would be refused when it is opened.
        raise lmdb.CorruptedError("made up")

    for use in (environment.read, environment.write):
        with pytest.raises(persipubsub.errors.StoreCorruptError, match="made up") as caught:
            use(fail)
        assert isinstance(caught.value.__cause__, lmdb.CorruptedError)


def test_clock_goes_on(config_pth: pathlib.Path) -> None:
    settings = support.settings(config_pth)
    times: list[int] = []
    for _ in range(3):
        environment = _registry.acquire(settings.path, settings.options())
        times.extend(environment.now_ns() for _ in range(100))
        _registry.release(environment)
    assert times == sorted(times)
    assert abs(times[0] - time.time_ns()) < 3600 * 10**9
