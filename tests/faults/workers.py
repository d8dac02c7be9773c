"""Be the processes of the fault tests, and keep their ledger."""

import ctypes
import functools
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from persipubsub import Pub, Sub, control
from tests import support

#: Publishers pause while this many messages wait.
_BACKLOG: Final = 2000


class Ledger:
    """
    Append records to a file that many processes append to.

    A record begins and ends with its own marks: that of a process killed in the middle of the
    write is told apart, and spoils no other one.
    """

    _END: Final = " ;"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)  # pylint: disable=consider-using-with

    def note(self, *fields: object) -> None:
        line = f"\n{time.monotonic_ns()} {' '.join(map(str, fields))}{self._END}\n"
        self._file.write(line.encode("ascii"))

    def records(self) -> list[list[str]]:
        """List the records, each with its time in front; a torn one is empty."""
        return [
            line[:-len(self._END)].split(" ") if line.endswith(self._END) else []
            for line in self._path.read_text("ascii").split("\n") if line
        ]


class Board(ctypes.Structure):
    """Share a few numbers between processes that may be killed at any time: no locks."""

    publishers_end: bool  #: publishers and controllers shall end
    subscribers_end: bool
    backlog: int

    _fields_ = [("publishers_end", ctypes.c_bool), ("subscribers_end", ctypes.c_bool),
                ("backlog", ctypes.c_long)]


class Scene:

    def __init__(self, config_pth: Path) -> None:
        self.config_pth = config_pth
        self.ledger = Ledger(config_pth.with_name("ledger"))
        self.board = support.FORK.RawValue(Board)


class Role(NamedTuple):
    kind: str  #: names the function that does it
    id: str  #: of the publisher or subscriber
    batch: int  #: largest number of messages at once
    threads: int = 1


class _Refused(Exception):
    """Be the exception of a user who can not process a message."""


def run(_: Any, scene: Scene, role: Role, name: str, seed: int) -> None:
    """Be a worker of a storm until told to end."""
    try:
        {"publish": _publish, "subscribe": _subscribe, "control": _control, "clear": _clear}[
            role.kind](scene, role, name, random.Random(seed))  # yapf: disable
    except BaseException as error:  # pylint: disable=broad-exception-caught
        scene.ledger.note("error", name, type(error).__name__, *repr(str(error)).split(" "))
        raise


def _publish(scene: Scene, role: Role, name: str, rng: random.Random) -> None:
    """Send single messages and batches, and note each of them before and after."""
    with Pub(role.id, scene.config_pth) as pub:

        def send(thread: int) -> None:
            source = f"{name}.{thread}"
            number = 0
            while not scene.board.publishers_end:
                count = rng.choice((1, 1, rng.randint(1, role.batch)))
                msgs = [
                    f"{source} {number + index} {'x' * rng.choice((0, 50, 500, 9000))}".encode(
                        "ascii") for index in range(count)
                ]
                scene.ledger.note("try", role.id, source, number, number + count)
                if count == 1:
                    pub.send(msg=msgs[0])
                else:
                    pub.send_many(msgs=msgs)
                scene.ledger.note("sent", role.id, source, number, number + count)
                number += count
                pause = 0.002 if scene.board.backlog < _BACKLOG else 0.1
                time.sleep(rng.uniform(0, pause))

        support.in_threads([functools.partial(send, thread) for thread in range(role.threads)],
                           timeout=None)


def _subscribe(scene: Scene, role: Role, name: str, rng: random.Random) -> None:
    """Receive single messages or batches; note each of them inside of the block and behind it."""
    ledger = scene.ledger
    with Sub(role.id, scene.config_pth) as sub:
        while not scene.board.subscribers_end:
            received: list[str] = []
            try:
                if role.batch == 1:
                    with sub.receive(timeout=0.2) as msg:
                        _work(() if msg is None else (msg, ), received, role, name, ledger, rng)
                else:
                    with sub.receive_many(max_msgs=rng.randint(1, role.batch), timeout=0.2) as msgs:
                        _work(msgs, received, role, name, ledger, rng)
            except _Refused:
                continue
            if received:
                ledger.note("done", role.id, name, *received)


def _work(msgs: Sequence[bytes], received: list[str], role: Role, name: str, ledger: Ledger,
          rng: random.Random) -> None:
    """Note what was received, take some time, and fail now and then."""
    for msg in msgs:
        source, number, _ = msg.decode("ascii").split(" ")
        received.append(f"{source}:{number}")
    if received:
        ledger.note("received", role.id, name, *received)
        time.sleep(rng.choice((0, 0, 0.0005, 0.005)))
        if rng.random() < 0.01:
            ledger.note("failed", role.id, name, *received)
            raise _Refused()


def _control(scene: Scene, _: Role, __: str, rng: random.Random) -> None:
    """Do what an operator does while others work."""
    while not scene.board.publishers_end:
        rng.choice((control.initialize_all_dbs,
                    control.prune_dangling_messages))(config_pth=scene.config_pth)
        with support.open_queue(scene.config_pth) as queue:
            findings = queue.check()
            assert not findings, findings
            scene.board.backlog = queue.statistics().messages
        time.sleep(rng.uniform(0, 0.2))


def _clear(scene: Scene, role: Role, _: str, rng: random.Random) -> None:
    while not scene.board.publishers_end:
        if rng.random() < 0.5:
            control.clear_all_subs(config_pth=scene.config_pth)
        else:
            with Sub(role.id, scene.config_pth) as sub:
                sub.pop_to_top()
        time.sleep(rng.uniform(0, 0.2))


class Worker:
    """Be one place in a storm: whoever is killed there is followed by another one."""

    def __init__(self, scene: Scene, role: Role, place: str, rng: random.Random) -> None:
        self._scene = scene
        self.role = role
        self._place = place
        self._rng = rng
        self._count = 0
        self.child: support.Child | None = None
        self.name = ""
        self.start()

    def start(self) -> None:
        self.name = f"{self._place}-{self._count}"
        self._count += 1
        self.child = support.Child(run, self._scene, self.role, self.name,
                                   self._rng.randrange(1 << 60))

    def kill(self) -> None:
        """Kill the one that is there, and note it before: it can not have done anything after."""
        assert self.child is not None
        assert self.child.process.exitcode is None, f"Expected {self.name} to work, but it ended."
        self._scene.ledger.note("killed", self.role.id, self.name)
        self.destroy()

    def stop(self, seconds: float) -> None:
        """Stop the one that is there for a while."""
        assert self.child is not None
        self.child.kill(signal.SIGSTOP)
        time.sleep(seconds)
        self._scene.ledger.note("stopped", self.role.id, self.name)
        self.child.kill(signal.SIGCONT)

    def end(self) -> None:
        if self.child is not None:
            self.child.end()
            self.destroy()

    def destroy(self) -> None:
        if self.child is not None:
            self.child.__exit__()
            self.child = None
