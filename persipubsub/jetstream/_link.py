"""
Hold one connection to the servers of a stream, and ask them until they answer or the time is over.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`. Queues at the same servers
share a connection. Credentials come from the environment, under the names that the tool ``nats``
uses.
"""

import asyncio
import json
import os
import ssl
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeAlias

import nats.aio.client
import nats.aio.msg
import nats.errors

import persipubsub.errors
from persipubsub.jetstream import _asking, _clients, _errors, _loop

#: Is awaited before a request is repeated.
Before: TypeAlias = Callable[[], Coroutine[Any, Any, None]]

#: Variables of the environment that say who we are.
_VARIABLES: Final = ("NATS_CREDS", "NATS_NKEY", "NATS_USER", "NATS_PASSWORD", "NATS_TOKEN",
                     "NATS_CA", "NATS_CERT", "NATS_KEY")

#: A connection that was reset while it was made is made again after this time, in seconds.
_AGAIN_SECS: Final = 0.05

#: The first connection is not waited for longer than that, in seconds.
_CONNECT_SECS: Final = 10.0

#: Servers are asked this often whether they are there, in seconds; a connection over which nothing
#: comes is given up after the third time.
_PING_SECS: Final = 5

#: A request that is not answered is repeated after so many seconds, at first and at most.
_FIRST_ATTEMPT_SECS: Final = 1.0
_LONGEST_ATTEMPT_SECS: Final = 5.0

_PAUSE_SECS: Final = 0.1

#: A connection that is being made again, or that is behind, is looked at this often, in seconds.
_LOOK_SECS: Final = 0.02

#: A cluster that was started again does not know all of its consumers for a moment, and says that
#: they are not there; that is believed after so many seconds.
RECOVERY_SECS: Final = 5.0

#: No answer of a server that says it has no JetStream is believed after so many seconds.
_NO_JETSTREAM_SECS: Final = 2.0


