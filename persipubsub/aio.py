"""
Publish and receive in tasks of ``asyncio``, with the same queues and the same promises.

The two classes are used as :py:class:`persipubsub.publisher.Pub` and
:py:class:`persipubsub.subscriber.Sub`, and share the queues with them, in this process and others.
The loop never waits for the disk or for another process: what could block runs in a few threads of
the process. Waiting needs one thread for each queue, however many tasks wait.

Any number of tasks may use an object, as may several loops in several threads, and a forked child.
Any loop works whose ``call_soon_threadsafe`` does the same as in ``asyncio``.

Cancelling a task loses nothing, and leaves no message claimed. Messages are sent and received in
order. There is one exception: when a cancelled task gives a message back, other tasks may already
have later messages.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self, TypeAlias, TypeVar, cast, overload

import persipubsub.config
import persipubsub.engine
import persipubsub.errors
import persipubsub.face
import persipubsub.statistics
from persipubsub.face import BytesLike, ContentT, MessageId
from persipubsub.message import Message

__all__ = ["BatchReceipt", "Messages", "Pub", "Receipt", "Sub"]

ResultT = TypeVar("ResultT")

Take: TypeAlias = Callable[[], Awaitable[persipubsub.engine.Lease | None]]

#: Threads of the process for all queues: a write may wait for another process for long.
_THREADS: Final = 32

#: Messages that are put together at most, and bytes: other processes are to have their turn.
_MOST_MESSAGES: Final = 512
_MOST_BYTES: Final = 1 << 23

#: Messages or batches that one look takes at most, so that the first task does not wait for all.
_MOST_TAKEN: Final = 16

#: Time between two attempts of a task that waits for room, in seconds.
_ROOM_SECS: Final = 0.02

_executor: concurrent.futures.ThreadPoolExecutor | None = None


def _forget_executor() -> None:
    global _executor  # pylint: disable=global-statement
    _executor = None


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_forget_executor)


def _submit(call: Callable[[], ResultT]) -> "concurrent.futures.Future[ResultT]":
    """Have a call made in a thread; in this one if none can be started, so that nothing is lost."""
    global _executor  # pylint: disable=global-statement
    if _executor is None:
        _executor = concurrent.futures.ThreadPoolExecutor(_THREADS, "persipubsub")
    calls = [call]
    try:
        return _executor.submit(lambda: calls.pop()())  # pylint: disable=unnecessary-lambda
    except RuntimeError:  # no thread is left, or the interpreter is about to exit
        done: "concurrent.futures.Future[ResultT]" = concurrent.futures.Future()
        try:
            done.set_result(calls.pop()())
        except BaseException as error:  # pylint: disable=broad-exception-caught
            done.set_exception(error)
        return done


def _post(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *given: object) -> bool:
    """Have a function called in the thread of a loop; False if that was closed."""
    try:
        loop.call_soon_threadsafe(function, *given)
    except RuntimeError:
        return False
    return True


def _wake(woken: "asyncio.Future[None]") -> None:
    if not woken.done():
        woken.set_result(None)


async def _run(call: Callable[[], ResultT],
               undo: Callable[[ResultT], object] | None = None) -> ResultT:
    """
    Make a call in a thread. It is made to its end even if the task is cancelled; then it is undone.

    Not ``asyncio.wrap_future``: a task that is cancelled in the moment in which its future is done
    would forget a lease.
    """
    loop = asyncio.get_running_loop()
    woken: "asyncio.Future[None]" = loop.create_future()
    done = _submit(call)
    done.add_done_callback(lambda _: _post(loop, _wake, woken))
    try:
        await woken
    except BaseException:
        if undo is not None:
            done.add_done_callback(functools.partial(_undo, undo))
        raise
    return done.result()


def _undo(undo: Callable[[ResultT], object], done: "concurrent.futures.Future[ResultT]") -> None:
    if done.exception() is None:
        _submit(functools.partial(undo, done.result()))


# Sending

Sending: TypeAlias = tuple[Sequence[bytes], persipubsub.engine.Recipients,
                           persipubsub.engine.MessageIds]


class _Outbox:
    """
    What the tasks of one loop send to a queue. Used in the thread of the loop only.

    A thread puts what came in one round of the loop, then what came meanwhile: a thousand tasks
    share a commit, and what they send stays in order.
    """

    def __init__(self, queue: persipubsub.engine.TaskQueue,
                 loop: asyncio.AbstractEventLoop) -> None:
        self.queue = queue
        self._loop = loop
        self._waiting: list[tuple[Sending, "asyncio.Future[None]"]] = []
        self._is_busy = False

    async def put(self, sending: Sending) -> None:
        """Put messages, all of them or none, if there is room."""
        future: "asyncio.Future[None]" = self._loop.create_future()
        self._waiting.append((sending, future))
        if not self._is_busy:
            self._is_busy = True
            # When all tasks that can run now have run: otherwise the first one would go alone.
            self._loop.call_soon(self._start)
        await future

    def _start(self) -> None:
        group: list[tuple[Sending, "asyncio.Future[None]"]] = []
        count = size = 0
        for sending, future in self._waiting:
            count += len(sending[0])
            size += sum(map(len, sending[0]))
            if group and (count > _MOST_MESSAGES or size > _MOST_BYTES):
                break
            group.append((sending, future))
        del self._waiting[:len(group)]
        # A task that was cancelled before its turn sends nothing.
        group = [(sending, future) for sending, future in group if not future.done()]
        self._is_busy = bool(group or self._waiting)
        if self._is_busy:
            _submit(lambda: self.queue.put_each([sending for sending, _ in group])
                    ).add_done_callback(lambda done: _post(self._loop, self._end, group, done))

    def _end(self, group: "list[tuple[Sending, asyncio.Future[None]]]",
             done: "concurrent.futures.Future[list[BaseException | None]]") -> None:
        failed = done.exception()
        errors = done.result() if failed is None else [failed] * len(group)
        for (_, future), error in zip(group, errors):
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
        self._start()


class Pub(persipubsub.face.Handle[persipubsub.face.Target]):
    """
    Send messages to the queue of a publisher, as :py:class:`persipubsub.publisher.Pub` does.

    Tasks that send at the same moment share a commit.

    >>> import tempfile
    >>> import persipubsub.control
    >>> directory = tempfile.TemporaryDirectory()
    >>> config = {"pub": {"out_queue": "q"}, "sub": {"in_queue": "q"},
    ...           "queues": {"q": {"path": directory.name, "subscribers": ["sub"]}}}
    >>> persipubsub.control.initialize_all_dbs(config)
    >>> async def main():
    ...     async with Pub("pub", config) as pub, Sub("sub", config) as sub:
    ...         await asyncio.gather(*(pub.send(b"hello") for _ in range(100)))
    ...         async with sub.receive_many(1000, timeout=10) as msgs:
    ...             print(len(msgs))
    >>> asyncio.run(main())
    100
    >>> directory.cleanup()
    """

    def __init__(self,
                 pub_id: str | None = None,
                 config_pth: persipubsub.config.ConfigLike | None = None,
                 autosync: bool = False) -> None:
        """
        Initialize without a queue; ``async with`` opens it, or :py:meth:`init` does.

        :param pub_id: key of the publisher in the configuration
        :param config_pth: see :py:meth:`init`
        :param autosync: True to let ``send_many`` commit each message by itself
        :raise TypeError: if only one of id and configuration is given
        """
        super().__init__()
        self._given = persipubsub.face.arguments(pub_id, config_pth)
        self._name = "" if pub_id is None else f"{pub_id!r}, "
        self._autosync = autosync
        self._outboxes: dict[asyncio.AbstractEventLoop, _Outbox] = {}

    async def init(self,
                   pub_id: str,
                   config_pth: persipubsub.config.ConfigLike,
                   autosync: bool = False) -> None:
        """
        Open the queue of a publisher. A queue that was open before is closed.

        If the task is cancelled during the call, no queue is open.

        :param pub_id: key of the publisher in the configuration
        :param config_pth: path to the configuration file, a dictionary with its content, or a
            :py:class:`persipubsub.config.Config`
        :param autosync: True to let ``send_many`` commit each message by itself
        :raise PersipubsubError: as :py:meth:`persipubsub.publisher.Pub.init` does
        """
        await _run(
            lambda: self._open(pub_id, persipubsub.face.Target.open(pub_id, config_pth, autosync)),
            undo=lambda _: self._put(None))

    async def __aenter__(self) -> Self:
        """
        Open the queue that was given to the constructor.

        :return: itself
        """
        if self._given is not None:
            await self.init(*self._given, autosync=self._autosync)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the queue."""
        await self.close()

    async def close(self) -> None:
        """
        Close the queue; it may be closed twice. What was sent stays sent.

        Messages that other tasks are sending are sent, or these tasks get a ``ClosedError``.
        """
        await _run(lambda: self._put(None))

    async def send(self,
                   msg: BytesLike,
                   timeout: float | None = None,
                   msg_id: MessageId | None = None) -> None:
        """
        Send a message to all subscribers of the publisher.

        When the call returns, the message is as safe as the queue's ``durability`` says. Messages
        of one loop are sent in the order of the calls. If the task is cancelled during the call,
        the message is sent or not, as if a process died.

        :param msg: to be sent; may be empty
        :param timeout: how long to wait for room where the queue's strategy is ``block``, in
            seconds; 0: not at all; None: for ever
        :param msg_id: of the message; if the queue knows it, nothing is sent, and the stored
            message is safe when the call returns
        :raise TypeError: if the message is not bytes-like, or the id neither a string nor bytes
        :raise ValueError: if the id is not of 1 to 255 bytes, or the timeout is no number from 0 on
        :raise MessageTooLargeError: if the queue could never hold the message
        :raise QueueFullError: if there is no room, and the queue's strategy is ``reject``, or
            ``block`` and the time is over; nothing is sent
        :raise BusyTimeoutError: if another process is in the middle of a write for too long, at
            most about twice ``busy_timeout_secs``
        :raise DiskFullError: if the disk, or the store, has no room
        """
        target = self._get()
        message = persipubsub.face.encode(msg)
        await self._send(target, (message, ), persipubsub.face.encode_ids((msg_id, ), count=1),
                         persipubsub.face.seconds_of(timeout))

    async def send_many(self,
                        msgs: Sequence[BytesLike],
                        timeout: float | None = None,
                        msg_ids: Sequence[MessageId | None] | None = None) -> None:
        """
        Send messages in one commit: all of them or none, even if the task is cancelled.

        With ``autosync``, each message has a commit of its own, in order. After an error, or if
        the task is cancelled, earlier messages stay sent. The same holds for an error on servers
        (``nats://...``), which have no such commit.

        :param msgs: to be sent
        :param timeout: how long to wait for room, see :py:meth:`send`; with ``autosync`` for each
        :param msg_ids: of the messages; an id, or None, for each message
        :raise TypeError: if one of them is not bytes-like; nothing is sent
        :raise MessageTooLargeError: if the queue could never hold one of them, or all together
        :raise PersipubsubError: otherwise as :py:meth:`send` does
        """
        target = self._get()
        seconds = persipubsub.face.seconds_of(timeout)
        for messages, ids in target.batches(msgs, msg_ids):
            await self._send(target, messages, ids, seconds)

    async def _send(self, target: persipubsub.face.Target, messages: Sequence[bytes],
                    ids: persipubsub.engine.MessageIds, timeout: float | None) -> None:
        queue = target.queue
        if hasattr(queue, "aput"):
            await queue.aput(messages, target.recipients, timeout, ids)
            return
        loop = asyncio.get_running_loop()
        outbox = self._outboxes.get(loop)
        if outbox is None or outbox.queue is not queue:
            for other in [other for other in self._outboxes if other.is_closed()]:
                del self._outboxes[other]
            outbox = _Outbox(cast(persipubsub.engine.TaskQueue, queue), loop)
            self._outboxes[loop] = outbox
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            try:
                await outbox.put((messages, target.recipients, ids))
                return
            except persipubsub.errors.QueueFullError:
                left = _ROOM_SECS if deadline is None else deadline - loop.time()
                if not outbox.queue.waits_for_room or left <= 0:
                    raise
            # Not in a thread: each task that waits would need one.
            await asyncio.sleep(min(_ROOM_SECS, left))


