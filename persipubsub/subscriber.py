"""Receive messages from a queue."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, Self, overload

import persipubsub.config
import persipubsub.engine
import persipubsub.errors
import persipubsub.face
import persipubsub.statistics
from persipubsub.face import ContentT
from persipubsub.message import Message

__all__ = ["Messages", "Receipt", "Sub"]


class Receipt(persipubsub.face.Block[ContentT]):
    """
    One message, or a list of several, in a ``with`` block.

    Returned by :py:meth:`persipubsub.subscriber.Sub.receive` and
    :py:meth:`persipubsub.subscriber.Sub.receive_many`; to be entered once.
    """

    __slots__ = ()

    def __enter__(self) -> ContentT:
        """
        Wait for messages.

        :return: message, None if none came in time; or a list, empty if none came in time
        """
        take, self._take = self._take, persipubsub.face.refuse
        return self._hold(take())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        """Acknowledge the messages, or give them back if the block was left by an exception."""
        lease = self._lease
        if lease is not None:
            if error is None:
                lease.ack()
            else:
                lease.nack(error)


class Messages(persipubsub.face.Batch[ContentT]):
    """
    Iterate over messages, and acknowledge them when the next one is asked for.

    Returned by :py:meth:`persipubsub.subscriber.Sub.messages`, for one thread. Nothing happens
    before the first message is asked for.

    A ``for`` loop does not tell the iterator whether it was left by ``break`` or by an exception.
    The message at which it was left stays, and is delivered again: at once, if nothing else refers
    to the iterator. Messages before it are acknowledged. If you use ``break``, or want errors to be
    counted and kept, tell the iterator in one of two ways:

    - Put ``with sub.messages() as msgs:`` around the loop. Leaving the block acknowledges the
      message at hand. An exception gives the message back, and is recorded.
    - Call :py:meth:`acknowledge` before the ``break``.
    """

    __slots__ = ()

    def __enter__(self) -> Self:
        """
        Let the end of the block decide about the last message.

        :return: itself
        """
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        """Acknowledge the message at hand, or give it back on an exception; the iterator ends."""
        self._is_done = True
        if error is None:
            persipubsub.face.end(self._finish(self._given))
        else:
            # What the block raised matters more.
            with contextlib.suppress(persipubsub.errors.PersipubsubError):
                persipubsub.face.end(self._finish(self._given - 1, error))

    def __iter__(self) -> Iterator[ContentT]:
        """
        Iterate.

        :return: itself
        """
        return self

    def __next__(self) -> ContentT:
        """
        Return the next message; if none is left, acknowledge what was handled, and wait.

        :return: message
        :raise StopIteration: if none came in time
        """
        if self._given < len(self._items):
            item = self._items[self._given]
            self._given += 1
            return item
        persipubsub.face.end(self._finish(self._given))
        lease = None if self._is_done else self._take()
        if lease is None:
            self._is_done = True
            raise StopIteration
        return self._begin(lease)

    def acknowledge(self) -> None:
        """Acknowledge now what was handled, and the message at hand; it may be repeated."""
        persipubsub.face.end(self._acknowledged())

    def close(self) -> None:
        """Give the message at hand back as if it had not been delivered, and end."""
        self._is_done = True
        persipubsub.face.end(self._finish(self._given - 1))

    def __del__(self) -> None:
        """Do not keep messages from others that a loop left behind."""
        if getattr(self, "_lease", None) is not None:
            with contextlib.suppress(persipubsub.errors.PersipubsubError):
                self.close()


class Sub(persipubsub.face.Handle[persipubsub.face.Source]):
    """
    Receive the messages that are addressed to a subscriber, in the order of their commits.

    Many threads may use one object, and many processes may use one subscriber id. They share the
    messages: no two of them have the same message at the same time. A forked child may use the
    object, too. It can not be pickled.

    >>> import tempfile
    >>> import persipubsub.control, persipubsub.publisher
    >>> directory = tempfile.TemporaryDirectory()
    >>> config = {"pub": {"out_queue": "q"}, "sub": {"in_queue": "q"},
    ...           "queues": {"q": {"path": directory.name, "subscribers": ["sub"]}}}
    >>> persipubsub.control.initialize_all_dbs(config)
    >>> with persipubsub.publisher.Pub("pub", config) as pub:
    ...     pub.send_many([b"one", b"two", b"three", b"four"])
    >>> with Sub("sub", config) as sub:
    ...     with sub.receive(timeout=10) as msg:
    ...         msg
    ...     for msg in sub:
    ...         print(msg)
    ...         break
    ...     sub.pop_to_top()
    ...     sub.front()
    b'one'
    b'two'
    b'four'
    >>> directory.cleanup()
    """

    def __init__(self,
                 sub_id: str | None = None,
                 config_pth: persipubsub.config.ConfigLike | None = None) -> None:
        """
        Open the queue of a subscriber. Without arguments, call :py:meth:`init` for that.

        :param sub_id: key of the subscriber in the configuration
        :param config_pth: see :py:meth:`init`
        :raise PersipubsubError: as :py:meth:`init` does
        :raise TypeError: if only one of id and configuration is given
        """
        super().__init__(sub_id, config_pth)
        if self._given is not None:
            self.init(*self._given)

    def init(self, sub_id: str, config_pth: persipubsub.config.ConfigLike) -> None:
        """
        Open the queue of a subscriber. A queue that was open before is closed.

        :param sub_id: key of the subscriber in the configuration
        :param config_pth: path to the configuration file, a dictionary with its content, or a
            :py:class:`persipubsub.config.Config`
        :raise ConfigError: if the configuration is wrong or has no such subscriber
        :raise NotInitializedError: if the queue, or the subscriber, was not initialized
        :raise FormatError: if the queue's directory holds something else
        :raise StoreCorruptError: if the store is damaged
        """
        self._replace(persipubsub.face.Source.open(sub_id, config_pth))

    def __enter__(self) -> Self:
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
        self._replace(None)

    # yapf: disable
    @overload
    def receive(self, timeout: float | None = 60, retries: int = 10,
                details: Literal[False] = False) -> Receipt[bytes | None]:        ...
    @overload
    def receive(self, timeout: float | None = 60, retries: int = 10, *,
                details: Literal[True]) -> Receipt[Message | None]:        ...
    # yapf: enable
    def receive(self,
                timeout: float | None = 60,
                retries: int = 10,
                details: bool = False) -> Receipt[Any]:
        """
        Receive the next message in a ``with`` block.

        The block gets the bytes that were sent, or None if no message came in time. If the block is
        left without an exception, the message is acknowledged. If it is left by an exception, the
        message stays where it was and is delivered again, perhaps to another process of the same
        subscriber.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` without a wake-up; there
            is a look once a second in any case
        :param details: True to get a :py:class:`persipubsub.message.Message` instead of bytes
        :return: context manager of the message
        :raise CorruptMessageError: from the ``with`` statement if the next message is damaged; it
            is set aside, and the next call gives the one after it
        """
        return Receipt(self._taker(timeout, retries), details)

    # yapf: disable
    @overload
    def receive_to_top(self, timeout: float | None = 60, retries: int = 10,
                       details: Literal[False] = False) -> Receipt[bytes | None]:        ...
    @overload
    def receive_to_top(self, timeout: float | None = 60, retries: int = 10, *,
                       details: Literal[True]) -> Receipt[Message | None]:        ...
    # yapf: enable
    def receive_to_top(self,
                       timeout: float | None = 60,
                       retries: int = 10,
                       details: bool = False) -> Receipt[Any]:
        """
        Receive the newest message in a ``with`` block, and skip all older ones.

        One transaction makes sure that the message still is the newest one, and acknowledges the
        older ones for this subscriber. Other subscribers keep theirs. Skipped messages stay
        skipped, whatever happens to the newest one. While another process has the newest message,
        nothing is skipped, and the call waits for the next one.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` without a wake-up
        :param details: True to get a :py:class:`persipubsub.message.Message` instead of bytes
        :return: context manager of the message, see :py:meth:`receive`
        :raise CorruptMessageError: as :py:meth:`receive` does
        """
        return Receipt(self._taker(timeout, retries, is_newest=True), details)

    # yapf: disable
    @overload
    def receive_many(self, max_msgs: int, timeout: float | None = 60, retries: int = 10,
                     details: Literal[False] = False) -> Receipt[list[bytes]]:        ...
    @overload
    def receive_many(self, max_msgs: int, timeout: float | None = 60, retries: int = 10, *,
                     details: Literal[True]) -> Receipt[list[Message]]:        ...
    # yapf: enable
    def receive_many(self,
                     max_msgs: int,
                     timeout: float | None = 60,
                     retries: int = 10,
                     details: bool = False) -> Receipt[Any]:
        """
        Receive several messages in a ``with`` block.

        The block gets a list of the messages that are there, at least one and at most ``max_msgs``,
        or an empty list if none came in time. It does not wait until there are ``max_msgs``. If the
        block is left without an exception, all of them are acknowledged together, in one
        transaction. Otherwise all of them stay, and are delivered again.

        At most about 16 MiB, or one larger message, are received at once.

        :param max_msgs: how many messages at most
        :param timeout: how long to wait for the first one, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` without a wake-up
        :param details: True to get :py:class:`persipubsub.message.Message` objects instead of bytes
        :return: context manager of the messages
        :raise CorruptMessageError: as :py:meth:`receive` does
        """
        persipubsub.face.check_count("max_msgs", max_msgs)
        return Receipt(self._taker(timeout, retries, max_msgs), details, is_batch=True)

    # yapf: disable
    @overload
    def messages(self, timeout: float | None = None, details: Literal[False] = False,
                 prefetch: int = 1) -> Messages[bytes]:        ...
    @overload
    def messages(self, timeout: float | None = None, *, details: Literal[True],
                 prefetch: int = 1) -> Messages[Message]:        ...
    # yapf: enable
    def messages(self,
                 timeout: float | None = None,
                 details: bool = False,
                 prefetch: int = 1) -> Messages[Any]:
        """
        Iterate over the messages as they come.

        A message is acknowledged when the next one is asked for. The loop ends when no message came
        within ``timeout``. If the loop is left by an exception or by ``break``, its last message
        stays, and is delivered again. For ``break``, a ``with`` statement changes that: see
        :py:class:`Messages`.

        With ``prefetch``, up to so many messages are taken at once, which is several times as fast.
        They are acknowledged together when the last one was handled, or when the loop is left. If
        the loop is left, the rest is given back. If the consumer is killed, all of them are
        delivered again. As long as it has them, no other consumer gets them: choose a small number
        if one message takes long.

        :param timeout: how long to wait for each message, in seconds; None: for ever
        :param details: True to get :py:class:`persipubsub.message.Message` objects instead of bytes
        :param prefetch: how many messages to take at once at most
        :return: iterator
        :raise CorruptMessageError: from the iteration, as :py:meth:`receive` does
        """
        persipubsub.face.check_count("prefetch", prefetch)
        return Messages(self._taker(timeout, 1, prefetch), details)

    def _taker(self,
               timeout: float | None,
               retries: int,
               max_messages: int = 1,
               is_newest: bool = False) -> Callable[[], persipubsub.engine.Lease | None]:
        """Check how long to wait; return what waits and takes."""
        seconds, poll_secs = persipubsub.face.waiting(timeout, retries)
        source = self._opened or self._require()
        return functools.partial(source.consumer.take, seconds, poll_secs, max_messages, is_newest)

    def __iter__(self) -> Messages[bytes]:
        """
        Iterate over the messages as they come, for ever; see :py:meth:`messages`.

        :return: iterator
        """
        return self.messages()

    def front(self) -> bytes | None:
        """
        Look at the next message without taking it.

        :return: message that is neither acknowledged nor being received; None if there is none
        """
        return self._require().consumer.front()

    def pop_to_top(self) -> None:
        """Acknowledge all messages of the subscriber but the newest one, in one transaction."""
        source = self._require()
        source.queue.skip_to_newest(source.subscriber)

    def statistics(self) -> persipubsub.statistics.SubscriberStatistics:
        """
        Count what waits for the subscriber, and what was dropped before it was read.

        :return: figures
        """
        return self._require().statistics()
