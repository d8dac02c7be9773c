"""Use one queue with very many threads, subscribers and processes, in namespaces of their own."""

import collections
import os
import pathlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import pytest

import persipubsub.control
import persipubsub.publisher
import persipubsub.queue
import persipubsub.subscriber
from tests import support
from tests.faults import workers

THREADS: Final = 1000
SUBSCRIBERS: Final = 512


@pytest.fixture(name="files")
def fixture_files() -> Iterator[None]:
    """Allow for a descriptor for each message that is being received."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * THREADS:
        pytest.skip(f"Not enough files may be opened: {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8 * THREADS)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def receive_in_threads(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Receive a message in each of many threads."""
    workers.guard()
    received: list[bytes] = []
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id="sub", config_pth=config_pth)
        pipe.send("ready")

        def receive(number: int) -> None:
            del number
            with sub.receive(timeout=support.HANG_SECS) as msg:
                assert msg is not None
                received.append(msg)

        workers.in_threads(THREADS, receive)
        pipe.send((received, sub.front()))


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_thousand_threads(tmp_path: pathlib.Path, durability: str) -> None:
    config_pth = support.write_config(tmp_path, durability=durability)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with support.Child(receive_in_threads, config_pth) as child:
        assert child.get() == "ready"
        with persipubsub.publisher.Pub() as pub:
            pub.init(pub_id="pub", config_pth=config_pth)
            workers.in_threads(THREADS, lambda number: pub.send(msg=b"%d" % number))
        received, rest = child.get()
        child.end()
    # No two threads had the same message.
    assert collections.Counter(received) == {b"%d" % number: 1 for number in range(THREADS)}
    assert rest is None
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        assert not queue.check()
        found = queue.statistics()
        assert (found.messages, found.subscribers[0].acknowledged) == (0, THREADS)


def test_many_subscribers(tmp_path: pathlib.Path) -> None:
    names = [f"sub{number:03}" for number in range(SUBSCRIBERS)]
    few = names[::7]
    config_pth = support.write_config(tmp_path, publishers={"pub": names, "few": few},
                                      subscribers=names, durability="os")  # yapf: disable
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    expected: dict[str, list[bytes]] = {name: [] for name in names}
    with persipubsub.publisher.Pub() as pub, persipubsub.publisher.Pub() as pub_few:
        pub.init(pub_id="pub", config_pth=config_pth)
        pub_few.init(pub_id="few", config_pth=config_pth)
        for number in range(10):
            sent = b"%d" % number
            (pub_few if number % 3 == 1 else pub).send(msg=sent)
            for name in few if number % 3 == 1 else names:
                expected[name].append(sent)
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        lags = {entry.subscriber: entry.lag for entry in queue.statistics().subscribers}
        assert lags == {name: len(msgs) for name, msgs in expected.items()}
        for name in names:
            with persipubsub.subscriber.Sub() as sub:
                sub.init(sub_id=name, config_pth=config_pth)
                with sub.receive(timeout=0) as msg:
                    assert msg == expected[name][0]
                with sub.receive_many(max_msgs=100, timeout=0) as msgs:
                    assert msgs == expected[name][1:]
                assert sub.front() is None
        assert queue.statistics().messages == 0
        assert not queue.check()


USER: Final = """
import os, sys
import persipubsub.errors, persipubsub.publisher, persipubsub.subscriber
from tests.faults import workers

role, config_pth, wanted = sys.argv[1:]
workers.guard()
# A namespace begins to count its processes at 1.
while os.getpid() < int(wanted):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status))
workers.guard()
try:
    if role == "pub":
        pub = persipubsub.publisher.Pub()
        pub.init(pub_id="pub", config_pth=config_pth)
    else:
        sub = persipubsub.subscriber.Sub()
        sub.init(sub_id="sub", config_pth=config_pth)
except persipubsub.errors.PersipubsubError as error:
    print(type(error).__name__, error, flush=True)
    os._exit(0)
print("ready", flush=True)
sys.stdin.readline()
for number in range(300):
    if role == "pub":
        pub.send(msg=b"%d" % number)
    else:
        with sub.receive(timeout=60) as msg:
            assert msg == b"%d" % number, (msg, number)
print("done", flush=True)
sys.stdin.readline()
os._exit(0)
"""


def prefix_of(*options: str) -> list[str]:
    """Return the command that starts a program in namespaces of its own; skip without one."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare is missing")
    prefix = [unshare, "--user", "--map-root-user", *options]
    if subprocess.run(prefix + ["true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("Namespaces are not allowed here")
    return prefix


class Program:
    """Be a Python program in namespaces of its own; it is killed at the end."""

    def __init__(self, prefix: Sequence[str], code: str, *arguments: object) -> None:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path != "")
        command: list[str] = [*prefix, sys.executable, "-c", code]
        self.process = subprocess.Popen(command + [str(argument) for argument in arguments],
                                        env=environment,
                                        stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE,
                                        text=True)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.communicate(timeout=support.HANG_SECS)

    def get(self) -> str:
        """Return the next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def go_on(self) -> None:
        """Let it do the next step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.mark.parametrize("is_same", [False, True])
def test_two_process_id_namespaces(tmp_path: pathlib.Path, is_same: bool) -> None:
    prefix = prefix_of("--pid", "--fork", "--kill-child")
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    other = 3 if is_same else 5
    with Program(prefix, USER, "sub", config_pth, 3) as sub:
        assert sub.get() == "ready"
        with Program(prefix, USER, "pub", config_pth, other) as pub:
            if is_same:
                # LMDB tells processes apart by their ids: refused, before anything is harmed.
                name, _, text = pub.get().partition(" ")
                assert name == "StoreError"
                assert "process id" in text
            else:
                assert pub.get() == "ready"
                pub.go_on()
                sub.go_on()
                assert pub.get() == sub.get() == "done"
        # The one that was there goes on, with one that has another id.
        if is_same:
            with Program(prefix, USER, "pub", config_pth, 5) as pub:
                assert pub.get() == "ready"
                pub.go_on()
                sub.go_on()
                assert pub.get() == sub.get() == "done"
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        assert not queue.check()
        assert queue.statistics().messages == 0
