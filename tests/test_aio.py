"""Test the asynchronous face: scenarios that drive both faces, then what only tasks can do."""

# pylint: disable=missing-function-docstring

import asyncio
import concurrent.futures
import contextlib
import gc
import itertools
import os
import pathlib
import random
import re
import signal
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final, Optional

import pytest

import persipubsub.aio
import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.queue
from persipubsub import _delivery, _engines, _waking
from tests import faces, support
from tests.faces import scenario
from tests.faults import tracing

ROUNDS: Final = int(os.environ.get("PERSIPUBSUB_AIO_ROUNDS", "300"))


@pytest.fixture(name="config_pth")
def fixture_config_pth(tmp_path: pathlib.Path) -> pathlib.Path:
    config_pth = support.write_config(tmp_path,
                                      publishers={
                                          "pub": ("sub", "other"),
                                          "pub_other": ("other", )
                                      },
                                      subscribers=("sub", "other"))
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    return config_pth


@pytest.fixture(name="face",
                params=[faces.BLOCKING, faces.ASYNCIO, faces.UVLOOP, faces.PLAIN],
                ids=lambda face: face.name)
def fixture_face(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> faces.Face:
    face: faces.Face = request.param
    if face is faces.PLAIN:
        monkeypatch.setitem(_engines._MODULES, "", "tests.plain_engine")
    return face


class CountedLease(_delivery.Lease):
    """Be a lease of which it is known whether somebody forgot it, which no claim shows."""

    open: dict[int, list[int]] = {}
    serials = itertools.count()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Enter the lease."""
        super().__init__(*arguments, **named)
        self.serial = next(self.serials)
        self.open[self.serial] = self.numbers

    def acknowledge(self) -> None:
        """Strike the lease out."""
        del self.open[self.serial]
        super().acknowledge()

    def give_back(self, error: BaseException | None = None) -> None:
        """Strike the lease out."""
        del self.open[self.serial]
        super().give_back(error)


@pytest.fixture(name="leases")
def fixture_leases(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[CountedLease]]:
    """Check at the end that each lease was acknowledged or given back."""
    CountedLease.open.clear()
    monkeypatch.setattr(_delivery, "Lease", CountedLease)
    yield CountedLease
    support.until(lambda: not CountedLease.open, "every lease is acknowledged or given back")


#: For tests of what only tasks can do; all loops are alike to them.
on_loops = pytest.mark.parametrize("face", [faces.ASYNCIO, faces.UVLOOP],
                                   ids=lambda face: face.name)

on_any_engine = pytest.mark.parametrize("face", [faces.ASYNCIO, faces.UVLOOP, faces.PLAIN],
                                        ids=lambda face: face.name,
                                        indirect=True)


@contextlib.asynccontextmanager
async def opened(face: faces.Face, config_pth: pathlib.Path) -> AsyncIterator[tuple[Any, Any]]:
    async with face.pub() as pub, face.sub() as sub:
        await pub.init(pub_id="pub", config_pth=config_pth)
        await sub.init(sub_id="sub", config_pth=config_pth)
        yield pub, sub


async def receive(sub: Any, timeout: float | None = 0) -> bytes | None:
    async with sub.receive(timeout=timeout) as msg:
        message: bytes | None = msg
    return message


async def drain(sub: Any) -> list[bytes]:
    received: list[bytes] = []
    while (msg := await receive(sub)) is not None:
        received.append(msg)
    return received


def figures(config_pth: pathlib.Path) -> Any:
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        assert queue.check() == []
        return next(entry for entry in queue.statistics().subscribers if entry.subscriber == "sub")


def in_flight(config_pth: pathlib.Path) -> int | None:
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        return queue._claims.is_claimed(queue.consumer("sub")._pending.ordinal, 0, 1 << 40)


def inotify_descriptors() -> int:
    """Count those of this process."""
    return support.open_files().count("anon_inode:inotify")


# Both faces


@scenario
async def test_messages_come_in_order_and_once(face: faces.Face, config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        assert await receive(sub) is None
        await pub.send(b"one")
        await pub.send_many([bytearray(b"two"), memoryview(b""), b"three"])
        await pub.send_many([])
        assert await sub.front() == b"one"
        assert await drain(sub) == [b"one", b"two", b"", b"three"]
        assert await sub.front() is None
    assert figures(config_pth).acknowledged == 4


@scenario
async def test_audience(face: faces.Face, config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub), face.pub() as pub_other:
        await pub_other.init("pub_other", config_pth)
        await pub_other.send(b"for other")
        await pub.send(b"for all")
        assert await drain(sub) == [b"for all"]
        await sub.init("other", config_pth)
        assert await drain(sub) == [b"for other", b"for all"]


@pytest.mark.parametrize("kind", [ValueError, GeneratorExit, asyncio.CancelledError, MemoryError])
@scenario
async def test_exception_leaves_the_message(face: faces.Face, config_pth: pathlib.Path,
                                            kind: Any) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"one", b"two"])
        for _ in range(2):
            with pytest.raises(kind):
                async with sub.receive(timeout=0) as msg:
                    assert msg == b"one"
                    raise kind()
        with pytest.raises(kind):
            async with sub.receive_many(10, timeout=0) as msgs:
                assert msgs == [b"one", b"two"]
                raise kind()
        assert await drain(sub) == [b"one", b"two"]


@scenario
async def test_batches(face: faces.Face, config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        async with sub.receive_many(3, timeout=0) as msgs:
            assert msgs == []
        await pub.send_many([b"%d" % number for number in range(5)])
        for expected in ([b"0", b"1", b"2"], [b"3", b"4"], []):
            async with sub.receive_many(3, timeout=0) as msgs:
                assert msgs == expected
        for wrong in (0, -1, True, 1.5):
            with pytest.raises(ValueError, match="max_msgs"):
                sub.receive_many(wrong)
    assert figures(config_pth).acknowledged == 5


@scenario
async def test_pop_to_top(face: faces.Face, config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"one", b"two", b"three"])
        await sub.pop_to_top()
        assert await drain(sub) == [b"three"]


@scenario
async def test_wrong_arguments(face: faces.Face, config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        for wrong in ("text", None, 1):
            with pytest.raises(TypeError):
                await pub.send(wrong)
            with pytest.raises(TypeError):
                await pub.send_many([b"good", wrong])
        with pytest.raises(TypeError):
            await pub.send_many(b"bytes")
        for timeout in (-1, "1", float("nan")):
            with pytest.raises(ValueError, match="timeout"):
                sub.receive(timeout=timeout)
            with pytest.raises(ValueError, match="timeout"):
                await pub.send(b"", timeout=timeout)
            with pytest.raises(ValueError, match="timeout"):
                await pub.send(b"", timeout=timeout, msg_id="1")
            with pytest.raises(ValueError, match="timeout"):
                await pub.send_many([b""], timeout=timeout)
        for retries in (0, True):
            with pytest.raises(ValueError, match="retries"):
                sub.receive(retries=retries)
        assert await receive(sub) is None


@scenario
async def test_not_open(face: faces.Face, config_pth: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pub, sub = face.pub(), face.sub()
    for _ in range(2):
        for call in (lambda: pub.send(b""), lambda: pub.send_many([]), sub.front, sub.pop_to_top,
                     lambda: receive(sub)):
            with pytest.raises(persipubsub.errors.ClosedError, match="init"):
                await call()
        await pub.init("pub", config_pth)
        await sub.init("sub", config_pth)
        await pub.send(b"one")
        assert await receive(sub) == b"one"
        for _ in range(2):
            await pub.close()
            await sub.close()
    other_pth = support.write_config(tmp_path, name="other.json", path=str(tmp_path / "nothing"))
    with pytest.raises(persipubsub.errors.NotInitializedError):
        await pub.init("pub", other_pth)
    with pytest.raises(persipubsub.errors.NotInitializedError):
        await sub.init("sub", other_pth)
    with pytest.raises(persipubsub.errors.ConfigError):
        await sub.init("nobody", config_pth)


@scenario
async def test_message_that_is_too_large(face: faces.Face, tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, HWM_LMDB_SIZE_BYTES=100)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    async with opened(face, config_pth) as (pub, sub):
        for msgs in ([bytes(101)], [b"small", bytes(101)], [bytes(60)] * 2):
            with pytest.raises(persipubsub.errors.MessageTooLargeError):
                await pub.send_many(msgs)
        with pytest.raises(persipubsub.errors.MessageTooLargeError):
            await pub.send(bytes(101))
        await pub.init("pub", config_pth, autosync=True)
        with pytest.raises(persipubsub.errors.MessageTooLargeError):
            await pub.send_many([b"small", bytes(101)])
        await pub.send_many([bytes(60), bytes(40)])
        assert await drain(sub) == [bytes(60), bytes(40)]


@scenario
async def test_one_message_is_at_fault(face: faces.Face, tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, HWM_LMDB_SIZE_BYTES=10000)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    async with opened(face, config_pth) as (pub, sub):
        msgs = [b"%d" % number for number in range(20)]
        msgs[13] = bytes(20000)
        outcomes = await asyncio.gather(*map(pub.send, msgs), return_exceptions=True)
        error = outcomes.pop(13)
        assert isinstance(error, persipubsub.errors.MessageTooLargeError)
        assert outcomes == [None] * 19
        assert sorted(await drain(sub)) == sorted(msgs[:13] + msgs[14:])


@scenario
async def test_waiting_ends_with_the_timeout(face: faces.Face, config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (_, sub):
        begin = time.monotonic()
        outcomes = await asyncio.gather(receive(sub, 0.3), receive(sub, 0.2))
        assert list(outcomes) == [None, None]
        assert 0.3 <= time.monotonic() - begin < support.HANG_SECS


@pytest.mark.parametrize("is_polling", [False, True])
@scenario
async def test_waiting_is_ended_by_a_message(face: faces.Face, config_pth: pathlib.Path,
                                             is_polling: bool,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    if is_polling:
        monkeypatch.setenv("PERSIPUBSUB_POLLING", "1")
    times: list[float] = []
    async with opened(face, config_pth) as (pub, sub):
        for number in range(10):
            waiting = asyncio.ensure_future(receive(sub, None))
            await asyncio.sleep(0.02)
            begin = time.monotonic()
            await pub.send(b"%d" % number)
            assert await waiting == b"%d" % number
            times.append(time.monotonic() - begin)
    # Nobody waited for the look once a second; the machine may be busy now and then.
    assert sorted(times)[5] < 0.4, times


@scenario
async def test_waiting_goes_on_while_others_are_served(face: faces.Face,
                                                       config_pth: pathlib.Path) -> None:
    times: list[float] = []
    async with opened(face, config_pth) as (pub, sub):
        waiting: set["asyncio.Future[Optional[bytes]]"] = {
            asyncio.ensure_future(receive(sub, None))
            for _ in range(6)
        }
        while waiting:
            # Longer than others look while a message is claimed.
            await asyncio.sleep(0.15)
            begin = time.monotonic()
            await pub.send(b"one")
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            times.append(time.monotonic() - begin)
    assert sorted(times)[3] < 0.4, times


@scenario
async def test_tasks_share_the_messages(face: faces.Face, config_pth: pathlib.Path) -> None:
    received: list[bytes] = []

    async def consume(sub: Any) -> None:
        while (msg := await receive(sub, timeout=0.5)) is not None:
            received.append(msg)

    async with opened(face, config_pth) as (pub, sub):
        consuming = asyncio.gather(*(consume(sub) for _ in range(10)))
        for first in range(0, 200, 20):
            await asyncio.gather(*(pub.send(b"%d" % number) for number in range(first, first + 20)))
        await consuming
    assert sorted(map(int, received)) == list(range(200))
    assert figures(config_pth).acknowledged == 200


@scenario
async def test_message_given_back_goes_to_who_waits(face: faces.Face,
                                                    config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send(b"one")
        with pytest.raises(ValueError):
            async with sub.receive(timeout=0) as msg:
                assert msg == b"one"
                waiting = asyncio.ensure_future(receive(sub, None))
                await asyncio.sleep(0.1)
                assert not waiting.done()
                raise ValueError()
        assert await waiting == b"one"


@pytest.mark.parametrize("is_closed", [True, False])
@scenario
async def test_closing_while_tasks_wait(face: faces.Face, config_pth: pathlib.Path,
                                        is_closed: bool) -> None:
    async with opened(face, config_pth) as (pub, sub):
        waiting = [asyncio.ensure_future(receive(sub, None)) for _ in range(3)]
        await asyncio.sleep(0.05)
        if is_closed:
            await sub.close()
        else:
            await sub.init("sub", config_pth)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [persipubsub.errors.ClosedError] * 3
        await pub.send(b"one")
        if is_closed:
            await sub.init("sub", config_pth)
        assert await receive(sub, None) == b"one"


@scenario
async def test_consumer_in_another_process_is_killed(face: faces.Face,
                                                     config_pth: pathlib.Path) -> None:

    def hold(pipe: support.Connection) -> None:
        with persipubsub.subscriber.Sub() as sub:
            sub.init("sub", config_pth)
            with sub.receive(timeout=support.HANG_SECS) as msg:
                pipe.send(msg)
                time.sleep(2 * support.HANG_SECS)

    with support.Child(hold) as child:
        async with opened(face, config_pth) as (pub, sub):
            await pub.send(b"one")
            assert await asyncio.to_thread(child.get) == b"one"
            waiting = asyncio.ensure_future(receive(sub, None))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            child.kill(signal.SIGKILL)
            assert await waiting == b"one"


@scenario
async def test_details(face: faces.Face, config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"one", b"two", b"three"])
        async with sub.receive(timeout=0, details=True) as message:
            assert (message.data, message.attempts) == (b"one", 1)
            number = message.number
        async with sub.receive_many(1, timeout=0, details=True) as messages:
            assert [(found.data, found.number) for found in messages] == [(b"two", number + 1)]
        async for message in sub.messages(timeout=0, details=True):
            assert (message.data, message.number) == (b"three", number + 2)


@scenario
async def test_receive_to_top(face: faces.Face, config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"one", b"two", b"three"])
        with pytest.raises(ValueError):
            async with sub.receive_to_top(timeout=0) as msg:
                assert msg == b"three"
                raise ValueError()
        async with sub.receive_to_top(timeout=0, details=True) as message:
            assert message.data == b"three"
        async with sub.receive_to_top(timeout=0) as msg:
            assert msg is None
        waiting = asyncio.ensure_future(receive_newest(sub))
        await asyncio.sleep(0.05)
        await pub.send(b"four")
        assert await waiting == b"four"
    assert figures(config_pth).skipped == 2


async def receive_newest(sub: Any) -> bytes | None:
    async with sub.receive_to_top(timeout=None) as msg:
        message: bytes | None = msg
    return message


# What sends can ask for


@scenario
async def test_message_of_an_id_is_stored_once(face: faces.Face, config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send(b"one", msg_id="1")
        await asyncio.gather(pub.send(b"again", msg_id=b"1"), pub.send(b"two", msg_id="2"),
                             pub.send(b"three"))
        await pub.send_many([b"again", b"four"], msg_ids=["2", None])
        received = await drain(sub)
        assert (received[0], set(received[1:3]), received[3:]) == (b"one", {b"two",
                                                                            b"three"}, [b"four"])
        for wrong, kind in ((1, TypeError), ("", ValueError), ("x" * 256, ValueError)):
            with pytest.raises(kind):
                await pub.send(b"", msg_id=wrong)
        with pytest.raises(ValueError):
            await pub.send_many([b"", b""], msg_ids=["1"])


@pytest.mark.parametrize("strategy", ["reject", "block"])
@scenario
async def test_queue_that_is_full(face: faces.Face, tmp_path: pathlib.Path, strategy: str) -> None:
    config_pth = support.write_config(tmp_path, MAX_MSGS_NUM=3, strategy=strategy)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    async with opened(face, config_pth) as (pub, sub):
        outcomes = await asyncio.gather(*(pub.send(b"one", timeout=0.1) for _ in range(5)),
                                        return_exceptions=True)
        kinds = [type(outcome) for outcome in outcomes]
        assert kinds.count(type(None)) == 3
        assert kinds.count(persipubsub.errors.QueueFullError) == 2
        with pytest.raises(persipubsub.errors.QueueFullError, match="'sub'"):
            await pub.send_many([b"two"], timeout=0)
        if strategy == "block":
            # More seconds than a float has room for: for ever.
            waiting = asyncio.ensure_future(pub.send(b"waited", timeout=10**400))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            assert await receive(sub) == b"one"
            await waiting
            assert await drain(sub) == [b"one", b"one", b"waited"]
        else:
            assert await drain(sub) == [b"one"] * 3
        await pub.send(b"last")
        assert await drain(sub) == [b"last"]


# Iteration


@scenario
async def test_message_is_acknowledged_when_the_next_is_asked_for(face: faces.Face,
                                                                  config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"1", b"2", b"3"])
        seen: list[bytes] = []
        async for msg in sub.messages(timeout=0):
            assert figures(config_pth).acknowledged == len(seen)
            seen.append(msg)
        assert seen == [b"1", b"2", b"3"]
    assert figures(config_pth).acknowledged == 3


@scenario
async def test_iteration_left_early_leaves_the_message(face: faces.Face,
                                                       config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"1", b"2"])
        with pytest.raises(ValueError):
            async with contextlib.aclosing(sub.messages(timeout=0)) as messages:
                async for msg in messages:
                    assert msg == b"1"
                    raise ValueError()
        async with contextlib.aclosing(sub.messages()) as messages:
            async for msg in messages:
                if msg == b"2":
                    break
                assert msg == b"1"
        async for msg in sub.messages():
            assert msg == b"2"
            break
        # Without aclosing() it comes back a moment later.
        assert await receive(sub, support.HANG_SECS) == b"2"
    assert figures(config_pth).acknowledged == 2


# Only tasks


def test_example_of_the_docs() -> None:
    text = (pathlib.Path(__file__).parent.parent / "docs" / "asyncio.rst").read_text("utf-8")
    match = re.search(r"code-block:: python\n\n((?:    .*\n|\n)+)", text)
    assert match is not None
    done = support.run_python(textwrap.dedent(match.group(1)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "1000 messages\n", "")


@on_loops
@scenario
async def test_end_of_the_block_decides_on_the_last_message(face: faces.Face,
                                                            config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"1", b"2", b"3"])
        async with sub.messages() as messages:
            async for msg in messages:
                assert msg == b"1"
                break
        with pytest.raises(StopAsyncIteration):
            await anext(messages)
        with pytest.raises(ValueError):
            async with sub.messages() as messages:
                async for msg in messages:
                    assert msg == b"2"
                    raise ValueError()
        async for msg in (messages := sub.messages()):
            if msg == b"3":
                break
            await messages.acknowledge()
            await messages.acknowledge()
        await messages.aclose()
        assert await drain(sub) == [b"3"]


@on_loops
@scenario
async def test_iteration_over_the_subscriber(face: faces.Face, config_pth: pathlib.Path) -> None:
    received: list[bytes] = []
    async with opened(face, config_pth) as (pub, sub):

        async def consume() -> None:
            async for msg in sub:
                received.append(msg)
                if len(received) == 20:
                    return

        consuming = asyncio.ensure_future(consume())
        await asyncio.gather(*(pub.send(b"%d" % number) for number in range(20)))
        await consuming
    assert received == [b"%d" % number for number in range(20)]


def last_transaction(pub: Any) -> int:
    queue = support.queue_of(pub._pub)
    return int(queue._environment._open_handles().environment.info()["last_txnid"])


@pytest.mark.parametrize("is_busy", [False, True])
@on_loops
@scenario
async def test_sends_share_commits(face: faces.Face, config_pth: pathlib.Path,
                                   is_busy: bool) -> None:
    msgs = [b"%d" % number for number in range(1000)]
    async with opened(face, config_pth) as (pub, sub):
        await pub.send(b"first")
        threads = threading.active_count()
        busy = asyncio.ensure_future(pub.send(b"busy")) if is_busy else asyncio.sleep(0)
        await asyncio.sleep(0)
        before = last_transaction(pub)
        await asyncio.gather(*map(pub.send, msgs))
        await busy
        # 20 are asked for; it is one for each 512 messages, and that of who was busy.
        assert 0 < last_transaction(pub) - before <= 2 + is_busy
        assert threading.active_count() <= threads + 1
        async with sub.receive_many(2000, timeout=0) as received:
            # What a loop sends stays in order.
            assert received == [b"first"] + [b"busy"] * is_busy + msgs


@on_loops
def test_sends_share_flushes(face: faces.Face, config_pth: pathlib.Path,
                             tmp_path: pathlib.Path) -> None:
    tracing.require()

    async def send() -> None:
        async with opened(face, config_pth) as (pub, _):
            await pub.send(b"first")
            os.access("/mark", os.F_OK)
            await asyncio.gather(*(pub.send(b"x" * 256) for _ in range(1000)))
            os.access("/mark", os.F_OK)

    trace = tmp_path / "trace"
    assert tracing.run(lambda: lambda: face.run(send()), ["-o", str(trace)]) == 0
    _, between, _ = trace.read_text(encoding="utf-8", errors="replace").split('"/mark"')
    assert 0 < len(re.findall(r"\b(?:fsync|fdatasync|msync)\(", between)) <= 40


@on_loops
@scenario
async def test_large_sends_are_not_put_together(face: faces.Face, config_pth: pathlib.Path) -> None:
    msgs = [bytes([number]) * (3 << 20) for number in range(8)]
    async with opened(face, config_pth) as (pub, sub):
        before = last_transaction(pub)
        await asyncio.gather(*map(pub.send, msgs))
        assert 4 <= last_transaction(pub) - before <= 8
        assert await drain(sub) == msgs


@on_loops
@scenario
async def test_sends_into_a_full_queue(face: faces.Face, tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, MAX_MSGS_NUM=100)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    msgs = [b"%d" % number for number in range(950)]
    async with opened(face, config_pth) as (pub, sub):
        await asyncio.gather(*map(pub.send, msgs))
        received = await drain(sub)
    assert 50 <= len(received) <= 100
    assert received == msgs[-len(received):]
    assert figures(config_pth).dropped_by_mark == 950 - len(received)


def stop_inside(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Stop in the middle of a write, whenever told to."""
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        pipe.send("ready")
        pipe.recv()
        queue._environment.write(lambda txn, databases: os.kill(os.getpid(), signal.SIGSTOP))
        pipe.send("done")


@on_any_engine
@scenario
async def test_loop_goes_on_while_another_process_is_stopped_in_a_commit(
        face: faces.Face, tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, busy_timeout_secs=3)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    pauses: list[float] = []

    async def tick() -> None:
        while True:
            begin = time.monotonic()
            await asyncio.sleep(0.01)
            pauses.append(time.monotonic() - begin)

    async def wait_and_acknowledge() -> None:
        with pytest.raises(persipubsub.errors.BusyTimeoutError):
            await receive(sub)

    # Each of them in turn would take longer than the test may.
    count = 2 if face.name == "plain" else 500
    with support.Child(stop_inside, config_pth) as child:
        async with opened(face, config_pth) as (pub, sub):
            await pub.send(b"one")
            assert child.get() == "ready"
            child.pipe.send("stop")
            stat = pathlib.Path(f"/proc/{child.process.pid}/stat")
            support.until(lambda: stat.read_text(encoding="ascii").split()[2] == "T", "it stops")
            ticking = asyncio.ensure_future(tick())
            outcomes = await asyncio.gather(wait_and_acknowledge(),
                                            *(pub.send(b"two") for _ in range(count)),
                                            return_exceptions=True)
            ticking.cancel()
            assert [type(outcome) for outcome in outcomes
                    ] == [type(None)] + [persipubsub.errors.BusyTimeoutError] * count
            assert len(pauses) >= 5 and max(pauses) < 2.5, pauses
            assert await sub.front() == b"one"
            child.kill(signal.SIGCONT)
            assert child.get() == "done"
            await pub.send(b"three")
            assert await drain(sub) == [b"one", b"three"]


@on_loops
@scenario
async def test_message_that_comes_right_after_a_look(face: faces.Face, config_pth: pathlib.Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    take_now = _waking.Consumer.take_now
    looks: list[None] = []

    def look_and_be_passed(self: _waking.Consumer, *arguments: Any) -> Any:
        found = take_now(self, *arguments)
        looks.append(None)
        if found[0] is None and len(looks) == 2:
            blocking.send(b"one")
        return found

    times: list[float] = []
    monkeypatch.setattr(_waking.Consumer, "take_now", look_and_be_passed)
    with persipubsub.publisher.Pub() as blocking:
        blocking.init("pub", config_pth)
        async with opened(face, config_pth) as (_, sub):
            for _ in range(7):
                looks.clear()
                begin = time.monotonic()
                assert await receive(sub, None) == b"one"
                times.append(time.monotonic() - begin)
    assert sorted(times)[3] < 0.5, times


@on_loops
@scenario
async def test_who_waits_for_the_newest_message_keeps_nobody_else_waiting(
        face: faces.Face, config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"one", b"two", b"three"])
        with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
            consumer = queue.consumer("sub")
            leases = [consumer.take(timeout=0) for _ in range(3)]
            for lease in leases[:2]:
                assert lease is not None
                lease.give_back()
            # More than a look takes at once, and all of them first in line.
            waiting = [asyncio.ensure_future(receive_newest(sub)) for _ in range(20)]
            await asyncio.sleep(0)
            found = [asyncio.ensure_future(receive(sub, support.HANG_SECS)) for _ in range(2)]
            assert set(await asyncio.gather(*found)) == {b"one", b"two"}
            assert leases[2] is not None
            leases[2].give_back()
        done, others = await asyncio.wait(waiting,
                                          timeout=support.HANG_SECS,
                                          return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in done] == [b"three"]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@on_loops
@scenario
async def test_waiting_needs_no_threads(face: faces.Face, config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send(b"first")
        assert await receive(sub) == b"first"
        waiting = [asyncio.ensure_future(receive(sub, None)) for _ in range(200)]
        await asyncio.sleep(0.2)
        assert threading.active_count() < 12
        await asyncio.sleep(0.5)
        assert threading.active_count() < 12
        msgs = [b"%d" % number for number in range(200)]
        await pub.send_many(msgs)
        assert set(await asyncio.gather(*waiting)) == set(msgs)
        assert threading.active_count() < 40
    await asyncio.to_thread(support.until, lambda: threading.active_count() < 12, "they end")


@on_loops
def test_waiting_polls_nothing(face: faces.Face, config_pth: pathlib.Path,
                               tmp_path: pathlib.Path) -> None:
    tracing.require()

    async def wait() -> None:
        async with opened(face, config_pth) as (_, sub):
            waiting = [asyncio.ensure_future(receive(sub, None)) for _ in range(50)]
            await asyncio.sleep(0.3)
            os.access("/mark", os.F_OK)
            await asyncio.sleep(1.2)
            os.access("/mark", os.F_OK)
            for task in waiting:
                task.cancel()

    trace = tmp_path / "trace"
    assert tracing.run(lambda: lambda: face.run(wait()), ["-o", str(trace)]) == 0
    _, between, _ = trace.read_text(encoding="utf-8", errors="replace").split('"/mark"')
    calls = between.splitlines()[1:-1]
    # There are looks, one a second, and not one for each task.
    assert 2 < len(calls) < 100, between


@on_loops
def test_loops_in_threads_share_one_object(face: faces.Face, config_pth: pathlib.Path) -> None:
    received: list[bytes] = []
    pub, sub = persipubsub.aio.Pub(), persipubsub.aio.Sub()
    barrier = threading.Barrier(4)

    async def work(first: int) -> None:
        barrier.wait(support.HANG_SECS)
        sending = asyncio.gather(*(pub.send(b"%d" % (first + index)) for index in range(50)))
        while (msg := await receive(sub, timeout=1)) is not None:
            received.append(msg)
        await sending

    async def begin() -> None:
        await pub.init("pub", config_pth)
        await sub.init("sub", config_pth)

    async def end() -> None:
        await pub.close()
        await sub.close()

    face.run(begin())
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda first: face.run(work(first)), range(0, 200, 50)))
    face.run(end())
    assert sorted(map(int, received)) == list(range(200))
    assert not in_flight(config_pth)


