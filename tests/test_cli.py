"""Test the command line, each command as a process of its own."""

# pylint: disable=missing-function-docstring

import base64
import codecs
import contextlib
import io
import json
import os
import pathlib
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import click.testing
import prometheus_client
import pytest
import rich.console

import persipubsub
import persipubsub.cli.commands
import persipubsub.control
import persipubsub.metrics
import persipubsub.publisher
import persipubsub.queue
import persipubsub.statistics
import persipubsub.subscriber
from persipubsub.cli import _text, _view
from tests import jetstream_server, support

_ROOT = pathlib.Path(__file__).resolve().parent.parent

COMMANDS: Mapping[str, click.Command] = persipubsub.cli.commands.commands.commands

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
    "metrics": ["--port", "0"],
    # Without it, there is no such queue in the file, and nothing to do.
    "dead-letters": ["--queue", "queue"],
}


def start(*arguments: object, prefix: Sequence[str] = (),
          **options: Any) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ, PYTHONPATH=str(_ROOT), COLUMNS="110")
    environment.pop("PYTHONUNBUFFERED", None)
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


def make(directory: pathlib.Path, **changes: Any) -> pathlib.Path:
    config_pth = support.write_config(directory, **changes)
    persipubsub.control.initialize_all_dbs(config_pth)
    return config_pth


def send(config_pth: pathlib.Path, *messages: bytes) -> None:
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        pub.send_many(messages)


def lag(config_pth: pathlib.Path) -> int:
    return persipubsub.control.statistics(config_pth)["queue"].subscribers[0].lag


# The commands as such


def test_every_command_has_help_with_an_example() -> None:
    runner = click.testing.CliRunner()
    for name, command in COMMANDS.items():
        result = runner.invoke(persipubsub.cli.commands.commands, [name, "--help"])
        assert result.exit_code == 0
        assert re.search(fr"\n  Examples?:\n      .*persipubsub {name} ", result.output), name
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"config", "--queue", "--json"} <= options, name


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
    lines = re.findall(r"persipubsub ([a-z-]+) /?[\w./-]*config\.json(.*)", text)
    assert len(lines) >= len(COMMANDS)
    for name, rest in lines:
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        for option in re.findall(r"(?<!\S)--[a-z]+", rest):
            assert option in known, (name, option)


def test_version_and_help_and_no_command() -> None:
    assert run("--version").stdout == f"persipubsub, version {persipubsub.__version__}\n"
    assert "check-config" in run("--help").stdout
    assert "check-config" in run(exit_code=2).stderr


def test_console_script_is_there() -> None:
    text = (_ROOT / "setup.py").read_text(encoding="utf-8")
    assert '"persipubsub = persipubsub.__main__:main"' in text


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_it_says_how_to_install_it(missing: str) -> None:
    process = support.run_python(
        "import sys, runpy; sys.modules[sys.argv.pop()] = None\n"
        "runpy.run_module('persipubsub', run_name='__main__')", missing)
    assert process.returncode == 1
    assert process.stderr == (f"persipubsub: the command line needs {missing}. Install it with: "
                              f"pip install 'persipubsub[cli]'\n")


def test_metrics_without_the_extra(tmp_path: pathlib.Path) -> None:
    process = support.run_python(
        "import sys, runpy; sys.modules['prometheus_client'] = None\n"
        "runpy.run_module('persipubsub', run_name='__main__')", "metrics",
        support.write_config(tmp_path))
    assert process.returncode == 1
    assert "pip install 'persipubsub[metrics]'" in process.stderr
    assert "Traceback" not in process.stderr


def test_what_would_change_a_terminal_is_escaped() -> None:
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for one in map(chr, range(sys.maxunicode + 1)):
        expected = one
        if (unicodedata.category(one) in ("Cc", "Zl", "Zp")
                or unicodedata.bidirectional(one) in directions):
            expected = one.encode("unicode_escape").decode("ascii")
        assert _text.printable(f"a{one}") == f"a{expected}", hex(ord(one))


# Closed streams


def closed(redirection: str) -> list[str]:
    """Return what starts the command behind it with a stream closed, as ``>&-`` does in a shell."""
    return ["sh", "-c", f'exec "$0" "$@" {redirection}']


@pytest.mark.parametrize("command",
                         ["stat", "init", "send pub --message x", "receive sub", "stat --json"])
def test_closed_output(tmp_path: pathlib.Path, command: str) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"first")
    name, *rest = command.split()
    process = run(name, config_pth, *rest, prefix=closed(">&-"), exit_code=1)
    assert process.stderr == ("persipubsub: Expected an open standard output, but got: it is "
                              "closed. To do without, send it to /dev/null.\n")
    # Nothing was sent, and nothing was received to be lost.
    assert persipubsub.control.statistics(config_pth)["queue"].subscribers[0].lag == 1


def test_closed_error_output(tmp_path: pathlib.Path) -> None:
    process = run("stat", tmp_path / "missing.json", prefix=closed("2>&-"), exit_code=1)
    assert (process.stdout, process.stderr) == ("", "")


def test_closed_input(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    process = run("send", config_pth, "pub", prefix=closed("<&-"), exit_code=1)
    assert process.stderr == ("0 messages sent\npersipubsub: Expected to read the standard input, "
                              "but got: it is closed\n")
    send(config_pth, b"first")
    for name in "clear", "drop-queue":
        process = run(name, config_pth, prefix=closed("<&-"), exit_code=1)
        assert process.stderr == "\npersipubsub: nothing was done\n"
    assert persipubsub.control.statistics(config_pth)["queue"].messages == 1


@pytest.mark.parametrize("options", [[], ["--lines"]])
def test_input_that_does_not_block_is_read_to_its_end(tmp_path: pathlib.Path,
                                                      options: list[str]) -> None:
    config_pth = make(tmp_path)
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
    contents = [one.content for one in persipubsub.control.peek(config_pth, "sub", 3)]
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
                                                ("check-config nowhere.json", 1),
                                                ("send CONFIG pub --message x", 0)])
