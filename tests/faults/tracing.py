"""Run a function in a process of its own under strace, from its first instruction on."""

import collections
import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import support

_PR_SET_PTRACER = 0x59616d61
_ANY_PROCESS = ctypes.c_ulong(-1)


def seed() -> int:
    """Choose the seed of a test, and print it."""
    chosen = int(os.environ.get("PERSIPUBSUB_SEED", "") or int.from_bytes(os.urandom(4), "big"))
    print(f"PERSIPUBSUB_SEED={chosen}")
    return chosen


def _child(pipe: support.Connection, start: Callable[[], Callable[[], None]]) -> None:
    """Do the work when told, so that strace sees all of it and nothing else."""
    work = start()
    # Where only parents may trace (Yama): strace is our sibling.
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY_PROCESS, 0, 0, 0)
    pipe.send(os.getpid())
    pipe.recv()
    work()


def run(start: Callable[[], Callable[[], None]], options: Sequence[str]) -> int:
    """
    Run a function under strace.

    A fork costs a tenth of what a new interpreter does, and its calls are those of the function.
    """
    with support.Child(_child, start) as child:
        tracer = subprocess.Popen(
            ["strace", "-f", *options, "-p", str(child.get())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True)
        try:
            assert tracer.stderr is not None
            line = tracer.stderr.readline()
            if "attached" not in line:
                raise RuntimeError(
                    f"Expected strace to attach, but got: {line + tracer.stderr.read()}")
            # A process that is to be killed at its first read does not live to be told.
            with contextlib.suppress(BrokenPipeError):
                child.pipe.send("go")
            # First the tracer: it ends behind the process, and what it wrote is complete then.
            _, rest = tracer.communicate(timeout=2 * support.HANG_SECS)
            child.process.join(support.HANG_SECS)
            assert child.process.exitcode is not None, rest
            return child.process.exitcode
        finally:
            if tracer.poll() is None:
                tracer.kill()
                tracer.wait()


def list_calls(start: Callable[[], Callable[[], None]], output: Path) -> list[tuple[str, int]]:
    """List the system calls of a process: name, and the how manieth of that name in a thread."""
    assert run(start, ["-o", str(output)]) == 0
    counts: dict[tuple[str, str], int] = collections.Counter()
    places: dict[tuple[str, int], None] = {}
    for line in output.read_text("utf-8", "replace").splitlines():
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match is not None and match.group(2) not in ("exit", "exit_group", "restart_syscall"):
            thread, name = match.groups()
            counts[thread, name] += 1
            places[name, counts[thread, name]] = None
    return list(places)


def inject(start: Callable[[], Callable[[], None]],
           calls: str,
           effect: str,
           when: object = "1+",
           paths: Sequence[Path] = ()) -> int:
    """
    Run a function some of whose system calls fail, or kill it.

    :param effect: ``error=...`` or ``signal=...``
    :param when: which of the calls: ``2``, ``2..5`` or ``2+``
    :param paths: only calls with these files
    :return: exit code
    """
    only = [option for path in paths for option in ("-P", str(path))]
    return run(start, [
        "-o", os.devnull, *only, "-e", f"trace={calls}", "-e",
        f"inject={calls}:{effect}:when={when}"
    ])


def kill_at(start: Callable[[], Callable[[], None]], place: tuple[str, int]) -> int:
    """Kill a process at a system call, and return its exit code: 0 if it ended before."""
    name, count = place
    return inject(start, name, "signal=KILL", count)


@functools.cache
def _why_not() -> str:
    """Tell why nothing can be traced here; empty if it can."""
    if shutil.which("strace") is None:
        return "strace is missing"
    try:
        run(lambda: lambda: None, ["-o", os.devnull, "-e", "trace=none"])
    except RuntimeError as error:
        return str(error)
    return ""


def require() -> None:
    """Skip the test where strace is missing, or not permitted."""
    reason = _why_not()
    if reason:
        pytest.skip(f"strace is needed: {reason}")


def fast_directory() -> "tempfile.TemporaryDirectory[str]":
    """Make a directory in memory, if there is one, for the many images of a disk."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK | os.X_OK) else None)
