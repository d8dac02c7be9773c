"""The files of a queue: names, permissions, checks, durable changes, and the shared page."""

import contextlib
import errno
import mmap
import os
import resource
import stat
import time
import types
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

from persipubsub.errors import (AccessError, DiskFullError, FormatError, NotInitializedError,
                                PersipubsubError, StoreError)

DATA: Final = "data.mdb"
LOCK: Final = "lock.mdb"
WRITE_LOCK: Final = "write.lock"
OPEN_LOCK: Final = "open.lock"
USERS: Final = "users.lock"
CLAIMS: Final = "claims.lock"
FLUSH_LOCK: Final = "flush.lock"
JOURNAL_LOCK: Final = "journal.lock"
SHARED: Final = "shared"
RUNNING: Final = "running"
RESERVE: Final = "reserve"
#: The directory of a log is named by this and the id of the log.
LOG_PREFIX: Final = "log."
JOURNAL: Final = "journal"

#: Everything that this library keeps in a queue's directory.
OWN: Final = frozenset((DATA, LOCK, WRITE_LOCK, OPEN_LOCK, USERS, CLAIMS, JOURNAL_LOCK, SHARED,
                        RUNNING, RESERVE, JOURNAL))

#: What a file system or a mount puts into an empty directory by itself.
_TOLERATED: Final = frozenset(("lost+found", ".nfs", "..data"))

DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600

#: A disk is full if it has less room than this, in bytes.
_LITTLE_ROOM: Final = 1 << 16

#: Size of the file that is removed when the disk is full, so that messages can be acknowledged.
_RESERVE_BYTES: Final = 1 << 18

_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"

_STREAMS: Final = (0, 1, 2)

#: Most buffers of one ``pwritev``.
_MOST_BUFFERS: Final = 1024

Buffer: TypeAlias = bytes | memoryview


def boot_id() -> bytes:
    """Identify the running boot of the operating system, in 16 bytes."""
    with translated(_BOOT_ID, "read"), open(_BOOT_ID, "rb") as file:
        return bytes.fromhex(file.read().strip().replace(b"-", b"").decode())


def ticks_ns() -> int:
    """Read the time since boot, sleep included: a clock that can not be set."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


# Errors

# An error of the system has a number. One that a signal handler raised, as TimeoutError(), has none: it
# goes to the caller as it is.


class suppress(contextlib.suppress):  # pylint: disable=invalid-name  # as the one it is derived from
    """Suppress errors of the system, but not what a signal handler raised."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: types.TracebackType | None) -> bool:
        """Suppress the error, or let it through."""
        if isinstance(error, OSError) and error.errno is None:
            return False
        return bool(super().__exit__(kind, error, traceback))


