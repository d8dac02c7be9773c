"""Test waiting and waking between real processes and threads."""

import functools
import mmap
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.notifier import Notifier
from tests.support import HANG_SECS, Child, Connection, in_threads, until

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

    in_threads([functools.partial(work, me * THREADS + index) for index in range(THREADS)])
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