@on_loops
def test_closing_while_other_loops_wait(face: faces.Face, config_pth: pathlib.Path) -> None:
    sub = persipubsub.aio.Sub()
    waits = threading.Event()

    async def wait() -> None:
        waiting = asyncio.ensure_future(receive(sub, None))
        await asyncio.sleep(0.1)
        waits.set()
        with pytest.raises(persipubsub.errors.ClosedError):
            await waiting

    face.run(sub.init("sub", config_pth))
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(lambda: face.run(wait()))
        assert waits.wait(support.HANG_SECS)
        face.run(sub.close())
        waiting.result(support.HANG_SECS)


@on_any_engine
def test_objects_work_in_a_forked_child(face: faces.Face, config_pth: pathlib.Path) -> None:
    pub, sub, other = persipubsub.aio.Pub(), persipubsub.aio.Sub(), persipubsub.aio.Sub()

    async def use() -> bytes:
        await asyncio.gather(*(pub.send(b"%d" % number) for number in range(3)))
        async with sub.receive_many(3, timeout=support.HANG_SECS) as msgs:
            assert len(msgs) == 3
        waiting = asyncio.ensure_future(receive(sub, None))
        await asyncio.sleep(0.05)
        await pub.send(b"last")
        return await waiting or b""

    async def use_in_both() -> bytes:
        waiting = [asyncio.ensure_future(receive(other, None)) for _ in range(2)]
        await asyncio.sleep(0.05)  # the loop watches the bell
        with support.Child(lambda pipe: pipe.send(in_child())) as child:
            inherited = await asyncio.to_thread(child.get)
            child.end()
        assert inherited == 0
        received = await asyncio.gather(*waiting)
        # Without an outbox, each is sent by a thread of its own, and those of a child that open the
        # queue at the same time do not come out in the order in which they went in.
        if face is not faces.PLAIN:
            assert set(received) == {b"0", b"1"}
        received.append(await receive(other))
        assert (len(received), set(received)) == (3, {b"0", b"1", b"2"})
        return await use()

    def in_child() -> int:
        inherited = inotify_descriptors()
        # A loop in a thread of its own: that of the parent still runs in this one.
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            executor.submit(lambda: face.run(use_and_close())).result(support.HANG_SECS)
        return inherited

    async def use_and_close() -> None:
        assert await use() == b"last"
        for used in (pub, sub, other):
            await used.close()

    async def begin() -> None:
        await pub.init("pub", config_pth)
        await sub.init("sub", config_pth)

    face.run(begin())
    assert face.run(use()) == b"last"
    face.run(other.init("other", config_pth))
    face.run(other.pop_to_top())
    assert face.run(receive(other)) == b"last"
    assert face.run(use_in_both()) == b"last"
    face.run(use_and_close())


