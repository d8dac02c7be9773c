"""Test the claims of competing consumers, with real processes."""

import ast
import contextlib
import os
import pathlib
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import persipubsub._claims
import persipubsub.errors
from persipubsub._claims import Claims
from tests.faults import tracing

# Catches hangs only.
_HANG_SECS = 120

# A process which does what the test tells it to, line by line. It knows the claims by first number.
_PUPPET = """
import gc, os, random, resource, signal, subprocess, sys, threading, time
import persipubsub._claims
import persipubsub.errors

path = sys.argv[1]
is_ofd = sys.argv[2] == "True"
claims = persipubsub._claims.Claims(path, _ofd=is_ofd)
held = {}

def take(first, count=1):
    claim = claims.claim(0, first, count)
    if claim is not None:
        held[first] = claim
    return claim is not None

def give(first):
    held.pop(first).release()

def in_child(function):
    # Fork, call the function in the child, and return its exit code.
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(function() or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def fork_heir():
    # Fork a child which goes on in our place as soon as we are dead.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        return "heir"
    os.close(reader)
    return child

def descriptors():
    names = []
    for name in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink("/proc/self/fd/" + name))
        except FileNotFoundError:
            pass
    return names.count(path)

def run(source):
    exec(source, globals())

for line in iter(sys.stdin.readline, ""):
    try:
        reply = repr(eval(line))
    except persipubsub.errors.PersipubsubError as error:
        reply = repr((type(error).__name__, str(error)))
    print(reply, flush=True)
"""


class Puppet:
    """Drive another process."""

    def __init__(self, path: str, is_ofd: bool) -> None:
        # pylint: disable=consider-using-with
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PUPPET, path, str(is_ofd)],
            cwd=pathlib.Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True)

    def ask(self, expression: str) -> Any:
        """Let the process evaluate the expression and return its value."""
        self.tell(expression)
        return self.hear()

    def tell(self, expression: str) -> None:
        """Do not wait for the value."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{expression}\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """Wait for the value."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "The process ended."
        return ast.literal_eval(line)

    def run(self, source: str) -> None:
        """Let the process execute statements."""
        assert self.ask(f"run({source!r})") is None

    def kill(self) -> None:
        """Kill the process, which may have forked an heir, and wait for its end."""
        self.process.kill()
        self.process.wait(timeout=_HANG_SECS)

    def end(self) -> None:
        """End the process and its heirs, which live on the same pipe."""
        for stream in [self.process.stdin, self.process.stdout]:
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self.kill()


Spawn = Callable[[], Puppet]


@pytest.fixture(name="is_ofd", params=[True, False], ids=["ofd", "posix"])
def fixture_is_ofd(request: pytest.FixtureRequest) -> bool:
    """Test both kinds of locks."""
    is_ofd: bool = request.param
    if is_ofd and not Claims("any")._ofd:
        pytest.skip("This system has no locks of open file descriptions.")
    return is_ofd


@pytest.fixture(name="path")
def fixture_path(tmp_path: pathlib.Path) -> str:
    """Name a claims file."""
    return str(tmp_path / "claims.lock")


@pytest.fixture(name="claims")
def fixture_claims(path: str, is_ofd: bool) -> Iterator[Claims]:
    """Use claims in this process."""
    claims = Claims(path, _ofd=is_ofd)
    yield claims
    claims.close()


@pytest.fixture(name="spawn")
def fixture_spawn(path: str, is_ofd: bool) -> Iterator[Spawn]:
    """Start processes which end with the test, however it ends."""
    with contextlib.ExitStack() as stack:

        def start() -> Puppet:
            puppet = Puppet(path, is_ofd)
            stack.callback(puppet.end)
            return puppet

        yield start


def _claimed(claims: Claims, numbers: range) -> list[int]:
    """List what is claimed according to both ways to ask."""
    asked = [number for number in numbers if claims.is_claimed(0, number)]
    tried = []
    for number in numbers:
        claim = claims.claim(0, number)
        if claim is None:
            tried.append(number)
        else:
            claim.release()
    assert asked == tried
    return asked


