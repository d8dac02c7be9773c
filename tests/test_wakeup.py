"""Test waiting and waking between real processes, with the real inotify and without it."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import asyncio
import functools
import linecache
import mmap
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import pytest

import persipubsub._wakeup
import persipubsub.errors
from tests import support

ROUNDS = int(os.environ.get("PERSIPUBSUB_WAKEUP_ROUNDS", "20000"))

# Catches hangs. A wake-up that was lost shows as a wait of so long, thus as a failure.
HANG_SECS = 30.0

FORK = multiprocessing.get_context("fork")


def environment(polling: bool = False) -> dict[str, str]:
    """Return the environment for a Python process that finds the modules this one has."""
    result = {key: value for key, value in os.environ.items() if key != "PERSIPUBSUB_POLLING"}
    result["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path != "")
    if polling:
        result["PERSIPUBSUB_POLLING"] = "1"
    return result


@pytest.fixture(name="mode", params=["inotify", "polling"])
def fixture_mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with inotify and again without it."""
    mode: str = request.param
    monkeypatch.delenv("PERSIPUBSUB_POLLING", raising=False)
    if mode == "polling":
        monkeypatch.setenv("PERSIPUBSUB_POLLING", "1")
    elif sys.platform != "linux":
        pytest.skip("inotify is a part of Linux")
    return mode


@pytest.fixture(autouse=True)
def fixture_nothing_left() -> Iterator[None]:
    """See that nothing waits, is watched or stays open after a test."""
    hub = persipubsub._wakeup._hub
    yield
    assert hub is persipubsub._wakeup._hub
    assert not hub.files and not hub.watched and not hub.polled and not hub.followers
    assert hub.leader is None and not hub.lock.locked()
    assert (hub.inotify, hub.nudge, hub.poller) == (-1, -1, None)
    hub.retry_at = 0.0  # the next test shall not suffer from what this one used up


