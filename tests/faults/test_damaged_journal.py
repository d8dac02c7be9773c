"""Remove, damage and replace what is in a journal: nothing is lost, or an error says what to do."""

import logging
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from persipubsub import Pub, Sub, control, errors
from persipubsub.lmdb_engine import files
from tests import stores, support
from tests.faults import replay

COUNT = 60


def message(index: int) -> bytes:
    return b"%d " % index + bytes(3000)


def fill(pipe: support.Connection, config_pth: Path, count: int) -> None:
    replay.small_segments()
    control.initialize_all_dbs(config_pth)
    with Pub("pub", config_pth) as pub:
        for index in range(count):
            pub.send(message(index))
        pipe.send("filled")
        pipe.recv()


def receive(pipe: support.Connection, config_pth: Path) -> None:
    """Receive all messages in another boot; tell the error, and their numbers."""
    replay.new_boot(1)
    received: list[int] = []
    try:
        with Sub("sub", config_pth) as sub:
            received.extend(int(found.split(b" ")[0]) for found in sub.messages(timeout=0))
        assert control.verify(config_pth) == {"queue": ()}
        pipe.send(("", received))
    except errors.PersipubsubError as error:
        pipe.send((f"{type(error).__name__}: {error}", received))


def crash(directory: Path, count: int = COUNT) -> Path:
    """Make a queue with messages that was not left cleanly."""
    directory.mkdir(exist_ok=True)
    config_pth = support.write_config(directory)
    with support.Child(fill, config_pth, count) as child:
        assert child.get() == "filled"
    return config_pth


def recover(config_pth: Path) -> tuple[str, list[int]]:
    with support.Child(receive, config_pth) as child:
        error, received = child.get()
        child.end()
    return error, received


def segments(directory: Path) -> list[Path]:
    """List the segments in the order in which they are used."""
    found = (directory / "queue" / files.JOURNAL).iterdir()
    # The number of a segment, see docs/format.rst.
    return sorted((path for path in found if path.read_bytes()[20:28] != bytes(8)),
                  key=lambda path: int.from_bytes(path.read_bytes()[20:28], "little"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    with open(path, "r+b") as file:
        file.write(content)


def test_nothing_is_wrong(tmp_path: Path) -> None:
    config_pth = crash(tmp_path)
    assert len(segments(tmp_path)) > 3
    assert recover(config_pth) == ("", list(range(COUNT)))


def test_removed_where_the_store_was_left_cleanly(tmp_path: Path,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    config_pth = support.make_queue(tmp_path)
    with Pub("pub", config_pth) as pub:
        pub.send(message(0))
    shutil.rmtree(tmp_path / "queue" / files.JOURNAL)
    with caplog.at_level(logging.WARNING), Pub("pub", config_pth) as pub:
        assert "made anew" in caplog.text
        pub.send(message(1))
        with support.Child(fill, config_pth, 0) as child:
            assert child.get() == "filled"
    assert control.verify(config_pth) == {"queue": ()}
    # It is whole: after a power failure all is rebuilt from it.
    stores.lose_power(tmp_path / "queue")
    assert recover(config_pth) == ("", [0, 1])


def test_removed_where_the_store_was_not_left_cleanly(tmp_path: Path) -> None:
    config_pth = crash(tmp_path)
    shutil.rmtree(tmp_path / "queue" / files.JOURNAL)
    error, received = recover(config_pth)
    assert error.startswith("StoreCorruptError") and not received
    assert "persipubsub restore" in error
    # What the error says.
    running = tmp_path / "queue" / files.RUNNING
    assert f"remove {running} and run 'persipubsub verify'" in error
    running.unlink()
    assert control.verify(config_pth) == {"queue": ()}
    assert recover(config_pth) == ("", list(range(COUNT)))


@pytest.mark.parametrize("damage, found", [
    (os.unlink, "is missing"),
    (lambda path: flip(path, 4096 + 100), "is damaged"),
    (lambda path: os.truncate(path, 10000), "is missing"),
    (lambda path: flip(path, 30), "is missing"),
    (lambda path: path.write_bytes(bytes(1 << 15)), "is missing"),
    (lambda path: path.write_bytes(b"x" * (1 << 15)), "is missing"),
], ids=["missing", "flipped", "truncated", "header", "zeros", "foreign"])  # yapf: disable
def test_damaged_segment(tmp_path: Path, damage: Callable[[Path], object], found: str) -> None:
    config_pth = crash(tmp_path)
    damage(segments(tmp_path)[2])
    before = support.snapshot(tmp_path / "queue")
    error, received = recover(config_pth)
    assert error.startswith("StoreCorruptError") and found in error and not received
    after = support.snapshot(tmp_path / "queue")
    assert {name: after[name] for name in (files.DATA, files.RUNNING)
            } == {name: before[name] for name in (files.DATA, files.RUNNING)}  # yapf: disable


def test_damage_is_found_while_the_queue_is_used(tmp_path: Path) -> None:
    config_pth = crash(tmp_path)
    flip(segments(tmp_path)[2], 4096 + 100)
    findings = control.verify(config_pth)["queue"]
    assert findings and all("journal" in finding for finding in findings), findings


def test_torn_end(tmp_path: Path) -> None:
    """Of a record that is not whole at the end nobody was told that it is safe."""
    config_pth = crash(tmp_path)
    last = segments(tmp_path)[-1]
    end = last.read_bytes().rstrip(b"\0")
    flip(last, len(end) - 1)
    error, received = recover(config_pth)
    assert error == "" and received == list(range(len(received))) and len(received) >= COUNT - 5


@pytest.mark.parametrize("name", ["00000099", "journal.txt", "00000001.new"])
@pytest.mark.parametrize("size", [0, 100, 1 << 15])
def test_foreign_file(tmp_path: Path, name: str, size: int) -> None:
    config_pth = crash(tmp_path)
    (tmp_path / "queue" / files.JOURNAL / name).write_bytes(b"x" * size)
    assert recover(config_pth) == ("", list(range(COUNT)))


def test_segment_of_another_queue(tmp_path: Path) -> None:
    config_pth = crash(tmp_path / "one")
    crash(tmp_path / "two", count=150)
    other = segments(tmp_path / "two")[-1]
    shutil.copy(other, tmp_path / "one" / "queue" / files.JOURNAL / "00000099")
    assert recover(config_pth) == ("", list(range(COUNT)))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)],
                         ids=["fifo", "directory", "link"])
