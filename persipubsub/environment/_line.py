"""
Let the threads of a process stand in line to write, each with an alarm of its own.

A thread that finds the write lock taken sleeps until its work was done for it, or until it is its
turn. Threads that wait for the lock itself would be woken one after the other, each only to see
that its work was done long ago, and each switch of threads costs as much as several works.

Of those whose works were committed together and that need a flush, one flushes, and the others, its
followers, sleep until it is through. They are woken a few at a time, and the next commit is kept
back until the last one was: those that come back first would commit alone otherwise, and keep the
others from sharing a flush with them. Sixteen threads that send again at once make groups of
sixteen instead of seven, and a fifth more messages in a second. It is kept back for a bounded time,
since threads may have something else to do.

Nobody relies on being woken alone: whoever would wake others can be interrupted just before. So
everybody looks again after a moment, and what is lost with an alarm is that moment.
"""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

#: Longest sleep of a waiting thread, in seconds, before it looks whether an alarm was lost.
_LONGEST_SLEEP_SECS: Final = 0.05

#: So many threads of a flushed group are awake at a time: one that runs, and one on the way from
#: its sleep to the interpreter's lock. More would queue for it: more switches, no more messages.
_MOST_AWAKE: Final = 2

#: How long the next commit is kept back for those that come back from a flush, in seconds: so long,
#: and so much longer for each of them, but never longer than anybody sleeps.
_HOLD_SECS: Final = 0.001
_HOLD_SECS_EACH: Final = 0.0001


class Request:
    """Hold the work of one thread until some thread has committed it."""

    __slots__ = ("work", "is_flushed", "done", "result", "error", "commit", "alarm", "leads",
                 "follows", "is_through")

    def __init__(self, work: Callable[..., Any], is_flushed: bool = False) -> None:
        """
        Initialize as not done.

        :param work: to be run in a transaction
        :param is_flushed: True if its thread goes on to wait for a flush
        """
        self.work = work
        self.is_flushed = is_flushed
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.commit = 0
        # Taken by its thread, which falls asleep by taking it a second time. None before that: most
        # threads never wait.
        self.alarm: threading.Lock | None = None
        # Those for whom its thread flushes, and whom it wakes then; or those with whom it sleeps
        # until another one has flushed. Given to it by who committed it.
        self.leads: "Group" | None = None
        self.follows: "Group" | None = None
        # Whether its thread went past both: it woke by itself, before or after they were given.
        self.is_through = False

    def wake(self) -> None:
        """Wake its thread, if it sleeps or is about to; any thread may call it, more than once."""
        alarm = self.alarm
        if alarm is not None:
            try:
                alarm.release()
            except RuntimeError:
                pass  # woken already, or between two sleeps: it looks again anyway


class Group:
    """
    Be the threads that sleep while another one flushes for them.

    What is taken from either list is taken once, whatever threads do it at the same time.
    """

    __slots__ = ("sleepers", "missing")

    def __init__(self) -> None:
        """Initialize without anybody."""
        # Those that nobody woke yet, and one entry for each that is not back.
        self.sleepers: collections.deque[Request] = collections.deque()
        self.missing: list[None] = []

    def add(self, request: Request) -> None:
        """
        Let a thread sleep until the flush, unless it is through already.

        :param request: of the thread
        """
        self.sleepers.append(request)
        self.missing.append(None)
        request.follows = self
        # After it was given: either its thread sees that, or it is seen here.
        if request.is_through:
            self.count_back()

    def count_back(self) -> None:
        """Note that one more is back."""
        try:
            self.missing.pop()
        except IndexError:
            pass  # it was counted by its own thread as well

    def wake_one(self) -> None:
        """Wake one that still sleeps; one that woke by itself would wake nobody any more."""
        try:
            while (sleeper := self.sleepers.popleft()).is_through:
                pass
        except IndexError:
            return
        sleeper.wake()


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
        self.requests: collections.deque[Request] = collections.deque()

        # Until when nobody takes the lock to write, on the monotonic clock, unless all of a group
        # are back before; 0: nobody is waited for. Both are hints, and under no lock: one that is
        # wrong costs a moment.
        self.held_until = 0.0
        self._awaited: Group | None = None

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
                if self._is_first(request):
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

    def _is_first(self, request: Request) -> bool:
        """
        Tell whether a request is the first in line.

        :param request: of this thread
        :return: True if so
        """
        try:
            return self.requests[0] is request
        except IndexError:
            return False

    def share_flush(self, requests: Sequence[Request], own: Request) -> None:
        """
        Wake the threads of works that were committed; of those that need a flush, only one for now.

        The others are woken by that one after its flush, when there is nothing left to wait for.

        :param requests: that this thread committed
        :param own: request of this thread, among them or not; it flushes if its own needs it
        """
        flusher = own if own.is_flushed and own.done and own.error is None else None
        group = Group()
        for request in requests:
            if request is own:
                continue
            if not request.is_flushed or request.error is not None:
                request.wake()
            elif flusher is None:
                flusher = request
            else:
                group.add(request)
        if flusher is not None:
            # Before it is woken: it may be through with its flush at once.
            flusher.leads = group
            if flusher is not own:
                flusher.wake()
                if flusher.is_through:
                    # It woke by itself before it led anybody, perhaps.
                    self._bring_back(group)

    def pass_on(self, request: Request) -> None:
        """
        Wake those who come after this thread, when its commit was flushed or can not be.

        :param request: of this thread
        """
        request.is_through = True
        if request.leads is not None:
            self._bring_back(request.leads)
        elif request.follows is not None:
            request.follows.count_back()
            request.follows.wake_one()
            self._end_hold(request.follows)

    def _bring_back(self, group: Group) -> None:
        """
        Wake threads that were flushed for, and keep the next commit back until all are awake.

        :param group: these threads
        """
        if not group.missing:
            return
        self._awaited = group
        self.held_until = time.monotonic() + min(_LONGEST_SLEEP_SECS,
                                                 _HOLD_SECS + _HOLD_SECS_EACH * len(group.missing))
        for _ in range(_MOST_AWAKE):
            group.wake_one()
        self._end_hold(group)

    def _end_hold(self, group: Group) -> None:
        """
        Let others write if all of a group are back.

        :param group: that somebody came back of
        """
        if not group.missing and self._awaited is group:
            self._awaited = None
            self.held_until = 0.0
            self.wake_next()

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
