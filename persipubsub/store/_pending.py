"""
Find and copy the messages of one subscriber, inside of a transaction.

What is pending for a subscriber is what lies at or behind its position, is addressed to it, and was
not acknowledged ahead. Of that, a message that failed may rest until it is due again.
"""

import types
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import lmdb

import persipubsub.errors
from persipubsub.store import _attempts, _blocks, _layout, _log, _positions
from persipubsub.store._databases import Databases

#: Of messages without a record.
_NO_ATTEMPTS: Final[Mapping[int, _layout.Attempts]] = types.MappingProxyType({})

#: A batch has about as many bytes, however many messages were asked for.
BATCH_BYTES: Final = 1 << 24

#: No more blocks are copied once there are so many bytes. More than a batch is claimed for, whose
#: first and last block may be in it only in part.
_COPIED_BYTES: Final = BATCH_BYTES + _blocks.BLOCK_BYTES


class Candidate(NamedTuple):
    """Hold a message that could be claimed."""

    begin: int  #: everything from here to the message is done or not for the subscriber
    number: int
    due_ns: int  #: when the first of those in front of it that rest is due; 0 if none rests


class Resting(NamedTuple):
    """Say that there are only messages that are not due yet."""

    due_ns: int  #: when the first one is, on the queue's clock


class Expired(NamedTuple):
    """Say that the next message is too old."""


class Copied(NamedTuple):
    """Hold messages that were copied out of the store."""

    numbers: list[int]
    messages: list[bytes]
    runs: list[tuple[int, int]]  #: how many of them were committed together, and when
    attempts: Mapping[int, _layout.Attempts]  #: of those that have a record
    is_spent: bool  #: True if it is a single message that is not to be delivered any more


_NOTHING: Final = Copied([], [], [], _NO_ATTEMPTS, False)