# Receiving


class _Waiter:
    """One task that waits for messages."""

    __slots__ = ("future", "deadline", "poll_secs", "max_messages", "is_newest")

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float | None, poll_secs: float,
                 max_messages: int, is_newest: bool) -> None:
        self.future: "asyncio.Future[persipubsub.engine.Lease | None]" = loop.create_future()
        self.deadline = math.inf if timeout is None else loop.time() + timeout
        self.poll_secs = poll_secs
        self.max_messages = max_messages
        self.is_newest = is_newest


class _Look(NamedTuple):
    """What a look at the queue came to."""

    waiters: list[_Waiter]  #: for which it was looked
    taken: dict[_Waiter, persipubsub.engine.Lease]
    #: Seconds until the next look for the newest message (True), or the next one, if there is none.
    missed: dict[bool, float]
    error: BaseException | None


class _Line:
    """
    Tasks of one loop that wait for messages of a consumer, first come, first served.

    One thread looks for all of them, when the engine calls back; nothing else waits but the loop.
    A lock, held by the one task that looks, was rejected: each message took a thread of its own,
    and 16 tasks received half as much.
    """

    def __init__(self, consumer: persipubsub.engine.TaskConsumer,
                 loop: asyncio.AbstractEventLoop) -> None:
        self.consumer = consumer
        self.process_id = os.getpid()
        self._loop = loop
        self._waiters: list[_Waiter] = []
        self._is_looking = False
        self._is_due = False  # something came since the look began
        self._listener: persipubsub.engine.Listener | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def take(self, timeout: float | None, poll_secs: float, max_messages: int,
                   is_newest: bool) -> persipubsub.engine.Lease | None:
        """Wait for messages, and take them; None if none came in time."""
        if self._is_closed:
            raise _closed()
        waiter = _Waiter(self._loop, timeout, poll_secs, max_messages, is_newest)
        self._waiters.append(waiter)
        self._look()
        try:
            return await waiter.future
        except BaseException:
            future = waiter.future
            # Cancelled in the moment in which it got messages.
            if future.done() and not future.cancelled() and future.exception() is None:
                _give_back(future.result())
            raise

    def _look(self) -> None:
        """Look at the queue in a thread, now or after the look that is under way."""
        self._is_due = True
        if self._is_looking or not self._waiters:
            return
        self._is_looking, self._is_due = True, False
        if self._timer is not None:
            self._timer.cancel()
        _submit(functools.partial(self._take, list(self._waiters),
                                  self._loop.time())).add_done_callback(self._finish)

    def _take(self, waiters: list[_Waiter], now: float) -> _Look:
        look = _Look(waiters, {}, {}, None)
        try:
            if self._listener is not None:
                self._listener.arm()
            for waiter in waiters:
                if len(look.taken) == _MOST_TAKEN or len(look.missed) == 2:
                    break
                if waiter.is_newest not in look.missed:
                    lease, pause = self.consumer.try_take(waiter.max_messages, waiter.is_newest)
                    if lease is None:
                        look.missed[waiter.is_newest] = pause
                    else:
                        look.taken[waiter] = lease
            if look.missed and self._listener is None and any(waiter.deadline > now
                                                              for waiter in waiters):
                self._listener = self.consumer.listen(lambda: _post(self._loop, self._look))
                look.missed.update(dict.fromkeys(look.missed, 0.0))  # what came before it is armed
                if self._is_closed:
                    self._listener.close()
        except BaseException as error:  # pylint: disable=broad-exception-caught
            return look._replace(error=error)
        return look

    def _finish(self, done: "concurrent.futures.Future[_Look]") -> None:
        look = done.result()
        if not _post(self._loop, self._hand_out, look):
            for lease in look.taken.values():
                _give_back(lease)

    def _hand_out(self, look: _Look) -> None:
        self._is_looking = False
        for waiter, lease in look.taken.items():
            if waiter.future.done():
                _give_back(lease)
                self._is_due = True
            else:
                waiter.future.set_result(lease)
        now = self._loop.time()
        error = look.error
        for waiter in look.waiters:
            if waiter.future.done():
                continue
            if waiter.is_newest not in look.missed and error is not None:
                waiter.future.set_exception(error)
                if isinstance(error, persipubsub.errors.CorruptMessageError):
                    error = None  # it was set aside, and concerns nobody else
            elif waiter.is_newest in look.missed and waiter.deadline <= now:
                waiter.future.set_result(None)
        self._waiters = [waiter for waiter in self._waiters if not waiter.future.done()]
        if self._is_due or any(waiter.is_newest not in look.missed for waiter in self._waiters):
            self._look()
        elif self._waiters:
            pause = min(min(waiter.poll_secs, waiter.deadline - now) for waiter in self._waiters)
            self._timer = self._loop.call_later(min(pause, *look.missed.values()), self._look)

    def close(self) -> None:
        """Let all tasks fail. Any thread may call it."""
        self._is_closed = True
        if self.process_id == os.getpid():
            if self._listener is not None:
                self._listener.close()
            _post(self._loop, self._fail)

    def _fail(self) -> None:
        for waiter in self._waiters:
            if not waiter.future.done():
                waiter.future.set_exception(_closed())
        self._waiters.clear()


