"""
Test that ``stat`` without click says and returns what it does with click, each as a process.

Every case is run twice with the same arguments, the second time with the shortcut taken out.
"""

# pylint: disable=missing-function-docstring

import contextlib
import json
import os
import pathlib
import pty
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest

import persipubsub.control
import persipubsub.queue
from persipubsub.store import _clock
from tests import support, test_cli

#: Runs the command behind it at a time that stands still, since figures tell how old things are;
#: says in a file whether click was loaded. At the time "interrupt", somebody presses Ctrl-C when
#: the clock is read.
_WITNESSED = """if True:
    import atexit, os, runpy, signal, sys, time
    way, now, witness = sys.argv[1:4]

    def read_clock(_):
        if now == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return int(now)

    def testify():
        with open(witness, "wt", encoding="ascii") as fid:
            fid.write(str("click" in sys.modules))

    if way == "click":
        import persipubsub.cli._plain
        persipubsub.cli._plain.run = lambda arguments: None
    time.clock_gettime_ns = read_clock
    atexit.register(testify)
    # Without the interpreter and "-m persipubsub"
    del sys.argv[1:7]
    runpy.run_module("persipubsub", run_name="__main__", alter_sys=True)
"""

#: Takes the right of root to read everything from the command behind it.
_WITHOUT_RIGHTS = """if True:
    import ctypes, os, sys
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
"""


class End(NamedTuple):
    """Keep what came of a command."""

    exit_code: int
    out: bytes
    err: bytes
    loads_click: bool


def end_of(directory: pathlib.Path,
           way: str,
           arguments: Sequence[object],
           now: object,
           stdin: bytes = b"",
           prefix: Sequence[str] = (),
           **options: Any) -> End:
    witness = directory / "witness"
    process = test_cli.start(
        *arguments,
        prefix=[*prefix, sys.executable, "-c", _WITNESSED, way,
                str(now), str(witness)],
        stdin=subprocess.PIPE,
        **options)
    out, err = process.communicate(stdin, timeout=support.HANG_SECS)
    testimony = witness.read_text(encoding="ascii")
    witness.unlink()
    return End(process.returncode, out or b"", err or b"", testimony == "True")


def same(directory: pathlib.Path,
         *arguments: object,
         is_plain: bool,
         now: object = None,
         **options: Any) -> tuple[int, bytes, bytes]:
    """Run a command both ways; return exit code and output, which are the same."""
    now = _clock.ticks_ns() if now is None else now
    plain = end_of(directory, "plain", arguments, now, **options)
    by_click = end_of(directory, "click", arguments, now, **options)
    assert by_click.loads_click
    assert plain[:3] == by_click[:3]
    assert plain.loads_click != is_plain
    return plain[:3]


