"""
Add messages to a queue, and make the room for them that its high-water marks ask for.

A send looks at the positions of subscribers only every few messages: what it remembers of them is a
safe lower bound. It deletes a bounded number of finished messages at the head, about twice what it
adds, so that no send ever pays for the whole queue.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Optional

import lmdb

import persipubsub.config
import persipubsub.errors
from persipubsub import _addition, _losses, _tidying, _wakeup
from persipubsub._settings import Settings
from persipubsub.environment import _environment
from persipubsub.store import _blocks, _databases, _layout, _log, _once, _retention
from persipubsub.store._databases import Databases

#: After so many bytes a send looks for finished blocks at once, however few messages they are.
_LARGE_BYTES = 1 << 16

#: An empty queue has less than that beside messages.
_EMPTY_BYTES = 1 << 17

#: Who waits for room looks at the queue this often whatever happens, in seconds: a subscriber may
#: die between its commit and its ring, and messages become too old without one.
_LONGEST_PAUSE_SECS = 1.0


class Putter:
    """Add messages to one open queue, from any number of threads."""

    def __init__(  # pylint: disable=too-many-arguments,too-many-positional-arguments
            self, settings: Settings, environment: _environment.Environment, bell: _wakeup.Bell,
            losses: _losses.LossLog, tidier: _tidying.Tidier, now_ns: Callable[[], int]) -> None:
        """
        Initialize without looking at the store.

        :param settings: of the queue
        :param environment: of the queue
        :param bell: of the queue
        :param losses: are told of messages that were dropped unread
        :param tidier: of the queue
        :param now_ns: reads the queue's clock
        """
        self._settings = settings
        self._environment = environment
        self._bell = bell
        self._losses = losses
        self._tidier = tidier
        self._now_ns = now_ns
        self._drops_unread = settings.drops_unread
        self._max_messages = settings.max_messages
        self._max_message_bytes = settings.max_message_bytes
        self._drops_newest = settings.strategy is persipubsub.config.Strategy.PRUNE_LAST

        # A single message of no more bytes needs no closer look.
        self._surely_fitting = min(
            settings.max_message_bytes, _blocks.MAX_MESSAGE_BYTES,
            settings.max_bytes - _blocks.BLOCK_BYTES // 8 - _blocks.ENTRY_BYTES)

        # Whether the last send found no room. Then the next one looks before it writes, so that
        # nobody who waits keeps the others from the write lock. Only a guess.
        self._was_full = False

        # Remembered between sends. The first is written behind a commit, in any order: an older one
        # still is a lower bound. The second is under the environment's write lock.
        self._floor: _retention.Floor | None = None
        self._audiences: dict[tuple[str, ...], int] = {}

    def put(self,
            messages: Sequence[bytes],
            audience: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> int:
        """
        Add messages at the end of the queue, all of them or none.

        They are as safe as the durability says when the call returns. It takes no longer when there
        are more subscribers or more waiting messages.

        :param messages: in the order in which they are to be received
        :param audience: ids of the subscribers that get them; everybody if not given
        :param timeout:
            how long to wait for room where the strategy is ``block``, in seconds; None: for ever
        :param msg_ids:
            of the messages, as many as these, None for those without; a message of an id that is
            known is left out
        :return: number of the first message; of one that is left out, of the one that is stored
        :raise MessageTooLargeError: if the queue could never hold them
        :raise QueueFullError: if there is no room, and the strategy is to drop nothing
        :raise BusyTimeoutError: if another process is in the middle of a write for too long
        :raise DiskFullError: if there is no room, and dropping messages made none
        """
        if len(messages) != 1 or len(messages[0]) > self._surely_fitting:
            self._settings.check_size(messages)
        put = _addition.Put(messages, audience, msg_ids or None)
        if self._drops_unread:
            self._write(put)
        else:
            self._write_when_there_is_room(put, timeout)
        return put.first

    def _write(self, put: _addition.Put) -> None:
        """
        Add messages, ring, and warn of what was dropped.

        :param put: what to add; gets the result
        """
        add = self._put if put.msg_ids is None else self._put_once

        # Not a partial function: with a keyword it takes three times as long to be called. The type
        # in quotes: it would be evaluated at each send.
        def work(txn: "lmdb.Transaction[memoryview]",
                 databases: Databases) -> "Optional[_log.Tail]":
            return add(txn, databases, put)

        def ring() -> None:
            if not put.is_full or put.losses:
                self._ring(0 if put.is_full else put.first + put.count)

        try:
            # Before the flush, if there is one: subscribers wake up meanwhile. Those who are awake
            # see a message as early.
            self._environment.write(work, True, False, ring)
        except _environment.MapFullError:
            self._put_into_full_map(put, work)
            ring()
        except persipubsub.errors.DiskFullError:
            self._put_onto_full_disk(work)
            ring()
        except BaseException:
            self._floor = None
            raise
        self._floor = put.floor
        if put.losses:
            self._losses.add(put.losses)

    def _ring(self, end: int) -> None:
        """
        Wake subscribers.

        :param end: a number that the log has come up to; 0 if nothing was added
        """
        try:
            self._bell.ring(end)
        except persipubsub.errors.PersipubsubError:
            pass  # it is sent; subscribers look once a second anyhow

    def _write_when_there_is_room(self, put: _addition.Put, timeout: float | None) -> None:
        """
        Add messages to a queue that drops nothing; wait for room if that is the strategy.

        An exception, as of a signal, while it waits leaves nothing sent.

        :param put: what to add; gets the result
        :param timeout: how long to wait, in seconds; None: for ever
        :raise QueueFullError: if there was no room in time
        """
        if self._write_if_there_is_room(put):
            return
        is_blocking = self._settings.strategy is persipubsub.config.Strategy.BLOCK
        if is_blocking and (timeout is None or timeout > 0):
            deadline = None if timeout is None else time.monotonic() + timeout
            with self._bell.prepare() as ticket:
                while True:
                    ticket.arm()
                    if self._write_if_there_is_room(put):
                        return
                    pause = _LONGEST_PAUSE_SECS
                    if deadline is not None:
                        pause = min(pause, deadline - time.monotonic())
                        if pause <= 0:
                            break
                    ticket.wait(pause)
        raise self._full_error(put)

    def _write_if_there_is_room(self, put: _addition.Put) -> bool:
        """
        Add messages unless the queue is full.

        :param put: what to add; gets the result
        :return: False if it is full, and nothing was added
        """
        if self._was_full and self._environment.read(functools.partial(self._is_full, put=put)):
            return False
        self._write(put)
        self._was_full = put.is_full
        return not put.is_full

    def _is_full(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
                 put: _addition.Put) -> bool:
        """
        Look whether messages would pass a high-water mark, also if what is too old were dropped.

        :param txn: any transaction
        :param databases: handles
        :param put: what is to be added
        :return: True if so
        """
        if put.msg_ids is not None:
            put.leave_out_known(txn, databases, self._now_ns() - self._settings.once_window_ns)
            if not put.count:
                return False
        tail = _log.read_tail(txn.cursor(db=databases.data))
        floor = _retention.find_floor(txn, databases, tail, is_look=True, known=self._floor)
        return self._is_over(tail, floor, put) and floor.number == _retention.expired_before(
            txn, databases, floor, tail,
            self._now_ns() - self._settings.timeout_ns)

    def _full_error(self, put: _addition.Put) -> persipubsub.errors.QueueFullError:
        """
        Describe a full queue, and who holds it up.

        :param put: what was to be added
        :return: error to be raised
        """

        def work(txn: "lmdb.Transaction[memoryview]",
                 databases: Databases) -> "tuple[int, int, Optional[_retention.Slowest]]":
            tail = _log.read_tail(txn.cursor(db=databases.data))
            floor = _retention.find_floor(txn, databases, tail, is_look=True)
            return (tail.total_count - floor.messages, tail.total_bytes - floor.size,
                    _retention.find_slowest(txn, databases))

        count, size, slowest = self._environment.read(work)
        settings = self._settings
        text = (
            "Expected room for {} more message(s) of {} bytes in the queue {}, but got: {} of "
            "{} messages (MAX_MSGS_NUM) and {} of {} bytes (HWM_LMDB_SIZE_BYTES) wait in a store "
            "of at most {} bytes (max_db_size_bytes).".format(put.count, put.size, settings.path,
                                                              count, settings.max_messages, size,
                                                              settings.max_message_bytes,
                                                              settings.max_bytes))
        if slowest is not None:
            text += " The slowest subscriber is {!r} with {} of them.".format(*slowest)
        return persipubsub.errors.QueueFullError(text)

    def _put(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
             put: _addition.Put) -> _log.Tail | None:
        """
        Add messages at the end of the log and tidy up a little at its beginning.

        :param txn: write transaction
        :param databases: handles
        :param put: what to add; gets the result
        :return: new end of the log; None if the queue is full
        """
        # As the last put left it, if nobody wrote since then. Taken away: it is not what the next
        # one of this transaction finds.
        tail, self._environment.left = self._environment.left, None
        if not isinstance(tail, _log.Tail) or self._environment.left_by != txn.id() - 1:
            tail = _log.read_tail(txn.cursor(databases.data))
        floor = self._floor
        put.losses = []
        put.is_full = False
        # Each field of a named tuple that is read takes as long as two of these steps.
        number, _, count, size, generation, _ = tail
        if floor is None or floor.generation != generation:
            floor = _retention.find_floor(txn, databases, tail)
        if (count - floor.messages + put.count > self._max_messages
                or size - floor.size + put.size > self._max_message_bytes):
            tail, floor = self._make_room(txn, databases, tail, floor, put)
            if put.is_full:
                put.floor = floor
                return None
            number, _, _, size, _, _ = tail
        put.first = number
        audience = self._find_audience(txn, databases, put.audience) if put.audience else 0
        tail = _log.append(txn, databases, tail, self._now_ns(), audience, put.batches)

        interval = floor.interval
        if ((number + put.count) // interval != number // interval
                or (size + put.size) // _LARGE_BYTES != size // _LARGE_BYTES):
            floor = self._tidier.tidy(txn,
                                      databases,
                                      tail,
                                      put.losses,
                                      budget=2 * (interval + len(put.batches)),
                                      known=floor)
        put.floor = floor
        # LMDB uses up no id for a transaction that changes nothing: another process may get it.
        return tail if put.batches else None

    def _put_once(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
                  put: _addition.Put) -> _log.Tail | None:
        """
        Add the messages whose ids are not known, and remember their ids.

        :param txn: write transaction
        :param databases: handles
        :param put: what to add; gets the result
        :return: new end of the log; None if nothing was added
        """
        now_ns = self._now_ns()
        oldest_ns = now_ns - self._settings.once_window_ns
        known, places = put.leave_out_known(txn, databases, oldest_ns)
        put.losses = []
        put.is_full = False
        put.floor = self._floor
        tail = self._put(txn, databases, put) if put.count else None
        if put.is_full:
            return None
        for msg_id, place in places.items():
            _once.remember(txn, databases, msg_id, put.first + place, now_ns)
        _once.forget(txn, databases, oldest_ns, budget=2 * (len(known) + len(places)))
        assert put.msg_ids is not None, "It has ids, or it would be put as others are."
        if put.msg_ids[0] in known:
            put.first = known[put.msg_ids[0]]
        return tail

    def _is_over(self, tail: _log.Tail, floor: _retention.Floor, put: _addition.Put) -> bool:
        """
        Tell whether messages would pass a high-water mark.

        :param tail: end of the log
        :param floor: how far all subscribers have come, at least
        :param put: what is to be added
        :return: True if there is too much
        """
        return (tail.total_count - floor.messages + put.count > self._max_messages
                or tail.total_bytes - floor.size + put.size > self._max_message_bytes)

    def _make_room(self, txn: "lmdb.Transaction[memoryview]", databases: Databases, tail: _log.Tail,
                   floor: _retention.Floor,
                   put: _addition.Put) -> "tuple[_log.Tail, _retention.Floor]":
        """
        Look closely at the high-water marks; drop messages if they are passed, or refuse to.

        :param txn: write transaction
        :param databases: handles
        :param tail: end of the log
        :param floor: how far all subscribers have come, at least
        :param put: what is to be added
        :return: new end of the log, how far all subscribers have come
        """
        floor = _retention.find_floor(txn, databases, tail, known=floor)
        if self._is_over(tail, floor, put):
            floor = self._tidier.tidy(txn,
                                      databases,
                                      tail,
                                      put.losses,
                                      budget=_tidying.CHUNK_BLOCKS,
                                      known=floor)
        while self._is_over(tail, floor, put):
            if not self._settings.drops_unread:
                # Not by an exception: it would take back what was dropped since it is too old, and
                # what other threads put in the same transaction.
                put.is_full = True
                break
            tail, losses = _retention.halve(txn,
                                            databases,
                                            floor,
                                            tail,
                                            drops_newest=self._drops_newest)
            put.losses.extend(losses)
            floor = _retention.find_floor(txn, databases, tail)
        return tail, floor

    def _find_audience(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
                       subscribers: tuple[str, ...]) -> int:
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

    def _put_into_full_map(self, put: _addition.Put, work: Callable[..., _log.Tail | None]) -> None:
        """
        Put messages into a full store: delete what is finished, then drop by the strategy.

        :param put: what is to be added
        :param work: that adds them
        :raise DiskFullError: if it does not fit although nothing is left to be dropped
        """
        waiting = 1
        limit = self._settings.max_bytes + _EMPTY_BYTES - put.size
        # A process that was killed in a read may keep everything that was freed since then.
        self._environment.check_readers()
        while True:
            self._floor = None
            if not self._settings.drops_unread:
                self._tidier.drop_expired()
            self._tidier.delete_finished(keeps_retained=False)
            self._environment.write(_retention.make_reusable, may_grow=True)
            try:
                # With nothing left to be dropped, free pages are too scattered for it, or the last
                # block, which stays to keep its numbers taken, is in the way; or there are ids.
                may_grow = not waiting and self._environment.read(self._count_others) <= limit
                self._environment.write(work, is_flushed=True, may_grow=may_grow)
                return
            except _environment.MapFullError:
                if not waiting:
                    raise
            if not self._settings.drops_unread:
                waiting = self._environment.read(self._count_waiting)
                put.losses = []
                put.is_full = waiting > 0
                if put.is_full:
                    # What the transaction that failed found is not what is stored.
                    put.floor = None
                    return
            else:
                waiting, losses = self._environment.write(self._shrink, may_grow=True)
                self._losses.add(losses)

    def _put_onto_full_disk(self, work: Callable[..., _log.Tail | None]) -> None:
        """
        Put messages where finished ones were, which a send that fails can not delete by itself.

        :param work: that adds them
        :raise DiskFullError: if there are too few of them
        """
        self._floor = None
        self._tidier.delete_finished(keeps_retained=False)
        self._environment.write(_retention.make_reusable, may_grow=True)
        self._environment.write(work, is_flushed=True)

    def _shrink(self, txn: "lmdb.Transaction[memoryview]",
                databases: Databases) -> tuple[int, list[_retention.Loss]]:
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
        return waiting, _retention.halve(txn,
                                         databases,
                                         floor,
                                         tail,
                                         drops_newest=self._drops_newest)[1]

    @staticmethod
    def _count_others(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> int:
        """
        Count what is stored beside messages, as ids are, which are not dropped to make room.

        :param txn: any transaction
        :param databases: handles
        :return: in bytes of whole pages
        """
        return sum(
            _databases.count_bytes(txn, other) for other in databases
            if other is not databases.data)

    @staticmethod
    def _count_waiting(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> int:
        """
        Count the messages that somebody still has to acknowledge.

        :param txn: any transaction
        :param databases: handles
        :return: how many there are
        """
        tail = _log.read_tail(txn.cursor(db=databases.data))
        return tail.total_count - _retention.find_floor(txn, databases, tail, is_look=True).messages
