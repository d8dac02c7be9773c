"""Test examples/quickstart.py as a user runs it: as a program."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from persipubsub import Sub, control
from tests import jetstream_server, support

_SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "quickstart.py"

# Catches a hang, and nothing else: the example gives up by itself before that.
_TIMEOUT_SECS = 400


def _start(tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    (tmp_path / "tmp").mkdir()
    env: dict[str, str] = dict(os.environ, TMPDIR=str(tmp_path / "tmp"))
    return support.start([sys.executable, _SCRIPT, *arguments], cwd=tmp_path, env=env)


def _left(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_nothing_is_lost(tmp_path: Path, durability: str) -> None:
    process = _start(tmp_path, "--files", "300", "--durability", durability)
    out, err = process.communicate(timeout=_TIMEOUT_SECS)

    assert (err, process.returncode) == ("", 0), out
    assert re.search(r"^lost: +0$", out, re.MULTILINE), out
    assert re.search(r"^sent: +300 messages by 2 processes$", out, re.MULTILINE), out
    assert re.search(r"^received: +300 by archive, 300 by index, 300 by checksums$", out,
                     re.MULTILINE), out
    assert re.search(r"^killed: +archive \(PID \d+\) with SIGKILL", out, re.MULTILINE), out
    assert re.search(r"^redelivered: +\d+$", out, re.MULTILINE), out
    assert re.search(r"^throughput: .* MB/s published", out, re.MULTILINE), out
    assert re.search(r"^latency: +p50 .* ms, p99 .* ms", out, re.MULTILINE), out
    assert f"durability {durability}\n" in out
    assert "\x1b" not in out and "\r" not in out, "Expected no progress bar without a terminal"
    assert not _left(tmp_path)


@jetstream_server.needs_server
@pytest.mark.parametrize("nodes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_nothing_is_lost_on_servers(tmp_path: Path, nodes: int) -> None:
    with jetstream_server.running(tmp_path, nodes=nodes) as servers:
        options = {"ack_wait": 2, **({"replicas": nodes} if nodes > 1 else {})}
        process = _start(tmp_path, "--files", "200", "--queue",
                         servers.path("quickstart", **options))
        out, err = process.communicate(timeout=_TIMEOUT_SECS)
    assert (err, process.returncode) == ("", 0), out
    assert re.search(r"^lost: +0$", out, re.MULTILINE), out
    assert re.search(r"^killed: +archive \(PID \d+\) with SIGKILL", out, re.MULTILINE), out
    assert not _left(tmp_path)


def test_loss_is_found(tmp_path: Path) -> None:
    config_pth = tmp_path / "config.json"
    config_pth.write_text('{"index": {"in_queue": "queue"}, '
                          '"queues": {"queue": {"subscribers": ["index"]}}}')
    control.initialize_all_dbs(config_pth=config_pth)

    with Sub("index", config_pth) as thief:
        process = _start(tmp_path, "--files", "20", "--patience", "3", "--queue", "queue")
        stolen = 0
        while process.poll() is None:
            with thief.receive(timeout=0.1) as msg:
                stolen += msg is not None
        out, err = process.communicate(timeout=_TIMEOUT_SECS)

    # The thief waited before the other processes of the subscriber had even started. Only on a very
    # slow machine does the example lose its patience, so that even more is missing.
    assert stolen > 0
    match = re.search(r"^lost: +([0-9]+)$", out, re.MULTILINE)
    assert match is not None, out + err
    assert int(match.group(1)) >= stolen
    assert f"FAILED: {match.group(1)} deliveries did not arrive" in err
    assert "Lost by index: /" in err
    assert process.returncode == 1
    assert not _left(tmp_path)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path: Path, number: signal.Signals, code: int) -> None:
    # Whoever starts us may ignore the signal, and a program inherits that; handlers it does not.
    before = signal.signal(number, signal.default_int_handler)
    try:
        process = _start(tmp_path)
    finally:
        signal.signal(number, before)
    # In the middle of the work; to send all files takes seconds. Not at once: msgspec drops what a
    # signal handler raises while it looks at the types of the configuration for the first time.
    deadline = time.monotonic() + _TIMEOUT_SECS
    while not list((tmp_path / "tmp").glob("*/index")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=_TIMEOUT_SECS)

    assert process.returncode == code, (out, err)
    assert not _left(tmp_path)


def test_children_end_with_their_parent(tmp_path: Path) -> None:
    process = _start(tmp_path, "--files", "100000", "--queue", "queue")
    assert process.stdout is not None
    deadline = time.monotonic() + _TIMEOUT_SECS
    ledgers: list[Path] = []
    while not ledgers and time.monotonic() < deadline and process.poll() is None:
        ledgers = list((tmp_path / "tmp").glob("*/index"))
        time.sleep(0.01)
    process.kill()

    # The pipes to us are closed when the last process has ended.
    process.communicate(timeout=_TIMEOUT_SECS)
    assert ledgers, "Expected a subscriber to have started"
    assert process.returncode == -signal.SIGKILL


def test_wrong_arguments(tmp_path: Path) -> None:
    process = _start(tmp_path, "--files", "0")
    _, err = process.communicate(timeout=_TIMEOUT_SECS)
    assert process.returncode == 2
    assert "Expected --files to be at least 1, but got: 0" in err