class Child:
    """Run a function in a forked process. It gets the child's end of a pipe, and may return."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        """Start the process."""
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=function, args=(theirs, ) + arguments, daemon=True)
        self.process.start()
        theirs.close()

    def get(self) -> Any:
        """Return what the child sent next."""
        assert self.pipe.poll(2 * HANG_SECS), "Expected the child to answer, but it hangs."
        return self.pipe.recv()

    def end(self) -> None:
        """Wait for the process to succeed."""
        self.process.join(2 * HANG_SECS)
        assert self.process.exitcode == 0

    def until_asleep(self) -> None:
        """Wait until all threads of the process sleep in the kernel."""
        assert self.process.pid is not None
        until_asleep(self.process.pid)


def until_asleep(process_id: int, threads: int = 1) -> None:
    deadline = time.monotonic() + HANG_SECS
    tasks = pathlib.Path(f"/proc/{process_id}/task")
    if not tasks.exists():
        return
    while True:
        states = [
            path.joinpath("stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            for path in tasks.iterdir()
        ]
        if len(states) >= threads and set(states) == {"S"}:
            return
        assert time.monotonic() < deadline, f"Expected sleeping threads, but got {states}"
        time.sleep(0.001)


Connection: TypeAlias = "multiprocessing.connection.Connection[Any, Any]"


class Board:
    """Share numbers between processes, for want of a queue: to write one is to commit."""

    def __init__(self, path: pathlib.Path) -> None:
        """Map the file, and create it if it is missing."""
        with open(path, "ab") as file:
            file.truncate(4096)
        with open(path, "r+b") as file:
            self._page = mmap.mmap(file.fileno(), 4096)
        self._mutex = threading.Lock()

    def __getitem__(self, index: int) -> int:
        """Return a number."""
        return int.from_bytes(self._page[8 * index:8 * index + 8], byteorder=sys.byteorder)

    def __setitem__(self, index: int, value: int) -> None:
        """Write a number, and unlock a mutex afterwards, as every commit does."""
        # Rejected: struct.pack_into writes zeros first, and another process may read them.
        self._page[8 * index:8 * index + 8] = value.to_bytes(length=8, byteorder=sys.byteorder)
        with self._mutex:
            pass
        with self._mutex:
            pass

    def reached(self, number: int, indices: Iterable[int]) -> bool:
        """Look whether all these numbers are so large."""
        return all(self[index] >= number for index in indices)


def wait_with(ticket: persipubsub._wakeup.Ticket, look: Callable[[], bool]) -> bool:
    """Wait as a subscriber does, until there is something. Return False if a wake-up was lost."""
    while True:
        ticket.arm()
        if look():
            return True
        if not ticket.wait(timeout=HANG_SECS):
            return False


def wait_until(bell: persipubsub._wakeup.Bell, look: Callable[[], bool]) -> bool:
    """Wait with a new ticket."""
    with bell.prepare() as ticket:
        return wait_with(ticket, look)


# Between processes.


def sleeper(pipe: Connection, path: str, times: int) -> None:
    bell = persipubsub._wakeup.Bell(path)
    with bell.prepare() as ticket:
        for _ in range(times):
            ticket.arm()
            while ticket.wait(timeout=0):  # polling starts with a ring without a need
                ticket.arm()
            pipe.send("armed")
            pipe.send(ticket.wait(timeout=HANG_SECS))
    bell.close()


def test_ring_wakes_a_sleeping_process(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    path = str(tmp_path / "bell")
    child = Child(sleeper, path, 100)
    bell = persipubsub._wakeup.Bell(path)
    for index in range(100):
        assert child.get() == "armed"
        if index % 2 == 0:
            child.until_asleep()
        bell.ring()
        assert child.get() is True
    child.end()
    bell.close()


def test_time_out_without_a_ring(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))
    with bell.prepare() as ticket:
        while ticket.wait(timeout=0):
            ticket.arm()
        start = time.monotonic()
        assert not ticket.wait(timeout=0.05)
        assert 0.049 < time.monotonic() - start < HANG_SECS
        assert not ticket.wait(timeout=-1)
    bell.close()


def test_a_ring_between_prepare_and_wait_is_kept(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))
    with bell.prepare() as ticket:
        bell.ring()
        assert ticket.wait(timeout=HANG_SECS)
        assert not ticket.wait(timeout=0)
        bell.ring()  # the flag was not set again
        assert not ticket.wait(timeout=0.01)
        ticket.arm()
        bell.ring()
        assert ticket.wait(timeout=0)
    bell.close()


def test_who_rings_says_where_the_log_ends(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    ours, theirs = (persipubsub._wakeup.Bell(str(tmp_path / "bell")) for _ in range(2))
    with ours.prepare() as ticket:
        for end in (7, 1 << 40, 0):
            theirs.ring(end)
            assert ticket.wait(timeout=HANG_SECS)
            assert ticket.end == end
            theirs.ring(5)  # nobody is to be woken
            assert ticket.end == end
            ticket.arm()
    ours.close()
    theirs.close()


def ping_pong(pipe: Connection, directory: pathlib.Path, me: int, rounds: int,
              one_ticket: bool) -> None:
    board = Board(directory / "board")
    bells = [persipubsub._wakeup.Bell(str(directory / f"bell{i}")) for i in range(2)]
    mine, other = bells[me], bells[1 - me]
    number, awake = 0, True
    with mine.prepare() as ticket:
        while number < rounds and awake:
            number += 1
            if me == 0:
                board[0] = number
                other.ring()
            look = functools.partial(board.reached, number, [1 - me])
            awake = wait_with(ticket, look) if one_ticket else wait_until(mine, look)
            if me == 1:
                board[1] = number
                other.ring()
    pipe.send((number, awake))
    mine.close()
    other.close()


@pytest.mark.parametrize("one_ticket", [False, True])
def test_no_wake_up_is_lost_in_ping_pong(mode: str, one_ticket: bool,
                                         tmp_path: pathlib.Path) -> None:
    rounds = ROUNDS if mode == "inotify" else ROUNDS // 20
    children = [Child(ping_pong, tmp_path, me, rounds, one_ticket) for me in range(2)]
    for child in children:
        child.pipe.poll(2 * HANG_SECS + ROUNDS * 0.01)
    assert [child.get() for child in children] == 2 * [(rounds, True)]
    for child in children:
        child.end()


PUBLISHERS = 2
WAITER_PROCESSES = 2
WAITER_THREADS = 2
WAITERS = WAITER_PROCESSES * WAITER_THREADS


def acknowledged(publisher: int, waiter: int) -> int:
    return PUBLISHERS + publisher * WAITERS + waiter


def lockstep_publisher(pipe: Connection, directory: pathlib.Path, me: int, rounds: int) -> None:
    board = Board(directory / "board")
    messages = persipubsub._wakeup.Bell(str(directory / "messages"))
    acknowledgements = persipubsub._wakeup.Bell(str(directory / "acknowledgements"))
    indices = [acknowledged(me, waiter) for waiter in range(WAITERS)]
    number, awake = 0, True
    while number < rounds and awake:
        number += 1
        board[me] = number
        messages.ring()
        awake = wait_until(acknowledgements, functools.partial(board.reached, number, indices))
    pipe.send((number, awake))
    messages.close()
    acknowledgements.close()


def lockstep_waiter(pipe: Connection, directory: pathlib.Path, me: int, rounds: int) -> None:
    board = Board(directory / "board")
    messages = persipubsub._wakeup.Bell(str(directory / "messages"))
    acknowledgements = persipubsub._wakeup.Bell(str(directory / "acknowledgements"))
    results: list[tuple[int, bool]] = []

    def wait(waiter: int) -> None:
        seen = [0] * PUBLISHERS

        def look() -> bool:
            now = [board[publisher] for publisher in range(PUBLISHERS)]
            changed = now != seen
            for publisher in range(PUBLISHERS):
                board[acknowledged(publisher, waiter)] = seen[publisher] = now[publisher]
            return changed

        awake = True
        while min(seen) < rounds and awake:
            awake = wait_until(messages, look)
            acknowledgements.ring()
        results.append((min(seen), awake))

    threads = [
        threading.Thread(target=wait, args=(me * WAITER_THREADS + i, ))
        for i in range(WAITER_THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send(results)
    messages.close()
    acknowledgements.close()


def test_no_wake_up_is_lost_between_many(mode: str, tmp_path: pathlib.Path) -> None:
    """Publish the next message when all threads of all processes have the last one."""
    rounds = ROUNDS // 20 if mode == "inotify" else ROUNDS // 100
    children = [Child(lockstep_waiter, tmp_path, me, rounds) for me in range(WAITER_PROCESSES)]
    children += [Child(lockstep_publisher, tmp_path, me, rounds) for me in range(PUBLISHERS)]
    for child in children:
        child.pipe.poll(2 * HANG_SECS + ROUNDS * 0.01)
    well = (rounds, True)
    assert [child.get() for child in children
            ] == WAITER_PROCESSES * [WAITER_THREADS * [well]] + PUBLISHERS * [well]
    for child in children:
        child.end()


def test_killed_waiter_harms_nobody(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    path = str(tmp_path / "bell")
    victim, survivor = Child(sleeper, path, 2), Child(sleeper, path, 2)
    bell = persipubsub._wakeup.Bell(path)
    for child in (victim, survivor):
        assert child.get() == "armed"
        child.until_asleep()
    victim.process.kill()
    victim.process.join(HANG_SECS)
    assert victim.process.exitcode == -signal.SIGKILL
    bell.ring()
    assert [survivor.get(), survivor.get()] == [True, "armed"]
    bell.ring()
    assert survivor.get() is True
    survivor.end()
    bell.close()


def test_many_processes_create_the_bell_at_once(tmp_path: pathlib.Path) -> None:
    """See that none of them wipes out the flag that another one set already."""

    def create(pipe: Connection, barrier: Any) -> None:
        for index in range(20):
            bell = persipubsub._wakeup.Bell(str(tmp_path / f"bell{index}"))
            barrier.wait(HANG_SECS)
            file = bell._open()
            file.page[persipubsub._wakeup._FLAG] = 1
            barrier.wait(HANG_SECS)
            pipe.send(file.page[persipubsub._wakeup._FLAG])
            bell.close()

    barrier = FORK.Barrier(4)
    children = [Child(create, barrier) for _ in range(4)]
    for child in children:
        assert [child.get() for _ in range(20)] == 20 * [1]
        child.end()
    for index in range(20):
        status = os.stat(tmp_path / f"bell{index}")
        assert (stat.S_IMODE(status.st_mode), status.st_size) == (0o600, 4096)


# What it costs.


def test_ring_is_no_system_call_when_nobody_sleeps(tmp_path: pathlib.Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    script = textwrap.dedent("""\
        import os, sys, persipubsub._wakeup
        bell = persipubsub._wakeup.Bell(sys.argv[1])
        bell.ring()
        os.stat("/begin")  if os.path.lexists("/begin") else None
        for _ in range(1000): bell.ring()
        os.path.lexists("/middle")
        with bell.prepare() as ticket: bell.ring()
        os.path.lexists("/end")
        bell.close()
        """)
    trace = tmp_path / "trace"
    process = subprocess.run(
        [strace, "-o",
         str(trace), sys.executable, "-c", script,
         str(tmp_path / "bell")],
        env=environment(),
        timeout=4 * HANG_SECS,
        check=False,
        capture_output=True,
        text=True)
    if process.returncode != 0 and "ptrace" in process.stderr.lower():
        pytest.skip(f"strace may not trace here: {process.stderr.strip()}")
    assert process.returncode == 0, process.stderr
    calls = trace.read_text(encoding="utf-8").splitlines()
    marks = [
        next(i for i, call in enumerate(calls) if f'"{mark}"' in call)
        for mark in ("/begin", "/middle", "/end")
    ]
    assert calls[marks[0] + 1:marks[1]] == []
    rings = [call for call in calls[marks[1]:marks[2]] if call.startswith("pread64")]
    assert len(rings) == 1, calls[marks[1]:marks[2]]


def idler(pipe: Connection, path: str, threads: int, secs: float) -> None:
    bell = persipubsub._wakeup.Bell(path)

    def wait() -> None:
        with bell.prepare() as ticket:
            deadline = time.monotonic() + secs
            while time.monotonic() < deadline:
                ticket.arm()
                ticket.wait(timeout=1.0)

    with bell.prepare():  # the first one costs the import of ctypes
        pass
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = [threading.Thread(target=wait) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    after = resource.getrusage(resource.RUSAGE_SELF)
    pipe.send(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    bell.close()


def test_idle_waiting_costs_nothing(mode: str, tmp_path: pathlib.Path) -> None:
    child = Child(idler, str(tmp_path / "bell"), 4, 2.0)
    assert child.get() < (0.05 if mode == "inotify" else 0.5)
    child.end()


def test_import_is_cheap_until_somebody_waits() -> None:
    script = "import sys, persipubsub._wakeup; print({'ctypes', 'logging'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", script],
                            env=environment(),
                            check=True,
                            capture_output=True,
                            timeout=2 * HANG_SECS,
                            text=True).stdout
    assert output == "set()\n"


# Between threads of a process.


class Waiter(threading.Thread):
    """Wait for one ring in a thread."""

    def __init__(self, bell: persipubsub._wakeup.Bell, timeout: float = HANG_SECS) -> None:
        """Start to wait; return when the ticket is prepared."""
        super().__init__(daemon=True)
        self.bell = bell
        self.timeout = timeout
        self.rung: bool | None = None
        self.ready = threading.Event()
        self.start()
        assert self.ready.wait(HANG_SECS)

    def run(self) -> None:
        """Wait."""
        with self.bell.prepare() as ticket:
            while ticket.wait(timeout=0):
                ticket.arm()
            self.ready.set()
            self.rung = ticket.wait(timeout=self.timeout)

    def result(self) -> bool | None:
        """Return whether the ticket was rung."""
        self.join(2 * HANG_SECS)
        assert not self.is_alive()
        return self.rung


def until_led(followers: int = 0) -> None:
    """Wait until a thread leads, and so many follow."""
    hub = persipubsub._wakeup._hub
    deadline = time.monotonic() + HANG_SECS
    while hub.leader is None or len(hub.followers) < followers:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_thousand_threads_wait_for_one_bell(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))
    size = threading.stack_size(256 * 1024)
    try:
        waiters = [Waiter(bell) for _ in range(1000)]
    finally:
        threading.stack_size(size)
    until_led(followers=999)
    bell.ring()
    assert [waiter.result() for waiter in waiters] == 1000 * [True]
    bell.close()


def test_each_bell_wakes_its_own(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    bells = [persipubsub._wakeup.Bell(str(tmp_path / f"bell{i}")) for i in range(8)]
    waiters = [[Waiter(bell) for _ in range(2)] for bell in bells]
    until_led(followers=15)
    for index in (3, 0, 7, 1, 2, 6, 5, 4):  # the first leader waits for number 0
        bells[index].ring()
        assert [waiter.result() for waiter in waiters[index]] == [True, True]
        waiters[index] = []
        assert all(waiter.is_alive() for pair in waiters for waiter in pair)
    for bell in bells:
        bell.close()


def test_a_leader_whose_time_is_over_hands_over(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    bells = [persipubsub._wakeup.Bell(str(tmp_path / f"bell{i}")) for i in range(2)]
    leader = Waiter(bells[0], timeout=1.0)
    until_led()
    followers = [Waiter(bells[1]) for _ in range(3)]
    until_led(followers=3)
    assert leader.result() is False
    bells[1].ring()
    assert [waiter.result() for waiter in followers] == [True, True, True]
    for bell in bells:
        bell.close()


def test_the_leader_is_woken_by_whoever_dispatches(tmp_path: pathlib.Path) -> None:
    """Steal the leader's events, as an event loop does that watches the descriptor."""
    bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))
    with bell.prepare() as ticket:
        hub = persipubsub._wakeup._hub
        for _ in range(200):
            ticket.arm()
            waiter = Waiter(bell)
            until_led()
            start = time.monotonic()
            with hub.lock:  # the leader can not dispatch
                bell.ring()
                hub._drain()
            assert waiter.result() is True
            assert time.monotonic() - start < HANG_SECS / 2
            assert ticket.wait(timeout=0)
    bell.close()


