"""
Use the two peers of ``honker``, by its public interface.

They are in a module of their own as one of them needs asyncio, which costs memory.
"""

import asyncio
import importlib
import pathlib
from collections.abc import Callable
from typing import Any

from benchmarks.contender import OS, Text


class HonkerQueue(Text):
    """Use a queue of ``honker``."""

    name = "honker queue"
    distribution = "honker"
    durabilities = (OS, )

    def __init__(self, directory: pathlib.Path, durability: str, subscribers: int = 1) -> None:
        """Open the queue; create it if it is not there."""
        del durability, subscribers
        module = importlib.import_module("honker")
        self._database = module.open(str(directory / "queue.db"))
        self._queue = self._database.queue("queue")
        self.send = self._queue.enqueue

    def send_many(self, messages: list[Any]) -> None:
        """Send messages in one commit."""
        with self._database.transaction() as transaction:
            for message in messages:
                self._queue.enqueue(message, tx=transaction)

    def receive(self, count: int) -> list[Any]:
        """Receive messages one by one, and acknowledge each of them."""
        received: list[Any] = []
        for _ in range(count):
            job = self._queue.claim_one("worker")
            received.append(job.payload)
            job.ack()
        return received

    def receive_many(self, count: int, batch: int) -> list[Any]:
        """Receive messages in batches that are acknowledged together."""
        received: list[Any] = []
        while len(received) < count:
            jobs = self._queue.claim_batch("worker", min(batch, count - len(received)))
            received.extend(job.payload for job in jobs)
            self._queue.ack_batch([job.id for job in jobs], "worker")
            if not jobs:
                break
        return received

    def close(self) -> None:
        """Close the queue."""
        self._database.close()


class HonkerStream(Text):
    """Use a stream of ``honker``: consumers remember how far they have come."""

    name = "honker stream"
    distribution = "honker"
    durabilities = (OS, )
    max_subscribers = 10**9
    can_sleep = True

    def __init__(self, directory: pathlib.Path, durability: str, subscribers: int = 1) -> None:
        """Open the queue; create it if it is not there."""
        del durability, subscribers
        module = importlib.import_module("honker")
        self._database = module.open(str(directory / "queue.db"))
        self._stream = self._database.stream("stream")
        self.send = self._stream.publish

    def send_many(self, messages: list[Any]) -> None:
        """Send messages in one commit."""
        with self._database.transaction() as transaction:
            for message in messages:
                self._stream.publish(message, tx=transaction)

    async def _consume(self, consumer: str, batch: int, callback: Callable[[Any], bool]) -> None:
        """
        Read a stream and save the offset after every batch.

        :param consumer: who reads
        :param batch: after how many messages the offset is saved
        :param callback: called with each message; returns False to end
        """
        unsaved = 0
        async for event in self._stream.subscribe(consumer, save_every_n=0, save_every_s=0):
            goes_on = callback(event.payload)
            unsaved += 1
            if unsaved == batch or not goes_on:
                self._stream.save_offset(consumer, event.offset)
                unsaved = 0
            if not goes_on:
                return

    def _collect(self, consumer: str, count: int, batch: int) -> list[Any]:
        """
        Receive messages.

        :param consumer: who reads
        :param count: how many messages
        :param batch: how many are acknowledged together
        :return: messages
        """
        received: list[Any] = []

        def collect(message: Any) -> bool:
            received.append(message)
            return len(received) < count

        asyncio.run(self._consume(consumer, batch, collect))
        return received

    def receive(self, count: int) -> list[Any]:
        """Receive messages one by one, and acknowledge each of them."""
        return self._collect("consumer0", count, 1)

    def receive_many(self, count: int, batch: int) -> list[Any]:
        """Receive messages in batches that are acknowledged together."""
        return self._collect("consumer0", count, batch)

    def drain(self, subscriber: int, count: int) -> list[Any]:
        """Receive all messages of one of several subscribers."""
        return self._collect(f"consumer{subscriber}", count, 1000)

    def sleep_and_receive(self, callback: Callable[[Any], bool]) -> None:
        """Receive messages, asleep while there are none."""
        asyncio.run(self._consume("consumer0", 1, callback))

    def close(self) -> None:
        """Close the queue."""
        self._database.close()
