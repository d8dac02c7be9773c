"""Help the tests with queues in temporary directories and with processes of their own."""

import concurrent.futures
import contextlib
import ctypes
import fcntl
import gc
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import persipubsub
import persipubsub.publisher
import persipubsub.queue
import persipubsub.subscriber
from persipubsub import config, control

#: Catches hangs: nothing that a test waits for takes a tenth of it.
HANG_SECS = 60.0

FORK = multiprocessing.get_context("fork")

_PR_SET_PDEATHSIG = 1

Connection: TypeAlias = "multiprocessing.connection.Connection[Any, Any]"


def write_config(directory: Path,
                 publishers: Mapping[str,
                                     Sequence[str]] = types.MappingProxyType({"pub": ("sub", )}),
                 subscribers: Sequence[str] = ("sub", ),
                 name: str = "config.json",
                 **changes: Any) -> Path:
    """Write a configuration file with one queue, ``directory/queue``."""
    mark: dict[str, Any] = {
        "MSG_TIMEOUT_SECS": 600,
        "MAX_MSGS_NUM": 1000000,
        # A server reserves it for each of the many queues.
        "HWM_LMDB_SIZE_BYTES": 1 << 26,
        "strategy": "prune_first"
    }
    queue: dict[str, Any] = {
        "path": str(directory / "queue"),
        "max_reader_num": 1024,
        "max_db_num": 1024,
        "max_db_size_bytes": 1 << 28,
        "subscribers": list(subscribers),
        "high-water-mark": mark
    }
    for key, value in changes.items():
        (mark if key in mark else queue)[key] = value

    entries: dict[str, Any] = {"queues": {"queue": queue}}
    for publisher, addressed in publishers.items():
        entries[publisher] = {"out_queue": "queue", "subscribers": list(addressed)}
    for subscriber in subscribers:
        entries.setdefault(subscriber, {})["in_queue"] = "queue"
    path = directory / name
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


@contextlib.contextmanager
def edited(config_pth: Path) -> Iterator[dict[str, Any]]:
    """Let a test change the content of a configuration file."""
    content = json.loads(config_pth.read_text(encoding="utf-8"))
    yield content
    config_pth.write_text(json.dumps(content), encoding="utf-8")


def add_dead_letters(config_pth: Path, **subscriber: Any) -> Path:
    """Add a queue for the dead letters of ``sub``."""
    with edited(config_pth) as content:
        content["sub"].update({"max_deliveries": 1, "dead_letter_queue": "letters", **subscriber})
        content["queues"]["letters"] = {
            **content["queues"]["queue"], "path": str(config_pth.with_name("letters")),
            "subscribers": []
        }
    return config_pth


def make_queue(directory: Path, *args: Any, **changes: Any) -> Path:
    """Write a configuration file, as :py:func:`write_config` does, and initialize its queue."""
    config_pth = write_config(directory, *args, **changes)
    control.initialize_all_dbs(config_pth)
    return config_pth


def send(config_pth: Path, *messages: bytes) -> None:
    with persipubsub.Pub("pub", config_pth) as pub:
        pub.send_many(messages)


def send_each(config_pth: Path, *messages: bytes) -> None:
    with persipubsub.Pub("pub", config_pth) as pub:
        for message in messages:
            pub.send(message)


def receive_all(config_pth: Path, sub_id: str = "sub") -> list[bytes]:
    with persipubsub.Sub(sub_id, config_pth) as sub:
        return list(sub.messages(timeout=0))


def open_queue(config_pth: Path, queue_key: str = "queue") -> persipubsub.queue.Queue:
    """Open a queue on this machine as publishers and subscribers do."""
    return persipubsub.queue.open_queue(config.read(config_pth), queue_key)


def queue_of(
        user: (persipubsub.publisher.Pub | persipubsub.subscriber.Sub),
) -> persipubsub.queue.Queue:
    """Return the queue on this machine that a publisher or a subscriber has open."""
    queue = user._require().queue
    assert isinstance(queue, persipubsub.queue.Queue)
    return queue


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + HANG_SECS
    while not condition():
        assert time.monotonic() < deadline, f"Waited in vain: {what}"
        time.sleep(0.001)


