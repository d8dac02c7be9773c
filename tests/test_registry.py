"""Test that a process shares one environment for a store, and that forks harm nobody."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import collections
import gc
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable
from typing import Any, Counter

import pytest

import persipubsub.config
import persipubsub.control
import persipubsub.errors
import persipubsub.maintenance._alone
import persipubsub.publisher
import persipubsub.queue
import persipubsub.subscriber
from persipubsub import _wakeup
from persipubsub.environment import _files, _opening, _registry
from tests import support

FORKS = int(os.environ.get("PERSIPUBSUB_FORKS", "100"))
THREADS = int(os.environ.get("PERSIPUBSUB_THREADS", "1000"))


@pytest.fixture(name="config_pth", params=["fsync", "os"])
def fixture_config_pth(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    config_pth = support.write_config(tmp_path, durability=request.param)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    return config_pth


def open_pair(
        config_pth: pathlib.Path) -> tuple[persipubsub.publisher.Pub, persipubsub.subscriber.Sub]:
    pub = persipubsub.publisher.Pub()
    pub.init(pub_id="pub", config_pth=config_pth)
    sub = persipubsub.subscriber.Sub()
    sub.init(sub_id="sub", config_pth=config_pth)
    return pub, sub


def receive_all(sub: persipubsub.subscriber.Sub) -> list[bytes]:
    result: list[bytes] = []
    while True:
        with sub.receive(timeout=0) as message:
            if message is None:
                return result
            result.append(message)


def check(config_pth: pathlib.Path) -> None:
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        assert not queue.check()


# Sharing


def test_all_users_share_an_environment(config_pth: pathlib.Path) -> None:
    pairs = [open_pair(config_pth) for _ in range(3)]
    assert len(_registry._REGISTRY) == 1
    pairs[0][0].send(b"message")
    for pub, sub in pairs[:2]:
        pub.close()
        sub.close()
        pub.close()
        assert len(_registry._REGISTRY) == 1
    pub, sub = pairs[2]
    pub.send(b"again")
    assert receive_all(sub) == [b"message", b"again"]
    pub.close()
    assert sub.front() is None
    sub.close()
    assert not _registry._REGISTRY and not _registry._USERS


def test_paths_to_the_same_files_share_it(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    (tmp_path / "link").symlink_to(tmp_path / "queue")
    paths = [
        str(tmp_path / "queue"),
        str(tmp_path / "link"), f"{tmp_path / 'queue' / '..' / 'queue'!s}/", "queue"
    ]
    configs = [
        support.write_config(tmp_path, name=f"{number}.json", path=path)
        for number, path in enumerate(paths)
    ]
    pairs = [open_pair(each) for each in configs]
    assert len(_registry._REGISTRY) == 1
    for pub, _ in pairs:
        pub.send(b"message")
    with pairs[0][1].receive(timeout=0) as message:
        assert message == b"message"
        # The claim counts by whatever path the file was opened.
        with pairs[1][1].receive(timeout=0) as other:
            assert other == b"message"
    assert len(receive_all(pairs[2][1])) == 2
    for pub, sub in pairs:
        pub.close()
        sub.close()
    assert not _registry._REGISTRY


def test_other_queues_have_their_own(tmp_path: pathlib.Path) -> None:
    first = support.write_config(tmp_path, name="first.json", path=str(tmp_path / "first"))
    second = support.write_config(tmp_path, name="second.json", path=str(tmp_path / "second"))
    for config_pth in (first, second):
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    pub, unused = open_pair(first)
    other, sub = open_pair(second)
    assert len(_registry._REGISTRY) == 2
    pub.send(b"first")
    assert sub.front() is None
    pub.close()
    other.send(b"second")
    assert sub.front() == b"second"
    for each in (unused, other, sub):
        each.close()
    assert not _registry._REGISTRY


def test_failed_opening_leaves_nothing(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    before = support.count_descriptors()
    for _ in range(3):
        with pytest.raises(persipubsub.errors.NotInitializedError):
            open_pair(config_pth)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    other = support.write_config(tmp_path, name="os.json", durability="os")
    unknown = support.write_config(tmp_path,
                                   name="unknown.json",
                                   publishers={"pub": ["new"]},
                                   subscribers=["sub", "new"])
    for _ in range(3):
        with pytest.raises(persipubsub.errors.ConfigError):
            open_pair(other)
        with pytest.raises(persipubsub.errors.NotInitializedError, match="new"):
            open_pair(unknown)
    assert not _registry._REGISTRY
    assert len(os.listdir("/proc/self/fd")) <= before


def test_nothing_stays_open(config_pth: pathlib.Path) -> None:
    gc.collect()  # what tests before this one left would be missing later on
    counts: list[int] = []
    for _ in range(4):
        pub, sub = open_pair(config_pth)
        pub.send(b"message")
        receive_all(sub)
        pub.close()
        sub.close()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert max(counts[1:]) <= counts[0]


def interrupt(function: Callable[[], object], module: str, point: int) -> KeyboardInterrupt | None:
    """Call a function; raise a KeyboardInterrupt at so many calls or their ends in a module."""
    points = 0

    def profile(frame: types.FrameType, event: str, _: object) -> None:
        nonlocal points
        if event not in ("call", "c_return") or os.path.basename(
                frame.f_code.co_filename) != module:
            return
        # Who is interrupted before he could give a use back, or in a destructor, does not do it.
        if frame.f_code.co_name in ("release", "__del__"):
            return
        points += 1
        if points == point:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        function()
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.setprofile(None)
    return None


@pytest.mark.parametrize(
    "module",
    ["_gate.py", "_opening.py", "_environment.py", "_registry.py", "queue.py", "_wakeup.py"])
def test_interrupt_at_any_call_of_opening_and_closing(config_pth: pathlib.Path,
                                                      module: str) -> None:
    settings = support.settings(config_pth)
    fds = support.count_descriptors()

    def use() -> None:
        queue = persipubsub.queue.Queue(settings)
        try:
            queue.close()
        finally:
            queue.close()

    point = 1
    while (error := interrupt(use, module, point)) is not None:
        point += 1
        assert not _wakeup._hub.lock.locked()
        assert not _registry._USERS
        # While the frames are kept; and LMDB opens no store twice in a process.
        with _opening.open_gate(settings.path, settings.options()._replace(busy_timeout_secs=0)):
            pass
        use()
        del error
        gc.collect()
        with persipubsub.maintenance._alone.alone(settings.path, settings.options()):
            pass
        assert len(os.listdir("/proc/self/fd")) <= fds
    assert point > 3


def test_larger_map_holds_at_once(tmp_path: pathlib.Path) -> None:
    settings = support.settings(support.write_config(tmp_path))._replace(
        max_bytes=1 << 20, strategy=persipubsub.config.Strategy.REJECT)
    persipubsub.queue.Queue.ensure(settings, subscribers=["sub"])

    def fill(queue: persipubsub.queue.Queue, count: int) -> None:
        for _ in range(count):
            queue.put([bytes(50000)])

    with persipubsub.queue.Queue(settings) as old:
        with pytest.raises(persipubsub.errors.QueueFullError):
            fill(old, 1000)
        with persipubsub.queue.Queue(settings._replace(max_bytes=1 << 25)) as new:
            fill(new, 100)
            fill(old, 100)
            # A smaller one changes nothing.
            with persipubsub.queue.Queue(settings) as smaller:
                fill(smaller, 100)
            assert not old.check()


def test_queue_that_was_made_anew_is_another_one(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    pub, sub = open_pair(config_pth)
    (tmp_path / "queue").rename(tmp_path / "moved")
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    other_pub, other_sub = open_pair(config_pth)
    pub.send(b"old")
    other_pub.send(b"new")
    assert (sub.front(), other_sub.front()) == (b"old", b"new")
    for each in (pub, sub, other_pub, other_sub):
        each.close()


def test_many_threads(config_pth: pathlib.Path) -> None:
    pub, sub = open_pair(config_pth)
    received: list[bytes] = []
    failed: list[BaseException] = []

    def use(number: int) -> None:
        try:
            pub.send(b"%d" % number)
            with sub.receive(timeout=support.HANG_SECS) as message:
                assert message is not None
                received.append(message)
        except BaseException as error:  # pylint: disable=broad-exception-caught
            failed.append(error)

    size = threading.stack_size(256 * 1024)
    try:
        threads = [threading.Thread(target=use, args=(number, )) for number in range(THREADS)]
        for thread in threads:
            thread.start()
    finally:
        threading.stack_size(size)
    for thread in threads:
        thread.join(2 * support.HANG_SECS)
        assert not thread.is_alive()
    assert not failed
    assert sorted(received, key=int) == [b"%d" % number for number in range(THREADS)]
    pub.close()
    sub.close()
    check(config_pth)


def test_threads_open_and_close(config_pth: pathlib.Path) -> None:
    failed: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(10):
                pub, sub = open_pair(config_pth)
                pub.send(b"message")
                pub.close()
                sub.close()
        except BaseException as error:  # pylint: disable=broad-exception-caught
            failed.append(error)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(support.HANG_SECS)
        assert not thread.is_alive()
    assert not failed
    assert not _registry._REGISTRY
    pub, sub = open_pair(config_pth)
    assert len(receive_all(sub)) == 80
    pub.close()
    sub.close()


# Forking

ACTOR = """if True:
    import json, os, signal, socket, sys
    import persipubsub.publisher, persipubsub.subscriber

    channels = [socket.socket(fileno=int(number)).makefile("rw") for number in sys.argv[2:]]
    pub = persipubsub.publisher.Pub()
    sub = persipubsub.subscriber.Sub()

    def act(channel, command, argument):
        if command == "open":
            pub.init(pub_id="pub", config_pth=sys.argv[1])
            sub.init(sub_id="sub", config_pth=sys.argv[1])
        elif command == "send":
            pub.send(argument.encode())
        elif command == "receive":
            with sub.receive(timeout=10) as message:
                return message and message.decode()
        elif command == "front":
            return (sub.front() or b"").decode()
        elif command == "close":
            pub.close()
            sub.close()
        elif command == "readers":
            handles = pub._slot.content[0]._environment._handles
            handles.environment.reader_check()
            return handles.environment.info()["num_readers"]

    def loop(place):
        channel = channels[place]
        for line in channel:
            command, argument = json.loads(line)
            if command == "fork":
                if os.fork() == 0:
                    return place + 1
                result = None
            elif command == "return":
                sys.exit(0)
            elif command == "_exit":
                os._exit(0)
            else:
                try:
                    result = act(channel, command, argument)
                except Exception as error:
                    result = repr(error)
            channel.write(json.dumps([os.getpid(), result]) + "\\n")
            channel.flush()
        sys.exit(3)

    place = 0
    while True:
        place = loop(place)
