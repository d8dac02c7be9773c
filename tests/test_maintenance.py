"""Test what control does to whole queues: verify, back up, restore, compact, drop, subscribers."""

import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from persipubsub import Pub, Sub, control, errors
from tests import stores, support
from tests.faults import tracing
from tests.support import make_queue, receive_all, send_each

BOTH = pytest.mark.parametrize("durability", ["fsync", "os"])


def next_number(config_pth: Path) -> int:
    return control.statistics(config_pth)["queue"].next_number


def assert_sound(config_pth: Path) -> None:
    assert control.verify(config_pth) == {"queue": ()}


# Verifying


@BOTH
def test_sound_queue_is_verified_while_it_is_used(tmp_path: Path, durability: str) -> None:
    config_pth = make_queue(tmp_path, durability=durability)
    send_each(config_pth, b"x" * 10000, b"y")

    def use_for_ever(pipe: support.Connection) -> None:
        with Pub("pub", config_pth) as pub:
            pipe.send("begun")
            while True:
                pub.send_many([b"z" * 1000] * 10)
                receive_all(config_pth)

    with support.Child(use_for_ever) as child:
        child.get()
        for _ in range(20):
            assert_sound(config_pth)


def test_damaged_page_is_found_without_a_crash(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path)
    send_each(config_pth, *[b"x" * 2000] * 20)
    path = tmp_path / "queue" / "data.mdb"
    content = bytearray(path.read_bytes())
    # All pages behind the meta pages claim to be of another kind.
    for page in range(2, len(content) // 4096):
        content[page * 4096 + 10] ^= 0x0f
    path.write_bytes(content)
    outcomes = support.outcomes_in_child(lambda: control.verify(config_pth))
    assert outcomes == [""]
    assert control.verify(config_pth)["queue"]


# Backups


@BOTH
def test_backup_is_restored(tmp_path: Path, durability: str) -> None:
    config_pth = make_queue(tmp_path, durability=durability)
    send_each(config_pth, b"1", b"2")
    receive_all(config_pth)
    send_each(config_pth, b"3", b"4")
    target = tmp_path / "backup"
    size = control.backup(config_pth, "queue", target)
    assert target.stat().st_size == size
    assert target.stat().st_mode & 0o777 == 0o600
    assert receive_all(config_pth) == [b"3", b"4"]
    send_each(config_pth, b"5")
    used = next_number(config_pth)

    control.restore(config_pth, "queue", target)
    assert_sound(config_pth)
    # No number is used again, whatever happened since the backup.
    assert next_number(config_pth) > used
    send_each(config_pth, b"6")
    assert receive_all(config_pth) == [b"3", b"4", b"6"]
    assert_sound(config_pth)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".new")] == []


def test_no_number_is_used_twice_by_repeated_restoring(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path)
    send_each(config_pth, b"1")
    control.backup(config_pth, "queue", tmp_path / "backup")
    numbers = set()
    for _ in range(3):
        send_each(config_pth, b"2")
        number = control.peek(config_pth, "sub", count=2)[-1].number
        assert number not in numbers
        numbers.add(number)
        control.restore(config_pth, "queue", tmp_path / "backup")
        assert receive_all(config_pth) == [b"1"]


def test_backup_creates_a_queue_elsewhere(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path)
    send_each(config_pth, b"1")
    control.backup(config_pth, "queue", tmp_path / "backup")
    (tmp_path / "elsewhere").mkdir()
    # Another durability, and one more subscriber.
    other_pth = support.write_config(tmp_path / "elsewhere",
                                     subscribers=["sub", "other"],
                                     durability="os")
    control.restore(other_pth, "queue", tmp_path / "backup")
    send_each(other_pth, b"2")
    assert receive_all(other_pth) == [b"1", b"2"]
    subscribers = control.statistics(other_pth)["queue"].subscribers
    assert [one.subscriber for one in subscribers] == ["other", "sub"]
    assert_sound(other_pth)