def test_complaints_that_nobody_reads(tmp_path: pathlib.Path, command: str, exit_code: int,
                                      kind: str) -> None:
    """The exit code is as if they were read, and who was not asked did not agree."""
    config_pth = make(tmp_path)
    send(config_pth, b"first")
    with unread(kind) as descriptor:
        process = start(*command.replace("CONFIG", str(config_pth)).split(),
                        stdin=subprocess.PIPE,
                        stderr=descriptor)
        process.communicate(b"y\n", timeout=support.HANG_SECS)
    assert process.returncode == exit_code
    expected = 2 if exit_code == 0 else 1
    assert persipubsub.control.statistics(config_pth)["queue"].messages == expected


# Queues


def test_init_and_stat(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    expected = f"queue: ready in {tmp_path / 'queue'}\n"
    assert run("init", config_pth).stdout == expected
    assert json.loads(run("init", config_pth, "--json").stdout) == {
        "queue": {
            "path": str(tmp_path / "queue")
        }
    }
    send(config_pth, b"x" * 1000, b"y")
    lines = run("stat", config_pth).stdout.splitlines()
    assert re.match(r"QUEUE +MESSAGES +OF MARK +BYTES", lines[0])
    assert re.match(r"queue +2 +<1 % +1\.0 kB", lines[1])
    assert re.match(r"sub +queue +2 +0 +0", lines[4])
    found = json.loads(run("stat", config_pth, "--json").stdout)["queue"]
    assert (found["messages"], found["message_bytes"], found["next_number"]) == (2, 1001, 3)
    assert found["message_share"] == 2e-6
    assert found["subscribers"][0]["in_flight"] == 0


def test_stat_counts_what_is_in_flight(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    send(config_pth, *[b"x"] * 10)
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        consumer = queue.consumer("sub")
        leases = [consumer.take(timeout=0), consumer.take(timeout=0, max_messages=3)]
        found = json.loads(run("stat", config_pth, "--json").stdout)["queue"]
        assert found["subscribers"][0]["in_flight"] == 4
        for lease in leases:
            assert lease is not None
            lease.acknowledge()
    found = json.loads(run("stat", config_pth, "--json").stdout)["queue"]
    assert (found["subscribers"][0]["in_flight"], found["subscribers"][0]["lag"]) == (0, 6)


def test_one_queue_that_fails_does_not_hide_the_others(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    config = json.loads(config_pth.read_text())
    config["queues"]["missing"] = dict(config["queues"]["queue"], path=str(tmp_path / "missing"))
    config_pth.write_text(json.dumps(config))
    process = run("stat", config_pth, exit_code=1)
    assert re.search(r"^queue +0 ", process.stdout, re.MULTILINE)
    assert "persipubsub init" in process.stderr and len(process.stderr.splitlines()) == 1
    process = run("stat", config_pth, "--json", exit_code=1)
    assert set(json.loads(process.stdout)) == {"queue", "missing"}
    assert json.loads(process.stdout)["missing"]["error"].startswith("Expected")
    run("stat", config_pth, "--queue", "queue")
    process = run("tail", config_pth, exit_code=2)
    assert "--queue" in process.stderr


def keep_first_otherwise(config_pth: pathlib.Path) -> None:
    """Add a queue in front of the other one, kept with another durability than the file says."""
    config = json.loads(config_pth.read_text())
    first = dict(config["queues"]["queue"], path=str(config_pth.parent / "first"))
    config["queues"] = {"first": first, **config["queues"]}
    config_pth.write_text(json.dumps(config))
    persipubsub.control.initialize_all_dbs(config_pth)
    first["durability"] = "os"
    config_pth.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["stat", "verify", "prune"])
def test_one_queue_that_is_kept_otherwise_does_not_hide_the_others(tmp_path: pathlib.Path,
                                                                   name: str) -> None:
    config_pth = make(tmp_path)
    keep_first_otherwise(config_pth)
    process = run(name, config_pth, exit_code=1)
    assert re.search(r"^queue\b", process.stdout, re.MULTILINE)
    assert "durability" in process.stderr and len(process.stderr.splitlines()) == 1
    found = json.loads(run(name, config_pth, "--json", exit_code=1).stdout)
    assert "durability" in found["first"]["error"] and "error" not in found["queue"]


@pytest.mark.parametrize("name", ["verify", "compact"])
def test_queue_on_servers_does_not_hide_directories(tmp_path: pathlib.Path, name: str) -> None:
    config_pth = make(tmp_path)
    config = json.loads(config_pth.read_text())
    first = dict(config["queues"]["queue"], path="nats://127.0.0.1:1/S")
    config["queues"] = {"first": first, **config["queues"]}
    config_pth.write_text(json.dumps(config))
    process = run(name, config_pth, exit_code=1)
    assert process.stdout.startswith("queue: ")
    assert "directory of this machine" in process.stderr and len(process.stderr.splitlines()) == 1


def test_check_config_lists_all_problems(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, max_db_num=-1, MAX_MSGS_NUM=True)
    process = run("check-config", config_pth, exit_code=1)
    assert process.stdout == ""
    lines = process.stderr.splitlines()
    assert len(lines) == 3 and lines[2].endswith(f"2 problems in {config_pth}")
    assert "max_db_num" in lines[0] and "MAX_MSGS_NUM" in lines[1]
    found = json.loads(run("check-config", config_pth, "--json", exit_code=1).stdout)
    assert found == {"problems": lines[:2], "warnings": []}
    support.write_config(tmp_path)
    assert "fine: 1 queue, 1 publisher, 1 subscriber" in run("check-config", config_pth).stdout


def test_prune_and_clear(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"1", b"2")
    assert run("prune", config_pth).stdout.startswith("queue: 0 deliveries")
    process = run("clear", config_pth, stdin=b"n\n", exit_code=1)
    assert "Drop 2 messages of queue?" in process.stderr and process.stdout == ""
    run("clear", config_pth, exit_code=1)
    assert lag(config_pth) == 2
    assert run("clear", config_pth, stdin=b"y\n").stdout == "queue: cleared, 2 deliveries unread\n"
    assert lag(config_pth) == 0
    assert json.loads(run("clear", config_pth, "--yes", "--json").stdout) == {
        "queue": {
            "dropped": 0
        }
    }


# Messages


def test_send_and_receive(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    (tmp_path / "file").write_bytes(b"\0\xff\n")
    assert run("send", config_pth, "pub", "--message", "hello", tmp_path / "file").stderr == \
        "2 messages sent\n"
    run("send", config_pth, "pub", stdin=b"all\nof\nit")
    assert json.loads(
        run("send", config_pth, "pub", "--lines", "--json", stdin=b"a\n\nlast").stdout) == {
            "sent": 3
        }
    assert lag(config_pth) == 6

    assert run("receive", config_pth, "sub").stdout == "hello\n"
    process = start("receive", config_pth, "sub", "--format", "raw")
    assert process.communicate(timeout=support.HANG_SECS)[0] == b"\0\xff\n"
    found = json.loads(run("receive", config_pth, "sub", "--json").stdout)
    assert base64.b64decode(found["base64"]) == b"all\nof\nit"
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    lines = run("receive", config_pth, "sub", "--number", "0", "--directory", inbox).stdout
    paths = [pathlib.Path(line) for line in lines.splitlines()]
    assert [path.read_bytes() for path in paths] == [b"a", b"", b"last"]
    assert sorted(inbox.iterdir()) == paths
    process2 = run("receive", config_pth, "sub", exit_code=1)
    assert process2.stderr == "persipubsub: no message for sub within 0 seconds\n"


@jetstream_server.needs_server
def test_send_and_receive_on_servers(tmp_path: pathlib.Path,
                                     servers: jetstream_server.Servers) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers)
    run("send", config_pth, "pub", "--lines", stdin=b"a\nb")
    assert run("receive", config_pth, "sub").stdout == "a\n"
    found = json.loads(run("receive", config_pth, "sub", "--json", "--timeout", "10").stdout)
    assert base64.b64decode(found["base64"]) == b"b" and found["number"] == 2
    assert run("receive", config_pth, "sub", exit_code=1).stderr == \
        "persipubsub: no message for sub within 0 seconds\n"


def test_receive_waits(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    with start("receive", config_pth, "sub", "--timeout", "inf", "--number", "2") as process:
        assert process.stdout is not None
        send(config_pth, b"1")
        assert process.stdout.readline() == b"1\n"
        send(config_pth, b"2")
        assert process.stdout.readline() == b"2\n"
        assert process.wait(timeout=support.HANG_SECS) == 0


def test_lines_are_sent_as_they_come(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path, MAX_MSGS_NUM=100)
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


def test_peek(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"hello", "w\xf6rld\n\x1b[2J".encode(), b"\xff")
    lines = run("peek", config_pth, "sub").stdout.splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["hello", "w\xf6rld\\n\\x1b[2J", "\\xff"]
    numbers = [int(line.split()[0]) for line in lines]
    lines = run("peek", config_pth, "sub", "--from", numbers[1], "--number", 1, "--format",
                "hex").stdout.splitlines()
    assert len(lines) == 1 and lines[0].endswith("77c3b6726c640a1b5b324a")
    found = json.loads(run("peek", config_pth, "sub", "--number", 1, "--json").stdout)
    assert (found["number"], found["base64"]) == (numbers[0], "aGVsbG8=")
    assert run("peek", config_pth, "sub", "--from", 10**23).stdout == ""
    assert lag(config_pth) == 3


class Terminal:
    """Run a command in a pseudo-terminal and read what it shows."""

    def __init__(self, *arguments: object, **options: Any) -> None:
        """Start the command."""
        self._master, slave = pty.openpty()
        # Its own session, so that Ctrl-C reaches it and nobody else.
        self.process = start(*arguments,
                             stdin=slave,
                             stdout=slave,
                             stderr=slave,
                             start_new_session=True,
                             preexec_fn=lambda: self._control(slave),
                             **options)
        os.close(slave)
        # A read may end in the middle of a character. Ctrl-C throws away what the terminal still
        # holds, so half a character may be lost for good: it is replaced, no command is at fault.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""

    @staticmethod
    def _control(slave: int) -> None:
        import fcntl  # pylint: disable=import-outside-toplevel
        import termios  # pylint: disable=import-outside-toplevel
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._master, keys)

    def wait_for(self, pattern: str) -> None:
        """Read until something was shown."""
        deadline = time.monotonic() + support.HANG_SECS
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, f"Waited in vain for {pattern!r} in {self.text!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the command ended
                    self.text += self._decoder.decode(os.read(self._master, 1 << 16))

    def end(self, exit_code: int) -> None:
        """Wait for the end."""
        with contextlib.suppress(OSError):
            while select.select([self._master], [], [], support.HANG_SECS)[0]:
                found = os.read(self._master, 1 << 16)
                if not found:
                    break
                self.text += self._decoder.decode(found)
        assert self.process.wait(timeout=support.HANG_SECS) == exit_code, self.text
        assert "Traceback" not in self.text


def test_tail_in_a_terminal(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"one", b"two")
    with Terminal("tail", config_pth, "--number", "1") as terminal:
        terminal.wait_for("two")
        assert "one" not in terminal.text
        send(config_pth, b"three")
        terminal.wait_for("three")
        terminal.type(b"\x03")
        terminal.end(exit_code=130)
    assert "persipubsub: interrupted" in terminal.text
    assert lag(config_pth) == 3


def test_stat_watch_in_a_terminal(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    with Terminal("stat", config_pth, "--watch", "--interval", "0.1") as terminal:
        terminal.wait_for("MAX_MSGS_NUM")
        terminal.wait_for("sent.*/s")
        send(config_pth, *[b"x"] * 777)
        terminal.wait_for("777")
        terminal.wait_for("[\u2581-\u2588]")
        terminal.type(b"\x03")
        terminal.end(exit_code=130)
    # The cursor is shown again.
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_stat_watch_in_a_terminal_that_can_not_be_drawn_over(tmp_path: pathlib.Path,
                                                             term: str) -> None:
    config_pth = make(tmp_path)
    with Terminal("stat",
                  config_pth,
                  "--watch",
                  "--interval",
                  "0.1",
                  prefix=["env", f"TERM={term}"]) as terminal:
        terminal.wait_for("(?s)SUBSCRIBER.*SUBSCRIBER")
        terminal.type(b"\x03")
        terminal.end(exit_code=130)
    assert "\x1b[" not in terminal.text


def drawn(width: int, figures: Mapping[str, Any], rounds: int) -> str:
    """Draw a queue with two subscribers, after some looks."""
    history = _view.History()
    for index in range(rounds):
        numbers = {"lag": 0, "in_flight": 0, "failed": 0, "acknowledged": 5, **figures}
        numbers["acknowledged"] += 123456 * index
        statistics = persipubsub.statistics.QueueStatistics(
            path="/srv/app/queues/greetings",
            messages=1234567,
            message_share=.9,
            message_bytes=123456789,
            byte_share=.3,
            file_bytes=1 << 33,
            file_share=.4,
            oldest_age_seconds=1234.,
            age_share=.1,
            next_number=10**9 + 123456 * index,
            commits=987654321,
            subscribers=tuple(
                persipubsub.statistics.SubscriberStatistics(subscriber=name,
                                                            position=1,
                                                            cleared=0,
                                                            skipped=0,
                                                            corrupt=0,
                                                            dropped_by_timeout=numbers["failed"],
                                                            dropped_by_mark=numbers["failed"],
                                                            dead_lettered=7,
                                                            seconds_since_acknowledged=119.9,
                                                            **numbers)
                for name in ("archive-service-eu", "index")))
        history.add(float(index), statistics)
    console = rich.console.Console(width=width, file=io.StringIO())
    console.print(_view.draw({"greetings": statistics}, {}, {"greetings": history}, 5, width))
    return cast(io.StringIO, console.file).getvalue()


@pytest.mark.parametrize("rounds", [1, 25])
@pytest.mark.parametrize("figures", [{}, {
    "lag": 1234567,
    "in_flight": 64,
    "failed": 12345,
    "acknowledged": 87654321
}])
def test_nothing_is_cut_whatever_the_width(figures: Mapping[str, Any], rounds: int) -> None:
    columns = []
    for width in range(66, 161):
        text = drawn(width, figures, rounds)
        assert "\u2026" not in text
        assert "archive-service-eu  " in text and f" {figures.get('lag', 0):,} " in text
        assert max(map(len, text.splitlines())) <= width
        lines = text.splitlines()
        columns.append(len(next(line for line in lines if " lag " in line).split()))
        assert all(line[0] + line[-1] in ("\u256d\u256e", "\u2502\u2502", "\u2570\u256f")
                   for line in lines)
    # The wider, the more.
    assert columns == sorted(columns) and columns[0] < columns[-1]
    assert "timeout" in text and ("\u2581" in text or "\u2588" in text) == (rounds > 1)


@pytest.mark.parametrize("rounds", [1, 25])
@pytest.mark.parametrize("count", [0, 1234567])
def test_figures_are_whole_in_a_very_narrow_terminal(count: int, rounds: int) -> None:
    for width in range(32, 66):
        text = drawn(width, {"lag": count, "failed": 12345}, rounds)
        assert "\u2026" not in text and _text.show_seconds(1234.) in text, text
        lines = text.replace("in flight", "in_flight").splitlines()
        assert max(map(len, lines)) <= width
        # Each column that is named has its figures.
        heads = next(line for line in lines if " lag " in line).split()
        row = next(line for line in lines if " index " in line).split()
        assert row[2] == f"{count:,}"
        assert len([cell for cell in row if cell not in ("s", "min")]) == len(heads), text


def test_stat_watch_for_machines(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    out = run("stat", config_pth, "--watch", "--count", "3", "--interval", "0.1", "--json").stdout
    assert [json.loads(line)["queue"]["messages"] for line in out.splitlines()] == [0, 0, 0]


def test_stat_as_a_picture(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    run("stat", config_pth, "--svg", tmp_path / "stat.svg")
    text = (tmp_path / "stat.svg").read_text(encoding="utf-8")
    assert text.startswith("<svg") and "MAX_MSGS_NUM" in text
    process = run("stat", config_pth, "--svg", tmp_path / "missing" / "stat.svg", exit_code=1)
    assert "missing" in process.stderr


# Closed pipes and Ctrl-C


@pytest.mark.parametrize(
    "arguments", [["tail", "--number", "100"], ["stat"], ["stat", "--watch", "--interval", "0.1"],
                  ["peek", "sub", "--number", "100"]])
def test_closed_pipe_is_quiet_and_loses_nothing(tmp_path: pathlib.Path,
                                                arguments: list[str]) -> None:
    config_pth = make(tmp_path)
    send(config_pth, *[b"x" * 1000] * 200)
    with start(arguments[0], config_pth, *arguments[1:]) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=support.HANG_SECS) == 0
        assert process.stderr.read() == b""
    assert lag(config_pth) == 200


def test_closed_pipe_leaves_what_was_not_written(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    send(config_pth, *[b"%d" % index * 1000 for index in range(200)])
    with start("receive", config_pth, "sub", "--number", "0") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"0" * 1000 + b"\n"
        process.stdout.close()
        assert process.wait(timeout=support.HANG_SECS) == 0
        assert process.stderr.read() == b""
    # A pipe holds some messages that were written and never read; all others are still there.
    rest = lag(config_pth)
    assert 0 < rest < 200
    assert persipubsub.control.peek(config_pth, "sub")[0].content == b"%d" % (200 - rest) * 1000


def test_full_output_leaves_the_message(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"x")
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
def test_message_that_was_written_in_part_stays(tmp_path: pathlib.Path, options: list[str],
                                                prefix: list[str]) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"x" * 1000000)
    with start("receive", config_pth, "sub", *options, prefix=prefix) as process:
        assert process.stdout is not None
        # A pipe that takes a part of a write, and no more.
        os.read(process.stdout.fileno(), 10)
        process.stdout.close()
        assert process.wait(timeout=support.HANG_SECS) == 0
    assert lag(config_pth) == 1


@pytest.mark.parametrize("prefix", [[], UNBUFFERED])
@pytest.mark.parametrize("options", [[], ["--json"], ["--format", "raw"]])
def test_output_that_does_not_block_gets_all(tmp_path: pathlib.Path, options: list[str],
                                             prefix: list[str]) -> None:
    config_pth = make(tmp_path)
    send(config_pth, *[b"x" * 5000] * 100)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(reader, "rb") as output:
        process = start("receive",
                        config_pth,
                        "sub",
                        "--number",
                        "100",
                        *options,
                        prefix=prefix,
                        stdout=writer)
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


def test_each_line_is_written_at_once_without_buffers(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    with start("stat", config_pth, "--watch", "--interval", "3600", "--json",
               prefix=UNBUFFERED) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], support.HANG_SECS)[0]
        process.kill()


@pytest.mark.parametrize(
    "arguments",
    [["tail", "--number", "1"], ["receive", "sub", "--number", "2", "--timeout", "inf"],
     ["stat", "--watch", "--json"], ["metrics", "--port", "0"]])
def test_interrupted(tmp_path: pathlib.Path, arguments: list[str]) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"x")
    with start(arguments[0], config_pth, *arguments[1:]) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=support.HANG_SECS) == 130
        assert process.stderr.read() == b"persipubsub: interrupted\n"


@pytest.mark.parametrize(
    "arguments", [["clear"], ["drop-queue"], ["remove-subscriber", "sub"], ["restore", "backup"]])
def test_interrupted_at_a_question(tmp_path: pathlib.Path, arguments: list[str]) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"x")
    with start(arguments[0], config_pth, *arguments[1:], stdin=subprocess.PIPE) as process:
        assert process.stderr is not None
        question = b""
        while not question.endswith(b"[y/N]: "):
            question += process.stderr.read(1)
        # A signal just before it waits would be seen when it has read something, and not before.
        status = pathlib.Path("/proc", str(process.pid), "stat")
        support.until(lambda: ") S " in status.read_text("ascii"), "it waits for the answer")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=support.HANG_SECS) == 130
        assert process.stderr.read() == b"\npersipubsub: interrupted\n"
    assert lag(config_pth) == 1


