"""
Let the threads of a process stand in line to write, each with an alarm of its own.

A thread that finds the write lock taken sleeps until its work was done for it, or until it is its
turn. Threads that wait for the lock itself would be woken one after the other, each only to see
that its work was done long ago, and each switch of threads costs as much as several works.

Nobody relies on being woken alone: whoever would wake others can be interrupted just before. So
everybody looks again after a moment, and what is lost with an alarm is that moment.
"""

import collections
import threading
import time
from typing import Any, Callable, Deque, Final, Optional, Sequence

#: Longest sleep of a waiting thread, in seconds, before it looks whether an alarm was lost.
_LONGEST_SLEEP_SECS: Final = 0.05


class Request:
    """Hold the work of one thread until some thread has committed it."""

    __slots__ = ("work", "is_flushed", "done", "result", "error", "commit", "alarm", "followers")

    def __init__(self, work: Callable[..., Any], is_flushed: bool = False) -> None:
        """
        Initialize as not done.

        :param work: to be run in a transaction
        :param is_flushed: True if its thread goes on to wait for a flush
        """
        self.work = work
        self.is_flushed = is_flushed
        self.done = False
        self.result = None  # type: Any
        self.error = None  # type: Optional[BaseException]
        self.commit = 0
        # Taken by its thread, which falls asleep by taking it a second time. None before that: most
        # threads never wait.
        self.alarm = None  # type: Optional[threading.Lock]
        # Those whom its thread wakes after its flush, which serves them as well.
        self.followers = ()  # type: Sequence["Request"]

    def wake(self) -> None:
        """Wake its thread, if it sleeps or is about to; any thread may call it, more than once."""
        alarm = self.alarm
        if alarm is not None:
            try:
                alarm.release()
            except RuntimeError:
                pass  # woken already, or between two sleeps: it looks again anyway


class Line:
    """
    Be the write lock of an environment, and the requests of those who wait for it.

    ``lock`` guards the writing half: requests being run, the gate's descriptor. It comes after the
    copy lock and before the flush lock. Whoever takes it calls :py:meth:`wake_next` after giving it
    back. What this class has of a lock is for who takes all of them, to open, close or fork, and
    not for those who write: a KeyboardInterrupt within its functions, which a lock itself does not
    have, would leave it taken.
    """

    def __init__(self) -> None:
        """Initialize without anybody in line."""
        self.lock = threading.RLock()
        self.requests = collections.deque()  # type: Deque[Request]

    def wait(self, request: Request, seconds: float) -> bool:
        """
        Sleep until the request is done or it is its thread's turn.

        :param request: of this thread, in line or taken out of it by a thread that runs it
        :param seconds: longest wait
        :return: True if the lock was taken; False if the request is done or the time is over
        """
        alarm = request.alarm = threading.Lock()
        alarm.acquire()  # pylint: disable=consider-using-with
        deadline = time.monotonic() + seconds
        while not request.done:
            # Only after the alarm was set: whoever gives the lock back later sees it.
            if self.lock.acquire(blocking=False):
                return True
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            alarm.acquire(timeout=min(remaining, _LONGEST_SLEEP_SECS))
        return False

    def withdraw(self, request: Request) -> bool:
        """
        Take back a request that nobody ran.

        :param request: of a thread that gives up
        :return: False if another thread is running it, or ran it
        """
        try:
            self.requests.remove(request)
        except ValueError:
            return False
        # It may have been woken as the next one.
        self.wake_next()
        return True

    def wake_next(self) -> None:
        """Wake the first in line, after the lock was given back."""
        try:
            request = self.requests[0]
        except IndexError:
            return
        request.wake()

    def acquire(self, timeout: float = -1) -> bool:
        """
        Take the lock.

        :param timeout: longest wait in seconds; -1 for no bound
        :return: True if it was taken
        """
        return self.lock.acquire(timeout=timeout)  # pylint: disable=consider-using-with

    def release(self) -> None:
        """Give the lock back and wake the first in line."""
        self.lock.release()
        self.wake_next()

    def __enter__(self) -> None:
        """Take the lock, and wait for it without a bound."""
        self.lock.acquire()  # pylint: disable=consider-using-with

    def __exit__(self, *_: object) -> None:
        """Give the lock back and wake the first in line."""
        self.release()


def share_flush(group: Sequence[Request], own: Request) -> None:
    """
    Wake the threads of a group that was committed; of those that need a flush, only one for now.

    The others are woken by that one after its flush, when there is nothing left to wait for.

    :param group: that this thread committed
    :param own: request of this thread, in the group or not; it flushes if its own needs it
    """
    flusher = own if own.is_flushed and own.done and own.error is None else None
    followers = []
    for request in group:
        if request is own:
            continue
        if not request.is_flushed or request.error is not None:
            request.wake()
        elif flusher is None:
            flusher = request
        else:
            followers.append(request)
    if flusher is not None:
        # Before it is woken: it may be through with its flush at once.
        flusher.followers = followers
        if flusher is not own:
            flusher.wake()
