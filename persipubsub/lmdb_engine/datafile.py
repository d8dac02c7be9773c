"""
LMDB's files: check them, open them, walk through their pages; LMDB's errors.

LMDB trusts its file: it kills the process with SIGBUS on a truncated one and takes an empty one for
new. The file is therefore checked here first.
"""

import contextlib
import errno
import io
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import lmdb

from persipubsub.errors import (AccessError, DiskFullError, FlushError, FormatError,
                                PersipubsubError, ReadersFullError, StoreCorruptError)
from persipubsub.lmdb_engine import files
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import lmdb_private
from persipubsub.lmdb_engine.format import Databases, Tx
from persipubsub.statistics import Progress

#: Sub-databases of a store, and some room for those of later versions. ``max_db_num`` is not used for
#: it: LMDB copies the handles at every transaction (1,024 slow a read transaction from 0.6 to 1.1
#: microseconds).
_MAX_DBS: Final = 16

#: LMDB's lock file: its header, which includes the first slot of the table of readers; and the size
#: of each further slot.
_LOCK_HEADER_BYTES: Final = 192
_READER_BYTES: Final = 64

#: Begins a transaction, which is committed at the end of the block.
Begin: TypeAlias = Callable[[], contextlib.AbstractContextManager[Tx]]

# Errors


class MapFullError(DiskFullError):
    """Report that the map, not the disk, is full; dropping may help, see ``room``."""


_FLUSH_HINT: Final = (
    ". Close all that this process has open of the queue and open it again; look at the disk.")

_FOREIGN_HINT: Final = " (perhaps an LMDB environment of another program)"

#: The first row that fits decides: classes of LMDB, error of this library, what is added to the text.
_TRANSLATIONS: Final[tuple[tuple[tuple[type[lmdb.Error], ...],
                                 type[PersipubsubError], str], ...]] = (
    ((lmdb.DiskError, ), DiskFullError, ""),
    ((lmdb.ReadersFullError, ), ReadersFullError, " (max_reader_num)"),
    ((lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.BadTxnError),
     StoreCorruptError, ""),
    ((lmdb.VersionMismatchError, lmdb.InvalidError), FormatError, ""),
    ((lmdb.NotFoundError, lmdb.IncompatibleError, lmdb.DbsFullError),
     FormatError, _FOREIGN_HINT),
    ((lmdb.PanicError, ), FlushError, _FLUSH_HINT),
    ((lmdb.ReadonlyError, ), AccessError, ""),
)  # yapf: disable


def translate(error: lmdb.Error, path: str, max_bytes: int = 0) -> PersipubsubError:
    """
    Choose the error of this library for an error of LMDB.

    :param max_bytes: ``max_db_size_bytes``, if it is known
    """
    if isinstance(error, lmdb.MapFullError):
        limit = f" of {max_bytes} bytes" if max_bytes else ""
        return MapFullError(
            f"Expected a free page in the queue {path}, but got: a full store{limit} "
            "(max_db_size_bytes). Raise max_db_size_bytes in the configuration and run "
            "persipubsub.control.initialize_all_dbs, or receive or clear messages, or remove "
            "subscribers.")
    # Without the advice of py-lmdb: "(Please use a larger Environment(map_size=) parameter)".
    found = str(error).partition(" (Please ")[0]
    text = f"Expected to work with the queue {path}, but got: {found}"
    for classes, kind, hint in _TRANSLATIONS:
        if isinstance(error, classes):
            return kind(text + hint)
    code = getattr(error, "code", 0)
    if code == errno.EIO:
        data = os.path.join(path, files.DATA) if os.path.isdir(path) else path
        # LMDB reports this code for a write that was cut short.
        return (DiskFullError(text + " (no room left)")
                if files.is_full(data) else FlushError(text + _FLUSH_HINT))
    if code == errno.EAGAIN:
        # LMDB locks a byte at the offset of the process id.
        text += (" (perhaps a process with the same process id has it open: containers that share "
                 "a queue have to share a namespace of process ids)")
    return files.kind_of(code)(text)