def test_a_polled_bell_beside_a_watched_one(tmp_path: pathlib.Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """See that a leader who sleeps in the kernel starts to poll when that becomes necessary."""
    if sys.platform != "linux":
        pytest.skip("inotify is a part of Linux")
    monkeypatch.delenv("PERSIPUBSUB_POLLING", raising=False)
    bells = [persipubsub._wakeup.Bell(str(tmp_path / f"bell{i}")) for i in range(2)]
    leader = Waiter(bells[0])
    until_led()
    monkeypatch.setenv("PERSIPUBSUB_POLLING", "1")
    follower = Waiter(bells[1])
    until_led(followers=1)
    start = time.monotonic()
    bells[1].ring()
    assert follower.result() is True
    assert time.monotonic() - start < HANG_SECS / 2
    bells[0].ring()
    assert leader.result() is True
    for bell in bells:
        bell.close()


def test_two_bells_of_a_process_on_one_file(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    path = str(tmp_path / "bell")
    bells = [persipubsub._wakeup.Bell(path) for _ in range(2)]
    waiters = [Waiter(bell) for bell in bells]
    bells[0].ring()
    assert [waiter.result() for waiter in waiters] == [True, True]
    waiter = Waiter(bells[1])
    bells[0].close()
    bells[1].ring()
    assert waiter.result() is True
    bells[1].close()


def test_close_wakes_all_who_wait(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))
    ticket = bell.prepare()
    waiters = [Waiter(bell) for _ in range(5)]
    until_led(followers=4)
    start = time.monotonic()
    bell.close()
    bell.close()
    assert [waiter.result() for waiter in waiters] == 5 * [True]
    assert time.monotonic() - start < HANG_SECS
    ticket.arm()
    with pytest.raises(persipubsub.errors.ClosedError):
        ticket.wait(timeout=1)
    ticket.close()
    ticket.close()
    for call in (bell.ring, bell.prepare):
        with pytest.raises(persipubsub.errors.ClosedError) as information:
            call()
        assert str(tmp_path / "bell") in str(information.value)


def test_close_between_opening_and_waiting(mode: str, tmp_path: pathlib.Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    del mode
    bell, other = (persipubsub._wakeup.Bell(str(tmp_path / "bell")) for _ in range(2))
    open_file = bell._open

    def open_and_be_closed() -> Any:
        file = open_file()
        # By another thread. The file has been watched, and no longer is.
        bell.close()
        return file

    with bell.prepare(), other.prepare() as ticket:
        monkeypatch.setattr(bell, "_open", open_and_be_closed)
        with pytest.raises(persipubsub.errors.ClosedError):
            bell.prepare()
        other.ring()
        assert ticket.wait(HANG_SECS)
    other.close()


def test_close_while_threads_come_and_go(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    errors: list[BaseException] = []

    def work(bell: persipubsub._wakeup.Bell) -> None:
        try:
            while True:
                with bell.prepare() as ticket:
                    ticket.arm()
                    ticket.wait(timeout=0.001)
                bell.ring()
        except persipubsub.errors.ClosedError:
            pass
        except BaseException as error:  # pylint: disable=broad-except
            errors.append(error)

    for index in range(50):
        bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))
        threads = [threading.Thread(target=work, args=(bell, )) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.0005 * (index % 10))  # any moment is as good
        bell.close()
        for thread in threads:
            thread.join(HANG_SECS)
            assert not thread.is_alive()
    assert not errors


def test_all_descriptors_are_given_back(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("there is no /proc")

    def use(closed_tickets: int) -> None:
        bells = [persipubsub._wakeup.Bell(str(tmp_path / f"bell{i}")) for i in range(3)]
        tickets = [bell.prepare() for bell in bells]
        used.append(len(os.listdir("/proc/self/fd")))
        waiters = [Waiter(bell) for bell in bells]
        for ticket in tickets[:closed_tickets]:
            ticket.close()
        for bell in bells:
            bell.close()
        for waiter in waiters:
            waiter.result()

    used: list[int] = []
    before = support.count_descriptors()
    for number in (0, 1, 2, 3):
        use(closed_tickets=number)
        assert len(os.listdir("/proc/self/fd")) <= before
    assert min(used) >= before + 3


def test_lost_events_wake_everybody(tmp_path: pathlib.Path) -> None:
    """Ring so often without a look that the kernel's queue of events runs over."""
    limit = pathlib.Path("/proc/sys/fs/inotify/max_queued_events")
    if not limit.exists() or int(limit.read_text(encoding="utf-8")) > 100000:
        pytest.skip("the queue of events is too long to run over")
    bells = [persipubsub._wakeup.Bell(str(tmp_path / f"bell{i}")) for i in range(3)]
    tickets = [bell.prepare() for bell in bells]
    for _ in range(int(limit.read_text(encoding="utf-8")) // 2 + 1):
        for index in range(2):  # by turns, as the kernel merges equal events in a row
            tickets[index].arm()
            bells[index].ring()
    assert sum(ticket.wait(timeout=0) for ticket in tickets[:2] for _ in range(1000)) > 2
    assert tickets[2].rung
    for bell in bells:
        bell.close()


def test_event_loop_beside_threads(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "bell")
    bell = persipubsub._wakeup.Bell(path)

    async def receive(times: int) -> int:
        loop = asyncio.get_running_loop()
        rung = asyncio.Event()
        with bell.prepare() as ticket:
            ticket.set_callback(lambda: loop.call_soon_threadsafe(rung.set))
            loop.add_reader(ticket.fileno(), persipubsub._wakeup.dispatch)
            for index in range(times):
                rung.clear()
                ticket.arm()
                waiter = Waiter(bell) if index % 2 == 0 else None
                bell.ring()
                await asyncio.wait_for(rung.wait(), timeout=HANG_SECS)
                assert waiter is None or waiter.result() is True
            loop.remove_reader(ticket.fileno())
        return times

    assert asyncio.run(receive(200)) == 200
    with bell.prepare() as ticket:
        bell.ring()
        persipubsub._wakeup.dispatch()
        calls: list[int] = []
        ticket.set_callback(lambda: calls.append(1))
        assert calls == [1]
    bell.close()


# Exceptions, signals and forks.

INTERRUPTED = textwrap.dedent("""\
    import sys, threading, persipubsub._wakeup
    bells = [persipubsub._wakeup.Bell(path) for path in sys.argv[1:]]
    def follow():
        with bells[1].prepare() as ticket:
            rung = True
            for word in ("rung", "rung again"):
                while ticket.wait(timeout=0): ticket.arm()
                print("waits", flush=True)
                print(word if ticket.wait(timeout={hang}) else "lost", flush=True)
                ticket.arm()
    thread = threading.Thread(target=follow)
    try:
        with bells[0].prepare() as ticket:
            while ticket.wait(timeout=0): ticket.arm()
            thread.start()
            while True:
                ticket.wait(timeout={hang})
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    thread.join()
    hub = persipubsub._wakeup._hub
    print(hub.leader, len(hub.followers), hub.lock.locked(), flush=True)
    """).format(hang=HANG_SECS)


@pytest.mark.parametrize("attempt", range(5))
def test_interrupted_leader_hands_over(mode: str, attempt: int, tmp_path: pathlib.Path) -> None:
    paths = [str(tmp_path / f"bell{i}") for i in range(2)]
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED] + paths,
                          stdout=subprocess.PIPE,
                          env=environment(polling=mode == "polling"),
                          text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        until_asleep(process.pid, threads=2)
        bell = persipubsub._wakeup.Bell(paths[1])
        if attempt % 2 == 0:
            bell.ring()
            assert process.stdout.readline() == "rung\n"
            assert process.stdout.readline() == "waits\n"
            until_asleep(process.pid, threads=2)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - start < HANG_SECS / 2  # far below the time out
        bell.ring()
        if attempt % 2 == 1:
            assert process.stdout.readline() == "rung\n"
            assert process.stdout.readline() == "waits\n"
            bell.ring()
        assert process.stdout.readline() == "rung again\n"
        assert process.stdout.readline() == "None 0 False\n"
        bell.close()
        assert process.wait(HANG_SECS) == 0


def test_interrupted_at_any_moment(tmp_path: pathlib.Path) -> None:
    """Interrupt the main thread a thousand times, while another thread must get every ring."""
    script = textwrap.dedent("""\
        import os, signal, sys, threading, time, persipubsub._wakeup
        bells = [persipubsub._wakeup.Bell(path) for path in sys.argv[1:]]
        lost, number, seen = [], 0, 0
        def follow():
            global seen
            with bells[1].prepare() as ticket:
                while seen < 1000:
                    ticket.arm()
                    if seen < number: seen = number
                    elif not ticket.wait(timeout={hang}): lost.append(number)
        def disturb():
            global number, sent
            while number < 1000:
                number += 1
                bells[1].ring()
                deadline = time.monotonic() + {hang} + 5
                while seen < number and time.monotonic() < deadline: time.sleep(0.00001)
                # One that comes while another is on its way would not be seen, nor would one that
                # comes between two attempts be caught.
                deadline = time.monotonic() + 10
                while (not ready or interrupts < sent) and time.monotonic() < deadline:
                    time.sleep(0.00001)
                if number % 2 and ready:
                    sent = interrupts + 1
                    os.kill(os.getpid(), signal.SIGINT)
        threads = [threading.Thread(target=function) for function in (follow, disturb)]
        interrupts = sent = 0
        started = ready = False
        while not started or threads[1].is_alive():
            try:
                ready = True
                if not started:
                    started = True
                    for thread in threads: thread.start()
                with bells[0].prepare() as ticket:
                    while threads[1].is_alive():
                        ticket.arm()
                        bells[0].ring()
                        ticket.wait(timeout=0.001)
            except KeyboardInterrupt:
                ready = False
                interrupts += 1
        threads[0].join()
        print(lost, interrupts > 100)
        """).format(hang=HANG_SECS)
    paths = [str(tmp_path / f"bell{i}") for i in range(2)]
    process = subprocess.run([sys.executable, "-c", script] + paths,
                             env=environment(),
                             timeout=8 * HANG_SECS,
                             check=False,
                             capture_output=True,
                             text=True)
    assert (process.stdout, process.returncode) == ("[] True\n", 0), process.stderr


def at_line(number: int, act: Callable[[], None], call: Callable[[], Any]) -> bool:
    """
    Act in the midst of a call, before a certain line of the module is executed.

    :param number: of the line, counted from 1 as they are executed
    :param act: what to do there; may raise
    :param call: to be called
    :return: False if the call had fewer lines
    """
    left = number

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if (frame.f_code.co_filename != persipubsub._wakeup.__file__
                or frame.f_code.co_name == "__del__"):
            return None
        if event == "line":
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            # Python handles signals only after calls and jumps, thus never at the start or the end
            # of these, where an exception would leave a lock locked.
            left -= 0 if line.startswith(("with ", "try:", "return")) else 1
            if left == 0:
                act()
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return left <= 0


#: A step is behind the last one if it is not reached so often, time after time: a single call may
#: be cut short when its process gets no processor until the time to wait is over.
MOST_MISSES = 10

# In processes of their own: an exception that a trace function raises in the midst of handling
# another one stays with the interpreter (Python 3.13), to the harm of the tests that follow.


@pytest.mark.parametrize("what", ["interrupt", "close"])
def test_at_every_line(mode: str, what: str, tmp_path: pathlib.Path) -> None:
    assert mode
    work = {"interrupt": interrupt_at_every_line, "close": close_at_every_line}[what]
    assert support.outcomes_in_child(lambda: work(tmp_path)) == [""]


def interrupt_at_every_line(tmp_path: pathlib.Path) -> None:
    """Interrupt a leader at each of its steps, while it has an event for another waiter."""
    hub = persipubsub._wakeup._hub
    bells = [persipubsub._wakeup.Bell(str(tmp_path / f"bell{i}")) for i in range(2)]

    def interrupt() -> None:
        raise KeyboardInterrupt()

    def lead() -> None:
        with bells[0].prepare() as leader:
            leader.wait(timeout=0.001)

    number, misses = 1, 0
    while misses < MOST_MISSES:
        with bells[1].prepare() as ticket:
            while ticket.wait(timeout=0):
                ticket.arm()
            bells[1].ring()
            interrupted = False
            try:
                reached = at_line(number, interrupt, lead)
            except KeyboardInterrupt:
                interrupted = reached = True
            assert hub.leader is None and not hub.lock.locked()
            start = time.monotonic()
            assert ticket.wait(timeout=HANG_SECS)
            assert time.monotonic() - start < HANG_SECS / 2
        assert reached or not interrupted
        number, misses = (number + 1, 0) if reached else (number, misses + 1)
    assert 50 < number < 1000
    for bell in bells:
        bell.close()


def close_at_every_line(tmp_path: pathlib.Path) -> None:
    """Close a bell in the midst of waiting for it; another one beside has to go on."""
    hub = persipubsub._wakeup._hub
    other = persipubsub._wakeup.Bell(str(tmp_path / "other"))
    closed, number, misses = 0, 1, 0
    while misses < MOST_MISSES:
        bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))

        def lead(bell: persipubsub._wakeup.Bell = bell) -> None:
            with bell.prepare() as ticket:
                bell.ring()
                while ticket.wait(timeout=0.001):
                    ticket.arm()

        with other.prepare() as ticket:
            while ticket.wait(timeout=0):
                ticket.arm()
            other.ring()
            try:
                reached = at_line(number, bell.close, lead)
            except persipubsub.errors.ClosedError:
                closed += 1
                reached = True
            assert bell not in hub.files or not reached
            assert hub.leader is None and not hub.lock.locked()
            assert ticket.wait(timeout=HANG_SECS)
        bell.close()
        number, misses = (number + 1, 0) if reached else (number, misses + 1)
    assert 50 < number < 1000 and closed > 20
    other.close()


