"""
Publish and receive in tasks of ``asyncio``, with the same queues and the same promises.

The two classes are used as :py:class:`persipubsub.publisher.Pub` and
:py:class:`persipubsub.subscriber.Sub`, and share the queues with them, in this process and others.
The loop never waits for the disk or for another process: what could block runs in a few threads of
the process. Waiting needs one thread for each queue, however many tasks wait.

Any number of tasks may use an object, as may several loops in several threads, and a forked child.
Any loop works whose ``call_soon_threadsafe`` does the same as in ``asyncio``.

Cancelling a task loses nothing, and leaves no message claimed. Messages are sent and received in
order, with one exception: when a cancelled task gives a message back, other tasks may already have
later ones.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar, cast

from persipubsub import face
from persipubsub.config import ConfigLike
from persipubsub.engine import Consumer, Lease, Queue, Sending, TaskConsumer, TaskQueue
from persipubsub.errors import CorruptMessageError, PersipubsubError, QueueFullError
from persipubsub.face import BytesLike, ContentT, MessageId, Parts
from persipubsub.message import Message
from persipubsub.statistics import SubscriberStatistics

__all__ = ["Messages", "Pub", "Receipt", "Sub"]

ResultT = TypeVar("ResultT")

#: Threads of the process, for all queues. Many, as a write may wait long for another process.
_THREADS: Final = 32

#: Most messages and bytes of one commit, so that other processes get their turn.
_MOST_MESSAGES: Final = 512
_MOST_BYTES: Final = 1 << 23

#: Most waiting tasks that one look serves; all of them get their messages when it ends.
_MOST_TAKEN: Final = 16

#: Time between two attempts of a task that waits for room, in seconds.
_ROOM_SECS: Final = 0.02


@functools.cache
def _executor() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(_THREADS, "persipubsub")


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_executor.cache_clear)


def _submit(call: Callable[[], ResultT]) -> "concurrent.futures.Future[ResultT]":
    """Make a call in a thread. If no thread can be started, the future fails."""
    try:
        return _executor().submit(call)
    except RuntimeError as error:
        failed: "concurrent.futures.Future[ResultT]" = concurrent.futures.Future()
        failed.set_exception(error)
        return failed


def _post(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *given: object) -> None:
    """Call a function in the thread of a loop; do nothing if the loop was closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *given)


def _settle(future: "asyncio.Future[Any]", result: object = None,
            error: BaseException | None = None) -> None:
    """Wake the task that waits for a future, unless it was cancelled."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


async def _run(call: Callable[[], ResultT], undo: Callable[[], object] | None = None) -> ResultT:
    """
    Make a call in a thread, and wait for it.

    If the task is cancelled, the call still runs to its end; then ``undo`` is called.

    Not ``asyncio.shield`` around ``asyncio.wrap_future``, which takes up to twice as long.
    """
    loop = asyncio.get_running_loop()
    woken: "asyncio.Future[None]" = loop.create_future()
    done = _submit(call)
    done.add_done_callback(lambda _: _post(loop, _settle, woken))
    try:
        await woken
    except BaseException:
        if undo is not None:
            done.add_done_callback(lambda _: _submit(undo))
        raise
    return done.result()


class _Handle(face.Handle[face.OpenT]):
    """Publisher or subscriber for tasks."""

    async def _open(self, *given: Any) -> None:
        await _run(lambda: self._replace(self._kind.open(*given)), undo=lambda: self._replace(None))

    async def __aenter__(self) -> Self:
        """
        Open the queue that was given to the constructor.

        :return: itself
        """
        if self._given is not None:
            await self._open(*self._given)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the queue."""
        await self.close()

    async def close(self) -> None:
        """
        Close the queue; it may be closed twice. What was sent stays sent.

        Tasks that wait for a message get a ``ClosedError``. A message that is being received is
        given back. Messages that tasks are sending are sent, or these tasks get a ``ClosedError``.
        """
        await _run(lambda: self._replace(None))


# Sending