# Checking

_MAGIC: Final = 0xBEEFC0DE
_DATA_VERSION: Final = 1

#: A meta page: magic, version, size of a page, last page in use, number of its transaction.
_META = struct.Struct("=16xII16xI92xQQ")

#: The beginning of a file, with both meta pages: a page has at most 32 KiB.
_HEAD_BYTES: Final = 1 << 16


def check_metas(path: str) -> bool:
    """
    Check the meta pages of a data file as LMDB does it, and compare its size with them.

    :return: True if the file is shorter than they say. Then it was truncated, or its last pages
        were allocated and freed in one transaction, and never written.
    :raise StoreCorruptError: if they are damaged
    :raise FormatError: if it is a file of another program
    """
    with files.using(path, os.O_RDONLY) as descriptor, files.translated(path=path, doing="read"):
        _, last_page_end, _ = _read_metas(descriptor, path)
        # Read after the meta pages: the file may grow while we look, but never shrinks.
        return os.fstat(descriptor).st_size < last_page_end


def _read_metas(descriptor: int, path: str) -> tuple[bytes, int, int]:
    """Read the beginning of a data file: its bytes, where the last page ends, last transaction."""
    head = os.pread(descriptor, _HEAD_BYTES, 0)
    magic, version, page_bytes, *first = _META.unpack(head[:_META.size].ljust(_META.size, b"\0"))
    if any(head[:_META.size]) and (magic, version) != (_MAGIC, _DATA_VERSION):
        raise FormatError(f"Expected {path} to be a data file of LMDB (magic {_MAGIC:#x}, version "
                          f"{_DATA_VERSION}), but got: {magic:#x}, {version}")
    other = head[page_bytes:page_bytes + _META.size].ljust(_META.size, b"\0")
    magic, version, _, *second = _META.unpack(other)
    is_power = page_bytes >= 256 and page_bytes & (page_bytes - 1) == 0
    if not is_power or (magic, version) != (_MAGIC, _DATA_VERSION):
        raise StoreCorruptError(f"Expected {path} to begin with two meta pages of LMDB, but got: "
                                "others. Restore a backup with 'persipubsub restore'.")
    last_page, txn_id = max(first, second, key=lambda meta: meta[1])
    return head, (last_page + 1) * page_bytes, txn_id


class _Pages(io.FileIO):
    """A data file whose beginning stays as it was: other processes may commit meanwhile."""

    def __init__(self, descriptor: int, head: bytes, progress: Progress) -> None:
        """Initialize with the beginning."""
        super().__init__(descriptor, closefd=False)
        self._head = head
        self._progress = progress

    def read(self, size: int | None = -1) -> bytes:
        """Read. The verifier seeks before each read, so this need not move the place."""
        assert size is not None, "The verifier says how much."
        self._progress.done += size
        begin = self.tell()
        if begin + size <= len(self._head):
            return self._head[begin:begin + size]
        return super().read(size)


def find_damage(path: str, progress: Progress, txn_id: int = 0) -> list[str] | None:
    """
    Walk through all pages in use, without LMDB's engine, which damage could crash.

    :param txn_id: of a reader's transaction, if others write meanwhile
    :return: what is wrong; None if another transaction was committed since the reader's
    """
    with files.using(path, os.O_RDONLY) as descriptor, files.translated(path=path, doing="read"):
        head, _, newest = _read_metas(descriptor, path)
        if txn_id and newest != txn_id:
            return None
        size = os.fstat(descriptor).st_size
        progress.begin("bytes", total=size)
        findings, lost = lmdb_private.find_damage(_Pages(descriptor, head, progress), size)
    return findings + ([f"{lost} pages in use are beyond the end of the file"] if lost else [])


