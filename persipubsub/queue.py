"""
Keep the messages of one queue in one LMDB environment.

This is what :py:class:`persipubsub.publisher.Pub`, :py:class:`persipubsub.subscriber.Sub` and
:py:mod:`persipubsub.control` work with. A :py:class:`Queue` may be used by many threads at the same
time; many processes may have the same queue open.
"""

import contextlib
import datetime
import functools
import os
from collections.abc import Callable, Sequence

import lmdb

import persipubsub.config
import persipubsub.errors
import persipubsub.statistics
from persipubsub import (_claims, _in_flight, _losses, _moving, _putting_together, _replay,
                         _tidying, _wakeup, _waking)
from persipubsub._settings import Retries, Settings, check_dead_letters
from persipubsub.environment import _files, _registry
from persipubsub.store import _attempts, _check, _newest, _pending, _positions, _retention
from persipubsub.store._databases import Databases

__all__ = [
    "Queue", "Settings", "ensure_queue", "open_queue", "statistics_of", "check_durability"
]

statistics_of = persipubsub.statistics.statistics_of  # transitional


class Queue:
    """
    Put messages into a queue and look after them.

    >>> import tempfile
    >>> directory = tempfile.TemporaryDirectory()
    >>> settings = Settings(
    ...     path=directory.name, max_bytes=1 << 24, max_readers=16, timeout_ns=10**12,
    ...     max_messages=100, max_message_bytes=10**6, keeps_os=False,
    ...     checkpoint_secs=1.0, busy_timeout_secs=10.0,
    ...     strategy=persipubsub.config.Strategy.PRUNE_FIRST)
    >>> Queue.ensure(settings, subscribers=["sub"])
    >>> with Queue(settings) as queue:
    ...     queue.put([b"first", b"second"])
    ...     queue.front("sub")
    1
    b'first'
    >>> directory.cleanup()
    """

    def __init__(self, settings: Settings, clock: Callable[[], int] | None = None) -> None:
        """
        Open a queue that was initialized.

        :param settings: of the queue
        :param clock:
            returns the time in nanoseconds and never goes back; the queue's own clock if not given
        :raise NotInitializedError: if there is no queue yet
        :raise FormatError: if the directory holds something else
        :raise StoreCorruptError: if the store is damaged
        """
        self.settings = settings
        self._environment = _registry.acquire(settings.path, settings.options())
        try:
            self._now_ns = clock if clock is not None else self._environment.now_ns
            self._bell = _wakeup.Bell(os.path.join(settings.path, _files.BELL))
            self._claims = _claims.Claims(os.path.join(settings.path, _files.CLAIMS))
            self._board = _in_flight.Board(os.path.join(settings.path, _files.BOARD))
            self._movers: dict[str, _moving.Mover] = {}
            self._losses = _losses.LossLog(settings.path)
            self._tidier = _tidying.Tidier(settings, self._environment, self._losses, self._now_ns)
            self._putter = _putting_together.GroupPutter(settings, self._environment, self._bell,
                                                         self._losses, self._tidier, self._now_ns)
            self._is_closed = False
        except BaseException:
            # Whatever it is, Ctrl-C say: nobody could close what nobody got.
            _registry.release(self._environment)
            raise

    @staticmethod
    def ensure(settings: Settings, subscribers: Sequence[str],
               from_beginning: Sequence[str] = ()) -> None:
        """
        Create the queue and its subscribers, as far as they are not there. It may be repeated.

        The store is durable when the call returns. A store of another durability is changed, if no
        process uses it.

        :param settings: of the queue
        :param subscribers: ids of all its subscribers; others that are there stay
        :param from_beginning:
            those of them that get what is still stored if they are new; the others begin at the end
        :raise QueueInUseError: to change the durability while it is used
        """
        options = settings.options()
        _registry.create(settings.path, options)
        environment = _registry.acquire(settings.path, options, adopts_durability=True)
        try:
            keys = [subscriber.encode("utf-8") for subscriber in subscribers]
            if environment.read(functools.partial(_positions.lacks, keys=keys)):
                environment.write(
                    functools.partial(
                        _positions.add,
                        keys=keys,
                        from_beginning=[name.encode("utf-8") for name in from_beginning],
                        oldest_ns=environment.now_ns() - settings.timeout_ns))
                environment.secure_now()
        finally:
            _registry.release(environment)

    def __enter__(self) -> "Queue":
        """
        Use the queue as a context manager.

        :return: itself
        """
        return self

    def __exit__(self, *_: object) -> None:
        """Close the queue."""
        self.close()

    def close(self) -> None:
        """Close the queue; it may be closed twice. What was put stays."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._losses.report(force=True)
            self._claims.close()
            for mover in self._movers.values():
                mover.close()
            self._bell.close()
        finally:
            _registry.release(self._environment)

    def _check_open(self) -> None:
        """
        Check that the queue was not closed.

        :raise ClosedError: if it was
        """
        if self._is_closed:
            raise persipubsub.errors.ClosedError(
                f"Expected the queue {self.settings.path} to be open, but got: it was closed")

    # Putting

    def put(self,
            messages: Sequence[bytes],
            audience: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> int:
        """
        Add messages at the end of the queue, all of them or none.

        They are as safe as the durability says when the call returns. It takes no longer when there
        are more subscribers or more waiting messages.

        :param messages: in the order in which they are to be received
        :param audience: ids of the subscribers that get them; everybody if not given
        :param timeout:
            how long to wait for room where the strategy is ``block``, in seconds; None: for ever
        :param msg_ids:
            of the messages, as many as these, None for those without, 1 to 255 bytes each; a
            message of an id that the queue knows is left out, the rest is added
        :return: number of the first message; of one that is left out, of the one that is stored
        :raise MessageTooLargeError: if the queue could never hold them
        :raise QueueFullError: if there is no room, and the strategy is to drop nothing
        :raise BusyTimeoutError: if another process is in the middle of a write for too long
        :raise DiskFullError: if there is no room, and dropping messages made none
        """
        if self._is_closed:
            self._check_open()
        return self._putter.put(messages, audience, timeout, msg_ids)

    @property
    def waits_for_room(self) -> bool:
        """Tell whether publishers wait for room in a full queue."""
        return self.settings.strategy is persipubsub.config.Strategy.BLOCK

    def put_each(self, sendings: Sequence[_putting_together.Sending]) -> list[BaseException | None]:
        """
        Do what a :py:meth:`put` of each would do, one after the other, in as few commits as can be.

        It waits for other processes about as long as a single ``put``, and not for room.

        :param sendings: messages, audience and ids of each
        :return: error of each; None if it was put
        """
        self._check_open()
        return self._putter.put_each(sendings)

    def check_sizes(self, messages: Sequence[bytes]) -> None:
        """
        Check that the queue could hold messages if it were empty.

        :param messages: to be put in one commit
        :raise MessageTooLargeError: if it could not
        """
        self.settings.check_size(messages)

    def require_subscribers(self, subscribers: Sequence[str]) -> None:
        """
        Check that subscribers were initialized.

        :param subscribers: ids
        :raise NotInitializedError: if one of them was not
        """
        self._check_open()
        keys = [subscriber.encode("utf-8") for subscriber in subscribers]

        def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> None:
            for key in keys:
                _positions.require(txn, databases, key)

        self._environment.read(work)

    # Receiving

    def consumer(self, subscriber: str, is_delivery: bool = True) -> _waking.Consumer:
        """
        Take part in the work of a subscriber.

        :param subscriber: its id
        :param is_delivery:
            False for who takes messages elsewhere: that is not counted where deliveries are limited
        :return: from which messages can be taken
        :raise NotInitializedError: if the queue has no such subscriber
        """
        self._check_open()
        retries = self.settings.retries.get(subscriber)
        policy = _attempts.Policy() if retries is None else retries.policy
        consumer = _waking.Consumer(environment=self._environment,
                                    claims=self._claims,
                                    board=self._board,
                                    bell=self._bell,
                                    pending=_pending.Pending(subscriber, self.settings.timeout_ns,
                                                             self._now_ns, policy),
                                    expire=self.drop_expired,
                                    mover=self._mover(subscriber, retries),
                                    rings=self.settings.strategy
                                    is persipubsub.config.Strategy.BLOCK)
        if not is_delivery:
            consumer.counts = False
        return consumer

    def _mover(self, subscriber: str, retries: Retries | None) -> _moving.Mover:
        """
        Choose what moves the messages of a subscriber that are not delivered any more.

        :param subscriber: its id
        :param retries: what to do with them; None if nothing limits the deliveries
        :return: to be closed with the queue; it has nothing open before it moves a message
        """
        letters = None if retries is None else retries.dead_letters
        # One for all consumers of the subscriber: it remembers that a message could not be moved.
        return self._movers.setdefault(
            subscriber,
            _moving.Mover(
                _moving.Origin(queue="" if retries is None else retries.queue_key,
                               subscriber=subscriber,
                               path=self.settings.path),
                open_target=None if letters is None else functools.partial(Queue, letters)))

    def front(self, subscriber: str) -> bytes | None:
        """
        Look at the next message of a subscriber without taking it.

        :param subscriber: its id
        :return: message that nobody has acknowledged or claimed; None if there is none
        """
        return self.consumer(subscriber).front()

    def skip_to_newest(self, subscriber: str) -> int:
        """
        Acknowledge all messages of a subscriber but the newest one, in one transaction.

        :param subscriber: its id
        :return: how many were acknowledged by that
        """
        self._check_open()
        key = subscriber.encode("utf-8")
        skipped = self._environment.write(functools.partial(_newest.skip_to_newest, key=key),
                                          may_grow=True)
        self._ring()
        return skipped

    def _ring(self) -> None:
        """Wake publishers that wait for room, and subscribers."""
        with contextlib.suppress(persipubsub.errors.PersipubsubError):
            self._bell.ring()  # those who are not woken look once a second

    def seek(self, subscriber: str, to: str | int | float | datetime.datetime) -> int:
        """
        Let a subscriber go on from another place, in one transaction and durably.

        :param subscriber: its id
        :param to: see :py:func:`persipubsub.control.seek`
        :return: its new position
        :raise NotInitializedError: if the queue has no such subscriber
        """
        self._check_open()
        choose = _replay.chooser(to, self.settings.timeout_ns, self._now_ns)

        def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> int:
            return _positions.seek(txn,
                                   databases,
                                   key=subscriber.encode("utf-8"),
                                   number=choose(txn, databases))

        position = self._environment.write(work, may_grow=True)
        self._environment.secure_now()
        self._ring()
        return position

    # Looking after the queue

    def secure(self) -> None:
        """Let what was put so far survive a power failure, where putting does not do that."""
        self._check_open()
        if self.settings.keeps_os:
            self._environment.secure_now()

    def drop_expired(self) -> int:
        """
        Drop the messages that are older than the queue's timeout, for all subscribers.

        :return: how many deliveries were dropped
        """
        self._check_open()
        dropped = self._tidier.drop_expired()
        if dropped:
            self._ring()
        return dropped

    def delete_finished(self) -> int:
        """
        Delete all messages that everybody acknowledged, in many short transactions.

        Senders get their turn between them.

        :return: how many blocks were deleted
        """
        self._check_open()
        return self._tidier.delete_finished()

    def prune(self) -> int:
        """
        Drop the messages that are too old, and delete those that everybody acknowledged.

        :return: how many deliveries were dropped
        """
        dropped = self.drop_expired()
        self.delete_finished()
        return dropped

    def clear(self) -> int:
        """
        Drop all messages; subscribers and numbers stay.

        All messages leave in one transaction; what they took on the disk is freed after it. Until
        then they are like others that are finished: who seeks back gets those that are left.

        :return: how many deliveries were dropped
        """
        self._check_open()
        losses = self._environment.write(_retention.clear, may_grow=True)
        self._ring()
        self._tidier.delete_finished(keeps_retained=False)
        # The last block stays otherwise, since it keeps its numbers taken.
        self._environment.write(_retention.empty_last, may_grow=True)
        return sum(loss.messages for loss in losses)

    def statistics(self) -> persipubsub.statistics.QueueStatistics:
        """
        Count what is in the queue, without a walk through the messages.

        It is a consistent snapshot (but for what is in flight), and holds up nobody.

        :return: figures of the queue and of its subscribers
        """
        self._check_open()
        return persipubsub.statistics.collect(self._environment, self.settings, self._now_ns())

    def check(self) -> list[str]:
        """
        Check all invariants of the store: a walk through all messages, in one snapshot.

        :return: what is wrong; nothing if it is sound
        """
        self._check_open()
        return self._environment.read(_check.check)


def ensure_queue(config: persipubsub.config.Config, queue_key: str) -> None:
    """
    Create a queue and its subscribers, as far as they are not there. It may be repeated.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :raise ConfigError: if its dead letters would be put into itself
    """
    check_dead_letters(config, queue_key)
    subscribers = list(config.queues[queue_key].subscribers)
    if any(found.dead_letter_queue == queue_key for found in config.subscribers.values()):
        # On its behalf the operator looks at what is there; without it nobody might keep it.
        subscribers.append(persipubsub.config.DEAD_LETTERS)
    Queue.ensure(Settings.of(config, queue_key),
                 subscribers=subscribers,
                 from_beginning=[
                     subscriber.identifier for subscriber in config.subscribers.values()
                     if subscriber.in_queue == queue_key
                     and subscriber.start_from is persipubsub.config.StartFrom.BEGINNING
                 ])


def open_queue(config: persipubsub.config.Config, queue_key: str) -> Queue:
    """
    Open a queue that was initialized.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: to be closed by the caller
    :raise ConfigError: if its dead letters would be put into itself
    :raise NotInitializedError: if there is no queue yet
    """
    check_dead_letters(config, queue_key)
    return Queue(Settings.of(config, queue_key))


def check_durability(config: persipubsub.config.Config, queue_key: str) -> tuple[str, ...]:
    """
    Look whether a queue is less durable than its configuration says: it never is.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: warnings
    """
    del config, queue_key
    return ()
