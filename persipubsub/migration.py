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
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec.structs

import persipubsub.config
import persipubsub.engine
import persipubsub.errors
import persipubsub.queue
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


def prepare(config: persipubsub.config.Config, queue_key: str,
            target: str) -> persipubsub.config.Config:
    """
    Describe the queue where it is to be.

    :param config: that describes it where it is
    :param queue_key: of the queue in ``queues``
    :param target: path of the queue where it is to be
    :return: configuration; it has a publisher for each subscriber alone, beside those of the file,
        and drops nothing at the mark: moving is no reason to lose messages
    :raise ConfigError: if the target is none
    """
    persipubsub.queue.directory_of(config, queue_key)
    # To look for room before each part was rejected: others may take it in between, and the
    # strategy of the file would then drop messages for those that are moved.
    mark = msgspec.structs.replace(config.queues[queue_key].high_water_mark,
                                   strategy=persipubsub.config.Strategy.BLOCK)
    queue = msgspec.structs.replace(config.queues[queue_key], path=target, high_water_mark=mark)
    alone = {
        name: persipubsub.config.Publisher(name, queue_key, (subscriber, ))
        for subscriber in queue.subscribers
        for name in (persipubsub.config.MADE_UP + subscriber, )
    }
    moved = msgspec.structs.replace(config,
                                    queues=types.MappingProxyType({
                                        **config.queues, queue_key: queue
                                    }),
                                    publishers=types.MappingProxyType({
                                        **config.publishers,
                                        **alone
                                    }))
    if not persipubsub.config.scheme_of(target):
        raise persipubsub.errors.ConfigError(
            f"Expected the other queue as nats://..., but got: {target!r}")
    persipubsub.engine.of(moved, queue_key)
    return moved


def migrate(config: persipubsub.config.Config, queue_key: str, target: str,
            progress: Progress) -> Mapping[str, Moved]:
    """
    Move all waiting messages, subscriber by subscriber. It may be repeated.

    :param config: that describes the queue where it is
    :param queue_key: of the queue in ``queues``
    :param target: path of the queue where it is to be
    :param progress: to be counted up
    :return: what became of the messages, by subscriber
    """
    moved = prepare(config, queue_key, target)
    engine = persipubsub.engine.of(moved, queue_key)
    queue = moved.queues[queue_key]
    with persipubsub.queue.open_queue(config, queue_key) as source:
        lags = _lags(source)
        engine.ensure_queue(moved, queue_key)
        progress.begin("messages", total=sum(lags.values()))
        with contextlib.closing(engine.open_queue(moved, queue_key)) as destination:
            counts = {
                # One that was added by hand is in no configuration: nobody could receive there.
                subscriber: _move(source, destination, subscriber, queue.high_water_mark, progress)
                if subscriber in queue.subscribers else 0
                for subscriber in lags
            }
        lags = _lags(source)
    return types.MappingProxyType({
        subscriber: Moved(moved=count, left=lags.get(subscriber, 0))
        for subscriber, count in counts.items()
    })


def _lags(queue: persipubsub.queue.Queue) -> dict[str, int]:
    """
    Count the messages that subscribers still have to acknowledge.

    :param queue: where they wait
    :return: by id of the subscriber
    """
    return {one.subscriber: one.lag for one in queue.statistics().subscribers}


def _move(source: persipubsub.queue.Queue, destination: persipubsub.engine.Queue, subscriber: str,
          mark: persipubsub.config.HighWaterMark, progress: Progress) -> int:
    """
    Move the messages of a subscriber, in order.

    :param source: where they wait
    :param destination: where they are to be
    :param subscriber: its id
    :param mark: of the destination
    :param progress: to be counted up
    :return: how many were moved
    """
    # Killed or refused, it would use up what max_deliveries allows, and the next move would give up
    # what nobody has seen.
    consumer = source.consumer(subscriber, is_delivery=False)
    most = max(1, min(_BATCH_MESSAGES, (mark.max_msgs_num or 2**48) // 4))
    origin = os.path.realpath(source.path)
    moved = 0
    deadline = time.monotonic() + _PATIENCE_SECS
    while True:
        lease = consumer.take(timeout=_PAUSE_SECS, max_messages=most)
        if lease is None:
            if not _lags(source).get(subscriber) or time.monotonic() >= deadline:
                return moved
            continue
        try:
            # With the time: the same number in a queue that was dropped and created again, which the
            # other engine may still know, is that of another message.
            ids = [
                os.fsencode(f"{origin}\0{subscriber}\0{number}\0{time_ns}")
                for number, time_ns in zip(lease.numbers, lease.times_ns())
            ]
            begin = 0
            for end in _cut(lease.messages, (mark.size_bytes or 2**46) // 4):
                destination.put(lease.messages[begin:end], (subscriber, ),
                                timeout=_PATIENCE_SECS,
                                msg_ids=ids[begin:end])
                begin = end
        except BaseException as error:
            # Without the error: it is none of a consumer.
            lease.nack()
            if isinstance(error, persipubsub.errors.QueueFullError):
                raise persipubsub.errors.QueueFullError(
                    f"{error}; start its subscribers there, or raise its high-water mark, and repeat"
                ) from error
            raise
        lease.ack()
        moved += len(lease.messages)
        progress.done += len(lease.messages)
        deadline = time.monotonic() + _PATIENCE_SECS


def _cut(messages: Sequence[bytes], size: int) -> list[int]:
    """
    Cut messages into parts that are not too large.

    :param messages: to be cut
    :param size: of a part with its frames, in bytes; a larger message is a part of its own
    :return: index behind the last message of each part
    """
    ends = []
    total = 0
    for index, message in enumerate(messages):
        taken = len(message) + _FRAME_BYTES
        if total and total + taken > size:
            ends.append(index)
            total = 0
        total += taken
    ends.append(len(messages))
    return ends
