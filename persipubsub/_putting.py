"""
Add messages to a queue, and make the room for them that its high-water marks ask for.

A send looks at the positions of subscribers only every few messages: what it remembers of them is a
safe lower bound. It deletes a bounded number of finished messages at the head, about twice what it
adds, so that no send ever pays for the whole queue.
"""

import functools
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import lmdb

import persipubsub.errors
from persipubsub import _losses, _wakeup
from persipubsub._settings import Settings
from persipubsub.environment import _environment
from persipubsub.store import _blocks, _layout, _log, _retention
from persipubsub.store._databases import Databases

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


class Putter:
    """Add messages to one open queue, from any number of threads."""

    def __init__(self, settings: Settings, environment: _environment.Environment,
                 bell: _wakeup.Bell, losses: _losses.LossLog, now_ns: Callable[[], int]) -> None:
        """
        Initialize without looking at the store.

        :param settings: of the queue
        :param environment: of the queue
        :param bell: of the queue
        :param losses: are told of messages that were dropped unread
        :param now_ns: reads the queue's clock
        """
        self._settings = settings
        self._environment = environment
        self._bell = bell
        self._losses = losses
        self._now_ns = now_ns

        # A single message of no more bytes needs no closer look.
        self._surely_fitting = min(
            settings.max_message_bytes, _blocks.MAX_MESSAGE_BYTES,
            settings.max_bytes - _blocks.BLOCK_BYTES // 8 - _blocks.ENTRY_BYTES)

        # Remembered between sends; written by whoever holds the environment's write lock.
        self._floor = None  # type: Optional[_retention.Floor]
        self._audiences = {}  # type: Dict[Tuple[str, ...], int]

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
        if len(messages) != 1 or len(messages[0]) > self._surely_fitting:
            self._settings.check_size(messages)
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
        self._finish(put.losses)
        return put.first

    def put_each(
        self, puts: Sequence[Tuple[Sequence[bytes], Optional[Tuple[str, ...]]]]
    ) -> List[Optional[BaseException]]:
        """
        Put for several callers, each of them all or nothing, in one commit if nothing is wrong.

        :param puts: messages and audience of each
        :return: error of each; None if it was put
        """
        if not puts:
            return []
        try:
            if len(puts) == 1:
                self.put(*puts[0])
            else:
                self._put_together(puts)
        except persipubsub.errors.BusyTimeoutError as error:
            # Nobody is at fault, and everybody waited long enough.
            return [error] * len(puts)
        except persipubsub.errors.PersipubsubError as error:
            if len(puts) == 1:
                return [error]
            # Halves, so that those who are not at fault share as few commits as can be.
            half = len(puts) // 2
            return self.put_each(puts[:half]) + self.put_each(puts[half:])
        return [None] * len(puts)

    def _put_together(self, puts: Sequence[Tuple[Sequence[bytes], Optional[Tuple[str,
                                                                                 ...]]]]) -> None:
        """
        Put for several callers in one commit, or nothing of it.

        :param puts: messages and audience of each
        """
        made = []  # type: List[_Put]
        for messages, audience in puts:
            self._settings.check_size(messages)
            made.append(_Put(_blocks.encode_batches(messages), audience))

        def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> None:
            for put in made:
                self._put(txn, databases, put)

        try:
            self._environment.write(work, is_flushed=True)
        except BaseException:
            self._floor = None
            raise
        self._floor = made[-1].floor
        self._finish([loss for put in made for loss in put.losses])

    def _finish(self, losses: List[_retention.Loss]) -> None:
        """
        Tell the others of a commit.

        :param losses: what was dropped unread in it
        """
        try:
            self._bell.ring()
        except persipubsub.errors.PersipubsubError:
            pass  # it is sent; subscribers look once a second anyhow
        if losses:
            self._losses.add(losses)

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
            floor = self.tidy(txn,
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
        return (tail.total_count - floor.messages + put.count > self._settings.max_messages
                or tail.total_bytes - floor.size + put.size > self._settings.max_message_bytes)

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
            floor = self.tidy(txn, databases, tail, put.losses, budget=_CHUNK_BLOCKS)
        while self._is_over(tail, floor, put):
            tail, losses = _retention.halve(txn,
                                            databases,
                                            floor,
                                            tail,
                                            drops_newest=self._settings.drops_newest)
            put.losses.extend(losses)
            floor = _retention.find_floor(txn, databases, tail)
        return tail, floor

    def tidy(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, tail: _log.Tail,
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
                                        self._now_ns() - self._settings.timeout_ns)
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
        drops_newest = self._settings.drops_newest
        return waiting, _retention.halve(txn, databases, floor, tail, drops_newest=drops_newest)[1]

    def drop_expired(self) -> int:
        """
        Drop the messages that are older than the queue's timeout, for all subscribers.

        :return: how many deliveries were dropped
        """
        losses = []  # type: List[_retention.Loss]

        def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> None:
            losses.clear()
            tail = _log.read_tail(txn.cursor(db=databases.data))
            self.tidy(txn, databases, tail, losses, budget=_CHUNK_BLOCKS)

        self._environment.write(work, may_grow=True)
        self._losses.add(losses)
        return sum(loss.messages for loss in losses)

    def delete_finished(self) -> int:
        """
        Delete all messages that everybody acknowledged, in many short transactions.

        Senders get their turn between them.

        :return: how many blocks were deleted
        """
        total = 0
        while True:
            deleted = self._environment.write(functools.partial(_retention.delete_finished,
                                                                budget=_CHUNK_BLOCKS),
                                              may_grow=True)
            total += deleted
            if deleted < _CHUNK_BLOCKS:
                return total
