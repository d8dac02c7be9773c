"""
Connect to the servers of a stream, and repeat a request until it is answered or its time is over.

All of it runs in the thread of :py:mod:`persipubsub.jetstream.loop`. Queues at the same servers
share a connection. Credentials come from the environment, under the names that the tool ``nats``
uses.
"""

import asyncio
import contextlib
import dataclasses
import os
import random
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import nats.aio.client
import nats.aio.msg
import nats.errors

from persipubsub.errors import AccessError, UnavailableError
from persipubsub.jetstream import errors, loop

#: Environment variables with credentials: arguments of the client, and files.
_ARGUMENTS: Final = {
    "NATS_CREDS": "user_credentials",
    "NATS_NKEY": "nkeys_seed",
    "NATS_USER": "user",
    "NATS_PASSWORD": "password",
    "NATS_TOKEN": "token"
}
_FILES: Final = ("NATS_CREDS", "NATS_NKEY", "NATS_CA", "NATS_CERT", "NATS_KEY")

#: Timeout for nats-py where this module bounds the time itself, in seconds.
_FOREVER_SECS: Final = 1 << 24

#: Timeout of a connection to one server, and of the first connection of all, in seconds.
_SERVER_SECS: Final = 2
_FIRST_SECS: Final = 10.0

#: Longest silence before a connection is given up, and interval of pings, in seconds.
_SILENCE_SECS: Final = 15.0
_PING_SECS: Final = 5

#: Time after which a request without an answer is repeated, at first and at most, in seconds.
FIRST_ATTEMPT_SECS: Final = 1.0
LONGEST_ATTEMPT_SECS: Final = 5.0

PAUSE_SECS: Final = 0.1

#: Interval at which a connection is watched, in seconds.
_LOOK_SECS: Final = 0.25

#: Time without any answer after which a server is believed to have no JetStream, in seconds.
_NO_JETSTREAM_SECS: Final = 2.0

#: Errors after which a request is repeated; OSError includes TimeoutError.
UNANSWERED: Final = (OSError, nats.errors.NoRespondersError, nats.errors.ConnectionClosedError,
                     nats.errors.ConnectionReconnectingError, nats.errors.ConnectionDrainingError,
                     nats.errors.StaleConnectionError, nats.errors.OutboundBufferLimitError)


@dataclasses.dataclass(slots=True, eq=False)
class _Request:
    """A request without an answer so far. Times are on the monotonic clock."""

    scope: asyncio.Timeout  #: in which the answer is waited for
    doubted_at: float  #: from then on, a ping finds out whether the server has read it
    patience: float  #: after the server has read it, in seconds
    deadline: float

    def end(self) -> None:
        """Let the call go on without an answer."""
        if not self.scope.expired():
            self.scope.reschedule(time.monotonic())