def in_threads(works: Sequence[Callable[[], object]], timeout: float | None = HANG_SECS) -> None:
    """Call each function in a thread of its own, wait for all, and raise what one of them raised."""
    with concurrent.futures.ThreadPoolExecutor(len(works)) as executor:
        for future in [executor.submit(work) for work in works]:
            future.result(timeout)


def is_writable(descriptor: int) -> bool:
    """Tell whether a descriptor is open, and of a file that may be written to."""
    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    except OSError:
        return False
    return flags & os.O_ACCMODE != os.O_RDONLY


def count_descriptors() -> int:
    """
    Count what this process has open, before a test that is to leave nothing.

    What tests before this one left to the garbage collector is closed first: otherwise a leak of
    the test might be made up for. What their threads still close later on is no fault of the test:
    there may be fewer in the end, but not more.
    """
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def open_files(process: int | str = "self") -> list[str]:
    """List what a process has open, which may open and close more meanwhile."""
    found = []
    for path in Path("/proc", str(process), "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(path))
    return found


def run_python(
    code: str, *arguments: object, options: Sequence[str] = (), prefix: Sequence[str] = ()
) -> "subprocess.CompletedProcess[str]":
    """Run code in a Python process of its own that finds the modules this one has."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path != "")
    return run([*prefix, sys.executable, *options, "-c", code, *arguments], env=environment)


def run(command: Sequence[object], **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(word) for word in command],
                          capture_output=True,
                          text=True,
                          timeout=2 * HANG_SECS,
                          check=False,
                          **options)


def start(command: Sequence[object], **options: Any) -> "subprocess.Popen[str]":
    """Start a program that reads nothing."""
    return subprocess.Popen([str(word) for word in command],
                            stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            text=True,
                            **options)


def import_file(path: Path) -> types.ModuleType:
    """Import a module that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Child:
    """
    Run a function in a forked process; it gets one end of a pipe and the arguments.

    A child that is still there at the end of the ``with`` block is killed, and so is one whose
    parent was.
    """

    def __init__(self,
                 function: Callable[..., None],
                 *arguments: Any,
                 has_children: bool = False) -> None:
        self.pipe, theirs = FORK.Pipe()

        def run() -> None:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            function(theirs, *arguments)

        # Python refuses to start processes in a daemon.
        self.process = FORK.Process(target=run, daemon=not has_children)
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.exitcode is None:
            self.kill(signal.SIGKILL)
            self.process.join(HANG_SECS)
        self.pipe.close()

    def get(self) -> Any:
        assert self.pipe.poll(HANG_SECS), "Expected the child to answer, but it hangs."
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join(HANG_SECS)
            raise AssertionError(
                f"Expected the child to answer, but it ended with {self.process.exitcode}"
            ) from None

    def kill(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, exit_code: int = 0) -> None:
        self.process.join(HANG_SECS)
        assert self.process.exitcode == exit_code


def hold_message(pipe: Connection, config_pth: Path) -> None:
    """Receive a message in a child, and acknowledge it when told to."""
    with persipubsub.Sub("sub", config_pth) as sub:
        with sub.receive(timeout=HANG_SECS) as msg:
            pipe.send(msg)
            pipe.recv()
    pipe.send("done")


def outcome(function: Callable[[], object]) -> str:
    try:
        function()
    except BaseException as error:  # pylint: disable=broad-exception-caught
        return type(error).__name__
    return ""


def outcomes_in_child(*functions: Callable[[], object]) -> list[str]:
    """Call functions one after the other in a process that may crash."""

    def run(pipe: Connection) -> None:
        for function in functions:
            pipe.send(outcome(function))

    with Child(run) as child:
        results = [child.get() for _ in functions]
        child.end()
    return results