class _Outbox:
    """
    Messages that the tasks of one loop send to a queue. Used in the thread of the loop only.

    One thread at a time puts all that the tasks sent meanwhile. So a thousand tasks share a commit,
    and their messages stay in order.
    """

    def __init__(self, queue: TaskQueue, loop: asyncio.AbstractEventLoop) -> None:
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
            # Start after the tasks that can run now: so they share the commit.
            self._loop.call_soon(self._start)
        await future

    def _start(self) -> None:
        sendings: list[Sending] = []
        futures: list["asyncio.Future[None]"] = []
        count = size = 0
        while self._waiting:
            sending, future = self._waiting[0]
            count += len(sending[0])
            size += sum(map(len, sending[0]))
            if sendings and (count > _MOST_MESSAGES or size > _MOST_BYTES):
                break
            del self._waiting[0]
            # A task that was cancelled before its turn sends nothing.
            if not future.done():
                sendings.append(sending)
                futures.append(future)
        self._is_busy = bool(sendings)
        if sendings:
            _submit(lambda: self.queue.put_each(sendings)).add_done_callback(
                lambda done: _post(self._loop, self._end, futures, done))

    def _end(self, futures: "list[asyncio.Future[None]]",
             done: "concurrent.futures.Future[list[BaseException | None]]") -> None:
        failure = done.exception()
        errors = done.result() if failure is None else [failure] * len(futures)
        for future, error in zip(futures, errors):
            _settle(future, None, error)
        self._start()


