"""
Find, copy and acknowledge the messages of one subscriber, inside of a transaction.

What is pending for a subscriber is what lies at or behind its position, is addressed to it, and was
not acknowledged ahead.
"""

from typing import Callable, Dict, Final, List, NamedTuple, Tuple, Union

import lmdb

import persipubsub.errors
from persipubsub.store import _blocks, _layout, _log, _positions
from persipubsub.store._databases import Databases

#: A batch ends with the block that reaches this many bytes, however many messages were asked for.
_BATCH_BYTES: Final = 1 << 24


class Candidate(NamedTuple):
    """Hold a message that could be claimed."""

    begin: int  #: everything from here to the message is done or not for the subscriber
    number: int


class Expired(NamedTuple):
    """Say that the next message is too old."""


class Pending:
    """
    Look at the messages of one subscriber. It may be used by many threads at the same time.

    It keeps nothing of a transaction but which audiences the subscriber belongs to; these never
    change.
    """

    def __init__(self, subscriber: str, timeout_ns: int, now_ns: Callable[[], int]) -> None:
        """
        Initialize without looking.

        :param subscriber: its id
        :param timeout_ns: age at which messages are too old, in nanoseconds
        :param now_ns: reads the queue's clock
        """
        self.key = subscriber.encode("utf-8")
        self.ordinal = -1
        self._timeout_ns = timeout_ns
        self._now_ns = now_ns
        self._audiences = {}  # type: Dict[int, bool]

    def find(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
             start: int) -> Union[Candidate, Expired, None]:
        """
        Find the next message that is pending.

        :param txn: any transaction
        :param databases: handles
        :param start: where to begin; in front of the position: at the position
        :return: message; that it is too old; None if there is none
        """
        subscriber = _positions.require(txn, databases, self.key)
        begin = number = max(start, subscriber.position)
        cursor = txn.cursor(db=databases.data)
        found = _log.seek(cursor, number)
        while found is not None:
            first, block, _ = found
            number = max(number, first)
            if block.messages and self._is_addressed(txn, databases, block.audience):
                if subscriber.flags:
                    number = _positions.skip_ahead(txn, databases, subscriber.ordinal, number)
                if number < first + block.messages:
                    if block.time_ns < self._now_ns() - self._timeout_ns:
                        return Expired()
                    return Candidate(begin=begin, number=number)
                begin = number
            if number > _blocks.end_of(first, block):
                found = _log.seek(cursor, number)
            else:
                found = _log.following(cursor)
        return None

    def copy_next(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
                  start: int) -> Union[Tuple[int, bytes], Expired, None]:
        """
        Copy the next message that is pending.

        :param txn: any transaction
        :param databases: handles
        :param start: where to begin
        :return: number and message; that it is too old; None if there is none
        """
        candidate = self.find(txn, databases, start=start)
        if candidate is None or isinstance(candidate, Expired):
            return candidate
        found = _log.seek(txn.cursor(db=databases.data), candidate.number)
        assert found is not None, "The message was found in the same snapshot."
        return candidate.number, _blocks.copy_message(found.value, found.block,
                                                      candidate.number - found.first,
                                                      candidate.number)

    def _is_addressed(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
                      audience: int) -> bool:
        """
        Tell whether messages are for the subscriber.

        :param txn: any transaction
        :param databases: handles
        :param audience: of the messages
        :return: True if they are
        """
        if audience == _layout.EVERYONE:
            return True
        known = self._audiences.get(audience)
        if known is None:
            identifier = self.key.decode("utf-8")
            self._audiences = {
                key: identifier in members
                for key, members in _log.read_audiences(txn, databases).items()
            }
            known = self._audiences.get(audience, False)
        return known

    def copy(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, number: int,
             end: int) -> Tuple[List[int], List[bytes]]:
        """
        Copy messages from a claimed one on, as far as they are pending.

        :param txn: any transaction
        :param databases: handles
        :param number: of the first message
        :param end: number behind the last one to look at
        :return: numbers and messages; empty if the first one is not pending
        :raise CorruptMessageError: if the first one is damaged
        """
        numbers = []  # type: List[int]
        messages = []  # type: List[bytes]
        ordinal, flags, position = _positions.require_position(txn, databases, self.key)
        if number < position:
            return numbers, messages
        if flags:
            if _positions.skip_ahead(txn, databases, ordinal, number) != number:
                return numbers, messages
            end = min(end, _positions.next_range(txn, databases, ordinal, number))

        oldest_ns = self._now_ns() - self._timeout_ns
        size = 0
        cursor = txn.cursor(db=databases.data)
        found = _log.seek(cursor, number)
        if found is None or number < found.first:
            return numbers, messages
        if number + 1 == end:
            # The loop below would do, and takes twice as long for a single message.
            first, block, value = found
            if (number >= first + block.messages or block.time_ns < oldest_ns
                    or not self._is_addressed(txn, databases, block.audience)):
                return numbers, messages
            return [number], [_blocks.copy_message(value, block, number - first, number)]
        while found is not None and found.first < end and size < _BATCH_BYTES:
            first, block, value = found
            begin, stop = max(number - first, 0), min(end - first, block.messages)
            if block.time_ns < oldest_ns:
                break
            if begin < stop and self._is_addressed(txn, databases, block.audience):
                copied = _copy_run(value, block, first, begin, stop, bool(messages))
                numbers.extend(range(first + begin, first + begin + len(copied)))
                messages.extend(copied)
                if len(copied) < stop - begin:
                    break
                size += _blocks.size_before(value, block, stop)
            elif not messages:
                break
            found = _log.following(cursor) if first + block.messages < end else None
        return numbers, messages

    def acknowledge(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, begin: int,
                    numbers: List[int]) -> int:
        """
        Move the position over messages, or add a range ahead of it.

        :param txn: write transaction
        :param databases: handles
        :param begin: everything from here to the first message is done or not for the subscriber
        :param numbers: of the messages
        :return: number of the next message if there seems to be one; 0 otherwise
        """
        value = txn.get(self.key, db=databases.pending)
        if value is None:
            # The subscriber was removed meanwhile.
            return 0
        in_order = _layout.acknowledge_in_order(value, self.ordinal, numbers, self._now_ns())
        if in_order is not None:
            position = numbers[-1] + 1
            txn.put(self.key, in_order, db=databases.pending)
        else:
            position = self._acknowledge_out_of_order(txn, databases, begin, numbers)
        cursor = txn.cursor(db=databases.data)
        if cursor.last() and _layout.unpack_number(cursor.key()) >= position:
            return position
        return 0

    def _acknowledge_out_of_order(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
                                  begin: int, numbers: List[int]) -> int:
        """
        Acknowledge messages in any state of the subscriber.

        :param txn: write transaction
        :param databases: handles
        :param begin: everything from here to the first message is done or not for the subscriber
        :param numbers: of the messages
        :return: position afterwards
        """
        subscriber = _positions.require(txn, databases, self.key)
        if subscriber.ordinal != self.ordinal:
            # It was removed and added again: another subscriber of the same name.
            return subscriber.position
        count = self._count_pending(txn, databases, subscriber, numbers)
        moved, _ = _positions.acknowledge(txn, databases, subscriber, begin, numbers[-1] + 1)
        if count:
            moved = moved._replace(acknowledged=moved.acknowledged + count,
                                   acknowledged_ns=self._now_ns())
        if moved != subscriber:
            _positions.write(txn, databases, self.key, moved)
        return moved.position

    @staticmethod
    def _count_pending(txn: "lmdb.Transaction[memoryview]", databases: Databases,
                       subscriber: _layout.Subscriber, numbers: List[int]) -> int:
        """
        Count the messages that were neither dropped nor skipped while they were being worked on.

        :param txn: any transaction
        :param databases: handles
        :param subscriber: its record
        :param numbers: of the messages
        :return: how many are still pending
        """
        cursor = txn.cursor(db=databases.data)
        count = 0
        for number in numbers:
            if number < subscriber.position:
                continue
            found = _log.seek(cursor, number)
            if found is not None and found.first <= number < found.first + found.block.messages:
                count += _positions.skip_ahead(txn, databases, subscriber.ordinal, number) == number
        return count

    def set_aside(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, begin: int,
                  number: int) -> None:
        """
        Acknowledge a damaged message.

        :param txn: write transaction
        :param databases: handles
        :param begin: everything from here to the message is done or not for the subscriber
        :param number: of the message
        """
        subscriber = _positions.require(txn, databases, self.key)
        moved, fresh = _positions.acknowledge(txn, databases, subscriber, begin, number + 1)
        if fresh:
            _positions.write(txn, databases, self.key, moved._replace(corrupt=moved.corrupt + 1))

    def count_failure(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
                      count: int) -> None:
        """
        Count deliveries that ended with an exception.

        :param txn: write transaction
        :param databases: handles
        :param count: how many
        """
        subscriber = _positions.read(txn, databases, self.key)
        if subscriber is not None and subscriber.ordinal == self.ordinal:
            _positions.write(txn, databases, self.key,
                             subscriber._replace(failed=subscriber.failed + count))


def _copy_run(value: memoryview, block: _blocks.Block, first: int, begin: int, stop: int,
              may_be_empty: bool) -> List[bytes]:
    """
    Copy messages of one block, up to the first damaged one.

    :param value: of the block
    :param block: its record
    :param first: number of the block's first message
    :param begin: index of the first message to copy
    :param stop: index behind the last message to copy
    :param may_be_empty: True if messages of other blocks go before
    :return: messages
    :raise CorruptMessageError: if the first message of a lease is damaged
    """
    if stop - begin == 1 and not may_be_empty:
        return [_blocks.copy_message(value, block, begin, first + begin)]
    try:
        return _blocks.copy_messages(value, block, first, begin, stop)
    except persipubsub.errors.CorruptMessageError as error:
        if error.number == first + begin:
            if may_be_empty:
                return []
            raise
        return _blocks.copy_messages(value, block, first, begin, error.number - first)
