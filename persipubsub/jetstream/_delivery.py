"""
Lease messages of one subscriber: deliver, keep, acknowledge, give back.

The server gives a message to one consumer and expects an acknowledgement within ``ack_wait``. As
long as a lease is held, the server is told that it is being worked on; when its process dies,
nobody tells it any more, and the message is delivered to another.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import os
import sys
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, Optional

import persipubsub.errors
import persipubsub.message
from persipubsub.jetstream import (_address, _ahead, _calls, _errors, _holding, _inboxes, _keeping,
                                   _settings, _stream)

#: Messages that are acknowledged at the same time when all but the newest are skipped.
_SKIPPED_AT_ONCE: Final = 256

#: Done when the servers know that a lease ended, or are waited for no more.
Ending = concurrent.futures.Future[None]


class Lease:
    """
    Hold messages that one consumer has and nobody else gets, as long as its process lives.

    One of :py:meth:`acknowledge` and :py:meth:`give_back` is to be called, once. A lease that is
    forgotten is given back.
    """

    def __init__(self, consumer: "Consumer", ports: _calls.Ports,
                 pulled: list[_inboxes.Pulled]) -> None:
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
        self._hold = _holding.Hold(consumer.ahead(ports), ports.loop, pulled)
        self._process_id = os.getpid()
        self._pause = consumer.settings.address.ack_wait_secs / 3
        self._timer: asyncio.TimerHandle | None = None
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
        await _keeping.tell(self._ports.stream, self.pulled, self._pause)

    def stop(self) -> None:
        """Tell the server no more, as the lease ends. Only for the loop's own thread."""
        self._hold.end()
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
            with self._kept_for_closing():
                self._consumer.calls.run(self._acknowledge)

    @contextlib.contextmanager
    def _kept_for_closing(self) -> Iterator[None]:
        """Keep the lease until the queue is closed, if it is being closed: that gives it back."""
        try:
            yield
        except persipubsub.errors.ClosedError:
            self._consumer.unended.append(self)
            raise

    def begin_acknowledge(self) -> Ending:
        """
        Begin what :py:meth:`acknowledge` does. Never blocks.

        :return: done when the server has it; errors are those of :py:meth:`acknowledge`
        """
        return self._begin(self._acknowledge)

    async def _acknowledge(self) -> None:
        """Tell the server that the messages were worked on, and wait for its answers."""
        self._end()
        await self._consumer.ahead(self._ports).acknowledge(
            self.pulled,
            time.monotonic() + self._consumer.settings.wait_secs)

    def _begin(self, function: Callable[[], Coroutine[Any, Any, None]]) -> Ending:
        """
        Begin to end the lease, if it is one of this process.

        :param function: makes the coroutine
        :return: done when it is ended
        """
        if self._process_id == os.getpid():
            with self._kept_for_closing():
                return self._consumer.calls.begin(function)
        nothing: Ending = concurrent.futures.Future()
        nothing.set_result(None)
        return nothing

    def give_back(self, error: BaseException | None = None) -> None:
        """
        Let the messages be delivered again, perhaps to another.

        It raises nothing; if no server answers, they are delivered again after ``ack_wait``.

        :param error: why; None if they were not worked on
        """
        del error
        if self._process_id == os.getpid():
            with contextlib.suppress(persipubsub.errors.ClosedError), self._kept_for_closing():
                self._consumer.calls.run(self._give_back)

    def begin_give_back(self, error: BaseException | None = None) -> Ending:
        """
        Begin what :py:meth:`give_back` does. Never blocks.

        :param error: why; None if they were not worked on
        :return: done when the server has it, or is waited for no more
        :raise ClosedError: if the queue was closed, which gave it back
        """
        del error
        return self._begin(self._give_back)

    async def _give_back(self) -> None:
        """Give the messages back, and those behind them, so that they stay in order."""
        # It raises nothing: what the user raised matters more.
        self._end()
        await asyncio.shield(self._consumer.ahead(self._ports).begin_give_back(self.pulled))

    async def refuse(self) -> None:
        """Let the messages be delivered again. Only for the loop's own thread."""
        self._end()
        await self._consumer.ahead(self._ports).puller.returns.refuse(self.pulled)

    def _end(self) -> None:
        """Hold the messages no longer."""
        self.stop()
        self._consumer.leases.discard(self)

    def abandon(self) -> None:
        """Give the messages back without waiting for an answer. Only for the loop's own thread."""
        self._end()
        self._consumer.ahead(self._ports).begin_give_back(self.pulled)

    ack = acknowledge  # transitional
    nack = give_back  # transitional

    async def aack(self) -> None:  # transitional
        """Acknowledge; awaitable from any loop."""
        await asyncio.shield(asyncio.wrap_future(self.begin_acknowledge()))

    async def anack(self, error: BaseException | None = None) -> None:  # transitional
        """Give back; awaitable from any loop."""
        with contextlib.suppress(persipubsub.errors.ClosedError):
            await asyncio.shield(asyncio.wrap_future(self.begin_give_back(error)))

    def split(self, count: int) -> "Lease":  # transitional
        """Move the first messages into a lease of their own."""

        async def work() -> Lease:
            self._hold.end()
            first = Lease(self._consumer, self._ports, self.pulled[:count])
            self._consumer.leases.add(first)
            self.pulled = self.pulled[count:]
            self.messages = self.messages[count:]
            self._hold = _holding.Hold(self._consumer.ahead(self._ports), self._ports.loop,
                                       self.pulled)
            return first

        return self._consumer.calls.run(work)

    def touch(self) -> None:
        """Tell the server that the messages are being worked on, which it is told anyhow."""
        if self._process_id == os.getpid():
            self._consumer.calls.run(self.beat)

    def details(self) -> list[persipubsub.message.Message]:
        """
        Tell what is known of the messages.

        :return: messages, in the same order; the number is the one in the stream
        """
        return list(map(_inboxes.to_message, self.pulled))


