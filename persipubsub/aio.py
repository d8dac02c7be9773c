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
from typing import AsyncIterator, Dict, Final, Optional, Sequence, Tuple, Union

import persipubsub.errors
import persipubsub.publisher
import persipubsub.subscriber
from persipubsub import _engines, _inbox, _outbox, _workers
from persipubsub._async_receipts import BatchReceipt, Receipt
from persipubsub.publisher import (BytesLike, MessageId, _all_to_bytes, _not_open, _to_bytes,
                                   _to_ids)
from persipubsub.subscriber import _check_max_msgs

__all__ = ["BatchReceipt", "Pub", "Receipt", "Sub"]

#: Acknowledgements at the same moment share a commit; so many do.
_ACKNOWLEDGING_THREADS: Final = 8

#: For an engine that can not put what several tasks send together.
_SENDING_THREADS: Final = 8

#: ... and for one that can not wake its waiters.
_WAITING_THREADS: Final = 16


class _Publisher(persipubsub.publisher.Pub):
    """Be what blocks, with its queue."""

    def opened(self) -> "Tuple[_engines.Queue, Optional[Tuple[str, ...]]]":
        """
        Look up where to send to.

        :return: queue, ids of the subscribers; None for all of them
        :raise ClosedError: if there is no open queue
        """
        queue = self._queue
        if queue is None:
            raise _not_open()
        return queue, self._audience

    @property
    def commits_each(self) -> bool:
        """Tell whether ``send_many`` commits each message by itself."""
        return self._autosync


class _Subscriber(persipubsub.subscriber.Sub):
    """Be what blocks, with its consumer."""

    def prepare(self, timeout: Optional[float],
                retries: int) -> "Tuple[_engines.Consumer, Optional[float], float]":
        """
        Check the arguments of a receipt.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look within ``timeout``
        :return: consumer, how long to wait, time between two looks in seconds
        """
        return self._prepare(timeout, retries)


