"""
Run blocking calls in a few threads, for tasks of any number of event loops.

The default executor of a loop was rejected: the application's own slow calls would hold up
acknowledgements, and a queue that hangs would hold up the application. So was one pool for the
whole process: a queue that hangs would hold up the others.

The threads of executors end with the main thread, even if loops in other threads go on, and those
that somebody starts after a close would be there for ever. What comes then is done by threads that
end with their jobs.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import TypeVar

import persipubsub.errors

ResultT = TypeVar("ResultT")

Job = Callable[[], object]


class NoThreadError(persipubsub.errors.StoreError):
    """Report that no thread can be started; nothing was done."""


def post(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments:
         object) -> bool:
    """
    Have a function called in the thread of a loop. Any thread may do so. Never blocks.

    :param loop: that runs, or not
    :param function: to be called
    :param arguments: of the function
    :return: False if the loop was closed: the function will not be called
    """
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


class _Late:
    """Do jobs in threads that end as soon as there is nothing to do."""

    def __init__(self, most: int) -> None:
        """
        Initialize without any thread.

        :param most: number of threads
        """
        self._most = most
        # Guards the two below, and the start of a thread. No job is done while it is held.
        self._lock = threading.Lock()
        self._jobs: collections.deque[Job] = collections.deque()
        self._threads = 0

    def submit(self, job: Job) -> None:
        """
        Have a job done soon.

        :param job: that raises nothing
        :raise RuntimeError: if no thread can be started, and none is there
        """
        with self._lock:
            self._jobs.append(job)
            if self._threads < self._most:
                try:
                    threading.Thread(target=self._run, name="persipubsub").start()
                    self._threads += 1
                except RuntimeError:
                    if self._threads == 0:
                        self._jobs.pop()
                        raise

    def _run(self) -> None:
        """Do jobs until there are none."""
        while True:
            with self._lock:
                if not self._jobs:
                    self._threads -= 1
                    return
                job = self._jobs.popleft()
            with contextlib.suppress(Exception):  # as in executors
                job()


class Workers:
    """
    Run calls in up to a number of threads, which are started when they are needed.

    All threads may use it at the same time, and so may a forked child: it gets threads of its own.
    """

    def __init__(self, most: int) -> None:
        """
        Initialize without any thread.

        :param most: number of threads
        """
        self._most = most
        # By process id, so that a forked child does not wait for threads that it does not have.
        self._executors: dict[int, concurrent.futures.ThreadPoolExecutor] = {}
        self._late: dict[int, _Late] = {}
        self._is_closed = False

    def open(self) -> None:
        """Keep threads from now on until :py:meth:`close`."""
        self._is_closed = False

    def submit(self, job: Job) -> None:
        """
        Have a job done soon. It is done even if nobody waits for it any more. Never blocks.

        :param job: that raises nothing
        :raise NoThreadError: if none can be started; the job is not done
        """
        process_id = os.getpid()
        # An executor that can start no thread may do the job all the same, later.
        jobs = [job]
        once = functools.partial(_do_once, jobs)
        was_closed = self._is_closed
        if not was_closed:
            try:
                executor = self._executors.get(process_id)
                if executor is None:
                    # Atomic: of two threads that make one at the same time, both use the first.
                    executor = self._executors.setdefault(
                        process_id,
                        concurrent.futures.ThreadPoolExecutor(self._most, "persipubsub"))
                executor.submit(once)
                if self._is_closed:
                    self.close()  # another thread did, before it could see this executor
                return
            except RuntimeError:
                pass  # closed a moment ago, or the main thread has ended, or there is no thread
        try:
            self._late.setdefault(process_id, _Late(self._most)).submit(once)
        except RuntimeError as error:
            if _withdraw(jobs) is not None:
                raise NoThreadError(
                    f"Expected a thread for what would block the event loop, but got: {error}"
                ) from error

    def submit_undo(self, job: Job) -> None:
        """
        Have something undone soon. Without a thread, the garbage collector has to do it.

        :param job: that raises nothing
        """
        with contextlib.suppress(NoThreadError):
            self.submit(job)

    async def run(self,
                  call: Callable[[], ResultT],
                  undo: Callable[[ResultT], object] | None = None) -> ResultT:
        """
        Wait for a call in one of the threads.

        The call is made, and made to its end, even if the task is cancelled meanwhile.

        :param call: to be made
        :param undo: called in one of the threads with the result, if the task was cancelled
        :return: what the call returned
        :raise NoThreadError: if none can be started; the call is not made
        """
        loop = asyncio.get_running_loop()
        future: "asyncio.Future[ResultT]" = loop.create_future()
        self.submit(functools.partial(self._call, loop, future, call, undo))
        try:
            return await future
        except BaseException:
            # Cancelled after the result was there, but before the task went on.
            if undo is not None and future.done() and not future.cancelled():
                if future.exception() is None:
                    self.submit_undo(functools.partial(undo, future.result()))
            raise

    def _call(self, loop: asyncio.AbstractEventLoop, future: "asyncio.Future[ResultT]",
              call: Callable[[], ResultT], undo: Callable[[ResultT], object] | None) -> None:
        """Make the call in a worker thread, and tell the loop."""
        try:
            result = call()
        except BaseException as error:  # pylint: disable=broad-exception-caught
            post(loop, fail, future, error)
            return
        if not post(loop, self._finish, future, result, undo) and undo is not None:
            undo(result)

    def _finish(self, future: "asyncio.Future[ResultT]", result: ResultT,
                undo: Callable[[ResultT], object] | None) -> None:
        """Hand the result over in the thread of the loop."""
        if not future.done():
            future.set_result(result)
        elif undo is not None:
            self.submit_undo(functools.partial(undo, result))

    def close(self) -> None:
        """Let the threads end when they have done their jobs. Never blocks; may be repeated."""
        self._is_closed = True
        executor = self._executors.pop(os.getpid(), None)
        if executor is not None:
            executor.shutdown(wait=False)


def _do_once(jobs: list[Job]) -> None:
    """Do the job that is there, unless it was withdrawn, or somebody else does it."""
    job = _withdraw(jobs)
    if job is not None:
        job()


def _withdraw(jobs: list[Job]) -> Job | None:
    """
    Take the job that is there; only one thread gets it.

    :param jobs: one, or none
    :return: job; None if there is none any more
    """
    try:
        return jobs.pop()
    except IndexError:
        return None


def fail(future: "asyncio.Future[ResultT]", error: BaseException) -> None:
    """
    Let a future fail in the thread of its loop, unless it was cancelled.

    :param future: that somebody waits for
    :param error: to be raised there
    """
    if not future.done():
        future.set_exception(error)
