"""Test that the documentation speaks of what is there."""

# pylint: disable=missing-function-docstring

import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

import persipubsub.control
import persipubsub.errors
from tests import support

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


def _block(text: str, title: str) -> str:
    """Return the only block behind a title."""
    found = re.findall("^" + re.escape(title) + r"\n\n((?:(?:    .*)?\n)+)", text, re.MULTILINE)
    assert len(found) == 1, title
    return textwrap.dedent(found[0]).strip("\n") + "\n"


@pytest.mark.parametrize("name", ["back-pressure", "once", "replay", "retries"])
def test_example_runs_and_prints_what_it_says(tmp_path: pathlib.Path, name: str) -> None:
    text = (_ROOT / "docs" / (name + ".rst")).read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(_block(text, ".. code-block:: json"), encoding="utf-8")
    process = subprocess.run(
        [sys.executable, "-c", _block(text, ".. code-block:: python")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False)
    assert process.stderr == ""
    assert process.stdout == _block(text, "It prints::")
    assert process.returncode == 0


def test_examples_of_receiving_run(tmp_path: pathlib.Path) -> None:
    text = (_ROOT / "docs" / "receiving.rst").read_text(encoding="utf-8")
    blocks = re.findall(r"^.. code-block:: python\n\n((?:(?:    .*)?\n)+)", text, re.MULTILINE)
    assert len(blocks) == 7
    send = ("with persipubsub.publisher.Pub() as pub:\n"
            "    pub.init('pub', 'config.json')\n"
            "    pub.send_many([b'hello', b'stop'])\n"
            "print('--')\n")
    code = "import persipubsub\n"
    code += "".join(textwrap.dedent(block) + "\n" + send for block in blocks)
    persipubsub.control.initialize_all_dbs(support.write_config(tmp_path))
    process = subprocess.run([sys.executable, "-c", code],
                             cwd=tmp_path,
                             capture_output=True,
                             text=True,
                             timeout=120,
                             check=False)
    assert process.stderr == ""
    received = process.stdout.split("--\n")
    assert received[:6] == [
        "", "got b'hello'\n", "got b'stop'\ngot b'hello'\ngot b'stop'\n",
        "got b'hello'\ngot b'stop'\n", "got b'hello'\ngot b'stop'\n", "the newest is b'stop'\n"
    ]
    assert re.match(r"11 \d{4}-\d\d-\d\dT[\d:.]+\+00:00 1 b'hello'\n", received[6])