@on_loops
def test_loop_that_ends_leaves_no_claim(face: faces.Face, config_pth: pathlib.Path) -> None:
    sub = persipubsub.aio.Sub()
    face.run(sub.init("sub", config_pth))
    with persipubsub.publisher.Pub() as pub:
        pub.init("pub", config_pth)
        for number in range(30):

            async def leave(delay: float) -> None:
                for _ in range(3):
                    asyncio.ensure_future(receive(sub, None))
                await asyncio.sleep(delay)
                pub.send(b"one")
                await asyncio.sleep(delay)

            face.run(leave(0.0003 * number))
            gc.collect()
            support.until(lambda: not in_flight(config_pth), "the claims are given back")
        # That of the process, and of the last loop, if it was left in the middle of a look.
        assert inotify_descriptors() <= 2
    face.run(sub.close())


# Cancellation


class Books:
    """Note what became of messages."""

    def __init__(self) -> None:
        """Initialize as empty."""
        self.sent: set[bytes] = set()
        self.perhaps: set[bytes] = set()
        self.finished: list[bytes] = []
        self.cancelled = 0

    async def send(self, pub: Any, msgs: list[bytes]) -> None:
        """Send messages, and note whether they were sent."""
        self.perhaps.update(msgs)
        if len(msgs) == 1:
            await pub.send(msgs[0])
        else:
            await pub.send_many(msgs)
        self.sent.update(msgs)

    async def receive(self, sub: Any, rng: random.Random) -> None:
        """Receive messages, and note that the block was left without an exception."""
        if rng.random() < 0.5:
            async with sub.receive(timeout=rng.choice((0, 0.001, None))) as msg:
                await asyncio.sleep(rng.choice((0, 0, 0.002)))
                if msg is not None:
                    self.finished.append(msg)
        else:
            async with sub.receive_many(3, timeout=rng.choice((0, 0.001, None))) as msgs:
                await asyncio.sleep(rng.choice((0, 0, 0.002)))
                self.finished.extend(msgs)


