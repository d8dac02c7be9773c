"""
Hand the messages of one consumer to the tasks of one event loop that wait for some.

However many tasks wait, one worker thread looks at the queue for all of them, and only when there
is a reason: somebody rang, a task began to wait, or it is time for the look that is taken whatever
happens. In between, nothing waits but the loop's selector.

All of it is callbacks and not a task of its own: a loop that ends cancels its tasks, and one that
is cancelled while a worker thread takes messages would lose their claims. A lease that nobody
waits for any more is given back at once, wherever that is noticed.
"""

import asyncio
import contextlib
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final, cast

import persipubsub.errors
from persipubsub import _begun, _engines, _wakeup, _workers

#: Messages or batches that are taken in one go, so that the first task does not wait for all.
_MOST_TAKEN: Final = 16

#: Without inotify, time between two looks at the bell, which cost no system call, in seconds.
_POLL_SECS: Final = 0.005


class _Waiter:
    """Be one task that waits."""

    __slots__ = ("future", "max_messages", "is_newest", "pause", "deadline", "look", "lease")

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float | None, pause: float,
                 max_messages: int, is_newest: bool, look: int) -> None:
        self.future: "asyncio.Future[None]" = loop.create_future()
        self.max_messages = max_messages
        self.is_newest = is_newest
        self.pause = pause
        self.deadline = float("inf") if timeout is None else time.monotonic() + timeout
        # The last one that began before the task waited; with a lease: which took its messages.
        self.look = look
        self.lease: _engines.Lease | None = None

    def is_like(self, other: "_Waiter") -> bool:
        """
        Tell whether a task can have what was taken for another one.

        :param other: task
        :return: True if both want the same
        """
        return (self.max_messages, self.is_newest) == (other.max_messages, other.is_newest)


