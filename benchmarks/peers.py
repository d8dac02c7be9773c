"""
Use the peers, each by its own public interface.

Every peer gets what favours it: a serializer that leaves bytes as they are where it has one, text
where it stores text, its fastest documented way to receive. A peer is imported when it is opened,
so that one that is missing costs only its own rows.
"""

import functools
import importlib
import pathlib
from collections.abc import Callable
from typing import Any

from benchmarks.contender import FSYNC, Contender, Text


class _Verbatim:
    """Serialize bytes as they are."""

    @staticmethod
    def dumps(message: bytes, **_: object) -> bytes:
        """
        Do nothing.

        :param message: to be stored
        :return: the same
        """
        return message

    @staticmethod
    def loads(stored: bytes) -> bytes:
        """
        Do nothing but make it bytes.

        :param stored: as it was stored
        :return: message
        """
        return bytes(stored)


class LocalQueue(Contender):
    """Use ``localqueue.SimpleQueue``."""

    name = distribution = "localqueue"
    receives_batches = False
    can_sleep = True

    def __init__(self, directory: pathlib.Path, durability: str, subscribers: int = 1) -> None:
        """Open the queue; create it if it is not there."""
        del subscribers
        module = importlib.import_module("localqueue")
        mode = module.DurabilityMode
        self._queue = module.SimpleQueue(
            str(directory),
            durability=mode.DURABLE if durability == FSYNC else mode.RELAXED,
            serializer=_Verbatim())
        self.send = self._queue.put

    def send_many(self, messages: list[Any]) -> None:
        """Send messages in one commit."""
        self._queue.put_many(messages)

    def receive(self, count: int) -> list[Any]:
        """Receive messages one by one, and acknowledge each of them."""
        received: list[Any] = []
        for _ in range(count):
            job = self._queue.get()
            received.append(job.data)
            self._queue.ack(job)
        return received

    def sleep_and_receive(self, callback: Callable[[Any], bool]) -> None:
        """Receive messages, asleep while there are none."""
        goes_on = True
        while goes_on:
            job = self._queue.get()
            goes_on = callback(job.data)
            self._queue.ack(job)

    def close(self) -> None:
        """Close the queue."""
        self._queue.close()


class LiteQueue(Contender):
    """Use ``litequeue.LiteQueue``."""

    name = distribution = "litequeue"
    receives_batches = False

    def __init__(self, directory: pathlib.Path, durability: str, subscribers: int = 1) -> None:
        """Open the queue; create it if it is not there."""
        del subscribers
        module = importlib.import_module("litequeue")
        self._queue = module.LiteQueue(str(directory / "queue.db"))
        if durability == FSYNC:
            self._queue.conn.execute("PRAGMA synchronous = FULL")
        self.send = self._queue.put

    def send_many(self, messages: list[Any]) -> None:
        """Send messages in one commit."""
        with self._queue.transaction(mode="IMMEDIATE"):
            for message in messages:
                self._queue.put(message)

    def receive(self, count: int) -> list[Any]:
        """Receive messages one by one, and acknowledge each of them."""
        received: list[Any] = []
        for _ in range(count):
            message = self._queue.pop()
            received.append(message.data)
            self._queue.done(message.message_id)
        return received

    def close(self) -> None:
        """Close the queue."""
        self._queue.close()


class PersistQueue(Contender):
    """Use ``persistqueue.SQLiteAckQueue``."""

    name = distribution = "persist-queue"
    durabilities = (FSYNC, )
    sends_batches = receives_batches = False

    def __init__(self, directory: pathlib.Path, durability: str, subscribers: int = 1) -> None:
        """Open the queue; create it if it is not there."""
        del durability, subscribers
        module = importlib.import_module("persistqueue")
        self._queue = module.SQLiteAckQueue(str(directory), serializer=_Verbatim())
        self.send = self._queue.put

    def receive(self, count: int) -> list[Any]:
        """Receive messages one by one, and acknowledge each of them."""
        received: list[Any] = []
        for _ in range(count):
            item = self._queue.get(raw=True)
            received.append(item["data"])
            self._queue.ack(id=item["pqid"])
        return received

    def close(self) -> None:
        """Close the queue."""
        self._queue.close()