def test_claim_excludes_other_claims(claims: Claims, spawn: Spawn) -> None:
    other = spawn()
    claim = claims.claim(subscriber=0, first=5)
    assert claim is not None and (claim.first, claim.count) == (5, 1)

    assert claims.claim(subscriber=0, first=5) is None
    assert not other.ask("take(5)")
    assert other.ask("claims.is_claimed(0, 5)")
    assert claims.is_claimed(subscriber=0, first=5)
    assert other.ask("[take(4), take(6)]") == [True, True]

    claim.release()
    assert not claims.is_claimed(subscriber=0, first=5)
    assert other.ask("take(5)")
    # A second release must not give back what others have claimed since.
    claim.release()
    assert _claimed(claims, range(0, 10)) == [4, 5, 6]

    other.ask("give(5)")
    assert _claimed(claims, range(0, 10)) == [4, 6]


def test_subscribers_do_not_disturb_each_other(claims: Claims) -> None:
    taken = [claims.claim(index, first=1, count=10) for index in [0, 1, 2, 2**15 - 1]]
    assert None not in taken
    assert claims.claim(1, first=1) is None
    assert claims.claim(3, first=1) is not None


def test_ranges_are_claimed_as_a_whole(claims: Claims, spawn: Spawn) -> None:
    other = spawn()
    assert other.ask("take(10, 5)")
    for first, count in [(10, 5), (8, 3), (14, 10), (5, 50), (12, 1)]:
        assert claims.claim(0, first, count) is None
        assert claims.is_claimed(0, first, count)
    below, above = claims.claim(0, 5, 5), claims.claim(0, 15, 5)
    assert below is not None and above is not None
    # The attempts that failed left nothing behind.
    assert _claimed(claims, range(0, 30)) == list(range(5, 20))


def test_ends_of_the_range_of_numbers(claims: Claims) -> None:
    last = claims.claim(2**15 - 1, first=2**48 - 1)
    before = claims.claim(2**15 - 2, first=0, count=2**48)
    assert last is not None and before is not None
    assert claims.claim(2**15 - 1, first=2**48 - 1) is None
    assert claims.claim(2**15 - 1, first=0, count=2**48) is None
    before.release()
    assert claims.is_claimed(2**15 - 1, first=2**48 - 1)


@pytest.mark.parametrize("arguments", [(-1, 0, 1), (2**15, 0, 1), (0, -1, 1), (0, 2**48, 1),
                                       (0, 0, 0), (0, 5, -1), (0, 2**48 - 1, 2)])
def test_numbers_out_of_range(claims: Claims, arguments: tuple[int, int, int]) -> None:
    methods: list[Callable[[int, int, int], object]]
    methods = [claims.claim, claims.claim_prefix, claims.is_claimed]
    for method in methods:
        with pytest.raises(persipubsub.errors.StoreError, match="Expected a subscriber below"):
            method(*arguments)


def test_prefix(claims: Claims, spawn: Spawn) -> None:
    other = spawn()
    # Descending, since the kernel names conflicts in the order in which they came
    assert other.ask("[take(number) for number in range(59, 39, -1)]") == [True] * 20
    assert other.ask("[take(number) for number in (18, 15, 12)]") == [True] * 3
    own = claims.claim(0, 17)
    assert own is not None

    for first, count, expected in [(0, 5, 5), (10, 10, 2), (13, 1, 1), (13, 9, 2), (16, 9, 1),
                                   (19, 9, 9), (30, 90, 10)]:
        claim = claims.claim_prefix(0, first, count)
        assert claim is not None and (claim.first, claim.count) == (first, expected)
        assert _claimed(claims, range(first,
                                      first + expected)) == list(range(first, first + expected))
        claim.release()

    for first in [12, 15, 17, 18]:
        assert claims.claim_prefix(0, first, 5) is None
    assert _claimed(claims, range(0, 30)) == [12, 15, 17, 18]


@pytest.mark.parametrize("first, count", [(10, 10), (10, 3), (17, 3), (13, 3), (10, 1), (19, 1)])
def test_narrow(claims: Claims, spawn: Spawn, first: int, count: int) -> None:
    other = spawn()
    claim = claims.claim(0, 10, 10)
    assert claim is not None
    claim.narrow(first, count)
    assert (claim.first, claim.count) == (first, count)
    assert _claimed(claims, range(0, 30)) == list(range(first, first + count))
    for number in range(10, 20):
        assert other.ask(f"take({number})") == (not first <= number < first + count)
    claim.release()
    assert other.ask(f"take({first}, {count})")


