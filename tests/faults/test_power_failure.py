"""
Test power failures: record real sends and receives, cut at any place, open what is left.

``PERSIPUBSUB_REPLAYS`` says how many images each test opens, ``PERSIPUBSUB_SEED`` repeats a run.
"""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access
import os
import pathlib
import random
import threading
from collections.abc import Callable
from typing import Any

import lmdb
import pytest

import persipubsub.control
import persipubsub.publisher
import persipubsub.queue
from persipubsub.environment import _environment, _files, _mark, _opening
from persipubsub.store import _header
from tests import support
from tests.faults import disk, replay, tracing


@pytest.fixture(name="seed", autouse=True)
def fixture_seed() -> int:
    tracing.require()
    return tracing.seed()


def test_every_send_survives(tmp_path: pathlib.Path, seed: int) -> None:
    recording = replay.record(tmp_path, seed, "fsync")
    replay.survey(recording, 2 * replay.IMAGES, random.Random(seed)).assert_sound()


def test_checkpointed_queue_goes_on_from_an_earlier_state(tmp_path: pathlib.Path,
                                                          seed: int) -> None:
    recording = replay.record(tmp_path, seed, "os")
    assert replay.follow_to_end(recording).checkpoints >= 3
    replay.survey(recording, 2 * replay.IMAGES, random.Random(seed)).assert_sound()


