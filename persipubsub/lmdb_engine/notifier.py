"""
Wake threads that wait for messages or for room, in all processes, without polling.

Everything is in two words of the page that all processes of a queue have mapped: a *stamp*, on which
waiters sleep in the kernel (a futex), and a *flag* that says that a waiter may sleep. A sender that
has committed notifies: if the flag is set, it clears the flag, stores a new stamp, and wakes all. A
waiter loads the stamp, sets the flag, looks at the queue, and sleeps unless the stamp has changed;
the kernel compares it once more under its own lock. The stamp is 32 bits of the time in
nanoseconds: a value comes back after 4.3 seconds at the earliest.

Why no wake-up is lost: assume that the look misses a commit. Then the sender reads the flag after
the waiter has set it. If it reads 1, it stores a stamp that the waiter has not loaded: the waiter
does not sleep, or is woken. If it reads 0, another sender cleared the flag after the waiter set it.
That sender stores a new stamp, so that the waiter does not sleep, or is woken. A wake-up is lost if
a sender is killed between its commit and its notification: therefore waiters look once a second
anyhow.

Rejected: inotify (14 us instead of 10 from process to process, 128 instances a user, a descriptor
to be shared by threads), eventfd (5.5 us, but descriptors would have to be passed).
"""

import contextlib
import ctypes
import platform
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from persipubsub.errors import ClosedError
from persipubsub.lmdb_engine.files import SharedPage

#: Number of the system call ``futex``; 98 on all newer machines.
_SYS_FUTEX: Final = {"x86_64": 202, "armv7l": 240, "i686": 240}.get(platform.machine(), 98)
_WAIT, _WAKE = 0, 1  # not FUTEX_PRIVATE: the page is shared between processes
_EVERYBODY: Final = 0x7fffffff

ResultT = TypeVar("ResultT")

#: Longest sleep in seconds, whatever a caller asks for.
_LONGEST_SECS: Final = 3600.0

_LIBC: Final = ctypes.CDLL(None, use_errno=True)

#: ``struct timespec`` of the C library: seconds and nanoseconds.
_TIMESPEC: Final = ctypes.c_long * 2


class Futex:
    """A word of a shared page on which threads and processes sleep."""

    def __init__(self, page: SharedPage, index: int) -> None:
        """Point to the lower half of a word of the page."""
        # This keeps the page mapped as long as a thread may sleep on it.
        self._word = ctypes.c_uint32.from_buffer(page.map, 8 * index)
        # A pointer: ctypes would cut a plain integer to 32 bits, and the wait would spin.
        self._address = ctypes.c_void_p(ctypes.addressof(self._word))

    def load(self) -> int:
        """Read the word."""
        return self._word.value

    def wait(self, value: int, seconds: float) -> None:
        """Sleep until the word differs from a value, a signal comes, or the time is over."""
        if seconds <= 0:
            return
        seconds = min(seconds, _LONGEST_SECS)
        timeout = _TIMESPEC(int(seconds), int(seconds % 1 * 1e9))
        _LIBC.syscall(_SYS_FUTEX, self._address, _WAIT, ctypes.c_uint32(value),
                      ctypes.byref(timeout), None, 0)

    def wake_all(self) -> None:
        """Store a new stamp, and wake all sleepers."""
        # The stamp is the time. Rejected: a counter, since two processes that count at once could
        # bring a value back that a waiter has loaded.
        self._word.value = time.monotonic_ns() & 0xffffffff
        _LIBC.syscall(_SYS_FUTEX, self._address, _WAKE, _EVERYBODY, None, None, 0)


class Notifier:
    """Notify and wait, for one queue. All threads may use it at the same time."""

    def __init__(self, page: SharedPage) -> None:
        """Use the words of a shared page."""
        self._words = page.words
        self._futex = Futex(page, SharedPage.STAMP)
        self.is_closed = False
        # It guards the two below. No callback is called while it is held.
        self._lock = threading.RLock()
        #: Functions to be called once, with the stamps at which they were given.
        self._callbacks: dict[Callable[[], object], int] = {}
        self._thread: threading.Thread | None = None

    def notify(self, end: int = 0) -> None:
        """
        Wake all waiters of all processes; to be called after the commit, never before.

        Unlocking after the commit is a memory barrier, so the flag is read after the commit is
        visible.

        :param end: number after the new message, which spares consumers a look; 0: unknown
        """
        words = self._words
        if end:
            words[SharedPage.END] = end
        if words[SharedPage.FLAG]:
            words[SharedPage.FLAG] = 0
            self._futex.wake_all()

    def arm(self) -> int:
        """
        Begin to wait, before the look at the queue; return the stamp.

        If the look misses a commit, its sender changes the stamp, so that ``wait`` does not sleep.
        """
        stamp = self._futex.load()
        self._words[SharedPage.FLAG] = 1
        # A fence, so that the look is not done before others see the flag: a lock of Python is one.
        with self._lock:
            return stamp

    def wait(self, stamp: int, seconds: float) -> None:
        """
        Sleep until a notification; it may return early, because of the notification before.

        :param stamp: of :py:meth:`arm`
        :param seconds: at most
        :raise ClosedError: if the queue was closed
        """
        if not self.is_closed:
            self._futex.wait(stamp, seconds)
        if self.is_closed:
            raise ClosedError("Expected the queue to be open while waiting, but got: it was closed")

    def wait_for(self,
                 look: Callable[[], tuple[ResultT | None, float]],
                 deadline: float | None,
                 poll_secs: float = _LONGEST_SECS) -> ResultT | None:
        """
        Look until there is something, once more after each notification; None: the time is over.

        :param look: returns what it found, and the seconds after which to look again without one
        :param deadline: on the monotonic clock; None: look for ever
        :param poll_secs: look again after this time in any case
        :raise ClosedError: if the queue was closed
        """
        while True:  # until the deadline; without one, until there is something
            stamp = self.arm()
            found, pause = look()
            if found:
                return found
            left = _LONGEST_SECS if deadline is None else deadline - time.monotonic()
            # Test ``left``, not ``pause``: a pause of 0 also means that a retry is due.
            if left <= 0:
                return None
            self.wait(stamp, min(pause, poll_secs, left))

    def call_once(self, callback: Callable[[], object]) -> None:
        """
        Call a function once. Look at the queue after this: a commit that the look misses calls it.

        One thread for each queue calls all of these functions. They are for loops of asyncio.
        """
        with self._lock:
            self._callbacks[callback] = self.arm()
            if self._thread is None:
                thread = threading.Thread(target=self._run,
                                          name="persipubsub-notifier",
                                          daemon=True)
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        """Call functions until the queue is closed."""
        while True:  # until the close
            stamp = self._futex.load()
            # Looked at after the stamp was loaded, which a close changes.
            if self.is_closed:
                return
            self._call(stamp)
            self._futex.wait(stamp, _LONGEST_SECS)

    def _call(self, stamp: int | None) -> None:
        """Call the functions that were given at another stamp."""
        with self._lock:
            due = [one for one, armed in self._callbacks.items() if armed != stamp]
            for callback in due:
                del self._callbacks[callback]
        for callback in due:
            # A closed loop of asyncio raises this. The other functions are still called.
            with contextlib.suppress(RuntimeError):
                callback()

    def close(self) -> None:
        """Let all waiters of this process fail. Those of other processes wake up, too, and look."""
        self.is_closed = True
        self._call(None)
        self._futex.wake_all()
