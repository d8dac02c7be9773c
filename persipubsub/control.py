"""
Apply a configuration to its queues, and look after them.

Deployment scripts and people on call use these functions, also while publishers and subscribers are
running. A function that needs a queue for itself says so: it raises
:py:class:`persipubsub.errors.QueueInUseError` while any process has the queue open.

``config_pth`` is the path of a configuration file, a dictionary with the content of one, or a
:py:class:`persipubsub.config.Config`. The command ``persipubsub`` calls these functions.
"""

import contextlib
import datetime
import importlib
import operator
import os
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import persipubsub.config
import persipubsub.engine
import persipubsub.errors
from persipubsub.config import DEAD_LETTERS, Config, ConfigLike, check_identifier
from persipubsub.message import Peeked
from persipubsub.statistics import InFlight, Progress, QueueStatistics

if TYPE_CHECKING:
    from persipubsub.letters import ListedDeadLetter
    from persipubsub.lmdb_engine.maintenance import Sizes
    from persipubsub.migration import Moved

__all__ = [
    "initialize_all_dbs", "prune_dangling_messages", "clear_all_subs", "statistics", "in_flight",
    "seek", "pause", "resume", "delete", "verify", "compact", "backup", "restore", "add_subscriber",
    "remove_subscriber", "drop_queue", "peek", "follow", "dead_letters", "send_back",
    "drop_dead_letters", "migrate", "check_durability", "stored_settings", "ConfigPath", "Progress"
]

ConfigPath = ConfigLike

ResultT = TypeVar("ResultT")


def _load(name: str) -> Any:
    """
    Import a module that only few of the functions need.

    Importing some modules takes longer than the function runs.
    """
    return importlib.import_module(f"persipubsub.{name}")


def _select(config_pth: ConfigLike, queue_key: str | None) -> tuple[Config, list[str]]:
    """Read a configuration and choose queues."""
    config = persipubsub.config.read(config_pth)
    if queue_key is not None:
        config.queue_path(queue_key)
    return config, list(config.queues) if queue_key is None else [queue_key]


def _for_each(config_pth: ConfigLike, queue_key: str | None,
              work: Callable[[Config, str], ResultT]) -> Mapping[str, ResultT]:
    """Do something with queues, one after the other."""
    config, keys = _select(config_pth, queue_key)
    return types.MappingProxyType({key: work(config, key) for key in keys})


def _operate(config: Config, queue_key: str, name: str, *arguments: object) -> Any:
    """Open a queue, and call a method of it. Not every engine offers those for operators."""
    engine: Any = persipubsub.engine.of(config, queue_key)
    if not hasattr(engine.Queue, name):
        # Only queues on servers lack methods. For them, this raises the ConfigError that says so.
        _load("queue").directory_of(config, queue_key)
    with contextlib.closing(engine.open_queue(config, queue_key)) as queue:
        return getattr(queue, name)(*arguments)


def _operate_for(config_pth: ConfigLike, sub_id: str, queue_key: str | None, name: str, *arguments:
                 object) -> Any:
    """Call a method of the queue of a subscriber, for it."""
    config, key = _subscriber(config_pth, sub_id, queue_key)
    return _operate(config, key, name, sub_id, *arguments)


def _ask(config: Config, queue_key: str, name: str, otherwise: Any) -> Any:
    """Ask something that not every engine knows."""
    function = getattr(persipubsub.engine.of(config, queue_key), name, None)
    return otherwise if function is None else function(config, queue_key)


def _maintain(config: Config, queue_key: str, name: str, *arguments: object) -> Any:
    """Do something with the files of a queue on this machine."""
    directory = _load("queue").directory_of(config, queue_key)
    work = getattr(_load("lmdb_engine.maintenance"), name)
    return work(directory, config.queues[queue_key], *arguments)


def _subscriber(config_pth: ConfigLike, sub_id: str, queue_key: str | None) -> tuple[Config, str]:
    """Check the id of a subscriber that the file need not have, and find its queue."""
    config = persipubsub.config.read(config_pth)
    if not isinstance(sub_id, str):
        raise TypeError(f"Expected the id of a subscriber as str, but got: {sub_id!r}")
    # DEAD_LETTERS is reserved but allowed here: on servers, peek is the only way to look at them.
    if sub_id != DEAD_LETTERS:
        check_identifier(sub_id, config.path)
    key = config.subscriber(sub_id).in_queue if queue_key is None else queue_key
    config.queue_path(key)
    return config, key


