"""
A queue in a directory of this machine: the engine on LMDB and a journal.

:py:class:`persipubsub.publisher.Pub`, :py:class:`persipubsub.subscriber.Sub` and
:py:mod:`persipubsub.control` work with it. A :py:class:`Queue` may be used by many threads at the same
time; many processes may have the same queue open.
"""

import contextlib
import functools
import importlib
import os
import time
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import persipubsub.config
import persipubsub.errors
import persipubsub.place
from persipubsub.lmdb_engine import attempts, check, consuming, dead_letters, environment, files
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import locks, log, pending, positions, retention, room, sending
from persipubsub.lmdb_engine.format import Tx
from persipubsub.message import Peeked
from persipubsub.place import Place
from persipubsub.statistics import InFlight, QueueStatistics, SubscriberStatistics

__all__ = ["Queue", "Retries", "ensure_queue", "open_queue", "statistics_of", "check_durability"]

if TYPE_CHECKING:
    pass

ResultT = TypeVar("ResultT")


class Retries(NamedTuple):
    """What happens to the messages that a subscriber fails to work on."""

    policy: attempts.Policy
    queue_key: str  #: of the subscriber's queue in the configuration
    #: opens the queue of dead letters; None if there is none
    open_dead_letters: "Callable[[], Queue] | None" = None


_NO_RETRIES: Final = types.MappingProxyType[str, Retries]({})


