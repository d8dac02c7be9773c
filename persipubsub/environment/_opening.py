"""
Open, create and close the files of a store.

Two processes never open, close or create the same store at the same time: they pass a gate for it,
which is another one than that of the writers.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import lmdb

import persipubsub.errors
from persipubsub.environment import _checkpoint, _files, _gate, _mark, _standard_streams
from persipubsub.store import _clock, _databases, _layout
from persipubsub.store._databases import Databases

#: Named databases of a store, and some room for those of later versions. ``max_db_num`` is not used
#: for it: LMDB copies the handles at every transaction (1,024 of them make a read transaction of
#: 0.6 microseconds one of 1.1).
_MAX_DBS: Final = 16

#: LMDB's lock file: the part in front of the second slot of the table of readers, and a slot.
_LOCK_HEADER_BYTES: Final = 192
_READER_BYTES: Final = 64


class Options(NamedTuple):
    """Say how a store is to be opened."""

    map_size: int  #: largest size of the store in bytes
    max_readers: int  #: slots in LMDB's table of readers
    keeps_os: bool  #: durability "os": commits are not flushed
    checkpoint_secs: float  #: time between checkpoints of an "os" store; 0: none
    busy_timeout_secs: float  #: how long a write waits for another process


class MapFullError(persipubsub.errors.DiskFullError):
    """Report that the map is full, as opposed to the disk: dropping messages makes room."""


class Handles(NamedTuple):
    """Hold what is open of a store."""

    environment: lmdb.Environment
    databases: Databases
    gate: _gate.Gate  #: that writers pass
    users: _gate.LockFile  #: holds a shared lock as long as the store is open
    was_interrupted: bool  #: the machine went down while the store, of ``os``, was in use
    was_restored: bool  #: ... and a checkpoint took its place
    map_size: int  #: that is mapped, in bytes


@contextlib.contextmanager
def open_gate(directory: str, options: Options) -> Iterator[None]:
    """
    Keep other processes from opening, closing or creating the store.

    :param directory: of the store
    :param options: with the time to wait
    """
    deadline = time.monotonic() + options.busy_timeout_secs
    while True:
        gate = _gate.Gate(os.path.join(directory, _files.OPEN_GATE))
        try:
            # The queue may be dropped while we wait: others pass another gate then.
            if gate.enter(deadline) and gate.is_there():
                yield
                return
            if time.monotonic() >= deadline:
                raise persipubsub.errors.BusyTimeoutError(
                    "Expected to open the queue {} within {} seconds (busy_timeout_secs), but got: "
                    "another process is in the middle of opening it".format(
                        directory, options.busy_timeout_secs))
        finally:
            # With no call before it: whatever interrupts the rest must not leave the gate shut for
            # as long as somebody keeps the exception, and with it this frame.
            try:
                fcntl.flock(gate.descriptor, fcntl.LOCK_UN)
            except OSError:
                pass  # where there are no locks; what that comes to was raised by entering
            gate.close()


def open_store(directory: str, options: Options) -> Handles:
    """
    Open the files of a store; to be called with the open gate held.

    :param directory: of the store
    :param options: how to open it
    :return: what is to be closed, LMDB's environment first
    :raise StoreCorruptError: if the store is damaged
    :raise FormatError: if it is another program's, or of another version
    """
    if not os.path.lexists(os.path.join(directory, _files.USERS)):
        # By that file it would be taken for a queue that may be dropped, or replaced by a backup.
        _files.verify_data_file(os.path.join(directory, _files.DATA))
        _check_is_ours(directory)
    gate = _gate.Gate(os.path.join(directory, _files.WRITE_GATE))
    users = _gate.LockFile(os.path.join(directory, _files.USERS))
    environment = None
    try:
        users.share()
        was_interrupted = _mark.was_interrupted(directory)
        was_restored = _check_files(directory, options, gate, users, was_interrupted)
        # py-lmdb opens databases in a write transaction, and waits for it with the interpreter's
        # lock held: without the gate, a process stopped in the middle of a commit would freeze us.
        # All of it with the gate: nobody writes more than is mapped meanwhile.
        if not gate.enter(deadline=time.monotonic() + options.busy_timeout_secs):
            raise _gate.busy_error(directory, options.busy_timeout_secs)
        try:
            environment = _open_environment(directory, options)
            databases = Databases(*(environment.open_db(name, create=False)
                                    for name in _databases.NAMES))
            environment.reader_check()
        except (lmdb.NotFoundError, lmdb.IncompatibleError, lmdb.DbsFullError):
            raise _foreign_error(directory) from None
        except lmdb.Error as error:
            raise translate(error=error, directory=directory) from error
        finally:
            fcntl.flock(gate.descriptor, fcntl.LOCK_UN)
        return Handles(environment, databases, gate, users, was_interrupted, was_restored,
                       environment.info()["map_size"])
    except BaseException:
        # Not with contextlib.ExitStack: a KeyboardInterrupt behind its pop_all would leave LMDB's
        # environment open for as long as somebody keeps the exception.
        if environment is not None:
            environment.close()
        gate.close()
        users.close()
        raise


def check_alone(directory: str, handles: Handles) -> None:
    """
    Check that no other process has a store open. Hold the open gate, so that none comes.

    :param directory: of the store
    :param handles: of the store
    :raise QueueInUseError: if another process has it open
    """
    if not handles.users.is_alone():
        raise persipubsub.errors.QueueInUseError(
            f"Expected no other process to use the queue {directory}, but got: at least one has "
            f"it open")


def _check_files(directory: str, options: Options, gate: _gate.Gate, users: _gate.LockFile,
                 was_interrupted: bool) -> bool:
    """
    Look at the data file before LMDB does; after a power failure, restore the checkpoint.

    Whether there has to be one is told by the mark. The options were rejected: they may have been
    changed since. That there is one, too: it may be older than the mark, or be lost.

    :param directory: of the store
    :param options: with the time to wait
    :param gate: that writers pass
    :param users: holds a shared lock
    :param was_interrupted: True if the machine went down while the store was in use
    :return: True if the checkpoint took the place of the store
    """
    path = os.path.join(directory, _files.DATA)
    # Of who was killed while it compacted or restored the queue: none is made without the gate. It
    # may be as large as the queue.
    if os.path.lexists(f"{path}.new"):
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.new")
    settle(directory)
    is_restored = was_interrupted and _mark.is_checkpointed(directory)
    if is_restored:
        _checkpoint.restore(directory)
    elif _files.missing_bytes(path) > 0 or was_interrupted:
        # Nobody may write while the file is walked through.
        if not gate.enter(deadline=time.monotonic() + options.busy_timeout_secs):
            raise _gate.busy_error(directory, options.busy_timeout_secs)
        try:
            _files.verify_data_file(path)
        finally:
            fcntl.flock(gate.descriptor, fcntl.LOCK_UN)
    _reserve_lock_file(directory, options, users)
    return is_restored


def _reserve_lock_file(directory: str, options: Options, users: _gate.LockFile) -> None:
    """
    Make LMDB's lock file as large as LMDB would make it, but without holes.

    LMDB maps a sparse file: when the disk is full, the kernel kills with SIGBUS whoever opens the
    store first, or takes a slot in a page of the table of readers that nobody has used so far.

    One that is there may be too short: whoever made it was killed, or the power failed, in the
    middle, or the table had fewer slots then.

    :param directory: of the store
    :param options: with the number of slots
    :param users: tells whether others have the store open, who know the table as it is
    """
    path = os.path.join(directory, _files.LOCK)
    size = _LOCK_HEADER_BYTES + _READER_BYTES * (options.max_readers - 1)
    try:
        begin = os.lstat(path).st_size
    except OSError:
        begin = 0
    if begin >= size or not users.is_alone():
        return
    _check_is_ours(directory)
    descriptor = _files.open_own_file(path)
    try:
        with _files.translated(path=path, doing="reserve"):
            _files.extend(descriptor, begin, size)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)


def _open_environment(directory: str, options: Options) -> lmdb.Environment:
    """
    Open LMDB's environment; wait a little for a slot if its table of readers is full.

    :param directory: of the store
    :param options: how to open it
    :return: open environment
    """
    deadline = time.monotonic() + options.busy_timeout_secs

    def open_files() -> lmdb.Environment:
        return lmdb.open(
            os.fsencode(directory),
            map_size=options.map_size,
            max_readers=options.max_readers,
            max_dbs=_MAX_DBS,
            # A cached read transaction owns a slot of the reader table, which a forked child
            # would give back for its parent. It would save 0.07 microseconds.
            max_spare_txns=0,
            sync=not options.keeps_os,
            metasync=False,
            mode=_files.FILE_MODE,
            create=False,
            readahead=False,
            lib_version=0)

    while True:
        try:
            return _standard_streams.open_elsewhere(open_files)
        except lmdb.ReadersFullError as error:
            if time.monotonic() >= deadline:
                raise translate(error=error, directory=directory) from error
            time.sleep(0.01)
        except lmdb.Error as error:
            raise translate(error=error, directory=directory) from error


def _check_is_ours(directory: str) -> None:
    """
    Check the names of the sub-databases before LMDB makes its lock file beside the data file.

    :param directory: of the store, which nobody has open
    :raise FormatError: if it is another program's
    """
    try:
        with lmdb.open(os.fsencode(directory),
                       max_dbs=_MAX_DBS,
                       readonly=True,
                       lock=False,
                       create=False,
                       lib_version=0) as environment:
            environment.open_db(_layout.DATA_DB, create=False)
            meta = environment.open_db(_layout.META_DB, create=False)
            with environment.begin(db=meta) as txn:
                _layout.unpack_header(txn.get(_layout.HEADER_KEY, b""), directory)
    except (lmdb.NotFoundError, lmdb.IncompatibleError, lmdb.DbsFullError):
        raise _foreign_error(directory) from None
    except lmdb.Error as error:
        raise translate(error=error, directory=directory) from error


def _foreign_error(directory: str) -> persipubsub.errors.FormatError:
    """
    Describe a store of another program.

    :param directory: of the store
    :return: error to be raised
    """
    return persipubsub.errors.FormatError(
        f"Expected {directory} to be a queue of persipubsub, but got: an LMDB environment of "
        f"another program")


def flags_of(options: Options) -> int:
    """
    Choose the flags in the header of a store.

    :param options: how it is opened
    :return: flags
    """
    return _layout.FLAG_DURABILITY_OS if options.keeps_os else 0


_FLUSH_HINT: Final = (". Close all that this process has open of the queue and open it again; look "
                      "at the disk.")

_Translation = tuple[type[persipubsub.errors.PersipubsubError], str, tuple[type[lmdb.Error], ...],
                     tuple[int, ...]]

# The first class that fits decides: a row for LMDB's classes, one for error numbers of the system.
_TRANSLATIONS: tuple[_Translation, ...] = (
    (MapFullError, " (max_db_size_bytes)", (lmdb.MapFullError, ), ()),
    (persipubsub.errors.DiskFullError, "", (lmdb.DiskError, ), (errno.ENOSPC, errno.EDQUOT,
                                                                errno.EFBIG)),
    (persipubsub.errors.ReadersFullError, " (max_reader_num)", (lmdb.ReadersFullError, ), ()),
    (persipubsub.errors.StoreCorruptError, "", (lmdb.CorruptedError, lmdb.PageNotFoundError,
                                                lmdb.BadTxnError), ()),
    (persipubsub.errors.FormatError, "", (lmdb.VersionMismatchError, lmdb.InvalidError,
                                          lmdb.IncompatibleError), ()),
    (persipubsub.errors.FlushError, _FLUSH_HINT, (lmdb.PanicError, ), (errno.EIO, )),
    (persipubsub.errors.AccessError, "", (lmdb.ReadonlyError, ), (errno.EACCES, errno.EPERM,
                                                                  errno.EROFS)),
    (persipubsub.errors.NotInitializedError, "", (), (errno.ENOENT, errno.ENOTDIR)),
    # LMDB locks a byte at the offset of the process id.
    (persipubsub.errors.StoreError, " (perhaps a process with the same process id has it open: "
     "containers that share a queue have to share a namespace of process ids)", (), (errno.EAGAIN, )
     ),
)


def flush_error_text(error: lmdb.Error, directory: str) -> str:
    """
    Describe a flush that failed.

    :param error: that LMDB raised
    :param directory: of the store
    :return: text of the error to be raised instead
    """
    return f"Expected to flush the queue {directory}, but got: {error}{_FLUSH_HINT}"


def translate(error: lmdb.Error, directory: str) -> persipubsub.errors.PersipubsubError:
    """
    Choose the error of this library for an error of LMDB.

    :param error: that LMDB raised
    :param directory: of the store
    :return: error to be raised instead
    """
    text = f"Expected to work with the queue {directory}, but got: {error}"
    code = getattr(error, "code", 0)
    if code == errno.EIO and _files.is_full(directory):
        # What LMDB makes of a write that was cut short.
        return persipubsub.errors.DiskFullError(f"{text} (no room left)")
    for kind, hint, classes, codes in _TRANSLATIONS:
        if isinstance(error, classes) or code in codes:
            return kind(text + hint)
    return persipubsub.errors.StoreError(text)


def name_queue(error: persipubsub.errors.PersipubsubError, directory: str) -> None:
    """
    Complete the text of an error that a work on a store raised: it does not know which queue it is.

    :param error: that was raised
    :param directory: of the store
    """
    text = str(error)
    if directory not in text:
        error.args = (f"{text.removesuffix('.')}; queue {directory}", *error.args[1:])


def build(directory: str, options: Options) -> None:
    """
    Build an empty store; to be called with the open gate held.

    :param directory: of the store
    :param options: how to create it
    """
    aside = os.path.join(directory, _files.CREATING)
    _remove_aside(aside)
    os.mkdir(aside, mode=_files.DIRECTORY_MODE)
    header = _layout.Header(format=_layout.FORMAT,
                            flags=flags_of(options),
                            clock_offset_ns=time.time_ns() - _clock.ticks_ns(),
                            boot_id=_clock.boot_id(),
                            next_ordinal=0)

    def open_files() -> lmdb.Environment:
        return lmdb.open(os.fsencode(aside),
                         map_size=options.map_size,
                         max_dbs=_MAX_DBS,
                         mode=_files.FILE_MODE,
                         create=False,
                         lib_version=0)

    try:
        with _standard_streams.open_elsewhere(open_files) as environment:
            for database in _databases.NAMES:
                environment.open_db(database)
            meta = environment.open_db(_layout.META_DB)
            with environment.begin(write=True, db=meta) as txn:
                txn.put(_layout.HEADER_KEY, _layout.pack_header(header))
    except lmdb.Error as error:
        raise translate(error=error, directory=directory) from error
    # Of a queue whose data file was removed: it shall not come back in the place of this one.
    for name in (_files.RUNNING, _files.CHECKPOINT, _files.CHECKPOINT_LOCK):
        _files.remove_durably(os.path.join(directory, name))
    # Durable with the store: by its lack, whoever needs the queue for itself, such as restore,
    # tells the environment of another program.
    os.close(_files.open_own_file(os.path.join(directory, _files.USERS)))
    os.rename(os.path.join(aside, _files.DATA), os.path.join(directory, _files.DATA))
    settle(directory)


def _remove_aside(aside: str) -> None:
    """
    Remove the directory in which a store is built; what a link leads to is not ours to empty.

    :param aside: the directory
    """
    try:
        # First, as an administrator may have left it, whose directories others can not list.
        os.rmdir(aside)
    except OSError:
        if os.path.isdir(aside) and not os.path.islink(aside):
            for name in os.listdir(aside):
                os.unlink(os.path.join(aside, name))
            os.rmdir(aside)


def settle(directory: str) -> None:
    """
    Make the name of a data file durable that took its place; to be called with the open gate held.

    The directory ``creating`` is there from before that until after this. Whoever was killed in
    between leaves it: what is written next shall not get into a file that a power failure takes.

    :param directory: of the store
    """
    aside = os.path.join(directory, _files.CREATING)
    if os.path.lexists(aside):
        _files.flush_directory(directory)
        with contextlib.suppress(OSError):
            _remove_aside(aside)