@pytest.mark.usefixtures("leases")
@on_any_engine
@scenario
async def test_cancellation_loses_nothing(face: faces.Face, config_pth: pathlib.Path) -> None:
    rng = random.Random(tracing.seed())
    books = Books()
    loop = asyncio.get_running_loop()
    async with opened(face, config_pth) as (pub, sub):
        number, scale = 0, 1.0
        # How far the tasks come depends on the machine: it goes on until enough of both is seen.
        while number < ROUNDS or min(books.cancelled, len(books.finished)) <= ROUNDS / 4:
            tasks: dict["asyncio.Future[None]", None] = {}
            for index in range(rng.randint(1, 4)):
                msgs = [b"%d.%d.%d" % (number, index, i) for i in range(rng.choice((1, 1, 3)))]
                tasks[asyncio.ensure_future(books.send(pub, msgs))] = None
            for index in range(rng.randint(1, 4)):
                tasks[asyncio.ensure_future(books.receive(sub, rng))] = None
            for task in tasks:
                delay = rng.choice((0.0, rng.uniform(0, 0.004), rng.uniform(0, 0.02)))
                loop.call_later(scale * delay, task.cancel)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            books.cancelled += sum(
                isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
            assert {type(outcome)
                    for outcome in outcomes} <= {type(None), asyncio.CancelledError}, outcomes
            number += 1
            if number % 20 == 0 and len(books.finished) <= number / 4:
                scale *= 2
        # What was cancelled may still be on its way back.
        await asyncio.to_thread(support.until, lambda: not in_flight(config_pth),
                                "no claim is left")
        rest = await drain(sub)
    print("{} sent, {} perhaps, {} finished, {} left, {} tasks cancelled".format(
        len(books.sent), len(books.perhaps - books.sent), len(books.finished), len(rest),
        books.cancelled))
    everything = books.finished + rest
    assert len(everything) == len(set(everything)), "Something that was finished came again."
    assert books.sent <= set(everything) <= books.perhaps
    found = figures(config_pth)
    assert (found.lag, found.acknowledged) == (0, len(everything))


@pytest.mark.usefixtures("leases")
@on_loops
@scenario
async def test_cancelled_receive_gives_back_what_came_meanwhile(face: faces.Face,
                                                                config_pth: pathlib.Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        for _ in range(50):
            waiting = asyncio.ensure_future(receive(sub, None))
            inbox = sub._inbox_of(sub._sub.prepare(0, 1)[0])
            await asyncio.sleep(0)
            await pub.send(b"one")
            # In the same round of the loop in which the message is handed over.
            while inbox._waiters:
                await asyncio.sleep(0)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
            await asyncio.to_thread(support.until, lambda: not in_flight(config_pth),
                                    "the claim is given back")
            await receive(sub)
            assert await sub.front() is None


@pytest.mark.usefixtures("leases")
@on_loops
@scenario
async def test_cancelled_receives_keep_the_order(face: faces.Face, config_pth: pathlib.Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    give_back = CountedLease.give_back

    def give_back_slowly(self: CountedLease, error: BaseException | None = None) -> None:
        time.sleep(0.05)
        give_back(self, error)

    monkeypatch.setattr(CountedLease, "give_back", give_back_slowly)
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"first", b"second"])
        waiting = asyncio.ensure_future(receive(sub, None))
        inbox = sub._inbox_of(sub._sub.prepare(0, 1)[0])
        await asyncio.sleep(0)
        while inbox._waiters:
            await asyncio.sleep(0)
        waiting.cancel()
        # Another worker is still giving the first one back when this one begins to look.
        assert await drain(sub) == [b"first", b"second"]


@pytest.mark.usefixtures("leases")
@pytest.mark.parametrize("comes_later", [False, True])
@pytest.mark.parametrize("is_handed_over", [False, True])
@on_loops
@scenario
async def test_next_task_gets_what_a_cancelled_one_waited_for(face: faces.Face,
                                                              config_pth: pathlib.Path,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              is_handed_over: bool,
                                                              comes_later: bool) -> None:
    returned: list[bytes] = []
    give_back = CountedLease.give_back

    def note(self: CountedLease, error: BaseException | None = None) -> None:
        returned.extend(self.messages)
        give_back(self, error)

    monkeypatch.setattr(CountedLease, "give_back", note)
    may_look = threading.Semaphore(0)
    async with opened(face, config_pth) as (pub, sub):
        inbox = sub._inbox_of(sub._sub.prepare(0, 1)[0])
        look = inbox._look

        def look_late(*arguments: Any) -> None:
            assert may_look.acquire(timeout=support.HANG_SECS)
            look(*arguments)

        monkeypatch.setattr(inbox, "_look", look_late)
        # The first look is for the first of them only: the others come while a worker is at it.
        tasks = [asyncio.ensure_future(receive(sub, None)) for _ in range(2 if comes_later else 3)]
        await asyncio.sleep(0)
        if not comes_later:
            tasks.pop(0).cancel()
            may_look.release()
            while inbox._look_count == 1:
                await asyncio.sleep(0)
        await pub.send_many([b"first", b"second"])
        cancelled, waiting = tasks
        if is_handed_over:
            may_look.release()
            while len(inbox._waiters) > (1 if comes_later else 0):
                await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)
        may_look.release(4)
        assert await waiting == b"first"
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await receive(sub, 0) == b"second"
        # Who waited before it was taken has it without the queue.
        assert returned[:1] == [b"first"] if comes_later else returned == [b"second"]


