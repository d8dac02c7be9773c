"""Test what only tasks can do: waiting without threads, sharing commits, being cancelled."""

import asyncio
import concurrent.futures
import contextlib
import fcntl
import gc
import os
import random
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any, Final

import pytest

import persipubsub.aio
from persipubsub import Pub, Sub, control, errors
from persipubsub.lmdb_engine import datafile
from tests import faces, support
from tests.faces import (commits, deploy, drain, figures, fixture_config_pth, fixture_lmdb_pth,
                         in_flight, on_loops, opened, receive, receive_newest, scenario)
from tests.faults import tracing

assert fixture_config_pth and fixture_lmdb_pth  # pytest finds them here

ROUNDS: Final = int(os.environ.get("PERSIPUBSUB_AIO_ROUNDS", "150"))


@pytest.mark.parametrize("is_busy", [False, True])
@on_loops
@scenario
async def test_sends_share_commits(face: faces.Face, lmdb_pth: Path, is_busy: bool) -> None:
    msgs = [b"%d" % number for number in range(1000)]
    async with opened(face, lmdb_pth) as (pub, sub):
        await pub.send(b"first")
        threads = threading.active_count()
        busy = asyncio.ensure_future(pub.send(b"busy")) if is_busy else asyncio.sleep(0)
        await asyncio.sleep(0)
        before = commits(lmdb_pth)
        await asyncio.gather(*map(pub.send, msgs))
        await busy
        # 20 are asked for; it is one for each 512 messages, and that of who was busy.
        assert 0 < commits(lmdb_pth) - before <= 2 + is_busy
        assert threading.active_count() <= threads + 1
        async with sub.receive_many(2000, timeout=0) as received:
            # What a loop sends stays in order.
            assert received == [b"first"] + [b"busy"] * is_busy + msgs


@on_loops
def test_sends_share_flushes(face: faces.Face, lmdb_pth: Path, tmp_path: Path) -> None:
    tracing.require()

    async def send() -> None:
        async with opened(face, lmdb_pth) as (pub, _):
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
async def test_messages_dropped_in_the_commit_that_sent_them(face: faces.Face,
                                                             tmp_path: Path) -> None:
    # LMDB counts pages that it then never writes: its file is shorter than it says.
    config_pth = deploy(tmp_path, durability="os", MAX_MSGS_NUM=20, strategy="prune_last")
    path = str(tmp_path / "queue" / "data.mdb")
    is_short = False
    async with face.pub() as pub:
        await pub.init(pub_id="pub", config_pth=config_pth)
        for _ in range(50):
            await asyncio.gather(*(pub.send(bytes(50000)) for _ in range(40)))
            is_short = datafile.check_metas(path)
            if is_short:
                break
    assert is_short
    assert control.verify(config_pth)["queue"] == ()
    async with opened(face, config_pth) as (pub, sub):
        await pub.send(b"last")
        assert (await drain(sub))[-1] == b"last"


@on_loops
@scenario
async def test_large_sends_are_not_put_together(face: faces.Face, lmdb_pth: Path) -> None:
    msgs = [bytes([number]) * (3 << 20) for number in range(8)]
    async with opened(face, lmdb_pth) as (pub, sub):
        before = commits(lmdb_pth)
        await asyncio.gather(*map(pub.send, msgs))
        assert 4 <= commits(lmdb_pth) - before <= 8
        assert await drain(sub) == msgs


def stop_inside(pipe: support.Connection, config_pth: Path) -> None:
    """Stop in the middle of a write, whenever told to."""
    with support.open_queue(config_pth) as queue:
        pipe.send("ready")
        pipe.recv()
        queue._environment.write(lambda tx: os.kill(os.getpid(), signal.SIGSTOP))
        pipe.send("done")


