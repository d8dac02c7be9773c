"""
Publish messages, and make room where a high-water mark is reached.

All of it runs in the thread of :py:mod:`persipubsub.jetstream.loop`.
"""

import asyncio
import hashlib
import itertools
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NoReturn

import persipubsub.drop_log
import persipubsub.errors
from persipubsub.jetstream import address, connection, errors, stream

#: Messages of a batch are published in groups of so many messages and bytes, each written to the
#: socket at once.
_GROUP_MESSAGES: Final = 512
_GROUP_BYTES: Final = 1 << 20

#: An answer to one of many messages is waited for that much longer for each of them, in seconds.
_EACH_SECS: Final = 0.01

#: Calls that are under way at the same time: a message that waits for a thousand others would be
#: published again before it is answered.
_AT_ONCE: Final = 256

#: What a message takes beside its bytes, its subject and the values of its headers, at most, in
#: bytes: its record in the server's files (34 with 2.10.27) and the names of the headers (51).
_FRAME_BYTES: Final = 96

#: Headers that the server counts as a part of the message, at most, in bytes.
_HEADER_BYTES: Final = 192

#: How often a full queue is looked at by a publisher that waits for room, in seconds.
_FIRST_LOOK_SECS: Final = 0.01
_LONGEST_LOOK_SECS: Final = 0.25