@contextlib.contextmanager
def translated(path: str, doing: str) -> Iterator[None]:
    """Turn the operating system's errors into those of this library."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise translate_os_error(error=error, path=path, doing=doing) from error


_KINDS: Final[dict[type[PersipubsubError], tuple[int, ...]]] = {
    AccessError: (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EISDIR),
    DiskFullError: (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    NotInitializedError: (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
}


def kind_of(number: int | None) -> type[PersipubsubError]:
    """Choose the error of this library for an error number of the operating system."""
    for kind, numbers in _KINDS.items():
        if number in numbers:
            return kind
    return StoreError


def translate_os_error(error: OSError, path: str, doing: str) -> PersipubsubError:
    """Choose the error of this library for an error of the operating system."""
    return kind_of(error.errno)(f"Expected to {doing} {path}, but got: {error.strerror or error}")


# Opening


def occupy_streams() -> None:
    """
    Occupy the numbers of standard streams that are closed; reading and writing still fails there.

    Libraries in C, and a process that crashes, print to the numbers 0, 1 and 2. A store that was
    opened under one of these numbers would be damaged by the first line that is printed.
    """
    for number in _STREAMS:
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno is None:
                raise  # by a signal handler
            # This takes the lowest number that is free. Reading and writing fail there.
            os.open("/", os.O_PATH | os.O_CLOEXEC)


def open_file(path: str, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """
    Open a file of a queue, and create it if it is missing.

    :raise AccessError: if it is a link, has a second name, or is no regular file; a link is not
        followed, and a FIFO is not waited for
    """
    with translated(path=path, doing="open"):
        occupy_streams()
        # Without O_NONBLOCK, opening a FIFO waits.
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, FILE_MODE)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
            return descriptor
        os.close(descriptor)
    raise AccessError(
        f"Expected {path} to be a regular file with a single name, but got: {_describe(status)}")


@contextlib.contextmanager
def using(path: str, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    """Open a file of a queue for a ``with`` block; see :py:func:`open_file`."""
    descriptor = open_file(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def close_all_of(paths: Sequence[str]) -> None:
    """
    Close all descriptors of some files, in a forked child that has one thread.

    The child does not know which they are if another thread of its parent was in the middle of opening
    or closing one of the files.
    """
    identities = set()
    for path in paths:
        # A file that is gone is of no queue any more: no process locks it.
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            identities.add((status.st_dev, status.st_ino))
    if not identities:
        return
    for name in os.listdir("/proc/self/fd"):
        # The descriptor that lists the directory is closed by now.
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if (status.st_dev, status.st_ino) in identities:
                os.close(int(name))


def _describe(status: os.stat_result) -> str:
    """Say what is in the place of a regular file with a single name."""
    if stat.S_ISREG(status.st_mode):
        return f"{status.st_nlink} hard links"
    return f"something else ({stat.filemode(status.st_mode)})"


class SharedPage:
    """
    Words and notes that all processes of a queue see, mapped from the file ``shared``.

    Everything in it is a hint, or is written by one process at a time. A word has 8 aligned bytes,
    which are stored at once: no process reads half of one.
    """

    #: Indices of words in :py:attr:`words`. What is written often has a cache line of its own.
    STAMP: Final = 0  #: of the last notification
    FLAG: Final = 8  #: 1: a waiter may sleep until a notification
    END: Final = 9  #: number after the newest message, as the last sender stored it
    FLUSH_STAMP: Final = 16  #: of the last flush
    WAITS: Final = 24  #: 1: a process waits for the write lock
    JOURNAL: Final = 32  #: from here on, see :py:class:`persipubsub.lmdb_engine.journal.Journal`
    LOG: Final = 64  #: from here on, see :py:class:`persipubsub.lmdb_engine.log_file.LogFile`
    #: Offset and size of the notes on claims, in bytes.
    NOTES: Final = 4096
    NOTES_BYTES: Final = 1024 * 32
    SIZE: Final = NOTES + NOTES_BYTES

    def __init__(self, directory: str) -> None:
        """Map the file, and create it if it is missing."""
        path = os.path.join(directory, SHARED)
        with using(path) as descriptor, translated(path=path, doing="map"):
            # Zeros are written, as a hole is SIGBUS on a full disk. Nothing is overwritten.
            size = os.fstat(descriptor).st_size
            if size < self.SIZE:
                extend(descriptor, size, self.SIZE)
            self.map = mmap.mmap(descriptor, self.SIZE)
        self.words = memoryview(self.map)[:self.NOTES].cast("Q")


# Changing


def extend(descriptor: int, begin: int, end: int) -> None:
    """Write the rest of a file with zeros."""
    write_all(descriptor, [bytes(end - begin)], begin)


def write_all(descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write buffers one after the other at a place of a file, mostly in one call."""
    rest = [memoryview(one) for one in buffers if len(one)]
    while rest:
        written = os.pwritev(descriptor, rest[:_MOST_BUFFERS], offset)
        # Each round writes something: the disk is full, or more than 2 GiB are written.
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += written
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if written:
            rest[0] = rest[0][written:]


def flush_directory(path: str) -> None:
    """Make the names in a directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: str) -> None:
    """Create a directory and its parents, durably, unless they are there."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(os.path.abspath(path))
    make_directories(parent)
    try:
        os.mkdir(path, mode=DIRECTORY_MODE)
    except FileExistsError:
        return  # another process was faster; if it is a file, the next step fails
    flush_directory(parent)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[tuple[str, int]]:
    """
    Make a file that takes the place of another one at the end of the block, durably.

    If the process or the machine goes down, the path has either the old file or the new one.

    :return: path of the new file, and its descriptor
    """
    made = path + ".new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(made)  # a process that was killed here has left it
    descriptor = open_file(made, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        if os.path.lexists(path):
            os.fchmod(descriptor, stat.S_IMODE(os.lstat(path).st_mode))
        if os.geteuid() == 0:
            # An administrator must not lock the owner of the queue out.
            owner = os.lstat(path if os.path.lexists(path) else os.path.dirname(path))
            with suppress(OSError):
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
        yield made, descriptor
        os.fsync(descriptor)
        os.rename(made, path)
        flush_directory(os.path.dirname(path))
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made)