@on_loops
@scenario
async def test_loop_goes_on_while_another_process_is_stopped_in_a_commit(
        face: faces.Face, tmp_path: Path) -> None:
    config_pth = deploy(tmp_path, busy_timeout_secs=1.5)
    pauses: list[float] = []

    async def tick() -> None:
        while True:
            begin = time.monotonic()
            await asyncio.sleep(0.01)
            pauses.append(time.monotonic() - begin)

    async def wait_and_acknowledge() -> None:
        with pytest.raises(errors.BusyTimeoutError):
            await receive(sub)

    count = 500
    with support.Child(stop_inside, config_pth) as child:
        async with opened(face, config_pth) as (pub, sub):
            await pub.send(b"one")
            assert child.get() == "ready"
            child.pipe.send("stop")
            stat = Path(f"/proc/{child.process.pid}/stat")
            support.until(lambda: stat.read_text(encoding="ascii").split()[2] == "T", "it stops")
            ticking = asyncio.ensure_future(tick())
            outcomes = await asyncio.gather(wait_and_acknowledge(),
                                            *(pub.send(b"two") for _ in range(count)),
                                            return_exceptions=True)
            ticking.cancel()
            assert [type(outcome)
                    for outcome in outcomes] == [type(None)] + [errors.BusyTimeoutError] * count
            assert len(pauses) >= 5 and max(pauses) < 1.2, pauses
            assert await sub.front() == b"one"
            child.kill(signal.SIGCONT)
            assert child.get() == "done"
            await pub.send(b"three")
            assert await drain(sub) == [b"one", b"three"]


@on_loops
@scenario
async def test_messages_that_come_while_a_task_begins_to_wait(face: faces.Face,
                                                              config_pth: Path) -> None:
    """However the sends fall between looks and wake-ups: none waits for the look once a second."""
    rng = random.Random(tracing.seed())
    times: list[float] = []
    with Pub("pub", config_pth) as blocking:
        async with opened(face, config_pth) as (_, sub):
            for _ in range(100):
                waiting = asyncio.ensure_future(receive(sub, None))
                await asyncio.sleep(rng.uniform(0, 0.003))
                begin = time.monotonic()
                await asyncio.to_thread(blocking.send, b"one")
                assert await waiting == b"one"
                times.append(time.monotonic() - begin)
    assert sorted(times)[90] < 0.5, times


@on_loops
@scenario
async def test_look_that_began_before_a_task_came_says_nothing_to_it(face: faces.Face,
                                                                     lmdb_pth: Path) -> None:

    async def send_and_receive() -> bytes | None:
        await asyncio.sleep(0)
        # Blocks the loop: what the look of the other task found is only handed out after this.
        blocking.send(b"one")
        return await receive(sub)

    with Pub("pub", lmdb_pth) as blocking:
        async with opened(face, lmdb_pth) as (_, sub):
            for _ in range(100):
                found = await asyncio.gather(receive(sub), send_and_receive())
                assert sorted(found, key=str) == [None, b"one"]


@on_loops
@scenario
async def test_who_waits_for_the_newest_message_keeps_nobody_else_waiting(
        face: faces.Face, lmdb_pth: Path) -> None:
    async with opened(face, lmdb_pth) as (pub, sub):
        await pub.send_many([b"one", b"two", b"three"])
        with Sub("sub", lmdb_pth) as other:
            with contextlib.ExitStack() as stack:
                held = [stack.enter_context(other.receive(timeout=0)) for _ in range(2)]
                with other.receive(timeout=0) as newest:
                    assert (held, newest) == ([b"one", b"two"], b"three")
                    # All of them first in line, for what another one has.
                    waiting = [asyncio.ensure_future(receive_newest(sub)) for _ in range(20)]
                    await asyncio.sleep(0.05)
                    found = asyncio.ensure_future(receive(sub, support.HANG_SECS))
                    with contextlib.suppress(ValueError), stack.pop_all():
                        raise ValueError()
                    assert await found in (b"one", b"two")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@on_loops
@scenario
async def test_waiting_needs_no_threads(face: faces.Face, lmdb_pth: Path) -> None:
    async with opened(face, lmdb_pth) as (pub, sub):
        await pub.send(b"first")
        assert await receive(sub) == b"first"
        threads = threading.active_count()
        waiting = [asyncio.ensure_future(receive(sub, None)) for _ in range(200)]
        for _ in range(7):
            await asyncio.sleep(0.1)
            # What looks, and what is called back.
            assert threading.active_count() <= threads + 3
        msgs = [b"%d" % number for number in range(200)]
        await pub.send_many(msgs)
        assert set(await asyncio.gather(*waiting)) == set(msgs)
        assert threading.active_count() < 40