# Maintenance


def test_verify(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"some content that is easily found")
    assert run("verify", config_pth).stdout == "queue: sound\n"
    path = tmp_path / "queue" / "data.mdb"
    path.write_bytes(path.read_bytes().replace(b"some content", b"what content"))
    process = run("verify", config_pth, exit_code=1)
    assert process.stdout == "queue: 1 finding\n" and "checksum" in process.stderr
    found = json.loads(run("verify", config_pth, "--json", exit_code=1).stdout)
    assert len(found["queue"]["findings"]) == 1


def test_verify_shows_its_progress_in_a_terminal(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    send(config_pth, *[b"x" * 100] * 20000)
    with Terminal("verify", config_pth) as terminal:
        terminal.end(exit_code=0)
    assert "queue: sound" in terminal.text and "%" in terminal.text


def test_compact_backup_and_restore(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"1")
    target = tmp_path / "backup"
    assert run("backup", config_pth, target).stdout.endswith(f"{target}, verified\n")
    assert "there already" in run("backup", config_pth, target, exit_code=1).stderr
    send(config_pth, b"2")
    with persipubsub.queue.Queue(support.settings(config_pth)):
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


@pytest.mark.parametrize("place, position", [("beginning", 1), ("end", 4), ("2", 2), ("0", 1),
                                             ("99", 4), ("@0", 1), ("@4e9", 4), ("2001-02-03", 1),
                                             ("2001-02-03T04:05:06Z", 1),
                                             ("2150-02-03 04:05+01:00", 4)])
def test_seek(tmp_path: pathlib.Path, place: str, position: int) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"1", b"2", b"3")
    count = 4 - position
    process = run("seek", config_pth, "sub", "--to", place)
    assert process.stdout == "queue: sub goes on from number {}, with {} to receive\n".format(
        position, {1: "1 message"}.get(count, f"{count} messages"))
    found = json.loads(run("seek", config_pth, "sub", "--to", place, "--json").stdout)
    assert found == {"queue": "queue", "subscriber": "sub", "position": position, "lag": count}
    assert lag(config_pth) == count


