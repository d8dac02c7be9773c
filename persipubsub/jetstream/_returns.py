"""
Give messages of one consumer back to the servers: in order, and before anybody pulls again.

The servers deliver what is given back in the order in which it comes to them, before all that was
not delivered yet. Whoever pulls waits for what is on its way, or later messages would overtake it.

One task gives back what several have, and looks at nothing before no inbox may bring more: if each
gave back its own, what one of them has would come behind what another one gave back meanwhile.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import nats.errors

import persipubsub.errors
from persipubsub.jetstream import _errors, _inboxes, _link

#: A message that can not be given back within so many seconds is delivered again after ack_wait.
_GIVE_BACK_SECS: Final = 2.0

#: Who pulls waits so long for what is given back, or as long as for a message, in seconds.
SETTLE_SECS: Final = 0.5


class Returns:
    """Give messages back, for any number of coroutines."""

    def __init__(self, link: _link.Link,
                 pull: Callable[[int], Coroutine[Any, Any, list[_inboxes.Pulled]]]) -> None:
        """
        Initialize with nothing to be given back.

        :param link: to the servers
        :param pull: takes so many messages that are there
        """
        self._link = link
        self._pull = pull
        #: Numbers of messages that were given back and did not come again since, as far as we know
        #: (others may have them), and when. They are delivered next, in the order of their giving
        #: back.
        self.given: dict[int, float] = {}
        # What ends the use of inboxes, and may find messages in them.
        self._endings: set[asyncio.Task[None]] = set()
        # What waits for that, since what is found may be in front of it; and what gives it back.
        self._waiting: list[_inboxes.Pulled] = []
        self._giver: asyncio.Task[None] | None = None

    def note(self, pulled: _inboxes.Pulled, asked: float) -> None:
        """
        Note that a message came.

        :param pulled: the message
        :param asked: when it was asked for, on our monotonic clock
        """
        if pulled.attempts == 1 and self.given:
            # It comes behind all that was given back by then.
            self.given = {number: since for number, since in self.given.items() if since > asked}
        self.given.pop(pulled.number, None)

    def begin(self, ending: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """
        Begin what is not cancelled with whoever begins it, and what nobody pulls beside.

        :param ending: of the use of an inbox, or of having messages
        :return: its task; nobody has to wait for it
        """
        task = asyncio.ensure_future(ending)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        # Nobody may ask how it went.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    async def settle(self, timeout: float | None = None) -> None:
        """
        Wait until what is given back is with the servers, or was given up.

        Who gives it back does not wait for itself when it pulls.

        :param timeout: how long, in seconds; None: as long as it takes
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while pending := (self._endings | self._giving()) - {asyncio.current_task()}:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            await asyncio.wait(pending, timeout=left)

    def give_back(self, pulled: list[_inboxes.Pulled]) -> None:
        """
        Let others have messages. It waits for nothing, and raises nothing.

        To raise an error if the servers can not be told was rejected: it would take the place of
        what is the reason to give messages back, and they are delivered again after ack_wait.

        :param pulled: messages
        """
        self._waiting += pulled
        if self._waiting and not self._giving():
            self._giver = asyncio.ensure_future(self._give())

    def _giving(self) -> "set[asyncio.Task[None]]":
        """Find what gives back, or is about to, however the last one ended."""
        return {self._giver} if self._giver is not None and not self._giver.done() else set()

    async def _give(self) -> None:
        """Give back what waits, in order, as soon as no inbox may bring more of it."""
        pulled: list[_inboxes.Pulled] = []
        while self._waiting or pulled:
            while self._endings:
                await asyncio.wait(list(self._endings))
            pulled, self._waiting = pulled + self._waiting, []
            pulled.sort(key=lambda one: one.number)
            if max(self.given, default=0) > pulled[0].number:
                # What was given back before would come before it. More may wait by then.
                pulled += await self._pull_given()
                continue
            with contextlib.suppress(persipubsub.errors.PersipubsubError, nats.errors.Error,
                                     OSError):
                await self._refuse(pulled, time.monotonic() + _GIVE_BACK_SECS)
            pulled = []

    async def _pull_given(self) -> list[_inboxes.Pulled]:
        """
        Pull what was given back. It raises nothing.

        :return: messages, perhaps others among them
        """
        given, found = list(self.given), []  # type: list[int], list[_inboxes.Pulled]
        with contextlib.suppress(persipubsub.errors.PersipubsubError, _errors.ApiError,
                                 nats.errors.Error, OSError):
            found = await self._pull(len(given))
        if len(found) < len(given):
            # The rest is with others, or no server is there.
            for number in given:
                self.given.pop(number, None)
        return found

    async def refuse(self, pulled: list[_inboxes.Pulled], seconds: float = _GIVE_BACK_SECS) -> None:
        """
        Let others have messages, and wait until the servers know.

        :param pulled: messages
        :param seconds: how long to wait at most
        :raise UnavailableError: if there was no answer in time
        """
        await asyncio.shield(self.begin(self._refuse(pulled, time.monotonic() + seconds)))

    async def _refuse(self, pulled: list[_inboxes.Pulled], deadline: float) -> None:
        """
        Let others have messages, and wait until the servers know.

        :param pulled: messages
        :param deadline: on the monotonic clock
        """
        self.given.update((one.number, time.monotonic()) for one in pulled)
        # In order: the first one is the next that is delivered again.
        for found in await asyncio.gather(*(self._link.request(one.reply, b"-NAK", deadline)
                                            for one in pulled),
                                          return_exceptions=True):
            if isinstance(found, BaseException):
                raise found
