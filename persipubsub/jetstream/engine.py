"""
Keep the messages of one queue in one stream of NATS JetStream.

This is what :py:class:`persipubsub.publisher.Pub`, :py:class:`persipubsub.subscriber.Sub` and
:py:mod:`persipubsub.control` work with when the path of a queue is ``nats://...``. A
:py:class:`Queue` may be used by many threads at the same time, and by forked children. Each call
waits for the servers for at most ``busy_timeout_secs`` of the queue.
"""

import asyncio
import concurrent.futures
import os
import ssl
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import nats.errors

import persipubsub.config
import persipubsub.errors
import persipubsub.statistics
from persipubsub import _losses
from persipubsub.jetstream import (_ahead, _calls, _delivery, _durability, _errors, _link, _loop,
                                   _publishing, _settings, _stream)

__all__ = ["Queue", "ensure_queue", "open_queue", "statistics_of", "check_durability"]

ResultT = TypeVar("ResultT")

#: Errors that do not leave the room as they are.
_FOREIGN: Final = (_errors.ApiError, nats.errors.Error, asyncio.TimeoutError, ssl.SSLError, OSError,
                   concurrent.futures.TimeoutError)

#: Calls of begin_put that are under way at the same time: a request that waits for a thousand
#: others would be repeated before it is answered.
_PUTS_AT_ONCE: Final = 256


