"""Test checkpoints of ``os`` queues: when they are made, by whom, and what they are good for."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import contextlib
import logging
import os
import pathlib
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.queue
import persipubsub.subscriber
from persipubsub.environment import _checkpoint, _environment, _files
from persipubsub.store import _clock
from tests import support
from tests.faults import disk, tracing

SOON = 0.01


@pytest.fixture(name="config_pth")
def fixture_config_pth(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give the configuration of a queue that was made ready."""
    config_pth = support.write_config(tmp_path, durability="os", checkpoint_secs=SOON)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    yield config_pth


def opened(config_pth: pathlib.Path, is_automatic: bool = False) -> persipubsub.queue.Queue:
    """Open the queue; no checkpoint is made but when somebody says so, if not automatic."""
    queue = persipubsub.queue.Queue(support.settings(config_pth))
    # What a forked process inherits is opened by its first use.
    queue.statistics()
    checkpointer = queue._environment._checkpointer
    assert checkpointer is not None
    if not is_automatic:
        checkpointer.stop()
    return queue


def last_transaction(queue: persipubsub.queue.Queue) -> int:
    return int(queue._environment._open_handles().environment.info()["last_txnid"])


def covered(queue: persipubsub.queue.Queue) -> int:
    return _checkpoint.covered_transaction(queue.settings.path)


def wait_until_covered(queue: persipubsub.queue.Queue) -> None:
    last = last_transaction(queue)
    support.until(lambda: covered(queue) >= last, "a checkpoint")


def take_all(queue: persipubsub.queue.Queue) -> list[bytes]:
    messages: list[bytes] = []
    consumer = queue.consumer("sub")
    while (lease := consumer.take(timeout=0)) is not None:
        messages.extend(lease.messages)
        lease.acknowledge()
    return messages


def killed(work: Callable[[], None]) -> None:
    """Do something in a process that is killed right after it, with all that it has open."""

    def run(pipe: support.Connection) -> None:
        work()
        pipe.send("done")
        pipe.recv()

    with support.Child(run) as child:
        assert child.get() == "done"
        child.kill(9)
        child.end(-9)


def put_and_stay(config_pth: pathlib.Path, *messages: bytes) -> None:
    """Put messages, and never close the queue."""
    queue = opened(config_pth)
    queue.put(messages)
    KEPT.append(queue)


KEPT: list[persipubsub.queue.Queue] = []


def after_power_failure(config_pth: pathlib.Path) -> list[bytes]:
    """Open the queue in another boot, with a store that is garbage; return what there is."""
    directory = pathlib.Path(support.settings(config_pth).path)
    if (directory / _files.RUNNING).exists():
        data = directory / _files.DATA
        data.write_bytes(data.read_bytes()[:8192] + bytes(data.stat().st_size - 8192))

    def run(pipe: support.Connection) -> None:
        setattr(_clock, "boot_id", lambda: b"the boot after it")
        with opened(config_pth) as queue:
            findings = queue.check()
            pipe.send(findings or take_all(queue))

    with support.Child(run) as child:
        messages: list[bytes] = child.get()
        child.end()
    return messages


# When


def test_open_queue_has_a_checkpoint_before_anything_is_sent(config_pth: pathlib.Path) -> None:
    killed(lambda: put_and_stay(config_pth, b"of the first one"))
    with opened(config_pth):
        pass
    directory = pathlib.Path(support.settings(config_pth).path)
    (directory / _files.CHECKPOINT).unlink()
    with opened(config_pth) as queue:
        assert (directory / _files.CHECKPOINT).exists()
        assert (directory / _files.RUNNING).read_bytes() == _clock.boot_id()
        assert covered(queue) == last_transaction(queue)


def test_checkpoints_follow_what_is_done(config_pth: pathlib.Path) -> None:
    with opened(config_pth, is_automatic=True) as queue:
        for number in range(3):
            queue.put([b"%d" % number])
            wait_until_covered(queue)
        take_all(queue)
        wait_until_covered(queue)


