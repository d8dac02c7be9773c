"""
Keep a copy of an ``os`` store that a power failure can not harm.

Commits of such a store are not flushed, so that a power failure may leave any mixture of old and
new pages behind. Flushing from time to time does not help: the pages of the flushed state are used
again before the next flush. A checkpoint does: a compact copy of a snapshot, written beside the
store, flushed, renamed over the one before, the directory flushed. At the first open after such a
failure the last checkpoint takes the store's place, if the mark of the store says that there were
any: whoever is to write none says so there, and removes that of earlier times.

One process at a time writes checkpoints, for all of them: whoever holds the lock on the
checkpoint's lock file. That file also says up to which of LMDB's transactions the checkpoint
goes.
"""

import fcntl
import os
import threading
import time
from collections.abc import Callable
from typing import Final

import lmdb

import persipubsub.errors
from persipubsub.environment import _files

#: The next checkpoint begins only after this many times the duration of the last one.
_REST_FACTOR: Final = 10

#: A checkpoint that failed (a full disk, say) is tried again after this time, in seconds.
_RETRY_SECS: Final = 1.0


def _read_covered(descriptor: int) -> int:
    """
    Read up to which transaction the checkpoint goes.

    :param descriptor: of the lock file
    :return: id of the transaction; 0 if unknown
    """
    content = os.pread(descriptor, 8, 0)
    return int.from_bytes(content, "little") if len(content) == 8 else 0


def is_there(directory: str) -> bool:
    """
    Tell whether a store has a checkpoint.

    :param directory: of the store
    :return: True if so
    """
    return os.path.lexists(os.path.join(directory, _files.CHECKPOINT))


def remove(directory: str) -> None:
    """
    Remove the checkpoint of a store, if there is one, so that it never takes the store's place.

    :param directory: of the store; nobody is writing one
    """
    path = os.path.join(directory, _files.CHECKPOINT)
    with _files.translated(path=directory, doing="write to"):
        # One that was not finished: it has messages in it, too, and takes room. Before the other
        # one, by which it is seen that something is to be removed.
        for name in (f"{path}.new", path):
            _files.remove_durably(name)


def covered_transaction(directory: str) -> int:
    """
    Read up to which transaction the checkpoint of a store goes.

    :param directory: of the store
    :return: id of the transaction; 0 if there is no checkpoint
    """
    if not is_there(directory):
        return 0
    descriptor = _files.open_own_file(os.path.join(directory, _files.CHECKPOINT_LOCK))
    try:
        return _read_covered(descriptor)
    finally:
        os.close(descriptor)


def write(directory: str, environment: lmdb.Environment) -> bool:
    """
    Write a checkpoint, unless there is nothing new or another process is writing one.

    It holds up nobody; pages that are freed meanwhile are not used again before it ends.

    :param directory: of the store
    :param environment: of the store
    :return: False if another process is writing one
    :raise DiskFullError: if there is no room; the checkpoint before stays
    """
    lock = os.path.join(directory, _files.CHECKPOINT_LOCK)
    descriptor = _files.open_own_file(lock)
    try:
        with _files.translated(path=lock, doing="lock and read"):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            before = _read_covered(descriptor)
        path = os.path.join(directory, _files.CHECKPOINT)
        # Copiers and readers that were killed keep their slots, and with them old pages. Before all
        # else: with no slot left, nothing could be read.
        environment.reader_check()
        # Read first: the snapshot can only be newer than what is said of it.
        covered = _last_transaction(environment)
        if is_there(directory) and before == covered:
            return True
        with _files.translated(path=path, doing="write"):
            # A power failure between the two leaves a larger number out, never a wrong one.
            os.pwrite(descriptor, bytes(8), 0)
            _copy(environment, path)
            os.pwrite(descriptor, covered.to_bytes(8, "little"), 0)
        return True
    finally:
        os.close(descriptor)


def _last_transaction(environment: lmdb.Environment) -> int:
    """
    Read which transaction was the last one.

    Not from info(): that tells of a commit a moment before it can be seen. A function of its own,
    since the object keeps its slot in the table of readers as long as it is there: with a single
    slot, the copy would find none.

    :param environment: of the store
    :return: id of the transaction
    """
    with environment.begin() as txn:
        return txn.id()


