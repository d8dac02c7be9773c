"""
What the blocking classes and those of :py:mod:`persipubsub.aio` have in common.

A *face* is the set of public classes: blocking, or for asyncio.
Arguments are checked here, and it is decided here how the messages of a loop end.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import (Any, Final, Generic, Literal, NamedTuple, NoReturn, Self, TypeAlias, TypeVar,
                    overload)

import persipubsub.config
from persipubsub import engine
from persipubsub.config import Config, ConfigLike
from persipubsub.engine import MAX_ID_BYTES, Consumer, Lease, MessageIds, Queue, Recipients
from persipubsub.errors import ClosedError, NotInitializedError
from persipubsub.statistics import SubscriberStatistics

BytesLike: TypeAlias = bytes | bytearray | memoryview

MessageId: TypeAlias = str | bytes

#: Waits for messages and takes them; in a task, it is awaited.
Take: TypeAlias = Callable[[], Any]

ContentT = TypeVar("ContentT")
ResultT = TypeVar("ResultT")

#: A timeout over 30 years, in seconds, counts as None: a huge integer does not fit into a float.
_FOREVER_SECS: Final = 1e9


def _open_queue(config: Config, queue_key: str,
                look_up: Callable[[Queue], ResultT]) -> tuple[Queue, ResultT]:
    """Open a queue and look something up in it; if that fails, the queue is closed again."""
    queue = engine.of(config, queue_key).open_queue(config, queue_key)
    try:
        return queue, look_up(queue)
    except BaseException:
        queue.close()
        raise


class Target(NamedTuple):
    """Where an open publisher sends to."""

    name: str  #: of the publisher and its queue
    queue: Queue
    recipients: Recipients
    autosync: bool  #: each message of several has a commit of its own

    @classmethod
    def open(cls, pub_id: str, config_pth: ConfigLike, autosync: bool) -> Self:
        """Open the queue of a publisher."""
        config = persipubsub.config.read(config_pth)
        publisher = config.publisher(pub_id)
        key, names = publisher.out_queue, publisher.subscribers
        queue, _ = _open_queue(config, key, lambda queue: queue.require_subscribers(names))
        is_everybody = set(names) == set(config.queues[key].subscribers)
        recipients = None if is_everybody else tuple(sorted(names))
        return cls(f"{pub_id!r} of the queue {key!r}", queue, recipients, autosync)

    def batches(self, msgs: Iterable[BytesLike],
                msg_ids: Sequence[MessageId | None] | None) -> list[tuple[list[bytes], MessageIds]]:
        """Check all messages before the first one is sent; return what each commit puts."""
        messages = encode_all(msgs)
        ids = None if msg_ids is None else encode_ids(msg_ids, count=len(messages))
        if not self.autosync:
            return [(messages, ids)] if messages else []
        for message in messages:
            self.queue.check_sizes((message, ))
        return [([message], None if ids is None else ids[index:index + 1])
                for index, message in enumerate(messages)]


class Source(NamedTuple):
    """Where an open subscriber receives from."""

    name: str  #: of the subscriber and its queue
    queue: Queue
    consumer: Consumer
    subscriber: str

    @classmethod
    def open(cls, sub_id: str, config_pth: ConfigLike) -> Self:
        """Open the queue of a subscriber."""
        config = persipubsub.config.read(config_pth)
        key = config.subscriber(sub_id).in_queue
        queue, consumer = _open_queue(config, key, lambda queue: queue.consumer(sub_id))
        return cls(f"{sub_id!r} of the queue {key!r}", queue, consumer, sub_id)

    def statistics(self) -> SubscriberStatistics:
        """Return the figures of the subscriber."""
        for found in self.queue.statistics().subscribers:
            if found.subscriber == self.subscriber:
                return found
        raise NotInitializedError(
            f"Expected the subscriber {self.subscriber!r} in the queue, but got: it was removed; "
            "call persipubsub.control.initialize_all_dbs")


OpenT = TypeVar("OpenT", Target, Source)


class Handle(Generic[OpenT]):
    """
    Publisher or subscriber: has at most one open queue. Any thread may open and close it.

    It has no lock: if another thread holds a lock during a fork, the child waits for it for ever.
    """

    _kind: type[OpenT]

    def __init__(self, identifier: str | None, config_pth: ConfigLike | None, *more: bool) -> None:
        """Initialize without a queue."""
        self._given = None if identifier is None else (identifier, config_pth, *more)
        self._name = "" if identifier is None else f"{identifier!r}, "
        self._opened: OpenT | None = None
        if (identifier is None) != (config_pth is None):
            raise TypeError("Expected an id and a configuration, or neither of them, but got: "
                            f"{identifier!r}, {config_pth!r}")

    def _require(self) -> OpenT:
        """Return what is open."""
        opened = self._opened
        if opened is None:
            raise ClosedError(
                f"Expected {self!r} to be open, but got: init() was not called, or close() was")
        return opened

    def _exchange(self, opened: OpenT | None) -> OpenT | None:
        """Use this in the place of what is open; return that, to be closed."""
        old, self._opened = self._opened, opened
        if opened is not None:
            self._name = f"{opened.name}, "
        return old

    def _replace(self, opened: OpenT | None) -> None:
        """Close what is open, and use this in its place."""
        if (old := self._exchange(opened)) is not None:
            old.queue.close()

    def __repr__(self) -> str:
        """
        Tell id, queue and state.

        :return: text
        """
        state = "closed" if self._opened is None else "open"
        return f"<{type(self).__module__}.{type(self).__name__} {self._name}{state}>"

    def __reduce_ex__(self, protocol: object) -> str:
        """
        Refuse to be copied, also to another process.

        :param protocol: of pickle
        :raise TypeError: always
        """
        raise TypeError("Expected a publisher or subscriber to be opened in each process (pass its "
                        f"id and the configuration there), but got: a copy of {self!r}")


class Blocking(Handle[OpenT]):
    """Publisher or subscriber for threads."""

    def __init__(self, *given: Any) -> None:
        """Open a queue, if one is given."""
        super().__init__(*given)
        if self._given is not None:
            self._open(*self._given)

    def _open(self, *given: Any) -> None:
        self._replace(self._kind.open(*given))

    def __enter__(self) -> Self:
        """
        Use it as a context manager.

        :return: itself
        """
        return self

    def __exit__(self, *_: object) -> None:
        """Close the queue."""
        self.close()

    def close(self) -> None:
        """
        Close the queue; it may be closed twice.

        What was sent stays sent. A message that is being received is given back.
        """
        self._replace(None)


# Python has no type for "a receipt of this face, with that content", so a face names each of them:
# blocks of a message, of a message with details, of several, of several with details; loops over
# messages, over messages with details.
OneT = TypeVar("OneT")
DetailedOneT = TypeVar("DetailedOneT")
ManyT = TypeVar("ManyT")
DetailedManyT = TypeVar("DetailedManyT")
LoopT = TypeVar("LoopT")
DetailedLoopT = TypeVar("DetailedLoopT")


class Receiver(Handle[Source], Generic[OneT, DetailedOneT, ManyT, DetailedManyT, LoopT,
                                       DetailedLoopT]):
    """
    What both classes ``Sub`` have in common.

    The methods here take nothing yet: the block or the loop does.
    """

    _kind = Source
    _receipt: Callable[..., Any]
    _messages: Callable[..., Any]
    _taker: Callable[..., Take]  #: gets all arguments of ``take`` of a consumer
    _end: Callable[..., Any]  #: acknowledges and gives back

    # yapf: disable
    @overload
    def receive(self, timeout: float | None = 60, retries: int = 10,
                details: Literal[False] = False) -> OneT:        ...
    @overload
    def receive(self, timeout: float | None = 60, retries: int = 10, *,
                details: Literal[True]) -> DetailedOneT:        ...
    # yapf: enable
    def receive(self, timeout: float | None = 60, retries: int = 10, details: bool = False) -> Any:
        """
        Receive the next message in a ``with`` block; in a task, in an ``async with`` block.

        The block gets the bytes that were sent, or None if no message came in time. If the block is
        left without an exception, the message is acknowledged. If it is left by an exception, or
        because the task was cancelled, the message stays where it was and is delivered again,
        perhaps to another process of the same subscriber. A task that is cancelled while it waits
        leaves no message claimed.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` without a wake-up; there
            is a look once a second in any case
        :param details: True to get a :py:class:`persipubsub.message.Message` instead of bytes
        :return: a ``Receipt``: context manager of the message
        :raise CorruptMessageError: from the ``with`` statement if the next message is damaged; it
            is set aside, and the next call gives the one after it
        """
        return self._receipt(self._taker(*waiting(timeout, retries), 1, False), self._end, details)

    # yapf: disable
    @overload
    def receive_to_top(self, timeout: float | None = 60, retries: int = 10,
                       details: Literal[False] = False) -> OneT:        ...
    @overload
    def receive_to_top(self, timeout: float | None = 60, retries: int = 10, *,
                       details: Literal[True]) -> DetailedOneT:        ...
    # yapf: enable
    def receive_to_top(self,
                       timeout: float | None = 60,
                       retries: int = 10,
                       details: bool = False) -> Any:
        """
        Receive the newest message in a ``with`` block, and skip all older ones.

        One transaction makes sure that the message still is the newest one, and acknowledges the
        older ones for this subscriber. Other subscribers keep theirs. Skipped messages stay
        skipped, whatever happens to the newest one. While another process has the newest message,
        nothing is skipped, and the call waits for the next one.

        :param timeout: how long to wait, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` without a wake-up
        :param details: True to get a :py:class:`persipubsub.message.Message` instead of bytes
        :return: a ``Receipt``, see :py:meth:`receive`
        :raise CorruptMessageError: as :py:meth:`receive` does
        """
        return self._receipt(self._taker(*waiting(timeout, retries), 1, True), self._end, details)

    # yapf: disable
    @overload
    def receive_many(self, max_msgs: int, timeout: float | None = 60, retries: int = 10,
                     details: Literal[False] = False) -> ManyT:        ...
    @overload
    def receive_many(self, max_msgs: int, timeout: float | None = 60, retries: int = 10, *,
                     details: Literal[True]) -> DetailedManyT:        ...
    # yapf: enable
    def receive_many(self,
                     max_msgs: int,
                     timeout: float | None = 60,
                     retries: int = 10,
                     details: bool = False) -> Any:
        """
        Receive several messages in a ``with`` block; in a task, in an ``async with`` block.

        The block gets a list of the messages that are there, at least one and at most ``max_msgs``,
        or an empty list if none came in time. It does not wait until there are ``max_msgs``. If the
        block is left without an exception, all of them are acknowledged together, in one
        transaction. Otherwise all of them stay, and are delivered again.

        At most about 16 MiB (8 from servers), or one larger message, are received at once.

        :param max_msgs: how many messages at most
        :param timeout: how long to wait for the first one, in seconds; None: for ever
        :param retries: how often to look at the queue within ``timeout`` without a wake-up
        :param details: True to get :py:class:`persipubsub.message.Message` objects instead of bytes
        :return: a ``Receipt``: context manager of the messages
        :raise CorruptMessageError: as :py:meth:`receive` does
        """
        check_count("max_msgs", max_msgs)
        taker = self._taker(*waiting(timeout, retries), max_msgs, False)
        return self._receipt(taker, self._end, details, is_batch=True)

    # yapf: disable
    @overload
    def messages(self, timeout: float | None = None, details: Literal[False] = False,
                 prefetch: int = 1) -> LoopT:        ...
    @overload
    def messages(self, timeout: float | None = None, *, details: Literal[True],
                 prefetch: int = 1) -> DetailedLoopT:        ...
    # yapf: enable
    def messages(self,
                 timeout: float | None = None,
                 details: bool = False,
                 prefetch: int = 1) -> Any:
        """
        Iterate over the messages as they come: ``for``, or ``async for`` in a task.

        A message is acknowledged when the next one is asked for. The loop ends when no message came
        within ``timeout``. If the loop is left by an exception, by ``break``, or because the task
        was cancelled, its last message stays, and is delivered again. For ``break``, a ``with``
        statement changes that: see :py:class:`persipubsub.subscriber.Messages`.

        Up to ``prefetch`` messages are taken at once, which is several times as fast as one by one.
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
        check_count("prefetch", prefetch)
        taker = self._taker(*waiting(timeout, 1), prefetch, False)
        return self._messages(taker, self._end, details)


