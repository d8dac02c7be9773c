"""
Hold messages in an ``async with`` block, for :py:mod:`persipubsub.aio`.

The block decides: left without an exception, its messages are acknowledged.
"""

import functools
from types import TracebackType
from typing import List, Optional, Type, Union

from persipubsub import _engines, _inbox, _workers


class _Taking:
    """Acknowledge on a clean exit what was taken on entry; give it back on an exception."""

    __slots__ = ("_inbox", "_workers", "_timeout", "_pause", "_max_messages", "_lease")

    def __init__(self,
                 inbox: Union[_inbox.Inbox, _inbox.SharedInbox],
                 workers: _workers.Workers,
                 timeout: Optional[float],
                 pause: float,
                 max_messages: int = 1) -> None:
        """
        Initialize without taking anything.

        :param inbox: to wait at
        :param workers: acknowledge and give back
        :param timeout: how long to wait, in seconds; None: for ever
        :param pause: time between two looks without a wake-up, in seconds
        :param max_messages: how many messages to take at most
        """
        self._inbox = inbox
        self._workers = workers
        self._timeout = timeout
        self._pause = pause
        self._max_messages = max_messages
        self._lease: Optional[_engines.Lease] = None

    async def _take(self) -> Optional[_engines.Lease]:
        """
        Wait for messages.

        :return: messages; None if none came in time
        """
        self._lease = await self._inbox.take(self._timeout, self._pause, self._max_messages)
        return self._lease

    async def __aexit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                        traceback: Optional[TracebackType]) -> None:
        """Acknowledge the messages, or give them back if the block was left by an exception."""
        lease, self._lease = self._lease, None
        if lease is None:
            return
        # Done to the end even if the task is cancelled meanwhile.
        if kind is None:
            await self._workers.run(lease.acknowledge)
        else:
            await self._workers.run(functools.partial(lease.give_back, error))


class Receipt(_Taking):
    """
    Hold one message in an ``async with`` block.

    Returned by :py:meth:`persipubsub.aio.Sub.receive`; to be entered once.
    """

    __slots__ = ()

    async def __aenter__(self) -> Optional[bytes]:
        """
        Wait for a message.

        :return: message; None if none came in time
        """
        lease = await self._take()
        return None if lease is None else lease.messages[0]


class BatchReceipt(_Taking):
    """
    Hold several messages in an ``async with`` block.

    Returned by :py:meth:`persipubsub.aio.Sub.receive_many`; to be entered once.
    """

    __slots__ = ()

    async def __aenter__(self) -> List[bytes]:
        """
        Wait for messages.

        :return: messages; empty if none came in time
        """
        lease = await self._take()
        return [] if lease is None else lease.messages
