"""Test the command line, each command as a process of its own."""

import base64
import contextlib
import datetime
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click.testing
import pytest

import persipubsub
import persipubsub.cli.commands
from persipubsub import Pub, Sub, control
from tests import jetstream_server, support

_ROOT = Path(__file__).resolve().parent.parent

COMMANDS: Mapping[str, click.Command] = persipubsub.cli.commands.commands.commands

#: Those that are about a configuration file that has to be there.
USERS = sorted(set(COMMANDS) - {"new", "completion"})

#: Commands with what they need behind the configuration file.
ARGUMENTS: dict[str, list[str]] = {
    "peek": ["sub"],
    "migrate": ["--to", "nats://127.0.0.1:1/nobody"],
    "receive": ["sub"],
    "send": ["pub", "--message", "x"],
    "backup": ["target"],
    "restore": ["backup", "--yes"],
    "seek": ["sub", "--to", "end"],
    "add-subscriber": ["new"],
    "remove-subscriber": ["sub", "--yes"],
    "clear": ["--yes"],
    "drop-queue": ["--yes"],
    "delete": ["sub", "--number", "1", "--yes"],
    "pause": ["sub"],
    "resume": ["sub"],
    "metrics": ["--port", "0"],
    # Without it, there is no such queue in the file, and nothing to do.
    "dead-letters": ["--queue", "queue"],
}


def start(*arguments: object, prefix: Sequence[str] = (),
          **options: Any) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ, PYTHONPATH=str(_ROOT), COLUMNS="110", TERM="xterm")
    for name in ("PYTHONUNBUFFERED", "NO_COLOR", "PERSIPUBSUB_CONFIG", "LINES"):
        environment.pop(name, None)
    environment.update(options.pop("variables", {}))
    options = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        **options
    }
    command = [*prefix, sys.executable, "-m", "persipubsub", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **options)


