"""Count what is in a queue and what happened to it."""

import dataclasses
from typing import Optional, Tuple

import lmdb

from persipubsub import _layout, _log, _positions
from persipubsub._opening import Databases

__all__ = ["QueueStatistics", "SubscriberStatistics", "collect"]


@dataclasses.dataclass(frozen=True)
class SubscriberStatistics:
    """Hold the figures of one subscriber since it was added to the queue."""

    subscriber: str  #: its id
    lag: int  #: messages that it still has to acknowledge
    position: int  #: number of the first of them
    acknowledged: int  #: messages that were received and acknowledged
    failed: int  #: deliveries that ended with an exception
    dropped_by_timeout: int  #: messages that were dropped unread since they were too old
    dropped_by_mark: int  #: messages that were dropped unread at a high-water mark
    cleared: int  #: messages that an operator cleared
    skipped: int  #: messages that ``pop_to_top`` acknowledged
    corrupt: int  #: damaged messages that were set aside
    seconds_since_acknowledged: Optional[float]  #: None: it never acknowledged


@dataclasses.dataclass(frozen=True)
class QueueStatistics:
    """Hold the figures of one queue."""

    path: str  #: directory of the queue
    messages: int  #: from the oldest one that somebody still has to acknowledge
    message_bytes: int  #: bytes of these messages
    file_bytes: int  #: size of the data file
    oldest_age_seconds: Optional[float]  #: age of the oldest waiting message; None if none waits
    next_number: int  #: of the next message
    subscribers: Tuple[SubscriberStatistics, ...]  #: ordered by id


def collect(txn: "lmdb.Transaction[memoryview]", databases: Databases, path: str, file_bytes: int,
            now_ns: int) -> QueueStatistics:
    """
    Collect the figures in one snapshot, without a walk through the messages.

    :param txn: any transaction
    :param databases: handles
    :param path: of the queue
    :param file_bytes: size of the data file
    :param now_ns: time on the queue's clock, in nanoseconds
    :return: figures
    """
    cursor = txn.cursor(db=databases.data)
    tail = _log.read_tail(cursor)
    audiences = _log.read_audiences(txn, databases)
    subscribers = []
    oldest = tail.next_number
    for key, record in _positions.read_all(txn, databases):
        own = _positions.audiences_of(audiences, key)
        lag = _positions.count_pending(txn, databases, record, own, 0, tail.next_number)
        if lag:
            oldest = min(oldest,
                         _positions.first_pending(txn, databases, record, own, tail.next_number))
        subscribers.append(_subscriber_statistics(key.decode("utf-8"), record, lag, now_ns))
    place = _log.place_of(cursor, oldest)
    found = _log.seek(cursor, oldest) if oldest < tail.next_number else None
    return QueueStatistics(
        path=path,
        messages=tail.total_count - place.messages,
        message_bytes=tail.total_bytes - place.size,
        file_bytes=file_bytes,
        oldest_age_seconds=None if found is None else max(0, now_ns - found.block.time_ns) / 1e9,
        next_number=tail.next_number,
        subscribers=tuple(subscribers))


def _subscriber_statistics(identifier: str, record: _layout.Subscriber, lag: int,
                           now_ns: int) -> SubscriberStatistics:
    """
    Describe one subscriber.

    :param identifier: its id
    :param record: as stored
    :param lag: messages that it still has to acknowledge
    :param now_ns: time on the queue's clock, in nanoseconds
    :return: its figures
    """
    return SubscriberStatistics(
        subscriber=identifier,
        lag=lag,
        position=record.position,
        acknowledged=record.acknowledged,
        failed=record.failed,
        dropped_by_timeout=record.dropped_by_timeout,
        dropped_by_mark=record.dropped_by_mark,
        cleared=record.cleared,
        skipped=record.skipped,
        corrupt=record.corrupt,
        seconds_since_acknowledged=(None if not record.acknowledged_ns else
                                    max(0, now_ns - record.acknowledged_ns) / 1e9))