def _at_least(name: str, value: int, least: int) -> int:
    """Check a number."""
    value = operator.index(value)
    if value < least:
        raise ValueError(f"Expected {name} to be at least {least}, but got: {value}")
    return value


def initialize_all_dbs(config_pth: ConfigLike, queue_key: str | None = None) -> None:
    """
    Create the queues of a configuration file, add their subscribers, and store their settings.

    It may be repeated at any time: messages and subscribers that are there stay. A new subscriber
    gets what is sent from then on; with ``start_from`` ``"beginning"``, it also gets what is still
    stored and addressed to it. All of this is durable when the call returns. If there is an error,
    queues that were made ready before stay ready.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :raise ConfigError: if the file is wrong
    :raise FormatError: if the directory of a queue holds something else
    :raise AccessError: if a directory may not be created or written to
    """
    _for_each(config_pth, queue_key,
              lambda config, key: persipubsub.engine.of(config, key).ensure_queue(config, key))


def prune_dangling_messages(config_pth: ConfigLike,
                            queue_key: str | None = None) -> Mapping[str, int]:
    """
    Drop messages that are too old, and delete messages that all subscribers acknowledged.

    It is done in many short transactions, so that publishers are not held up.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :return: how many deliveries were dropped, by queue
    :raise ConfigError: if the file is wrong
    :raise NotInitializedError: if a queue was not initialized
    """
    return _for_each(config_pth, queue_key, lambda config, key: _operate(config, key, "prune"))


def clear_all_subs(config_pth: ConfigLike, queue_key: str | None = None) -> Mapping[str, int]:
    """
    Drop all messages of queues; their subscribers stay.

    The messages of a queue are dropped in one transaction. If a consumer has one of them, its
    acknowledgement has no effect.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :return: how many deliveries were dropped, by queue
    :raise ConfigError: if the file is wrong
    :raise NotInitializedError: if a queue was not initialized
    """
    return _for_each(config_pth, queue_key, lambda config, key: _operate(config, key, "clear"))


# Looking


def statistics(config_pth: ConfigLike,
               queue_key: str | None = None) -> Mapping[str, QueueStatistics]:
    """
    Count what is in queues and what happened to it, without a walk through the messages.

    This does not count as a use of the queues: :py:func:`compact` is possible at the same time.

    :param config_pth: configuration
    :param queue_key: key in ``queues``; all of them if not given
    :return: figures by key
    :raise ConfigError: if the configuration is wrong
    :raise NotInitializedError: if a queue was not initialized
    """
    return _for_each(
        config_pth, queue_key,
        lambda config, key: persipubsub.engine.of(config, key).statistics_of(config, key))


def in_flight(config_pth: ConfigLike,
              queue_key: str | None = None) -> Mapping[str, tuple[InFlight, ...]]:
    """
    Tell what is being worked on right now, in which process and since when.

    :param config_pth: configuration
    :param queue_key: key in ``queues``; all of them if not given
    :return: what is claimed, by key, ordered by subscriber and number; empty for servers
    :raise ConfigError: if the configuration is wrong
    """
    return types.MappingProxyType({
        key: tuple(claim for one in figures.subscribers for claim in one.claims)
        for key, figures in statistics(config_pth, queue_key).items()
    })


def peek(config_pth: ConfigLike,
         sub_id: str,
         count: int = 1,
         start: int = 0,
         queue_key: str | None = None) -> tuple[Peeked, ...]:
    """
    Look at the next messages of a subscriber without taking them.

    :param config_pth: path to the configuration file
    :param sub_id: id of the subscriber
    :param count: how many messages at most
    :param start: number from which on to look; messages before its position are left out
    :param queue_key: key in ``queues``; that of the subscriber's entry if not given
    :return: messages that it did not acknowledge yet, also those that are being received
    :raise ConfigError:
        if the file is wrong, has no such subscriber or queue, or the id is not valid
    :raise NotInitializedError: if the queue or the subscriber was not initialized
    """
    config, key = _subscriber(config_pth, sub_id, queue_key)
    count, start = _at_least("count", count, 1), _at_least("start", start, 0)
    return tuple(persipubsub.engine.of(config, key).peek(config, key, sub_id, count, start))


