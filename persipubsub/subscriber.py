"""Receive messages from a queue."""

import functools
import os
from collections.abc import Callable
from typing import Any, Literal, Optional, Union, overload

import persipubsub.config
import persipubsub.errors
from persipubsub import _engines, _slot
from persipubsub._receipts import BatchReceipt, Messages, Receipt, describe, unwrap
from persipubsub.message import Message

__all__ = ["BatchReceipt", "Messages", "Receipt", "Sub"]


class Sub:
    """
    Receive the messages that are addressed to a subscriber, in the order of their commits.

    One object may be used by many threads, and one subscriber id by many processes: they share the
    messages, and no two of them have the same message at the same time. It may be used in a forked
    child.

    >>> import json, pathlib, tempfile
    >>> import persipubsub.control, persipubsub.publisher
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
    >>> with persipubsub.publisher.Pub() as pub:
    ...     pub.init(pub_id="pub", config_pth=config_pth)
    ...     pub.send_many(msgs=[b"one", b"two", b"three"])
    >>> with Sub() as sub:
    ...     sub.init(sub_id="sub", config_pth=config_pth)
    ...     with sub.receive(timeout=10) as msg:
    ...         msg
    ...     sub.pop_to_top()
    ...     sub.front()
    b'one'
    b'three'
    >>> directory.cleanup()
    """

    def __init__(self) -> None:
        """Initialize without a queue; call :py:meth:`init` before anything else."""
        # Queue, consumer, and id of the subscriber.
        self._slot: _slot.Slot[tuple[_engines.Queue, _engines.Consumer, str]] = _slot.Slot()

    def init(self, sub_id: str, config_pth: Union[str, "os.PathLike[str]"]) -> None:
        """
        Open the queue of a subscriber. A queue that was open before is closed.

        :param sub_id: key of the subscriber in the configuration file
        :param config_pth: path to the configuration file
        :raise ConfigError: if the file is wrong or has no such subscriber
        :raise NotInitializedError: if the queue, or the subscriber, was not initialized
        :raise FormatError: if the queue's directory holds something else
        :raise StoreCorruptError: if the store is damaged
        """
        config = persipubsub.config.read(config_pth)
        subscriber = config.subscriber(sub_id)
        queue = _engines.engine_of(config,
                                   subscriber.in_queue).open_queue(config, subscriber.in_queue)
        try:
            consumer = queue.consumer(sub_id)
        except BaseException:
            queue.close()
            raise
        for old, _, _ in self._slot.put((queue, consumer, sub_id)):
            old.close()

    def __enter__(self) -> "Sub":
        """
        Use the subscriber as a context manager.

        :return: itself
        """
        return self

    def __exit__(self, *_: object) -> None:
        """Close the queue."""
        self.close()

    def close(self) -> None:
        """
        Close the queue; it may be closed twice.

        A message that is being received is given back.
        """
        opened = self._slot.take()
        if opened is not None:
            opened[0].close()

    @property
    def _consumer(self) -> _engines.Consumer | None:
        """
        Look up what takes messages.

        :return: consumer; None if there is no open queue
        """
        opened = self._slot.content
        return None if opened is None else opened[1]

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
        Receive the next message in a ``with`` block.

        The block gets the bytes that were sent, or None if no message came in time. Left without an
        exception, the message is acknowledged; left by an exception, it stays where it was and is
        delivered again, perhaps to another process of the same subscriber.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` if nobody wakes us; it is
            looked at once a second anyhow
        :param details: True to get a :py:class:`persipubsub.message.Message` instead of bytes
        :return: context manager of the message
        :raise CorruptMessageError: from the ``with`` statement if the next message is damaged; it
            is set aside, and the next call gives the one behind it
        """
        return Receipt(self._prepare(timeout, retries), describe if details else unwrap)

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
        Receive the newest message in a ``with`` block, and skip all older ones.

        The older ones are acknowledged for this subscriber, in the one transaction that sees that
        the message still is the newest one; other subscribers keep theirs. They stay skipped
        whatever becomes of the newest one. While another process has that, nothing is skipped, and
        it is waited for the next one.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` if nobody wakes us
        :param details: True to get a :py:class:`persipubsub.message.Message` instead of bytes
        :return: context manager of the message, as of :py:meth:`receive`
        :raise CorruptMessageError: as :py:meth:`receive` does
        """
        return Receipt(self._prepare(timeout, retries, is_newest=True),
                       describe if details else unwrap)

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
        Receive several messages in a ``with`` block.

        The block gets a list of the messages that are there, at least one and at most ``max_msgs``,
        or an empty list if none came in time. It does not wait until there are ``max_msgs``. All of
        them are acknowledged together, in one transaction, when the block is left without an
        exception; otherwise all of them stay and are delivered again.

        About 16 MiB are received at once at most, or one larger message.

        :param max_msgs: how many messages at most
        :param timeout: how long to wait for the first one, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` if nobody wakes us
        :param details: True to get :py:class:`persipubsub.message.Message` objects instead of bytes
        :return: context manager of the messages
        :raise CorruptMessageError: as :py:meth:`receive` does
        """
        _check_max_msgs(max_msgs)
        return BatchReceipt(functools.partial(self._prepare(timeout, retries), max_msgs),
                            describe if details else unwrap)

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
        Iterate over the messages as they come.

        A message is acknowledged when the next one is asked for. The loop ends when no message came
        within ``timeout``. A message at which the loop is left by an exception stays, and is
        delivered again; so does one at which it is left by ``break``, unless the iterator is used
        in a ``with`` statement: see :py:class:`Messages`.

        :param timeout: how long to wait for each message, in seconds; None: for ever
        :param details: True to get :py:class:`persipubsub.message.Message` objects instead of bytes
        :return: iterator
        :raise CorruptMessageError: from the iteration, as :py:meth:`receive` does
        """
        return Messages(self._prepare(timeout, retries=1), describe if details else unwrap)

    def _prepare(self,
                 timeout: float | None,
                 retries: int,
                 is_newest: bool = False) -> "Callable[..., Optional[_engines.Lease]]":
        """
        Check the arguments of a receipt.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look within ``timeout``
        :param is_newest: True to take the newest message instead of the next one
        :return: waits and takes, given how many messages at most unless it is one
        """
        consumer = self._consumer
        if consumer is None:
            raise _not_open()
        timeout, pause = _to_waiting(timeout, retries)
        return functools.partial(consumer.take_newest if is_newest else consumer.take, timeout,
                                 pause)

    def front(self) -> bytes | None:
        """
        Look at the next message without taking it.

        :return: message that nobody has acknowledged or is receiving now; None if there is none
        """
        consumer = self._consumer
        if consumer is None:
            raise _not_open()
        return consumer.front()

    def pop_to_top(self) -> None:
        """Acknowledge all messages of the subscriber but the newest one, in one transaction."""
        opened = self._slot.content
        if opened is None:
            raise _not_open()
        queue, _, sub_id = opened
        queue.skip_to_newest(sub_id)


def _to_waiting(timeout: float | None, retries: int) -> tuple[float | None, float]:
    """
    Check how long somebody wants to wait.

    :param timeout: given by the user, in seconds; None: for ever
    :param retries: how often to look within ``timeout``
    :return: how long to wait, time between two looks in seconds
    :raise ValueError: if they are no such numbers
    """
    if timeout is not None:
        timeout = _engines.seconds_of(timeout)
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 1:
        raise ValueError(f"Expected retries to be an integer from 1 on, but got: {retries!r}")
    if timeout is None:
        return None, 1.0
    return timeout, timeout / retries


def _check_max_msgs(max_msgs: object) -> None:
    """
    Check how many messages somebody wants at once.

    :param max_msgs: given by the user
    :raise ValueError: if it is not a number of messages
    """
    if isinstance(max_msgs, bool) or not isinstance(max_msgs, int) or max_msgs < 1:
        raise ValueError(f"Expected max_msgs to be an integer from 1 on, but got: {max_msgs!r}")


def _not_open() -> persipubsub.errors.ClosedError:
    """
    Describe a subscriber without a queue.

    :return: error to be raised
    """
    return persipubsub.errors.ClosedError(
        "Expected a subscriber with an open queue, but got: init() was not called, or close() was")