class Queue:
    """Puts messages into a queue, hands them to consumers, and looks after them."""

    def __init__(self,
                 path: str,
                 queue: persipubsub.config.Queue,
                 retries: Mapping[str, Retries] = _NO_RETRIES,
                 clock: Callable[[], int] | None = None) -> None:
        """
        Open a queue that was initialized.

        :param path: directory
        :param queue: settings in the configuration; those stored in the queue count
        :param retries: of the subscribers that have any
        :param clock: in the place of the queue's own
        :raise NotInitializedError: if it was not
        """
        self.path = path
        self._retries = retries
        self._environment = environment.acquire(path, queue)
        try:
            self._now_ns = clock if clock is not None else self._environment.now_ns
            self._claims = locks.Claims(path, self._environment.held)
            self._ending = consuming.Ending()
            self._writers: dict[str, dead_letters.DeadLetterWriter] = {}
            self._room = room.Room(self._environment, self._now_ns)
            self._sender = sending.Sender(self._environment, self._room, self._now_ns)
            self._environment.members += [self._claims, self._ending]
            self._environment.drop_logs.append(self._room.drop_log)
        except BaseException:
            environment.release(self._environment)
            raise
        # A method less for each send.
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
        is_new = environment.create(path, queue)
        opened = environment.acquire(path, queue, adopts_settings=True, renews_journal=is_new)
        try:
            keys = [subscriber.encode("utf-8") for subscriber in subscribers]
            if opened.read(positions.lacks, keys):
                timeout_secs = opened.queue.high_water_mark.msg_timeout_secs
                oldest_ns = 0 if timeout_secs is None else opened.now_ns() - int(timeout_secs * 1e9)
                opened.write(positions.add, keys, [name.encode("utf-8") for name in from_beginning],
                             oldest_ns)
                opened.secure_now()
        finally:
            environment.release(opened)

    def __enter__(self) -> "Queue":
        """Use the queue as a context manager."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the queue."""
        self.close()

    def __repr__(self) -> str:
        """Tell the directory and the state."""
        return f"<Queue {self.path!r}, {'closed' if self._ending.is_closed else 'open'}>"

    def close(self) -> None:
        """Close the queue; it may be closed twice. What was put stays; what is claimed is given back."""
        with self._ending.lock:
            if self._ending.is_closed:
                return
            self._ending.is_closed = True
            self._claims.close()
        try:
            self._room.drop_log.report()
            for writer in self._writers.values():
                writer.close()
            self._environment.members.remove(self._claims)
            self._environment.members.remove(self._ending)
            self._environment.drop_logs.remove(self._room.drop_log)
            # Those who wait here notice that it is closed.
            with contextlib.suppress(persipubsub.errors.PersipubsubError):
                self._environment.notifier.notify()
        finally:
            environment.release(self._environment)

    def _check_open(self) -> None:
        """Check that the queue was not closed."""
        if self._ending.is_closed:
            raise persipubsub.errors.ClosedError(
                f"Expected the queue {self.path} to be open, but got: it was closed")

    # Sending

    @property
    def waits_for_room(self) -> bool:
        """Tell whether publishers wait for room in a full queue."""
        return self._room.strategy is persipubsub.config.Strategy.BLOCK

    def put(self,
            messages: Sequence[bytes],
            recipients: tuple[str, ...] | None = None,
            timeout: float | None = None,
            msg_ids: Sequence[bytes | None] | None = None) -> int:
        """Add messages at the end of the queue, all of them or none; see ``Sender.put``."""
        if self._ending.is_closed:
            self._check_open()
        return self._put(messages, recipients, timeout, msg_ids)

    def put_each(self, sendings: Sequence[sending.Sending]) -> list[BaseException | None]:
        """Do what a :py:meth:`put` of each would do, in as few commits as can be; wait for no room."""
        self._check_open()
        return self._sender.put_each(sendings)

    def check_sizes(self, messages: Sequence[bytes]) -> None:
        """Check that the queue could hold messages if it were empty."""
        self._room.check_sizes(messages)

    def require_subscribers(self, subscribers: Sequence[str]) -> None:
        """Check that subscribers were initialized."""
        self._check_open()
        for subscriber in subscribers:
            self._environment.read(positions.require, subscriber.encode("utf-8"))

    # Receiving

    def consumer(self, subscriber: str, is_delivery: bool = True) -> consuming.Consumer:
        """
        Take part in the work of a subscriber.

        :param is_delivery: False to move messages, which counts as no delivery
        """
        self._check_open()
        retries = self._retries.get(subscriber)
        policy = attempts.Policy() if retries is None else retries.policy
        looks = pending.Pending(subscriber, self._room.timeout_ns, self._now_ns, policy)
        consumer = consuming.Consumer(self._environment, self._claims,
                                      self._ending, looks, self.drop_expired,
                                      self._writer(subscriber, retries), self.waits_for_room)
        consumer.counts = consumer.counts and is_delivery
        return consumer

    def _writer(self, subscriber: str, retries: Retries | None) -> dead_letters.DeadLetterWriter:
        """Choose what moves the messages of a subscriber whose deliveries are exhausted."""
        origin = dead_letters.Origin(queue="" if retries is None else retries.queue_key,
                                     subscriber=subscriber,
                                     path=self.path)
        open_target = None if retries is None else retries.open_dead_letters
        # One for all consumers of the subscriber: it remembers that a message could not be moved.
        return self._writers.setdefault(subscriber,
                                        dead_letters.DeadLetterWriter(origin, open_target))

    def front(self, subscriber: str) -> bytes | None:
        """Look at the next message of a subscriber without taking it."""
        return self.consumer(subscriber).front()

    def skip_to_newest(self, subscriber: str) -> int:
        """Acknowledge all messages of a subscriber but the newest one; return how many it were."""
        self._check_open()
        skipped = self._environment.write(positions.skip_to_newest,
                                          subscriber.encode("utf-8"),
                                          makes_room=True)
        self._notify()
        return skipped

    def seek(self, subscriber: str, to: Place) -> int:
        """Let a subscriber go on from another place, in one transaction and durably."""
        self._check_open()
        find = _chooser(to, self._room.timeout_ns, self._now_ns)

        def work(tx: Tx) -> int:
            return positions.seek(tx, subscriber.encode("utf-8"), find(tx))

        return self._change(work)

    # Looking after the queue

    def pause(self, subscriber: str, is_paused: bool = True) -> bool:
        """Let the consumers of a subscriber wait, or go on, durably; return False if it is so already."""
        self._check_open()
        return self._change(positions.set_paused, subscriber.encode("utf-8"), is_paused)

    def delete(self, subscriber: str, number: int) -> bool:
        """Let one message leave a subscriber, durably; return False if it does not wait for it."""
        self._check_open()
        return self._change(positions.acknowledge_one, subscriber.encode("utf-8"), number)

    def add_subscriber(self, subscriber: str) -> bool:
        """Add a subscriber at the end of the queue, durably; return False if it is there."""
        self._check_open()
        key = subscriber.encode("utf-8")
        if not self._environment.read(positions.lacks, [key]):
            return False
        self._change(positions.add, [key])
        return True

    def remove_subscriber(self, subscriber: str) -> int:
        """Remove a subscriber, durably; return how many messages it still had to acknowledge."""
        self._check_open()
        lag = self._change(positions.remove, subscriber.encode("utf-8"))
        self.delete_finished()
        return lag

    def _change(self, work: Callable[..., ResultT], *args: object) -> ResultT:
        """Change something durably, and let all look at the queue again."""
        result = self._environment.write(work, *args, makes_room=True)
        for held in list(self._environment.held.values()):
            held.start = 0
        self._environment.secure_now()
        self._notify()
        return result

    def _notify(self) -> None:
        """Wake publishers that wait for room, and subscribers."""
        self._environment.notifier.notify()

    def secure(self) -> None:
        """Let what was put so far survive a power failure, where putting does not do that."""
        self._check_open()
        self._environment.secure_now()

    def drop_expired(self) -> int:
        """Drop the messages that are older than the queue's timeout; return how many it were."""
        self._check_open()
        dropped = self._room.drop_expired()
        if dropped:
            self._notify()
        return dropped

    def delete_finished(self) -> int:
        """Delete all messages that all subscribers acknowledged, in many short transactions."""
        self._check_open()
        return self._room.delete_finished()

    def prune(self) -> int:
        """Drop the messages that are too old, and delete those that are finished."""
        dropped = self.drop_expired()
        self.delete_finished()
        return dropped

    def clear(self) -> int:
        """Drop all messages, durably; subscribers and numbers stay."""
        self._check_open()
        dropped = self._environment.write(retention.clear, makes_room=True)
        self._notify()
        self._room.delete_finished(keeps_retained=False)
        # The last block stays otherwise, since it keeps its numbers taken.
        self._environment.write(retention.empty_last, makes_room=True)
        self._environment.secure_now()
        return sum(one.messages for one in dropped)

    def statistics(self) -> QueueStatistics:
        """Count what is in the queue, without a walk through the messages."""
        self._check_open()
        return _collect(self._environment, self._now_ns())

    def check(self) -> list[str]:
        """Check all invariants of the store: a walk through all messages, in one snapshot."""
        self._check_open()
        return self._environment.read(check.check)