"""


class Family:
    """Command a process, its forked child, the child's child, and so on."""

    def __init__(self, config_pth: pathlib.Path, size: int) -> None:
        pairs = [socket.socketpair() for _ in range(size)]
        self._sockets = [ours for ours, _ in pairs]
        self._files = [ours.makefile("rw") for ours in self._sockets]
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path != "")
        descriptors = [theirs.fileno() for _, theirs in pairs]
        self._process = subprocess.Popen(
            [sys.executable, "-c", ACTOR, str(config_pth)] + [str(each) for each in descriptors],
            env=environment,
            pass_fds=descriptors)
        for _, theirs in pairs:
            theirs.close()
        for ours in self._sockets:
            ours.settimeout(support.HANG_SECS)
        self.ids: dict[int, int] = {}

    def __enter__(self) -> "Family":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ids.values():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._process.kill()
        self._process.wait()
        for file in self._files:
            file.close()
        for ours in self._sockets:
            ours.close()

    def order(self, place: int, command: str, argument: str = "") -> Any:
        """Let a member do something; return what came of it."""
        print(json.dumps([command, argument]), file=self._files[place], flush=True)
        line = self._files[place].readline()
        assert line, "Expected an answer, but the process has ended."
        self.ids[place], result = json.loads(line)
        return result

    def end(self, place: int, how: str) -> None:
        """Let a member end, and wait until it did."""
        process = self.ids.pop(place)
        if how == "kill":
            os.kill(process, signal.SIGKILL)
        else:
            print(json.dumps([how, ""]), file=self._files[place], flush=True)
        if place == 0:
            expected = -signal.SIGKILL if how == "kill" else 0
            assert self._process.wait(support.HANG_SECS) == expected
        else:
            # Its parent does not wait for it, so that it stays as a zombie.
            support.until(lambda: state(process) in "ZX", "end of the process")