@pytest.mark.usefixtures("leases")
@on_loops
@scenario
async def test_look_that_passed_over_what_is_given_back_is_repeated(
        face: faces.Face, config_pth: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, may_go_on = threading.Semaphore(0), threading.Semaphore(0)
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"first", b"second"])
        consumer = sub._sub.prepare(0, 1)[0]
        take_now = consumer.take_now

        def take_and_wait(*arguments: Any) -> Any:
            result = take_now(*arguments)
            taken.release()
            assert may_go_on.acquire(timeout=support.HANG_SECS)
            return result

        monkeypatch.setattr(consumer, "take_now", take_and_wait)
        inbox = sub._inbox_of(consumer)
        cancelled, waiting = (asyncio.ensure_future(receive(sub, None)) for _ in range(2))
        await asyncio.sleep(0)
        may_go_on.release()
        while len(inbox._waiters) == 2:
            await asyncio.sleep(0)
        # The first one was handed over, and the loop stands still until the second is taken.
        for _ in range(2):
            assert taken.acquire(timeout=support.HANG_SECS)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        may_go_on.release(100)
        assert await waiting == b"first"
        assert await receive(sub) == b"second"


@pytest.mark.usefixtures("leases")
@pytest.mark.parametrize("skips_elsewhere", [False, True])
@on_loops
@scenario
async def test_message_of_a_cancelled_task_does_not_come_after_a_skip(
        face: faces.Face, config_pth: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
        skips_elsewhere: bool) -> None:
    taken, may_go_on = threading.Event(), threading.Event()
    async with opened(face, config_pth) as (pub, sub), face.sub() as other:
        await other.init(sub_id="sub", config_pth=config_pth)
        await pub.send_many([b"first", b"second", b"third"])
        consumer = sub._sub.prepare(0, 1)[0]
        take_now = consumer.take_now

        def take_and_wait(*arguments: Any) -> Any:
            result = take_now(*arguments)
            taken.set()
            assert may_go_on.wait(support.HANG_SECS)
            return result

        monkeypatch.setattr(consumer, "take_now", take_and_wait)
        cancelled = asyncio.ensure_future(receive(sub, None))
        await asyncio.to_thread(taken.wait, support.HANG_SECS)
        cancelled.cancel()
        await (other if skips_elsewhere else sub).pop_to_top()
        waiting = asyncio.ensure_future(receive(sub, support.HANG_SECS))
        await asyncio.sleep(0)
        may_go_on.set()
        assert await waiting == b"third"
        await asyncio.to_thread(support.until, lambda: not in_flight(config_pth),
                                "the claims are given back")
    assert (figures(config_pth).acknowledged, figures(config_pth).skipped) == (1, 2)


