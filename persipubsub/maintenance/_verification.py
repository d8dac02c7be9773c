"""
Look closely at a store: at all its pages, then at all its records and messages.

The pages are walked through without LMDB's engine, which trusts its file and would be killed by a
damaged one.
"""

import io
import os
import stat
import struct
from collections.abc import Sequence
from typing import Final

import lmdb
import lmdb.verify

import persipubsub.errors
from persipubsub._progress import Progress
from persipubsub.environment import _environment, _files, _opening, _standard_streams
from persipubsub.store import _check, _databases
from persipubsub.store._databases import Databases

#: Where a meta page has the number of its transaction, and the size of a page.
_TRANSACTION_OFFSET: Final = 144
_PAGE_SIZE_OFFSET: Final = 40

_TRANSACTION: Final = struct.Struct("=Q")
_PAGE_SIZE: Final = struct.Struct("=I")

#: Two pages of any size.
_HEAD_BYTES: Final = 1 << 17

#: Named databases of a store, and some room for those of later versions.
MAX_DBS: Final = 16


class _Pages(io.RawIOBase):
    """Read the pages of a store; those of the beginning as they were when it was opened."""

    def __init__(self, descriptor: int, progress: Progress) -> None:
        """
        Read the beginning.

        :param descriptor: of the data file
        :param progress: counts the bytes that are read
        """
        super().__init__()
        self._descriptor = descriptor
        self._progress = progress
        self._position = 0
        self._head = bytearray(os.pread(descriptor, _HEAD_BYTES, 0))
        self._page_bytes = 0
        if len(self._head) >= _PAGE_SIZE_OFFSET + _PAGE_SIZE.size:
            self._page_bytes, = _PAGE_SIZE.unpack_from(self._head, _PAGE_SIZE_OFFSET)
        del self._head[2 * self._page_bytes:]
        self.size = os.fstat(descriptor).st_size
        progress.begin("bytes", total=self.size)

    def pin(self, transaction: int) -> bool:
        """
        Let the store look as at a transaction at which a reader stands.

        Others go on writing; as long as the reader stands there, its pages are not used again. Only
        the meta pages are, in turn.

        :param transaction: number of the transaction
        :return: False if its meta page was overwritten already
        """
        is_there = False
        for offset in (_TRANSACTION_OFFSET, self._page_bytes + _TRANSACTION_OFFSET):
            found, = _TRANSACTION.unpack_from(self._head, offset)
            is_there = is_there or found == transaction
            if found > transaction:
                # A commit later, in the other page: make it the one before.
                _TRANSACTION.pack_into(self._head, offset, transaction - 1)
        return is_there

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """
        Go to a place.

        :param offset: from the beginning of the file
        :param whence: from where to count; only from the beginning
        :return: the offset
        """
        assert whence == os.SEEK_SET, "The verifier counts from the beginning only."
        self._position = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        """
        Read from the place.

        :param size: how many bytes
        :return: bytes
        """
        begin = self._position
        self._position += size
        self._progress.done += size
        if begin + size <= len(self._head):
            return bytes(self._head[begin:begin + size])
        return os.pread(self._descriptor, size, begin)

    def verify(self) -> list[str]:
        """
        Walk through all pages in use.

        :return: what is wrong; nothing if the pages are sound
        """
        # Not lmdb.verify.verify: it looks only at the first page of a large value, so that it finds
        # nothing wrong with a file that was cut in the middle of one.
        # pylint: disable-next=protected-access
        verifier = lmdb.verify._Verifier(self, self.size)  # type: ignore[no-untyped-call]
        try:
            findings = list(verifier.verify())  # type: ignore[no-untyped-call]
        except lmdb.verify.VerifyError as error:
            return [str(error)]
        lost = sum(verifier.live[self.size // verifier.psize:])
        if lost:
            findings.append(f"{lost} pages in use are beyond the end of the file")
        return findings


def verify_open(environment: _environment.Environment, progress: Progress) -> list[str]:
    """
    Verify a store that is in use: all its pages, records and messages, in one snapshot.

    It holds up no other process. The other threads of this one wait to read; the store may grow
    meanwhile, since old pages are not used again.

    :param environment: of the store
    :param progress: to be counted up
    :return: what is wrong; nothing if the store is sound
    """
    path = os.path.join(environment.directory, _files.DATA)

    def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> list[str] | None:
        with _files.translated(path=path, doing="read"), open(path, "rb", buffering=0) as file:
            pages = _Pages(file.fileno(), progress)
            if not pages.pin(txn.id()):
                return None
            findings = pages.verify()
        # A walk with the engine over pages that are not sound could end the process.
        return findings or _check.check(txn, databases, progress)

    while True:
        findings = environment.read(work)
        if findings is not None:
            return findings


def verify_pages(environment: lmdb.Environment, path: str, progress: Progress) -> None:
    """
    Verify the pages of a store before the engine walks over all of them, as a compact copy does.

    On pages that are not sound, that walk could end the process. To copy all pages as they are, and
    to verify and compact the copy, was rejected: it needs as much room again, free pages included.

    :param environment: of the store; others may go on writing to it
    :param path: of its data file
    :param progress: to be counted up
    :raise StoreCorruptError: if they are damaged
    """
    is_there = False
    while not is_there:
        # Its own: nobody who reads waits for it.
        with environment.begin() as txn, _files.translated(path=path,
                                                           doing="read"), open(path,
                                                                               "rb",
                                                                               buffering=0) as file:
            pages = _Pages(file.fileno(), progress)
            is_there = pages.pin(txn.id())
            findings = pages.verify() if is_there else []
    _fail_if_any(findings, path)


def _fail_if_any(findings: Sequence[str], path: str) -> None:
    """
    Tell what is wrong with a data file.

    :param findings: what is wrong
    :param path: of the file
    :raise StoreCorruptError: if anything is
    """
    if findings:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected {path} to be sound, but got {len(findings)} finding(s): "
            f"{'; '.join(findings[:3])}")


def verify_copy(path: str, progress: Progress, origin: str) -> None:
    """
    Verify a copy of a store that nobody writes to.

    :param path: of the copy
    :param progress: to be counted up
    :param origin: path of what was copied, named in errors, for the copy is not going to stay
    :raise FormatError: if it is not the data file of a queue of this format
    :raise StoreCorruptError: if anything is wrong with it
    """
    try:
        _verify_copy(path, progress)
    except persipubsub.errors.StoreError as error:
        raise type(error)(str(error).replace(path, origin)) from error


def _verify_copy(path: str, progress: Progress) -> None:
    """
    Verify a copy of a store that nobody writes to.

    :param path: of the copy
    :param progress: to be counted up
    """
    check_regular(path)
    if _files.missing_bytes(path) > 0:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected {path} to be whole, but got: a truncated file")
    with _files.translated(path=path, doing="read"), open(path, "rb", buffering=0) as file:
        findings = _Pages(file.fileno(), progress).verify()
    if not findings:
        try:
            with open_file(path, is_readonly=True) as environment:
                databases = databases_of(environment)
                with environment.begin(buffers=True) as txn:
                    findings = _check.check(txn, databases, progress)
        except (lmdb.NotFoundError, lmdb.IncompatibleError, lmdb.DbsFullError):
            raise persipubsub.errors.FormatError(
                f"Expected {path} to be the data file of a queue, but got: one of another program"
            ) from None
        except lmdb.Error as error:
            raise _opening.translate(error, path) from error
    _fail_if_any(findings, path)


def check_regular(path: str) -> None:
    """
    Check that a file can be read without waiting for somebody who writes it.

    :param path: of the file
    :raise FormatError: if it is a directory, a FIFO or the like
    :raise StoreError: if it is not there
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise persipubsub.errors.StoreError(
            f"Expected a data file at {path}, but got: no such file") from None
    except OSError as error:
        raise _files.translate_os_error(error=error, path=path, doing="look at") from error
    if not stat.S_ISREG(mode):
        raise persipubsub.errors.FormatError(
            f"Expected {path} to be a regular file, but got: {stat.filemode(mode)}")


def open_file(path: str, is_readonly: bool, map_size: int = 0) -> lmdb.Environment:
    """
    Open a data file that stands for itself and belongs to nobody else.

    :param path: of the file
    :param is_readonly: True to leave it as it is
    :param map_size: largest size of the file in bytes; at least as large as it is
    :return: environment without locks, to be closed by the caller before the process may fork
    """

    def open_files() -> lmdb.Environment:
        return lmdb.open(os.fsencode(path),
                         subdir=False,
                         map_size=map_size or 1 << 20,
                         max_dbs=MAX_DBS,
                         readonly=is_readonly,
                         lock=False,
                         create=False,
                         readahead=False,
                         lib_version=0)

    return _standard_streams.open_elsewhere(open_files)


def databases_of(environment: lmdb.Environment) -> Databases:
    """
    Open the sub-databases of a store.

    :param environment: of the store
    :return: handles
    """
    return Databases(*(environment.open_db(name, create=False) for name in _databases.NAMES))
