"""
Put and delete in LMDB without any library: the limit of what can be reached.

Only for waiting, which Python has no binding for, the binding of this library is taken.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import lmdb

from benchmarks import contender
from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.notifier import Notifier

_MAP_BYTES = 1 << 36


class Bare(contender.Contender):
    """
    Keep messages under consecutive numbers.

    One put and one commit for each send; one look, then one delete and one commit for each
    message received. There are no subscribers, no claims, no checks and no limits.
    """

    name = "bare LMDB"
    distribution = "lmdb"
    note = "a loop of puts and deletes, no library"
    max_subscribers = 10**9
    can_sleep = True

    def __init__(self, directory: pathlib.Path, durability: str, subscribers: int = 1) -> None:
        """
        Open the environment; create it if it is not there.

        :param directory: of the environment, which exists
        :param durability: ``fsync``: LMDB's default; ``os``: ``sync=False``
        :param subscribers: makes no difference
        """
        del subscribers
        # The engine and the options of the library, so that only the library is the difference.
        self._environment = lmdb.open(str(directory),
                                      map_size=_MAP_BYTES,
                                      lib_version=0,
                                      sync=durability == contender.FSYNC)
        self.send = self._put
        self._notifier = Notifier(SharedPage(str(directory)))

    def _put(self, message: bytes) -> None:
        """
        Put a message behind the last one.

        :param message: to be put
        """
        with self._environment.begin(write=True, buffers=True) as txn:
            cursor = txn.cursor()
            number = int.from_bytes(cursor.key(), "big") + 1 if cursor.last() else 1
            cursor.put(number.to_bytes(8, "big"), message, append=True)

    def wake_with_sends(self) -> None:
        """Have each send wake those who sleep on a futex."""
        self.send = self._put_and_wake

    def _put_and_wake(self, message: bytes) -> None:
        """
        Put a message behind the last one, and wake who sleeps.

        :param message: to be put
        """
        self._put(message)
        self._notifier.notify()

    def sleep_and_receive(self, callback: Callable[[Any], bool]) -> None:
        """Receive messages one by one, asleep while there are none."""
        goes_on = True
        while goes_on:
            stamp = self._notifier.arm()
            number, message = self._look()
            if number is None:
                self._notifier.wait(stamp, 1.0)
            else:
                goes_on = callback(message)
                with self._environment.begin(write=True) as txn:
                    txn.delete(number)

    def _look(self) -> tuple[bytes | None, bytes]:
        """
        Look at the first message.

        :return: its key, None if there is none, and the message
        """
        with self._environment.begin(buffers=True) as txn:
            cursor = txn.cursor()
            return (bytes(cursor.key()), bytes(cursor.value())) if cursor.first() else (None, b"")

    def send_many(self, messages: list[Any]) -> None:
        """Send messages in one commit."""
        with self._environment.begin(write=True, buffers=True) as txn:
            cursor = txn.cursor()
            number = int.from_bytes(cursor.key(), "big") + 1 if cursor.last() else 1
            for message in messages:
                cursor.put(number.to_bytes(8, "big"), message, append=True)
                number += 1

    def receive(self, count: int) -> list[Any]:
        """Receive messages one by one, and acknowledge each of them."""
        received: list[Any] = []
        begin = self._environment.begin
        for _ in range(count):
            with begin(buffers=True) as txn:
                cursor = txn.cursor()
                cursor.first()
                key, message = bytes(cursor.key()), bytes(cursor.value())
            received.append(message)
            with begin(write=True) as txn:
                txn.delete(key)
        return received

    def receive_many(self, count: int, batch: int) -> list[Any]:
        """Receive messages in batches that are acknowledged together."""
        received: list[Any] = []
        begin = self._environment.begin
        while len(received) < count:
            wanted = min(batch, count - len(received))
            with begin(buffers=True) as txn:
                for _, message in zip(range(wanted), txn.cursor().iternext(keys=False)):
                    received.append(bytes(message))
            with begin(write=True, buffers=True) as txn:
                cursor = txn.cursor()
                cursor.first()
                for _ in range(wanted):
                    cursor.delete()
        return received

    def drain(self, subscriber: int, count: int) -> list[Any]:
        """Receive all messages of one of several subscribers."""
        return [] if subscriber else self.receive_many(count, 1000)

    def close(self) -> None:
        """Close the queue."""
        self._environment.close()