@on_loops
def test_waiting_polls_nothing(face: faces.Face, lmdb_pth: Path, tmp_path: Path) -> None:
    tracing.require()

    async def wait() -> None:
        async with opened(face, lmdb_pth) as (_, sub):
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
    # There are looks, one a second, and not one for each task; the engine's thread may write to the
    # journal once meanwhile.
    assert 2 < len(calls) < 300, between


@on_loops
def test_loops_in_threads_share_one_object(face: faces.Face, config_pth: Path) -> None:
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
def test_closing_while_other_loops_wait(face: faces.Face, config_pth: Path) -> None:
    sub = persipubsub.aio.Sub()
    waits = threading.Event()

    async def wait() -> None:
        waiting = asyncio.ensure_future(receive(sub, None))
        await asyncio.sleep(0.1)
        waits.set()
        with pytest.raises(errors.ClosedError):
            await waiting

    face.run(sub.init("sub", config_pth))
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(lambda: face.run(wait()))
        assert waits.wait(support.HANG_SECS)
        face.run(sub.close())
        waiting.result(support.HANG_SECS)


@on_loops
def test_objects_work_in_a_forked_child(face: faces.Face, config_pth: Path) -> None:
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
        await asyncio.sleep(0.05)  # the loop waits for a wake-up
        with support.Child(lambda pipe: pipe.send(in_child())) as child:
            assert await asyncio.to_thread(child.get) == "done"
            child.end()
        received = await asyncio.gather(*waiting)
        assert set(received) == {b"0", b"1"}
        received.append(await receive(other))
        assert (len(received), set(received)) == (3, {b"0", b"1", b"2"})
        return await use()

    def in_child() -> str:
        # A loop in a thread of its own: that of the parent still runs in this one.
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            executor.submit(lambda: face.run(use_and_close())).result(support.HANG_SECS)
        return "done"

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


def test_child_that_closes_does_not_wait_for_calls_of_its_parent(tmp_path: Path) -> None:
    """The parent forks while an acknowledgement waits, in a thread, for the write lock."""
    config_pth = deploy(tmp_path, busy_timeout_secs=0.5)

    async def close_in_child() -> None:
        locked = asyncio.Event()

        async def receive_one() -> None:
            async with sub.receive(timeout=support.HANG_SECS) as msg:
                assert msg == b"one"
                fcntl.flock(lock, fcntl.LOCK_EX)
                locked.set()

        async with persipubsub.aio.Pub("pub", config_pth) as pub:
            await pub.send(b"one")
        async with persipubsub.aio.Sub("sub", config_pth) as sub:
            receiving = asyncio.ensure_future(receive_one())
            await locked.wait()
            with support.Child(lambda pipe: pipe.send(in_child(sub))) as child:
                assert await asyncio.to_thread(child.get) == "closed"
                child.end()
            with pytest.raises(errors.BusyTimeoutError):
                await receiving

    def in_child(sub: persipubsub.aio.Sub) -> str:
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            executor.submit(lambda: asyncio.run(sub.close())).result(support.HANG_SECS)
        return "closed"

    with open(tmp_path / "queue" / "write.lock", "rb") as lock:
        asyncio.run(close_in_child())


@on_loops
def test_loop_that_ends_leaves_no_claim(face: faces.Face, config_pth: Path) -> None:
    sub = persipubsub.aio.Sub()
    face.run(sub.init("sub", config_pth))
    with Pub("pub", config_pth) as pub:
        for number in range(0, 30, 3):

            async def leave(delay: float) -> None:
                for _ in range(3):
                    asyncio.ensure_future(receive(sub, None))
                await asyncio.sleep(delay)
                pub.send(b"one")
                await asyncio.sleep(delay)

            face.run(leave(0.0003 * number))
            gc.collect()
            face.run(drain_all(sub, config_pth))
    face.run(sub.close())


# Cancellation


class Books:
    """Note what became of messages."""

    def __init__(self) -> None:
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


@on_loops
@scenario
async def test_cancellation_loses_nothing(face: faces.Face, config_pth: Path) -> None:
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
        rest = await drain_all(sub, config_pth)
    print("{} sent, {} perhaps, {} finished, {} left, {} tasks cancelled".format(
        len(books.sent), len(books.perhaps - books.sent), len(books.finished), len(rest),
        books.cancelled))
    everything = books.finished + rest
    assert len(everything) == len(set(everything)), "Something that was finished came again."
    assert books.sent <= set(everything) <= books.perhaps
    found = figures(config_pth)
    assert found.lag == 0


