"""
Know more of a client of NATS than it tells, let go of servers that read nothing, and end for good.

The client does not bound what it does: it waits without end for a server that reads nothing, and
takes it for granted that a task is over which it cancelled once.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import logging
import time
from typing import Final

import nats.aio.client
import nats.errors

_LOGGER = logging.getLogger("persipubsub.jetstream")

#: Nothing is published while so many bytes wait for the server to read them.
_MOST_PENDING_BYTES: Final = 1 << 24

#: What is still to be written when a connection is closed is waited for so long, in seconds.
_CLOSE_SECS: Final = 1.0

#: A connection that is being closed is looked at this often, in seconds.
_LOOK_SECS: Final = 0.02

#: A task that goes on although it was cancelled is cancelled again after so many seconds.
_PAUSE_SECS: Final = 0.1


class Client(nats.aio.client.Client):
    """Be a client that lets go of a server which reads nothing, and goes on to the next one."""

    async def _attempt_reconnect(self) -> None:
        """Connect again; what was not written yet is lost with the connection."""
        transport = transport_of(self)
        if transport is not None:
            # Closing alone waits until the server has read what is still to be written: for ever,
            # although there are other servers.
            transport.abort()
        await super()._attempt_reconnect()


async def give_up(connecting: "asyncio.Task[None]", client: nats.aio.client.Client) -> None:
    """
    End an attempt to connect, and close what it has made so far.

    :param connecting: the attempt; may be over
    :param client: that is to be connected
    """
    await _end(connecting)
    if not connecting.cancelled():
        # Otherwise asyncio complains that nobody has looked at it.
        connecting.exception()
    await close(client)


async def _end(task: "asyncio.Task[None]") -> None:
    """
    Cancel a task of a client until it is over.

    :param task: that connects; may be over
    """
    # Once is not enough: what has just been waited for is taken instead (before Python 3.12), and
    # the client would go on for ever, unknown to anybody.
    while not task.done():
        task.cancel()
        await asyncio.wait((task, ), timeout=_PAUSE_SECS)


async def close(client: nats.aio.client.Client) -> None:
    """
    Close a client, whatever state it is in.

    :param client: to be closed
    """
    # pylint: disable=protected-access
    reconnecting: asyncio.Task[None] | None = client._reconnection_task
    if reconnecting is not None:
        # The client would cancel it once.
        await _end(reconnecting)
    transport = transport_of(client)
    if transport is not None:
        until = time.monotonic() + _CLOSE_SECS
        while _is_behind(client, transport) and time.monotonic() < until:
            await asyncio.sleep(_LOOK_SECS)
        if _is_behind(client, transport):
            # The client would wait for it without end, and leave the connection if we gave up.
            forget(client)
            transport.abort()
    try:
        async with asyncio.timeout(_CLOSE_SECS):
            await client.close()
    except (TimeoutError, nats.errors.Error, OSError):
        pass
    except Exception as error:  # pylint: disable=broad-exception-caught
        # The client raises whatever its half-made connection raises (AttributeError, for one).
        _LOGGER.debug("Closing a connection failed: %s", error)


def transport_of(client: nats.aio.client.Client | None) -> asyncio.WriteTransport | None:
    """
    Find the transport of a connection.

    :param client: perhaps connected
    :return: transport; None if there is none
    """
    writer = getattr(getattr(client, "_transport", None), "_io_writer", None)
    return None if writer is None else writer.transport


def is_ready(client: nats.aio.client.Client) -> bool:
    """
    Tell whether a client may publish.

    :param client: to be used
    :return: False while it is not connected, or too much waits for the server to read it
    """
    return client.is_connected and client.pending_data_size < _MOST_PENDING_BYTES


def heard(client: nats.aio.client.Client) -> None:
    """
    Note that something came over a connection, so that it is not taken for dead.

    The client itself waits for the answers to its pings, which come behind all that the server had
    begun to send: over a slow connection, that takes longer than it waits.

    :param client: of the connection
    """
    # pylint: disable-next=protected-access
    client._pings_outstanding = 0


def _is_behind(client: nats.aio.client.Client, transport: asyncio.WriteTransport) -> bool:
    """
    Tell whether something is still to be written to the socket.

    :param client: of the connection
    :param transport: of the connection
    :return: False if not, or if there is no connection any more
    """
    return client.is_connected and bool(client.pending_data_size
                                        or transport.get_write_buffer_size())


def forget(client: nats.aio.client.Client) -> None:
    """
    Drop what a client did not write to its socket yet.

    :param client: whose connection is over
    """
    # pylint: disable=protected-access
    client._pending = []
    client._pending_data_size = 0