def _closed() -> persipubsub.errors.ClosedError:
    return persipubsub.errors.ClosedError(
        "Expected an open subscriber to receive from, but got: close() was called")


def _give_back(lease: persipubsub.engine.Lease | None) -> None:
    """Have messages given back that nobody waits for."""
    if lease is not None:
        _submit(lease.nack)  # which fails if the queue was closed: that gave them back


async def _end(endings: Sequence[persipubsub.face.Ending]) -> None:
    """End all leases, even if one can not be."""
    if not hasattr(endings[0].lease, "aack"):
        await _run(functools.partial(persipubsub.face.end, endings))
        return
    async with contextlib.AsyncExitStack() as stack:
        for ending in reversed(endings):
            lease = cast(persipubsub.engine.LoopLease, ending.lease)
            if ending.is_ack:
                stack.push_async_callback(lease.aack)
            else:
                stack.push_async_callback(lease.anack, ending.error)


class _Ends:
    """Ends leases, to the end even if the task is cancelled; waited for before closing."""

    def __init__(self) -> None:
        self._tasks: set["asyncio.Future[None]"] = set()

    async def __call__(self, endings: Sequence[persipubsub.face.Ending]) -> None:
        if endings:
            task = asyncio.ensure_future(_end(endings))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.shield(task)

    async def wait(self) -> None:
        """Wait for what tasks of this loop began that were cancelled."""
        loop = asyncio.get_running_loop()
        tasks = [task for task in self._tasks if task.get_loop() is loop]
        if tasks:
            await asyncio.wait(tasks)


