"""Look at messages without taking them."""

import dataclasses
import functools
import os
from collections.abc import Generator
from typing import Final

import lmdb

import persipubsub.errors
from persipubsub import _wakeup
from persipubsub._settings import Settings
from persipubsub.environment import _environment, _files
from persipubsub.maintenance import _upkeep
from persipubsub.store import _blocks, _layout, _log, _positions
from persipubsub.store._databases import Databases

#: A look ends with the message that reaches this many bytes; the next one goes on behind it.
_LOOK_BYTES: Final = 1 << 20

#: ... or after this many messages.
_LOOK_MESSAGES: Final = 1000

#: Whoever follows a queue looks at it this often whatever happens, in seconds.
_LONGEST_PAUSE_SECS: Final = 1.0


@dataclasses.dataclass(frozen=True)
class Message:
    """Hold a message that was looked at."""

    number: int  #: in its queue
    age_seconds: float  #: since it was sent
    subscribers: tuple[str, ...] | None  #: whom it was sent to; None: all of the queue
    content: bytes | None  #: None if the message is damaged


class _Look:
    """Collect messages inside of a transaction, up to a limit."""

    def __init__(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, now_ns: int,
                 limit: int) -> None:
        """
        Initialize without messages.

        :param txn: any transaction
        :param databases: handles
        :param now_ns: time on the queue's clock, in nanoseconds
        :param limit: how many messages to collect at most
        """
        self.cursor = txn.cursor(db=databases.data)
        self.audiences = _log.read_audiences(txn, databases)
        self.messages: list[Message] = []
        self._now_ns = now_ns
        self._limit = min(limit, _LOOK_MESSAGES)
        self._size = 0

    def is_full(self) -> bool:
        """
        Tell whether the limit is reached.

        :return: True if so
        """
        return len(self.messages) >= self._limit or self._size >= _LOOK_BYTES

    def add(self, found: _log.Found, number: int) -> None:
        """
        Copy a message.

        :param found: block that holds it
        :param number: of the message
        """
        first, block, value = found
        content: bytes | None = None
        try:
            content = _blocks.copy_message(value, block, number - first, number)
            self._size += len(content)
        except persipubsub.errors.CorruptMessageError:
            pass
        self.messages.append(
            Message(number=number,
                    age_seconds=max(0, self._now_ns - block.time_ns) / 1e9,
                    subscribers=self.audiences.get(block.audience),
                    content=content))


def peek(settings: Settings, subscriber: str, count: int, start: int) -> list[Message]:
    """
    Look at the next messages of a subscriber; nothing is changed, and nobody waits.

    :param settings: of the queue
    :param subscriber: its id
    :param count: how many messages at most
    :param start: number from which on to look; those in front of its position are done
    :return: messages that it still has to acknowledge, also those in flight, but none that are too
        old to be delivered
    :raise NotInitializedError: if there is no such subscriber
    """
    messages: list[Message] = []
    # No message is behind it, and a key has no room for any number.
    start = min(start, _layout.MAX_NUMBER + 1)
    with _upkeep.opened(settings, is_look=True) as environment:
        while True:
            found = environment.read(
                functools.partial(_peek,
                                  key=subscriber.encode("utf-8"),
                                  start=start,
                                  limit=count - len(messages),
                                  now_ns=environment.now_ns(),
                                  timeout_ns=settings.timeout_ns))
            messages.extend(found)
            if not found or len(messages) >= count:
                return messages
            start = found[-1].number + 1


def _peek(txn: "lmdb.Transaction[memoryview]", databases: Databases, key: bytes, start: int,
          limit: int, now_ns: int, timeout_ns: int) -> list[Message]:
    """
    Copy messages that a subscriber still has to acknowledge.

    :param txn: any transaction
    :param databases: handles
    :param key: id of the subscriber, in UTF-8
    :param start: number from which on to look
    :param limit: how many messages at most
    :param now_ns: time on the queue's clock, in nanoseconds
    :param timeout_ns: age at which messages are too old
    :return: messages, at least one if there are any
    """
    look = _Look(txn, databases, now_ns, limit)
    record = _positions.require(txn, databases, key)
    own = _positions.audiences_of(look.audiences, key)
    number = max(start, record.position)
    found = _log.seek(look.cursor, number)
    while found is not None and not look.is_full():
        first, block, _ = found
        number = max(number, first)
        end = first + block.messages
        if block.time_ns < now_ns - timeout_ns or (block.audience and block.audience not in own):
            number = max(number, end)
        while number < end and not look.is_full():
            behind = _positions.skip_ahead(txn, databases, record.ordinal, number)
            if behind == number:
                look.add(found, number)
                behind += 1
            number = behind
        found = _log.seek(look.cursor, number) if number > end else _log.following(look.cursor)
    return look.messages


def follow(settings: Settings, last: int) -> Generator[list[Message], None, None]:
    """
    Look at messages as they are sent, for ever; a look, not a subscriber.

    Messages that all their subscribers acknowledged may be deleted before they were seen: then a
    number is left out. Close the iterator to close the queue.

    :param settings: of the queue
    :param last: how many of the newest messages that are there to begin with
    :return: messages as they come, several at a time; nothing at least once a second
    """
    bell = _wakeup.Bell(os.path.join(settings.path, _files.BELL))
    try:
        with _upkeep.opened(settings) as environment, bell.prepare() as ticket:
            number = environment.read(functools.partial(_begin_of_last, last=last))
            while True:
                ticket.arm()
                messages = _read_on(environment, number)
                yield messages
                if messages:
                    number = messages[-1].number + 1
                else:
                    ticket.wait(_LONGEST_PAUSE_SECS)
    finally:
        bell.close()


def _begin_of_last(txn: "lmdb.Transaction[memoryview]", databases: Databases, last: int) -> int:
    """
    Find the newest messages.

    :param txn: any transaction
    :param databases: handles
    :param last: how many
    :return: number of the first one of them
    """
    cursor = txn.cursor(db=databases.data)
    tail = _log.read_tail(cursor)
    head = _log.head(cursor)
    if head is None or last == 0:
        return tail.next_number
    return _log.number_at_count(cursor, head.first, tail.next_number, tail.total_count - last)


def _read_on(environment: _environment.Environment, number: int) -> list[Message]:
    """
    Copy messages from a number on.

    :param environment: of the queue
    :param number: of the first message
    :return: messages; nothing if there are none
    """
    now_ns = environment.now_ns()

    def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> list[Message]:
        look = _Look(txn, databases, now_ns, _LOOK_MESSAGES)
        begin = number
        found = _log.seek(look.cursor, begin)
        while found is not None and not look.is_full():
            begin = max(begin, found.first)
            end = found.first + found.block.messages
            while begin < end and not look.is_full():
                look.add(found, begin)
                begin += 1
            found = _log.following(look.cursor)
        return look.messages

    return environment.read(work)
