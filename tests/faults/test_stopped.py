"""Stop processes (SIGSTOP) in the middle of their work: the others go on."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

import pytest

from persipubsub import Pub, Sub, control, errors
from persipubsub.lmdb_engine.format import Tx
from tests import support

#: A stopped process is caught in the middle of a commit within so many attempts.
ATTEMPTS: Final = 8000


def receive(pipe: support.Connection, config_pth: Path) -> None:
    received: list[bytes] = []
    with Sub("sub", config_pth) as sub:
        pipe.send("ready")
        while True:
            with sub.receive(timeout=0.2) as msg:
                if msg is not None:
                    received.append(msg)
                elif pipe.poll():
                    break
    pipe.send(received)


@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("is_over_mark", [False, True])
def test_stopped_consumer(tmp_path: Path, durability: str, is_over_mark: bool) -> None:
    count, mark = (600, 200) if is_over_mark else (400, 1000)
    if durability == "os":
        count, mark = 5 * count, 5 * mark
    # A process that is stopped while it reads keeps all pages that are freed meanwhile. That is not
    # tested here: the one that is to be stopped records no states.
    config_pth = support.make_queue(tmp_path,
                                    durability=durability,
                                    MAX_MSGS_NUM=mark,
                                    checkpoint_secs=3600)
    data = tmp_path / "queue" / "data.mdb"
    expected = [b"%d " % number + bytes(1000) for number in range(count)]
    with Pub("pub", config_pth) as pub, support.Child(support.hold_message, config_pth) as stopped:
        pub.send(msg=b"mine")
        assert stopped.get() == b"mine"
        stopped.kill(signal.SIGSTOP)
        with support.Child(receive, config_pth) as one, support.Child(receive, config_pth) as two:
            assert one.get() == two.get() == "ready"
            with support.open_queue(config_pth) as queue:
                for number, message in enumerate(expected):
                    pub.send(msg=message)
                    # The mark drops what waits, so that those who work must keep up with it.
                    while number % 10 == 0 and queue.statistics().subscribers[0].lag > 40:
                        time.sleep(0.001)
                support.until(lambda: queue.statistics().subscribers[0].lag <= 1,
                              what="the others receive everything else")
            # Were nothing used again, each message would take five or six pages.
            assert data.stat().st_size < 3 * 4096 * count
            one.pipe.send("end")
            two.pipe.send("end")
            received = one.get() + two.get()
        assert sorted(received) == sorted(expected)
        stopped.kill(signal.SIGCONT)
        stopped.pipe.send("finish")
        assert stopped.get() == "done"
        stopped.end()

    with support.open_queue(config_pth) as queue:
        assert not queue.check()
        entry, = queue.statistics().subscribers
        assert entry.lag == entry.failed == 0
        # Above the mark the stopped one's message is dropped and counted, and nothing else.
        assert entry.dropped_by_mark == (1 if is_over_mark else 0)
        assert entry.acknowledged == count + (0 if is_over_mark else 1)
        assert queue.consumer("sub").front() is None


def send_always(pipe: support.Connection, config_pth: Path) -> None:
    """Send without end, and tell how many were sent."""
    with Pub("pub", config_pth) as pub:
        count = 0
        while not pipe.poll():
            pub.send(msg=b"%d" % count)
            count += 1
            if count == 1:
                pipe.send("ready")
        pipe.send(count)


def obey(pipe: support.Connection, config_pth: Path) -> None:
    """Do what is asked for, and tell what came of it: a process that may hang."""
    with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:

        def send() -> None:
            pub.send(msg=b"mine")

        def receive_one() -> None:
            with sub.receive(timeout=0) as msg:
                assert msg is not None

        pipe.send("ready")
        while (wish := pipe.recv()) != "end":
            if wish == "front":
                pipe.send(sub.front())
            else:
                pipe.send(support.outcome(send if wish == "send" else receive_one))


def ask(child: support.Child, wish: str) -> object:
    child.pipe.send(wish)
    return child.get()


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGKILL])
def test_publisher_stopped_in_the_middle_of_a_send(tmp_path: Path, number: int) -> None:
    # With ``os``, as only the write lock shall keep the other one from going on.
    config_pth = support.make_queue(tmp_path, busy_timeout_secs=0.2, durability="os")
    sent = 0
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(support.Child(obey, config_pth))
        assert other.get() == "ready"
        child = stack.enter_context(support.Child(send_always, config_pth))
        assert child.get() == "ready"
        for _ in range(ATTEMPTS):
            child.kill(signal.SIGSTOP)
            came = ask(other, "send")
            if came == "BusyTimeoutError":
                break
            assert came == ""
            sent += 1
            child.kill(signal.SIGCONT)
        else:
            pytest.fail("The publisher was never stopped in the middle of a commit.")

        # Reading needs nobody's leave; what can not be acknowledged is given back.
        assert ask(other, "front") == b"0"
        assert ask(other, "receive") == "BusyTimeoutError"
        assert ask(other, "front") == b"0"

        child.kill(number)
        if number == signal.SIGKILL:
            child.end(-signal.SIGKILL)
        # As soon as the one that goes on has flushed, if it does.
        support.until(lambda: ask(other, "send") == "", what="the other one goes on")
        sent += 1
        if number == signal.SIGCONT:
            child.pipe.send("end")
            theirs = child.get()
            child.end()
        other.pipe.send("end")
        other.end()

    received = support.receive_all(config_pth)
    assert received.count(b"mine") == sent
    others = [int(message) for message in received if message != b"mine"]
    assert others == list(range(len(others)))
    if number == signal.SIGCONT:
        assert len(others) == theirs
    with support.open_queue(config_pth) as queue:
        assert not queue.check()


def is_stopped(child: support.Child) -> bool:
    status = Path(f"/proc/{child.process.pid}/stat").read_text(encoding="ascii")
    return status.rpartition(") ")[2].startswith("T")


def stop_in_a_flush(pipe: support.Connection, config_pth: Path) -> None:
    """Send, and be stopped in the middle of the flush, with the lock of the journal."""
    with Pub("pub", config_pth) as pub:
        flush = os.fdatasync

        def stop_and_flush(descriptor: int) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)
            flush(descriptor)

        setattr(os, "fdatasync", stop_and_flush)
        pipe.send("ready")
        pipe.recv()
        pub.send(b"first")
        setattr(os, "fdatasync", flush)
        pipe.send("sent")


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGKILL])
def test_publisher_stopped_in_the_middle_of_a_flush(tmp_path: Path, number: int) -> None:
    config_pth = support.make_queue(tmp_path, busy_timeout_secs=0.3, checkpoint_secs=3600)
    with support.Child(stop_in_a_flush, config_pth) as child:
        with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
            assert child.get() == "ready"
            child.pipe.send("go")  # now that all is open here, which needs the journal, too
            support.until(lambda: is_stopped(child), what="the flush")
            assert sub.front() == b"first"
            with pytest.raises(errors.BusyTimeoutError, match="not yet safe"):
                pub.send(b"second")
            # It is in the queue, and consumers go on.
            for message in (b"first", b"second"):
                with sub.receive(timeout=0) as received:
                    assert received == message
            child.kill(number)
            if number == signal.SIGCONT:
                assert child.get() == "sent"
                child.end()
            else:
                child.end(-signal.SIGKILL)
            pub.send(b"third")
            with sub.receive(timeout=0) as received:
                assert received == b"third"
    assert control.verify(config_pth) == {"queue": ()}


def die_reading(pipe: support.Connection, config_pth: Path) -> None:
    """Open the queue, and when told to, be killed in the middle of a read."""
    queue = support.open_queue(config_pth)
    # In a forked process it is opened at the first use, and that frees the slots of dead readers.
    queue.consumer("sub").front()
    pipe.send("ready")
    pipe.recv()

    def work(tx: Tx) -> None:
        tx.txn.stat(tx.db.data)
        os.kill(os.getpid(), signal.SIGKILL)

    queue._environment.read(work)


# At the end of a small map the search is made anyhow; in a large one only now and then.
@pytest.mark.parametrize("size, bound", [(1 << 22, 5 << 20), (1 << 28, 24 << 20)])
def test_killed_readers_do_not_let_the_file_grow(tmp_path: Path, size: int, bound: int) -> None:
    config_pth = support.make_queue(tmp_path, durability="os", checkpoint_secs=0.05,
                                      max_db_size_bytes=size)  # yapf: disable
    with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
        # Whoever opens the queue looks for dead readers: all of them do it before one dies.
        with support.Child(die_reading, config_pth) as child:
            assert child.get() == "ready"
            pub.send(msg=b"first")
            child.pipe.send("die")
            child.end(-signal.SIGKILL)
        for number in range(3000):
            pub.send(msg=b"%d " % number + bytes(1000))
            with sub.receive(timeout=0) as msg:
                assert msg is not None
        # The last one is still there.
        assert sub.front() == b"2999 " + bytes(1000)
        assert (tmp_path / "queue" / "data.mdb").stat().st_size <= bound
    with support.open_queue(config_pth) as queue:
        assert not queue.check()
        entry, = queue.statistics().subscribers
        assert (entry.acknowledged, entry.dropped_by_mark) == (3000, 0)


@pytest.mark.parametrize("slots", [1, 3])
def test_table_full_of_killed_readers(tmp_path: Path, slots: int) -> None:
    config_pth = support.make_queue(tmp_path, max_reader_num=slots, busy_timeout_secs=5)
    with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
        children = [support.Child(die_reading, config_pth) for _ in range(slots)]
        for child in children:
            assert child.get() == "ready"
        for child in children:
            child.pipe.send("die")
            child.end(-signal.SIGKILL)
            child.pipe.close()
        pub.send(msg=b"first")
        with sub.receive(timeout=0) as msg:
            assert msg == b"first"
        # Others can open the queue again.
        with support.Child(support.hold_message, config_pth) as child:
            pub.send(msg=b"second")
            assert child.get() == b"second"
            child.pipe.send("finish")
            assert child.get() == "done"
            child.end()
