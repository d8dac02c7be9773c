"""
Run blocking calls in a few threads, for tasks of any number of event loops.

The default executor of a loop was rejected: the application's own slow calls would hold up
acknowledgements, and a queue that hangs would hold up the application. So was one pool for the
whole process: a queue that hangs would hold up the others.
"""

import asyncio
import concurrent.futures
import functools
import os
from typing import Callable, Dict, Optional, TypeVar

ResultT = TypeVar("ResultT")


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
        self._executors: Dict[int, concurrent.futures.ThreadPoolExecutor] = {}

    def submit(self, job: Callable[[], object]) -> None:
        """
        Have a job done soon. It is done even if nobody waits for it any more. Never blocks.

        :param job: that raises nothing
        """
        process_id = os.getpid()
        executor = self._executors.get(process_id)
        if executor is not None:
            try:
                executor.submit(job)
                return
            except RuntimeError:
                pass  # another thread closed it a moment ago
        executor = concurrent.futures.ThreadPoolExecutor(self._most, "persipubsub")
        # Atomic: of two threads that make one at the same time, both use the first.
        self._executors.setdefault(process_id, executor).submit(job)

    async def run(self,
                  call: Callable[[], ResultT],
                  undo: Optional[Callable[[ResultT], object]] = None) -> ResultT:
        """
        Wait for a call in one of the threads.

        The call is made, and made to its end, even if the task is cancelled meanwhile.

        :param call: to be made
        :param undo: called in one of the threads with the result, if the task was cancelled
        :return: what the call returned
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
                    self.submit(functools.partial(undo, future.result()))
            raise

    def _call(self, loop: asyncio.AbstractEventLoop, future: "asyncio.Future[ResultT]",
              call: Callable[[], ResultT], undo: Optional[Callable[[ResultT], object]]) -> None:
        """Make the call in a worker thread, and tell the loop."""
        try:
            result = call()
        except BaseException as error:  # pylint: disable=broad-exception-caught
            post(loop, fail, future, error)
            return
        if not post(loop, self._finish, future, result, undo) and undo is not None:
            undo(result)

    def _finish(self, future: "asyncio.Future[ResultT]", result: ResultT,
                undo: Optional[Callable[[ResultT], object]]) -> None:
        """Hand the result over in the thread of the loop."""
        if not future.done():
            future.set_result(result)
        elif undo is not None:
            self.submit(functools.partial(undo, result))

    def close(self) -> None:
        """Let the threads end when they have done their jobs. Never blocks; may be repeated."""
        executor = self._executors.pop(os.getpid(), None)
        if executor is not None:
            executor.shutdown(wait=False)


def fail(future: "asyncio.Future[ResultT]", error: BaseException) -> None:
    """
    Let a future fail in the thread of its loop, unless it was cancelled.

    :param future: that somebody waits for
    :param error: to be raised there
    """
    if not future.done():
        future.set_exception(error)
