"""
Deliver the messages of one subscriber: pull, hold, acknowledge, give back.

The server delivers a message to one process and expects an acknowledgement within ``ack_wait``.
While a process holds a message, it sends *in progress*. When the process dies, this ends, and the
server delivers the message to another process.

A message that was delivered as often as ``max_deliveries`` allows is given up. First it is put into
the queue of dead letters, under an id that is the same in every process; then it is acknowledged. A
process that is killed between the two leaves it in both: the next consumer that gets it puts it
again, which changes nothing, and acknowledges it.

All of it runs in the thread of :py:mod:`persipubsub.jetstream.loop`.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Final, NamedTuple

import nats.aio.msg
import nats.errors

from persipubsub.errors import PersipubsubError, UnavailableError
from persipubsub.jetstream import address, connection, errors, publishing, stream
from persipubsub.message import NO_WORD, Message, give_up, retry_delay_ns, text_of

_LOGGER = logging.getLogger("persipubsub.queue")

#: Time after which a pull request expires, in seconds, because it is lost when its server dies.
_LONGEST_PULL_SECS: Final = 5.0

#: Interval of the heartbeats by which a server shows that it has a pull request, in seconds.
_HEARTBEAT_SECS: Final = 0.5

#: Time without a heartbeat after which a pull request may be lost, in seconds.
_LOST_SECS: Final = 3 * _HEARTBEAT_SECS

#: Bytes of a pull request, or one larger message; a request beside others has a share of it. Servers
#: drop a connection that is 64 MiB behind, and its messages are delivered again only after ack_wait.
#: The number is prime: messages of one size do not use it up exactly, which would end a request
#: without a status.
_MOST_BYTES: Final = (1 << 23) - 15

#: Messages that are acknowledged at the same time: one that waits for thousands of others would be
#: acknowledged again before it is answered.
_ACKS_AT_ONCE: Final = 512

#: Longest wait for the answer to a -NAK, in seconds: afterwards ack_wait has the same effect.
_NAK_SECS: Final = 2.0

#: Time after which a message that can not become a dead letter is delivered again, in nanoseconds.
_POSTPONED_NS: Final = 10**9

#: Shortest time between two warnings about that, in seconds.
_WARNING_SECS: Final = 60.0

#: How a pull request ended: without an answer, without a consumer or its leader, or with a next
#: message that is larger than its bytes.
_LOST, _REFUSED, _TOO_SMALL = "lost", "refused", "too small"


class Delivered(NamedTuple):
    """A message that the servers delivered to this process."""

    message: Message
    reply: str  #: subject to acknowledge it at


@dataclasses.dataclass(slots=True, eq=False)
class _Pull:
    """A pull request that the servers have."""

    name: str  #: subject that is replied to
    wanted: int
    left: int  #: messages that the servers may still send for it
    ends: float
    #: when the servers last showed that they have it, or the end of the request, if it has no
    #: heartbeats
    heard: float
    #: What its call gets; canceled when the call ends before it.
    found: asyncio.Future[list[Delivered]]
    status: str = ""  #: how it ended for its call, if not with messages


class Delivery:
    """
    Take messages of one subscriber for any number of coroutines.

    Servers serve the pull requests in their order, and calls get the messages in theirs: which
    request a message was sent for does not matter. A call that is cancelled leaves its request to
    the next call. ``fetch`` of nats-py was rejected: it offers neither ``no_wait`` nor
    ``max_bytes``, and takes a lost connection for an empty queue.
    """

    def __init__(self, own: stream.Stream, subscriber: str,
                 open_target: Callable[[str], publishing.Publishing]) -> None:
        """Initialize without pulling; ``open_target`` opens the queue of dead letters."""
        self.loop = own.connection.loop
        self._stream = own
        self._connection = own.connection
        self._subscriber = subscriber
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{own.name}.{address.durable_of(subscriber)}"
        self._entry = own.settings.entry(subscriber)
        self._open_target = open_target
        self._warned = -_WARNING_SECS
        self._is_closed = False
        # The connection that is listened at, and the subjects that its servers reply to.
        self._link: connection.Link | None = None
        self._subscription: Any = None
        self._replies: Iterator[str] = iter(())
        self._pulls: dict[str, _Pull] = {}
        # Since when calls get no answer.
        self._silent_since = math.inf
        # Messages that were neither acknowledged nor given back, by the subject to reply at; those
        # of them that no call has got yet, and those that are being acknowledged.
        self._held: dict[str, Delivered] = {}
        self._ready: list[Delivered] = []
        self._acking: set[str] = set()
        # Tasks that give messages back or up, or stop listening. A pull waits for them: otherwise
        # later messages would come first.
        self._endings: set[asyncio.Task[None]] = set()
        self._progress: asyncio.Task[None] | None = None

    # Taking

    async def take(self, timeout: float | None, max_messages: int) -> list[Delivered]:
        """Take the next messages; wait for one if there is none."""
        answered = time.monotonic()
        deadline = math.inf if timeout is None else answered + timeout
        wanted = max_messages
        while True:  # until the deadline; without one, until there is a message
            if self._endings:
                await self._settle()
            self._check_open()
            if self._ready and self._waiting() is None:
                return self._hand_out(wanted)
            try:
                pull = await self._pull(wanted, deadline)
                found = await self._wait(pull)
                self._check_open()
                if pull.status != _LOST:
                    answered, self._silent_since = time.monotonic(), math.inf
                if found:
                    return found
                if pull.status == _TOO_SMALL:
                    wanted = 1
                    continue
                if pull.status:
                    self._connection.check_rights(self._subject)
                    async with asyncio.timeout_at(deadline):
                        await asyncio.sleep(connection.PAUSE_SECS)
                        await self._stream.consumer_info(self._subscriber)
            except (UnavailableError, TimeoutError) as error:
                # A loop of short calls does not fail while the servers are away for a moment.
                self._silent_since = min(self._silent_since, answered)
                patience = self._stream.settings.wait_secs + _LOST_SECS
                if time.monotonic() >= self._silent_since + patience:
                    self._silent_since = math.inf
                    raise errors.translate(error, self._stream.settings.path) from None
            if time.monotonic() >= deadline:
                return []

    def _check_open(self) -> None:
        if self._is_closed:
            raise errors.closed(self._stream.settings.path)

    async def _listen(self, deadline: float) -> connection.Link:
        """Wait for a connection, and listen to what comes over it."""
        now = time.monotonic()
        link = self._connection.ready() or await self._connection.link(
            min(max(deadline, now + connection.PAUSE_SECS), now + _HEARTBEAT_SECS))
        self._check_open()
        if self._link is not link:
            self._link = link
            link.lost.add_done_callback(lambda _: self._end_all())
            prefix = link.client.new_inbox()
            self._replies = (f"{prefix}.{number}" for number in itertools.count())
            with contextlib.suppress(nats.errors.Error):  # the connection was lost just now
                self._subscription = await link.client.subscribe(f"{prefix}.*", cb=self._come)
        return link

    async def _pull(self, wanted: int, deadline: float) -> _Pull:
        """Make a pull request, or take one over that was left."""
        link = await self._listen(deadline)
        now = time.monotonic()
        for pull in self._pulls.values():
            if (pull.found.done() and pull.left == pull.wanted == wanted
                    and now < pull.ends <= deadline):
                pull.found = self.loop.create_future()
                return pull
        # It brings what is stored, and ends. If nothing is, it waits for one message as long as it may.
        request: dict[str, Any] = {"batch": wanted, "no_wait": True}
        secs = min(max(0.0, deadline - now), _LONGEST_PULL_SECS)
        heard = ends = now + secs
        if secs > 0:
            request["expires"] = max(1_000_000, int(secs * 1e9))
        if secs > _LOST_SECS:
            request["idle_heartbeat"] = int(_HEARTBEAT_SECS * 1e9)
            heard = now
        if wanted > 1:
            request["max_bytes"] = _MOST_BYTES // (1 + len(self._pulls))
        pull = _Pull(next(self._replies), wanted, wanted, ends, heard, self.loop.create_future())
        self._pulls[pull.name] = pull
        with contextlib.suppress(nats.errors.Error):  # the connection was lost just now
            await link.client.publish(self._subject, json.dumps(request).encode(), pull.name)
        return pull

    async def _wait(self, pull: _Pull) -> list[Delivered]:
        """Wait until a pull request is over or lost."""
        found = pull.found  # the next call that takes the request over has another one
        try:
            while not found.done():  # until the pull request was silent for _LOST_SECS
                left = pull.heard + _LOST_SECS - time.monotonic()
                await asyncio.wait((found, ), timeout=max(0.0, left))
                if left <= 0:
                    self._end(pull, _LOST)
            return found.result()
        except BaseException:
            came = found.result() if found.done() else []
            found.cancel()
            self._offer(came, None)
            raise

    async def _come(self, message: nats.aio.msg.Msg) -> None:
        now = time.monotonic()
        if message.reply:
            known = message.metadata
            one = Delivered(
                Message(message.data, known.sequence.stream, known.timestamp, known.num_delivered),
                message.reply)
            # The server serves the oldest request first.
            source = next(iter(self._pulls.values()), None)
            self._hold(one, source)
            if source is not None:
                source.heard = now
                source.left -= 1
                if not source.left:
                    self._end(source)
        elif pull := self._pulls.get(message.subject):
            pull.heard = now
            header = message.headers or {}
            status, text = header.get("Status"), header.get("Description") or ""
            if status == "409" and "MaxBytes" in text:
                self._end(pull, _TOO_SMALL)
            elif status != "100":
                self._end(pull, "" if status in ("404", "408") else _REFUSED)

    def _hold(self, one: Delivered, source: _Pull | None) -> None:
        """Note a message, and offer it to a call unless it is too old or came too often."""
        self._held[one.reply] = one
        if self._progress is None or self._progress.done():
            self._progress = self.loop.start(self._keep_in_progress())
        if self._is_closed:
            self.give_back([one])
        elif self._stream.is_expired(one.message.sent_at):
            # The server drops it a bit late.
            self._begin_ending(self.ack([one]))
        elif self._is_exhausted(one.message.attempts - 1):
            self._begin_ending(self._give_up(one, one.message.attempts - 1, NO_WORD))
        else:
            self._offer([one], source)

    def _offer(self, messages: list[Delivered], source: _Pull | None) -> None:
        """Give messages to the calls that wait, or keep them for the next one."""
        self._ready += messages
        while self._ready:  # each round gives some to a call, or ends
            first = self._waiting()
            if first is None:
                # Not given back at once: requests of cancelled calls live for _LONGEST_PULL_SECS;
                # the server would answer one of them with this message.
                self.loop.call_later(_LONGEST_PULL_SECS, self._give_ready_back)
                break
            # Wait for more only if this was sent for the call's own request. Another one was answered
            # instead of that, which may bring nothing more.
            if first is source and len(self._ready) < first.wanted:
                break
            first.found.set_result(self._hand_out(first.wanted))

    def _waiting(self) -> _Pull | None:
        """Return the pull request of the call that has waited longest."""
        return next((one for one in self._pulls.values() if not one.found.done()), None)

    def _hand_out(self, wanted: int) -> list[Delivered]:
        found, self._ready = self._ready[:wanted], self._ready[wanted:]
        return found

    def _give_ready_back(self) -> None:
        if self._waiting() is None:
            self.give_back(self._hand_out(len(self._ready)))

    def _end(self, pull: _Pull, status: str = "") -> None:
        """End a pull request, and let its call go on."""
        self._pulls.pop(pull.name, None)
        if not pull.found.done():
            pull.status = status
            pull.found.set_result(self._hand_out(pull.wanted))

    def _end_all(self) -> None:
        for pull in list(self._pulls.values()):
            self._end(pull)

    # In progress

    async def _keep_in_progress(self) -> None:
        """Send *in progress* four times in ``ack_wait``, as long as messages are held."""
        while self._held:  # as long as messages are held
            await asyncio.sleep(self._stream.settings.address.ack_wait_secs / 4)
            for index, one in enumerate(list(self._held.values()), start=1):
                link = self._connection.ready()
                if link is not None:
                    with contextlib.suppress(nats.errors.Error, OSError):
                        await link.client.publish(one.reply, b"+WPI")
                if index % _ACKS_AT_ONCE == 0:
                    # The above never yields to the loop, which writes them at once.
                    await asyncio.sleep(0)

    # Ending

    async def ack(self, messages: Sequence[Delivered]) -> None:
        """
        Acknowledge messages, and wait for the answers.

        A server notes a delivery after it was made, so a server that was killed may have forgotten
        deliveries. It ignores the acknowledgement of a message that it does not remember
        delivering. Such messages are pulled again, and acknowledged then. To raise an error was
        rejected: the work on all of them would be repeated.
        """
        deadline = self._stream.deadline()
        replies = {one.reply for one in messages}
        left = list(messages)
        self._acking |= replies
        try:
            while left:  # until the deadline, which moves on with each part that was acknowledged
                some, rest = left[:_ACKS_AT_ONCE], left[_ACKS_AT_ONCE:]
                link = await self._connection.link(deadline)
                # In order: if only the first ones arrive, the floor in _ask_again shows which. In
                # another order, it would not.
                calls = [self._ack_one(link, one, len(some), deadline) for one in some]
                answers = await asyncio.gather(*calls) if len(calls) > 1 else [await calls[0]]
                failed = [one for one, is_answered in zip(some, answers) if not is_answered]
                left = [*failed, *rest]
                if failed:
                    self._connection.check_rights(failed[0].reply)
                    if time.monotonic() >= deadline:
                        raise errors.translate(TimeoutError(), self._stream.settings.path)
                    left = await self._ask_again(left, deadline)
                else:
                    deadline = max(deadline, self._stream.deadline())
        finally:
            self._acking -= replies
            for reply in replies:
                # What was not acknowledged is delivered again.
                self._held.pop(reply, None)

    async def _ack_one(self, link: connection.Link, one: Delivered, at_once: int,
                       deadline: float) -> bool:
        """Acknowledge one message; return False if there was no answer."""
        try:
            await link.request(one.reply, b"+ACK", deadline, at_once)
        except connection.UNANSWERED:
            return False
        self._held.pop(one.reply, None)
        return True

    async def _ask_again(self, messages: list[Delivered], deadline: float) -> list[Delivered]:
        """
        Pull messages again, if the servers do not remember delivering them.

        Return the messages that are still to be acknowledged.
        """
        info = await self._stream.consumer_info(self._subscriber)
        # If the leader noted the acknowledgements and died before it answered, the floor shows it.
        # If the leader is merely slow, both figures below are high enough: nothing must be pulled.
        # If a new leader does not know our deliveries, one of the figures is too low; perhaps only
        # the second, as it may note them meanwhile, and yet act on what it knew at its election.
        floor = int(info["ack_floor"]["stream_seq"])
        messages = [one for one in messages if one.message.number > floor]
        own = {one.message.number for one in messages}
        if not own or (int(info["delivered"]["stream_seq"]) >= max(own)
                       and int(info["num_ack_pending"]) >= len(own)):
            return messages
        pulled: list[Delivered] = []
        try:
            # Until the deadline.
            while floor < max(own) and time.monotonic() < deadline:
                found = await self.take(0.0, min(len(own), max(own) - floor))
                if not found:
                    break
                pulled += found
                floor = max(one.message.number for one in found)
        finally:
            # Other calls wait for answers to their acknowledgements as well, and get them now. Only
            # messages that no call holds are delivered again. They are not given back sooner: they
            # would come back at once, before the messages that we pull.
            for one in pulled:
                if one.message.number in own:
                    self._held.pop(one.reply, None)
            self.give_back(pulled)
        return messages

    def give_back(self, messages: Sequence[Delivered], first_ns: int = 0) -> None:
        """
        Give messages back that are held, and do not wait.

        :param first_ns: after how many nanoseconds a message is delivered again that was delivered
            once; see :py:func:`persipubsub.message.retry_delay_ns`
        """
        found = [
            one for one in messages
            if one.reply not in self._acking and self._held.pop(one.reply, None) is not None
        ]
        if found:
            found.sort(key=lambda one: one.message.number)
            self._begin_ending(self._nak(found, first_ns))

    def _begin_ending(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start a task that later pulls wait for."""
        task = self.loop.start(coroutine)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _settle(self) -> None:
        """Wait until the servers have what was given back, but not for long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_NAK_SECS):
                while self._endings:  # until the timeout
                    await asyncio.wait(self._endings)

    async def nack(self, messages: Sequence[Delivered], error: BaseException | None) -> None:
        """Give messages back, or give them up after their last delivery."""
        first_ns = 0
        if error is not None:
            first_ns = int(self._entry.retry_delay_secs * 1e9)
            for one in messages:
                if self._is_exhausted(one.message.attempts) and one.reply in self._held:
                    await self._give_up(one, one.message.attempts, text_of(error))
        self.give_back(messages, first_ns)
        await self._settle()

    async def _nak(self, messages: Sequence[Delivered], first_ns: int) -> None:
        """Send -NAK, and wait for the answers; without them, ``ack_wait`` has the same effect."""
        deadline = time.monotonic() + _NAK_SECS
        with contextlib.suppress(PersipubsubError):
            link = await self._connection.link(deadline)
            calls = []
            for one in messages:
                delay_ns = retry_delay_ns(first_ns, one.message.attempts)
                what = b'-NAK {"delay": %d}' % delay_ns if delay_ns else b"-NAK"
                calls.append(link.request(one.reply, what, deadline))
            # In order: the server delivers them again in the order of the -NAKs.
            await asyncio.gather(*calls, return_exceptions=True)

    def _is_exhausted(self, deliveries: int) -> bool:
        """Tell whether these are all the deliveries that are allowed."""
        return 0 < self._entry.max_deliveries <= deliveries

    async def _give_up(self, one: Delivered, attempts: int, error: str) -> None:
        """Put a message into the queue of dead letters, and acknowledge it."""
        path, number = self._stream.settings.path, one.message.number
        try:
            if self._entry.dead_letter_queue:
                await self._put_dead_letter(one.message, attempts, error)
            else:
                _LOGGER.warning(
                    "The message %s of the queue %s was dropped for %s, which has no "
                    "dead_letter_queue, after %s deliveries: %s", number, path, self._subscriber,
                    attempts, error)
        except (PersipubsubError, errors.ApiError) as failure:
            if time.monotonic() >= self._warned + _WARNING_SECS:
                self._warned = time.monotonic()
                _LOGGER.warning(
                    "The message %s of the queue %s stays with %s, since it can not be moved into "
                    "the dead_letter_queue: %s", number, path, self._subscriber, failure)
            # It is put again under the same id.
            self._held.pop(one.reply, None)
            self._begin_ending(self._nak([one], _POSTPONED_NS))
        else:
            # Without an answer, it is delivered and put again after ack_wait.
            with contextlib.suppress(PersipubsubError):
                await self.ack([one])

    async def _put_dead_letter(self, message: Message, attempts: int, error: str) -> None:
        letter = give_up(message, self._stream.settings.key, self._subscriber, attempts, error)
        # The time tells it from the same number of a stream that was deleted and made again.
        parts = ("dead letter", self._stream.name, self._subscriber, message.number,
                 message.sent_at)
        msg_id = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape"))
        # It does not wait for room: the consumer has other messages to work on.
        await self._open_target(self._entry.dead_letter_queue).put([letter.encode()], None, 0,
                                                                   [msg_id.digest()])

    async def close(self) -> None:
        """Stop listening, and give back what is held. Calls that wait fail."""
        self._is_closed = True
        self._end_all()
        if self._subscription is not None:
            # It still receives what the server sends before it learns of the end.
            self._begin_ending(self._subscription.drain())
        self.give_back(list(self._held.values()))
        await self._settle()
        if self._progress is not None:
            self._progress.cancel()

    # Skipping

    async def take_newest(self, timeout: float | None) -> tuple[int, list[Delivered]]:
        """Take the newest message, and acknowledge all older ones; return their number."""
        count = 0
        found = await self.take(timeout, _ACKS_AT_ONCE)
        try:
            # Publishers may be faster: stop at the message that is the newest one now.
            last = int((await self._stream.state())["last_seq"]) if found else 0
            # Each round acknowledges all but one, up to the message that was the newest one above.
            while found:
                found.sort(key=lambda one: one.message.number)
                await self.ack(found[:-1])
                count += len(found) - 1
                found = found[-1:]
                if found[0].message.number >= last or not (more := await self.take(
                        0.0, _ACKS_AT_ONCE)):
                    break
                found += more
        except BaseException:
            # Those that were acknowledged are not held any more.
            self.give_back(found)
            raise
        return count, found

    async def skip_to_newest(self) -> int:
        """Acknowledge all messages but the newest one; return how many."""
        count, newest = await self.take_newest(0.0)
        await self.nack(newest, None)
        return count

    # Looking

    async def front(self) -> bytes | None:
        """Return the next message that no consumer has acknowledged or holds; None without one."""
        info = await self._stream.consumer_info(self._subscriber)
        if not info["num_ack_pending"]:
            start = int(info["delivered"]["stream_seq"]) + 1
            found = await self._stream.next_stored(stream.filters_of(info["config"]), start)
            return None if found is None else found.content
        # While others have messages, or some were given back, the server does not tell which.
        taken = await self.take(0.0, 1)
        await self.nack(taken, None)
        return taken[0].message.data if taken else None
