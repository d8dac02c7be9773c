"""
Handle the files of a queue's directory before and beside LMDB: names, checks, durable renames.

LMDB trusts its file: it kills the process with SIGBUS on a truncated one and takes an empty one for
new. What it is given is therefore checked here first.
"""

import contextlib
import errno
import mmap
import os
import resource
import stat
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import persipubsub.errors
from persipubsub.environment import _standard_streams

DATA: Final = "data.mdb"
LOCK: Final = "lock.mdb"
WRITE_GATE: Final = "write.lock"
OPEN_GATE: Final = "open.lock"
USERS: Final = "users.lock"
CLAIMS: Final = "claims.lock"
BELL: Final = "bell"
BOARD: Final = "board"
RUNNING: Final = "running"
CHECKPOINT: Final = "checkpoint.mdb"
CHECKPOINT_LOCK: Final = "checkpoint.lock"
RESERVE: Final = "reserve"
CREATING: Final = "creating"

#: Everything that this library keeps in a queue's directory.
OWN: Final = frozenset((DATA, LOCK, WRITE_GATE, OPEN_GATE, USERS, CLAIMS, BELL, BOARD, RUNNING,
                        CREATING, CHECKPOINT, CHECKPOINT_LOCK, RESERVE))

#: What a file system or a mount puts into an empty directory by itself.
_TOLERATED: Final = frozenset(("lost+found", ".nfs", "..data"))

DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600

#: A disk is full if it has less room than this, in bytes.
_LITTLE_ROOM: Final = 1 << 16

#: What is given back when the disk is full, so that messages can be acknowledged, in bytes.
_RESERVE_BYTES: Final = 1 << 18

_MDB_MAGIC: Final = 0xBEEFC0DE
_MDB_DATA_VERSION: Final = 1
_PAGE_HEADER_BYTES: Final = 16
_META = struct.Struct("=IIQQ48s48sQQ")


@contextlib.contextmanager
def translated(path: str, doing: str) -> Iterator[None]:
    """
    Turn the operating system's errors into those of this library.

    :param path: of the file or directory, named in the error
    :param doing: what was tried, such as "open", named in the error
    :raise AccessError: for missing rights and read-only file systems
    :raise DiskFullError: for a full disk, a quota or a limit on file sizes
    :raise StoreError: for everything else
    """
    try:
        yield
    except OSError as error:
        raise translate_os_error(error=error, path=path, doing=doing) from error


def translate_os_error(error: OSError, path: str,
                       doing: str) -> persipubsub.errors.PersipubsubError:
    """
    Choose the error of this library for an error of the operating system.

    :param error: that was raised
    :param path: of the file or directory
    :param doing: what was tried
    :return: error to be raised instead
    """
    text = f"Expected to {doing} {path}, but got: {error.strerror or error}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return persipubsub.errors.AccessError(text)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return persipubsub.errors.DiskFullError(text)
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        return persipubsub.errors.NotInitializedError(text)
    return persipubsub.errors.StoreError(text)


def flush_directory(path: str) -> None:
    """
    Make the names in a directory survive a power failure.

    :param path: of the directory
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: str) -> None:
    """
    Create a directory with its parents, durably; those that are there are left as they are.

    :param path: of the directory
    """
    missing: list[str] = []
    current = os.path.abspath(path)
    while not os.path.isdir(current):
        missing.append(current)
        current = os.path.dirname(current)
    for directory in reversed(missing):
        try:
            os.mkdir(directory, mode=DIRECTORY_MODE)
        except FileExistsError:
            # Another process was faster; if it is a file, the next step fails.
            continue
        flush_directory(os.path.dirname(directory))


def open_to_write(path: str, flags: int) -> int:
    """
    Open a file of a queue, or one that is to take its place.

    :param path: of the file
    :param flags: of ``os.open``
    :return: descriptor, closed on exec, and none of a standard stream
    """
    _standard_streams.occupy()
    return _standard_streams.step_aside(os.open(path, flags | os.O_CLOEXEC, FILE_MODE))


def open_own_file(path: str) -> int:
    """
    Open one of the library's small files for reading and writing; create it when it is missing.

    :param path: of the file
    :return: descriptor, closed on exec
    :raise AccessError: without rights, or if the file is a symbolic link
    """
    with translated(path=path, doing="open"):
        try:
            return open_to_write(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise persipubsub.errors.AccessError(
                    f"Expected {path} to be a regular file, but got: a symbolic link") from error
            raise


def map_file(descriptor: int, size: int, access: int = mmap.ACCESS_WRITE) -> mmap.mmap:
    """
    Map a file; the mapping keeps a descriptor of its own.

    :param descriptor: of the file
    :param size: in bytes; the file is at least as large
    :param access: that of ``mmap``
    :return: mapped bytes
    """
    return _standard_streams.open_elsewhere(lambda: mmap.mmap(descriptor, size, access=access))


def reserve(descriptor: int, size: int) -> None:
    """
    Make a file that is going to be mapped so large, with zeros.

    ``ftruncate`` was rejected: it leaves a hole, and when the disk is full, the kernel kills with
    SIGBUS whoever sets a byte in it.

    :param descriptor: of the file
    :param size: in bytes
    """
    extend(descriptor, 0, size)


def extend(descriptor: int, begin: int, end: int) -> None:
    """
    Write the rest of a file that is going to be mapped, with zeros.

    :param descriptor: of the file
    :param begin: first byte to write
    :param end: behind the last byte, which is the size of the file then
    """
    if os.pwrite(descriptor, bytes(end - begin), begin) < end - begin:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_full(directory: str) -> bool:
    """
    Tell whether the disk, or the limit on the size of this process's files, leaves no room.

    :param directory: of the queue
    :return: True if so; False if that can not be found out
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    path = os.path.join(directory, DATA)
    try:
        # While a queue is being created, there is none yet.
        size = os.stat(path).st_size if os.path.lexists(path) else 0
        system = os.statvfs(directory)
    except OSError:
        return False
    blocks = system.f_bavail if os.geteuid() else system.f_bfree
    return (blocks * system.f_frsize < _LITTLE_ROOM
            or limit != resource.RLIM_INFINITY and limit - size < _LITTLE_ROOM)


