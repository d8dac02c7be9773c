"""
Deliver the messages of one subscriber: pull, hold, acknowledge, give back.

The server gives a message to one consumer and expects an acknowledgement within ``ack_wait``. As
long as a message is held, the server is told that it is being worked on; when its process dies,
nobody tells it any more, and the message is delivered to another.

What does not say otherwise runs in the thread of :py:mod:`persipubsub.jetstream.loop`.
"""

import asyncio
import collections
import contextlib
import datetime
import itertools
import json
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Final, NamedTuple

import nats.aio.msg
import nats.errors
import nats.js.api

import persipubsub.errors
import persipubsub.message
from persipubsub.jetstream import address, connection, dead_letters, errors, loop, stream

#: A pull request is made again after so many seconds: it is lost with the server that has it.
_LONGEST_PULL_SECS: Final = 5.0

#: The server shows this often that it still has a pull request, in seconds.
_HEARTBEAT_SECS: Final = 0.5

#: A pull request without a sign of life for so many seconds is taken for lost.
_LOST_SECS: Final = 3 * _HEARTBEAT_SECS

#: Pull requests of a consumer that wait at the servers, which refuse what is more than 4096 in all.
_MOST_PULLS: Final = 256

#: Bytes that one consumer lets the servers send at once: they drop a connection that is 64 MiB
#: behind, and what was delivered over it is lost until ack_wait. A prime number, as a pull that is
#: used up to its last byte ends without a word, which messages of one size would come to.
_MOST_BYTES: Final = (1 << 23) - 15

#: Bytes that are taken at once, or one larger message; as from a directory.
_MOST_TAKEN_BYTES: Final = 1 << 24

#: Messages that are acknowledged at the same time: one that waits for thousands of others would be
#: acknowledged again before it is answered.
_ACKS_AT_ONCE: Final = 512

#: Messages that are skipped at the same time.
_SKIPPED_AT_ONCE: Final = 256

#: A pull request that is refused. Rejected: one of so few bytes that no message fits. It moves the
#: next message behind the others that were given back.
_REFUSED: Final = b"{"

#: A message that can not be given back within so many seconds is delivered again after ack_wait.
_NAK_SECS: Final = 2.0

#: A pull waits so long for what is given back, or as long as for a message, in seconds.
_SETTLE_SECS: Final = 0.5

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class Delivered(NamedTuple):
    """A message that the servers gave to us."""

    data: bytes
    reply: str  #: subject to acknowledge it at
    number: int  #: in the stream
    attempts: int  #: deliveries, this one included
    time_ns: int  #: when it was stored, on the clock of the servers
    arrived: float  #: on our monotonic clock


def to_delivered(data: bytes, reply: str) -> Delivered:
    """
    Read what the server writes into the reply subject of a message.

    It is ``$JS.ACK.stream.consumer.deliveries.number.order.time.pending``, where a domain and an
    account may stand in front of the stream. ``metadata`` of nats-py was rejected: it rounds the
    time.

    >>> to_delivered(b"", "$JS.ACK.Q.sub.2.7.9.1795545064100655688.3")[2:5]
    (7, 2, 1795545064100655688)
    """
    parts = reply.split(".")
    first = 4 if len(parts) == 9 else 6
    return Delivered(data=data,
                     reply=reply,
                     number=int(parts[first + 1]),
                     attempts=int(parts[first]),
                     time_ns=int(parts[first + 3]),
                     arrived=time.monotonic())


class _Taker:
    """A call that waits for messages."""

    __slots__ = ("wanted", "deadline", "messages", "request", "has_more", "is_over", "error",
                 "_woken")

    def __init__(self, wanted: int, deadline: float | None) -> None:
        self.wanted = wanted
        self.deadline = deadline  #: on the monotonic clock; None: it takes only what is there
        self.messages: list[Delivered] = []
        self.request: str | None = None  #: that was made for this call
        self.has_more = False  #: its request ended before it brought all that is there
        self.is_over = False
        self.error: BaseException | None = None
        self._woken: asyncio.Future[None] | None = None

    def finish(self, error: BaseException | None = None) -> None:
        """Let the call go on."""
        self.is_over = True
        self.error = self.error or error
        self._wake()

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def wait(self, until: float) -> None:
        """Wait until the call is over, but not longer than that, on the monotonic clock."""
        # Not asyncio.wait, which takes longer than all the rest of a call.
        own_loop = asyncio.get_running_loop()
        self._woken = own_loop.create_future()
        timer = None if until == float("inf") else own_loop.call_at(until, self._wake)
        try:
            await self._woken
        finally:
            if timer is not None:
                timer.cancel()


