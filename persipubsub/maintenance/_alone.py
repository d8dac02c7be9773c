"""
Change the files of a queue as a whole: compact, restore, drop. Nobody else may use it meanwhile.

What takes the place of the store is made beside it, flushed and verified, and only then renamed
over it: whatever happens before, the store is as it was; whatever happens after, it is the new one.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import lmdb

import persipubsub.errors
from persipubsub._progress import Progress
from persipubsub._settings import Settings
from persipubsub.environment import _files, _gate, _mark, _opening, _registry
from persipubsub.maintenance import _verification
from persipubsub.store import _attempts, _clock, _databases, _header, _layout, _log
from persipubsub.store._databases import Databases

#: Room that a restored store needs beyond its own size for what is changed in it, in bytes; what is
#: changed of the records of attempts not included.
_ROOM_BYTES: Final = 1 << 24

#: Numbers are taken up again this far behind the last one that is known to have been used. Not as
#: far as behind a checkpoint: one from before may still take the store's place.
_SKIPPED_NUMBERS: Final = 3 << 31

#: Who only looks, as ``stat`` and scrapes of metrics do, has a queue open for some milliseconds. It
#: is waited for so long, in seconds, with so much time between two attempts.
_LOOK_SECS: Final = 0.5
_PAUSE_SECS: Final = 0.005


class Sizes(NamedTuple):
    """
    Hold the size of a store before and after it was compacted.

    >>> Sizes(before=4096, after=1024).before
    4096
    """

    before: int  #: in bytes
    after: int  #: in bytes


@contextlib.contextmanager
def alone(directory: str, options: _opening.Options) -> Iterator[None]:
    """
    Have a queue for oneself: nobody has it open, and nobody can open it until the block is left.

    :param directory: of the queue
    :param options: with the time to wait for somebody who is just opening or closing it
    :raise QueueInUseError:
        if anybody has it open, this process included, for longer than a look takes
    """
    is_store = os.path.lexists(os.path.join(directory, _files.DATA))
    path = os.path.join(directory, _files.USERS)
    if is_store and not os.path.lexists(path):
        raise persipubsub.errors.FormatError(
            "Expected the queue {} to have the file {}, but got: none. It may be an LMDB "
            "environment of another program.".format(directory, _files.USERS))
    deadline = time.monotonic() + _LOOK_SECS
    while True:
        # No fork either, while an environment is open that is not in the registry.
        with _registry.still(), _opening.open_gate(directory, options):
            users = _gate.LockFile(path)
            try:
                if _lock(users):
                    yield
                    return
                found = _describe_users(users)
            finally:
                users.close()
        if time.monotonic() >= deadline:
            raise persipubsub.errors.QueueInUseError(
                f"Expected no process to use the queue {directory}, but got: it is open in {found}")
        # Without the gate: who only looks needs it to close the queue.
        time.sleep(_PAUSE_SECS)


def _lock(users: _gate.LockFile) -> bool:
    """
    Keep all others from having a queue open.

    :param users: on which they hold locks
    :return: False if somebody has it open
    """
    with _files.translated(path=users.path, doing="lock"):
        try:
            fcntl.flock(users.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _describe_users(users: _gate.LockFile) -> str:
    """
    Name the processes that have a queue open, as far as the system tells.

    :param users: on which they hold locks
    :return: for a message
    """
    with _files.translated(path=users.path, doing="look at"):
        inode = f":{os.fstat(users.descriptor).st_ino}"
    processes = set()
    with contextlib.suppress(OSError, ValueError), open("/proc/locks", encoding="ascii") as file:
        for line in file:
            # 1: FLOCK  ADVISORY  READ  1234 08:01:5678 0 EOF
            fields = line.split()
            if len(fields) == 8 and fields[1] == "FLOCK" and fields[5].endswith(inode):
                processes.add(int(fields[4]))
    # In another PID namespace, the system does not tell.
    known = sorted(process for process in processes if process > 0)
    if not known:
        return "another process"
    more = ", ..." if len(known) > 5 else ""
    return f"process {', '.join(map(str, known[:5]))}{more}"


def compact(settings: Settings, progress: Progress) -> Sizes:
    """
    Give the room back that a store does not need any more.

    Whatever happens on the way, the store is either as it was or compacted, durably. It needs room
    for the copy.

    :param settings: of the queue
    :param progress: to be counted up
    :return: sizes of the store
    :raise QueueInUseError: if anybody has the queue open
    """
    directory, options = settings.path, settings.options()
    # Whatever a crash left is mended, or refused, by opening it.
    _registry.release(_registry.acquire(directory, options))
    store = os.path.join(directory, _files.DATA)
    with alone(directory, options), _files.translated(path=directory, doing="compact"):
        before = os.stat(store).st_size
        with _beside(store) as path:
            try:
                with _verification.open_file(store, is_readonly=True) as environment:
                    _verification.verify_pages(environment, store, progress)
                    _copy_compact(environment, path)
            except lmdb.Error as error:
                raise _opening.translate(error, directory) from error
            _verification.verify_copy(path, progress, origin=store)
            after = os.stat(path).st_size
            _take_place(directory, path)
    return Sizes(before=before, after=after)


def _copy_compact(environment: lmdb.Environment, path: str) -> None:
    """
    Copy a store durably, without its free pages.

    :param environment: of the store
    :param path: of the copy, an empty file
    """
    descriptor = _files.open_to_write(path, os.O_WRONLY)
    try:
        environment.copyfd(descriptor, compact=True)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _beside(store: str) -> Iterator[str]:
    """
    Make a file that is to take the place of a store; removed if it did not.

    :param store: its data file; need not be there
    :return: path of the empty file, with owner and rights of the store
    """
    path = f"{store}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    os.close(_files.open_to_write(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        model = os.stat(store if os.path.exists(store) else os.path.dirname(store))
        if os.path.exists(store):
            os.chmod(path, model.st_mode & 0o777)
        if os.geteuid() == 0:
            # An administrator must not lock the owner of the queue out.
            os.chown(path, model.st_uid, model.st_gid)
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _take_place(directory: str, path: str) -> None:
    """
    Let a flushed file take the place of the store, durably.

    The order matters, for a power failure may come between any two steps. Until the mark is gone,
    the old checkpoint counts, and all is as before; the mark of a store in use must not be gone
    earlier, since the store itself can not be trusted without it.

    :param directory: of the queue
    :param path: of the file
    """
    checkpoint = os.path.join(directory, _files.CHECKPOINT)
    if os.path.lexists(checkpoint):
        # Numbers of transactions begin anew: none of them may seem to be in the checkpoint.
        descriptor = _files.open_own_file(os.path.join(directory, _files.CHECKPOINT_LOCK))
        try:
            os.pwrite(descriptor, bytes(8), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    with contextlib.suppress(FileExistsError):
        os.mkdir(os.path.join(directory, _files.CREATING), mode=_files.DIRECTORY_MODE)
    os.rename(path, os.path.join(directory, _files.DATA))
    _opening.settle(directory)
    _mark.mark_clean(directory)
    _files.remove_durably(checkpoint)


class _Known(NamedTuple):
    """Hold what was used up in the life of a queue."""

    next_number: int
    generation: int
    next_ordinal: int


def _read_known(directory: str) -> _Known | None:
    """
    Read what was used up by the store that is there, as far as it can be trusted.

    :param directory: of the queue
    :return: what neither the store nor its checkpoint has used; None if neither can be read
    :raise FormatError: if the store is another program's
    """
    found: list[_Known] = []
    for name in (_files.DATA, _files.CHECKPOINT):
        path = os.path.join(directory, name)
        if not os.path.lexists(path):
            continue
        try:
            # Without it, a damaged store could end the process.
            _files.missing_bytes(path)
            _files.verify_data_file(path)
        except persipubsub.errors.StoreCorruptError:
            continue
        try:
            with _verification.open_file(path, is_readonly=True) as environment:
                databases = _verification.databases_of(environment)
                with environment.begin(buffers=True) as txn:
                    header = _header.read(txn, databases, directory)
                    tail = _log.read_tail(txn.cursor(db=databases.data))
            found.append(_Known(tail.next_number, tail.generation, header.next_ordinal))
        except persipubsub.errors.StoreCorruptError:
            continue
        except lmdb.Error:
            raise persipubsub.errors.FormatError(
                f"Expected {path} to be the store of a queue, but got: an LMDB environment of "
                f"another program") from None
    return _Known(*map(max, zip(*found))) if found else None


def restore(settings: Settings, source: str, progress: Progress) -> None:
    """
    Let a backup take the place of a queue's store; the queue need not be there.

    The backup is copied and the copy verified before anything else happens. Numbers go on behind
    all that are known to be used. Whatever happens on the way, the store is either as it was or
    the restored one, durably.

    :param settings: of the queue
    :param source: path of the backup
    :param progress: to be counted up
    :raise QueueInUseError: if anybody has the queue open
    :raise StoreCorruptError: if the backup is damaged
    :raise FormatError: if it is not the backup of a queue, or the directory holds something else
    """
    directory, options = settings.path, settings.options()
    _verification.check_regular(source)
    with _files.translated(path=directory, doing="create"):
        _files.make_directories(directory)
        foreign = _files.foreign_names(directory)
    store = os.path.join(directory, _files.DATA)
    if foreign and not os.path.lexists(store):
        raise persipubsub.errors.FormatError(
            f"Expected the directory {directory} to be a queue or to be empty, but got: "
            f"{', '.join(foreign[:3])}")
    with alone(directory, options), _files.translated(path=directory, doing="restore"):
        with _beside(store) as path:
            with _files.translated(path=source, doing="copy"):
                _files.copy_durably(source, path, os.stat(path).st_mode & 0o777)
            _verification.verify_copy(path, progress, origin=source)
            known = _read_known(directory)
            try:
                with _verification.open_file(path,
                                             is_readonly=False,
                                             map_size=os.stat(path).st_size +
                                             _ROOM_BYTES) as environment:
                    databases = _verification.databases_of(environment)
                    with environment.begin() as txn:
                        changed = _databases.count_bytes(txn, databases.attempts)
                    environment.set_mapsize(os.stat(path).st_size + _ROOM_BYTES + changed)
                    with environment.begin(write=True, buffers=True) as txn:
                        _go_on_behind(txn, databases, _opening.flags_of(options), known)
                    environment.sync(True)
            except lmdb.Error as error:
                raise _opening.translate(error, directory) from error
            _take_place(directory, path)


def _go_on_behind(txn: "lmdb.Transaction[memoryview]", databases: Databases, flags: int,
                  known: _Known | None) -> None:
    """
    Take care that nothing of the store that was there is used again.

    :param txn: write transaction on the restored store
    :param databases: handles
    :param flags: of the store
    :param known: what the store that was there used up; None if it is not known
    """
    header = _header.update(txn, databases, flags, False)
    cursor = txn.cursor(db=databases.data)
    tail = _log.read_tail(cursor)
    known = known or _Known(0, 0, 0)
    number = max(tail.next_number, known.next_number) + _SKIPPED_NUMBERS
    generation = (max(tail.generation, known.generation) + 1) & 0xffffffff
    _log.put_placeholder(cursor, tail._replace(next_number=number, generation=generation))
    header = header._replace(next_ordinal=max(header.next_ordinal, known.next_ordinal))
    txn.put(_layout.HEADER_KEY, _layout.pack_header(header), db=databases.meta)
    # A letter that left the queue of dead letters since the backup may be needed again: it is to be
    # another one, as the ids of those that were there are remembered.
    _attempts.begin_anew(txn, databases, _clock.ticks_ns() + header.clock_offset_ns)


def drop(settings: Settings) -> list[str]:
    """
    Remove a queue with all its messages; files that are not of this library stay.

    When it is killed, or a power failure interrupts it, repeat it.

    :param settings: of the queue
    :return: names of what else is in the directory; nothing: it was removed, too
    :raise NotInitializedError: if there is no queue
    :raise QueueInUseError: if anybody has the queue open
    """
    directory = settings.path
    if not os.path.lexists(os.path.join(directory, _files.USERS)) and not _is_remnant(directory):
        _files.identify_store(directory)
    with alone(directory, settings.options()), _files.translated(path=directory, doing="remove"):
        foreign = _files.foreign_names(directory)
        # A checkpoint that is left must not take the place of a new store one day; the mark must
        # not be gone before the store, which can not be trusted without it.
        _files.remove_durably(os.path.join(directory, _files.CHECKPOINT))
        _files.remove_durably(os.path.join(directory, _files.DATA))
        aside = os.path.join(directory, _files.CREATING)
        if os.path.isdir(aside) and not os.path.islink(aside):
            shutil.rmtree(aside)
        # The gate and what tells that it is used last: somebody may be waiting there.
        names = set(os.listdir(directory)) - set(foreign) - {_files.OPEN_GATE, _files.USERS}
        for name in sorted(names) + [_files.USERS, _files.OPEN_GATE]:
            if name in _files.OWN or name.endswith(".new"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, name))
        _files.flush_directory(directory)
    try:
        os.rmdir(directory)
    except OSError:
        return foreign
    with contextlib.suppress(OSError):
        _files.flush_directory(os.path.dirname(directory))
    return []


def _is_remnant(directory: str) -> bool:
    """
    Tell whether a directory is as who was killed at the end of removing a queue leaves it.

    :param directory: to look at
    :return: True if there is nothing in it but a gate
    """
    try:
        return set(os.listdir(directory)) <= {_files.OPEN_GATE}
    except OSError:
        return False
