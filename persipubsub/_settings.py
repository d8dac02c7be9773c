"""Take from a configuration what a queue on this machine has to know."""

import os
import types
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Optional

import persipubsub.config
import persipubsub.errors
from persipubsub.environment import _opening
from persipubsub.store import _attempts, _blocks, _log


class Retries(NamedTuple):
    """Say what happens to the messages that a subscriber fails to work on."""

    policy: _attempts.Policy
    queue_key: str  #: of the subscriber's queue in the configuration
    dead_letters: "Optional[Settings]"  #: of the queue of dead letters; None if there is none


_NO_RETRIES: Final[Mapping[str, Retries]] = types.MappingProxyType({})


class Settings(NamedTuple):
    """Say where a queue is and what it does with its messages."""

    path: str  #: directory of the queue
    max_bytes: int  #: largest size of the store
    max_readers: int  #: slots in LMDB's table of readers
    timeout_ns: int  #: age at which a message is dropped, in nanoseconds
    max_messages: int  #: number of messages that may wait
    max_message_bytes: int  #: bytes of messages that may wait
    strategy: persipubsub.config.Strategy  #: what happens then
    keeps_os: bool  #: durability "os"
    checkpoint_secs: float  #: time between checkpoints of an "os" queue; 0: none
    busy_timeout_secs: float  #: how long a write waits for another process
    once_window_ns: int = 3600 * 10**9  #: how long ids of messages are remembered, in nanoseconds
    retain_ns: int = 0  #: how long finished messages stay, in nanoseconds since their commit
    retries: Mapping[str, Retries] = _NO_RETRIES  #: of the subscribers that say something of them

    @classmethod
    def of(cls,
           config: persipubsub.config.Config,
           queue_key: str,
           has_retries: bool = True) -> "Settings":
        """
        Take the settings from a configuration.

        :param config: that describes the queue
        :param queue_key: of the queue in ``queues``
        :param has_retries: False to leave out what subscribers do with messages that fail
        :return: its settings
        :raise ConfigError: if the queue is no directory
        """
        require_directory(config, queue_key)
        queue = config.queues[queue_key]
        mark = queue.high_water_mark
        return cls(
            path=config.queue_path(queue_key),
            max_bytes=queue.max_db_size_bytes,
            max_readers=queue.max_reader_num,
            timeout_ns=int((mark.msg_timeout_secs or 3.2e9) * 1e9),  # transitional
            max_messages=mark.max_msgs_num or 2**48,
            max_message_bytes=mark.size_bytes or 2**46,
            strategy=mark.strategy,
            keeps_os=queue.durability is persipubsub.config.Durability.OS,
            checkpoint_secs=queue.checkpoint_secs,
            busy_timeout_secs=queue.busy_timeout_secs,
            once_window_ns=int(queue.once_window_secs * 1e9),
            retain_ns=int(queue.retain_secs * 1e9),
            retries=_retries_of(config, queue_key) if has_retries else _NO_RETRIES)

    @property
    def drops_unread(self) -> bool:
        """
        Tell whether messages that were not read are dropped to make room.

        :return: False if those who send are refused, or wait, instead
        """
        return self.strategy in (persipubsub.config.Strategy.PRUNE_FIRST,
                                 persipubsub.config.Strategy.PRUNE_LAST)

    def retained_ns(self, now_ns: int) -> int:
        """
        Tell which finished messages stay.

        :param now_ns: time on the queue's clock
        :return: those that were committed later
        """
        return now_ns - self.retain_ns if self.retain_ns else _log.RETAINS_NOTHING_NS

    def options(self) -> _opening.Options:
        """
        Choose how to open the store.

        :return: options of its environment
        """
        return _opening.Options(map_size=self.max_bytes,
                                max_readers=self.max_readers,
                                keeps_os=self.keeps_os,
                                checkpoint_secs=self.checkpoint_secs,
                                busy_timeout_secs=self.busy_timeout_secs)

    def check_size(self, messages: Sequence[bytes]) -> None:
        """
        Check that the queue could hold messages if it were empty, before they are encoded.

        :param messages: to be put in one commit
        :raise MessageTooLargeError: if it could not
        """
        sizes = list(map(len, messages))
        count, size, largest = len(sizes), sum(sizes), max(sizes, default=0)
        limit = min(self.max_message_bytes, _blocks.MAX_MESSAGE_BYTES)
        if largest > limit:
            raise persipubsub.errors.MessageTooLargeError(
                f"Expected a message of at most {limit} bytes for the queue {self.path} "
                f"(HWM_LMDB_SIZE_BYTES), but got: {largest} bytes")
        if size > self.max_message_bytes or count > self.max_messages:
            raise persipubsub.errors.MessageTooLargeError(
                "Expected a batch of at most {} messages (MAX_MSGS_NUM) and {} bytes "
                "(HWM_LMDB_SIZE_BYTES) for the queue {}, but got: {} messages, {} bytes".format(
                    self.max_messages, self.max_message_bytes, self.path, count, size))
        room = self.max_bytes - _blocks.BLOCK_BYTES // 8 - _blocks.ENTRY_BYTES * count
        if size > room:
            raise persipubsub.errors.MessageTooLargeError(
                f"Expected messages of at most {max(0, room)} bytes for the queue {self.path} "
                f"(max_db_size_bytes), but got: {size} bytes")


