"""Test the bytes of the log: segments, one write a commit, shared flushes, reads with a checksum."""

import errno
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest

from persipubsub.errors import BusyTimeoutError, CorruptMessageError, FlushError, StoreCorruptError
from persipubsub.lmdb_engine import files, locks, segments
from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.log_file import Extent, LogFile
from tests import support

LOG_ID = b"12345678"

BUSY_SECS = 0.2


def no_ids() -> int:
    return 0


def make_log(directory: Path) -> LogFile:
    """Make an empty log."""
    log = open_log(directory)
    os.mkdir(log.segments.directory)
    log.segments.create(0, previous=0, least=0)
    log.reset(end=0, segment=0)
    return log


def open_log(directory: Path) -> LogFile:
    log = LogFile(str(directory), SharedPage(str(directory)), BUSY_SECS)
    log.use(LOG_ID)
    return log


def append(log: LogFile, *messages: bytes, is_committed: bool = True) -> list[Extent]:
    """Append messages as one commit; each is a record without a head."""
    extents: list[Extent] = []
    position, begin = log.words[LogFile.END], log.words[LogFile.SEGMENT]
    for message in messages:
        segment = log.require(position, begin, len(message), no_ids)
        log.add(segment, position, [message], len(message))
        begin = segment.begin
        extents.append(Extent(len(extents), begin, position, len(message), zlib.crc32(message)))
        position += len(message) + 7 & ~7
    log.write_out()
    log.settle(is_committed)
    return extents


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """List the first arguments of the calls of a function of ``os``, which is called all the same."""
    calls: list[Any] = []
    function = getattr(os, name)

    def count(*args: Any) -> Any:
        calls.append(args[0])
        return function(*args)

    monkeypatch.setattr(os, name, count)
    return calls


def end_of(log: LogFile) -> tuple[int, int]:
    return log.words[LogFile.END], log.words[LogFile.SEGMENT]


