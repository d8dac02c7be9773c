"""Use this library as an application does."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import persipubsub.control
import persipubsub.publisher
import persipubsub.subscriber
from benchmarks import contender

#: How long to wait for a message that is there, in seconds: never that long.
_HANG_SECS = 60

_HUGE = 10**9


def write_config(directory: pathlib.Path,
                 durability: str,
                 subscribers: int = 1,
                 name: str = "config.json",
                 **changes: Any) -> pathlib.Path:
    """
    Write a configuration file with one queue that drops nothing by itself.

    :param directory: where to write it
    :param durability: of the queue
    :param subscribers: how many
    :param name: of the file
    :param changes: keys of the queue or of its high-water mark
    :return: path to the file
    """
    identifiers = [f"sub{index}" for index in range(subscribers)]
    mark: dict[str, Any] = {
        "MSG_TIMEOUT_SECS": 10**6,
        "MAX_MSGS_NUM": _HUGE,
        "HWM_LMDB_SIZE_BYTES": 1 << 36,
        "strategy": "prune_first"
    }
    queue: dict[str, Any] = {
        "path": str(directory / "queue"),
        "max_reader_num": 1024,
        "max_db_num": 1024,
        "max_db_size_bytes": 1 << 36,
        "subscribers": identifiers,
        "durability": durability,
        "high-water-mark": mark
    }
    for key, value in changes.items():
        (mark if key in mark else queue)[key] = value
    entries: dict[str, Any] = {
        "queues": {
            "queue": queue
        },
        "pub": {
            "out_queue": "queue",
            "subscribers": identifiers
        }
    }
    for identifier in identifiers:
        entries[identifier] = {"in_queue": "queue"}
    path = directory / name
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


class Library(contender.Contender):
    """Send and receive by ``Pub`` and ``Sub``."""

    name = "persipubsub"
    max_subscribers = _HUGE
    can_sleep = True

    def __init__(self,
                 directory: pathlib.Path,
                 durability: str,
                 subscribers: int = 1,
                 config_pth: pathlib.Path | None = None,
                 **changes: Any) -> None:
        """
        Open the queue; create it if it is not there.

        :param directory: of the queue, which exists
        :param durability: one of ``durabilities``
        :param subscribers: how many get each message
        :param config_pth: written by :py:func:`write_config`; written here if not given
        :param changes: as of :py:func:`write_config`
        """
        if config_pth is None:
            config_pth = directory / "config.json"
            # Not written again: other processes may be reading it.
            if not config_pth.exists() or changes:
                write_config(directory, durability, subscribers, **changes)
        self.config_pth = config_pth
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        self._publisher = persipubsub.publisher.Pub()
        self._publisher.init(pub_id="pub", config_pth=config_pth)
        self.send = self._publisher.send
        self._subscribers: dict[int, persipubsub.subscriber.Sub] = {}

    def _subscriber(self, index: int = 0) -> persipubsub.subscriber.Sub:
        """
        Open a subscriber at its first use.

        :param index: from 0 on
        :return: open subscriber
        """
        subscriber = self._subscribers.get(index)
        if subscriber is None:
            subscriber = self._subscribers[index] = persipubsub.subscriber.Sub()
            subscriber.init(sub_id=f"sub{index}", config_pth=self.config_pth)
        return subscriber

    def send_many(self, messages: list[Any]) -> None:
        """Send messages in one commit."""
        self._publisher.send_many(messages)

    def receive(self, count: int) -> list[Any]:
        """Receive messages one by one, and acknowledge each of them."""
        subscriber = self._subscriber()
        received: list[Any] = []
        for _ in range(count):
            with subscriber.receive(timeout=_HANG_SECS) as message:
                received.append(message)
        return received

    def receive_many(self, count: int, batch: int) -> list[Any]:
        """Receive messages in batches that are acknowledged together."""
        return self._receive_batches(self._subscriber(), count, batch)

    @staticmethod
    def _receive_batches(subscriber: persipubsub.subscriber.Sub, count: int,
                         batch: int) -> list[Any]:
        """
        Receive messages in batches.

        :param subscriber: that receives
        :param count: how many messages
        :param batch: how many at once, at most
        :return: messages
        """
        received: list[Any] = []
        while len(received) < count:
            with subscriber.receive_many(min(batch, count - len(received)),
                                         timeout=_HANG_SECS) as messages:
                received.extend(messages)
            if not messages:
                break
        return received

    def drain(self, subscriber: int, count: int) -> list[Any]:
        """Receive all messages of one of several subscribers."""
        received = self._receive_batches(self._subscriber(subscriber), count, 1000)
        self._subscribers.pop(subscriber).close()
        return received

    def sleep_and_receive(self, callback: Callable[[Any], bool]) -> None:
        """Receive messages, asleep while there are none."""
        subscriber = self._subscriber()
        goes_on = True
        while goes_on:
            with subscriber.receive(timeout=_HANG_SECS) as message:
                goes_on = callback(message)

    def close(self) -> None:
        """Close the queue."""
        self._publisher.close()
        for subscriber in self._subscribers.values():
            subscriber.close()
