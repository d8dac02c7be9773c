"""Choose the queues of a configuration file that somebody is to look after."""

import contextlib
import os
import types
from collections.abc import Callable, Mapping
from typing import TypeVar, Union

import persipubsub.config
import persipubsub.engine
from persipubsub._settings import Settings

ConfigPath = persipubsub.config.ConfigLike

ResultT = TypeVar("ResultT")


def select(config_pth: ConfigPath,
           queue_key: str | None) -> tuple[persipubsub.config.Config, list[str]]:
    """
    Read a configuration file and choose queues.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :return: configuration, keys of the queues
    :raise ConfigError: if the file is wrong, or has no such queue
    """
    config = persipubsub.config.read(config_pth)
    if queue_key is not None:
        config.queue_path(queue_key)
    return config, list(config.queues) if queue_key is None else [queue_key]


def settings_of(config_pth: ConfigPath, queue_key: str | None) -> Mapping[str, Settings]:
    """
    Read what is to be known of queues that are directories of this machine.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :return: settings by key
    :raise ConfigError: if the file is wrong, has no such queue, or it is no directory
    """
    config, keys = select(config_pth, queue_key)
    return {key: Settings.of(config, key) for key in keys}


def one(config_pth: ConfigPath, queue_key: str) -> Settings:
    """
    Read what is to be known of one queue.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``
    :return: its settings
    :raise ConfigError: if the file is wrong, or has no such queue
    """
    config = persipubsub.config.read(config_pth)
    # None is for others all of them.
    config.queue_path(queue_key)
    return Settings.of(config, queue_key)


def check_subscriber(config_pth: ConfigPath, sub_id: str) -> None:
    """
    Check the id of a subscriber that the file need not have, before a queue is asked for it.

    :param config_pth: path to the configuration file
    :param sub_id: id of the subscriber; that of dead letters is one
    :raise ConfigError: if nobody may have that id
    :raise TypeError: if it is no text
    """
    if not isinstance(sub_id, str):
        raise TypeError(f"Expected the id of a subscriber as str, but got: {sub_id!r}")
    if sub_id != persipubsub.config.DEAD_LETTERS:
        persipubsub.config.check_identifier(sub_id, config_pth)


def for_each(config_pth: ConfigPath, queue_key: str | None,
             work: Callable[[persipubsub.engine.Queue], ResultT]) -> Mapping[str, ResultT]:
    """
    Open queues, one after the other, and do something with each.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :param work: to be done
    :return: what came of it, by key
    """
    config, keys = select(config_pth, queue_key)
    results = {}
    for key in keys:
        with contextlib.closing(persipubsub.engine.of(config, key).open_queue(config,
                                                                              key)) as queue:
            results[key] = work(queue)
    return types.MappingProxyType(results)