def follow(config_pth: ConfigLike,
           queue_key: str,
           last: int = 0) -> Generator[list[Peeked], None, None]:
    """
    Look at the messages of a queue as they are sent, for ever, without being a subscriber.

    A message that all its subscribers acknowledged may be deleted before it is seen: its number is
    left out. The queue is in use until the iterator is closed.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param last: how many of the newest messages that are there to begin with
    :return: iterator over messages, several at a time; an empty list at least once a second
    :raise ConfigError: if the file is wrong, or has no such queue
    """
    config, (key, ) = _select(config_pth, queue_key)
    return persipubsub.engine.of(config, key).follow(config, key, _at_least("last", last, 0))


def seek(config_pth: ConfigLike,
         sub_id: str,
         to: str | int | float | datetime.datetime,
         queue_key: str | None = None) -> int:
    """
    Let a subscriber go on from another place of the queue: back, to receive again, or forward.

    It is done in one transaction, and durable when the call returns. Messages from that place on
    are delivered again even if the subscriber acknowledged them, as far as they are still stored
    (see ``retain_secs``). Messages that are passed unread count as skipped. It may be called while
    consumers are at work: a message that one of them has is not given to a second one.

    A time is converted to an age by the present wall clock. If that was set after a message was
    sent, the place is off by as much. Messages older than the queue's timeout are passed over.

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
        if the file is wrong, has no such subscriber or queue, or the id is not valid
    :raise NotInitializedError: if the queue or the subscriber was not initialized
    :raise TypeError: if the place is of another type
    :raise ValueError: if it is another text, or a time without a time zone
    """
    return int(_operate_for(config_pth, sub_id, queue_key, "seek", to))


def pause(config_pth: ConfigLike, sub_id: str, queue_key: str | None = None) -> bool:
    """
    Let the consumers of a subscriber wait: they get no messages until :py:func:`resume`.

    Messages are kept as if no consumer was there, up to the queue's limits. Messages that consumers
    already have can be acknowledged. The pause is durable when the call returns.

    :param config_pth: configuration
    :param sub_id: id of the subscriber
    :param queue_key: key in ``queues``; that of the subscriber's entry if not given
    :return: False if it was paused before
    :raise ConfigError: if the configuration is wrong
    :raise NotInitializedError: if the queue has no such subscriber
    """
    return bool(_operate_for(config_pth, sub_id, queue_key, "pause", True))


def resume(config_pth: ConfigLike, sub_id: str, queue_key: str | None = None) -> bool:
    """
    Let the consumers of a subscriber that was paused go on.

    :param config_pth: configuration
    :param sub_id: id of the subscriber
    :param queue_key: key in ``queues``; that of the subscriber's entry if not given
    :return: False if it was not paused
    :raise ConfigError: if the configuration is wrong
    :raise NotInitializedError: if the queue has no such subscriber
    """
    return bool(_operate_for(config_pth, sub_id, queue_key, "pause", False))


def delete(config_pth: ConfigLike, sub_id: str, number: int, queue_key: str | None = None) -> bool:
    """
    Delete one message for one subscriber, such as a poison message at which every consumer fails.

    It counts as cleared. The change is durable when the call returns. Other subscribers still get
    the message. A consumer that has it may finish its work.

    :param config_pth: configuration
    :param sub_id: id of the subscriber
    :param number: of the message
    :param queue_key: key in ``queues``; that of the subscriber's entry if not given
    :return: False if there is no such message for the subscriber
    :raise ConfigError: if the configuration is wrong
    :raise NotInitializedError: if the queue has no such subscriber
    """
    number = _at_least("number", number, 0)
    return bool(_operate_for(config_pth, sub_id, queue_key, "delete", number))


def stored_settings(config_pth: ConfigLike, queue_key: str) -> Mapping[str, tuple[Any, Any]]:
    """
    Compare the settings of a queue in the configuration with those that are stored in the queue.

    :param config_pth: configuration
    :param queue_key: key in ``queues``
    :return: keys that differ, each with the value of the configuration and that of the queue;
        ``subscribers`` with all of the configuration and all of the queue; empty for servers
    :raise ConfigError: if the configuration is wrong
    :raise NotInitializedError: if there is no such queue yet
    """
    config, (key, ) = _select(config_pth, queue_key)
    return types.MappingProxyType(_ask(config, key, "stored_settings", {}))


# Messages that were given up


