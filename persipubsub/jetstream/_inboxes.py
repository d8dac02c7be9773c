"""
Listen for the messages that pulls bring.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import collections
import contextlib
import datetime
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import nats.aio.client
import nats.aio.msg
import nats.errors

import persipubsub.message
from persipubsub.jetstream import _clients

#: The end of a subscription is waited for so long, in seconds.
_CLOSE_SECS: Final = 1.0

#: Others go on after so many words to the servers, which may be thousands.
_TOLD_AT_ONCE: Final = 512

#: A pull that is refused. Rejected: one of so few bytes that no message fits. It moves the next
#: message behind the others that were given back.
_NOTHING: Final = b"{"

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class Pulled(NamedTuple):
    """Hold a message that the servers gave to us."""

    data: bytes
    reply: str  #: subject to acknowledge it at
    number: int  #: in the stream
    attempts: int  #: deliveries, this one included
    time_ns: int  #: when it was stored, on the clock of the servers
    arrived: float  #: on our monotonic clock
    pending: int  #: messages behind it that the server had not delivered then


class Inbox:
    """Hold what pulls brought."""

    def __init__(self, client: nats.aio.client.Client) -> None:
        """
        Initialize without listening.

        :param client: of the connection
        """
        self.client = client
        self.name = client.new_inbox()
        self.messages: collections.deque[Pulled] = collections.deque()
        self.statuses: collections.deque[dict[str, str]] = collections.deque()
        self.changed = asyncio.Event()
        #: Pulls whose end was not seen yet: they may bring something.
        self.pulls = 0
        #: When the last pull began, on our monotonic clock.
        self.asked = 0.0
        #: Messages that the last pull ends with; 0 if it goes on until there is one.
        self.wanted_now = 0
        #: Whether the last pull ended before it could bring all that was there.
        self.has_more = False
        self._subscription: Any = None

    async def listen(self) -> "Inbox":
        """
        Begin to listen.

        :return: itself
        """
        self._subscription = await self.client.subscribe(self.name, cb=self._take)
        return self

    async def _take(self, message: nats.aio.msg.Msg) -> None:
        """
        Take what came.

        :param message: from a stream, or the status of a pull
        """
        if message.reply:
            self.messages.append(to_pulled(message.data, message.reply))
        else:
            # Some of the names are of an enumeration, of which ``str`` makes another one.
            self.statuses.append({
                str(getattr(key, "value", key)): value
                for key, value in (message.headers or {}).items()
            })
        self.changed.set()
        _clients.heard(self.client)

    async def keep(self, ack_wait_secs: float) -> None:
        """
        Tell the servers that what came is at work, if the first of it waits for the rest for long.

        What is not told in time may be with another consumer by now.

        :param ack_wait_secs: how long the servers wait until they deliver again, in seconds
        """
        now = time.monotonic()
        age = now - self.messages[0].arrived if self.messages else 0.0
        if not ack_wait_secs / 4 <= age <= ack_wait_secs / 2:
            return
        kept = list(self.messages)
        await keep(self.client, kept)
        # What came meanwhile is behind them.
        for place, pulled in enumerate(kept):
            self.messages[place] = pulled._replace(arrived=now)

    async def close(self, subject: str) -> None:
        """
        Stop listening; if a pull may still bring something, take what comes until it is over.

        That the server knows is not enough: what it had begun to send comes behind that, and
        nobody would take it. What it answers to a pull comes last. An answer is waited for for a
        second; of a cluster, another server may send still later.

        ``drain`` and ``flush`` of nats-py were rejected: the first forgets the subscription too
        early, and if either is cancelled, or its answer comes too late, the client stops reading.

        :param subject: of pulls for the same messages
        """
        try:
            if self.pulls:
                with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError, OSError):
                    async with asyncio.timeout(_CLOSE_SECS):
                        # pylint: disable-next=protected-access
                        await self.client._send_unsubscribe(self._subscription._id)
                        await self.client.request(subject, _NOTHING, timeout=_CLOSE_SECS)
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._subscription.unsubscribe()


async def tell(client: nats.aio.client.Client, pulled: Pulled, what: bytes) -> None:
    """
    Say something about a message, without waiting for an answer.

    :param client: of the connection
    :param pulled: message
    :param what: ``+ACK`` or ``+WPI``; for ``-NAK``, see :py:mod:`persipubsub.jetstream._returns`
    """
    try:
        await client.publish(pulled.reply, what)
    except (nats.errors.Error, OSError):
        pass  # the server delivers it again after ack_wait


async def keep(client: nats.aio.client.Client, pulled: Sequence[Pulled]) -> None:
    """
    Say that messages are at work.

    :param client: of the connection
    :param pulled: messages
    """
    for begin in range(0, len(pulled), _TOLD_AT_ONCE):
        for one in pulled[begin:begin + _TOLD_AT_ONCE]:
            await tell(client, one, b"+WPI")
        # Nothing of that suspends us.
        await asyncio.sleep(0)


def to_pulled(data: bytes, reply: str) -> Pulled:
    """
    Read what the server writes into the reply subject of a message.

    :param data: of the message
    :param reply: ``$JS.ACK.stream.consumer.deliveries.number.order.time.pending``, where a domain
        and an account may stand in front of the stream
    :return: message

    >>> to_pulled(b"", "$JS.ACK.Q.sub.2.7.9.1795545064100655688.3")[2:5]
    (7, 2, 1795545064100655688)
    """
    parts = reply.split(".")
    first = 4 if len(parts) == 9 else 6
    return Pulled(data=data,
                  reply=reply,
                  number=int(parts[first + 1]),
                  attempts=int(parts[first]),
                  time_ns=int(parts[first + 3]),
                  arrived=time.monotonic(),
                  pending=int(parts[first + 4]))


def to_message(pulled: Pulled) -> persipubsub.message.Message:
    """
    Tell what is known of a message.

    :param pulled: message
    :return: it, with its number in the stream
    """
    return persipubsub.message.Message(data=pulled.data,
                                       number=pulled.number,
                                       sent_at=_EPOCH +
                                       datetime.timedelta(microseconds=pulled.time_ns // 1000),
                                       attempts=pulled.attempts)