@pytest.mark.parametrize("place", ["", "start", "-1", "1.5", "@", "@nan", "@1e99", "24.11.2026"])
def test_seek_to_no_place(tmp_path: pathlib.Path, place: str) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"1")
    process = run("seek", config_pth, "sub", "--to", place, exit_code=2)
    assert f"but got: {place!r}" in process.stderr
    assert lag(config_pth) == 1


def test_subscribers_and_drop(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    process = run("add-subscriber", config_pth, "late")
    assert "late was added" in process.stdout and "queues.queue.subscribers" in process.stdout
    assert "there already" in run("add-subscriber", config_pth, "late").stdout
    send(config_pth, b"1")
    assert run("peek", config_pth, "late", "--queue", "queue").stdout.endswith("  1\n")
    assert run("receive", config_pth, "late", "--queue", "queue").stdout == "1\n"
    send(config_pth, b"2")
    process = run("remove-subscriber", config_pth, "late", stdin=b"y\n")
    assert "with 1 message that" in process.stderr and "late was removed" in process.stdout
    process = run("remove-subscriber", config_pth, "late", exit_code=1)
    assert "'late'" in process.stderr
    (tmp_path / "queue" / "notes").touch()
    run("drop-queue", config_pth, exit_code=1)
    assert "notes" in run("drop-queue", config_pth, stdin=b"y\n").stdout
    assert os.listdir(tmp_path / "queue") == ["notes"]


# Metrics


@contextlib.contextmanager
def serving(config_pth: pathlib.Path) -> Iterator[str]:
    with start("metrics", config_pth, "--port", "0", "--json") as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.kill()


def test_metrics_are_served_on_the_loopback_address_only(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path)
    send(config_pth, b"x" * 10, b"y")
    with serving(config_pth) as url:
        with urllib.request.urlopen(url, timeout=support.HANG_SECS) as response:
            text = response.read().decode()
        port = int(url.rpartition(":")[2].partition("/")[0])
        listening = [
            line.split()[1] for name in ["/proc/net/tcp", "/proc/net/tcp6"] if os.path.exists(name)
            for line in pathlib.Path(name).read_text(encoding="ascii").splitlines()[1:]
            if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
        ]
        assert listening == [f"0100007F:{port:04X}"]
        # It has the queue open only while it answers.
        persipubsub.control.compact(config_pth)
        process = run("metrics", config_pth, "--port", port, exit_code=1)
        assert f"127.0.0.1:{port}" in process.stderr
    assert 'persipubsub_up{queue="queue"} 1.0' in text
    assert 'persipubsub_messages{queue="queue"} 2.0' in text
    assert 'persipubsub_message_bytes{queue="queue"} 11.0' in text
    assert 'persipubsub_lag{queue="queue",subscriber="sub"} 2.0' in text
    assert 'persipubsub_share{limit="MAX_MSGS_NUM",queue="queue"} 2e-06' in text
    assert 'persipubsub_dropped_total{queue="queue",reason="mark",subscriber="sub"} 0.0' in text


def test_metrics_tell_which_queue_is_not_there(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    with serving(config_pth) as url:
        with urllib.request.urlopen(url, timeout=support.HANG_SECS) as response:
            assert 'persipubsub_up{queue="queue"} 0.0' in response.read().decode()


def test_servers_that_are_away_do_not_hold_up_other_figures(
        tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persipubsub.metrics, "_SERVER_SECS", 1.0, raising=False)
    config_pth = make(tmp_path)
    send(config_pth, b"x")
    config = json.loads(config_pth.read_text())
    with socket.socket() as silent, socket.socket() as away:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        away.bind(("127.0.0.1", 0))
        for name, one in (("silent", silent), ("away", away), ("away2", away)):
            path = f"nats://127.0.0.1:{one.getsockname()[1]}/{name}"
            config["queues"][name] = {
                **config["queues"]["queue"], "path": path,
                "subscribers": ["other"]
            }
        config_pth.write_text(json.dumps(config))
        registry = prometheus_client.CollectorRegistry()
        registry.register(persipubsub.metrics.Collector(config_pth))
        start_secs = time.monotonic()
        text = prometheus_client.generate_latest(registry).decode()
    assert time.monotonic() - start_secs < 8
    assert 'persipubsub_messages{queue="queue"} 1.0' in text
    assert re.findall("persipubsub_up{.*", text) == [
        'persipubsub_up{queue="queue"} 1.0', 'persipubsub_up{queue="silent"} 0.0',
        'persipubsub_up{queue="away"} 0.0', 'persipubsub_up{queue="away2"} 0.0'
    ]


def test_metrics_of_one_queue(tmp_path: pathlib.Path) -> None:
    for queue_key, expected in (("queue", 1), ("missing", 0)):
        registry = prometheus_client.CollectorRegistry()
        registry.register(persipubsub.metrics.Collector(make(tmp_path), queue_key))
        assert registry.get_sample_value("persipubsub_up", {"queue": queue_key}) == expected
    registry = prometheus_client.CollectorRegistry()
    registry.register(persipubsub.metrics.Collector(tmp_path / "missing.json", "queue"))
    assert registry.get_sample_value("persipubsub_up", {"queue": "queue"}) == 0
    assert registry.get_sample_value("persipubsub_config_up") == 0


# What users do wrong


def outcome(capfd: pytest.CaptureFixture[str], *arguments: object) -> int:
    """Run a command in this process: one line on stderr, no traceback, nothing on stdout."""
    code = persipubsub.cli.commands.main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert out == "", arguments
    assert err and "Traceback" not in err, arguments
    if code == 1:
        assert len(err.splitlines()) == 1 and err.startswith("persipubsub: "), (arguments, err)
    return code


def wrong_files(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    yield directory / "missing.json"
    yield directory
    for name, content in [("empty", b""), ("list", b"[]"), ("binary", bytes(range(256))),
                          ("half", b'{"queues": {'), ("nested", b"[" * 100000)]:
        path = directory / (f"{name}.json")
        path.write_bytes(content)
        yield path


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"check-config"}))
def test_wrong_configuration_file(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str],
                                  name: str) -> None:
    for path in wrong_files(tmp_path):
        assert outcome(capfd, name, path, *ARGUMENTS.get(name, [])) == 1


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"check-config", "init", "metrics"}))
def test_queue_that_can_not_be_used(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str],
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
    persipubsub.control.initialize_all_dbs(config_pth)
    if name in ("verify", "drop-queue"):
        return
    os.truncate(tmp_path / "queue" / "data.mdb", 5000)
    assert outcome(capfd, name, config_pth, *arguments) == 1