@on_loops
@scenario
async def test_cancelled_acknowledgement_is_made_anyway(face: faces.Face,
                                                        config_pth: pathlib.Path) -> None:

    async def receive_and_tell() -> None:
        async with sub.receive(timeout=0):
            left.set()

    async with opened(face, config_pth) as (pub, sub):
        for number in range(20):
            await pub.send(b"%d" % number)
            left = asyncio.Event()
            task = asyncio.ensure_future(receive_and_tell())
            await left.wait()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.to_thread(support.until, lambda: figures(config_pth).lag == 0, "all is done")
        assert await receive(sub) is None


# Storms


def consume(pipe: support.Connection, config_pth: pathlib.Path, ledger_pth: pathlib.Path,
            face: faces.Face) -> None:
    """Receive with several tasks, and note each message when its block was left."""
    ledger = os.open(ledger_pth, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def receive_always(sub: Any) -> None:
        while True:
            async with sub.receive(timeout=None) as msg:
                os.write(ledger, b"r %s\n" % msg)
                await asyncio.sleep(0)
            os.write(ledger, b"d %s\n" % msg)

    async def main() -> None:
        async with face.sub() as sub:
            await sub.init("sub", config_pth)
            pipe.send("ready")
            await asyncio.gather(*(receive_always(sub) for _ in range(5)))

    face.run(main())


@on_loops
def test_storm_of_kills(face: faces.Face, config_pth: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rng = random.Random(tracing.seed())
    ledger_pth = tmp_path / "ledger"
    count = 0

    async def send_until(deadline: float) -> None:
        nonlocal count
        least = count + 20
        async with face.pub() as pub:
            await pub.init("pub", config_pth)
            # However slow the machine is, there is something to lose.
            while count < least or time.monotonic() < deadline:
                await asyncio.gather(*(pub.send(b"%d" % (count + index)) for index in range(10)))
                count += 10
                await asyncio.sleep(0.005)

    with contextlib.ExitStack() as stack:
        stay = stack.enter_context(support.Child(consume, config_pth, ledger_pth, face))
        assert stay.get() == "ready"
        for _ in range(8):
            with support.Child(consume, config_pth, ledger_pth, face) as child:
                assert child.get() == "ready"
                face.run(send_until(time.monotonic() + rng.uniform(0.05, 0.2)))
                child.kill(signal.SIGKILL)
                child.end(-signal.SIGKILL)
        support.until(lambda: figures(config_pth).lag == 0, "everything is received")
        support.until(
            lambda: ledger_pth.read_bytes().count(b"d %d\n" %
                                                  (count - 1)) or not in_flight(config_pth),
            "the last one is noted")
    lines = [line.split() for line in ledger_pth.read_bytes().splitlines()]
    received = [int(fields[1]) for fields in lines if fields[0] == b"r"]
    done = [int(fields[1]) for fields in lines if fields[0] == b"d"]
    print(f"{count} sent, {len(received)} received, {len(done)} noted as done")
    assert count > 100
    assert set(received) == set(range(count))
    assert len(done) == len(set(done))
    # Only what a killed process had at that moment came again.
    assert len(received) - count <= 8 * 5
