"""Be the processes of the fault tests, and keep their ledger."""

import ctypes
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from persipubsub import Pub, Sub, control
from tests import support

#: No process of these tests lives longer than this, in seconds.
LIMIT_SECS: Final = int(os.environ.get("PERSIPUBSUB_STORM_SECS", "0")) + 300

#: Publishers pause while this many messages wait.
_BACKLOG: Final = 2000

_PR_SET_PDEATHSIG: Final = 1


def guard() -> None:
    """Let this process end with its parent, and after a limit in any case."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LIMIT_SECS)
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except AttributeError:
        # Only Linux has it; the limit of time is left.
        pass


class Ledger:
    """
    Append records to a file that many processes append to.

    A record begins and ends with its own marks: that of a process killed in the middle of the
    write is told apart, and spoils no other one.
    """

    END: Final = " ;"

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, *fields: object) -> None:
        line = f"\n{time.monotonic_ns()} {' '.join(map(str, fields))}{self.END}\n"
        os.write(self._descriptor, line.encode("ascii"))


class Board:
    """Share a few numbers between processes that may be killed at any time: no locks."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    def _get(self, index: int) -> int:
        return int.from_bytes(self._page[8 * index:8 * index + 8], "little")

    def _set(self, index: int, value: int) -> None:
        self._page[8 * index:8 * index + 8] = value.to_bytes(8, "little")

    @property
    def publishers_end(self) -> bool:
        """Tell whether publishers and controllers shall end."""
        return self._get(0) != 0

    @property
    def subscribers_end(self) -> bool:
        return self._get(1) != 0

    @property
    def backlog(self) -> int:
        return self._get(2)

    @backlog.setter
    def backlog(self, count: int) -> None:
        self._set(2, count)

    def end_publishers(self) -> None:
        self._set(0, 1)

    def end_subscribers(self) -> None:
        self._set(1, 1)


class Scene(NamedTuple):
    """Hold what all workers of a storm need."""

    config_pth: Path
    ledger_pth: Path
    board: Board


class Role(NamedTuple):
    """Say what a worker does."""

    kind: str  #: names the function that does it
    id: str  #: of the publisher or subscriber
    batch: int  #: largest number of messages at once
    threads: int = 1


class _Refused(Exception):
    """Be the exception of a user who can not process a message."""


def run(pipe: Any, scene: Scene, role: Role, name: str, seed: int) -> None:
    """Be a worker of a storm until told to end."""
    del pipe
    guard()
    ledger = Ledger(scene.ledger_pth)
    try:
        {"publish": _publish, "subscribe": _subscribe, "control": _control, "clear": _clear}[
            role.kind](scene, role, name, ledger, seed)  # yapf: disable
    except BaseException as error:  # pylint: disable=broad-exception-caught
        ledger.note("error", name, type(error).__name__, *repr(str(error)).split(" "))
        raise


def _publish(scene: Scene, role: Role, name: str, ledger: Ledger, seed: int) -> None:
    """Send single messages and batches, and note each of them before and after."""
    with Pub(role.id, scene.config_pth) as pub:

        def send(thread: int) -> None:
            rng = random.Random(seed + thread)
            source = f"{name}.{thread}"
            number = 0
            while not scene.board.publishers_end:
                count = rng.choice((1, 1, rng.randint(1, role.batch)))
                msgs = [
                    f"{source} {number + index} {'x' * rng.choice((0, 50, 500, 9000))}".encode(
                        "ascii") for index in range(count)
                ]
                ledger.note("try", role.id, source, number, number + count)
                if count == 1:
                    pub.send(msg=msgs[0])
                else:
                    pub.send_many(msgs=msgs)
                ledger.note("sent", role.id, source, number, number + count)
                number += count
                pause = 0.002 if scene.board.backlog < _BACKLOG else 0.1
                time.sleep(rng.uniform(0, pause))

        in_threads(role.threads, send)


def _subscribe(scene: Scene, role: Role, name: str, ledger: Ledger, seed: int) -> None:
    """Receive single messages or batches; note each of them inside of the block and behind it."""
    rng = random.Random(seed)
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


def _control(scene: Scene, role: Role, name: str, ledger: Ledger, seed: int) -> None:
    """Do what an operator does while others work."""
    del role, name, ledger
    rng = random.Random(seed)
    while not scene.board.publishers_end:
        rng.choice((control.initialize_all_dbs,
                    control.prune_dangling_messages))(config_pth=scene.config_pth)
        with support.open_queue(scene.config_pth) as queue:
            findings = queue.check()
            assert not findings, findings
            scene.board.backlog = queue.statistics().messages
        time.sleep(rng.uniform(0, 0.2))


def _clear(scene: Scene, role: Role, name: str, ledger: Ledger, seed: int) -> None:
    del name, ledger
    rng = random.Random(seed)
    while not scene.board.publishers_end:
        if rng.random() < 0.5:
            control.clear_all_subs(config_pth=scene.config_pth)
        else:
            with Sub(role.id, scene.config_pth) as sub:
                sub.pop_to_top()
        time.sleep(rng.uniform(0, 0.2))


def in_threads(count: int, function: Callable[[int], None]) -> None:
    """Run a function in threads, and wait for all of them."""
    if count == 1:
        function(0)
        return
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            function(number)
        except BaseException as error:  # pylint: disable=broad-exception-caught
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number, ), daemon=True)
               for number in range(count)]  # yapf: disable
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECS)
        assert not thread.is_alive(), "Expected the threads to end, but one hangs."
    if errors:
        raise errors[0]


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

    def kill(self, ledger: Ledger) -> None:
        """Kill the one that is there, and note it before: it can not have done anything after."""
        assert self.child is not None
        assert self.child.process.exitcode is None, f"Expected {self.name} to work, but it ended."
        ledger.note("killed", self.role.id, self.name)
        self.child.kill(signal.SIGKILL)
        self.child.end(-signal.SIGKILL)
        self.child.pipe.close()
        self.child = None

    def stop(self, ledger: Ledger, seconds: float) -> None:
        """Stop the one that is there for a while."""
        assert self.child is not None
        self.child.kill(signal.SIGSTOP)
        time.sleep(seconds)
        ledger.note("stopped", self.role.id, self.name)
        self.child.kill(signal.SIGCONT)

    def end(self) -> None:
        """Wait for the end of the last one."""
        if self.child is None:
            return
        self.child.process.join(support.HANG_SECS)
        exitcode = self.child.process.exitcode
        self.child.__exit__()
        self.child = None
        assert exitcode == 0, f"Expected {self.name} to end, but got: {exitcode}"

    def destroy(self) -> None:
        """End the last one whatever it does."""
        if self.child is not None:
            self.child.__exit__()
            self.child = None