class Consumer:
    """
    Take messages of one subscriber, from any number of threads.

    Consumers of the same subscriber, on whatever machines, share its messages.
    """

    def __init__(self, settings: _settings.Settings, subscriber: str, calls: _calls.Calls) -> None:
        """
        Initialize without taking anything.

        :param settings: of the queue
        :param subscriber: its id
        :param calls: of the queue
        """
        self.settings = settings
        self.calls = calls
        #: That are held. Only the loop's own thread changes it.
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        #: That their threads could not end, since the queue was being closed: closing ends them.
        self.unended: list[Lease] = []
        # What takes messages right now. Once closing began, it gives them back.
        self._takes = _calls.Takes()
        self._is_closing = False
        self._durable = _address.durable_of(subscriber)
        self._subscriber = subscriber
        self._ahead: _ahead.Ahead | None = None
        self._ahead_of: _calls.Ports | None = None

    def ahead(self, ports: _calls.Ports) -> _ahead.Ahead:
        """
        Find what pulls. A forked child gets its own. Only for the loop's own thread.

        :param ports: of the queue
        :return: what pulls, and what was pulled ahead
        """
        if self._ahead is None or self._ahead_of is not ports:
            self._ahead = _ahead.Ahead(ports, self.settings, self._durable)
            self._ahead_of = ports
            self.leases = weakref.WeakSet()
        return self._ahead

    async def close(self) -> None:
        """Give back what is held, and stop listening. Only for the loop's own thread."""
        self._is_closing = True
        ahead, ports = self._ahead, self._ahead_of
        if ahead is not None and ports is not None and ports.loop.process_id == os.getpid():
            leases = list(self.leases)
            for lease in leases:
                lease.stop()
            await ahead.close([one for lease in leases for one in lease.pulled])
            await self._takes.wait()
            # What they took.
            await ahead.give_back()
            await ahead.puller.returns.settle()

    # Taking

    def take(self,
             timeout: float | None,
             longest_pause: float = 1.0,
             max_messages: int = 1) -> Lease | None:
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

    def take_newest(self, timeout: float | None, longest_pause: float = 1.0) -> Lease | None:
        """
        Take the newest message, and acknowledge all others; wait if there is none.

        :param timeout: how long to wait, in seconds; None: for ever
        :param longest_pause: is not needed: the server wakes us
        :return: message; None if there was none in time
        """
        del longest_pause
        return self._hand_over(lambda: self._take_newest(timeout))

    def _hand_over(self,
                   function: "Callable[[], Coroutine[Any, Any, Optional[Lease]]]") -> Lease | None:
        """
        Take a lease over from the loop, or give it back if this thread is interrupted (Ctrl-C).

        :param function: makes the coroutine that takes it
        :return: the lease
        """
        handover: _calls.Handover[Lease] = _calls.Handover()
        try:
            return self.calls.run(self._into(handover, function))
        except BaseException:
            lease = handover.leave()
            if lease is not None:
                lease.give_back()
            raise

    def begin_take(self,
                   timeout: float | None,
                   max_messages: int = 1,
                   is_newest: bool = False) -> concurrent.futures.Future[Lease | None]:
        """
        Begin what :py:meth:`take` or :py:meth:`take_newest` does. Never blocks.

        :param timeout: how long to wait, in seconds; None: for ever
        :param max_messages: how many to take at most
        :param is_newest: True to take the newest message, and to skip all older ones
        :return:
            messages; None if there was none in time. Once it is cancelled, what was taken is given
            back
        :raise ClosedError: if the queue was closed
        """
        handover: _calls.Handover[Lease] = _calls.Handover()

        async def function() -> Lease | None:
            return await (self._take_newest(timeout) if is_newest else self._take(
                timeout, max_messages))

        def end(begun: concurrent.futures.Future[Lease | None]) -> None:
            lease = handover.leave() if begun.cancelled() else None
            if lease is not None:
                with contextlib.suppress(persipubsub.errors.ClosedError):
                    lease.begin_give_back()

        begun = self.calls.begin(self._into(handover, function))
        begun.add_done_callback(end)
        return begun

    async def atake(self,
                    timeout: float | None,
                    max_messages: int = 1,
                    is_newest: bool = False) -> Lease | None:  # transitional
        """Take; awaitable from any loop."""
        begun = self.begin_take(timeout, max_messages, is_newest)
        woken = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        def post(_: object) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(wake)

        begun.add_done_callback(post)
        try:
            await woken
        except BaseException:
            if not begun.cancel() and begun.exception() is None:
                lease = begun.result()
                if lease is not None:
                    with contextlib.suppress(persipubsub.errors.ClosedError):
                        lease.begin_give_back()
            raise
        if begun.cancelled():
            raise persipubsub.errors.ClosedError(
                "Expected a program that runs, but got: the interpreter is about to exit")
        return begun.result()

    def _into(
        self, handover: "_calls.Handover[Lease]",
        function: "Callable[[], Coroutine[Any, Any, Optional[Lease]]]"
    ) -> "Callable[[], Coroutine[Any, Any, Optional[Lease]]]":
        """
        Put a lease where whoever waits finds it, or give it back if nobody does any more.

        :param handover: to be used
        :param function: makes the coroutine that takes the lease
        :return: makes the coroutine that does both
        """

        async def work() -> Lease | None:
            async with self._takes.behind_others():
                lease = await function()
                if lease is not None and (self._is_closing or not handover.give(lease)):
                    lease.abandon()
                if self._is_closing:
                    raise _errors.closed(self.settings.path)
                return lease

        return work

    async def _take(self, timeout: float | None, max_messages: int) -> Lease | None:
        """
        Pull messages.

        :param timeout: how long to wait, in seconds; None: for ever
        :param max_messages: how many at most
        :return: messages; None if there was none in time
        """
        ports = await self.calls.ports()
        ahead = self.ahead(ports)
        # While another one of this process is at work, nobody knows who is quick.
        is_alone = not self.leases and not ahead.puller.is_busy()
        pulled = await ahead.take(timeout, max_messages, is_alone)
        return self._lease(ports, pulled) if pulled else None

    def _lease(self, ports: _calls.Ports, pulled: list[_inboxes.Pulled]) -> Lease:
        """
        Lease what was pulled.

        :param ports: of the queue
        :param pulled: messages
        :return: lease
        """
        lease = Lease(self, ports, pulled)
        self.leases.add(lease)
        return lease

    async def _take_newest(self, timeout: float | None) -> Lease | None:
        """
        Pull all messages that are there, and keep only the newest.

        :param timeout: how long to wait for the first one, in seconds; None: for ever
        :return: newest message; None if there was none in time
        """
        ports = await self.calls.ports()
        ahead = self.ahead(ports)
        pulled = (await _ahead.take_all_of(ports.loop, ahead.place)
                  or await ahead.waiting.take(timeout))
        if not pulled:
            return None
        _, newest = await self._skip(ports, pulled)
        return newest

    async def skip_to_newest(self) -> int:
        """
        Acknowledge all messages but the newest one. Only for the loop's own thread.

        :return: how many were acknowledged by that
        """
        ports = await self.calls.ports()
        ahead = self.ahead(ports)
        pulled = (await _ahead.take_all_of(ports.loop, ahead.place)
                  or await ahead.waiting.take_now(_SKIPPED_AT_ONCE))
        if not pulled:
            return 0
        count, newest = await self._skip(ports, pulled)
        await newest.refuse()
        return count

    async def _skip(self, ports: _calls.Ports,
                    pulled: list[_inboxes.Pulled]) -> "tuple[int, Lease]":
        """
        Acknowledge all messages that are there now but the newest one.

        :param ports: of the queue
        :param pulled: the first of them
        :return: how many were acknowledged; the newest one
        """
        # What is published meanwhile may be too fast for us to come to an end.
        count = 0
        try:
            last = int((await ports.stream.info(self._deadline()))["state"]["last_seq"])
            while True:
                pulled.sort(key=lambda one: one.number)
                await self.ahead(ports).acknowledge(pulled[:-1], self._deadline())
                count += len(pulled) - 1
                pulled = pulled[-1:]
                if pulled[0].number >= last:
                    break
                async with _keeping.kept(ports.stream, pulled):
                    pulled += await self.ahead(ports).waiting.take_now(_SKIPPED_AT_ONCE)
                if len(pulled) == 1:
                    break
        except BaseException:
            # The server knows of those that were acknowledged already.
            self.ahead(ports).puller.returns.give_back(pulled)
            raise
        return count, self._lease(ports, pulled)

    def _deadline(self) -> float:
        """
        Bound the wait for the servers.

        :return: on the monotonic clock
        """
        return time.monotonic() + self.settings.wait_secs

    # Looking

    def front(self) -> bytes | None:
        """
        Look at the next message without taking it.

        While others of the same subscriber have messages, the server does not tell which: then it
        is taken and given back, which counts as a delivery.

        :return: message that nobody has acknowledged or taken; None if there is none
        """
        return self.calls.run(self._front)

    async def _front(self) -> bytes | None:
        """
        Find the next message.

        :return: message; None if there is none
        """
        ports = await self.calls.ports()
        ahead = self.ahead(ports)
        found_ahead = await ahead.front()
        if found_ahead is not None:
            return found_ahead.data
        info = await ports.stream.consumer_info(self._subscriber, self._deadline())
        if info is None:
            raise _errors.missing_consumer(self.settings.path)
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
        # One that is given back alone would come behind others that were given back.
        pulled = await ahead.puller.pull_now(max(1, len(ahead.puller.returns.given)), sys.maxsize)
        if not pulled:
            return None
        pulled.sort(key=lambda one: one.number)
        lease = self._lease(ports, pulled)
        await lease.refuse()
        return lease.messages[0]
