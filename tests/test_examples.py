"""Test the small examples as users run them: as programs."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from persipubsub import Pub, Sub
from tests import support
from tests.faces import deploy, figures, fixture_config_pth

assert fixture_config_pth  # pytest finds it here

_EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def start(name: str, *arguments: object, cwd: Path) -> "subprocess.Popen[str]":
    return support.start([sys.executable, _EXAMPLES / name, *arguments], cwd=cwd)


@pytest.fixture(name="worker", params=["worker.py", "aio_worker.py"])
def fixture_worker(request: pytest.FixtureRequest, tmp_path: Path,
                   config_pth: Path) -> Iterator["subprocess.Popen[str]"]:
    with start(request.param, config_pth, cwd=tmp_path) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_worker_that_is_told_to_end_in_the_middle_of_its_work(worker: "subprocess.Popen[str]",
                                                              config_pth: Path,
                                                              number: signal.Signals) -> None:
    msgs = [b"%d" % index for index in range(500)]
    with Pub("pub", config_pth) as pub:
        pub.send_many(msgs)
    assert worker.stdout is not None and worker.stderr is not None
    first = worker.stdout.readline()
    worker.send_signal(number)
    # Not communicate(), which would lose what readline() read ahead.
    done = (first + worker.stdout.read()).split()
    assert (worker.wait(support.HANG_SECS), worker.stderr.read()) == (0, "")
    # All that is noted was acknowledged, and the rest is there at once.
    assert figures(config_pth).lag == 500 - len(done)
    with Sub("sub", config_pth) as sub:
        left = [msg.decode() for msg in sub.messages(timeout=0.3, prefetch=100)]
    assert len(left) > 100
    assert sorted(done + left, key=int) == [msg.decode() for msg in msgs]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_worker_that_is_told_to_end_while_it_waits(worker: "subprocess.Popen[str]",
                                                   config_pth: Path,
                                                   number: signal.Signals) -> None:
    with Pub("pub", config_pth) as pub:
        pub.send(b"only one")
    support.until(lambda: figures(config_pth).lag == 0, "the worker waits again")
    worker.send_signal(number)
    assert worker.communicate(timeout=support.HANG_SECS) == ("only one\n", "")
    assert worker.returncode == 0


@pytest.mark.parametrize("name", ["worker.py", "aio_worker.py"])
def test_worker_that_is_killed(tmp_path: Path, name: str) -> None:
    config_pth = deploy(tmp_path)
    msgs = [b"%d" % index for index in range(200)]
    with Pub("pub", config_pth) as pub:
        pub.send_many(msgs)
    with start(name, config_pth, cwd=tmp_path) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.kill()
        done = (first + process.stdout.read()).split()
    with Sub("sub", config_pth) as sub:
        left = [msg.decode() for msg in sub.messages(timeout=0.2)]
    assert set(done + left) == {msg.decode() for msg in msgs}
    # Only what was at work came again.
    assert len(done + left) - len(msgs) <= 10
