"""
Keep the messages of one queue in one LMDB environment.

This is what :py:class:`persipubsub.publisher.Pub`, :py:class:`persipubsub.subscriber.Sub` and
:py:mod:`persipubsub.control` work with. A :py:class:`Queue` may be used by many threads at the same
time; many processes may have the same queue open.
"""

import functools
import os
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import lmdb

import persipubsub.errors
import persipubsub.statistics
from persipubsub import (_blocks, _check, _claims, _delivery, _environment, _files, _layout, _log,
                         _losses, _pending, _positions, _registry, _retention, _wakeup)
from persipubsub._opening import Databases
from persipubsub._settings import Settings

__all__ = ["Queue", "Settings"]

#: How many blocks are deleted in one transaction while an operator prunes or clears a queue.
_CHUNK_BLOCKS = 256

#: A send of more bytes than this looks for finished blocks at once.
_LARGE_BYTES = 1 << 16


class _Put:
    """Hold what one call of ``put`` adds, and what came of it."""

    __slots__ = ("batches", "count", "size", "audience", "first", "floor", "losses")

    def __init__(self, batches: List[_blocks.Batch], audience: Optional[Tuple[str, ...]]) -> None:
        self.batches = batches
        if len(batches) == 1:
            self.count, self.size, _ = batches[0]
        else:
            self.count = sum(batch.messages for batch in batches)
            self.size = sum(batch.size for batch in batches)
        self.audience = audience
        self.first = 0
        self.floor = None  # type: Optional[_retention.Floor]
        self.losses = []  # type: List[_retention.Loss]


