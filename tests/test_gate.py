"""Test the gate of the writers between real processes."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import errno
import fcntl
import functools
import mmap
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

import persipubsub.control
import persipubsub.errors
import persipubsub.queue
from persipubsub.environment import _files, _gate
from tests import support
from tests.faults import tracing


def leave(gate: _gate.Gate) -> None:
    fcntl.flock(gate.descriptor, fcntl.LOCK_UN)


def enters(gate: _gate.Gate, seconds: float = 0.0) -> bool:
    return gate.enter(deadline=time.monotonic() + seconds)


def hold(pipe: support.Connection, path: str) -> None:
    """Enter the gate, tell it, and leave when told."""
    gate = _gate.Gate(path)
    assert enters(gate, support.HANG_SECS)
    pipe.send("in")
    pipe.recv()
    leave(gate)
    pipe.send("out")
    pipe.recv()


@pytest.fixture(name="gate_path")
def fixture_gate_path(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "write.lock")


def test_one_process_at_a_time(gate_path: str) -> None:
    gate = _gate.Gate(gate_path)
    with support.Child(hold, gate_path) as child:
        assert child.get() == "in"
        assert not enters(gate)
        start = time.monotonic()
        assert not enters(gate, 0.2)
        assert 0.2 <= time.monotonic() - start < support.HANG_SECS
        child.pipe.send("leave")
        assert enters(gate, support.HANG_SECS)
        assert child.get() == "out"

        other = _gate.Gate(gate_path)
        assert not enters(other), "Expected another descriptor to stay out in the same process."
        leave(gate)
        assert enters(other)
        other.close()
    gate.close()


def test_close_that_fails_leaves_nothing_open(gate_path: str) -> None:
    gate = _gate.Gate(gate_path)
    os.close(gate.descriptor)
    gate.close()
    assert gate.descriptor == -1


def test_a_stopped_process_keeps_it_and_a_killed_one_gives_it_back(gate_path: str) -> None:
    gate = _gate.Gate(gate_path)
    with support.Child(hold, gate_path) as child:
        assert child.get() == "in"
        child.kill(signal.SIGSTOP)
        assert not enters(gate, 0.05)
        child.kill(signal.SIGKILL)
        assert enters(gate, support.HANG_SECS)
        child.end(-signal.SIGKILL)
    gate.close()


def test_close_gives_it_back(gate_path: str) -> None:
    gate, other = _gate.Gate(gate_path), _gate.Gate(gate_path)
    assert enters(gate)
    assert not enters(other)
    gate.close()
    gate.close()
    assert enters(other)
    other.close()


def test_nothing_stays_open(gate_path: str) -> None:
    before = support.count_descriptors()
    for _ in range(20):
        _gate.Gate(gate_path).close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_file_is_private_and_has_a_page(gate_path: str) -> None:
    gate = _gate.Gate(gate_path)
    status = os.stat(gate_path)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == mmap.PAGESIZE
    # A page of a sparse file kills its writer with SIGBUS when the disk is full.
    assert status.st_blocks * 512 >= mmap.PAGESIZE
    gate.close()


def test_holder_makes_way_only_for_who_waits(gate_path: str) -> None:
    gate, other = _gate.Gate(gate_path), _gate.Gate(gate_path)
    assert gate._page is not None
    gate.make_way()
    assert gate._page[0] == 0
    assert enters(gate)
    assert not enters(other, 0.001)
    assert gate._page[0] == 1
    leave(gate)
    gate.make_way()
    assert gate._page[0] == 0
    other.close()
    gate.close()
    gate.make_way()


def hammer(pipe: support.Connection, path: str) -> None:
    """Enter and leave as fast as possible."""
    gate = _gate.Gate(path)
    pipe.send("ready")
    count = 0
    while count == 0 or not pipe.poll():
        assert enters(gate, support.HANG_SECS)
        count += 1
        leave(gate)
        gate.make_way()
    pipe.send(count)


def test_who_waits_gets_its_turn(gate_path: str) -> None:
    gate = _gate.Gate(gate_path)
    with support.Child(hammer, gate_path) as first, support.Child(hammer, gate_path) as second:
        first.get()
        second.get()
        for _ in range(200):
            assert enters(gate, support.HANG_SECS)
            leave(gate)
            gate.make_way()
        first.pipe.send("stop")
        second.pipe.send("stop")
        assert first.get() > 0
        assert second.get() > 0
    gate.close()


def test_full_disk_kills_nobody(tmp_path: pathlib.Path) -> None:
    code = """if True:
        import errno, fcntl, os, subprocess, sys, time
        from persipubsub import errors
        from persipubsub.environment import _files, _gate
        directory = sys.argv[1]
        for name in ("there.lock", "new.lock"):
            subprocess.check_call(["mount", "-t", "tmpfs", "-o", "size=64k", "none", directory])
            if name == "there.lock":
                _gate.Gate(directory + "/there.lock").close()
            with open(directory + "/full", "wb", buffering=0) as fid:
                try:
                    while True:
                        fid.write(bytes(4096))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
            try:
                gate = _gate.Gate(directory + "/" + name)
            except errors.DiskFullError:
                print("full")
            else:
                other = _gate.Gate(directory + "/" + name)
                assert gate.enter(deadline=0)
                assert not other.enter(deadline=time.monotonic() + 0.01)
                print("waited")
                gate.close()
                other.close()
            subprocess.check_call(["umount", directory])
        """
    namespace = ["unshare", "--map-root-user", "--mount"]
    try:
        tried = subprocess.run(namespace + ["true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is needed for a small disk")
    if tried.returncode != 0 or sys.platform != "linux":
        pytest.skip("user namespaces are needed for a small disk")
    done = support.run_python(code, tmp_path, prefix=namespace)
    assert (done.returncode, done.stdout.split()) == (0, ["waited", "full"]), done.stderr


def test_no_rights(tmp_path: pathlib.Path) -> None:
    with pytest.raises(persipubsub.errors.StoreError, match="write.lock"):
        (tmp_path / "write.lock").mkdir()
        _gate.Gate(str(tmp_path / "write.lock"))


def test_error_names_the_queue_and_the_key() -> None:
    error = _gate.busy_error("/some/queue", 1.5)
    assert isinstance(error, persipubsub.errors.BusyTimeoutError)
    assert "/some/queue within 1.5 seconds (busy_timeout_secs), but got:" in str(error)


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP"])
def test_file_system_without_locks(tmp_path: pathlib.Path, error: str) -> None:
    tracing.require()
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    output = tmp_path / "output"

    def start() -> Callable[[], None]:

        def work() -> None:
            with pytest.raises(persipubsub.errors.StoreError) as caught:
                persipubsub.queue.Queue(support.settings(config_pth))
            output.write_text(str(caught.value))

        return work

    code = tracing.run(start,
                       ["-o", os.devnull, "-e", "trace=flock", "-e", f"inject=flock:error={error}"])
    assert code == 0
    assert output.read_text() == (
        f"Expected to lock {tmp_path / 'queue' / _files.OPEN_GATE}, but got: "
        f"{os.strerror(getattr(errno, error))}")


@pytest.mark.parametrize("refused", ["1..2", "1..3"])
def test_lock_that_is_refused_for_a_moment(tmp_path: pathlib.Path, refused: str) -> None:
    tracing.require()
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    output = tmp_path / "output"

    def start() -> Callable[[], None]:
        queue = persipubsub.queue.Queue(support.settings(config_pth))

        def work() -> None:
            outcomes = [support.outcome(lambda: queue.put([b"1"])) for _ in range(2)]
            output.write_text(" ".join([*outcomes, str(queue.statistics().messages)]))
            queue.close()

        return work

    # The attempt, and the one behind it that waits; and giving back what was not taken.
    code = tracing.run(
        start,
        ["-o", os.devnull, "-e", "trace=flock", "-e", f"inject=flock:error=ENOLCK:when={refused}"])
    assert code == 0
    assert output.read_text() == "StoreError  1"


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_each_lock_is_refused_once(tmp_path: pathlib.Path, durability: str,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    flock, which, count = fcntl.flock, 0, 0

    def refuse(descriptor: int, operation: int) -> None:
        nonlocal count
        if operation != fcntl.LOCK_UN:
            count += 1
            if count == which:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(descriptor, operation)

    config_pth = support.write_config(tmp_path, durability=durability)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    config = support.settings(config_pth)

    def outcomes() -> Iterator[str]:
        queues: list[persipubsub.queue.Queue] = []
        yield support.outcome(lambda: queues.append(persipubsub.queue.Queue(config)))
        for queue in queues:
            yield support.outcome(functools.partial(queue.put, [b"1"]))
            yield support.outcome(queue.close)

    monkeypatch.setattr(fcntl, "flock", refuse)
    while count >= which:
        which, count = which + 1, 0
        assert set(outcomes()) <= {"", "StoreError"}
    assert which > 4
