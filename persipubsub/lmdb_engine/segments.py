"""
Segments: the files of a log, each of a fixed size that is allocated in advance.

The log of a queue is a directory. A position in the log is the number of bytes of records before it.
A segment is named by the position of its first record, and ends where the next one begins. A segment
begins with a header, which has a page of 4096 bytes to itself:

======= ============================================================================================
offset  header of a segment
======= ============================================================================================
0       magic ``persilog`` (8), format (4), CRC-32 (4) of the fields after it
16      id of the log (8), identity (8)
32      position of the first record (8), of that of the segment before (8)
48      size of the file (8), time of the newest id before the segment (8)
64      position up to which the log was on the disk (8), 0 (8)
======= ============================================================================================

The identity of a segment is random and new at each use. The head of each record has it: what the file
held before is never taken for new.

To flush a file whose blocks are allocated and written takes one write to the disk; to flush one that
is only allocated, or grows, takes two or three. So the background thread makes the *spare* in advance,
written with zeros. A sender that needs a segment renames the spare. If there is none, the sender only
allocates a small segment: it never waits for zeros. A large record has no use for zeros, and the
durability ``os`` flushes too rarely. A segment that is not needed any more becomes the spare, or is
removed.
"""

import contextlib
import os
import stat
import struct
import zlib
from typing import Final, NamedTuple

from persipubsub.errors import AccessError, NotInitializedError, StoreCorruptError
from persipubsub.lmdb_engine import files

_MAGIC: Final = b"persilog"
_FORMAT: Final = 1
_HEADER = struct.Struct("<8sII8sQQQQQQQ")
_FIELDS_AT: Final = 16

#: The header of a segment has a page of the disk to itself.
HEADER_BYTES: Final = 4096

#: Size of the first segment, and of one that a sender makes.
SMALL_BYTES: Final = 1 << 18

#: The largest size of a segment, unless a single record needs more. A drained queue keeps two.
LARGEST_BYTES: Final = 1 << 23

#: Zeros are written in pieces of this size. A file system caches a file in pieces as large as its
#: writes, and goes through a whole piece at each later small write: with pieces of 1 MiB, a flush
#: takes a tenth longer.
_WRITTEN_BYTES: Final = 1 << 16

#: Segments that stay open in a process.
_MOST_OPEN: Final = 16

_SPARE: Final = "spare"


class SegmentMissing(Exception):  # caught by this engine, never raised to a user
    """Report that the file of a segment is not there: its messages left the queue, or were lost."""


class Header(NamedTuple):
    """The header of a segment."""

    log_id: bytes
    identity: int
    begin: int  #: position of its first record
    previous: int  #: where the segment before it begins
    size: int  #: of the file
    ids_ns: int  #: time of the newest id before it
    safe: int  #: the log was on the disk up to here when the segment began

    def pack(self) -> bytes:
        """Encode the header."""
        packed = _HEADER.pack(_MAGIC, _FORMAT, 0, *self, 0)
        crc = zlib.crc32(packed[_FIELDS_AT:])
        return _HEADER.pack(_MAGIC, _FORMAT, crc, *self, 0)


def unpack_header(packed: bytes) -> Header | None:
    """Decode the header of a segment; None if it is damaged or of another format."""
    if len(packed) < _HEADER.size:
        return None
    magic, version, crc, *fields, _ = _HEADER.unpack(packed[:_HEADER.size])
    if (magic, version, crc) != (_MAGIC, _FORMAT, zlib.crc32(packed[_FIELDS_AT:_HEADER.size])):
        return None
    return Header._make(fields)


class Segment:
    """An open segment. Its file is closed when no thread uses it any more."""

    def __init__(self, descriptor: int, header: Header) -> None:
        """Take over the descriptor."""
        self.descriptor = descriptor
        self.header = header
        self.begin = header.begin
        self.identity = header.identity
        #: Position in the log where the file ends.
        self.limit = header.begin + header.size - HEADER_BYTES

    def __del__(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)

    def read(self, position: int, size: int) -> bytes:
        """Read at a position of the log; less at the end of the file."""
        return os.pread(self.descriptor, size, HEADER_BYTES + position - self.begin)

    def write(self, position: int, buffers: list[files.Buffer]) -> None:
        """Write at a position of the log, mostly by one ``pwritev``."""
        files.write_all(self.descriptor, buffers, HEADER_BYTES + position - self.begin)


