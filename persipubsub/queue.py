"""
A queue in a directory of this machine: the engine on LMDB and a journal.

:py:class:`persipubsub.publisher.Pub`, :py:class:`persipubsub.subscriber.Sub` and
:py:mod:`persipubsub.control` work with it. A :py:class:`Queue` may be used by many threads at the
same time; many processes may have the same queue open.
"""

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar

import persipubsub.config
from persipubsub.config import Config
from persipubsub.errors import ClosedError, PersipubsubError
from persipubsub.lmdb_engine import attempts, check, claims, consuming, environment, figures
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import meta, positions, retention, room, sending
from persipubsub.lmdb_engine.dead_letters import DeadLetterWriter, Retries
from persipubsub.lmdb_engine.format import Tx
from persipubsub.lmdb_engine.pending import Pending
from persipubsub.message import Peeked, Place, time_ns_of
from persipubsub.statistics import QueueStatistics

__all__ = ["Queue", "Retries", "ensure_queue", "open_queue", "statistics_of", "peek", "follow"]

ResultT = TypeVar("ResultT")


class Queue(contextlib.AbstractContextManager["Queue"]):
    """Puts messages into a queue, hands them to consumers, and looks after them."""

    def __init__(self,
                 path: str,
                 queue: persipubsub.config.Queue,
                 retries: Mapping[str, Retries] | None = None,
                 clock: Callable[[], int] | None = None) -> None:
        """
        Open a queue that was initialized.

        :param path: directory
        :param queue: settings in the configuration; the settings stored in the queue win
        :param retries: of the subscribers that have any
        :param clock: in the place of the queue's own
        :raise NotInitializedError: if it was not
        """
        self.path = path
        self._retries = retries or {}
        self._opened = opened = environment.acquire(path, queue)
        try:
            self._now_ns = clock if clock is not None else opened.now_ns
            self._claims = claims.Claims(path)
            self._writers: dict[str, DeadLetterWriter] = {}
            self._room = room.Room(opened, self._now_ns)
            self._sender = sending.Sender(opened, self._room, self._now_ns)
            self._members = (self._claims, self._sender)
            opened.members += self._members
            opened.drop_logs.append(self._room.drop_log)
        except BaseException:
            environment.release(opened)
            raise
        #: True if publishers wait for room in a full queue.
        self.waits_for_room = self._room.strategy is persipubsub.config.Strategy.BLOCK
        # Stored, as the attribute of an attribute takes longer.
        self._put = self._sender.put

    @staticmethod
    def ensure(path: str,
               queue: persipubsub.config.Queue,
               subscribers: Sequence[str],
               from_beginning: Sequence[str] = ()) -> None:
        """
        Create the queue and its subscribers, as far as they are not there, and store its settings.

        It may be repeated. What it did is durable when it returns.
        """
        environment.create(path, queue)
        with environment.opened(path, queue, adopts_settings=True) as opened:
            keys = [subscriber.encode("utf-8") for subscriber in subscribers]
            if opened.read(positions.lacks, keys):
                timeout_secs = opened.queue.high_water_mark.msg_timeout_secs
                oldest_ns = 0 if timeout_secs is None else opened.now_ns() - int(timeout_secs * 1e9)
                opened.write(positions.add, keys, [name.encode("utf-8") for name in from_beginning],
                             oldest_ns)
                opened.write_state()

    def __exit__(self, *_: object) -> None:
        """Close the queue."""
        self.close()

    def __repr__(self) -> str:
        """Tell the directory and the state."""
        return f"<Queue {self.path!r}, {'closed' if self._claims.is_closed else 'open'}>"

    def close(self) -> None:
        """Close the queue; it may be closed twice. Messages that are claimed are given back."""
        with self._claims.ending_lock:
            if self._claims.is_closed:
                return
            self._claims.close()
        opened = self._opened
        try:
            self._room.drop_log.report()
            for writer in self._writers.values():
                writer.close()
            for member in self._members:
                opened.members.remove(member)
            opened.drop_logs.remove(self._room.drop_log)
            # Waiting calls notice that it is closed.
            with contextlib.suppress(PersipubsubError):
                opened.notifier.notify()
        finally:
            environment.release(opened)

    def _check_open(self) -> None:
        """Check that the queue was not closed."""
        if self._claims.is_closed:
            raise ClosedError(f"Expected the queue {self.path} to be open, but got: it was closed")

    @property
    def _environment(self) -> environment.Environment:
        """The open store."""
        self._check_open()
        return self._opened

    # Sending

    def put(self,
            messages: Sequence[bytes],
            recipients: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> int:
        """Add messages at the end of the queue, all of them or none; see ``Sender.put``."""
        if self._claims.is_closed:
            self._check_open()
        return self._put(messages, recipients, timeout, msg_ids)

    def put_each(self, sendings: Sequence[sending.Sending]) -> list[BaseException | None]:
        """Put each, all or nothing, in as few commits as possible; never wait for room."""
        self._check_open()
        return self._sender.put_each(sendings)

    def check_sizes(self, messages: Sequence[bytes]) -> None:
        """Check that the queue could hold messages if it were empty."""
        self._room.check_sizes(messages)

    def require_subscribers(self, subscribers: Sequence[str]) -> None:
        """Check that subscribers were initialized."""
        for subscriber in subscribers:
            self._environment.read(positions.require, subscriber.encode("utf-8"))

    # Receiving

    def consumer(self, subscriber: str, is_delivery: bool = True) -> consuming.Consumer:
        """
        Take part in the work of a subscriber.

        :param is_delivery: False to move messages, which counts as no delivery
        """
        opened = self._environment
        retries = self._retries.get(subscriber, Retries())
        # All consumers of a subscriber share it: it remembers that a message could not be moved.
        writer = self._writers.setdefault(subscriber,
                                          DeadLetterWriter(self.path, subscriber, retries))
        pending = Pending(subscriber, self._room.timeout_ns, self._now_ns, retries.policy)
        consumer = consuming.Consumer(opened, self._claims, pending, self._room.drop_expired,
                                      writer, self.waits_for_room)
        consumer.counts = consumer.counts and is_delivery
        return consumer

    def skip_to_newest(self, subscriber: str) -> int:
        """Acknowledge all messages of a subscriber but the newest one; return how many."""
        skipped = self._environment.write(positions.skip_to_newest,
                                          subscriber.encode("utf-8"),
                                          makes_room=True)
        self._environment.notifier.notify()
        return skipped

    def seek(self, subscriber: str, to: Place) -> int:
        """Let a subscriber go on from another place, in one transaction and durably."""
        # Checks ``to``. The beginning is the oldest message, of whatever age.
        wall_ns = 0 if to == "beginning" else time_ns_of(to)

        def work(tx: Tx) -> int:
            if wall_ns is None:
                number = fmt.MAX_NUMBER if to == "end" else int(to)  # type: ignore[arg-type]
            else:
                # ``to`` is a time of the wall clock. The log has times of the queue's clock, which
                # nobody sets. So they are compared by age. Messages that are older than the timeout
                # would only be dropped.
                age_ns = min(time.time_ns() - wall_ns, self._room.timeout_ns)
                number = positions.beginning(tx, self._now_ns() - age_ns)
            return positions.seek(tx, subscriber.encode("utf-8"), number)

        return self._change(work)

    # Looking after the queue

    def pause(self, subscriber: str, is_paused: bool = True) -> bool:
        """Stop delivery to a subscriber, or resume it, durably; return False if nothing changed."""
        return self._change(positions.set_paused, subscriber.encode("utf-8"), is_paused)

    def delete(self, subscriber: str, number: int) -> bool:
        """Let one message leave a subscriber, durably; return False if it does not wait for it."""
        return self._change(positions.leave_one, subscriber.encode("utf-8"), number, "cleared")

    def add_subscriber(self, subscriber: str) -> bool:
        """Add a subscriber at the end of the queue, durably; return False if it is there."""
        key = subscriber.encode("utf-8")
        if not self._environment.read(positions.lacks, [key]):
            return False
        self._change(positions.add, [key])
        return True

    def remove_subscriber(self, subscriber: str) -> int:
        """Remove a subscriber, durably; return how many messages it still had to acknowledge."""
        lag = self._change(positions.remove, subscriber.encode("utf-8"))
        self._opened.delete_finished(self._now_ns())
        return lag

    def _change(self, work: Callable[..., ResultT], *args: object) -> ResultT:
        """Change something durably, and wake all consumers and senders."""
        opened = self._environment
        result = opened.write(work, *args, makes_room=True)
        for held in list(opened.held.values()):
            held.start = 0
        opened.write_state()
        opened.notifier.notify()
        return result

    def secure(self) -> None:
        """Flush what was put so far, for queues in which a put does not."""
        self._environment.write_state()

    def prune(self) -> int:
        """Drop the messages that are too old, and delete those that are finished."""
        self._check_open()
        dropped = self._room.drop_expired()
        self._opened.delete_finished(self._now_ns())
        return dropped

    def clear(self) -> int:
        """Drop all messages, durably; subscribers and numbers stay."""
        opened = self._environment
        dropped = opened.write(retention.clear, makes_room=True)
        opened.notifier.notify()
        opened.delete_finished(self._now_ns(), keeps_retained=False)
        opened.write_state()
        return sum(one.messages for one in dropped)

    def statistics(self) -> QueueStatistics:
        """Count what is in the queue, without a walk through the messages."""
        return figures.collect(self._environment, self._now_ns())

    def check(self) -> list[str]:
        """Check all invariants of the store: a walk through all messages, in short steps."""
        return check.check(self._environment.read)


# The engine, see persipubsub.engine


def directory_of(config: Config, queue_key: str) -> str:
    """
    Return the directory of a queue.

    :raise ConfigError: if it is on servers
    """
    path = config.queue_path(queue_key)
    if persipubsub.config.scheme_of(path):
        persipubsub.config.fail(config.path, [
            f"queues.{queue_key}.path: Expected a queue that is a directory of this machine, but "
            f"got: {path!r}; use the tools of its servers instead"
        ])
    return path


def ensure_queue(config: Config, queue_key: str) -> None:
    """Create a queue and its subscribers, as far as they are not there, and store its settings."""
    subscribers = list(config.queues[queue_key].subscribers)
    if any(one.dead_letter_queue == queue_key for one in config.subscribers.values()):
        # Operators look at the queue as this subscriber. It keeps messages that no other one needs.
        subscribers.append(persipubsub.config.DEAD_LETTERS)
    from_beginning = [
        subscriber.identifier for subscriber in config.subscribers.values()
        if subscriber.in_queue == queue_key
        and subscriber.start_from is persipubsub.config.StartFrom.BEGINNING
    ]
    Queue.ensure(directory_of(config, queue_key), config.queues[queue_key], subscribers,
                 from_beginning)


def open_queue(config: Config, queue_key: str) -> Queue:
    """Open a queue that was initialized."""
    return Queue(directory_of(config, queue_key), config.queues[queue_key],
                 _retries_of(config, queue_key))


def statistics_of(config: Config, queue_key: str) -> QueueStatistics:
    """Count what is in a queue. The queue does not count as in use meanwhile."""
    with environment.opened(directory_of(config, queue_key),
                            config.queues[queue_key],
                            is_read_only=True) as opened:
        return figures.collect(opened, opened.now_ns())


def _retries_of(config: Config, queue_key: str) -> Mapping[str, Retries]:
    """Take from a configuration what subscribers do with messages that fail."""
    found = {}
    for one in config.subscribers.values():
        if one.in_queue == queue_key:
            open_target = None
            if target := one.dead_letter_queue:
                # Without the retries of that queue: they may lead back to this one.
                open_target = functools.partial(Queue, directory_of(config, target),
                                                config.queues[target])
            policy = attempts.Policy(one.max_deliveries, int(one.retry_delay_secs * 1e9))
            found[one.identifier] = Retries(policy, queue_key, open_target)
    return found


def peek(config: Config, queue_key: str, subscriber: str, count: int, start: int) -> list[Peeked]:
    """Look at the next messages of a subscriber without taking them."""
    looking = importlib.import_module("persipubsub.lmdb_engine.maintenance")
    return looking.peek(  # type: ignore[no-any-return]
        directory_of(config, queue_key), config.queues[queue_key], subscriber, count, start)


def follow(config: Config, queue_key: str, last: int) -> Generator[list[Peeked], None, None]:
    """Look at the messages of a queue as they are sent, for ever."""
    looking = importlib.import_module("persipubsub.lmdb_engine.maintenance")
    return looking.follow(  # type: ignore[no-any-return]
        directory_of(config, queue_key), config.queues[queue_key], last)


def stored_settings(config: Config, queue_key: str) -> Mapping[str, tuple[object, object]]:
    """Compare the settings in the configuration with those that are stored in the queue."""
    here = config.queues[queue_key]
    with environment.opened(directory_of(config, queue_key), here, is_read_only=True) as opened:
        found = dict(meta.differences(here, opened.read(meta.read_settings)))
        stored = [one.name for one in opened.read(positions.read_all)]
    known = [name for name in stored if name != persipubsub.config.DEAD_LETTERS]
    if sorted(known) != sorted(here.subscribers):
        found["subscribers"] = (tuple(here.subscribers), tuple(known))
    return found
