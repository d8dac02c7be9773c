"""
The messages of one subscriber: the next one, the newest one, and what became of deliveries.

Pending for a subscriber is what lies at or behind its position, is addressed to it, and was not
acknowledged ahead. Of that, a message that failed may not be delivered again before its ``retry at``.
"""

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Final, NamedTuple

import persipubsub.errors
from persipubsub.lmdb_engine import attempts
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, positions
from persipubsub.lmdb_engine.format import Cursor, Tx

#: Of messages without a record.
_NO_ATTEMPTS: Final[Mapping[int, fmt.Attempts]] = types.MappingProxyType({})

#: A batch has about as many bytes, however many messages were asked for.
BATCH_BYTES: Final = 1 << 24

#: No more blocks are copied once there are so many bytes. More than a batch is claimed for, whose
#: first and last block may be in it only in part.
_COPIED_BYTES: Final = BATCH_BYTES + fmt.BLOCK_BYTES


class Candidate(NamedTuple):
    """Message that could be claimed."""

    begin: int  #: all from here to the message is done, or is not for the subscriber
    number: int
    retry_at_ns: int  #: when the first of those that it passes over may be delivered again; 0: none


class RetryLater(NamedTuple):
    """There are only messages that may not be delivered again yet."""

    retry_at_ns: int  #: when the first one is, on the queue's clock


class Expired(NamedTuple):
    """The next message is too old."""


class Copied(NamedTuple):
    """Messages that were copied out of the store."""

    numbers: list[int]
    messages: list[bytes]
    runs: list[tuple[int, int]]  #: how many of them were committed together, and when
    attempts: Mapping[int, fmt.Attempts]  #: of those that have a record
    is_exhausted: bool  #: True if it is a single message that is not to be delivered any more
    dropped: int  #: messages that were dropped unread for the subscriber so far


_NOTHING: Final = Copied([], [], [], _NO_ATTEMPTS, False, 0)