class Pending:
    """
    Look at the messages of one subscriber. It may be used by many threads at the same time.

    It keeps nothing of a transaction that counts.
    """

    def __init__(self,
                 subscriber: str,
                 timeout_ns: int,
                 now_ns: Callable[[], int],
                 policy: _attempts.Policy = _attempts.Policy()) -> None:
        """
        Initialize without looking.

        :param subscriber: its id
        :param timeout_ns: age at which messages are too old, in nanoseconds
        :param now_ns: reads the queue's clock
        :param policy: how often a message is delivered, and how soon again
        """
        self.key = subscriber.encode("utf-8")
        self.ordinal = -1
        self.timeout_ns = timeout_ns
        self.now_ns = now_ns
        self.policy = policy
        # Whether the subscriber is in a list, by the list as it is stored. Not by its number: a
        # transaction that is taken back gives that to another list.
        self._is_in: dict[bytes, bool] = {}
        # Number behind the last message that anybody saw, so that the next ones need not look. What
        # is guessed by it is checked before it counts: messages may be gone since then.
        self.end = 0

    def find(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
             start: int) -> Candidate | Expired | Resting | None:
        """
        Find the next message that is pending, and due.

        It walks over those that are not due, so that it takes time with their number.

        :param txn: any transaction
        :param databases: handles
        :param start: where to begin; in front of the position: at the position
        :return: message; that it is too old; when one is due if none is; None if there is none
        :raise NotInitializedError: if the subscriber was removed, even if it was added again
        """
        ordinal, flags, position, _ = _positions.require_position(txn, databases, self.key)
        if ordinal != self.ordinal:
            raise self.replaced()
        begin = number = max(start, position)
        value = None if flags else txn.get(_layout.pack_number(number), None, databases.data)
        if value is not None:
            # What is below would do, and takes twice as long where nothing is in the way.
            block = _blocks.unpack_block(value, number)
            if (block.messages and block.audience == _layout.EVERYONE
                    and block.time_ns >= self.now_ns() - self.timeout_ns):
                return Candidate(begin, number, 0)
        due_ns = 0
        cursor = txn.cursor(db=databases.data)
        found = _log.seek(cursor, number)
        while found is not None:
            first, block, _ = found
            number = max(number, first)
            if block.messages and self.is_addressed(txn, databases, block.audience):
                stop = first + block.messages
                if flags:
                    number = _positions.skip_ahead(txn, databases, ordinal, number)
                if number < stop and block.time_ns < self.now_ns() - self.timeout_ns:
                    return Expired()
                if flags & _layout.FLAG_MAY_HAVE_ATTEMPTS:
                    due, resting_ns = self._skip_resting(txn, databases, ordinal, number, stop)
                    if resting_ns:
                        begin = number = due
                        due_ns = min(due_ns or resting_ns, resting_ns)
                if number < stop:
                    return Candidate(begin=begin, number=number, due_ns=due_ns)
                begin = number
            if number > _blocks.end_of(first, block):
                found = _log.seek(cursor, number)
            else:
                found = _log.following(cursor)
        return Resting(due_ns) if due_ns else None

    def _skip_resting(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, ordinal: int,
                      number: int, stop: int) -> tuple[int, int]:
        """
        Skip messages that are not due yet.

        :param txn: any transaction
        :param databases: handles
        :param ordinal: of the subscriber
        :param number: of a message that is pending
        :param stop: number behind the last one to look at
        :return: number of the first one that is pending and due, at least ``stop`` if none is; when
            the first of those that were skipped is due, 0 if none was skipped
        """
        now_ns = self.now_ns()
        due_ns = 0
        while number < stop:
            attempts = _attempts.read(txn, databases, ordinal, number)
            if attempts is None or attempts.due_ns <= now_ns:
                break
            due_ns = min(due_ns or attempts.due_ns, attempts.due_ns)
            number = _positions.skip_ahead(txn, databases, ordinal, number + 1)
        return number, due_ns

    def copy_next(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
                  start: int) -> tuple[int, bytes] | Expired | None:
        """
        Copy the next message that is pending, and due.

        :param txn: any transaction
        :param databases: handles
        :param start: where to begin
        :return: number and message; that it is too old; None if there is none
        """
        candidate = self.find(txn, databases, start=start)
        if candidate is None or isinstance(candidate, Expired):
            return candidate
        if isinstance(candidate, Resting):
            return None
        found = _log.seek(txn.cursor(db=databases.data), candidate.number)
        assert found is not None, "The message was found in the same snapshot."
        return candidate.number, _blocks.copy_message(found.value, found.block,
                                                      candidate.number - found.first,
                                                      candidate.number)

    def is_addressed(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
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
        members = bytes(txn.get(_layout.audience_key(audience), b"", db=databases.meta))
        known = self._is_in.get(members)
        if known is None:
            known = self.key.decode("utf-8") in _layout.unpack_audience(members)
            self._is_in[members] = known
        return known

    def replaced(self) -> persipubsub.errors.NotInitializedError:
        """
        Describe that another subscriber has the id now: claims and records are by its ordinal.

        :return: error to be raised
        """
        return persipubsub.errors.NotInitializedError(
            "Expected the subscriber {!r} to be the one that it was, but got: it was removed, and "
            "added again. Call init() again.".format(self.key.decode("utf-8")))

    def copy(self,
             txn: "lmdb.Transaction[memoryview]",
             databases: Databases,
             number: int,
             end: int,
             is_guess: bool = False) -> Copied:
        """
        Copy messages of a claimed range, as far as they are pending, due and to be delivered.

        Those at its beginning that others acknowledged before the claim, or that have become too
        old since then, are walked over: if the rest were given back, who passed over it meanwhile
        would receive it after later ones.

        :param txn: any transaction
        :param databases: handles
        :param number: first one of the range
        :param end: number behind the last one of the range
        :param is_guess: True if it is the next one only if the position is still there
        :return: messages; none if none is pending, or the first one that is pending is not due
        :raise CorruptMessageError: if that one is damaged
        :raise NotInitializedError: if the subscriber was removed, even if it was added again
        """
        attempts = _NO_ATTEMPTS
        is_spent = False
        ordinal, flags, position, _ = _positions.require_position(txn, databases, self.key)
        if ordinal != self.ordinal:
            raise self.replaced()
        if number < position:
            number = position
        elif is_guess and number != position:
            return _NOTHING
        if flags:
            number = _positions.skip_ahead(txn, databases, ordinal, number)
        if number >= end:
            return _NOTHING
        if flags:
            stop, attempts, is_spent = self.limit(txn, databases, flags, number, end)
            if number == stop:
                return _NOTHING
            if stop < end and not is_spent:
                return self._copy_around(txn, databases, flags, number, end)
            end = stop

        if number + 1 == end:
            # What is below would do, and takes three times as long for the message of a send.
            value = txn.get(_layout.pack_number(number), None, databases.data)
            single = None if value is None else _blocks.copy_single(value)
            if single is not None and single[0] >= self.now_ns() - self.timeout_ns:
                # Not Copied(...), which is a function of Python around just this.
                return tuple.__new__(Copied,
                                     ([number], [single[1]], [(1, single[0])], attempts, is_spent))
        copied = self._copy_found(txn, databases, number, end)
        return copied._replace(attempts=attempts, is_spent=is_spent) if copied.numbers else copied

    def _copy_around(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, flags: int,
                     number: int, end: int) -> Copied:
        """
        Copy messages of a claimed range on both sides of those that were acknowledged ahead.

        Another consumer did that between the choice of the range and the claim. What lies behind
        them is claimed already: if it were given back, who passed over it meanwhile would receive
        it after later ones.

        :param txn: any transaction
        :param databases: handles
        :param flags: of the subscriber
        :param number: of the first message, which is pending
        :param end: number behind the last one to look at
        :return: messages with what is known of their deliveries
        :raise CorruptMessageError: if the first one is damaged
        """
        found: dict[int, _layout.Attempts] = {}
        result = Copied([], [], [], found, False)
        is_behind_others = True
        while is_behind_others and number < end:
            stop, attempts, is_spent = self.limit(txn, databases, flags, number, end)
            if is_spent:
                break
            try:
                part = self._copy_found(txn, databases, number, stop)
            except persipubsub.errors.CorruptMessageError:
                if not result.numbers:
                    raise
                break
            result.numbers.extend(part.numbers)
            result.messages.extend(part.messages)
            result.runs.extend(part.runs)
            found.update(attempts)
            after = part.numbers[-1] + 1 if part.numbers else number
            left = self.find(txn, databases, after) if after < stop else None
            if isinstance(left, Candidate) and left.number < stop:
                break  # damaged, or too much for one batch: what lies behind it comes later
            number = _positions.skip_ahead(txn, databases, self.ordinal, stop)
            is_behind_others = number > stop
        return result

    def _copy_found(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, number: int,
                    end: int) -> Copied:
        """
        Copy messages that are pending from wherever they are, if they are neither gone nor too old.

        :param txn: any transaction
        :param databases: handles
        :param number: of the first message
        :param end: number behind the last one to look at
        :return: messages, without what is known of their deliveries
        :raise CorruptMessageError: if the first one is damaged
        """
        cursor = txn.cursor(db=databases.data)
        found = _log.seek(cursor, number)
        if found is None or number < found.first:
            return _NOTHING
        if number + 1 < end:
            return self._copy_runs(txn, databases, cursor, found, number, end)
        first, block, value = found
        if (number >= first + block.messages or block.time_ns < self.now_ns() - self.timeout_ns
                or not self.is_addressed(txn, databases, block.audience)):
            return _NOTHING
        message = _blocks.copy_message(value, block, number - first, number)
        return Copied([number], [message], [(1, block.time_ns)], _NO_ATTEMPTS, False)

    def _copy_runs(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
                   cursor: "lmdb.Cursor[memoryview]", found: _log.Found | None, number: int,
                   end: int) -> Copied:
        """
        Copy messages of one block after the other that are not too old and addressed.

        :param txn: any transaction
        :param databases: handles
        :param cursor: of ``data_db``; stands at the first block
        :param found: first block
        :param number: of the first message
        :param end: number behind the last one to look at
        :return: messages, without what is known of their deliveries
        :raise CorruptMessageError: if the first one is damaged
        """
        result = Copied([], [], [], _NO_ATTEMPTS, False)
        oldest_ns = self.now_ns() - self.timeout_ns
        size = 0
        while found is not None and found.first < end and size < _COPIED_BYTES:
            first, block, value = found
            begin, stop = max(number - first, 0), min(end - first, block.messages)
            if (begin < stop and block.time_ns >= oldest_ns
                    and self.is_addressed(txn, databases, block.audience)):
                copied = _copy_run(value, block, first, begin, stop, bool(result.messages))
                result.numbers.extend(range(first + begin, first + begin + len(copied)))
                result.messages.extend(copied)
                result.runs.append((len(copied), block.time_ns))
                if len(copied) < stop - begin:
                    break
                size += _blocks.size_before(value, block, stop)
            found = _log.following(cursor) if first + block.messages < end else None
        return result

    def limit(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, flags: int,
              number: int, end: int) -> tuple[int, Mapping[int, _layout.Attempts], bool]:
        """
        Cut a range in front of what is acknowledged, not due, or not to be delivered any more.

        :param txn: any transaction
        :param databases: handles
        :param flags: of the subscriber
        :param number: of the first message, which is pending
        :param end: number behind the last one
        :return: new end, records in front of it, whether the first one is not to be delivered and
            therefore alone
        """
        end = min(end, _positions.next_range(txn, databases, self.ordinal, number))
        if not flags & _layout.FLAG_MAY_HAVE_ATTEMPTS:
            return end, _NO_ATTEMPTS, False
        now_ns = self.now_ns()
        found: dict[int, _layout.Attempts] = {}
        for other, attempts in _attempts.between(txn, databases, self.ordinal, number, end):
            if attempts.due_ns > now_ns:
                return other, found, False
            if self.policy.is_spent(attempts.deliveries):
                if other > number:
                    return other, found, False
                return number + 1, {number: attempts}, True
            found[other] = attempts
        return end, found, False


def _copy_run(value: memoryview, block: _blocks.Block, first: int, begin: int, stop: int,
              may_be_empty: bool) -> list[bytes]:
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
