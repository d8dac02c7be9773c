"""Test what a queue on NATS JetStream offers to tasks, of whatever event loop."""

import asyncio
import contextlib
import itertools
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from persipubsub import config
from persipubsub.jetstream import engine
from tests import jetstream_server
from tests.faults import tracing
from tests.jetstream_server import ask
from tests.support import HANG_SECS
from tests.test_behaviour import lags, numbered

pytestmark = jetstream_server.needs_server

Work = Callable[[Path], Coroutine[Any, Any, None]]


@pytest.fixture(name="config_pth")
def _config_pth(tmp_path: Path, servers: jetstream_server.Servers) -> Path:
    return jetstream_server.deploy(tmp_path, servers)


def in_loop(function: Work) -> Callable[[Path], None]:
    """Make a test of a coroutine function that gets the path of a configuration."""

    @pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
    def test(config_pth: Path, run: Callable[[Any], None]) -> None:
        run(asyncio.wait_for(function(config_pth), HANG_SECS))

    test.__doc__ = function.__doc__
    made: Callable[[Path], None] = test
    return made


def open_queue(config_pth: Path) -> engine.Queue:
    return engine.open_queue(config.read(config_pth), "queue")


@contextlib.asynccontextmanager
async def opened(config_pth: Path) -> AsyncIterator[tuple[engine.Queue, Any]]:
    """Open a queue and a consumer, without blocking the loop."""
    queue = await asyncio.to_thread(open_queue, config_pth)
    try:
        yield queue, await asyncio.to_thread(queue.consumer, "sub")
    finally:
        await asyncio.to_thread(queue.close)


async def receive(consumer: Any, timeout: float | None = HANG_SECS, count: int = 1) -> list[bytes]:
    lease = await consumer.atake(timeout, count)
    if lease is None:
        return []
    await lease.aack()
    messages: list[bytes] = lease.messages
    return messages


async def until_waiting(queue: engine.Queue, count: int) -> None:
    """Wait until so many pull requests wait at the server."""
    address = queue.settings.address
    port = int(address.servers[0].rpartition(":")[2])
    verb = f"CONSUMER.INFO.{address.stream}.sub"
    while (await asyncio.to_thread(ask, port, verb))["num_waiting"] != count:
        await asyncio.sleep(0.01)


@in_loop
async def test_waiting_and_sending_need_no_threads(config_pth: Path) -> None:
    async with opened(config_pth) as (queue, consumer):
        before = threading.active_count()
        tasks = [asyncio.ensure_future(receive(consumer)) for _ in range(600)]
        await asyncio.sleep(0.2)
        sending = [asyncio.ensure_future(queue.aput([one])) for one in numbered(600)]
        await asyncio.wait(sending[:1], return_when=asyncio.FIRST_COMPLETED)
        assert threading.active_count() <= before
        await asyncio.gather(*sending)
        found = await asyncio.gather(*tasks)
        assert sorted(itertools.chain(*found)) == sorted(numbered(600))
    assert lags(config_pth) == {"sub": 0}


@pytest.mark.parametrize("mark", [1000000, 2000])
def test_batches_and_messages_are_in_the_order_of_the_calls(tmp_path: Path,
                                                            servers: jetstream_server.Servers,
                                                            mark: int) -> None:
    """With the lower mark, the server is asked for each message of the larger batch by itself."""
    config_pth = jetstream_server.deploy(tmp_path, servers, MAX_MSGS_NUM=mark)
    messages = numbered(1000)

    async def main() -> None:
        async with opened(config_pth) as (queue, consumer):
            await asyncio.gather(queue.aput(messages[:3]), queue.aput(messages[3:4]),
                                 queue.aput(messages[4:5]), queue.aput(messages[5:900]),
                                 queue.aput(messages[900:901]), queue.aput(messages[901:903]),
                                 *(queue.aput([one]) for one in messages[903:]))
            assert await receive(consumer, count=2000) == messages

    asyncio.run(asyncio.wait_for(main(), HANG_SECS))