def _chooser(to: Place, timeout_ns: int, now_ns: Callable[[], int]) -> Callable[[Tx], int]:
    """
    Check a place, before anything is looked at, and return the function that finds its number.

    Times are given on the wall clock, while the log has those of the queue's clock, which nobody sets.
    They are compared by age: how long ago the time is, by the wall clock now.
    """
    wall_ns = persipubsub.place.since_ns(to)
    if to == "end":
        return lambda tx: fmt.MAX_NUMBER
    if to == "beginning":
        return lambda tx: positions.beginning(tx, now_ns() - timeout_ns)
    if wall_ns is None:
        return lambda tx: int(to)  # type: ignore[arg-type]  # it is no time

    def find(tx: Tx) -> int:
        since_ns = now_ns() - (time.time_ns() - wall_ns)
        # What is too old would only be dropped.
        return positions.beginning(tx, max(since_ns, now_ns() - timeout_ns))

    return find


# Statistics


def _collect(opened: environment.Environment, now_ns: int) -> QueueStatistics:
    """Collect the figures in one snapshot."""
    queue, mark = opened.queue, opened.queue.high_water_mark
    end, sent, count, size, age_ns, commits, subscribers = opened.read(_figures, now_ns)
    spans = {record.ordinal: (record.position, end) for record, _ in subscribers}
    claims = locks.find_claims(opened.directory, spans, opened.page)
    file_bytes = opened.file_bytes()
    age = None if age_ns is None else age_ns / 1e9
    timeout_secs = mark.msg_timeout_secs
    return QueueStatistics(
        path=opened.directory,
        messages=count,
        message_share=None if mark.max_msgs_num is None else count / mark.max_msgs_num,
        message_bytes=size,
        byte_share=None if mark.size_bytes is None else size / mark.size_bytes,
        file_bytes=file_bytes,
        file_share=file_bytes / queue.max_db_size_bytes,
        oldest_age_seconds=age,
        age_share=None if timeout_secs is None else (age or 0.0) / timeout_secs,
        next_number=end,
        commits=commits,
        subscribers=tuple(
            _subscriber(record, lag, now_ns, None if claims is None else claims[record.ordinal])
            for record, lag in subscribers),
        sent=sent,
        journal_bytes=opened.journal.bytes_on_disk(),
        journal_lag_bytes=opened.journal.lag_bytes(),
        disk_bytes=files.disk_bytes(opened.directory))