class Segments:
    """The files of one log. All threads may use it at the same time."""

    def __init__(self, queue: str, log_id: bytes) -> None:
        """Initialize without opening anything."""
        self._queue = queue
        self.log_id = log_id
        self.directory = log_directory(queue, log_id)
        self._open: dict[int, Segment] = {}

    def path(self, begin: int) -> str:
        """Name the file of a segment."""
        return os.path.join(self.directory, f"{begin:016x}")

    def begins(self) -> list[int]:
        """List where the segments begin, in order."""
        with files.translated(self.directory, "list"):
            try:
                # Not os.path.isdir, which returns False if a signal handler raises an OSError.
                is_directory = stat.S_ISDIR(os.lstat(self.directory).st_mode)
            except FileNotFoundError:
                return []
            if not is_directory:
                raise AccessError(
                    f"Expected {self.directory} to be a directory, but got: something else")
            return sorted(int(name, 16) for name in os.listdir(self.directory) if len(name) == 16)

    def get(self, begin: int) -> Segment:
        """
        Open a segment, or return it if it is open.

        :raise SegmentMissing: if the file is not there, or is not the segment
        """
        segment = self._open.get(begin)
        if segment is not None:
            return segment
        path = self.path(begin)
        try:
            descriptor = files.open_file(path, os.O_RDWR)
        except NotInitializedError:
            raise SegmentMissing(path) from None
        try:
            with files.translated(path, "read"):
                header = unpack_header(os.pread(descriptor, _HEADER.size, 0))
            if header is None or (header.begin, header.log_id) != (begin, self.log_id):
                raise SegmentMissing(path)
        except BaseException:
            os.close(descriptor)
            raise
        return self._keep(Segment(descriptor, header))

    def _keep(self, segment: Segment) -> Segment:
        """Keep a segment open, and forget the one that was opened first."""
        self._open[segment.begin] = segment
        # Another thread may change the dictionary meanwhile: then one more stays for now.
        with contextlib.suppress(KeyError, RuntimeError, StopIteration):
            if len(self._open) > _MOST_OPEN:
                del self._open[next(iter(self._open))]
        return segment

    def forget(self, begin: int) -> None:
        """Open the file anew at its next use."""
        self._open.pop(begin, None)

    def close(self) -> None:
        """Close all that is open, as soon as no thread uses it."""
        self._open = {}

    def missing_error(self, begin: int, found: str = "no such file") -> StoreCorruptError:
        """Describe a segment without which messages are lost."""
        return StoreCorruptError(
            f"Expected the segment {self.path(begin)} of the log of the queue {self._queue}, but got: "
            f"{found}. Its messages are lost: restore a backup with 'persipubsub restore', or give up "
            "what waits with 'persipubsub clear'.")

    # Making and removing

    def create(self,
               begin: int,
               previous: int,
               least: int,
               usual: int = 0,
               ids_ns: int = 0,
               safe: int = 0) -> Segment:
        """
        Begin a segment; hold the write lock. A flush makes its file and its name durable.

        :param begin: position of its first record
        :param previous: where the segment before it begins
        :param least: bytes of records that it needs room for
        :param usual: size of its file if there is no spare; 0: a small one, which leaves the spare
        :param ids_ns: time of the newest id before it
        :param safe: the log is on the disk up to here
        """
        least = -(-(least + HEADER_BYTES) // HEADER_BYTES) * HEADER_BYTES
        path = self.path(begin)
        # One name for each process: the write lock does not keep a rebuild or a restore out.
        made = f"{path}.{os.getpid()}.new"
        with files.translated(path, "write"):
            descriptor = self._take_spare(made, least) if usual else -1
            try:
                if descriptor < 0:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(made)  # of a process that was killed here
                    descriptor = files.open_file(made, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                    _allocate(descriptor, max(least, SMALL_BYTES), usual)
                identity = int.from_bytes(os.urandom(8), "little")
                header = Header(self.log_id, identity, begin, previous,
                                os.fstat(descriptor).st_size, ids_ns, safe)
                files.write_all(descriptor, [header.pack()], 0)
                os.rename(made, path)
            except BaseException:
                if descriptor >= 0:
                    os.close(descriptor)
                # Give the room back: the disk may be full.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(made)
                raise
        return self._keep(Segment(descriptor, header))

    def enlarge(self, segment: Segment, least: int) -> Segment:
        """
        Make room in a segment that has no record yet; hold the write lock.

        It stays the same file: another process may have it open to write to it, and then has less room
        than there is.
        """
        least = -(-(least + HEADER_BYTES) // HEADER_BYTES) * HEADER_BYTES
        with files.translated(self.path(segment.begin), "write"):
            os.posix_fallocate(segment.descriptor, 0, least)
            segment.header = segment.header._replace(size=least)
            files.write_all(segment.descriptor, [segment.header.pack()], 0)
        segment.limit = segment.begin + least - HEADER_BYTES
        return segment

    def _take_spare(self, made: str, least: int) -> int:
        """Take the spare if it is large enough; return its descriptor, or -1."""
        spare = os.path.join(self.directory, _SPARE)
        try:
            if os.lstat(spare).st_size < least:
                return -1
            os.rename(spare, made)
        except FileNotFoundError:
            return -1
        return files.open_file(made, os.O_RDWR)

    def has_spare(self, size: int) -> bool:
        """Tell whether there is a spare of a size."""
        with files.suppress(OSError):
            return os.lstat(os.path.join(self.directory, _SPARE)).st_size == size
        return False

    def make_spare(self, size: int, is_written: bool) -> None:
        """
        Make the spare in the place of another one.

        :param is_written: True to write zeros, False only to allocate
        """
        spare = os.path.join(self.directory, _SPARE)
        made = f"{spare}.{os.getpid()}.new"
        with files.translated(spare, "write"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(made)
            descriptor = files.open_file(made, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                if is_written:
                    for offset in range(0, size, _WRITTEN_BYTES):
                        files.extend(descriptor, offset, min(size, offset + _WRITTEN_BYTES))
                    os.fsync(descriptor)
                else:
                    os.posix_fallocate(descriptor, 0, size)
                os.rename(made, spare)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(made)
                raise
            finally:
                os.close(descriptor)

    def drop_spare(self) -> bool:
        """Remove the spare, for example on a full disk; return False if there is none."""
        try:
            os.unlink(os.path.join(self.directory, _SPARE))
        except OSError as error:
            if error.errno is None:
                raise  # by a signal handler
            return False
        return True

    def remove(self, begins: list[int], spare_bytes: int = 0) -> None:
        """
        Remove segments that nothing needs.

        :param spare_bytes: one of this size becomes the spare; 0: none does
        """
        for begin in begins:
            self.forget(begin)
            path = self.path(begin)
            with files.suppress(OSError):
                if (spare_bytes and os.lstat(path).st_size == spare_bytes
                        and not self.has_spare(spare_bytes)):
                    os.rename(path, os.path.join(self.directory, _SPARE))
                else:
                    os.unlink(path)

    def bytes_on_disk(self) -> int:
        """Add up the sizes of all segments, and of the spare."""
        total = 0
        with files.suppress(OSError):
            for name in os.listdir(self.directory):
                with files.suppress(OSError):
                    total += os.lstat(os.path.join(self.directory, name)).st_size
        return total


def log_directory(queue: str, log_id: bytes) -> str:
    """Name the directory of a log."""
    return os.path.join(queue, files.LOG_PREFIX + log_id.hex())


def remove_logs(queue: str, but: bytes = b"") -> None:
    """Remove the logs in the directory of a queue, but the one of an id."""
    kept = os.path.basename(log_directory(queue, but)) if but else ""
    for name in os.listdir(queue):
        path = os.path.join(queue, name)
        if not name.startswith(files.LOG_PREFIX) or name == kept:
            continue
        if os.path.islink(path) or not os.path.isdir(path):
            os.unlink(path)
            continue
        for each in os.listdir(path):
            os.unlink(os.path.join(path, each))
        os.rmdir(path)


def _allocate(descriptor: int, least: int, usual: int) -> None:
    """Allocate a file: of its usual size, or a smaller one if the disk is full."""
    try:
        os.posix_fallocate(descriptor, 0, max(least, usual))
    except OSError as error:
        if usual <= least or error.errno is None:
            raise
        os.ftruncate(descriptor, 0)
        os.posix_fallocate(descriptor, 0, least)


def usual_bytes(used: int) -> int:
    """Choose the size of the next segment: a quarter of what the log has now."""
    size = SMALL_BYTES
    while size < min(used // 4, LARGEST_BYTES):  # it doubles each time
        size *= 2
    return size