def write_durably(path: str, content: bytes) -> None:
    """
    Write a small file so that after a power failure it is either as before or complete.

    :param path: of the file
    :param content: to be written
    """
    temporary = f"{path}.new"
    descriptor = open_to_write(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(temporary, path)
    flush_directory(os.path.dirname(path))


def copy_durably(source: str, path: str, mode: int) -> None:
    """
    Copy a large file, and wait until the content of the copy is on the disk. Its name need not be.

    If it fails, there is no copy.

    :param source: path of the file
    :param path: of the copy; replaced if it is there
    :param mode: rights of the copy
    """
    import shutil  # pylint: disable=import-outside-toplevel  # slow, and hardly ever needed

    descriptor = open_to_write(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        with open(descriptor, "wb") as target, open(source, "rb") as content:
            os.fchmod(descriptor, mode)
            shutil.copyfileobj(content, target)
            target.flush()
            os.fsync(descriptor)
    except BaseException:
        # Give the room back: the disk may be full.
        os.unlink(path)
        raise


def remove_durably(path: str) -> None:
    """
    Remove a file, if it is there, so that it stays removed after a power failure.

    :param path: of the file
    """
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    flush_directory(os.path.dirname(path))


def foreign_names(directory: str) -> list[str]:
    """
    List what does not belong to a queue.

    :param directory: of the queue
    :return: names of files that this library did not make
    """
    return sorted(name for name in os.listdir(directory)
                  if name not in OWN and name not in _TOLERATED and not name.startswith(".nfs")
                  and not (name.endswith(".new") and name[:-len(".new")] in OWN))


class Identity(NamedTuple):
    """Tell files apart: two paths that lead to the same file give the same identity."""

    device: int
    inode: int


def identify_store(directory: str) -> Identity:
    """
    Look at a queue's data file without following a link.

    :param directory: of the queue
    :return: identity of its data file
    :raise NotInitializedError: if there is no queue yet
    :raise FormatError: if the directory holds something else, or the file is of a wrong kind
    :raise AccessError: if the process may not look
    """
    path = os.path.join(directory, DATA)
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise _explain_missing(directory=directory) from None
    except OSError as error:
        raise translate_os_error(error=error, path=path, doing="look at") from error

    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
        raise persipubsub.errors.FormatError(
            f"Expected {path} to be a regular file, but got: {kind}")
    if status.st_nlink != 1:
        # LMDB's lock file stands beside the data file: the other name would have other locks.
        raise persipubsub.errors.FormatError(
            f"Expected {path} to have a single name, but got: {status.st_nlink} hard links")
    return Identity(device=status.st_dev, inode=status.st_ino)


def _explain_missing(directory: str) -> persipubsub.errors.PersipubsubError:
    """
    Choose the error for a directory without a data file.

    :param directory: of the queue
    :return: error to be raised
    """
    hint = "Run persipubsub.control.initialize_all_dbs with the configuration file first."
    if not os.path.lexists(directory):
        return persipubsub.errors.NotInitializedError(
            f"Expected the directory of a queue at {directory}, but got: nothing there. {hint}")
    if not os.path.isdir(directory):
        return persipubsub.errors.FormatError(
            f"Expected {directory} to be the directory of a queue, but got: not a directory")
    try:
        foreign = foreign_names(directory)
    except OSError as error:
        return translate_os_error(error=error, path=directory, doing="list")
    if foreign:
        return persipubsub.errors.FormatError(
            f"Expected the directory {directory} to be a queue or to be empty, but got: "
            f"{', '.join(foreign[:3])}")
    return persipubsub.errors.NotInitializedError(
        f"Expected an initialized queue in {directory}, but got: an empty directory. {hint}")


def missing_bytes(path: str) -> int:
    """
    Check the meta pages of a data file as LMDB does it, and compare its size with them.

    :param path: of the data file
    :return:
        how many bytes the file is shorter than its newer meta page says; that is truncation, or
        free pages at the end that were never written
    :raise StoreCorruptError: if the file is truncated or its meta pages are damaged
    :raise FormatError: if it is no data file of LMDB 0.9
    """
    with translated(path=path, doing="read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            # Before the meta pages: the file may grow while we look, but never shrinks.
            size = os.fstat(descriptor).st_size
            first = os.pread(descriptor, _PAGE_HEADER_BYTES + _META.size, 0)
            page_size = _check_first_meta(path=path, size=size, head=first)
            second = os.pread(descriptor, _PAGE_HEADER_BYTES + _META.size, page_size)
            metas = (_parse_meta(path, first), _parse_meta(path, second))
            size = max(size, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)

    last_page = max(metas)[1]
    return max(0, (last_page + 1) * page_size - size)


def verify_data_file(path: str) -> None:
    """
    Walk through all pages of a data file without LMDB's engine.

    Nobody may write to the file meanwhile. It takes about a second for 100 MB.

    :param path: of the data file
    :raise StoreCorruptError: if anything is wrong
    """
    import lmdb.verify  # pylint: disable=import-outside-toplevel

    with translated(path=path, doing="read"), open(path, "rb") as fid:
        size = os.fstat(fid.fileno()).st_size
        # Not lmdb.verify.verify: it looks only at the first page of a large value, so that it finds
        # nothing wrong with a file that was cut in the middle of one, where LMDB gets a SIGBUS.
        # pylint: disable-next=protected-access
        verifier = lmdb.verify._Verifier(fid, size)  # type: ignore[no-untyped-call]
        try:
            findings = verifier.verify()  # type: ignore[no-untyped-call]
        except lmdb.verify.VerifyError as error:
            findings = [str(error)]
        else:
            lost = sum(verifier.live[size // verifier.psize:])
            if lost:
                findings.append(f"{lost} pages in use are beyond the end of the file")
    if findings:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected the store {path} to be sound, but got {len(findings)} finding(s): "
            f"{'; '.join(findings[:3])}")


def _check_first_meta(path: str, size: int, head: bytes) -> int:
    """
    Check the first meta page.

    :param path: of the data file
    :param size: of the data file, in bytes
    :param head: first bytes of the file
    :return: size of a page in bytes
    """
    if len(head) < _PAGE_HEADER_BYTES + _META.size:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected {path} to have at least two pages, but got: {size} bytes. It was truncated.")
    fields = _META.unpack_from(head, _PAGE_HEADER_BYTES)
    if fields[0] != _MDB_MAGIC:
        if not any(head):
            raise persipubsub.errors.StoreCorruptError(
                f"Expected {path} to begin with a meta page, but got: only zeros")
        raise persipubsub.errors.FormatError(
            f"Expected {path} to be a data file of LMDB (magic {_MDB_MAGIC:#x}), but got: "
            f"{fields[0]:#x}")
    if fields[1] != _MDB_DATA_VERSION:
        raise persipubsub.errors.FormatError(
            f"Expected {path} to be of LMDB's data version {_MDB_DATA_VERSION}, but got: "
            f"{fields[1]}")
    page_size = int.from_bytes(fields[4][:4], "little" if struct.pack("=H", 1)[0] else "big")
    if page_size < 256 or page_size > 65536 or page_size & (page_size - 1):
        raise persipubsub.errors.StoreCorruptError(
            f"Expected the page size of {path} to be a power of two, but got: {page_size}")
    if size < 2 * page_size:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected {path} to have at least two pages of {page_size} bytes, but got: {size} "
            f"bytes. It was truncated.")
    return page_size


def _parse_meta(path: str, head: bytes) -> "tuple[int, int]":
    """
    Parse a meta page.

    :param path: of the data file
    :param head: first bytes of the page
    :return: number of the transaction, last page in use
    """
    if len(head) < _PAGE_HEADER_BYTES + _META.size:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected {path} to have two meta pages, but got: a truncated file")
    fields = _META.unpack_from(head, _PAGE_HEADER_BYTES)
    if fields[0] != _MDB_MAGIC or fields[1] != _MDB_DATA_VERSION:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected both meta pages of {path} to be valid, but got: the magic "
            f"{fields[0]:#x}, version {fields[1]}")
    return fields[7], fields[6]


def keep_reserve(directory: str) -> bool:
    """
    Keep some room on the disk aside, if there is that much.

    :param directory: of the store
    :return: True if it is kept now
    """
    path = os.path.join(directory, RESERVE)
    try:
        # One that is too short: whoever made it was killed, or the power failed, in the middle.
        if os.path.lexists(path) and os.lstat(path).st_size < _RESERVE_BYTES:
            os.unlink(path)
        descriptor = open_to_write(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except OSError:
        # It is there already, or the directory may not be written to.
        return os.path.lexists(path)
    try:
        os.posix_fallocate(descriptor, 0, _RESERVE_BYTES)
        return True
    except OSError:
        os.unlink(path)
        return False
    finally:
        os.close(descriptor)


def spend_reserve(directory: str) -> bool:
    """
    Give the room that was kept aside back to the disk.

    :param directory: of the store
    :return: True if there was some
    """
    try:
        os.unlink(os.path.join(directory, RESERVE))
    except OSError:
        return False
    return True