class Pending:
    """
    Looks at the messages of one subscriber. Any thread may use it.

    It keeps nothing of a transaction that counts.
    """

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
        # Whether the subscriber is in a list, by the list as it is stored. Not by its number: a
        # transaction that is taken back gives that to another list.
        self._is_in: dict[bytes, bool] = {}
        # Number behind the last message that anybody saw, so that the next ones need not look. What
        # is guessed by it is checked before it counts: messages may be gone since then.
        self.end = 0

    def find(self, tx: Tx, start: int,
             held: Set[int] = frozenset()) -> "Candidate | Expired | RetryLater | None":
        """
        Find the next message that may be delivered now.

        :param start: smallest number to look at
        :param held: numbers that this process has claimed, to be passed over
        """
        ordinal, flags, position, _ = positions.require_position(tx, self.key)
        if ordinal != self.ordinal:
            raise self.other_error()
        begin = number = max(start, position)
        oldest_ns = self.now_ns() - self.timeout_ns
        value = None
        if not flags and number not in held:
            value = tx.txn.get(fmt.pack_number(number), None, tx.db.data)
        elif flags & fmt.FLAG_PAUSED:
            return None
        if value is not None:
            # What is below would do, and takes twice as long where nothing is in the way.
            block = fmt.unpack_block(value, number)
            if block.messages and block.audience == fmt.EVERYONE and block.time_ns >= oldest_ns:
                return Candidate(begin, number, 0)
        retry_at_ns = 0
        cursor = tx.cursor()
        found = log.seek(cursor, number)
        while found is not None:
            first, block, _ = found
            number, stop = max(number, first), fmt.end_of(first, block)
            if not block.messages or not self.is_addressed(tx, block.audience):
                number = stop
            elif flags:
                number = positions.skip_ahead(tx, ordinal, number)
            if number < stop:
                if block.time_ns < oldest_ns:
                    return Expired()
                free, earliest_ns = number, 0
                if flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
                    free, earliest_ns = attempts.skip_retries(tx, ordinal, number, self.now_ns())
                    retry_at_ns = min(retry_at_ns or earliest_ns, earliest_ns or retry_at_ns)
                while free in held:
                    free += 1
                if free == number:
                    return Candidate(begin, number, retry_at_ns)
                begin = number = free
            if number > stop:
                found = log.seek(cursor, number)
            elif number == stop:
                found = log.following(cursor)
        return RetryLater(retry_at_ns) if retry_at_ns else None

    def copy_next(self, tx: Tx, start: int) -> tuple[int, bytes] | Expired | None:
        """Copy the next message that may be delivered now."""
        candidate = self.find(tx, start=start)
        if candidate is None or isinstance(candidate, Expired):
            return candidate
        if isinstance(candidate, RetryLater):
            return None
        found = log.seek(tx.cursor(), candidate.number)
        assert found is not None, "The message was found in the same snapshot."
        return candidate.number, fmt.copy_message(found.value, found.block,
                                                  candidate.number - found.first, candidate.number)

    def is_addressed(self, tx: Tx, audience: int) -> bool:
        """Tell whether messages are for the subscriber."""
        if audience == fmt.EVERYONE:
            return True
        members = bytes(tx.txn.get(fmt.audience_key(audience), b"", db=tx.db.meta))
        known = self._is_in.get(members)
        if known is None:
            known = self.key.decode("utf-8") in fmt.unpack_audience(members)
            self._is_in[members] = known
        return known

    def other_error(self) -> persipubsub.errors.NotInitializedError:
        """Describe that another subscriber has the id now: claims and records are by the ordinal."""
        return persipubsub.errors.NotInitializedError(
            f"Expected the subscriber {self.key.decode('utf-8')!r} to be the same as at "
            "init(), but got: it was removed and added again. Call init() again.")

    def copy(self, tx: Tx, number: int, end: int, is_guess: bool = False) -> Copied:
        """Copy the messages of a claimed range that may be delivered now."""
        records = _NO_ATTEMPTS
        is_exhausted = False
        ordinal, flags, position, drops = positions.require_position(tx, self.key)
        if ordinal != self.ordinal:
            raise self.other_error()
        if flags & fmt.FLAG_PAUSED:
            return _NOTHING
        if number < position:
            number = position
        elif is_guess and number != position:
            return _NOTHING
        if flags:
            number = positions.skip_ahead(tx, ordinal, number)
        if number >= end:
            return _NOTHING
        if flags:
            stop, records, is_exhausted = self.limit(tx, flags, number, end)
            if number == stop:
                return _NOTHING
            if stop < end and not is_exhausted:
                return self._copy_around(tx, flags, number, end, drops)
            end = stop

        if number + 1 == end:
            # What is below would do, and takes three times as long for the message of a send.
            value = tx.txn.get(fmt.pack_number(number), None, tx.db.data)
            single = None if value is None else fmt.copy_single(value)
            if single is not None and single[0] >= self.now_ns() - self.timeout_ns:
                # Not Copied(...), which is a function of Python around just this.
                return tuple.__new__(
                    Copied, ([number], [single[1]], [(1, single[0])], records, is_exhausted, drops))
        copied = self._copy_found(tx, number, end)
        return copied._replace(attempts=records, dropped=drops,
                               is_exhausted=is_exhausted) if copied.numbers else copied

    def _copy_around(self, tx: Tx, flags: int, number: int, end: int, drops: int) -> Copied:
        """Copy messages on both sides of some that were acknowledged ahead."""
        found: dict[int, fmt.Attempts] = {}
        result = Copied([], [], [], found, False, drops)
        is_behind_others = True
        while is_behind_others and number < end:
            stop, records, is_exhausted = self.limit(tx, flags, number, end)
            if is_exhausted:
                break
            try:
                part = self._copy_found(tx, number, stop)
            except persipubsub.errors.CorruptMessageError:
                if not result.numbers:
                    raise
                break
            result.numbers.extend(part.numbers)
            result.messages.extend(part.messages)
            result.runs.extend(part.runs)
            found.update(records)
            after = part.numbers[-1] + 1 if part.numbers else number
            left = self.find(tx, after) if after < stop else None
            if isinstance(left, Candidate) and left.number < stop:
                break  # damaged, or too much for one batch: what lies behind it comes later
            number = positions.skip_ahead(tx, self.ordinal, stop)
            is_behind_others = number > stop
        return result

    def _copy_found(self, tx: Tx, number: int, end: int) -> Copied:
        """Copy pending messages that are neither gone nor too old."""
        cursor = tx.cursor()
        found = log.seek(cursor, number)
        if found is None or number < found.first:
            return _NOTHING
        if number + 1 < end:
            return self._copy_runs(tx, cursor, found, number, end)
        first, block, value = found
        if (number >= first + block.messages or block.time_ns < self.now_ns() - self.timeout_ns
                or not self.is_addressed(tx, block.audience)):
            return _NOTHING
        message = fmt.copy_message(value, block, number - first, number)
        return Copied([number], [message], [(1, block.time_ns)], _NO_ATTEMPTS, False, 0)

    def _copy_runs(self, tx: Tx, cursor: Cursor, found: log.Found | None, number: int,
                   end: int) -> Copied:
        """Copy messages of one block after the other that are not too old and addressed."""
        result = Copied([], [], [], _NO_ATTEMPTS, False, 0)
        oldest_ns = self.now_ns() - self.timeout_ns
        size = 0
        while found is not None and found.first < end and size < _COPIED_BYTES:
            first, block, value = found
            begin, stop = max(number - first, 0), min(end - first, block.messages)
            if (begin < stop and block.time_ns >= oldest_ns
                    and self.is_addressed(tx, block.audience)):
                copied = _copy_run(value, block, first, begin, stop, bool(result.messages))
                result.numbers.extend(range(first + begin, first + begin + len(copied)))
                result.messages.extend(copied)
                result.runs.append((len(copied), block.time_ns))
                if len(copied) < stop - begin:
                    break
                size += fmt.size_before(value, block, stop)
            found = log.following(cursor) if first + block.messages < end else None
        return result

    def limit(self, tx: Tx, flags: int, number: int,
              end: int) -> tuple[int, Mapping[int, fmt.Attempts], bool]:
        """Cut a range in front of what is acknowledged, may not be delivered yet, or is exhausted."""
        end = min(end, positions.next_range(tx, self.ordinal, number))
        if not flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
            return end, _NO_ATTEMPTS, False
        now_ns = self.now_ns()
        found: dict[int, fmt.Attempts] = {}
        for other, record in attempts.between(tx, self.ordinal, number, end):
            if record.retry_at_ns > now_ns:
                return other, found, False
            if self.policy.is_exhausted(record.deliveries):
                if other > number:
                    return other, found, False
                return number + 1, {number: record}, True
            found[other] = record
        return end, found, False


