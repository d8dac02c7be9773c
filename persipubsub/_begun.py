"""
Wait in a task for what was begun in another loop: the one that an engine has of its own.

``asyncio.wrap_future`` was rejected: a task that is cancelled in the moment in which its future is
done would forget a lease, and nobody could give it back.
"""

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable
from typing import TypeVar

import persipubsub.errors
from persipubsub import _workers

ResultT = TypeVar("ResultT")

Undo = Callable[[ResultT], object]


async def result_of(begun: concurrent.futures.Future[ResultT],
                    undo: Undo[ResultT] | None = None) -> ResultT:
    """
    Wait for what was begun; it takes no thread.

    :param begun: by an engine
    :param undo:
        called with the result, in any thread, if the task was cancelled and what was begun could
        not be; it must not block. Without it, that is done to its end even if the task is cancelled
    :return: its result
    """
    loop = asyncio.get_running_loop()
    own: "asyncio.Future[ResultT]" = loop.create_future()
    # Whoever takes it out does it.
    undos = [] if undo is None else [undo]
    begun.add_done_callback(functools.partial(_tell, loop, own, undos))
    try:
        return await own
    except BaseException:
        if undo is not None and not begun.cancel():
            # Done, or within microseconds. Not left to the loop, which is told of the result later:
            # what the task does next may be to close the queue.
            _undo(undos, begun)
        raise


def _tell(loop: asyncio.AbstractEventLoop, own: "asyncio.Future[ResultT]",
          undos: list[Undo[ResultT]], begun: concurrent.futures.Future[ResultT]) -> None:
    """Tell the task's loop that it is done, from the thread of the engine."""
    if not _workers.post(loop, _finish, own, begun):
        # The loop was closed under its task.
        _undo(undos, begun)


def _finish(own: "asyncio.Future[ResultT]", begun: concurrent.futures.Future[ResultT]) -> None:
    """Hand the result over in the thread of the task's loop."""
    if own.done():
        return
    if begun.cancelled():
        own.set_exception(
            persipubsub.errors.ClosedError(
                "Expected a program that runs, but got: the interpreter is about to exit"))
    elif (error := begun.exception()) is not None:
        own.set_exception(error)
    else:
        own.set_result(begun.result())


def _undo(undos: list[Undo[ResultT]], begun: concurrent.futures.Future[ResultT]) -> None:
    """Undo what was done, if something was, and nobody did it yet."""
    if not begun.cancelled() and begun.exception() is None:
        try:
            undo = undos.pop()
        except IndexError:
            return
        undo(begun.result())