def test_a_ring_in_the_midst_of_arm_is_not_forgotten(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))
    outcomes = set()

    def ring() -> None:
        bell.ring()
        persipubsub._wakeup.dispatch()

    with bell.prepare() as ticket:
        number = 1
        while at_line(number, ring, ticket.arm):
            number += 1
            rung = ticket.wait(timeout=0)
            assert rung or ticket.file.page[persipubsub._wakeup._FLAG] == 1
            outcomes.add(rung)
    assert outcomes == {False, True}
    bell.close()


def test_fork_leaves_the_parent_its_events(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))

    def inherit(pipe: Connection) -> None:
        assert persipubsub._wakeup._hub.inotify == -1
        with pytest.raises(persipubsub.errors.ClosedError):
            ticket.wait(timeout=1)
        ticket.close()
        with bell.prepare() as own:
            for _ in range(100):
                own.arm()
                while own.wait(timeout=0):
                    own.arm()
                pipe.send("armed")
                pipe.send(own.wait(timeout=HANG_SECS))

    with bell.prepare() as ticket:
        waiter = Waiter(bell)
        until_led()
        child = Child(inherit)
        for _ in range(100):
            assert child.get() == "armed"
            bell.ring()
            assert child.get() is True
            assert waiter.result() is True
            waiter = Waiter(bell)
        bell.ring()
        assert waiter.result() is True
        child.end()
    bell.close()


