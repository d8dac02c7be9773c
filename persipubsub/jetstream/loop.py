"""
Run one event loop in a thread, for all queues of this process that are streams.

The client of NATS is written for ``asyncio``; any thread, and any task of another loop, hands a
coroutine over and waits for it. One loop serves all queues: a program with a hundred queues has one
more thread, and not a hundred.

A forked child starts a loop of its own at its first call. The parent's connections are closed in
the child at once.
"""

import asyncio
import atexit
import contextlib
import contextvars
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Final, Generic, TypeVar

import persipubsub.errors

ResultT = TypeVar("ResultT")

#: How long the exit of the interpreter waits for the connections to be closed, in seconds.
_EXIT_SECS: Final = 2.0

#: Where the transports go that a task and its children open.
opened: Final[contextvars.ContextVar[list[asyncio.BaseTransport]]] = contextvars.ContextVar(
    "opened", default=[])


class _EventLoop(asyncio.SelectorEventLoop):
    """
    Event loop that knows its connections.

    The client of NATS offers no way to its socket. It is needed to abort a connection to a server
    that reads nothing, and to close it in a forked child.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transports: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()
        self.set_exception_handler(self._handle)

    def _handle(self, _: object, context: dict[str, Any]) -> None:
        # Up to nats-py 2.14, a client whose server closed the connection leaves tasks.
        if "was destroyed" not in context["message"]:
            self.default_exception_handler(context)

    async def create_connection(self, *args: Any, **named: Any) -> Any:
        """Connect, and note the transport."""
        transport, protocol = await super().create_connection(*args, **named)
        self.transports.add(transport)
        opened.get().append(transport)
        return transport, protocol


class _Call(Generic[ResultT]):
    """
    A coroutine that runs in the loop for somebody outside.

    The futures of ``concurrent.futures`` were rejected: with ``run_coroutine_threadsafe``, a call
    took a fifth longer.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, ResultT], tell: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._tell = tell
        self._is_told, self._is_wanted = False, True
        self._task: asyncio.Task[None] | None = None
        self._results: list[ResultT] = []
        self._error: BaseException | None = None

    def start(self, own: "Loop") -> None:
        """Start the coroutine, in the loop's thread."""
        self._task = own.start(self._run())
        self._task.add_done_callback(self._end)

    async def _run(self) -> None:
        try:
            result = await self._coroutine
            if self._is_wanted:
                self._results.append(result)
        except BaseException as error:  # pylint: disable=broad-exception-caught
            self._error = error
        # Not left to the callback, which comes one round of the loop later.
        self._end()

    def _end(self, task: asyncio.Task[None] | None = None) -> None:
        if task is not None and not self._is_told:
            # It was cancelled before it began.
            self._coroutine.close()
            self._error = asyncio.CancelledError()
        if not self._is_told:
            self._is_told = True
            self._tell()

    def cancel(self) -> None:
        """Cancel the coroutine, and forget its result, in the loop's thread."""
        self._is_wanted = False
        self._results.clear()
        if self._task is not None:
            self._task.cancel()

    def has_failed(self) -> bool:
        """Tell whether it raised an error."""
        return self._error is not None

    def take_result(self) -> ResultT:
        """Return or raise what came of it; a lease is not kept here."""
        if isinstance(self._error, asyncio.CancelledError):
            raise exiting()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # the traceback refers to us
        return self._results.pop()


