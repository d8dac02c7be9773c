"""
Lease messages of one subscriber: deliver, keep, acknowledge, give back.

The server gives a message to one consumer and expects an acknowledgement within ``ack_wait``. As
long as a lease is held, the server is told that it is being worked on; when its process dies,
nobody tells it any more, and the message is delivered to another.
"""

import asyncio
import base64
import datetime
import os
import threading
import time
import weakref
from typing import Any, Callable, Coroutine, Final, List, Optional, Protocol, TypeVar

import nats.errors

import persipubsub.errors
import persipubsub.message
from persipubsub.jetstream import _address, _errors, _link, _loop, _pulling, _settings, _stream

ResultT = TypeVar("ResultT")

#: A message that can not be given back at once is delivered again after ack_wait.
_GIVE_BACK_SECS: Final = 2.0

#: Messages that are acknowledged at the same time when all but the newest are skipped.
_SKIPPED_AT_ONCE: Final = 256

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)


class Run(Protocol):
    """Run a coroutine in the loop."""

    def __call__(self, function: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """
        Run it.

        :param function: makes the coroutine
        :return: what it returned
        """


class Ports:
    """Be what a consumer needs of its queue. All of it runs in the loop's own thread."""

    def __init__(self, loop: _loop.Loop, link: _link.Link, stream: _stream.Stream) -> None:
        """
        Initialize with what is open.

        :param loop: of this process
        :param link: to the servers
        :param stream: of the queue
        """
        self.loop = loop
        self.link = link
        self.stream = stream


class Lease:
    """
    Hold messages that one consumer has and nobody else gets, as long as its process lives.

    Exactly one of :py:meth:`acknowledge` and :py:meth:`give_back` is to be called, once.
    """

    def __init__(self, consumer: "Consumer", ports: Ports, pulled: List[_pulling.Pulled]) -> None:
        """
        Initialize with what was pulled. Only for the loop's own thread.

        :param consumer: that took the messages
        :param ports: of its queue
        :param pulled: messages
        """
        self.messages = [one.data for one in pulled]
        self.pulled = pulled
        self._consumer = consumer
        self._ports = ports
        self._process_id = os.getpid()
        self._pause = consumer.settings.address.ack_wait_secs / 3
        self._timer = None  # type: Optional[asyncio.TimerHandle]
        self._beat_later(weakref.ref(self))

    def _beat_later(self, reference: "weakref.ref[Lease]") -> None:
        """
        Tell the server after a while that we are at work, again and again.

        :param reference: to this lease: one that its user forgot is not kept for ever
        """

        def beat() -> None:
            lease = reference()
            if lease is not None:
                lease._ports.loop.start(lease.beat())  # pylint: disable=protected-access
                lease._beat_later(reference)  # pylint: disable=protected-access

        self._timer = self._ports.loop.start_later(self._pause, beat)

    async def beat(self) -> None:
        """Tell the server that we are at work. It is not awaited, and repeated anyhow."""
        try:
            client = await self._ports.link.client(time.monotonic() + self._pause)
            for one in self.pulled:
                await client.publish(one.reply, b"+WPI")
        except (persipubsub.errors.PersipubsubError, nats.errors.Error, OSError):
            pass

    def stop(self) -> None:
        """Tell the server no more. Only for the loop's own thread."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def acknowledge(self) -> None:
        """
        Let the messages leave the queue for this subscriber, and wait until the server has it.

        Several messages are acknowledged at the same time, but not in one transaction.

        :raise UnavailableError: if no server answers in time; the messages are delivered again
        """
        if self._process_id == os.getpid():
            self._consumer.run(self._acknowledge)

    def give_back(self, error: Optional[BaseException] = None) -> None:
        """
        Let the messages be delivered again, perhaps to another.

        It raises nothing; if no server answers, they are delivered again after ``ack_wait``.

        :param error: why; None if they were not worked on
        """
        del error
        if self._process_id != os.getpid():
            return
        try:
            self._consumer.run(self.refuse)
        except persipubsub.errors.PersipubsubError:
            pass  # what the user raised matters more

    async def _acknowledge(self) -> None:
        """Tell the server that the messages were worked on, and wait for its answers."""
        self._end()
        await self._consumer.puller(self._ports).acknowledge(
            self.pulled,
            time.monotonic() + self._consumer.settings.wait_secs)

    async def refuse(self) -> None:
        """Let the messages be delivered again. Only for the loop's own thread."""
        self._end()
        deadline = time.monotonic() + _GIVE_BACK_SECS
        # In order: the first one is the next that is delivered again.
        await asyncio.gather(*(self._ports.link.request(one.reply, b"-NAK", deadline)
                               for one in self.pulled))

    def _end(self) -> None:
        """Hold the messages no longer."""
        self.stop()
        self._consumer.leases.discard(self)

    async def abandon(self) -> None:
        """Give the messages back without waiting for an answer."""
        self.stop()
        await self._consumer.puller(self._ports).give_back(self.pulled)

    def touch(self) -> None:
        """Tell the server that the messages are being worked on, which it is told anyhow."""
        if self._process_id == os.getpid():
            self._consumer.run(self.beat)

    def details(self) -> List[persipubsub.message.Message]:
        """
        Tell what is known of the messages.

        :return: messages, in the same order; the number is the one in the stream
        """
        return [
            persipubsub.message.Message(data=one.data,
                                        number=one.number,
                                        sent_at=_EPOCH +
                                        datetime.timedelta(microseconds=one.time_ns // 1000),
                                        attempts=one.attempts) for one in self.pulled
        ]


class _Handover:
    """Let a lease be with the thread that waits for it, or with nobody, but never be forgotten."""

    def __init__(self) -> None:
        """Initialize without a lease."""
        # Guards the two below: one thread gives, while the other may be interrupted and leave.
        self._lock = threading.Lock()
        self._lease = None  # type: Optional[Lease]
        self._has_left = False

    def give(self, lease: Lease) -> bool:
        """
        Give the lease.

        :param lease: that was taken
        :return: False if nobody waits for it any more
        """
        with self._lock:
            self._lease = lease
            return not self._has_left

    def leave(self) -> Optional[Lease]:
        """
        Stop waiting.

        :return: lease that was given already
        """
        with self._lock:
            self._has_left = True
            return self._lease


class Consumer:
    """
    Take messages of one subscriber, from any number of threads.

    Consumers of the same subscriber, on whatever machines, share its messages.
    """

    def __init__(self, settings: _settings.Settings, subscriber: str, run: Run,
                 ports: "Callable[[], Coroutine[Any, Any, Ports]]") -> None:
        """
        Initialize without taking anything.

        :param settings: of the queue
        :param subscriber: its id
        :param run: runs a coroutine in the loop
        :param ports: opens the queue in this process, if it is not open there
        """
        self.settings = settings
        self.run = run
        #: That are held. Only the loop's own thread changes it.
        self.leases = weakref.WeakSet()  # type: weakref.WeakSet[Lease]
        self._durable = _address.durable_of(subscriber)
        self._subscriber = subscriber
        self._get_ports = ports
        self._puller = None  # type: Optional[_pulling.Puller]
        self._puller_of = None  # type: Optional[Ports]

    def puller(self, ports: Ports) -> _pulling.Puller:
        """
        Find what pulls. A forked child gets its own. Only for the loop's own thread.

        :param ports: of the queue
        :return: puller
        """
        if self._puller is None or self._puller_of is not ports:
            self._puller = _pulling.Puller(ports.stream, self.settings, self._durable)
            self._puller_of = ports
            self.leases = weakref.WeakSet()
        return self._puller

    async def close(self) -> None:
        """Give back what is held, and stop listening. Only for the loop's own thread."""
        if self._puller is not None:
            for lease in list(self.leases):
                await lease.abandon()
            await self._puller.close()

    # Taking

    def take(self,
             timeout: Optional[float],
             longest_pause: float = 1.0,
             max_messages: int = 1) -> Optional[Lease]:
        """
        Take the next message, or several; wait if there is none.

        :param timeout: how long to wait, in seconds; None: for ever
        :param longest_pause: is not needed: the server wakes us
        :param max_messages: how many to take at most; all that are there at once, at least one
        :return: messages; None if there was none in time
        :raise UnavailableError: if no server answers for too long
        """
        del longest_pause
        return self._hand_over(lambda: self._take(timeout, max_messages))

    def take_newest(self, timeout: Optional[float], longest_pause: float = 1.0) -> Optional[Lease]:
        """
        Take the newest message, and acknowledge all others; wait if there is none.

        :param timeout: how long to wait, in seconds; None: for ever
        :param longest_pause: is not needed: the server wakes us
        :return: message; None if there was none in time
        """
        del longest_pause
        return self._hand_over(lambda: self._take_newest(timeout))

    def _hand_over(
            self,
            function: "Callable[[], Coroutine[Any, Any, Optional[Lease]]]") -> Optional[Lease]:
        """
        Take a lease over from the loop, or give it back if this thread is interrupted (Ctrl-C).

        :param function: makes the coroutine that takes it
        :return: the lease
        """
        handover = _Handover()

        async def work() -> Optional[Lease]:
            lease = await function()
            if lease is not None and not handover.give(lease):
                await lease.abandon()
            return lease

        try:
            return self.run(work)
        except BaseException:
            lease = handover.leave()
            if lease is not None:
                lease.give_back()
            raise

    async def _take(self, timeout: Optional[float], max_messages: int) -> Optional[Lease]:
        """
        Pull messages.

        :param timeout: how long to wait, in seconds; None: for ever
        :param max_messages: how many at most
        :return: messages; None if there was none in time
        """
        ports = await self._get_ports()
        pulled = await self.puller(ports).pull(timeout, max_messages)
        return self._lease(ports, pulled) if pulled else None

    def _lease(self, ports: Ports, pulled: List[_pulling.Pulled]) -> Lease:
        """
        Lease what was pulled.

        :param ports: of the queue
        :param pulled: messages
        :return: lease
        """
        lease = Lease(self, ports, pulled)
        self.leases.add(lease)
        return lease

    async def _take_newest(self, timeout: Optional[float]) -> Optional[Lease]:
        """
        Pull all messages that are there, and keep only the newest.

        :param timeout: how long to wait for the first one, in seconds; None: for ever
        :return: newest message; None if there was none in time
        """
        ports = await self._get_ports()
        pulled = await self.puller(ports).pull(timeout, 1)
        if not pulled:
            return None
        _, newest = await self._skip(ports, pulled)
        return newest

    async def skip_to_newest(self) -> int:
        """
        Acknowledge all messages but the newest one. Only for the loop's own thread.

        :return: how many were acknowledged by that
        """
        ports = await self._get_ports()
        pulled = await self.puller(ports).pull(0.0, _SKIPPED_AT_ONCE)
        if not pulled:
            return 0
        count, newest = await self._skip(ports, pulled)
        await newest.refuse()
        return count

    async def _skip(self, ports: Ports, pulled: List[_pulling.Pulled]) -> "tuple[int, Lease]":
        """
        Acknowledge all messages that are there now but the newest one.

        :param ports: of the queue
        :param pulled: the first of them
        :return: how many were acknowledged; the newest one
        """
        # What is published meanwhile may be too fast for us to come to an end.
        last = int((await ports.stream.info(self._deadline()))["state"]["last_seq"])
        count = 0
        while True:
            pulled.sort(key=lambda one: one.number)
            await self.puller(ports).acknowledge(pulled[:-1], self._deadline())
            count += len(pulled) - 1
            newest = pulled[-1]
            if newest.number >= last:
                break
            more = await self.puller(ports).pull(0.0, _SKIPPED_AT_ONCE)
            if not more:
                break
            pulled = [newest] + more
        return count, self._lease(ports, [newest])

    def _deadline(self) -> float:
        """
        Bound the wait for the servers.

        :return: on the monotonic clock
        """
        return time.monotonic() + self.settings.wait_secs

    # Looking

    def front(self) -> Optional[bytes]:
        """
        Look at the next message without taking it.

        While others of the same subscriber have messages, the server does not tell which: then it
        is taken and given back, which counts as a delivery.

        :return: message that nobody has acknowledged or taken; None if there is none
        """
        return self.run(self._front)

    async def _front(self) -> Optional[bytes]:
        """
        Find the next message.

        :return: message; None if there is none
        """
        ports = await self._get_ports()
        info = await ports.stream.consumer_info(self._subscriber, self._deadline())
        if info is None:
            raise _errors.translate(
                _errors.ApiError({
                    "err_code": _errors.CONSUMER_NOT_FOUND,
                    "description": "consumer not found"
                }), self.settings.path)
        if not info["num_ack_pending"]:
            start = int(info["delivered"]["stream_seq"]) + 1
            while True:
                found = await ports.stream.next_message(info["config"].get("filter_subjects") or [],
                                                        start, self._deadline())
                if found is None:
                    return None
                age_ns = ports.stream.now_ns() - _stream.to_ns(found["time"])
                if age_ns <= self.settings.timeout_ns:
                    return base64.b64decode(found.get("data") or b"")
                start = int(found["seq"]) + 1
        pulled = await self.puller(ports).pull(0.0, 1)
        if not pulled:
            return None
        lease = self._lease(ports, pulled)
        await lease.refuse()
        return lease.messages[0]
