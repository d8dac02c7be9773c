"""
Kill a process at any of its system calls, and go on at once in another one.

A sample of the calls is taken, chosen by ``PERSIPUBSUB_SEED``; with ``PERSIPUBSUB_EVERY_CALL=1`` a
process is killed at each of them.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

from persipubsub import Pub, Sub, control
from persipubsub.lmdb_engine import files
from tests import stores, support
from tests.faults import replay, tracing, workers

IS_EVERY: Final = bool(int(os.environ.get("PERSIPUBSUB_EVERY_CALL", "0")))

#: So many kills a case, if not every call is taken; fewer on a machine that is busy.
SAMPLE: Final = 10

#: No further kill of a sample begins after this time, in seconds.
BUDGET_SECS: Final = 4.0

BIG: Final = bytes(50000)

#: What is there before, and what is sent by whoever is killed.
FIRST: Final = (b"first", BIG, b"third")
SENT: Final = (b"small", BIG, b"last")


class Scene:
    """Be a queue that a process is killed on, and its ledger."""

    def __init__(self, directory: Path, durability: str) -> None:
        directory.mkdir()
        self.directory = directory / "queue"
        self.config_pth = support.write_config(directory,
                                               durability=durability,
                                               checkpoint_secs=0.01,
                                               busy_timeout_secs=10)
        self.ledger = workers.Ledger(directory / "ledger")
        self.note = self.ledger.note

    def count(self, word: str) -> int:
        return sum(record[1:] == [word] for record in self.ledger.records())

    def publisher(self) -> Pub:
        return Pub("pub", self.config_pth)

    def subscriber(self) -> Sub:
        return Sub("sub", self.config_pth)

    def send(self, pub: Pub, message: bytes) -> None:
        self.note("begun")
        pub.send(message)
        self.note("sent")


# What is killed: everything but what is returned is done before strace comes.


def start_send(scene: Scene) -> Callable[[], None]:
    pub = scene.publisher()

    def work() -> None:
        for message in SENT:
            scene.send(pub, message)

    return work


def start_receive(scene: Scene) -> Callable[[], None]:
    sub = scene.subscriber()

    def work() -> None:
        for _ in FIRST:
            scene.note("take")
            with sub.receive(timeout=1) as message:
                assert message is not None
            scene.note("acknowledged")
        # Asleep until the time is over.
        with sub.receive(timeout=0.02) as message:
            assert message is None

    return work


def start_initialize(scene: Scene) -> Callable[[], None]:
    return lambda: control.initialize_all_dbs(config_pth=scene.config_pth)


def start_open(scene: Scene) -> Callable[[], None]:

    def work() -> None:
        scene.publisher()
        scene.subscriber()

    return work


def start_close(scene: Scene) -> Callable[[], None]:
    pub, sub = scene.publisher(), scene.subscriber()
    scene.send(pub, SENT[0])

    def work() -> None:
        pub.close()
        sub.close()

    return work


def start_state(scene: Scene) -> Callable[[], None]:
    pub = scene.publisher()
    scene.send(pub, SENT[0])
    return support.queue_of(pub).secure


def start_segments(scene: Scene) -> Callable[[], None]:
    """Segments become full, are made, and are used again."""
    replay.small_segments()
    pub = scene.publisher()

    def work() -> None:
        for message in SENT:
            scene.send(pub, message)
            support.queue_of(pub).secure()

    return work


def start_rebuild(scene: Scene) -> Callable[[], None]:
    """As after a power failure; the neighbour sees to it that the boot is the same."""
    stores.lose_power(scene.directory)
    return start_open(scene)


Start = Callable[[Scene], Callable[[], None]]

CASES: dict[str, Start] = {
    "send": start_send,
    "receive": start_receive,
    "initialize": start_initialize,
    "open": start_open,
    "close": start_close,
    "state": start_state,
    "segments": start_segments,
    "rebuild": start_rebuild,
}

# Who goes on


def neighbour(pipe: support.Connection, scene: Scene) -> None:
    """Have the queue open from before; when the other process was killed, work at once."""
    pub, sub = scene.publisher(), scene.subscriber()
    pipe.send("open")
    pipe.recv()
    pub.send(b"neighbour")
    received: list[bytes] = []
    while not received or received[-1] != b"neighbour":
        with sub.receive(timeout=5) as message:
            assert message is not None, f"Expected the message, but got: {received}"
            received.append(message)
    pipe.send(received[:-1])
    pub.close()
    sub.close()


def check_received(scene: Scene, received: Sequence[bytes]) -> None:
    """Compare what arrived with the ledger: nothing lost, nothing twice, in order."""
    everything = list(FIRST + SENT)
    begin = len(everything)
    # Which of them: from the first that is not acknowledged to the last that was sent.
    for begin in range(scene.count("acknowledged"), scene.count("take") + 1):
        for end in range(len(FIRST) + scene.count("sent"), len(FIRST) + scene.count("begun") + 1):
            if list(received) == everything[begin:end]:
                return
    raise AssertionError("Expected what the ledger says, but got: {}; ledger: {}".format(
        [message[:10] for message in received],
        {word: scene.count(word)
         for word in ("take", "acknowledged", "begun", "sent")}))


def check_scene(scene: Scene) -> None:
    """Check that nothing hinders anybody: no repair is needed."""
    control.initialize_all_dbs(config_pth=scene.config_pth)
    with scene.publisher() as pub, scene.subscriber() as sub:
        pub.send(b"afterwards")
        with sub.receive(timeout=5) as message:
            assert message == b"afterwards"
    with support.open_queue(scene.config_pth) as queue:
        assert queue.check() == []
    assert not (scene.directory / files.RUNNING).exists()
    assert not files.foreign_names(str(scene.directory))


def kill_at(scene: Scene, start: Start, place: tuple[str, int]) -> bool:
    """Kill a process at a system call, and see that the others go on."""
    # Nobody else may have it open while it is rebuilt.
    is_there = scene.directory.exists() and start is not start_rebuild
    if is_there:
        with support.Child(neighbour, scene) as child:
            assert child.get() == "open"
            code = tracing.kill_at(lambda: start(scene), place)
            child.pipe.send("go")
            check_received(scene, child.get())
            child.end()
    else:
        code = tracing.kill_at(lambda: start(scene), place)
        # Those who come too early are told so.
        expected = ("", ) if start is start_rebuild else ("", "NotInitializedError")
        assert support.outcome(lambda: scene.subscriber().close()) in expected
        if start is start_rebuild:
            assert support.receive_all(scene.config_pth) == list(FIRST)
    check_scene(scene)
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_call(tmp_path: Path, case: str, durability: str) -> None:
    tracing.require()
    start = CASES[case]
    chance = random.Random(tracing.seed())

    def make(name: str) -> Scene:
        scene = Scene(tmp_path / name, durability)
        if case != "initialize":
            control.initialize_all_dbs(config_pth=scene.config_pth)
            with scene.publisher() as pub:
                pub.send_many(FIRST)
        return scene

    def list_calls(scene: Scene) -> list[tuple[str, int]]:
        return tracing.list_calls(lambda: start(scene), tmp_path / "trace")

    places = list_calls(make("count"))
    total = len(places)
    if not IS_EVERY:
        # On a busy machine the background thread works many times more in one run than in another.
        again = set(list_calls(make("again")))
        places = [place for place in places if place in again]
        chance.shuffle(places)
    killed = done = 0
    deadline = time.monotonic() + BUDGET_SECS
    for place in places:
        # More than the sample if most of those calls did not come this time.
        is_enough = done >= SAMPLE or time.monotonic() > deadline
        if is_enough and killed >= 3 and not IS_EVERY:
            break
        done += 1
        scene = make("{}-{}".format(*place))
        try:
            killed += kill_at(scene, start, place)
        except AssertionError as error:
            raise AssertionError(f"Killed at {place}: {error}") from error
        shutil.rmtree(scene.directory.parent)
    print(f"{killed} kills at {total} calls")
    assert killed >= 3
