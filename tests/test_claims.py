"""Test the claims of competing consumers, with real processes."""

import contextlib
import functools
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persipubsub import errors
from persipubsub.lmdb_engine import claims as claiming
from persipubsub.lmdb_engine import files
from tests import support


def obey(pipe: support.Connection, directory: Path) -> None:
    """Take claims of messages and give them back, as the test says."""
    claims = claiming.Claims(str(directory))
    held: dict[int, claiming.Claim] = {}
    while True:
        wish, number = pipe.recv()
        if wish == "give":
            claims.release(held.pop(number))
            pipe.send(True)
        elif wish == "start a program":
            # Without close_fds, so that it gets all that can be inherited.
            program = subprocess.Popen(["sleep", str(number)], close_fds=False)  # pylint: disable=consider-using-with
            pipe.send(program.pid)
        else:
            claim = lock(claims, 0, number)
            pipe.send(claim is not None)
            if claim is not None:
                held[number] = claim


def ask(child: support.Child, wish: str, number: int) -> Any:
    child.pipe.send((wish, number))
    return child.get()


@pytest.fixture(name="claims")
def _claims(tmp_path: Path) -> Iterator[claiming.Claims]:
    with contextlib.closing(claiming.Claims(str(tmp_path))) as claims:
        yield claims


def lock(claims: claiming.Claims,
         ordinal: int,
         first: int,
         count: int = 1) -> claiming.Claim | None:
    claim = claiming.Claim(ordinal, first, first + count, claiming.Held())
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
    assert claim is not None and (claim.first, claim.stop) == (first, first + count)
    return claim


def test_descriptors_are_used_again_and_bounded(claims: claiming.Claims) -> None:
    before = support.count_descriptors()
    for _ in range(100):
        claims.release(take(claims, 1))
    assert support.count_descriptors() == before + 1
    held = [take(claims, number) for number in range(200)]
    for claim in held:
        claims.release(claim)
    assert support.count_descriptors() < before + 100
    claims.close()
    assert support.count_descriptors() == before


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

    support.in_threads([functools.partial(work, me) for me in range(8)])
    assert not failures
    assert not claimed(claims, range(20))


def test_processes_that_are_killed_exclude_each_other(claims: claiming.Claims,
                                                      tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    owners: dict[int, support.Child] = {}
    children = [support.Child(obey, tmp_path) for _ in range(3)]
    for _ in range(300):
        child, number = rng.choice(children), rng.randrange(10)
        if rng.random() < 0.03:
            child.__exit__()
            owners = {number: owner for number, owner in owners.items() if owner is not child}
            children[children.index(child)] = support.Child(obey, tmp_path)
        elif owners.get(number) is child and rng.random() < 0.5:
            assert ask(child, "give", number)
            del owners[number]
        else:
            assert ask(child, "take", number) == (number not in owners)
            owners.setdefault(number, child)
        assert claimed(claims, range(10)) == sorted(owners)
    for child in children:
        child.__exit__()


# Forks


def test_program_keeps_nothing_of_a_killed_parent(claims: claiming.Claims, tmp_path: Path) -> None:
    """A program that is started inherits no descriptor, so no claim."""
    with support.Child(obey, tmp_path) as holder:
        assert ask(holder, "take", 1)
        program = ask(holder, "start a program", 60)
    try:
        support.until(lambda: not claims.is_claimed(0, 1), what="the end of the claim")
    finally:
        os.kill(program, signal.SIGKILL)