def test_fork_while_locks_are_held(mode: str, tmp_path: pathlib.Path) -> None:
    assert mode
    bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with persipubsub._wakeup._hub.lock:
            held.set()
            release.wait(HANG_SECS)

    def inherit(pipe: Connection) -> None:
        ticket.close()
        with bell.prepare() as own:
            bell.ring()
            pipe.send(own.wait(timeout=HANG_SECS))
        bell.close()

    with bell.prepare() as ticket:
        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(HANG_SECS)
        child = Child(inherit)
        assert child.get() is True
        child.end()
        release.set()
        thread.join()
        bell.ring()
        assert ticket.wait(timeout=HANG_SECS)
    bell.close()


# What may happen to files and to inotify.


def test_deleted_and_renamed_files(mode: str, tmp_path: pathlib.Path) -> None:
    """See that processes that have the bell open go on, do not spin, and close it in peace."""
    assert mode
    directory = tmp_path / "queue"
    directory.mkdir()
    path = str(directory / "bell")
    child = Child(sleeper, path, 3)
    bell = persipubsub._wakeup.Bell(path)
    renamed = tmp_path / "renamed"
    changes: list[Callable[[], Any]] = [
        functools.partial(directory.rename, renamed), (renamed / "bell").unlink, renamed.rmdir
    ]
    with bell.prepare() as ticket:
        while ticket.wait(timeout=0):
            ticket.arm()
        for change in changes:
            assert child.get() == "armed"
            change()
            before = time.process_time()
            assert not ticket.wait(timeout=0.2)
            assert time.process_time() - before < 0.1
            ticket.arm()
            bell.ring()
            assert child.get() is True
            assert ticket.wait(timeout=HANG_SECS)
            ticket.arm()
    child.end()
    bell.close()
    with pytest.raises(persipubsub.errors.NotInitializedError) as information:
        persipubsub._wakeup.Bell(path).prepare()
    assert path in str(information.value)