def test_backup_replaces_nothing(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path)
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ["file", "link", "queue"]:
        with pytest.raises(errors.StoreError, match="there already"):
            control.backup(config_pth, "queue", tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"precious"
    with pytest.raises(errors.AccessError, match="no such directory"):
        control.backup(config_pth, "queue", tmp_path / "missing" / "backup")


@BOTH
def test_backup_of_a_damaged_store_fails_and_leaves_nothing(tmp_path: Path,
                                                            durability: str) -> None:
    config_pth = make_queue(tmp_path, durability=durability)
    send_each(config_pth, b"before", b"some content that is easily found", b"behind")
    path = tmp_path / "queue" / "data.mdb"
    path.write_bytes(path.read_bytes().replace(b"some content", b"what content"))
    with pytest.raises(errors.StoreCorruptError, match="checksum"):
        control.backup(config_pth, "queue", tmp_path / "backup")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "queue"]


@pytest.mark.parametrize("action", ["backup", "compact"])
def test_copy_of_damaged_pages_ends_with_an_error(tmp_path: Path, action: str) -> None:
    config_pth = make_queue(tmp_path)
    send_each(config_pth, *[b"%d." % number * 300 for number in range(100)])
    path = tmp_path / "queue" / "data.mdb"
    content = bytearray(path.read_bytes())
    # The root of the newer of the two trees, behind the number of whose transaction it is.
    newer = max((0, 4096), key=lambda meta: struct.unpack_from("=Q", content, meta + 144))
    root = struct.unpack_from("=Q", content, newer + 128)[0] * 4096
    # In the middle of the messages comes the root again: who walks over all pages never ends.
    leaves = [
        page for page in range(8192, len(content), 4096) if b"50.50." in content[page:page + 4096]
    ]
    for page in leaves:
        content[page:page + 4096] = content[root:root + 4096]
    path.write_bytes(content)
    before = support.snapshot(tmp_path / "queue")

    def copy() -> None:
        if action == "backup":
            control.backup(config_pth, "queue", tmp_path / "backup")
        else:
            control.compact(config_pth, "queue")

    assert support.outcomes_in_child(copy) == ["StoreCorruptError"]
    with pytest.raises(errors.StoreCorruptError, match="data.mdb to be sound"):
        copy()
    assert support.snapshot(tmp_path / "queue")["data.mdb"] == before["data.mdb"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "queue"]


def test_what_is_no_backup_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path)
    send_each(config_pth, b"some content")
    before = support.snapshot(tmp_path / "queue")
    (tmp_path / "text").write_bytes(b"something else" * 10000)
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    control.backup(config_pth, "queue", tmp_path / "backup")
    whole = (tmp_path / "backup").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-4096])
    (tmp_path / "damaged").write_bytes(whole.replace(b"some content", b"what content"))
    for name in ["text", "empty", "fifo", "cut", "damaged", "queue", "missing"]:
        with pytest.raises(errors.StoreError, match=name):
            control.restore(config_pth, "queue", tmp_path / name)
    after = support.snapshot(tmp_path / "queue")
    assert {**after, "lock.mdb": b"", "shared": b""} == {**before, "lock.mdb": b"", "shared": b""}
    assert receive_all(config_pth) == [b"some content"]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_damaged_queue_is_restored(tmp_path: Path, damage: str) -> None:
    config_pth = make_queue(tmp_path, durability="os")
    send_each(config_pth, b"1")
    control.backup(config_pth, "queue", tmp_path / "backup")
    path = tmp_path / "queue" / "data.mdb"
    if damage == "truncated":
        os.truncate(path, 4096)
    elif damage == "garbage":
        path.write_bytes(os.urandom(8192))
        # It is not ours to decide what that file is.
        with pytest.raises(errors.FormatError):
            control.restore(config_pth, "queue", tmp_path / "backup")
    if damage != "truncated":
        path.unlink()
    control.restore(config_pth, "queue", tmp_path / "backup")
    assert receive_all(config_pth) == [b"1"]
    assert_sound(config_pth)


def test_old_journal_never_takes_the_place_of_what_was_restored(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path, durability="os")
    send_each(config_pth, b"1")
    control.backup(config_pth, "queue", tmp_path / "backup")
    receive_all(config_pth)
    send_each(config_pth, b"2")
    stores.lose_power(tmp_path / "queue")
    control.restore(config_pth, "queue", tmp_path / "backup")
    stores.lose_power(tmp_path / "queue")
    assert receive_all(config_pth) == [b"1"]
    assert_sound(config_pth)