# Messages that were taken

#: How the messages of a lease end, part by part: the method of the lease, and its arguments.
Parts: TypeAlias = Sequence[tuple[str, Sequence[Any]]]


def end(lease: Lease | None, parts: Parts) -> None:
    """End messages, one part after the other, also if the part before fails."""
    with contextlib.ExitStack() as stack:
        for method, given in reversed(parts):
            stack.callback(getattr(lease, method), *given)


def refuse() -> NoReturn:
    """Raise: the receipt was entered already."""
    raise ValueError("Expected a receipt to be entered once, but got: twice. Call receive() again.")


class Block(Generic[ContentT]):
    """Messages that are taken when a block is entered, and ended when it is left."""

    __slots__ = ("_take", "_end", "_details", "_is_batch", "_lease")

    _expected = "Expected a receipt in a block (with sub.receive() as msg: ...)"

    def __init__(self, take: Take, ender: Any, details: bool, is_batch: bool = False) -> None:
        """
        Initialize without taking anything.

        :param take: waits for messages and takes them
        :param ender: acknowledges and gives back
        :param details: True if the block gets all that is known of messages, not only bytes
        :param is_batch: True if the block gets a list
        """
        self._take = take
        self._end = ender
        self._details = details
        self._is_batch = is_batch
        self._lease: Lease | None = None

    def _hold(self, lease: Lease | None) -> ContentT:
        """Return what the block gets: of one message or several, bytes or details."""
        self._lease = lease
        contents: Any = []
        if lease is not None:
            contents = lease.details() if self._details else lease.messages
        if not self._is_batch:
            contents = contents[0] if contents else None
        return contents  # type: ignore[no-any-return]

    def __bool__(self) -> bool:
        """
        Refuse to be taken for a message.

        :raise TypeError: always
        """
        raise TypeError(
            f"{self._expected}, but got: its truth value, which tells nothing about messages")

    def __del__(self) -> None:
        """Warn if the block was never entered."""
        if self._take is not refuse:
            warnings.warn(f"{self._expected}, but got: it was never entered, and received nothing",
                          ResourceWarning,
                          stacklevel=2,
                          source=self)