def test_narrow_to_something_else(claims: Claims) -> None:
    claim = claims.claim(0, 10, 10)
    assert claim is not None
    for first, count in [(9, 2), (15, 6), (10, 0), (12, -1), (20, 1), (0, 5)]:
        with pytest.raises(persipubsub.errors.StoreError, match="Expected a part of"):
            claim.narrow(first, count)
    claim.narrow(12, 4)
    claim.narrow(13, 1)
    assert _claimed(claims, range(0, 30)) == [13]

    claim.release()
    other = claims.claim(0, 13)
    claim.narrow(13, 1)
    assert other is not None
    assert _claimed(claims, range(0, 30)) == [13]


def test_dropped_claim_is_given_back(claims: Claims, spawn: Spawn) -> None:
    other = spawn()
    claim = claims.claim(0, 5)
    assert not other.ask("take(5)")
    del claim
    assert other.ask("take(5)")


def test_killed_holder(claims: Claims, spawn: Spawn) -> None:
    for number in range(10):
        other = spawn()
        assert other.ask(f"take({number}, 7)")
        assert claims.claim(0, number) is None
        other.kill()
        claim = claims.claim(0, number, 7)
        assert claim is not None
        claim.release()


def test_stopped_holder(claims: Claims, spawn: Spawn) -> None:
    other = spawn()
    assert other.ask("take(5)")
    other.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, other.process.pid, os.WSTOPPED | os.WNOWAIT)
    assert claims.claim(0, 5) is None
    other.process.send_signal(signal.SIGCONT)
    assert other.ask("give(5)") is None
    assert claims.claim(0, 5) is not None


def test_close(claims: Claims, spawn: Spawn) -> None:
    other = spawn()
    assert other.ask("[take(5), take(6, 3)]") == [True, True]
    other.run("claims.close(); claims.close()")
    assert _claimed(claims, range(0, 20)) == []
    assert other.ask("take(5)")[0] == "ClosedError"
    assert other.ask("claims.is_claimed(0, 5)")[0] == "ClosedError"

    # The claims are dead: they must not take the claims of others along.
    claim = claims.claim(0, 5)
    assert claim is not None
    assert other.ask("[held[5].release(), held[6].narrow(7, 1)]") == [None, None]
    assert claims.is_claimed(0, 5)
    assert other.ask("descriptors()") == (0 if other.ask("is_ofd") else 1)


def test_close_without_use(claims: Claims, path: str) -> None:
    claims.close()
    assert not os.path.exists(path)


def test_two_objects_of_a_process(claims: Claims, path: str, is_ofd: bool) -> None:
    other = Claims(path, _ofd=is_ofd)
    own = claims.claim(0, 5)
    assert own is not None
    assert other.claim(0, 5) is None
    claim = other.claim(0, 6)
    assert claim is not None
    assert claims.claim(0, 6) is None
    other.close()
    assert _claimed(claims, range(0, 10)) == [5]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Expected /proc")
def test_idle_descriptors_are_bounded(spawn: Spawn) -> None:
    puppet = spawn()
    puppet.run("taken = [claims.claim(0, number) for number in range(200)]")
    is_ofd = puppet.ask("is_ofd")
    assert puppet.ask("descriptors()") == (200 if is_ofd else 1)
    puppet.run("for claim in taken: claim.release()")
    assert puppet.ask("descriptors()") == (persipubsub._claims._MAX_IDLE if is_ofd else 1)
    puppet.run("for number in range(1000): take(number); give(number)")
    assert puppet.ask("descriptors()") == (persipubsub._claims._MAX_IDLE if is_ofd else 1)


def test_many_claims(claims: Claims, spawn: Spawn) -> None:
    puppet = spawn()
    puppet.run("resource.setrlimit(resource.RLIMIT_NOFILE, "
               "(256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))")
    reply = puppet.ask("all(take(number) for number in range(1000))")
    if puppet.ask("is_ofd"):
        name, message = reply
        assert name == "StoreError"
        assert claims.path in message and "Too many open files" in message
        assert puppet.ask("claims.is_claimed(0, 0)")[0] == "StoreError"
        # Those from before stand, and can be given back.
        assert claims.is_claimed(0, 0) and claims.is_claimed(0, 200)
        assert not claims.is_claimed(0, 256, 1000)
        puppet.run("for number in list(held): give(number)")
        assert not claims.is_claimed(0, 0, 1000)

        if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 1100:
            pytest.skip("The hard limit on descriptors is too low.")
        puppet.run("resource.setrlimit(resource.RLIMIT_NOFILE, (1100, 1100))")
        reply = puppet.ask("all(take(number) for number in range(1000))")

    assert reply is True
    assert all(claims.is_claimed(0, number) for number in range(1000))
    puppet.run("for number in list(held): give(number)")
    assert not claims.is_claimed(0, 0, 1000)


