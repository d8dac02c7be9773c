"""Publish messages to a queue from tasks of ``asyncio``; see :py:mod:`persipubsub.aio`."""

import functools
import os
from collections.abc import Sequence
from typing import Final, Union

import persipubsub.publisher
from persipubsub import _engines, _outbox, _workers
from persipubsub.publisher import BytesLike, MessageId, _all_to_bytes, _not_open, _to_bytes, _to_ids

#: For an engine that can not put what several tasks send together, and has no loop of its own.
_SENDING_THREADS: Final = 8


class _Publisher(persipubsub.publisher.Pub):
    """Be what blocks, with its queue."""

    def opened(self) -> persipubsub.publisher.Opened:
        """
        Look up where to send to.

        :return: queue, ids of the subscribers, whether ``send_many`` commits each message by itself
        :raise ClosedError: if there is no open queue
        """
        opened = self._slot.content
        if opened is None:
            raise _not_open()
        return opened


class Pub:
    """
    Send messages to the queue of a publisher, as :py:class:`persipubsub.publisher.Pub` does.

    Tasks that send at the same moment share a commit.

    >>> import asyncio, json, pathlib, tempfile
    >>> import persipubsub.control
    >>> from persipubsub.aio import Sub
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
        self._outbox: _outbox.Outbox | _outbox.LoopOutbox | None = None
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
        for workers in (self._opener, self._workers):
            workers.open()
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
                   timeout: float | None = None,
                   msg_id: MessageId | None = None) -> None:
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
        :raise ValueError: if the id is not of 1 to 255 bytes, or the timeout is no number from 0 on
        :raise MessageTooLargeError: if the queue could never hold it
        :raise QueueFullError: if there is no room, and the queue's strategy is ``reject``, or
            ``block`` and the time is over; nothing is sent
        :raise BusyTimeoutError: if another process is in the middle of a write for too long, at
            most about twice ``busy_timeout_secs``
        :raise DiskFullError: if there is no room
        """
        queue, audience, _ = self._pub.opened()
        outbox = self._outbox_of(queue)
        if outbox is None:
            await self._workers.run(functools.partial(self._pub.send, msg, timeout, msg_id))
            return
        if timeout is not None:
            timeout = _engines.seconds_of(timeout)
        message = _to_bytes(msg)
        await outbox.put((message, ), audience, timeout, _to_ids((msg_id, ), count=1))

    async def send_many(self,
                        msgs: Sequence[BytesLike],
                        timeout: float | None = None,
                        msg_ids: Sequence[MessageId | None] | None = None) -> None:
        """
        Send messages in one commit: all of them or none, even if the task is cancelled meanwhile.

        With ``autosync`` each message has a commit of its own instead, in order; an error, or that
        the task is cancelled, then leaves those before it sent. So does an error on servers
        (``nats://...``), which have no such commit.

        :param msgs: to be sent
        :param timeout: how long to wait for room, see :py:meth:`send`; with ``autosync`` for each
        :param msg_ids: of the messages, as many as these, None for those without
        :raise TypeError: if one of them is not bytes-like; nothing is sent
        :raise MessageTooLargeError: if the queue could never hold one of them, or all together
        :raise PersipubsubError: otherwise as :py:meth:`send` does
        """
        queue, audience, commits_each = self._pub.opened()
        outbox = self._outbox_of(queue)
        if outbox is None:
            await self._workers.run(functools.partial(self._pub.send_many, msgs, timeout, msg_ids))
            return
        if timeout is not None:
            timeout = _engines.seconds_of(timeout)
        messages = _all_to_bytes(msgs)
        ids = None if msg_ids is None else _to_ids(msg_ids, count=len(messages))
        if commits_each:
            for message in messages:
                queue.check_sizes((message, ))
            for index, message in enumerate(messages):
                await outbox.put((message, ), audience, timeout,
                                 None if ids is None else ids[index:index + 1])
        elif messages:
            await outbox.put(messages, audience, timeout, ids)

    def _outbox_of(self, queue: _engines.Queue) -> _outbox.Outbox | _outbox.LoopOutbox | None:
        """
        Find what puts messages into the queue in this process without a thread for each task.

        :param queue: that is open
        :return: outbox; None if the engine has nothing of the kind
        """
        outbox = self._outbox
        if outbox is not None and outbox.queue is queue and outbox.process_id == os.getpid():
            return outbox
        # Two threads may make one each at the same time; they only share less.
        if isinstance(queue, _engines.TogetherQueue):
            outbox = _outbox.Outbox(queue, self._workers)
        elif isinstance(queue, _engines.LoopQueue):
            outbox = _outbox.LoopOutbox(queue)
        else:
            return None
        self._outbox = outbox
        return outbox