class Batch(Generic[ContentT]):
    """Messages of a loop: several are taken and ended at once, and handed out one by one."""

    __slots__ = ("_take", "_end", "_details", "_lease", "_items", "_given", "_is_done")

    def __init__(self, take: Take, ender: Any, details: bool) -> None:
        """
        Initialize without taking anything.

        :param take: waits for messages and takes them
        :param ender: acknowledges and gives back
        :param details: True if the loop gets all that is known of messages, not only bytes
        """
        self._take = take
        self._end = ender
        self._details = details
        self._lease: Lease | None = None
        self._items: Sequence[ContentT] = ()
        self._given = 0  # how many of the items the loop got
        self._is_done = False

    def _begin(self, lease: Lease | None) -> None:
        """Have the loop get the messages that were taken; it ends if there are none."""
        self._lease, self._is_done = lease, lease is None
        if lease is not None:
            items: Any = lease.details() if self._details else lease.messages
            self._items = items

    def _acknowledged(self) -> tuple[Lease | None, Parts]:
        """
        Return how to end the lease: acknowledge what the loop got so far, and keep the rest.

        What it got includes the message at hand.
        """
        lease, given = self._lease, self._given
        self._items, self._given = self._items[given:], 0  # a copy: it may be the lease's own list
        return lease, [("ack", [given])] if given > 0 else []

    def _finish(self,
                handled: int,
                error: BaseException | None = None) -> tuple[Lease | None, Parts]:
        """
        Return how to end the lease.

        Acknowledge what was handled, give back the message of the error, then the rest.
        """
        lease, count, given = self._lease, len(self._items), self._given
        self._lease, self._items, self._given = None, (), 0
        parts: list[tuple[str, list[Any]]] = []
        if handled > 0:
            parts.append(("ack", [handled]))
        # If the loop holds no item, acknowledge() has ended the failed message.
        if error is not None and given > 0:
            parts.append(("nack", [error, 1]))
        if handled < count:
            parts.append(("nack", []))
        return lease, parts if lease is not None else []