def test_file_is_made_for_the_user_alone(claims: Claims, path: str) -> None:
    mask = os.umask(0)
    try:
        assert not claims.is_claimed(0, 5)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.path.getsize(path) == 0


def test_relative_path(tmp_path: pathlib.Path, is_ofd: bool,
                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    claims = Claims("claims.lock", _ofd=is_ofd)
    assert claims.claim(0, 5) is not None
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    taken = [claims.claim(0, number) for number in range(10)]
    assert None not in taken
    assert os.listdir(tmp_path / "elsewhere") == []
    claims.close()


def test_symbolic_link_is_refused(claims: Claims, path: str) -> None:
    foreign = f"{path}.foreign"
    for target in ["exists", "dangles"]:
        if target == "exists":
            pathlib.Path(foreign).touch()
        os.symlink(foreign, path)
        with pytest.raises(persipubsub.errors.AccessError, match="symbolic link"):
            claims.claim(0, 5)
        os.unlink(path)
        pathlib.Path(foreign).unlink(missing_ok=True)
    assert claims.claim(0, 5) is not None


def test_something_else_in_the_place_of_the_file(path: str, is_ofd: bool) -> None:
    os.mkfifo(path)
    with pytest.raises(persipubsub.errors.StoreError, match="Expected .* to be a regular file"):
        Claims(path, _ofd=is_ofd).claim(0, 5)
    os.unlink(path)
    os.mkdir(path)
    with pytest.raises(persipubsub.errors.StoreError, match="Is a directory"):
        Claims(path, _ofd=is_ofd).claim(0, 5)
    with pytest.raises(persipubsub.errors.NotInitializedError):
        Claims(os.path.join(path, "missing", "claims"), _ofd=is_ofd).claim(0, 5)


def test_replaced_file(claims: Claims, path: str) -> None:
    own = claims.claim(0, 5)
    assert own is not None
    os.rename(path, f"{path}.old")
    with pytest.raises(persipubsub.errors.StoreError, match="stays in place"):
        claims.claim(0, 6)
    os.rename(f"{path}.old", path)
    assert _claimed(claims, range(0, 10)) == [5]


def test_missing_rights(is_ofd: bool) -> None:
    # Not tmp_path: other users may not enter it.
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o555)
        puppet = Puppet(os.path.join(directory, "claims.lock"), is_ofd)
        try:
            if os.getuid() == 0:
                puppet.run("os.setgroups([]); os.setgid(65534); os.setuid(65534)")
            assert puppet.ask("take(5)")[0] == "AccessError"

            os.chmod(directory, 0o755)
            pathlib.Path(directory, "claims.lock").touch(mode=0o444)
            assert puppet.ask("take(5)")[0] == "AccessError"
        finally:
            puppet.end()


def test_child_exits(claims: Claims, spawn: Spawn) -> None:
    puppet = spawn()
    assert puppet.ask("[take(5), take(6), give(6)]") == [True, True, None]
    for function in [
            "lambda: 0", "lambda: give(5)", "lambda: claims.close()",
            "lambda: (held.clear(), gc.collect()) and 0", "lambda: held[5].narrow(5, 1)"
    ]:
        assert puppet.ask(f"in_child({function})") == 0
        assert _claimed(claims, range(0, 10)) == [5], function

    # The parent goes on as if nothing had happened.
    assert puppet.ask("[take(5), take(6)]") == [False, True]
    puppet.ask("give(5)")
    assert _claimed(claims, range(0, 10)) == [6]