class Pub(_Handle[face.Target]):
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

    _kind = face.Target

    def __init__(self, pub_id: str | None = None, config_pth: ConfigLike | None = None,
                 autosync: bool = False) -> None:
        """
        Initialize without a queue; ``async with`` opens it, or :py:meth:`init` does.

        :param pub_id: key of the publisher in the configuration
        :param config_pth: see :py:meth:`init`
        :param autosync: True to let ``send_many`` commit each message by itself
        :raise TypeError: if only one of id and configuration is given
        """
        super().__init__(pub_id, config_pth, autosync)
        self._outboxes: dict[asyncio.AbstractEventLoop, _Outbox] = {}

    async def init(self, pub_id: str, config_pth: ConfigLike, autosync: bool = False) -> None:
        """
        Open the queue of a publisher. A queue that was open before is closed.

        If the task is cancelled during the call, no queue is open.

        :param pub_id: key of the publisher in the configuration
        :param config_pth: path to the configuration file, a dictionary with its content, or a
            :py:class:`persipubsub.config.Config`
        :param autosync: True to let ``send_many`` commit each message by itself
        :raise PersipubsubError: as :py:meth:`persipubsub.publisher.Pub.init` does
        """
        await self._open(pub_id, config_pth, autosync)

    async def send(self, msg: BytesLike, timeout: float | None = None,
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
        await self.send_many([msg], timeout, None if msg_id is None else [msg_id])

    async def send_many(self, msgs: Sequence[BytesLike], timeout: float | None = None,
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
        target = self._require()
        seconds = face.seconds_of(timeout)
        for messages, ids in target.batches(msgs, msg_ids):
            if hasattr(target.queue, "aput"):
                await target.queue.aput(messages, target.recipients, seconds, ids)
            else:
                await self._put(target.queue, (messages, target.recipients, ids), seconds)

    async def _put(self, queue: Queue, sending: Sending, timeout: float | None) -> None:
        loop = asyncio.get_running_loop()
        outbox = self._outboxes.get(loop)
        if outbox is None or outbox.queue is not queue:
            for other in [other for other in self._outboxes if other.is_closed()]:
                del self._outboxes[other]
            outbox = _Outbox(cast(TaskQueue, queue), loop)
            self._outboxes[loop] = outbox
        deadline = math.inf if timeout is None else loop.time() + timeout
        while True:
            try:
                return await outbox.put(sending)
            except QueueFullError:
                pause = min(_ROOM_SECS, deadline - loop.time())
                if pause <= 0 or not outbox.queue.waits_for_room:
                    raise
            # Not in a thread: each task that waits would need one.
            await asyncio.sleep(pause)


# Receiving


class _Waiter(NamedTuple):
    """One task that waits for messages."""

    future: "asyncio.Future[Lease | None]"
    deadline: float  #: on the clock of the loop
    poll_secs: float
    max_messages: int


class _Line:
    """
    Tasks of one loop that wait for messages of a consumer, first come, first served.

    When the engine calls back, one thread looks at the queue for all of them. No thread waits.
    Rejected: a lock that is held by the one task that looks. Each message then needs a call in a
    thread, and 16 tasks received half as much.
    """

    def __init__(self, consumer: TaskConsumer, is_newest: bool,
                 loop: asyncio.AbstractEventLoop) -> None:
        self.consumer = consumer
        self._is_newest = is_newest
        self._loop = loop
        self._waiters: list[_Waiter] = []
        self._is_looking = False
        self._is_due = False  # there is a reason for another look since the last one began
        self._timer: asyncio.TimerHandle | None = None

    async def take(self, timeout: float | None, poll_secs: float,
                   max_messages: int) -> Lease | None:
        """Wait for messages, and take them; None if none came in time."""
        future: "asyncio.Future[Lease | None]" = self._loop.create_future()
        deadline = math.inf if timeout is None else self._loop.time() + timeout
        self._waiters.append(_Waiter(future, deadline, poll_secs, max_messages))
        self._look()
        try:
            return await future
        except BaseException:
            # The task was cancelled after it was given messages.
            if future.done() and not future.cancelled() and future.exception() is None:
                _give_back(future.result())
            raise

    def _look(self) -> None:
        """Look at the queue in a thread, now or when the present look has ended."""
        self._is_due = True
        if self._is_looking or not self._waiters:
            return
        self._is_looking, self._is_due = True, False
        if self._timer is not None:
            self._timer.cancel()
        waiters = list(self._waiters)
        leases: list[Lease] = []
        # If the loop is closed meanwhile, the leases are dropped, which gives the messages back.
        _submit(functools.partial(self._take, waiters[:_MOST_TAKEN], leases)).add_done_callback(
            lambda done: _post(self._loop, self._hand_out, waiters, leases, done))

    def _take(self, waiters: list[_Waiter], leases: list[Lease]) -> float | None:
        """
        Take for each waiter.

        :return: None if all waiters got messages; otherwise the seconds until the next look
        """
        for waiter in waiters:
            lease, pause = self.consumer.try_take(waiter.max_messages, self._is_newest)
            if lease is None:
                self.consumer.call_once(self.wake)
                # A message may have come before.
                lease, pause = self.consumer.try_take(waiter.max_messages, self._is_newest)
            if lease is None:
                return pause
            leases.append(lease)
        return None

    def _hand_out(self, waiters: list[_Waiter], leases: list[Lease],
                  done: "concurrent.futures.Future[float | None]") -> None:
        self._is_looking = False
        error = done.exception()
        pause = done.result() if error is None else None
        for waiter, lease in zip(waiters, leases):
            if waiter.future.done():
                _give_back(lease)
                self._is_due = True
            else:
                waiter.future.set_result(lease)
        rest = [waiter for waiter in waiters[len(leases):] if not waiter.future.done()]
        if isinstance(error, CorruptMessageError):
            del rest[1:]  # the message was set aside: the next waiter gets the one after it
        now = self._loop.time()
        for waiter in rest:
            if error is not None or (pause is not None and waiter.deadline <= now):
                _settle(waiter.future, None, error)
        self._waiters = [waiter for waiter in self._waiters if not waiter.future.done()]
        if pause is None or self._is_due:
            self._look()
        elif self._waiters:
            pause = min(pause,
                        *(min(waiter.poll_secs, waiter.deadline - now) for waiter in self._waiters))
            self._timer = self._loop.call_later(pause, self._look)

    def wake(self) -> None:
        """Look at the queue; after a close, all waiting tasks fail. Any thread may call it."""
        _post(self._loop, self._look)


def _give_back(lease: Lease | None) -> None:
    """Give back messages for which no task waits any more."""
    if lease is not None:
        _submit(lease.nack)  # it fails if the queue was closed, which gave them back


async def _end(lease: Lease | None, parts: Parts) -> None:
    if not hasattr(lease, "aack"):
        await _run(functools.partial(face.end, lease, parts))
        return
    async with contextlib.AsyncExitStack() as stack:
        for method, given in reversed(parts):
            stack.push_async_callback(getattr(lease, f"a{method}"), *given)


class Receipt(face.Block[ContentT]):
    """
    One message, or a list of several, in an ``async with`` block.

    Returned by :py:meth:`persipubsub.aio.Sub.receive` and
    :py:meth:`persipubsub.aio.Sub.receive_many`; to be entered once.
    """

    __slots__ = ()

    _expected = "Expected a receipt in a block (async with sub.receive() as msg: ...)"

    async def __aenter__(self) -> ContentT:
        """
        Wait for messages.

        :return: message, None if none came in time; or a list, empty if none came in time
        """
        take, self._take = self._take, face.refuse
        return self._hold(await take())

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        """Acknowledge the messages, or give them back if the block was left by an exception."""
        if self._lease is not None:
            await self._end(self._lease, [("ack", []) if error is None else ("nack", [error])])


class Messages(face.Batch[ContentT]):
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

    __slots__ = ()

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
            await self._end(*self._finish(self._given))
        else:
            # The exception of the block matters more.
            with contextlib.suppress(PersipubsubError):
                await self._end(*self._finish(self._given - 1, error))

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
        await self._end(*self._finish(self._given))
        lease = None if self._is_done else await self._take()
        if lease is None:
            self._is_done = True
            raise StopAsyncIteration
        return self._begin(lease)

    async def acknowledge(self) -> None:
        """Acknowledge now what was handled, and the message at hand; it may be repeated."""
        await self._end(*self._acknowledged())

    async def aclose(self) -> None:
        """Give the message at hand back as if it had not been delivered, and end."""
        self._is_done = True
        await self._end(*self._finish(self._given - 1))

    def __del__(self) -> None:
        """Give back the messages of a loop that was left."""
        if getattr(self, "_lease", None) is not None:
            _submit(functools.partial(face.end, *self._finish(self._given - 1)))


class Sub(face.Receiver[Receipt[bytes | None], Receipt[Message | None], Receipt[list[bytes]],
                        Receipt[list[Message]], Messages[bytes], Messages[Message]],
          _Handle[face.Source]):
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

    _receipt = Receipt
    _messages = Messages

    def __init__(self, sub_id: str | None = None, config_pth: ConfigLike | None = None) -> None:
        """
        Initialize without a queue; ``async with`` opens it, or :py:meth:`init` does.

        :param sub_id: key of the subscriber in the configuration
        :param config_pth: see :py:meth:`init`
        :raise TypeError: if only one of id and configuration is given
        """
        super().__init__(sub_id, config_pth)
        #: By loop, and whether its tasks wait for the newest message.
        self._lines: dict[tuple[asyncio.AbstractEventLoop, bool], _Line] = {}
        self._endings: set["asyncio.Future[None]"] = set()

    async def init(self, sub_id: str, config_pth: ConfigLike) -> None:
        """
        Open the queue of a subscriber. A queue that was open before is closed.

        If the task is cancelled during the call, no queue is open.

        :param sub_id: key of the subscriber in the configuration
        :param config_pth: path to the configuration file, a dictionary with its content, or a
            :py:class:`persipubsub.config.Config`
        :raise PersipubsubError: as :py:meth:`persipubsub.subscriber.Sub.init` does
        """
        await self._open(sub_id, config_pth)

    async def close(self) -> None:
        """
        Close the queue; it may be closed twice.

        Tasks that wait for a message get a ``ClosedError``. A message that is being received is
        given back.
        """
        loop = asyncio.get_running_loop()
        try:
            # Acknowledgements of tasks that were cancelled.
            if endings := [ending for ending in self._endings if ending.get_loop() is loop]:
                await asyncio.wait(endings)
        finally:
            await super().close()

    def _replace(self, opened: face.Source | None) -> None:
        super()._replace(opened)
        self._leave(None if opened is None else opened.consumer)

    def _leave(self, consumer: Consumer | None) -> None:
        """Let tasks fail that wait for messages of another consumer, or in a closed loop."""
        for key, line in list(self._lines.items()):
            if line.consumer is not consumer or key[0].is_closed():
                self._lines.pop(key, None)
                line.wake()

    async def _end(self, lease: Lease | None, parts: Parts) -> None:
        """End messages; the task may be cancelled, all of them are ended nevertheless."""
        if parts:
            task = asyncio.ensure_future(_end(lease, parts))
            self._endings.add(task)
            task.add_done_callback(self._endings.discard)
            await asyncio.shield(task)

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
        return await _run(self._require().consumer.front)

    async def pop_to_top(self) -> None:
        """
        Acknowledge all messages of the subscriber but the newest one, in one transaction.

        It is done even if the task is cancelled.
        """
        source = self._require()
        await _run(lambda: source.queue.skip_to_newest(source.subscriber))

    async def statistics(self) -> SubscriberStatistics:
        """
        Count what waits for the subscriber, and what was dropped before it was read.

        :return: figures
        """
        return await _run(self._require().statistics)

    def _taker(self, timeout: float | None, poll_secs: float, max_messages: int,
               is_newest: bool) -> face.Take:
        consumer = self._require().consumer
        if hasattr(consumer, "atake"):
            return functools.partial(consumer.atake, timeout, max_messages, is_newest)
        key = asyncio.get_running_loop(), is_newest
        line = self._lines.get(key)
        if line is None or line.consumer is not consumer:
            self._leave(consumer)
            line = _Line(cast(TaskConsumer, consumer), is_newest, key[0])
            self._lines[key] = line
        return functools.partial(line.take, timeout, poll_secs, max_messages)
