"""
Look at the messages of one subscriber: which is next, which is the newest; copy what is claimed.

Of what is pending (see ``positions``), a message that failed may not be delivered again before its
``retry_at_ns``, and one whose deliveries are exhausted is not delivered at all.
"""

from collections.abc import Callable, Mapping, Set
from typing import Final, NamedTuple

import msgspec

from persipubsub.errors import CorruptMessageError, NotInitializedError, StoreCorruptError
from persipubsub.lmdb_engine import attempts
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, positions
from persipubsub.lmdb_engine.format import Cursor, Subscriber, Tx

#: A batch has at most so many bytes, however many messages were asked for, or is a single message.
BATCH_BYTES: Final = 1 << 24

#: Copying ends with the block that brings it to so many bytes. Messages are claimed for at most
#: ``BATCH_BYTES``; a claim may hold more if a damaged block hid its size.
_COPIED_BYTES: Final = BATCH_BYTES + fmt.BLOCK_BYTES


class Look(NamedTuple):
    """What a search found."""

    number: int = 0  #: of the first message that could be claimed; 0: none
    messages: int = 1  #: how many could be claimed from it on
    retry_at_ns: int = 0  #: when the first of those passed over may be delivered again; 0: none
    is_expired: bool = False  #: the next message is too old: it has to be dropped first


_NOTHING: Final = Look()


class Copied(msgspec.Struct):
    """Messages that were copied out of the store."""

    numbers: list[int]
    messages: list[bytes]
    times_ns: list[int]  #: when they were sent
    attempts: dict[int, fmt.Attempts]  #: of those that have a record
    dropped: int  #: messages that were dropped unread for the subscriber before them
    is_exhausted: bool = False  #: True if it is a single message that is not to be delivered any more


