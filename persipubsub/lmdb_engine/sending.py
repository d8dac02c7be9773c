"""
Add messages to a queue, make the room that its limits ask for, and tidy up.

A send looks at the positions of subscribers only every few messages: what it remembers of them, the
low watermark, is a safe lower bound. It deletes a bounded number of finished messages at the head,
about twice what it adds, so that no send ever pays for the whole queue.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final

import persipubsub.errors
from persipubsub.config import Durability, Strategy
from persipubsub.drop_log import DropLog
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, once, retention
from persipubsub.lmdb_engine.datafile import MapFullError
from persipubsub.lmdb_engine.environment import Environment
from persipubsub.lmdb_engine.format import Tx
from persipubsub.lmdb_engine.journal import MESSAGE_COST
from persipubsub.lmdb_engine.log import LogEnd
from persipubsub.lmdb_engine.retention import Dropped, LowWatermark

#: Messages, recipients and ids of one send.
Sending = tuple[Sequence[bytes], tuple[str, ...] | None, Sequence[bytes | None] | None]

#: After so many bytes a send looks for finished blocks at once, however few messages they are.
_LARGE_BYTES: Final = 1 << 16

#: How many blocks are deleted in one transaction while an operator prunes or clears a queue.
CHUNK_BLOCKS: Final = 256

#: A sender that waits for room looks at the queue this often whatever happens, in seconds: a
#: subscriber may die between its commit and its notification, and messages become too old without one.
_LONGEST_PAUSE_SECS: Final = 1.0

#: No limit.
_UNLIMITED: Final = 1 << 62

#: Instead of a message number: the queue is at a limit and drops nothing; the store, or the
#: journal, has no room until something is done outside of the transaction.
_FULL, _NO_SPACE, _NO_JOURNAL = 0, -1, -2

#: Number of the first message, end of the log, what was dropped, low watermark.
_Result = tuple[int, int, list[Dropped], LowWatermark | None]


class _Batch:
    """Messages of one send, encoded before any lock is taken."""

    __slots__ = ("messages", "recipients", "msg_ids", "blocks", "count", "size", "cost")

    def __init__(self, messages: Sequence[bytes], recipients: tuple[str, ...] | None,
                 msg_ids: Sequence[bytes | None] | None) -> None:
        """Encode messages."""
        self.messages = messages
        self.recipients = recipients
        self.msg_ids = msg_ids
        self.count = len(messages)
        if self.count == 1:
            # Most sends are of one, and this is done for each of them.
            single = fmt.encode_single(messages[0])
            self.size = single[1]
            self.blocks: Sequence[tuple[int, int, bytes]] = (single, )
        else:
            self.blocks = fmt.encode_batches(messages)
            self.size = sum(map(len, messages))
        self.cost = self.size + MESSAGE_COST * self.count
        if msg_ids is not None:
            self.cost += sum(len(msg_id or b"") for msg_id in msg_ids)

    def without_known(self, tx: Tx, oldest_ns: int) -> tuple["_Batch", dict[bytes, int]]:
        """
        Leave out the messages whose ids are known; of an id that comes twice, the first one stays.

        :return: what is left, numbers of the known ids
        """
        msg_ids = self.msg_ids or ()
        given = list(dict.fromkeys(msg_id for msg_id in msg_ids if msg_id is not None))
        found = once.find(tx, given, oldest_ns)
        known = {msg_id: number for msg_id, number in zip(given, found) if number is not None}
        chosen: list[tuple[bytes, bytes | None]] = []
        new: dict[bytes, None] = {}
        for message, msg_id in zip(self.messages, msg_ids):
            if msg_id is None or (msg_id not in known and msg_id not in new):
                chosen.append((message, msg_id))
                if msg_id is not None:
                    new[msg_id] = None
        left = _Batch([message for message, _ in chosen], self.recipients,
                      [msg_id for _, msg_id in chosen])
        return left, known


class Sender:
    """Adds messages to one open queue. Any thread may use it."""

    def __init__(self, environment: Environment, now_ns: Callable[[], int]) -> None:
        """Initialize without looking at the store."""
        queue = environment.queue
        self._now_ns = now_ns
        mark = queue.high_water_mark
        self._environment = environment
        self.drop_log = DropLog(environment.directory)
        self.timeout_ns = (_UNLIMITED
                           if mark.msg_timeout_secs is None else int(mark.msg_timeout_secs * 1e9))
        self.strategy = mark.strategy
        self._drops_unread = mark.strategy in (Strategy.PRUNE_FIRST, Strategy.PRUNE_LAST)
        self._max_messages = mark.max_msgs_num or _UNLIMITED
        self._max_size = mark.size_bytes or _UNLIMITED
        self._max_bytes = queue.max_db_size_bytes
        self._is_flushed = queue.durability is Durability.FSYNC
        self._once_window_ns = int(queue.once_window_secs * 1e9)

        # A single message of no more bytes needs no closer look.
        self._surely_fitting = min(self._max_size, fmt.MAX_MESSAGE_BYTES,
                                   self._max_bytes - fmt.BLOCK_BYTES // 8 - fmt.ENTRY_BYTES)

        # Whether the last send found no room. Then the next one looks before it writes, so that those
        # who wait do not block other writers. Only a guess.
        self._was_full = False
        # Remembered between sends, written behind a commit in any order: an older one is a lower bound.
        self._low: LowWatermark | None = None
        # End of the log after the last send, LMDB's number of its transaction, and how many had
        # been aborted (the next one reuses the number of an aborted one); under the write lock.
        self._end = (log.EMPTY, -1, 0)
        # Indices of lists of recipients, under the write lock.
        self._audiences: dict[tuple[str, ...], int] = {}

    # Sending

    def put(self,
            messages: Sequence[bytes],
            recipients: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> int:
        """
        Add messages at the end of the queue, all of them or none; return the number of the first.

        :param timeout: seconds to wait for room, with the strategy ``block``; None: for ever
        """
        if len(messages) != 1 or len(messages[0]) > self._surely_fitting:
            self.check_sizes(messages)
        batch = _Batch(messages, recipients, msg_ids or None)
        first = 0
        if not (self._was_full and self._environment.read(self._is_still_full, batch)):
            first = self._commit(batch)
        if not first and self.strategy is Strategy.BLOCK and (timeout is None or timeout > 0):
            first = self._wait_for_room(batch, timeout)
        self._was_full = not first
        if not first:
            raise self._full_error(batch)
        return first

    def put_each(self, sendings: Sequence[Sending]) -> list[BaseException | None]:
        """Do as a :py:meth:`put` of each, but never wait for room; in one commit if possible."""
        outcomes: list[BaseException | None] = [None] * len(sendings)
        batches: dict[int, _Batch] = {}
        for index, (messages, recipients, msg_ids) in enumerate(sendings):
            try:
                self.check_sizes(messages)
                batches[index] = _Batch(messages, recipients, msg_ids or None)
            except persipubsub.errors.MessageError as error:
                outcomes[index] = error
        try:
            results: Sequence[_Result] | None = (self._environment.write(
                self._append_all, list(batches.values())) if len(batches) > 1 else None)
        except persipubsub.errors.BusyTimeoutError as error:
            # Nobody is at fault, and everybody waited long enough.
            return [error if outcome is None else outcome for outcome in outcomes]
        except persipubsub.errors.PersipubsubError:
            results = None
        if results is None:
            for index in batches:
                try:
                    self.put(*sendings[index][:2], timeout=0, msg_ids=sendings[index][2])
                except persipubsub.errors.PersipubsubError as error:
                    outcomes[index] = error
            return outcomes
        # pylint: disable=not-an-iterable,unsubscriptable-object
        failure = self._finish([result for result in results if result[0]], results[-1][3])
        for (index, batch), result in zip(batches.items(), results):
            outcomes[index] = failure if result[0] else self._full_error(batch)
        return outcomes

    def check_sizes(self, messages: Sequence[bytes]) -> None:
        """
        Check that the queue could hold messages if it were empty.

        :raise MessageTooLargeError: if it could not
        """
        count = len(messages)
        largest = size = len(messages[0]) if count == 1 else 0
        if count != 1:
            sizes = list(map(len, messages))
            size, largest = sum(sizes), max(sizes, default=0)
        directory = self._environment.directory
        limit = min(self._max_size, fmt.MAX_MESSAGE_BYTES)
        if largest > limit:
            raise persipubsub.errors.MessageTooLargeError(
                f"Expected a message of at most {limit} bytes for the queue {directory} "
                f"(HWM_LMDB_SIZE_BYTES), but got: {largest} bytes")
        if size > self._max_size or count > self._max_messages:
            raise persipubsub.errors.MessageTooLargeError(
                f"Expected a batch of at most {self._max_messages} messages (MAX_MSGS_NUM) and "
                f"{self._max_size} bytes (HWM_LMDB_SIZE_BYTES) for the queue {directory}, but got: "
                f"{count} messages, {size} bytes")
        room = self._max_bytes - fmt.BLOCK_BYTES // 8 - fmt.ENTRY_BYTES * count
        if size > room:
            raise persipubsub.errors.MessageTooLargeError(
                f"Expected messages of at most {max(0, room)} bytes for the queue {directory} "
                f"(max_db_size_bytes), but got: {size} bytes")

    def _commit(self, batch: _Batch) -> int:
        """Add messages, notify, and flush; return the number of the first, 0 if the queue is full."""
        environment = self._environment
        was_freed = False
        while True:
            try:
                result = environment.write(self._append, batch)
                if result[0] < 0:
                    self.drop_log.add(result[2])
                if result[0] == _NO_JOURNAL:
                    environment.journal.make_room(result[1], self._is_flushed)
            except MapFullError:
                environment.check_readers()
                environment.check_stuck_readers()
                result = (_NO_SPACE, 0, [], None)
            except persipubsub.errors.DiskFullError:
                # A send that fails can not delete what is finished by itself.
                if was_freed:
                    raise
                was_freed = True
                self.delete_finished(keeps_retained=False)
                environment.write(retention.make_reusable, makes_room=True)
                # Segments of the journal that hold nothing else can be used again, too.
                environment.secure_now()
                continue
            if result[0] == _NO_SPACE:
                if not self._free_space(batch):
                    return _FULL
            elif result[0] != _NO_JOURNAL:
                break
        error = self._finish([result], result[3])
        if error is not None:
            raise error
        return result[0]

    def _finish(self, results: Sequence[_Result],
                low: LowWatermark | None) -> persipubsub.errors.PersipubsubError | None:
        """Do what follows a commit: notify, warn, flush; return the error of the flush."""
        self._low = low
        end = 0
        for first, behind, dropped, _ in results:
            if dropped:
                self.drop_log.add(dropped)
            if first or dropped:
                end = max(end, behind)
        if end:
            # Before the flush: consumers wake up meanwhile. Those that are awake see a message as early.
            self._environment.notifier.notify(end)
            if self._is_flushed:
                try:
                    self._environment.journal.secure(end)
                except persipubsub.errors.PersipubsubError as error:
                    return error
        return None

    def _append_all(self, tx: Tx, batches: Sequence[_Batch]) -> list[_Result] | None:
        """Add the messages of several sends; nothing of it if the store or the journal has no room."""
        results = []
        for batch in batches:
            result = self._append(tx, batch)
            if result[0] < 0:
                # By an exception, which takes back what was added already.
                raise MapFullError("Expected room for several sends, but got: none")
            results.append(result)
            self._low = None
        return results

    def _append(self, tx: Tx, batch: _Batch) -> _Result:
        """Add messages at the end of the log and tidy up a little at its beginning."""
        environment = self._environment
        # As the last send left it, if nobody has written since then: to read it takes a tenth of a send.
        log_end, txn_id, aborted = self._end
        if not (txn_id == environment.committed == tx.txn.id() - 1
                and aborted == environment.aborted):
            log_end = log.read_end(tx.cursor())
        low = self._low
        if low is None or low.generation != log_end.generation:
            low = retention.find_low_watermark(tx, log_end)
        known: dict[bytes, int] = {}
        given = batch
        if batch.msg_ids is not None:
            now_ns = self._now_ns()
            batch, known = batch.without_known(tx, now_ns - self._once_window_ns)
            once.forget(tx, now_ns - self._once_window_ns, budget=2 * given.count)
            if not batch.count:
                return next(iter(known.values())), log_end.next_number, [], low
        dropped: list[Dropped] = []
        number, _, count, size, _, totals = log_end
        if (count - low.messages + batch.count > self._max_messages
                or size - low.size + batch.size > self._max_size):
            log_end, low, dropped = self._make_room(tx, log_end, low, batch)
            if self._is_over(log_end, low, batch):
                # No exception: it would take back the dropping of what was too old.
                return _FULL, log_end.next_number, dropped, low
            number, _, _, size, _, totals = log_end
        is_time = ((number + batch.count) // low.interval != number // low.interval
                   or (size + batch.size) // _LARGE_BYTES != size // _LARGE_BYTES)
        if is_time and self._used(tx) + batch.size > self._max_bytes:
            return _NO_SPACE, 0, dropped, low
        audience = self._find_audience(tx, batch.recipients) if batch.recipients else 0
        cost = batch.cost + 8 * len(totals) * len(batch.blocks)
        if not environment.journal.reserve(cost):
            return _NO_JOURNAL, cost, dropped, low
        now_ns = self._now_ns()
        log_end = log.append(tx, log_end, now_ns, audience, batch.blocks)
        self._end = log_end, tx.txn.id(), environment.aborted
        first = number
        if given.msg_ids is not None:
            for place, msg_id in enumerate(batch.msg_ids or ()):
                if msg_id is not None:
                    once.remember(tx, msg_id, number + place, now_ns)
            first = known.get(given.msg_ids[0] or b"", number)
        if is_time:
            low = self._tidy(tx, log_end, dropped, 2 * (low.interval + len(batch.blocks)), low)
        return first, log_end.next_number, dropped, low

    def _find_audience(self, tx: Tx, recipients: tuple[str, ...]) -> int:
        """Find the index of a list of recipients."""
        audience = self._audiences.get(recipients)
        # A transaction that failed may have taken it back, and another one may have given its index
        # to other recipients.
        if audience is None or bytes(tx.txn.get(fmt.audience_key(audience), b"",
                                                db=tx.db.meta)) != fmt.pack_audience(recipients):
            audience = log.ensure_audience(tx, recipients)
            self._audiences[recipients] = audience
        return audience

    # Limits

    def _is_over(self, log_end: LogEnd, low: LowWatermark, batch: _Batch) -> bool:
        """Tell whether messages would pass a high-water mark."""
        return (log_end.total_count - low.messages + batch.count > self._max_messages
                or log_end.total_bytes - low.size + batch.size > self._max_size)

    def _make_room(self, tx: Tx, log_end: LogEnd, low: LowWatermark,
                   batch: _Batch) -> tuple[LogEnd, LowWatermark, list[Dropped]]:
        """Check the high-water marks exactly; if one is passed, drop messages if asked to."""
        dropped: list[Dropped] = []
        low = retention.find_low_watermark(tx, log_end, known=low)
        if self._is_over(log_end, low, batch):
            low = self._tidy(tx, log_end, dropped, CHUNK_BLOCKS, low)
        while self._drops_unread and self._is_over(log_end, low, batch):
            log_end, more = retention.halve(tx, low, log_end, batch.count, self.strategy
                                            is Strategy.PRUNE_LAST)
            dropped.extend(more)
            low = retention.find_low_watermark(tx, log_end)
        return log_end, low, dropped

    def _is_still_full(self, tx: Tx, batch: _Batch) -> bool:
        """Look whether messages would pass a high-water mark, also if what is too old were dropped."""
        if batch.msg_ids is not None:
            batch, _ = batch.without_known(tx, self._now_ns() - self._once_window_ns)
        log_end = log.read_end(tx.cursor())
        low = retention.find_low_watermark(tx, log_end, is_read_only=True, known=self._low)
        oldest_ns = self._now_ns() - self.timeout_ns
        return bool(batch.count and self._is_over(log_end, low, batch)
                    and low.number == retention.expired_before(tx, low, log_end, oldest_ns))

    def _wait_for_room(self, batch: _Batch, timeout: float | None) -> int:
        """Add messages as soon as there is room; return 0 if there was none in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            notifier = self._environment.notifier
            stamp = notifier.arm()
            if not self._environment.read(self._is_still_full, batch):
                first = self._commit(batch)
                if first:
                    return first
            pause = _LONGEST_PAUSE_SECS
            if deadline is not None:
                pause = min(pause, deadline - time.monotonic())
                if pause <= 0:
                    return _FULL
            notifier.wait(stamp, pause)

    def _full_error(self, batch: _Batch) -> persipubsub.errors.QueueFullError:
        """Describe a full queue, and the slowest subscriber."""
        count, size, slowest = self._environment.read(self._describe_full)
        text = (
            f"Expected room for {batch.count} more message(s) of {batch.size} bytes in the queue "
            f"{self._environment.directory}, but got: {count} of {_limit(self._max_messages)} "
            f"messages (MAX_MSGS_NUM) and {size} of {_limit(self._max_size)} bytes "
            f"(HWM_LMDB_SIZE_BYTES) wait in a store of at most {self._max_bytes} bytes "
            "(max_db_size_bytes).")
        if slowest is not None:
            text += f" The slowest subscriber is {slowest.subscriber!r} with {slowest.lag} of them."
        return persipubsub.errors.QueueFullError(text)

    def _describe_full(self, tx: Tx) -> tuple[int, int, retention.Slowest | None]:
        """Count what waits."""
        log_end = log.read_end(tx.cursor())
        low = retention.find_low_watermark(tx, log_end, is_read_only=True)
        return (log_end.total_count - low.messages, log_end.total_bytes - low.size,
                retention.find_slowest(tx))

    # A full store

    @staticmethod
    def _used(tx: Tx) -> int:
        """Bytes of all pages in use."""
        return sum(fmt.used_bytes(tx.txn, database) for database in tx.db)

    def _free_space(self, batch: _Batch) -> bool:
        """
        Delete what is finished, then drop by the strategy, until messages fit into the store.

        :return: False if they do not fit and nothing may be dropped
        """
        self._low = None
        while True:
            self.drop_expired()
            self.delete_finished(keeps_retained=False)
            self._environment.write(retention.empty_last, makes_room=True)
            # LMDB reuses pages two commits after they were freed.
            self._environment.write(retention.make_reusable, makes_room=True)
            used, waiting = self._environment.read(self._measure)
            if used + batch.size <= self._max_bytes:
                return True
            if not waiting:
                raise persipubsub.errors.DiskFullError(
                    f"Expected room for {batch.size} bytes in the queue {self._environment.directory}, "
                    f"but got: {used} of {self._max_bytes} bytes (max_db_size_bytes) are in use, though "
                    "no message waits: by ids of messages (once_window_secs), or failed deliveries")
            if not self._drops_unread:
                return False
            self.drop_log.add(self._environment.write(self._shrink, batch.count, makes_room=True))

    def _measure(self, tx: Tx) -> tuple[int, int]:
        """Bytes in use, and messages that wait."""
        log_end = log.read_end(tx.cursor())
        low = retention.find_low_watermark(tx, log_end, is_read_only=True)
        return self._used(tx), log_end.total_count - low.messages

    def _shrink(self, tx: Tx, added: int) -> list[Dropped]:
        """Drop half of the messages."""
        log_end = log.read_end(tx.cursor())
        low = retention.find_low_watermark(tx, log_end)
        return retention.halve(tx, low, log_end, added, self.strategy is Strategy.PRUNE_LAST)[1]

    # Tidying up

    def _tidy(self, tx: Tx, log_end: LogEnd, dropped: list[Dropped], budget: int,
              known: LowWatermark | None) -> LowWatermark:
        """Drop what is too old, and delete some finished blocks."""
        low = retention.find_low_watermark(tx, log_end, known=known)
        now_ns = self._now_ns()
        cut = retention.expired_before(tx, low, log_end, now_ns - self.timeout_ns)
        if cut > low.number:
            dropped.extend(retention.drop_before(tx, cut, retention.count_timeout))
            low = retention.find_low_watermark(tx, log_end)
        log.delete_head(tx.cursor(), low.audiences, low.everyone, budget, self._retained_ns(now_ns))
        return low

    def _retained_ns(self, now_ns: int) -> int:
        """Tell since when messages stay although they are finished."""
        retain_secs = self._environment.queue.retain_secs
        return now_ns - int(retain_secs * 1e9) if retain_secs else log.RETAINS_NOTHING_NS

    def drop_expired(self) -> int:
        """Drop the messages that are older than the queue's timeout; return how many it were."""
        dropped = self._environment.write(self._drop_expired, makes_room=True)
        self.drop_log.add(dropped)
        return sum(one.messages for one in dropped)

    def _drop_expired(self, tx: Tx) -> list[Dropped]:
        """Drop what is too old."""
        dropped: list[Dropped] = []
        self._tidy(tx, log.read_end(tx.cursor()), dropped, CHUNK_BLOCKS, None)
        return dropped

    def delete_finished(self, keeps_retained: bool = True) -> int:
        """Delete all finished messages and old ids, in many short transactions; count the blocks."""
        now_ns = self._now_ns()
        oldest_ns = now_ns - self._once_window_ns
        if self._environment.read(once.is_any_before, oldest_ns):
            while self._environment.write(once.forget, oldest_ns, CHUNK_BLOCKS,
                                          makes_room=True) == CHUNK_BLOCKS:
                pass
        retained_ns = self._retained_ns(now_ns) if keeps_retained else log.RETAINS_NOTHING_NS
        total = 0
        while True:
            deleted = self._environment.write(retention.delete_finished,
                                              CHUNK_BLOCKS,
                                              retained_ns,
                                              makes_room=True)
            total += deleted
            if deleted < CHUNK_BLOCKS:
                return total


def _limit(value: int) -> str:
    """Show a limit."""
    return "any number of" if value == _UNLIMITED else str(value)
