"""
What happens at a limit of a queue: a high-water mark, a full store, a full disk.

A queue at a high-water mark refuses messages, lets senders wait, or drops messages, as its strategy
says (``Room.apply_strategy``). On a full store, all that is finished is deleted; if that does not
suffice, the strategy applies (``Room.free_store``). ``Sender._commit`` meets these errors, and calls
what is here. A store is full if its pages in use would pass ``max_db_size_bytes``, or if
LMDB's map, which is larger, has no free page. A stopped reader may keep the pages of a full map:
then nothing is dropped (``Environment.check_stuck_readers``). On a full disk, all that is finished
is deleted, and the send is tried once more (``Room.free_disk``). Acknowledging on a full disk is
elsewhere: ``Environment._free_room``.

Usually finished blocks are deleted bit by bit: a send that tidies up (``Room.tidy``) deletes at
most about twice as many blocks as were added since the last one did, so that no such send pays for
the whole queue. Only a send that finds the store or the disk full deletes all that is finished.
"""

from collections.abc import Callable, Sequence
from typing import Final

from persipubsub.config import Strategy
from persipubsub.drop_log import DropLog
from persipubsub.errors import DiskFullError, MessageTooLargeError, QueueFullError
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, retention
from persipubsub.lmdb_engine.environment import Environment
from persipubsub.lmdb_engine.format import Tx
from persipubsub.lmdb_engine.log import LogEnd
from persipubsub.lmdb_engine.retention import Dropped, LowWatermark

#: No limit.
_UNLIMITED: Final = 1 << 62