def test_init_where_nobody_may_write(tmp_path: pathlib.Path,
                                     capfd: pytest.CaptureFixture[str]) -> None:
    assert outcome(capfd, "init", support.write_config(tmp_path, path="/proc/queue")) == 1


@pytest.mark.parametrize(
    "arguments",
    [["nothing-of-this-name"], ["stat"], ["stat", "CONFIG", "--queue", "missing"],
     ["stat", "CONFIG", "--nothing"], ["peek", "CONFIG"], [
         "peek", "CONFIG", "sub", "--number", "0"
     ], ["peek", "CONFIG", "sub", "--number", "many"], ["tail", "CONFIG", "--number", "-1"],
     ["receive", "CONFIG", "sub", "--timeout", "-1"], ["receive", "CONFIG", "sub", "--format", "x"],
     ["receive", "CONFIG", "sub", "--directory", "/missing"], ["backup", "CONFIG"],
     ["metrics", "CONFIG", "--port", "65536"], ["stat", "CONFIG", "--interval", "0"],
     ["stat", "CONFIG", "--interval", "nan"], ["stat", "CONFIG", "--json", "--svg", "/missing/svg"],
     ["seek", "CONFIG", "sub", "--to", "end", "--queue", "missing"],
     ["seek", "CONFIG", "sub", "--to", "end", "--queue", ""],
     ["send", "CONFIG", "pub", "--queue", "missing"]])