class Queue:
    """
    Put messages into a stream and look after them.

    >>> Queue.__name__
    'Queue'
    """

    def __init__(self, settings: _settings.Settings) -> None:
        """
        Initialize without connecting; see :py:func:`open_queue`.

        :param settings: of the queue
        """
        self.settings = settings
        self._losses = _losses.LossLog(settings.path)
        # Only the loop's own thread changes them.
        self._ports: _calls.Ports | None = None
        self._publishing: _publishing.Publishing | None = None
        self._puts: asyncio.Semaphore | None = None
        # Not weakly: whoever closes a subscriber forgets its consumer first, and what that holds
        # would not be given back.
        self._consumers: set[_delivery.Consumer] = set()
        self._is_closed = False

    def __enter__(self) -> "Queue":
        """
        Use the queue as a context manager.

        :return: itself
        """
        return self

    def __exit__(self, *_: object) -> None:
        """Close the queue."""
        self.close()

    def close(self) -> None:
        """Close the queue; it may be closed twice. What is held is given back."""
        if self._is_closed:
            return
        self._is_closed = True
        self._losses.report(force=True)
        ports = self._ports
        if ports is not None and ports.loop.process_id == os.getpid():
            try:
                ports.loop.call(lambda: self._close(ports))
            except persipubsub.errors.ClosedError:
                pass  # at the exit all connections are closed anyhow

    async def _close(self, ports: _calls.Ports) -> None:
        """
        Give back what is held, and the connection.

        :param ports: of this queue
        """
        try:
            await asyncio.wait_for(asyncio.gather(*(consumer.close()
                                                    for consumer in list(self._consumers))),
                                   timeout=2.0)
        except (TimeoutError, persipubsub.errors.PersipubsubError, nats.errors.Error, OSError):
            pass  # delivered again after ack_wait
        await _link.release(ports.link)

    def run(self, function: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """
        Run a coroutine in the loop, and translate what goes wrong: no other error leaves the room.

        :param function: makes the coroutine
        :return: what it returned
        :raise ClosedError: if the queue was closed
        """
        self._check_open()
        return _call(self.settings.path, function)

    def begin(
            self, function: Callable[[], Coroutine[Any, Any,
                                                   ResultT]]) -> concurrent.futures.Future[ResultT]:
        """
        Begin to run a coroutine in the loop, as :py:meth:`run` does. Never blocks.

        :param function: makes the coroutine
        :return: of what the coroutine returns; cancelling it cancels the coroutine
        :raise ClosedError: if the queue was closed
        """
        self._check_open()

        async def work() -> ResultT:
            try:
                return await function()
            except _FOREIGN as error:
                raise _errors.translate(error, self.settings.path) from None

        return _loop.current().begin(work)

    def _check_open(self) -> None:
        """
        Check that the queue was not closed.

        :raise ClosedError: if it was
        """
        if self._is_closed:
            raise persipubsub.errors.ClosedError(
                f"Expected the queue {self.settings.path} to be open, but got: it was closed")

    async def ports(self) -> _calls.Ports:
        """
        Open the queue in this process, if it is not open there. Only for the loop's own thread.

        :return: what is open
        """
        ports = self._ports
        loop = _loop.current()
        if ports is None or ports.loop is not loop:
            link = _link.acquire(loop, self.settings.address.servers, self.settings.path)
            ports = self._ports = _calls.Ports(loop, link, _stream.Stream(link, self.settings))
            self._publishing = _publishing.Publishing(ports.stream, self.settings, self._losses)
            self._puts = asyncio.Semaphore(_PUTS_AT_ONCE)
        return ports

    async def connect(self) -> None:
        """
        Connect, and look whether the stream is there. Only for the loop's own thread.

        :raise NotInitializedError: if it is not
        """
        ports = await self.ports()
        try:
            await ports.stream.info(self._deadline())
        except BaseException:
            self._ports = None
            await _link.release(ports.link)
            raise

    def _deadline(self) -> float:
        """
        Bound the wait for the servers.

        :return: on the monotonic clock
        """
        return time.monotonic() + self.settings.wait_secs

    # Putting

    def put(self,
            messages: Sequence[bytes],
            audience: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> int:
        """
        Add messages at the end of the queue.

        When the call returns, the servers have all of them. When it raises, some of several
        messages may be there, those at the beginning. With the same ids it may be repeated, which
        completes them. Atomic batches, which servers have since 2.12, were rejected: such a server
        refuses a batch with an id that it knows, and does not tell whether the message is stored,
        so that nobody knows what became of a batch that was not answered.

        :param messages: in the order in which they are to be received
        :param audience: ids of the subscribers that get them; everybody if not given
        :param timeout: how long to wait for room with the strategy ``block``, in seconds; None: for
            ever
        :param msg_ids: of the messages, None for those without; the same is stored once within the
            server's window
        :return: number of the first message
        :raise MessageTooLargeError: if the queue, or the server, could never hold them
        :raise QueueFullError: if there is no room, and nothing may be dropped
        :raise UnavailableError: if no server answers in time; they may be there nevertheless
        :raise NotInitializedError: if a subscriber of the audience has no consumer
        """
        self.settings.check_size(messages)

        async def work() -> int:
            await self.ports()
            assert self._publishing is not None
            return await self._publishing.put(messages, audience, timeout, msg_ids)

        return self.run(work)

    def begin_put(self,
                  messages: Sequence[bytes],
                  audience: tuple[str, ...] | None = None,
                  timeout: float | None = None,
                  msg_ids: Sequence[bytes | None] | None = None) -> concurrent.futures.Future[int]:
        """
        Begin what :py:meth:`put` does. Never blocks.

        :param messages: in the order in which they are to be received
        :param audience: ids of the subscribers that get them; everybody if not given
        :param timeout: how long to wait for room, see :py:meth:`put`
        :param msg_ids: of the messages, None for those without
        :return: number of the first message; errors are those of :py:meth:`put`
        :raise MessageTooLargeError: if the queue could never hold them
        """
        self.settings.check_size(messages)
        until = None if timeout is None else time.monotonic() + timeout

        async def work() -> int:
            await self.ports()
            assert self._publishing is not None and self._puts is not None
            async with self._puts:
                left = None if until is None else max(0.0, until - time.monotonic())
                return await self._publishing.put(messages, audience, left, msg_ids)

        return self.begin(work)

    async def aput(self,
                   messages: Sequence[bytes],
                   recipients: tuple[str, ...] | None = None,
                   timeout: float | None = None,
                   msg_ids: Sequence[bytes | None] | None = None) -> int:  # transitional
        """Put; awaitable from any loop."""
        return await asyncio.shield(
            asyncio.wrap_future(self.begin_put(messages, recipients, timeout, msg_ids)))

    def check_sizes(self, messages: Sequence[bytes]) -> None:
        """
        Check that the queue could hold messages if it were empty.

        :param messages: to be put in one call
        :raise MessageTooLargeError: if it could not
        """
        self.settings.check_size(messages)

    def require_subscribers(self, subscribers: Sequence[str]) -> None:
        """
        Check that subscribers were initialized.

        :param subscribers: ids
        :raise NotInitializedError: if one of them was not
        """

        async def work() -> None:
            await (await self.ports()).stream.require(subscribers, self._deadline())

        self.run(work)

    # Receiving

    def consumer(self, subscriber: str) -> _delivery.Consumer:
        """
        Take part in the work of a subscriber.

        :param subscriber: its id
        :return: from which messages can be taken
        :raise NotInitializedError: if the queue has no such subscriber
        """
        self.require_subscribers([subscriber])
        consumer = _delivery.Consumer(self.settings, subscriber, self)
        self._consumers.add(consumer)
        return consumer

    def skip_to_newest(self, subscriber: str) -> int:
        """
        Acknowledge all messages of a subscriber but the newest one, in batches.

        :param subscriber: its id
        :return: how many were acknowledged by that
        """
        consumer = self.consumer(subscriber)

        async def work() -> int:
            try:
                return await consumer.skip_to_newest()
            finally:
                self._consumers.discard(consumer)
                await consumer.close()

        return self.run(work)

    # Looking after the queue

    def prune(self) -> int:
        """
        Drop the messages that are too old; what everybody acknowledged is gone anyhow.

        :return: how many deliveries were dropped
        """

        async def work() -> int:
            return await (await self.ports()).stream.drop_expired(self._deadline())

        return self.run(work)

    def clear(self) -> int:
        """
        Drop all messages; subscribers and numbers stay.

        :return: how many deliveries were dropped
        """

        async def work() -> int:
            ports = await self.ports()
            stream = ports.stream
            # It would be received although it is gone.
            await _ahead.give_back_of(ports.loop, stream.name)
            lags = await stream.lags(self._deadline())
            await stream.purge(self._deadline())
            return sum(lags.values())

        return self.run(work)

    def statistics(self) -> persipubsub.statistics.QueueStatistics:
        """
        Count what is in the queue, by what the servers know.

        It is no snapshot: subscribers are asked for one after the other. What was dropped, cleared
        or skipped is not counted by NATS, and is 0.

        :return: figures of the queue and of its subscribers
        """

        async def work() -> persipubsub.statistics.QueueStatistics:
            stream = (await self.ports()).stream
            infos = await stream.infos(self._deadline())
            state = (await stream.info(self._deadline()))["state"]
            return self._figures(state, infos, stream.now_ns())

        return self.run(work)

    def _figures(self, state: dict[str, Any], infos: dict[str, dict[str, Any]],
                 now_ns: int) -> persipubsub.statistics.QueueStatistics:
        """
        Put figures together.

        :param state: of the stream
        :param infos: of the consumers, by subscriber
        :param now_ns: time of the servers
        :return: figures
        """
        settings = self.settings
        messages, size = int(state["messages"]), int(state["bytes"])
        age = max(0, now_ns - _stream.to_ns(state["first_ts"])) / 1e9 if messages else None
        return persipubsub.statistics.QueueStatistics(
            path=settings.path,
            messages=messages,
            message_share=messages / settings.max_messages,
            message_bytes=size,
            byte_share=size / settings.max_message_bytes,
            file_bytes=size,
            file_share=size / settings.max_message_bytes,
            oldest_age_seconds=age,
            age_share=(age or 0.0) * 1e9 / settings.timeout_ns,
            next_number=int(state["last_seq"]) + 1,
            commits=int(state["last_seq"]),
            subscribers=tuple(
                _figures_of(subscriber, info, now_ns)
                for subscriber, info in sorted(infos.items())))


def _figures_of(subscriber: str, info: dict[str, Any],
                now_ns: int) -> persipubsub.statistics.SubscriberStatistics:
    """
    Describe one subscriber.

    :param subscriber: its id
    :param info: of its consumer
    :param now_ns: time of the servers
    :return: its figures
    """
    floor = info["ack_floor"]
    last = floor.get("last_active")
    return persipubsub.statistics.SubscriberStatistics(
        subscriber=subscriber,
        lag=_stream.lag_of(info),
        in_flight=int(info["num_ack_pending"]),
        position=int(floor["stream_seq"]) + 1,
        acknowledged=int(floor["consumer_seq"]),
        failed=int(info["num_redelivered"]),
        dropped_by_timeout=0,
        dropped_by_mark=0,
        cleared=0,
        skipped=0,
        corrupt=0,
        dead_lettered=0,
        seconds_since_acknowledged=max(0, now_ns - _stream.to_ns(last)) / 1e9 if last else None)


def _call(path: str, function: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
    """
    Run a coroutine in the loop, and translate what goes wrong.

    :param path: of the queue
    :param function: makes the coroutine
    :return: what it returned
    """
    try:
        return _loop.current().call(function)
    except _FOREIGN as error:
        raise _errors.translate(error, path) from None


def ensure_queue(config: persipubsub.config.Config, queue_key: str) -> None:
    """
    Create a stream and its consumers, as far as they are not there. It may be repeated.

    Limits of the stream and what its subscribers get are brought up to date.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :raise FormatError: if there is a stream of that name, or of its subjects, of somebody else
    :raise UnavailableError: if no server answers in time, or it has no JetStream
    :raise AccessError: if a server does not let us in
    """
    queue = Queue(_settings.Settings.of(config, queue_key))

    async def work() -> None:
        ports = await queue.ports()
        await ports.stream.ensure(time.monotonic() + queue.settings.wait_secs)

    try:
        queue.run(work)
    finally:
        queue.close()


def open_queue(config: persipubsub.config.Config, queue_key: str) -> Queue:
    """
    Open a queue that was initialized.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: to be closed by the caller
    :raise NotInitializedError: if there is no queue yet
    :raise FormatError: if the stream is somebody else's
    :raise UnavailableError: if no server answers in time
    """
    queue = Queue(_settings.Settings.of(config, queue_key))
    queue.run(queue.connect)
    return queue


def statistics_of(config: persipubsub.config.Config,
                  queue_key: str) -> persipubsub.statistics.QueueStatistics:
    """
    Count what is in a queue, without taking part in it.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: figures of the queue and of its subscribers
    """
    with open_queue(config, queue_key) as queue:
        return queue.statistics()


def check_durability(config: persipubsub.config.Config, queue_key: str) -> tuple[str, ...]:
    """
    Look whether the servers flush each message, as durability ``fsync`` promises.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: warnings
    """
    if config.queues[queue_key].durability is not persipubsub.config.Durability.FSYNC:
        return ()
    return _durability.warnings_of(_settings.Settings.of(config, queue_key).address)