def test_power_fails_again_while_a_queue_recovers(tmp_path: pathlib.Path, seed: int) -> None:
    recording = replay.record(tmp_path, seed, "os", operations=40)
    chance = random.Random(seed)
    rounds = max(3, replay.IMAGES // 100)
    for number, image in enumerate(replay.images(recording, tmp_path, rounds, chance)):
        if not image.progress.states:
            continue
        directory = tmp_path / str(number)
        directory.mkdir()
        second = replay.record_recovery(directory, recording, image, operations=10)
        # No state but that of the checkpoint, even before the recovery ended.
        replay.survey(second, 60, chance, boot=100).assert_sound()


@pytest.mark.parametrize("operation", ["drop", "restore"])
def test_new_queue_without_what_was_not_flushed(tmp_path: pathlib.Path, operation: str) -> None:
    """It is dropped or restored before anybody opens it again."""

    def work(config_pth: pathlib.Path, _: pathlib.Path) -> None:
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        with persipubsub.publisher.Pub() as pub:
            pub.init(pub_id="pub", config_pth=config_pth)
            pub.send(b"message")

    recording = replay.record(tmp_path, 0, "fsync", work=work)
    backup = tmp_path / "backup"
    persipubsub.control.backup(recording.config_pth, "queue", backup)
    follower = disk.Disk(recording.root, recording.initial)
    for event in recording.events:
        follower.feed(event)
    image = tmp_path / "image"
    follower.materialize(
        image, random.Random(0),
        disk.Survival(chance=0.0,
                      piece=4096,
                      is_odd_one_out=False,
                      keeps_size=False,
                      name_chance=0.0,
                      keeps_name_order=True))
    config_pth = replay.write_config(image, "fsync")
    if operation == "drop":
        # And not None. pylint: disable-next=use-implicit-booleaness-not-comparison
        assert persipubsub.control.drop_queue(config_pth, "queue") == ()
    else:
        persipubsub.control.restore(config_pth, "queue", backup)
        assert persipubsub.control.statistics(config_pth)["queue"].messages == 1


# Several threads


def send_in_threads(config_pth: pathlib.Path, ledger_pth: pathlib.Path, threads: int,
                    count: int) -> None:
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    ledger = os.open(ledger_pth, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)

        def send(thread: int) -> None:
            for index in range(count):
                pub.send(name_of(thread, index))
                os.write(ledger, b'{"sent": [%d, %d]}\n' % (thread, index))

        running = [threading.Thread(target=send, args=(thread, )) for thread in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()


def name_of(thread: int, index: int) -> bytes:
    return b"%d %d " % (thread, index) + bytes(100 * (thread + index) % 3000)


def find_lost_send(image: replay.Image, recording: replay.Recording, boot: int) -> str:
    """Look for sends of any thread that returned and are not there."""
    replay.new_boot(boot)
    lines = image.progress.lines
    if recording.is_os:
        lines = lines[:image.progress.covered_lines]
    promised = {name_of(*line["sent"]) for line in lines}
    config_pth = replay.write_config(image.path, "os" if recording.is_os else "fsync")
    if not image.progress.lines:
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    received: list[bytes] = []
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        findings = queue.check()
        consumer = queue.consumer("sub")
        while (lease := consumer.take(timeout=0)) is not None:
            received.extend(lease.messages)
            lease.acknowledge()
    if findings:
        return "; ".join(findings)
    lost = promised - set(received)
    if lost or len(set(received)) != len(received):
        return f"Expected {len(promised)} messages, but {len(lost)} are lost"
    # What is there beyond what was promised is a beginning for each thread.
    parts = [tuple(map(int, message.split(b" ", 2)[:2])) for message in received]
    latest: dict[int, int] = {}
    for thread, index in parts:
        if index != latest.get(thread, -1) + 1:
            return f"Expected the messages of thread {thread} in order, but got: {parts}"
        latest[thread] = index
    return ""


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_sends_of_many_threads_survive(tmp_path: pathlib.Path, seed: int, durability: str) -> None:
    recording = replay.record(
        tmp_path,
        seed,
        durability,
        work=lambda config_pth, ledger: send_in_threads(config_pth, ledger, threads=4, count=12))
    assert len(replay.follow_to_end(recording).lines) == 48
    replay.survey(recording, replay.IMAGES // 2, random.Random(seed),
                  find=find_lost_send).assert_sound()


# Without checkpoints


def find_damage(image: replay.Image, recording: replay.Recording, boot: int) -> str:
    """Look for messages that were never sent, or sent earlier than those behind them."""
    replay.new_boot(boot)
    config_pth = replay.write_config(image.path, "os", checkpoint_secs=0)
    if not image.progress.is_initialized:
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    sent = image.upcoming.sent if image.upcoming is not None else image.progress.states[-1].sent
    known = {replay.content(recording.seed, index): index for index in range(sent)}
    used = max((state.next_number for state in image.progress.states), default=0)
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        findings = queue.check()
        number = queue.put([b"afterwards"])
        if number < used:
            return f"Expected no number below {used}, but got: {number}"
        received: list[bytes] = []
        consumer = queue.consumer("sub")
        while (lease := consumer.take(timeout=0)) is not None:
            received.extend(lease.messages)
            lease.acknowledge()
    indexes = [known.get(message, -1) for message in received[:-1]]
    if received[-1] != b"afterwards" or indexes != sorted(set(indexes) - {-1}):
        findings.append(f"Expected messages in order, but got: {indexes}")
    return "; ".join(findings)


def test_without_checkpoints_a_damaged_store_is_refused(tmp_path: pathlib.Path, seed: int) -> None:
    recording = replay.record(tmp_path, seed, "os", checkpoint_secs=0)
    summary = replay.survey(recording, replay.IMAGES, random.Random(seed), find=find_damage)
    print(f"{len(summary.refused)} of {summary.images} images were refused")
    assert not summary.faults
    # That is what checkpoints are for.
    assert summary.refused


# The replay itself


def take_out(owner: object, name: str, replacement: object = lambda *_: None) -> None:
    """Take a protection out, in a process that lives no longer than the recording."""
    assert hasattr(owner, name)
    setattr(owner, name, replacement)


def mark_without_checkpoint(environment: _environment.Environment) -> None:
    """Leave the mark of a running store, with no first checkpoint but later ones."""
    # pylint: disable-next=protected-access
    environment._checkpoint_secs = environment.options.checkpoint_secs
    if not _mark.is_marked(environment.directory):
        _mark.mark_running(environment.directory, has_checkpoints=True)


TAKEN_OUT: dict[str, tuple[str, Callable[[], None]]] = {
    "flush after a commit": ("fsync", lambda: take_out(_environment.Environment, "_flush")),
    "flush of the pages": ("fsync", lambda: take_out(_opening, "lmdb", _LmdbWithout("sync"))),
    "flush of a checkpoint and of names": ("os", lambda: take_out(os, "fsync")),
    "flush of the directory": ("os", lambda: take_out(_files, "flush_directory")),
    "mark of a running store": ("os", lambda: take_out(_mark, "mark_running")),
    "checkpoint before the mark": (
        "os", lambda: take_out(_environment.Environment, "_prepare_os", mark_without_checkpoint)),
    "flush before a clean end": ("os", lambda: take_out(_environment.Environment, "flush_now")),
}


class _LmdbWithout:
    """Be the module ``lmdb``, but open environments with an option switched off."""

    def __init__(self, option: str) -> None:
        self._option = option

    def __getattr__(self, name: str) -> object:
        return getattr(lmdb, name)

    def open(self, *arguments: Any, **options: Any) -> lmdb.Environment:
        """Open an environment."""
        options[self._option] = False
        return lmdb.open(*arguments, **options)


@pytest.mark.parametrize("protection", TAKEN_OUT)
def test_replay_notices_what_is_taken_out(tmp_path: pathlib.Path, seed: int,
                                          protection: str) -> None:
    durability, prepare = TAKEN_OUT[protection]
    for attempt in range(10):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        recording = replay.record(directory, seed + attempt, durability, prepare=prepare)
        try:
            summary = replay.survey(recording, 100, random.Random(seed + attempt))
        except AssertionError as error:
            # LMDB kills the process that opens a damaged file.
            assert "it ended with -" in str(error)
            return
        if summary.faults or summary.refused:
            print(f"{len(summary.faults) + len(summary.refused)} faults in {summary.images} images")
            return
    raise AssertionError(f"Expected damage without the {protection}")


def test_replay_notices_numbers_that_are_used_again(tmp_path: pathlib.Path, seed: int) -> None:

    def find(image: replay.Image, recording: replay.Recording, boot: int) -> str:
        take_out(_header, "_SKIPPED_NUMBERS", 0)
        return replay.find_fault(image, recording, boot)

    recording = replay.record(tmp_path, seed, "os")
    summary = replay.survey(recording, 100, random.Random(seed), find=find)
    assert any("number below" in fault for fault in summary.faults)