class Inbox:  # pylint: disable=too-many-instance-attributes
    """
    Wait for the tasks of one loop.

    Everything happens in the thread of the loop, but for :py:meth:`_look`, :py:meth:`_return_all`
    and :py:meth:`close`.
    """

    def __init__(self, consumer: _engines.WakingConsumer, workers: _workers.Workers,
                 loop: asyncio.AbstractEventLoop) -> None:
        """
        Initialize with nobody waiting.

        :param consumer: to take messages from
        :param workers: look at the queue
        :param loop: of the tasks
        """
        self.loop = loop
        self.process_id = os.getpid()
        self.consumer = consumer
        self._workers = workers
        self._error: BaseException | None = None  # after close

        self._waiters: dict[_Waiter, None] = {}  # in the order in which they came
        self._served: dict[_Waiter, None] = {}  # tasks that have messages, and did not go on yet
        # While a worker looks, the ticket is its own; what comes meanwhile asks for another look.
        self._is_looking = False
        self._looks_again = False
        self._look_count = 0
        # True if something is given back since the look began, which may have passed over it.
        self._is_outdated = False
        # What nobody waits for any more, and a lock for whoever gives it back.
        self._returns: list[_engines.Lease] = []
        self._returning = threading.Lock()
        self._ticket: _wakeup.Ticket | None = None
        # A duplicate of inotify's descriptor: the loop may watch it even after the bell was closed.
        self._watched = -1
        self._timer: asyncio.TimerHandle | None = None
        self._poller: asyncio.TimerHandle | None = None
        _inboxes.add(self)

    async def take(self, timeout: float | None, pause: float, max_messages: int,
                   is_newest: bool) -> _engines.Lease | None:
        """
        Wait for messages.

        :param timeout: how long to wait, in seconds; None: for ever
        :param pause: time between two looks without a wake-up, in seconds
        :param max_messages: how many to take at most
        :param is_newest: True to take the newest message instead, and to skip all older ones
        :return: messages; None if none came in time
        """
        if self._error is not None:
            raise self._error
        waiter = _Waiter(self.loop, timeout, pause, max_messages, is_newest, self._look_count)
        self._waiters[waiter] = None
        self._start_look()
        try:
            await waiter.future
        except BaseException:
            self._withdraw(waiter)
            raise
        self._served.pop(waiter, None)
        return waiter.lease

    def _withdraw(self, waiter: _Waiter) -> None:
        """
        Forget a task that was cancelled, or whose message is damaged.

        :param waiter: the task
        """
        self._waiters.pop(waiter, None)
        self._served.pop(waiter, None)
        lease = waiter.lease
        if lease is not None:
            # Cancelled before it went on. Those behind it move up, so that they stay in order.
            for other in self._served:
                if other.look == waiter.look and other.is_like(waiter):
                    other.lease, lease = lease, other.lease
            self._pass_on(waiter, lease, waiter.look)
        self._rest_if_idle()

    def _pass_on(self, waiter: _Waiter, lease: _engines.Lease, look: int) -> None:
        """
        Let the first task that waits have messages; without any, let others have them.

        Not one that came since they were taken: what it did before may have been to skip them.

        :param waiter: for whom they were taken; may be gone, or may have those of one that is gone
        :param lease: of the messages
        :param look: that took them
        """
        for other in self._waiters:
            if other.look < look and other.is_like(waiter) and not other.future.done():
                del self._waiters[other]
                other.look, other.lease = look, lease
                self._served[other] = None
                other.future.set_result(None)
                return
        self._is_outdated = self._is_looking
        self._return(lease)

    def _return(self, *leases: _engines.Lease) -> None:
        """Have messages given back soon, in order."""
        self._returns.extend(leases)
        try:
            self._workers.submit(self._return_all)
        except _workers.NoThreadError:
            self._returns.clear()  # without a thread, they are given back with their memory

    def _return_all(self) -> None:
        """
        Give back what nobody waits for any more, in a worker thread.

        A look does so first: while another thread was at it, it would find what comes later.
        """
        with self._returning, contextlib.suppress(IndexError):
            while True:
                _give_back(self._returns.pop(0))

    # Looking

    def _start_look(self) -> None:
        """Have a worker look, now or when it has finished the look it is at."""
        self._looks_again = self._is_looking
        waiters = [waiter for waiter in self._waiters if not waiter.future.done()]
        if self._is_looking or not waiters:
            return
        self._is_looking, self._is_outdated = True, False
        self._look_count += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            self._workers.submit(functools.partial(self._look, waiters, time.monotonic()))
        except _workers.NoThreadError as error:
            self._hand_out(waiters, {}, {}, error)

    def _look(self, waiters: list[_Waiter], now: float) -> None:
        """
        Look at the queue in a worker thread, and take as much as is wanted.

        :param waiters: tasks that want something
        :param now: time on the monotonic clock at which the look began, in seconds
        """
        leases: dict[_Waiter, _engines.Lease] = {}
        missed: dict[bool, float] = {}
        error: BaseException | None = None
        try:
            self._return_all()
            if self._ticket is not None:
                if self._ticket.closed:
                    raise persipubsub.errors.ClosedError(
                        "Expected an open queue to receive from, but got: it was closed")
                self._ticket.arm()
            self._take(waiters, leases, missed)
            if (self._ticket is None and missed
                    and any(waiter.deadline > now for waiter in waiters)):
                self._ticket = self.consumer.prepare_wait()
                self._ticket.set_callback(
                    functools.partial(_workers.post, self.loop, self._start_look))
                self._take(waiters, leases, missed)
        except BaseException as caught:  # pylint: disable=broad-exception-caught
            error = caught
        if not _workers.post(self.loop, self._hand_out, waiters, leases, missed, error):
            # The loop was closed under its tasks.
            for lease in leases.values():
                _give_back(lease)
            if self._ticket is not None:
                self._ticket.close()

    def _take(self, waiters: list[_Waiter], leases: dict[_Waiter, _engines.Lease],
              missed: dict[bool, float]) -> None:
        """
        Take what is there, in a worker thread.

        Where there is no newest message to be had, there may be a next one: somebody else has the
        newest one, or it rests.

        :param waiters: tasks that want something; some of them were served already
        :param leases: of tasks; extended
        :param missed: after how many seconds to look again for those who want the newest message
            (True), or the next one (False), where there was none; replaced
        """
        missed.clear()
        for waiter in waiters:
            if len(leases) == _MOST_TAKEN or len(missed) == 2:
                return
            if waiter in leases or waiter.is_newest in missed:
                continue
            lease, pause = self.consumer.take_now(waiter.max_messages, waiter.is_newest)
            if lease is None:
                missed[waiter.is_newest] = pause
            else:
                leases[waiter] = lease

    def _hand_out(self, waiters: list[_Waiter], leases: dict[_Waiter, _engines.Lease],
                  missed: dict[bool, float], error: BaseException | None) -> None:
        """
        Give the tasks what a look found, and go on waiting for the others.

        :param waiters: tasks for which it was looked
        :param leases: of some of them, in their order
        :param missed: see :py:meth:`_take`
        :param error: that ended the look
        """
        self._is_looking = False
        if self._is_outdated:
            # Messages that are in front of these were given back.
            self._return(*leases.values())
            leases, missed = {}, {} if error is None else missed
        for waiter, lease in leases.items():
            self._pass_on(waiter, lease, self._look_count)

        now = time.monotonic()
        ended = [waiter for waiter in waiters if waiter not in leases]
        if isinstance(error, persipubsub.errors.CorruptMessageError):
            # It was set aside, and concerns nobody else than for whom it was taken.
            ended = [waiter for waiter in ended if waiter.is_newest not in missed][:1]
        elif error is None:
            ended = [
                waiter for waiter in ended if waiter.is_newest in missed and waiter.deadline <= now
            ]
        for waiter in ended:
            if waiter in self._waiters:
                del self._waiters[waiter]
                if error is not None:
                    _workers.fail(waiter.future, error)
                elif not waiter.future.done():
                    waiter.future.set_result(None)

        if not self._waiters:
            self._rest_if_idle()
        elif (self._looks_again or error is not None or not missed or len(leases) == _MOST_TAKEN):
            self._start_look()
        else:
            self._wait(min(missed.values()))

    # Waiting

    def _wait(self, pause: float) -> None:
        """
        Let the loop wait for the bell.

        :param pause: longest time until the next look, in seconds
        """
        if self._watched < 0 and self._poller is None:
            self._watch()
        now = time.monotonic()
        for waiter in self._waiters:
            pause = min(pause, waiter.pause, waiter.deadline - now)
        self._timer = self.loop.call_later(max(pause, 0.0), self._start_look)

    def _watch(self) -> None:
        """Have the loop notice the bell of any process."""
        descriptor = -1 if self._ticket is None else self._ticket.fileno()
        if descriptor >= 0:
            try:
                self._watched = os.dup(descriptor)
                self.loop.add_reader(self._watched, _wakeup.dispatch)
                return
            except OSError:
                pass  # no descriptor is left, or the bell was closed by another thread
            self._unwatch()
        self._poll()

    def _poll(self) -> None:
        """Look at the bell every few milliseconds, where there is no inotify."""
        self._poller = self.loop.call_later(_POLL_SECS, self._poll)
        _wakeup.dispatch()

    def _unwatch(self) -> None:
        """Have the loop notice nothing any more."""
        descriptor, self._watched = self._watched, -1
        if descriptor >= 0:
            if not self.loop.is_closed():
                self.loop.remove_reader(descriptor)
            os.close(descriptor)
        if self._poller is not None:
            self._poller.cancel()
            self._poller = None

    def _rest_if_idle(self) -> None:
        """Give everything back that waiting needs, if nobody waits."""
        if self._waiters or self._is_looking:
            return
        self._unwatch()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.close()

    # Ending

    def close(self, error: BaseException) -> None:
        """
        Let all who wait fail. Any thread may call it; those of other loops fail a little later.

        :param error: to be raised there
        """
        if self.process_id != os.getpid():
            return
        try:
            is_own = asyncio.get_running_loop() is self.loop
        except RuntimeError:
            is_own = False
        if is_own:
            self._fail(error)
        elif not _workers.post(self.loop, self._fail, error):
            # The loop was closed under its tasks: nobody can be told. A worker that still looks
            # will notice it, too, and what a look has found is given back with the loop's memory.
            self._waiters.clear()
            self._is_looking = False
            self._rest_if_idle()

    def _fail(self, error: BaseException) -> None:
        """Let all who wait fail, in the thread of the loop."""
        self._error = error
        for waiter in self._waiters:
            _workers.fail(waiter.future, error)
        self._waiters.clear()
        self._rest_if_idle()

    def close_in_child(self) -> None:
        """Let go of the parent's descriptor, without a word to the parent's loop."""
        descriptor, self._watched = self._watched, -1
        if descriptor >= 0:
            os.close(descriptor)


