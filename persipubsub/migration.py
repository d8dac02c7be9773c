"""
Move what waits in a queue on this machine to another engine, while both are in use.

For each subscriber, messages are taken as one more of its consumers would, put into the other queue
for this subscriber alone, and then acknowledged. A message is never in neither of the two; a kill
in between leaves it in both, and the next run puts it again under the same id, which the other
engine knows. One copy for all subscribers was rejected: whoever acknowledged it before the kill
would get it twice, or an id for each set of subscribers would not be recognized.
"""

import contextlib
import os
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec.structs

import persipubsub.config
import persipubsub.engine
import persipubsub.errors
import persipubsub.queue
from persipubsub.config import Config, HighWaterMark
from persipubsub.lmdb_engine import consuming
from persipubsub.statistics import Progress

#: Messages that are moved at once, at most.
_BATCH_MESSAGES: Final = 200

#: What another engine takes for a message beside its bytes, at most: subject, headers and frame.
_FRAME_BYTES: Final = 512

#: After so many seconds without a message that could be moved, we give up.
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
    :raise ConfigError: if the queue is on servers, or the target is not
    """
    persipubsub.queue.directory_of(config, queue_key)
    if persipubsub.config.scheme_of(target) != "nats":
        raise persipubsub.errors.ConfigError(
            f"Expected the other queue as nats://..., but got: {target!r}")
    moved = _describe(config, queue_key, target)
    engine = persipubsub.engine.of(moved, queue_key)
    described = moved.queues[queue_key]
    counts = {}
    with persipubsub.queue.open_queue(config, queue_key) as source:
        lags = _lags(source)
        engine.ensure_queue(moved, queue_key)
        progress.begin("messages", total=sum(lags.values()))
        with contextlib.closing(engine.open_queue(moved, queue_key)) as destination:
            for subscriber in lags:
                counts[subscriber] = 0
                # One that was added by hand is in no configuration: nobody could receive there.
                if subscriber in described.subscribers:
                    counts[subscriber] = _move(source, destination, subscriber,
                                               described.high_water_mark, progress)
        lags = _lags(source)
    return types.MappingProxyType({
        subscriber: Moved(moved=count, left=lags.get(subscriber, 0))
        for subscriber, count in counts.items()
    })


def _describe(config: Config, queue_key: str, target: str) -> Config:
    """
    Describe the queue where it is to be.

    There is a publisher for each subscriber alone, beside those of the file. Nothing is dropped at
    the mark: moving is no reason to lose messages. To look for room before each part was rejected:
    others may take it in between, and the strategy of the file would then drop messages for those
    that are moved.
    """
    queue = config.queues[queue_key]
    mark = msgspec.structs.replace(queue.high_water_mark,
                                   strategy=persipubsub.config.Strategy.BLOCK)
    queue = msgspec.structs.replace(queue, path=target, high_water_mark=mark)
    publishers = dict(config.publishers)
    for one in queue.subscribers:
        name = persipubsub.config.MADE_UP + one
        publishers[name] = persipubsub.config.Publisher(name, queue_key, (one, ))
    return msgspec.structs.replace(config,
                                   queues={
                                       **config.queues, queue_key: queue
                                   },
                                   publishers=publishers)


def _lags(queue: persipubsub.queue.Queue) -> dict[str, int]:
    """Count the messages that subscribers still have to acknowledge."""
    return {one.subscriber: one.lag for one in queue.statistics().subscribers}


def _move(source: persipubsub.queue.Queue, destination: persipubsub.engine.Queue, subscriber: str,
          mark: HighWaterMark, progress: Progress) -> int:
    """Move the messages of a subscriber, in order; return how many it were."""
    # Killed or refused, it would use up what max_deliveries allows, and the next move would give up
    # what nobody has seen.
    consumer = source.consumer(subscriber, is_delivery=False)
    most = max(1, min(_BATCH_MESSAGES, (mark.max_msgs_num or 2**48) // 4))
    moved = 0
    deadline = time.monotonic() + _PATIENCE_SECS
    while True:
        lease = consumer.take(timeout=_PAUSE_SECS, max_messages=most)
        if lease is None:
            if not _lags(source).get(subscriber) or time.monotonic() >= deadline:
                return moved
            continue
        try:
            for part in _cut(lease, (mark.size_bytes or 2**46) // 4):
                _put(destination, subscriber, lease.messages[part],
                     _ids(source.path, subscriber, lease)[part])
        except BaseException:
            # Without the error: it is none of a consumer.
            lease.nack()
            raise
        lease.ack()
        moved += len(lease.messages)
        progress.done += len(lease.messages)
        deadline = time.monotonic() + _PATIENCE_SECS


def _ids(path: str, subscriber: str, lease: consuming.Lease) -> list[bytes]:
    """
    Make the ids of messages at the other engine.

    With the time: the same number in a queue that was dropped and created again, which the other
    engine may still know, is that of another message.
    """
    return [
        os.fsencode(f"{os.path.realpath(path)}\0{subscriber}\0{number}\0{time_ns}")
        for number, time_ns in zip(lease.numbers, lease.times_ns())
    ]


def _put(destination: persipubsub.engine.Queue, subscriber: str, messages: Sequence[bytes],
         ids: Sequence[bytes]) -> None:
    """Put messages where they are to be, as soon as there is room."""
    try:
        destination.put(messages, (subscriber, ), timeout=_PATIENCE_SECS, msg_ids=ids)
    except persipubsub.errors.QueueFullError as error:
        raise persipubsub.errors.QueueFullError(
            f"{error}; start its subscribers there, or raise its high-water mark, and repeat"
        ) from error


def _cut(lease: consuming.Lease, size: int) -> Iterator[slice]:
    """Cut messages into parts of so many bytes with frames; a larger message is one of its own."""
    begin = total = 0
    for index, message in enumerate(lease.messages):
        taken = len(message) + _FRAME_BYTES
        if total and total + taken > size:
            yield slice(begin, index)
            begin, total = index, 0
        total += taken
    yield slice(begin, None)
