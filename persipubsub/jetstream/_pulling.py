"""
Pull messages of one subscriber from the servers.

A pull is a request with an inbox for what it brings. Each consumer keeps a few inboxes, one for
each thread that waits at the same time, since a pull that nobody waits for any more may still bring
messages: whoever uses its inbox next gets them. ``fetch`` of nats-py was rejected: it mixes the
pulls of several threads in one inbox, and takes a lost connection for an empty queue.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import collections
import json
import time
from typing import Any, Deque, Dict, Final, List, NamedTuple, Optional, Set

import nats.aio.client
import nats.aio.msg
import nats.errors

import persipubsub.errors
from persipubsub.jetstream import _errors, _link, _settings, _stream

#: A pull is repeated after so many seconds: it is lost with the server that has it.
_LONGEST_PULL_SECS: Final = 5.0

#: The server shows this often that it still has the pull, in seconds.
_HEARTBEAT_SECS: Final = 0.5

_PAUSE_SECS: Final = 0.1


class Pulled(NamedTuple):
    """Hold a message that the servers gave to us."""

    data: bytes
    reply: str  #: subject to acknowledge it at
    number: int  #: in the stream
    attempts: int  #: deliveries, this one included
    time_ns: int  #: when it was stored, on the clock of the servers
    arrived: float  #: on our monotonic clock


class _Inbox:
    """Hold what pulls brought."""

    def __init__(self, client: nats.aio.client.Client) -> None:
        """
        Initialize without listening.

        :param client: of the connection
        """
        self.client = client
        self.name = client.new_inbox()
        self.messages = collections.deque()  # type: Deque[Pulled]
        self.statuses = collections.deque()  # type: Deque[Dict[str, str]]
        self.changed = asyncio.Event()
        #: Pulls whose end was not seen yet: they may bring something.
        self.pulls = 0
        self._subscription = None  # type: Any

    async def listen(self) -> "_Inbox":
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
            self.statuses.append({
                str(key): value
                for key, value in (message.headers or {}).items()
            })
        self.changed.set()

    async def close(self) -> None:
        """Stop listening, and take what comes until the server knows."""
        try:
            await self._subscription.drain()
        except (nats.errors.Error, OSError):
            pass  # the connection is gone, and the inbox with it


class Puller:
    """Take messages of one subscriber for any number of coroutines."""

    def __init__(self, stream: _stream.Stream, settings: _settings.Settings, durable: str) -> None:
        """
        Initialize without pulling.

        :param stream: of the queue
        :param settings: of the queue
        :param durable: name of the consumer
        """
        self._stream = stream
        self._settings = settings
        self._subject = "$JS.API.CONSUMER.MSG.NEXT.{}.{}".format(stream.name, durable)
        self._info = "CONSUMER.INFO.{}.{}".format(stream.name, durable)
        self._idle = []  # type: List[_Inbox]
        # What waits for messages, and what ends the use of inboxes.
        self._pulls = set()  # type: Set["asyncio.Task[Any]"]
        self._retiring = set()  # type: Set["asyncio.Task[None]"]
        self._is_closed = False
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
        await asyncio.gather(*map(self._retire, inboxes), *self._retiring)

    async def _retire(self, inbox: _Inbox) -> None:
        """
        Stop listening, and let others have what comes until the server knows of it.

        :param inbox: that nobody uses any more
        """
        await inbox.close()
        await self._give_up(inbox)

    async def pull(self, timeout: Optional[float], max_messages: int) -> List[Pulled]:
        """
        Wait for messages.

        :param timeout: how long, in seconds; None: for ever
        :param max_messages: how many to take at most; all that are there at once, at least one
        :return: messages; none if there was none in time
        :raise UnavailableError: if no server answers for too long
        :raise NotInitializedError: if there is no such consumer any more
        :raise ClosedError: if the queue is closed meanwhile
        """
        task = asyncio.current_task()
        assert task is not None
        self._pulls.add(task)
        try:
            if self._is_closed:
                raise asyncio.CancelledError
            return await self._pull(timeout, max_messages)
        except asyncio.CancelledError:
            if not self._is_closed:
                raise
            raise persipubsub.errors.ClosedError(
                "Expected the queue {} to be open, but got: it was closed meanwhile".format(
                    self._settings.path)) from None
        finally:
            self._pulls.discard(task)

    async def _pull(self, timeout: Optional[float], max_messages: int) -> List[Pulled]:
        """
        Wait for messages.

        :param timeout: how long, in seconds; None: for ever
        :param max_messages: how many to take at most
        :return: messages; none if there was none in time
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        inbox = None  # type: Optional[_Inbox]
        taken = []  # type: List[Pulled]
        if time.monotonic() - self._listened > _PAUSE_SECS:
            self._heard = time.monotonic()
        try:
            while True:
                left = None if deadline is None else deadline - time.monotonic()
                inbox = await self._listening(inbox, left)
                if inbox is not None:
                    is_last = left is not None and left <= 0
                    if max_messages > 1 or is_last:
                        await self._ask(inbox, {"batch": max_messages, "no_wait": True}, 0.0)
                    else:
                        await self._ask(inbox, {"batch": 1}, left)
                    taken = await self._fresh(inbox, max_messages)
                    if not taken and max_messages > 1 and not is_last:
                        await self._ask(inbox, {"batch": 1}, left)
                        taken = await self._fresh(inbox, max_messages)
                    if taken and 1 < max_messages and len(taken) < max_messages and not is_last:
                        taken += await self._rest(inbox, max_messages - len(taken))
                if taken:
                    self._missing_since = 0.0
                if taken or (deadline is not None and time.monotonic() >= deadline):
                    return taken
        except BaseException:
            await self.give_back(taken)
            raise
        finally:
            self._listened = time.monotonic()
            if inbox is not None:
                self._leave(inbox)

    def _leave(self, inbox: _Inbox) -> None:
        """
        Stop using an inbox.

        :param inbox: that was used
        """
        if inbox.pulls or inbox.messages:
            # Nobody would look at what a pull still brings. It ends with the subscription, so
            # that the next message goes to the next pull: in order, and not delivered for nothing.
            task = asyncio.ensure_future(self._retire(inbox))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        else:
            self._idle.append(inbox)

    async def _rest(self, inbox: _Inbox, count: int) -> List[Pulled]:
        """
        Take what came beside the message that was waited for.

        :param inbox: to be used
        :param count: of messages at most
        :return: messages; none if there is none right now
        """
        await self._ask(inbox, {"batch": count, "no_wait": True}, 0.0)
        return await self._fresh(inbox, count)

    async def _listening(self, inbox: Optional[_Inbox], left: Optional[float]) -> Optional[_Inbox]:
        """
        Find an inbox of a connection that lives.

        :param inbox: that was used so far
        :param left: how long to wait, in seconds; None: for ever
        :return: inbox; None if there is no connection yet
        """
        wait = self._settings.wait_secs
        since = time.monotonic() - self._heard
        try:
            client = await self._stream.link.client(
                time.monotonic() + max(0.05, min(wait, wait if left is None else left)))
        except persipubsub.errors.UnavailableError:
            # Servers come back; who receives in a loop shall not fail for a moment without them.
            if since >= wait or left is None:
                raise
            return None
        if inbox is not None and inbox.client is client:
            return inbox
        while self._idle:
            inbox = self._idle.pop()
            if inbox.client is client:
                return inbox
        return await _Inbox(client).listen()

    async def _ask(self, inbox: _Inbox, request: Dict[str, Any], left: Optional[float]) -> None:
        """
        Pull, and wait for a message or for the end of the pull.

        :param inbox: for what comes
        :param request: what to ask for
        :param left: how long to wait, in seconds; None: for ever
        """
        inbox.statuses.clear()
        if inbox.messages:
            return
        inbox.pulls += 1
        patience = 1.0
        if "no_wait" not in request:
            expires = _LONGEST_PULL_SECS if left is None else min(left, _LONGEST_PULL_SECS)
            request["expires"] = max(1_000_000, int(expires * 1e9))
            patience += expires
            if expires > 3 * _HEARTBEAT_SECS:
                request["idle_heartbeat"] = int(_HEARTBEAT_SECS * 1e9)
                patience = 3 * _HEARTBEAT_SECS
        try:
            await inbox.client.publish(self._subject,
                                       json.dumps(request).encode("utf-8"),
                                       reply=inbox.name)
        except (nats.errors.Error, OSError):
            await asyncio.sleep(_PAUSE_SECS)
            return
        wanted = int(request["batch"])
        while True:
            inbox.changed.clear()
            if len(inbox.messages) >= wanted or await self._is_over(inbox):
                inbox.pulls -= 1
                break
            try:
                await asyncio.wait_for(inbox.changed.wait(), timeout=patience)
            except asyncio.TimeoutError:
                self._check_heard()
                return
        self._heard = time.monotonic()

    async def _is_over(self, inbox: _Inbox) -> bool:
        """
        Look at what the server says about the pull.

        :param inbox: of the pull
        :return: True if the pull is over
        """
        while inbox.statuses:
            status = inbox.statuses.popleft()
            code = status.get("Status", "")
            if code == "100":
                self._heard = time.monotonic()
            elif code == "503":
                # Nobody leads the consumer, or there is none.
                self._check_heard()
                await self._check_consumer()
                await asyncio.sleep(_PAUSE_SECS)
                return True
            elif code == "409":
                await self._check_consumer()
                await asyncio.sleep(_PAUSE_SECS)
                return True
            else:
                return True
        return False

    def _check_heard(self) -> None:
        """
        Check that the servers were there not long ago.

        :raise UnavailableError: if they were not
        """
        if time.monotonic() - self._heard > self._settings.wait_secs:
            raise persipubsub.errors.UnavailableError(
                "Expected the servers of {} to deliver, but got: no answer for {:.0f} s".format(
                    self._settings.path, self._settings.wait_secs))

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

    async def _fresh(self, inbox: _Inbox, count: int) -> List[Pulled]:
        """
        Take messages out of an inbox.

        :param inbox: in which they are
        :param count: how many at most
        :return: messages, without those that are too old
        """
        taken = []  # type: List[Pulled]
        now, now_ns = time.monotonic(), self._stream.now_ns()
        while inbox.messages and len(taken) < count:
            pulled = inbox.messages.popleft()
            if now_ns - pulled.time_ns > self._settings.timeout_ns:
                # The server drops it a bit late.
                await self._tell(inbox.client, pulled, b"+ACK")
            elif now - pulled.arrived > self._settings.address.ack_wait_secs / 2:
                # It may be with another by the time it is worked on.
                await self._tell(inbox.client, pulled, b"-NAK")
            else:
                taken.append(pulled)
        return taken

    async def _give_up(self, inbox: _Inbox) -> None:
        """
        Let others have what a pull brought too late.

        :param inbox: to be emptied
        """
        while inbox.messages:
            await self._tell(inbox.client, inbox.messages.popleft(), b"-NAK")

    async def give_back(self, pulled: List[Pulled]) -> None:
        """
        Let others have messages, without waiting for an answer.

        :param pulled: messages
        """
        if pulled:
            client = await self._stream.link.client(time.monotonic() + 0.5)
            for one in pulled:
                await self._tell(client, one, b"-NAK")

    @staticmethod
    async def _tell(client: nats.aio.client.Client, pulled: Pulled, what: bytes) -> None:
        """
        Say something about a message, without waiting for an answer.

        :param client: of the connection
        :param pulled: message
        :param what: ``+ACK``, ``-NAK`` or ``+WPI``
        """
        try:
            await client.publish(pulled.reply, what)
        except (nats.errors.Error, OSError):
            pass  # the server delivers it again after ack_wait


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
                  arrived=time.monotonic())