def test_no_regular_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    config_pth = crash(tmp_path)
    path = segments(tmp_path)[2]
    path.unlink()
    make(path)
    error, received = recover(config_pth)
    assert error.startswith("AccessError") and not received


def test_other_format(tmp_path: Path) -> None:
    config_pth = crash(tmp_path)
    path = segments(tmp_path)[2]
    head = bytearray(path.read_bytes()[:88])
    head[8] += 1
    head[84:] = zlib.crc32(head[:84]).to_bytes(4, "little")
    with open(path, "r+b") as file:
        file.write(head)
    assert recover(config_pth)[0].startswith("FormatError")


#: Of a record, see docs/format.rst: checksum, kind, bytes, number, end.
RECORD: Final = struct.Struct("<IIQQQ")


def records(path: Path) -> list[int]:
    """List the places of the records of a segment, and of its end."""
    content, places = path.read_bytes(), [4096]
    while (length := RECORD.unpack_from(content, places[-1])[2]) > 0:
        places.append(places[-1] + (RECORD.size + length + 7) // 8 * 8)
    return places


def test_whole_record_behind_lost_ones(tmp_path: Path) -> None:
    """Of the records of one flush only the last is on the disk: it does not count, now or later."""
    config_pth = crash(tmp_path, 3)
    path = segments(tmp_path)[-1]
    flip(path, records(path)[-4] + 40)
    assert recover(config_pth) == ("", [])
    stores.lose_power(tmp_path / "queue")
    assert recover(config_pth) == ("", [])


def test_bytes_of_a_message_that_look_like_a_record(tmp_path: Path) -> None:
    """A reused segment holds such bytes behind its last record: they are not taken for one."""
    config_pth = crash(tmp_path)
    path = segments(tmp_path)[-1]
    content = path.read_bytes()
    *_, begin, offset = records(path)
    _, kind, length, number, end = RECORD.unpack_from(content, begin)
    body = bytearray(content[begin + RECORD.size:begin + RECORD.size + length])
    assert kind == 1 and body[8:16] == (COUNT).to_bytes(8, "little"), "It is the last message."
    # The last message again, as the next one. Its checksum is right but for the identity.
    body[8:16] = end.to_bytes(8, "little")
    fields = RECORD.pack(0, kind, length, number + 1, end + 1)[4:]
    forged = zlib.crc32(fields + body).to_bytes(4, "little") + fields + body
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(forged)
    assert recover(config_pth) == ("", list(range(COUNT)))


def test_position_that_is_half_written(tmp_path: Path) -> None:
    """A process that is killed while it writes into the shared page: the others find it again."""
    config_pth = crash(tmp_path)
    shared = tmp_path / "queue" / files.SHARED
    content = bytearray(shared.read_bytes())
    begin = 8 * files.SharedPage.JOURNAL
    content[begin:begin + 48] = os.urandom(48)
    with open(shared, "r+b") as file:
        file.write(content)
    with Pub("pub", config_pth) as pub:
        pub.send(message(COUNT))
        assert control.verify(config_pth) == {"queue": ()}
    stores.lose_power(tmp_path / "queue")
    assert recover(config_pth) == ("", list(range(COUNT + 1)))


def test_segment_that_is_removed_under_an_open_queue(tmp_path: Path) -> None:
    # With "os", the next segment is made before the messages need it.
    config_pth = support.make_queue(tmp_path, durability="os")
    with Pub("pub", config_pth) as pub:
        pub.send(bytes(1000))
        # The next one is made in advance, and all of them are removed: as by a program that tidies up.
        for _ in range(3):
            pub.send(bytes(100_000))
        for path in (tmp_path / "queue" / files.JOURNAL).iterdir():
            path.unlink()
        with pytest.raises((errors.StoreCorruptError, errors.FlushError),
                           match="segment") as caught:
            for _ in range(100):
                pub.send(bytes(100_000))
        print(caught.value)
    # Nothing that was sent is lost: the store has it.
    assert len(support.receive_all(config_pth)) >= 4
    assert control.verify(config_pth) == {"queue": ()}
