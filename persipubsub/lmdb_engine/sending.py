"""
Add messages to a queue.

A send looks at the positions of subscribers only every few messages. It remembers the low
watermark, which is a safe lower bound of them. At each look it also deletes some finished messages
at the head. The flush of a send is ``Journal.secure``.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from persipubsub.config import Durability, Strategy
from persipubsub.errors import (BusyTimeoutError, ClosedError, DiskFullError, FlushError,
                                MessageError, PersipubsubError)
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, once, retention
from persipubsub.lmdb_engine.datafile import MapFullError
from persipubsub.lmdb_engine.environment import Environment
from persipubsub.lmdb_engine.format import Tx
from persipubsub.lmdb_engine.journal import MESSAGE_COST
from persipubsub.lmdb_engine.retention import Dropped, LowWatermark
from persipubsub.lmdb_engine.room import Room
from persipubsub.shared_errors import copy_of

#: Messages, recipients and ids of one send.
Sending = tuple[Sequence[bytes], tuple[str, ...] | None, Sequence[bytes | None] | None]

#: After so many bytes a send looks for finished blocks at once, however few messages they are.
_LARGE_BYTES: Final = 1 << 16

#: A sender that waits for room looks at the queue again after this time, in seconds, even without a
#: notification: a subscriber may die between its commit and its notification, and messages become
#: too old without one.
_LONGEST_PAUSE_SECS: Final = 1.0


class _StoreFullError(DiskFullError):
    """The pages in use would pass ``max_db_size_bytes``."""


class _JournalFullError(DiskFullError):
    """The journal needs a segment, which is not made under the write lock."""


class _Batch:
    """Messages of one send, encoded before any lock is taken."""

    __slots__ = ("messages", "recipients", "msg_ids", "bodies", "count", "size", "cost", "first",
                 "error", "waiter")

    def __init__(self, messages: Sequence[bytes], recipients: tuple[str, ...] | None,
                 msg_ids: Sequence[bytes | None] | None) -> None:
        """Encode messages."""
        self.messages = messages
        self.recipients = recipients
        self.msg_ids = msg_ids
        self.bodies = fmt.encode_bodies(messages)
        self.count = len(messages)
        self.size = len(messages[0]) if self.count == 1 else sum(map(len, messages))
        self.cost = self.size + MESSAGE_COST * self.count
        if msg_ids is not None:
            self.cost += sum(len(msg_id or b"") for msg_id in msg_ids)
        # What came of it: number of the first message, 0 if the queue was full; or an error.
        self.first: int = 0
        self.error: BaseException | None = None
        self.waiter: threading.Lock  # see ``_Line``

    def without_known(self, tx: Tx, oldest_ns: int) -> tuple["_Batch", int]:
        """
        Leave out the messages whose ids are known; of an id that comes twice, the first one stays.

        :return: what is left; number under which the first message is stored, 0 if it is new
        """
        msg_ids = self.msg_ids or ()
        known: dict[bytes, int] = {}
        left: list[int] = []
        for index, msg_id in enumerate(msg_ids):
            number = 0
            if msg_id is not None:
                if msg_id in known:
                    continue
                number = known[msg_id] = once.find(tx, msg_id, oldest_ns)
            if not number:
                left.append(index)
        return _Batch([self.messages[index] for index in left], self.recipients,
                      [msg_ids[index] for index in left]), known.get(msg_ids[0] or b"", 0)


def _fail(batches: Sequence[_Batch], error: BaseException | None) -> None:
    """Note an error, if any, of several batches: one for each, as each has a thread or a task."""
    for batch in batches:
        batch.error = error if error is None or len(batches) == 1 else copy_of(error)


def _not_safe(error: PersipubsubError) -> PersipubsubError:
    """Say that a message was stored before the error: a DiskFullError, say, means that it was not."""
    stored = "The message is in the queue, but not yet safe."
    if stored in str(error):
        return error
    kind = type(error) if isinstance(error, (BusyTimeoutError, ClosedError)) else FlushError
    made = kind(f"{str(error).removesuffix('.')}. {stored}")
    made.__cause__ = error
    return made


class _Line:
    """
    Threads that send to one open queue at the same time: one of them sends for all that wait.

    They share a transaction and a flush. If each thread had a transaction of its own, 16 threads
    would use most of their time to hand over the interpreter's lock.
    """

    def __init__(self) -> None:
        """Initialize with nobody waiting."""
        # The main thread is never one of them: an exception of a signal handler may end its send at
        # any place, and other threads must not notice.
        self.main_thread = threading.main_thread().ident
        self._lock = threading.Lock()  # guards the two below, for a moment
        self._waiting: list[_Batch] = []
        # The thread that sends for all. 0: there is none. -1: the first one in ``_waiting`` will.
        self._leader = 0

    def send(self, batch: _Batch, send_all: Callable[[Sequence[_Batch]], None]) -> None:
        """Send a batch with those of the threads that wait, or wait until another thread sends it."""
        if self._leader == threading.get_ident():
            # This thread sends for all and logs that it dropped messages; a log handler of the user
            # sends. It must not wait for itself.
            send_all([batch])
            return
        with self._lock:
            self._waiting.append(batch)
            # If a thread sends for all, this one waits until that one releases it.
            batch.waiter = threading.Lock()
            if self._leader:
                batch.waiter.acquire()  # pylint: disable=consider-using-with
            self._leader = self._leader or -1
        batch.waiter.acquire()  # pylint: disable=consider-using-with
        if batch not in self._waiting:
            return  # it was sent
        with self._lock:
            self._leader = threading.get_ident()
            batches, self._waiting = self._waiting, []
        try:
            send_all(batches)
        except BaseException as error:
            for one in batches:
                one.error = copy_of(error)
            raise
        finally:
            with self._lock:
                # The first one that came meanwhile is the next to send for all.
                following = self._waiting[:1]
                self._leader = -1 if following else 0
            for one in (*batches, *following):
                if one is not batch:
                    one.waiter.release()


class Sender:
    """Adds messages to one open queue. Any thread may use it."""

    def __init__(self, environment: Environment, room: Room, now_ns: Callable[[], int]) -> None:
        """Initialize without looking at the store."""
        self._environment = environment
        self._room = room
        self._now_ns = now_ns
        self._waits = room.strategy is Strategy.BLOCK
        self._is_flushed = environment.queue.durability is Durability.FSYNC

        # The low watermark of the last send. Threads store it after their commits, in any order: an
        # older one is a lower bound, too.
        self._low: LowWatermark | None = None
        # After the last send: end of the log, LMDB's number of the transaction, and how many had
        # been aborted, since LMDB gives the number of an aborted one again; under the write lock.
        self._end = (log.EMPTY, -1, 0)
        # Indices of lists of recipients, under the write lock.
        self._audiences: dict[tuple[str, ...], int] = {}
        self._line = _Line()

    def forget_parent(self) -> None:
        """Begin with a line in which no thread of the parent waits."""
        self._line = _Line()

    def put(self,
            messages: Sequence[bytes],
            recipients: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> int:
        """
        Add messages at the end of the queue, all of them or none; return the number of the first.

        :param timeout: seconds to wait for room, with the strategy ``block``; None: for ever
        """
        if len(messages) != 1 or len(messages[0]) > self._room.surely_fitting:
            self._room.check_sizes(messages)
        batch = _Batch(messages, recipients, msg_ids or None)
        first: int | None = self._send(batch)
        if not first and self._waits and timeout != 0:
            deadline = None if timeout is None else time.monotonic() + timeout
            first = self._environment.notifier.wait_for(
                lambda: (self._send_if_room(batch), _LONGEST_PAUSE_SECS), deadline)
        if not first:
            raise self._room.full_error(batch.count, batch.size)
        return first

    def _send(self, batch: _Batch) -> int:
        """Add messages; return the number of the first, 0 if the queue is full."""
        # Without a flush, a transaction for each thread is faster.
        if not self._is_flushed or threading.get_ident() == self._line.main_thread:
            self._commit([batch])
        else:
            self._line.send(batch, self._commit_each)
        if batch.error is not None:
            raise batch.error
        return batch.first

    def _send_if_room(self, batch: _Batch) -> int:
        """Look before writing: senders that wait for room must not block other writers."""
        is_full = self._environment.read(self._room.is_still_over, self._low, batch.count,
                                         batch.size)
        return 0 if is_full else self._send(batch)

    def put_each(self, sendings: Sequence[Sending]) -> list[BaseException | None]:
        """Put each as :py:meth:`put` does, but never wait for room; in one commit if possible."""
        outcomes: list[BaseException | None] = [None] * len(sendings)
        batches: dict[int, _Batch] = {}
        for index, (messages, recipients, msg_ids) in enumerate(sendings):
            try:
                self._room.check_sizes(messages)
                batches[index] = _Batch(messages, recipients, msg_ids or None)
            except MessageError as error:
                outcomes[index] = error
        self._commit_each(list(batches.values()))
        for index, batch in batches.items():
            outcomes[index] = batch.error
            if batch.error is None and not batch.first:
                outcomes[index] = self._room.full_error(batch.count, batch.size)
        return outcomes

    def _commit_each(self, batches: Sequence[_Batch]) -> None:
        """Add the messages of several sends, in one commit if possible, and note all errors."""
        try:
            self._commit(batches)
            return
        except PersipubsubError as error:
            # In the case of a timeout, all of them waited long enough.
            if len(batches) == 1 or isinstance(error, BusyTimeoutError):
                _fail(batches, error)
                return
        # One of them is at fault: each is tried by itself, not in the block above, which would make
        # the error of all the context of each.
        for batch in batches:
            self._commit_each([batch])

    def _commit(self, batches: Sequence[_Batch]) -> None:
        """Add messages, all or none; notify, flush, and note in each batch what came of it."""
        environment = self._environment
        # Not the error itself: its traceback has this frame, so that neither would be freed before
        # the garbage collector runs, and the queue's files would stay open after a close.
        cause: type[DiskFullError] | None = None
        cost, deadline, was_freed = 0, 0.0, False
        while True:  # until the deadline: other senders may use the room that this one has made
            try:
                if cause is not None and not self._make_room(cause, cost, batches[0]):
                    return
                numbers, end, low, dropped = environment.write(self._append, batches, self._low)
                break
            except DiskFullError as error:
                is_disk = not isinstance(error, (_JournalFullError, _StoreFullError, MapFullError))
                if len(batches) > 1 or is_disk and was_freed:
                    raise
                if not deadline:
                    deadline = time.monotonic() + environment.queue.busy_timeout_secs
                elif time.monotonic() > deadline:
                    raise BusyTimeoutError(
                        f"Expected to use the room that was made in the queue {environment.directory} "
                        f"within {environment.queue.busy_timeout_secs} seconds (busy_timeout_secs), "
                        "but got: other senders used it each time. Nothing was sent.") from error
                cause, was_freed = type(error), was_freed or is_disk
                cost = error.args[1] if isinstance(error, _JournalFullError) else 0
        self._low = low
        if dropped:
            self._room.drop_log.add(dropped)
        failure: PersipubsubError | None = None
        if dropped or any(numbers):
            # Notify before the flush: consumers wake up meanwhile. Those that are awake see the
            # messages before the flush, too.
            environment.notifier.notify(end)
            if self._is_flushed:
                try:
                    environment.journal.secure(end)
                except PersipubsubError as error:
                    # It is not raised: nothing that was committed is tried again.
                    failure = _not_safe(error)
        for batch, number in zip(batches, numbers):
            batch.first, batch.error = number, None
        _fail([batch for batch in batches if batch.first], failure)

    def _make_room(self, cause: type[DiskFullError], cost: int, batch: _Batch) -> bool:
        """Make room for a batch; return False if the store is full and nothing may be dropped."""
        environment = self._environment
        if cause is _JournalFullError:
            environment.journal.make_room(cost, self._is_flushed)
        elif cause in (_StoreFullError, MapFullError):
            if cause is MapFullError:
                environment.check_readers()
                environment.check_stuck_readers()
            self._low = None
            return self._room.free_store(batch.count, batch.size)
        else:
            self._room.free_disk()
        return True

    # In a transaction

    def _append(self, tx: Tx, batches: Sequence[_Batch],
                low: LowWatermark | None) -> tuple[list[int], int, LowWatermark, list[Dropped]]:
        """
        Add messages at the end of the log, all or none, and tidy up a little at its beginning.

        :return: number of the first message of each batch, 0 if the queue is at a limit and drops
            nothing; end of the log; low watermark; what was dropped
        """
        environment, room = self._environment, self._room
        # If no transaction wrote since the last send, the end of the log is as that left it. To
        # read it would take a tenth of a send.
        log_end, txn_id, aborted = self._end
        if not (txn_id == environment.committed == tx.txn.id() - 1
                and aborted == environment.aborted):
            log_end = log.read_end(tx.cursor())
        if low is None or low.generation != log_end.generation:
            low = retention.find_low_watermark(tx, log_end)
        now_ns = self._now_ns()
        numbers: list[int] = []
        dropped: list[Dropped] = []
        for batch in batches:
            known = 0
            if batch.msg_ids is not None:
                once.forget(tx, now_ns - room.once_window_ns, budget=2 * batch.count)
                batch, known = batch.without_known(tx, now_ns - room.once_window_ns)
                if not batch.count:
                    numbers.append(known)
                    continue
            if room.is_over(log_end, low, batch.count, batch.size):
                log_end, low = room.apply_strategy(tx, low, batch.count, batch.size, dropped)
                if room.is_over(log_end, low, batch.count, batch.size):
                    # Do not raise here: that aborts the transaction, and the expired messages would
                    # come back.
                    numbers.append(0)
                    continue
            number, total = log_end.next_number, log_end.total_bytes
            is_time = ((number + batch.count) // low.interval != number // low.interval
                       or (total + batch.size) // _LARGE_BYTES != total // _LARGE_BYTES)
            if is_time and room.used(tx) + batch.size > room.max_bytes:
                raise _StoreFullError("Expected room in the store, but got: none")
            audience = self._find_audience(tx, batch.recipients) if batch.recipients else 0
            cost = batch.cost + 8 * len(log_end.totals) * len(batch.bodies)
            if not environment.journal.reserve(cost):
                raise _JournalFullError("Expected room in the journal, but got: none", cost)
            log_end = log.append(tx, log_end, now_ns, audience, batch.bodies)
            self._end = log_end, tx.txn.id(), environment.aborted
            for place, msg_id in enumerate(batch.msg_ids or ()):
                if msg_id is not None:
                    once.remember(tx, msg_id, number + place, now_ns)
            if is_time:
                low, expired = room.tidy(tx, low, 2 * (low.interval + len(batch.bodies)))
                dropped += expired
            numbers.append(known or number)
        return numbers, log_end.next_number, low, dropped

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