@on_loops
@scenario
async def test_cancelled_receive_gives_back_what_came_meanwhile(face: faces.Face,
                                                                config_pth: Path) -> None:
    """After any number of rounds of the loop: also in that in which the message is handed over."""
    seen: list[bytes | None] = []
    async with opened(face, config_pth) as (pub, sub):
        rest: list[bytes] = []
        for rounds in range(60):
            waiting = asyncio.ensure_future(note(sub, seen))
            await asyncio.sleep(0.001)
            await pub.send(b"%d" % rounds)
            for _ in range(rounds):
                await asyncio.sleep(0)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
            rest += await drain_all(sub, config_pth)
        assert sorted(
            (msg or b"") for msg in seen + rest) == sorted(b"%d" % rounds for rounds in range(60))


@on_loops
@scenario
async def test_messages_given_back_together_come_in_order(face: faces.Face, tmp_path: Path) -> None:
    """A task that looks in the moment in which they are given back begins with the first one."""
    config_pth = deploy(tmp_path, durability="os")
    async with opened(face, config_pth) as (pub, sub):
        for _ in range(300):
            await pub.send_many([b"3", b"4"])
            async for _ in sub.messages(timeout=support.HANG_SECS, prefetch=2):
                break
            assert [await receive(sub, support.HANG_SECS) for _ in range(2)] == [b"3", b"4"]