class Room:
    """Room for messages in one open queue. Any thread may use it."""

    def __init__(self, environment: Environment, now_ns: Callable[[], int]) -> None:
        """Initialize without looking at the store."""
        queue, mark = environment.queue, environment.queue.high_water_mark
        self._environment = environment
        self._now_ns = now_ns
        self.drop_log = DropLog(environment.directory)
        self.timeout_ns = (_UNLIMITED
                           if mark.msg_timeout_secs is None else int(mark.msg_timeout_secs * 1e9))
        self.once_window_ns = int(queue.once_window_secs * 1e9)
        self.strategy = mark.strategy
        self._drops_unread = mark.strategy in (Strategy.PRUNE_FIRST, Strategy.PRUNE_LAST)
        self._drops_newest = mark.strategy is Strategy.PRUNE_LAST
        self.max_messages = mark.max_msgs_num or _UNLIMITED
        self.max_size = mark.size_bytes or _UNLIMITED
        self.max_bytes = queue.max_db_size_bytes
        #: The size of a single message of at most so many bytes needs no further check.
        self.surely_fitting = min(self.max_size, fmt.MAX_MESSAGE_BYTES,
                                  self.max_bytes - fmt.BLOCK_BYTES // 8 - fmt.ENTRY_BYTES)

    def check_sizes(self, messages: Sequence[bytes]) -> None:
        """
        Check that the queue could hold messages if it were empty.

        :raise MessageTooLargeError: if it could not
        """
        sizes = list(map(len, messages))
        count, size = len(sizes), sum(sizes)
        stored = size + fmt.ENTRY_BYTES * count + fmt.BLOCK_BYTES // 8
        for found, limit, what, setting in (
            (max(sizes, default=0), fmt.MAX_MESSAGE_BYTES, "bytes in a message", "of any queue"),
            (count, self.max_messages, "messages in a batch", "MAX_MSGS_NUM"),
            (size, self.max_size, "bytes of messages", "HWM_LMDB_SIZE_BYTES"),
            (stored, self.max_bytes, "bytes of messages and overhead", "max_db_size_bytes"),
        ):
            if found > limit:
                raise MessageTooLargeError(
                    f"Expected at most {limit} {what} for the queue {self._environment.directory} "
                    f"({setting}), but got: {found}")

    # High-water marks

    def is_over(self, log_end: LogEnd, low: LowWatermark, count: int, size: int) -> bool:
        """Tell whether messages would pass a high-water mark."""
        return (log_end.total_count - low.messages + count > self.max_messages
                or log_end.total_bytes - low.size + size > self.max_size)

    def is_still_over(self, tx: Tx, known: LowWatermark | None, count: int, size: int) -> bool:
        """Tell whether messages would pass a mark even if what is too old were dropped."""
        log_end = log.read_end(tx.cursor())
        low = retention.find_low_watermark(tx, log_end, is_read_only=True, known=known)
        oldest_ns = self._now_ns() - self.timeout_ns
        return (self.is_over(log_end, low, count, size)
                and low.number == retention.expired_before(tx, low, log_end, oldest_ns))

    def apply_strategy(self, tx: Tx, low: LowWatermark, count: int, size: int,
                       dropped: list[Dropped]) -> tuple[LogEnd, LowWatermark]:
        """Check the high-water marks exactly; if one is passed, drop what the strategy says."""
        log_end = log.read_end(tx.cursor())
        low = retention.find_low_watermark(tx, log_end, known=low)
        if self.is_over(log_end, low, count, size):
            low, expired = self.tidy(tx, low)
            dropped += expired
        # Each round leaves at most half of what waits, and ``check_sizes`` refuses what passes a mark
        # when nothing waits.
        while self._drops_unread and self.is_over(log_end, low, count, size):
            dropped += retention.halve(tx, count, self._drops_newest)
            log_end = log.read_end(tx.cursor())
            low = retention.find_low_watermark(tx, log_end)
        return log_end, low

    def full_error(self, count: int, size: int) -> QueueFullError:
        """Describe a full queue, and the slowest subscriber."""
        waiting, waiting_size, slowest, lag = self._environment.read(retention.describe)
        most, most_size = (limit if limit < _UNLIMITED else "any number of"
                           for limit in (self.max_messages, self.max_size))
        return QueueFullError(
            f"Expected room for {count} more message(s) of {size} bytes in the queue "
            f"{self._environment.directory}, but got: {waiting} of {most} messages (MAX_MSGS_NUM) "
            f"and {waiting_size} of {most_size} bytes (HWM_LMDB_SIZE_BYTES) wait in a store of at "
            f"most {self.max_bytes} bytes (max_db_size_bytes)." +
            (f" The slowest subscriber is {slowest!r} with {lag} of them." if lag else ""))

    # A full store, a full disk

    def used(self, tx: Tx) -> int:
        """Bytes of all pages in use."""
        used = 0
        for database in tx.db:
            stat = tx.txn.stat(database)
            used += stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] +
                                     stat["overflow_pages"])
        return used

    def free_store(self, count: int, size: int) -> bool:
        """
        Delete what is finished, then drop by the strategy, until messages fit into the store.

        :return: False if they do not fit and nothing may be dropped
        """
        while True:  # each round leaves at most half of what waits, and ends when nothing does
            self.drop_expired()
            self._environment.delete_finished(self._now_ns(), keeps_retained=False)
            used = self._environment.read(self.used)
            if used + size <= self.max_bytes:
                return True
            if not self._environment.read(retention.describe)[0]:
                raise DiskFullError(
                    f"Expected room for {size} bytes in the queue {self._environment.directory}, "
                    f"but got: {used} of {self.max_bytes} bytes (max_db_size_bytes) are in use, though "
                    "no message waits: by ids of messages (once_window_secs), or failed deliveries")
            if not self._drops_unread:
                return False
            self.drop_log.add(
                self._environment.write(retention.halve, count, self._drops_newest,
                                        makes_room=True))

    def free_disk(self) -> None:
        """Delete what is finished, in other transactions than that of the send, which failed."""
        self._environment.delete_finished(self._now_ns(), keeps_retained=False)
        # The journal, too, can then reuse segments in which all is finished.
        self._environment.write_state()

    # Tidying up

    def tidy(self,
             tx: Tx,
             known: LowWatermark | None = None,
             budget: int = retention.CHUNK) -> tuple[LowWatermark, list[Dropped]]:
        """Drop what is too old, and delete some finished blocks."""
        log_end = log.read_end(tx.cursor())
        low = retention.find_low_watermark(tx, log_end, known=known)
        now_ns = self._now_ns()
        dropped: list[Dropped] = []
        cut = retention.expired_before(tx, low, log_end, now_ns - self.timeout_ns)
        if cut > low.number:
            dropped = retention.drop(tx, 0, cut, retention.BY_TIMEOUT)
            low = retention.find_low_watermark(tx, log_end)
        log.delete_head(tx.cursor(), low.number, budget, self._environment.retained_ns(now_ns))
        return low, dropped

    def drop_expired(self) -> int:
        """Drop the messages that are older than the queue's timeout; return how many."""
        _, dropped = self._environment.write(self.tidy, makes_room=True)
        if dropped:
            self.drop_log.add(dropped)
            self._environment.notifier.notify()
        return sum(one.messages for one in dropped)
