"""Test that what is tried again ends, also if others undo each time what it did."""

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from persipubsub import Pub, Sub, control
from persipubsub.lmdb_engine import format as fmt
from tests import support

#: Most looks at the queue for one message: a few are needed.
LOOKS = 100


def test_newest_message_is_taken_while_a_newer_one_comes_after_each_look(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_pth = support.make_queue(tmp_path, durability="os")
    with support.open_queue(config_pth) as queue:
        consumer = queue.consumer("sub")
        read, sent = consumer.environment.read, [b"0"]
        queue.put(sent)

        def read_and_send(*args: Any) -> Any:
            found = read(*args)
            assert len(sent) < LOOKS, "Expected to take the newest message, but it looks for ever."
            sent.append(b"%d" % len(sent))
            queue.put(sent[-1:])
            return found

        monkeypatch.setattr(consumer.environment, "read", read_and_send)
        lease = consumer.take(timeout=0, is_newest=True)
        monkeypatch.undo()
        assert lease is not None
        message, = lease.messages
        lease.ack()
        # All before it were skipped, none after it.
        rest = []
        while (lease := consumer.take(timeout=0)) is not None:
            rest += lease.messages
            lease.ack()
        assert rest == sent[sent.index(message) + 1:]
        assert not queue.check()


# Logs that contradict themselves


def change_blocks(
        config_pth: Path, change: Callable[[int, fmt.Block, tuple[int, ...]],
                                           tuple[fmt.Block, tuple[int, ...]]]) -> None:
    """Write the records of blocks anew, with right checksums."""
    with lmdb.open(str(config_pth.with_name("queue")), max_dbs=16, create=False) as environment:
        data = environment.open_db(b"data_db", create=False)
        with environment.begin(write=True, db=data, buffers=True) as txn:
            for key, value in [(bytes(key), bytes(value)) for key, value in txn.cursor()]:
                block = fmt.unpack_block(memoryview(value), fmt.unpack_number(key))
                totals = fmt.unpack_totals(memoryview(value), block)
                place = fmt.unpack_number(key)
                block, totals = change(place, block, totals)
                record = fmt.pack_block(*block[:6], totals)
                txn.put(key, record + value[len(record):])


def receive_in_child(config_pth: Path) -> str:

    def receive() -> None:
        with Sub("sub", config_pth) as sub, sub.receive(timeout=0):
            pass

    outcome, = support.outcomes_in_child(receive)
    return outcome


def test_message_that_is_too_old_behind_one_that_is_not(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send_each(config_pth, *[b"%d" % number for number in range(10)])
    with Sub("sub", config_pth) as sub:
        with sub.receive_many(max_msgs=5, timeout=0) as messages:
            assert len(messages) == 5

    def change(place: int, block: fmt.Block,
               totals: tuple[int, ...]) -> tuple[fmt.Block, tuple[int, ...]]:
        return (block._replace(time_ns=0) if place >= 7 else block), totals

    change_blocks(config_pth, change)
    with Sub("sub", config_pth) as sub, sub.receive(timeout=0) as message:
        # As it is still in use, it is the oldest one. What is too old would be in front of it.
        assert message == b"5"
        assert receive_in_child(config_pth) == "StoreCorruptError"
    assert control.verify(config_pth)["queue"]


def test_totals_that_count_messages_of_others(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path,
                                    publishers={
                                        "pub": ["sub"],
                                        "other": ["other"]
                                    },
                                    subscribers=["sub", "other"])
    support.send(config_pth, b"for sub")
    with Pub("other", config_pth) as pub:
        for _ in range(20):
            pub.send(b"for other")

    def change(place: int, block: fmt.Block,
               totals: tuple[int, ...]) -> tuple[fmt.Block, tuple[int, ...]]:
        # The first list of recipients is that of ``sub``.
        return block, (place, *[0] * (len(totals) - 1))

    change_blocks(config_pth, change)
    assert support.receive_all(config_pth, "other") == [b"for other"] * 20
    with Sub("sub", config_pth) as sub, sub.receive(timeout=0) as message:
        assert message == b"for sub"
    assert receive_in_child(config_pth) == "StoreCorruptError"


# Others that undo what was done


@pytest.fixture(name="stubborn_reserve")
def _stubborn_reserve(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let another process make the reserve again each time that it is spent, and use the room."""
    unlink = os.unlink

    def unlink_others(path: Any, **options: Any) -> None:
        if not str(path).endswith("reserve"):
            unlink(path, **options)

    with monkeypatch.context() as context:
        context.setattr(os, "unlink", unlink_others)
        yield


@pytest.mark.usefixtures("stubborn_reserve")
def test_acknowledgement_ends_if_the_room_that_it_makes_is_used_by_others(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, busy_timeout_secs=0.5, checkpoint_secs=3600)
    support.send(config_pth, bytes(100_000))

    def work() -> None:
        with Sub("sub", config_pth) as sub:
            with sub.receive(timeout=0) as message:
                assert message is not None
                # What is written behind this place of any file fails as on a full disk.
                resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, ) * 2)

    assert support.outcomes_in_child(work) == ["DiskFullError"]
    assert support.receive_all(config_pth) == [bytes(100_000)]


def send_each_time(pipe: support.Connection, config_pth: Path) -> None:
    with Pub("pub", config_pth) as pub:
        pipe.send("ready")
        while pipe.recv() == "go":
            pub.send(b"message")
            pipe.send("sent")


def test_verifying_ends_if_there_is_a_commit_at_each_attempt(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, durability="os", busy_timeout_secs=0.5)
    data = str(tmp_path / "queue" / "data.mdb")

    with support.Child(send_each_time, config_pth) as child:
        assert child.get() == "ready"

        def work() -> None:
            opened = os.open

            def send_and_open(path: Any, *args: Any, **options: Any) -> int:
                if str(path) == data:
                    child.pipe.send("go")
                    assert child.get() == "sent"
                return opened(path, *args, **options)

            setattr(os, "open", send_and_open)
            try:
                control.verify(config_pth)
            finally:
                setattr(os, "open", opened)

        assert support.outcomes_in_child(work) == ["BusyTimeoutError"]
        assert control.verify(config_pth) == {"queue": ()}
        child.pipe.send("end")
        child.end()