def test_child_of_killed_parent_keeps_nothing(claims: Claims, spawn: Spawn) -> None:
    puppet = spawn()
    # Claims in progress, and a descriptor that is idle while the parent forks but not later
    assert puppet.ask("[take(5), take(6, 3), take(20), give(20)]") == [True, True, True, None]
    assert puppet.ask("fork_heir()") > 0
    assert puppet.ask("[take(20), take(21), take(22)]") == [True] * 3
    assert _claimed(claims, range(0, 30)) == [5, 6, 7, 8, 20, 21, 22]
    puppet.kill()
    assert puppet.hear() == "heir"
    assert _claimed(claims, range(0, 30)) == []

    # What the heir inherited is dead, yet it can claim, and is killed in its turn.
    assert claims.claim_prefix(0, 5, 10) is not None
    own = claims.claim(0, 5)
    assert own is not None
    assert puppet.ask("[take(5), held[5].release(), take(5)]") == [False, None, False]
    assert claims.is_claimed(0, 5)
    own.release()
    assert puppet.ask("[take(5), take(6), take(7), give(5)]") == [True, True, True, None]
    assert _claimed(claims, range(0, 30)) == [6, 7]


def test_parent_and_child_compete(claims: Claims, spawn: Spawn) -> None:
    puppet = spawn()
    assert puppet.ask("[take(5), take(6), give(6)]") == [True, True, None]
    assert puppet.ask("in_child(lambda: claims.is_claimed(0, 5) and not take(5) and take(6))") == 1
    # The child took 6 and is gone, and with it the claim.
    assert _claimed(claims, range(0, 10)) == [5]


def test_grandchildren(claims: Claims, spawn: Spawn) -> None:
    puppet = spawn()
    assert puppet.ask("[take(5), take(6), give(6)]") == [True, True, None]
    assert puppet.ask("in_child(lambda: take(7) and "
                      "in_child(lambda: give(5) or give(7) or claims.is_claimed(0, 7)) and "
                      "claims.is_claimed(0, 5) and claims.is_claimed(0, 7) and not take(5))") == 1
    assert _claimed(claims, range(0, 10)) == [5]


def test_finalizer_in_child_before_the_hook(claims: Claims, spawn: Spawn) -> None:
    puppet = spawn()
    # What other threads left behind is finalized in the child before any hook of ours runs there.
    puppet.run("""
class Lease:
    def __init__(self, number):
        self.claim = claims.claim(0, number)
    def __del__(self):
        self.claim.release()

local, ready, done = threading.local(), threading.Event(), threading.Event()

def hold():
    local.lease = Lease(5)
    local.claim = claims.claim(0, 6)
    ready.set()
    done.wait()

thread = threading.Thread(target=hold)
thread.start()
ready.wait()
""")
    assert puppet.ask("in_child(lambda: 0)") == 0
    assert _claimed(claims, range(0, 10)) == [5, 6]
    puppet.run("done.set(); thread.join()")
    assert _claimed(claims, range(0, 10)) == []


def test_forks_while_threads_claim(claims: Claims, spawn: Spawn) -> None:
    puppet = spawn()
    puppet.run("""
def churn(first):
    while not done.is_set():
        # Several at once and dropped ones, so that descriptors are opened and closed all the time
        taken = [claims.claim(0, number) for number in range(first, first + 80)]
        assert None not in taken
        for claim in taken[::2]:
            claim.release()

def live():
    # Until the writing end is closed
    number = 5000 + len(children)
    assert claims.claim(0, number) is not None
    os.close(writer)
    os.read(reader, 1)

done, children = threading.Event(), []
reader, writer = os.pipe()
threads = [threading.Thread(target=churn, args=(100 * index,)) for index in range(3)]
for thread in threads:
    thread.start()
for _ in range(40):
    child = os.fork()
    if child == 0:
        try:
            live()
        finally:
            os._exit(0)
    children.append(child)
done.set()
for thread in threads:
    thread.join()
del thread, threads
last = [claims.claim(0, number) for number in range(100)]
""")
    # The children live. They keep nothing of what was claimed while they were forked.
    assert puppet.ask("len(children)") == 40
    assert not claims.is_claimed(0, 100, 4900)
    assert puppet.ask("all(last)")
    assert puppet.ask("descriptors()") <= (100 + persipubsub._claims._MAX_IDLE)
    assert all(claims.is_claimed(0, number) for number in range(100))
    puppet.run("del last; gc.collect()")
    assert not claims.is_claimed(0, 0, 5000)
    puppet.run("os.close(writer)\nfor child in children: os.waitpid(child, 0)")