def publish_for_ever(pipe: support.Connection, config_pth: Path) -> None:
    with Pub("pub", config_pth) as pub:
        number = 0
        while True:
            pub.send_many([b"%d" % (number + index) for index in range(3)])
            number += 3
            pipe.send(number)


def take_for_ever(pipe: support.Connection, config_pth: Path) -> None:
    pipe.send("begun")
    with Sub("other", config_pth) as sub:
        while True:
            with sub.receive_many(max_msgs=10, timeout=10):
                pass


def drain(child: support.Child) -> int:
    last = 0
    while child.pipe.poll(0):
        last = child.pipe.recv()
    return last


@BOTH
def test_backup_under_full_load_has_all_that_was_acknowledged(tmp_path: Path,
                                                              durability: str) -> None:
    config_pth = make_queue(tmp_path,
                            subscribers=["sub", "other"],
                            publishers={"pub": ["sub", "other"]},
                            durability=durability)
    sent = []
    with support.Child(publish_for_ever, config_pth) as publisher, \
            support.Child(take_for_ever, config_pth) as taker:
        taker.get()
        publisher.get()
        for index in range(5):
            sent.append(drain(publisher) or publisher.get())
            control.backup(config_pth, "queue", tmp_path / f"backup{index}")
    for index, count in enumerate(sent):
        control.restore(config_pth, "queue", tmp_path / f"backup{index}")
        assert_sound(config_pth)
        messages = receive_all(config_pth)
        assert messages == [b"%d" % number for number in range(len(messages))]
        assert len(messages) >= count


# Compacting


@BOTH
def test_compact_gives_room_back_and_keeps_all(tmp_path: Path, durability: str) -> None:
    config_pth = make_queue(tmp_path, durability=durability)
    send_each(config_pth, b"first")
    receive_all(config_pth)
    with Pub("pub", config_pth) as pub:
        pub.send_many([os.urandom(1000) for _ in range(2000)])
    control.clear_all_subs(config_pth)
    send_each(config_pth, b"last")
    number = next_number(config_pth)
    sizes = control.compact(config_pth)["queue"]
    assert sizes.before > 4000000 > 1000000 > sizes.after
    assert (tmp_path / "queue" / "data.mdb").stat().st_mode & 0o777 == 0o600
    assert next_number(config_pth) == number
    assert_sound(config_pth)
    assert receive_all(config_pth) == [b"last"]
    assert control.statistics(config_pth)["queue"].subscribers[0].acknowledged == 2


@BOTH
def test_compact_of_a_drained_queue_needs_no_prune(tmp_path: Path, durability: str) -> None:
    config_pth = make_queue(tmp_path, durability=durability)
    send_each(config_pth, *[bytes(100000)] * 100)
    assert len(receive_all(config_pth)) == 100
    sizes = control.compact(config_pth)["queue"]
    # What is left: a store with one finished block, the reserve, and two segments of the journal.
    assert sizes.before > 10000000 > 1500000 > sizes.after
    assert sizes.after == control.statistics(config_pth)["queue"].disk_bytes


def use(config_pth: Path) -> list[Callable[[], object]]:
    return [
        lambda: control.compact(config_pth),
        lambda: control.restore(config_pth, "queue", config_pth.parent / "backup"),
        lambda: control.drop_queue(config_pth, "queue")
    ]


def hold_open(pipe: support.Connection, config_pth: Path) -> None:
    with Sub("sub", config_pth):
        pipe.send("open")
        pipe.recv()


def test_queue_in_use_is_left_alone(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path)
    send_each(config_pth, b"1")
    control.backup(config_pth, "queue", tmp_path / "backup")
    with support.Child(hold_open, config_pth) as child:
        child.get()
        for function in use(config_pth):
            with pytest.raises(errors.QueueInUseError, match=f"process {child.process.pid}"):
                function()
        child.pipe.send("end")
        child.end()
    # This process counts, too.
    with support.open_queue(config_pth):
        for function in use(config_pth):
            with pytest.raises(errors.QueueInUseError):
                function()
    assert receive_all(config_pth) == [b"1"]


