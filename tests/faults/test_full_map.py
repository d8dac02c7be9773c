"""Test full stores: what makes room works, whatever else is full, and in another boot."""

import contextlib
import itertools
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from persipubsub import Sub, control, errors
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


# A store without a free page

LIMIT = 1 << 19


def add_to_file(config_pth: Path, names: Sequence[str]) -> None:
    with support.edited(config_pth) as content:
        content["queues"]["queue"]["subscribers"] += names
        content.update((name, {"in_queue": "queue"}) for name in names)


@pytest.fixture(name="full_pth", scope="module")
def fixture_full_pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fill a store with messages, and what is kept aside for acknowledgements with subscribers."""
    config_pth = support.make_queue(tmp_path_factory.mktemp("full"),
                                    durability="os",
                                    strategy="reject",
                                    max_db_size_bytes=LIMIT)
    users = Users(config_pth)
    assert users.send_until_error(0)[1] == "QueueFullError"
    users.close()
    before = config_pth.read_bytes()
    count = 0
    for step in (200, 50, 10, 1):
        while True:
            names = [f"{count + index:05d}" + "z" * 240 for index in range(step)]
            content = config_pth.read_bytes()
            add_to_file(config_pth, names)
            if support.outcome(lambda: control.initialize_all_dbs(config_pth)):
                config_pth.write_bytes(content)
                break
            count += step
    print(f"{count} subscribers")
    config_pth.write_bytes(before)
    return config_pth


@pytest.fixture(name="config_pth")
def fixture_config_pth(full_pth: Path, tmp_path: Path) -> Path:
    """Copy the full store."""
    shutil.copytree(full_pth.with_name("queue"), tmp_path / "queue")
    return support.write_config(tmp_path,
                                durability="os",
                                strategy="reject",
                                max_db_size_bytes=LIMIT)


def add_with_control(config_pth: Path) -> None:
    control.add_subscriber(config_pth, "queue", "a" * 250)


def add_many_with_file(config_pth: Path) -> None:
    add_to_file(config_pth, ["b" * 240 + f"{index:05d}" for index in range(20)])
    control.initialize_all_dbs(config_pth)


def add_with_queue(config_pth: Path) -> None:
    with support.open_queue(config_pth) as queue:
        for index in range(20):
            queue.add_subscriber("c" * 240 + f"{index:05d}")


def fail_to_work(config_pth: Path) -> None:
    with Sub("sub", config_pth) as sub, pytest.raises(KeyError):
        with sub.receive_many(1000, timeout=0):
            raise KeyError("z" * 1000)


def receive_out_of_order(config_pth: Path) -> None:
    """Leave a range ahead of the position for each message."""
    with Sub("sub", config_pth) as sub:
        with contextlib.ExitStack() as first, contextlib.ExitStack() as later:
            for _ in range(50):
                first.enter_context(sub.receive(timeout=0))
                later.enter_context(sub.receive(timeout=0))


def receive_newest(config_pth: Path) -> None:
    with Sub("sub", config_pth) as sub, sub.receive_to_top(timeout=0) as message:
        assert message is not None


@pytest.mark.parametrize("add", [add_with_control, add_many_with_file, add_with_queue],
                         ids=lambda add: str(add.__name__))
def test_error_of_a_full_store_says_what_to_do(config_pth: Path, add: Callable[[Path],
                                                                               None]) -> None:
    with pytest.raises(errors.DiskFullError) as info:
        for _ in range(10):
            add(config_pth)
    text = str(info.value)
    assert str(config_pth.with_name("queue")) in text
    assert f"{LIMIT} bytes (max_db_size_bytes). Raise max_db_size_bytes" in text
    assert "Environment(" not in text


@pytest.mark.parametrize("use", [
    fail_to_work, receive_out_of_order, receive_newest, support.receive_all,
    control.prune_dangling_messages, control.clear_all_subs, control.statistics, control.verify,
    control.compact, lambda pth: control.peek(pth, "sub"),
    lambda pth: control.seek(pth, "sub", "end"), lambda pth: control.seek(pth, "sub", "beginning"),
    lambda pth: control.pause(pth, "sub"), lambda pth: control.delete(pth, "sub", 50),
    lambda pth: control.backup(pth, "queue", pth.with_name("backup")),
    lambda pth: control.remove_subscriber(pth, "queue", "sub"),
    lambda pth: control.stored_settings(pth, "queue"), lambda pth: control.drop_queue(pth, "queue")
])
def test_what_does_not_add_works_in_a_full_store(config_pth: Path, use: Callable[[Path],
                                                                                 object]) -> None:
    use(config_pth)
    if config_pth.with_name("queue").exists():
        assert control.verify(config_pth) == {"queue": ()}


@pytest.mark.parametrize("is_open", [True, False])
def test_full_store_can_be_made_larger(config_pth: Path, is_open: bool) -> None:
    """As its error says, also while this process has it open, and another one is at a read."""
    before = control.statistics(config_pth)["queue"].messages
    with contextlib.ExitStack() as stack:
        if is_open:
            # As long as it reads, no page is free, not even for the settings.
            child = stack.enter_context(support.Child(hold_snapshot, config_pth))
            assert child.get() == "reading"
            stack.enter_context(Sub("sub", config_pth))
        with pytest.raises(errors.DiskFullError):
            for index in itertools.count():
                add_to_file(config_pth, [f"{index:05d}" + "d" * 240])
                control.initialize_all_dbs(config_pth)
        with support.edited(config_pth) as content:
            content["queues"]["queue"]["max_db_size_bytes"] = 4 * LIMIT
        control.initialize_all_dbs(config_pth)
        support.send(config_pth, bytes(LIMIT))
    assert len(support.receive_all(config_pth)) == before + 1
    assert control.verify(config_pth) == {"queue": ()}


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
