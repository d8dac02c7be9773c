"""
Publish and receive in tasks of ``asyncio``, with the same queues and the same promises.

The two classes are used as :py:class:`persipubsub.publisher.Pub` and
:py:class:`persipubsub.subscriber.Sub`, and share the queues with them, in this process and others.
The loop is never blocked for the disk or for another process: what could block runs in a few
threads. Waiting needs no thread: the loop itself notices the bell of other processes.

An object may be used by any number of tasks, by several loops in several threads, and in a forked
child. Any loop will do whose ``add_reader`` and ``call_soon_threadsafe`` do what they do in
``asyncio``.
"""

import asyncio
import functools
import os
from typing import Any, Final, Literal, Optional, Union, overload

import persipubsub.errors
import persipubsub.subscriber
from persipubsub import _engines, _inbox, _workers
from persipubsub._async_publisher import Pub
from persipubsub._async_receipts import (BatchReceipt, Ending, InLoop, InWorkers, Messages, Receipt,
                                         Take)
from persipubsub._receipts import describe, unwrap
from persipubsub.message import Message
from persipubsub.subscriber import _check_max_msgs, _not_open, _to_waiting

__all__ = ["BatchReceipt", "Messages", "Pub", "Receipt", "Sub"]

#: Acknowledgements at the same moment share a commit; so many do.
_ACKNOWLEDGING_THREADS: Final = 8

#: For an engine that can not wake its waiters, and has no loop of its own.
_WAITING_THREADS: Final = 16

_IN_LOOP: Final = InLoop()


class _Subscriber(persipubsub.subscriber.Sub):
    """Be what blocks, with its consumer."""

    def prepare(self, timeout: float | None,
                retries: int) -> "tuple[_engines.Consumer, Optional[float], float]":
        """
        Check the arguments of a receipt.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look within ``timeout``
        :return: consumer, how long to wait, time between two looks in seconds
        """
        consumer = self._consumer
        if consumer is None:
            raise _not_open()
        return (consumer, *_to_waiting(timeout, retries))


