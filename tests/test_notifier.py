"""Test waiting and waking between real processes and threads."""

# pylint: disable=missing-function-docstring

import mmap
import os
import pathlib
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import persipubsub.errors
from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.notifier import Futex, Notifier
from tests import support
from tests.support import HANG_SECS, Child, Connection, until

ROUNDS = int(os.environ.get("PERSIPUBSUB_WAKEUP_ROUNDS", "5000"))

#: Who waits for so long was not woken.
LOST_SECS = HANG_SECS / 4

PUBLISHERS, WAITERS, THREADS = 2, 2, 2


def open_notifier(directory: pathlib.Path) -> Notifier:
    directory.mkdir(exist_ok=True)
    return Notifier(SharedPage(str(directory)))


@pytest.fixture(name="notifier")
def _notifier(tmp_path: pathlib.Path) -> Iterator[Notifier]:
    notifier = open_notifier(tmp_path)
    yield notifier
    notifier.close()


def wait_until(notifier: Notifier, look: Callable[[], bool]) -> bool:
    """Wait as consumers do, but for a notification alone; False if it was lost."""
    while True:
        stamp = notifier.arm()
        if look():
            return True
        begin = time.monotonic()
        notifier.wait(stamp, LOST_SECS)
        if time.monotonic() >= begin + LOST_SECS:
            return False


class Board:
    """Numbers that processes see at once."""

    def __init__(self, count: int) -> None:
        self._numbers = memoryview(mmap.mmap(-1, 8 * count)).cast("Q")
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> int:
        return self._numbers[index]

    def __setitem__(self, index: int, number: int) -> None:
        self._numbers[index] = number
        # A fence: the number is seen before the flag is read, as what a commit wrote is.
        with self._lock:
            pass


def wait_once(pipe: Connection, directory: pathlib.Path, seconds: float) -> None:
    notifier = open_notifier(directory)
    stamp = notifier.arm()
    pipe.send("armed")
    woken = notifier.wait(stamp, seconds)
    pipe.send((woken, SharedPage(str(directory)).words[SharedPage.END]))


def test_notification_wakes_another_process(tmp_path: pathlib.Path, notifier: Notifier) -> None:
    with Child(wait_once, tmp_path, HANG_SECS) as child:
        assert child.get() == "armed"
        notifier.notify(end=7)
        assert child.get() == (True, 7)
        child.end()


def test_time_out_without_a_notification(notifier: Notifier) -> None:
    assert not notifier.wait(notifier.arm(), 0.01)
    assert not notifier.wait(notifier.arm(), 0)


def test_notification_between_arm_and_wait_is_kept(notifier: Notifier) -> None:
    stamp = notifier.arm()
    notifier.notify()
    assert notifier.wait(stamp, HANG_SECS)


def test_notification_is_not_kept_for_those_who_arm_later(notifier: Notifier) -> None:
    notifier.arm()
    notifier.notify()
    assert not notifier.wait(notifier.arm(), 0.01)


