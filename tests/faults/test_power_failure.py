"""
Test power failures: record real sends and receives, cut at any place, open what is left.

``PERSIPUBSUB_REPLAYS`` says how many images each test opens, ``PERSIPUBSUB_SEED`` repeats a run.
"""

import contextlib
import json
import os
import random
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from persipubsub import Pub, Sub, control, errors
from persipubsub.lmdb_engine import environment, journal
from tests import support
from tests.faults import replay, tracing

DURABILITIES: Final = ("fsync", "os")


@pytest.fixture(name="seed", autouse=True)
def fixture_seed() -> int:
    tracing.require()
    return tracing.seed()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("durability", DURABILITIES)
def test_nothing_promised_is_lost(tmp_path: Path, seed: int, durability: str,
                                  processes: int) -> None:
    recording = replay.record(tmp_path, seed, durability, operations=60, processes=processes)
    assert replay.follow_to_end(recording).states >= 3
    replay.survey(recording, 2 * replay.IMAGES, random.Random(seed)).assert_sound()


@pytest.mark.parametrize("durability", DURABILITIES)
def test_power_fails_again_during_a_rebuild(tmp_path: Path, seed: int, durability: str) -> None:
    """Three times: in the use, in a rebuild, and in the rebuild or use behind that."""
    chance = random.Random(seed)
    recording = replay.record(tmp_path, seed, durability, operations=30)
    rounds = max(2, replay.IMAGES // 60)
    for number, image in enumerate(replay.images(recording, tmp_path, rounds, chance)):
        if not image.progress.is_initialized:
            continue
        second = replay.record_recovery(tmp_path / f"{number}", recording, image, operations=5)
        replay.survey(second, 30, chance).assert_sound()
        for again in replay.images(second, tmp_path / f"{number}", 2, chance):
            third = replay.record_recovery(again.path.parent / "third", second, again, 5)
            replay.survey(third, 20, chance).assert_sound()


#: What operators do, between sends and receives.
OPERATIONS: Final = {
    "change": ["change"],
    "clear": ["clear"],
    "compact": ["compact"],
    "delete": ["delete"],
    "pause": ["pause", "pause"],
    "prune": ["prune"],
    "restore": ["save", "send_many", "receive", "restore"],
    "seek": ["seek", "receive", "seek"],
    "subscribe": ["subscribe", "send", "subscribe"],
}


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operators(tmp_path: Path, seed: int, durability: str, operation: str) -> None:
    names = [
        "send_many", "send_known", "receive_many", "send_some", *OPERATIONS[operation], "send",
        "receive"
    ]
    recording = replay.record(tmp_path, seed, durability, names)
    replay.survey(recording, replay.IMAGES // 2, random.Random(seed)).assert_sound()


@pytest.mark.parametrize("durability", DURABILITIES)
def test_newest_messages_are_dropped(tmp_path: Path, seed: int, durability: str) -> None:
    """No record says that they were: the rebuild finds it in the totals of the blocks."""
    names = 4 * ["send_many", "send", "wait", "send_some", "send_many", "receive", "send_many"]
    recording = replay.record(tmp_path, seed, durability, names, mark=20, strategy="prune_last")
    last = replay.follow_to_end(recording).operations[-1].state
    assert last.figures["other"][2] > 0, "Nothing was dropped."
    replay.survey(recording, replay.IMAGES, random.Random(seed)).assert_sound()


# Threads and processes that take no turns


def tell(ledger: int, *fields: object) -> None:
    os.write(ledger, json.dumps({"note": fields}).encode("ascii") + b"\n")


def name_of(source: int, index: int) -> bytes:
    return b"%d %d " % (source, index) + bytes(100 * (source + index) % 3000)


def work_at_once(directory: Path, config_pth: Path, processes: int, threads: int,
                 count: int) -> None:
    """Send and receive in threads of processes."""
    ledger = os.open(directory / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def receive(name: str, is_over: threading.Event) -> None:
        with Sub(name, config_pth) as sub:
            while not is_over.is_set():
                with sub.receive_many(max_msgs=3, timeout=0.01) as msgs:
                    ids = [list(map(int, msg.split(b" ", 2)[:2])) for msg in msgs]
                    tell(ledger, "take", name, ids)
                tell(ledger, "took", name, ids)

    def send(pub: Pub, source: int) -> None:
        for index in range(count):
            tell(ledger, "send", [source, index])
            pub.send(name_of(source, index))
            tell(ledger, "sent", [source, index])

    def work(number: int) -> None:
        is_over = threading.Event()
        with Pub("pub", config_pth) as pub:
            receivers = [
                threading.Thread(target=receive, args=(name, is_over))
                for name in replay.SUBSCRIBERS
            ]
            senders = [
                threading.Thread(target=send, args=(pub, threads * number + thread))
                for thread in range(threads)
            ]
            for thread in receivers + senders:
                thread.start()
            for thread in senders:
                thread.join()
            is_over.set()
            for thread in receivers:
                thread.join()

    replay.in_processes(work, processes)


def find_lost(  # pylint: disable=too-many-locals
        image: replay.Image, recording: replay.Recording, boot: int) -> str:
    """Look for sends that returned and are not there, and acknowledgements that were recorded."""
    replay.new_boot(boot)
    config_pth = replay.write_config(image.path, recording.durability, mark=1000)
    progress = image.progress
    if not progress.is_initialized:
        control.initialize_all_dbs(config_pth=config_pth)
    findings = replay.find_damage(config_pth)
    if findings:
        return findings
    notes = [line["note"] for line in progress.lines]
    recorded = notes[:progress.covered]
    promised = {
        tuple(one[1])
        for one in (notes if recording.durability == "fsync" else recorded) if one[0] == "sent"
    }
    begun = {tuple(one[1]) for one in notes if one[0] == "send"}
    for name in replay.SUBSCRIBERS:
        taken, finished = ({
            tuple(message)
            for one in among if one[:2] == [kind, name] for message in one[2]
        } for kind, among in (("take", notes), ("took", recorded)))
        received: list[tuple[int, ...]] = []
        with Sub(name, config_pth) as sub:
            while sub.front() is not None:
                with sub.receive_many(max_msgs=100, timeout=0) as msgs:
                    ids = [tuple(map(int, msg.split(b" ", 2)[:2])) for msg in msgs]
                    if list(msgs) != [name_of(*one) for one in ids]:
                        return "Expected other bytes"
                    received += ids
        lost, more = promised - taken - set(received), set(received) - begun
        again = (set(received) & finished) if len(received) == len(set(received)) else received
        if lost or more or again:
            return f"{name} lost {sorted(lost)}, got more {sorted(more)}, again {sorted(again)}"
        for source in {one[0] for one in received}:
            indices = [one[1] for one in received if one[0] == source]
            if indices != sorted(indices):
                return f"Expected the messages of {source} in order, but got: {indices}"
    return replay.find_damage(config_pth)


@pytest.mark.parametrize("durability", DURABILITIES)
def test_threads_and_processes_at_once(tmp_path: Path, seed: int, durability: str) -> None:
    recording = replay.record(tmp_path,
                              seed,
                              durability,
                              mark=1000,
                              work=lambda directory, config_pth: work_at_once(
                                  directory, config_pth, processes=2, threads=3, count=15))
    assert sum(line["note"][0] == "sent" for line in replay.follow_to_end(recording).lines) == 90
    replay.survey(recording, 2 * replay.IMAGES, random.Random(seed), find=find_lost).assert_sound()


# A flush that fails


@pytest.mark.parametrize("place", [8, 11])
def test_power_fails_after_a_flush_failed(tmp_path: Path, seed: int, place: int) -> None:
    """What it should have flushed may be lost for ever; the queue is opened again and goes on."""

    def work(directory: Path, config_pth: Path) -> None:
        ledger = os.open(directory / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        pub = Pub("pub", config_pth)
        failed = 0
        for index in range(12):
            tell(ledger, "send", [0, index])
            try:
                pub.send(name_of(0, index))
                tell(ledger, "sent", [0, index])
            except errors.FlushError:
                failed += 1
                with contextlib.suppress(errors.FlushError):
                    pub.close()
                pub = Pub("pub", config_pth)
                # It is stored, and the journal that was made anew has it.
                tell(ledger, "sent", [0, index])
        pub.close()
        tell(ledger, "failed", failed)

    recording = replay.record(tmp_path,
                              seed,
                              "fsync",
                              mark=1000,
                              work=work,
                              options=["-e", f"inject=fdatasync:error=EIO:when={place}"])
    assert replay.follow_to_end(recording).lines[-1]["note"][1] >= 1
    replay.survey(recording, 2 * replay.IMAGES, random.Random(seed), find=find_lost).assert_sound()


# Removing a queue


def test_dropped_queue(tmp_path: Path, seed: int) -> None:

    def work(directory: Path, config_pth: Path) -> None:
        ledger = os.open(directory / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with Pub("pub", config_pth) as pub:
            pub.send_many([b"1", b"2", b"3"])
            tell(ledger, "sent")
        control.drop_queue(config_pth, "queue")
        tell(ledger, "dropped")
        control.initialize_all_dbs(config_pth)
        tell(ledger, "new")

    def find(image: replay.Image, _: replay.Recording, boot: int) -> str:
        replay.new_boot(boot)
        config_pth = replay.write_config(image.path, "fsync")
        told = len(image.progress.lines)
        outcome = support.outcome(lambda: control.statistics(config_pth)["queue"].messages)
        if outcome not in (("", ) if told == 3 else ("", "NotInitializedError")):
            return f"Expected a queue or none, but got: {outcome}"
        control.initialize_all_dbs(config_pth)
        messages = control.statistics(config_pth)["queue"].messages
        if messages not in ((0, 3) if told < 2 else (0, )):
            return f"Expected all messages or none, but got: {messages}"
        return replay.find_damage(config_pth)

    recording = replay.record(tmp_path, seed, "fsync", work=work)
    replay.survey(recording, 2 * replay.IMAGES, random.Random(seed), find=find).assert_sound()


# Messages that are given up, and sent back


def test_dead_letters(tmp_path: Path, seed: int) -> None:
    """Moved with ``os``: a letter is safe before its message leaves."""

    def configure(directory: Path) -> dict[str, object]:
        queues = {
            key: {
                "path": str(directory / key),
                "subscribers": subscribers,
                "durability": "os",
                "checkpoint_secs": 0.02,
                "max_db_size_bytes": 1 << 22
            }
            for key, subscribers in (("queue", ["sub"]), ("letters", []))
        }
        return {
            "pub": {"out_queue": "queue"},
            "sub": {"in_queue": "queue", "max_deliveries": 1, "dead_letter_queue": "letters"},
            "queues": queues
        }  # yapf: disable

    def work(directory: Path, _: Path) -> None:
        ledger = os.open(directory / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        config = configure(directory / "root")
        control.initialize_all_dbs(config)
        with Pub("pub", config) as pub, Sub("sub", config) as sub:
            for _round in range(2):
                pub.send_many([b"%d" % index for index in range(5)])
                support.queue_of(pub).secure()
                tell(ledger, "sent")
                for _message in range(5):
                    with contextlib.suppress(KeyError), sub.receive(timeout=0):
                        raise KeyError("fails on purpose")
                control.send_back(config, "letters")
                tell(ledger, "clear")
                control.clear_all_subs(config, "queue")

    def find(image: replay.Image, _: replay.Recording, boot: int) -> str:
        replay.new_boot(boot)
        config = configure(image.path)
        control.initialize_all_dbs(config)
        waiting = {message.content for message in control.peek(config, "sub", 100)}
        for letters in control.dead_letters(config).values():
            waiting.update(listed.letter.data for listed in letters)
        notes = [line["note"][0] for line in image.progress.lines]
        if notes and notes[-1] == "sent" and waiting != {b"%d" % index for index in range(5)}:
            return f"Expected five messages, but got: {waiting}"
        return "; ".join(sum(control.verify(config).values(), ()))

    recording = replay.record(tmp_path, seed, "os", work=work)
    replay.survey(recording, 2 * replay.IMAGES, random.Random(seed), find=find).assert_sound()


# The replay itself


class TakenOut(NamedTuple):
    """A protection, and the source of the library without it."""

    durability: str
    changes: tuple[tuple[types.ModuleType, str, str], ...]
    operations: int | Sequence[str] = 100  #: among which it is missed soon


TAKEN_OUT: Final = {
    "flush": TakenOut("fsync", ((journal, "os.fdatasync(self._descriptor)", "pass"), )),
    # Missed only where one catch-up fills one segment and goes on in the next one.
    "flush of the old segment": TakenOut("os", ((journal, """
        self._flush_file()
        self._begin_segment(""", """
        self._begin_segment("""), ), 5 * [*5 * ["send_many"], "wait"]),
    "checksum": TakenOut("fsync", ((journal, """
                if zlib.crc32(body, zlib.crc32(head[_CRC.size:], seed)) != crc:
                    return""", ""), )),
    "state record": TakenOut("os", ((journal, """
        with self._lock.held(self._busy_timeout_secs):
            self._write_state(oldest_id_ns)
            self._let_go()""", ""), )),
    "flush of a new segment and its name": TakenOut("os", ((journal, """
                os.fsync(descriptor)
                os.rename(temporary, path)
                files.flush_directory(self.directory)""", """
                os.rename(temporary, path)"""), )),
    "skipped numbers": TakenOut("os", ((environment, "_SKIPPED_NUMBERS: Final = 1 << 32",
                                        "_SKIPPED_NUMBERS: Final = 1"), )),
    "mark of a running store": TakenOut("fsync", ((environment, """
        files.mark_running(self.directory)""", ""), )),
    "flush of a store that is left": TakenOut("fsync", ((environment, """
            store.lmdb.sync(True)""", ""), ), 8 * ["send", "receive", "reopen"]),
}  # yapf: disable


def take_out(changes: Sequence[tuple[types.ModuleType, str, str]]) -> None:
    """Take a protection out, in a process that lives no longer than the test."""
    for module, old, new in changes:
        path = Path(str(module.__file__))
        source = path.read_text("utf-8")
        assert old in source, old
        path = path.with_suffix(".changed")
        exec(compile(source.replace(old, new), str(path), "exec"), module.__dict__)  # pylint: disable=exec-used
    setattr(environment, "Journal", journal.Journal)


@pytest.mark.parametrize("protection", TAKEN_OUT)
def test_replay_notices_what_is_taken_out(tmp_path: Path, seed: int, protection: str) -> None:
    durability, changes, operations = TAKEN_OUT[protection]

    def find(image: replay.Image, recording: replay.Recording, boot: int) -> str:
        if boot == replay.FIRST_BOOT:
            take_out(changes)
        return replay.find_fault(image, recording, boot)

    for attempt in range(30):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        recording = replay.record(directory,
                                  seed + attempt,
                                  durability,
                                  operations,
                                  mark=1000,
                                  prepare=lambda: take_out(changes))
        try:
            summary = replay.survey(recording,
                                    80,
                                    random.Random(seed + attempt),
                                    find=find,
                                    is_over_at_first=True)
        except AssertionError as error:
            # LMDB kills the process that opens a damaged file.
            assert "it ended with -" in str(error)
            print(f"crash in recording {attempt + 1}")
            return
        if summary.faults:
            print(f"image {summary.images} of recording {attempt + 1}: {summary.faults[0][-300:]}")
            return
    raise AssertionError(f"Expected faults without the {protection}")