class _Pull:
    """A pull request that is at the servers."""

    __slots__ = ("left", "taker", "heard", "ends", "rtt")

    def __init__(self, left: int, taker: _Taker, ends: float, rtt: float) -> None:
        self.left = left  #: messages that it may still bring
        self.taker: _Taker | None = taker  #: for which it was made, unless that left
        self.heard = time.monotonic()
        self.ends = ends
        self.rtt = rtt  #: of the connection, in seconds


class Inbox:
    """
    Take what the pull requests of one consumer bring over one connection.

    The servers serve pull requests first come, first served, and so are the calls that wait: which
    request a message was for does not matter. A call that is cancelled leaves its request to the
    next one. ``fetch`` of nats-py was rejected: it knows neither ``no_wait`` nor ``max_bytes``, and
    takes a lost connection for an empty queue.
    """

    def __init__(self, link: connection.Link, subject: str, owner: "Delivery") -> None:
        """Initialize without listening."""
        self.link = link
        self.heard = time.monotonic()
        self.pulls: dict[str, _Pull] = {}
        self.is_retired = False
        self._subject = subject
        self._owner = owner
        self._prefix = link.client.new_inbox()
        self._tokens = itertools.count()
        self._subscription: Any = None

    async def listen(self) -> "Inbox":
        """Begin to listen."""
        self._subscription = await self.link.client.subscribe(f"{self._prefix}.*", cb=self._come)
        return self

    async def pull(self, taker: _Taker, **request: Any) -> None:
        """Make a pull request for a call."""
        name = f"{self._prefix}.{next(self._tokens)}"
        ends = time.monotonic() + request.get("expires", 0) / 1e9
        self.pulls[name] = _Pull(request["batch"], taker, ends, self.link.rtt)
        if "idle_heartbeat" not in request:
            self.pulls[name].heard = ends
        taker.request = name
        await self.link.client.publish(self._subject, json.dumps(request).encode("utf-8"), name)

    async def _come(self, message: nats.aio.msg.Msg) -> None:
        self.heard = time.monotonic()
        if message.reply:
            # It counts for the oldest request.
            for name, pull in self.pulls.items():
                pull.heard = self.heard
                pull.left -= 1
                if not pull.left:
                    self._end(name, has_more=True)
                break
            one = to_delivered(message.data, message.reply)
            if not self._owner.come(one):
                await self._reject(one)
            return
        header = message.headers or {}
        status = header.get("Status") or header.get(nats.js.api.Header.STATUS)
        found = self.pulls.get(message.subject)
        if found is None:
            return  # it has ended before
        found.heard = self.heard
        if status == "100":
            return
        text = header.get("Description") or header.get(nats.js.api.Header.DESCRIPTION) or ""
        has_more = status == "409" and "MaxBytes" in text
        if status in ("404", "408") or has_more:
            self._end(message.subject, has_more)
        else:
            # Nobody leads the consumer, or there is none any more.
            self.forget(message.subject)
            self._owner.disturb()

    def _end(self, name: str, has_more: bool) -> None:
        """End a pull request, and the call that waits for its end."""
        pull = self.pulls.pop(name)
        taker = pull.taker
        if taker is None or taker.request != name:
            return
        taker.request = None
        if taker.deadline is None:
            taker.has_more = has_more
            # The last message comes behind this.
            asyncio.get_running_loop().call_soon(taker.finish)
        elif pull.ends >= taker.deadline - 0.01 and not has_more:
            taker.finish()

    def forget(self, name: str) -> None:
        """Forget a pull request that is lost; the call that it was made for makes another one."""
        pull = self.pulls.pop(name, None)
        if pull is not None and pull.taker is not None and pull.taker.request == name:
            pull.taker.request = None

    async def _reject(self, one: Delivered) -> None:
        """
        Give back a message that came for a call that was cancelled.

        Other requests without a call end first, or it would come to these, one after the other. The
        server may send what it had begun to send after any number of answers (PONG), but before the
        answer to a later request; as long as we are here, nats-py does not forget the subscription.
        """
        is_first = not self.is_retired
        if is_first:
            self.retire()
            await asyncio.sleep(0)
        self._owner.give_back([one])
        if is_first:
            with contextlib.suppress(*connection.UNANSWERED):
                await self.link.request(self._subject, _REFUSED, connection.FIRST_ATTEMPT_SECS)

    def retire(self) -> None:
        """Begin to stop listening, but take what comes until the server knows."""
        self.is_retired = True
        self.pulls.clear()
        self._owner.begin_ending(self._drain())

    async def _drain(self) -> None:
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._subscription.drain()


