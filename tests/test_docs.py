"""Test that the documentation speaks of what is there."""

import pathlib
import re

import pytest

import persipubsub.errors

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_GUARANTEES = (_ROOT / "docs" / "guarantees.rst").read_text(encoding="utf-8")


def test_named_tests_are_there() -> None:
    named = set(re.findall(r"``(tests/[\w/]+\.py)``", _GUARANTEES))
    assert len(named) > 15
    assert [path for path in sorted(named) if not (_ROOT / path).is_file()] == []


def test_every_fault_test_proves_a_promise() -> None:
    files = {"tests/faults/" + pth.name for pth in (_ROOT / "tests" / "faults").glob("test_*.py")}
    unnamed = {path for path in files if path not in _GUARANTEES}
    # These try sizes and ends of the interpreter, which no single promise is about.
    assert unnamed <= {
        "tests/faults/test_sizes.py", "tests/faults/test_exit.py", "tests/faults/test_directory.py"
    }


@pytest.mark.parametrize(
    "name",
    sorted(
        set(re.findall(r"``(PERSIPUBSUB_[A-Z_]+)``", _GUARANTEES))
        | set(re.findall(r"(PERSIPUBSUB_[A-Z_]+)=", _GUARANTEES))))
def test_named_variable_is_used(name: str) -> None:
    sources = [pth.read_text(encoding="utf-8") for pth in (_ROOT / "tests").rglob("*.py")]
    assert any('"{}"'.format(name) in source for source in sources)


def test_named_errors_are_there() -> None:
    named = set(re.findall(r"``(\w+Error)``", _GUARANTEES))
    assert named <= set(persipubsub.errors.__all__)
