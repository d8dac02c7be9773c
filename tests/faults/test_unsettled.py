"""
Kill a process before it flushes names of a queue's directory, and open the queue in another one.

What that one writes must not be lost with a name that a power failure takes: it flushes the
directory itself.
"""

# pylint: disable=missing-function-docstring

import functools
import os
import pathlib
import signal
from collections.abc import Callable
from typing import NamedTuple

import pytest

import persipubsub.control
import persipubsub.queue
from persipubsub.environment import _files
from tests import support
from tests.faults import tracing


class Case(NamedTuple):
    """Say what is killed."""

    durability: str  #: of the queue that is there before; "": none
    work: Callable[[pathlib.Path], object]  #: given the configuration
    after: str  #: durability in the configuration
    checkpoint_secs: float = 1.0


CASES: dict[str, Case] = {
    "create": Case("", persipubsub.control.initialize_all_dbs, "fsync"),
    "compact": Case("fsync", persipubsub.control.compact, "fsync"),
    "mark": Case("os", lambda path: persipubsub.queue.Queue(support.settings(path)), "os", 0),
    "unmark": Case("os", persipubsub.control.initialize_all_dbs, "fsync"),
}


def trace_flushes(directory: pathlib.Path, output: pathlib.Path, work: Callable[[], object],
                  *options: str) -> int:
    """Run something in a process, and count how often it flushes a directory."""

    def run() -> None:
        work()

    tracing.run(lambda: run,
                ["-P", str(directory), "-o",
                 str(output), "-e", "trace=fsync", *options])
    return output.read_text("utf-8", "replace").count("fsync(")


@pytest.mark.parametrize("name", CASES)
def test_killed_before_names_are_flushed(tmp_path: pathlib.Path, name: str) -> None:
    tracing.require()
    case = CASES[name]
    directory = tmp_path / "queue"
    if case.durability:
        persipubsub.control.initialize_all_dbs(
            support.write_config(tmp_path,
                                 durability=case.durability,
                                 checkpoint_secs=case.checkpoint_secs))
    config_pth = support.write_config(tmp_path,
                                      durability=case.after,
                                      checkpoint_secs=case.checkpoint_secs)
    output = tmp_path / "trace"
    assert trace_flushes(directory, output, functools.partial(case.work, config_pth), "-e",
                         "inject=fsync:signal=KILL:when=1") == 1
    assert "killed by SIGKILL" in output.read_text("utf-8")

    def use() -> None:
        persipubsub.queue.Queue(support.settings(config_pth))
        # Without closing it, which may flush as well.
        os.kill(os.getpid(), signal.SIGKILL)

    assert trace_flushes(directory, output, use) > 0
    names = set(os.listdir(directory))
    assert _files.CREATING not in names
    if case.after == "fsync":
        assert not names & {_files.CHECKPOINT, f"{_files.CHECKPOINT}.new", _files.RUNNING}
        # Once is enough.
        assert trace_flushes(directory, output, use) == 0
