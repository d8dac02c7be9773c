"""
Pull messages of one subscriber ahead, while whoever receives them is quick.

A pull is a round trip. A consumer that receives in a loop pulls one message at first, then twice as
many as the last time, and hands them out one after the other. What it has beside the one at work is
held for a fraction of a second at most, so that nobody else waits for it: it is given back when
that time is over, when the consumer fails, skips, clears or closes, and at the end of the program.

To say *at work* for what is held, so that it may be held longer, was rejected: a process that stops
asking would sit on messages that others could work on.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import collections
import functools
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Final

import nats.errors

import persipubsub.errors
from persipubsub.jetstream import (_acknowledging, _calls, _errors, _inboxes, _keeping, _loop,
                                   _pulling, _returns, _settings, _waiting)

#: Messages that are pulled at once, at most.
_MOST_MESSAGES: Final = 64

#: ... and their bytes, with what the server counts beside them. A larger one is pulled by itself. A
#: prime number, as that of larger pulls.
_MOST_BYTES: Final = (1 << 20) - 3

#: No more is pulled than the consumer has handled within this time so far, in seconds.
_QUICK_SECS: Final = 0.1

#: What is not asked for within this time is given back, in seconds; within a part of ack_wait, so
#: that the rest of it remains for the first word that a message is at work.
_HOLD_SECS: Final = 0.25
_HOLD_SHARE: Final = 0.25


class Ahead:
    """Hold what was pulled ahead for one consumer in this process."""

    def __init__(self, ports: _calls.Ports, settings: _settings.Settings, durable: str) -> None:
        """
        Initialize with nothing pulled.

        :param ports: of the queue
        :param settings: of the queue
        :param durable: name of the consumer at the servers
        """
        self.place = (settings.address.stream, durable)
        self.puller = _pulling.Puller(ports.stream, settings, durable)
        #: Takes messages of which none are held.
        self.waiting = _waiting.Waiting(self.puller)
        self._durable = durable
        self._stream = ports.stream
        self._loop = ports.loop
        self._hold_secs = min(_HOLD_SECS, _HOLD_SHARE * settings.address.ack_wait_secs)
        self._ack_wait_secs = settings.address.ack_wait_secs
        # Guards what is held, and the pull for it, while something is awaited. Who takes waits
        # until what is given back is with the server: later messages would overtake it otherwise.
        self._lock = asyncio.Lock()
        self._held: collections.deque[_inboxes.Pulled] = collections.deque()
        self._timer: asyncio.TimerHandle | None = None
        self._refill: asyncio.Task[None] | None = None
        # Handed out, and to be given back before anything else is handed out; and what gives back.
        self._returning: list[_inboxes.Pulled] = []
        self._giving: asyncio.Task[None] | None = None
        # Before which moment nothing of what is held can have been delivered.
        self._asked = 0.0
        # Of the last pull: when it was done, what it brought, and how many were handed out.
        self._came = 0.0
        self._count = self._handed_out = 0
        # Messages that the server had behind those, and whether it had more to deliver again.
        self._pending = 0
        self._is_again = False
        _of(ports.loop).add(self)

    # Taking

    async def take(self, timeout: float | None, max_messages: int,
                   is_alone: bool) -> list[_inboxes.Pulled]:
        """
        Take messages, of those that are held first.

        :param timeout: how long to wait, in seconds; None: for ever
        :param max_messages: how many to take at most
        :param is_alone: True if nobody else in this process has a message, or waits for one
        :return: messages; none if there was none in time
        """
        async with self._lock:
            await self._settle()
            if max_messages == 1 and is_alone and not self._held and self._wanted() > 1:
                self._refill = asyncio.ensure_future(self._pull(self._wanted()))
                # Nobody may ask any more how it went.
                self._refill.add_done_callback(lambda task: task.cancelled() or task.exception())
                await self._settle()
            held = self._take(max_messages)
        if len(held) == max_messages:
            return held
        if not held:
            if max_messages > 1:
                return await self._take_many(timeout, max_messages)
            pulled = await self.waiting.take(timeout)
            if pulled:
                self._note(pulled)
                self._handed_out = 1
            return pulled
        try:
            async with _keeping.kept(self._stream, held):
                held += await self.waiting.take_now(max_messages - len(held))
            return held
        except BaseException:
            self.puller.returns.give_back(held)
            raise

    async def _take_many(self, timeout: float | None, max_messages: int) -> list[_inboxes.Pulled]:
        """
        Take messages, with nothing held; those that are there at once.

        :param timeout: how long to wait for the first one, in seconds; None: for ever
        :param max_messages: how many to take at most
        :return: messages; none if there was none in time
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pulled = await self.waiting.take_now(max_messages)
        if pulled or timeout == 0:
            return pulled
        pulled = await self.waiting.take(None if deadline is None else deadline - time.monotonic())
        try:
            async with _keeping.kept(self._stream, pulled):
                pulled += await self.waiting.take_now(max_messages - 1) if pulled else []
            return pulled
        except BaseException:
            self.puller.returns.give_back(pulled)
            raise

    async def front(self) -> _inboxes.Pulled | None:
        """
        Look at what is handed out next.

        :return: message; None if nothing is held
        """
        async with self._lock:
            await self._settle()
            return next((one for one in self._held if not self.puller.is_expired(one)), None)

    async def take_all(self) -> list[_inboxes.Pulled]:
        """
        Take what is held.

        :return: messages, in order
        """
        async with self._lock:
            await self._settle()
            return self._take(len(self._held))

    def _take(self, count: int) -> list[_inboxes.Pulled]:
        """
        Take some of what is held.

        :param count: how many at most
        :return: messages, in order, without those that are too old
        """
        taken, expired = [], []  # type: list[_inboxes.Pulled], list[_inboxes.Pulled]
        while self._held and len(taken) < count:
            one = self._held.popleft()
            (expired if self.puller.is_expired(one) else taken).append(one)
        self._handed_out += len(taken)
        if expired:
            self._loop.start(self.puller.drop(expired))
        if not self._held and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return taken

    def _wanted(self) -> int:
        """
        Tell how much to pull.

        :return: how many messages; 1 if nothing is to be pulled ahead
        """
        if not self._handed_out or self._is_again:
            # Of what is delivered again, one that does not fit would be put behind all others.
            return 1
        pace = max(1e-6, (time.monotonic() - self._came) / self._handed_out)
        # Of what is there, half stays for others: they may have nothing to do.
        return min(2 * self._count, _MOST_MESSAGES, int(_QUICK_SECS / pace),
                   (self._pending + 1) // 2)

    async def _pull(self, count: int) -> None:
        """
        Pull ahead.

        :param count: how many messages
        """
        self._asked = time.monotonic()
        # What comes for a task that was cancelled is in front of it.
        pulled = await self.waiting.take_now(count, _MOST_BYTES)
        self._note(pulled)
        self._held.extend(pulled)
        if pulled:
            self._timer = self._loop.start_later(self._hold_secs, self._let_go)

    async def _settle(self) -> None:
        """
        Wait for what is pulled, while the lock is held.

        It is not cancelled with who began it: what it brings is for whoever takes next, or is given
        back when it was held for long enough. Nothing is handed out that was held for longer,
        whatever kept the timer from being called.
        """
        if self._refill is not None:
            await asyncio.wait([self._refill])
            refill, self._refill = self._refill, None
            refill.result()
        if self._giving or self._returning or (self._held and self._age() > self._hold_secs):
            await self._give_all_back()

    def _note(self, pulled: list[_inboxes.Pulled]) -> None:
        """
        Remember how a pull went.

        :param pulled: what it brought
        """
        self._came = time.monotonic()
        self._count, self._handed_out = len(pulled), 0
        self._pending = pulled[-1].pending if pulled else 0
        self._is_again = bool(pulled) and pulled[-1].attempts > 1

    # Giving back

    def _age(self) -> float:
        """
        Tell since when something may be held.

        :return: in seconds
        """
        return time.monotonic() - self._asked

    def _let_go(self) -> None:
        """Give back what nobody asked for in time."""
        self._timer = None
        self._loop.start(self.give_back())

    def begin_give_back(self, pulled: Sequence[_inboxes.Pulled]) -> "asyncio.Task[None]":
        """
        Give back messages, with those that are held behind them, so that they stay in order.

        Whoever takes next waits for that. To hold them instead was rejected: others wait for them
        at the servers.

        :param pulled: messages that were handed out
        :return: done when the server has them; it raises nothing
        """
        self._returning += pulled
        return self._loop.start(self.give_back())

    async def give_back(self) -> None:
        """Give back what is held, and wait until the server has it. It raises nothing."""
        async with self._lock:
            try:
                await self._settle()
            except (persipubsub.errors.PersipubsubError, _errors.ApiError, nats.errors.Error,
                    OSError):
                pass  # the pull failed, and whoever takes next will see why
            await self._give_all_back()

    async def _give_all_back(self) -> None:
        """Give back what is to be given back, while the lock is held."""
        # Not left half done by a task that is cancelled, and not done beside another.
        while self._giving or self._held or self._returning:
            if self._giving is None:
                self._giving = asyncio.ensure_future(self._give_back())
            await asyncio.wait([self._giving])
            self._giving = None

    async def _give_back(self) -> None:
        """Give back what was handed out in vain, what is held, and what would be between them."""
        is_with_others = self._age() > self._ack_wait_secs / 2
        held = self._take(len(self._held))
        # One message at first, the next time.
        self._handed_out = 0
        # If it was held for so long, the server may have given it to another.
        pulled, self._returning = self._returning + ([] if is_with_others else held), []
        if pulled:
            self.puller.returns.give_back(pulled)
            await self.puller.returns.settle()

    async def acknowledge(self, pulled: Sequence[_inboxes.Pulled], deadline: float) -> None:
        """
        Acknowledge messages that were handed out, and wait until the servers have it.

        :param pulled: messages
        :param deadline: on the monotonic clock
        :raise UnavailableError: if there was no answer in time; they are delivered again
        """
        await _acknowledging.acknowledge(self.puller, self._stream, self._durable, pulled, deadline)

    async def close(self, pulled: Sequence[_inboxes.Pulled]) -> None:
        """
        Give back what is held, and pull nothing any more.

        :param pulled: messages that were handed out, to be given back as well
        """
        _of(self._loop).discard(self)
        giving = self.begin_give_back(pulled)
        # That servers are away is no reason to let those wait who wait for messages.
        await asyncio.wait([giving], timeout=_returns.SETTLE_SECS)
        await self.puller.close()
        await asyncio.wait([giving])
        await self.waiting.close()
        await self.puller.returns.settle()


#: What is open in this process. Only the loop's own thread changes it.
_ALL: weakref.WeakKeyDictionary[_loop.Loop, weakref.WeakSet[Ahead]] = weakref.WeakKeyDictionary()


def _of(loop: _loop.Loop) -> "weakref.WeakSet[Ahead]":
    """
    Find what is open in a process.

    :param loop: of the process
    :return: to be changed
    """
    found = _ALL.get(loop)
    if found is None:
        found = _ALL[loop] = weakref.WeakSet()
        loop.givers.append(functools.partial(give_back_all, found))
    return found


async def give_back_all(aheads: Iterable[Ahead]) -> None:
    """
    Give back what is held, and wait until the server has it. It raises nothing.

    :param aheads: of one process
    """
    found = list(aheads)
    await asyncio.gather(*(ahead.give_back() for ahead in found))
    await asyncio.gather(*(ahead.puller.returns.settle(_returns.SETTLE_SECS) for ahead in found))


async def give_back_of(loop: _loop.Loop, stream: str) -> None:
    """
    Give back what is held of a stream in this process, and wait until the server has it.

    :param loop: of this process
    :param stream: its name; that of another with the same name is given back as well
    """
    await give_back_all(ahead for ahead in _of(loop) if ahead.place[0] == stream)


async def take_all_of(loop: _loop.Loop, place: tuple[str, str]) -> list[_inboxes.Pulled]:
    """
    Take what is held in this process for a subscriber, whichever object holds it.

    :param loop: of this process
    :param place: names of the stream and of the consumer
    :return: messages
    """
    taken: list[_inboxes.Pulled] = []
    for ahead in [ahead for ahead in _of(loop) if ahead.place == place]:
        try:
            taken += await ahead.take_all()
        except BaseException:
            ahead.puller.returns.give_back(taken)
            raise
    return taken
