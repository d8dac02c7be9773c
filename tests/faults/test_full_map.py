"""Test full stores: what makes room works, whatever else is full, and in another boot."""

import signal
from pathlib import Path

import pytest

from persipubsub import errors
from persipubsub.lmdb_engine import files
from tests import support
from tests.faults import replay
from tests.faults.test_disk_full import Filler, Users, hold_snapshot, on_small_disk


@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("is_closed", [True, False])
def test_full_store_in_another_boot(tmp_path: Path, durability: str, is_closed: bool) -> None:
    """What is written at the first opening then finds room, also in a store that is rebuilt."""
    config_pth = support.make_queue(tmp_path,
                                    durability=durability,
                                    strategy="reject",
                                    max_db_size_bytes=1 << 18)

    def fill(pipe: support.Connection) -> None:
        users = Users(config_pth)
        sent, error = users.send_until_error(0)
        pipe.send(error)
        support.queue_of(users.pub).secure()
        if is_closed:
            users.close()
        pipe.send(sent)
        pipe.recv()

    def receive(pipe: support.Connection) -> None:
        replay.new_boot(1)
        users = Users(config_pth)
        pipe.send(users.send(1000))
        pipe.send(users.receive_all())
        pipe.send([users.send(1000), users.receive()])
        pipe.send(users.check())
        users.close()

    with support.Child(fill) as child:
        assert child.get() == "QueueFullError"
        sent = child.get()
    with support.Child(receive) as child:
        assert child.get() == "QueueFullError"
        assert child.get() == list(range(sent))
        assert child.get() == ["", 1000]
        assert child.get() == []
        child.end()


def test_reader_that_is_stopped_keeps_the_pages(tmp_path: Path) -> None:
    """Nothing is dropped in vain: the error names its process, and all goes on when it is gone."""
    config_pth = support.make_queue(tmp_path, durability="os", max_db_size_bytes=1 << 19)
    users = Users(config_pth)
    with support.Child(hold_snapshot, config_pth) as child:
        assert child.get() == "reading"
        child.kill(signal.SIGSTOP)
        sent = 0
        with pytest.raises(errors.DiskFullError, match=f"{child.process.pid}"):
            while True:
                users.pub.send(b"%d " % sent + bytes(3000))
                sent += 1
                assert users.receive() == sent - 1
    statistics = support.queue_of(users.pub).statistics().subscribers[0]
    # The last one was sent, and could not be acknowledged, or was not sent.
    assert statistics.dropped_by_mark == 0 and statistics.acknowledged in (sent - 1, sent)
    assert users.receive_all() == list(range(statistics.acknowledged, sent))
    for index in range(300):
        assert users.send(index) == "" and users.receive() == index
    assert users.check() == []
    users.close()


# Nor room on the disk


def fill_store_and_disk(directory: Path, durability: str) -> None:
    """What makes room in a full store needs room on the disk: the reserve is for that."""
    config_pth = support.make_queue(directory,
                                    durability=durability,
                                    checkpoint_secs=0.05,
                                    strategy="reject",
                                    max_db_size_bytes=1 << 18)
    users = Users(config_pth)
    sent, error = users.send_until_error(0)
    assert error == "QueueFullError"
    filler = Filler(directory)
    filler.fill()
    reserve = directory / "queue" / files.RESERVE
    with support.Child(hold_snapshot, config_pth) as child:
        # A backup, say: as long as it reads, no page is free.
        assert child.get() == "reading"
        assert [users.receive() for _ in range(3)] == list(range(3))
    assert not reserve.exists()
    filler.free()
    support.until(reserve.exists, "room is kept aside again")
    assert users.receive_all() == list(range(3, sent))
    assert users.send(sent) == "" and users.receive() == sent
    users.close()


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_full_store_on_a_full_disk(tmp_path: Path, durability: str) -> None:
    on_small_disk(tmp_path, fill_store_and_disk, "2m", durability)