def check_pages(path: str, progress: Progress | None = None) -> None:
    """
    Walk through all pages of a data file that no process writes to.

    :raise StoreCorruptError: if it is not sound
    """
    fail_if_any(find_damage(path, progress or Progress()), path)


def fail_if_any(findings: list[str] | None, path: str) -> None:
    """Raise what is wrong with a data file."""
    if findings:
        raise StoreCorruptError(f"Expected {path} to be sound, but got {len(findings)} finding(s): "
                                f"{'; '.join(findings[:3])}")


# Opening


@contextlib.contextmanager
def opened(path: str,
           size: int = 0,
           is_new: bool = False) -> Iterator[tuple[lmdb.Environment, Begin]]:
    """
    Open a data file without a lock file, which no other process uses.

    :param size: that it may grow to, in bytes; 0: it is only read. Changes are not flushed.
    :param is_new: True to create the sub-databases of a queue
    :return: LMDB's environment, and what begins a transaction
    """
    try:
        files.occupy_streams()
        with lmdb.open(
                os.fsencode(path),
                subdir=False,
                map_size=size or 1 << 20,
                max_dbs=_MAX_DBS,
                readonly=not size,
                # LMDB makes its lock file with holes, which is SIGBUS on a full disk.
                lock=False,
                create=False,
                sync=False,
                readahead=False,
                lib_version=0) as environment:
            if not is_new:
                # Check the header first: another version may have other sub-databases.
                meta = environment.open_db(fmt.META_DB, create=False)
                with environment.begin(db=meta) as txn:
                    fmt.unpack_header(txn.get(fmt.HEADER_KEY, b""), path)
            db = _open_databases(environment, is_new)

            @contextlib.contextmanager
            def begin() -> Iterator[Tx]:
                with environment.begin(write=bool(size), buffers=True) as txn:
                    yield Tx(txn, db)

            yield environment, begin
    except lmdb.Error as error:
        raise translate(error, path) from error


def _open_databases(environment: lmdb.Environment, is_new: bool = False) -> Databases:
    """Open all sub-databases."""
    return Databases(*(environment.open_db(name, create=is_new) for name in fmt.DATABASE_NAMES))


def open_shared(directory: str, size: int, max_readers: int,
                deadline: float) -> tuple[lmdb.Environment, Databases]:
    """Open a queue's data file together with others; wait if LMDB's table of readers is full."""
    files.occupy_streams()
    try:
        while True:  # until the deadline
            try:
                environment = lmdb.open(
                    os.fsencode(directory),
                    map_size=size,
                    max_readers=max_readers,
                    max_dbs=_MAX_DBS,
                    # A cached read transaction owns a slot of the table of readers, which a forked
                    # child would give back for its parent.
                    max_spare_txns=0,
                    sync=False,
                    metasync=False,
                    mode=files.FILE_MODE,
                    create=False,
                    readahead=False,
                    lib_version=0)
                break
            except lmdb.ReadersFullError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
        try:
            environment.reader_check()
            return environment, _open_databases(environment)
        except BaseException:
            environment.close()
            raise
    except lmdb.Error as error:
        raise translate(error, directory) from error


def reserve_lock_file(directory: str, max_readers: int, is_alone: Callable[[], bool]) -> None:
    """
    Make LMDB's lock file as large as LMDB would make it, but without holes: SIGBUS on a full disk.

    LMDB would follow a link in its place, and hang at a FIFO: both are refused here.

    :param is_alone: tells that no other process has the queue open
    """
    path = os.path.join(directory, files.LOCK)
    size = _LOCK_HEADER_BYTES + _READER_BYTES * (max_readers - 1)
    # This process does not have it open; else closing it would give back LMDB's locks.
    with files.using(path) as descriptor, files.translated(path=path, doing="reserve"):
        begin = os.fstat(descriptor).st_size
        if begin < size and is_alone():
            files.extend(descriptor, begin, size)
