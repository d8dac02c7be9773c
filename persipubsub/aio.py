"""
Publish and receive in tasks of ``asyncio``, with the same queues and the same promises.

The two classes are used as :py:class:`persipubsub.publisher.Pub` and
:py:class:`persipubsub.subscriber.Sub`, and share the queues with them, in this process and others.
The loop never waits for the disk or for another process: what could block runs in up to 32 threads of
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
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypeVar

from persipubsub import face
from persipubsub.config import ConfigLike
from persipubsub.engine import Lease, Queue, Sending
from persipubsub.errors import CorruptMessageError, PersipubsubError, QueueFullError
from persipubsub.face import BytesLike, ContentT, MessageId, Parts
from persipubsub.message import Message
from persipubsub.shared_errors import copy_of
from persipubsub.statistics import SubscriberStatistics

if TYPE_CHECKING:
    import persipubsub.queue
    from persipubsub.lmdb_engine import consuming

__all__ = ["Messages", "Pub", "Receipt", "Sub"]

ResultT = TypeVar("ResultT")

#: Threads of the process, for all queues. Many, as a write may wait long for another process.
_THREADS: Final = 32

#: A commit that has so many messages, or bytes, takes no more: other processes get their turn.
_MOST_MESSAGES: Final = 512
_MOST_BYTES: Final = 1 << 22

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


def _settle(future: "asyncio.Future[Any]", answer: object = None) -> None:
    """Wake the task that waits for a future, unless it was cancelled."""
    if future.done():
        _give_back(answer)
    elif isinstance(answer, BaseException):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _give_back(answer: Any) -> None:
    """Give back messages, if the answer is any, for which no task waits any more."""
    if hasattr(answer, "nack"):
        _submit(answer.nack)  # it fails if the queue was closed, which gave them back


def _close_opened(opening: "concurrent.futures.Future[Any]") -> None:
    """Close in a thread what a call opened for which no task waits any more."""
    if opening.exception() is None:
        _submit(opening.result().queue.close)


async def _wait(call: "concurrent.futures.Future[ResultT]") -> ResultT:
    """
    Wait for a call in a thread. If the task is cancelled, the call still runs to its end.

    Not ``asyncio.shield`` around ``asyncio.wrap_future``: it takes up to twice as long, and asyncio
    complains about the errors of calls for which no task waits any more.
    """
    loop = asyncio.get_running_loop()
    woken: "asyncio.Future[None]" = loop.create_future()
    call.add_done_callback(lambda _: _post(loop, _settle, woken))
    await woken
    return call.result()


class _Handle(face.Handle[face.OpenT]):
    """Publisher or subscriber for tasks."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        #: By loop, and whether its tasks wait for the newest message.
        self._dispatchers: dict[tuple[asyncio.AbstractEventLoop, bool], Any] = {}
        #: Calls that end messages, with the process: a forked child must not wait for its parent's.
        self._endings: dict["concurrent.futures.Future[None]", int] = {}

    async def _open(self, *given: Any) -> None:
        before = self._opened
        # The thread does not replace what is open: if this task is cancelled, a later call may have
        # opened a queue before the thread ends, and that one stays.
        opening = _submit(lambda: self._kind.open(*given))
        try:
            opened = await _wait(opening)
        except (asyncio.CancelledError, GeneratorExit):
            opening.add_done_callback(_close_opened)
            self._close_later(before)
            raise
        old = self._exchange(opened)
        if old is not None:
            try:
                await _wait(_submit(old.queue.close))
            except (asyncio.CancelledError, GeneratorExit):
                self._close_later(opened)
                raise

    def _close_later(self, opened: face.OpenT | None) -> None:
        """Close in a thread what a call opened or found open, unless a later call replaced it."""
        if opened is not None and self._opened is opened:
            self._exchange(None)
            _submit(opened.queue.close)

    def _dispatcher(self, kind: Callable[..., Any], owner: object, is_newest: bool = False) -> Any:
        """Return the dispatcher for the tasks of this loop, at the queue that is open now."""
        loop = asyncio.get_running_loop()
        dispatcher = self._dispatchers.get((loop, is_newest))
        if dispatcher is None or dispatcher.owner is not owner:
            for other in [other for other in list(self._dispatchers) if other[0].is_closed()]:
                self._dispatchers.pop(other, None)
            dispatcher = self._dispatchers[loop, is_newest] = kind(owner, loop)
        return dispatcher

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
        endings = [one for one, process_id in self._endings.items() if process_id == os.getpid()]
        await _wait(_submit(functools.partial(self._close, self._opened, endings)))

    def _close(self, opened: face.OpenT | None,
               endings: "list[concurrent.futures.Future[None]]") -> None:
        """Wait for what ends messages in threads, and close what was open then."""
        concurrent.futures.wait(endings)
        # If the task was cancelled, a later call may have opened a queue meanwhile.
        if self._opened is opened:
            self._replace(None)