def test_wrong_usage(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str],
                     arguments: list[str]) -> None:
    config_pth = make(tmp_path)
    replaced = [str(config_pth) if argument == "CONFIG" else argument for argument in arguments]
    assert outcome(capfd, *replaced) == 2


@pytest.mark.parametrize(
    "arguments",
    [["peek", "nobody"], ["receive", "nobody"], ["receive", "nobody", "--queue", "queue"],
     ["send", "nobody"], ["send", "pub", "/missing"], ["send", "pub", "/"],
     ["remove-subscriber", "nobody"], ["restore", "/missing", "--yes"], ["restore", "/", "--yes"],
     ["restore", "/dev/zero", "--yes"], ["backup", "/"], ["backup", "/missing/backup"],
     ["add-subscriber", ""], ["add-subscriber", "queues"], ["add-subscriber", "\udcff"],
     ["receive", "\udcff", "--queue", "queue"], ["peek", "\udcff", "--queue", "queue"],
     ["seek", "\udcff", "--to", "end", "--queue", "queue"], ["remove-subscriber", "\udcff"]])
def test_what_is_not_there(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str],
                           arguments: list[str]) -> None:
    config_pth = make(tmp_path)
    if arguments[:2] == ["send", "pub"]:
        code = persipubsub.cli.commands.main([arguments[0], str(config_pth), *arguments[1:]])
        err = capfd.readouterr().err.splitlines()
        assert (code, err[0], len(err)) == (1, "0 messages sent", 2)
        return
    assert outcome(capfd, arguments[0], config_pth, *arguments[1:]) == 1


