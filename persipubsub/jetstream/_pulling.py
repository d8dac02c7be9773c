"""
Pull messages of one subscriber from the servers.

A pull is a request with an inbox for what it brings. Each consumer keeps a few inboxes, one for
each thread that waits at the same time. A pull that nobody waits for any more may still bring
messages: they are given back before anybody pulls again, so that later ones do not overtake them.
``fetch`` of nats-py was rejected: it mixes the pulls of several threads in one inbox, and takes a
lost connection for an empty queue.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import contextlib
import itertools
import json
import math
import sys
import time
from typing import Any, Final

import nats.aio.client
import nats.errors

import persipubsub.errors
from persipubsub.jetstream import _errors, _inboxes, _keeping, _link, _returns, _settings, _stream

#: A pull is repeated after so many seconds: it is lost with the server that has it.
LONGEST_PULL_SECS: Final = 5.0

#: The server shows this often that it still has the pull, in seconds.
_HEARTBEAT_SECS: Final = 0.5

_PAUSE_SECS: Final = 0.1

#: The server answers within so many seconds, if it has a pull.
_ANSWER_SECS: Final = 1.0

#: The server says so when the next message is too large for a pull.
_MAX_BYTES: Final = "MaxBytes"

#: ... and so after the last message of a pull with a limit of bytes, whose end is seen by then.
_COMPLETED: Final = "Batch Completed"

#: Bytes that one consumer lets the servers send at once: they drop a connection that is 64 MiB
#: behind, and what was delivered over it is lost until ack_wait. A prime number, as a pull that is
#: used up to its last byte ends without a word, which messages of one size would come to.
_MOST_BYTES: Final = (1 << 23) - 15

#: Bytes that are taken at once, or one larger message; as from a directory.
_MOST_TAKEN_BYTES: Final = 1 << 24


class Puller:
    """Take messages of one subscriber for any number of coroutines."""

    def __init__(self, stream: _stream.Stream, settings: _settings.Settings, durable: str) -> None:
        """
        Initialize without pulling.

        :param stream: of the queue
        :param settings: of the queue
        :param durable: name of the consumer
        """
        self.returns = _returns.Returns(stream.link,
                                        lambda count: self.pull_now(count, sys.maxsize))
        self._stream = stream
        self._settings = settings
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream.name}.{durable}"
        self._info = f"CONSUMER.INFO.{stream.name}.{durable}"
        self._idle: list[_inboxes.Inbox] = []
        # What waits for messages, with its place in the line at the servers.
        self._pulls: dict["asyncio.Task[Any]", float] = {}
        self._places = itertools.count()
        self._is_closed = False
        # How many take several messages at this moment; they share the bytes on the way.
        self._batches = 0
        # Since when the consumer is not there; 0.0 if it is.
        self._missing_since = 0.0
        # When the servers were heard last, as far as anybody listened.
        self._heard = self._listened = time.monotonic()

    async def close(self) -> None:
        """Stop listening, and let others have what nobody took. Those who wait fail."""
        self._is_closed = True
        pulls = [task for task in self._pulls if task is not asyncio.current_task()]
        for task in pulls:
            task.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)
        inboxes, self._idle = self._idle, []
        for inbox in inboxes:
            self.returns.begin(self._retire(inbox))
        await self.returns.settle()

    async def _retire(self, inbox: _inboxes.Inbox) -> None:
        """
        Stop listening, and let others have what comes until the server knows of it.

        :param inbox: that nobody uses any more
        """
        try:
            await inbox.close(self._subject)
        finally:
            self._give_up(inbox)

    async def _finish(self, inbox: _inboxes.Inbox) -> None:
        """
        Let a pull of what is there come to its end, and let others have what it brings.

        To end the subscription was rejected: of a cluster, another server may send at that moment,
        and this one would drop what comes for nobody.

        :param inbox: of the pull, which nobody waits for any more
        """
        with contextlib.suppress(persipubsub.errors.PersipubsubError, _errors.ApiError):
            if inbox.pulls and not self._is_closed:
                await self._is_done(inbox, inbox.wanted_now, _ANSWER_SECS)
        if not inbox.pulls:
            self._give_up(inbox)
        if inbox.pulls or self._is_closed:
            await self._retire(inbox)
        else:
            self._leave(inbox)

    def place(self, task: "asyncio.Task[Any]") -> float:
        """
        Tell which pull the servers send to first.

        :param task: that pulls
        :return: its place in the line; infinite if it asks for nothing yet
        """
        return self._pulls.get(task, math.inf)

    def _give_up(self, inbox: _inboxes.Inbox) -> None:
        """
        Let others have what a pull brought too late.

        :param inbox: to be emptied
        """
        self.returns.give_back(list(inbox.messages))
        inbox.messages.clear()

    def is_busy(self) -> bool:
        """
        Tell whether somebody waits for messages.

        :return: True if so
        """
        return bool(self._pulls)

    async def pull_now(self,
                       max_messages: int,
                       max_bytes: int = _MOST_TAKEN_BYTES) -> list[_inboxes.Pulled]:
        """
        Take messages that are there, with as many pulls as their size needs.

        :param max_messages: how many at most
        :param max_bytes: no more are pulled once there are so many bytes
        :return: messages; none if there is none
        :raise UnavailableError: if no server answers for too long
        :raise NotInitializedError: if there is no such consumer any more
        :raise ClosedError: if the queue is closed meanwhile
        """
        taken, found = [], []  # type: list[_inboxes.Pulled], list[_inboxes.Pulled]
        has_more = True
        patience_secs = self._settings.address.ack_wait_secs / 4
        self._batches += 1
        try:
            while has_more and len(taken) < max_messages and max_bytes > 0:
                if taken and time.monotonic() - taken[0].arrived > patience_secs:
                    break  # who asked has waited long enough for those
                count, limit = max_messages - len(taken), _MOST_BYTES // self._batches
                fitting = max(1, limit // self._stream.link.max_payload())
                async with _keeping.kept(self._stream, taken):
                    if count <= fitting or not found or found[-1].attempts > 1:
                        # The servers have a limit by bytes put a message that does not fit behind
                        # all others that were given back; what was never delivered comes later.
                        found, has_more = await self._pull(0.0, min(count, fitting), None)
                    else:
                        found, has_more = await self._pull(0.0, count, min(limit, max_bytes))
                    taken += found
                max_bytes -= sum(len(one.data) for one in found)
        except BaseException:
            self.returns.give_back(taken)
            raise
        finally:
            self._batches -= 1
        return taken

    async def pull_once(self, max_messages: int, max_bytes: int) -> list[_inboxes.Pulled]:
        """
        Take messages that are there, and that were never given back, with one pull.

        :param max_messages: how many at most
        :param max_bytes: how many bytes at most, with what the server counts beside them
        :return: messages; none if there is none, or if the next one is larger
        :raise UnavailableError: if no server answers for too long
        :raise NotInitializedError: if there is no such consumer any more
        :raise ClosedError: if the queue is closed meanwhile
        """
        return (await self._pull(0.0, max_messages, max_bytes))[0]

    async def pull_one(self, timeout: float) -> list[_inboxes.Pulled]:
        """
        Wait for a message.

        :param timeout: how long, in seconds
        :return: the message; none if there was none in time
        :raise UnavailableError: if no server answers for too long
        :raise NotInitializedError: if there is no such consumer any more
        :raise ClosedError: if the queue is closed meanwhile
        """
        return (await self._pull(timeout, 1, None))[0]

    async def _pull(self, timeout: float, max_messages: int,
                    max_bytes: int | None) -> tuple[list[_inboxes.Pulled], bool]:
        """
        Wait for messages, so that closing ends it.

        :param timeout: how long, in seconds
        :param max_messages: how many to take at most
        :param max_bytes: how many bytes to take at most; None: however large they are
        :return: messages; none if there was none in time; and whether there may be more
        """
        task = asyncio.current_task()
        assert task is not None
        self._pulls[task] = math.inf
        try:
            if self._is_closed:
                raise asyncio.CancelledError
            return await self._repeat(timeout, max_messages, max_bytes)
        except asyncio.CancelledError:
            if not self._is_closed:
                raise
            raise _errors.closed(self._settings.path) from None
        finally:
            del self._pulls[task]

    async def _repeat(self, timeout: float, max_messages: int,
                      max_bytes: int | None) -> tuple[list[_inboxes.Pulled], bool]:
        """
        Pull until there are messages, or no time is left.

        :param timeout: how long, in seconds
        :param max_messages: how many to take at most; one if the pull has to wait
        :param max_bytes: how many bytes to take at most; None: however large they are
        :return: messages; none if there was none in time; and whether there may be more
        """
        deadline = time.monotonic() + timeout
        inbox: _inboxes.Inbox | None = None
        taken: list[_inboxes.Pulled] = []
        if time.monotonic() - self._listened > _PAUSE_SECS:
            self._heard = time.monotonic()
        try:
            while True:
                # What is given back comes first.
                await self.returns.settle(max(_returns.SETTLE_SECS, deadline - time.monotonic()))
                left = deadline - time.monotonic()
                found = await self._listening(inbox, left)
                if inbox is not None and found is not inbox:
                    # Of a connection that is gone.
                    self._leave(inbox)
                inbox = found
                if inbox is not None:
                    if left <= 0:
                        request: dict[str, Any] = {"batch": max_messages, "no_wait": True}
                        if max_bytes is not None:
                            request["max_bytes"] = max_bytes
                        await self._ask(inbox, request, 0.0)
                    else:
                        await self._ask(inbox, {"batch": 1}, left)
                    await self._take_fresh(inbox, max_messages, taken)
                if taken:
                    self._missing_since = 0.0
                if taken or time.monotonic() >= deadline:
                    return taken, inbox is not None and inbox.has_more
        except BaseException:
            self.returns.give_back(taken)
            raise
        finally:
            self._listened = time.monotonic()
            if inbox is not None:
                self._leave(inbox)

    def _leave(self, inbox: _inboxes.Inbox) -> None:
        """
        Stop using an inbox.

        :param inbox: that was used
        """
        if not inbox.pulls and not inbox.messages:
            self._idle.append(inbox)
            return
        # Nobody would look at what a pull still brings. One that waits ends with the subscription,
        # so that the next message goes to the next pull: in order, and not delivered for nothing.
        ends_soon = inbox.pulls == 0 or inbox.wanted_now > 0
        self.returns.begin(self._finish(inbox) if ends_soon else self._retire(inbox))

    async def _listening(self, inbox: _inboxes.Inbox | None, left: float) -> _inboxes.Inbox | None:
        """
        Find an inbox of a connection that lives.

        :param inbox: that was used so far
        :param left: how long to wait, in seconds
        :return: inbox; None if there is no connection yet
        """
        wait = self._settings.wait_secs
        since = time.monotonic() - self._heard
        try:
            client = await self._stream.link.client(time.monotonic() + max(0.05, min(wait, left)))
        except persipubsub.errors.UnavailableError:
            # Servers come back; who receives in a loop shall not fail for a moment without them.
            if since >= wait:
                raise
            return None
        if inbox is not None and inbox.client is client:
            return inbox
        while self._idle:
            inbox = self._idle.pop()
            if inbox.client is client:
                return inbox
        return await _inboxes.Inbox(client).listen()

    async def _ask(self, inbox: _inboxes.Inbox, request: dict[str, Any], left: float) -> None:
        """
        Pull, and wait for a message or for the end of the pull. Without the right to, it fails.

        :param inbox: for what comes
        :param request: what to ask for
        :param left: how long to wait, in seconds
        """
        inbox.statuses.clear()
        inbox.has_more = bool(inbox.messages)
        if inbox.messages:
            return
        inbox.pulls += 1
        patience = _ANSWER_SECS
        wanted = int(request["batch"])
        inbox.wanted_now = wanted if "no_wait" in request else 0
        if not inbox.wanted_now:
            expires = min(left, LONGEST_PULL_SECS)
            request["expires"] = max(1_000_000, int(expires * 1e9))
            patience += expires
            if expires > 3 * _HEARTBEAT_SECS:
                request["idle_heartbeat"] = int(_HEARTBEAT_SECS * 1e9)
                patience = 3 * _HEARTBEAT_SECS
        task = asyncio.current_task()
        assert task in self._pulls, "Only what pulls asks."
        self._pulls[task] = next(self._places)
        inbox.asked = time.monotonic()
        try:
            await inbox.client.publish(self._subject,
                                       json.dumps(request).encode("utf-8"),
                                       reply=inbox.name)
        except (nats.errors.Error, OSError):
            await asyncio.sleep(_PAUSE_SECS)
            return
        if await self._is_done(inbox, wanted, patience):
            self._heard = time.monotonic()
        else:
            self._stream.link.check_rights(self._subject)
            self._check_heard()

    async def _is_done(self, inbox: _inboxes.Inbox, wanted: int, patience: float) -> bool:
        """
        Wait for the end of a pull.

        :param inbox: for what comes
        :param wanted: how many messages it ends with
        :param patience: how long to wait if nothing comes, in seconds
        :return: False if nothing came for so long
        """
        while True:
            inbox.changed.clear()
            is_full = len(inbox.messages) >= wanted
            if is_full or await self._is_over(inbox):
                inbox.has_more |= is_full
                inbox.pulls -= 1
                return True
            try:
                # Not wait_for, which may come back without an error although it was cancelled.
                async with asyncio.timeout(patience):
                    await inbox.changed.wait()
                self._heard = time.monotonic()
            except TimeoutError:
                return False
            await inbox.keep(self._settings.address.ack_wait_secs)

    async def _is_over(self, inbox: _inboxes.Inbox) -> bool:
        """
        Look at what the server says about the pull.

        :param inbox: of the pull
        :return: True if the pull is over
        """
        while inbox.statuses:
            status = inbox.statuses.popleft()
            code, text = status.get("Status", ""), status.get("Description", "")
            if code == "100":
                self._heard = time.monotonic()
            elif _COMPLETED in text:
                pass  # of an earlier pull
            elif code == "503":
                # Nobody leads the consumer, or there is none.
                self._check_heard()
                await self._check_consumer()
                await asyncio.sleep(_PAUSE_SECS)
                return True
            elif code == "409" and _MAX_BYTES not in text:
                await self._check_consumer()
                await asyncio.sleep(_PAUSE_SECS)
                return True
            else:
                inbox.has_more = code == "409"
                return True
        return False

    def _check_heard(self) -> None:
        """
        Check that the servers were there not long ago.

        :raise UnavailableError: if they were not
        """
        if time.monotonic() - self._heard > self._settings.wait_secs:
            raise persipubsub.errors.UnavailableError(
                f"Expected the servers of {self._settings.path} to deliver, but got: no answer "
                f"for {self._settings.wait_secs:.0f} s")

    async def _check_consumer(self) -> None:
        """
        Check that the consumer is still there, if somebody knows right now.

        :raise NotInitializedError: if it is not
        """
        try:
            await self._stream.link.api(self._info, None, time.monotonic() + 0.5, confirms=False)
        except _errors.ApiError as error:
            now = time.monotonic()
            self._missing_since = self._missing_since or now
            patience = _link.RECOVERY_SECS if self._stream.link.is_cluster() else 0.0
            if error.is_missing() and now - self._missing_since >= patience:
                raise _errors.translate(error, self._settings.path) from None
        except persipubsub.errors.UnavailableError:
            pass
        else:
            self._missing_since = 0.0

    async def _take_fresh(self, inbox: _inboxes.Inbox, count: int,
                          taken: list[_inboxes.Pulled]) -> None:
        """
        Take messages out of an inbox, but those that are too old.

        :param inbox: in which they are
        :param count: how many at most
        :param taken:
            to which they are added; not returned, as whoever is cancelled in the middle of this has
            to know of them
        """
        now = time.monotonic()
        is_late = False
        while inbox.messages and len(taken) < count:
            pulled = inbox.messages.popleft()
            self.returns.note(pulled, inbox.asked)
            if self.is_expired(pulled):
                # The server drops it a bit late.
                await _inboxes.tell(inbox.client, pulled, b"+ACK")
            elif is_late or now - pulled.arrived > self._settings.address.ack_wait_secs / 2:
                # It may be with another by the time it is worked on, and comes again. What is
                # behind it as well, or it would be out of order.
                is_late = True
                self.returns.give_back([pulled])
            else:
                taken.append(pulled)

    def is_expired(self, pulled: _inboxes.Pulled) -> bool:
        """
        Tell whether a message is too old; the servers drop it a bit late.

        :param pulled: message
        :return: True if so
        """
        return self._stream.now_ns() - pulled.time_ns > self._settings.timeout_ns

    async def drop(self, pulled: list[_inboxes.Pulled]) -> None:
        """
        Tell the servers, if they are there, that nobody will want messages. It raises nothing.

        :param pulled: messages
        """
        with contextlib.suppress(persipubsub.errors.PersipubsubError):
            client = await self._stream.link.client(time.monotonic() + 0.5)
            for one in pulled:
                await _inboxes.tell(client, one, b"+ACK")