def dead_letters(config_pth: ConfigLike,
                 queue_key: str | None = None) -> "Mapping[str, tuple[ListedDeadLetter, ...]]":
    """
    Look at messages that were given up, without taking them.

    All of them are read into memory.

    :param config_pth: path to the configuration file
    :param queue_key: key of a queue of dead letters; all of them if not given
    :return: those that were neither sent back nor dropped, in order, by queue
    :raise ConfigError: if the file is wrong, has no such queue, or the queue is no directory
    :raise NotInitializedError: if a queue was not initialized as a queue of dead letters
    """
    config, keys = _select(config_pth, queue_key)
    letters = _load("letters")
    if queue_key is None:
        keys = letters.queues_of(config)
    return types.MappingProxyType({key: tuple(letters.look(config, key)) for key in keys})


def send_back(config_pth: ConfigLike,
              queue_key: str,
              numbers: Sequence[int] | None = None) -> tuple[int, ...]:
    """
    Send messages that were given up to the subscriber that failed to work on them, as new ones.

    No other subscriber gets them. Each is durable in its queue before it leaves the queue of dead
    letters. If the process is killed in between, repeating the call does not send it twice.

    :param config_pth: path to the configuration file
    :param queue_key: key of the queue of dead letters
    :param numbers: in that queue; all that are there now if not given
    :return: numbers of those that were sent back; without those that are not there, or in use
    :raise ConfigError:
        if the file is wrong, lacks that queue or the queue of a letter, or one is no directory
    :raise NotInitializedError: if the queue of a letter does not have its subscriber any more
    """
    config, _ = _select(config_pth, queue_key)
    return tuple(_load("letters").send_back(config, queue_key, numbers))


def drop_dead_letters(config_pth: ConfigLike,
                      queue_key: str,
                      numbers: Sequence[int] | None = None) -> tuple[int, ...]:
    """
    Drop messages that were given up.

    :param config_pth: path to the configuration file
    :param queue_key: key of the queue of dead letters
    :param numbers: in that queue; all that are there now if not given
    :return: numbers of those that were dropped; without those that are not there, or in use
    :raise ConfigError: if the file is wrong, has no such queue, or the queue is no directory
    """
    config, _ = _select(config_pth, queue_key)
    return tuple(_load("letters").drop(config, queue_key, numbers))


# Maintenance


def verify(config_pth: ConfigLike,
           queue_key: str | None = None,
           progress: Progress | None = None) -> Mapping[str, tuple[str, ...]]:
    """
    Verify all pages, records and messages of queues.

    The pages are those of one snapshot; the rest is read in short steps. No other process and no
    thread waits for it. It takes seconds for each 100 MB. A queue that is in use grows meanwhile,
    since its old pages are not used again before the end.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :param progress: is counted up, for another thread to read
    :return: what is wrong, by queue; nothing if the queue is sound
    :raise ConfigError: if the file is wrong
    :raise NotInitializedError: if a queue was not initialized
    """
    shown = progress or Progress()
    return _for_each(config_pth, queue_key,
                     lambda config, key: tuple(_maintain(config, key, "verify", shown)))


def backup(config_pth: ConfigLike,
           queue_key: str,
           target: "str | os.PathLike[str]",
           progress: Progress | None = None) -> int:
    """
    Copy a queue, as it is at one moment, into a file. The queue may be in full use; nobody waits.

    Everything that was sent or acknowledged before the call is in the file. The file is verified
    and durable when the call returns. If the call fails, there is no file of that name.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param target: path of the file, which must not be there yet
    :param progress: is counted up, for another thread to read
    :return: size of the file in bytes
    :raise ConfigError: if the file is wrong, or has no such queue
    :raise StoreError: if the target is there already
    :raise DiskFullError: if there is no room for it
    """
    config, _ = _select(config_pth, queue_key)
    return int(_maintain(config, queue_key, "backup", os.fspath(target), progress or Progress()))


def restore(config_pth: ConfigLike,
            queue_key: str,
            source: "str | os.PathLike[str]",
            progress: Progress | None = None) -> None:
    """
    Replace a queue with a backup, or create the queue from it.

    It needs the queue for itself. The backup is verified before anything is changed, and stays.
    Messages keep their age: those that are older than the queue's timeout are dropped at its next
    use. New numbers come after all that are known to be used. Subscribers of the configuration file
    that are not in the backup are added.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param source: path of the backup
    :param progress: is counted up, for another thread to read
    :raise ConfigError: if the file is wrong, or has no such queue
    :raise QueueInUseError: if any process, this one included, has the queue open
    :raise StoreCorruptError: if the backup is damaged
    :raise FormatError: if it is not the backup of a queue, or the directory holds something else
    """
    config, _ = _select(config_pth, queue_key)
    source = os.path.realpath(os.fspath(source))
    _maintain(config, queue_key, "restore", source, progress or Progress())
    persipubsub.engine.of(config, queue_key).ensure_queue(config, queue_key)


