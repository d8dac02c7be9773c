"""Test the claims of competing consumers, with real processes."""

# pylint: disable=missing-function-docstring

import ast
import contextlib
import os
import pathlib
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import persipubsub.errors
from persipubsub.lmdb_engine import files, locks
from tests.support import HANG_SECS, count_descriptors, until

#: A process which does what the test tells it to, line by line. It knows the claims by first number.
_PUPPET = """
import os, sys
from persipubsub.lmdb_engine import locks

claims = locks.Claims(sys.argv[1], locks.HeldOf())
held = {}

def take(first, count=1):
    claim = locks.Claim(0, first, count, claims.held[0])
    if claims.claim(claim):
        held[first] = claim
        return True
    return False

def give(first):
    claims.release(held.pop(first))

for line in iter(sys.stdin.readline, ""):
    print(repr(eval(line)), flush=True)
"""


class Puppet:
    """Drive another process."""

    def __init__(self, directory: pathlib.Path) -> None:
        # pylint: disable=consider-using-with
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PUPPET, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True)

    def ask(self, expression: str) -> Any:
        """Let the process evaluate an expression and return its value."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{expression}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "The process ended."
        return ast.literal_eval(line)

    def end(self) -> None:
        """Kill the process, and wait for its end."""
        self.process.kill()
        self.process.communicate(timeout=HANG_SECS)


@pytest.fixture(name="claims")
def _claims(tmp_path: pathlib.Path) -> Iterator[locks.Claims]:
    with contextlib.closing(locks.Claims(str(tmp_path), locks.HeldOf())) as claims:
        yield claims


@pytest.fixture(name="spawn")
def _spawn(tmp_path: pathlib.Path) -> Iterator[Callable[[], Puppet]]:
    with contextlib.ExitStack() as stack:

        def start() -> Puppet:
            puppet = Puppet(tmp_path)
            stack.callback(puppet.end)
            return puppet

        yield start


def lock(claims: locks.Claims, ordinal: int, first: int, count: int = 1) -> locks.Claim | None:
    claim = locks.Claim(ordinal, first, count, claims.held[ordinal])
    return claim if claims.claim(claim) else None


def claimed(claims: locks.Claims, numbers: range) -> list[int]:
    """List what is claimed, according to both ways to ask."""
    asked = [number for number in numbers if claims.is_claimed(0, number)]
    tried = []
    for number in numbers:
        claim = lock(claims, 0, number)
        if claim is None:
            tried.append(number)
        else:
            claims.release(claim)
    assert asked == tried
    return asked


def take(claims: locks.Claims, first: int, count: int = 1) -> locks.Claim:
    claim = lock(claims, 0, first, count)
    assert claim is not None and (claim.first, claim.count) == (first, count)
    return claim


def test_claim_excludes_others(claims: locks.Claims, spawn: Callable[[], Puppet]) -> None:
    other = spawn()
    claim = take(claims, 5)
    assert lock(claims, 0, 5) is None
    assert not other.ask("take(5)")
    assert other.ask("take(6)")
    assert claimed(claims, range(10)) == [5, 6]
    claims.release(claim)
    claims.release(claim)
    assert other.ask("take(5)")
    assert claimed(claims, range(10)) == [5, 6]


def test_subscribers_do_not_disturb_each_other(claims: locks.Claims) -> None:
    for ordinal in range(3):
        assert lock(claims, ordinal, 2**40)
    assert lock(claims, 1, 2**40) is None


def test_range_is_claimed_as_a_whole(claims: locks.Claims, spawn: Callable[[], Puppet]) -> None:
    assert spawn().ask("take(12)")
    assert lock(claims, 0, 10, 5) is None
    assert claimed(claims, range(10, 15)) == [12]


@pytest.mark.parametrize("taken, expected", [((), 5), ((14, ), 4), ((12, 11), 1), ((10, ), None)])
def test_prefix(claims: locks.Claims, spawn: Callable[[], Puppet], taken: tuple[int, ...],
                expected: int | None) -> None:
    other = spawn()
    for number in taken:
        assert other.ask(f"take({number})")
    claim = locks.Claim(0, 10, 5, claims.held[0])
    assert (claim.count if claims.claim_prefix(claim) else None) == expected


@pytest.mark.parametrize("first, count", [(10, 5), (10, 2), (12, 3), (11, 1)])
def test_narrow(claims: locks.Claims, spawn: Callable[[], Puppet], first: int, count: int) -> None:
    claim = take(claims, 10, 5)
    claims.narrow(claim, first, count)
    free = [number for number in range(10, 15) if not first <= number < first + count]
    other = spawn()
    assert [number for number in range(10, 15) if other.ask(f"take({number})")] == free


def test_killed_holder(claims: locks.Claims, spawn: Callable[[], Puppet]) -> None:
    holder = spawn()
    assert holder.ask("take(1, 3)")
    assert claimed(claims, range(5)) == [1, 2, 3]
    holder.end()
    assert not claimed(claims, range(5))


def test_stopped_holder_keeps_its_claims(claims: locks.Claims, spawn: Callable[[], Puppet]) -> None:
    holder = spawn()
    assert holder.ask("take(1)")
    os.kill(holder.process.pid, signal.SIGSTOP)
    assert claimed(claims, range(3)) == [1]


def test_close_gives_everything_back(claims: locks.Claims, spawn: Callable[[], Puppet]) -> None:
    claim = take(claims, 1, 2)
    claims.close()
    claims.release(claim)
    assert spawn().ask("take(1, 2)")
    with pytest.raises(persipubsub.errors.ClosedError):
        lock(claims, 0, 1)


def test_descriptors_are_used_again_and_bounded(claims: locks.Claims) -> None:
    before = count_descriptors()
    for _ in range(100):
        claims.release(take(claims, 1))
    assert count_descriptors() == before + 1
    held = [take(claims, number) for number in range(200)]
    for claim in held:
        claims.release(claim)
    assert count_descriptors() < before + 100
    claims.close()
    assert count_descriptors() == before


def test_file_is_for_the_user_alone(claims: locks.Claims, tmp_path: pathlib.Path) -> None:
    take(claims, 1)
    status = os.stat(tmp_path / files.CLAIMS)
    assert (stat.S_IMODE(status.st_mode), status.st_size) == (0o600, 0)


def test_file_that_was_replaced(claims: locks.Claims, tmp_path: pathlib.Path) -> None:
    take(claims, 1)
    (tmp_path / files.CLAIMS).unlink()
    (tmp_path / files.CLAIMS).touch(mode=0o600)
    # Locks on the new file exclude nobody that has the one before.
    with pytest.raises(persipubsub.errors.StoreError, match="another file"):
        lock(claims, 0, 2)


def test_threads_exclude_each_other(claims: locks.Claims) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    owners: dict[int, int] = {}
    failures: list[int] = []

    def work(me: int) -> None:
        rng = random.Random(seed + me)
        for _ in range(500):
            number = rng.randrange(20)
            claim = lock(claims, 0, number)
            if claim is not None:
                if owners.setdefault(number, me) != me:
                    failures.append(number)
                owners.pop(number)
                claims.release(claim)

    threads = [threading.Thread(target=work, args=(me, )) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECS)
    assert not failures
    assert not claimed(claims, range(20))


def test_processes_that_are_killed_exclude_each_other(claims: locks.Claims,
                                                      spawn: Callable[[], Puppet]) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    owners: dict[int, Puppet] = {}
    puppets = [spawn() for _ in range(3)]
    for _ in range(300):
        puppet, number = rng.choice(puppets), rng.randrange(10)
        if rng.random() < 0.03:
            puppet.end()
            owners = {number: owner for number, owner in owners.items() if owner is not puppet}
            puppets[puppets.index(puppet)] = spawn()
        elif owners.get(number) is puppet and rng.random() < 0.5:
            puppet.ask(f"give({number})")
            del owners[number]
        else:
            assert puppet.ask(f"take({number})") == (number not in owners)
            owners.setdefault(number, puppet)
        assert claimed(claims, range(10)) == sorted(owners)


# Forks


def test_child_keeps_nothing_of_a_killed_parent(claims: locks.Claims,
                                                spawn: Callable[[], Puppet]) -> None:
    """A program that is started inherits no descriptor, so no claim."""
    holder = spawn()
    assert holder.ask("take(1)")
    child = holder.ask(
        "__import__('subprocess').Popen(['sleep', '60'], stdin=-3, stdout=-3, close_fds=False).pid")
    try:
        holder.end()
        until(lambda: not claims.is_claimed(0, 1), what="the end of the claim")
    finally:
        os.kill(child, signal.SIGKILL)
