"""
Apply a configuration file to its queues, and look after them.

These functions are called by deployment scripts and by people on call, also while publishers and
subscribers are running. Those that need a queue for themselves say so: they raise
:py:class:`persipubsub.errors.QueueInUseError` while any process has it open.

The command ``persipubsub`` is a thin face of this module.
"""

import datetime
import operator
import os
import types
from collections.abc import Generator, Mapping, Sequence
from typing import Union

import icontract

import persipubsub.config
import persipubsub.engine
import persipubsub.queue
from persipubsub import _migration, _selection
from persipubsub._counting import in_flight, statistics
from persipubsub._migration import Moved
from persipubsub._progress import Progress
from persipubsub.maintenance import _alone, _dead_letters, _looking, _upkeep
from persipubsub.maintenance._alone import Sizes
from persipubsub.maintenance._dead_letters import ListedDeadLetter
from persipubsub.maintenance._looking import Message

__all__ = [
    "initialize_all_dbs", "prune_dangling_messages", "clear_all_subs", "statistics", "seek",
    "verify", "compact", "backup", "restore", "add_subscriber", "remove_subscriber", "drop_queue",
    "peek", "follow", "in_flight", "dead_letters", "send_back", "drop_dead_letters", "migrate",
    "check_durability", "ListedDeadLetter", "Message", "Moved", "Progress", "Sizes"
]

ConfigPath = _selection.ConfigPath


def initialize_all_dbs(config_pth: ConfigPath, queue_key: str | None = None) -> None:
    """
    Create the queues of a configuration file and add their subscribers.

    It may be repeated at any time: what is there stays as it is, new subscribers are added and get
    what is published from then on; with ``start_from`` ``"beginning"``, also what is still stored
    and addressed to them. All of it is durable when the call returns; queues that were
    made ready before an error stay ready.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :raise ConfigError: if the file is wrong
    :raise QueueInUseError:
        if the file gives a queue another durability, and another process has the queue open
    :raise FormatError: if the directory of a queue holds something else
    :raise AccessError: if a directory may not be created or written to
    """
    config, keys = _selection.select(config_pth, queue_key)
    for key in keys:
        persipubsub.engine.of(config, key).ensure_queue(config, key)


def prune_dangling_messages(config_pth: ConfigPath,
                            queue_key: str | None = None) -> Mapping[str, int]:
    """
    Drop the messages of queues that are too old, and delete those that everybody acknowledged.

    It is done in many short transactions, so that publishers are not held up.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :return: how many deliveries were dropped, by queue
    :raise ConfigError: if the file is wrong
    :raise NotInitializedError: if a queue was not initialized
    """
    return _selection.for_each(config_pth, queue_key, lambda queue: queue.prune())


def clear_all_subs(config_pth: ConfigPath, queue_key: str | None = None) -> Mapping[str, int]:
    """
    Drop all messages of queues; their subscribers stay.

    The messages of a queue leave in one transaction. A message that is being received is
    acknowledged into the void.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :return: how many deliveries were dropped, by queue
    :raise ConfigError: if the file is wrong
    :raise NotInitializedError: if a queue was not initialized
    """
    return _selection.for_each(config_pth, queue_key, lambda queue: queue.clear())


# Looking


@icontract.require(lambda count: count >= 1)
@icontract.require(lambda start: start >= 0)
@icontract.ensure(lambda result, count: len(result) <= count)
def peek(config_pth: ConfigPath,
         sub_id: str,
         count: int = 1,
         start: int = 0,
         queue_key: str | None = None) -> tuple[Message, ...]:
    """
    Look at the next messages of a subscriber without taking them.

    :param config_pth: path to the configuration file
    :param sub_id: id of the subscriber
    :param count: how many messages at most
    :param start: number from which on to look; those in front of its position are done
    :param queue_key: key in ``queues``; that of the subscriber's entry if not given
    :return: messages that it did not acknowledge yet, also those that are just being received
    :raise ConfigError:
        if the file is wrong, has no such subscriber or queue, or nobody may have that id
    :raise NotInitializedError: if the queue or the subscriber was not initialized
    """
    queue_key = _queue_of(config_pth, sub_id, queue_key)
    count, start = operator.index(count), operator.index(start)
    settings = _selection.one(config_pth, queue_key)
    return tuple(_looking.peek(settings, sub_id, count=count, start=start))