def state(process: int) -> str:
    try:
        text = pathlib.Path(f"/proc/{process}/stat").read_text("utf-8")
    except FileNotFoundError:
        return "X"
    return text.rpartition(")")[2].split()[0]


ENDS = ["return", "_exit", "kill"]


@pytest.mark.parametrize("ends",
                         list(itertools.product(ENDS, ENDS, [(0, 1), (1, 0)])),
                         ids=lambda ends: "-".join(str(each) for each in ends))
def test_fork_in_every_order_of_ends(tmp_path: pathlib.Path, ends: tuple[str, str,
                                                                         tuple[int, int]]) -> None:
    config_pth = support.write_config(tmp_path, durability="os" if ends[0] == "kill" else "fsync")
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    how = {0: ends[0], 1: ends[1]}
    first, second = ends[2]
    with Family(config_pth, size=2) as family:
        family.order(0, "open")
        assert family.order(0, "send", "a") is None
        assert family.order(0, "receive") == "a"
        family.order(0, "fork")
        for number in range(3):
            for place in (1, 0):
                text = f"{place} {number}"
                assert family.order(place, "send", text) is None
                assert family.order(1 - place, "front") == text
                assert family.order(place, "receive") == text
        assert family.order(0, "readers") <= 4
        family.end(first, how[first])
        assert family.order(second, "send", "b") is None
        assert family.order(second, "receive") == "b"
        assert family.order(second, "send", "c") is None
        family.end(second, how[second])

    pub, sub = open_pair(config_pth)
    assert receive_all(sub) == [b"c"]
    pub.close()
    sub.close()
    check(config_pth)


