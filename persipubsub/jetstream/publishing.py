"""
Publish messages, and make room where a high-water mark is reached.

All of it runs in the thread of :py:mod:`persipubsub.jetstream.loop`.
"""

import asyncio
import functools
import hashlib
import itertools
import json
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, Final

from persipubsub.drop_log import DropLog
from persipubsub.errors import MessageTooLargeError, QueueFullError
from persipubsub.jetstream import address, connection, errors, stream

#: Most messages and bytes of a group: a batch is published in groups, each written to the socket at
#: once.
_GROUP_MESSAGES: Final = 512
_GROUP_BYTES: Final = 1 << 20

#: Calls at the same time, at most: a message behind a thousand others would be published again
#: before it is answered.
_AT_ONCE: Final = 256

#: What a message takes beside its bytes, its subject and the values of its headers, at most, in
#: bytes: its record in the server's files (34 with 2.10.27) and the names of the headers (51).
_FRAME_BYTES: Final = 96

#: Headers that the server counts as a part of the message, at most, in bytes.
_HEADER_BYTES: Final = 192

#: A publisher that waits for room looks at these intervals, at first and at most, in seconds.
_FIRST_LOOK_SECS: Final = 0.01
_LONGEST_LOOK_SECS: Final = 0.25


class _Item:
    """One message that is to be stored once."""

    def __init__(self, subject: str, data: bytes, msg_id: str, stream_name: str) -> None:
        self.subject = subject
        self.data = data
        self.headers = {"Nats-Msg-Id": msg_id, "Nats-Expected-Stream": stream_name}
        self.number = 0  #: in the stream; 0 until the server has said that it is stored
        self.is_tried = False  #: it was published, and may be stored
        #: In the stream, a few more bytes than the server counts.
        self.size = len(data) + len(subject) + len(stream_name) + len(msg_id) + _FRAME_BYTES


