"""
Keep a connection to the servers of a stream, and ask them until they answer or the time is over.

All of it runs in the thread of :py:mod:`persipubsub.jetstream.loop`. Queues at the same servers
share a connection. Credentials come from the environment, under the names that the tool ``nats``
uses.
"""

import asyncio
import contextlib
import json
import os
import random
import ssl
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

import nats.aio.client
import nats.aio.msg
import nats.errors

import persipubsub.errors
from persipubsub.jetstream import errors, loop

#: Variables of the environment that say who we are.
_VARIABLES: Final = ("NATS_CREDS", "NATS_NKEY", "NATS_USER", "NATS_PASSWORD", "NATS_TOKEN",
                     "NATS_CA", "NATS_CERT", "NATS_KEY")

#: For what has a limit of its own, in seconds.
_FOREVER_SECS: Final = 1 << 24

#: One server is waited for that long; the first connection of all, that long, in seconds.
_SERVER_SECS: Final = 2
_FIRST_SECS: Final = 10.0

#: A connection over which nothing came for so many seconds is given up; this often it is pinged.
_SILENCE_SECS: Final = 15.0
_PING_SECS: Final = 5.0

#: A request that is not answered is repeated after so many seconds, at first and at most.
FIRST_ATTEMPT_SECS: Final = 1.0
LONGEST_ATTEMPT_SECS: Final = 5.0

PAUSE_SECS: Final = 0.1

#: A cluster that was started again does not know all of its consumers for a moment, and says that
#: they are not there; that is believed after so many seconds. The same while a consumer is being
#: replaced (seek), on any server.
RECOVERY_SECS: Final = 5.0
REPLACED_SECS: Final = 1.0

#: No answer at all of a server that has no JetStream is believed after so many seconds.
_NO_JETSTREAM_SECS: Final = 2.0

#: After these, a TimeoutError among them, a request is made again.
UNANSWERED: Final = (OSError, nats.errors.NoRespondersError, nats.errors.ConnectionClosedError,
                     nats.errors.ConnectionReconnectingError, nats.errors.ConnectionDrainingError,
                     nats.errors.StaleConnectionError, nats.errors.OutboundBufferLimitError)