@pytest.mark.parametrize("how", ENDS)
def test_child_that_does_nothing(config_pth: pathlib.Path, how: str) -> None:
    with Family(config_pth, size=4) as family:
        family.order(0, "open")
        family.order(0, "send", "a")
        for place in range(1, 4):
            # They are children of each other, as each of them takes the next channel.
            family.order(place - 1, "fork")
            assert family.order(place, "nothing") is None
        for place in range(3, 0, -1):
            family.end(place, how)
            assert family.order(0, "send", str(place)) is None
            assert family.order(0, "front") == "a"
        for expected in ("a", "3", "2", "1"):
            assert family.order(0, "receive") == expected
    check(config_pth)


def test_child_closes_what_it_inherited(config_pth: pathlib.Path) -> None:
    with Family(config_pth, size=3) as family:
        family.order(0, "open")
        family.order(0, "fork")
        family.order(1, "fork")
        family.order(1, "close")
        assert "ClosedError" in family.order(1, "send", "refused")
        assert family.order(0, "send", "a") is None
        assert family.order(2, "receive") == "a"
        family.order(1, "open")
        assert family.order(1, "send", "b") is None
        assert family.order(0, "receive") == "b"
        family.order(0, "close")
        assert family.order(2, "send", "c") is None
        assert family.order(1, "receive") == "c"


def test_mark_of_a_family_stays_until_the_last_one(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, durability="os")
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    mark = tmp_path / "queue" / "running"
    with Family(config_pth, size=2) as family:
        family.order(0, "open")
        family.order(0, "fork")
        family.order(1, "send", "a")
        family.order(0, "close")
        assert mark.exists()
        family.order(1, "close")
        assert not mark.exists()