class _Turn:
    """The right to write the next messages, as long as the block or until the turn is ended."""

    def __init__(self, order: asyncio.Lock, patience: Callable[[], float], path: str) -> None:
        self._order = order
        self._patience = patience
        self._path = path
        self._is_held = False

    async def __aenter__(self) -> "_Turn":
        while not self._is_held:
            try:
                async with asyncio.timeout_at(self._patience()):
                    self._is_held = await self._order.acquire()
            except TimeoutError as error:
                if time.monotonic() >= self._patience():
                    raise errors.translate(error, self._path) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Let the next call be served; it may be ended twice."""
        if self._is_held:
            self._is_held = False
            self._order.release()


class _Item:
    """One message that is to be stored once."""

    def __init__(self, subject: str, data: bytes, msg_id: str, stream_name: str) -> None:
        self.subject = subject
        self.data = data
        self.headers = {"Nats-Msg-Id": msg_id, "Nats-Expected-Stream": stream_name}
        self.is_refused = False  #: the queue was full
        #: Over which it was published last; None if it was not.
        self.link: connection.Link | None = None
        #: In the stream, a few more bytes than the server counts.
        self.size = len(data) + len(subject) + len(stream_name) + len(msg_id) + _FRAME_BYTES


class Publishing:
    """Put messages into one stream."""

    def __init__(self, own: stream.Stream) -> None:
        """Initialize without publishing anything."""
        self._stream = own
        self._settings = own.settings
        self._connection = own.connection
        # Held while messages are written, and by what has to publish some again: messages are in
        # the order of the calls.
        self._order = asyncio.Lock()
        self._unique = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._window_secs = float(own.settings.stream_config()["duplicate_window"]) / 1e9
        self._calls = asyncio.Semaphore(_AT_ONCE)
        # When the servers answered to a message last, on the monotonic clock.
        self._answered = 0.0
        # Guards the making of room: coroutines that find the queue full at once prune it once.
        self._room = asyncio.Lock()
        self.drops = persipubsub.drop_log.DropLog(own.settings.path)

    async def put(self, messages: Sequence[bytes], recipients: tuple[str, ...] | None,
                  timeout: float | None, msg_ids: Sequence[bytes | None] | None) -> int:
        """Publish messages, in order; return the number of the first one."""
        begin = time.monotonic()
        until = None if timeout is None else begin + timeout

        def patience() -> float:
            # Behind others that are served, the servers are not away.
            return self._deadline(max(begin, self._answered))

        async with self._calls:
            async with _Turn(self._order, patience, self._settings.path) as turn:
                link = await self._connection.link(patience())
                self._check_payload(messages, link.client.max_payload)
                await self._stream.require_interest(recipients)
                subject = self._settings.subject(recipients)
                items = [
                    _Item(subject, message, self._to_id(msg_id), self._stream.name)
                    for message, msg_id in zip(messages, msg_ids or itertools.repeat(None))
                ]
                if len(items) > 1:
                    return await self._put_batch(items, until, turn)
            # Up to the moment in which the message is written, nothing suspends us.
            number = await self._attempt(items[0], connection.FIRST_ATTEMPT_SECS)
            if number is None:
                async with _Turn(self._order, patience, self._settings.path) as turn:
                    number = await self._again(items[0], until, turn)
            return number

    def _to_id(self, msg_id: bytes | None) -> str:
        """Make an id that fits into a header; no two have the same."""
        if msg_id is None:
            return f"{self._unique}.{next(self._numbers)}"
        return f"u.{hashlib.sha256(msg_id).hexdigest()}"

    async def _put_batch(self, items: Sequence[_Item], until: float | None, turn: _Turn) -> int:
        """
        Publish several messages, in order.

        Atomic batches, which servers have since 2.12, were rejected: such a server refuses a batch
        with an id that it knows, and does not tell whether the message is stored, so that nobody
        knows what became of a batch that was not answered.
        """
        size = sum(item.size for item in items)
        # Where room is scarce, others may fill the queue in between: one after the other, so that a
        # message that is refused does not come behind those that follow it.
        is_scarce = await self._make_room(len(items), size, until, turn)
        first = 0
        for some in ([item] for item in items) if is_scarce else _groups(items):
            seconds = connection.FIRST_ATTEMPT_SECS + _EACH_SECS * len(some)
            found = await asyncio.gather(*(self._attempt(item, seconds) for item in some))
            for item, number in zip(some, found):
                number = number or await self._again(item, until, turn)
                first = first or number
        return first

    def _deadline(self, begin: float | None = None) -> float:
        """Bound the wait for the servers, on the monotonic clock."""
        # A publish that is repeated later than the server remembers ids would be stored twice.
        begin = time.monotonic() if begin is None else begin
        return begin + min(self._settings.wait_secs, max(1.0, self._window_secs / 2))

    def _check_payload(self, messages: Sequence[bytes], max_payload: int) -> None:
        """Check that the server takes messages of this size; it would close the connection."""
        limit = max_payload - _HEADER_BYTES
        largest = max(map(len, messages))
        if largest > limit:
            raise persipubsub.errors.MessageTooLargeError(
                f"Expected a message of at most {limit} bytes for the queue "
                f"{self._settings.path} (max_payload of its server is {max_payload}), but got: "
                f"{largest} bytes")

    async def _attempt(self, item: _Item, seconds: float) -> int | None:
        """Publish a message once; return its number, None if it is not known to be stored."""
        link = self._connection.ready()
        if link is None:
            return None
        item.link = link
        try:
            message = await link.request(item.subject, item.data, seconds, item.headers)
        except connection.UNANSWERED:
            return None
        answer: dict[str, Any] = json.loads(message.data)
        if "error" in answer:
            error = errors.ApiError(answer["error"])
            item.is_refused = error.err_code == errors.LIMIT_REACHED
            if item.is_refused or error.is_temporary():
                return None
            raise error
        self._answered = time.monotonic()
        # 0: it is known by its id, and not stored. Its leader died in between.
        return int(answer.get("seq") or 0) or None

    async def _again(self, item: _Item, until: float | None, turn: _Turn) -> int:
        """Publish a message that may have been published before, until it is stored."""
        deadline = self._deadline()
        attempt = connection.FIRST_ATTEMPT_SECS
        is_first = True
        while True:
            if item.is_refused:
                item.is_refused = False
                if await self._make_room(1, item.size, until, turn, is_needed=True):
                    deadline = self._deadline()
                elif time.monotonic() >= deadline and not self._waits(until):
                    raise persipubsub.errors.QueueFullError(
                        f"Expected room in the queue {self._settings.path}, but got: others take "
                        f"it at once")
            elif not is_first:
                if time.monotonic() >= deadline:
                    raise persipubsub.errors.UnavailableError(
                        f"Expected an answer of the servers of {self._settings.path}, but got: "
                        f"none in time")
                await asyncio.sleep(connection.PAUSE_SECS)
            is_first = False
            self._connection.check_rights(item.subject)
            link = await self._connection.link(deadline)
            if item.link is link:
                # Before the server has read it, there is no use in publishing it again.
                await link.ping(deadline)
            if item.link is not None and self._settings.address.replicas > 1:
                await self._catch_up(deadline)
            number = await self._attempt(
                item, max(0.05, min(max(attempt, 2 * link.rtt), deadline - time.monotonic())))
            if number is not None:
                return number
            attempt = min(2 * attempt, connection.LONGEST_ATTEMPT_SECS)

    async def _catch_up(self, deadline: float) -> None:
        """
        Wait until the leader of a replicated stream knows all that was stored before.

        A server that was elected just now takes messages before it has gone through what the one
        before it stored, and does not know the ids in that yet (2.10.27: they are looked up when a
        message is proposed): a message that is published again would be stored twice. What it
        answers to a message that nobody wants, and that is not kept, comes behind all that. A pause
        was rejected: nobody knows how long.
        """
        subject = address.nobodys_subject(self._stream.name)
        attempt = connection.FIRST_ATTEMPT_SECS
        while time.monotonic() < deadline:
            link = await self._connection.link(deadline)
            try:
                # An answer to what was asked before the last time would not do.
                await link.request(subject, b"", min(attempt, deadline - time.monotonic()))
                return
            except connection.UNANSWERED:
                await asyncio.sleep(connection.PAUSE_SECS)
            attempt = min(2 * attempt, connection.LONGEST_ATTEMPT_SECS)

    # Making room

    def _waits(self, until: float | None) -> bool:
        """Tell whether room is still to be waited for."""
        return self._settings.strategy == "block" and (until is None or time.monotonic() < until)

    async def _make_room(self,
                         count: int,
                         size: int,
                         until: float | None,
                         turn: _Turn,
                         is_needed: bool = False) -> bool:
        """
        Make or wait for room for so many messages and bytes, as the strategy says.

        Return whether the room is so scarce that others could take it away; if it is needed, since
        a message was refused, whether some was made.
        """
        pause = _FIRST_LOOK_SECS
        was_made = was_finished = False
        while True:
            async with self._room:
                info = await self._stream.info()
                # Not those of our configuration: init may have lowered them meanwhile, or somebody
                # by hand, and room that the server does not see would be found for ever.
                most_messages = _limit(info["config"]["max_msgs"])
                most_bytes = _limit(info["config"]["max_bytes"])
                if count > most_messages or size > most_bytes:
                    raise persipubsub.errors.MessageTooLargeError(
                        f"Expected at most {most_messages} messages (MAX_MSGS_NUM) and "
                        f"{most_bytes} bytes (HWM_LMDB_SIZE_BYTES) at once for the queue "
                        f"{self._settings.path}, which are the limits of its stream, but got: "
                        f"{count} messages, {size} bytes with their frames and headers")
                messages, stored = info["state"]["messages"], info["state"]["bytes"]
                if not messages or (messages + count <= most_messages
                                    and stored + size <= most_bytes):
                    if is_needed:
                        if not was_made:
                            # Others made it in that moment, and may take it in the next.
                            await asyncio.sleep(_FIRST_LOOK_SECS)
                        return was_made
                    return bool(messages + 2 * count + 1000 > most_messages
                                or stored + 2 * size > most_bytes)
                was_made = True
                if self._settings.retain_ns and not was_finished:
                    was_finished = True
                    await self._stream.drop_finished()
                    continue
                if self._settings.strategy.startswith("prune"):
                    await self._prune(messages, count)
                    continue
                if not self._waits(until):
                    await self._raise_full(messages)
            # It may take for ever, and there may be room for others that send less.
            turn.end()
            await asyncio.sleep(pause if until is
                                None else max(0.001, min(pause, until - time.monotonic())))
            pause = min(2 * pause, _LONGEST_LOOK_SECS)
            was_finished = False

    async def _prune(self, messages: int, added: int) -> None:
        """Drop half of the messages, those that are to be added included."""
        # By what is to stay: if another process prunes as well, the second one does nothing.
        keep = max(0, (messages + added) // 2 - added)
        before = await self._stream.lags()
        if self._settings.strategy == "prune_last":
            await self._stream.delete_newest(messages - keep)
        else:
            await self._stream.purge(**({"keep": keep} if keep else {}))
        after = await self._stream.lags()
        lost = ((subscriber, lag - after.get(subscriber, 0)) for subscriber, lag in before.items())
        self.drops.add((subscriber, count) for subscriber, count in lost if count > 0)

    async def _raise_full(self, messages: int) -> NoReturn:
        lags = await self._stream.lags()
        slowest = max(lags, key=lambda subscriber: lags[subscriber], default="nobody")
        raise persipubsub.errors.QueueFullError(
            f"Expected room in the queue {self._settings.path} (MAX_MSGS_NUM, "
            f"HWM_LMDB_SIZE_BYTES), but got: {messages} messages wait in it, "
            f"{lags.get(slowest, 0)} of them for {slowest!r}")


def _groups(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    """Cut a batch into what is written at once."""
    begin = size = 0
    for index, item in enumerate(items):
        if index > begin and (index - begin >= _GROUP_MESSAGES
                              or size + len(item.data) > _GROUP_BYTES):
            yield items[begin:index]
            begin, size = index, 0
        size += len(item.data)
    yield items[begin:]


def _limit(found: int) -> float:
    """Read a limit of a stream: infinity if there is none."""
    return found if found > 0 else math.inf
