"""Publish messages to a queue."""

import os
from typing import List, Optional, Sequence, Tuple, Union

import persipubsub.config
import persipubsub.errors
from persipubsub import _engines

__all__ = ["Pub"]

BytesLike = Union[bytes, bytearray, memoryview]


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
    >>> directory.cleanup()
    """

    def __init__(self) -> None:
        """Initialize without a queue; call :py:meth:`init` before anything else."""
        self._queue = None  # type: Optional[_engines.Queue]
        self._audience = None  # type: Optional[Tuple[str, ...]]
        self._autosync = False

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
        self.close()
        self._queue = queue
        self._audience = (None if set(publisher.subscribers) == everybody else tuple(
            sorted(publisher.subscribers)))
        self._autosync = autosync

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
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.close()

    def send(self, msg: BytesLike) -> None:
        """
        Send a message to all subscribers of the publisher.

        When the call returns, the message is as safe as the queue's ``durability`` says. It waits
        for another process's write for at most ``busy_timeout_secs`` seconds.

        :param msg: to be sent; may be empty
        :raise TypeError: if it is not bytes-like
        :raise MessageTooLargeError: if the queue could never hold it
        :raise BusyTimeoutError: if another process is in the middle of a write for too long
        :raise DiskFullError: if there is no room
        """
        queue = self._queue
        if queue is None:
            raise _not_open()
        queue.put((_to_bytes(msg), ), self._audience)

    def send_many(self, msgs: Sequence[BytesLike]) -> None:
        """
        Send messages in one commit: all of them or none.

        With ``autosync`` each message has a commit of its own instead, in order; an error then
        leaves those before it sent.

        :param msgs: to be sent
        :raise TypeError: if one of them is not bytes-like; nothing is sent
        :raise MessageTooLargeError: if the queue could never hold one of them, or all together
        :raise BusyTimeoutError: if another process is in the middle of a write for too long
        :raise DiskFullError: if there is no room
        """
        queue = self._queue
        if queue is None:
            raise _not_open()
        messages = _all_to_bytes(msgs)
        if self._autosync:
            for message in messages:
                queue.check_sizes((message, ))
            for message in messages:
                queue.put((message, ), self._audience)
        elif messages:
            queue.put(messages, self._audience)


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
    raise TypeError("Expected a message of type bytes, bytearray or memoryview, but got: {}".format(
        type(msg).__name__))


def _all_to_bytes(msgs: Sequence[object]) -> List[bytes]:
    """
    Copy messages, so that they can not change while they are sent.

    :param msgs: given by the user
    :return: their bytes
    :raise TypeError: if it is no list, or one of them is not bytes-like
    """
    if isinstance(msgs, (bytes, bytearray, memoryview, str)):
        raise TypeError("Expected a list of messages, but got: {}".format(type(msgs).__name__))
    return [_to_bytes(msg) for msg in msgs]


def _not_open() -> persipubsub.errors.ClosedError:
    """
    Describe a publisher without a queue.

    :return: error to be raised
    """
    return persipubsub.errors.ClosedError(
        "Expected a publisher with an open queue, but got: init() was not called, or close() was")