def fork_while_threads_work(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Fork many times while other threads send and receive."""
    pub, sub = open_pair(config_pth)
    is_over = threading.Event()
    sent, received = [], []  # type: list[bytes], list[bytes]
    failed: list[str] = []

    def send(name: int) -> None:
        try:
            number = 0
            while not is_over.is_set():
                number += 1
                pub.send(b"%d-%d" % (name, number))
                sent.append(b"%d-%d" % (name, number))
        except BaseException as error:  # pylint: disable=broad-exception-caught
            failed.append(repr(error))

    def receive() -> None:
        try:
            while not is_over.is_set():
                with sub.receive(timeout=0.05) as message:
                    if message is not None:
                        received.append(message)
        except BaseException as error:  # pylint: disable=broad-exception-caught
            failed.append(repr(error))

    threads = [threading.Thread(target=send, args=(name, )) for name in range(4)]
    threads += [threading.Thread(target=receive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(FORKS if "fsync" in config_pth.read_text("utf-8") else FORKS // 4):
        process = os.fork()
        if process == 0:
            try:
                pub.send(b"child-%d" % number)
                with sub.receive(timeout=support.HANG_SECS) as message:
                    assert message is not None
                    pub.send(b"again-" + message)
            except BaseException as error:  # pylint: disable=broad-exception-caught
                print("child", number, repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        sent.append(b"child-%d" % number)
        _, status = os.waitpid(process, 0)
        if status != 0:
            failed.append(f"child {number} ended with {status}")
            break
    is_over.set()
    for thread in threads:
        thread.join(support.HANG_SECS)
        if thread.is_alive():
            failed.append("a thread hangs")
    pipe.send((sent, received + receive_all(sub), failed))
    pub.close()
    sub.close()


def test_fork_while_threads_work(config_pth: pathlib.Path) -> None:
    with support.Child(fork_while_threads_work, config_pth) as child:
        sent, received, failed = child.get()
        assert not failed
        child.end()
    again = 0
    counts: Counter[bytes] = collections.Counter()
    for message in received:
        # What a child received, it sent again.
        again += message.startswith(b"again-")
        while message.startswith(b"again-"):
            message = message[len(b"again-"):]
        counts[message] += 1
    assert counts == collections.Counter(sent)
    assert again > 0
    check(config_pth)


def work_with(config_pth: pathlib.Path, name: str) -> None:
    """Use the queue in a process that multiprocessing started."""
    pub, sub = open_pair(config_pth)
    pub.send(name.encode())
    with sub.receive(timeout=support.HANG_SECS) as message:
        assert message is not None
        pub.send(b"done")
    pub.close()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(tmp_path: pathlib.Path, method: str) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    pub, sub = open_pair(config_pth)
    context = multiprocessing.get_context(method)
    processes = [
        context.Process(target=work_with, args=(config_pth, str(number)))  # type: ignore
        for number in range(3)
    ]
    for process in processes:
        process.start()
        pub.send(b"parent")
    for process in processes:
        process.join(support.HANG_SECS)
        assert process.exitcode == 0
    rest = receive_all(sub)
    assert len(rest) == 6
    assert set(rest) <= {b"done", b"parent", b"0", b"1", b"2"}
    pub.close()
    sub.close()
    check(config_pth)


def end_without_close(config_pth: pathlib.Path, has_thread: bool) -> None:
    """Send in a process that multiprocessing started, and just end."""
    pub, _ = open_pair(config_pth)
    pub.send(b"message")
    if has_thread:

        def send_at_the_end() -> None:
            threading.main_thread().join()
            pub.send(b"of a thread")

        threading.Thread(target=send_at_the_end).start()


@pytest.mark.parametrize("has_thread", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_child_of_multiprocessing_that_ends_without_close(tmp_path: pathlib.Path, method: str,
                                                          has_thread: bool) -> None:
    config_pth = support.write_config(tmp_path, durability="os", checkpoint_secs=3600)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    context = multiprocessing.get_context(method)
    process = context.Process(  # type: ignore
        target=end_without_close, args=(config_pth, has_thread))
    process.start()
    process.join(support.HANG_SECS)
    assert process.exitcode == 0
    mark = tmp_path / "queue" / _files.RUNNING
    # From Python 3.12 on, a child waits for its threads before the library hears of its end.
    assert has_thread or not mark.exists()
    expected = [b"message", b"of a thread"] if has_thread else [b"message"]
    if mark.exists():
        # As after a power failure: the checkpoint takes the store's place.
        mark.write_text("another boot", encoding="ascii")
        expected = [b"message"]
    pub, sub = open_pair(config_pth)
    assert receive_all(sub) == expected
    pub.close()
    sub.close()


def inherit_lease(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Fork inside of a receive; the child leaves it in its own way."""
    pub, sub = open_pair(config_pth)
    pub.send(b"message")
    with sub.receive(timeout=0) as message:
        process = os.fork()
        assert message == b"message"
        if process != 0:
            os.waitpid(process, 0)
            assert sub.front() is None, "Expected the parent to have the message still."
    if process == 0:
        os._exit(0)
    assert sub.front() is None
    pipe.send("done")


def test_child_opens_once_more_what_was_compacted_meanwhile(config_pth: pathlib.Path) -> None:
    pub = persipubsub.publisher.Pub()
    pub.init(pub_id="pub", config_pth=config_pth)

    def run(pipe: support.Connection) -> None:
        # What was inherited is closed by now.
        pipe.send("ready")
        pipe.recv()
        pub.send(b"one")
        with persipubsub.publisher.Pub() as another:
            another.init(pub_id="pub", config_pth=config_pth)
            another.send(b"two")
            pub.close()
            another.send(b"three")
        assert not _registry._REGISTRY and not _registry._USERS
        pipe.send("done")

    with support.Child(run) as child:
        assert child.get() == "ready"
        pub.close()
        persipubsub.control.compact(config_pth)
        child.pipe.send("go")
        assert child.get() == "done"
        child.end()
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id="sub", config_pth=config_pth)
        with sub.receive_many(9, timeout=0) as messages:
            assert messages == [b"one", b"two", b"three"]


