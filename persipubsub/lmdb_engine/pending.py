"""
The messages of one subscriber, inside of a transaction: search, copy what is claimed, count.

Of what is pending (see ``positions``), a message that failed may not be delivered again before its
``retry_at_ns``, and one whose deliveries are exhausted is not delivered at all.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Final, NamedTuple

import msgspec

from persipubsub.errors import CorruptMessageError, StoreCorruptError
from persipubsub.lmdb_engine import attempts
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, positions
from persipubsub.lmdb_engine.format import Cursor, Subscriber, Tx
from persipubsub.message import retry_delay_ns

#: A batch has at most so many bytes, however many messages were asked for, or is a single message.
BATCH_BYTES: Final = 1 << 24

#: Copying ends with the block that brings it to so many bytes. A claim has at most ``BATCH_BYTES``,
#: but the size of a damaged block is not known, so that it may have more.
_COPIED_BYTES: Final = BATCH_BYTES + fmt.BLOCK_BYTES


class Look(NamedTuple):
    """What a search found."""

    number: int = 0  #: of the first message that could be claimed; 0: none
    stop: int = 0  #: number after the last one that could be claimed with it
    retry_at_ns: int = 0  #: when the first of those passed over may be delivered again; 0: none
    is_expired: bool = False  #: this message is too old: it has to be dropped first


_NOTHING: Final = Look()


class Copied(msgspec.Struct):
    """Messages that were copied out of the store."""

    numbers: list[int]
    messages: list[bytes]
    times_ns: list[int]  #: when they were sent
    attempts: dict[int, fmt.Attempts]  #: of those that have a record
    dropped: int  #: messages that were dropped unread for the subscriber before them


class Pending:
    """The messages of one subscriber. Any thread may use it; it keeps nothing of a transaction."""

    def __init__(self,
                 subscriber: str,
                 timeout_ns: int,
                 now_ns: Callable[[], int],
                 policy: attempts.Policy = attempts.Policy()) -> None:
        """Initialize without looking."""
        self.key = subscriber.encode("utf-8")
        self.ordinal = -1
        self.timeout_ns = timeout_ns
        self.now_ns = now_ns
        self.policy = policy

    # Searching

    def find(self, tx: Tx, start: int, max_messages: int, held: Mapping[int, int]) -> Look:
        """
        Find the next message that may be delivered now, and how many may be claimed with it.

        :param start: smallest number to look at
        :param held: ranges that this process has claimed, to be passed over: see ``Held.ends``
        """
        subscriber = positions.require(tx, self.key, self.ordinal)
        if subscriber.flags & fmt.FLAG_PAUSED:
            return _NOTHING
        cursor = tx.txn.cursor(tx.db.data)
        now_ns = self.now_ns()
        retry_at_ns = 0
        # Each round ends the search, or ``start`` goes forward.
        while (run := positions.next_run(tx, subscriber, cursor, start)) is not None:
            start = run.number
            if run.found.block.time_ns < now_ns - self.timeout_ns:
                return Look(start, is_expired=True)
            if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
                start, earliest_ns = attempts.skip_retries(tx, self.ordinal, start, now_ns)
                retry_at_ns = min(retry_at_ns or earliest_ns, earliest_ns or retry_at_ns)
            while start in held:  # a range ends behind its first number
                start = held[start]
            if start == run.number:
                stop = self._stop(tx, subscriber, cursor, start, max_messages)
                return Look(start, stop, retry_at_ns)
        return Look(retry_at_ns=retry_at_ns)

    def _stop(self, tx: Tx, subscriber: Subscriber, cursor: Cursor, number: int,
              max_messages: int) -> int:
        """Find the number before which messages may be claimed at once."""
        cursor.last()
        key, value = cursor.item()
        # The record is not checked: the consumer that reaches a damaged one handles it, and the
        # messages before it have to be delivered.
        log_end = fmt.unpack_number(key) + fmt.guess_messages(value)
        end = min(log_end, number + max_messages)
        if end <= number + 1:
            return number + 1
        if subscriber.flags:
            _, end = positions.free_part(tx, self.ordinal, number, end)
            end, _ = self._limit(tx, number, end)
        first = tx.txn.get(fmt.pack_number(number), None, tx.db.data)
        if first is None or (fmt.guess_total_bytes(value) - fmt.guess_total_bytes(first) +
                             len(first) > BATCH_BYTES):
            try:
                end = number + log.count_within(cursor, number, end, BATCH_BYTES)
            except StoreCorruptError:
                pass
        return max(number + 1, end)

    def find_newest(self, tx: Tx, tried: Set[int]) -> Look:
        """
        Find the newest pending message.

        :param tried: numbers to be passed over if their deliveries are exhausted
        """
        subscriber = positions.require(tx, self.key, self.ordinal)
        if subscriber.flags & fmt.FLAG_PAUSED:
            return _NOTHING
        now_ns = self.now_ns()
        for number, block in positions.newest_first(tx, subscriber):
            record = None
            if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
                record = attempts.read(tx, subscriber.ordinal, number)
            if (record is not None and number in tried
                    and self.policy.is_exhausted(record.deliveries)):
                continue
            if block.time_ns < now_ns - self.timeout_ns:
                return Look(number, is_expired=True)
            if record is not None and record.retry_at_ns > now_ns:
                return Look(retry_at_ns=record.retry_at_ns)
            return Look(number, number + 1)
        return _NOTHING

    # Copying

    def copy_one(self, tx: Tx, number: int) -> Copied | None:
        """Copy a pending message, whether or not it may be delivered now; None if it left."""
        subscriber = positions.read(tx, self.key, self.ordinal)
        run = subscriber and positions.next_run(tx, subscriber, tx.cursor(), number, number + 1)
        if not subscriber or not run:
            return None
        first, block, value = run.found
        record = attempts.read(tx, self.ordinal, number)
        return Copied([number], [fmt.copy_message(value, block, number - first, number)],
                      [block.time_ns], {number: record} if record else {}, subscriber.dropped)

    def copy(self, tx: Tx, number: int, end: int, is_guess: bool = False) -> Copied:
        """
        Copy the messages of a claimed range that may be delivered now, up to a damaged one.

        :param is_guess: True to copy nothing if the position is not at the first one
        """
        subscriber = positions.require(tx, self.key, self.ordinal)
        oldest_ns = self.now_ns() - self.timeout_ns
        copied = Copied([], [], [], {}, subscriber.dropped)
        if subscriber.flags & fmt.FLAG_PAUSED or (is_guess and number != subscriber.position):
            return copied
        if not subscriber.flags and number + 1 == end and number >= subscriber.position:
            # A shortcut with the same result as the code below, which takes 1.5 times as long.
            found = log.seek(tx.txn.cursor(tx.db.data), number)
            if found is not None:
                first, block, value = found
                if (first <= number < first + block.messages and not block.audience
                        and block.time_ns >= oldest_ns):
                    copied.numbers, copied.times_ns = [number], [block.time_ns]
                    copied.messages = [fmt.copy_message(value, block, number - first, number)]
                    return copied
        if subscriber.flags & fmt.FLAG_MAY_HAVE_RANGES:
            number, stop = positions.free_part(tx, self.ordinal, number, end)
            if stop == end:
                # There is no range in the rest: blocks need not be compared with ranges any more.
                subscriber.flags &= ~fmt.FLAG_MAY_HAVE_RANGES
        size = 0
        for run in positions.runs(tx, subscriber, number, end):
            first, block, value = run.found
            if block.time_ns < oldest_ns:
                continue
            stop, messages = run.stop, []
            if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
                stop, records = self._limit(tx, run.number, stop)
                copied.attempts.update(records)
            try:
                if run.number < stop:
                    messages = fmt.copy_messages(value, block, first, run.number - first,
                                                 stop - first)
            except CorruptMessageError:
                if not copied.numbers:
                    raise
            copied.numbers.extend(range(run.number, run.number + len(messages)))
            copied.messages.extend(messages)
            copied.times_ns.extend([block.time_ns] * len(messages))
            size += sum(map(len, messages))
            if len(messages) < run.stop - run.number or size >= _COPIED_BYTES:
                break
        return copied

    def _limit(self, tx: Tx, number: int, end: int) -> tuple[int, dict[int, fmt.Attempts]]:
        """Cut a range before what may not be delivered yet, or is exhausted."""
        records: dict[int, fmt.Attempts] = {}
        now_ns = self.now_ns()
        for other, record in attempts.between(tx, self.ordinal, number, end):
            if record.retry_at_ns > now_ns or self.policy.is_exhausted(record.deliveries):
                return other, records
            records[other] = record
        return end, records

    # Deliveries

    def begin(self, tx: Tx, number: int, end: int, is_guess: bool = False) -> Copied:
        """Copy claimed messages, and count their delivery before it begins, so that crashes count."""
        copied = self.copy(tx, number, end, is_guess)
        for found in copied.numbers:
            record = self._record_of(tx, found)
            copied.attempts[found] = record._replace(deliveries=record.deliveries + 1,
                                                     flags=fmt.FLAG_IS_BEGUN)
            attempts.write(tx, self.ordinal, found, copied.attempts[found])
        subscriber = positions.require(tx, self.key)
        if copied.numbers and not subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
            subscriber.flags |= fmt.FLAG_MAY_HAVE_ATTEMPTS
            positions.write(tx, subscriber)
        return copied

    def _record_of(self, tx: Tx, number: int) -> fmt.Attempts:
        """Read the record of a message, or begin one."""
        return attempts.read(tx, self.ordinal, number) or fmt.Attempts(0, 0, self.now_ns(), 0, "")

    def begin_newest(self, tx: Tx, tried: Set[int], claim: Callable[[int], bool]) -> Copied | None:
        """
        Claim and copy the newest message, and skip all messages before it.

        The message is searched for and claimed here, in the transaction. A claim before it may have
        to be given back, because a newer message has come. Other consumers would pass over the
        message meanwhile, and get it after later ones. Rejected: to take only the message that a look
        before has found. While others send, there is a newer one each time.

        :param claim: claims the message of a number; returns False if another consumer has it
        :return: None if there is no message that may be delivered now, or another consumer has it
        """
        newest = self.find_newest(tx, tried)
        if newest.is_expired or not newest.number or not claim(newest.number):
            return None
        begin = self.begin if self.policy.max_deliveries else self.copy
        copied = begin(tx, newest.number, newest.stop)
        if copied.numbers:
            positions.leave(tx, positions.require(tx, self.key), 0, newest.number, "skipped")
        return copied

    def nack(self, tx: Tx, numbers: Sequence[int], error: str | None) -> list[int]:
        """
        Record how deliveries ended that were not acknowledged.

        :param error: of the deliveries that failed; None: no consumer worked on the messages, so
            that they do not count
        :return: the messages that are exhausted by this
        """
        exhausted: list[int] = []
        subscriber = positions.read(tx, self.key, self.ordinal)
        if subscriber is None:
            return exhausted
        for number in numbers:
            if not positions.is_pending(tx, subscriber, number):
                continue
            record = self._record_of(tx, number)
            count = record.deliveries
            # With a limit, ``begin`` has counted this delivery: subtract it. Without one, it has not,
            # and the flag is left over from a time with a limit.
            if self.policy.max_deliveries and record.flags & fmt.FLAG_IS_BEGUN:
                count -= 1
            if error is not None:
                count += 1
                retry_at_ns = 0
                if self.policy.is_exhausted(count):
                    exhausted.append(number)
                elif self.policy.delay_ns:
                    retry_at_ns = self.now_ns() + retry_delay_ns(self.policy.delay_ns, count)
                record = record._replace(retry_at_ns=retry_at_ns, error=error)
            if count:
                attempts.write(tx, self.ordinal, number, record._replace(deliveries=count, flags=0))
                subscriber.flags |= fmt.FLAG_MAY_HAVE_ATTEMPTS
            else:
                attempts.forget(tx, self.ordinal, number, number + 1)
        if error is not None:
            subscriber.failed += len(numbers)
        positions.write(tx, subscriber)
        return exhausted
