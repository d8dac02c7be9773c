"""Test that locks of files end: a fork leaks none, and each wait for one has a deadline."""

import contextlib
import fcntl
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from persipubsub import Pub, Sub, control, errors
from tests import support
from tests.faults import tracing

#: How long the open of a file takes in which a process is forked, in microseconds.
OPENING_US = 2_000_000

#: How long the rebuild takes that another process is waited for, and how long that one waits at most
#: without any progress, in seconds.
REBUILD_SECS, BUSY_SECS = 5.0, 1.5


@pytest.fixture(name="made")
def fixture_made(tmp_path: Path) -> Path:
    """Make a queue with one message that was opened and closed before, so that all files are there."""
    config_pth = support.make_queue(tmp_path, checkpoint_secs=3600, busy_timeout_secs=0.3)
    support.send(config_pth, b"message")
    with Sub("sub", config_pth) as sub:
        with sub.receive(timeout=0) as message:
            assert message == b"message"
    support.send(config_pth, b"another")
    return config_pth


# Forks


def compact(config_pth: Path) -> str:
    control.compact(config_pth)
    return "alone"


def receive(config_pth: Path) -> str:
    with Sub("sub", config_pth) as sub, sub.receive(timeout=support.HANG_SECS / 4) as message:
        return repr(message)


def fork_and_die(config_pth: Path, name: str, look: Callable[[Path], str],
                 dies_at_once: bool) -> None:
    """
    Fork while another thread is in the middle of opening a file, and die, perhaps with its lock.

    The child looks at the queue after that: it must keep no lock of its parent.
    """
    is_locked = threading.Event()

    def work() -> None:
        with Sub("sub", config_pth) as sub, sub.receive(timeout=0):
            is_locked.set()
            threading.Event().wait()

    threading.Thread(target=work, daemon=True).start()
    support.until(lambda: any(path.endswith(name) for path in support.open_files()), what=name)
    parent = os.getpid()
    if os.fork() == 0:
        try:
            support.until(lambda: os.getppid() != parent, what="the end of the parent")
            config_pth.with_name("found").write_text(look(config_pth), encoding="ascii")
        except BaseException as error:  # pylint: disable=broad-exception-caught
            config_pth.with_name("found").write_text(repr(error), encoding="utf-8")
        finally:
            os._exit(0)
    assert not is_locked.is_set(), "Expected to fork before the file was locked."
    if not dies_at_once:
        is_locked.wait(support.HANG_SECS)
    os.kill(os.getpid(), signal.SIGKILL)


# While ``users.lock`` is being opened, ``open.lock`` is locked.
@pytest.mark.parametrize("dies_at_once", [False, True])
@pytest.mark.parametrize("name, look, expected", [("users.lock", compact, "alone"),
                                                  ("claims.lock", receive, repr(b"another"))])
def test_child_forked_while_a_thread_opens_a_file_keeps_no_lock(made: Path, name: str,
                                                                look: Callable[[Path],
                                                                               str], expected: str,
                                                                dies_at_once: bool) -> None:
    tracing.require()
    work = functools.partial(fork_and_die, made, name, look, dies_at_once)
    tracing.inject(lambda: work,
                   "openat",
                   f"delay_exit={OPENING_US}",
                   paths=[made.with_name("queue") / name])
    assert made.with_name("found").read_text(encoding="utf-8") == expected
    assert control.verify(made) == {"queue": ()}


# Waits


def hold(pipe: support.Connection, path: Path, made: Path | None = None) -> None:
    """Hold a lock until told to end; or for a while, in which a file grows."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    pipe.send("held")
    if made is None:
        pipe.recv()
    else:
        end = time.monotonic() + REBUILD_SECS
        with open(made, "wb", buffering=0) as file:
            while time.monotonic() < end:
                file.write(b"x")
                time.sleep(0.01)
        made.unlink()
    os.close(descriptor)
    pipe.send("given back")


def uses(config_pth: Path) -> list[Callable[[], object]]:
    return [
        lambda: support.send(config_pth, b"message"), lambda: support.receive_all(config_pth),
        lambda: control.initialize_all_dbs(config_pth), lambda: control.statistics(config_pth),
        lambda: control.compact(config_pth), lambda: control.verify(config_pth)
    ]


@pytest.mark.parametrize("is_growing", [False, True])
@pytest.mark.parametrize("name", ["open.lock", "users.lock"])
def test_wait_for_a_lock_ends(made: Path, name: str, is_growing: bool) -> None:
    """A file of an interrupted rebuild that does not change is no reason to wait."""
    directory = made.with_name("queue")
    if is_growing:
        (directory / "data.mdb.new").write_bytes(bytes(1000))
    with support.Child(hold, directory / name) as child:
        assert child.get() == "held"
        outcomes = support.outcomes_in_child(*uses(made))
        assert set(outcomes) == {"BusyTimeoutError"}, outcomes
        with pytest.raises(errors.BusyTimeoutError,
                           match="0.3 seconds.*busy_timeout_secs.*but got"):
            support.send(made, b"message")
        child.pipe.send("give it back")
        assert child.get() == "given back"
        child.end()
    assert set(support.outcomes_in_child(*uses(made))) == {""}


def test_lock_is_waited_for_on_close(made: Path) -> None:
    """The close of a process that has to wait for too long leaves the queue as a kill does."""
    with contextlib.ExitStack() as stack:
        pub = stack.enter_context(Pub("pub", made))
        child = stack.enter_context(support.Child(hold, made.with_name("queue") / "open.lock"))
        assert child.get() == "held"
        support.in_threads([pub.close])
        child.pipe.send("give it back")
        assert child.get() == "given back"
        child.end()
    assert set(support.outcomes_in_child(*uses(made))) == {""}


def test_wait_goes_on_as_long_as_a_rebuild_makes_progress(tmp_path: Path,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    config_pth = support.make_queue(tmp_path, busy_timeout_secs=BUSY_SECS)
    directory = tmp_path / "queue"
    with support.Child(hold, directory / "open.lock", directory / "data.mdb.new") as child:
        assert child.get() == "held"
        with caplog.at_level(logging.WARNING, logger="persipubsub.queue"):
            support.send(config_pth, b"message")
        assert child.get() == "given back"
        child.end()
    text, = [record.getMessage() for record in caplog.records]
    assert text.startswith(f"Waiting for a rebuild of the queue {directory}")
    assert support.receive_all(config_pth) == [b"message"]