def test_too_large_message(tmp_path: pathlib.Path) -> None:
    config_pth = make(tmp_path, HWM_LMDB_SIZE_BYTES=100)
    process = run("send", config_pth, "pub", "--lines", stdin=b"1\n" + b"x" * 101, exit_code=1)
    assert process.stderr.splitlines()[0] == "1 message sent"
    assert "HWM_LMDB_SIZE_BYTES" in process.stderr
    assert lag(config_pth) == 1


# Speed

#: What ``stat`` loads of the library in its plain forms. Times wobble, and a module that is loaded
#: in vain does not show in them; whoever needs one more adds it here.
STAT_LOADS = {
    "", "__main__", "_counting", "_engines", "_fork_guard", "_in_flight", "_progress", "_selection",
    "_settings", "cli", "cli._ending", "cli._figures", "cli._plain", "cli._text", "config",
    "environment", "environment._checkpoint", "environment._environment", "environment._files",
    "environment._gate", "environment._line", "environment._map", "environment._mark",
    "environment._opening", "environment._registry", "environment._standard_streams",
    "environment._transactions", "errors", "statistics", "store", "store._attempts",
    "store._blocks", "store._check", "store._clock", "store._databases", "store._header",
    "store._layout", "store._log", "store._positions"
}

#: What it loads besides in the other forms.
STAT_OPTIONS_LOAD = {"cli._shared", "cli._stat", "cli.commands"}