def test_nothing_new_is_not_written_again(config_pth: pathlib.Path) -> None:
    with opened(config_pth) as queue:
        path = os.path.join(queue.settings.path, _files.CHECKPOINT)
        before = os.stat(path).st_ino
        assert queue._environment._write_checkpoint()
        assert os.stat(path).st_ino == before
        queue.put([b"new"])
        assert queue._environment._write_checkpoint()
        assert os.stat(path).st_ino != before


def test_single_slot_for_readers_is_enough(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path,
                                      durability="os",
                                      checkpoint_secs=SOON,
                                      max_reader_num=1)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with opened(config_pth) as queue:
        queue.put([b"message"])
        assert queue._environment._write_checkpoint()
        assert covered(queue) == last_transaction(queue)
        assert take_all(queue) == [b"message"]


def test_thread_sleeps_while_nothing_is_new() -> None:
    attempts: list[int] = []

    def attempt() -> bool:
        attempts.append(1)
        return True

    checkpointer = _checkpoint.Checkpointer(0.0, attempt)
    assert not attempts and checkpointer._thread is None
    checkpointer.notice()
    support.until(lambda: attempts, "the first attempt")
    support.until(lambda: not checkpointer._is_changed.is_set(), "the thread to sleep")
    checkpointer.stop()
    assert len(attempts) == 1


def test_failed_attempt_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    attempts: list[int] = []

    def attempt() -> bool:
        attempts.append(1)
        if len(attempts) == 1:
            raise persipubsub.errors.DiskFullError("full on purpose")
        return len(attempts) > 2

    checkpointer = _checkpoint.Checkpointer(0.0, attempt)
    with caplog.at_level(logging.WARNING, logger="persipubsub.checkpoint"):
        checkpointer.notice()
        support.until(lambda: len(attempts) == 3, "two more attempts")
        checkpointer.stop()
    assert "full on purpose" in caplog.text


def test_thread_goes_on_behind_an_error_of_the_lock_file(config_pth: pathlib.Path) -> None:
    """Else there would be no checkpoint any more, and nobody would be told."""
    tracing.require()
    done = support.FORK.Event()

    def start() -> Callable[[], None]:
        queue = opened(config_pth, is_automatic=True)
        wait_until_covered(queue)

        def work() -> None:
            queue.put([b"message"])
            wait_until_covered(queue)
            queue.close()
            done.set()

        return work

    lock = os.path.join(support.settings(config_pth).path, _files.CHECKPOINT_LOCK)
    options = ["-o", os.devnull, "-P", lock, "-e", "trace=flock"]
    assert tracing.run(start, [*options, "-e", "inject=flock:error=ENOLCK:when=1"]) == 0
    assert done.is_set()


def test_stop_that_comes_while_the_thread_wakes_up() -> None:
    """The event that wakes the thread must not be cleared without a look at why it was set."""
    checkpointer = _checkpoint.Checkpointer(0.0, lambda: True)

    class Racing(threading.Event):
        """Be stopped in the most awkward moment."""

        def clear(self) -> None:
            """Clear, but be set just before."""
            checkpointer._is_stopped.set()
            self.set()
            super().clear()

    checkpointer._is_changed = Racing()
    checkpointer.notice()
    thread = checkpointer._thread
    assert thread is not None
    thread.join(support.HANG_SECS)
    assert not thread.is_alive()