class Queue:
    """
    Put messages into a queue and look after them.

    >>> import tempfile
    >>> directory = tempfile.TemporaryDirectory()
    >>> settings = Settings(
    ...     path=directory.name, max_bytes=1 << 24, max_readers=16, timeout_ns=10**12,
    ...     max_messages=100, max_message_bytes=10**6, drops_newest=False, keeps_os=False,
    ...     checkpoint_secs=1.0, busy_timeout_secs=10.0)
    >>> Queue.ensure(settings, subscribers=["sub"])
    >>> with Queue(settings) as queue:
    ...     queue.put([b"first", b"second"])
    ...     queue.front("sub")
    1
    b'first'
    >>> directory.cleanup()
    """

    def __init__(self, settings: Settings, clock: Optional[Callable[[], int]] = None) -> None:
        """
        Open a queue that was initialized.

        :param settings: of the queue
        :param clock:
            returns the time in nanoseconds and never goes back; the queue's own clock if not given
        :raise NotInitializedError: if there is no queue yet
        :raise FormatError: if the directory holds something else
        :raise StoreCorruptError: if the store is damaged
        """
        self.settings = settings
        self._environment = _registry.acquire(settings.path, settings.options())
        self._now_ns = clock if clock is not None else self._environment.now_ns
        self._bell = _wakeup.Bell(os.path.join(settings.path, _files.BELL))
        self._claims = _claims.Claims(os.path.join(settings.path, _files.CLAIMS))
        self._losses = _losses.LossLog(settings.path)
        self._is_closed = False

        # A single message of no more bytes needs no closer look.
        self._surely_fitting = min(
            settings.max_message_bytes, _blocks.MAX_MESSAGE_BYTES,
            settings.max_bytes - _blocks.BLOCK_BYTES // 8 - _blocks.ENTRY_BYTES)

        # Remembered between sends; written by whoever holds the environment's write lock.
        self._floor = None  # type: Optional[_retention.Floor]
        self._audiences = {}  # type: Dict[Tuple[str, ...], int]

    @staticmethod
    def ensure(settings: Settings, subscribers: Sequence[str]) -> None:
        """
        Create the queue and its subscribers, as far as they are not there. It may be repeated.

        The store is durable when the call returns. New subscribers begin at the end of the queue.
        A store of another durability is changed, if no process uses it.

        :param settings: of the queue
        :param subscribers: ids of all its subscribers; others that are there stay
        :raise QueueInUseError: to change the durability while it is used
        """
        options = settings.options()
        _registry.create(settings.path, options)
        environment = _registry.acquire(settings.path, options, adopts_durability=True)
        try:
            keys = [subscriber.encode("utf-8") for subscriber in subscribers]
            if environment.read(functools.partial(_positions.lacks, keys=keys)):
                environment.write(functools.partial(_positions.add, keys=keys))
                environment.flush_now()
        finally:
            _registry.release(environment)

    def __enter__(self) -> "Queue":
        """
        Use the queue as a context manager.

        :return: itself
        """
        return self

    def __exit__(self, *_: object) -> None:
        """Close the queue."""
        self.close()

    def close(self) -> None:
        """Close the queue; it may be closed twice. What was put stays."""
        if self._is_closed:
            return
        self._is_closed = True
        self._losses.report(force=True)
        self._claims.close()
        self._bell.close()
        _registry.release(self._environment)

    def _check_open(self) -> None:
        """
        Check that the queue was not closed.

        :raise ClosedError: if it was
        """
        if self._is_closed:
            raise persipubsub.errors.ClosedError(
                "Expected the queue {} to be open, but got: it was closed".format(
                    self.settings.path))

    # Putting

    def put(self, messages: Sequence[bytes], audience: Optional[Tuple[str, ...]] = None) -> int:
        """
        Add messages at the end of the queue, all of them or none.

        They are as safe as the durability says when the call returns. It takes no longer when there
        are more subscribers or more waiting messages.

        :param messages: in the order in which they are to be received
        :param audience: ids of the subscribers that get them; everybody if not given
        :return: number of the first message
        :raise MessageTooLargeError: if the queue could never hold them
        :raise BusyTimeoutError: if another process is in the middle of a write for too long
        :raise DiskFullError: if there is no room, and dropping messages made none
        """
        self._check_open()
        if len(messages) != 1 or len(messages[0]) > self._surely_fitting:
            self.settings.check_size(messages)
        put = _Put(_blocks.encode_batches(messages), audience)
        try:
            self._environment.write(functools.partial(self._put, put=put), is_flushed=True)
        except _environment.MapFullError:
            self._put_into_full_map(put)
        except persipubsub.errors.DiskFullError:
            self._put_onto_full_disk(put)
        except BaseException:
            self._floor = None
            raise
        self._floor = put.floor
        try:
            self._bell.ring()
        except persipubsub.errors.PersipubsubError:
            pass  # it is sent; subscribers look once a second anyhow
        if put.losses:
            self._losses.add(put.losses)
        return put.first

    def require_subscribers(self, subscribers: Sequence[str]) -> None:
        """
        Check that subscribers were initialized.

        :param subscribers: ids
        :raise NotInitializedError: if one of them was not
        """
        self._check_open()
        keys = [subscriber.encode("utf-8") for subscriber in subscribers]

        def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> None:
            for key in keys:
                _positions.require(txn, databases, key)

        self._environment.read(work)

    def _put(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, put: _Put) -> None:
        """
        Add messages at the end of the log and tidy up a little at its beginning.

        :param txn: write transaction
        :param databases: handles
        :param put: what to add; gets the result
        """
        cursor = txn.cursor(db=databases.data)
        tail = _log.read_tail(cursor)
        floor = self._floor
        put.losses = []
        if floor is None or floor.generation != tail.generation:
            floor = _retention.find_floor(txn, databases, tail)
        if self._is_over(tail, floor, put):
            tail, floor = self._make_room(txn, databases, tail, put)
        put.first = tail.next_number
        audience = self._find_audience(txn, databases, put.audience) if put.audience else 0
        tail = _log.append(cursor, tail, self._now_ns(), audience, put.batches)

        interval = _retention.interval_of(floor)
        if (put.size > _LARGE_BYTES or tail.next_number // interval != put.first // interval):
            floor = self._tidy(txn,
                               databases,
                               tail,
                               put.losses,
                               budget=2 * (interval + len(put.batches)))
        put.floor = floor

    def _is_over(self, tail: _log.Tail, floor: _retention.Floor, put: _Put) -> bool:
        """
        Tell whether messages would pass a high-water mark.

        :param tail: end of the log
        :param floor: how far all subscribers have come, at least
        :param put: what is to be added
        :return: True if there is too much
        """
        return (tail.total_count - floor.messages + put.count > self.settings.max_messages
                or tail.total_bytes - floor.size + put.size > self.settings.max_message_bytes)

    def _make_room(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, tail: _log.Tail,
                   put: _Put) -> "Tuple[_log.Tail, _retention.Floor]":
        """
        Look closely at the high-water marks, and drop messages if they are passed.

        :param txn: write transaction
        :param databases: handles
        :param tail: end of the log
        :param put: what is to be added
        :return: new end of the log, how far all subscribers have come
        """
        floor = _retention.find_floor(txn, databases, tail)
        if self._is_over(tail, floor, put):
            floor = self._tidy(txn, databases, tail, put.losses, budget=_CHUNK_BLOCKS)
        while self._is_over(tail, floor, put):
            tail, losses = _retention.halve(txn,
                                            databases,
                                            floor,
                                            tail,
                                            drops_newest=self.settings.drops_newest)
            put.losses.extend(losses)
            floor = _retention.find_floor(txn, databases, tail)
        return tail, floor

    def _tidy(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, tail: _log.Tail,
              losses: List[_retention.Loss], budget: int) -> _retention.Floor:
        """
        Drop what is too old, and delete some finished blocks.

        :param txn: write transaction
        :param databases: handles
        :param tail: end of the log
        :param losses: to be extended by what was dropped
        :param budget: how many blocks to delete at most
        :return: how far all subscribers have come
        """
        floor = _retention.find_floor(txn, databases, tail)
        cut = _retention.expired_before(txn, databases, floor, tail,
                                        self._now_ns() - self.settings.timeout_ns)
        if cut > floor.number:
            losses.extend(_retention.drop_before(txn, databases, cut, _retention.count_timeout))
            floor = _retention.find_floor(txn, databases, tail)
        _log.delete_head(txn.cursor(db=databases.data),
                         floor.audiences,
                         floor.everyone,
                         budget=budget)
        return floor

    def _find_audience(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
                       subscribers: Tuple[str, ...]) -> int:
        """
        Find the audience of a list of subscribers.

        :param txn: write transaction
        :param databases: handles
        :param subscribers: ids
        :return: audience
        """
        key, members = _layout.audience_key, _layout.pack_audience(subscribers)
        audience = self._audiences.get(subscribers)
        # A transaction that failed may have taken the audience back, and another one may have given
        # its number to other subscribers.
        if audience is None or bytes(txn.get(key(audience), b"", db=databases.meta)) != members:
            audience = _log.ensure_audience(txn, databases, subscribers)
            self._audiences[subscribers] = audience
        return audience

    def _put_into_full_map(self, put: _Put) -> None:
        """
        Put messages into a full store: delete what is finished, then drop by the strategy.

        :param put: what is to be added
        :raise DiskFullError: if it does not fit although nothing is left to be dropped
        """
        waiting = 1
        # A process that was killed in a read may keep everything that was freed since then.
        self._environment.check_readers()
        while True:
            self._floor = None
            self.delete_finished()
            self._environment.write(_retention.make_reusable, may_grow=True)
            try:
                # With nothing left to be dropped, the free pages are only too scattered for it.
                work = functools.partial(self._put, put=put)
                self._environment.write(work, is_flushed=True, may_grow=not waiting)
                return
            except _environment.MapFullError:
                if not waiting:
                    raise
            waiting, losses = self._environment.write(self._shrink, may_grow=True)
            self._losses.add(losses)

    def _put_onto_full_disk(self, put: _Put) -> None:
        """
        Put messages where finished ones were, which a send that fails can not delete by itself.

        :param put: what is to be added
        :raise DiskFullError: if there are too few of them
        """
        self._floor = None
        self.delete_finished()
        self._environment.write(_retention.make_reusable, may_grow=True)
        self._environment.write(functools.partial(self._put, put=put), is_flushed=True)

    def _shrink(self, txn: "lmdb.Transaction[memoryview]",
                databases: Databases) -> Tuple[int, List[_retention.Loss]]:
        """
        Drop half of the messages.

        :param txn: write transaction
        :param databases: handles
        :return: how many messages there were, what was dropped unread
        """
        tail = _log.read_tail(txn.cursor(db=databases.data))
        floor = _retention.find_floor(txn, databases, tail)
        waiting = tail.total_count - floor.messages
        if not waiting:
            return 0, []
        drops_newest = self.settings.drops_newest
        return waiting, _retention.halve(txn, databases, floor, tail, drops_newest=drops_newest)[1]

    # Receiving

    def consumer(self, subscriber: str) -> "_delivery.Consumer":
        """
        Take part in the work of a subscriber.

        :param subscriber: its id
        :return: from which messages can be taken
        :raise NotInitializedError: if the queue has no such subscriber
        """
        self._check_open()
        return _delivery.Consumer(environment=self._environment,
                                  claims=self._claims,
                                  bell=self._bell,
                                  pending=_pending.Pending(subscriber, self.settings.timeout_ns,
                                                           self._now_ns),
                                  expire=self.drop_expired)

    def front(self, subscriber: str) -> Optional[bytes]:
        """
        Look at the next message of a subscriber without taking it.

        :param subscriber: its id
        :return: message that nobody has acknowledged or claimed; None if there is none
        """
        return self.consumer(subscriber).front()

    def skip_to_newest(self, subscriber: str) -> int:
        """
        Acknowledge all messages of a subscriber but the newest one, in one transaction.

        :param subscriber: its id
        :return: how many were acknowledged by that
        """
        self._check_open()
        key = subscriber.encode("utf-8")
        return self._environment.write(functools.partial(_retention.skip_to_newest, key=key),
                                       may_grow=True)

    # Looking after the queue

    def drop_expired(self) -> int:
        """
        Drop the messages that are older than the queue's timeout, for all subscribers.

        :return: how many deliveries were dropped
        """
        self._check_open()
        losses = []  # type: List[_retention.Loss]

        def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> None:
            losses.clear()
            tail = _log.read_tail(txn.cursor(db=databases.data))
            self._tidy(txn, databases, tail, losses, budget=_CHUNK_BLOCKS)

        self._environment.write(work, may_grow=True)
        self._losses.add(losses)
        return sum(loss.messages for loss in losses)

    def delete_finished(self) -> int:
        """
        Delete all messages that everybody acknowledged, in many short transactions.

        Senders get their turn between them.

        :return: how many blocks were deleted
        """
        self._check_open()

        total = 0
        while True:
            deleted = self._environment.write(functools.partial(_retention.delete_finished,
                                                                budget=_CHUNK_BLOCKS),
                                              may_grow=True)
            total += deleted
            if deleted < _CHUNK_BLOCKS:
                return total

    def prune(self) -> int:
        """
        Drop the messages that are too old, and delete those that everybody acknowledged.

        :return: how many deliveries were dropped
        """
        dropped = self.drop_expired()
        self.delete_finished()
        return dropped

    def clear(self) -> int:
        """
        Drop all messages; subscribers and numbers stay.

        All messages leave in one transaction; what they took on the disk is freed after it.

        :return: how many deliveries were dropped
        """
        self._check_open()
        losses = self._environment.write(_retention.clear, may_grow=True)
        self.delete_finished()
        return sum(loss.messages for loss in losses)

    def statistics(self) -> persipubsub.statistics.QueueStatistics:
        """
        Count what is in the queue, without a walk through the messages.

        It is a consistent snapshot (but for what is in flight), and holds up nobody.

        :return: figures of the queue and of its subscribers
        """
        self._check_open()
        return persipubsub.statistics.collect(self._environment, self.settings, self._now_ns())

    def check(self) -> List[str]:
        """
        Check all invariants of the store: a walk through all messages, in one snapshot.

        :return: what is wrong; nothing if it is sound
        """
        self._check_open()
        return self._environment.read(_check.check)
