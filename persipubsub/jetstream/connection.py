"""
Connect to the servers of a stream, and repeat a request until it is answered or its time is over.

All of it runs in the thread of :py:mod:`persipubsub.jetstream.loop`. Queues at the same servers
share a connection. Credentials come from the environment, under the names that the tool ``nats``
uses.
"""

import asyncio
import contextlib
import math
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

#: Timeout of a connection to one server, and of the first connection to any of them, in seconds.
_SERVER_SECS: Final = 2
_FIRST_SECS: Final = 10.0

#: Longest silence before a connection is given up, and interval of pings, in seconds.
_SILENCE_SECS: Final = 15.0
_PING_SECS: Final = 5

#: Pause before a repeated attempt, in seconds.
PAUSE_SECS: Final = 0.1

#: Interval at which a connection is watched, in seconds.
_LOOK_SECS: Final = 0.25

#: A request without an answer is repeated after so many round trips of pings; there is one at each
#: look. If requests are made together, each so many of them add one round trip. Seconds were rejected:
#: over a slow connection, a request is read late, and repeating it takes even longer.
_PATIENCE: Final = 8
_EACH_ROUND_TRIP: Final = 25

#: Time without any answer after which a server is believed to have no JetStream, in seconds.
_NO_JETSTREAM_SECS: Final = 2.0

#: Errors after which a request is repeated; OSError includes TimeoutError.
UNANSWERED: Final = (OSError, nats.errors.NoRespondersError, nats.errors.ConnectionClosedError,
                     nats.errors.ConnectionReconnectingError, nats.errors.ConnectionDrainingError,
                     nats.errors.StaleConnectionError, nats.errors.OutboundBufferLimitError)


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
        # By the timeout of a request: the round trip at whose end it is given up.
        self._requests: dict[asyncio.Timeout, int] = {}
        self._round_trips = 0
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
            self._end_requests(math.inf)
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

    async def request(self,
                      subject: str,
                      payload: bytes,
                      deadline: float,
                      at_once: int = 1,
                      headers: dict[str, str] | None = None) -> nats.aio.msg.Msg:
        """
        Ask once; raise one of UNANSWERED if no answer comes in time or over this connection.

        :param at_once: how many requests are made at the same time
        """
        if self.lost.done():
            raise ConnectionResetError("the connection was lost")
        scope = asyncio.timeout(None)
        self._requests[scope] = self._round_trips + _PATIENCE + at_once // _EACH_ROUND_TRIP
        try:
            async with scope:
                return await self.client.request(subject,
                                                 payload,
                                                 max(0.0, deadline - time.monotonic()),
                                                 headers=headers)
        finally:
            self._requests.pop(scope, None)

    def _end_requests(self, round_trips: float) -> None:
        """Let requests go on without an answer, if their patience ends at this round trip."""
        for scope in [one for one, last in self._requests.items() if last <= round_trips]:
            del self._requests[scope]
            scope.reschedule(time.monotonic())

    async def _watch(self) -> None:
        """Ping while requests wait, and give a silent connection up."""
        received = 0
        heard = pinged = time.monotonic()
        while not self.lost.done():  # as long as the connection lives
            await asyncio.sleep(_LOOK_SECS)
            now = time.monotonic()
            if self.client.stats["in_msgs"] != received:
                received, heard = self.client.stats["in_msgs"], now
            if self._pinging is not None and self._pinging.done():
                if self._pinging.cancelled() or self._pinging.exception() is not None:
                    self.lose()
                self._pinging, heard = None, now
                self._round_trips += 1
                self._end_requests(self._round_trips)
            if now - heard >= _SILENCE_SECS:
                self.lose()
            elif self._pinging is None and (self._requests or now - pinged >= _PING_SECS):
                # Not cancelled as long as the connection lives: nats-py stops reading at the late
                # answer to a ping that was cancelled.
                ping = self.client.flush(timeout=_FOREVER_SECS)
                self._pinging, pinged = self._loop.start(ping), now


class Connection:
    """A connection that is made at its first use, and made again when it is lost."""

    def __init__(self, own: loop.Loop, servers: tuple[str, ...], path: str, key: Any) -> None:
        """Initialize without connecting."""
        self.users = 0
        self._key = key
        self.loop = own
        self._path = path
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
        while (link := self.ready()) is None:  # until the deadline
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
        begin = time.monotonic()
        while True:  # until the deadline
            link = await self.link(deadline)
            try:
                return await link.request(subject, payload, deadline)
            except UNANSWERED as error:
                self.check_rights(subject)
                until = deadline
                if isinstance(error, nats.errors.NoRespondersError) and subject.startswith("$JS."):
                    until = min(deadline, begin + _NO_JETSTREAM_SECS)
                if time.monotonic() >= until:
                    raise errors.translate(error, self._path) from None
            await asyncio.sleep(PAUSE_SECS)

    async def release(self) -> None:
        """Release the connection; its last user closes it, and ends its requests."""
        self.users -= 1
        if self.users == 0:
            self._is_closed = True
            del self.loop.connections[self._key]
            if self._link is not None:
                self._link.lose()
                await self._link.close()


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
