"""
Collect the messages that tasks send at the same time, and put them into the queue together.

One worker thread puts whatever came while it waited for the last commit. So a thousand tasks need
no thousand threads to share a commit, and what one loop sends stays in order.
"""

import asyncio
import collections
import os
import threading
import time
from collections.abc import Sequence
from typing import Final, Optional

import persipubsub.errors
from persipubsub import _begun, _engines, _workers

#: Messages that are put together at most: the others of the process shall get their turn.
_MOST_MESSAGES: Final = 512

#: ... and bytes, unless a single send has more.
_MOST_BYTES: Final = 1 << 23

#: Time between two attempts of a task that waits for room, in seconds.
_ROOM_SECS: Final = 0.02


class _Sending:
    """Hold what one task sends until it was put."""

    __slots__ = ("messages", "audience", "msg_ids", "size", "loop", "future")

    def __init__(self, messages: Sequence[bytes], audience: tuple[str, ...] | None,
                 msg_ids: Sequence[bytes | None] | None, loop: asyncio.AbstractEventLoop) -> None:
        self.messages = messages
        self.audience = audience
        self.msg_ids = msg_ids
        self.size = sum(map(len, messages))
        self.loop = loop
        self.future: "asyncio.Future[None]" = loop.create_future()


class Outbox:
    """Send for tasks of any number of loops in one process."""

    def __init__(self, queue: _engines.TogetherQueue, workers: _workers.Workers) -> None:
        """
        Initialize without anything to be sent.

        :param queue: to be put into
        :param workers: one of them sends
        """
        self.queue = queue
        self.process_id = os.getpid()
        self._workers = workers
        # Guards the two below. Nothing is called and no lock is taken while it is held.
        self._lock = threading.Lock()
        self._sendings: collections.deque[_Sending] = collections.deque()
        self._is_sending = False
        # What each loop sends in one round; only touched in the thread of the loop.
        self._rounds: dict[asyncio.AbstractEventLoop, list[_Sending]] = {}

    async def put(self,
                  messages: Sequence[bytes],
                  audience: tuple[str, ...] | None,
                  timeout: float | None = None,
                  msg_ids: Sequence[bytes | None] | None = None) -> None:
        """
        Put messages, all of them or none, and wait until they are as safe as the durability says.

        :param messages: to be sent
        :param audience: ids of the subscribers that get them; everybody if not given
        :param timeout: how long to wait for room, if the queue lets publishers wait, in seconds;
            None: for ever
        :param msg_ids: of the messages; None if none has one
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            try:
                await self._put_now(messages, audience, msg_ids)
                return
            except persipubsub.errors.QueueFullError:
                remaining = deadline - time.monotonic()
                if not self.queue.waits_for_room or remaining <= 0:
                    raise
            # Rejected: to wait in a thread, of which there would have to be one for each task.
            await asyncio.sleep(min(_ROOM_SECS, remaining))

    async def _put_now(self, messages: Sequence[bytes], audience: tuple[str, ...] | None,
                       msg_ids: Sequence[bytes | None] | None) -> None:
        """
        Put messages, all of them or none, if there is room.

        :param messages: to be sent
        :param audience: ids of the subscribers that get them; everybody if not given
        :param msg_ids: of the messages; None if none has one
        """
        loop = asyncio.get_running_loop()
        sending = _Sending(messages, audience, msg_ids, loop)
        sent = self._rounds.get(loop)
        if sent is None:
            sent = self._rounds[loop] = []
            # When all tasks that can run now have run: a worker that got the first message at once
            # would be through with it before most of the others are there.
            loop.call_soon(self._end_round, loop)
        sent.append(sending)
        await sending.future

    def _end_round(self, loop: asyncio.AbstractEventLoop) -> None:
        """
        Have a worker send what the tasks of a loop gave in one round.

        :param loop: whose thread this is
        """
        sent = self._rounds.pop(loop)
        with self._lock:
            self._sendings.extend(sent)
            is_idle, self._is_sending = not self._is_sending, True
        if is_idle:
            try:
                self._workers.submit(self._send)
            except _workers.NoThreadError as error:
                with self._lock:
                    refused = list(self._sendings)
                    self._sendings.clear()
                    self._is_sending = False
                self._report(refused, [error] * len(refused))

    def _send(self) -> None:
        """Send in a worker thread until there is nothing left."""
        while group := self._next_group():
            try:
                errors = self.queue.put_each([(sending.messages, sending.audience, sending.msg_ids)
                                              for sending in group])
            except BaseException as error:  # pylint: disable=broad-exception-caught
                errors = [error] * len(group)
            self._report(group, errors)

    @staticmethod
    def _report(sendings: Sequence[_Sending], errors: Sequence[BaseException | None]) -> None:
        """
        Tell tasks of any loops what came of their messages.

        :param sendings: of the tasks
        :param errors: of each; None if it was sent
        """
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple["asyncio.Future[None]",
                                                            BaseException | None]]] = {}
        for sending, error in zip(sendings, errors):
            by_loop.setdefault(sending.loop, []).append((sending.future, error))
        for loop, outcomes in by_loop.items():
            _workers.post(loop, _tell, outcomes)

    def _next_group(self) -> list[_Sending]:
        """
        Take what is to be put next.

        :return: in the order in which it was sent; empty if there is nothing, and the next task to
            send starts a worker again
        """
        group: list[_Sending] = []
        count = size = 0
        with self._lock:
            while self._sendings:
                sending = self._sendings[0]
                count += len(sending.messages)
                size += sending.size
                if group and (count > _MOST_MESSAGES or size > _MOST_BYTES):
                    break
                self._sendings.popleft()
                if not sending.future.cancelled():
                    group.append(sending)
            self._is_sending = bool(group)
        return group


class LoopOutbox:
    """Send for tasks of any number of loops where an engine has a loop of its own."""

    def __init__(self, queue: _engines.LoopQueue) -> None:
        """
        Initialize without anything to be sent.

        :param queue: to be put into
        """
        self.queue = queue
        self.process_id = os.getpid()

    async def put(self,
                  messages: Sequence[bytes],
                  audience: tuple[str, ...] | None,
                  timeout: float | None = None,
                  msg_ids: Sequence[bytes | None] | None = None) -> None:
        """
        Put messages, even if the task is cancelled meanwhile, and wait until the engine has them.

        :param messages: to be sent
        :param audience: ids of the subscribers that get them; everybody if not given
        :param timeout: how long to wait for room, in seconds; None: for ever
        :param msg_ids: of the messages; None if none has one
        """
        await _begun.result_of(self.queue.begin_put(messages, audience, timeout, msg_ids))


def _tell(outcomes: "Sequence[tuple[asyncio.Future[None], Optional[BaseException]]]") -> None:
    """
    Tell tasks what came of their messages, in the thread of their loop.

    :param outcomes: future of each task, and its error
    """
    for future, error in outcomes:
        if error is not None:
            _workers.fail(future, error)
        elif not future.done():
            future.set_result(None)
