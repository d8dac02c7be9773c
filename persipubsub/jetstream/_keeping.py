"""
Keep messages: tell the servers that they are at work, also while others are still pulled for them.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

import persipubsub.errors
from persipubsub.jetstream import _inboxes, _stream


@contextlib.asynccontextmanager
async def kept(stream: _stream.Stream, pulled: Sequence[_inboxes.Pulled]) -> AsyncIterator[None]:
    """
    Tell the servers that messages are at work as long as the block lasts, which may be long.

    :param stream: of the queue
    :param pulled:
        messages, to which the block adds what it pulled: whoever is cancelled at its end has to
        know of that
    """
    # What is kept is up to a quarter of it old, and whoever gets it tells nothing for a third.
    pause = stream.settings.address.ack_wait_secs / 4
    begin = time.monotonic()
    keeping = asyncio.ensure_future(_keep(stream, pulled, pause)) if pulled else None
    try:
        yield
    finally:
        if keeping is not None:
            keeping.cancel()
    if time.monotonic() - begin > pause:
        # The last of it came just now, but may have been under way for as long.
        await tell(stream, pulled, pause)


async def _keep(stream: _stream.Stream, pulled: Sequence[_inboxes.Pulled], pause: float) -> None:
    """
    Tell the servers that messages are at work, again and again.

    :param stream: of the queue
    :param pulled: messages
    :param pause: in between, in seconds
    """
    while True:
        await asyncio.sleep(pause)
        await tell(stream, pulled, pause)


async def tell(stream: _stream.Stream, pulled: Sequence[_inboxes.Pulled], seconds: float) -> None:
    """
    Tell the servers, if they are there, that messages are at work.

    :param stream: of the queue
    :param pulled: messages
    :param seconds: how long to wait for a connection
    """
    with contextlib.suppress(persipubsub.errors.PersipubsubError):
        await _inboxes.keep(await stream.link.client(time.monotonic() + seconds), pulled)