class _Receipt(persipubsub.face.Block[Take, ContentT]):
    """Acknowledge on a clean exit what was taken on entry; give it back on an exception."""

    __slots__ = ("_end", )

    def __init__(self, take: Take, contents: persipubsub.face.Contents[ContentT],
                 end: "_Ends") -> None:
        super().__init__(take, contents)
        self._end = end

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        """Acknowledge the messages, or give them back if the block was left by an exception."""
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._end([persipubsub.face.Ending(lease, error is None, error)])


class Receipt(_Receipt[ContentT]):
    """
    One message in an ``async with`` block.

    Returned by :py:meth:`persipubsub.aio.Sub.receive`. Enter it once.
    """

    __slots__ = ()
    _form = "async with sub.receive() as msg: ..."

    async def __aenter__(self) -> ContentT | None:
        """
        Wait for a message.

        :return: message; None if none came in time
        """
        lease = self._lease = await self._enter()()
        return None if lease is None else self._contents(lease)[0]


class BatchReceipt(_Receipt[ContentT]):
    """
    Several messages in an ``async with`` block.

    Returned by :py:meth:`persipubsub.aio.Sub.receive_many`. Enter it once.
    """

    __slots__ = ()
    _form = "async with sub.receive_many(100) as msgs: ..."

    async def __aenter__(self) -> list[ContentT]:
        """
        Wait for messages.

        :return: messages; empty if none came in time
        """
        lease = self._lease = await self._enter()()
        return [] if lease is None else self._contents(lease)