def _give_back(lease: _engines.Lease) -> None:
    """
    Give messages back that were not worked on, in a worker thread.

    :param lease: of the messages
    """
    try:
        lease.give_back()
    except persipubsub.errors.PersipubsubError:
        pass  # a queue that was closed has given them back already


class SharedInbox:
    """
    Wait for tasks of any number of loops where an engine can not wake them.

    Each task that waits gets a thread of a few for a short while, again and again.
    """

    def __init__(self,
                 consumer: _engines.Consumer,
                 workers: _workers.Workers,
                 slice_secs: float = 1.0) -> None:
        """
        Initialize with nobody waiting.

        :param consumer: to take messages from
        :param workers: wait
        :param slice_secs: how long one task keeps a thread at most, in seconds
        """
        self._consumer = consumer
        self._workers = workers
        self._slice_secs = slice_secs

    async def take(self, timeout: float | None, pause: float, max_messages: int,
                   is_newest: bool) -> _engines.Lease | None:
        """
        Wait for messages.

        :param timeout: how long to wait, in seconds; None: for ever
        :param pause: time between two looks without a wake-up, in seconds
        :param max_messages: how many to take at most
        :param is_newest: True to take the newest message instead, and to skip all older ones
        :return: messages; None if none came in time
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        undo: Callable[[_engines.Lease | None],
                       None] = lambda lease: None if lease is None else _give_back(lease)
        while True:
            remaining = deadline - time.monotonic()
            seconds = max(0.0, min(remaining, self._slice_secs))
            wait: Callable[[], _engines.Lease | None]
            if is_newest:
                wait = functools.partial(self._consumer.take_newest, seconds, pause)
            else:
                wait = functools.partial(self._consumer.take, seconds, pause, max_messages)
            lease = await self._workers.run(wait, undo)
            if lease is not None or remaining <= self._slice_secs:
                return lease


class LoopInbox:
    """Wait for tasks of any number of loops where an engine has a loop of its own."""

    def __init__(self, consumer: _engines.LoopConsumer) -> None:
        """
        Initialize with nobody waiting.

        :param consumer: to take messages from
        """
        self.consumer = consumer

    async def take(self, timeout: float | None, pause: float, max_messages: int,
                   is_newest: bool) -> _engines.Lease | None:
        """
        Wait for messages.

        :param timeout: how long to wait, in seconds; None: for ever
        :param pause: is not needed: the engine looks by itself
        :param max_messages: how many to take at most
        :param is_newest: True to take the newest message instead, and to skip all older ones
        :return: messages; None if none came in time
        """
        del pause
        return await _begun.result_of(self.consumer.begin_take(timeout, max_messages, is_newest),
                                      _begin_give_back)


def _begin_give_back(lease: _engines.Lease | None) -> None:
    """
    Give messages back that were not worked on, without waiting for it.

    :param lease: of an engine with a loop of its own; None if there was none in time
    """
    if lease is not None:
        try:
            cast(_engines.LoopLease, lease).begin_give_back()
        except persipubsub.errors.PersipubsubError:
            pass  # a queue that was closed has given them back already


_inboxes: "weakref.WeakSet[Inbox]" = weakref.WeakSet()


def _close_in_child() -> None:
    """Let go of the parent's descriptors in a forked child."""
    for inbox in list(_inboxes):
        inbox.close_in_child()


os.register_at_fork(after_in_child=_close_in_child)
