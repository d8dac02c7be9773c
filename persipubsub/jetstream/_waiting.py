"""
Wait for one message, and leave the pull to the next one who waits if that is cancelled.

A pull can not be taken back. To end its subscription was rejected: a message that another server of
the cluster sends at that moment is lost until ``ack_wait``, and tasks are cancelled often, by a
timeout of ``asyncio`` for one. So a pull goes on without its task until it ends, after a few
seconds at most. Whoever waits next takes the oldest over, to which the servers send first; a
message that comes for nobody is given back, and nobody pulls meanwhile what would overtake it.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import math
import time
from typing import Final

from persipubsub.jetstream import _inboxes, _pulling, _returns

#: Pulls of a consumer that wait at the servers, which refuse what is more than 4096 in all.
_MOST_PULLS: Final = 256


class Waiting:
    """Wait for messages of one consumer in this process."""

    def __init__(self, puller: _pulling.Puller) -> None:
        """
        Initialize with nobody waiting.

        :param puller: of the consumer
        """
        self._puller = puller
        # Whoever waits beside so many others waits here, in line.
        self._room = asyncio.Semaphore(_MOST_PULLS)
        # Pulls that nobody waits for, and what gives back what one of them brings.
        self._left: set[asyncio.Task[list[_inboxes.Pulled]]] = set()
        self._givers: set[asyncio.Task[None]] = set()

    async def take(self, timeout: float | None) -> list[_inboxes.Pulled]:
        """
        Wait for a message.

        :param timeout: how long, in seconds; None: for ever
        :return: the message; none if there was none in time
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            if left == 0.0:
                return await self.take_now(1)
            try:
                async with asyncio.timeout(None if timeout is None else left):
                    await self._room.acquire()
            except TimeoutError:
                return []  # the others would have got what was there
            try:
                pulled = await self._take(max(0.0, deadline - time.monotonic()))
            finally:
                self._room.release()
            if pulled or time.monotonic() >= deadline:
                return pulled

    async def _take(self, left: float) -> list[_inboxes.Pulled]:
        """
        Wait for a message with one pull: the oldest that was left, or a new one.

        :param left: how long at most, in seconds
        :return: the message; none if there was none in time, or before the pull ended
        """
        await self._settle(left)
        task = min(self._left, key=self._place, default=None)
        is_own = task is None
        if task is None:
            task = asyncio.ensure_future(
                self._puller.pull_one(min(left, _pulling.LONGEST_PULL_SECS)))
        else:
            self._left.remove(task)
        try:
            # Our own one ends in time.
            await asyncio.wait([task], timeout=None if is_own else left)
        except asyncio.CancelledError:
            self._leave(task)
            raise
        if task.done():
            return task.result()
        self._leave(task)
        return []

    async def take_now(self,
                       max_messages: int,
                       max_bytes: int | None = None) -> list[_inboxes.Pulled]:
        """
        Take messages that are there.

        :param max_messages: how many at most
        :param max_bytes:
            how many bytes at most, of messages that were never given back; None: as many as it
            takes
        :return: messages, in order; none if there is none
        """
        await self._settle(0.0)
        # What comes for them before the answer to our own pull is in front of what that brings.
        left, self._left = self._left, set()
        try:
            pulled = await (self._puller.pull_now(max_messages) if max_bytes is None else
                            self._puller.pull_once(max_messages, max_bytes))
        except BaseException:
            self._left |= left
            for task in left:
                if task.done():
                    self._end(task)
            raise
        for task in left:
            if task.done():
                pulled += _brought(task)
            else:
                self._left.add(task)
        pulled.sort(key=lambda one: one.number)
        self._begin_give_back(pulled[max_messages:])
        return pulled[:max_messages]

    async def _settle(self, timeout: float) -> None:
        """
        Wait until what came for nobody is given back: what is pulled later would overtake it.

        :param timeout: how long to wait for a message, in seconds
        """
        deadline = time.monotonic() + max(_returns.SETTLE_SECS, timeout)
        while self._givers and time.monotonic() < deadline:
            await asyncio.wait(list(self._givers), timeout=deadline - time.monotonic())

    def _place(self, task: "asyncio.Task[list[_inboxes.Pulled]]") -> tuple[int, float]:
        """
        Tell which pull brings what is next in order: one that is done, or the first in line.

        :param task: of the pull
        :return: to be compared
        """
        pulled = _brought(task) if task.done() else []
        return (0, pulled[0].number) if pulled else (1, self._puller.place(task))

    def _leave(self, task: "asyncio.Task[list[_inboxes.Pulled]]") -> None:
        """
        Leave a pull to whoever waits next.

        :param task: of the pull
        """
        self._left.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[list[_inboxes.Pulled]]") -> None:
        """
        Look at what a pull brought that was left.

        :param task: of the pull
        """
        if task not in self._left:
            return  # somebody took it over
        self._left.remove(task)
        self._begin_give_back(_brought(task))

    def _begin_give_back(self, pulled: list[_inboxes.Pulled]) -> None:
        """
        Begin to let others have messages, before anybody takes a pull over or pulls again.

        :param pulled: messages that came for nobody; perhaps none
        """
        if pulled:
            # Not one of the endings that a pull waits for: it waits for pulls to end.
            giver = asyncio.ensure_future(self._give_back(pulled))
            self._givers.add(giver)
            giver.add_done_callback(self._givers.discard)

    async def _give_back(self, pulled: list[_inboxes.Pulled]) -> None:
        """
        Let others have messages that came for nobody.

        :param pulled: messages
        """
        # They would come to these at once, one after the other. The last in line stays: a server
        # may have the next message in its hands, and would give that to whoever pulls next, before
        # what is given back to it meanwhile. Taken out first: who begins to wait meanwhile must not
        # take over one that is cancelled.
        others = [task for task in self._left if not task.done()]
        asked = [task for task in others if self._puller.place(task) < math.inf]
        if asked:
            others.remove(max(asked, key=self._puller.place))
        for task in others:
            self._left.remove(task)
            task.cancel()
        for found in await asyncio.gather(*others, return_exceptions=True):
            if not isinstance(found, BaseException):
                pulled = pulled + found  # it was done before it could be cancelled
        self._puller.returns.give_back(pulled)
        await self._puller.returns.settle()

    async def close(self) -> None:
        """Wait until what came for nobody is given back."""
        await asyncio.gather(*self._givers, return_exceptions=True)


def _brought(task: "asyncio.Task[list[_inboxes.Pulled]]") -> list[_inboxes.Pulled]:
    """
    Tell what a pull brought that is done.

    :param task: of the pull
    :return: messages; none if it failed
    """
    return [] if task.cancelled() or task.exception() is not None else task.result()