@contextlib.contextmanager
def used(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Make a queue with something of everything that is shown."""
    config_pth = test_cli.make(directory,
                               subscribers=["sub", "größe"],
                               publishers={"pub": ["sub", "größe"]})
    test_cli.send(config_pth, *[b"x" * 100] * 20)
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        first = queue.consumer("sub").take(timeout=0, max_messages=5)
        assert first is not None
        first.acknowledge()
        lease = queue.consumer("sub").take(timeout=0, max_messages=3)
        assert lease is not None
        yield config_pth
        lease.give_back()


def with_a_second_queue(config_pth: pathlib.Path) -> None:
    """Add a queue that is not initialized."""
    config = json.loads(config_pth.read_text(encoding="utf-8"))
    config["queues"]["missing"] = dict(config["queues"]["queue"],
                                       path=str(config_pth.parent / "missing"))
    config_pth.write_text(json.dumps(config), encoding="utf-8")


FORMS = [[], ["--json"], ["--queue", "queue"], ["--queue=queue"], ["--queue", "queue", "--json"],
         ["--queue=queue", "--json"]]


@pytest.mark.parametrize("options", FORMS)
def test_figures(tmp_path: pathlib.Path, options: list[str]) -> None:
    with used(tmp_path) as config_pth:
        code, out, err = same(tmp_path, "stat", config_pth, *options, is_plain=True)
    assert (code, err) == (0, b"")
    if "--json" in options:
        assert {one["in_flight"] for one in json.loads(out)["queue"]["subscribers"]} == {0, 3}
    else:
        assert "größe  ".encode() in out
        assert b"IN FLIGHT  QUEUE" in out


@pytest.mark.parametrize("options", [[], ["--json"], ["--queue", "missing"]])
def test_queue_that_is_not_initialized(tmp_path: pathlib.Path, options: list[str]) -> None:
    config_pth = test_cli.make(tmp_path)
    with_a_second_queue(config_pth)
    code, out, err = same(tmp_path, "stat", config_pth, *options, is_plain=True)
    assert code == 1
    assert (b"persipubsub init" in err) == (options != ["--json"])
    assert (out == b"") == ("--queue" in options)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_queue_that_is_kept_otherwise(tmp_path: pathlib.Path, options: list[str]) -> None:
    config_pth = test_cli.make(tmp_path)
    test_cli.keep_first_otherwise(config_pth)
    code, out, err = same(tmp_path, "stat", config_pth, *options, is_plain=True)
    assert code == 1
    assert b"durability" in (out if options else err) and b"sub" in out


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_queues(tmp_path: pathlib.Path, options: list[str]) -> None:
    config_pth = tmp_path / "config.json"
    config_pth.write_text('{"queues": {}}', encoding="utf-8")
    same(tmp_path, "stat", config_pth, *options, is_plain=True)


def test_missing_file(tmp_path: pathlib.Path) -> None:
    code, out, err = same(tmp_path, "stat", tmp_path / "missing", is_plain=False)
    assert (code, out) == (1, b"") and b"missing" in err


@pytest.mark.parametrize("content", [b"", b"[]", b'{"queues": {', bytes(range(256))])
def test_wrong_file(tmp_path: pathlib.Path, content: bytes) -> None:
    # Error handlers of the streams do their work, too.
    config_pth = tmp_path / "wr\udcffng\n.json"
    config_pth.write_bytes(content)
    code, out, err = same(tmp_path, "stat", config_pth, is_plain=True)
    assert (code, out) == (1, b"")
    assert err.startswith(b"persipubsub: ") and rb"wr\udcffng\n.json" in err


@pytest.mark.parametrize("options", [[], ["--queue", "other"]])
def test_what_is_no_file(tmp_path: pathlib.Path, options: list[str]) -> None:
    for path in (tmp_path, "/dev/stdin"):
        code, out, err = same(tmp_path,
                              "stat",
                              path,
                              *options,
                              is_plain=True,
                              stdin=b'{"queues": {}}')
        assert (code, out) == (1, b"") and b"Expected a regular file" in err


def test_file_that_may_not_be_read(tmp_path: pathlib.Path) -> None:
    config_pth = test_cli.make(tmp_path)
    config_pth.chmod(0)
    code, _, err = same(tmp_path,
                        "stat",
                        config_pth,
                        is_plain=False,
                        prefix=[sys.executable, "-c", _WITHOUT_RIGHTS])
    # Usage, says click; a file that is not there is none.
    assert code == 2 and b"is not readable" in err


def test_unknown_queue(tmp_path: pathlib.Path) -> None:
    config_pth = test_cli.make(tmp_path)
    code, out, err = same(tmp_path, "stat", config_pth, "--queue", "other", is_plain=False)
    assert (code, out) == (2, b"") and b"'other' is not a queue" in err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_damaged_store(tmp_path: pathlib.Path, options: list[str]) -> None:
    config_pth = test_cli.make(tmp_path)
    os.truncate(tmp_path / "queue" / "data.mdb", 5000)
    code, out, err = same(tmp_path, "stat", config_pth, *options, is_plain=True)
    assert code == 1
    assert b"error" in out if options else err.startswith(b"persipubsub: ")


@pytest.mark.parametrize("options", FORMS[:3])
def test_pipe_that_nobody_reads(tmp_path: pathlib.Path, options: list[str]) -> None:
    config_pth = test_cli.make(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert same(tmp_path, "stat", config_pth, *options, is_plain=True,
                    stdout=writer) == (0, b"", b"")
    finally:
        os.close(writer)


def test_complaint_that_nobody_reads(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        for options in ([], ["--json"], ["--queue", "queue"]):
            assert same(tmp_path, "stat", config_pth, *options, is_plain=True,
                        stderr=writer)[0] == 1
        config_pth.write_bytes(b"[]")
        assert same(tmp_path, "stat", config_pth, is_plain=True, stderr=writer)[0] == 1
    finally:
        os.close(writer)


def test_full_disk(tmp_path: pathlib.Path) -> None:
    config_pth = test_cli.make(tmp_path)
    with open("/dev/full", "wb") as full:
        code, _, err = same(tmp_path, "stat", config_pth, is_plain=True, stdout=full)
    assert code == 1 and b"No space left" in err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_closed_standard_output(tmp_path: pathlib.Path, options: list[str]) -> None:
    same(tmp_path,
         "stat",
         test_cli.make(tmp_path),
         *options,
         is_plain=False,
         prefix=test_cli.closed(">&-"))


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_can_not_be_encoded(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                 options: list[str]) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    with used(tmp_path) as config_pth:
        code, out, err = same(tmp_path, "stat", config_pth, *options, is_plain=True)
    assert (code, err) == (0, b"") and (b"gr\\xf6\\xdfe" in out or b"gr\\u00f6\\u00dfe" in out)


def test_interrupted(tmp_path: pathlib.Path) -> None:
    config_pth = test_cli.make(tmp_path)
    assert same(tmp_path, "stat", config_pth, is_plain=True,
                now="interrupt") == (130, b"", b"persipubsub: interrupted\n")


@pytest.mark.parametrize(
    "arguments",
    [[], ["-h"], ["stat"], ["stat", "-h"], ["stat", "CONFIG", "-h"], ["stat", "-"],
     ["stat", "--", "CONFIG"], ["stat", "CONFIG", "--"], ["stat", "--json", "CONFIG"],
     ["stat", "CONFIG", "--json", "--queue", "queue"], ["stat", "CONFIG", "--json", "--json"],
     ["stat", "CONFIG", "--jso"], ["stat", "CONFIG", "--queue"], ["stat", "CONFIG", "--queue="],
     ["stat", "CONFIG", "--queue", "--json"], ["stat", "CONFIG", "--queue", "--json", "--json"],
     ["stat", "CONFIG", "--queue", "-x"], ["stat", "CONFIG", "--queue=-x"],
     ["stat", "CONFIG", "--queues", "queue"], ["stat", "CONFIG", "--queue=queue", "queue"],
     ["stat", "CONFIG", "CONFIG"], ["stat", ""], ["stat", "CONFIG", ""],
     ["stat", "CONFIG", "--watch", "--count", "1"], ["stat", "CONFIG", "--count", "0"],
     ["status", "CONFIG"], ["--version", "stat", "CONFIG"]])
def test_other_forms_are_left_to_click(tmp_path: pathlib.Path, arguments: list[str]) -> None:
    config_pth = test_cli.make(tmp_path)
    same(tmp_path,
         *[{
             "CONFIG": config_pth
         }.get(argument, argument) for argument in arguments],
         is_plain=False)


@pytest.mark.parametrize("name", ["--json", "-x"])
def test_queue_with_the_name_of_an_option(tmp_path: pathlib.Path, name: str) -> None:
    config_pth = test_cli.make(tmp_path)
    config_pth.write_text(config_pth.read_text(encoding="utf-8").replace(
        '"queue"', json.dumps(name)),
                          encoding="utf-8")
    for options in [["--queue", name], ["--queue", name, "--json"], [f"--queue={name}"]]:
        same(tmp_path, "stat", config_pth, *options, is_plain=False)


def test_file_with_the_name_of_an_option(tmp_path: pathlib.Path) -> None:
    os.rename(test_cli.make(tmp_path), tmp_path / "-config")
    for arguments in [["stat", "-config"], ["stat", "--", "-config"], ["stat", "./-config"]]:
        same(tmp_path, *arguments, is_plain=arguments[1].startswith("."), cwd=tmp_path)


def test_completion(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_pth = test_cli.make(tmp_path)
    monkeypatch.setenv("_PERSIPUBSUB_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "persipubsub sta")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert same(tmp_path, "stat", config_pth, is_plain=False) == (0, b"plain,stat\n", b"")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_terminal(tmp_path: pathlib.Path, options: list[str]) -> None:
    config_pth = test_cli.make(tmp_path)
    master, slave = pty.openpty()
    try:
        now = _clock.ticks_ns()
        end = end_of(tmp_path, "plain", ["stat", config_pth, *options], now, stdout=slave)
        shown = os.read(master, 65536)
    finally:
        os.close(master)
        os.close(slave)
    # Drawn, if it is for people
    assert (end.exit_code, end.err) == (0, b"")
    assert end.loads_click == ("╭".encode() in shown) == (not options)