def _copy_run(value: memoryview, block: fmt.Block, first: int, begin: int, stop: int,
              may_be_empty: bool) -> list[bytes]:
    """Copy messages of one block, up to the first damaged one."""
    if stop - begin == 1 and not may_be_empty:
        return [fmt.copy_message(value, block, begin, first + begin)]
    try:
        return fmt.copy_messages(value, block, first, begin, stop)
    except persipubsub.errors.CorruptMessageError as error:
        if error.number == first + begin:
            if may_be_empty:
                return []
            raise
        return fmt.copy_messages(value, block, first, begin, error.number - first)


def search_batch(tx: Tx, pending: Pending, start: int, max_messages: int,
                 held: Set[int]) -> tuple[Candidate | Expired | RetryLater | None, int]:
    """Find the next message, and how many may be claimed with it."""
    found = pending.find(tx, start, held)
    if not isinstance(found, Candidate):
        return found, 1
    cursor = tx.cursor()
    cursor.last()
    key, value = cursor.item()
    # Not checked: whoever reaches a damaged record handles it; it must not stop those before.
    pending.end = fmt.unpack_number(key) + fmt.guess_messages(value)
    if max_messages == 1:
        return found, 1
    end = min(pending.end, found.number + max_messages)
    _, flags, _, _ = positions.require_position(tx, pending.key)
    if flags:
        end, _, _ = pending.limit(tx, flags, found.number, end)
    count = max(1, end - found.number)
    first = tx.txn.get(fmt.pack_number(found.number), None, tx.db.data)
    if first is not None and (fmt.guess_total_bytes(value) - fmt.guess_total_bytes(first) +
                              len(first) <= BATCH_BYTES):
        # All that there is. What is below would do, and takes as long as the rest of this.
        return found, count
    try:
        return found, _fitting(cursor, found.number, count)
    except persipubsub.errors.StoreCorruptError:
        return found, count