def test_started_program_keeps_nothing(claims: Claims, spawn: Spawn) -> None:
    puppet = spawn()
    assert puppet.ask("[take(5), take(6), give(6)]") == [True, True, None]
    puppet.run("""
reader, writer = os.pipe()
os.set_inheritable(reader, True)
program = "import os, sys; os.read(int(sys.argv[1]), 1); print(1, flush=True); sys.stdin.read()"
started = subprocess.Popen([sys.executable, "-c", program, str(reader)], close_fds=False)
os.close(reader)
""")
    assert puppet.ask("[take(6), take(7)]") == [True, True]
    puppet.kill()
    # The program lives: it notices by this end of the pipe that the puppet is dead.
    assert puppet.hear() == 1
    assert _claimed(claims, range(0, 10)) == []


def test_threads_exclude_each_other(claims: Claims) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    owners: dict[int, int] = {}
    problems: list[str] = []
    refused: list[int] = []

    def compete(name: int) -> None:
        generator = random.Random(seed + name)
        for _ in range(1500):
            first, count = generator.randrange(20), generator.randrange(1, 4)
            claim = claims.claim(0, first, count)
            if claim is None:
                refused.append(name)
                continue
            for number in range(first, first + count):
                if owners.setdefault(number, name) != name:
                    problems.append(f"{owners[number]} and {name} had {number}")
            time.sleep(0)
            for number in range(first, first + count):
                owners.pop(number, None)
            claim.release()

    threads = [threading.Thread(target=compete, args=(name, )) for name in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=_HANG_SECS)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)
    assert not problems
    assert refused
    assert _claimed(claims, range(0, 30)) == []


