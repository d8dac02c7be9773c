"""Test the claims of competing consumers, with real processes."""

import ast
import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from persipubsub import errors
from persipubsub.lmdb_engine import claims as claiming
from persipubsub.lmdb_engine import files
from tests.support import HANG_SECS, count_descriptors, in_threads, until

#: A process which does what the test tells it to, line by line. It knows the claims by first number.
_PUPPET = """
import os, sys
from persipubsub.lmdb_engine import claims as claiming

claims = claiming.Claims(sys.argv[1], claiming.HeldOf())
held = {}

def take(first, count=1):
    claim = claiming.Claim(0, first, count, claims.held[0])
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

    def __init__(self, directory: Path) -> None:
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
def _claims(tmp_path: Path) -> Iterator[claiming.Claims]:
    with contextlib.closing(claiming.Claims(str(tmp_path), claiming.HeldOf())) as claims:
        yield claims


@pytest.fixture(name="spawn")
def _spawn(tmp_path: Path) -> Iterator[Callable[[], Puppet]]:
    with contextlib.ExitStack() as stack:

        def start() -> Puppet:
            puppet = Puppet(tmp_path)
            stack.callback(puppet.end)
            return puppet

        yield start


def lock(claims: claiming.Claims,
         ordinal: int,
         first: int,
         count: int = 1) -> claiming.Claim | None:
    claim = claiming.Claim(ordinal, first, count, claims.held[ordinal])
    return claim if claims.claim(claim) else None


def claimed(claims: claiming.Claims, numbers: range) -> list[int]:
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


def take(claims: claiming.Claims, first: int, count: int = 1) -> claiming.Claim:
    claim = lock(claims, 0, first, count)
    assert claim is not None and (claim.first, claim.count) == (first, count)
    return claim


def test_descriptors_are_used_again_and_bounded(claims: claiming.Claims) -> None:
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


def test_file_that_was_replaced(claims: claiming.Claims, tmp_path: Path) -> None:
    take(claims, 1)
    (tmp_path / files.CLAIMS).unlink()
    (tmp_path / files.CLAIMS).touch(mode=0o600)
    # Locks on the new file exclude nobody that has the one before.
    with pytest.raises(errors.StoreError, match="another file"):
        lock(claims, 0, 2)


def test_threads_exclude_each_other(claims: claiming.Claims) -> None:
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

    in_threads([functools.partial(work, me) for me in range(8)])
    assert not failures
    assert not claimed(claims, range(20))


def test_processes_that_are_killed_exclude_each_other(claims: claiming.Claims,
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


def test_child_keeps_nothing_of_a_killed_parent(claims: claiming.Claims,
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
