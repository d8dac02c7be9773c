"""
Publish messages, and make room where a high-water mark is reached.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import hashlib
import math
import time
import uuid
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn

import persipubsub.errors
from persipubsub import _losses
from persipubsub.jetstream import _address, _errors, _settings, _stream
from persipubsub.store import _retention

#: Messages of a batch are published in groups of so many messages and bytes, each written to the
#: socket at once: a lost connection leaves the beginning of a group, so that the order stays.
_GROUP_MESSAGES: Final = 512
_GROUP_BYTES: Final = 1 << 20

#: What a message takes beside its bytes, its subject and the values of its headers, at most, in
#: bytes: its record in the server's files (34 with 2.10.27) and the names of the headers (51).
_FRAME_BYTES: Final = 96

#: Headers that the server counts as a part of the message, at most, in bytes.
_HEADER_BYTES: Final = 192

#: How often a full queue is looked at by somebody who waits for room, in seconds.
_FIRST_LOOK_SECS: Final = 0.01
_LONGEST_LOOK_SECS: Final = 0.25


class _Room(NamedTuple):
    """Say what was found and done where a queue was looked at."""

    is_scarce: bool  #: it is so full that others could take the room away
    was_made: bool  #: messages were dropped for it, or it was waited for


class _Turn:
    """Hold the lock that keeps calls in their order, as long as the block or until it is ended."""

    def __init__(self, order: asyncio.Lock) -> None:
        """
        Initialize without the lock.

        :param order: to be held
        """
        self._order = order
        self._is_held = False

    async def __aenter__(self) -> "_Turn":
        """
        Wait until it is our turn.

        :return: itself
        """
        await self._order.acquire()
        self._is_held = True
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let the next one be served."""
        self.end()

    def end(self) -> None:
        """Let the next one be served already now; it may be ended twice."""
        if self._is_held:
            self._is_held = False
            self._order.release()