def _queue_of(config_pth: ConfigPath, sub_id: str, queue_key: str | None) -> str:
    """
    Find the queue of a subscriber.

    :param config_pth: path to the configuration file
    :param sub_id: id of the subscriber
    :param queue_key: that was given; None for that of the subscriber's entry
    :return: key in ``queues``
    """
    _selection.check_subscriber(config_pth, sub_id)
    if queue_key is not None:
        return queue_key
    return persipubsub.config.read(config_pth).subscriber(sub_id).in_queue


@icontract.require(lambda last: last >= 0)
def follow(config_pth: ConfigPath,
           queue_key: str,
           last: int = 0) -> Generator[list[Message], None, None]:
    """
    Look at the messages of a queue as they are sent, for ever; a look, and not a subscriber.

    Messages that all their subscribers acknowledged may be deleted before they were seen: their
    numbers are left out. The queue is in use until the iterator is closed.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param last: how many of the newest messages that are there to begin with
    :return: iterator over messages, several at a time; an empty list at least once a second
    :raise ConfigError: if the file is wrong, or has no such queue
    """
    return _looking.follow(_selection.one(config_pth, queue_key), last=operator.index(last))


def seek(config_pth: ConfigPath,
         sub_id: str,
         to: str | int | float | datetime.datetime,
         queue_key: str | None = None) -> int:
    """
    Let a subscriber go on from another place of the queue: back, to receive again, or forward.

    It is done in one transaction, and durable when the call returns. Whatever the subscriber has
    acknowledged from that place on is delivered again, as far as it is still stored (see
    ``retain_secs``); what it passes unread counts as skipped. It may be called while everybody is
    at work: a message that is being received is not given to a second one meanwhile.

    A time means a message's age by the wall clock now. If that was set since the message was sent,
    the place is off by as much. Messages that are older than the queue's timeout are passed over.

    :param config_pth: path to the configuration file
    :param sub_id: id of the subscriber
    :param to:
        ``"beginning"``: the oldest message that is stored; ``"end"``: behind the newest one; an
        ``int``: the message of that number, or the next one that is stored; a ``float`` (seconds
        since 1970) or a ``datetime`` with a time zone: the first message that was sent then or
        later
    :param queue_key: key in ``queues``; that of the subscriber's entry if not given
    :return: new position: the number of the message from which it goes on
    :raise ConfigError:
        if the file is wrong, has no such subscriber or queue, or nobody may have that id
    :raise NotInitializedError: if the queue or the subscriber was not initialized
    :raise TypeError: if the place is of another type
    :raise ValueError: if it is another text, or a time without a time zone
    """
    queue_key = _queue_of(config_pth, sub_id, queue_key)
    with persipubsub.queue.Queue(_selection.one(config_pth, queue_key)) as queue:
        return queue.seek(sub_id, to)


# Messages that were given up


def dead_letters(config_pth: ConfigPath,
                 queue_key: str | None = None) -> Mapping[str, tuple[ListedDeadLetter, ...]]:
    """
    Look at messages that were given up, without taking them.

    All of them are read into the memory.

    :param config_pth: path to the configuration file
    :param queue_key: key of a queue of dead letters; all of them if not given
    :return: those that were neither sent back nor dropped, in order, by queue
    :raise ConfigError: if the file is wrong, has no such queue, or it is no directory
    :raise NotInitializedError: if a queue was not initialized, or as one for something else
    """
    config, keys = _selection.select(config_pth, queue_key)
    if queue_key is None:
        keys = _dead_letters.queues_of(config)
    return types.MappingProxyType({key: tuple(_dead_letters.look(config, key)) for key in keys})