def look_for_ever(pipe: support.Connection, config_pth: Path) -> None:
    """Look at the queue again and again, as scrapes of metrics do."""
    control.statistics(config_pth)
    pipe.send("looked")
    while True:
        control.statistics(config_pth)
        time.sleep(0.005)


def test_who_looks_is_waited_for(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path)
    with support.Child(look_for_ever, config_pth) as child:
        assert child.get() == "looked"
        for _ in range(60):
            control.compact(config_pth)


@pytest.mark.parametrize("place", range(1, 10))
@pytest.mark.parametrize("action", ["compact", "restore"])
def test_killed_in_the_middle(tmp_path: Path, action: str, place: int) -> None:
    tracing.require()
    config_pth = make_queue(tmp_path, durability="os", checkpoint_secs=3600)
    send_each(config_pth, b"old")
    control.backup(config_pth, "queue", tmp_path / "backup")
    send_each(config_pth, b"new")

    def work() -> None:
        use(config_pth)[action == "restore"]()

    # Each change of a name, and the flush of each.
    assert tracing.inject(lambda: work, "rename,unlink,fsync", "signal=KILL",
                          place) in (0, -signal.SIGKILL)
    assert_sound(config_pth)
    assert not (tmp_path / "queue" / "data.mdb.new").exists()
    messages = receive_all(config_pth)
    assert messages == [b"old", b"new"] or (action, messages) == ("restore", [b"old"])
    send_each(config_pth, b"later")
    assert receive_all(config_pth) == [b"later"]
    control.compact(config_pth)
    assert_sound(config_pth)


# Dropping


@BOTH
def test_drop_removes_the_directory(tmp_path: Path, durability: str) -> None:
    config_pth = make_queue(tmp_path, durability=durability)
    send_each(config_pth, b"1")
    receive_all(config_pth)
    assert not control.drop_queue(config_pth, "queue")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
    with pytest.raises(errors.NotInitializedError):
        control.drop_queue(config_pth, "queue")
    control.initialize_all_dbs(config_pth)
    assert not receive_all(config_pth)


@pytest.mark.parametrize("call", ["unlink", "rmdir"])
def test_drop_that_is_killed_at_its_end_is_repeated(tmp_path: Path, call: str) -> None:
    tracing.require()
    config_pth = make_queue(tmp_path)
    lock = tmp_path / "queue" / "open.lock"

    def work() -> None:
        control.drop_queue(config_pth, "queue")

    path = lock if call == "unlink" else lock.parent
    assert tracing.inject(lambda: work, call, "signal=KILL", paths=[path]) == -signal.SIGKILL
    assert set(os.listdir(lock.parent)) <= {"open.lock"}
    assert not control.drop_queue(config_pth, "queue")
    assert not lock.parent.exists()
    with pytest.raises(errors.NotInitializedError):
        control.drop_queue(config_pth, "queue")


def test_drop_leaves_what_is_not_ours(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path)
    (tmp_path / "queue" / "notes.txt").write_text("precious")
    (tmp_path / "queue" / "data.mdb.bak").write_text("precious")
    assert control.drop_queue(config_pth, "queue") == ("data.mdb.bak", "notes.txt")
    assert sorted(os.listdir(tmp_path / "queue")) == ["data.mdb.bak", "notes.txt"]


# Subscribers


def test_subscriber_comes_and_goes_while_the_queue_is_used(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path)
    with Pub("pub", config_pth) as pub:
        pub.send(b"1")
        assert control.add_subscriber(config_pth, "queue", "late")
        assert not control.add_subscriber(config_pth, "queue", "late")
        for index in range(100):
            pub.send(b"%d" % index)
        assert len(receive_all(config_pth)) == 101
        found = control.peek(config_pth, "late", count=1000, queue_key="queue")
        assert len(found) == 100
        with support.open_queue(config_pth) as queue:
            lease = stores.lease(queue, name="late")
            assert control.remove_subscriber(config_pth, "queue", "late") == 100
            # It had a message in hand: that is acknowledged into the void.
            lease.ack()
            with pytest.raises(errors.NotInitializedError):
                queue.consumer("late").front()
        assert control.statistics(config_pth)["queue"].messages == 0
        for index in range(100):
            pub.send(b"%d" % index)
        assert control.statistics(config_pth)["queue"].messages == 100
    with pytest.raises(errors.NotInitializedError, match="'late'"):
        control.remove_subscriber(config_pth, "queue", "late")
    assert_sound(config_pth)


