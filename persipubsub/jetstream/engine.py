"""
Keep the messages of one queue in one stream of NATS JetStream.

This is what publishers, subscribers and :py:mod:`persipubsub.control` work with when the path of a
queue is ``nats://...``. A :py:class:`Queue` may be used by many threads and tasks at the same time,
and by forked children. Each call waits for the servers for at most ``busy_timeout_secs``.
"""

import asyncio
import contextlib
import functools
import http.client
import json
import math
import os
import time
import urllib.request
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import nats.errors

from persipubsub.config import Config, Durability
from persipubsub.errors import ClosedError, MessageTooLargeError, PersipubsubError
from persipubsub.jetstream import connection, delivery, errors, loop, publishing, settings, stream
from persipubsub.message import Message, Peeked, Place, time_ns_of
from persipubsub.statistics import QueueStatistics, SubscriberStatistics, share

__all__ = [
    "Queue", "Consumer", "Lease", "ensure_queue", "open_queue", "statistics_of", "check_durability",
    "peek", "follow"
]

ResultT = TypeVar("ResultT")

#: Errors that are translated before they leave the package.
_FOREIGN: Final = (errors.ApiError, nats.errors.Error, OSError)

#: Following a stream: messages of one look, at most, and the interval of looks, in seconds.
_LOOK_MESSAGES: Final = 1000
_LOOK_SECS: Final = 0.05

#: Figures that NATS does not count.
_NOT_COUNTED: Final[dict[str, Any]] = dict.fromkeys(
    ("dropped_by_timeout", "dropped_by_mark", "cleared", "skipped", "corrupt", "dead_lettered"), 0)

#: The monitoring port of a server: timeout in seconds, and largest page in bytes.
_PATIENCE_SECS: Final = 3.0
_LARGEST_PAGE: Final = 1 << 20


class _Open(NamedTuple):
    """The parts of an open queue, for one process."""

    stream: stream.Stream
    publishing: publishing.Publishing
    deliveries: dict[str, delivery.Delivery]  #: by subscriber
    targets: "dict[str, Queue]"  #: queues of dead letters, by key