def test_fork_inside_of_a_receive(config_pth: pathlib.Path) -> None:
    with support.Child(inherit_lease, config_pth) as child:
        assert child.get() == "done"
        child.end()


def test_fork_in_the_middle_of_a_transaction(config_pth: pathlib.Path) -> None:
    """As a signal handler may do it: the child can not go on with this store, but says so."""
    settings = support.settings(config_pth)
    # It waits for so long for its parent, which is in the middle of a write.
    environment = _registry.acquire(settings.path,
                                    settings.options()._replace(busy_timeout_secs=0.2))
    statuses: list[int] = []

    def work(txn: Any, databases: Any) -> int:
        process = os.fork()
        if process == 0:
            name = support.outcome(lambda: environment.read(lambda other, _: other.id()))
            os._exit(0 if issubclass(getattr(persipubsub.errors, name, int), persipubsub.errors.
                                     PersipubsubError) else 1)
        statuses.append(os.waitpid(process, 0)[1])
        txn.put(b"key", b"value", db=databases.meta)
        return 1

    assert environment.write(work) == 1
    assert statuses == [0]

    def look(txn: Any, databases: Any) -> bytes:
        return bytes(txn.get(b"key", db=databases.meta))

    assert environment.read(look) == b"value"
    _registry.release(environment)