def _figures(
        tx: Tx, now_ns: int
) -> tuple[int, int, int, int, int | None, int, list[tuple[fmt.Subscriber, int]]]:
    """Count in a transaction: end, sent, waiting messages and bytes, age, commits, subscribers."""
    cursor = tx.cursor()
    log_end = log.read_end(cursor)
    oldest = log_end.next_number
    subscribers = []
    for record in positions.read_all(tx):
        lag = positions.count_pending(tx, record, 0, log_end.next_number)
        if lag:
            oldest = min(oldest, positions.first_pending(tx, record, log_end.next_number))
        subscribers.append((record, lag))
    place = log.place_of(cursor, oldest)
    found = log.seek(cursor, oldest) if oldest < log_end.next_number else None
    age_ns = None if found is None else max(0, now_ns - found.block.time_ns)
    return (log_end.next_number, log_end.total_count, log_end.total_count - place.messages,
            log_end.total_bytes - place.size, age_ns, tx.txn.id(), subscribers)


def _subscriber(record: fmt.Subscriber, lag: int, now_ns: int,
                spans: Sequence[locks.Span] | None) -> SubscriberStatistics:
    """Describe one subscriber."""
    since_ns = now_ns - record.acknowledged_ns if record.acknowledged_ns else None
    ticks_ns = files.ticks_ns()
    return SubscriberStatistics(
        subscriber=record.name,
        lag=lag,
        in_flight=None if spans is None else min(lag, sum(span.length for span in spans)),
        position=record.position,
        acknowledged=record.acknowledged,
        failed=record.failed,
        dropped_by_timeout=record.dropped_by_timeout,
        dropped_by_mark=record.dropped_by_mark,
        cleared=record.cleared,
        skipped=record.skipped,
        corrupt=record.corrupt,
        dead_lettered=record.dead_lettered,
        seconds_since_acknowledged=None if since_ns is None else max(0, since_ns) / 1e9,
        claims=tuple(
            InFlight(subscriber=record.name,
                     number=span.first,
                     count=span.length,
                     process_id=None if span.note is None else span.note.process_id,
                     seconds=None if span.note is None else max(0, ticks_ns - span.note.since_ns) /
                     1e9) for span in spans or ()),
        is_paused=bool(record.flags & fmt.FLAG_PAUSED))


# The engine, see persipubsub.engine


def directory_of(config: persipubsub.config.Config, queue_key: str) -> str:
    """
    Return the directory of a queue.

    :raise ConfigError: if it is on servers
    """
    path = config.queue_path(queue_key)
    if persipubsub.config.scheme_of(path):
        persipubsub.config.fail(config.path, [
            f"queues.{queue_key}.path: Expected a queue that is a directory of this machine, but got: "
            f"{path!r}; this is to be done with the tools of its servers"
        ])
    return path


def ensure_queue(config: persipubsub.config.Config, queue_key: str) -> None:
    """Create a queue and its subscribers, as far as they are not there, and store its settings."""
    _check_dead_letters(config, queue_key)
    subscribers = list(config.queues[queue_key].subscribers)
    if any(found.dead_letter_queue == queue_key for found in config.subscribers.values()):
        # On its behalf operators look at what is there; without it nobody might keep it.
        subscribers.append(persipubsub.config.DEAD_LETTERS)
    Queue.ensure(directory_of(config, queue_key), config.queues[queue_key], subscribers, [
        subscriber.identifier
        for subscriber in config.subscribers.values() if subscriber.in_queue == queue_key
        and subscriber.start_from is persipubsub.config.StartFrom.BEGINNING
    ])


def open_queue(config: persipubsub.config.Config, queue_key: str) -> Queue:
    """Open a queue that was initialized."""
    _check_dead_letters(config, queue_key)
    return Queue(directory_of(config, queue_key), config.queues[queue_key],
                 _retries_of(config, queue_key))


def statistics_of(config: persipubsub.config.Config, queue_key: str) -> QueueStatistics:
    """Count what is in a queue, without taking part in it: it is not in use for that."""
    with environment.opened(directory_of(config, queue_key),
                            config.queues[queue_key],
                            is_read_only=True) as opened:
        return _collect(opened, opened.now_ns())


def check_durability(config: persipubsub.config.Config, queue_key: str) -> tuple[str, ...]:
    """Look whether a queue is less durable than its configuration says: it never is."""
    del config, queue_key
    return ()