# What a user gives


def encode(msg: object) -> bytes:
    """
    Copy a message, so that it can not change while it is sent.

    :param msg: given by the user
    :return: its bytes
    :raise TypeError: if it is not bytes-like
    """
    if isinstance(msg, (bytes, bytearray, memoryview)):
        return bytes(msg)  # the same object, unless it might change
    hint = " (encode it: msg.encode())" if isinstance(msg, str) else ""
    raise TypeError("Expected a message of type bytes, bytearray or memoryview, but got: "
                    f"{type(msg).__name__}{hint}")


def encode_all(msgs: Iterable[object]) -> list[bytes]:
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
    return [encode(msg) for msg in messages]


def encode_ids(msg_ids: Sequence[MessageId | None], count: int) -> list[bytes | None] | None:
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
    ids = [None if msg_id is None else _encode_id(msg_id) for msg_id in msg_ids]
    if len(ids) != count:
        raise ValueError(
            f"Expected an id, or None, for each of {count} messages, but got: {len(ids)}")
    return None if ids.count(None) == count else ids


def _encode_id(msg_id: object) -> bytes:
    if not isinstance(msg_id, (str, bytes)):
        raise TypeError(
            f"Expected an id of a message of type str or bytes, but got: {type(msg_id).__name__}")
    encoded = bytes(msg_id) if isinstance(msg_id, bytes) else msg_id.encode("utf-8")
    if not 0 < len(encoded) <= MAX_ID_BYTES:
        raise ValueError(f"Expected an id of a message of 1 to {MAX_ID_BYTES} "
                         f"bytes, but got: {len(encoded)} bytes")
    return encoded


