"""
Let the threads of a process stand in line to write, each with an alarm of its own.

A thread that finds the write lock taken sleeps until its work was done for it, or until it is its
turn. Threads that wait for the lock itself would be woken one after the other, each only to see
that its work was done long ago, and each switch of threads costs as much as several works.

Threads whose commit was flushed are woken a few at a time, and the next commit is kept back until
the last one was: those that come back first would commit alone otherwise, and keep the others from
sharing a flush with them. Sixteen threads that send again at once make groups of sixteen instead of
seven, and a fifth more messages in a second. It is kept for a bounded time, since threads may have
something else to do.

Nobody relies on being woken alone: whoever would wake others can be interrupted just before. So
everybody looks again after a moment, and what is lost with an alarm is that moment.
"""

import collections
import threading
import time
from typing import Any, Callable, Deque, Final, List, Optional, Sequence

#: Longest sleep of a waiting thread, in seconds, before it looks whether an alarm was lost.
_LONGEST_SLEEP_SECS: Final = 0.05

#: So many threads of a flushed group are awake at a time: one that runs, and those that are on the
#: way from their sleep to the interpreter's lock. All at once, they would queue for it.
_MOST_AWAKE: Final = 3

#: How long the next commit is kept back for those that come back from a flush, in seconds: at most
#: so long, and so much longer for each of them.
_LONGEST_HOLD_SECS: Final = 0.001
_HOLD_SECS_EACH: Final = 0.0001


class Request:
    """Hold the work of one thread until some thread has committed it."""

    __slots__ = ("work", "is_flushed", "done", "result", "error", "commit", "alarm", "followers",
                 "is_asleep")

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
        # Whether another one flushes for its thread, which did not wake from that yet.
        self.is_asleep = False

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

        # Until when nobody takes the lock to write, unless the last one comes back before; on the
        # monotonic clock, 0: nobody is waited for. All three are hints, and under no lock: one that
        # is wrong costs a moment.
        self.held_until = 0.0
        # Followers that were flushed for and sleep, and one entry for each that is not back. What
        # is taken from either is taken once, whatever threads do it at the same time.
        self._sleepers = collections.deque()  # type: Deque[Request]
        self._missing = []  # type: List[None]

    def wait(self, request: Request, seconds: float) -> bool:
        """
        Sleep until the request is done or it is its thread's turn.

        :param request: of this thread, in line or taken out of it by a thread that runs it
        :param seconds: longest wait
        :return: True if the lock was taken; False if the request is done or the time is over
        """
        alarm = request.alarm = threading.Lock()
        alarm.acquire()  # pylint: disable=consider-using-with
        now = time.monotonic()
        deadline = now + seconds
        while not request.done:
            sleep = _LONGEST_SLEEP_SECS
            hold = min(self.held_until, deadline) - now
            if hold > 0:
                # The others are woken by who takes the lock.
                if self.requests and self.requests[0] is request:
                    sleep = hold
            # Only after the alarm was set: whoever gives the lock back later sees it.
            elif self.lock.acquire(blocking=False):
                self.held_until = 0.0
                return True
            if now >= deadline:
                return False
            alarm.acquire(timeout=min(deadline - now, sleep))
            now = time.monotonic()
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

    def pass_on(self, request: Request) -> None:
        """
        Wake those who come after this thread, when its commit was flushed or can not be.

        :param request: of this thread, which flushed for its followers, or is one of them
        """
        if request.followers:
            self._bring_back(request.followers)
        elif request.is_asleep:
            self._come_back(request)

    def _bring_back(self, followers: Sequence[Request]) -> None:
        """
        Wake threads that were flushed for, and keep the next commit back until all are awake.

        :param followers: their requests
        """
        # Not those of former groups: what is missing of them was interrupted.
        self._missing = [None] * len(followers)
        self._sleepers.extend(followers)
        self.held_until = time.monotonic() + _LONGEST_HOLD_SECS + _HOLD_SECS_EACH * len(followers)
        for _ in range(_MOST_AWAKE):
            self._wake_sleeper()

    def _come_back(self, request: Request) -> None:
        """
        Wake the next one that sleeps after a flush; the last one lets others write.

        :param request: of this thread, which was woken
        """
        request.is_asleep = False
        try:
            self._missing.pop()
        except IndexError:
            pass  # a later group is waited for, or nobody any more
        self._wake_sleeper()
        if not self._missing and self.held_until:
            self.held_until = 0.0
            self.wake_next()

    def _wake_sleeper(self) -> None:
        """Wake one thread that was flushed for."""
        try:
            # One that woke by itself wakes nobody any more.
            while not (sleeper := self._sleepers.popleft()).is_asleep:
                pass
        except IndexError:
            return
        sleeper.wake()

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
            request.is_asleep = True
            followers.append(request)
    if flusher is not None:
        # Before it is woken: it may be through with its flush at once.
        flusher.followers = followers
        if flusher is not own:
            flusher.wake()
