"""Say what can be measured: the interface between a measurement and a queue."""

import abc
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

#: Every commit is flushed before the call returns: it survives a power failure.
FSYNC = "fsync"

#: Commits survive only the end of their process, however it is killed.
OS = "os"

DURABILITIES = (FSYNC, OS)


class Unsupported(Exception):
    """Say that a queue can not do what is to be measured."""


class Contender(abc.ABC):
    """
    Use one queue in a directory, by the public interface of its library.

    What a library is given and gives back is converted outside of the measured time.
    """

    #: As in tables.
    name: ClassVar[str]

    #: Distribution whose version is reported; empty: this checkout.
    distribution: ClassVar[str] = ""

    #: Classes of durability that the library offers.
    durabilities: ClassVar[tuple[str, ...]] = DURABILITIES

    #: What a reader has to know to compare.
    note: ClassVar[str] = ""

    #: Whether several messages can be sent, or received, in one commit.
    sends_batches: ClassVar[bool] = True
    receives_batches: ClassVar[bool] = True

    #: How many subscribers can get the same message at most.
    max_subscribers: ClassVar[int] = 1

    #: Whether a receiver can sleep until another process sends.
    can_sleep: ClassVar[bool] = False

    #: Send one message; set by ``__init__``, so that no call of ours is measured.
    send: Callable[[Any], object]

    @abc.abstractmethod
    def __init__(self, directory: pathlib.Path, durability: str, subscribers: int = 1) -> None:
        """
        Open the queue; create it if it is not there.

        :param directory: of the queue, which exists
        :param durability: one of ``durabilities``
        :param subscribers: how many get each message
        """

    @staticmethod
    def encode(messages: list[bytes]) -> list[Any]:
        """
        Convert messages to what is sent.

        :param messages: of ASCII letters and digits
        :return: what the library takes
        """
        return list(messages)

    @staticmethod
    def decode(received: list[Any]) -> list[bytes]:
        """
        Convert back.

        :param received: what the library gave
        :return: messages
        """
        return list(received)

    def send_many(self, messages: list[Any]) -> None:
        """
        Send messages, in one commit if the library can.

        :param messages: encoded
        """
        for message in messages:
            self.send(message)

    @abc.abstractmethod
    def receive(self, count: int) -> list[Any]:
        """
        Receive messages one by one; acknowledge each before the next one.

        :param count: how many; that many are there
        :return: what was received
        """

    def receive_many(self, count: int, batch: int) -> list[Any]:
        """
        Receive messages in batches that are acknowledged together, if the library can.

        :param count: how many; that many are there
        :param batch: how many at once
        :return: what was received
        """
        del batch
        return self.receive(count)

    def drain(self, subscriber: int, count: int) -> list[Any]:
        """
        Receive all messages of one of several subscribers.

        :param subscriber: from 0 on
        :param count: how many there are
        :return: what was received
        """
        if subscriber:
            raise Unsupported("one subscriber only")
        return self.receive_many(count, 1000)

    def wake_with_sends(self) -> None:
        """Have each send from now on wake who sleeps, if sends do not do so anyhow."""

    def sleep_and_receive(self, callback: Callable[[Any], bool]) -> None:
        """
        Receive messages, asleep while there are none.

        :param callback: called with each message; returns False to end
        """
        del callback
        raise Unsupported("no receiver that sleeps")

    @abc.abstractmethod
    def close(self) -> None:
        """Close the queue."""


class Text(Contender):  # pylint: disable=abstract-method
    """Convert for a library that stores text."""

    @staticmethod
    def encode(messages: list[bytes]) -> list[Any]:
        """Convert messages to text."""
        return [message.decode("ascii") for message in messages]

    @staticmethod
    def decode(received: list[Any]) -> list[bytes]:
        """Convert text back to messages."""
        return [message.encode("ascii") for message in received]