def test_replaced_file_is_polled(tmp_path: pathlib.Path) -> None:
    """See that a bell never watches another file than the one that it maps."""
    bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))
    bell.ring()
    (tmp_path / "bell").unlink()
    (tmp_path / "bell").write_bytes(bytes(4096))
    with bell.prepare() as ticket:
        assert ticket.fileno() == -1
        bell.ring()
        assert ticket.wait(timeout=HANG_SECS)
    bell.close()


def test_only_regular_files_are_opened(tmp_path: pathlib.Path) -> None:
    (tmp_path / "target").write_bytes(bytes(4096))
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    expected: dict[str, type[Exception]] = {
        "link": persipubsub.errors.AccessError,
        "dangling": persipubsub.errors.AccessError,
        "directory": persipubsub.errors.StoreError,
        "fifo": persipubsub.errors.StoreError,
        "no/such/directory": persipubsub.errors.NotInitializedError,
    }
    for name, error in expected.items():
        bell = persipubsub._wakeup.Bell(str(tmp_path / name))
        for call in (bell.ring, bell.prepare):
            with pytest.raises(error) as information:
                call()
            assert str(tmp_path / name) in str(information.value)
        bell.close()
    assert not (tmp_path / "nowhere").exists()


def test_missing_rights(tmp_path: pathlib.Path) -> None:

    def touch(pipe: Connection) -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            persipubsub._wakeup.Bell(str(tmp_path / "closed" / "bell")).ring()
        except persipubsub.errors.AccessError as error:
            pipe.send(str(error))

    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0)
    child = Child(touch)
    assert str(tmp_path / "closed" / "bell") in child.get()
    child.end()
    (tmp_path / "closed").chmod(0o700)


