"""
Add what several callers send in one commit, for :py:mod:`persipubsub.aio`.

Threads that send at the same moment share a commit by themselves; tasks of a loop have no threads.
"""

import functools
from collections.abc import Sequence
from typing import Optional

import lmdb

import persipubsub.errors
from persipubsub import _addition, _putting
from persipubsub.store._databases import Databases

#: Messages, audience and ids of one send.
Sending = tuple[Sequence[bytes], Optional[tuple[str, ...]], Optional[Sequence[Optional[bytes]]]]


class GroupPutter(_putting.Putter):
    """Add messages for many callers, from any number of threads."""

    def put_each(self, sendings: Sequence[Sending]) -> list[BaseException | None]:
        """
        Put for several callers, each of them all or nothing, in one commit if nothing is wrong.

        :param sendings: in order
        :return: error of each; None if it was put
        """
        if not sendings:
            return []
        try:
            if len(sendings) > 1:
                return self._put_together(sendings)
            messages, audience, msg_ids = sendings[0]
            self.put(messages, audience, 0.0, msg_ids)
            return [None]
        except persipubsub.errors.BusyTimeoutError as error:
            # Nobody is at fault, and everybody waited long enough.
            return [error] * len(sendings)
        except persipubsub.errors.PersipubsubError as error:
            if len(sendings) == 1:
                return [error]
            # Halves, so that those who are not at fault share as few commits as can be.
            half = len(sendings) // 2
            return self.put_each(sendings[:half]) + self.put_each(sendings[half:])

    def _put_together(self, sendings: Sequence[Sending]) -> list[BaseException | None]:
        """
        Put for several callers in one commit, or nothing of it.

        :param sendings: in order
        :return: error of each that found the queue full; None if it was put
        """
        puts: list[_addition.Put] = []
        for messages, audience, msg_ids in sendings:
            self._settings.check_size(messages)
            puts.append(_addition.Put(messages, audience, msg_ids or None))
        # Those who wait for room shall keep nobody from the write lock.
        if not self._settings.drops_unread and self._was_full and all(
                self._environment.read(functools.partial(self._is_full, put=put)) for put in puts):
            return [self._full_error(put) for put in puts]

        def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> None:
            for put in puts:
                (self._put if put.msg_ids is None else self._put_once)(txn, databases, put)

        def ring() -> None:
            if not all(put.is_full for put in puts) or any(put.losses for put in puts):
                self._ring(max(0 if put.is_full else put.first + put.count for put in puts))

        try:
            self._environment.write(work, is_flushed=True, announce=ring)
        except BaseException:
            self._floor = None
            raise
        self._floor = puts[-1].floor
        self._was_full = puts[-1].is_full
        losses = [loss for put in puts for loss in put.losses]
        if losses:
            self._losses.add(losses)
        return [self._full_error(put) if put.is_full else None for put in puts]