class Pub:
    """
    Send messages to the queue of a publisher, as :py:class:`persipubsub.publisher.Pub` does.

    Tasks that send at the same moment share a commit.

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
    ...         await asyncio.gather(*(pub.send(b"hello") for _ in range(100)))
    ...         async with sub.receive_many(1000, timeout=10) as msgs:
    ...             print(len(msgs))
    >>> asyncio.run(main())
    100
    >>> directory.cleanup()
    """

    def __init__(self) -> None:
        """Initialize without a queue; call :py:meth:`init` before anything else."""
        self._pub = _Publisher()
        self._outbox: Optional[_outbox.Outbox] = None
        self._workers = _workers.Workers(_SENDING_THREADS)
        # A single thread, so that one opens and closes in order, even if a task was cancelled.
        self._opener = _workers.Workers(1)

    async def init(self,
                   pub_id: str,
                   config_pth: Union[str, "os.PathLike[str]"],
                   autosync: bool = False) -> None:
        """
        Open the queue of a publisher. A queue that was open before is closed.

        If the task is cancelled meanwhile, the queue may be open or not.

        :param pub_id: key of the publisher in the configuration file
        :param config_pth: path to the configuration file
        :param autosync: True to let ``send_many`` commit each message by itself
        :raise PersipubsubError: as :py:meth:`persipubsub.publisher.Pub.init` does
        """
        await self._opener.run(functools.partial(self._pub.init, pub_id, config_pth, autosync))

    async def __aenter__(self) -> "Pub":
        """
        Use the publisher as a context manager.

        :return: itself
        """
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the queue."""
        await self.close()

    async def close(self) -> None:
        """
        Close the queue; it may be closed twice. What was sent stays sent.

        What other tasks are sending right now is sent, or they get a ``ClosedError``.
        """
        try:
            await self._opener.run(self._pub.close)
        finally:
            self._opener.close()
            self._workers.close()

    async def send(self,
                   msg: BytesLike,
                   timeout: Optional[float] = None,
                   msg_id: Optional[MessageId] = None) -> None:
        """
        Send a message to all subscribers of the publisher.

        When the call returns, the message is as safe as the queue's ``durability`` says. Messages
        of one loop are put in the order of the calls. If the task is cancelled meanwhile, the
        message is sent, or it is not: as with a process that dies then.

        :param msg: to be sent; may be empty
        :param timeout: how long to wait for room where the queue's strategy is ``block``, in
            seconds; 0: not at all; None: for ever
        :param msg_id: of the message; if the queue knows it, nothing is sent, and the message that
            is stored is safe when the call returns
        :raise TypeError: if it is not bytes-like, or the id is neither a string nor bytes
        :raise ValueError: if the id is not of 1 to 255 bytes
        :raise MessageTooLargeError: if the queue could never hold it
        :raise QueueFullError: if there is no room, and the queue's strategy is ``reject``, or
            ``block`` and the time is over; nothing is sent
        :raise BusyTimeoutError: if another process is in the middle of a write for too long, at
            most about twice ``busy_timeout_secs``
        :raise DiskFullError: if there is no room
        """
        queue, audience = self._pub.opened()
        outbox = self._outbox_of(queue)
        if outbox is None:
            await self._workers.run(functools.partial(self._pub.send, msg, timeout, msg_id))
            return
        message = _to_bytes(msg)
        await outbox.put((message, ), audience, timeout, _to_ids((msg_id, ), count=1))

    async def send_many(self,
                        msgs: Sequence[BytesLike],
                        timeout: Optional[float] = None,
                        msg_ids: Optional[Sequence[Optional[MessageId]]] = None) -> None:
        """
        Send messages in one commit: all of them or none, even if the task is cancelled meanwhile.

        With ``autosync`` each message has a commit of its own instead, in order; an error, or that
        the task is cancelled, then leaves those before it sent.

        :param msgs: to be sent
        :param timeout: how long to wait for room, see :py:meth:`send`; with ``autosync`` for each
        :param msg_ids: of the messages, as many as these, None for those without
        :raise TypeError: if one of them is not bytes-like; nothing is sent
        :raise MessageTooLargeError: if the queue could never hold one of them, or all together
        :raise PersipubsubError: otherwise as :py:meth:`send` does
        """
        queue, audience = self._pub.opened()
        outbox = self._outbox_of(queue)
        if outbox is None:
            await self._workers.run(functools.partial(self._pub.send_many, msgs, timeout, msg_ids))
            return
        messages = _all_to_bytes(msgs)
        ids = None if msg_ids is None else _to_ids(msg_ids, count=len(messages))
        if self._pub.commits_each:
            for message in messages:
                queue.check_sizes((message, ))
            for index, message in enumerate(messages):
                await outbox.put((message, ), audience, timeout,
                                 None if ids is None else ids[index:index + 1])
        elif messages:
            await outbox.put(messages, audience, timeout, ids)

    def _outbox_of(self, queue: _engines.Queue) -> Optional[_outbox.Outbox]:
        """
        Find where messages are collected for the queue in this process.

        :param queue: that is open
        :return: outbox; None if the engine can not put them together
        """
        outbox = self._outbox
        if outbox is not None and outbox.queue is queue and outbox.process_id == os.getpid():
            return outbox
        if not isinstance(queue, _engines.TogetherQueue):
            return None
        # Two threads may make one each at the same time; they only share less.
        self._outbox = _outbox.Outbox(queue, self._workers)
        return self._outbox


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
        self._inboxes: Dict[asyncio.AbstractEventLoop, _inbox.Inbox] = {}
        self._workers = _workers.Workers(_ACKNOWLEDGING_THREADS)
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

    def receive(self, timeout: Optional[float] = 60, retries: int = 10) -> Receipt:
        """
        Receive the next message in an ``async with`` block.

        The block gets the bytes that were sent, or None if no message came in time. Left without an
        exception, the message is acknowledged; left by an exception, and by that the task was
        cancelled, it stays where it was and is delivered again, perhaps to another process of the
        same subscriber. A task that is cancelled while it waits leaves no message claimed.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` if nobody wakes us; it is
            looked at once a second anyhow
        :return: context manager of the message
        :raise CorruptMessageError: from the ``async with`` statement if the next message is
            damaged; it is set aside, and the next call gives the one behind it
        """
        consumer, wait, pause = self._sub.prepare(timeout, retries)
        return Receipt(self._inbox_of(consumer), self._workers, wait, pause)

    def receive_many(self,
                     max_msgs: int,
                     timeout: Optional[float] = 60,
                     retries: int = 10) -> BatchReceipt:
        """
        Receive several messages in an ``async with`` block.

        The block gets a list of the messages that are there, at least one and at most ``max_msgs``,
        or an empty list if none came in time. All of them are acknowledged together, in one
        transaction, or all of them stay; see :py:meth:`receive`.

        :param max_msgs: how many messages at most
        :param timeout: how long to wait for the first one, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` if nobody wakes us
        :return: context manager of the messages
        :raise CorruptMessageError: as :py:meth:`receive` does
        """
        consumer, wait, pause = self._sub.prepare(timeout, retries)
        _check_max_msgs(max_msgs)
        return BatchReceipt(self._inbox_of(consumer), self._workers, wait, pause, max_msgs)

    async def messages(self, timeout: Optional[float] = None) -> AsyncIterator[bytes]:
        """
        Receive one message after the other, for an ``async for`` statement.

        A message is acknowledged when the next one is asked for. If the loop is left before that,
        by an exception, ``break`` or a task that is cancelled, it stays and is delivered again. It
        is given back a moment later: when Python closes the iterator, or at the end of an ``async
        with contextlib.aclosing(sub.messages()) as messages`` block.

        :param timeout: how long to wait for each message, in seconds; None: for ever
        :return: messages, until none comes in time
        """
        while True:
            async with self.receive(timeout=timeout) as msg:
                if msg is None:
                    return
                yield msg

    def __aiter__(self) -> AsyncIterator[bytes]:
        """
        Receive one message after the other, for ever; see :py:meth:`messages`.

        :return: messages
        """
        return self.messages()

    async def front(self) -> Optional[bytes]:
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

    def _inbox_of(self, consumer: _engines.Consumer) -> Union[_inbox.Inbox, _inbox.SharedInbox]:
        """
        Find where the running loop waits for messages.

        :param consumer: that is open
        :return: inbox
        """
        loop = asyncio.get_running_loop()
        inbox = self._inboxes.get(loop)
        if (inbox is not None and inbox.consumer is consumer and inbox.process_id == os.getpid()):
            return inbox
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
