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
import datetime
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple

import nats.aio.msg
import nats.errors

from persipubsub.errors import PersipubsubError, UnavailableError
from persipubsub.jetstream import address, connection, errors, publishing, stream
from persipubsub.message import NO_WORD, Message, give_up, retry_delay_ns

_LOGGER = logging.getLogger("persipubsub.queue")

#: Time after which a pull request expires, in seconds, because it is lost when its server dies.
_LONGEST_PULL_SECS: Final = 5.0

#: Interval of the heartbeats by which a server shows that it has a pull request, in seconds.
_HEARTBEAT_SECS: Final = 0.5

#: Time without a heartbeat after which a pull request may be lost, in seconds.
_LOST_SECS: Final = 3 * _HEARTBEAT_SECS

#: Bytes of all pull requests that wait at a time, or one larger message. Servers drop a connection
#: that is 64 MiB behind, and its messages are delivered again only after ack_wait. The number is
#: prime: messages of one size do not use it up exactly, which would end a request without a status.
_MOST_BYTES: Final = (1 << 23) - 15

#: Messages that are acknowledged at the same time: one that waits for thousands of others would be
#: acknowledged again before it is answered.
_ACKS_AT_ONCE: Final = 512

#: Longest wait for the answer to a -NAK, in seconds: afterwards ack_wait has the same effect.
_NAK_SECS: Final = 2.0

#: Longest wait of a pull until the server has what was given back, in seconds.
_SETTLE_SECS: Final = 1.0

#: Time after which a message that can not become a dead letter is delivered again, in nanoseconds.
_POSTPONED_NS: Final = 10**9

#: Shortest time between two warnings about that, in seconds.
_WARNING_SECS: Final = 60.0


class Delivered(NamedTuple):
    """A message that the servers delivered to this process."""

    data: bytes
    reply: str  #: subject to acknowledge it at
    number: int  #: in the stream
    attempts: int  #: deliveries, this one included
    sent_at: datetime.datetime  #: on the clock of the servers