def send_back(config_pth: ConfigPath,
              queue_key: str,
              numbers: Sequence[int] | None = None) -> tuple[int, ...]:
    """
    Send messages that were given up to the subscriber that failed to work on them, as new ones.

    No other subscriber gets them. Each is durable in its queue before it leaves the queue of dead
    letters; when the process is killed in between and the call repeated, it is sent once.

    :param config_pth: path to the configuration file
    :param queue_key: key of the queue of dead letters
    :param numbers: in that queue; all that are there now if not given
    :return: numbers of those that were sent back; one that is not there or in use is left out
    :raise ConfigError:
        if the file is wrong, or lacks that queue, or the one of a letter, or one is no directory
    :raise NotInitializedError: if the queue of a letter does not have its subscriber any more
    """
    config, _ = _selection.select(config_pth, queue_key)
    return _dead_letters.send_back(config, queue_key, numbers)


def drop_dead_letters(config_pth: ConfigPath,
                      queue_key: str,
                      numbers: Sequence[int] | None = None) -> tuple[int, ...]:
    """
    Drop messages that were given up.

    :param config_pth: path to the configuration file
    :param queue_key: key of the queue of dead letters
    :param numbers: in that queue; all that are there now if not given
    :return: numbers of those that were dropped; one that is not there or in use is left out
    :raise ConfigError: if the file is wrong, has no such queue, or it is no directory
    """
    config, _ = _selection.select(config_pth, queue_key)
    return _dead_letters.drop(config, queue_key, numbers)


# Maintenance


def verify(config_pth: ConfigPath,
           queue_key: str | None = None,
           progress: Progress | None = None) -> Mapping[str, tuple[str, ...]]:
    """
    Verify all pages, records and messages of queues, each in one snapshot.

    It holds up no other process. It takes seconds for each 100 MB; a queue that is used meanwhile
    grows, since its old pages are not used again before the end.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :param progress: is counted up, for another thread to look at
    :return: what is wrong, by queue; nothing if the queue is sound
    :raise ConfigError: if the file is wrong
    :raise NotInitializedError: if a queue was not initialized
    """
    progress = progress or Progress()
    return types.MappingProxyType({
        key: tuple(_upkeep.verify(settings, progress))
        for key, settings in _selection.settings_of(config_pth, queue_key).items()
    })


def backup(config_pth: ConfigPath,
           queue_key: str,
           target: Union[str, "os.PathLike[str]"],
           progress: Progress | None = None) -> int:
    """
    Copy a queue, as it is at one moment, into a file. It holds up nobody, and may be in full use.

    All that was acknowledged before the call is in it. The file is verified and durable when the
    call returns; whatever happens before, there is no file of that name.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param target: path of the file, which must not be there yet
    :param progress: is counted up, for another thread to look at
    :return: size of the file in bytes
    :raise ConfigError: if the file is wrong, or has no such queue
    :raise StoreError: if the target is there already
    :raise DiskFullError: if there is no room for it
    """
    return _upkeep.backup(_selection.one(config_pth, queue_key), os.fspath(target), progress
                          or Progress())


def restore(config_pth: ConfigPath,
            queue_key: str,
            source: Union[str, "os.PathLike[str]"],
            progress: Progress | None = None) -> None:
    """
    Let a backup take the place of a queue, or create the queue from it.

    It needs the queue for itself. The backup is verified before anything is changed, and stays.
    Messages are as old as they are: those that are older than the queue's timeout are dropped at
    its next use. Numbers go on behind all that are known to be used. Subscribers of the
    configuration file that are not in the backup are added.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param source: path of the backup
    :param progress: is counted up, for another thread to look at
    :raise ConfigError: if the file is wrong, or has no such queue
    :raise QueueInUseError: if any process, this one included, has the queue open
    :raise StoreCorruptError: if the backup is damaged
    :raise FormatError: if it is not the backup of a queue, or the directory holds something else
    """
    settings = _selection.one(config_pth, queue_key)
    config = persipubsub.config.read(config_pth)
    _alone.restore(settings, os.path.realpath(os.fspath(source)), progress or Progress())
    persipubsub.queue.ensure_queue(config, queue_key)