#: What one task waits for: its future; messages to be put, or a call that takes what is there; when
#: it stops waiting, on the clock of the loop; seconds between two looks. Not a NamedTuple: a send
#: takes 2 % longer with it.
_Request: TypeAlias = tuple["asyncio.Future[Any]", Any, float, float]


class _Dispatcher:
    """
    Tasks of one loop that want something of a queue. Used in the thread of the loop only.

    One thread at a time serves all of them, first come, first served. No thread waits.
    """

    #: Appends answers for the first requests, in a thread. If it raises, all others get the error. It
    #: returns the pause before the next call, in seconds, or None to go on at once.
    _serve: Callable[[list[_Request], list[Any]], float | None]

    def __init__(self, owner: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.owner = owner
        self._loop = loop
        self._requests: list[_Request] = []
        self._is_busy = False
        self._is_due = False  # there is a reason to start, since the last start
        self._timer: asyncio.TimerHandle | None = None

    async def ask(self,
                  what: Any,
                  timeout: float | None = None,
                  poll_secs: float = math.inf) -> Any:
        """Wait for an answer; None if there was none in time."""
        future: "asyncio.Future[Any]" = self._loop.create_future()
        deadline = math.inf if timeout is None else self._loop.time() + timeout
        self._requests.append((future, what, deadline, poll_secs))
        if not (self._is_busy or self._is_due):
            # Start after the tasks that can run now: so they share a commit, or a look.
            self._loop.call_soon(self._start)
        self._is_due = True
        try:
            return await future
        except BaseException:
            # The task was cancelled after it was given messages.
            if future.done() and not future.cancelled() and future.exception() is None:
                _give_back(future.result())
            raise

    def _start(self) -> None:
        """Serve the tasks in a thread, now or when it has ended what it does."""
        self._is_due = self._is_busy
        if self._is_busy or not self._requests:
            return
        self._is_busy = True
        if self._timer is not None:
            self._timer.cancel()
        # A task that was cancelled before its turn sends nothing.
        requests = [request for request in self._requests if not request[0].done()]
        self._requests = []
        answers: list[Any] = []
        # If the loop is closed meanwhile, the answers are dropped, which gives messages back.
        _submit(lambda: self._serve(requests, answers)).add_done_callback(
            lambda done: _post(self._loop, self._end, requests, answers, done))

    def _end(self, requests: list[_Request], answers: list[Any],
             done: "concurrent.futures.Future[float | None]") -> None:
        self._is_busy = False
        error = done.exception()
        pause = done.result() if error is None else None
        for request, answer in zip(requests, answers):
            _settle(request[0], answer)
        if left := requests[len(answers):]:
            now = self._loop.time()
            for future, _, deadline, _ in left:
                if error is not None:
                    _settle(future, copy_of(error))
                elif pause is not None and deadline <= now:
                    _settle(future)
            self._requests[:0] = [request for request in left if not request[0].done()]
        if pause is None or self._is_due:
            self._start()
        elif self._requests:
            now = self._loop.time()
            pause = min(
                pause,
                *(min(poll_secs, deadline - now) for _, _, deadline, poll_secs in self._requests))
            self._timer = self._loop.call_later(pause, self._start)


# Sending


class _Outbox(_Dispatcher):
    """
    Tasks that send to a queue.

    All that they sent meanwhile is put at once. So a thousand tasks share a commit, and their
    messages stay in order.
    """

    owner: "persipubsub.queue.Queue"

    def _serve(self, requests: list[_Request], answers: list[Any]) -> None:
        sendings: list[Sending] = []
        count = size = 0
        for _, sending, _, _ in requests:
            sendings.append(sending)
            count += len(sending[0])
            size += sum(map(len, sending[0]))
            if count >= _MOST_MESSAGES or size >= _MOST_BYTES:
                break
        answers += self.owner.put_each(sendings)


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

    def __init__(self,
                 pub_id: str | None = None,
                 config_pth: ConfigLike | None = None,
                 autosync: bool = False) -> None:
        """
        Initialize without a queue; ``async with`` opens it, or :py:meth:`init` does.

        :param pub_id: key of the publisher in the configuration
        :param config_pth: see :py:meth:`init`
        :param autosync: True to let ``send_many`` commit each message by itself
        :raise TypeError: if only one of id and configuration is given
        """
        super().__init__(pub_id, config_pth, autosync)

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

    async def send(self,
                   msg: BytesLike,
                   timeout: float | None = None,
                   msg_id: MessageId | None = None) -> None:
        """
        Send a message to all subscribers of the publisher.

        When the call returns, the message is as safe as the queue's ``durability`` says. Messages
        of one loop are sent in the order of the calls, unless they wait for room. If the task is
        cancelled during the call, the message is sent or not, as if a process died.

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
        target = self._require()
        seconds = face.seconds_of(timeout)
        for messages, ids in target.batches(msgs, msg_ids):
            if hasattr(target.queue, "aput"):
                await target.queue.aput(messages, target.recipients, seconds, ids)
            else:
                await self._put(target.queue, (messages, target.recipients, ids), seconds)

    async def _put(self, queue: Queue, sending: Sending, timeout: float | None) -> None:
        outbox: _Outbox = self._dispatcher(_Outbox, queue)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:  # until the deadline; without one, until there is room
            try:
                return await outbox.ask(sending)  # type: ignore[no-any-return]
            except QueueFullError:
                pause = min(_ROOM_SECS, deadline - time.monotonic())
                if pause <= 0 or not outbox.owner.waits_for_room:
                    raise
            # Not in a thread: each task that waits would need one.
            await asyncio.sleep(pause)


# Receiving


class _Line(_Dispatcher):
    """
    Tasks that wait for messages of a consumer.

    When the engine calls back, one thread looks at the queue for all of them. Rejected: a lock that
    is held by the one task that looks. Each message then needs a call in a thread, and 16 tasks
    received half as much.
    """

    owner: "consuming.Consumer"

    def _serve(self, requests: list[_Request], answers: list[Any]) -> float | None:
        lease: Lease | BaseException | None
        pause: float
        for _, take, _, _ in requests[:_MOST_TAKEN]:
            try:
                lease, pause = take()
                if lease is None:
                    self.owner.call_once(self._wake)
                    # A message may have come before.
                    lease, pause = take()
            except CorruptMessageError as error:
                lease = error  # the message was set aside: the next task gets the one after it
            if lease is None:
                return pause
            answers.append(lease)
        return None

    def _wake(self) -> None:
        """Look at the queue again; after a close, all tasks fail. Any thread may call it."""
        _post(self._loop, self._start)


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

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
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

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
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
        if self._given == len(self._items):
            await self._end(*self._finish(self._given))
            self._begin(None if self._is_done else await self._take())
            if not self._items:
                raise StopAsyncIteration
        self._given += 1
        return self._items[self._given - 1]

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

    async def _end(self, lease: Lease | None, parts: Parts) -> None:
        """End messages; the task may be cancelled, all of them are ended nevertheless."""
        if parts and hasattr(lease, "aack"):
            async with contextlib.AsyncExitStack() as stack:
                for method, given in reversed(parts):
                    stack.push_async_callback(getattr(lease, f"a{method}"), *given)
        elif parts:
            ending = _submit(lambda: face.end(lease, parts))
            self._endings[ending] = os.getpid()
            ending.add_done_callback(lambda done: self._endings.pop(done, None))
            await _wait(ending)

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
        return await _wait(_submit(self._require().consumer.front))

    async def pop_to_top(self) -> None:
        """
        Acknowledge all messages of the subscriber but the newest one, in one transaction.

        It is done even if the task is cancelled.
        """
        source = self._require()
        await _wait(_submit(lambda: source.queue.skip_to_newest(source.subscriber)))

    async def statistics(self) -> SubscriberStatistics:
        """
        Count what waits for the subscriber, and what was dropped before it was read.

        :return: figures
        """
        return await _wait(_submit(self._require().statistics))

    def _taker(self, timeout: float | None, poll_secs: float, max_messages: int,
               is_newest: bool) -> face.Take:
        consumer: Any = self._require().consumer
        if hasattr(consumer, "atake"):
            return functools.partial(consumer.atake, timeout, max_messages, is_newest)
        take = functools.partial(consumer.try_take, max_messages, is_newest)
        # A task that waits for the newest message must not keep the others waiting.
        line: _Line = self._dispatcher(_Line, consumer, is_newest)
        return functools.partial(line.ask, take, timeout, poll_secs)