@on_loops
@scenario
async def test_next_task_gets_what_a_cancelled_one_waited_for(face: faces.Face,
                                                              config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        for _ in range(20):
            seen: list[bytes | None] = []
            tasks = [asyncio.ensure_future(note(sub, seen)) for _ in range(3)]
            await asyncio.sleep(0.005)
            sending = asyncio.ensure_future(pub.send(b"one"))
            await asyncio.sleep(0)
            for task in tasks[:2]:
                task.cancel()
            await sending
            async with asyncio.timeout(support.HANG_SECS):
                while not seen:
                    await asyncio.sleep(0.001)
            tasks[2].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert seen == [b"one"]


async def drain_all(sub: Any, config_pth: Path) -> list[bytes]:
    """Receive also what is still on its way back from tasks that were cancelled."""
    received: list[bytes] = []
    async with asyncio.timeout(support.HANG_SECS):
        while (await asyncio.to_thread(figures, config_pth)).lag:
            if (msg := await receive(sub, 0.2)) is not None:
                received.append(msg)
    return received


async def note(sub: Any, seen: list[bytes | None]) -> None:
    async with sub.receive(timeout=None) as msg:
        seen.append(msg)


@on_loops
@scenario
async def test_cancelled_acknowledgement_is_made_anyway(face: faces.Face, config_pth: Path) -> None:

    async def receive_and_tell() -> None:
        async with sub.receive(timeout=support.HANG_SECS) as msg:
            assert msg is not None
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


def slow_opening(face: faces.Face, kind: str, config_pth: Path) -> tuple[Any, "asyncio.Task[None]"]:
    """Begin to open a publisher or a subscriber."""
    user = getattr(face, kind)()
    return user, asyncio.ensure_future(user.init(kind, config_pth))


async def check_open(user: Any, kind: str) -> None:
    """Use what was opened, as often as a clean-up of another call may need to close it."""
    for _ in range(20):
        await (user.send(b"one") if kind == "pub" else user.front())


@pytest.mark.parametrize("kind", ["pub", "sub"])
@on_loops
@scenario
async def test_cancelled_init_leaves_a_later_one_open(face: faces.Face, tmp_path: Path,
                                                      kind: str) -> None:
    """The first call still reads its configuration, from a FIFO, when the second one succeeds."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    slow_pth, config_pth = deploy(tmp_path / "first"), deploy(tmp_path / "second")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    user, opening = slow_opening(face, kind, fifo)
    # The open waits until somebody reads.
    writer = await asyncio.to_thread(os.open, fifo, os.O_WRONLY)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await user.init(kind, config_pth)
    before = (tmp_path / "first" / "queue").stat().st_mtime_ns
    os.write(writer, slow_pth.read_bytes())
    os.close(writer)

    def is_over() -> bool:
        """Tell whether the first call has opened its queue, and closed it again."""
        if (tmp_path / "first" / "queue").stat().st_mtime_ns == before:
            return False
        return support.outcome(lambda: control.compact(slow_pth)) == ""

    await asyncio.to_thread(support.until, is_over, "the first call ends")
    assert repr(user).endswith(" open>") and "second" not in repr(user)
    await check_open(user, kind)
    await user.close()
    control.compact(config_pth)  # nobody has it open


@pytest.mark.parametrize("is_again", [True, False])
@pytest.mark.parametrize("kind", ["pub", "sub"])
@on_loops
@scenario
async def test_init_cancelled_while_another_process_opens(face: faces.Face, tmp_path: Path,
                                                          kind: str, is_again: bool) -> None:
    config_pth = deploy(tmp_path, busy_timeout_secs=support.HANG_SECS)
    for _ in range(5):
        with open(tmp_path / "queue" / "open.lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            user, opening = slow_opening(face, kind, config_pth)
            # It has the file open while it waits for the lock.
            await asyncio.to_thread(
                support.until,
                lambda: sum(path.endswith("/open.lock") for path in support.open_files()) == 2,
                "it waits")
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            later = asyncio.ensure_future(user.init(kind, config_pth)) if is_again else None
            await asyncio.sleep(0)
        if later is not None:
            await later
            await check_open(user, kind)
            await user.close()
        # Nobody has it open in the end.
        await asyncio.to_thread(support.until,
                                lambda: support.outcome(lambda: control.compact(config_pth)) == "",
                                "all is closed")
        with pytest.raises(errors.ClosedError):
            await check_open(user, kind)


@pytest.mark.parametrize("kind", ["pub", "sub"])
@on_loops
@scenario
async def test_cancelled_init_closes_what_was_open_before(face: faces.Face, tmp_path: Path,
                                                          kind: str) -> None:
    config_pth, fifo = deploy(tmp_path), tmp_path / "fifo"
    os.mkfifo(fifo)
    user = getattr(face, kind)()
    await user.init(kind, config_pth)
    opening = asyncio.ensure_future(user.init(kind, fifo))
    writer = await asyncio.to_thread(os.open, fifo, os.O_WRONLY)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    with pytest.raises(errors.ClosedError):
        await check_open(user, kind)
    os.close(writer)
    await asyncio.to_thread(support.until,
                            lambda: support.outcome(lambda: control.compact(config_pth)) == "",
                            "it is closed")


@on_loops
@scenario
async def test_cancelled_close_leaves_what_is_opened_later(face: faces.Face,
                                                           tmp_path: Path) -> None:
    """The call that closes waits for an acknowledgement, which waits for another process."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = deploy(tmp_path / "first", busy_timeout_secs=support.HANG_SECS)
    second = deploy(tmp_path / "second")
    locked = asyncio.Event()

    async def receive_one() -> None:
        async with sub.receive(timeout=support.HANG_SECS):
            await pub.send(b"two")
            fcntl.flock(lock, fcntl.LOCK_EX)
            locked.set()

    with open(tmp_path / "first" / "queue" / "write.lock", "rb") as lock:
        async with opened(face, first) as (pub, sub):
            await pub.send(b"one")
            receiving = asyncio.ensure_future(receive_one())
            await locked.wait()
            closing = asyncio.ensure_future(sub.close())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            opening = asyncio.ensure_future(sub.init("sub", second))
            # It opens the second queue, and then closes the first one, which waits as well.
            async with asyncio.timeout(support.HANG_SECS):
                while await sub.front() is not None:
                    await asyncio.sleep(0.001)
            fcntl.flock(lock, fcntl.LOCK_UN)
            await asyncio.gather(receiving, opening)
            await check_open(sub, "sub")


# Storms


def consume(pipe: support.Connection, config_pth: Path, ledger_pth: Path, face: faces.Face) -> None:
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
def test_storm_of_kills(face: faces.Face, config_pth: Path, tmp_path: Path) -> None:
    rng = random.Random(tracing.seed())
    faces.shorten_ack_wait(config_pth)
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
