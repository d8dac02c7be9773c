"""
Wait for one message, and leave the pull to the next one who waits if that is cancelled.

A pull can not be taken back. To end its subscription was rejected: a message that another server of
the cluster sends at that moment is lost until ``ack_wait``, and tasks are cancelled often, by a
timeout of ``asyncio`` for one. So a pull goes on without its task until it ends, after a few
seconds at most. Whoever waits next takes it over; a message that comes for nobody is given back.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import time
from typing import Dict, List, Optional

from persipubsub.jetstream import _inboxes, _pulling


class Waiting:
    """Wait for messages of one consumer in this process."""

    def __init__(self, puller: _pulling.Puller) -> None:
        """
        Initialize with nobody waiting.

        :param puller: of the consumer
        """
        self._puller = puller
        # Pulls that nobody waits for, in order, and what gives back what one of them brings.
        self._left = {}  # type: Dict[asyncio.Task[List[_inboxes.Pulled]], None]
        self._givers = set()  # type: set[asyncio.Task[None]]

    async def take(self, timeout: Optional[float]) -> List[_inboxes.Pulled]:
        """
        Wait for a message.

        :param timeout: how long, in seconds; None: for ever
        :return: the message; none if there was none in time
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            task = next(iter(self._left), None)
            is_own = task is None or left == 0.0
            if task is None or is_own:
                task = asyncio.ensure_future(
                    self._puller.pull_one(min(left, _pulling.LONGEST_PULL_SECS)))
            else:
                del self._left[task]
            try:
                # Our own one ends in time.
                await asyncio.wait([task], timeout=None if is_own or timeout is None else left)
            except asyncio.CancelledError:
                self._leave(task)
                raise
            if task.done():
                pulled = task.result()
                if pulled or time.monotonic() >= deadline:
                    return pulled
            else:
                self._leave(task)

    def _leave(self, task: "asyncio.Task[List[_inboxes.Pulled]]") -> None:
        """
        Leave a pull to whoever waits next.

        :param task: of the pull
        """
        self._left[task] = None
        task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[List[_inboxes.Pulled]]") -> None:
        """
        Look at what a pull brought that was left.

        :param task: of the pull
        """
        if task not in self._left:
            return  # somebody took it over
        del self._left[task]
        if not task.cancelled() and task.exception() is None and task.result():
            giver = asyncio.ensure_future(self._give_back(task.result()))
            self._givers.add(giver)
            giver.add_done_callback(self._givers.discard)

    async def _give_back(self, pulled: List[_inboxes.Pulled]) -> None:
        """
        Let others have a message that came for nobody.

        :param pulled: the message
        """
        # It would come to the next one of these at once. Taken out first: who begins to wait
        # meanwhile must not take over one that is cancelled.
        others = [task for task in self._left if not task.done()]
        for task in others:
            del self._left[task]
            task.cancel()
        for found in await asyncio.gather(*others, return_exceptions=True):
            if not isinstance(found, BaseException):
                pulled = pulled + found  # it was done before it could be cancelled
        await self._puller.settle()
        await self._puller.give_back(pulled)

    async def close(self) -> None:
        """Wait until what came for nobody is given back."""
        await asyncio.gather(*self._givers, return_exceptions=True)