@icontract.ensure(lambda result: all(sizes.after > 0 for sizes in result.values()))
def compact(config_pth: ConfigPath,
            queue_key: str | None = None,
            progress: Progress | None = None) -> Mapping[str, Sizes]:
    """
    Give the room on the disk back that queues do not need any more.

    It needs each queue for itself, and room for a copy of what is in it. Whatever happens on the
    way, the queue is either as it was or compacted, durably.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :param progress: is counted up, for another thread to look at
    :return: sizes before and after, by queue
    :raise ConfigError: if the file is wrong
    :raise QueueInUseError: if any process, this one included, has the queue open
    :raise StoreCorruptError: if the queue is damaged; it is left as it is
    """
    progress = progress or Progress()
    return types.MappingProxyType({
        key: _alone.compact(settings, progress)
        for key, settings in _selection.settings_of(config_pth, queue_key).items()
    })


def add_subscriber(config_pth: ConfigPath, queue_key: str, subscriber: str) -> bool:
    """
    Add a subscriber to a queue, durably; it gets what is sent from now on.

    The configuration file is not changed: it has to name the subscriber as well.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param subscriber: its id, of 1 to 255 bytes in UTF-8
    :return: False if it was there already, and stays as it is
    :raise ConfigError: if the file is wrong, has no such queue, or nobody may have that id
    :raise NotInitializedError: if the queue was not initialized
    """
    settings = _selection.one(config_pth, queue_key)
    _selection.check_subscriber(config_pth, subscriber)
    persipubsub.config.check_identifier(subscriber, config_pth)
    return bool(_upkeep.add_subscribers(settings, [subscriber]))


def remove_subscriber(config_pth: ConfigPath, queue_key: str, subscriber: str) -> int:
    """
    Remove a subscriber from a queue, durably, and with it the messages that nobody else needs.

    The configuration file is not changed: as long as it names the subscriber, the next
    initialization adds it again, at the end of the queue.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param subscriber: its id
    :return: how many messages it did not acknowledge
    :raise ConfigError: if the file is wrong, has no such queue, or nobody may have that id
    :raise NotInitializedError: if the queue was not initialized, or has no such subscriber
    """
    _selection.check_subscriber(config_pth, subscriber)
    return _upkeep.remove_subscriber(_selection.one(config_pth, queue_key), subscriber)


def drop_queue(config_pth: ConfigPath, queue_key: str) -> tuple[str, ...]:
    """
    Remove a queue with all its messages from the disk. It needs the queue for itself.

    The configuration file is not changed: the next initialization creates the queue again. Only the
    library's own files are removed, and the directory if it is empty then.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :return: names of what else was in the directory and stays there
    :raise ConfigError: if the file is wrong, or has no such queue
    :raise NotInitializedError: if there is no queue
    :raise QueueInUseError: if any process, this one included, has the queue open
    """
    return tuple(_alone.drop(_selection.one(config_pth, queue_key)))


def migrate(config_pth: ConfigPath,
            queue_key: str,
            target: str,
            progress: Progress | None = None) -> Mapping[str, Moved]:
    """
    Move what waits in a queue of this machine to a queue on servers, while both are in use.

    The other queue is initialized first. Each subscriber gets what it did not acknowledge yet, in
    order, and nothing else; what its consumers are receiving right now stays theirs. Moved messages
    are as old as the move. It waits for room at the other queue's high-water mark, and drops
    nothing. It may be killed and repeated; the configuration file is not changed.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param target: path of the other queue, ``nats://...``
    :param progress: is counted up, for another thread to look at
    :return: what became of the messages, by subscriber; run it again if something is left
    :raise ConfigError: if the file is wrong, has no such queue, or the target is none
    :raise NotInitializedError: if the queue was not initialized
    :raise QueueFullError: if there is no room at the target for half a minute
    :raise UnavailableError: if no server answers in time
    """
    config, _ = _selection.select(config_pth, queue_key)
    return _migration.migrate(config, queue_key, target, progress or Progress())


def check_durability(config_pth: ConfigPath,
                     queue_key: str | None = None) -> Mapping[str, tuple[str, ...]]:
    """
    Look for queues that are less durable than their configuration says, as far as that can be told.

    On this machine, the library itself sees to it. Servers flush when they are configured to: they
    are asked if the path of the queue says where (``monitor=http://host:8222``).

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :return: warnings, by queue
    :raise ConfigError: if the file is wrong
    """
    config, keys = _selection.select(config_pth, queue_key)
    return types.MappingProxyType(
        {key: persipubsub.engine.of(config, key).check_durability(config, key)
         for key in keys})