class Loop:
    """The event loop and its thread. Any thread may call what does not say otherwise."""

    def __init__(self) -> None:
        """Start the thread."""
        self.process_id = os.getpid()
        #: Queues, which the exit closes. Only the loop's own thread changes it.
        self.open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._loop = _EventLoop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_stopped = threading.Event()
        # A daemon: a program that ends without closing its queues must not hang.
        self._thread = threading.Thread(target=self._run, name="persipubsub-nats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a coroutine in the loop, and wait for it. Ctrl-C cancels the coroutine."""
        done = threading.Lock()
        done.acquire()  # pylint: disable=consider-using-with
        call = self._begin(coroutine, done.release)
        try:
            done.acquire()  # pylint: disable=consider-using-with
        except BaseException:
            self.post(call.cancel)
            raise
        if self._is_stopped.is_set() and call.has_failed() and threading.current_thread().daemon:
            # The interpreter stops such a thread where it is. An error would be printed at the end
            # of a program in which nothing is wrong.
            threading.Event().wait()
        return call.take_result()

    async def wait(self, coroutine: Coroutine[Any, Any, ResultT], is_carried_out: bool) -> ResultT:
        """
        Run a coroutine in the loop, and wait for it in a task of any loop.

        Cancelling the task cancels the coroutine, unless that is to be carried out anyway.
        ``asyncio.wrap_future`` was rejected: it logs an error if the task's loop was closed.
        """
        own_loop = asyncio.get_running_loop()
        done = own_loop.create_future()

        def finish() -> None:
            if not done.done():
                done.set_result(None)

        def tell() -> None:
            try:
                own_loop.call_soon_threadsafe(finish)
            except RuntimeError:
                call.cancel()  # the task's loop was closed

        call = self._begin(coroutine, tell)
        try:
            await done
        except BaseException:
            if not is_carried_out:
                self.post(call.cancel)
            raise
        return call.take_result()

    def _begin(self, coroutine: Coroutine[Any, Any, ResultT],
               tell: Callable[[], None]) -> "_Call[ResultT]":
        call = _Call(coroutine, tell)
        if self._is_stopped.is_set():
            coroutine.close()
            raise exiting()
        self._loop.call_soon_threadsafe(call.start, self)
        return call

    def post(self, function: Callable[[], object]) -> None:
        """Call a function in the loop's thread soon. Fit for finalizers: no lock, no error."""
        with contextlib.suppress(RuntimeError):  # the loop was closed at the exit
            self._loop.call_soon_threadsafe(function)

    def start(self, coroutine: Coroutine[Any, Any, ResultT]) -> asyncio.Task[ResultT]:
        """Run a coroutine, and keep its task. Only for the loop's own thread."""
        task = self._loop.create_task(coroutine)
        # The loop itself holds tasks only weakly.
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # otherwise asyncio complains that nobody has looked at it

    def stop(self) -> None:
        """Close what is open, end the thread, and wait for both, but not for long."""
        if self.process_id != os.getpid() or self._is_stopped.is_set():
            return
        self._is_stopped.set()
        is_closed = threading.Event()
        self.post(lambda: _Call(self._close(), is_closed.set).start(self))
        is_closed.wait(timeout=2 * _EXIT_SECS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_EXIT_SECS)

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(_EXIT_SECS):
                await asyncio.gather(*(one.aclose() for one in list(self.open)),
                                     return_exceptions=True)
        except TimeoutError:
            pass  # the servers deliver what is held to others after ack_wait
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close_sockets(self) -> None:
        """Close the parent's connections in a forked child, without a word to the servers."""
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for transport in list(self._loop.transports):
            socket = transport.get_extra_info("socket")
            if socket is not None and socket.fileno() >= 0:
                os.dup2(nothing, socket.fileno(), inheritable=False)
        os.close(nothing)


def exiting() -> persipubsub.errors.ClosedError:
    """Describe a call that comes too late."""
    return persipubsub.errors.ClosedError(
        "Expected a program that runs, but got: the interpreter is about to exit")


# Guards _current while it is set. A forked child gets a new one: another thread of the parent may
# hold the old one.
_lock = threading.Lock()
_current: Loop | None = None
# Kept: their transports would close their descriptors, which may be something else by then.
_parents: list[Loop] = []


def current() -> Loop:
    """Return the loop of this process; start it if there is none."""
    global _current  # pylint: disable=global-statement
    loop = _current
    if loop is not None and loop.process_id == os.getpid():
        return loop
    with _lock:
        if _current is None or _current.process_id != os.getpid():
            try:
                _current = Loop()
            except RuntimeError:
                raise exiting() from None
            atexit.register(_current.stop)
        return _current


def _start_anew() -> None:
    global _lock, _current  # pylint: disable=global-statement
    _lock = threading.Lock()
    parent, _current = _current, None
    if parent is not None:
        _parents.append(parent)
        parent.close_sockets()


os.register_at_fork(after_in_child=_start_anew)
