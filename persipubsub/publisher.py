"""Publish messages to a queue."""

import os
from collections.abc import Iterable, Sequence
from typing import Optional, Union

import persipubsub.config
import persipubsub.errors
from persipubsub import _engines, _slot

__all__ = ["Pub"]

BytesLike = Union[bytes, bytearray, memoryview]

MessageId = Union[str, bytes]

#: Queue, ids of the subscribers that get what is sent (None: all of them), and whether each message
#: of several has a commit of its own.
Opened = tuple[_engines.Queue, Optional[tuple[str, ...]], bool]


class Pub:
    """
    Send messages to the queue of a publisher.

    One object may be used by many threads at the same time; those that send at the same moment
    share a commit. It may be used in a forked child.

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
    >>> with Pub() as pub:
    ...     pub.init(pub_id="pub", config_pth=config_pth)
    ...     pub.send(msg=b"hello")
    ...     pub.send_many(msgs=[b"one", b"two"])
    ...     for _ in range(2):
    ...         pub.send(msg=b"an order", msg_id="order 17")  # stored once
    >>> directory.cleanup()
    """

    def __init__(self) -> None:
        """Initialize without a queue; call :py:meth:`init` before anything else."""
        self._slot: _slot.Slot[Opened] = _slot.Slot()

    def init(self,
             pub_id: str,
             config_pth: Union[str, "os.PathLike[str]"],
             autosync: bool = False) -> None:
        """
        Open the queue of a publisher. A queue that was open before is closed.

        :param pub_id: key of the publisher in the configuration file
        :param config_pth: path to the configuration file
        :param autosync: True to let ``send_many`` commit each message by itself
        :raise ConfigError: if the file is wrong or has no such publisher
        :raise NotInitializedError: if the queue, or one of its subscribers, was not initialized
        :raise FormatError: if the queue's directory holds something else
        :raise StoreCorruptError: if the store is damaged
        """
        config = persipubsub.config.read(config_pth)
        publisher = config.publisher(pub_id)
        everybody = set(config.queues[publisher.out_queue].subscribers)
        engine = _engines.engine_of(config, publisher.out_queue)
        queue = engine.open_queue(config, publisher.out_queue)
        try:
            queue.require_subscribers(publisher.subscribers)
        except BaseException:
            queue.close()
            raise
        audience = (None if set(publisher.subscribers) == everybody else tuple(
            sorted(publisher.subscribers)))
        for old, _, _ in self._slot.put((queue, audience, autosync)):
            old.close()

    def __enter__(self) -> "Pub":
        """
        Use the publisher as a context manager.

        :return: itself
        """
        return self

    def __exit__(self, *_: object) -> None:
        """Close the queue."""
        self.close()

    def close(self) -> None:
        """Close the queue; it may be closed twice. What was sent stays sent."""
        opened = self._slot.take()
        if opened is not None:
            opened[0].close()

    def send(self,
             msg: BytesLike,
             timeout: float | None = None,
             msg_id: MessageId | None = None) -> None:
        """
        Send a message to all subscribers of the publisher.

        When the call returns, the message is as safe as the queue's ``durability`` says. It waits
        for another process's write for at most ``busy_timeout_secs`` seconds.

        With an id it may be repeated, also by another process after this one was killed: the queue
        stores one message of an id within ``once_window_secs`` seconds. The ids of all publishers
        of a queue are in one namespace.

        :param msg: to be sent; may be empty
        :param timeout:
            how long to wait for room where the queue's strategy is ``block``, in seconds; 0: not at
            all; None: for ever
        :param msg_id:
            of the message, 1 to 255 bytes (of a string, in UTF-8); if the queue knows it, nothing
            is sent, and the message that is stored is safe when the call returns
        :raise TypeError: if it is not bytes-like, or the id is neither a string nor bytes
        :raise ValueError: if the id has another length, or the timeout is no number from 0 on
        :raise MessageTooLargeError: if the queue could never hold it
        :raise QueueFullError:
            if there is no room, and the queue's strategy is ``reject``, or it is ``block`` and the
            time is over; nothing is sent
        :raise BusyTimeoutError: if another process is in the middle of a write for too long
        :raise DiskFullError: if there is no room
        """
        opened = self._slot.content
        if opened is None:
            raise _not_open()
        queue, audience, _ = opened
        # Not isinstance: an object of a derived class might change.
        message = msg if type(msg) is bytes else _to_bytes(msg)  # pylint: disable=unidiomatic-typecheck
        if timeout is None and msg_id is None:
            queue.put((message, ), audience)
        else:
            if timeout is not None:
                timeout = _engines.seconds_of(timeout)
            queue.put((message, ), audience, timeout, _to_ids((msg_id, ), count=1))

    def send_many(self,
                  msgs: Sequence[BytesLike],
                  timeout: float | None = None,
                  msg_ids: Sequence[MessageId | None] | None = None) -> None:
        """
        Send messages in one commit: all of them or none.

        With ``autosync`` each message has a commit of its own instead, in order; an error then
        leaves those before it sent.

        Messages of ids that the queue knows, or that come twice, are left out; the others are
        sent.

        On servers (``nats://...``) there is no such commit: an error leaves those at the beginning
        sent, or none. With the same ids the call may be repeated, which completes the batch.

        :param msgs: to be sent
        :param timeout:
            how long to wait for room where the queue's strategy is ``block``, in seconds; 0: not at
            all; None: for ever. With ``autosync`` it is for each message.
        :param msg_ids: of the messages, see :py:meth:`send`; as many as these, None for those
            without
        :raise TypeError:
            if one of them is not bytes-like, or an id is neither a string nor bytes; nothing is
            sent
        :raise ValueError:
            if an id has another length, there are not as many as messages, or the timeout is no
            number from 0 on
        :raise MessageTooLargeError: if the queue could never hold one of them, or all together
        :raise QueueFullError:
            if there is no room, and the queue's strategy is ``reject``, or it is ``block`` and the
            time is over; nothing is sent
        :raise BusyTimeoutError: if another process is in the middle of a write for too long
        :raise DiskFullError: if there is no room
        """
        opened = self._slot.content
        if opened is None:
            raise _not_open()
        queue, audience, commits_each = opened
        if timeout is not None:
            timeout = _engines.seconds_of(timeout)
        messages = _all_to_bytes(msgs)
        ids = None if msg_ids is None else _to_ids(msg_ids, count=len(messages))
        if commits_each:
            for message in messages:
                queue.check_sizes((message, ))
            for index, message in enumerate(messages):
                queue.put((message, ), audience, timeout,
                          None if ids is None else ids[index:index + 1])
        elif messages:
            queue.put(messages, audience, timeout, ids)