class Publishing:
    """Put messages into one stream."""

    def __init__(self, stream: _stream.Stream, settings: _settings.Settings,
                 losses: _losses.LossLog) -> None:
        """
        Initialize without publishing anything.

        :param stream: of the queue
        :param settings: of the queue
        :param losses: where dropped messages are told
        """
        self._stream = stream
        self._settings = settings
        self._losses = losses
        # Guards the one below: coroutines that lose the servers at once wait for them once. Nothing
        # else is locked while it is held.
        self._catching_up = asyncio.Lock()
        self._caught_up = 0.0
        # Guards what is asked before messages are published, and the writing of batches: who has to
        # wait for an answer is not overtaken, so that messages are in the order of the calls. It is
        # taken before _room.
        self._order = asyncio.Lock()
        # When the servers answered to a message last, on the monotonic clock.
        self._answered = 0.0
        # Guards the making of room: coroutines that find the queue full at once prune it once.
        self._room = asyncio.Lock()

    async def put(self, messages: Sequence[bytes], audience: tuple[str, ...] | None,
                  timeout: float | None, msg_ids: Sequence[bytes | None] | None) -> int:
        """
        Publish messages, in order.

        :param messages: to be published
        :param audience: ids of the subscribers that get them; None for everybody
        :param timeout: how long to wait for room, in seconds; None: for ever
        :param msg_ids: given by the user, None for those without; the same is stored once within
            the server's window
        :return: number of the first message
        """
        # Before the lock: nobody waits longer for servers that are away than the first one.
        begin = time.monotonic()
        async with _Turn(self._order) as turn:
            # Behind others that are served, the servers are not away.
            deadline = self._deadline(max(begin, self._answered))
            await self._check_payload(messages, deadline)
            await self._stream.require_interest(audience, deadline)
            subject = self._settings.subject(audience)
            unique = uuid.uuid4().hex
            ids = [
                f"{unique}.{index}" if msg_id is None else _to_id(msg_id)
                for index, msg_id in enumerate(msg_ids or [None] * len(messages))
            ]
            until = None if timeout is None else begin + timeout
            if len(messages) > 1:
                return await self._put_batch(subject, messages, ids, until, turn)
        # Up to the moment in which the message is written, nothing is awaited that suspends us.
        return await self._publish(subject, messages[0], ids[0], until)

    async def _put_batch(self, subject: str, messages: Sequence[bytes], ids: Sequence[str],
                         until: float | None, turn: _Turn) -> int:
        """
        Publish several messages, in order.

        :param subject: of the messages
        :param messages: to be published
        :param ids: of the messages
        :param until: how long to wait for room, on the monotonic clock; None: for ever
        :param turn: of this call; ended as soon as all of them are written
        :return: number of the first message
        """
        size = sum(self._size_of(subject, *both) for both in zip(messages, ids))
        numbers: list[int] = []
        if (await self._make_room(len(messages), size, until, turn)).is_scarce:
            # Somebody else may fill the queue in between: one after the other, so that a message
            # that is refused does not come behind those that follow it.
            for message, one in zip(messages, ids):
                numbers.append(await self._publish(subject, message, one, until, turn))
            return numbers[0]
        for begin, end in _groups(messages):
            group = asyncio.gather(*(self._publish(subject, message, one, until, turn)
                                     for message, one in zip(messages[begin:end], ids[begin:end])))
            if end == len(messages):
                # All of them are begun by then, and write before they suspend for the first time.
                await asyncio.sleep(0)
                turn.end()
            numbers += await group
        return numbers[0]

    def _deadline(self, begin: float | None = None) -> float:
        """
        Bound the wait for the servers.

        :param begin: of the wait, on the monotonic clock; now if not given
        :return: on the monotonic clock
        """
        # A publish that is repeated later than the server remembers ids would be stored twice.
        window = float(self._settings.stream_config()["duplicate_window"]) / 1e9
        begin = time.monotonic() if begin is None else begin
        return begin + min(self._settings.wait_secs, max(1.0, window / 2))

    async def _check_payload(self, messages: Sequence[bytes], deadline: float) -> None:
        """
        Check that the server takes messages of this size; it would close the connection.

        :param messages: to be published
        :param deadline: on the monotonic clock
        :raise MessageTooLargeError: if it does not
        """
        client = await self._stream.link.client(deadline)
        limit = client.max_payload - _HEADER_BYTES
        largest = max(map(len, messages))
        if largest > limit:
            raise persipubsub.errors.MessageTooLargeError(
                "Expected a message of at most {} bytes for the queue {} (max_payload of its "
                "server is {}), but got: {} bytes".format(limit, self._settings.path,
                                                          client.max_payload, largest))

    async def _publish(self,
                       subject: str,
                       message: bytes,
                       msg_id: str,
                       until: float | None,
                       turn: _Turn | None = None) -> int:
        """
        Publish one message, until it is stored or the time is over.

        :param subject: of the message
        :param message: to be published
        :param msg_id: the same one each time, so that it is stored once
        :param until: how long to wait for room, on the monotonic clock; None: for ever
        :param turn: of this call, ended before room is waited for; None if it is over
        :return: its number
        """
        headers = {"Nats-Msg-Id": msg_id, "Nats-Expected-Stream": self._stream.name}
        deadline = self._deadline()
        sent = 0.0

        async def catch_up() -> None:
            nonlocal sent
            await self._catch_up(sent, deadline)
            sent = time.monotonic()

        before = catch_up if self._settings.address.replicas > 1 else None
        while True:
            sent = time.monotonic()
            try:
                answer = await self._stream.link.ask(subject, message, deadline, headers, before)
            except _errors.ApiError as error:
                if error.err_code != _errors.LIMIT_REACHED:
                    raise
                size = self._size_of(subject, message, msg_id)
                room = await self._make_room(1, size, until, turn)
                if room.was_made or self._waits(until):
                    deadline = self._deadline()
                elif time.monotonic() >= deadline:
                    # For ever, it would be refused where we find room.
                    raise
                if not room.was_made:
                    # Others made it in that moment, and may take it in the next.
                    await asyncio.sleep(_FIRST_LOOK_SECS)
                continue
            self._answered = time.monotonic()
            if answer.get("seq"):
                return int(answer["seq"])
            # Known by its id, and not stored: its leader died in between, and it may be lost.
            if time.monotonic() >= deadline:
                raise persipubsub.errors.UnavailableError(
                    f"Expected {self._settings.path} to store a message, but got: no number for "
                    f"it in time")
            await asyncio.sleep(0.05)

    async def _catch_up(self, since: float, deadline: float) -> None:
        """
        Wait until the leader of a replicated stream knows all that was stored before.

        A server that was elected just now takes messages before it has gone through what the one
        before it stored, and does not know the ids in that yet (2.10.27: they are looked up when a
        message is proposed): a message that is published again would be stored twice. What it
        answers to a message that nobody wants, and that is not kept, comes behind all that. A pause
        was rejected: nobody knows how long.

        :param since: when a message was published last that is to be published again, on the
            monotonic clock
        :param deadline: on the monotonic clock
        :raise UnavailableError: if no server answers in time
        """
        async with self._catching_up:
            if self._caught_up < since:
                begin = time.monotonic()
                await self._stream.link.request(_address.nobodys_subject(self._stream.name),
                                                b"",
                                                deadline,
                                                takes_late=False)
                self._caught_up = begin

    # Making room

    def _size_of(self, subject: str, message: bytes, msg_id: str) -> int:
        """
        Tell what a message takes in the stream.

        :param subject: of the message
        :param message: its bytes
        :param msg_id: of the message
        :return: in bytes, a few more than the server counts
        """
        return len(message) + len(subject) + len(self._stream.name) + len(msg_id) + _FRAME_BYTES

    def _waits(self, until: float | None) -> bool:
        """
        Tell whether room is still to be waited for.

        :param until: how long to wait, on the monotonic clock; None: for ever
        :return: False if the time is over, or nobody waits by the strategy
        """
        return self._settings.strategy == "block" and (until is None or time.monotonic() < until)

    async def _make_room(self, count: int, size: int, until: float | None,
                         turn: _Turn | None) -> _Room:
        """
        Make or wait for room, as the strategy says. If there is room it does nothing.

        :param count: of messages to come
        :param size: of them in the stream, in bytes
        :param until: how long to wait for room, on the monotonic clock; None: for ever
        :param turn: of this call, ended before room is waited for; None if it is over
        :return: what there is then
        :raise MessageTooLargeError: if there is not enough even in the empty queue
        """
        pause = _FIRST_LOOK_SECS
        was_made = False
        while True:
            async with self._room:
                info = await self._stream.info(self._deadline())
                # Not those of our configuration: init may have lowered them meanwhile, or somebody
                # by hand, and room that the server does not see would be found for ever.
                limits = info["config"]
                most_messages, most_bytes = _limit(limits["max_msgs"]), _limit(limits["max_bytes"])
                self._check_fits(count, size, most_messages, most_bytes)
                messages, stored = info["state"]["messages"], info["state"]["bytes"]
                if not messages or (messages + count <= most_messages
                                    and stored + size <= most_bytes):
                    return _Room(is_scarce=(messages + 2 * count + 1000 > most_messages
                                            or stored + 2 * size > most_bytes),
                                 was_made=was_made)
                was_made = True
                if self._settings.strategy.startswith("prune"):
                    await self._prune(messages)
                    continue
                if not self._waits(until):
                    await self._raise_full(messages)
            if turn is not None:
                # It may take for ever, and there may be room for others that send less.
                turn.end()
            await asyncio.sleep(pause if until is
                                None else max(0.001, min(pause, until - time.monotonic())))
            pause = min(2 * pause, _LONGEST_LOOK_SECS)

    def _check_fits(self, count: int, size: int, most_messages: float, most_bytes: float) -> None:
        """
        Check that the stream could hold messages if it were empty.

        :param count: of messages
        :param size: of them in the stream, in bytes
        :param most_messages: that the server lets it hold
        :param most_bytes: that the server lets it hold
        :raise MessageTooLargeError: if it could not
        """
        if count > most_messages or size > most_bytes:
            raise persipubsub.errors.MessageTooLargeError(
                "Expected at most {} messages (MAX_MSGS_NUM) and {} bytes (HWM_LMDB_SIZE_BYTES) at "
                "once for the queue {}, which are the limits of its stream, but got: {} messages, "
                "{} bytes with their frames and headers".format(most_messages, most_bytes,
                                                                self._settings.path, count, size))

    async def _prune(self, messages: int) -> None:
        """
        Drop half of the messages.

        :param messages: how many there are
        """
        deadline = self._deadline()
        before = await self._stream.lags(deadline)
        if self._settings.strategy == "prune_last":
            await self._stream.delete_newest(messages - messages // 2, deadline)
        else:
            # By what is to stay: if another process prunes as well, the second one does nothing.
            keep = messages // 2
            await self._stream.purge(deadline, **({"keep": keep} if keep else {}))
        after = await self._stream.lags(deadline)
        self._losses.add([
            _retention.Loss(subscriber, lag - after.get(subscriber, 0))
            for subscriber, lag in before.items() if lag > after.get(subscriber, 0)
        ])

    async def _raise_full(self, messages: int) -> NoReturn:
        """
        Tell that the queue is full, and who is behind.

        :param messages: how many there are
        :raise QueueFullError: always
        """
        lags: dict[str, int] = await self._stream.lags(self._deadline())
        slowest = max(lags, key=lambda subscriber: lags[subscriber], default="nobody")
        raise persipubsub.errors.QueueFullError(
            "Expected room in the queue {} (MAX_MSGS_NUM, HWM_LMDB_SIZE_BYTES), but got: {} "
            "messages wait in it, {} of them for {!r}".format(self._settings.path, messages,
                                                              lags.get(slowest, 0), slowest))


def _groups(messages: Sequence[bytes]) -> list[tuple[int, int]]:
    """
    Cut a batch into what is written at once.

    :param messages: of the batch
    :return: index of the first message of each group, and of the one behind it
    """
    groups = []
    begin = size = 0
    for index, message in enumerate(messages):
        if index > begin and (index - begin >= _GROUP_MESSAGES
                              or size + len(message) > _GROUP_BYTES):
            groups.append((begin, index))
            begin, size = index, 0
        size += len(message)
    groups.append((begin, len(messages)))
    return groups


def _limit(found: int) -> float:
    """
    Read a limit of a stream.

    :param found: as the server tells it
    :return: limit; infinity if there is none
    """
    return found if found > 0 else math.inf


def _to_id(msg_id: bytes) -> str:
    """
    Make what a user gave fit into a header.

    :param msg_id: any bytes
    :return: no two of them have the same
    """
    return f"u.{hashlib.sha256(msg_id).hexdigest()}"
