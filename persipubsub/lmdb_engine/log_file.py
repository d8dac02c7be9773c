"""
The bytes of the log: append, flush, read.

A sender writes its records with one ``pwritev``, under the write lock and before LMDB commits
(``LogFile.write_out``). Where the log ends is what the index says, so that an aborted transaction
leaves nothing to be taken back: the next sender writes over its records. After a power failure such a
record may still be there. Therefore an aborted sender clears its head.

A sender that waits for the disk calls ``flush_through`` after its commit. One flush covers all threads
and processes that committed before it. In the shared page there is the end of the log that was
committed, and the end that is *safe*, which means on the disk. A safe end that is too low, as the
process was killed that flushed, only costs one more flush.

**A failed flush is final.** The kernel reports an error of ``fdatasync`` once and may drop the pages:
a second call that succeeds proves nothing. So the first error is noted in the shared page, and no
process sends any more until all have closed the queue. The next one that opens it writes what is not
safe to new files (``rewrite``). Receiving goes on. Rejected: to go on in a new segment at once, which
is of no use as long as the disk fails, and would need to know which threads to tell.
"""

import os
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from persipubsub.errors import BusyTimeoutError, CorruptMessageError, FlushError, PersipubsubError
from persipubsub.lmdb_engine import files, locks
from persipubsub.lmdb_engine import segments as segs
from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.notifier import Futex
from persipubsub.lmdb_engine.segments import Segment, SegmentMissing, Segments

#: Longest sleep of a sender that waits for the flush of another thread or process, in seconds.
_FLUSH_PAUSE_SECS: Final = 0.001

#: Messages are read with one call if no more bytes than this lie between them ...
_NEAR_BYTES: Final = 1 << 12

#: ... and up to so many bytes.
_READ_BYTES: Final = 1 << 22

_COPIED_BYTES: Final = 1 << 20

#: What is cleared of a record that does not count: all of its head.
_HEAD_BYTES: Final = 88

_FLUSH_HINT: Final = (
    "Messages are not sent any more, as what was sent may not be on the disk. Look at "
    "the disk, then close the queue in all processes and open it again.")


class Extent(NamedTuple):
    """Where the log has the bytes of a message."""

    number: int  #: of the message
    segment: int  #: where its segment begins
    position: int
    size: int
    crc: int