def _copy(environment: lmdb.Environment, path: str) -> None:
    """
    Copy a snapshot, durably.

    :param environment: of the store
    :param path: of the checkpoint
    """
    temporary = f"{path}.new"
    target = _files.open_to_write(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
    try:
        environment.copyfd(target, compact=True)
        os.fsync(target)
    except BaseException:
        # Give the room back: the disk may be full.
        os.ftruncate(target, 0)
        raise
    finally:
        os.close(target)
    os.rename(temporary, path)
    _files.flush_directory(os.path.dirname(path))


def restore(directory: str) -> None:
    """
    Let the checkpoint take the place of the store; hold the open gate, with no user but this one.

    The checkpoint itself stays until the next one: after a power failure in the middle of this, it
    is done again from the beginning.

    :param directory: of the store
    :raise StoreCorruptError: if there is no sound checkpoint
    """
    # Slow, and hardly ever needed.
    import logging  # pylint: disable=import-outside-toplevel

    path = os.path.join(directory, _files.CHECKPOINT)
    store = os.path.join(directory, _files.DATA)
    hint = ("The machine went down while the queue was in use, so that the store itself can not be "
            "trusted. Restore a backup of {}; or, to accept what is there, remove {} and look at "
            "it closely.".format(store, os.path.join(directory, _files.RUNNING)))
    if not is_there(directory):
        raise persipubsub.errors.StoreCorruptError(
            f"Expected the checkpoint {path}, but got: no such file. {hint}")
    try:
        if _files.missing_bytes(path):
            raise persipubsub.errors.StoreCorruptError(
                f"Expected the whole checkpoint {path}, but got: a truncated file")
        _files.verify_data_file(path)
    except (persipubsub.errors.StoreCorruptError, persipubsub.errors.FormatError) as error:
        raise persipubsub.errors.StoreCorruptError(f"{error} {hint}") from error

    age = time.time() - os.stat(path).st_mtime
    descriptor = _files.open_own_file(os.path.join(directory, _files.CHECKPOINT_LOCK))
    with _files.translated(path=store, doing="restore the checkpoint of"):
        try:
            # Numbers of transactions begin anew; flushed, as an old one may come up once more.
            os.pwrite(descriptor, bytes(8), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary = f"{store}.new"
        _files.copy_durably(path, temporary, os.stat(store).st_mode & 0o777)
        os.rename(temporary, store)
        _files.flush_directory(directory)
    logging.getLogger("persipubsub.checkpoint").warning(
        "The machine went down while the queue %s was in use. It goes on from its last checkpoint, "
        "which was written %.0f seconds ago; what was sent and acknowledged after it is lost.",
        directory, age)


class _Event(threading.Event):
    """Be an event that a signal handler may set while the code that it interrupted sets it."""

    def __init__(self) -> None:
        """Initialize as not set."""
        super().__init__()
        # That of the standard library is not re-entrant: the handler would hang.
        self._cond = threading.Condition(threading.RLock())


class Checkpointer:
    """
    Write checkpoints in the background as long as there is something new.

    The thread is started at the first change and sleeps, without looking, until the next one.
    """

    def __init__(self, seconds: float, attempt: Callable[[], bool]) -> None:
        """
        Initialize without a thread.

        :param seconds: time between two checkpoints
        :param attempt: writes a checkpoint; returns False if another process is writing one
        """
        # Slow, and not for those who only look. Not where something is to be said either: a process
        # that is out of files could not load it there.
        import logging  # pylint: disable=import-outside-toplevel
        self._logger = logging.getLogger("persipubsub.checkpoint")
        self._seconds = seconds
        self._attempt = attempt
        self._thread: threading.Thread | None = None
        # Guards the start of the thread; nothing is waited for while it is held. Re-entrant for a
        # signal handler that closes the queue.
        self._lock = threading.RLock()
        self._is_changed: threading.Event = _Event()
        self._is_stopped = _Event()

    def notice(self) -> None:
        """Say that something was committed; costs a few nanoseconds if that is known."""
        if not self._is_changed.is_set():
            self._is_changed.set()
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        """Start the thread."""
        with self._lock:
            if self._thread is None and not self._is_stopped.is_set():
                thread = threading.Thread(target=self._run,
                                          name="persipubsub-checkpoint",
                                          daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    # No memory or no number left for it, or the interpreter ends. The message is
                    # sent all the same; the next change tries again.
                    self._is_changed.clear()
                    self._logger.warning("No checkpoints can be written: %s", error)
                    return
                self._thread = thread

    def stop(self) -> None:
        """Let the thread end; wait for a checkpoint that is being written."""
        # Another thread may be about to start it: it can only be joined after that.
        with self._lock:
            self._is_stopped.set()
            thread = self._thread
        self._is_changed.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        """Write checkpoints until stopped."""
        due = 0.0
        while True:
            self._is_changed.wait()
            if self._is_stopped.wait(timeout=max(0.0, due - time.monotonic())):
                return
            self._is_changed.clear()
            if self._is_stopped.is_set():
                # Stopped since the line before the last one: nobody will set the other event again.
                return
            begin = time.monotonic()
            try:
                is_done = self._attempt()
            except persipubsub.errors.ClosedError:
                return
            except persipubsub.errors.PersipubsubError as error:
                self._logger.warning("No checkpoint could be written: %s", error)
                is_done = False
            except lmdb.Error as error:
                self._logger.warning("No checkpoint could be written: %s", error)
                is_done = False
            now = time.monotonic()
            due = max(begin + self._seconds, now + _REST_FACTOR * (now - begin))
            if not is_done:
                due = max(due, now + _RETRY_SECS)
                self._is_changed.set()