class Sub:
    """
    Receive the messages of a subscriber, as :py:class:`persipubsub.subscriber.Sub` does.

    Its tasks share the messages with each other, and with other objects and processes of the same
    subscriber id. While a task waits, or has a message, no thread does.

    >>> import json, pathlib, tempfile
    >>> import persipubsub.control
    >>> directory = tempfile.TemporaryDirectory()
    >>> config_pth = pathlib.Path(directory.name) / "config.json"
    >>> _ = config_pth.write_text(json.dumps({
    ...     "pub": {"out_queue": "q", "subscribers": ["sub"]},
    ...     "sub": {"in_queue": "q"},
    ...     "queues": {"q": {
    ...         "path": "queue", "max_reader_num": 64, "max_db_num": 64,
    ...         "max_db_size_bytes": 1 << 24, "subscribers": ["sub"],
    ...         "high-water-mark": {"MSG_TIMEOUT_SECS": 600, "MAX_MSGS_NUM": 1000,
    ...             "HWM_LMDB_SIZE_BYTES": 1000000, "strategy": "prune_first"}}}}))
    >>> persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    >>> async def main():
    ...     async with Pub() as pub, Sub() as sub:
    ...         await pub.init(pub_id="pub", config_pth=config_pth)
    ...         await sub.init(sub_id="sub", config_pth=config_pth)
    ...         await pub.send_many([b"one", b"two", b"three"])
    ...         async with sub.receive(timeout=10) as msg:
    ...             print(msg)
    ...         async for msg in sub.messages(timeout=0):
    ...             print(msg)
    >>> asyncio.run(main())
    b'one'
    b'two'
    b'three'
    >>> directory.cleanup()
    """

    def __init__(self) -> None:
        """Initialize without a queue; call :py:meth:`init` before anything else."""
        self._sub = _Subscriber()
        self._inboxes: dict[asyncio.AbstractEventLoop, _inbox.Inbox] = {}
        self._loop_inbox: _inbox.LoopInbox | None = None
        self._workers = _workers.Workers(_ACKNOWLEDGING_THREADS)
        self._in_workers = InWorkers(self._workers)
        # Apart, so that acknowledgements do not wait behind tasks that wait for messages.
        self._takers = _workers.Workers(_WAITING_THREADS)
        # A single thread, so that one opens and closes in order, even if a task was cancelled.
        self._opener = _workers.Workers(1)

    async def init(self, sub_id: str, config_pth: Union[str, "os.PathLike[str]"]) -> None:
        """
        Open the queue of a subscriber. A queue that was open before is closed.

        If the task is cancelled meanwhile, the queue may be open or not.

        :param sub_id: key of the subscriber in the configuration file
        :param config_pth: path to the configuration file
        :raise PersipubsubError: as :py:meth:`persipubsub.subscriber.Sub.init` does
        """
        for workers in (self._opener, self._takers, self._workers):
            workers.open()
        await self._opener.run(functools.partial(self._sub.init, sub_id, config_pth))

    async def __aenter__(self) -> "Sub":
        """
        Use the subscriber as a context manager.

        :return: itself
        """
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the queue."""
        await self.close()

    async def close(self) -> None:
        """
        Close the queue; it may be closed twice.

        Tasks that wait for a message get a ``ClosedError``. A message that is being received is
        given back.
        """
        while self._inboxes:
            _, inbox = self._inboxes.popitem()
            inbox.close(_closed())
        try:
            await self._opener.run(self._sub.close)
        finally:
            self._opener.close()
            self._takers.close()
            self._workers.close()

    @overload
    def receive(self,
                timeout: float | None = 60,
                retries: int = 10,
                details: Literal[False] = False) -> "Receipt[bytes]":
        ...

    @overload
    def receive(self,
                timeout: float | None = 60,
                retries: int = 10,
                *,
                details: Literal[True]) -> "Receipt[Message]":
        ...

    @overload
    def receive(self,
                timeout: float | None = 60,
                retries: int = 10,
                details: bool = False) -> "Union[Receipt[bytes], Receipt[Message]]":
        ...

    def receive(self,
                timeout: float | None = 60,
                retries: int = 10,
                details: bool = False) -> "Receipt[Any]":
        """
        Receive the next message in an ``async with`` block.

        The block gets the bytes that were sent, or None if no message came in time. Left without an
        exception, the message is acknowledged; left by an exception, and by that the task was
        cancelled, it stays where it was and is delivered again, perhaps to another process of the
        same subscriber. A task that is cancelled while it waits leaves no message claimed.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` if nobody wakes us; it is
            looked at once a second anyhow
        :param details: True to get a :py:class:`persipubsub.message.Message` instead of bytes
        :return: context manager of the message
        :raise CorruptMessageError: from the ``async with`` statement if the next message is
            damaged; it is set aside, and the next call gives the one behind it
        """
        take, ending = self._taker(timeout, retries)
        return Receipt(take, describe if details else unwrap, ending)

    @overload
    def receive_to_top(self,
                       timeout: float | None = 60,
                       retries: int = 10,
                       details: Literal[False] = False) -> "Receipt[bytes]":
        ...

    @overload
    def receive_to_top(self,
                       timeout: float | None = 60,
                       retries: int = 10,
                       *,
                       details: Literal[True]) -> "Receipt[Message]":
        ...

    @overload
    def receive_to_top(self,
                       timeout: float | None = 60,
                       retries: int = 10,
                       details: bool = False) -> "Union[Receipt[bytes], Receipt[Message]]":
        ...

    def receive_to_top(self,
                       timeout: float | None = 60,
                       retries: int = 10,
                       details: bool = False) -> "Receipt[Any]":
        """
        Receive the newest message in an ``async with`` block, and skip all older ones.

        See :py:meth:`persipubsub.subscriber.Sub.receive_to_top`.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` if nobody wakes us
        :param details: True to get a :py:class:`persipubsub.message.Message` instead of bytes
        :return: context manager of the message, as of :py:meth:`receive`
        :raise CorruptMessageError: as :py:meth:`receive` does
        """
        take, ending = self._taker(timeout, retries, is_newest=True)
        return Receipt(take, describe if details else unwrap, ending)

    @overload
    def receive_many(self,
                     max_msgs: int,
                     timeout: float | None = 60,
                     retries: int = 10,
                     details: Literal[False] = False) -> "BatchReceipt[bytes]":
        ...

    @overload
    def receive_many(self,
                     max_msgs: int,
                     timeout: float | None = 60,
                     retries: int = 10,
                     *,
                     details: Literal[True]) -> "BatchReceipt[Message]":
        ...

    @overload
    def receive_many(self,
                     max_msgs: int,
                     timeout: float | None = 60,
                     retries: int = 10,
                     details: bool = False) -> "Union[BatchReceipt[bytes], BatchReceipt[Message]]":
        ...

    def receive_many(self,
                     max_msgs: int,
                     timeout: float | None = 60,
                     retries: int = 10,
                     details: bool = False) -> "BatchReceipt[Any]":
        """
        Receive several messages in an ``async with`` block.

        The block gets a list of the messages that are there, at least one and at most ``max_msgs``,
        or an empty list if none came in time. All of them are acknowledged together, in one
        transaction, or all of them stay; see :py:meth:`receive`.

        :param max_msgs: how many messages at most
        :param timeout: how long to wait for the first one, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` if nobody wakes us
        :param details: True to get :py:class:`persipubsub.message.Message` objects instead of bytes
        :return: context manager of the messages
        :raise CorruptMessageError: as :py:meth:`receive` does
        """
        _check_max_msgs(max_msgs)
        take, ending = self._taker(timeout, retries, max_msgs)
        return BatchReceipt(take, describe if details else unwrap, ending)

    @overload
    def messages(self,
                 timeout: float | None = None,
                 details: Literal[False] = False) -> "Messages[bytes]":
        ...

    @overload
    def messages(self,
                 timeout: float | None = None,
                 *,
                 details: Literal[True]) -> "Messages[Message]":
        ...

    @overload
    def messages(self,
                 timeout: float | None = None,
                 details: bool = False) -> "Union[Messages[bytes], Messages[Message]]":
        ...

    def messages(self, timeout: float | None = None, details: bool = False) -> "Messages[Any]":
        """
        Receive one message after the other, for an ``async for`` statement.

        A message is acknowledged when the next one is asked for. If the loop is left before that,
        by an exception, ``break`` or a task that is cancelled, it stays and is delivered again,
        unless the iterator is used in an ``async with`` statement: see :py:class:`Messages`.

        :param timeout: how long to wait for each message, in seconds; None: for ever
        :param details: True to get :py:class:`persipubsub.message.Message` objects instead of bytes
        :return: iterator that ends when no message comes in time
        """
        take, ending = self._taker(timeout, 1)
        return Messages(take, describe if details else unwrap, ending)

    def __aiter__(self) -> "Messages[bytes]":
        """
        Receive one message after the other, for ever; see :py:meth:`messages`.

        :return: messages
        """
        return self.messages()

    async def front(self) -> bytes | None:
        """
        Look at the next message without taking it.

        :return: message that nobody has acknowledged or is receiving now; None if there is none
        """
        return await self._workers.run(self._sub.front)

    async def pop_to_top(self) -> None:
        """
        Acknowledge all messages of the subscriber but the newest one, in one transaction.

        It is done even if the task is cancelled meanwhile.
        """
        await self._workers.run(self._sub.pop_to_top)

    def _taker(self,
               timeout: float | None,
               retries: int,
               max_messages: int = 1,
               is_newest: bool = False) -> tuple[Take, Ending]:
        """
        Check the arguments of a receipt.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look within ``timeout``
        :param max_messages: how many messages to take at most
        :param is_newest: True to take the newest message instead of the next one
        :return: what waits and takes, what acknowledges and gives back
        """
        consumer, wait, pause = self._sub.prepare(timeout, retries)
        inbox = self._inbox_of(consumer)
        return (functools.partial(inbox.take, wait, pause, max_messages, is_newest),
                _IN_LOOP if isinstance(inbox, _inbox.LoopInbox) else self._in_workers)

    def _inbox_of(
            self,
            consumer: _engines.Consumer) -> _inbox.Inbox | _inbox.LoopInbox | _inbox.SharedInbox:
        """
        Find where the running loop waits for messages.

        :param consumer: that is open
        :return: inbox
        """
        loop = asyncio.get_running_loop()
        inbox = self._inboxes.get(loop)
        if (inbox is not None and inbox.consumer is consumer and inbox.process_id == os.getpid()):
            return inbox
        if self._loop_inbox is not None and self._loop_inbox.consumer is consumer:
            return self._loop_inbox
        if isinstance(consumer, _engines.LoopConsumer):
            self._loop_inbox = _inbox.LoopInbox(consumer)
            return self._loop_inbox
        if not isinstance(consumer, _engines.WakingConsumer):
            return _inbox.SharedInbox(consumer, self._takers)
        for other, abandoned in list(self._inboxes.items()):
            if other.is_closed():
                abandoned.close(_closed())
                self._inboxes.pop(other, None)
        inbox = self._inboxes[loop] = _inbox.Inbox(consumer, self._takers, loop)
        return inbox


def _closed() -> persipubsub.errors.ClosedError:
    """
    Describe a queue that was closed while somebody waited.

    :return: error to be raised
    """
    return persipubsub.errors.ClosedError(
        "Expected an open subscriber to receive from, but got: close() was called")