def require_directory(config: persipubsub.config.Config, queue_key: str) -> None:
    """
    Check that a queue is a directory of this machine.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :raise ConfigError: if it is kept elsewhere
    """
    path = config.queues[queue_key].path or queue_key
    if persipubsub.config.scheme_of(path):
        raise persipubsub.errors.ConfigError(
            "{}: queues.{}.path: Expected a queue that is a directory of this machine, but got: "
            "{!r}; this is to be done with the tools of its servers".format(
                config.path, queue_key, path))


def _retries_of(config: persipubsub.config.Config, queue_key: str) -> Mapping[str, Retries]:
    """
    Take from a configuration what subscribers do with messages that fail.

    :param config: that describes the queue
    :param queue_key: of the queue in ``queues``
    :return: by id of those subscribers that say something
    """
    found = {}
    for subscriber in config.subscribers.values():
        if subscriber.in_queue != queue_key:
            continue
        policy = _attempts.Policy(max_deliveries=subscriber.max_deliveries,
                                  delay_ns=int(subscriber.retry_delay_secs * 1e9))
        target = subscriber.dead_letter_queue
        if policy != _attempts.Policy():
            # Without the retries of that queue: its subscribers may give up into this one.
            letters = Settings.of(config, target, has_retries=False) if target else None
            found[subscriber.identifier] = Retries(policy, queue_key, letters)
    return types.MappingProxyType(found)


def check_dead_letters(config: persipubsub.config.Config, queue_key: str) -> None:
    """
    Check that no subscriber's messages are given up into the queue that they come from.

    When the file is read, only names are compared: what is right must not depend on the links that
    are on the disk then. Here they count, since somebody is about to use the directories.

    :param config: that describes the queues
    :param queue_key: of the queue that is about to be used, or that of its dead letters
    :raise ConfigError: if two keys lead to the same directory
    """
    for subscriber in config.subscribers.values():
        target = subscriber.dead_letter_queue
        if not target or queue_key not in (subscriber.in_queue, target):
            continue
        path = config.queue_path(target)
        if _is_same(config.queue_path(subscriber.in_queue), path):
            places = [
                persipubsub.config.at(persipubsub.config.at("queues", key), "path")
                for key in (subscriber.in_queue, target)
            ]
            persipubsub.config.fail(config.path, [
                "{}: Expected another directory than that of {}, but got: {!r}, the same one ({}, "
                "dead_letter_queue of {!r})".format(places[1], places[0], path, target,
                                                    subscriber.identifier)
            ])


def _is_same(path: str, other: str) -> bool:
    """
    Tell whether paths lead to the same directory now.

    :param path: one of them, which need not be there
    :param other: the other one, which need not be there
    :return: True if so
    """
    try:
        return os.path.samefile(path, other)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(other)