class Pending:
    """
    Looks at the messages of one subscriber. Any thread may use it.

    It keeps nothing of what a transaction read, except ``end``, which is a hint.
    """

    def __init__(self, subscriber: str, timeout_ns: int, now_ns: Callable[[], int],
                 policy: attempts.Policy = attempts.Policy()) -> None:
        """Initialize without looking."""
        self.key = subscriber.encode("utf-8")
        self.ordinal = -1
        self.timeout_ns = timeout_ns
        self.now_ns = now_ns
        self.policy = policy
        # Number after the newest message at the last search, so that a message below it can be
        # claimed without another search. It is a hint, checked after the claim: the message may be
        # gone since then.
        self.end = 0

    def read(self, tx: Tx) -> Subscriber | None:
        """Read the record of the subscriber; None if it was removed, perhaps added again."""
        subscriber = positions.read(tx, self.key)
        return None if subscriber is None or subscriber.ordinal != self.ordinal else subscriber

    def _require(self, tx: Tx) -> Subscriber:
        """Read the record of the subscriber; fail if its ordinal changed: it was added again."""
        subscriber = positions.read(tx, self.key)
        if subscriber is None or subscriber.ordinal != self.ordinal:
            subscriber = positions.require(tx, self.key)
            raise NotInitializedError(
                f"Expected the subscriber {subscriber.name!r} to be the same as at "
                "init(), but got: it was removed and added again. Call init() again.")
        return subscriber

    # Searching

    def find(self, tx: Tx, start: int, max_messages: int, held: Mapping[int, int]) -> Look:
        """
        Find the next message that may be delivered now, and how many may be claimed with it.

        :param start: smallest number to look at
        :param held: ranges that this process has claimed, to be passed over: see ``Held.ends``
        """
        subscriber = self._require(tx)
        if subscriber.flags & fmt.FLAG_PAUSED:
            return _NOTHING
        cursor = tx.txn.cursor(tx.db.data)
        now_ns = self.now_ns()
        retry_at_ns = 0
        while (run := positions.next_run(tx, subscriber, cursor, start)) is not None:
            start = run.number
            if run.found.block.time_ns < now_ns - self.timeout_ns:
                return Look(is_expired=True)
            if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
                start, earliest_ns = attempts.skip_retries(tx, self.ordinal, start, now_ns)
                retry_at_ns = min(retry_at_ns or earliest_ns, earliest_ns or retry_at_ns)
            while start in held:
                start = held[start]
            if start == run.number:
                count = self._count(tx, subscriber, cursor, start, max_messages)
                return Look(start, count, retry_at_ns)
        return Look(retry_at_ns=retry_at_ns)

    def _count(self, tx: Tx, subscriber: Subscriber, cursor: Cursor, number: int,
               max_messages: int) -> int:
        """Find how many messages may be claimed at once."""
        cursor.last()
        key, value = cursor.item()
        # The record is not checked: the consumer that reaches a damaged one handles it, and the
        # messages before it have to be delivered.
        self.end = fmt.unpack_number(key) + fmt.guess_messages(value)
        end = min(self.end, number + max_messages)
        if end <= number + 1:
            return 1
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
        return max(1, end - number)

    def find_newest(self, tx: Tx, tried: Set[int]) -> Look:
        """
        Find the newest pending message.

        :param tried: numbers to be passed over if their deliveries are exhausted
        """
        subscriber = self._require(tx)
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
                return Look(is_expired=True)
            if record is not None and record.retry_at_ns > now_ns:
                return Look(retry_at_ns=record.retry_at_ns)
            return Look(number)
        return _NOTHING

    # Copying

    def copy_next(self, tx: Tx, start: int) -> tuple[Look, bytes | None]:
        """Copy the next message that may be delivered now, even if its deliveries are exhausted."""
        look = self.find(tx, start, 1, {})
        found = log.seek(tx.cursor(), look.number) if look.number else None
        if found is None:
            return look, None
        return look, fmt.copy_message(found.value, found.block, look.number - found.first,
                                      look.number)

    def copy(self, tx: Tx, number: int, end: int, is_guess: bool = False) -> Copied:
        """
        Copy the messages of a claimed range that may be delivered now.

        :param is_guess: True to copy nothing if the position is not at the first one
        """
        subscriber = self._require(tx)
        oldest_ns = self.now_ns() - self.timeout_ns
        copied = Copied([], [], [], {}, subscriber.dropped)
        if subscriber.flags & fmt.FLAG_PAUSED or (is_guess and number != subscriber.position):
            return copied
        if not subscriber.flags and number + 1 == end and number >= subscriber.position:
            # A shortcut with the same result as the code below, which takes 1.5 times as long.
            found = log.seek(tx.cursor(), number)
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
            if run.found.block.time_ns >= oldest_ns:
                added = self._copy_run(tx, subscriber, run, copied)
                size += sum(map(len, copied.messages[len(copied.messages) - added:]))
                if added < run.stop - run.number or size >= _COPIED_BYTES or copied.is_exhausted:
                    break
        return copied

    def _copy_run(self, tx: Tx, subscriber: Subscriber, run: positions.Run, copied: Copied) -> int:
        """Copy messages up to one that is damaged, or not to be delivered; return how many."""
        first, block, value = run.found
        stop = run.stop
        records: dict[int, fmt.Attempts] = {}
        if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
            stop, records = self._limit(tx, run.number, run.stop)
        if stop == run.number:
            record = attempts.read(tx, self.ordinal, stop)
            if copied.numbers or record is None or not self.policy.is_exhausted(record.deliveries):
                return 0
            copied.is_exhausted = True
            stop, records = stop + 1, {stop: record}
        try:
            messages = fmt.copy_messages(value, block, first, run.number - first, stop - first)
        except CorruptMessageError:
            if copied.numbers:
                return 0
            raise
        count = len(messages)
        copied.numbers.extend(range(run.number, run.number + count))
        copied.messages.extend(messages)
        copied.times_ns.extend([block.time_ns] * count)
        copied.attempts.update(records)
        return count

    def _limit(self, tx: Tx, number: int, end: int) -> tuple[int, dict[int, fmt.Attempts]]:
        """Cut a range before what may not be delivered yet, or is exhausted."""
        records: dict[int, fmt.Attempts] = {}
        now_ns = self.now_ns()
        for other, record in attempts.between(tx, self.ordinal, number, end):
            if record.retry_at_ns > now_ns or self.policy.is_exhausted(record.deliveries):
                return other, records
            records[other] = record
        return end, records
