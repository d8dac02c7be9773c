"""
Count what is in a queue and what happened to it.

The figures are structs, as those of :py:mod:`persipubsub.config` are: nothing of them can be
changed, and ``msgspec.to_builtins`` makes dictionaries of them.
"""

import os
from collections.abc import Sequence

import lmdb
import msgspec
import msgspec.structs

import persipubsub.config
from persipubsub import _in_flight, _settings
from persipubsub.environment import _environment, _files, _registry
from persipubsub.store import _clock, _layout, _log, _positions
from persipubsub.store._databases import Databases

__all__ = ["InFlight", "QueueStatistics", "SubscriberStatistics", "collect", "statistics_of"]


class InFlight(msgspec.Struct, frozen=True):
    """
    Hold messages that one consumer is working on: it claimed them together.

    The kernel says that they are claimed. The rest is what the consumer noted, and unknown if its
    note was written over.
    """

    subscriber: str  #: its id
    number: int  #: of the first message
    count: int  #: numbers that are claimed, from the first one on
    process_id: int | None  #: of the consumer; None if it is not known
    seconds: float | None  #: since they were claimed; None if it is not known


class SubscriberStatistics(msgspec.Struct, frozen=True):
    """Hold the figures of one subscriber since it was added to the queue."""

    subscriber: str  #: its id
    lag: int  #: messages that it still has to acknowledge
    #: of these, how many its consumers are working on right now, at most: they claimed them, and
    #: did not acknowledge them yet; None if the system does not tell
    in_flight: int | None
    position: int  #: number of the first message that it still has to acknowledge
    acknowledged: int  #: messages that were received and acknowledged
    #: deliveries that ended with an exception, and so were or will be made again; those whose
    #: consumer was killed are not counted, as nobody is left to do it
    failed: int
    dropped_by_timeout: int  #: messages that were dropped unread since they were too old
    dropped_by_mark: int  #: messages that were dropped unread at a high-water mark
    cleared: int  #: messages that an operator cleared
    #: messages that ``pop_to_top`` and ``receive_to_top`` acknowledged, or ``seek`` passed unread
    skipped: int
    corrupt: int  #: damaged messages that were set aside
    dead_lettered: int  #: messages that were given up after ``max_deliveries``
    seconds_since_acknowledged: float | None  #: None: it never acknowledged
    #: what is in flight, where and since when; ordered by number
    claims: tuple[InFlight, ...] = ()


class QueueStatistics(msgspec.Struct, frozen=True):
    """Hold the figures of one queue."""

    path: str  #: directory of the queue
    messages: int  #: from the oldest one that somebody still has to acknowledge
    message_share: float  #: of ``MAX_MSGS_NUM``; 1.0 is the mark
    message_bytes: int  #: bytes of these messages
    byte_share: float  #: of ``HWM_LMDB_SIZE_BYTES``; 1.0 is the mark
    file_bytes: int  #: size of the data file
    file_share: float  #: of ``max_db_size_bytes``
    oldest_age_seconds: float | None  #: age of the oldest waiting message; None if none waits
    age_share: float  #: of ``MSG_TIMEOUT_SECS``; 0.0 if none waits
    next_number: int  #: of the next message; one less were sent, but for gaps
    #: write transactions: sends, acknowledgements and the rest, since the store was created,
    #: compacted or restored
    commits: int
    subscribers: tuple[SubscriberStatistics, ...]  #: ordered by id


def collect(environment: _environment.Environment, settings: _settings.Settings,
            now_ns: int) -> QueueStatistics:
    """
    Collect the figures in one snapshot, without a walk through the messages.

    It takes time with the number of subscribers, and holds up nobody. What is in flight is counted
    right behind the snapshot.

    :param environment: of the queue
    :param settings: of the queue
    :param now_ns: time on the queue's clock, in nanoseconds
    :return: figures
    """
    collector = _Collector(settings, environment.file_bytes(), now_ns)
    statistics = environment.read(collector.collect)
    claims = _in_flight.find(
        os.path.join(settings.path, _files.CLAIMS), {
            ordinal: (figures.position, statistics.next_number)
            for ordinal, figures in zip(collector.ordinals, statistics.subscribers)
        }, _in_flight.Board(os.path.join(settings.path, _files.BOARD), is_look=True))
    if claims is None:
        return statistics
    return msgspec.structs.replace(
        statistics,
        subscribers=tuple(
            _with_claims(figures, claims[ordinal])
            for ordinal, figures in zip(collector.ordinals, statistics.subscribers)))