class Messages(persipubsub.face.Batch[Take, ContentT]):
    """
    Iterate over messages, and acknowledge them when the next one is asked for.

    Returned by :py:meth:`persipubsub.aio.Sub.messages`, for one task. Nothing happens before the
    first message is asked for.

    An ``async for`` loop does not tell the iterator whether it was left by ``break`` or by an
    exception. The message at which it was left stays, and is delivered again: soon, if nothing else
    refers to the iterator. Messages before it are acknowledged. If you use ``break``, or want
    errors to be counted and kept, tell the iterator in one of two ways:

    - Put ``async with sub.messages() as msgs:`` around the loop. Leaving the block acknowledges the
      message at hand. An exception gives the message back, and is recorded.
    - Call :py:meth:`acknowledge` before the ``break``.
    """

    __slots__ = ("_end", )

    def __init__(self, take: Take, contents: persipubsub.face.Contents[ContentT],
                 end: "_Ends") -> None:
        """
        Initialize without taking anything.

        :param take: waits for messages and takes them
        :param contents: turns them into what the loop gets
        :param end: acknowledges and gives back
        """
        super().__init__(take, contents)
        self._end = end

    async def __aenter__(self) -> Self:
        """
        Let the end of the block decide about the last message.

        :return: itself
        """
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        """Acknowledge the message at hand, or give it back on an exception; the iterator ends."""
        self._is_done = True
        if error is None:
            await self._end(self._finish(self._given))
        else:
            # What the block raised matters more.
            with contextlib.suppress(persipubsub.errors.PersipubsubError):
                await self._end(self._finish(self._given - 1, error))

    def __aiter__(self) -> Self:
        """
        Iterate.

        :return: itself
        """
        return self

    async def __anext__(self) -> ContentT:
        """
        Return the next message; if none is left, acknowledge what was handled, and wait.

        :return: message
        :raise StopAsyncIteration: if none came in time
        """
        if self._given < len(self._items):
            item = self._items[self._given]
            self._given += 1
            return item
        await self._end(self._finish(self._given))
        lease = None if self._is_done else await self._take()
        if lease is None:
            self._is_done = True
            raise StopAsyncIteration
        return self._begin(lease)

    async def acknowledge(self) -> None:
        """Acknowledge now what was handled, and the message at hand; it may be repeated."""
        await self._end(self._acknowledged())

    async def aclose(self) -> None:
        """Give the message at hand back as if it had not been delivered, and end."""
        self._is_done = True
        await self._end(self._finish(self._given - 1))

    def __del__(self) -> None:
        """Do not keep messages from others that a loop left behind."""
        if getattr(self, "_lease", None) is not None:
            _submit(functools.partial(persipubsub.face.end, self._finish(self._given - 1)))