class Publishing:
    """Put messages into one stream."""

    def __init__(self, own: stream.Stream) -> None:
        """Initialize without publishing anything."""
        self._stream = own
        self._settings = own.settings
        self._connection = own.connection
        # Held while a batch is published, and while a message is published again. A single message is
        # written right after it was held, before another call can go on. So messages are stored in
        # the order of the calls.
        self._order = asyncio.Lock()
        self._unique = uuid.uuid4().hex
        self._numbers = itertools.count()
        window_secs = float(own.settings.stream_config()["duplicate_window"]) / 1e9
        # How long a call waits for the servers: a publish that is repeated later than they remember
        # ids would be stored twice.
        self._wait_secs = min(own.settings.wait_secs, max(1.0, window_secs / 2))
        self._calls = asyncio.Semaphore(_AT_ONCE)
        # When the servers last answered to a message, on the monotonic clock.
        self._answered = 0.0
        self.drops = DropLog(own.settings.path)

    async def put(self, messages: Sequence[bytes], recipients: tuple[str, ...] | None,
                  timeout: float | None, msg_ids: Sequence[bytes | None] | None) -> int:
        """Publish messages, in order; return the number of the first one."""
        begin = time.monotonic()
        until = math.inf if timeout is None else begin + timeout
        subject = self._settings.subject(recipients)
        items = [
            _Item(subject, message, self._to_id(msg_id), self._stream.name)
            for message, msg_id in zip(messages, msg_ids or itertools.repeat(None))
        ]
        pause = _FIRST_LOOK_SECS
        async with self._calls:
            while True:  # until the timeout; without one, until there is room
                try:
                    await self._put(items, recipients, begin)
                    return items[0].number
                except QueueFullError:
                    left = until - time.monotonic()
                    if self._settings.strategy != "block" or left <= 0:
                        raise
                # The lock is free meanwhile: the wait may be long, and there may be room for the
                # smaller messages of other calls.
                await asyncio.sleep(max(0.001, min(pause, left)))
                pause = min(2 * pause, _LONGEST_LOOK_SECS)
                begin = time.monotonic()

    async def _put(self, items: Sequence[_Item], recipients: tuple[str, ...] | None,
                   begin: float) -> None:
        """Publish the messages that are not stored yet."""
        async with self._order:
            deadline = self._in_turn(begin)
            link = await self._connection.link(deadline)
            # Where a message is larger, the server would close the connection.
            limit = link.client.max_payload - _HEADER_BYTES
            largest = max(len(item.data) for item in items)
            if largest > limit:
                raise MessageTooLargeError(
                    f"Expected a message of at most {limit} bytes for the queue "
                    f"{self._settings.path} (max_payload of its server is "
                    f"{link.client.max_payload}), but got: {largest} bytes")
            await self._stream.require_interest(recipients)
            if len(items) > 1:
                await self._put_batch([item for item in items if not item.number], deadline)
                return
        # Nothing suspends this call before the message is written, so the order stays.
        if not items[0].is_tried:
            await self._attempt(items[0], deadline)
        if not items[0].number:
            async with self._order:
                self._in_turn(begin)
                await self._again(items[0])

    def _in_turn(self, begin: float) -> float:
        """Return the deadline for the answers of the servers; raise if it is over."""
        # Count from the last answer, not from the call, while other calls hold the lock.
        deadline = max(begin, self._answered) + self._wait_secs
        if time.monotonic() >= deadline:
            raise errors.translate(TimeoutError(), self._settings.path)
        return deadline

    def _to_id(self, msg_id: bytes | None) -> str:
        """Make an id that fits into a header: of the user's one, or one that is used once."""
        if msg_id is None:
            return f"{self._unique}.{next(self._numbers)}"
        return f"u.{hashlib.sha256(msg_id).hexdigest()}"

    async def _put_batch(self, items: Sequence[_Item], deadline: float) -> None:
        """
        Publish several messages, in order.

        The atomic batches of servers since 2.12 were rejected: a server refuses a batch that has a
        known id, and does not tell whether that message is stored. So the publisher of a batch
        without an answer could not find out what became of it.
        """
        _, is_scarce = await self._make_room(len(items), sum(item.size for item in items))
        # Where room is scarce, other publishers may fill the queue in between. Messages are then
        # sent one by one, so that a message that was refused does not come behind later ones.
        largest = max(item.size for item in items)
        at_once = 1 if is_scarce else max(1, min(_GROUP_MESSAGES, _GROUP_BYTES // largest))
        for begin in range(0, len(items), at_once):
            some = items[begin:begin + at_once]
            deadline = max(deadline, self._answered + self._wait_secs)
            await asyncio.gather(*(self._attempt(item, deadline, len(some)) for item in some
                                   if not item.is_tried))
            for item in some:
                if not item.number:
                    await self._again(item)

    async def _attempt(self, item: _Item, deadline: float, at_once: int = 1) -> bool:
        """
        Publish a message once, and note its number if it is known to be stored.

        Return whether it was refused, because the queue is full.
        """
        link = self._connection.ready()
        if link is None:
            return False
        item.is_tried = True
        try:
            message = await link.request(item.subject, item.data, deadline, at_once, item.headers)
        except connection.UNANSWERED:
            return False
        answer: dict[str, Any] = json.loads(message.data)
        if "error" in answer:
            error = errors.ApiError(answer["error"])
            if error.is_temporary():
                return False
            if error.err_code != errors.LIMIT_REACHED:
                raise error
        self._answered = time.monotonic()
        # 0: the server knows the id but has not stored the message, as its leader died in between.
        item.number = int(answer.get("seq") or 0)
        return "error" in answer

    async def _again(self, item: _Item) -> None:
        """
        Publish a message that may have been published before, until it is stored.

        A new leader accepts messages before it has read all that the leader before it stored, and
        does not know the ids in there yet (2.10.27 looks ids up when a message is proposed): a
        message that is published again would be stored twice. So a message that no consumer wants
        is published first; when it is answered, the leader has read everything. A pause was
        rejected: nobody knows how long it would have to be.
        """
        deadline = time.monotonic() + self._wait_secs
        # Until the deadline. It moves on when room was made; a message that is refused again then
        # says that another publisher has used that room.
        while True:
            if item.is_tried and self._settings.address.replicas > 1:
                await self._connection.ask(address.nobodys_subject(self._stream.name), b"",
                                           deadline)
            self._connection.check_rights(item.subject)
            await self._connection.link(deadline)
            is_refused = await self._attempt(item, deadline)
            if item.number:
                return
            if is_refused and (await self._make_room(1, item.size))[0]:
                deadline = time.monotonic() + self._wait_secs
            elif time.monotonic() < deadline:
                # If it was refused, another publisher has made room, and may use it first.
                await asyncio.sleep(_FIRST_LOOK_SECS if is_refused else connection.PAUSE_SECS)
            elif is_refused:
                raise await self._full()
            else:
                raise errors.translate(TimeoutError(), self._settings.path)

    # Making room

    async def _make_room(self, count: int, size: int) -> tuple[bool, bool]:
        """
        Make room for messages, given their number and bytes, if the strategy drops messages.

        The caller holds the lock: of several calls that find the queue full, one prunes it. Return
        whether messages were dropped, and whether other publishers could fill the room first.
        """
        was_made = False
        # Each round that drops leaves at most half of the messages, and it ends when there are none.
        while True:
            info = await self._stream.info()
            # The limits of the stream, not of our file: they may have been changed by another file
            # or by hand. By our file there might be room where the servers find none, for ever.
            most_messages = _limit(info["config"]["max_msgs"])
            most_bytes = _limit(info["config"]["max_bytes"])
            if count > most_messages or size > most_bytes:
                raise MessageTooLargeError(
                    f"Expected at most {most_messages} messages (MAX_MSGS_NUM) and "
                    f"{most_bytes} bytes (HWM_LMDB_SIZE_BYTES) at once for the queue "
                    f"{self._settings.path}, which are the limits of its stream, but got: "
                    f"{count} messages, {size} bytes with their frames and headers")
            messages, stored = info["state"]["messages"], info["state"]["bytes"]
            if not messages or (messages + count <= most_messages and stored + size <= most_bytes):
                is_scarce = (messages + 2 * count + 1000 > most_messages
                             or stored + 2 * size > most_bytes)
                return was_made, is_scarce
            if self._settings.retain_secs and not was_made:
                await self._stream.drop_finished()
            elif self._settings.strategy.startswith("prune"):
                await self._prune(messages, count)
            else:
                raise await self._full()
            was_made = True

    async def _prune(self, messages: int, added: int) -> None:
        """Drop half of the messages, counting those that are to be added."""
        # With prune_first, the servers get the number that stays: if two processes prune, the second
        # one drops nothing. With prune_last, both may drop.
        keep = max(0, (messages + added) // 2 - added)

        drop = functools.partial(self._stream.purge, keep=keep)
        if self._settings.strategy == "prune_last":
            drop = functools.partial(self._stream.delete_newest, messages - keep)
        self.drops.add((await self._stream.count_dropped(drop)).items())

    async def _full(self) -> QueueFullError:
        """Return the error of a queue that has no room, and may drop nothing."""
        messages = (await self._stream.state())["messages"]
        lags = await self._stream.lags()
        slowest = max(lags, key=lambda subscriber: lags[subscriber], default="nobody")
        return QueueFullError(f"Expected room in the queue {self._settings.path} (MAX_MSGS_NUM, "
                              f"HWM_LMDB_SIZE_BYTES), but got: {messages} messages wait in it, "
                              f"{lags.get(slowest, 0)} of them for {slowest!r}")


def _limit(found: int) -> float:
    """Read a limit of a stream: infinity if there is none."""
    return found if found > 0 else math.inf
