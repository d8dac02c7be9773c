"""
Run one event loop in a thread, for all queues of this process that are streams.

nats-py is written for ``asyncio``. Threads, and tasks of other loops, submit a coroutine function
to this loop and wait for its result. A program with a hundred queues has one more thread, not a
hundred.

A forked child closes its copies of the parent's sockets at once, and starts a loop of its own at
its first call.
"""

import asyncio
import atexit
import contextlib
import contextvars
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias, TypeVar

from persipubsub.errors import ClosedError

ResultT = TypeVar("ResultT")
Work: TypeAlias = Callable[[], Coroutine[Any, Any, ResultT]]

#: How long the exit of the interpreter waits for the connections to be closed, in seconds.
_EXIT_SECS: Final = 2.0

#: Transports that a task and its children have opened.
opened: Final[contextvars.ContextVar[list[asyncio.BaseTransport]]] = contextvars.ContextVar(
    "opened", default=[])


class Loop(asyncio.SelectorEventLoop):
    """
    An event loop with a thread of its own. Any thread may call it, unless a method says otherwise.

    The loop keeps the transports, because nats-py does not show its socket. They are needed to
    abort the connection to a server that reads nothing, and to close the sockets in a forked child.
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
        tasks = self._submit(work, done.release)
        try:
            done.acquire()  # pylint: disable=consider-using-with
        except BaseException:
            self.post(lambda: tasks.pop().cancel())
            raise
        return tasks.pop().result()

    async def wait(self, work: Work[ResultT], is_carried_out: bool) -> ResultT:
        """
        Do work in the loop, and wait for it in a task of any loop.

        Cancelling the task cancels the work, unless that is to be carried out anyway.
        """
        other, done = asyncio.get_running_loop(), asyncio.Event()
        tasks = self._submit(work, lambda: other.call_soon_threadsafe(done.set))
        try:
            await done.wait()
        except BaseException:
            if not is_carried_out:
                self.post(lambda: tasks.pop().cancel())
            raise
        return tasks.pop().result()

    def _submit(self, work: Work[ResultT], tell: Callable[[],
                                                          object]) -> list[asyncio.Task[ResultT]]:
        """
        Begin work in the loop; the list gets its task, which is done when ``tell`` is called.

        The caller takes the task out. Otherwise the traceback of a cancelled call would keep a
        lease that came at the same moment, and its messages would not be given back.

        The futures of ``concurrent.futures`` were rejected: a call took 10 us longer, of 37.
        """
        if self.is_ending:
            raise exiting()
        tasks: list[asyncio.Task[ResultT]] = []

        def finish(_: object) -> None:
            # At the exit only daemon threads wait, which the interpreter stops where they are. An
            # error would be printed at the end of a program in which nothing is wrong.
            if not self.is_ending:
                with contextlib.suppress(RuntimeError):  # the loop that waits was closed
                    tell()

        def start() -> None:
            tasks.append(self.start(work()))
            tasks[0].add_done_callback(finish)

        self.call_soon_threadsafe(start)
        return tasks

    def post(self, function: Callable[[], object]) -> None:
        """Call a function in the loop's thread soon. Safe in finalizers: no lock, no error."""
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
        self.stop()

    def close_sockets(self) -> None:
        """Close the parent's sockets in a forked child; the parent's connections stay."""
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for transport in list(self._noted_transports):
            socket = transport.get_extra_info("socket")
            if socket is not None and socket.fileno() >= 0:
                os.dup2(nothing, socket.fileno(), inheritable=False)
        os.close(nothing)


def exiting() -> ClosedError:
    """Return the error of a call that comes while the interpreter exits."""
    return ClosedError("Expected a program that runs, but got: the interpreter is about to exit")


# Guards _current while it is set. A forked child gets a new one: another thread of the parent may
# hold the old one.
_lock = threading.Lock()
_current: Loop | None = None
# Never freed: a transport that is freed closes its descriptor, which may be reused by then.
_parents: list[Loop] = []


def current() -> Loop:
    """Return the loop of this process; start it if there is none."""
    global _current  # pylint: disable=global-statement
    with _lock:
        if _current is None:
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