class Link:
    """
    One TCP connection to one server, which is never made again.

    The reconnection of nats-py was rejected: it sends what was not written to the last connection
    over the next one, behind what was written and lost, and so out of order.
    """

    def __init__(self, own: loop.Loop, complain: Callable[[BaseException], None]) -> None:
        """Initialize without connecting; errors that come on the side are told to `complain`."""
        self.client = nats.aio.client.Client()
        self.is_lost = False
        self.rtt = 0.0  #: of the last ping, in seconds
        #: To be called when the connection is lost.
        self.losers: list[Callable[[], object]] = []
        self._loop = own
        self._complain = complain
        self._transports: list[asyncio.BaseTransport] = []
        self._scopes: set[asyncio.Timeout] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard = time.monotonic()

    async def connect(self, server: str, options: Mapping[str, Any]) -> None:
        """Connect to one server, or raise what nats-py raised last."""
        found: list[BaseException] = []

        async def complain(error: BaseException) -> None:
            found.append(error)
            self._complain(error)
            if isinstance(error, nats.errors.UnexpectedEOF):
                self.lose()

        async def lose() -> None:
            self.lose()

        loop.opened.set(self._transports)
        try:
            async with asyncio.timeout(_SERVER_SECS + 0.5):
                await self.client.connect(
                    servers=[server],
                    error_cb=complain,
                    disconnected_cb=lose,
                    closed_cb=lose,
                    name="persipubsub",
                    allow_reconnect=False,
                    # Twice: then it gives up.
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
        except (TimeoutError, nats.errors.NoServersError) as error:
            self.lose()
            # Either does not say why.
            raise (found or [error])[-1] from None
        except BaseException:
            self.lose()
            raise
        if self.is_lost:
            raise ConnectionResetError("the connection was lost while it was made")
        self._tasks.add(self._loop.start(self._watch()))

    def lose(self) -> None:
        """Give the connection up: all who wait for an answer are told."""
        if self.is_lost:
            return
        self.is_lost = True
        for scope in self._scopes:
            if not scope.expired():
                scope.reschedule(time.monotonic())
        losers, self.losers = self.losers, []
        for loser in losers:
            loser()
        self._loop.start(self.close())

    async def close(self) -> None:
        """Close the connection; what was not written yet is lost."""
        self.is_lost = True
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        # Closing alone waits until the server has read what was written: for ever, perhaps.
        for transport in self._transports:
            if isinstance(transport, asyncio.WriteTransport):
                transport.abort()
        with contextlib.suppress(nats.errors.Error, OSError):
            try:
                async with asyncio.timeout(PAUSE_SECS):
                    await self.client.close()
            except (AttributeError, AssertionError):
                pass  # it was never connected

    async def request(self,
                      subject: str,
                      payload: bytes,
                      seconds: float,
                      headers: dict[str, str] | None = None) -> nats.aio.msg.Msg:
        """Ask once; raise one of UNANSWERED if no answer comes in time or over this connection."""
        if self.is_lost:
            raise ConnectionResetError("the connection was lost")
        scope = asyncio.timeout(seconds)
        self._scopes.add(scope)
        try:
            async with scope:
                return await self.client.request(subject,
                                                 payload,
                                                 timeout=_FOREVER_SECS,
                                                 headers=headers)
        except TimeoutError:
            if self.is_lost:
                raise ConnectionResetError("the connection was lost") from None
            raise
        finally:
            self._scopes.discard(scope)

    async def ping(self, deadline: float) -> None:
        """Wait until the server has read what was written so far, or the time is over."""
        await asyncio.wait((self._begin_ping(), ), timeout=max(0.0, deadline - time.monotonic()))

    def _begin_ping(self) -> asyncio.Task[None]:
        # Never cancelled while the connection lives: nats-py stops reading at a late answer.
        task = asyncio.ensure_future(self.client.flush(timeout=_FOREVER_SECS))
        begin = time.monotonic()

        def end(_: object) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and task.exception() is None:
                self._heard = time.monotonic()
                self.rtt = self._heard - begin

        def check() -> None:
            if task.done():
                self.lose()

        self._tasks.add(task)
        task.add_done_callback(end)
        # Behind its first step: if that is the last one, nobody reads what comes.
        asyncio.get_running_loop().call_soon(check)
        return task

    async def _watch(self) -> None:
        """Give the connection up when nothing comes over it any more."""
        received, pinged = 0, time.monotonic()
        while not self.client.is_closed and time.monotonic() - self._heard < _SILENCE_SECS:
            if time.monotonic() - pinged >= _PING_SECS:
                pinged = time.monotonic()
                self._begin_ping()
            await asyncio.sleep(1.0)
            if self.client.stats["in_msgs"] != received:
                received = self.client.stats["in_msgs"]
                self._heard = time.monotonic()
        self.lose()


class Connection:
    """A connection that is made at its first use, and made again when it is lost."""

    def __init__(self, own: loop.Loop, servers: tuple[str, ...], path: str) -> None:
        """Initialize without connecting."""
        self.loop = own
        self.users = 0
        self._path = path
        #: Whether there are several servers, as far as is known.
        self.is_cluster = len(servers) > 1
        self._servers = servers
        self._link: Link | None = None
        self._latest = ""
        self._connecting = asyncio.Lock()
        self._was_connected = self._is_closed = False
        self._complaint: BaseException | None = None

    async def close(self) -> None:
        """Close the connection; what was asked for and not answered is lost."""
        self._is_closed = True
        link, self._link = self._link, None
        if link is not None:
            link.lose()
            await link.close()

    # Connecting

    def ready(self) -> Link | None:
        """Return the connection if there is one."""
        return None if self._link is None or self._link.is_lost else self._link

    async def link(self, deadline: float) -> Link:
        """Wait until there is a connection."""
        link = self.ready()
        if link is not None:
            return link
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                async with self._connecting:
                    if self._is_closed:
                        raise errors.closed(self._path)
                    self._link = self.ready() or await self._connect(deadline)
                    return self._link
        except TimeoutError:
            raise self._unreachable() from None

    async def _connect(self, deadline: float) -> Link:
        """Connect to any of the servers; try until the time is over, or one does not let us in."""
        options = _credentials(self._path)
        until = deadline
        if not self._was_connected:
            until = min(deadline, time.monotonic() + _FIRST_SECS)
        while True:
            # The one that was lost comes last.
            for server in sorted(self._servers,
                                 key=lambda one: (one == self._latest, random.random())):
                link = Link(self.loop, self._complain)
                try:
                    # In a task of its own: what it opens is noted in its context.
                    await self.loop.start(link.connect(server, options))
                except (nats.errors.Error, OSError) as error:
                    if isinstance(error, ssl.SSLError) or errors.is_refusal(error):
                        raise errors.translate(error, self._path) from None
                    self._complaint = error
                except Exception as error:
                    # What it reads credentials with has errors of its own, and raises KeyError.
                    raise persipubsub.errors.AccessError(
                        f"Expected credentials for {self._path} in NATS_CREDS or NATS_NKEY, but "
                        f"got: {errors.describe(error)}") from None
                else:
                    self._latest, self._was_connected, self._complaint = server, True, None
                    return link
                if time.monotonic() >= until:
                    raise self._unreachable()
            await asyncio.sleep(PAUSE_SECS)

    def _complain(self, error: BaseException) -> None:
        self._complaint = error

    def _unreachable(self) -> persipubsub.errors.UnavailableError:
        found = "none" if self._complaint is None else errors.describe(self._complaint)
        return persipubsub.errors.UnavailableError(
            f"Expected a connection to the servers of {self._path}, but got: {found}")

    def check_rights(self, subject: str) -> None:
        """
        Raise an error if a server told us that we may not do what we asked for.

        It does not answer such a request, but complains on the side.
        """
        complaint = self._complaint
        text = str(complaint).lower()
        if "permissions violation" in text and subject.lower() in text:
            self._complaint = None
            raise persipubsub.errors.AccessError(
                f"Expected the rights to use {self._path}, but got: {complaint}")

    # Asking

    async def ask(self,
                  subject: str,
                  payload: bytes,
                  deadline: float,
                  is_api: bool = False) -> nats.aio.msg.Msg:
        """Ask until there is an answer. The request has to be one that may be repeated."""
        attempt = FIRST_ATTEMPT_SECS
        begin = time.monotonic()
        while True:
            link = await self.link(deadline)
            # Over a slow connection, an answer takes as long as that of a ping.
            seconds = min(max(attempt, 2 * link.rtt), deadline - time.monotonic())
            try:
                return await link.request(subject, payload, max(0.05, seconds))
            except UNANSWERED as error:
                if time.monotonic() >= deadline:
                    raise errors.translate(error, self._path) from None
                if is_api and isinstance(error, nats.errors.NoRespondersError):
                    if time.monotonic() - begin > _NO_JETSTREAM_SECS:
                        raise persipubsub.errors.UnavailableError(
                            f"Expected servers of {self._path} with JetStream (nats-server -js), "
                            f"but got: a server without it") from None
                elif isinstance(error, TimeoutError):
                    self.check_rights(subject)
                    # Before the server has read it, there is no use in asking again.
                    await link.ping(deadline)
                    attempt = min(2 * attempt, LONGEST_ATTEMPT_SECS)
            await asyncio.sleep(PAUSE_SECS)

    async def api(self,
                  verb: str,
                  body: Mapping[str, Any] | None,
                  deadline: float,
                  confirms: bool = True) -> dict[str, Any]:
        """
        Ask the API of JetStream; raise ApiError at a refusal that waiting does not change.

        Without ``confirms``, it is believed at once that a stream or a consumer is not there.
        """
        payload = b"" if body is None else json.dumps(body).encode("utf-8")
        recovery = RECOVERY_SECS if self.is_cluster else REPLACED_SECS
        until = min(deadline, time.monotonic() + recovery)
        while True:
            message = await self.ask(f"$JS.API.{verb}", payload, deadline, is_api=True)
            answer: dict[str, Any] = json.loads(message.data)
            if "error" not in answer:
                return answer
            error = errors.ApiError(answer["error"])
            if error.is_temporary():
                if time.monotonic() >= deadline:
                    raise persipubsub.errors.UnavailableError(
                        f"Expected the servers of {self._path} to be ready, but got: {error}")
            elif not confirms or not error.is_missing() or time.monotonic() >= until:
                raise error
            await asyncio.sleep(PAUSE_SECS)


def _credentials(path: str) -> dict[str, Any]:
    """Take the arguments of the client that say who we are from the environment."""
    found = {name: value for name in _VARIABLES if (value := os.environ.get(name))}
    options: dict[str, Any] = {}
    for name, argument in (("NATS_CREDS", "user_credentials"), ("NATS_NKEY", "nkeys_seed"),
                           ("NATS_USER", "user"), ("NATS_PASSWORD", "password"), ("NATS_TOKEN",
                                                                                  "token")):
        if name in found:
            options[argument] = found[name]
    for name in ("NATS_CREDS", "NATS_NKEY", "NATS_CA", "NATS_CERT", "NATS_KEY"):
        if name in found and not os.access(found[name], os.R_OK):
            raise persipubsub.errors.AccessError(
                f"Expected a file that can be read in {name} for the queue {path}, but got: "
                f"{found[name]!r}")
    if "NATS_CA" in found or "NATS_CERT" in found:
        try:
            context = ssl.create_default_context(cafile=found.get("NATS_CA"))
            if "NATS_CERT" in found:
                context.load_cert_chain(found["NATS_CERT"], found.get("NATS_KEY"))
        except (OSError, ssl.SSLError) as error:
            raise persipubsub.errors.AccessError(
                f"Expected certificates in NATS_CA, NATS_CERT and NATS_KEY for the queue "
                f"{path}, but got: {error}") from None
        options["tls"] = context
    return options


#: Connections by loop, servers and credentials. Only the loop's own thread changes it.
_CONNECTIONS: weakref.WeakKeyDictionary[loop.Loop, dict[Any, Connection]]
_CONNECTIONS = weakref.WeakKeyDictionary()


def acquire(own: loop.Loop, servers: tuple[str, ...], path: str) -> Connection:
    """Share a connection, which has to be released."""
    connections = _CONNECTIONS.setdefault(own, {})
    key = (servers, tuple(os.environ.get(name) for name in _VARIABLES))
    connection = connections.get(key)
    if connection is None:
        connection = connections[key] = Connection(own, servers, path)
    connection.users += 1
    return connection


async def release(connection: Connection) -> None:
    """Give a connection up, and close it if nobody else uses it."""
    connection.users -= 1
    if connection.users > 0:
        return
    connections = _CONNECTIONS.get(connection.loop, {})
    for key in [key for key, other in connections.items() if other is connection]:
        del connections[key]
    await connection.close()