def run(*arguments: object,
        stdin: bytes = b"",
        exit_code: int = 0,
        **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command; whatever happens, no traceback may come."""
    process = start(*arguments, stdin=subprocess.PIPE, **options)
    out, err = process.communicate(stdin, timeout=support.HANG_SECS)
    assert b"Traceback" not in err
    assert process.returncode == exit_code, (out, err)
    return subprocess.CompletedProcess([], process.returncode, out.decode(), err.decode())


def call(capfd: pytest.CaptureFixture[str], *arguments:
         object) -> "subprocess.CompletedProcess[str]":
    """Run a command in this process, which is faster."""
    code = persipubsub.cli.commands.main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert "Traceback" not in err, arguments
    return subprocess.CompletedProcess([], code, out, err)


@contextlib.contextmanager
def receiving(config_pth: Path, count: int, name: str = "sub") -> Iterator[list[bytes]]:
    """Receive several messages; they are acknowledged at the end of the block."""
    with Sub(name, config_pth) as sub:
        with sub.receive_many(max_msgs=count, timeout=0) as messages:
            yield messages


def lag(config_pth: Path) -> int:
    return control.statistics(config_pth)["queue"].subscribers[0].lag


# The commands as such


def test_every_command_has_help_with_an_example() -> None:
    runner = click.testing.CliRunner()
    for name, command in COMMANDS.items():
        result = runner.invoke(persipubsub.cli.commands.commands, [name, "--help"])
        assert result.exit_code == 0
        assert re.search(fr"\n  Examples?:\n      .*persipubsub {name} ", result.output), name
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"config", "--config", "--queue", "--json"} <= options or name == "completion"


def test_help_lists_all_commands_in_groups() -> None:
    text = run("--help").stdout
    groups = re.findall(r"^(Messages|Look|Maintain|Deploy):\n((?:  .*\n)+)", text, re.MULTILINE)
    names = [name for _, lines in groups for name in re.findall(r"^  ([a-z-]+) ", lines, re.M)]
    assert len(groups) == 4 and sorted(names) == sorted(COMMANDS)
    # No sentence is cut.
    assert not re.search(r"\w\.\.\.$", text, re.MULTILINE)


def test_every_command_is_in_the_docs_and_no_other() -> None:
    text = (_ROOT / "docs" / "operations.rst").read_text(encoding="utf-8")
    titles = re.findall(r"^([a-z-]+)\n~+$", text, re.MULTILINE)
    assert sorted(titles) == sorted(COMMANDS)
    for title in titles:
        section = re.search(fr"^{title}\n~+\n(.*?)(?=^[^\n]+\n[~-]{{3,}}$|\Z)", text,
                            re.MULTILINE | re.DOTALL)
        assert section is not None
        assert f"$ persipubsub {title} " in section.group(1), title


def test_every_command_and_option_of_the_docs_is_there() -> None:
    text = (_ROOT / "docs" / "operations.rst").read_text(encoding="utf-8")
    lines = re.findall(r"\$ persipubsub ([a-z-]+) (.*)", text)
    assert len(lines) >= len(COMMANDS)
    for name, rest in lines:
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert option in known, (name, option)


def test_version_and_help_and_no_command() -> None:
    assert run("--version").stdout == f"persipubsub, version {persipubsub.__version__}\n"
    assert "check-config" in run("--help").stdout
    assert "check-config" in run(exit_code=2).stderr


def test_without_the_extra_it_says_how_to_install_it() -> None:
    process = support.run_python("import sys, runpy; sys.modules['click'] = None\n"
                                 "runpy.run_module('persipubsub', run_name='__main__')")
    assert process.returncode == 1
    assert process.stderr == ("persipubsub: the command line needs click. Install it with: "
                              "pip install 'persipubsub[cli]'\n")


# Where the configuration file is


def test_file_named_by_the_environment(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"1", b"2")
    variables = {"PERSIPUBSUB_CONFIG": str(config_pth)}
    other_pth = tmp_path / "other.json"
    other_pth.write_text('{"queues": {}}', encoding="utf-8")
    (tmp_path / "message").write_bytes(b"3")
    # An argument is as good as ever, and goes before the variable; so does the option.
    for arguments in ([], [config_pth], ["--config", config_pth]):
        assert json.loads(run("stat", *arguments, "--json", variables=variables).stdout)["queue"]
        assert run("peek", *arguments, "sub", "--number", 1, variables=variables).stdout
        run("send", *arguments, "pub", tmp_path / "message", variables=variables)
        run("dead-letters", *arguments, "list", variables=variables)
    assert lag(config_pth) == 5
    for arguments in ([other_pth], ["--config", other_pth]):
        assert run("stat", *arguments, "--json", variables=variables).stdout == "{}\n"
        assert "Usage" not in run("peek", *arguments, "sub", variables=variables,
                                  exit_code=1).stderr
    assert "[OPTIONS] CONFIG SUBSCRIBER" in run("peek", "--help").stdout
    # With the option, there is no argument for the file.
    run("stat", "--config", config_pth, config_pth, exit_code=2)
    run("peek", config_pth, "sub", "more", variables=variables, exit_code=2)


def test_file_that_is_not_named(tmp_path: Path) -> None:
    for name in ("stat", "send", "init"):
        for variables in ({}, {"PERSIPUBSUB_CONFIG": ""}):
            process = run(name, variables=variables, exit_code=2)
            assert "in PERSIPUBSUB_CONFIG" in process.stderr
    run("peek", "sub", exit_code=2)
    variables = {"PERSIPUBSUB_CONFIG": str(tmp_path / "missing")}
    assert "missing" in run("stat", variables=variables, exit_code=1).stderr


# Closed streams


def closed(redirection: str) -> list[str]:
    """Return what starts the command behind it with a stream closed, as ``>&-`` does in a shell."""
    return ["sh", "-c", f'exec "$0" "$@" {redirection}']


@pytest.mark.parametrize("command",
                         ["stat", "init", "send pub --message x", "receive sub", "stat --json"])
def test_closed_output(tmp_path: Path, command: str) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"first")
    name, *rest = command.split()
    process = run(name, config_pth, *rest, prefix=closed(">&-"), exit_code=1)
    assert process.stderr == ("persipubsub: Expected an open standard output, but got: it is "
                              "closed. If you do not need the output, send it to /dev/null.\n")
    # Nothing was sent, and nothing was received to be lost.
    assert control.statistics(config_pth)["queue"].subscribers[0].lag == 1


def test_closed_error_output(tmp_path: Path) -> None:
    process = run("stat", tmp_path / "missing.json", prefix=closed("2>&-"), exit_code=1)
    assert (process.stdout, process.stderr) == ("", "")


def test_closed_input(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    process = run("send", config_pth, "pub", prefix=closed("<&-"), exit_code=1)
    assert process.stderr == ("0 messages sent\npersipubsub: Expected to read the standard input, "
                              "but got: it is closed\n")
    support.send(config_pth, b"first")
    for name in "clear", "drop-queue":
        process = run(name, config_pth, prefix=closed("<&-"), exit_code=1)
        assert process.stderr.endswith("\npersipubsub: nothing was done\n")
    assert control.statistics(config_pth)["queue"].messages == 1


@pytest.mark.parametrize("options", [[], ["--lines"]])
def test_input_that_does_not_block_is_read_to_its_end(tmp_path: Path, options: list[str]) -> None:
    config_pth = support.make_queue(tmp_path)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    # The pipe ends first, whatever happens: the command would wait for more, and we for its end.
    with start("send", config_pth, "pub", *options,
               stdin=reader) as process, open(writer, "wb", buffering=0) as pipe:
        os.close(reader)
        support.until(
            lambda: any(path.endswith("/data.mdb") for path in support.open_files(process.pid)),
            "the queue is open")
        for part in (b"one\ntw", b"o\nthree"):
            time.sleep(0.3)  # until it waits for more
            pipe.write(part)
        pipe.close()
        assert process.stderr is not None
        assert process.wait(timeout=support.HANG_SECS) == 0, process.stderr.read()
    contents = [one.content for one in control.peek(config_pth, "sub", 3)]
    assert contents == ([b"one", b"two", b"three"] if options else [b"one\ntwo\nthree"])


@contextlib.contextmanager
def unread(kind: str) -> Iterator[int]:
    """Return a descriptor to which nothing can be written."""
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("kind", ["full", "closed pipe"])
@pytest.mark.parametrize("command, exit_code", [("stat CONFIG --nonsense", 2), ("seek CONFIG", 2),
                                                ("stat nowhere.json", 1), ("clear CONFIG", 1),
                                                ("check nowhere.json", 3),
                                                ("send CONFIG pub --message x", 0)])
def test_complaints_that_nobody_reads(tmp_path: Path, command: str, exit_code: int,
                                      kind: str) -> None:
    """The exit code is as if they were read, and who was not asked did not agree."""
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"first")
    with unread(kind) as descriptor:
        process = start(*command.replace("CONFIG", str(config_pth)).split(),
                        stdin=subprocess.PIPE,
                        stderr=descriptor)
        process.communicate(b"y\n", timeout=support.HANG_SECS)
    assert process.returncode == exit_code
    expected = 2 if exit_code == 0 else 1
    assert control.statistics(config_pth)["queue"].messages == expected


# Queues


def test_init_and_stat(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path)
    expected = f"queue: ready in {tmp_path / 'queue'}\n"
    assert run("init", config_pth).stdout == expected
    found = json.loads(run("init", config_pth, "--json").stdout)
    assert found == {"queue": {"path": str(tmp_path / "queue")}}
    support.send(config_pth, b"x" * 1000, b"y")
    text = run("stat", config_pth).stdout
    assert re.match(r"queue  /.*/queue\n  messages +2 +.* <1 % of MAX_MSGS_NUM\n", text)
    assert re.search(r"^  bytes +1\.0 kB .* of HWM_LMDB_SIZE_BYTES$", text, re.MULTILINE)
    # Without the columns that have nothing but zeros
    assert text.endswith("\n\n  SUBSCRIBER  LAG\n  sub           2\n")
    found = json.loads(run("stat", config_pth, "--json").stdout)["queue"]
    assert (found["messages"], found["message_bytes"], found["next_number"]) == (2, 1001, 3)
    assert found["message_share"] == 2e-6
    assert found["subscribers"][0]["in_flight"] == 0
    assert max(map(len, text.splitlines()[1:])) <= 100


def test_stat_counts_what_is_in_flight(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, *[b"x"] * 10)
    with receiving(config_pth, 1), receiving(config_pth, 3):
        found = json.loads(run("stat", config_pth, "--json").stdout)["queue"]
        assert found["subscribers"][0]["in_flight"] == 4
        text = run("stat", config_pth).stdout
        assert re.search(r"^  SUBSCRIBER  LAG  IN FLIGHT\n  sub +10 +4$", text, re.MULTILINE)
        rows = re.findall(r"^  sub +(1|2 to 4) +(\d+) +\d+\.\d s$", text, re.MULTILINE)
        assert sorted(rows) == [("1", str(os.getpid())), ("2 to 4", str(os.getpid()))]
    found = json.loads(run("stat", config_pth, "--json").stdout)["queue"]
    assert (found["subscribers"][0]["in_flight"], found["subscribers"][0]["lag"]) == (0, 6)
    assert "IN FLIGHT" not in run("stat", config_pth).stdout


def test_stat_of_no_queues_and_of_an_empty_one(tmp_path: Path) -> None:
    config_pth = tmp_path / "config.json"
    config_pth.write_text('{"queues": {}}', encoding="utf-8")
    assert run("stat", config_pth).stdout == ""
    assert run("stat", config_pth, "--json").stdout == "{}\n"
    text = run("stat", support.make_queue(tmp_path)).stdout
    assert "\n  nothing waits\n" in text and "MAX_MSGS_NUM" not in text


# Monitoring

CHECKS = [
    ("", 0, "1 queue fine"),
    ("--max-lag 3", 0, "1 queue fine"),
    ("--max-lag 2", 2, "queue: lag of sub is 3, more than 2"),
    ("--max-lag 2,3", 1, "queue: lag of sub is 3, more than 2"),
    ("--max-lag 1,2", 2, "queue: lag of sub is 3, more than 2"),
    ("--max-age 1h30m", 0, "1 queue fine"),
    ("--max-age 0", 2, "queue: age is"),
    ("--max-share 0.8", 0, "1 queue fine"),
    ("--max-share 0.2,0.8", 1, "share of messages is 0.3, more than 0.2"),
    ("--max-lag 2 --max-share 0.1,0.9", 2, "; queue: share of messages"),
]


def test_check(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config_pth = support.make_queue(tmp_path, MAX_MSGS_NUM=10)
    support.send(config_pth, *[b"x"] * 3)
    for options, exit_code, finding in CHECKS:
        done = call(capfd, "check", config_pth, *options.split())
        status = ("OK", "WARNING", "CRITICAL")[exit_code]
        assert (done.returncode, done.stderr) == (exit_code, "")
        assert done.stdout.startswith(f"PERSIPUBSUB {status} - ")
        text, _, data = done.stdout.partition(" | ")
        assert finding in text and done.stdout.count("\n") == 1
        # As the guidelines for monitoring plugins have it
        number = r"\d+(\.\d+)?(e-\d+)?"
        assert re.fullmatch(fr"('[^'=|]+'={number}s?;({number})?;({number})?;0[ \n])+", data)
        assert "'queue lag of sub'=3;" in data
        found = json.loads(call(capfd, "check", config_pth, *options.split(), "--json").stdout)
        assert found["status"] == status and len(found["performance"]) == data.count("=")


def test_check_of_what_can_not_be_looked_at(tmp_path: Path,
                                            capfd: pytest.CaptureFixture[str]) -> None:
    config_pth = support.write_config(tmp_path)
    process = run("check", config_pth, exit_code=3)
    assert process.stdout.startswith("PERSIPUBSUB UNKNOWN - queue: Expected the directory")
    with support.edited(config_pth) as config:
        config["queues"]["sound|'="] = dict(config["queues"]["queue"], path=str(tmp_path / "sound"))
    control.initialize_all_dbs(config_pth, "sound|'=")
    run("check", config_pth, exit_code=3)
    process = run("check", config_pth, "--queue", "sound|'=")
    assert "'sound/''_ lag of sub'=0;;;0 " in process.stdout and process.stdout.count("|") == 1
    # What is known to be wrong goes before what is not known.
    run("check", config_pth, "--max-share", "0", exit_code=2)
    for options in (["--max-lag", "x"], ["--max-lag", "3,2"], ["--max-lag", "1,2,3"],
                    ["--max-age", "-1"], ["--max-lag", "nan"], ["--nonsense"], ["--queue", "q"]):
        assert call(capfd, "check", config_pth, *options).returncode == 3


def add_in_front(config_pth: Path, path: str) -> None:
    """Add a queue in front of the other one."""
    with support.edited(config_pth) as config:
        first = dict(config["queues"]["queue"], path=path)
        config["queues"] = {"first": first, **config["queues"]}


@pytest.mark.parametrize("name", ["stat", "verify", "prune"])
def test_one_queue_that_can_not_be_read_does_not_hide_the_others(tmp_path: Path, name: str) -> None:
    config_pth = support.make_queue(tmp_path)
    add_in_front(config_pth, str(tmp_path / "first"))
    # There, another program has its data.
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "data.mdb").write_bytes(b"something else" * 1000)
    process = run(name, config_pth, exit_code=1)
    assert re.search(r"^queue\b", process.stdout, re.MULTILINE)
    assert "first" in process.stderr and len(process.stderr.splitlines()) == 1
    found = json.loads(run(name, config_pth, "--json", exit_code=1).stdout)
    assert "first" in found["first"]["error"] and "error" not in found["queue"]


@pytest.mark.parametrize("name", ["verify", "compact"])
def test_queue_on_servers_does_not_hide_directories(tmp_path: Path, name: str) -> None:
    config_pth = support.make_queue(tmp_path)
    add_in_front(config_pth, "nats://127.0.0.1:1/S")
    process = run(name, config_pth, exit_code=1)
    assert process.stdout.startswith("queue: ")
    assert "directory of this machine" in process.stderr and len(process.stderr.splitlines()) == 1


def test_prune_and_clear(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"1", b"2")
    assert run("prune", config_pth).stdout.startswith("queue: 0 deliveries")
    process = run("clear", config_pth, stdin=b"n\n", exit_code=1)
    assert "Drop 2 messages of queue?" in process.stderr and process.stdout == ""
    run("clear", config_pth, exit_code=1)
    assert lag(config_pth) == 2
    assert run("clear", config_pth, stdin=b"y\n").stdout == "queue: cleared, 2 deliveries unread\n"
    assert lag(config_pth) == 0
    found = json.loads(run("clear", config_pth, "--yes", "--json").stdout)
    assert found == {"queue": {"dropped": 0}}


# Messages


def test_send_and_receive(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    (tmp_path / "file").write_bytes(b"\0\xff\n")
    assert run("send", config_pth, "pub", "--message", "hello", tmp_path / "file").stderr == \
        "2 messages sent\n"
    run("send", config_pth, "pub", stdin=b"all\nof\nit")
    process = run("send", config_pth, "pub", "--lines", "--json", stdin=b"a\n\nlast")
    assert json.loads(process.stdout) == {"sent": 3}
    assert lag(config_pth) == 6

    assert run("receive", config_pth, "sub").stdout == "hello\n"
    raw = start("receive", config_pth, "sub", "--format", "raw")
    assert raw.communicate(timeout=support.HANG_SECS)[0] == b"\0\xff\n"
    found = json.loads(run("receive", config_pth, "sub", "--json").stdout)
    assert base64.b64decode(found["base64"]) == b"all\nof\nit"
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    lines = run("receive", config_pth, "sub", "--number", "0", "--directory", inbox).stdout
    paths = [Path(line) for line in lines.splitlines()]
    assert [path.read_bytes() for path in paths] == [b"a", b"", b"last"]
    assert sorted(inbox.iterdir()) == paths
    process = run("receive", config_pth, "sub", exit_code=1)
    assert process.stderr == "persipubsub: no message for sub within 0 seconds\n"


@jetstream_server.needs_server
def test_send_and_receive_on_servers(tmp_path: Path, servers: jetstream_server.Servers) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers)
    run("send", config_pth, "pub", "--lines", stdin=b"a\nb")
    assert run("receive", config_pth, "sub").stdout == "a\n"
    found = json.loads(run("receive", config_pth, "sub", "--json", "--timeout", "10").stdout)
    assert base64.b64decode(found["base64"]) == b"b" and found["number"] == 2
    assert run("receive", config_pth, "sub", exit_code=1).stderr == \
        "persipubsub: no message for sub within 0 seconds\n"


def test_receive_waits(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    with start("receive", config_pth, "sub", "--timeout", "inf", "--number", "2") as process:
        assert process.stdout is not None
        support.send(config_pth, b"1")
        assert process.stdout.readline() == b"1\n"
        support.send(config_pth, b"2")
        assert process.stdout.readline() == b"2\n"
        assert process.wait(timeout=support.HANG_SECS) == 0


def test_lines_are_sent_as_they_come(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, MAX_MSGS_NUM=100)
    with start("send", config_pth, "pub", "--lines", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"1\n")
        process.stdin.flush()
        support.until(lambda: lag(config_pth) == 1, "the first line")
        # More than fits into one commit: the high-water mark drops the rest, as it is told to.
        process.stdin.write(b"".join(b"%d\n" % index for index in range(1000)))
        process.stdin.close()
        assert process.wait(timeout=support.HANG_SECS) == 0
        assert process.stderr is not None and b"1,001 messages sent" in process.stderr.read()
    assert run("receive", config_pth, "sub", "--number", "0").stdout.splitlines()[-1] == "999"


def test_peek(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"hello", "w\xf6rld\n\x1b[2J".encode(), b"\xff")
    lines = run("peek", config_pth, "sub").stdout.splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["hello", "w\xf6rld\\n\\x1b[2J", "\\xff"]
    numbers = [int(line.split()[0]) for line in lines]
    lines = run("peek", config_pth, "sub", "--from", numbers[1], "--number", 1, "--format",
                "hex").stdout.splitlines()
    assert len(lines) == 1 and lines[0].endswith("77c3b6726c640a1b5b324a")
    found = json.loads(run("peek", config_pth, "sub", "--number", 1, "--json").stdout)
    assert (found["number"], found["base64"]) == (numbers[0], "aGVsbG8=")
    assert found["subscribers"] is None and 0 <= found["age_seconds"] < support.HANG_SECS
    assert run("peek", config_pth, "sub", "--from", 10**23).stdout == ""
    assert len(run("peek", config_pth, "sub", "--number", 10**23).stdout.splitlines()) == 3
    assert lag(config_pth) == 3


def test_times_of_messages(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    before = datetime.datetime.now(datetime.UTC)
    support.send(config_pth, b"hello")
    variables = {"TZ": "UTC-5:30"}

    def shown(*options: str) -> str:
        return run("peek", config_pth, "sub", *options, variables=variables).stdout.split("  ")[-2]

    after = datetime.datetime.now(datetime.UTC)
    zones = ((datetime.timezone(datetime.timedelta(hours=5.5)), shown()), (datetime.UTC,
                                                                           shown("--utc")))
    for zone, text in zones:
        assert text.endswith("Z") == (zone is datetime.UTC)
        # The date is shown if midnight has passed since.
        day = "" if len(text) < 20 else "%Y-%m-%d "
        slack = datetime.timedelta(milliseconds=100)
        assert f"{(before - slack).astimezone(zone):{day}%H:%M:%S.%f}"[:-3] <= text.strip(" Z")
        assert text.strip(" Z") <= f"{(after + slack).astimezone(zone):{day}%H:%M:%S.%f}"
    assert re.fullmatch(r" *\d\.\d s", shown("--age"))


def test_stat_watch_for_machines(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    out = run("stat", config_pth, "--watch", "--count", "3", "--interval", "0.1", "--json").stdout
    assert [json.loads(line)["queue"]["messages"] for line in out.splitlines()] == [0, 0, 0]


# Closed pipes and Ctrl-C


@pytest.mark.parametrize(
    "arguments", [["tail", "--number", "100"], ["tail", "--number", "1"], ["stat"],
                  ["stat", "--watch", "--interval", "0.1"], ["peek", "sub", "--number", "100"]])
def test_closed_pipe_is_quiet_and_loses_nothing(tmp_path: Path, arguments: list[str]) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, *[b"x" * 1000] * 200)
    with start(arguments[0], config_pth, *arguments[1:]) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=support.HANG_SECS) == 0
        assert process.stderr.read() == b""
    assert lag(config_pth) == 200


def test_closed_pipe_leaves_what_was_not_written(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, *[b"%d" % index * 1000 for index in range(200)])
    with start("receive", config_pth, "sub", "--number", "0") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"0" * 1000 + b"\n"
        process.stdout.close()
        assert process.wait(timeout=support.HANG_SECS) == 0
        assert process.stderr.read() == b""
    # A pipe holds some messages that were written and never read; all others are still there.
    rest = lag(config_pth)
    assert 0 < rest < 200
    assert control.peek(config_pth, "sub")[0].content == b"%d" % (200 - rest) * 1000


def test_full_output_leaves_the_message(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"x")
    with open("/dev/full", "wb") as full:
        for arguments in [["receive", config_pth, "sub"], ["stat", config_pth]]:
            process = start(*arguments, stdout=full)
            err = process.communicate(timeout=support.HANG_SECS)[1]
            assert process.returncode == 1
            assert b"No space left" in err and b"Traceback" not in err
    assert lag(config_pth) == 1


#: As in most containers: nothing is between a write of Python and the system.
UNBUFFERED = ["env", "PYTHONUNBUFFERED=1"]


@pytest.mark.parametrize("prefix", [[], UNBUFFERED])
@pytest.mark.parametrize("options", [[], ["--json"], ["--format", "raw"]])
def test_message_that_was_written_in_part_stays(tmp_path: Path, options: list[str],
                                                prefix: list[str]) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"x" * 1000000)
    with start("receive", config_pth, "sub", *options, prefix=prefix) as process:
        assert process.stdout is not None
        # A pipe that takes a part of a write, and no more.
        os.read(process.stdout.fileno(), 10)
        process.stdout.close()
        assert process.wait(timeout=support.HANG_SECS) == 0
    assert lag(config_pth) == 1


@pytest.mark.parametrize("prefix", [[], UNBUFFERED])
@pytest.mark.parametrize("options", [[], ["--json"], ["--format", "raw"]])
def test_output_that_does_not_block_gets_all(tmp_path: Path, options: list[str],
                                             prefix: list[str]) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, *[b"x" * 5000] * 100)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(reader, "rb") as output:
        arguments = ["sub", "--number", "100", *options]
        process = start("receive", config_pth, *arguments, prefix=prefix, stdout=writer)
        os.close(writer)
        assert select.select([output], [], [], support.HANG_SECS)[0]
        time.sleep(0.2)  # until the pipe is full
        written = output.read()
        assert process.communicate(timeout=support.HANG_SECS)[1] == b""
    assert process.returncode == 0
    if "--json" in options:
        written = b"".join(
            base64.b64decode(json.loads(line)["base64"]) for line in written.splitlines())
    assert written.count(b"x") == 500000
    assert lag(config_pth) == 0


def test_each_line_is_written_at_once_without_buffers(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    with start("stat", config_pth, "--watch", "--interval", "3600", "--json",
               prefix=UNBUFFERED) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], support.HANG_SECS)[0]
        process.kill()


@pytest.mark.parametrize(
    "arguments",
    [["tail", "--number", "1"], ["receive", "sub", "--number", "2", "--timeout", "inf"],
     ["stat", "--watch", "--json"], ["metrics", "--port", "0"]])
def test_interrupted(tmp_path: Path, arguments: list[str]) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"x")
    with start(arguments[0], config_pth, *arguments[1:]) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=support.HANG_SECS) == 130
        assert process.stderr.read() == b"persipubsub: interrupted\n"


@pytest.mark.parametrize(
    "arguments", [["clear"], ["drop-queue"], ["remove-subscriber", "sub"], ["restore", "backup"]])
def test_interrupted_at_a_question(tmp_path: Path, arguments: list[str]) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"x")
    with start(arguments[0], config_pth, *arguments[1:], stdin=subprocess.PIPE) as process:
        assert process.stderr is not None
        question = b""
        while not question.endswith(b"[y/N]:"):
            question += process.stderr.read(1)
        # A signal just before it waits would be seen when it has read something, and not before.
        status = Path("/proc", str(process.pid), "stat")
        support.until(lambda: ") S " in status.read_text("ascii"), "it waits for the answer")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=support.HANG_SECS) == 130
        assert process.stderr.read() == b" persipubsub: interrupted\n"
    assert lag(config_pth) == 1


# Maintenance


def test_verify(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"some content that is easily found")
    assert run("verify", config_pth).stdout == "queue: sound\n"
    path = tmp_path / "queue" / "data.mdb"
    path.write_bytes(path.read_bytes().replace(b"some content", b"what content"))
    process = run("verify", config_pth, exit_code=1)
    assert process.stdout == "queue: 1 finding\n" and "checksum" in process.stderr
    found = json.loads(run("verify", config_pth, "--json", exit_code=1).stdout)
    assert len(found["queue"]["findings"]) == 1


def test_compact_backup_and_restore(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"1")
    target = tmp_path / "backup"
    assert run("backup", config_pth, target).stdout.endswith(f"{target}, verified\n")
    assert "there already" in run("backup", config_pth, target, exit_code=1).stderr
    support.send(config_pth, b"2")
    with Sub("sub", config_pth):
        for arguments in [["compact"], ["restore", str(target), "--yes"], ["drop-queue", "--yes"]]:
            process = run(arguments[0], config_pth, *arguments[1:], exit_code=1)
            assert f"process {os.getpid()}" in process.stderr
    run("restore", config_pth, target, exit_code=1)
    assert lag(config_pth) == 2
    assert run("restore", config_pth, target, stdin=b"y\n").stdout == \
        "queue: restored, with 1 message\n"
    assert lag(config_pth) == 1
    found = json.loads(run("compact", config_pth, "--json").stdout)["queue"]
    assert found["before_bytes"] >= found["after_bytes"] > 0


def test_seek(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"1", b"2", b"3")
    for position, places in {
            1: ("beginning", "0", "@0", "2001-02-03", "2001-02-03T04:05:06Z", "-1h", "-1h30m"),
            2: ("2", ),
            4: ("end", "99", "@4e9", "2150-02-03 04:05+01:00", "-0.5ms")
    }.items():
        for place in places:
            count = 4 - position
            process = call(capfd, "seek", config_pth, "sub", "--to", place)
            assert process.stdout == (
                f"queue: sub goes on from number {position}, with {count} messages to receive\n")
            process = call(capfd, "seek", config_pth, "sub", "--to", place, "--json")
            figures = {"position": position, "lag": count}
            assert json.loads(process.stdout) == {"queue": "queue", "subscriber": "sub", **figures}
            assert lag(config_pth) == count


def test_seek_to_no_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"1")
    for place in ("", "start", "-", "--1h", "-1x", "-inf", "-99999999w", "1.5", "@", "@nan",
                  "@1e99", "24.11.2026", "25:00", "1h", "\u0663"):
        done = call(capfd, "seek", config_pth, "sub", "--to", place)
        assert done.returncode == 2 and f"but got: {place!r}" in done.stderr
        assert lag(config_pth) == 1


def test_subscribers_and_drop(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    process = run("add-subscriber", config_pth, "late")
    assert "late was added" in process.stdout and "queues.queue.subscribers" in process.stdout
    assert "there already" in run("add-subscriber", config_pth, "late").stdout
    support.send(config_pth, b"1")
    assert run("peek", config_pth, "late", "--queue", "queue").stdout.endswith("  1\n")
    assert run("receive", config_pth, "late", "--queue", "queue").stdout == "1\n"
    support.send(config_pth, b"2")
    process = run("remove-subscriber", config_pth, "late", stdin=b"y\n")
    assert "with 1 message that" in process.stderr and "late was removed" in process.stdout
    process = run("remove-subscriber", config_pth, "late", exit_code=1)
    assert "'late'" in process.stderr
    (tmp_path / "queue" / "notes").touch()
    run("drop-queue", config_pth, exit_code=1)
    assert "notes" in run("drop-queue", config_pth, stdin=b"y\n").stdout
    assert os.listdir(tmp_path / "queue") == ["notes"]


# What users do wrong


def outcome(capfd: pytest.CaptureFixture[str], *arguments: object) -> int:
    """Run a command in this process: one line on stderr, no traceback, nothing on stdout."""
    done = call(capfd, *arguments)
    assert done.stdout == "" and done.stderr, arguments
    if done.returncode in (1, 3):
        assert len(done.stderr.splitlines()) == 1, (arguments, done.stderr)
        assert done.stderr.startswith("persipubsub: ")
    return done.returncode


def wrong_files(directory: Path) -> Iterator[Path]:
    yield directory / "missing.json"
    yield directory
    for name, content in [("empty", b""), ("list", b"[]"), ("binary", bytes(range(256))),
                          ("half", b'{"queues": {'), ("nested", b"[" * 100000)]:
        path = directory / (f"{name}.json")
        path.write_bytes(content)
        yield path


@pytest.mark.parametrize("name", sorted(set(USERS) - {"check-config"}))
def test_wrong_configuration_file(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                  name: str) -> None:
    for path in wrong_files(tmp_path):
        assert outcome(capfd, name, path, *ARGUMENTS.get(name, [])) == (3 if name == "check" else 1)


@pytest.mark.parametrize("name", sorted(set(USERS) - {"check", "check-config", "init", "metrics"}))
def test_queue_that_can_not_be_used(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                    name: str) -> None:
    arguments = [
        str(tmp_path / argument) if argument in ("target", "backup") else argument
        for argument in ARGUMENTS.get(name, [])
    ]
    config_pth = support.write_config(tmp_path)
    # Not initialized
    assert outcome(capfd, name, config_pth, *arguments) == 1
    # No rights, for root neither
    nowhere = support.write_config(tmp_path, name="nowhere.json", path="/proc/queue")
    assert outcome(capfd, name, nowhere, *arguments) == 1
    # Another program's
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue" / "notes").write_text("precious")
    assert outcome(capfd, name, config_pth, *arguments) == 1
    (tmp_path / "queue" / "notes").unlink()
    # Damaged
    control.initialize_all_dbs(config_pth)
    if name in ("verify", "drop-queue"):
        return
    os.truncate(tmp_path / "queue" / "data.mdb", 5000)
    assert outcome(capfd, name, config_pth, *arguments) == 1


WRONG_USAGE = [
    *(line.split() for line in
      ("nothing-of-this-name", "stat", "stat CONFIG --queue missing", "stat CONFIG --nothing",
       "peek CONFIG", "peek CONFIG sub --number 0", "peek CONFIG sub --number many",
       "tail CONFIG --number -1", "receive CONFIG sub --timeout -1",
       "receive CONFIG sub --format x", "receive CONFIG sub --directory /missing", "backup CONFIG",
       "metrics CONFIG --port 65536", "stat CONFIG --interval 0", "stat CONFIG --interval nan",
       "stat CONFIG --interval 2h", "stat CONFIG --interval 1e3", "receive CONFIG sub --timeout 1y",
       "stat --config", "delete CONFIG sub", "completion tcsh", "completion",
       "seek CONFIG sub --to end --queue missing", "send CONFIG pub --queue missing")),
    ["receive", "CONFIG", "sub", "--timeout", "9" * 400],
    ["tail", "CONFIG", "--number", "1" * 5000],
    ["seek", "CONFIG", "sub", "--to", "end", "--queue", ""],
]


def test_wrong_usage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config_pth = support.make_queue(tmp_path)
    for arguments in WRONG_USAGE:
        assert outcome(capfd, *(config_pth if one == "CONFIG" else one for one in arguments)) == 2


MISSING = [
    "peek nobody", "receive nobody", "receive nobody --queue queue", "send nobody",
    "remove-subscriber nobody", "restore /missing --yes", "restore / --yes",
    "restore /dev/zero --yes", "backup /", "backup /missing/backup", "add-subscriber ",
    "add-subscriber queues", "add-subscriber \udcff", "receive \udcff --queue queue",
    "peek \udcff --queue queue", "seek \udcff --to end --queue queue", "remove-subscriber \udcff"
]


def test_what_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    nowhere = support.write_config(tmp_path, path="/proc/queue")
    assert outcome(capfd, "init", nowhere) == 1
    config_pth = support.make_queue(tmp_path)
    for line in MISSING:
        name, *arguments = line.split(" ")
        assert outcome(capfd, name, config_pth, *arguments) == 1
    for path in ("/missing", "/"):
        done = call(capfd, "send", config_pth, "pub", path)
        err = done.stderr.splitlines()
        assert (done.returncode, err[0], len(err)) == (1, "0 messages sent", 2)


def test_too_large_message(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, HWM_LMDB_SIZE_BYTES=100)
    process = run("send", config_pth, "pub", "--lines", stdin=b"1\n" + b"x" * 101, exit_code=1)
    assert process.stderr.splitlines()[0] == "1 message sent"
    assert "HWM_LMDB_SIZE_BYTES" in process.stderr
    assert lag(config_pth) == 1


# Speed


def test_stat_is_fast_however_much_waits(tmp_path: Path) -> None:
    count = int(os.environ.get("PERSIPUBSUB_STAT_MESSAGES", "100000"))
    subscribers = [f"sub{index:03}" for index in range(100)]
    publishers = {"pub": subscribers, "some": subscribers[:10]}
    config_pth = support.make_queue(tmp_path,
                                    publishers,
                                    subscribers,
                                    MAX_MSGS_NUM=2 * count,
                                    HWM_LMDB_SIZE_BYTES=1 << 40,
                                    max_db_size_bytes=1 << 34,
                                    durability="os")
    with Pub("pub", config_pth) as pub, Pub("some", config_pth) as some:
        for index in range(count // 1000):
            (some if index % 10 == 0 else pub).send_many([b"x" * 50] * 1000)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        statistics = control.statistics(config_pth)["queue"]
        seconds.append(time.perf_counter() - begin)
    print(f"statistics of {count} messages and 100 subscribers: {1000.0 * min(seconds):.1f} ms")
    assert statistics.messages == count
    assert statistics.subscribers[0].lag == count
    assert statistics.subscribers[99].lag == count - count // 10
    # Generous: it takes milliseconds; a walk through the messages would take seconds.
    assert min(seconds) < 1.0