class DiskCache(Contender):
    """Use ``diskcache.Deque``."""

    name = distribution = "diskcache"
    note = "a message is gone when it is taken: at most once"

    def __init__(self, directory: pathlib.Path, durability: str, subscribers: int = 1) -> None:
        """Open the queue; create it if it is not there."""
        del subscribers
        module = importlib.import_module("diskcache")
        cache = module.Cache(str(directory),
                             eviction_policy="none",
                             sqlite_synchronous=2 if durability == FSYNC else 1)
        self._deque = module.Deque.fromcache(cache)
        self.send = self._deque.append

    def send_many(self, messages: list[Any]) -> None:
        """Send messages in one commit."""
        with self._deque.transact():
            self._deque.extend(messages)

    def receive(self, count: int) -> list[Any]:
        """Receive messages one by one, and acknowledge each of them."""
        return [self._deque.popleft() for _ in range(count)]

    def receive_many(self, count: int, batch: int) -> list[Any]:
        """Receive messages in batches that are acknowledged together."""
        received: list[Any] = []
        while len(received) < count:
            with self._deque.transact():
                for _ in range(min(batch, count - len(received))):
                    received.append(self._deque.popleft())
        return received

    def close(self) -> None:
        """Close the queue."""
        self._deque.cache.close()


class Nque(Contender):
    """Use ``nque``: one queue, or one that is copied to up to ten."""

    name = distribution = "nque"
    durabilities = (FSYNC, )
    note = "one consumer process only"
    max_subscribers = 10

    def __init__(self, directory: pathlib.Path, durability: str, subscribers: int = 1) -> None:
        """Open the queue; create it if it is not there."""
        del durability
        module = importlib.import_module("nque")
        limits = {"items_count_max": 10**6, "item_bytes_max": 1 << 12}
        self._names = [f"queue{index}".encode() for index in range(subscribers)]
        self._open = functools.partial(module.FifoMultiQueueLmdb,
                                       str(directory),
                                       queues=tuple(self._names),
                                       **limits)
        self._queue = (module.FifoBasicQueueLmdb(str(directory), **limits)
                       if subscribers == 1 else self._open())
        self.send = lambda message: self._queue.put([message])

    def send_many(self, messages: list[Any]) -> None:
        """Send messages in one commit."""
        self._queue.put(messages)

    def receive(self, count: int) -> list[Any]:
        """Receive messages one by one, and acknowledge each of them."""
        return self.receive_many(count, 1)

    def receive_many(self, count: int, batch: int) -> list[Any]:
        """Receive messages in batches that are acknowledged together."""
        received: list[Any] = []
        while len(received) < count:
            items = self._queue.get(min(batch, count - len(received)))
            received.extend(items)
            self._queue.remove(len(items))
        return received

    def drain(self, subscriber: int, count: int) -> list[Any]:
        """Receive all messages of one of several subscribers."""
        if len(self._names) > 1:
            # LMDB can be opened only once in a process: let go of the one before first.
            self._queue = None
            self._queue = self._open(use=self._names[subscriber])
        return self.receive_many(count, 1000)

    def close(self) -> None:
        """Close the queue."""
        self._queue = None  # It has nothing to close.


class SimpleBroker(Text):
    """Use ``simplebroker.Queue``."""

    name = "SimpleBroker"
    distribution = "simplebroker"
    note = "a message is gone when it is taken: at most once"
    sends_batches = False

    def __init__(self, directory: pathlib.Path, durability: str, subscribers: int = 1) -> None:
        """Open the queue; create it if it is not there."""
        del subscribers
        module = importlib.import_module("simplebroker")
        config = module.resolve_config(
            env={"BROKER_SYNC_MODE": "FULL" if durability == FSYNC else "NORMAL"})
        self._queue = module.Queue("queue",
                                   db_path=str(directory / "queue.db"),
                                   persistent=True,
                                   config=config)
        self.send = self._queue.write

    def receive(self, count: int) -> list[Any]:
        """Receive messages one by one, and acknowledge each of them."""
        return [self._queue.read_one() for _ in range(count)]

    def receive_many(self, count: int, batch: int) -> list[Any]:
        """Receive messages in batches that are acknowledged together."""
        received: list[Any] = []
        while len(received) < count:
            messages = self._queue.read_many(min(batch, count - len(received)))
            received.extend(messages)
            if not messages:
                break
        return received

    def close(self) -> None:
        """Close the queue."""
        self._queue.close()