def remove_durably(path: str) -> None:
    """Remove a file, if it is there, so that it stays removed after a power failure."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    # Flush even if it is gone already: the process that removed it may not have come to flush.
    flush_directory(os.path.dirname(path))


# The mark of a store in use


def read_mark(directory: str) -> bytes | None:
    """Read the id of the boot in which a store was in use last; None if it was closed cleanly."""
    path = os.path.join(directory, RUNNING)
    if not os.path.lexists(path):
        return None
    with using(path, os.O_RDONLY) as descriptor:
        return os.read(descriptor, 16)


def mark_running(directory: str) -> None:
    """
    Mark a store durably as in use, before writing: a reboot makes LMDB's file untrustworthy.

    A mark of this boot is taken for durable: the caller has flushed the directory.
    """
    if read_mark(directory) != boot_id():
        with replacing(os.path.join(directory, RUNNING)) as (_, descriptor):
            os.write(descriptor, boot_id())


def mark_clean(directory: str) -> None:
    """Take the mark away, after everything was flushed."""
    remove_durably(os.path.join(directory, RUNNING))


# The disk


def is_full(path: str) -> bool:
    """Tell whether the disk of a file, or the limit on its size, leaves no room."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    try:
        size = os.stat(path).st_size
        system = os.statvfs(path)
    except OSError:
        return False
    blocks = system.f_bavail if os.geteuid() else system.f_bfree
    return (blocks * system.f_frsize < _LITTLE_ROOM
            or limit != resource.RLIM_INFINITY and limit - size < _LITTLE_ROOM)


def keep_reserve(directory: str) -> None:
    """Keep some room on the disk aside, if there is that much."""
    path = os.path.join(directory, RESERVE)
    # There may be no room for it, or no permission to write to the directory.
    with suppress(OSError, PersipubsubError):
        # One that is too short was left by a process that was killed, or by a power failure.
        if os.path.lexists(path) and os.lstat(path).st_size >= _RESERVE_BYTES:
            return
        with using(path) as descriptor:
            try:
                os.posix_fallocate(descriptor, 0, _RESERVE_BYTES)
            except OSError:
                os.unlink(path)
                raise


def spend_reserve(directory: str) -> bool:
    """Give the room that was kept aside back to the disk; return False if there was none."""
    try:
        os.unlink(os.path.join(directory, RESERVE))
    except OSError:
        return False
    return True


def disk_bytes(directory: str) -> int:
    """Add up what the files of a queue take on the disk."""
    total = 0
    for path, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


# What is there


def foreign_names(directory: str) -> list[str]:
    """List what does not belong to a queue."""
    return sorted(name for name in os.listdir(directory)
                  if name not in OWN and name not in _TOLERATED and not name.startswith(".nfs")
                  and not (name.endswith(".new") and name[:-len(".new")] in OWN))


class Identity(NamedTuple):
    """Device and inode: two paths that lead to the same file give the same identity."""

    device: int
    inode: int


def identify_store(directory: str) -> Identity:
    """
    Look at a queue's data file without following a link.

    :raise NotInitializedError: if there is none
    :raise FormatError: if it is no regular file with a single name, or the directory is none of a queue
    """
    path = os.path.join(directory, DATA)
    with translated(path=path, doing="look at"):
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise _explain_missing(directory) from None
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        # LMDB's lock file stands beside the data file: another name would have other locks.
        raise FormatError(f"Expected {path} to be a regular file with a single name, but got: "
                          f"{_describe(status)}")
    return Identity(device=status.st_dev, inode=status.st_ino)


def _explain_missing(directory: str) -> PersipubsubError:
    """Choose the error for a directory without a data file."""
    found = "nothing there"
    if os.path.lexists(directory):
        found = "an empty directory"
        foreign = foreign_names(directory) if os.path.isdir(directory) else ["no directory"]
        if foreign:
            return FormatError(f"Expected the directory {directory} to be a queue or to be empty, "
                               f"but got: {', '.join(foreign[:3])}")
    return NotInitializedError(
        f"Expected the directory {directory} to hold an initialized queue, but got: {found}. Run "
        "persipubsub.control.initialize_all_dbs with the configuration file first.")


def prepare_directory(directory: str) -> bool:
    """
    Make the directory of a queue, unless it is there; return True if it holds a store already.

    :raise FormatError: if it holds something else
    """
    try:
        with translated(path=directory, doing="create"):
            make_directories(directory)
    except NotInitializedError as error:
        # The path is in /proc, say, or below a file: "not initialized" would mislead.
        raise AccessError(str(error)) from error
    try:
        identify_store(directory)
    except NotInitializedError:
        return False
    return True
