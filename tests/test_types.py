"""Test that users of a type checker see exact types, and their mistakes."""

import re
import sys
from pathlib import Path

import pytest

from tests import support

_RIGHT = '''
import pathlib
from typing import Any, assert_type

import persipubsub
import persipubsub.aio
import persipubsub.config
import persipubsub.publisher
import persipubsub.subscriber
from persipubsub import AsyncPub, AsyncSub, Pub, Sub
from persipubsub.message import Message
from persipubsub.statistics import SubscriberStatistics

assert_type(Pub(), persipubsub.publisher.Pub)
assert_type(persipubsub.Sub(), persipubsub.subscriber.Sub)
assert_type(AsyncPub(), persipubsub.aio.Pub)
assert_type(persipubsub.AsyncSub(), persipubsub.aio.Sub)


def threads(config: persipubsub.config.Config) -> None:
    with Pub("pub", "config.json") as pub, Sub("sub", pathlib.Path("config.json")) as sub:
        assert_type(pub, Pub)
        pub.send(b"", timeout=1)
        pub.send_many([b"", bytearray()], msg_ids=["1", None])
        with sub.receive() as msg:
            assert_type(msg, bytes | None)
        with sub.receive(details=True) as detailed:
            assert_type(detailed, Message | None)
        with sub.receive_to_top(timeout=None) as msg:
            assert_type(msg, bytes | None)
        with sub.receive_to_top(details=True) as detailed:
            assert_type(detailed, Message | None)
        with sub.receive_many(10) as msgs:
            assert_type(msgs, list[bytes])
        with sub.receive_many(10, details=True) as many:
            assert_type(many, list[Message])
        for one in sub:
            assert_type(one, bytes)
        for one in sub.messages(prefetch=10):
            assert_type(one, bytes)
        with sub.messages(timeout=1, details=True) as messages:
            for each in messages:
                assert_type(each, Message)
                assert_type(each.dropped_before, int)
        assert_type(sub.front(), bytes | None)
        assert_type(sub.statistics(), SubscriberStatistics)
    Sub("sub", config)
    Sub("sub", {"sub": {"in_queue": "q"}, "queues": {"q": {"subscribers": ["sub"]}}})


async def tasks(config: dict[str, Any]) -> None:
    async with AsyncPub("pub", config) as pub, AsyncSub("sub", config) as sub:
        assert_type(sub, AsyncSub)
        await pub.send(memoryview(b""), msg_id=b"1")
        async with sub.receive() as msg:
            assert_type(msg, bytes | None)
        async with sub.receive(details=True) as detailed:
            assert_type(detailed, Message | None)
        async with sub.receive_to_top(details=True) as detailed:
            assert_type(detailed, Message | None)
        async with sub.receive_many(10) as msgs:
            assert_type(msgs, list[bytes])
        async with sub.receive_many(10, details=True) as many:
            assert_type(many, list[Message])
        async for one in sub:
            assert_type(one, bytes)
        async for each in sub.messages(details=True, prefetch=2):
            assert_type(each, Message)
        assert_type(await sub.front(), bytes | None)
        assert_type(await sub.statistics(), SubscriberStatistics)
'''

_ENGINES = '''
import persipubsub.jetstream.engine
import persipubsub.queue
from persipubsub.engine import Consumer, Engine, Lease, Queue

engines: list[Engine] = [persipubsub.queue, persipubsub.jetstream.engine]


def check(lmdb: persipubsub.queue.Queue, nats: persipubsub.jetstream.engine.Queue) -> None:
    queue: Queue = lmdb
    consumer: Consumer = lmdb.consumer("sub")
    queue = nats
    consumer = nats.consumer("sub")
    lmdb_lease = lmdb.consumer("sub").take(0)
    nats_lease = nats.consumer("sub").take(0)
    assert lmdb_lease is not None and nats_lease is not None
    lease: Lease = lmdb_lease
    lease = nats_lease
'''

_WRONG = '''
from persipubsub import AsyncSub, Pub, Sub, Pubb

Pub().send("text")
Sub("sub", 5)
Sub().receive(timeout="5")
async def main() -> None:
    async for msg in AsyncSub().messages():
        msg.decode().number
    with AsyncSub().receive() as msg: pass
'''


@pytest.mark.slow
def test_types_are_exact_and_mistakes_are_found(tmp_path: Path) -> None:
    """What the faces use of the engines is right, too."""
    for name, code in (("right", _RIGHT), ("engines", _ENGINES), ("wrong", _WRONG)):
        (tmp_path / f"{name}.py").write_text(code)
    done = support.run([
        sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir",
        tmp_path / "cache", *tmp_path.glob("*.py")
    ],
                       cwd=Path(__file__).parent.parent)
    assert done.stderr == ""
    found = sorted(
        set(re.findall(rf"^{tmp_path}/(\w+\.py:\d+): error: ", done.stdout, re.MULTILINE)))
    assert found == [f"wrong.py:{line}" for line in (10, 2, 4, 5, 6, 9)], done.stdout
