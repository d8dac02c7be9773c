"""
Send in every shape: each send ends, and each message is received once and in order.

A shape is a kind and number of senders, a size of messages, a durability, a call, and a consumer.
Each shape has a process of its own, which is killed if it hangs. By default a sample is tried, which
``PERSIPUBSUB_SEED`` repeats. The whole grid takes some minutes:

    PERSIPUBSUB_ALL_SHAPES=1 python -m pytest -n0 -s tests/faults/test_shapes.py

``PERSIPUBSUB_SHAPE_SECS`` is the time after which a shape hangs.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing.connection
import os
import random
import shutil
import signal
import struct
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from persipubsub import AsyncPub, Pub, Sub, control
from tests import support
from tests.faults import tracing

IS_WHOLE_GRID: Final = os.environ.get("PERSIPUBSUB_ALL_SHAPES", "") == "1"
SHAPE_SECS: Final = float(os.environ.get("PERSIPUBSUB_SHAPE_SECS", support.HANG_SECS))
ROUNDS: Final = int(os.environ.get("PERSIPUBSUB_ROUNDS", "6"))

#: So many shapes of each kind of sender are tried by default, and so many at the same time.
SAMPLE: Final = 48
POOL: Final = 2

#: The senders of a shape send at most so much in all, but each of them at least two messages.
MOST_MESSAGES: Final = 300
MOST_BYTES: Final = 4 << 20

#: Shapes are left out in which two messages of each sender are more than this.
MOST_BYTES_OF_SAMPLE: Final = 40 << 20
MOST_BYTES_OF_GRID: Final = 200 << 20

#: A segment of the queue begins with 256 KiB.
SIZES: Final = (0, 1, 256, 4 << 10, 20_000, 50_000, 200_000, 1 << 20, 3 << 20, 20 << 20)

SENDERS: Final = {"threads": (1, 2, 4, 16, 32), "tasks": (1, 10, 100, 300), "processes": (1, 2, 4)}

_HEAD: Final = struct.Struct("<QQ")


class Shape(NamedTuple):
    kind: str  #: of the senders: threads, tasks or processes
    senders: int
    size: int  #: of a message, in bytes
    durability: str = "fsync"
    call: str = "send"  #: or send_many
    consumer: str = "none"  #: while messages are sent: none, early or late

    @property
    def least_bytes(self) -> int:
        return 2 * self.senders * self.size

    @property
    def messages_each(self) -> int:
        """Number of messages that each sender sends."""
        return max(2, min(MOST_MESSAGES, MOST_BYTES // max(1, self.size)) // self.senders)

    def __str__(self) -> str:
        return (f"{self.senders} {self.kind} x {self.size} bytes, {self.durability}, {self.call}, "
                f"consumer: {self.consumer}")


#: These hung.
ALWAYS: Final = (Shape("threads", 16, 20_000), Shape("tasks", 10,
                                                     50_000), Shape("tasks", 100, 4 << 10))


def choose_shapes(kind: str) -> list[Shape]:
    """Choose shapes of a kind of sender: a sample, or all."""
    grid = [
        Shape(kind, *rest)
        for rest in itertools.product(SENDERS[kind], SIZES, ("fsync",
                                                             "os"), ("send",
                                                                     "send_many"), ("none", "early",
                                                                                    "late"))
    ]
    if IS_WHOLE_GRID:
        return [shape for shape in grid if shape.least_bytes <= MOST_BYTES_OF_GRID]
    always = [shape for shape in ALWAYS if shape.kind == kind]
    others = [
        shape for shape in grid if shape.least_bytes <= MOST_BYTES_OF_SAMPLE and shape not in always
    ]
    return always + random.Random(tracing.seed()).sample(others, SAMPLE - len(always))


# Messages


def make_message(sender: int, number: int, size: int) -> bytes:
    """Make a message; one that is too short for a head is like all others."""
    if size < _HEAD.size:
        return b"\xa5" * size
    head = _HEAD.pack(sender, number)
    return (head * (size // len(head) + 1))[:size]


def sender_of(msg: bytes, size: int) -> tuple[int, int]:
    """Read sender and number in a message, and check all of it."""
    sender, number = _HEAD.unpack_from(msg) if size >= _HEAD.size else (0, 0)
    assert msg == make_message(sender, number, size), f"Expected the message, but got: {msg[:50]!r}"
    return sender, number


def make_calls(shape: Shape, sender: int) -> list[list[bytes]]:
    """List the messages of each call of a sender."""
    msgs = [make_message(sender, number, shape.size) for number in range(shape.messages_each)]
    step = 1 if shape.call == "send" else max(2, min(20, shape.messages_each // 3))
    return [msgs[begin:begin + step] for begin in range(0, len(msgs), step)]


# The processes of a shape


def send_in_threads(pipe: support.Connection, shape: Shape, config_pth: Path, senders: range,
                    half: Any) -> None:
    """Send in threads, the main one among them, whose sends take another way."""
    barrier = threading.Barrier(len(senders))
    with Pub("pub", config_pth) as pub:

        def send(sender: int) -> None:
            calls = make_calls(shape, sender)
            barrier.wait(support.HANG_SECS)
            for index, msgs in enumerate(calls):
                if index == len(calls) // 2:
                    half.release()
                if shape.call == "send":
                    pub.send(msgs[0])
                else:
                    pub.send_many(msgs)

        with concurrent.futures.ThreadPoolExecutor(len(senders)) as executor:
            futures = [executor.submit(send, sender) for sender in senders[1:]]
            send(senders[0])
            for future in futures:
                future.result()
    pipe.send("sent")


def send_in_tasks(pipe: support.Connection, shape: Shape, config_pth: Path, senders: range,
                  half: Any) -> None:

    async def send(pub: AsyncPub, sender: int) -> None:
        calls = make_calls(shape, sender)
        for index, msgs in enumerate(calls):
            if index == len(calls) // 2:
                half.release()
            if shape.call == "send":
                await pub.send(msgs[0])
            else:
                await pub.send_many(msgs)

    async def send_all() -> None:
        async with AsyncPub("pub", config_pth) as pub:
            await asyncio.gather(*(send(pub, sender) for sender in senders))

    asyncio.run(send_all())
    pipe.send("sent")


def receive_shape(pipe: support.Connection, shape: Shape, config_pth: Path) -> None:
    """Receive everything, and send back the numbers from each sender, in order."""
    numbers: dict[int, list[int]] = collections.defaultdict(list)
    missing = shape.senders * shape.messages_each
    with Sub("sub", config_pth) as sub:
        pipe.send("ready")
        while missing > 0:
            with contextlib.ExitStack() as stack:
                if shape.call == "send":
                    msg = stack.enter_context(sub.receive(timeout=SHAPE_SECS))
                    msgs: Sequence[bytes] = () if msg is None else (msg, )
                else:
                    msgs = stack.enter_context(sub.receive_many(max_msgs=50, timeout=SHAPE_SECS))
                assert msgs, f"Expected {missing} more messages, but got: none"
                for msg in msgs:
                    sender, number = sender_of(msg, shape.size)
                    numbers[sender].append(number)
                missing -= len(msgs)
        assert sub.front() is None
    pipe.send(dict(numbers))


def send_and_receive(shape: Shape, directory: Path) -> None:
    """Start the senders and the consumer of a shape, and check what came of it."""
    config_pth = make_queue(directory, shape.durability)
    half = support.FORK.Semaphore(0)
    share = 1 if shape.kind == "processes" else shape.senders
    send = send_in_tasks if shape.kind == "tasks" else send_in_threads
    with contextlib.ExitStack() as stack:

        def start_consumer() -> support.Child:
            child = stack.enter_context(support.Child(receive_shape, shape, config_pth))
            assert child.get() == "ready"
            return child

        consumer = start_consumer() if shape.consumer == "early" else None
        children = [
            stack.enter_context(
                support.Child(send, shape, config_pth, range(first, first + share), half))
            for first in range(0, shape.senders, share)
        ]
        if shape.consumer == "late":
            for _ in range(shape.senders):
                assert half.acquire(timeout=SHAPE_SECS), "Expected to send, but got: it hangs"
            consumer = start_consumer()
        for child in children:
            assert child.get() == "sent"
            child.end()
        consumer = consumer or start_consumer()
        found = consumer.get()
        consumer.end()
    if shape.size < _HEAD.size:
        assert found == {0: shape.senders * shape.messages_each * [0]}
    else:
        assert found == {
            sender: list(range(shape.messages_each))
            for sender in range(shape.senders)
        }
    with support.open_queue(config_pth) as queue:
        assert not queue.check()


def make_queue(directory: Path, durability: str) -> Path:
    """Make a queue without marks: nothing is dropped."""
    config_pth = support.write_config(directory, durability=durability)
    with support.edited(config_pth) as content:
        for key in ("high-water-mark", "max_db_size_bytes"):
            del content["queues"]["queue"][key]
    control.initialize_all_dbs(config_pth)
    return config_pth


def try_shape(pipe: support.Connection, shape: Shape, directory: Path) -> None:
    try:
        send_and_receive(shape, directory)
    except BaseException:  # pylint: disable=broad-exception-caught
        pipe.send(traceback.format_exc())
    else:
        pipe.send("")


class Run:
    """A shape that is being tried."""

    def __init__(self, shape: Shape, directory: Path) -> None:
        self.shape = shape
        self.directory = directory
        directory.mkdir()
        self.begun = time.monotonic()
        self.child = support.Child(try_shape, shape, directory, has_children=True)

    def end(self) -> str:
        """End the processes, and tell what was wrong."""
        problem = f"Expected it to end, but got: it hangs for {SHAPE_SECS} seconds"
        if self.child.pipe.poll():
            try:
                problem = self.child.pipe.recv()
            except EOFError:
                problem = "Expected it to end well, but got: its process died"
        # Those that it started are killed with it.
        self.child.__exit__()
        if not problem:
            shutil.rmtree(self.directory)
        return problem and f"{self.shape}:\n{problem}"


# The longer limit is for shapes that hang: all of them are to be named.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", SENDERS)
def test_every_shape(tmp_path: Path, kind: str) -> None:
    upcoming = choose_shapes(kind)[::-1]
    count, begun = len(upcoming), time.monotonic()
    running: list[Run] = []
    problems: list[str] = []
    seconds: list[tuple[float, str]] = []
    try:
        while running or upcoming:
            while upcoming and len(running) < POOL:
                shape = upcoming.pop()
                running.append(Run(shape, tmp_path / str(len(upcoming))))
            deadline = min(run.begun for run in running) + SHAPE_SECS
            ready = multiprocessing.connection.wait([run.child.pipe for run in running],
                                                    max(0, deadline - time.monotonic()))
            for run in list(running):
                if run.child.pipe in ready or time.monotonic() >= run.begun + SHAPE_SECS:
                    running.remove(run)
                    problems += filter(None, [run.end()])
                    seconds.append((time.monotonic() - run.begun, str(run.shape)))
    finally:
        for run in running:
            run.end()
    print(f"{count} shapes with {kind} in {time.monotonic() - begun:.1f} seconds; longest: "
          f"{sorted(seconds)[-3:]}")
    if problems:
        pytest.fail("\n".join([f"{len(problems)} of {count} shapes failed", *problems]))


# Senders that are killed

SIZE: Final = 200_000
THREADS: Final = 4


def send_until_killed(pipe: support.Connection, config_pth: Path, source: int, ledger: int) -> None:
    """Send in threads; write to a pipe what each send returned for."""
    with Pub("pub", config_pth) as pub:
        pipe.send("ready")

        def send(sender: int) -> None:
            for number in itertools.count():
                pub.send(make_message(sender, number, SIZE))
                os.write(ledger, _HEAD.pack(sender, number))

        support.in_threads([functools.partial(send, source + index) for index in range(THREADS)],
                           timeout=None)


def send_few(pub: Pub, source: int) -> None:

    def send(sender: int) -> None:
        for number in range(3):
            pub.send(make_message(sender, number, SIZE))

    support.in_threads([functools.partial(send, source + index) for index in range(THREADS)])


def send_few_anew(pipe: support.Connection, config_pth: Path, source: int) -> None:
    with Pub("pub", config_pth) as pub:
        send_few(pub, source)
    pipe.send("sent")


def survive(pipe: support.Connection, config_pth: Path) -> None:
    """Have the queue open all the time; send when told to, and receive all that is there."""
    with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
        pipe.send("ready")
        while (source := pipe.recv()) is not None:
            send_few(pub, source)
            pipe.send([sender_of(msg, SIZE) for msg in sub.messages(timeout=0)])


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_killed_while_threads_send(tmp_path: Path, durability: str) -> None:
    rng = random.Random(tracing.seed())
    config_pth = make_queue(tmp_path, durability)
    with support.Child(survive, config_pth) as survivor:
        assert survivor.get() == "ready"
        for turn in range(ROUNDS):
            killed, anew, survived = range(1000 * turn, 1000 * turn + 300, 100)
            acknowledged = kill_sender(config_pth, killed, rng)
            with support.Child(send_few_anew, config_pth, anew) as child:
                assert child.get() == "sent"
                child.end()
            survivor.pipe.send(survived)
            found: dict[int, list[int]] = collections.defaultdict(list)
            for sender, number in survivor.get():
                found[sender].append(number)
            for index in range(THREADS):
                assert found.pop(anew + index) == found.pop(survived + index) == [0, 1, 2]
                received = found.pop(killed + index, [])
                # The last one may have been sent without a note.
                assert received == list(range(len(received)))
                assert 0 <= len(received) - acknowledged[killed + index] <= 1
            assert not found
            with support.open_queue(config_pth) as queue:
                assert not queue.check()
        survivor.pipe.send(None)
        survivor.end()


def kill_sender(config_pth: Path, source: int, rng: random.Random) -> collections.Counter[int]:
    """Kill a process while its threads send; count what each of them noted, in order."""
    reading, writing = os.pipe()
    try:
        with support.Child(send_until_killed, config_pth, source, writing) as child:
            os.close(writing)
            assert child.get() == "ready"
            time.sleep(rng.uniform(0, 0.1))
            child.kill(signal.SIGKILL)
            child.end(-signal.SIGKILL)
        with open(reading, "rb", closefd=False) as file:
            notes = file.read()
    finally:
        os.close(reading)
    counts: collections.Counter[int] = collections.Counter()
    for sender, number in _HEAD.iter_unpack(notes):
        assert number == counts[sender]
        counts[sender] += 1
    return counts
