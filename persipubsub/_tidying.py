"""
Drop what is too old and delete what is finished: as a part of other transactions, or by itself.

Deleting is spread out over many transactions, each of which deletes a bounded number of blocks.
"""

import functools
from collections.abc import Callable
from typing import Final

import lmdb

from persipubsub import _losses
from persipubsub._settings import Settings
from persipubsub.environment import _environment
from persipubsub.store import _log, _once, _retention
from persipubsub.store._databases import Databases

#: How many blocks are deleted in one transaction while an operator prunes or clears a queue.
CHUNK_BLOCKS: Final = 256


class Tidier:
    """Tidy up one open queue, from any number of threads."""

    def __init__(self, settings: Settings, environment: _environment.Environment,
                 losses: _losses.LossLog, now_ns: Callable[[], int]) -> None:
        """
        Initialize without looking at the store.

        :param settings: of the queue
        :param environment: of the queue
        :param losses: are told of messages that were dropped unread
        :param now_ns: reads the queue's clock
        """
        self._settings = settings
        self._environment = environment
        self._losses = losses
        self._now_ns = now_ns

    def tidy(  # pylint: disable=too-many-arguments,too-many-positional-arguments
            self,
            txn: "lmdb.Transaction[memoryview]",
            databases: Databases,
            tail: _log.Tail,
            losses: list[_retention.Loss],
            budget: int,
            known: _retention.Floor | None = None) -> _retention.Floor:
        """
        Drop what is too old, and delete some finished blocks.

        :param txn: write transaction
        :param databases: handles
        :param tail: end of the log
        :param losses: to be extended by what was dropped
        :param budget: how many blocks to delete at most
        :param known: how far they had come before, see :py:func:`_retention.find_floor`
        :return: how far all subscribers have come
        """
        floor = _retention.find_floor(txn, databases, tail, known=known)
        now_ns = self._now_ns()
        cut = _retention.expired_before(txn, databases, floor, tail,
                                        now_ns - self._settings.timeout_ns)
        if cut > floor.number:
            losses.extend(_retention.drop_before(txn, databases, cut, _retention.count_timeout))
            floor = _retention.find_floor(txn, databases, tail)
        _log.delete_head(txn.cursor(db=databases.data),
                         floor.audiences,
                         floor.everyone,
                         budget=budget,
                         retained_ns=self._settings.retained_ns(now_ns))
        return floor

    def drop_expired(self) -> int:
        """
        Drop the messages that are older than the queue's timeout, for all subscribers.

        :return: how many deliveries were dropped
        """
        losses: list[_retention.Loss] = []

        def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> None:
            losses.clear()
            tail = _log.read_tail(txn.cursor(db=databases.data))
            self.tidy(txn, databases, tail, losses, budget=CHUNK_BLOCKS)

        self._environment.write(work, may_grow=True)
        self._losses.add(losses)
        return sum(loss.messages for loss in losses)

    def delete_finished(self, keeps_retained: bool = True) -> int:
        """
        Delete all messages that everybody acknowledged, in many short transactions.

        Senders get their turn between them. Ids of messages that are older than the window are
        forgotten on the way.

        :param keeps_retained: False to delete also what is to stay for ``retain_secs``
        :return: how many blocks were deleted
        """
        while self._forget() == CHUNK_BLOCKS:
            pass
        total = 0
        retained_ns = (self._settings.retained_ns(self._now_ns())
                       if keeps_retained else _log.RETAINS_NOTHING_NS)
        delete = functools.partial(_retention.delete_finished,
                                   budget=CHUNK_BLOCKS,
                                   retained_ns=retained_ns)
        while True:
            deleted = self._environment.write(delete, may_grow=True)
            total += deleted
            if deleted < CHUNK_BLOCKS:
                return total

    def _forget(self) -> int:
        """
        Forget ids of messages that are older than the window.

        :return: how many, up to a chunk
        """
        oldest_ns = self._now_ns() - self._settings.once_window_ns
        if not self._environment.read(functools.partial(_once.is_any_before, oldest_ns=oldest_ns)):
            return 0
        return self._environment.write(functools.partial(_once.forget,
                                                         oldest_ns=oldest_ns,
                                                         budget=CHUNK_BLOCKS),
                                       may_grow=True)