def _fitting(cursor: Cursor, number: int, count: int) -> int:
    """Find how many messages have no more bytes than a batch."""
    limit = log.place_of(cursor, number).size + BATCH_BYTES
    if log.place_of(cursor, number + count).size <= limit:
        return count
    fitting, most = 1, count - 1
    while fitting < most:
        middle = (fitting + most + 1) // 2
        if log.place_of(cursor, number + middle).size <= limit:
            fitting = middle
        else:
            most = middle - 1
    return fitting


def find_newest(tx: Tx, pending: Pending,
                stuck: Set[int]) -> Candidate | Expired | RetryLater | None:
    """Find the newest pending message; walk over messages for others behind it."""
    subscriber = positions.require(tx, pending.key)
    if subscriber.ordinal != pending.ordinal:
        raise pending.other_error()
    if subscriber.flags & fmt.FLAG_PAUSED:
        return None
    is_own = functools.partial(pending.is_addressed, tx)
    for number, block in _newest_first(tx, subscriber, is_own):
        record = None
        if subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
            record = attempts.read(tx, subscriber.ordinal, number)
        if (record is not None and number in stuck
                and pending.policy.is_exhausted(record.deliveries)):
            continue
        if block.time_ns < pending.now_ns() - pending.timeout_ns:
            return Expired()
        if record is not None and record.retry_at_ns > pending.now_ns():
            return RetryLater(record.retry_at_ns)
        return Candidate(begin=number, number=number, retry_at_ns=0)
    return None


def _newest_first(tx: Tx, subscriber: fmt.Subscriber,
                  is_own: Callable[[int], bool]) -> Iterator[tuple[int, fmt.Block]]:
    """Iterate over pending messages, from the newest one on."""
    ranges: list[tuple[int, int]] = []
    if subscriber.flags & fmt.FLAG_MAY_HAVE_RANGES:
        ranges = list(positions.ranges(tx, subscriber.ordinal))
    found = log.last(cursor := tx.cursor())
    while found is not None and found.first + found.block.messages > subscriber.position:
        if found.block.messages and is_own(found.block.audience):
            first = max(found.first, subscriber.position)
            number = found.first + found.block.messages - 1
            for begin, end in reversed(ranges):
                for other in range(number, max(first, end) - 1, -1):
                    yield other, found.block
                number = min(number, begin - 1)
            for other in range(number, first - 1, -1):
                yield other, found.block
        found = log.preceding(cursor)


def skip_to_newest(tx: Tx, key: bytes) -> int:
    """Acknowledge all pending messages of a subscriber but the newest one."""
    subscriber = positions.require(tx, key)
    own = {fmt.EVERYONE, *positions.audiences_of(log.read_audiences(tx), key)}
    newest = next(_newest_first(tx, subscriber, own.__contains__), None)
    return 0 if newest is None else skip_before(tx, key, newest[0])


def skip_before(tx: Tx, key: bytes, number: int) -> int:
    """Acknowledge all messages in front of one, as skipped."""
    subscriber = positions.require(tx, key)
    audiences = positions.audiences_of(log.read_audiences(tx), key)
    skipped = positions.count_pending(tx, subscriber, audiences, 0, number)
    if number > subscriber.position:
        moved, _ = positions.acknowledge_range(tx, subscriber, subscriber.position, number)
        positions.write(tx, key, moved._replace(skipped=moved.skipped + skipped))
    return skipped