class Queue(contextlib.AbstractContextManager["Queue"]):
    """A queue that is a stream. Any thread may call it."""

    def __init__(self, config: Config, queue_key: str) -> None:
        """Initialize without connecting."""
        self.settings = settings.Settings(config, queue_key)
        # Only the loop's own thread changes it.
        self._open: _Open | None = None
        self._is_closed = False

    def __exit__(self, *_: object) -> None:
        """Close the queue."""
        self.close()

    def close(self) -> None:
        """Close the queue, and give back the messages that it holds. It may be closed twice."""
        opened = self._open
        if opened is not None and opened.stream.connection.loop.process_id == os.getpid():
            with contextlib.suppress(ClosedError):  # the exit closes it
                opened.stream.connection.loop.call(self.aclose)
        self._is_closed = True

    async def aclose(self) -> None:
        """Give messages back, and release the connection. Only for the loop's own thread."""
        self._is_closed = True
        opened, self._open = self._open, None
        if opened is None:
            return
        opened.publishing.drops.report()
        await asyncio.gather(*(one.close() for one in opened.deliveries.values()))
        for target in opened.targets.values():
            await target.aclose()
        await opened.stream.connection.release()

    # Running

    def run(self, work: loop.Work[ResultT]) -> ResultT:
        """Do work in the loop, and wait for it; no foreign error leaves."""
        self._check_open()
        return loop.current().call(functools.partial(self._translated, work))

    async def arun(self, work: loop.Work[ResultT], is_carried_out: bool = True) -> ResultT:
        """Do what :py:meth:`run` does, for a task of any loop."""
        self._check_open()
        return await loop.current().wait(functools.partial(self._translated, work), is_carried_out)

    def ask(self, question: Callable[[stream.Stream], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """Ask something of the stream, and wait for the answer."""
        return self.run(lambda: question(self.opened().stream))

    async def _translated(self, work: loop.Work[ResultT]) -> ResultT:
        try:
            return await work()
        except _FOREIGN as error:
            raise errors.translate(error, self.settings.path) from None

    def _check_open(self) -> None:
        if self._is_closed:
            raise errors.closed(self.settings.path)

    def opened(self) -> _Open:
        """Open the queue in this process. Only for the loop's own thread."""
        found = self._open
        own = loop.current()
        if found is None or found.stream.connection.loop is not own:
            self._check_open()
            shared = connection.acquire(own, self.settings.address.servers, self.settings.path)
            kept = stream.Stream(shared, self.settings)
            found = self._open = _Open(kept, publishing.Publishing(kept), {}, {})
            own.queues.add(self)
        return found

    def delivery_to(self, subscriber: str) -> delivery.Delivery:
        """Return what delivers to a subscriber in this process. Only for the loop's own thread."""
        opened = self.opened()
        if subscriber not in opened.deliveries:
            opened.deliveries[subscriber] = delivery.Delivery(opened.stream, subscriber,
                                                              self._target)
        return opened.deliveries[subscriber]

    def _target(self, key: str) -> publishing.Publishing:
        """Open the queue of dead letters. Only for the loop's own thread."""
        target = self.opened().targets.setdefault(key, Queue(self.settings.config, key))
        return target.opened().publishing

    # Putting

    def put(self,
            messages: Sequence[bytes],
            recipients: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> int:
        """
        Add messages at the end of the queue.

        When the call returns, the servers have all of them. When it raises, some of several
        messages may be there, those at the beginning. With the same ids it may be repeated, which
        completes them.

        :param messages: in the order in which they are to be received
        :param recipients: ids of the subscribers that get them; everybody if not given
        :param timeout: how long to wait for room with the strategy ``block``, in seconds; None: for
            ever
        :param msg_ids: of the messages, None for those without; the same is stored once within the
            server's window
        :return: number of the first message
        :raise MessageTooLargeError: if the queue, or the server, could never hold them
        :raise QueueFullError: if there is no room, and nothing may be dropped
        :raise UnavailableError: if no server answers in time; they may be there nevertheless
        :raise NotInitializedError: if a recipient has no consumer
        """
        return self.run(self._putting(messages, recipients, timeout, msg_ids))

    async def aput(self,
                   messages: Sequence[bytes],
                   recipients: tuple[str, ...] | None = None,
                   timeout: float | None = None,
                   msg_ids: Sequence[bytes | None] | None = None) -> int:
        """Do what :py:meth:`put` does, in a task; it is carried out even if that is cancelled."""
        return await self.arun(self._putting(messages, recipients, timeout, msg_ids))

    def _putting(self, messages: Sequence[bytes], *others: Any) -> loop.Work[int]:
        self.check_sizes(messages)
        return lambda: self.opened().publishing.put(messages, *others)

    def check_sizes(self, messages: Sequence[bytes]) -> None:
        """Check that the queue could hold messages if it were empty."""
        mark = self.settings.queue.high_water_mark
        size = sum(map(len, messages))
        if (size > (math.inf if mark.size_bytes is None else mark.size_bytes)
                or len(messages) > (math.inf if mark.max_msgs_num is None else mark.max_msgs_num)):
            raise MessageTooLargeError(
                f"Expected at most {mark.max_msgs_num} messages (MAX_MSGS_NUM) and "
                f"{mark.size_bytes} bytes (HWM_LMDB_SIZE_BYTES) at once for the queue "
                f"{self.settings.path}, but got: {len(messages)} messages, {size} bytes")

    def require_subscribers(self, subscribers: Sequence[str]) -> None:
        """Check that subscribers were initialized."""

        async def look(kept: stream.Stream) -> None:
            await asyncio.gather(*map(kept.consumer_info, subscribers))

        self.ask(look)

    # Receiving

    def consumer(self, subscriber: str) -> "Consumer":
        """Take part in the work of a subscriber; raise NotInitializedError if it is not there."""
        self.require_subscribers([subscriber])
        return Consumer(self, subscriber)

    def skip_to_newest(self, subscriber: str) -> int:
        """Acknowledge all messages of a subscriber but the newest one; return how many."""
        self.require_subscribers([subscriber])
        return self.run(lambda: self.delivery_to(subscriber).skip_to_newest())

    # Looking after the queue

    def add_subscriber(self, subscriber: str) -> bool:
        """Add a subscriber, which gets what is sent from now on; return False if it is there."""
        return self.ask(lambda kept: kept.ensure_consumer(subscriber))

    def remove_subscriber(self, subscriber: str) -> int:
        """
        Remove a subscriber; return how many messages it did not acknowledge.

        Publishers whose file still names it get a ``NotInitializedError`` within a second.
        """
        return self.ask(lambda kept: kept.delete_consumer(subscriber))

    def seek(self, subscriber: str, to: Place) -> int:
        """
        Let a subscriber go on from another place; return the number from which it goes on.

        What is not stored any more can not be received again: without ``retain_secs``, that is what
        every subscriber acknowledged. The consumer of the subscriber is replaced; what its
        processes have at that moment may come again, and deliveries are counted from one again.
        """
        time_ns = time_ns_of(to)
        start: stream.Info = {"deliver_policy": "all" if to == "beginning" else "new"}
        if time_ns is not None:
            start = {"deliver_policy": "by_start_time", "opt_start_time": stream.to_text(time_ns)}
        elif isinstance(to, int):
            number = min(max(1, to), 2**63)
            start = {"deliver_policy": "by_start_sequence", "opt_start_seq": number}
        return self.ask(lambda kept: kept.seek(subscriber, start))

    def prune(self) -> int:
        """Drop the messages that are too old; return how many deliveries were dropped."""
        return sum(self.ask(lambda kept: kept.count_dropped(kept.drop_expired)).values())

    def clear(self) -> int:
        """Drop all messages; subscribers and numbers stay. Return how many deliveries."""
        return sum(self.ask(lambda kept: kept.count_dropped(kept.purge)).values())

    def statistics(self) -> QueueStatistics:
        """
        Count what is in the queue, by what the servers know.

        It is no snapshot: subscribers are asked for one after the other. What was dropped, cleared
        or skipped is not counted by NATS, and is 0.
        """
        return self.ask(_count)


class Lease:
    """
    Messages that one process holds, and no other gets, as long as it lives.

    Any thread may call it. A lease that is dropped gives its messages back.
    """

    def __init__(self, queue: Queue, own: delivery.Delivery,
                 delivered: list[delivery.Delivered]) -> None:
        """Hold messages that were delivered."""
        self.messages = [one.message.data for one in delivered]
        self._queue = queue
        self._delivery = own
        self._delivered = delivered

    def _end(self, count: int | None) -> list[delivery.Delivered]:
        """Take out the first messages, or all; none in a forked child, whose parent has them."""
        ended = self._delivered[:count]
        self._delivered = self._delivered[len(ended):]
        return ended if self._delivery.loop.process_id == os.getpid() else []

    def ack(self, count: int | None = None) -> None:
        """
        Let the messages leave the queue for this subscriber, and wait until the server has it.

        Several messages are acknowledged at the same time, but not in one transaction.
        """
        if ended := self._end(count):
            self._queue.run(lambda: self._delivery.ack(ended))

    async def aack(self, count: int | None = None) -> None:
        """Do what :py:meth:`ack` does, in a task; it is carried out even if that is cancelled."""
        if ended := self._end(count):
            await self._queue.arun(lambda: self._delivery.ack(ended))

    def nack(self, error: BaseException | None = None, count: int | None = None) -> None:
        """
        Give the messages back; they are delivered again, perhaps to another process.

        It raises nothing: what the user raised matters more. If no server answers, they are
        delivered again after ``ack_wait``.
        """
        if ended := self._end(count):
            with contextlib.suppress(PersipubsubError):
                self._queue.run(lambda: self._delivery.nack(ended, error))

    async def anack(self, error: BaseException | None = None, count: int | None = None) -> None:
        """Do what :py:meth:`nack` does, in a task; it is carried out even if that is cancelled."""
        if ended := self._end(count):
            with contextlib.suppress(PersipubsubError):
                await self._queue.arun(lambda: self._delivery.nack(ended, error))

    def details(self) -> list[Message]:
        """Tell what is known of the messages, in the same order."""
        return [one.message for one in self._delivered]

    def __del__(self) -> None:
        """Give back messages that were neither acknowledged nor given back."""
        # It runs in any thread, in the middle of any code, or at the exit: the loop does the work.
        own = self._delivery
        if forgotten := self._end(None):
            own.loop.post(lambda: own.give_back(forgotten))


class Consumer:
    """
    Take messages of one subscriber, from any number of threads.

    Consumers of the same subscriber, on whatever machines, share its messages.
    """

    def __init__(self, queue: Queue, subscriber: str) -> None:
        """Initialize without taking anything."""
        self._queue = queue
        self._subscriber = subscriber

    def take(self,
             timeout: float | None,
             poll_secs: float = 1.0,
             max_messages: int = 1,
             is_newest: bool = False) -> Lease | None:
        """Take the next message, or several, or the newest one; or wait. The server wakes us."""
        del poll_secs
        return self._queue.run(lambda: self._take(timeout, max_messages, is_newest))

    async def atake(self,
                    timeout: float | None,
                    max_messages: int = 1,
                    is_newest: bool = False) -> Lease | None:
        """Take messages in a task; cancelling it loses nothing and keeps nothing."""
        return await self._queue.arun(lambda: self._take(timeout, max_messages, is_newest),
                                      is_carried_out=False)

    async def _take(self, timeout: float | None, max_messages: int,
                    is_newest: bool) -> Lease | None:
        own = self._queue.delivery_to(self._subscriber)
        if is_newest:
            _, found = await own.take_newest(timeout)
        else:
            found = await own.take(timeout, max_messages)
        return Lease(self._queue, own, found) if found else None

    def front(self) -> bytes | None:
        """
        Look at the next message without taking it.

        While others of the same subscriber have messages, the server does not tell which: then it
        is taken and given back, which counts as a delivery.
        """
        return self._queue.run(lambda: self._queue.delivery_to(self._subscriber).front())


async def _count(kept: stream.Stream) -> QueueStatistics:
    infos, state = await kept.infos(), await kept.state()
    mark = kept.settings.queue.high_water_mark
    messages, size = int(state["messages"]), int(state["bytes"])
    age = kept.age_secs(stream.to_time(state["first_ts"])) if messages else None
    return QueueStatistics(path=kept.settings.path,
                           messages=messages,
                           message_share=share(messages, mark.max_msgs_num),
                           message_bytes=size,
                           byte_share=share(size, mark.size_bytes),
                           file_bytes=size,
                           file_share=share(size, mark.size_bytes),
                           oldest_age_seconds=age,
                           age_share=share(age or 0.0, mark.msg_timeout_secs),
                           next_number=int(state["last_seq"]) + 1,
                           commits=int(state["last_seq"]),
                           sent=int(state["last_seq"]),
                           subscribers=tuple(
                               _count_of(kept, *one) for one in sorted(infos.items())))


def _count_of(kept: stream.Stream, subscriber: str, info: stream.Info) -> SubscriberStatistics:
    floor = info["ack_floor"]
    last = floor.get("last_active")
    return SubscriberStatistics(
        subscriber=subscriber,
        lag=stream.lag_of(info),
        in_flight=int(info["num_ack_pending"]),
        position=int(floor["stream_seq"]) + 1,
        acknowledged=int(floor["consumer_seq"]),
        failed=int(info["num_redelivered"]),
        **_NOT_COUNTED,
        seconds_since_acknowledged=kept.age_secs(stream.to_time(last)) if last else None)


def ensure_queue(config: Config, queue_key: str) -> None:
    """
    Create a stream and its consumers, as far as they are not there. It may be repeated.

    Limits of the stream and what its subscribers get are brought up to date.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :raise FormatError: if there is a stream of that name, or of its subjects, of somebody else
    :raise UnavailableError: if no server answers in time, or it has no JetStream
    :raise AccessError: if a server does not let us in
    """
    with Queue(config, queue_key) as queue:
        queue.ask(stream.Stream.ensure)


def open_queue(config: Config, queue_key: str) -> Queue:
    """
    Open a queue that was initialized.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: to be closed by the caller
    :raise NotInitializedError: if there is no queue yet
    :raise FormatError: if the stream is somebody else's
    :raise UnavailableError: if no server answers in time
    """
    queue = Queue(config, queue_key)
    try:
        queue.ask(stream.Stream.info)
    except BaseException:
        queue.close()
        raise
    return queue


def statistics_of(config: Config, queue_key: str) -> QueueStatistics:
    """Count what is in a queue, without taking part in it."""
    with open_queue(config, queue_key) as queue:
        return queue.statistics()


# Looking


def peek(config: Config,
         queue_key: str,
         subscriber: str,
         count: int = 1,
         start: int = 0) -> list[Peeked]:
    """
    Look at the next messages of a subscriber without taking them.

    Messages that it acknowledged out of order, after the first one that it did not acknowledge, are
    shown as well while they are stored: the servers do not tell which these are.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :param subscriber: its id
    :param count: how many messages at most
    :param start: number from which on to look
    :return: messages, also those in flight, but none that are too old to be delivered
    :raise NotInitializedError: if the queue or the subscriber was not initialized
    """
    with open_queue(config, queue_key) as queue:

        async def work(kept: stream.Stream) -> list[Peeked]:
            info = await kept.consumer_info(subscriber)
            number = max(start, int(info["ack_floor"]["stream_seq"]) + 1)
            filters = stream.filters_of(info["config"])
            return await _look(kept, filters, number, count)

        return queue.ask(work)


def follow(config: Config, queue_key: str, last: int = 0) -> Generator[list[Peeked], None, None]:
    """
    Look at messages as they are sent, for ever, without being a subscriber.

    A message may be gone before it was seen, if all its subscribers have acknowledged it; its
    number is then left out. Close the iterator to close the queue.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :param last: how many of the newest numbers that are there to begin with
    :return: messages as they come, several at a time; nothing at least once a second
    :raise NotInitializedError: if the queue was not initialized
    """
    with open_queue(config, queue_key) as queue:
        number = int(queue.ask(stream.Stream.state)["last_seq"]) + 1 - last
        everything = [f"persipubsub.{queue.settings.address.stream}.>"]
        while True:  # for ever: the caller ends the iteration
            found = queue.ask(lambda kept: _look(kept, everything, number, _LOOK_MESSAGES))
            yield found
            if found:
                number = found[-1].number + 1
            else:
                time.sleep(_LOOK_SECS)


async def _look(kept: stream.Stream, filters: Sequence[str], number: int,
                count: int) -> list[Peeked]:
    found: list[Peeked] = []
    # Each round begins behind the message before.
    while len(found) < count and (one := await kept.next_stored(filters, number)) is not None:
        found.append(one)
        number = one.number + 1
    return found


# Durability


def check_durability(config: Config, queue_key: str) -> tuple[str, ...]:
    """
    Check whether the servers flush each message, as durability ``fsync`` promises.

    A server writes a message to its files before it acknowledges it, but flushes them every two
    minutes unless it is told otherwise. What is not flushed is lost in a power failure of all
    servers that have it.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: warnings
    """
    if config.queues[queue_key].durability is not Durability.FSYNC:
        return ()
    found_at = settings.Settings(config, queue_key).address
    monitor = found_at.monitor
    advice = (f"durability \"fsync\" needs \"sync_interval: always\" in the block jetstream of "
              f"each server of {','.join(found_at.servers)}")
    if monitor is None:
        return (f"{advice} (not checked: the path has no monitor=http://host:8222)", )
    try:
        with urllib.request.urlopen(f"{monitor}/varz", timeout=_PATIENCE_SECS) as answer:
            described = (json.loads(answer.read(_LARGEST_PAGE)).get("jetstream") or {})["config"]
    except (OSError, ValueError, AttributeError, LookupError, http.client.HTTPException):
        return (f"{advice} (not checked: {monitor} does not answer)", )
    if described.get("sync_always"):
        return ()
    interval_secs = described.get("sync_interval", 0) / 1e9
    return (f"{advice}, but {monitor} flushes every {interval_secs:g} s", )