def statistics_of(config: persipubsub.config.Config, queue_key: str) -> QueueStatistics:
    """
    Count what is in a queue, without taking part in it: it is not in use for that.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: figures of the queue and of its subscribers
    :raise NotInitializedError: if there is no queue yet
    """
    settings = _settings.Settings.of(config, queue_key)
    with _registry.opened(settings.path, settings.options(), is_look=True) as environment:
        return collect(environment, settings, environment.now_ns())


def _with_claims(figures: SubscriberStatistics,
                 spans: Sequence[_in_flight.Span]) -> SubscriberStatistics:
    """
    Add what is in flight.

    :param figures: of a subscriber
    :param spans: that its consumers claimed
    :return: figures
    """
    if not spans:
        return msgspec.structs.replace(figures, in_flight=0)
    now_ns = _clock.ticks_ns()
    return msgspec.structs.replace(
        figures,
        in_flight=min(figures.lag, sum(span.length for span in spans)),
        claims=tuple(
            InFlight(subscriber=figures.subscriber,
                     number=span.first,
                     count=span.length,
                     process_id=None if span.note is None else span.note.process_id,
                     seconds=None if span.note is None else max(0, now_ns - span.note.since_ns) /
                     1e9) for span in spans))


class _Collector:
    """Collect figures inside of a transaction."""

    def __init__(self, settings: _settings.Settings, file_bytes: int, now_ns: int) -> None:
        """
        Initialize without figures.

        :param settings: of the queue
        :param file_bytes: size of the data file
        :param now_ns: time on the queue's clock, in nanoseconds
        """
        self._settings = settings
        self._file_bytes = file_bytes
        self._now_ns = now_ns
        self.ordinals: list[int] = []

    def collect(self, txn: "lmdb.Transaction[memoryview]", databases: Databases) -> QueueStatistics:
        """
        Collect all figures but those in flight.

        :param txn: any transaction
        :param databases: handles
        :return: figures
        """
        cursor = txn.cursor(db=databases.data)
        tail = _log.read_tail(cursor)
        audiences = _log.read_audiences(txn, databases)
        subscribers = []
        self.ordinals.clear()
        oldest = tail.next_number
        for key, record in _positions.read_all(txn, databases):
            own = _positions.audiences_of(audiences, key)
            lag = _positions.count_pending(txn, databases, record, own, 0, tail.next_number)
            if lag:
                first = _positions.first_pending(txn, databases, record, own, tail.next_number)
                oldest = min(oldest, first)
            self.ordinals.append(record.ordinal)
            subscribers.append(self._subscriber(key.decode("utf-8"), record, lag))
        place = _log.place_of(cursor, oldest)
        found = _log.seek(cursor, oldest) if oldest < tail.next_number else None
        messages, size = tail.total_count - place.messages, tail.total_bytes - place.size
        age = None if found is None else max(0, self._now_ns - found.block.time_ns) / 1e9
        settings = self._settings
        return QueueStatistics(path=settings.path,
                               messages=messages,
                               message_share=messages / settings.max_messages,
                               message_bytes=size,
                               byte_share=size / settings.max_message_bytes,
                               file_bytes=self._file_bytes,
                               file_share=self._file_bytes / settings.max_bytes,
                               oldest_age_seconds=age,
                               age_share=(age or 0.0) * 1e9 / settings.timeout_ns,
                               next_number=tail.next_number,
                               commits=txn.id(),
                               subscribers=tuple(subscribers))

    def _subscriber(self, identifier: str, record: _layout.Subscriber,
                    lag: int) -> SubscriberStatistics:
        """
        Describe one subscriber.

        :param identifier: its id
        :param record: as stored
        :param lag: messages that it still has to acknowledge
        :return: its figures
        """
        since_ns = self._now_ns - record.acknowledged_ns if record.acknowledged_ns else None
        return SubscriberStatistics(
            subscriber=identifier,
            lag=lag,
            in_flight=None,
            position=record.position,
            acknowledged=record.acknowledged,
            failed=record.failed,
            dropped_by_timeout=record.dropped_by_timeout,
            dropped_by_mark=record.dropped_by_mark,
            cleared=record.cleared,
            skipped=record.skipped,
            corrupt=record.corrupt,
            dead_lettered=record.dead_lettered,
            seconds_since_acknowledged=None if since_ns is None else max(0, since_ns) / 1e9)