class Link:
    """
    One TCP connection to one server; it is never reconnected.

    The reconnection of nats-py was rejected. Messages that it has not written yet are sent over the
    next connection, although earlier ones were written and lost: they would be out of order.
    """

    def __init__(self, own: loop.Loop, complain: Callable[[BaseException], None]) -> None:
        """Initialize without connecting; `complain` gets the errors that no call raises."""
        self.client = nats.aio.client.Client()
        self.lost: asyncio.Future[None] = own.create_future()  #: done when it is lost
        self._loop = own
        self._complain = complain
        self._transports: list[asyncio.BaseTransport] = []
        self._requests: set[_Request] = set()
        self._pinging: asyncio.Task[None] | None = None

    async def connect(self, server: str, options: Mapping[str, Any]) -> None:
        """Connect to one server."""

        async def tell(error: BaseException | None = None) -> None:
            if error is not None:
                self._complain(error)
            if error is None or isinstance(error, nats.errors.UnexpectedEOF):
                self.lose()

        loop.opened.set(self._transports)
        try:
            async with asyncio.timeout(_SERVER_SECS + 0.5):
                await self.client.connect(
                    servers=[server],
                    error_cb=tell,
                    closed_cb=tell,
                    name="persipubsub",
                    allow_reconnect=False,
                    # nats-py drops a server after more failures than this, here after the second; 0
                    # would be no limit.
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=_SERVER_SECS,
                    # Never: its own pings take a slow connection for a dead one.
                    ping_interval=_FOREVER_SECS,
                    # With a limit, a publisher would wait without end for a server that reads
                    # nothing.
                    pending_size=-1,
                    flusher_queue_size=0,
                    **options)
        except BaseException:
            self.lose()
            raise
        if self.lost.done():
            raise ConnectionResetError("the connection was lost")
        self._loop.start(self._watch())

    def lose(self) -> None:
        """Give the connection up, and end its requests."""
        if not self.lost.done():
            self.lost.set_result(None)
            for request in self._requests:
                request.end()
            self._loop.start(self.close())

    async def close(self) -> None:
        """Close the connection; what was not written yet is lost."""
        if self._pinging is not None:
            self._pinging.cancel()
        # Closing alone waits, perhaps for ever, until the server has read what was written.
        for transport in self._transports:
            if isinstance(transport, asyncio.WriteTransport):
                transport.abort()
        # A client that never connected raises the last two.
        with contextlib.suppress(nats.errors.Error, OSError, AttributeError, AssertionError):
            async with asyncio.timeout(PAUSE_SECS):
                await self.client.close()

    async def request(self, subject: str, payload: bytes, patience: float, deadline: float,
                      headers: dict[str, str] | None = None) -> nats.aio.msg.Msg:
        """
        Ask once; raise one of UNANSWERED if no answer comes in time or over this connection.

        The patience, in seconds, begins when the server has read the request. Over a slow
        connection that takes long, and a repeated request makes it slower.
        """
        if self.lost.done():
            raise ConnectionResetError("the connection was lost")
        request = _Request(asyncio.timeout(None),
                           time.monotonic() + patience / 2, patience / 2, deadline)
        self._requests.add(request)
        try:
            async with request.scope:
                return await self.client.request(subject, payload, _FOREVER_SECS, headers=headers)
        finally:
            self._requests.discard(request)

    async def _watch(self) -> None:
        """End requests whose time is over, and give a silent connection up."""
        # One task for all requests: with a timer for each, sending took a fifth longer.
        received = 0
        heard = pinged = time.monotonic()
        while not self.lost.done():
            await asyncio.sleep(_LOOK_SECS)
            now = time.monotonic()
            for request in self._requests:
                if request.deadline <= now:
                    request.end()
            if self.client.stats["in_msgs"] != received:
                received, heard = self.client.stats["in_msgs"], now
            if self._pinging is not None and self._pinging.done():
                self._pinging, heard = None, now
            if now - heard >= _SILENCE_SECS:
                self.lose()
            elif self._pinging is None and (now - pinged >= _PING_SECS
                                            or any(one.doubted_at <= now
                                                   for one in self._requests)):
                # Not cancelled as long as the connection lives: nats-py stops reading at the late
                # answer to a ping that was cancelled.
                self._pinging, pinged = self._loop.start(self._ping(now)), now

    async def _ping(self, begin: float) -> None:
        """Wait until the server has read what was written, and bound the time of old requests."""
        has_waited: list[bool] = []
        self._loop.call_soon(has_waited.append, True)
        with contextlib.suppress(nats.errors.Error, OSError):
            await self.client.flush(timeout=_FOREVER_SECS)
        if not has_waited:
            self.lose()  # nats-py reads no answers any more
        now = time.monotonic()
        for request in self._requests:
            if request.doubted_at <= begin:
                request.deadline = min(request.deadline, now + request.patience)


