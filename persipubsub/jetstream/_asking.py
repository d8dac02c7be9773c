"""
Ask over one connection, one after the other in the order in which they began, and take the answers.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Mapping
from typing import Any, Optional

import nats.aio.client
import nats.aio.msg
import nats.errors

from persipubsub.jetstream import _clients


class Line:
    """Let one after the other go on, whoever drew its ticket first; they may come at any time."""

    def __init__(self) -> None:
        """Initialize with nobody in line."""
        self._tickets = itertools.count()
        self._is_taken = False
        self._turns: list[tuple[int, asyncio.Future[None]]] = []

    def draw(self) -> int:
        """
        Draw a ticket, with which one may get in line any number of times, one after the other.

        :return: the ticket
        """
        return next(self._tickets)

    def is_empty(self) -> bool:
        """
        Tell whether nobody is in line.

        :return: True if so
        """
        return not self._is_taken

    def is_first(self, ticket: int) -> bool:
        """
        Tell whether nobody who waits is to go on before somebody whose turn it is.

        :param ticket: whose turn it is
        :return: True if so
        """
        while self._turns and self._turns[0][1].done():
            heapq.heappop(self._turns)
        return not self._turns or self._turns[0][0] > ticket

    async def enter(self, ticket: int, timeout: float) -> None:
        """
        Wait for one's turn.

        :param ticket: that was drawn
        :param timeout: how long to wait, in seconds
        :raise TimeoutError: if the turn did not come in time
        """
        if not self._is_taken:
            self._is_taken = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._turns, (ticket, turn))
        try:
            async with asyncio.timeout(timeout):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.leave()  # it came at that moment
            turn.cancel()
            raise

    def leave(self) -> None:
        """Let the next one go on."""
        while self._turns:
            _, turn = heapq.heappop(self._turns)
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False


class Question:
    """
    Ask one thing over one connection, once or several times: any answer is one.

    The answer is None if the connection was lost.
    """

    def __init__(self, answers: "Answers") -> None:
        """
        Initialize without asking.

        :param answers: of the connection
        """
        self.answers = answers
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._reply = answers.expect(self.answer)

    async def ask(self, subject: str, payload: bytes, headers: Mapping[str, str] | None,
                  timeout: float) -> None:
        """
        Ask, and wait for the answer, which may be there already.

        :param subject: of the request
        :param payload: of the request
        :param headers: of the request
        :param timeout: how long to wait, in seconds
        """
        if not self.answer.done():
            await self.answers.client.publish(subject,
                                              payload,
                                              self._reply,
                                              headers=dict(headers) if headers else None)
            await asyncio.wait((self.answer, ), timeout=timeout)

    async def until_read(self, deadline: float) -> None:
        """
        Wait until the server has read what was asked, or the connection is another one.

        Before that there is no use in asking again: over a slow connection, what is asked again
        would be in the way of all that follows.

        :param deadline: on the monotonic clock
        """
        client = self.answers.client
        # Not flush(): if its answer comes too late, the client stops reading. And not the client's
        # own ping, which goes in front of what is still to be written.
        read: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # pylint: disable=protected-access
        client._pongs.append(read)
        await client._send_command(b"PING\r\n")
        await client._flush_pending()
        await asyncio.wait((self.answer, read),
                           timeout=max(0.0, deadline - time.monotonic()),
                           return_when=asyncio.FIRST_COMPLETED)

    def result(self) -> nats.aio.msg.Msg:
        """
        Tell the answer.

        :return: the answer
        :raise TimeoutError: if there is none
        :raise StaleConnectionError: if the connection was lost
        """
        if not self.answer.done():
            raise nats.errors.TimeoutError
        message: nats.aio.msg.Msg | None = self.answer.result()
        if message is None:
            raise nats.errors.StaleConnectionError
        return message

    def again(self, takes_late: bool) -> "Optional[Question]":
        """
        Get ready to be asked again.

        :param takes_late: False to take no answer to what was asked so far
        :return: itself; None if another one is to be asked, as this one has an answer that was none
        """
        if takes_late and not self.answer.done():
            return self
        self.end()
        return None

    def end(self) -> None:
        """Wait for no answer any more."""
        self.answers.forget(self._reply)


class Answers:
    """
    Take the answers that come over one connection.

    The client's own way of asking was rejected: it does not take an answer that comes late, so that
    over a slow connection what is asked again and again is never answered.
    """

    def __init__(self, client: nats.aio.client.Client) -> None:
        """
        Initialize without listening.

        :param client: of the connection
        """
        self.client = client
        self._prefix = f"{client.new_inbox()}."
        self._tokens = itertools.count()
        self._futures: dict[str, asyncio.Future[Any]] = {}

    async def listen(self) -> "Answers":
        """
        Begin to listen.

        :return: itself
        """
        await self.client.subscribe(f"{self._prefix}*", cb=self._take)
        return self

    async def _take(self, message: nats.aio.msg.Msg) -> None:
        """
        Take what came.

        :param message: an answer, perhaps to what nobody waits for any more
        """
        future = self._futures.get(message.subject)
        if future is not None and not future.done():
            future.set_result(message)
        _clients.heard(self.client)

    def expect(self, future: "asyncio.Future[Any]") -> str:
        """
        Wait for an answer.

        :param future: of the answer
        :return: subject to answer at
        """
        reply = self._prefix + str(next(self._tokens))
        self._futures[reply] = future
        return reply

    def lose(self) -> None:
        """Tell all who wait that the connection was lost."""
        for future in self._futures.values():
            if not future.done():
                future.set_result(None)

    def forget(self, reply: str) -> None:
        """
        Wait for an answer no more.

        :param reply: subject of the answer
        """
        self._futures.pop(reply, None)


def is_nobody(message: nats.aio.msg.Msg) -> bool:
    """
    Tell whether a server says that nobody is there to answer.

    :param message: answer
    :return: True if so
    """
    return not message.data and (message.headers or {}).get("Status") == "503"