class Sub(persipubsub.face.Handle[persipubsub.face.Source]):
    """
    Receive the messages of a subscriber, as :py:class:`persipubsub.subscriber.Sub` does.

    Its tasks share the messages with each other, and with other objects and processes of the same
    subscriber id. A task that waits, or that has a message, needs no thread.

    >>> import tempfile
    >>> import persipubsub.control
    >>> directory = tempfile.TemporaryDirectory()
    >>> config = {"pub": {"out_queue": "q"}, "sub": {"in_queue": "q"},
    ...           "queues": {"q": {"path": directory.name, "subscribers": ["sub"]}}}
    >>> persipubsub.control.initialize_all_dbs(config)
    >>> async def main():
    ...     async with Pub("pub", config) as pub, Sub("sub", config) as sub:
    ...         await pub.send_many([b"one", b"two", b"three"])
    ...         async with sub.receive(timeout=10) as msg:
    ...             print(msg)
    ...         async for msg in sub.messages(timeout=0):
    ...             print(msg)
    >>> asyncio.run(main())
    b'one'
    b'two'
    b'three'
    >>> directory.cleanup()
    """

    def __init__(self,
                 sub_id: str | None = None,
                 config_pth: persipubsub.config.ConfigLike | None = None) -> None:
        """
        Initialize without a queue; ``async with`` opens it, or :py:meth:`init` does.

        :param sub_id: key of the subscriber in the configuration
        :param config_pth: see :py:meth:`init`
        :raise TypeError: if only one of id and configuration is given
        """
        super().__init__()
        self._given = persipubsub.face.arguments(sub_id, config_pth)
        self._name = "" if sub_id is None else f"{sub_id!r}, "
        self._lines: dict[asyncio.AbstractEventLoop, _Line] = {}
        self._ends = _Ends()

    async def init(self, sub_id: str, config_pth: persipubsub.config.ConfigLike) -> None:
        """
        Open the queue of a subscriber. A queue that was open before is closed.

        If the task is cancelled during the call, no queue is open.

        :param sub_id: key of the subscriber in the configuration
        :param config_pth: path to the configuration file, a dictionary with its content, or a
            :py:class:`persipubsub.config.Config`
        :raise PersipubsubError: as :py:meth:`persipubsub.subscriber.Sub.init` does
        """
        await _run(lambda: self._open(sub_id, persipubsub.face.Source.open(sub_id, config_pth)),
                   undo=lambda _: self._put(None))
        self._leave(self._get().consumer)

    async def __aenter__(self) -> Self:
        """
        Open the queue that was given to the constructor.

        :return: itself
        """
        if self._given is not None:
            await self.init(*self._given)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the queue."""
        await self.close()

    async def close(self) -> None:
        """
        Close the queue; it may be closed twice.

        Tasks that wait for a message get a ``ClosedError``. A message that is being received is
        given back.
        """
        self._leave(None)
        try:
            await self._ends.wait()
        finally:
            await _run(lambda: self._put(None))

    def _leave(self, consumer: persipubsub.engine.Consumer | None) -> None:
        """Let those fail who wait for messages of another consumer, or in a closed loop."""
        for loop, line in list(self._lines.items()):
            if line.consumer is not consumer or loop.is_closed():
                self._lines.pop(loop, None)
                line.close()

    # yapf: disable
    @overload
    def receive(self, timeout: float | None = 60, retries: int = 10,
                details: Literal[False] = False) -> Receipt[bytes]:        ...
    @overload
    def receive(self, timeout: float | None = 60, retries: int = 10, *,
                details: Literal[True]) -> Receipt[Message]:        ...
    # yapf: enable
    def receive(self,
                timeout: float | None = 60,
                retries: int = 10,
                details: bool = False) -> Receipt[Any]:
        """
        Receive the next message in an ``async with`` block.

        The block gets the bytes that were sent, or None if no message came in time. If the block is
        left without an exception, the message is acknowledged. If it is left by an exception, or
        because the task was cancelled, the message stays where it was and is delivered again,
        perhaps to another process of the same subscriber. A task that is cancelled while it waits
        leaves no message claimed.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` without a wake-up; there
            is a look once a second in any case
        :param details: True to get a :py:class:`persipubsub.message.Message` instead of bytes
        :return: context manager of the message
        :raise CorruptMessageError: from the ``async with`` statement if the next message is
            damaged; it is set aside, and the next call gives the one after it
        """
        return Receipt(self._taker(timeout, retries), persipubsub.face.contents_of(details),
                       self._ends)

    # yapf: disable
    @overload
    def receive_to_top(self, timeout: float | None = 60, retries: int = 10,
                       details: Literal[False] = False) -> Receipt[bytes]:        ...
    @overload
    def receive_to_top(self, timeout: float | None = 60, retries: int = 10, *,
                       details: Literal[True]) -> Receipt[Message]:        ...
    # yapf: enable
    def receive_to_top(self,
                       timeout: float | None = 60,
                       retries: int = 10,
                       details: bool = False) -> Receipt[Any]:
        """
        Receive the newest message in an ``async with`` block, and skip all older ones.

        See :py:meth:`persipubsub.subscriber.Sub.receive_to_top`.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` without a wake-up
        :param details: True to get a :py:class:`persipubsub.message.Message` instead of bytes
        :return: context manager of the message, see :py:meth:`receive`
        :raise CorruptMessageError: as :py:meth:`receive` does
        """
        return Receipt(self._taker(timeout, retries, is_newest=True),
                       persipubsub.face.contents_of(details), self._ends)

    # yapf: disable
    @overload
    def receive_many(self, max_msgs: int, timeout: float | None = 60, retries: int = 10,
                     details: Literal[False] = False) -> BatchReceipt[bytes]:        ...
    @overload
    def receive_many(self, max_msgs: int, timeout: float | None = 60, retries: int = 10, *,
                     details: Literal[True]) -> BatchReceipt[Message]:        ...
    # yapf: enable
    def receive_many(self,
                     max_msgs: int,
                     timeout: float | None = 60,
                     retries: int = 10,
                     details: bool = False) -> BatchReceipt[Any]:
        """
        Receive several messages in an ``async with`` block.

        The block gets a list of the messages that are there, at least one and at most ``max_msgs``,
        or an empty list if none came in time. All of them are acknowledged together, in one
        transaction, or all of them stay; see :py:meth:`receive`.

        :param max_msgs: how many messages at most
        :param timeout: how long to wait for the first one, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` without a wake-up
        :param details: True to get :py:class:`persipubsub.message.Message` objects instead of bytes
        :return: context manager of the messages
        :raise CorruptMessageError: as :py:meth:`receive` does
        """
        persipubsub.face.check_count("max_msgs", max_msgs)
        return BatchReceipt(self._taker(timeout, retries, max_msgs),
                            persipubsub.face.contents_of(details), self._ends)

    # yapf: disable
    @overload
    def messages(self, timeout: float | None = None, details: Literal[False] = False,
                 prefetch: int = 1) -> Messages[bytes]:        ...
    @overload
    def messages(self, timeout: float | None = None, *, details: Literal[True],
                 prefetch: int = 1) -> Messages[Message]:        ...
    # yapf: enable
    def messages(self,
                 timeout: float | None = None,
                 details: bool = False,
                 prefetch: int = 1) -> Messages[Any]:
        """
        Receive one message after the other, for an ``async for`` statement.

        A message is acknowledged when the next one is asked for. If the loop is left before that,
        by an exception, by ``break``, or because the task is cancelled, the message stays, and is
        delivered again. For ``break``, an ``async with`` statement changes that: see
        :py:class:`Messages`.

        :param timeout: how long to wait for each message, in seconds; None: for ever
        :param details: True to get :py:class:`persipubsub.message.Message` objects instead of bytes
        :param prefetch: how many messages to take at once at most, see
            :py:meth:`persipubsub.subscriber.Sub.messages`
        :return: iterator that ends when no message comes in time
        """
        persipubsub.face.check_count("prefetch", prefetch)
        return Messages(self._taker(timeout, 1, prefetch), persipubsub.face.contents_of(details),
                        self._ends)

    def __aiter__(self) -> Messages[bytes]:
        """
        Receive one message after the other, for ever; see :py:meth:`messages`.

        :return: iterator
        """
        return self.messages()

    async def front(self) -> bytes | None:
        """
        Look at the next message without taking it.

        :return: message that is neither acknowledged nor being received; None if there is none
        """
        return await _run(self._get().consumer.front)

    async def pop_to_top(self) -> None:
        """
        Acknowledge all messages of the subscriber but the newest one, in one transaction.

        It is done even if the task is cancelled.
        """
        source = self._get()
        await _run(lambda: source.queue.skip_to_newest(source.subscriber))

    async def statistics(self) -> persipubsub.statistics.SubscriberStatistics:
        """
        Count what waits for the subscriber, and what was dropped before it was read.

        :return: figures
        """
        return await _run(self._get().statistics)

    def _taker(self,
               timeout: float | None,
               retries: int,
               max_messages: int = 1,
               is_newest: bool = False) -> Take:
        """Check how long to wait; return what waits and takes."""
        seconds, poll_secs = persipubsub.face.waiting(timeout, retries)
        consumer = self._get().consumer
        if hasattr(consumer, "atake"):
            return functools.partial(consumer.atake, seconds, max_messages, is_newest)
        loop = asyncio.get_running_loop()
        line = self._lines.get(loop)
        if line is None or line.consumer is not consumer or line.process_id != os.getpid():
            self._leave(consumer)
            line = _Line(cast(persipubsub.engine.TaskConsumer, consumer), loop)
            self._lines[loop] = line
        return functools.partial(line.take, seconds, poll_secs, max_messages, is_newest)
