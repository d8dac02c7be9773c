#!/usr/bin/env python3
"""
Work on the messages of a subscriber in tasks, until the process is told to end.

On SIGTERM (systemd stops it) or SIGINT (Ctrl-C), all tasks are cancelled. The messages at work are
given back, and the next process has them.
"""

import asyncio
import contextlib
import signal
import sys

from persipubsub import AsyncSub


async def work(msg: bytes) -> None:
    """Do something with a message; it comes again if the task is cancelled meanwhile."""
    await asyncio.sleep(0.05)
    print(msg.decode(), flush=True)


async def consume(sub: AsyncSub) -> None:
    """Work on one message after the other."""
    while True:
        async with sub.receive(timeout=None) as msg:
            if msg is not None:
                await work(msg)


async def main() -> None:
    """Start the tasks; an error of one of them ends all."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with AsyncSub("sub", sys.argv[1]) as sub, asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(consume(sub))


if __name__ == "__main__":
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(main())
