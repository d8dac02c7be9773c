"""
Run one event loop in a thread, for all queues of this process that are streams.

The client of NATS is written for ``asyncio``, the library is not: any thread hands a coroutine over
and waits for it. One loop, and not one for each queue, so that a program with a hundred queues has
one more thread and not a hundred.

A forked child has neither the thread nor a use for the connections: it begins with a loop of its
own at its first call, and the parent's connections are closed in it.
"""

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import persipubsub.errors

ResultT = TypeVar("ResultT")

#: How long the exit of the interpreter waits for the connections to be closed, in seconds.
_EXIT_SECS: Final = 2.0

#: A task that is cancelled may begin another one, to give back what it had: so many in a row.
_MOST_ROUNDS: Final = 5


class Loop:
    """Hold the event loop and its thread. What is not said otherwise, any thread may call."""

    def __init__(self) -> None:
        """Start the thread."""
        self.process_id = os.getpid()
        self._loop = asyncio.new_event_loop()
        #: To be awaited at the exit before the connections are closed, which raise nothing.
        self.givers: list[Callable[[], Coroutine[Any, Any, None]]] = []
        #: To be awaited at the exit, and sockets to be closed in forked children. Only the loop's
        #: own thread changes them.
        self.closers: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.sockets: list[Callable[[], int]] = []
        self._is_stopped = threading.Event()
        # Nothing is begun any more. Only the loop's own thread changes it.
        self._is_over = False
        self._tasks: set["asyncio.Task[Any]"] = set()
        # A daemon: a program that ends without closing its queues must not hang.
        self._thread = threading.Thread(target=self._run, name="persipubsub-nats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """Run the loop until it is stopped."""
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def call(self, function: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """
        Run a coroutine in the loop and wait for it; it has to bound its own waits.

        If the waiting thread is interrupted (Ctrl-C), the coroutine is cancelled.

        :param function: makes the coroutine
        :return: what the coroutine returned
        :raise ClosedError: if the interpreter is about to exit
        """
        future = self.begin(function)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            if self._is_stopped.is_set() and threading.current_thread().daemon:
                # The interpreter stops such a thread where it is, and so do we: an error would be
                # printed at the end of a program in which nothing is wrong.
                threading.Event().wait()
            raise _exiting() from None
        except BaseException:
            future.cancel()
            raise

    def begin(
            self, function: Callable[[], Coroutine[Any, Any,
                                                   ResultT]]) -> concurrent.futures.Future[ResultT]:
        """
        Run a coroutine in the loop and do not wait for it; it has to bound its own waits.

        :param function: makes the coroutine
        :return: of what the coroutine returns; cancelling it cancels the coroutine
        :raise ClosedError: if the interpreter is about to exit
        """
        if self._is_stopped.is_set():
            raise _exiting()
        return asyncio.run_coroutine_threadsafe(function(), self._loop)

    def post(self, function: Callable[[], None]) -> None:
        """
        Call a function in the loop's thread soon, unless the loop ends before. Fit for finalizers.

        It takes no lock, and raises nothing.

        :param function: to be called
        """

        def call() -> None:
            if not self._is_over:
                function()

        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(call)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """
        Run a coroutine and do not wait for it. Only for the loop's own thread.

        :param coroutine: that raises nothing
        :return: its task; nobody has to keep it
        """
        # The loop itself holds tasks only weakly.
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def start_later(self, seconds: float, function: Callable[[], None]) -> asyncio.TimerHandle:
        """
        Call a function later. Only for the loop's own thread.

        :param seconds: from now
        :param function: to be called
        :return: to be cancelled
        """
        return self._loop.call_later(seconds, function)

    def stop(self) -> None:
        """Close all connections, end the thread and wait for both, but not for long."""
        if self.process_id != os.getpid() or self._is_stopped.is_set():
            return
        self._is_stopped.set()
        future = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        try:
            future.result(timeout=_EXIT_SECS)
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError, RuntimeError):
            pass
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_EXIT_SECS)

    async def _close(self) -> None:
        """Cancel what is going on, and close the connections."""
        try:
            await asyncio.wait_for(asyncio.gather(*(giver() for giver in self.givers)),
                                   timeout=_EXIT_SECS / 2)
        except TimeoutError:
            pass  # the server gives it to others after ack_wait
        closers, self.closers = self.closers, []
        await asyncio.gather(*(closer() for closer in closers), return_exceptions=True)
        own = asyncio.current_task()
        for _ in range(_MOST_ROUNDS):
            tasks = [task for task in asyncio.all_tasks() if task is not own]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._is_over = True


def _exiting() -> persipubsub.errors.ClosedError:
    """
    Describe a call that comes too late.

    :return: error to be raised
    """
    return persipubsub.errors.ClosedError(
        "Expected a program that runs, but got: the interpreter is about to exit")


# Guards _current while it is set; nothing else is done while it is held. A forked child gets a new
# one, since another thread may hold the old one for ever.
_lock = threading.Lock()
_current: Loop | None = None
_parents: list[Loop] = []


def current() -> Loop:
    """
    Find the loop of this process, and start it if there is none.

    :return: the loop
    """
    loop = _current
    if loop is not None and loop.process_id == os.getpid():
        return loop
    return _start()


def _start() -> Loop:
    """
    Start the loop of this process, unless another thread just did.

    :return: the loop
    """
    global _current  # pylint: disable=global-statement
    with _lock:
        if _current is None or _current.process_id != os.getpid():
            try:
                _current = Loop()
            except RuntimeError:
                raise _exiting() from None
            atexit.register(_current.stop)
        return _current


def _forget() -> None:
    """Close what a forked child inherited of the connections, without a word to the servers."""
    global _lock, _current  # pylint: disable=global-statement
    _lock = threading.Lock()
    parent, _current = _current, None
    if parent is None:
        return
    # Kept: its transports would close their descriptors, which may be something else by then.
    _parents.append(parent)
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for socket in parent.sockets:
        descriptor = socket()
        if descriptor >= 0:
            os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)


os.register_at_fork(after_in_child=_forget)