def compact(config_pth: ConfigLike,
            queue_key: str | None = None,
            progress: Progress | None = None) -> "Mapping[str, Sizes]":
    """
    Give back room on the disk that queues do not need any more.

    It needs each queue for itself, and room for a copy of what is in it. If it is interrupted, the
    queue is either as it was or compacted, durably.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :param progress: is counted up, for another thread to read
    :return: sizes before and after, by queue
    :raise ConfigError: if the file is wrong
    :raise QueueInUseError: if any process, this one included, has the queue open
    :raise StoreCorruptError: if the queue is damaged; it is left as it is
    """
    shown = progress or Progress()
    return _for_each(config_pth, queue_key,
                     lambda config, key: _maintain(config, key, "compact", shown))


def add_subscriber(config_pth: ConfigLike, queue_key: str, subscriber: str) -> bool:
    """
    Add a subscriber to a queue, durably; it gets what is sent from now on.

    The configuration file is not changed: name the subscriber there as well.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param subscriber: its id, of 1 to 255 bytes in UTF-8
    :return: False if it was there already, and stays as it is
    :raise ConfigError: if the file is wrong, has no such queue, or the id is not valid
    :raise NotInitializedError: if the queue was not initialized
    """
    config, key = _subscriber(config_pth, subscriber, queue_key)
    # Only the initialization adds the subscriber of dead letters.
    check_identifier(subscriber, config.path)
    return bool(_operate(config, key, "add_subscriber", subscriber))


def remove_subscriber(config_pth: ConfigLike, queue_key: str, subscriber: str) -> int:
    """
    Remove a subscriber from a queue, durably, with the messages that no other subscriber needs.

    The configuration file is not changed: as long as it names the subscriber, the next
    initialization adds it again, at the end of the queue.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param subscriber: its id
    :return: how many messages it did not acknowledge
    :raise ConfigError: if the file is wrong, has no such queue, or the id is not valid
    :raise NotInitializedError: if the queue was not initialized, or has no such subscriber
    """
    return int(_operate_for(config_pth, subscriber, queue_key, "remove_subscriber"))


def drop_queue(config_pth: ConfigLike, queue_key: str) -> tuple[str, ...]:
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
    config, _ = _select(config_pth, queue_key)
    return tuple(_maintain(config, queue_key, "drop"))


def migrate(config_pth: ConfigLike,
            queue_key: str,
            target: str,
            progress: Progress | None = None) -> "Mapping[str, Moved]":
    """
    Move what waits in a queue of this machine to a queue on servers, while both are in use.

    The other queue is initialized first. Each subscriber gets the messages that it has not
    acknowledged, in order, and no others. Messages that its consumers have at that moment are not
    moved. The age of a moved message starts anew. At the other queue's high-water mark it waits for
    room, and drops nothing. It may be killed and repeated. The configuration file is not changed.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :param target: path of the other queue, ``nats://...``
    :param progress: is counted up, for another thread to read
    :return: what became of the messages, by subscriber; run it again if something is left
    :raise ConfigError: if the file is wrong, has no such queue, or the target is not on servers
    :raise NotInitializedError: if the queue was not initialized
    :raise QueueFullError: if there is no room at the target for half a minute
    :raise UnavailableError: if no server answers in time
    """
    config, _ = _select(config_pth, queue_key)
    moved: Mapping[str, Moved] = _load("migration").migrate(config, queue_key, target, progress
                                                            or Progress())
    return moved


def check_durability(config_pth: ConfigLike,
                     queue_key: str | None = None) -> Mapping[str, tuple[str, ...]]:
    """
    Look for queues that are less durable than their configuration says, as far as this is known.

    A directory is as durable as configured. Servers flush as they are configured themselves: they
    are asked if the path of the queue has ``monitor=http://host:8222``.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :return: warnings, by queue
    :raise ConfigError: if the file is wrong
    """
    return _for_each(config_pth, queue_key,
                     lambda config, key: _ask(config, key, "check_durability", ()))