def seconds_of(timeout: object) -> float | None:
    """
    Check how long a caller wants to wait.

    >>> seconds_of(60), seconds_of(float("inf")), seconds_of(None)
    (60, None, None)

    :param timeout: in seconds; None: for ever
    :return: how long to wait; None: for ever
    :raise ValueError: if it is no such number
    """
    if timeout is None:
        return None
    if not (isinstance(timeout, (int, float)) and timeout >= 0):
        raise ValueError(
            f"Expected timeout to be None or a number of seconds from 0 on, but got: {timeout!r}")
    return None if timeout > _FOREVER_SECS else timeout


def waiting(timeout: object, retries: int) -> tuple[float | None, float]:
    """
    Check how long a caller wants to wait for a message.

    :param timeout: in seconds; None: for ever
    :param retries: how often to look at the queue within ``timeout`` without a wake-up
    :return: how long to wait; time between two looks, in seconds
    :raise ValueError: if they are no such numbers
    """
    seconds = seconds_of(timeout)
    check_count("retries", retries)
    return seconds, 1.0 if seconds is None else seconds / retries


def check_count(name: str, count: object) -> None:
    """
    Check a number of something.

    :param name: of the argument
    :param count: given by the user
    :raise ValueError: if it is no integer from 1 on
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"Expected {name} to be an integer from 1 on, but got: {count!r}")