def test_a_short_file_is_extended(tmp_path: pathlib.Path) -> None:
    (tmp_path / "bell").write_bytes(b"\1")
    bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))
    assert bell._open().page[persipubsub._wakeup._FLAG] == 1  # another process was faster
    bell.ring()
    assert (tmp_path / "bell").read_bytes()[0] == 0
    assert (tmp_path / "bell").stat().st_size == 4096
    bell.close()


USED_UP = textwrap.dedent("""\
    import ctypes, os, sys, time, persipubsub._wakeup
    try:  # of an own user namespace; else the user's own are used up, for a moment
        with open("/proc/sys/user/max_inotify_instances", "w") as file:
            if os.environ.get("OWN_NAMESPACE"): file.write("8")
    except OSError:
        pass
    library = ctypes.CDLL(None)
    def use_up():
        result = []
        while True:
            result.append(library.inotify_init1(os.O_CLOEXEC))
            if result[-1] < 0: return result[:-1]
    taken = use_up()
    bell = persipubsub._wakeup.Bell(sys.argv[1])
    with bell.prepare() as ticket:
        print("used up" if ticket.fileno() == -1 else "left over", flush=True)
        for _ in range(20):
            ticket.arm()
            while ticket.wait(timeout=0): ticket.arm()
            print("armed", flush=True)
            print(ticket.wait(timeout={hang}), flush=True)
        for descriptor in taken: os.close(descriptor)
        deadline = time.monotonic() + {hang}
        while ticket.fileno() < 0 and time.monotonic() < deadline:
            ticket.wait(timeout=0.1)
            with bell.prepare(): pass
        print("inotify" if ticket.fileno() >= 0 else "polled", flush=True)
        ticket.arm()
        while ticket.wait(timeout=0): ticket.arm()
        print("armed", flush=True)
        print(ticket.wait(timeout={hang}), flush=True)
    bell.close()
    """).format(hang=HANG_SECS)


def test_used_up_inotify(tmp_path: pathlib.Path) -> None:
    if sys.platform != "linux":
        pytest.skip("inotify is a part of Linux")
    command, variables = [sys.executable, "-c", USED_UP, str(tmp_path / "bell")], environment()
    unshare = shutil.which("unshare")
    if unshare is not None:
        own = [unshare, "--user", "--map-root-user"]
        if subprocess.run(own + ["true"], check=False, capture_output=True).returncode == 0:
            command = own + command
            variables["OWN_NAMESPACE"] = "1"
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=variables, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "used up\n"
        bell = persipubsub._wakeup.Bell(str(tmp_path / "bell"))
        for _ in range(20):
            assert process.stdout.readline() == "armed\n"
            bell.ring()
            assert process.stdout.readline() == "True\n"
        assert process.stdout.readline() == "inotify\n"
        assert process.stdout.readline() == "armed\n"
        bell.ring()
        assert process.stdout.readline() == "True\n"
        bell.close()
        assert process.wait(HANG_SECS) == 0
