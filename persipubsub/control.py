"""
Apply a configuration file to its queues.

These functions are called by deployment scripts, also while publishers and subscribers are running.
"""

import os
from typing import Union

import persipubsub.config
import persipubsub.queue

__all__ = ["initialize_all_dbs", "prune_dangling_messages", "clear_all_subs"]

ConfigPath = Union[str, os.PathLike[str]]


def initialize_all_dbs(config_pth: ConfigPath) -> None:
    """
    Create the queues of a configuration file and add their subscribers.

    It may be repeated at any time: what is there stays as it is, new subscribers are added and get
    what is published from then on. All of it is durable when the call returns; queues that were
    made ready before an error stay ready.

    :param config_pth: path to the configuration file
    :raise ConfigError: if the file is wrong
    :raise FormatError: if the directory of a queue holds something else
    :raise AccessError: if a directory may not be created or written to
    """
    config = persipubsub.config.read(config_pth)
    for queue_key, queue in config.queues.items():
        persipubsub.queue.Queue.ensure(persipubsub.queue.Settings.of(config, queue_key),
                                       subscribers=queue.subscribers)


def prune_dangling_messages(config_pth: ConfigPath) -> None:
    """
    Drop the messages of all queues that are too old, and delete those that everybody acknowledged.

    It is done in many short transactions, so that publishers are not held up.

    :param config_pth: path to the configuration file
    :raise ConfigError: if the file is wrong
    :raise NotInitializedError: if a queue was not initialized
    """
    config = persipubsub.config.read(config_pth)
    for queue_key in config.queues:
        with persipubsub.queue.Queue(persipubsub.queue.Settings.of(config, queue_key)) as queue:
            queue.prune()


def clear_all_subs(config_pth: ConfigPath) -> None:
    """
    Drop all messages of all queues; their subscribers stay.

    The messages of a queue leave in one transaction. A message that is being received is
    acknowledged into the void.

    :param config_pth: path to the configuration file
    :raise ConfigError: if the file is wrong
    :raise NotInitializedError: if a queue was not initialized
    """
    config = persipubsub.config.read(config_pth)
    for queue_key in config.queues:
        with persipubsub.queue.Queue(persipubsub.queue.Settings.of(config, queue_key)) as queue:
            queue.clear()