class Connection:
    """A connection that is made at its first use, and made again when it is lost."""

    def __init__(self, own: loop.Loop, servers: tuple[str, ...], path: str, key: Any) -> None:
        """Initialize without connecting."""
        self.users = 0
        self._key = key
        self.loop = own
        self._path = path
        #: Whether there are several servers, as far as is known.
        self.is_cluster = len(servers) > 1
        self._servers = servers
        self._link: Link | None = None
        self._latest = ""  #: server of the last connection
        self._connecting: asyncio.Task[None] | None = None
        self._is_closed = False
        self._complaint: BaseException | None = None

    # Connecting

    def ready(self) -> Link | None:
        """Return the connection if there is one."""
        return None if self._link is None or self._link.lost.done() else self._link

    async def link(self, deadline: float) -> Link:
        """Wait for a connection; raise AccessError if a server refuses us."""
        begin = time.monotonic()
        while (link := self.ready()) is None:
            if self._is_closed:
                raise errors.closed(self._path)
            # The task outlives the call; otherwise callers with short timeouts never connect.
            if self._connecting is None or self._connecting.done():
                self._connecting = self.loop.start(self._connect())
            await asyncio.wait((self._connecting, ), timeout=max(0.0, deadline - time.monotonic()))
            if self._connecting.done():
                self._connecting.result()
            if self.ready() is not None:
                continue
            until = deadline if self._latest else min(deadline, begin + _FIRST_SECS)
            if time.monotonic() >= until:
                found = "none" if self._complaint is None else errors.describe(self._complaint)
                raise UnavailableError(
                    f"Expected a connection to the servers of {self._path}, but got: {found}")
            await asyncio.sleep(PAUSE_SECS)
        return link

    async def _connect(self) -> None:
        """Connect to the first server that accepts."""
        options = _credentials(self._path)
        # The server that was lost is tried last.
        for server in sorted(self._servers, key=lambda one: (one == self._latest, random.random())):
            link = Link(self.loop, self._complain)
            try:
                await link.connect(server, options)
            except (nats.errors.Error, OSError) as error:
                if self._complaint is None or not isinstance(
                        error, (TimeoutError, nats.errors.NoServersError)):
                    self._complaint = error  # the others do not say why
                if isinstance(self._complaint, ssl.SSLError) or errors.is_refusal(self._complaint):
                    raise errors.translate(self._complaint, self._path) from None
            except Exception as error:
                # The code in nats-py that reads credentials raises errors of its own, and KeyError.
                raise AccessError(f"Expected credentials for {self._path} in NATS_CREDS or "
                                  f"NATS_NKEY, but got: {errors.describe(error)}") from None
            else:
                self._link, self._latest, self._complaint = link, server, None
                if self._is_closed:
                    link.lose()
                return

    def _complain(self, error: BaseException) -> None:
        self._complaint = error

    def check_rights(self, subject: str) -> None:
        """
        Raise AccessError if a server has refused the subject.

        It does not answer such a request: it sends an error that belongs to no request.
        """
        complaint = self._complaint
        text = str(complaint).lower()
        if "permissions violation" in text and subject.lower() in text:
            self._complaint = None
            raise AccessError(f"Expected the rights to use {self._path}, but got: {complaint}")

    # Asking

    async def ask(self, subject: str, payload: bytes, deadline: float) -> nats.aio.msg.Msg:
        """Ask until there is an answer. The request has to be one that may be repeated."""
        patience = FIRST_ATTEMPT_SECS
        begin = time.monotonic()
        while True:
            link = await self.link(deadline)
            try:
                return await link.request(subject, payload, patience, deadline)
            except UNANSWERED as error:
                self.check_rights(subject)
                until = deadline
                if isinstance(error, nats.errors.NoRespondersError) and subject.startswith("$JS."):
                    until = min(deadline, begin + _NO_JETSTREAM_SECS)
                if time.monotonic() >= until:
                    raise errors.translate(error, self._path) from None
                patience = min(2 * patience, LONGEST_ATTEMPT_SECS)
            await asyncio.sleep(PAUSE_SECS)

    async def release(self) -> None:
        """Release the connection; its last user closes it, and ends its requests."""
        self.users -= 1
        if self.users == 0:
            self._is_closed = True
            del self.loop.connections[self._key]
            link, self._link = self._link, None
            if link is not None:
                link.lose()
                await link.close()


def acquire(own: loop.Loop, servers: tuple[str, ...], path: str) -> Connection:
    """Share a connection, which has to be released."""
    key = (servers, *(os.environ.get(name) for name in (*_ARGUMENTS, *_FILES)))
    found: Connection = own.connections.setdefault(key, Connection(own, servers, path, key))
    found.users += 1
    return found


def _credentials(path: str) -> dict[str, Any]:
    """Take the arguments of the client that say who we are from the environment."""
    found = {name: value for name in (*_ARGUMENTS, *_FILES) if (value := os.environ.get(name))}
    for name in _FILES:
        if name in found and not os.access(found[name], os.R_OK):
            raise AccessError(f"Expected a file that can be read in {name} for the queue {path}, "
                              f"but got: {found[name]!r}")
    options: dict[str, Any] = {_ARGUMENTS[name]: found[name] for name in _ARGUMENTS.keys() & found}
    if "NATS_CA" in found or "NATS_CERT" in found:
        try:
            options["tls"] = ssl.create_default_context(cafile=found.get("NATS_CA"))
            if "NATS_CERT" in found:
                options["tls"].load_cert_chain(found["NATS_CERT"], found.get("NATS_KEY"))
        except (OSError, ssl.SSLError) as error:
            raise AccessError("Expected certificates in NATS_CA, NATS_CERT and NATS_KEY for the "
                              f"queue {path}, but got: {error}") from None
    return options