def test_many_begin_and_stop_at_once() -> None:
    for _ in range(300):
        checkpointer = _checkpoint.Checkpointer(0.0, lambda: True)
        errors: list[str] = []

        def stop(stop_it: Callable[[], None], errors: list[str]) -> None:
            errors.append(support.outcome(stop_it))

        threads = [threading.Thread(target=checkpointer.notice) for _ in range(2)]
        threads.append(threading.Thread(target=stop, args=(checkpointer.stop, errors)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(support.HANG_SECS)
            assert not thread.is_alive()
        assert errors == [""]
        last = checkpointer._thread
        assert last is None or not last.is_alive()


# By whom


def copy_for_ever(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Write a checkpoint into a pipe that nobody empties."""
    queue = opened(config_pth)
    queue.put([bytes(1 << 20)])
    path = pathlib.Path(queue.settings.path) / (f"{_files.CHECKPOINT}.new")
    os.mkfifo(path)
    keeper = os.open(path, os.O_RDWR)
    pipe.send("copying")
    queue._environment._write_checkpoint()
    os.close(keeper)


def has_filled(path: pathlib.Path) -> bool:
    """Tell whether a pipe has something in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return bool(os.read(descriptor, 1))
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def test_killed_copier_hinders_nobody(config_pth: pathlib.Path) -> None:
    with opened(config_pth) as queue:
        temporary = pathlib.Path(queue.settings.path) / (f"{_files.CHECKPOINT}.new")
        with support.Child(copy_for_ever, config_pth) as child:
            assert child.get() == "copying"
            support.until(lambda: has_filled(temporary), "the copy to begin")
            # One at a time; the others go on.
            assert not queue._environment._write_checkpoint()
            queue.put([b"meanwhile"])
            child.kill(9)
            child.end(-9)
        environment = queue._environment._open_handles().environment
        # The dead one's slot would keep its pages for ever.
        assert len(environment.readers().splitlines()) >= 2
        temporary.unlink()
        assert queue._environment._write_checkpoint()
        assert "no active readers" in environment.readers()
        assert covered(queue) == last_transaction(queue)


def read_for_ever(pipe: support.Connection, config_pth: pathlib.Path) -> None:

    def work(*_: object) -> None:
        pipe.send("inside")
        pipe.recv()

    persipubsub.queue.Queue(support.settings(config_pth))._environment.read(work)


def test_killed_readers_in_all_slots_hinder_no_checkpoint(tmp_path: pathlib.Path) -> None:
    slots = 4
    config_pth = support.write_config(tmp_path,
                                      durability="os",
                                      checkpoint_secs=SOON,
                                      max_reader_num=slots)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    # One that never reads: it would keep a slot.
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        assert queue._environment._checkpointer is not None
        queue._environment._checkpointer.stop()
        children = [support.Child(read_for_ever, config_pth) for _ in range(slots)]
        for child in children:
            assert child.get() == "inside"
        for child in children:
            child.kill(9)
            child.end(-9)
        queue.put([b"message"])
        assert queue._environment._write_checkpoint()
        assert covered(queue) == last_transaction(queue)


def test_leftover_of_a_killed_copier_is_overwritten(config_pth: pathlib.Path) -> None:
    with opened(config_pth) as queue:
        temporary = pathlib.Path(queue.settings.path) / (f"{_files.CHECKPOINT}.new")
        temporary.write_bytes(b"half of a copy" * 100000)
        queue.put([b"message"])
        assert queue._environment._write_checkpoint()
        assert not temporary.exists()
        _files.verify_data_file(os.path.join(queue.settings.path, _files.CHECKPOINT))


def write_many(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    queue = opened(config_pth)
    pipe.send("open")
    pipe.recv()
    done = 0
    for number in range(60):
        queue.put([b"%d" % number])
        done += queue._environment._write_checkpoint()
    support.until(queue._environment._write_checkpoint, "a checkpoint of one's own")
    pipe.send(done)
    queue.close()


def test_many_processes_at_once(config_pth: pathlib.Path) -> None:
    children = [support.Child(write_many, config_pth) for _ in range(3)]
    try:
        for child in children:
            assert child.get() == "open"
        for child in children:
            child.pipe.send("go")
        print([child.get() for child in children])
        for child in children:
            child.end()
    finally:
        for child in children:
            child.__exit__()
    path = pathlib.Path(support.settings(config_pth).path)
    _files.verify_data_file(str(path / _files.CHECKPOINT))
    assert not (path / _files.RUNNING).exists()
    with opened(config_pth) as queue:
        assert len(take_all(queue)) == 180


def test_messages_of_a_killed_publisher_are_left_to_others(config_pth: pathlib.Path) -> None:
    with opened(config_pth, is_automatic=True) as queue:
        wait_until_covered(queue)
        killed(lambda: put_and_stay(config_pth, b"last words"))
        # A subscriber that sleeps looks once a second.
        lease = queue.consumer("sub").take(timeout=0)
        assert lease is not None and lease.messages == [b"last words"]
        wait_until_covered(queue)
        lease.give_back()


def test_leaving_others_behind_covers_what_was_done(config_pth: pathlib.Path) -> None:

    def stay(pipe: support.Connection) -> None:
        put_and_stay(config_pth, b"first")
        pipe.send("open")
        pipe.recv()

    with support.Child(stay) as child:
        assert child.get() == "open"
        with opened(config_pth) as queue:
            queue.put([b"second"])
            assert covered(queue) < last_transaction(queue)
        child.kill(9)
        child.end(-9)
    assert after_power_failure(config_pth) == [b"first", b"second"]


# What for


def test_clean_end_loses_nothing(config_pth: pathlib.Path) -> None:
    with opened(config_pth) as queue:
        queue.put([b"first"])
        queue.put([b"second"])
    assert after_power_failure(config_pth) == [b"first", b"second"]


def test_end_of_the_interpreter_loses_nothing(config_pth: pathlib.Path) -> None:
    done = support.run_python(
        """if True:
        import sys
        import persipubsub.publisher
        pub = persipubsub.publisher.Pub()
        pub.init(pub_id="pub", config_pth=sys.argv[1])
        pub.send(b"first")
        pub.send(b"second")
        """, config_pth)
    assert done.returncode == 0, done.stderr
    assert after_power_failure(config_pth) == [b"first", b"second"]


def test_last_checkpoint_takes_the_place_of_the_store(config_pth: pathlib.Path) -> None:

    def work() -> None:
        put_and_stay(config_pth, b"covered")
        assert KEPT[-1]._environment._write_checkpoint()
        KEPT[-1].put([b"lost"])

    killed(work)
    assert after_power_failure(config_pth) == [b"covered"]


def cut(path: pathlib.Path, size: int) -> None:
    os.truncate(path, size)


DAMAGES: dict[str, Callable[[pathlib.Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: cut(path, 0),
    "one page": lambda path: cut(path, 4096),
    "half": lambda path: cut(path,
                             path.stat().st_size // 2),
    "minus a page": lambda path: cut(path,
                                     path.stat().st_size - 4096),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeros behind the meta pages": lambda path: path.write_bytes(path.read_bytes()[:8192] + bytes(
        path.stat().st_size - 8192)),
    "text": lambda path: path.write_text("Dear diary\n" * 2000, encoding="utf-8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_a_sound_checkpoint_the_queue_is_refused(config_pth: pathlib.Path,
                                                         damage: str) -> None:
    killed(lambda: put_and_stay(config_pth, b"message"))
    directory = pathlib.Path(support.settings(config_pth).path)
    DAMAGES[damage](directory / _files.CHECKPOINT)
    (directory / _files.RUNNING).write_bytes(b"another boot----")
    before = (directory / _files.DATA).read_bytes()
    with pytest.raises(persipubsub.errors.StoreCorruptError) as caught:
        opened(config_pth)
    text = str(caught.value)
    assert str(directory / _files.CHECKPOINT) in text
    assert "Restore a backup" in text and f"remove {directory / _files.RUNNING!s}" in text
    assert (directory / _files.DATA).read_bytes() == before
    # The way on that the error tells.
    (directory / _files.RUNNING).unlink()
    with opened(config_pth) as queue:
        assert take_all(queue) == [b"message"]


def test_store_that_is_cut_is_replaced(config_pth: pathlib.Path) -> None:
    killed(lambda: put_and_stay(config_pth, b"message"))
    directory = pathlib.Path(support.settings(config_pth).path)
    (directory / _files.RUNNING).write_bytes(b"another boot----")
    cut(directory / _files.DATA, 0)
    with opened(config_pth) as queue:
        assert not take_all(queue)
        assert queue.put([b"next"]) > 1 << 32


def test_full_disk_while_copying_keeps_the_one_before(config_pth: pathlib.Path) -> None:

    def run(pipe: support.Connection) -> None:
        queue = opened(config_pth)
        queue.put([b"covered"])
        assert queue._environment._write_checkpoint()
        queue.put([bytes(100000)])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40000, hard))
        pipe.send(support.outcome(queue._environment._write_checkpoint))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        queue.put([b"goes on"])
        pipe.send(covered(queue) < last_transaction(queue))
        pipe.recv()

    with support.Child(run) as child:
        assert child.get() == "DiskFullError"
        assert child.get() is True
        child.kill(9)
        child.end(-9)
    temporary = pathlib.Path(support.settings(config_pth).path) / (f"{_files.CHECKPOINT}.new")
    assert temporary.stat().st_size == 0, "Expected the room to be given back."
    assert after_power_failure(config_pth) == [b"covered"]


# When the configuration was changed


def configure(config_pth: pathlib.Path, **changes: Any) -> persipubsub.queue.Settings:
    """Write the file anew, with other keys of the queue."""
    support.write_config(config_pth.parent, **{"durability": "os", **changes})
    return support.settings(config_pth)


def put_by(config_pth: pathlib.Path, seconds: float, message: bytes) -> None:
    """Put a message as a process that read this in the file, and never close the queue."""
    queue = persipubsub.queue.Queue(configure(config_pth, checkpoint_secs=seconds))
    queue.put([message])
    KEPT.append(queue)


def power_off(config_pth: pathlib.Path) -> None:
    """Let the mark be that of another boot, with nobody there; all pages reached the disk."""
    mark = pathlib.Path(support.settings(config_pth).path) / _files.RUNNING
    mark.write_bytes(b"another boot----" + mark.read_bytes()[16:])


@pytest.mark.parametrize("had_some", [True, False])
def test_file_asks_for_checkpoints_only_after_the_power_failed(tmp_path: pathlib.Path,
                                                               had_some: bool) -> None:
    config_pth = support.write_config(tmp_path, durability="os", checkpoint_secs=SOON * had_some)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    assert os.path.exists(os.path.join(support.settings(config_pth).path,
                                       _files.CHECKPOINT)) == had_some
    killed(lambda: put_by(config_pth, 0, b"message"))
    power_off(config_pth)
    configure(config_pth, checkpoint_secs=SOON)
    with opened(config_pth) as queue:
        assert covered(queue) == last_transaction(queue)
        assert take_all(queue) == [b"message"]


def test_file_asks_for_no_checkpoints_only_after_the_power_failed(config_pth: pathlib.Path) -> None:
    killed(lambda: put_and_stay(config_pth, b"lost"))
    power_off(config_pth)
    settings = configure(config_pth, checkpoint_secs=0)
    cut(pathlib.Path(settings.path) / _files.DATA, 0)
    for _ in range(2):
        with persipubsub.queue.Queue(settings) as queue:
            assert not take_all(queue)
            assert not _checkpoint.is_there(settings.path)


def test_killed_one_with_checkpoints_leaves_none_to_one_without(
        config_pth: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(lambda: put_and_stay(config_pth, b"first"))
    settings = configure(config_pth, checkpoint_secs=0)
    steps: list[str] = []
    flush, remove = _environment.Environment.flush_now, _checkpoint.remove

    def flush_now(self: _environment.Environment) -> None:
        steps.append("flush")
        flush(self)

    def remove_it(directory: str) -> None:
        steps.append("remove")
        remove(directory)

    monkeypatch.setattr(_environment.Environment, "flush_now", flush_now)
    monkeypatch.setattr(_checkpoint, "remove", remove_it)
    with persipubsub.queue.Queue(settings) as queue:
        # What it wrote is no safer than the checkpoint made it, until it is flushed.
        assert steps == ["flush", "remove"]
        assert not _checkpoint.is_there(settings.path)
        queue.put([b"second"])
        assert not _checkpoint.is_there(settings.path)


@pytest.mark.parametrize("is_left", [False, True])
def test_killed_one_without_checkpoints_leaves_them_to_one_with(config_pth: pathlib.Path,
                                                                is_left: bool) -> None:
    path = pathlib.Path(support.settings(config_pth).path) / _files.CHECKPOINT
    old = path.read_bytes()
    killed(lambda: put_by(config_pth, 0, b"first"))
    if is_left:
        # It was killed before it removed the checkpoint of earlier times.
        path.write_bytes(old)
    # The background writes none before there is something new.
    with persipubsub.queue.Queue(configure(config_pth, checkpoint_secs=SOON)) as queue:
        assert covered(queue) == last_transaction(queue)
    assert after_power_failure(config_pth) == [b"first"]


@pytest.mark.parametrize("damage", ["none", "zeros behind the meta pages", "message"])
def test_store_that_had_no_checkpoints_is_looked_at(tmp_path: pathlib.Path, damage: str) -> None:
    """Whatever the file says by then."""
    config_pth = support.write_config(tmp_path, durability="os", checkpoint_secs=0)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    killed(lambda: put_by(config_pth, 0, b"a message that never reached the disk"))
    power_off(config_pth)
    settings = configure(config_pth, checkpoint_secs=SOON)
    data = pathlib.Path(settings.path) / _files.DATA
    if damage == "none":
        with opened(config_pth) as queue:
            assert take_all(queue) == [b"a message that never reached the disk"]
        return
    if damage == "message":
        data.write_bytes(data.read_bytes().replace(b"a message that never", bytes(20)))
    else:
        DAMAGES[damage](data)
    before = data.read_bytes()
    with pytest.raises(persipubsub.errors.StoreCorruptError):
        opened(config_pth)
    assert data.read_bytes() == before


def test_old_checkpoint_beside_a_store_without_is_not_taken(config_pth: pathlib.Path) -> None:
    """As after a process that was killed between leaving the mark and removing the checkpoint."""
    path = pathlib.Path(support.settings(config_pth).path) / _files.CHECKPOINT
    old = path.read_bytes()
    killed(lambda: put_by(config_pth, 0, b"message"))
    path.write_bytes(old)
    power_off(config_pth)
    configure(config_pth, checkpoint_secs=SOON)
    with opened(config_pth) as queue:
        assert take_all(queue) == [b"message"]


@pytest.mark.parametrize("first, second", [(0, 3600), (3600, 0), (0, 0), (3600, 3600)])
def test_who_comes_second_does_as_the_first(config_pth: pathlib.Path, first: float, second: float,
                                            caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise one that is gone leaves a checkpoint that grows old beside one that writes none."""

    def stay(pipe: support.Connection) -> None:
        put_by(config_pth, first, b"first")
        pipe.send("open")
        pipe.recv()

    with support.Child(stay) as child:
        assert child.get() == "open"
        settings = configure(config_pth, checkpoint_secs=second)
        queue = persipubsub.queue.Queue(settings)
        assert _checkpoint.is_there(settings.path) == bool(first)
        assert (queue._environment._checkpointer is not None) == bool(first)
        assert ("does the same" in caplog.text) == (bool(first) != bool(second))
        child.kill(9)
        child.end(-9)
    queue.put([b"second"])
    if first and not second:
        support.until(lambda: covered(queue) >= last_transaction(queue), "a checkpoint")
    assert _checkpoint.is_there(settings.path) == bool(first)
    queue.close()
    with persipubsub.queue.Queue(settings) as queue:
        assert _checkpoint.is_there(settings.path) == bool(second)
        assert take_all(queue) == [b"first", b"second"]


def test_change_of_the_durability_leaves_no_copy(config_pth: pathlib.Path) -> None:
    killed(lambda: put_and_stay(config_pth, b"message"))
    directory = pathlib.Path(support.settings(config_pth).path)
    unfinished = directory / (f"{_files.CHECKPOINT}.new")
    unfinished.write_bytes(b"half of a copy")
    settings = configure(config_pth, durability="fsync")
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    assert not unfinished.exists() and not _checkpoint.is_there(str(directory))
    with persipubsub.queue.Queue(settings) as queue:
        assert take_all(queue) == [b"message"]


def test_killed_while_it_changed_the_durability(config_pth: pathlib.Path) -> None:
    """The mark that is left shall not let an old checkpoint replace what was flushed since."""
    killed(lambda: put_and_stay(config_pth, b"old"))
    directory = pathlib.Path(support.settings(config_pth).path)
    checkpoint = (directory / _files.CHECKPOINT).read_bytes()
    settings = configure(config_pth, durability="fsync")
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    (directory / _files.CHECKPOINT).write_bytes(checkpoint)
    (directory / _files.RUNNING).write_bytes(_clock.boot_id())
    with persipubsub.queue.Queue(settings) as queue:
        queue.put([b"flushed"])
        assert not (directory / _files.RUNNING).exists()
        assert not _checkpoint.is_there(settings.path)
        assert take_all(queue) == [b"old", b"flushed"]


# What is durable when the call returns


def subscribers_after_power_failure(config_pth: pathlib.Path,
                                    target: pathlib.Path) -> dict[str, int]:
    """Look at a copy of the queue as if the power failed now; return the positions."""
    settings = support.settings(config_pth)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(settings.path, target)
    data = target / _files.DATA
    if (target / _files.RUNNING).exists():
        (target / _files.RUNNING).write_bytes(b"another boot----")
        data.write_bytes(data.read_bytes()[:8192] + bytes(data.stat().st_size - 8192))
    with persipubsub.queue.Queue(settings._replace(path=str(target))) as queue:
        return {one.subscriber: one.position for one in queue.statistics().subscribers}


@pytest.mark.parametrize("is_another", [False, True])
def test_what_control_does_is_in_a_checkpoint(tmp_path: pathlib.Path, is_another: bool) -> None:
    config_pth = support.write_config(tmp_path,
                                      durability="os",
                                      checkpoint_secs=3600,
                                      retain_secs=3600)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)

    def work() -> None:
        queue = opened(config_pth)
        queue.put([b"1", b"2", b"3"])
        take_all(queue)
        KEPT.append(queue)

    def stay(pipe: support.Connection) -> None:
        work()
        pipe.send("open")
        pipe.recv()

    def positions() -> dict[str, int]:
        return subscribers_after_power_failure(config_pth, tmp_path / "image")

    with contextlib.ExitStack() as stack:
        if is_another:
            child = stack.enter_context(support.Child(stay))
            assert child.get() == "open"
        else:
            work()
            stack.callback(lambda: KEPT.pop().close())
        assert positions() == {"sub": 1}
        persipubsub.control.seek(config_pth, "sub", "end")
        assert positions() == {"sub": 4}
        persipubsub.control.add_subscriber(config_pth, "queue", "new")
        assert positions() == {"sub": 4, "new": 4}
        support.write_config(tmp_path,
                             durability="os",
                             checkpoint_secs=3600,
                             subscribers=["sub", "other"])
        persipubsub.control.initialize_all_dbs(config_pth)
        assert positions() == {"sub": 4, "new": 4, "other": 4}
        persipubsub.control.remove_subscriber(config_pth, "queue", "new")
        assert positions() == {"sub": 4, "other": 4}
        if is_another:
            child.kill(9)
            child.end(-9)


def test_checkpoint_that_fails_is_an_error_of_the_call(config_pth: pathlib.Path) -> None:

    def run(pipe: support.Connection) -> None:
        with opened(config_pth) as queue:
            queue.put([bytes(100000)])
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (40000, hard))
            pipe.send(support.outcome(queue._environment.secure_now))
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            pipe.send(support.outcome(queue._environment.secure_now))

    with support.Child(run) as child:
        assert child.get() == "DiskFullError"
        assert child.get() == ""
        child.end()


def test_checkpoint_is_tried_until_it_is_written(config_pth: pathlib.Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[bool | Exception]
    outcomes = [False, persipubsub.errors.ReadersFullError("full on purpose"), False]
    with opened(config_pth) as queue:
        environment = queue._environment
        write = environment._write_checkpoint

        def attempt() -> bool:
            outcome = outcomes.pop(0) if outcomes else write()
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(environment, "_write_checkpoint", attempt)
        queue.put([b"message"])
        environment.secure_now()
        assert not outcomes
        assert covered(queue) == last_transaction(queue)


def test_checkpoint_of_another_process_is_waited_for(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path,
                                      durability="os",
                                      checkpoint_secs=3600,
                                      busy_timeout_secs=0.2)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with opened(config_pth) as queue:
        temporary = pathlib.Path(queue.settings.path) / (f"{_files.CHECKPOINT}.new")
        with support.Child(copy_for_ever, config_pth) as child:
            assert child.get() == "copying"
            support.until(lambda: has_filled(temporary), "the copy to begin")
            with pytest.raises(persipubsub.errors.BusyTimeoutError, match="checkpoint"):
                queue.seek("sub", "end")
            assert covered(queue) < last_transaction(queue)
            child.kill(9)
            child.end(-9)
        temporary.unlink()
        queue.seek("sub", "end")
        assert covered(queue) == last_transaction(queue)


# What is said of a checkpoint


def test_what_is_said_of_a_checkpoint_is_forgotten_for_good(tmp_path: pathlib.Path,
                                                            config_pth: pathlib.Path) -> None:
    """Numbers of transactions begin anew: a power failure shall not bring the old one back."""
    tracing.require()
    killed(lambda: put_and_stay(config_pth, b"message"))
    directory = pathlib.Path(support.settings(config_pth).path)
    initial = tmp_path / "initial"
    shutil.copytree(directory, initial)
    events = disk.record(lambda: _checkpoint.restore(str(directory)), tmp_path / "trace")
    followed = disk.Disk(directory, initial)
    for event in events:
        followed.feed(event)
        if event.call.name == "rename" and event.result is not None:
            break
    else:
        raise AssertionError("Expected the checkpoint to be renamed")
    lock = followed.seen[str(directory / _files.CHECKPOINT_LOCK)]
    assert lock is not None and bytes(lock.durable) == bytes(8)


def test_checkpoint_of_a_removed_queue_does_not_come_back(config_pth: pathlib.Path) -> None:
    killed(lambda: put_and_stay(config_pth, b"of the removed queue"))
    directory = pathlib.Path(support.settings(config_pth).path)
    with opened(config_pth) as queue:
        assert queue._environment._write_checkpoint()
        (directory / _files.DATA).unlink()
    (directory / _files.RUNNING).write_bytes(b"another boot----")
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    killed(lambda: put_and_stay(config_pth))
    assert not after_power_failure(config_pth)


def test_send_where_no_thread_can_be_started(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, durability="os")
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    code = """if True:
        import logging, resource, sys, threading
        import persipubsub.publisher, persipubsub.subscriber
        logging.basicConfig(format="%(name)s", stream=sys.stdout)
        before = threading.stack_size(1 << 36)
        resource.setrlimit(resource.RLIMIT_AS, (1 << 36, resource.RLIM_INFINITY))
        pub = persipubsub.publisher.Pub()
        pub.init(pub_id="pub", config_pth=sys.argv[1])
        pub.send(b"one")
        pub.send(b"two")
        assert threading.active_count() == 1
        threading.stack_size(before)
        pub.send(b"three")
        assert threading.active_count() == 2
        pub.close()
        """
    done = support.run_python(code, config_pth)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == {"persipubsub.checkpoint"}
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        assert [
            queue.consumer("sub").take(timeout=0,
                                       max_messages=5).messages  # type: ignore[union-attr]
        ] == [[b"one", b"two", b"three"]]


@pytest.mark.parametrize("call", ["openat", "read"])
def test_unreadable_id_of_the_boot_is_no_power_failure(config_pth: pathlib.Path, call: str) -> None:
    """Who is out of files, say, would put the checkpoint in the place of a store in use."""
    tracing.require()
    directory = pathlib.Path(support.settings(config_pth).path)
    output = directory.parent / "output"
    outcomes = set()

    def work() -> None:
        text = ""
        try:
            opened(config_pth).close()
        except persipubsub.errors.StoreError as error:
            text = "StoreError" if str(directory) in str(error) else str(error)
        output.write_text(text)

    with opened(config_pth) as queue:
        number = queue.put([b"before"])
        identity = os.stat(directory / _files.DATA).st_ino
        for place in (1, 2, 3):
            assert tracing.run(lambda: work, [
                "-o", os.devnull, "-P", "/proc/sys/kernel/random/boot_id", "-e", f"trace={call}",
                "-e", f"inject={call}:error={'EMFILE' if call == 'openat' else 'EIO'}:when={place}"
            ]) == 0
            outcomes.add(output.read_text())
            assert os.stat(directory / _files.DATA).st_ino == identity
        assert queue.put([b"beside"]) == number + 1
        # What another process sees is what this one put.
        with support.Child(lambda pipe: pipe.send(take_all(opened(config_pth)))) as child:
            assert child.get() == [b"before", b"beside"]
            child.end()
    assert "StoreError" in outcomes and outcomes <= {"", "StoreError"}