class Delivery:
    """Take messages of one subscriber for any number of coroutines."""

    def __init__(self, own: stream.Stream, subscriber: str, letters: dead_letters.Writer,
                 own_loop: loop.Loop) -> None:
        """Initialize without pulling."""
        self.loop = own_loop
        self._stream = own
        self._connection = own.connection
        self._subscriber = subscriber
        self._subject = (f"$JS.API.CONSUMER.MSG.NEXT.{own.name}."
                         f"{address.durable_of(subscriber)}")
        self._letters = letters
        self._inbox: Inbox | None = None
        self._opening: asyncio.Task[None] | None = None
        self._takers: list[_Taker] = []
        # What came and was neither acknowledged nor given back, by the subject to reply at; and
        # those of them that are being acknowledged.
        self._held: dict[str, Delivered] = {}
        self._acking: set[str] = set()
        # What gives messages back, or stops to listen. A later pull waits for it, or later messages
        # would come first.
        self._endings: set[asyncio.Task[None]] = set()
        self._tending: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._is_disturbed = self._is_closed = False
        # How many take several messages at this moment; they share the bytes on the way.
        self._batches = 0
        # Since when the consumer is missing, when the servers were heard, and when somebody
        # listened last.
        self._missing_since: float | None = None
        self._heard = self._listened = time.monotonic()

    # Taking

    async def take(self, timeout: float | None, max_messages: int) -> list[Delivered]:
        """Take the next messages; wait for one if there is none."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            await self._settle(deadline)
            found: list[Delivered] = []
            try:
                if max_messages > 1 or deadline <= time.monotonic():
                    found = await self._pull_batch(max_messages)
                if not found and deadline > time.monotonic():
                    found = await self._run(_Taker(1, deadline))
                self._listened = time.monotonic()
                found = await self._sift(found)
            except BaseException:
                self.give_back(found)
                raise
            if found or time.monotonic() >= deadline:
                return found

    async def _settle(self, deadline: float) -> None:
        """Wait until what is given back is with the servers, and check that we may pull."""
        while self._endings:
            left = max(_SETTLE_SECS, deadline - time.monotonic())
            _, late = await asyncio.wait(list(self._endings), timeout=min(left, _NAK_SECS))
            if late:
                break
        if self._is_closed:
            raise errors.closed(self._stream.settings.path)
        if not self._takers and time.monotonic() - self._listened > connection.PAUSE_SECS:
            self._heard = time.monotonic()

    async def _sift(self, found: list[Delivered]) -> list[Delivered]:
        """Leave out what is too old, or was delivered too often."""
        kept = []
        for one in found:
            if self._stream.is_expired(one.time_ns):
                # The server drops it a bit late.
                self._held.pop(one.reply, None)
                await self._tell([one], b"+ACK")
            elif self._letters.is_exhausted(one.attempts - 1):
                await self._give_up(one, one.attempts - 1, dead_letters.NO_WORD)
            else:
                kept.append(one)
        return kept

    async def _pull_batch(self, wanted: int) -> list[Delivered]:
        """Take what is there, with as many pull requests as its size needs."""
        taken: list[Delivered] = []
        found: list[Delivered] = []
        size, has_more = 0, True
        patience_secs = self._stream.settings.address.ack_wait_secs / 4
        self._batches += 1
        try:
            while has_more and len(taken) < wanted and size < _MOST_TAKEN_BYTES:
                if taken and time.monotonic() - taken[0].arrived > patience_secs:
                    break  # the caller has waited long enough for those
                link = self._connection.ready()
                limit = _MOST_BYTES // self._batches
                fitting = max(1, limit // (1 << 20 if link is None else link.client.max_payload))
                taker = _Taker(wanted - len(taken), None)
                if taker.wanted <= fitting or not found or found[-1].attempts > 1:
                    # The servers have a limit by bytes put a message that does not fit behind all
                    # others that were given back; what was never delivered comes later.
                    taker.wanted = min(taker.wanted, fitting)
                    found = await self._run(taker)
                else:
                    found = await self._run(taker, min(limit, _MOST_TAKEN_BYTES - size))
                has_more = taker.has_more
                taken += found
                size += sum(len(one.data) for one in found)
        except BaseException:
            self.give_back(taken)
            raise
        finally:
            self._batches -= 1
        return taken

    async def _run(self, taker: _Taker, max_bytes: int | None = None) -> list[Delivered]:
        """Wait for a call's messages, for the end of its request, or of its time."""
        self._takers.append(taker)
        self._tend()
        try:
            inbox = await self._open(taker.deadline)
            if inbox is None:
                return []
            if taker.deadline is not None:
                await self._request(inbox, taker)
            else:
                request: dict[str, Any] = {"batch": taker.wanted, "no_wait": True}
                if max_bytes is not None:
                    request["max_bytes"] = max_bytes
                await inbox.pull(taker, **request)
            await self._until_done(taker)
            if not taker.is_over and taker.deadline is None:
                self._connection.check_rights(self._subject)
            return taker.messages
        except nats.errors.Error:
            return taker.messages  # the connection was lost
        except BaseException:
            self.give_back(taker.messages)
            raise
        finally:
            self._takers.remove(taker)
            if self._inbox is not None and taker.request is not None:
                pull = self._inbox.pulls.get(taker.request)
                if pull is not None:
                    pull.taker = None  # for the next call

    async def _until_done(self, taker: _Taker) -> None:
        """Wait until a call is done, or nothing can come for it any more."""
        while not taker.is_over:
            now = time.monotonic()
            pull = None if self._inbox is None else self._inbox.pulls.get(taker.request or "")
            if taker.deadline is None:
                if pull is None:
                    return  # it is lost
                until = pull.heard + max(connection.FIRST_ATTEMPT_SECS, 2 * pull.rtt)
            elif pull is not None and pull.ends <= taker.deadline + 0.01:
                # A message may be on its way until the server says that it ended.
                until = taker.deadline + max(connection.FIRST_ATTEMPT_SECS, 2 * pull.rtt)
            else:
                until = taker.deadline
            if now >= until:
                return
            await taker.wait(until)
        if taker.error is not None:
            raise taker.error

    async def _open(self, deadline: float | None) -> Inbox | None:
        """Find an inbox of a connection that lives; None if there is none in time."""
        inbox = self._inbox
        if inbox is not None and not inbox.is_retired and self._connection.ready() is inbox.link:
            return inbox
        # Not cancelled with the call: one that polls would never connect to a distant server.
        if self._opening is None or self._opening.done():
            self._opening = self.loop.start(self._listen())
        settings = self._stream.settings
        left = 0.0 if deadline is None else deadline - time.monotonic()
        await asyncio.wait((self._opening, ),
                           timeout=min(max(left, connection.PAUSE_SECS), settings.wait_secs))
        if self._opening.done():
            self._opening.result()
            return self._inbox
        # Servers come back: a call that receives in a loop does not fail for a moment without them.
        self._check_heard()
        return None

    async def _listen(self) -> None:
        """Connect, and make an inbox."""
        link = await self._connection.link(self._stream.deadline())
        inbox = self._inbox
        if inbox is None or inbox.link is not link or inbox.is_retired:
            for taker in self._takers:
                taker.request = None
            self._inbox = Inbox(link, self._subject, self)
            link.losers.append(self._lose)
            await self._inbox.listen()

    def _lose(self) -> None:
        """Let calls go on that wait for what was asked over a connection that is lost."""
        for taker in self._takers:
            taker.request = None
            if taker.deadline is None:
                taker.finish()
        self._wake.set()

    def disturb(self) -> None:
        """Note that a pull request was refused."""
        self._is_disturbed = True
        for taker in self._takers:
            if taker.deadline is None and taker.request is None:
                taker.finish()
        self._wake.set()

    def come(self, one: Delivered) -> bool:
        """Take a message that came, for the first call that wants one; return False if none."""
        self._heard = time.monotonic()
        self._missing_since = None
        self._held[one.reply] = one
        for taker in self._takers:
            if not taker.is_over and len(taker.messages) < taker.wanted:
                taker.messages.append(one)
                if len(taker.messages) == taker.wanted:
                    taker.finish()
                if len(self._takers) > _MOST_PULLS:
                    self._wake.set()  # others wait for their turn to ask
                return True
        return False

    async def _request(self, inbox: Inbox, taker: _Taker) -> None:
        """Make a pull request for a call that waits, or take one over that was left."""
        now = time.monotonic()
        for name, pull in inbox.pulls.items():
            if pull.taker is None and pull.ends > now:
                pull.taker, taker.request = taker, name
                return
        assert taker.deadline is not None
        left = min(taker.deadline - now, _LONGEST_PULL_SECS)
        if len(inbox.pulls) >= _MOST_PULLS or left <= 0:
            return
        request: dict[str, Any] = {"batch": 1, "expires": max(1_000_000, int(left * 1e9))}
        if left > _LOST_SECS:
            request["idle_heartbeat"] = int(_HEARTBEAT_SECS * 1e9)
        await inbox.pull(taker, **request)

    def _check_heard(self) -> None:
        """Check that the servers were there not long ago."""
        settings = self._stream.settings
        heard = max(self._heard, 0.0 if self._inbox is None else self._inbox.heard)
        if time.monotonic() - heard > settings.wait_secs:
            raise persipubsub.errors.UnavailableError(
                f"Expected the servers of {settings.path} to deliver, but got: no answer for "
                f"{settings.wait_secs:.0f} s")

    # Tending

    def _tend(self) -> None:
        if self._tending is None or self._tending.done():
            self._tending = self.loop.start(self._keep_tending())

    async def _keep_tending(self) -> None:
        """Repair what calls wait for, and tell the servers what is at work, as long as needed."""
        # The first word comes when a message is 3/8 of ack_wait old at the latest.
        pause = self._stream.settings.address.ack_wait_secs / 4
        told = used = time.monotonic()
        while not self._is_closed and time.monotonic() - used < _LONGEST_PULL_SECS:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_HEARTBEAT_SECS, pause / 4)):
                    await self._wake.wait()
            self._wake.clear()
            now = time.monotonic()
            if self._takers or self._held:
                used = now
            if now - told >= pause:
                told = now
                await self._tell(
                    [one for one in self._held.values() if now - one.arrived > pause / 2], b"+WPI")
            if any(taker.deadline is not None for taker in self._takers):
                try:
                    await self._repair()
                except (persipubsub.errors.PersipubsubError, errors.ApiError) as error:
                    for taker in self._takers:
                        taker.finish(error)
                except connection.UNANSWERED:
                    pass  # the connection was lost just now

    async def _repair(self) -> None:
        """Make the pull requests again that were lost."""
        now = time.monotonic()
        if self._inbox is not None:
            for name, pull in list(self._inbox.pulls.items()):
                if now - pull.heard > max(_LOST_SECS, 2 * pull.rtt):
                    self._inbox.forget(name)
                    self._connection.check_rights(self._subject)
        if self._is_disturbed:
            self._is_disturbed = False
            await self._check_consumer()
            await asyncio.sleep(connection.PAUSE_SECS)
        self._check_heard()
        inbox = await self._open(now + connection.PAUSE_SECS)
        for taker in list(self._takers) if inbox is not None else ():
            if taker.deadline is not None and taker.request is None and not taker.is_over:
                assert inbox is not None
                await self._request(inbox, taker)

    async def _check_consumer(self) -> None:
        """Check that the consumer is still there, if somebody knows right now."""
        with contextlib.suppress(persipubsub.errors.UnavailableError, TimeoutError):
            async with asyncio.timeout(_HEARTBEAT_SECS):
                found = await self._stream.consumer_info(self._subscriber, confirms=False)
            if found is not None:
                self._missing_since = None
                return
            now = time.monotonic()
            self._missing_since = self._missing_since or now
            patience = (connection.RECOVERY_SECS
                        if self._connection.is_cluster else connection.REPLACED_SECS)
            if now - self._missing_since >= patience:
                raise self._stream.missing(self._subscriber)
            self._is_disturbed = True

    async def _tell(self, messages: Sequence[Delivered], what: bytes) -> None:
        """Say something about messages without waiting for an answer, if a server is there."""
        for begin in range(0, len(messages), _ACKS_AT_ONCE):
            link = self._connection.ready()
            if link is None:
                return
            for one in messages[begin:begin + _ACKS_AT_ONCE]:
                with contextlib.suppress(nats.errors.Error, OSError):
                    await link.client.publish(one.reply, what)
            # Nothing of that suspends us.
            await asyncio.sleep(0)

    # Ending

    async def ack(self, messages: Sequence[Delivered]) -> None:
        """
        Acknowledge messages, and wait until the servers have it.

        Deliveries are noted after they were made: servers that were killed may know less than they
        delivered. Such a server ignores the acknowledgement of a message that is still to be
        delivered as far as it knows. So the messages are asked for again, and acknowledged then. To
        raise an error was rejected: all that was worked on would be worked on again.
        """
        deadline = self._stream.deadline()
        patience = connection.FIRST_ATTEMPT_SECS
        replies = {one.reply for one in messages}
        left = list(messages)
        self._acking |= replies
        try:
            while left:
                some, rest = left[:_ACKS_AT_ONCE], left[_ACKS_AT_ONCE:]
                link = await self._connection.link(deadline)
                seconds = max(patience + 0.01 * len(some), 2 * link.rtt)
                seconds = max(0.05, min(seconds, deadline - time.monotonic()))
                if len(some) == 1:
                    failed = await self._ack_one(link, some[0], seconds)
                else:
                    # In order: the first one is the next that is delivered again.
                    failed = sum(
                        await asyncio.gather(*(self._ack_one(link, one, seconds) for one in some)),
                        [])
                if not failed:
                    deadline = max(deadline, self._stream.deadline())
                    patience = connection.FIRST_ATTEMPT_SECS
                    left = rest
                    continue
                self._connection.check_rights(failed[0].reply)
                if time.monotonic() >= deadline:
                    raise persipubsub.errors.UnavailableError(
                        f"Expected an answer of the servers of {self._stream.settings.path} to an "
                        f"acknowledgement, but got: none in time")
                left = await self._ask_again([*failed, *rest], deadline)
                patience = min(2 * patience, connection.LONGEST_ATTEMPT_SECS)
        finally:
            self._acking -= replies
            for reply in replies:
                # What was not acknowledged is delivered again.
                self._held.pop(reply, None)

    async def _ack_one(self, link: connection.Link, one: Delivered,
                       seconds: float) -> list[Delivered]:
        """Acknowledge one message; return it if there was no answer."""
        try:
            await link.request(one.reply, b"+ACK", seconds)
        except connection.UNANSWERED:
            return [one]
        self._held.pop(one.reply, None)
        return []

    async def _ask_again(self, messages: list[Delivered], deadline: float) -> list[Delivered]:
        """
        Let the servers deliver messages again, if they do not know that they did so already.

        Return those that are still to be acknowledged.
        """
        info = await self._stream.consumer_info(self._subscriber)
        if info is None:
            raise self._stream.missing(self._subscriber)
        # A leader that was elected just now may have noted our deliveries meanwhile, and act on
        # what it knew at its election: what it tells of both has to be asked. If it is merely slow,
        # nothing must be pulled. It may also have noted the acknowledgements, and have died before
        # it answered.
        floor = int(info["ack_floor"]["stream_seq"])
        messages = [one for one in messages if one.number > floor]
        own = {one.number for one in messages}
        if not own or (int(info["delivered"]["stream_seq"]) >= max(own)
                       and int(info["num_ack_pending"]) >= len(own)):
            return messages
        others: list[Delivered] = []
        try:
            while floor < max(own) and time.monotonic() < deadline:
                found = await self._pull_batch(min(len(own), max(own) - floor))
                if not found:
                    break
                floor = max(one.number for one in found)
                for one in found:
                    if one.number in own:
                        self._held.pop(one.reply, None)
                    else:
                        others.append(one)
        finally:
            # Others wait for an answer to their acknowledgements as well: those get it now, and
            # only what nobody has is delivered again. Not sooner: it would come back at once,
            # before what we ask for.
            self.give_back(others)
        return messages

    def give_back(self, messages: Sequence[Delivered]) -> None:
        """Let others have messages, as far as they are held. It waits for nothing."""
        found = [
            one for one in messages
            if one.reply not in self._acking and self._held.pop(one.reply, None) is not None
        ]
        if found:
            self.begin_ending(self._nak(sorted(found, key=lambda one: one.number), 0.0))

    def begin_ending(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin what a later pull waits for."""
        task = self.loop.start(coroutine)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        return task

    async def nack(self, messages: Sequence[Delivered], error: str | None) -> None:
        """Let messages be delivered again, or give them up after their last delivery."""
        rests: dict[float, list[Delivered]] = collections.defaultdict(list)
        for one in messages:
            if self._held.get(one.reply) is None:
                continue
            if error is not None and self._letters.is_exhausted(one.attempts):
                await self._give_up(one, one.attempts, error)
            else:
                self._held.pop(one.reply, None)
                rest_secs = 0.0 if error is None else self._letters.rest_secs(one.attempts)
                rests[rest_secs].append(one)
        for rest_secs, some in sorted(rests.items()):
            await asyncio.shield(self.begin_ending(self._nak(some, rest_secs)))

    async def _nak(self, messages: Sequence[Delivered], rest_secs: float) -> None:
        """Tell the servers, and wait until they know; after a while, they deliver again anyhow."""
        what = b"-NAK"
        if rest_secs:
            what += json.dumps({"delay": int(rest_secs * 1e9)}).encode("ascii")
        with contextlib.suppress(persipubsub.errors.PersipubsubError):
            link = await self._connection.link(time.monotonic() + _NAK_SECS)
            # In order: the first one is the next that is delivered again.
            await asyncio.gather(*(link.request(one.reply, what, _NAK_SECS) for one in messages),
                                 return_exceptions=True)

    async def _give_up(self, one: Delivered, deliveries: int, error: str) -> None:
        """Put a message into the queue of dead letters, and acknowledge it."""
        message = to_message(one._replace(attempts=deliveries))
        try:
            if await self._letters.write(message, error):
                await self.ack([one])
                return
        except persipubsub.errors.PersipubsubError:
            pass  # it comes again, and is put again under the same id
        if self._held.pop(one.reply, None) is not None:
            self.begin_ending(self._nak([one], dead_letters.POSTPONED_SECS))

    async def close(self) -> None:
        """Stop listening, and give back what is held. Calls that wait fail."""
        self._is_closed = True
        for taker in self._takers:
            taker.finish(errors.closed(self._stream.settings.path))
        if self._inbox is not None and not self._inbox.link.is_lost:
            self._inbox.retire()
        self.give_back(list(self._held.values()))
        while self._endings:
            await asyncio.wait(list(self._endings))
        if self._tending is not None:
            self._tending.cancel()

    # Skipping

    async def take_newest(self, timeout: float | None) -> list[Delivered]:
        """Take the newest message, and acknowledge all older ones; wait if there is none."""
        found = await self.take(timeout, 1)
        return (await self._skip(found))[1] if found else []

    async def skip_to_newest(self) -> int:
        """Acknowledge all messages but the newest one; return how many."""
        found = await self.take(0.0, _SKIPPED_AT_ONCE)
        if not found:
            return 0
        count, newest = await self._skip(found)
        await self.nack(newest, None)
        return count

    async def _skip(self, found: list[Delivered]) -> tuple[int, list[Delivered]]:
        """Acknowledge all messages that are there now but the newest one."""
        # What is published meanwhile may be too fast for us to come to an end.
        count = 0
        try:
            last = int((await self._stream.state())["last_seq"])
            while True:
                found.sort(key=lambda one: one.number)
                await self.ack(found[:-1])
                count += len(found) - 1
                found = found[-1:]
                if found[0].number >= last:
                    break
                more = await self.take(0.0, _SKIPPED_AT_ONCE)
                if not more:
                    break
                found += more
        except BaseException:
            # The server knows of those that were acknowledged already.
            self.give_back(found)
            raise
        return count, found

    # Looking

    async def front(self) -> bytes | None:
        """Find the next message that nobody acknowledged or has; None if there is none."""
        info = await self._stream.consumer_info(self._subscriber)
        if info is None:
            raise self._stream.missing(self._subscriber)
        if not info["num_ack_pending"]:
            start = int(info["delivered"]["stream_seq"]) + 1
            while True:
                found = await self._stream.next_stored(stream.filters_of(info["config"]), start)
                if found is None or not self._stream.is_expired(found.time_ns):
                    return None if found is None else found.data
                start = found.number + 1
        # While others have messages, or some were given back, the server does not tell which.
        taken = await self.take(0.0, 1)
        await self.nack(taken, None)
        return taken[0].data if taken else None


def to_message(one: Delivered) -> persipubsub.message.Message:
    """Tell what is known of a message."""
    return persipubsub.message.Message(data=one.data,
                                       number=one.number,
                                       sent_at=_EPOCH +
                                       datetime.timedelta(microseconds=one.time_ns // 1000),
                                       attempts=one.attempts)
