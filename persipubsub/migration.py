"""
Move what waits in a queue on this machine to another engine, while both are in use.

For each subscriber, messages are taken as one more of its consumers would, put into the other queue
for this subscriber alone, and then acknowledged. A message is always in one of the two; a kill
in between leaves it in both, and the next run puts it again under the same id, which the other
engine knows.

Rejected: one copy for all subscribers. After a kill some subscribers have the message. A copy for
all would reach these twice. A copy for the rest has another id, so the engine would store it again.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import msgspec.structs

from persipubsub import engine
from persipubsub.config import MADE_UP, Config, HighWaterMark, Publisher, Strategy, scheme_of
from persipubsub.errors import ConfigError, QueueFullError
from persipubsub.jetstream import settings
from persipubsub.lmdb_engine.consuming import Lease
from persipubsub.queue import Queue, open_queue
from persipubsub.statistics import Progress

#: Messages that are moved at once, at most.
_BATCH_MESSAGES: Final = 200

#: Longest wait for a message that can be moved, and for room in the other queue, in seconds.
_PATIENCE_SECS: Final = 30.0

_PAUSE_SECS: Final = 0.2


class Moved(NamedTuple):
    """
    Hold what became of the messages of one subscriber.

    >>> Moved(moved=3, left=0).left
    0
    """

    moved: int  #: messages that are in the other queue now, and were acknowledged here
    left: int  #: messages that are still here: others are receiving them, or sent them meanwhile


def migrate(config: Config, queue_key: str, target: str, progress: Progress) -> Mapping[str, Moved]:
    """
    Move all waiting messages, subscriber by subscriber. It may be repeated.

    :param config: that describes the queue where it is
    :param queue_key: of the queue in ``queues``
    :param target: path of the queue where it is to be
    :param progress: to be counted up
    :return: what became of the messages, by subscriber
    :raise ConfigError: if the target is not nats://...
    """
    moved = _describe(config, queue_key, target)
    described = moved.queues[queue_key]
    other = engine.of(moved, queue_key)
    with open_queue(config, queue_key) as source:
        lags = _lags(source)
        counts = dict.fromkeys(lags, 0)
        other.ensure_queue(moved, queue_key)
        progress.begin("messages", total=sum(lags.values()))
        with contextlib.closing(other.open_queue(moved, queue_key)) as destination:
            for subscriber in lags:
                # One that was added by hand is in no configuration: nobody could receive there.
                if subscriber in described.subscribers:
                    for count in _move(source, destination, subscriber, described.high_water_mark):
                        counts[subscriber] += count
                        progress.done += count
        left = _lags(source)
    return {name: Moved(moved=count, left=left.get(name, 0)) for name, count in counts.items()}


def _describe(config: Config, queue_key: str, target: str) -> Config:
    """
    Describe the queue at its new place.

    It has a publisher for each subscriber alone, beside those of the file, and drops nothing at the
    mark: moving is no reason to lose messages.
    """
    if scheme_of(target) != "nats":
        raise ConfigError(f"Expected the other queue as nats://..., but got: {target!r}")
    here = config.queues[queue_key]
    # Rejected: looking for room before each part. Others may take it in between, and the
    # strategy of the file would then drop messages for those that are moved.
    mark = msgspec.structs.replace(here.high_water_mark, strategy=Strategy.BLOCK)
    there = msgspec.structs.replace(here, path=target, high_water_mark=mark)
    publishers = dict(config.publishers)
    for one in here.subscribers:
        name = MADE_UP + one
        publishers[name] = Publisher(name, queue_key, (one, ))
    queues = {**config.queues, queue_key: there}
    return msgspec.structs.replace(config, queues=queues, publishers=publishers)


def _lags(queue: Queue) -> dict[str, int]:
    """Count the messages that subscribers still have to acknowledge, by subscriber."""
    return {one.subscriber: one.lag for one in queue.statistics().subscribers}


def _move(source: Queue, destination: engine.Queue, subscriber: str,
          mark: HighWaterMark) -> Iterator[int]:
    """Move the messages of a subscriber, in order, and yield the sizes of the parts."""
    # Moves that are killed or refused must not count as deliveries: messages would be given up that
    # no consumer has seen.
    consumer = source.consumer(subscriber, is_delivery=False)
    most = max(1, min(_BATCH_MESSAGES, (mark.max_msgs_num or 2**48) // 4))
    deadline = time.monotonic() + _PATIENCE_SECS
    # Until the deadline, which moves on with each part that was moved.
    while True:
        lease = consumer.take(timeout=_PAUSE_SECS, max_messages=most)
        if lease is not None:
            # After an error, closing the queue gives it back.
            _put(destination, subscriber, lease, os.path.realpath(source.path), mark)
            lease.ack()
            yield len(lease.messages)
            deadline = time.monotonic() + _PATIENCE_SECS
        elif not _lags(source).get(subscriber) or time.monotonic() >= deadline:
            return


def _put(destination: engine.Queue, subscriber: str, lease: Lease, origin: str,
         mark: HighWaterMark) -> None:
    """Put messages into the other queue as there is room, in parts that leave room for others."""
    # With the time: if the queue was dropped and created again, a number is used for another
    # message, while the other engine may still know the id of the first one.
    ids = [
        os.fsencode(f"{origin}\0{subscriber}\0{number}\0{time_ns}")
        for number, time_ns in zip(lease.numbers, lease.copied.times_ns)
    ]
    largest = max(map(len, lease.messages)) + settings.FRAME_BYTES
    count = max(1, (mark.size_bytes or 2**46) // 4 // largest)
    for begin in range(0, len(ids), count):
        part = slice(begin, begin + count)
        try:
            destination.put(lease.messages[part], (subscriber, ),
                            timeout=_PATIENCE_SECS,
                            msg_ids=ids[part])
        except QueueFullError as error:
            raise QueueFullError(
                f"{error}; start its subscribers there, or raise its high-water mark, and repeat"
            ) from error
