"""Receive messages from a queue."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Self

from persipubsub import face
from persipubsub.config import ConfigLike
from persipubsub.errors import PersipubsubError
from persipubsub.face import ContentT
from persipubsub.message import Message
from persipubsub.statistics import SubscriberStatistics

__all__ = ["Messages", "Receipt", "Sub"]


class Receipt(face.Block[ContentT]):
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
        take, self._take = self._take, face.refuse
        return self._hold(take())

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Acknowledge the messages, or give them back if the block was left by an exception."""
        lease = self._lease
        if lease is not None:
            if error is None:
                lease.ack()
            else:
                lease.nack(error)


class Messages(face.Batch[ContentT]):
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

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Acknowledge the message at hand, or give it back on an exception; the iterator ends."""
        self._is_done = True
        if error is None:
            self._end(*self._finish(self._given))
        else:
            # The exception of the block matters more.
            with contextlib.suppress(PersipubsubError):
                self._end(*self._finish(self._given - 1, error))

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
        if self._given == len(self._items):
            self._end(*self._finish(self._given))
            self._begin(None if self._is_done else self._take())
            if not self._items:
                raise StopIteration
        self._given += 1
        return self._items[self._given - 1]

    def acknowledge(self) -> None:
        """Acknowledge now what was handled, and the message at hand; it may be repeated."""
        self._end(*self._acknowledged())

    def close(self) -> None:
        """Give the message at hand back as if it had not been delivered, and end."""
        self._is_done = True
        self._end(*self._finish(self._given - 1))

    def __del__(self) -> None:
        """Give back the messages of a loop that was left."""
        if getattr(self, "_lease", None) is not None:
            with contextlib.suppress(PersipubsubError):
                self.close()


class Sub(face.Receiver[Receipt[bytes | None], Receipt[Message | None], Receipt[list[bytes]],
                        Receipt[list[Message]], Messages[bytes], Messages[Message]],
          face.Blocking[face.Source]):
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

    _receipt = Receipt
    _messages = Messages
    _end = staticmethod(face.end)

    def __init__(self, sub_id: str | None = None, config_pth: ConfigLike | None = None) -> None:
        """
        Open the queue of a subscriber. Without arguments, call :py:meth:`init` for that.

        :param sub_id: key of the subscriber in the configuration
        :param config_pth: see :py:meth:`init`
        :raise PersipubsubError: as :py:meth:`init` does
        :raise TypeError: if only one of id and configuration is given
        """
        super().__init__(sub_id, config_pth)

    def init(self, sub_id: str, config_pth: ConfigLike) -> None:
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
        self._open(sub_id, config_pth)

    def _taker(self, *how: Any) -> face.Take:
        return functools.partial((self._opened or self._require()).consumer.take, *how)

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

    def statistics(self) -> SubscriberStatistics:
        """
        Count what waits for the subscriber, and what was dropped before it was read.

        :return: figures
        """
        return self._require().statistics()