#: What would take long to load, and is for other commands, or for other people than scripts.
SLOW = {
    "aiohttp", "asyncio", "concurrent", "ctypes", "hashlib", "icontract", "logging",
    "multiprocessing", "nats", "prometheus_client", "rich", "shutil", "socket", "ssl", "subprocess",
    "tempfile"
}

#: What nobody loads but click.
SLOW_OF_CLICK = {"click", "dataclasses", "gettext"}


def loaded(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> set[str]:
    """Run a command, and return the names of all modules that it loads."""
    # Not PYTHONPROFILEIMPORTTIME: that leaves out what importlib imports.
    monkeypatch.setenv("PYTHONVERBOSE", "1")
    return set(re.findall(r"^import '([\w.]+)' #", run(*arguments).stderr, re.MULTILINE))


def own(names: set[str]) -> set[str]:
    """Choose those of the library, named from the package on."""
    return {
        name.removeprefix("persipubsub").removeprefix(".")
        for name in names if name.partition(".")[0] == "persipubsub"
    }


@pytest.mark.parametrize("options", [[], ["--json"], ["--queue", "queue"]])
def test_stat_loads_only_what_it_needs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                       options: list[str]) -> None:
    names = loaded(monkeypatch, "stat", make(tmp_path), *options)
    # The module that is run is not imported by name.
    assert own(names) | {"__main__"} == STAT_LOADS
    assert {name.partition(".")[0] for name in names} & (SLOW | SLOW_OF_CLICK) == set()


@pytest.mark.parametrize("options",
                         [["--watch", "--count", "2", "--json"], ["--watch", "--count", "1"]])
def test_stat_with_more_options_loads_only_click_besides(tmp_path: pathlib.Path,
                                                         monkeypatch: pytest.MonkeyPatch,
                                                         options: list[str]) -> None:
    names = loaded(monkeypatch, "stat", make(tmp_path), "--interval", "0.1", *options)
    assert own(names) | {"__main__"} == STAT_LOADS | STAT_OPTIONS_LOAD
    assert {name.partition(".")[0] for name in names} & SLOW == set()
    assert SLOW_OF_CLICK <= names


@pytest.mark.parametrize("options, is_enabled", [([], False), (["--watch", "--count", "1"], True)])
def test_no_garbage_is_collected_while_a_command_is_loaded(tmp_path: pathlib.Path,
                                                           options: list[str],
                                                           is_enabled: bool) -> None:
    process = support.run_python(
        """if True:
        import gc, runpy, sys
        collections = []
        def notice(phase, _):
            if phase == "start" and "persipubsub.cli" in sys.modules:
                collections.append(len(sys.modules))
        gc.callbacks.append(notice)
        try:
            runpy.run_module("persipubsub", run_name="__main__", alter_sys=True)
        finally:
            print(collections, gc.isenabled(), gc.get_freeze_count() > 0, file=sys.stderr)
        """, "stat", make(tmp_path), *options)
    # A command may run for long: only loading it is done without. In its plain forms, "stat" ends
    # by itself. At the exit, there is nothing to collect.
    assert process.stderr == f"[] {is_enabled} True\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_loads_no_other(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    names = {one for one in own(loaded(monkeypatch, name, "--help")) if one.startswith("cli._")}
    function = COMMANDS[name].callback
    assert function is not None
    below = {"cli._ending", "cli._plain", "cli._shared", "cli._text"}
    if name == "stat":
        below.add("cli._figures")
    assert names == below | own({function.__module__})


def test_stat_is_fast_however_much_waits(tmp_path: pathlib.Path) -> None:
    count = int(os.environ.get("PERSIPUBSUB_STAT_MESSAGES", "100000"))
    subscribers = [f"sub{index:03}" for index in range(100)]
    config_pth = make(tmp_path,
                      subscribers=subscribers,
                      publishers={
                          "pub": subscribers,
                          "some": subscribers[:10]
                      },
                      MAX_MSGS_NUM=2 * count,
                      HWM_LMDB_SIZE_BYTES=1 << 40,
                      max_db_size_bytes=1 << 34,
                      durability="os",
                      checkpoint_secs=0)
    with persipubsub.publisher.Pub() as pub, persipubsub.publisher.Pub() as some:
        pub.init(pub_id="pub", config_pth=config_pth)
        some.init(pub_id="some", config_pth=config_pth)
        for index in range(count // 1000):
            (some if index % 10 == 0 else pub).send_many([b"x" * 50] * 1000)
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            statistics = queue.statistics()
            seconds.append(time.perf_counter() - begin)
    print(f"statistics of {count} messages and 100 subscribers: {1000.0 * min(seconds):.1f} ms")
    assert statistics.messages == count
    assert statistics.subscribers[0].lag == count
    assert statistics.subscribers[99].lag == count - count // 10
    # Generous: it takes milliseconds; a walk through the messages would take seconds.
    assert min(seconds) < 1.0