def test_messages_are_read_as_they_were_appended(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    messages = [b"", b"x", b"y" * 1000, b"z" * 100_000, b"more than a segment" * 100_000, b"last"]
    extents = [extent for message in messages for extent in append(log, message)]
    assert log.read(extents) == messages
    assert [log.read([extent]) for extent in extents] == [[message] for message in messages]
    # Another process finds the same.
    assert open_log(tmp_path).read(extents) == messages
    assert len(log.segments.begins()) == 2


def test_commit_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(tmp_path)
    calls = count_calls(monkeypatch, "pwritev")
    messages = [b"%d" % number for number in range(100)]
    extents = append(log, *messages)
    assert len(calls) == 1
    assert log.read(extents) == messages


def test_neighbours_are_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(tmp_path)
    messages = [b"%d" % number for number in range(100)]
    extents = append(log, *messages)
    log.segments.get(0)
    calls = count_calls(monkeypatch, "pread")
    assert log.read(extents) == messages
    assert len(calls) == 1


def test_aborted_record_is_written_over(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    append(log, b"first")
    before = end_of(log)
    aborted = append(log, b"never there" * 10, is_committed=False)
    assert end_of(log) == before
    # Its head is cleared: after a power failure it must not be found.
    assert log.segments.get(0).read(aborted[0].position, 88) == bytes(88)
    extents = append(log, b"second")
    assert extents[0].position == aborted[0].position
    assert log.read(extents) == [b"second"]


def test_segment_of_an_aborted_record_is_begun_again(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    large = b"x" * 2 * segments.SMALL_BYTES
    before = end_of(log)
    append(log, large, is_committed=False)
    assert end_of(log) == before
    extents = append(log, large[::-1])
    assert log.read(extents) == [large[::-1]]


def test_segment_without_a_record_is_enlarged_for_all(tmp_path: Path) -> None:
    log, other = make_log(tmp_path), open_log(tmp_path)
    # Both have it open to write to it.
    for one in (log, other):
        append(one, b"aborted", is_committed=False)
        assert one.require(0, 0, 8, no_ids).begin == 0
    large = b"x" * 2 * segments.SMALL_BYTES
    extents = append(log, large)
    extents += append(other, b"small")
    extents += append(log, b"small, too")
    for one in (log, other, open_log(tmp_path)):
        assert one.read(extents) == [large, b"small", b"small, too"]


def test_spare_is_the_next_segment(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.segments.make_spare(segments.LARGEST_BYTES, is_written=True)
    assert log.segments.has_spare(segments.LARGEST_BYTES)
    append(log, b"first")
    append(log, b"x" * segments.SMALL_BYTES)
    assert not log.segments.has_spare(segments.LARGEST_BYTES)
    begin = end_of(log)[1]
    assert log.segments.get(begin).header.size == segments.LARGEST_BYTES


def test_segment_that_is_not_needed_becomes_the_spare(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    for _ in range(9):
        append(log, b"x" * segments.SMALL_BYTES)
    begins = log.segments.begins()
    size = log.segments.get(begins[1]).header.size
    log.segments.remove(begins[:-1], spare_bytes=size)
    assert log.segments.begins() == begins[-1:]
    assert log.segments.has_spare(size)
    assert log.segments.drop_spare()
    assert not log.segments.drop_spare()


def test_flush_covers_all_that_was_committed(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(tmp_path)
    flushed = count_calls(monkeypatch, "fdatasync")
    append(log, b"first")
    log.flush_through(*end_of(log))  # the first flush of a segment covers its name, too
    assert not flushed
    ends = []
    for number in range(5):
        append(log, b"%d" % number)
        ends.append(end_of(log))
    for end in ends:
        log.flush_through(*end)
    assert len(flushed) == 1


def test_flush_covers_segments_that_are_full(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(tmp_path)
    for _ in range(3):
        append(log, b"x" * segments.SMALL_BYTES)
    flushed = count_calls(monkeypatch, "fsync")
    log.flush_through(*end_of(log))
    wanted = {log.segments.get(begin).descriptor for begin in log.segments.begins()}
    assert wanted <= set(flushed)


def test_threads_share_flushes(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    append(log, b"x")

    def flush() -> None:
        log.flush_through(*end_of(log))

    support.in_threads([flush] * 16)
    assert log.words[LogFile.SAFE] == log.words[LogFile.END]


def test_flush_ends_although_no_sender_told_the_end(tmp_path: Path) -> None:
    # It was killed between its commit and the shared page.
    log = make_log(tmp_path)
    append(log, b"x")
    end = end_of(log)
    log.words[LogFile.END] = 0
    log.flush_through(*end)
    assert log.words[LogFile.SAFE] == end[0]


def test_failed_flush_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, other = make_log(tmp_path), open_log(tmp_path)
    append(log, b"safe")
    log.flush_through(*end_of(log))
    extents = append(log, b"lost")
    end = end_of(log)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(FlushError):
            log.flush_through(*end)
    # The disk works again, but the kernel may have dropped what was written.
    for one in (log, other):
        assert one.has_failed
        with pytest.raises(FlushError):
            one.flush_through(*end)
    assert log.words[LogFile.SAFE] < end[0]
    # Whoever opens the queue alone writes it to new files.
    log.rewrite(end[0])
    log.reset(*end)
    assert not log.has_failed
    assert log.read(extents) == [b"lost"]


def test_wait_for_a_flush_has_a_deadline(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    append(log, b"x")
    lock = locks.LockFile(str(tmp_path / files.FLUSH_LOCK))
    assert lock.try_lock()
    with pytest.raises(BusyTimeoutError, match="The message is in the queue"):
        log.flush_through(*end_of(log))
    timer = threading.Timer(BUSY_SECS / 4, lock.close)
    timer.start()
    log.flush_through(*end_of(log))
    timer.join()


def test_damaged_message_is_not_handed_out(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    extents = append(log, b"first", b"second", b"third")
    segment = log.segments.get(0)
    segment.write(extents[1].position, [b"S"])
    assert log.read(extents) == [b"first"]
    assert not log.read(extents[1:2])
    error = log.damage(extents[1])
    assert isinstance(error, CorruptMessageError)
    assert error.number == 1


def test_missing_segment_is_corruption(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    extents = append(log, b"first")
    os.unlink(log.segments.path(0))
    log = open_log(tmp_path)
    assert not log.read(extents)
    assert isinstance(log.damage(extents[0]), StoreCorruptError)
    with pytest.raises(StoreCorruptError, match="restore"):
        append(log, b"second")


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 30, 79])
def test_segment_with_a_damaged_header_is_missing(tmp_path: Path, offset: int) -> None:
    log = make_log(tmp_path)
    extents = append(log, b"first")
    with open(log.segments.path(0), "r+b") as file:
        file.seek(offset)
        found = file.read(1)
        file.seek(offset)
        file.write(bytes([found[0] ^ 1]))
    assert not open_log(tmp_path).read(extents)


def test_open_segments_are_bounded(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    extents = [append(log, b"x" * segments.SMALL_BYTES)[0]]
    begin = end_of(log)[1]
    while len(extents) < 40:
        # Each in a small segment of its own.
        position, _ = end_of(log)
        segment = log.begin_segment(position, log.segments.get(begin), 8, 0, is_small=True)
        log.settle(is_committed=True)
        log.words[LogFile.SEGMENT] = begin = segment.begin
        extents += append(log, b"small")
    before = len(os.listdir("/proc/self/fd"))
    assert log.read(extents)[1:] == [b"small"] * (len(extents) - 1)
    assert len(os.listdir("/proc/self/fd")) <= before + 20