def _to_bytes(msg: object) -> bytes:
    """
    Copy a message, so that it can not change while it is sent.

    :param msg: given by the user
    :return: its bytes
    :raise TypeError: if it is not bytes-like
    """
    if isinstance(msg, bytes):
        return bytes(msg)
    if isinstance(msg, (bytearray, memoryview)):
        return bytes(msg)
    raise TypeError(
        f"Expected a message of type bytes, bytearray or memoryview, but got: {type(msg).__name__}")


def _all_to_bytes(msgs: Iterable[object]) -> list[bytes]:
    """
    Copy messages, so that they can not change while they are sent.

    :param msgs: given by the user
    :return: their bytes
    :raise TypeError: if it is no list, or one of them is not bytes-like
    """
    if isinstance(msgs, (bytes, bytearray, memoryview, str)):
        raise TypeError(f"Expected a list of messages, but got: {type(msgs).__name__}")
    messages = list(msgs)
    # One by one would take a fifth of the time of the whole call.
    if set(map(type, messages)) == {bytes}:
        return messages  # type: ignore[return-value]
    return [_to_bytes(msg) for msg in messages]


def _to_ids(msg_ids: Sequence[MessageId | None], count: int) -> list[bytes | None] | None:
    """
    Encode the ids of messages.

    :param msg_ids: given by the user
    :param count: how many there have to be
    :return: ids in UTF-8; None if there is none among them
    :raise TypeError: if one of them is neither a string nor bytes
    :raise ValueError: if one of them has another length, or there is another number of them
    """
    if isinstance(msg_ids, (bytes, str)):
        raise TypeError(f"Expected a list of ids of messages, but got: {msg_ids!r}")
    ids = [None if msg_id is None else _to_id(msg_id) for msg_id in msg_ids]
    if len(ids) != count:
        raise ValueError(
            f"Expected an id, or None, for each of {count} messages, but got: {len(ids)}")
    return None if ids.count(None) == count else ids


def _to_id(msg_id: object) -> bytes:
    """
    Encode the id of a message.

    :param msg_id: given by the user
    :return: id in UTF-8
    :raise TypeError: if it is neither a string nor bytes
    :raise ValueError: if it has another length
    """
    if not isinstance(msg_id, (str, bytes)):
        raise TypeError(
            f"Expected an id of a message of type str or bytes, but got: {type(msg_id).__name__}")
    encoded = bytes(msg_id) if isinstance(msg_id, bytes) else msg_id.encode("utf-8")
    if not 0 < len(encoded) <= _engines.MAX_ID_BYTES:
        raise ValueError(
            f"Expected an id of a message of 1 to {_engines.MAX_ID_BYTES} bytes, but got: "
            f"{len(encoded)} bytes")
    return encoded


def _not_open() -> persipubsub.errors.ClosedError:
    """
    Describe a publisher without a queue.

    :return: error to be raised
    """
    return persipubsub.errors.ClosedError(
        "Expected a publisher with an open queue, but got: init() was not called, or close() was")