def test_released_by_two_threads_at_once(claims: Claims) -> None:
    for number in range(300):
        claim = claims.claim(0, number)
        assert claim is not None
        barrier = threading.Barrier(2)

        def release(barrier: threading.Barrier = barrier,
                    claim: persipubsub._claims.Claim = claim) -> None:
            barrier.wait()
            claim.release()

        threads = [threading.Thread(target=release) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # If its descriptor were in the pool twice, both of these would succeed.
        first, second = claims.claim(0, number), claims.claim(0, number)
        assert first is not None and second is None
        first.release()


def test_storm_of_interrupts(claims: Claims, spawn: Spawn) -> None:
    puppet = spawn()
    puppet.run("""
class Interrupt(BaseException):
    pass

def interrupt(signal_number, frame):
    global interrupts, is_armed, openings
    interrupts += 1
    is_armed = False
    while frame is not None:
        if frame.f_code.co_name == "_open":
            openings += 1
        frame = frame.f_back
    raise Interrupt()

def claim_until_interrupted():
    global is_armed
    is_armed = True
    signal.setitimer(signal.ITIMER_REAL, generator.uniform(0.00001, 0.0002))
    # An interrupt that comes up in a finalizer is swallowed by the interpreter.
    while is_armed:
        claim = claims.claim(0, generator.randrange(50), generator.randrange(1, 9))
        if claim is not None:
            claim.narrow(claim.first, 1)
            claim.release()

signal.signal(signal.SIGALRM, interrupt)
interrupts = openings = 0
generator = random.Random(1)
while interrupts < 1000:
    try:
        claim_until_interrupted()
    except Interrupt:
        pass
""")
    assert puppet.ask("interrupts") == 1000
    # Whatever was interrupted even while it was being given back is given back at a conflict.
    assert puppet.ask("[take(100), take(100)]") == [True, False]
    assert _claimed(claims, range(0, 60)) == []
    # A number that the system call has just returned is with nobody yet: that one is lost.
    assert puppet.ask("descriptors() - openings") <= 3
    assert puppet.ask("[take(5), take(5)]") == [True, False]


def test_file_that_can_not_be_looked_at(path: str, is_ofd: bool) -> None:
    tracing.require()

    def work() -> None:
        with pytest.raises(persipubsub.errors.StoreError, match=re.escape(path)):
            Claims(path, _ofd=is_ofd).claim(0, 1)

    assert tracing.run(lambda: work,
                       ["-o", os.devnull, "-P", path, "-e", "inject=fstat:error=EIO"]) == 0


def test_interrupt_in_the_finalizer(claims: Claims, spawn: Spawn) -> None:
    puppet = spawn()
    # The interpreter swallows what is raised there: such a claim must not be held for good.
    puppet.run("""
class_of_holder = type(claims.take_idle())
discard = class_of_holder.discard

def interrupt(holder):
    raise KeyboardInterrupt()

take(5)
class_of_holder.discard = interrupt
held.clear()
class_of_holder.discard = discard
""")
    assert claims.is_claimed(0, 5)
    assert sorted(puppet.ask("[take(5), take(5), take(5)]")) == [False, False, True]
    puppet.ask("give(5)")
    assert not claims.is_claimed(0, 5)
    assert puppet.ask("descriptors()") <= 3


@pytest.mark.parametrize("action", [
    "kept.append(claims.claim(0, len(kept)))",
    "kept.append(claims.claim(0, 9 * len(kept), 9)); kept[-1].narrow(9 * len(kept) - 6, 2)",
    "claims.claim(0, 0, 9).release()",
    "claims.is_claimed(0, 0)",
])
def test_signal_handler_that_closes(claims: Claims, spawn: Spawn, action: str) -> None:
    puppet = spawn()
    puppet.run(f"""
def close(signal_number, frame):
    claims.close()

def close_in_the_middle():
    global claims
    claims = persipubsub._claims.Claims(path, _ofd=is_ofd)
    kept = []
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.001))
    try:
        while True:
            {action}
    except persipubsub.errors.ClosedError:
        return kept

signal.signal(signal.SIGALRM, close)
dead = []
""")
    for _ in range(30):
        # What was claimed is kept, but no longer claimed.
        puppet.run("dead.append(close_in_the_middle())")
        assert not claims.is_claimed(0, 0, 10000)
    assert puppet.ask("descriptors()") == (0 if puppet.ask("is_ofd") else 1)


_CONSUMER = """
def consume(name, seed, rounds):
    generator = random.Random(seed)
    taken = refused = 0
    for _ in range(rounds):
        first, count = generator.randrange(50), generator.choice((1, 1, 1, 5))
        claim = (claims.claim if generator.random() < 0.5 else claims.claim_prefix)(0, first, count)
        if claim is None:
            refused += 1
            continue
        taken += 1
        # One write each, hence in the order in which it happened
        os.write(ledger, "take {} {} {}\\n".format(name, claim.first, claim.count).encode())
        if claim.count > 1 and generator.random() < 0.5:
            os.write(ledger, "give {} {} {}\\n".format(
                name, claim.first + 1, claim.count - 1).encode())
            claim.narrow(claim.first, 1)
        if generator.random() < 0.2:
            time.sleep(0)
        os.write(ledger, "give {} {} {}\\n".format(name, claim.first, claim.count).encode())
        claim.release()
    results.append((taken, refused))

results = []
ledger = os.open(path + ".ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def work(seed, rounds):
    threads = [threading.Thread(target=consume, args=("{}-{}".format(os.getpid(), index),
                                                      seed + index, rounds))
               for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
"""


def test_storm(claims: Claims, path: str, spawn: Spawn) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    puppets = [spawn() for _ in range(4)]
    for index, puppet in enumerate(puppets):
        puppet.run(_CONSUMER)
        puppet.tell(f"work({seed + 10 * index}, {4000})")

    # One is killed in the middle.
    while os.path.getsize(f"{path}.ledger") < 20000:
        assert puppets[0].process.poll() is None
    puppets[0].kill()
    for puppet in puppets[1:]:
        results = puppet.hear()
        assert len(results) == 2
        assert all(taken > 0 and refused > 0 for taken, refused in results), results

    owners: dict[int, str] = {}
    for line in pathlib.Path(f"{path}.ledger").read_text(encoding="ascii").splitlines():
        action, name, first, count = line.split()
        for number in range(int(first), int(first) + int(count)):
            owner = owners.pop(number, None)
            if action == "take":
                killed = f"{puppets[0].process.pid}-"
                assert owner is None or owner.startswith(killed), (line, owner)
                owners[number] = name
            else:
                assert owner == name, (line, owner)
    assert all(owner.startswith(str(puppets[0].process.pid)) for owner in owners.values())
    assert _claimed(claims, range(0, 60)) == []