@dataclasses.dataclass(slots=True, eq=False)
class _Pull:
    """A pull request, and the messages for the call that made it."""

    name: str
    wanted: int
    left: int  #: messages that the servers may still send for it
    ends: float
    #: when the servers last showed that they have it, or the end of the request, if it has no
    #: heartbeats
    heard: float
    messages: list[Delivered] = dataclasses.field(default_factory=list)
    is_over: bool = False
    is_left: bool = False  #: its call ended before it
    is_refused: bool = False
    is_too_small: bool = False  #: the next message is larger than its bytes
    woken: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let its call look again."""
        if self.woken is not None and not self.woken.done():
            self.woken.set_result(None)

    async def wait(self, until: float) -> None:
        """Wait until it is woken, but not longer than that, on the monotonic clock."""
        self.woken = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self.woken


class Inbox:
    """
    Make the pull requests of one consumer over one connection, and hand out the messages.

    Servers serve the requests in their order, and calls get the messages in theirs: which request a
    message was sent for does not matter. A call that is cancelled leaves its request to the next
    call. ``fetch`` of nats-py was rejected: it offers neither ``no_wait`` nor ``max_bytes``, and
    takes a lost connection for an empty queue.
    """

    def __init__(self, link: connection.Link, subject: str, owner: "Delivery") -> None:
        """Initialize without listening."""
        self.link = link
        self.pulls: dict[str, _Pull] = {}  #: by the subject that is replied to
        self._subject = subject
        self._owner = owner
        self._prefix = link.client.new_inbox()
        self._tokens = itertools.count()
        self._subscription: Any = None

    async def listen(self) -> None:
        """Begin to listen."""
        self.link.lost.add_done_callback(lambda _: self.end_all())
        with contextlib.suppress(nats.errors.Error):  # the connection was lost just now
            self._subscription = await self.link.client.subscribe(f"{self._prefix}.*",
                                                                  cb=self._come)

    async def pull(self, wanted: int, deadline: float, max_bytes: int | None) -> _Pull:
        """Make a pull request, or take one over that was left."""
        now = time.monotonic()
        for pull in self.pulls.values():
            if pull.is_left and pull.left == pull.wanted == wanted and now < pull.ends <= deadline:
                pull.is_left = pull.is_over = False
                pull.messages = []
                return pull
        # It ends when it has brought what is there. With a time, it waits for the first message.
        request: dict[str, Any] = {"batch": wanted, "no_wait": True}
        secs = min(max(0.0, deadline - now), _LONGEST_PULL_SECS)
        heard = ends = now + secs
        if secs > 0:
            request["expires"] = max(1_000_000, int(secs * 1e9))
        if secs > _LOST_SECS:
            request["idle_heartbeat"] = int(_HEARTBEAT_SECS * 1e9)
            heard = now
        if max_bytes is not None:
            request["max_bytes"] = max_bytes
        pull = _Pull(f"{self._prefix}.{next(self._tokens)}", wanted, wanted, ends, heard)
        self.pulls[pull.name] = pull
        payload = json.dumps(request).encode("utf-8")
        with contextlib.suppress(nats.errors.Error):  # the connection was lost just now
            await self.link.client.publish(self._subject, payload, pull.name)
        return pull

    async def _come(self, message: nats.aio.msg.Msg) -> None:
        now = self._owner.heard = time.monotonic()
        if message.reply:
            # The server serves the oldest request first.
            oldest = next(iter(self.pulls.values()), None)
            known = message.metadata
            self._owner.hold(
                Delivered(message.data, message.reply, known.sequence.stream, known.num_delivered,
                          known.timestamp), oldest)
            if oldest is not None:
                oldest.heard = now
                oldest.left -= 1
                if not oldest.left:
                    self.end(oldest)
        elif pull := self.pulls.get(message.subject):
            pull.heard = now
            header = message.headers or {}
            status, text = header.get("Status"), header.get("Description") or ""
            if status != "100":
                pull.is_too_small = status == "409" and "MaxBytes" in text
                # The consumer has no leader, or was removed.
                pull.is_refused = not pull.is_too_small and status not in ("404", "408")
                self.end(pull)

    def offer(self, one: Delivered, source: _Pull | None = None) -> bool:
        """Give a message to the first call that waits; False if there is none."""
        for pull in self.pulls.values():
            if not (pull.is_left or pull.is_over):
                pull.messages.append(one)
                # The message was sent for another request, so this call's own request may not end:
                # wake the call now.
                if len(pull.messages) == pull.wanted or pull is not source:
                    pull.is_over = True
                    pull.wake()
                return True
        return False

    def end(self, pull: _Pull) -> None:
        """End a pull request, and let its call go on."""
        self.pulls.pop(pull.name, None)
        pull.is_over = True
        pull.wake()

    def end_all(self) -> None:
        """End all pull requests."""
        for pull in list(self.pulls.values()):
            self.end(pull)

    async def drain(self) -> None:
        """Stop listening, but take the messages that the server sends until it knows."""
        self.end_all()
        with contextlib.suppress(nats.errors.Error, OSError):
            if self._subscription is not None:
                await self._subscription.drain()


class Delivery:
    """Take messages of one subscriber for any number of coroutines."""

    def __init__(self, own: stream.Stream, subscriber: str,
                 open_target: Callable[[str], publishing.Publishing]) -> None:
        """Initialize without pulling; ``open_target`` opens the queue of dead letters."""
        self.loop = own.connection.loop
        self.heard = time.monotonic()  #: last answer of the servers, or last time without calls
        self._stream = own
        self._connection = own.connection
        self._subscriber = subscriber
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{own.name}.{address.durable_of(subscriber)}"
        self._entry = own.settings.entry(subscriber)
        self._open_target = open_target
        self._warned = -_WARNING_SECS
        self._inbox: Inbox | None = None
        self._calls = 0  #: that wait
        # Messages that came for calls that were cancelled, by the subject to reply at.
        self._spare: dict[str, Delivered] = {}
        # Messages that were neither acknowledged nor given back, by the subject to reply at; and
        # those of them that are being acknowledged.
        self._held: dict[str, Delivered] = {}
        self._acking: set[str] = set()
        # Tasks that give messages back, or stop listening. A pull waits for them: otherwise later
        # messages would come first.
        self._endings: set[asyncio.Task[None]] = set()
        self._progress: asyncio.Task[None] | None = None
        self._is_closed = False
        self._called = self.heard  # when a call ended last

    # Taking

    async def take(self, timeout: float | None, max_messages: int) -> list[Delivered]:
        """Take the next messages; wait for one if there is none."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        taken: list[Delivered] = []
        try:
            while True:
                if self._endings:
                    await asyncio.wait(list(self._endings), timeout=_SETTLE_SECS)
                await self._pull(taken, max_messages, deadline)
                taken = await self._sift(taken)
                if taken or time.monotonic() >= deadline:
                    return taken
        except BaseException:
            for one in taken:
                self._pass_on(one)
            raise

    async def _sift(self, found: list[Delivered]) -> list[Delivered]:
        """Leave out messages that are too old, or were delivered too often."""
        kept = []
        for one in found:
            if self._stream.is_expired(one.sent_at):
                # The server drops it a bit late.
                self._held.pop(one.reply, None)
                await self._tell(one, b"+ACK")
            elif self._is_exhausted(one.attempts - 1):
                await self._give_up(one._replace(attempts=one.attempts - 1), NO_WORD)
            else:
                kept.append(one)
        return kept

    async def _pull(self, taken: list[Delivered], wanted: int, deadline: float) -> None:
        """Make pull requests until one brings messages, and add them to the list."""
        if self._spare:
            for one in sorted(self._spare.values(), key=lambda one: one.number)[:wanted]:
                taken.append(self._spare.pop(one.reply))
            return
        if not self._calls and time.monotonic() - self._called > connection.PAUSE_SECS:
            self.heard = time.monotonic()
        self._calls += 1
        max_bytes = _MOST_BYTES // self._calls if wanted > 1 else None
        pull: _Pull | None = None
        try:
            while True:
                inbox = await self._open(deadline)
                if inbox is not None:
                    pull = await inbox.pull(wanted, deadline, max_bytes)
                    await self._wait(inbox, pull, deadline)
                    self._check_open()
                    if pull.messages:
                        return
                    if pull.is_too_small:
                        wanted, max_bytes = 1, None
                        continue
                if time.monotonic() >= deadline:
                    return
                if pull is not None and pull.is_refused:
                    # The consumer has no leader at the moment, or was removed.
                    await asyncio.sleep(connection.PAUSE_SECS)
                    await self._look(deadline)
        except TimeoutError as error:
            if self._is_silent():
                raise errors.translate(error, self._stream.settings.path) from None
        finally:
            if pull is not None:
                pull.is_left = True
                taken += pull.messages
            self._calls -= 1
            self._called = time.monotonic()

    async def _wait(self, inbox: Inbox, pull: _Pull, deadline: float) -> None:
        """Wait until a pull request is over; end one that was lost."""
        while not pull.is_over:
            await pull.wait(pull.heard + _LOST_SECS)
            if not pull.is_over and time.monotonic() >= pull.heard + _LOST_SECS:
                self._connection.check_rights(self._subject)
                try:
                    await self._look(deadline)
                finally:
                    if time.monotonic() >= pull.heard + _LOST_SECS:
                        inbox.end(pull)

    async def _look(self, deadline: float) -> None:
        """Raise an error if the consumer was removed, or the servers do not answer."""
        async with asyncio.timeout_at(deadline):
            await self._stream.consumer_info(self._subscriber)

    def _is_silent(self) -> bool:
        """Tell whether the servers were silent for longer than a call waits for them."""
        patience = self._stream.settings.wait_secs + _LOST_SECS
        return time.monotonic() >= self.heard + patience

    async def _open(self, deadline: float) -> Inbox | None:
        """Return the inbox of the connection; None if there is no connection in time."""
        self._check_open()
        now = time.monotonic()
        try:
            link = self._connection.ready() or await self._connection.link(
                min(max(deadline, now + connection.PAUSE_SECS), now + _HEARTBEAT_SECS))
        except UnavailableError:
            # A loop of short calls does not fail while the servers are away for a moment.
            if self._is_silent():
                raise
            return None
        self._check_open()
        if self._inbox is None or self._inbox.link is not link:
            self._inbox = Inbox(link, self._subject, self)
            await self._inbox.listen()
        return self._inbox

    def _check_open(self) -> None:
        if self._is_closed:
            raise errors.closed(self._stream.settings.path)

    def hold(self, one: Delivered, source: _Pull | None) -> None:
        """Note a message that came for a pull request, and give it to a call."""
        self._held[one.reply] = one
        if self._progress is None or self._progress.done():
            self._progress = self.loop.start(self._keep_in_progress())
        self._pass_on(one, source)

    def _pass_on(self, one: Delivered, source: _Pull | None = None) -> None:
        """Give a message to a call that waits, or to the next one; give it back if none comes."""
        if self._is_closed:
            self.give_back([one])
        elif one.reply in self._held and not (self._inbox and self._inbox.offer(one, source)):
            # Not given back at once: requests of cancelled calls live for _LONGEST_PULL_SECS; the
            # server would answer one of them with this message.
            self._spare[one.reply] = one
            self.loop.call_later(_LONGEST_PULL_SECS, self._give_spare_back, one)

    def _give_spare_back(self, one: Delivered) -> None:
        if self._spare.pop(one.reply, None) is not None:
            self.give_back([one])

    # In progress

    async def _keep_in_progress(self) -> None:
        """Send *in progress* four times in ``ack_wait``, as long as messages are held."""
        while self._held:
            await asyncio.sleep(self._stream.settings.address.ack_wait_secs / 4)
            for index, one in enumerate(list(self._held.values()), start=1):
                await self._tell(one, b"+WPI")
                if index % _ACKS_AT_ONCE == 0:
                    # The above never yields to the loop.
                    await asyncio.sleep(0)

    async def _tell(self, one: Delivered, what: bytes) -> None:
        """Reply to a message without waiting for an answer, if there is a connection."""
        link = self._connection.ready()
        if link is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await link.client.publish(one.reply, what)

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
            while left:
                some, rest = left[:_ACKS_AT_ONCE], left[_ACKS_AT_ONCE:]
                link = await self._connection.link(deadline)
                calls = [self._ack_one(link, one, len(some), deadline) for one in some]
                # In order: if only the first ones arrive, the floor in _ask_again shows which. In
                # another order, it would not.
                answers = await asyncio.gather(*calls) if len(calls) > 1 else [await calls[0]]
                failed = [one for one, is_answered in zip(some, answers) if not is_answered]
                if not failed:
                    deadline = max(deadline, self._stream.deadline())
                    left = rest
                    continue
                self._connection.check_rights(failed[0].reply)
                if time.monotonic() >= deadline:
                    raise errors.translate(TimeoutError(), self._stream.settings.path)
                left = await self._ask_again([*failed, *rest], deadline)
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
        messages = [one for one in messages if one.number > floor]
        own = {one.number for one in messages}
        if not own or (int(info["delivered"]["stream_seq"]) >= max(own)
                       and int(info["num_ack_pending"]) >= len(own)):
            return messages
        pulled: list[Delivered] = []
        try:
            while floor < max(own) and time.monotonic() < deadline:
                before = len(pulled)
                await self._pull(pulled, min(len(own), max(own) - floor), 0.0)
                if len(pulled) == before:
                    break
                floor = max(one.number for one in pulled[before:])
        finally:
            # Other calls wait for answers to their acknowledgements as well, and get them now. Only
            # messages that no call holds are delivered again. They are not given back sooner: they
            # would come back at once, before the messages that we pull.
            for one in pulled:
                if one.number in own:
                    self._held.pop(one.reply, None)
            self.give_back(pulled)
        return messages

    def give_back(self, messages: Sequence[Delivered]) -> None:
        """Give messages back that are held, and do not wait."""
        found = [
            one for one in messages
            if one.reply not in self._acking and self._held.pop(one.reply, None) is not None
        ]
        if found:
            found.sort(key=lambda one: one.number)
            self.begin_ending(self._nak([(one, 0) for one in found]))

    def begin_ending(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that later pulls wait for."""
        task = self.loop.start(coroutine)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        return task

    async def nack(self, messages: Sequence[Delivered], error: str | None) -> None:
        """Give messages back, or give them up after their last delivery."""
        first_ns = int(self._entry.retry_delay_secs * 1e9)
        naks: list[tuple[Delivered, int]] = []
        for one in messages:
            if error is not None and self._is_exhausted(one.attempts):
                if one.reply in self._held:
                    await self._give_up(one, error)
            elif self._held.pop(one.reply, None) is not None:
                naks.append((one, 0 if error is None else retry_delay_ns(first_ns, one.attempts)))
        if naks:
            await asyncio.shield(self.begin_ending(self._nak(naks)))

    async def _nak(self, naks: Sequence[tuple[Delivered, int]]) -> None:
        """
        Send -NAK, and wait for the answers; without them, ``ack_wait`` has the same effect.

        :param naks: messages, and after how many nanoseconds each is delivered again
        """
        deadline = time.monotonic() + _NAK_SECS
        with contextlib.suppress(PersipubsubError):
            link = await self._connection.link(deadline)
            calls = []
            for one, delay_ns in naks:
                what = b'-NAK {"delay": %d}' % delay_ns if delay_ns else b"-NAK"
                calls.append(link.request(one.reply, what, deadline))
            # In order: the server delivers them again in the order of the -NAKs.
            await asyncio.gather(*calls, return_exceptions=True)

    def _is_exhausted(self, deliveries: int) -> bool:
        """Tell whether these are all the deliveries that are allowed."""
        return 0 < self._entry.max_deliveries <= deliveries

    async def _give_up(self, one: Delivered, error: str) -> None:
        """Put a message into the queue of dead letters, and acknowledge it."""
        path = self._stream.settings.path
        try:
            if self._entry.dead_letter_queue:
                await self._put_dead_letter(to_message(one), error)
            else:
                _LOGGER.warning(
                    "The message %s of the queue %s was dropped for %s, which has no "
                    "dead_letter_queue, after %s deliveries: %s", one.number, path,
                    self._subscriber, one.attempts, error)
        except (PersipubsubError, errors.ApiError) as failure:
            if time.monotonic() >= self._warned + _WARNING_SECS:
                self._warned = time.monotonic()
                _LOGGER.warning(
                    "The message %s of the queue %s stays with %s, since it can not be moved into "
                    "the dead_letter_queue: %s", one.number, path, self._subscriber, failure)
        else:
            with contextlib.suppress(PersipubsubError):
                await self.ack([one])
        # It was not acknowledged: it is delivered again, and put again under the same id.
        if self._held.pop(one.reply, None) is not None:
            self.begin_ending(self._nak([(one, _POSTPONED_NS)]))

    async def _put_dead_letter(self, message: Message, error: str) -> None:
        letter = give_up(message, self._stream.settings.key, self._subscriber, message.attempts,
                         error)
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
        if self._inbox is not None:
            self.begin_ending(self._inbox.drain())
        self.give_back(list(self._held.values()))
        while self._endings:
            await asyncio.wait(list(self._endings))
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
            while found:
                found.sort(key=lambda one: one.number)
                await self.ack(found[:-1])
                count += len(found) - 1
                found = found[-1:]
                if found[0].number >= last or not (more := await self.take(0.0, _ACKS_AT_ONCE)):
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
            while True:
                found = await self._stream.next_stored(stream.filters_of(info["config"]), start)
                if found is None or not self._stream.is_expired(found.sent_at):
                    return None if found is None else found.data
                start = found.number + 1
        # While others have messages, or some were given back, the server does not tell which.
        taken = await self.take(0.0, 1)
        await self.nack(taken, None)
        return taken[0].data if taken else None


def to_message(one: Delivered) -> Message:
    """Tell what is known of a message."""
    return Message(one.data, one.number, one.sent_at, one.attempts)
