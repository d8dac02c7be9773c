"""
Run one event loop in a thread, for all queues of this process that are streams.

The client of NATS is written for ``asyncio``; any thread, and any task of another loop, has a
coroutine function run there and waits for it. One loop serves all queues: a program with a hundred
queues has one more thread, and not a hundred.

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
from typing import Any, Final, Generic, TypeAlias, TypeVar

import persipubsub.errors

ResultT = TypeVar("ResultT")
Work: TypeAlias = Callable[[], Coroutine[Any, Any, ResultT]]

#: How long the exit of the interpreter waits for the connections to be closed, in seconds.
_EXIT_SECS: Final = 2.0

#: Where the transports go that a task and its children open.
opened: Final[contextvars.ContextVar[list[asyncio.BaseTransport]]] = contextvars.ContextVar(
    "opened", default=[])


class _Call(Generic[ResultT]):
    """
    Work that is done in the loop for somebody outside.

    The futures of ``concurrent.futures`` were rejected: with ``run_coroutine_threadsafe``, a call
    took a fifth longer.
    """

    def __init__(self, own: "Loop", work: Work[ResultT], tell: Callable[[], None]) -> None:
        self._own = own
        self._work = work
        self._tell = tell
        self._task: asyncio.Task[None] | None = None
        self._results: list[ResultT] = []
        self._error: BaseException | None = None

    def start(self) -> None:
        """Start the work, in the loop's thread."""
        self._task = self._own.start(self._run())

    async def _run(self) -> None:
        try:
            self._results.append(await self._work())
        except BaseException as error:  # pylint: disable=broad-exception-caught
            self._error = error
        # At the exit only daemons are left, which the interpreter stops where they are. An error
        # would be printed at the end of a program in which nothing is wrong.
        if not self._own.is_ending:
            self._tell()

    def cancel(self) -> None:
        """Cancel the work, and forget its result, in the loop's thread."""
        self._results.clear()
        if self._task is not None:
            self._task.cancel()

    def take_result(self) -> ResultT:
        """Return or raise what came of it; a lease is not kept here."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # the traceback refers to us
        return self._results.pop()


class Loop(asyncio.SelectorEventLoop):
    """
    An event loop with a thread of its own. Its new methods are for any thread, unless they say so.

    It knows its connections, as the client of NATS offers no way to its socket. That is needed to
    abort a connection to a server that reads nothing, and to close it in a forked child.
    """

    def __init__(self) -> None:
        """Start the thread."""
        super().__init__()
        self.process_id = os.getpid()
        self.is_ending = False
        # Only the loop's own thread changes these: queues, which the exit closes, and connections
        # that they share, by servers and credentials.
        self.queues: weakref.WeakSet[Any] = weakref.WeakSet()
        self.connections: dict[Any, Any] = {}
        self._noted_transports: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()
        self._started_tasks: set[asyncio.Task[Any]] = set()
        self.set_exception_handler(self._complain)
        # A daemon: a program that ends without closing its queues must not hang.
        self._own_thread = threading.Thread(target=self._run, name="persipubsub-nats", daemon=True)
        self._own_thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self)
        try:
            self.run_forever()
        finally:
            self.close()

    def _complain(self, _: object, context: dict[str, Any]) -> None:
        # Up to nats-py 2.14, a client whose server closed the connection leaves tasks.
        if "was destroyed" not in context["message"]:
            self.default_exception_handler(context)

    async def create_connection(self, *args: Any, **named: Any) -> Any:
        """Connect, and note the transport."""
        transport, protocol = await super().create_connection(*args, **named)
        self._noted_transports.add(transport)
        opened.get().append(transport)
        return transport, protocol

    def call(self, work: Work[ResultT]) -> ResultT:
        """Do work in the loop, and wait for it. Ctrl-C cancels it."""
        done = threading.Lock()
        done.acquire()  # pylint: disable=consider-using-with
        call = self._begin(work, done.release)
        try:
            done.acquire()  # pylint: disable=consider-using-with
        except BaseException:
            self.post(call.cancel)
            raise
        return call.take_result()

    async def wait(self, work: Work[ResultT], is_carried_out: bool) -> ResultT:
        """
        Do work in the loop, and wait for it in a task of any loop.

        Cancelling the task cancels the work, unless that is to be carried out anyway.
        ``asyncio.wrap_future`` was rejected: it logs an error if the task's loop was closed.
        """
        other = asyncio.get_running_loop()
        done = other.create_future()

        def finish() -> None:
            if not done.done():
                done.set_result(None)

        def tell() -> None:
            try:
                other.call_soon_threadsafe(finish)
            except RuntimeError:
                call.cancel()  # the task's loop was closed

        call = self._begin(work, tell)
        try:
            await done
        except BaseException:
            if not is_carried_out:
                self.post(call.cancel)
            raise
        return call.take_result()

    def _begin(self, work: Work[ResultT], tell: Callable[[], None]) -> "_Call[ResultT]":
        if self.is_ending:
            raise exiting()
        call = _Call(self, work, tell)
        self.call_soon_threadsafe(call.start)
        return call

    def post(self, function: Callable[[], object]) -> None:
        """Call a function in the loop's thread soon. Fit for finalizers: no lock, no error."""
        with contextlib.suppress(RuntimeError):  # the loop was closed at the exit
            self.call_soon_threadsafe(function)

    def start(self, coroutine: Coroutine[Any, Any, ResultT]) -> asyncio.Task[ResultT]:
        """Run a coroutine, and keep its task. Only for the loop's own thread."""
        task = self.create_task(coroutine)
        # The loop itself holds tasks only weakly.
        self._started_tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._started_tasks.discard(task)
        if not task.cancelled():
            task.exception()  # otherwise asyncio complains that nobody has looked at it

    def end(self) -> None:
        """Close what is open, end the thread, and wait for both, but not for long."""
        if self.process_id == os.getpid():
            self.is_ending = True
            self.post(lambda: self.start(self._close_all()))
            self._own_thread.join(timeout=2 * _EXIT_SECS)

    async def _close_all(self) -> None:
        # What is not given back in time is delivered to others after ack_wait.
        closing = asyncio.gather(*(one.aclose() for one in list(self.queues)),
                                 return_exceptions=True)
        await asyncio.wait((closing, ), timeout=_EXIT_SECS)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.stop()

    def close_sockets(self) -> None:
        """Close the parent's connections in a forked child, without a word to the servers."""
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for transport in list(self._noted_transports):
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
            atexit.register(_current.end)
        return _current


def _start_anew() -> None:
    global _lock, _current  # pylint: disable=global-statement
    _lock = threading.Lock()
    parent, _current = _current, None
    if parent is not None:
        _parents.append(parent)
        parent.close_sockets()


os.register_at_fork(after_in_child=_start_anew)