@pytest.mark.parametrize("name", ["ctypes", "persipubsub.queue"])
def test_fork_while_another_thread_imports(tmp_path: pathlib.Path, name: str) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    code = textwrap.dedent("""
        import importlib.abc, os, signal, sys, threading, time
        import persipubsub.subscriber

        _, config_pth, name = sys.argv
        imports = threading.Event()

        class Slow(importlib.abc.MetaPathFinder):
            def find_spec(self, fullname, path, target=None):
                if fullname == name:
                    imports.set()
                    time.sleep(0.5)  # long enough for a fork

        def receive(sub):
            with sub.receive(timeout=0.01) as msg:
                assert msg is None

        def use():
            with persipubsub.subscriber.Sub() as sub:
                sub.init("sub", config_pth)
                receive(sub)

        sys.meta_path.insert(0, Slow())
        assert name not in sys.modules
        if name == "ctypes":
            inherited = persipubsub.subscriber.Sub()
            inherited.init("sub", config_pth)
            thread = threading.Thread(target=receive, args=(inherited, ))
        else:
            thread = threading.Thread(target=use)
        thread.start()
        assert imports.wait(60)
        process = os.fork()
        if process == 0:
            signal.alarm(30)
            receive(inherited) if name == "ctypes" else use()
            os._exit(0)
        print(os.waitpid(process, 0)[1])
        thread.join()
        """)
    process = support.run_python(code, config_pth, name)
    assert (process.stdout, process.returncode) == ("0\n", 0), process.stderr


#: For a program of which one thread forks when another one is in the middle of something.
FORK = textwrap.dedent("""
    import os, signal, sys, threading
    import persipubsub.publisher, persipubsub.subscriber

    is_there, forks, is_forked = threading.Event(), threading.Event(), threading.Event()

    def fork():
        assert is_there.wait(60)
        forks.set()
        process = os.fork()
        if process == 0:
            os._exit(0)
        is_forked.set()
        print(os.waitpid(process, 0)[1])
    """)


def test_signal_handler_sends_in_an_import_while_another_thread_forks(
        tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    code = FORK + textwrap.dedent("""
        import importlib.abc

        config_pth = sys.argv[1]

        class Slow(importlib.abc.MetaPathFinder):
            def find_spec(self, fullname, path, target=None):
                if fullname == "ctypes":
                    is_there.set()
                    assert forks.wait(60)
                    # Long enough for the fork to come to where it waits for the import.
                    is_forked.wait(0.5)
                    signal.raise_signal(signal.SIGUSR1)

        pub, sub = persipubsub.publisher.Pub(), persipubsub.subscriber.Sub()
        pub.init("pub", config_pth)
        sub.init("sub", config_pth)
        signal.signal(signal.SIGUSR1, lambda *_: pub.send(b"from the handler"))
        signal.alarm(30)
        sys.meta_path.insert(0, Slow())
        assert "ctypes" not in sys.modules
        thread = threading.Thread(target=fork)
        thread.start()
        with sub.receive(timeout=10) as msg:
            assert msg == b"from the handler"
        thread.join()
        """)
    process = support.run_python(code, config_pth)
    assert (process.stdout, process.returncode) == ("0\n", 0), process.stderr


@pytest.mark.parametrize("name", ["receive", "send"])
def test_signal_handler_in_the_middle_of_a_read_beside_a_fork(tmp_path: pathlib.Path,
                                                              name: str) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    code = FORK + textwrap.dedent("""
        from persipubsub.environment import _registry
        from tests import support

        _, config_pth, name = sys.argv

        def work(txn, databases):
            is_there.set()
            assert forks.wait(60)
            # Long enough for the fork to come to where it waits for the read.
            is_forked.wait(0.2)
            signal.raise_signal(signal.SIGUSR1)

        def handle(*_):
            if name == "send":
                pub.send(b"from the handler")
            else:
                # The first one, for which a descriptor is opened.
                with sub.receive(timeout=0) as msg:
                    assert msg == b"before"

        pub, sub = persipubsub.publisher.Pub(), persipubsub.subscriber.Sub()
        pub.init("pub", config_pth)
        sub.init("sub", config_pth)
        pub.send(b"before")
        signal.signal(signal.SIGUSR1, handle)
        signal.alarm(30)
        settings = support.settings(config_pth)
        environment = _registry.acquire(settings.path, settings.options())
        thread = threading.Thread(target=fork)
        thread.start()
        environment.read(work)
        thread.join()
        _registry.release(environment)
        """)
    process = support.run_python(code, config_pth, name)
    assert (process.stdout, process.returncode) == ("0\n", 0), process.stderr