def _retries_of(config: persipubsub.config.Config, queue_key: str) -> Mapping[str, Retries]:
    """Take from a configuration what subscribers do with messages that fail."""
    found = {}
    for subscriber in config.subscribers.values():
        policy = attempts.Policy(max_deliveries=subscriber.max_deliveries,
                                 delay_ns=int(subscriber.retry_delay_secs * 1e9))
        if subscriber.in_queue == queue_key and policy != attempts.Policy():
            target = subscriber.dead_letter_queue
            # Without the retries of that queue: its subscribers may give up into this one.
            open_target = functools.partial(Queue, directory_of(config, target),
                                            config.queues[target]) if target else None
            found[subscriber.identifier] = Retries(policy, queue_key, open_target)
    return types.MappingProxyType(found)


def _check_dead_letters(config: persipubsub.config.Config, queue_key: str) -> None:
    """Check that no subscriber's messages are given up into the queue that they come from."""
    for subscriber in config.subscribers.values():
        target = subscriber.dead_letter_queue
        if target and queue_key in (subscriber.in_queue, target):
            paths = [directory_of(config, key) for key in (subscriber.in_queue, target)]
            if os.path.realpath(paths[0]) == os.path.realpath(paths[1]):
                there, here = (persipubsub.config.at(persipubsub.config.at("queues", key), "path")
                               for key in (subscriber.in_queue, target))
                persipubsub.config.fail(config.path, [
                    f"{here}: Expected another directory than that of {there}, but got: {paths[1]!r}, "
                    f"the same one ({target!r}, dead_letter_queue of {subscriber.identifier!r})"
                ])


# What operators do, see persipubsub.control


def _with(work: Callable[[Queue], ResultT], config: persipubsub.config.Config,
          queue_key: str) -> ResultT:
    """Have a queue open for something."""
    with open_queue(config, queue_key) as queue:
        return work(queue)


def seek(config: persipubsub.config.Config, queue_key: str, sub_id: str, to: Place) -> int:
    """Let a subscriber go on from another place; return the number from which on it receives."""
    return _with(lambda queue: queue.seek(sub_id, to), config, queue_key)


def pause(config: persipubsub.config.Config, queue_key: str, sub_id: str, is_paused: bool) -> bool:
    """Let the consumers of a subscriber wait, or go on; return False if that is so already."""
    return _with(lambda queue: queue.pause(sub_id, is_paused), config, queue_key)


def delete(config: persipubsub.config.Config, queue_key: str, sub_id: str, number: int) -> bool:
    """Let one message leave a subscriber; return False if there is no such message for it."""
    return _with(lambda queue: queue.delete(sub_id, number), config, queue_key)


def add_subscriber(config: persipubsub.config.Config, queue_key: str, sub_id: str) -> bool:
    """Add a subscriber at the end of a queue; return False if it is there."""
    return _with(lambda queue: queue.add_subscriber(sub_id), config, queue_key)


def remove_subscriber(config: persipubsub.config.Config, queue_key: str, sub_id: str) -> int:
    """Remove a subscriber; return how many messages it still had to acknowledge."""
    return _with(lambda queue: queue.remove_subscriber(sub_id), config, queue_key)


def peek(config: persipubsub.config.Config, queue_key: str, sub_id: str, count: int,
         start: int) -> "list[Peeked]":
    """Look at the next messages of a subscriber without taking them."""
    looking = importlib.import_module("persipubsub.lmdb_engine.maintenance")
    return looking.peek(  # type: ignore[no-any-return]
        directory_of(config, queue_key), config.queues[queue_key], sub_id, count, start)


def follow(config: persipubsub.config.Config, queue_key: str,
           last: int) -> "Generator[list[Peeked], None, None]":
    """Look at the messages of a queue as they are sent, for ever."""
    looking = importlib.import_module("persipubsub.lmdb_engine.maintenance")
    return looking.follow(  # type: ignore[no-any-return]
        directory_of(config, queue_key), config.queues[queue_key], last)


def stored_settings(config: persipubsub.config.Config,
                    queue_key: str) -> Mapping[str, tuple[object, object]]:
    """Compare the settings in the configuration with those that are stored in the queue."""
    here = config.queues[queue_key]
    with environment.opened(directory_of(config, queue_key), here, is_read_only=True) as opened:
        found = dict(environment.differences(here, opened.stored_settings()))
        stored = [record.name for record in opened.read(positions.read_all)]
    known = [name for name in stored if name != persipubsub.config.DEAD_LETTERS]
    if sorted(known) != sorted(here.subscribers):
        found["subscribers"] = (tuple(here.subscribers), tuple(known))
    return found
