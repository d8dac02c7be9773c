"""Test full maps: what makes room works, whatever else is full, and in another boot."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import contextlib
import functools
import json
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import pytest

import persipubsub.control
import persipubsub.errors
import persipubsub.queue
from persipubsub import _addition
from persipubsub.environment import _files
from tests import support
from tests.faults import replay, tracing
from tests.faults.test_disk_full import Filler, Users, on_small_disk


def fill_to_the_last_page(queue: persipubsub.queue.Queue) -> int:
    """Leave no room to acknowledge anything in; return how many messages were sent."""
    environment = queue._environment
    sent = 0
    for size in (20000, 3000):
        with contextlib.suppress(persipubsub.errors.DiskFullError):
            while True:
                put = _addition.Put([b"%d " % sent + bytes(size)], None)
                environment.write(functools.partial(queue._putter._put, put=put))
                sent += 1
    # Ids of messages are not dropped to make room.
    for size in (20000, 4000, 16):
        with contextlib.suppress(persipubsub.errors.DiskFullError):
            for index in range(1 << 20):
                key = b"i%0199d %d" % (index, size)

                def put_id(txn: Any, databases: Any, key: bytes = key, size: int = size) -> None:
                    txn.put(key, bytes(size), db=databases.once)

                environment.write(put_id)
    return sent


@pytest.mark.parametrize("strategy", ["prune_first", "prune_last"])
@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_full_map(tmp_path: pathlib.Path, durability: str, strategy: str) -> None:
    config_pth = support.write_config(tmp_path,
                                      durability=durability,
                                      strategy=strategy,
                                      max_db_size_bytes=1 << 19)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    users = Users(config_pth)
    count = 400
    for index in range(count):
        assert users.send(index) == ""
    received = users.receive_all()
    assert received == sorted(set(received)) and 20 < len(received) < count
    assert (0 if strategy == "prune_last" else count - 1) in received
    assert (0 in received) == (strategy == "prune_last")
    statistics = support.queue_of(users.pub).statistics().subscribers[0]
    assert statistics.dropped_by_mark == count - len(received)
    assert users.send(count) == "" and users.receive() == count
    assert users.check() == []
    users.close()


@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("is_closed", [True, False])
def test_full_map_in_another_boot(tmp_path: pathlib.Path, durability: str, is_closed: bool) -> None:
    """What is written at the first opening then finds no room either."""
    config_pth = support.write_config(tmp_path, durability=durability, max_db_size_bytes=1 << 18)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)

    def fill(pipe: support.Connection) -> None:
        users = Users(config_pth)
        sent = fill_to_the_last_page(support.queue_of(users.pub))
        if durability == "os":
            support.queue_of(users.pub).secure()
        if is_closed:
            users.close()
        pipe.send(sent)
        pipe.recv()

    def receive(pipe: support.Connection) -> None:
        replay.new_boot(1)
        users = Users(config_pth)
        pipe.send(users.receive_all())
        pipe.send([users.send(1000), users.receive()])
        users.close()

    with support.Child(fill) as child:
        sent = child.get()
        child.kill(signal.SIGKILL)
        child.end(-signal.SIGKILL)
    with support.Child(receive) as child:
        assert child.get() == list(range(sent))
        assert child.get() == ["", 1000]
        child.end()


def test_message_that_never_fits(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, max_db_size_bytes=1 << 19)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    users = Users(config_pth)
    assert users.send(0) == ""
    assert users.send(1, size=1 << 20) == "MessageTooLargeError"
    assert users.receive_all() == [0]
    users.close()


# Nor room on the disk


def fill_map_and_disk(directory: pathlib.Path, durability: str) -> None:
    """What makes room in a full map needs room on the disk: the reserve is for that."""
    config_pth = support.write_config(directory,
                                      durability=durability,
                                      checkpoint_secs=0,
                                      max_db_size_bytes=1 << 18)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    users = Users(config_pth)
    sent = fill_to_the_last_page(support.queue_of(users.pub))
    filler = Filler(directory)
    filler.fill()
    environment = support.queue_of(users.pub)._environment
    with support.Child(hold_snapshot, config_pth) as child:
        # A backup, say: as long as it reads, no page is free.
        assert child.get() == "reading"
        assert [users.receive() for _ in range(3)] == [0, 1, 2]
    assert not (directory / "queue" / _files.RESERVE).exists()
    filler.free()
    environment._reserve_due = 0.0
    assert users.receive_all() == list(range(3, sent))
    assert users.send(sent) == "" and users.receive() == sent
    assert (directory / "queue" / _files.RESERVE).exists()
    users.close()


def hold_snapshot(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Be in the middle of a read until killed."""
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:

        def work(*_: object) -> None:
            pipe.send("reading")
            pipe.recv()

        queue._environment.read(work)


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_full_map_on_a_full_disk(tmp_path: pathlib.Path, durability: str) -> None:
    on_small_disk(tmp_path, fill_map_and_disk, "2m", durability)


# No memory


@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("place", [1, 2])
def test_no_memory_for_a_larger_map_for_a_moment(tmp_path: pathlib.Path, durability: str,
                                                 place: int) -> None:
    """LMDB has lost its map then, and refuses all further work: the store is opened again."""
    tracing.require()
    config_pth = support.write_config(tmp_path,
                                      durability=durability,
                                      checkpoint_secs=3600,
                                      max_db_size_bytes=1 << 18)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    output = tmp_path / "output"
    sent = support.FORK.Value("i", 0)

    def start() -> Callable[[], None]:
        users = Users(config_pth)
        queue = support.queue_of(users.pub)
        sent.value = fill_to_the_last_page(queue)

        def work() -> None:
            # The map gets larger (1), and small again (2).
            first = support.outcome(users.receive)
            # The thread that writes checkpoints goes on.
            is_written = durability == "os" and queue._environment._write_checkpoint()
            output.write_text(json.dumps([first, is_written,
                                          users.receive_all(),
                                          users.send(1000)]))
            users.close()

        return work

    code = tracing.run(start, [
        "-o", os.devnull, "-P",
        str(tmp_path / "queue" / _files.DATA), "-e", "trace=mmap", "-e",
        f"inject=mmap:error=ENOMEM:when={place}"
    ])
    assert code == 0
    # The second time it was acknowledged, and the error says that it is not known.
    assert json.loads(
        output.read_text()) == ["StoreError", False,
                                list(range(place - 1, sent.value)), ""]