def test_nothing_is_called_while_nobody_waits(notifier: Notifier,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[Futex] = []
    wake_all = Futex.wake_all

    def counted(self: Futex) -> None:
        woken.append(self)
        wake_all(self)

    monkeypatch.setattr(Futex, "wake_all", counted)
    for _ in range(100):
        notifier.notify()
    assert not woken
    notifier.arm()
    for _ in range(100):
        notifier.notify()
    assert len(woken) == 1


def ping_pong(pipe: Connection, directory: pathlib.Path, board: Board, me: int) -> None:
    mine, other = (open_notifier(directory / str(index)) for index in (me, 1 - me))
    numbers = board
    for number in range(1, ROUNDS + 1):
        if me == 0:
            numbers[0] = number
            other.notify()
        # pylint: disable-next=cell-var-from-loop
        if not wait_until(mine, lambda: numbers[1 - me] >= number):
            break
        if me == 1:
            numbers[1] = number
            other.notify()
    pipe.send(numbers[me])


def test_no_wake_up_is_lost_between_two(tmp_path: pathlib.Path) -> None:
    board = Board(2)
    for index in range(2):  # processes of a queue create its files one after the other
        open_notifier(tmp_path / str(index))
    with Child(ping_pong, tmp_path, board, 0) as one, Child(ping_pong, tmp_path, board, 1) as two:
        until(lambda: one.pipe.poll() and two.pipe.poll(), what="all rounds")
        assert (one.get(), two.get()) == (ROUNDS, ROUNDS)
        one.end()
        two.end()


def publish(pipe: Connection, directory: pathlib.Path, board: Board, me: int, rounds: int) -> None:
    """Publish the next number when all threads of all processes have the last one."""
    messages, acks = open_notifier(directory / "messages"), open_notifier(directory / "acks")
    numbers = board
    seen = range(PUBLISHERS + me * WAITERS * THREADS, PUBLISHERS + (me + 1) * WAITERS * THREADS)
    for number in range(1, rounds + 1):
        numbers[me] = number
        messages.notify()
        # pylint: disable-next=cell-var-from-loop
        if not wait_until(acks, lambda: all(numbers[index] >= number for index in seen)):
            break
    pipe.send(numbers[me])


def receive(pipe: Connection, directory: pathlib.Path, board: Board, me: int, rounds: int) -> None:
    messages, acks = open_notifier(directory / "messages"), open_notifier(directory / "acks")
    numbers, lost = board, []

    def work(waiter: int) -> None:
        seen = [0] * PUBLISHERS

        def look() -> bool:
            now = [numbers[index] for index in range(PUBLISHERS)]
            is_new = now != seen
            for publisher, number in enumerate(now):
                numbers[PUBLISHERS + publisher * WAITERS * THREADS + waiter] = number
                seen[publisher] = number
            return is_new

        while min(seen) < rounds:
            if not wait_until(messages, look):
                lost.append(waiter)
                return
            acks.notify()

    threads = [
        threading.Thread(target=work, args=(me * THREADS + index, )) for index in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send(lost)


def test_no_wake_up_is_lost_between_many(tmp_path: pathlib.Path) -> None:
    rounds = ROUNDS // 10
    for name in ("messages", "acks"):
        open_notifier(tmp_path / name)
    board = Board(PUBLISHERS + PUBLISHERS * WAITERS * THREADS)
    publishers = [Child(publish, tmp_path, board, me, rounds) for me in range(PUBLISHERS)]
    waiters = [Child(receive, tmp_path, board, me, rounds) for me in range(WAITERS)]
    until(lambda: all(child.pipe.poll() for child in publishers + waiters), what="all rounds")
    assert [child.get() for child in publishers] == [rounds] * PUBLISHERS
    assert [child.get() for child in waiters] == [[]] * WAITERS
    for child in publishers + waiters:
        child.end()


def test_killed_waiter_harms_nobody(tmp_path: pathlib.Path, notifier: Notifier) -> None:
    with (Child(wait_once, tmp_path, HANG_SECS) as killed, Child(wait_once, tmp_path, HANG_SECS) as
          child):
        assert (killed.get(), child.get()) == ("armed", "armed")
        killed.kill(signal.SIGKILL)
        killed.end(-signal.SIGKILL)
        notifier.notify()
        assert child.get()[0] is True
        child.end()


def test_a_thousand_threads_wait(notifier: Notifier) -> None:
    woken = []
    ready = threading.Semaphore(0)

    def wait() -> None:
        stamp = notifier.arm()
        ready.release()
        woken.append(notifier.wait(stamp, HANG_SECS))

    size = threading.stack_size(256 * 1024)
    try:
        threads = [threading.Thread(target=wait, daemon=True) for _ in range(1000)]
        for thread in threads:
            thread.start()
    finally:
        threading.stack_size(size)
    for _ in threads:
        assert ready.acquire(timeout=HANG_SECS)
    notifier.notify()
    for thread in threads:
        thread.join(HANG_SECS)
    assert woken == [True] * 1000


def idle(pipe: Connection, directory: pathlib.Path) -> None:
    notifier = open_notifier(directory)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(2):
        notifier.wait(notifier.arm(), 1.0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    pipe.send(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def test_idle_waiting_costs_nothing(tmp_path: pathlib.Path) -> None:
    with Child(idle, tmp_path) as child:
        assert child.get() < 0.05
        child.end()


# Closing


def test_close_wakes_all_who_wait(notifier: Notifier) -> None:
    outcomes: list[str] = []
    ready = threading.Semaphore(0)

    def wait() -> None:
        stamp = notifier.arm()
        ready.release()
        outcomes.append(support.outcome(lambda: notifier.wait(stamp, HANG_SECS)))

    threads = [threading.Thread(target=wait) for _ in range(10)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert ready.acquire(timeout=HANG_SECS)
    notifier.close()
    for thread in threads:
        thread.join(HANG_SECS)
    assert outcomes == ["ClosedError"] * 10
    with pytest.raises(persipubsub.errors.ClosedError):
        notifier.wait(notifier.arm(), HANG_SECS)


# Functions that are called


def test_listener_is_called_once_for_each_time_it_is_armed(notifier: Notifier) -> None:
    calls: list[float] = []
    listener = notifier.listen(lambda: calls.append(time.monotonic()))
    for number in range(1, 4):
        listener.arm()
        notifier.notify()
        until(lambda: len(calls) == number, what="the call")  # pylint: disable=cell-var-from-loop
        notifier.notify()
    listener.close()
    assert len(calls) == 3


def test_listeners_share_a_thread_that_ends_with_them(notifier: Notifier) -> None:
    called = [threading.Event() for _ in range(10)]
    listeners = [notifier.listen(event.set) for event in called]
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("persipubsub-notifier") == 1
    for listener in listeners:
        listener.arm()
    notifier.notify()
    assert all(event.wait(HANG_SECS) for event in called)
    for listener in listeners:
        listener.close()
        listener.close()
    until(lambda: "persipubsub-notifier" not in [one.name for one in threading.enumerate()],
          what="the end of the thread")


def test_listener_whose_loop_is_closed_disturbs_nobody(notifier: Notifier) -> None:

    def fail() -> None:
        raise RuntimeError("Event loop is closed")

    called = threading.Event()
    for callback in (fail, called.set):
        notifier.listen(callback).arm()
    notifier.notify()
    assert called.wait(HANG_SECS)


def test_close_calls_all_listeners(notifier: Notifier) -> None:
    called = threading.Event()
    notifier.listen(called.set)
    notifier.close()
    assert called.wait(HANG_SECS)