class LogFile:  # pylint: disable=too-many-instance-attributes
    """The log of one open queue. All threads may use it at the same time."""

    # Words of the shared page. END and SEGMENT are written under the write lock, SAFE and FAILED
    # under the flush lock, STATE_TXN under the state lock.
    END: Final = SharedPage.LOG  #: end of the log that was committed
    SEGMENT: Final = END + 1  #: where the segment begins that has this end
    SAFE: Final = END + 2  #: end of the log that is on the disk
    FAILED: Final = END + 3  #: 1 after a flush that failed, until the queue is opened alone
    STATE_TXN: Final = END + 4  #: LMDB's transaction up to which the last state goes
    FLUSH_WAITS: Final = END + 8  #: 1: a sender may sleep until a flush

    def __init__(self, directory: str, page: SharedPage, busy_timeout_secs: float) -> None:
        """Open the lock."""
        self._queue = directory
        self.words = page.words
        self._busy_timeout_secs = busy_timeout_secs
        self._futex = Futex(page, SharedPage.FLUSH_STAMP)
        self._flush_lock = locks.ExclusiveLock(os.path.join(directory, files.FLUSH_LOCK),
                                               f"flush the log of the queue {directory}")
        self.segments: Segments
        # Under the write lock: the segment that is written to; records that are not written yet;
        # what was written since the last commit.
        self._current: Segment | None = None
        self._buffers: list[files.Buffer] = []
        self._begin = self._end = 0
        self._written: list[tuple[Segment, int]] = []
        #: Whether a record was added since the last commit; under the write lock.
        self.has_added = False

    def use(self, log_id: bytes) -> None:
        """Work with the log of an id."""
        self.segments = Segments(self._queue, log_id)
        self._current = None

    def reset(self, end: int, segment: int) -> None:
        """Begin anew in the shared page, when no other process has the queue open."""
        words = self.words
        words[self.END], words[self.SEGMENT], words[self.SAFE] = end, segment, end
        words[self.FAILED] = words[self.STATE_TXN] = 0

    def close(self) -> None:
        """Close the files."""
        self._current = None
        self._flush_lock.close()

    # Appending, under the write lock

    def require(self, position: int, begin: int, size: int, ids_ns: Callable[[], int]) -> Segment:
        """
        Return the segment for the next record, and begin one if the last one has no room.

        :param position: of the record
        :param begin: of the last segment
        :param size: of the record
        :param ids_ns: tells the time of the newest id of a message
        """
        current = self._current
        if current is None or current.begin != begin:
            current = self._current = self._open(begin)
        if position + size > current.limit:
            current = self.begin_segment(position, current, size, ids_ns())
        return current

    def begin_segment(self,
                      position: int,
                      previous: Segment,
                      size: int,
                      ids_ns: int,
                      is_small: bool = False) -> Segment:
        """Begin a segment at a position; the sizes of segments double."""
        self.write_out()
        if position == previous.begin:
            self._current = self.segments.enlarge(previous, size)
            return self._current
        usual = 0 if is_small else min(2 * previous.header.size, segs.LARGEST_BYTES)
        self._current = self.segments.create(position, previous.begin, size, usual, ids_ns,
                                             self.words[self.SAFE])
        return self._current

    def _open(self, begin: int) -> Segment:
        """Open a segment that has to be there."""
        try:
            return self.segments.get(begin)
        except SegmentMissing:
            raise self.segments.missing_error(begin) from None

    def add(self, segment: Segment, position: int, buffers: Sequence[files.Buffer],
            size: int) -> None:
        """Add a record after those that were added before; see ``write_out``."""
        if not self._buffers:
            self._begin = position
        self._buffers.extend(buffers)
        # Records begin at multiples of 8 bytes.
        if size & 7:
            self._buffers.append(bytes(-size & 7))
        self._end = position + (size + 7 & ~7)
        self.has_added = True
        assert segment is self._current

    def write_out(self) -> None:
        """Write what was added, before the commit: mostly with one call."""
        buffers, self._buffers = self._buffers, []
        if buffers:
            assert self._current is not None
            self._written.append((self._current, self._begin))
            with files.translated(self.segments.path(self._current.begin), "write"):
                self._current.write(self._begin, buffers)

    def settle(self, is_committed: bool) -> None:
        """Publish what was committed, or clear what was not; before the write lock is released."""
        written, self._written, self._buffers = self._written, [], []
        self.has_added = False
        if not is_committed:
            # If a segment was begun, the next sender begins it again.
            current, self._current = self._current, None
            if current is not None:
                self.segments.forget(current.begin)
            for segment, position in written:
                with files.suppress(OSError):
                    segment.write(position, [bytes(_HEAD_BYTES)])
        elif written:
            # The segment first, and ``_flush`` reads it last: it never is the one before the end.
            self.words[self.SEGMENT] = written[-1][0].begin
            self.words[self.END] = self._end

    # Flushing

    def flush_through(self, end: int, segment: int) -> None:
        """
        Wait until the log is on the disk up to a position that was committed.

        One of the threads and processes that wait flushes for all of them.

        :param segment: where the segment begins that has this end
        :raise FlushError: if the disk refused it
        :raise BusyTimeoutError: if another process is in the middle of a flush for too long
        """
        deadline = time.monotonic() + self._busy_timeout_secs
        words = self.words
        # Each round either flushes all that is needed, or waits until the deadline for a process
        # that flushes.
        while words[self.SAFE] < end:
            stamp = self._futex.load()
            if words[self.FAILED]:
                raise self.failure("an earlier flush failed")
            try:
                with self._flush_lock.held(timeout=0):
                    self._flush(end, segment)
                    self._wake()
            except BusyTimeoutError:
                if time.monotonic() >= deadline:
                    raise BusyTimeoutError(
                        f"Expected to flush the log of the queue {self._queue} within "
                        f"{self._busy_timeout_secs} seconds (busy_timeout_secs), but got: another "
                        "process is in the middle of a flush. The message is in the queue, but not "
                        "yet safe.") from None
                words[self.FLUSH_WAITS] = 1
                # Look once more: the flush may have ended since the first look.
                if words[self.SAFE] < end:
                    self._futex.wait(stamp, _FLUSH_PAUSE_SECS)

    def _wake(self) -> None:
        """Wake all senders that wait for a flush, in all processes."""
        if self.words[self.FLUSH_WAITS]:
            self.words[self.FLUSH_WAITS] = 0
            self._futex.wake_all()

    def _flush(self, end: int, segment: int) -> None:
        """Flush all that was committed, at least up to a position; hold the flush lock."""
        words = self.words
        if words[self.FAILED]:
            raise self.failure("an earlier flush failed")
        if words[self.END] >= end:
            end, segment = words[self.END], words[self.SEGMENT]
        try:
            if words[self.SAFE] > segment:
                # A flush has covered the file's name and all segments before it.
                os.fdatasync(self._open(segment).descriptor)
            else:
                self._flush_segments(words[self.SAFE], end)
        except OSError as error:
            if error.errno is None:
                raise  # by a signal handler, see files
            # The kernel reports an error once: what can be read may not be on the disk.
            words[self.FAILED] = 1
            raise self.failure(error.strerror or error) from error
        words[self.SAFE] = max(end, words[self.SAFE])

    def _flush_segments(self, safe: int, end: int) -> None:
        """Flush all segments between two positions, and their names."""
        begins = self.segments.begins()
        for begin, following in zip(begins, [*begins[1:], end]):
            if begin < end and following > safe:
                try:
                    os.fsync(self.segments.get(begin).descriptor)
                except SegmentMissing:
                    # It was removed meanwhile: all its messages are finished.
                    continue
        files.flush_directory(self.segments.directory)

    def failure(self, found: object) -> FlushError:
        """Describe a flush that failed."""
        return FlushError(f"Expected to flush the log of the queue {self._queue}, but got: "
                          f"{found}. {_FLUSH_HINT}")

    @property
    def has_failed(self) -> bool:
        """Whether a flush failed since the queue was opened, in any process."""
        return bool(self.words[self.FAILED])

    def rewrite(self, end: int) -> None:
        """Write what is not safe to new files, after a failed flush; no other process is there."""
        begins = self.segments.begins()
        for begin, following in zip(begins, [*begins[1:], end]):
            if begin < end and following > self.words[self.SAFE]:
                segment = self._open(begin)
                with files.translated(self.segments.path(begin), "write"), files.replacing(
                        self.segments.path(begin)) as (_, descriptor):
                    copy_file(segment.descriptor, descriptor, segment.header.size)
                self.segments.forget(begin)
        self._current = None
        with files.translated(self.segments.directory, "flush"):
            files.flush_directory(self.segments.directory)

    # Reading

    def read(self, extents: Sequence[Extent]) -> list[bytes]:
        """
        Read messages, and check them; neighbours are read with one call.

        :return: those before the first one that is damaged or not there any more
        """
        if len(extents) == 1:
            message = self._read_one(extents[0])
            return [] if message is None else [message]
        messages: list[bytes] = []
        begin = 0
        while begin < len(extents):  # each round reads at least one
            stop = begin + 1
            first, last = extents[begin], extents[begin]
            while (stop < len(extents) and extents[stop].segment == first.segment
                   and 0 <= extents[stop].position - last.position - last.size <= _NEAR_BYTES
                   and extents[stop].position - first.position < _READ_BYTES):
                last = extents[stop]
                stop += 1
            try:
                data = self._read_range(first, last.position + last.size - first.position)
            except SegmentMissing:
                return messages
            base = first.position
            for extent in extents[begin:stop]:
                start = extent.position - base
                message = data[start:start + extent.size]
                if zlib.crc32(message) != extent.crc:
                    return messages
                messages.append(message)
            begin = stop
        return messages

    def _read_one(self, extent: Extent) -> bytes | None:
        """Read one message; None if it is damaged or not there."""
        try:
            message = self._read_range(extent, extent.size)
        except SegmentMissing:
            return None
        return message if zlib.crc32(message) == extent.crc else None

    def _read_range(self, extent: Extent, size: int) -> bytes:
        """Read from the beginning of a message on."""
        segment = self.segments.get(extent.segment)
        with files.translated(self.segments.path(extent.segment), "read"):
            return segment.read(extent.position, size)

    def damage(self, extent: Extent) -> PersipubsubError:
        """Describe a message that the index has and the log does not."""
        self.segments.forget(extent.segment)
        try:
            found = zlib.crc32(self._read_range(extent, extent.size))
        except SegmentMissing:
            return self.segments.missing_error(extent.segment)
        return CorruptMessageError(
            f"Expected the message {extent.number} ({extent.size} bytes) to have the checksum "
            f"{extent.crc:#010x}, but got: {found:#010x}",
            number=extent.number)


def copy_file(source: int, target: int, size: int) -> None:
    """Copy the beginning of a file into an empty one."""
    offset = 0
    while offset < size:  # each round copies something, or ends
        data = os.pread(source, min(_COPIED_BYTES, size - offset), offset)
        if not data:
            return
        files.write_all(target, [data], offset)
        offset += len(data)
