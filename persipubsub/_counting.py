"""
Count what is in the queues of a configuration file.

:py:mod:`persipubsub.control` has these functions from here. They stand apart since the command
``stat`` calls nothing else of it, and starts in half the time without the rest.
"""

import types
from collections.abc import Mapping

import persipubsub.config
import persipubsub.engine
import persipubsub.statistics
from persipubsub import _selection


def statistics(
    config_pth: _selection.ConfigPath,
    queue_key: str | None = None,
) -> Mapping[str, persipubsub.statistics.QueueStatistics]:
    """
    Count what is in queues and what happened to it, without a walk through the messages.

    Each queue's figures are a consistent snapshot; nobody is held up. It takes time with the number
    of subscribers, and none with that of the messages.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :return: figures of the queues and of their subscribers, by queue; nothing of it can be changed
    :raise ConfigError: if the file is wrong
    :raise NotInitializedError: if a queue was not initialized
    """
    config, keys = _selection.select(config_pth, queue_key)
    return types.MappingProxyType({key: statistics_of(config, key) for key in keys})


def statistics_of(config: persipubsub.config.Config,
                  queue_key: str) -> persipubsub.statistics.QueueStatistics:
    """
    Count what is in one queue, as :py:func:`statistics` does, without reading the file again.

    :param config: that describes the queue
    :param queue_key: key in ``queues``
    :return: figures of the queue and of its subscribers
    :raise ConfigError: if there is no such queue
    :raise NotInitializedError: if the queue was not initialized
    """
    config.queue_path(queue_key)
    return persipubsub.engine.of(config, queue_key).statistics_of(config, queue_key)


def in_flight(
    config_pth: _selection.ConfigPath,
    queue_key: str | None = None,
) -> Mapping[str, tuple[persipubsub.statistics.InFlight, ...]]:
    """
    Tell what is being worked on right now, in which process and since when.

    No time makes a consumer lose a message: as long as its process lives, the message is its own.
    If it hangs, end that process, and another one has the message at once.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :return: by queue; nothing where the system does not tell
    :raise ConfigError: if the file is wrong
    :raise NotInitializedError: if a queue was not initialized
    """
    return types.MappingProxyType({
        key: tuple(claim for one in figures.subscribers for claim in one.claims)
        for key, figures in statistics(config_pth, queue_key).items()
    })
