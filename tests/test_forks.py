"""Test that one process shares what it has open, and that forks and multiprocessing harm nobody."""

import collections
import contextlib
import functools
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from persipubsub import Pub, Sub, control, errors
from tests import stores, support

FORKS = int(os.environ.get("PERSIPUBSUB_FORKS", "40"))


@pytest.fixture(name="config_pth", params=["fsync", "os"])
def fixture_config_pth(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return support.make_queue(tmp_path, durability=request.param)


def open_pair(config_pth: Path) -> tuple[Pub, Sub]:
    return (Pub("pub", config_pth), Sub("sub", config_pth))


def receive_all(sub: Sub) -> list[bytes]:
    return list(sub.messages(timeout=0))


def receive(sub: Sub) -> bytes | None:
    with sub.receive(timeout=support.HANG_SECS) as message:
        return message


def check(config_pth: Path) -> None:
    assert control.verify(config_pth) == {"queue": ()}


# One environment a process


def test_closing_one_of_several_leaves_the_locks_of_the_others(config_pth: Path, tmp_path: Path,
                                                               pub: Pub, sub: Sub) -> None:
    """The locks of LMDB belong to the process: a second opening must not give them back."""
    (tmp_path / "link").symlink_to(tmp_path / "queue")
    by_link = support.write_config(tmp_path, name="link.json", path=str(tmp_path / "link"))
    with Pub("pub", by_link):
        pub.send(b"1")
    gc.collect()

    def use(pipe: support.Connection) -> None:
        # Another process finds the readers and the writers of this one.
        theirs_pub, theirs_sub = open_pair(config_pth)
        theirs_pub.send(b"2")
        pipe.send(receive(theirs_sub))

    with support.Child(use) as child:
        assert child.get() == b"1"
        child.end()
    pub.send(b"3")
    assert receive_all(sub) == [b"2", b"3"]
    check(config_pth)


def test_queue_that_was_made_anew_is_another_one(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    pub, _ = open_pair(config_pth)
    pub.send(b"old")
    shutil.rmtree(tmp_path / "queue")
    control.initialize_all_dbs(config_pth)
    with Pub("pub", config_pth) as another:
        another.send(b"new")
    with Sub("sub", config_pth) as sub:
        assert receive_all(sub) == [b"new"]
    with contextlib.suppress(errors.PersipubsubError):
        pub.close()


def test_threads_open_use_and_close(config_pth: Path) -> None:
    failed: list[str] = []

    def use(name: int) -> None:
        try:
            for number in range(5):
                pub, sub = open_pair(config_pth)
                pub.send(b"%d-%d" % (name, number))
                assert receive(sub) is not None
                pub.close()
                sub.close()
        except BaseException as error:  # pylint: disable=broad-exception-caught
            failed.append(repr(error))

    support.in_threads([functools.partial(use, name) for name in range(8)])
    assert not failed
    assert control.statistics(config_pth)["queue"].subscribers[0].acknowledged == 40
    check(config_pth)


# Forks


def run_in_child(work: Callable[[], None]) -> int:
    """Fork without a hook of multiprocessing; return the id of the process."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException as error:  # pylint: disable=broad-exception-caught
            print("child", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return process


def wait(process: int) -> None:
    assert os.waitpid(process, 0)[1] == 0


@pytest.mark.parametrize("ends", ["_exit", "kill", "close"])
@pytest.mark.parametrize("first", ["parent", "child"])
def test_parent_and_child_go_on_when_the_other_one_ends(config_pth: Path, ends: str,
                                                        first: str) -> None:

    def run(pipe: support.Connection) -> None:
        pub, sub = open_pair(config_pth)
        pub.send(b"before")
        assert receive(sub) == b"before"

        def leave() -> None:
            pipe.send("left")
            if ends == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif ends == "close":
                pub.close()
                sub.close()
            os._exit(0)

        def go_on() -> None:
            assert pipe.recv() == "go on"
            for number in range(20):
                pub.send(b"%d" % number)
                assert receive(sub) == b"%d" % number
            pub.send(b"last")
            pub.close()
            sub.close()
            pipe.send("done")

        if os.fork() == 0:
            try:
                (go_on if first == "parent" else leave)()
            finally:
                os._exit(1)
        (leave if first == "parent" else go_on)()

    with support.Child(run) as child:
        assert child.get() == "left"
        child.pipe.send("go on")
        assert child.get() == "done"
    with Sub("sub", config_pth) as sub:
        assert receive_all(sub) == [b"last"]
    check(config_pth)


def test_child_that_closes_what_it_inherited_takes_nothing_from_its_parent(
        config_pth: Path, pub: Pub, sub: Sub) -> None:
    pub.send(b"1")

    def work() -> None:
        pub.close()
        sub.close()
        assert support.outcome(lambda: pub.send(b"no")) == "ClosedError"
        with Pub("pub", config_pth) as other:
            other.send(b"2")

    wait(run_in_child(work))
    pub.send(b"3")
    assert receive_all(sub) == [b"1", b"2", b"3"]
    check(config_pth)


@pytest.mark.parametrize("uses", [False, True])
def test_child_that_closes_all_descriptors_and_opens_its_own_keeps_them(
        config_pth: Path, tmp_path: Path, pub: Pub, sub: Sub, uses: bool) -> None:
    """Daemons do that. Descriptors of the library then have the numbers of other files."""
    pub.send(b"1")
    with sub.receive(timeout=0) as message:
        assert message == b"1"

        def work() -> None:
            os.closerange(3, 1000)
            own = [os.open(tmp_path / str(number), os.O_RDWR | os.O_CREAT) for number in range(40)]
            if uses:
                pub.send(b"2")
                assert receive(sub) == b"2"
            gc.collect()
            pub.close()
            sub.close()
            for number, descriptor in enumerate(own):
                os.write(descriptor, b"%d" % number)
                os.close(descriptor)

        wait(run_in_child(work))
    for number in range(40):
        assert (tmp_path / str(number)).read_bytes() == b"%d" % number
    pub.send(b"3")
    assert receive_all(sub) == [b"3"]
    check(config_pth)


def fork_while_threads_work(pipe: support.Connection, config_pth: Path) -> None:
    """Fork many times while other threads send and receive."""
    pub, sub = open_pair(config_pth)
    is_over = threading.Event()
    sent: list[bytes] = []
    received: list[bytes] = []
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

    def take() -> None:
        try:
            while not is_over.is_set():
                with sub.receive(timeout=0.05) as message:
                    if message is not None:
                        received.append(message)
        except BaseException as error:  # pylint: disable=broad-exception-caught
            failed.append(repr(error))

    threads = [threading.Thread(target=send, args=(name, )) for name in range(3)]
    threads += [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(FORKS):

        def work(number: int = number) -> None:
            # Threads share transactions: this one must not wait for one of the parent.
            support.in_threads([lambda: pub.send(b"child-%d" % number)])
            with sub.receive(timeout=support.HANG_SECS) as message:
                assert message is not None
                pub.send(b"again-" + message)

        _, status = os.waitpid(run_in_child(work), 0)
        sent.append(b"child-%d" % number)
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


def test_forks_while_threads_work(config_pth: Path) -> None:
    with support.Child(fork_while_threads_work, config_pth) as child:
        sent, received, failed = child.get()
        assert not failed
        child.end()
    counts: collections.Counter[bytes] = collections.Counter()
    for message in received:
        # What a child received, it sent again.
        while message.startswith(b"again-"):
            message = message[len(b"again-"):]
        counts[message] += 1
    assert counts == collections.Counter(sent)
    check(config_pth)


def fork_while_a_thread_opens_and_closes(pipe: support.Connection, config_pth: Path, living: int,
                                         held: int) -> None:
    """
    Fork many times while another thread opens and closes the queue; the children live on.

    :param living: end of a pipe at which they wait for the end of the test
    :param held: other end of that pipe, which only the test must have open
    """
    os.close(held)
    is_over = threading.Event()
    failed: list[str] = []

    def open_and_close() -> None:
        try:
            while not is_over.is_set():
                with Pub("pub", config_pth) as pub:
                    pub.send(b"thread")
        except BaseException as error:  # pylint: disable=broad-exception-caught
            failed.append(repr(error))

    thread = threading.Thread(target=open_and_close, daemon=True)
    thread.start()
    for number in range(FORKS):
        ours, theirs = os.pipe()

        def work(number: int = number, theirs: int = theirs) -> None:
            # Half of them open the queue themselves.
            if number % 2:
                with Pub("pub", config_pth) as pub:
                    pub.send(b"child")
            os.write(theirs, b"done")
            os.read(living, 1)

        run_in_child(work)
        os.close(theirs)
        if os.read(ours, 4) != b"done":
            failed.append(f"the child {number} failed")
        os.close(ours)
        if failed:
            break
    pipe.send(failed)
    pipe.recv()
    is_over.set()
    thread.join(support.HANG_SECS)
    if thread.is_alive():
        failed.append("the thread hangs")
    pipe.send(failed)


def locks_of(process: int | None) -> list[str]:
    """List the locks that a process took, and which it or its children still have."""
    lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    return [line for line in lines if line.split()[-4] == str(process)]


@pytest.mark.parametrize("ends", ["end", "kill"])
def test_children_forked_while_a_thread_opens_and_closes_keep_no_lock(config_pth: Path,
                                                                      ends: str) -> None:
    living, held = os.pipe()
    try:
        with support.Child(fork_while_a_thread_opens_and_closes, config_pth, living, held) as child:
            assert not child.get()
            if ends == "kill":
                child.kill(signal.SIGKILL)
            else:
                child.pipe.send("end")
                assert not child.get()
            # Not by ``join``, which waits for the children as well: they are still there.
            support.until(lambda: child.process.exitcode is not None, what="the end")
            assert not locks_of(child.process.pid)
        with Pub("pub", config_pth) as pub:
            pub.send(b"last")
        with Sub("sub", config_pth) as sub:
            received = collections.Counter(receive_all(sub))
        assert received.keys() == {b"thread", b"child", b"last"}
        assert received[b"child"] == FORKS // 2
    finally:
        os.close(held)
        os.close(living)
    check(config_pth)


# multiprocessing


def work_with(config_pth: Path, name: str) -> None:
    """Use the queue in a process that multiprocessing started, and just end."""
    pub, sub = open_pair(config_pth)
    pub.send(name.encode())
    assert receive(sub) is not None
    pub.send(b"done")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(tmp_path: Path, method: str) -> None:
    config_pth = support.make_queue(tmp_path, durability="os", checkpoint_secs=3600)
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
    # What they sent was written when they ended, without a close.
    stores.lose_power(tmp_path / "queue")
    assert control.statistics(config_pth)["queue"].sent == 9
    check(config_pth)