# Looking


def test_peek_shows_what_is_pending_and_takes_nothing(tmp_path: Path) -> None:
    publishers = {"pub": ["sub", "other"], "narrow": ["other"]}
    config_pth = make_queue(tmp_path, publishers, subscribers=["sub", "other"])
    send_each(config_pth, b"1", b"2", b"3")
    with Pub("narrow", config_pth) as pub:
        pub.send(b"not for sub")
        pub.init(pub_id="pub", config_pth=config_pth)
        pub.send_many([b"%d" % index for index in range(4, 1300)])
    with support.open_queue(config_pth) as queue:
        first = stores.lease(queue)
        stores.take(queue)
        found = control.peek(config_pth, "sub", count=4000)
        expected = [b"%d" % index for index in range(1, 1300) if index != 2]
        assert [message.content for message in found] == expected
        again = control.peek(config_pth, "sub", count=2, start=found[500].number)
        assert [one.content for one in again] == [one.content for one in found[500:502]]
        first.nack()
    for start in (10**6, 2**64 - 1, 2**64, 10**23):
        assert not control.peek(config_pth, "sub", start=start)
    assert control.peek(config_pth, "other", count=4)[3].subscribers == ("other", )
    assert receive_all(config_pth) == expected


def test_follow_sees_what_comes(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path)
    send_each(config_pth, b"1", b"2", b"3")
    assert [one.content
            for one in next(control.follow(config_pth, "queue", last=2))] == [b"2", b"3"]
    found = control.follow(config_pth, "queue")
    assert next(found) == []
    send_each(config_pth, b"4")
    while not (messages := next(found)):
        pass
    assert [one.content for one in messages] == [b"4"]
    found.close()
    assert receive_all(config_pth) == [b"1", b"2", b"3", b"4"]


#: Look twice, and tell which files were opened to write, renamed or removed, and what was called in
#: another thread.
_AUDITED_LOOK = """if True:
    import os, sys, threading
    import persipubsub.control
    seen = []
    def notice(event, arguments):
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_TRUNC):
            seen.append(str(arguments[0]))
        elif event in ("os.rename", "os.mkdir"):
            seen.append(event)
    sys.addaudithook(notice)
    threading.settrace(lambda frame, event, argument: seen.append(frame.f_code.co_name))
    statistics = persipubsub.control.statistics(sys.argv[1])
    messages = persipubsub.control.peek(sys.argv[1], "sub", count=9)
    print(statistics["queue"].messages, len(messages), *seen)
"""


def state_of(directory: Path) -> list[tuple[str, int, int]]:
    """List the files of a queue with what changes when they are written, and the directory."""
    return [
        (path.name, path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted([directory, *directory.iterdir(), *(directory / "journal").iterdir()])
        if path.name not in ("lock.mdb", "shared")
    ]


@BOTH
def test_look_at_a_queue_that_nobody_uses_writes_nothing(tmp_path: Path, durability: str) -> None:
    config_pth = make_queue(tmp_path, durability=durability, checkpoint_secs=0.001)
    send_each(config_pth, b"x")
    before = state_of(tmp_path / "queue")
    done = support.run_python(_AUDITED_LOOK, config_pth)
    assert (done.stdout.split(), done.stderr) == (["1", "1"], "")
    assert state_of(tmp_path / "queue") == before


def test_look_at_a_queue_that_was_left_unclean(tmp_path: Path) -> None:
    config_pth = make_queue(tmp_path, durability="os", checkpoint_secs=3600)

    def run(pipe: support.Connection) -> None:
        with support.open_queue(config_pth) as queue:
            queue.put([b"x"])
            pipe.send("sent")
            pipe.recv()

    with support.Child(run) as child:
        child.get()
    assert control.statistics(config_pth)["queue"].messages == 1
    assert receive_all(config_pth) == [b"x"]