def test_batch_that_waits_for_room_holds_nobody_up(tmp_path: Path,
                                                   servers: jetstream_server.Servers) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers, MAX_MSGS_NUM=4, strategy="block")

    async def main() -> None:
        async with opened(config_pth) as (queue, consumer):
            await queue.aput(numbered(3))
            waiting = asyncio.ensure_future(queue.aput([b"a", b"b"]))
            # Its call comes first, and there is room for this one only.
            await asyncio.sleep(0)
            await queue.aput([b"3"])
            assert not waiting.done()
            assert await receive(consumer, count=4) == numbered(4)
            await waiting
            assert await receive(consumer, count=4) == [b"a", b"b"]

    asyncio.run(asyncio.wait_for(main(), HANG_SECS))


@in_loop
async def test_pull_request_of_a_cancelled_task_is_taken_over(config_pth: Path) -> None:
    async with opened(config_pth) as (queue, consumer):
        for message in numbered(10):
            for _ in range(2):
                task = asyncio.ensure_future(receive(consumer))
                await until_waiting(queue, 1)
                task.cancel()
                await asyncio.wait([task])
            taking = asyncio.ensure_future(consumer.atake(HANG_SECS))
            await asyncio.sleep(0.01)
            await queue.aput([message])
            lease = await taking
            assert [(one.data, one.attempts) for one in lease.details()] == [(message, 1)]
            await lease.aack()


@in_loop
async def test_message_does_not_stay_with_cancelled_tasks(config_pth: Path) -> None:
    async with opened(config_pth) as (queue, consumer), opened(config_pth) as (_, other):
        tasks = [asyncio.ensure_future(receive(consumer)) for _ in range(20)]
        await until_waiting(queue, 20)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await queue.aput([b"hello"])
        lease = await other.atake(HANG_SECS)
        # Not once for each of them.
        assert lease.messages == [b"hello"] and lease.details()[0].attempts <= 2
        await lease.aack()


@in_loop
async def test_cancelled_calls_are_carried_out(config_pth: Path) -> None:
    async with opened(config_pth) as (queue, consumer):
        for ending in ("aack", "anack"):
            putting = asyncio.ensure_future(queue.aput([b"hello"]))
            await asyncio.sleep(0)
            putting.cancel()
            lease = await consumer.atake(HANG_SECS)
            task = asyncio.ensure_future(getattr(lease, ending)())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if ending == "anack":
                assert await receive(consumer) == [b"hello"]
            assert await receive(consumer, timeout=0.05) == []
    assert lags(config_pth) == {"sub": 0}


async def storm(config_pth: Path, count: int, is_newest: bool) -> None:
    """Cancel tasks that take, at any moment, and check that each message comes once."""
    rng = random.Random(tracing.seed())
    total = 400
    received: list[bytes] = []
    async with opened(config_pth) as (queue, consumer):

        async def work() -> None:
            lease = await consumer.atake(HANG_SECS, count, is_newest)
            # Not cancelled from here on: it is known to have been worked on.
            received.extend(lease.messages)
            await asyncio.shield(asyncio.ensure_future(lease.aack()))

        sending = asyncio.ensure_future(send_slowly(queue, total, rng))
        tasks: set[asyncio.Task[None]] = set()
        while not sending.done() or (await asyncio.to_thread(lags, config_pth))["sub"]:
            while len(tasks) < 8:
                tasks.add(asyncio.create_task(work()))
            await asyncio.sleep(rng.random() * 0.005)
            victim = rng.choice(list(tasks))
            victim.cancel()
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert all(task.cancelled() or task.exception() is None for task in done)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await sending
    assert len(received) == len(set(received)) and set(received) <= set(numbered(total))
    if not is_newest:
        assert len(received) == total
    assert lags(config_pth) == {"sub": 0}


async def send_slowly(queue: engine.Queue, count: int, rng: random.Random) -> None:
    for message in numbered(count):
        await queue.aput([message])
        await asyncio.sleep(rng.random() * 0.002)


@in_loop
async def test_cancelled_skipping_forgets_nothing(config_pth: Path) -> None:
    await storm(config_pth, 1, True)