class Link:
    """Be a connection that is made at its first use, and made again when it is lost."""

    def __init__(self, loop: _loop.Loop, servers: tuple[str, ...], path: str) -> None:
        """
        Initialize without connecting.

        :param loop: that it runs in
        :param servers: addresses of some servers
        :param path: of a queue, for errors
        """
        self.loop = loop
        self.users = 0
        self._is_closed = False
        self._servers = servers
        self._path = path
        self._client: nats.aio.client.Client | None = None
        # Guards the making of a connection, and lets those who wait for one go on in the order in
        # which they began: what was lost with the last one would come behind later messages.
        self._line = _asking.Line()
        self._answers: _asking.Answers | None = None
        self._complaint: BaseException | None = None
        loop.closers.append(self.close)
        loop.sockets.append(self._descriptor)

    async def close(self) -> None:
        """Close the connection; what was asked for and not answered is lost."""
        for listed, own in ((self.loop.closers, self.close), (self.loop.sockets, self._descriptor)):
            if own in listed:
                listed.remove(own)  # type: ignore[arg-type]
        self._is_closed = True
        if self._answers is not None:
            self._answers.lose()
        client, self._client = self._client, None
        if client is not None:
            await _clients.close(client)

    def _descriptor(self) -> int:
        """
        Find the socket of the connection.

        :return: its descriptor; -1 if there is none
        """
        transport = _clients.transport_of(self._client)
        socket = None if transport is None else transport.get_extra_info("socket")
        return -1 if socket is None else int(socket.fileno())

    # Connecting

    async def client(self, deadline: float, ticket: int | None = None) -> nats.aio.client.Client:
        """
        Wait until there is a connection, and the server reads what is sent over it.

        :param deadline: on the monotonic clock
        :param ticket: of the line; a new one if not given
        :return: client that is connected
        :raise UnavailableError: if no server answers in time
        :raise AccessError: if a server does not let us in
        """
        client = self._client
        if client is not None and _clients.is_ready(client) and self._line.is_empty():
            return client
        ticket = self._line.draw() if ticket is None else ticket
        while True:
            try:
                await self._line.enter(ticket, max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise self._unreachable() from None
            try:
                client = await self._until_ready(deadline)
                if self._line.is_first(ticket):
                    return client
            finally:
                self._line.leave()

    async def _until_ready(self, deadline: float) -> nats.aio.client.Client:
        """
        Wait until there is a connection, as the first one in line.

        :param deadline: on the monotonic clock
        :return: client that is connected
        """
        while True:
            client = self._client
            if self._is_closed:
                # Perhaps while we were connecting, when there was nothing to be closed yet.
                await self.close()
                raise _errors.closed(self._path)
            if client is None or client.is_closed:
                self._client = await self._connect(deadline)
            elif _clients.is_ready(client):
                return client
            elif time.monotonic() >= deadline:
                raise self._unreachable()
            else:
                # It is reconnecting, or far behind. What we published now would be out of order.
                await asyncio.sleep(_LOOK_SECS)

    async def _connect(self, deadline: float) -> nats.aio.client.Client:
        """
        Connect, and wait for it no longer than is reasonable.

        :param deadline: on the monotonic clock
        :return: client that is connected
        """
        self._complaint = None
        refused = asyncio.Event()

        async def complain(error: BaseException) -> None:
            self._complaint = error
            if isinstance(error, ssl.SSLError) or _errors.is_refusal(error):
                refused.set()

        client = _clients.Client()

        async def forget() -> None:
            # It would be sent over the next connection, behind what was lost with this one: out of
            # order. Whoever waits for an answer asks again.
            _clients.forget(client)
            if self._answers is not None and self._answers.client is client:
                self._answers.lose()

        # With endless reconnects, which are needed later on, this alone would never return.
        connecting = asyncio.ensure_future(
            client.connect(
                servers=list(self._servers),
                error_cb=complain,
                disconnected_cb=forget,
                name="persipubsub",
                connect_timeout=2,
                reconnect_time_wait=0.1,  # type: ignore[arg-type]
                max_reconnect_attempts=-1,
                ping_interval=_PING_SECS,
                # No more than that would be waited for without end, whatever the timeout. So we
                # look for ourselves, and nothing is taken while there is no connection.
                pending_size=-1,
                # Without end, too, would wait who has something written behind a thousand others:
                # the pings among them, by which a dead connection is known.
                flusher_queue_size=0,
                **_credentials(self._path)))
        waiting = asyncio.ensure_future(refused.wait())
        pause = max(0.05, min(_CONNECT_SECS, deadline - time.monotonic()))
        try:
            await asyncio.wait((connecting, waiting),
                               timeout=pause,
                               return_when=asyncio.FIRST_COMPLETED)
            is_over = connecting.done()
            error = connecting.exception() if is_over else self._complaint
            if is_over and error is None:
                return client
        except asyncio.CancelledError:
            await _clients.give_up(connecting, client)
            raise
        finally:
            waiting.cancel()
        await _clients.give_up(connecting, client)
        if isinstance(error, ConnectionResetError) and time.monotonic() < deadline:
            # A server that refuses us closes at once: its reason may be lost with the connection.
            await asyncio.sleep(_AGAIN_SECS)
            return await self._connect(deadline)
        if error is None:
            raise self._unreachable()
        if is_over and not isinstance(error, (nats.errors.Error, OSError)):
            # What it reads credentials with has errors of its own, and raises KeyError as well.
            raise persipubsub.errors.AccessError(
                f"Expected credentials for {self._path} in NATS_CREDS or NATS_NKEY, but got: "
                f"{_errors.describe(error)}")
        raise _errors.translate(error, self._path) from None

    def _unreachable(self) -> persipubsub.errors.UnavailableError:
        """
        Describe servers that can not be reached.

        :return: error to be raised
        """
        if self._client is not None and self._client.is_connected:
            found = "one over which they do not read what was sent"
        else:
            found = "none" if self._complaint is None else _errors.describe(self._complaint)
        return persipubsub.errors.UnavailableError(
            f"Expected a connection to the servers of {self._path}, but got: {found}")

    # Asking

    async def request(self,
                      subject: str,
                      payload: bytes,
                      deadline: float,
                      headers: Mapping[str, str] | None = None,
                      before: Before | None = None,
                      takes_late: bool = True) -> nats.aio.msg.Msg:
        """
        Ask until there is an answer. The request has to be one that may be repeated.

        :param subject: of the request
        :param payload: of the request
        :param deadline: on the monotonic clock
        :param headers: of the request
        :param before: is awaited before each repetition
        :param takes_late: False to take no answer to what was asked before the last time
        :return: the answer
        :raise UnavailableError: if there was none in time
        """
        attempt = _FIRST_ATTEMPT_SECS
        begin = time.monotonic()
        question: _asking.Question | None = None
        ticket, is_again = self._line.draw(), False
        try:
            while True:
                client = await self.client(deadline, ticket)
                reconnects = client.stats["reconnects"]
                if is_again and before is not None:
                    await before()
                    if not client.is_connected or client.stats["reconnects"] != reconnects:
                        continue
                is_again = True
                try:
                    question = await self._question(client, question)
                    await question.ask(subject, payload, headers,
                                       max(0.05, min(attempt, deadline - time.monotonic())))
                    if not question.answer.done():
                        attempt = min(2 * attempt, _LONGEST_ATTEMPT_SECS)
                        self.check_rights()
                        await question.until_read(deadline)
                    message = question.result()
                    if not _asking.is_nobody(message):
                        return message
                    # Nobody leads the stream for a moment, or there is no JetStream at all.
                    self._check_jetstream(client, begin)
                    raise nats.errors.NoRespondersError
                except (nats.errors.TimeoutError, nats.errors.NoRespondersError,
                        nats.errors.ConnectionClosedError, nats.errors.ConnectionReconnectingError,
                        nats.errors.StaleConnectionError, nats.errors.OutboundBufferLimitError,
                        OSError) as error:
                    if time.monotonic() >= deadline:
                        raise _errors.translate(error, self._path) from None
                if question is not None:
                    question = question.again(takes_late)
                if client.is_connected:
                    await asyncio.sleep(_PAUSE_SECS)
        finally:
            if question is not None:
                question.end()

    async def _question(self, client: nats.aio.client.Client,
                        question: _asking.Question | None) -> _asking.Question:
        """
        Find what asks over a connection.

        :param client: of the connection
        :param question: that was used so far
        :return: the same, or another one if that is of a connection that is gone
        """
        if question is not None and question.answers.client is client:
            return question
        if self._answers is None or self._answers.client is not client:
            self._answers = await _asking.Answers(client).listen()
        return _asking.Question(self._answers)

    def _check_jetstream(self, client: nats.aio.client.Client, begin: float) -> None:
        """
        Check that a server that knows nobody who answers has JetStream.

        :param client: of the connection
        :param begin: since when it is asked, on the monotonic clock
        :raise UnavailableError: if it has not, for a while
        """
        # pylint: disable-next=protected-access
        is_enabled = bool(client._server_info.get("jetstream"))
        if not is_enabled and time.monotonic() - begin > _NO_JETSTREAM_SECS:
            raise persipubsub.errors.UnavailableError(
                f"Expected servers of {self._path} with JetStream (nats-server -js), but got: a "
                f"server without it") from None

    async def ask(self,
                  subject: str,
                  payload: bytes,
                  deadline: float,
                  headers: Mapping[str, str] | None = None,
                  before: Before | None = None) -> dict[str, Any]:
        """
        Ask, as :py:meth:`request` does, for an answer of JetStream.

        :param subject: of the request
        :param payload: of the request
        :param deadline: on the monotonic clock
        :param headers: of the request
        :param before: is awaited before each repetition
        :return: the answer
        :raise ApiError: if it is a refusal that waiting does not change
        """
        while True:
            message = await self.request(subject, payload, deadline, headers, before)
            answer: dict[str, Any] = json.loads(message.data)
            if "error" not in answer:
                return answer
            error = _errors.ApiError(answer["error"])
            if not error.is_temporary():
                raise error
            if time.monotonic() >= deadline:
                raise persipubsub.errors.UnavailableError(
                    f"Expected the servers of {self._path} to be ready, but got: {error}")
            await asyncio.sleep(_PAUSE_SECS)
            if before is not None:
                await before()

    async def api(self,
                  verb: str,
                  body: Mapping[str, Any] | None,
                  deadline: float,
                  confirms: bool = True) -> dict[str, Any]:
        """
        Ask the API of JetStream.

        :param verb: subject without its prefix, such as ``STREAM.INFO.name``
        :param body: of the request
        :param deadline: on the monotonic clock
        :param confirms: False to believe at once that a stream or a consumer is not there
        :return: the answer
        :raise ApiError: if it is a refusal that waiting does not change
        """
        payload = b"" if body is None else json.dumps(body).encode("utf-8")
        until = min(deadline, time.monotonic() + RECOVERY_SECS)
        while True:
            try:
                return await self.ask(f"$JS.API.{verb}", payload, deadline)
            except _errors.ApiError as error:
                if (not confirms or not error.is_missing() or not self.is_cluster()
                        or time.monotonic() >= until):
                    raise
            await asyncio.sleep(_PAUSE_SECS)

    def is_cluster(self) -> bool:
        """
        Tell whether there are several servers.

        :return: False if not, or not known yet
        """
        # pylint: disable-next=protected-access
        return self._client is not None and bool(self._client._server_info.get("cluster"))

    def max_payload(self) -> int:
        """
        Tell how large a message may be.

        :return: in bytes; the default of the servers if they are not known yet
        """
        return 1 << 20 if self._client is None else self._client.max_payload

    def check_rights(self, subject: str = "") -> None:
        """
        Look whether a server told us that we may not do what we asked for.

        It does not answer such a request, but complains on the side.

        :param subject: of the request; if not given, of any that was made lately
        :raise AccessError: if it did
        """
        complaint = self._complaint
        text = str(complaint).lower()
        if subject.lower() not in text:
            return  # whoever asked for that will look
        self._complaint = None
        if "permissions violation" in text:
            raise persipubsub.errors.AccessError(
                f"Expected the rights to use {self._path}, but got: {complaint}")


def _credentials(path: str) -> dict[str, Any]:
    """
    Take from the environment who we are.

    :param path: of the queue, for errors
    :return: arguments of the client
    """
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
_LINKS: weakref.WeakKeyDictionary[_loop.Loop, dict[Any, Link]] = weakref.WeakKeyDictionary()


def acquire(loop: _loop.Loop, servers: tuple[str, ...], path: str) -> Link:
    """
    Share a connection. Only for the loop's own thread.

    :param loop: of this process
    :param servers: addresses of some servers
    :param path: of the queue, for errors
    :return: to be released
    """
    links = _LINKS.setdefault(loop, {})
    key = (servers, tuple(os.environ.get(name) for name in _VARIABLES))
    link = links.get(key)
    if link is None:
        link = links[key] = Link(loop, servers, path)
    link.users += 1
    return link


async def release(link: Link) -> None:
    """
    Give a connection up, and close it if nobody else uses it.

    :param link: that was acquired
    """
    link.users -= 1
    if link.users > 0:
        return
    links = _LINKS.get(link.loop, {})
    for key in [key for key, other in links.items() if other is link]:
        del links[key]
    await link.close()
