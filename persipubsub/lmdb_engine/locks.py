"""
Locks between processes: the write lock, the open lock, users of a queue. Claims are in ``claims``.

Locks are taken in this order; a thread that holds a later one does not ask for an earlier one:

1. the registry's lock of a process (opening, closing), see ``environment``,
2. the open lock of a queue (between processes, while one of them opens, closes or creates it),
3. the ending lock: that of ``claims.Claims``, one for each open queue (an acknowledgement and a
   close exclude each other),
4. the journal's lock: first between threads (the mutex of an ``ExclusiveLock``), then between
   processes (its file),
5. the write lock: 5a. between threads, then 5b. between processes,
6. the read lock of an environment (no transaction is open while it is closed or mapped anew).

Threads that wait for one that sends for them (``sending._Line``) hold none of these. The lock of a
line is held for a moment, and no other lock is taken meanwhile.

**The write lock.** LMDB has a lock of its own for writers, but a process that waits for it can be
reached neither by a signal nor by a timeout: a publisher that was stopped (SIGSTOP) in the middle of
a commit would hang all others. Each write transaction therefore takes this lock first, an exclusive
``flock`` that is tried and never waited for in the kernel. A process that only tries again and
again rarely gets it, as the holder takes it again within microseconds. So a waiting process sets a
word in the shared page, and a holder that finds the word set pauses for a moment after unlocking.

**Fork.** A lock of ``flock`` belongs to the open file description, which a forked child shares: as
long as the child has the descriptor open, the lock stays taken, even after the parent has closed its
own or was killed. Each ``LockFile`` is therefore listed in ``_LOCK_FILES`` before its file is opened
and until after it is closed, and a child closes all of them before it does anything else
(``forget_parent``). Rejected: a mutex that a fork takes. The thread that forks would wait for one
that opens a queue, which may wait for a lock that the fork has taken already, as that of ``logging``.

**Waiting.** No process waits in the kernel for a lock file. Each wait has a deadline, after
``busy_timeout_secs``. The deadline of a wait for the open lock moves on as long as the holder makes
a data file anew: a rebuild after a power failure may take long (``_Patience``).
"""

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Final

from persipubsub.errors import BusyTimeoutError, StoreError
from persipubsub.lmdb_engine import files
from persipubsub.lmdb_engine.files import SharedPage

_FIRST_PAUSE_SECS: Final = 0.00002
_LONGEST_PAUSE_SECS: Final = 0.001
_COURTESY_SECS: Final = 0.0001

#: A wait for the open lock looks so often whether its holder makes progress, in seconds.
_LOOK_SECS: Final = 0.1

_LOGGER = logging.getLogger("persipubsub.queue")

#: All lock files that are open, are being opened, or are being closed. Adding to a set and discarding
#: are atomic, so that a fork finds it whole. Rejected: weak references, whose set is not atomic.
_LOCK_FILES: Final[set["LockFile"]] = set()


class LockFile:
    """A file that is locked with ``flock``."""

    def __init__(self, path: str) -> None:
        """Open the file, and create it if it is missing."""
        self.path = path
        self.descriptor = -1
        # Before the file is open: a child that is forked before the next statement has ended shares
        # the open file, though it does not know its descriptor. See ``forget_parent``.
        _LOCK_FILES.add(self)
        try:
            self.descriptor = files.open_file(path)
        except BaseException:
            _LOCK_FILES.discard(self)
            raise

    def try_lock(self, kind: int = fcntl.LOCK_EX) -> bool:
        """Lock the file, unless another process has it."""
        try:
            fcntl.flock(self.descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno is None:
                raise  # by a signal handler, see files
            raise files.translate_os_error(error, self.path, "lock") from error
        return True

    def lock(self,
             deadline: float,
             page: SharedPage | None = None,
             kind: int = fcntl.LOCK_EX) -> bool:
        """Lock the file; return False at the deadline, on the monotonic clock."""
        pause = _FIRST_PAUSE_SECS
        while not self.try_lock(kind):  # until the deadline
            if time.monotonic() >= deadline:
                return False
            if page is not None:
                page.words[SharedPage.WAITS] = 1
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECS)
        return True

    def is_there(self) -> bool:
        """Tell whether the path still leads to this file."""
        with files.translated(path=self.path, doing="look at"):
            try:
                return os.path.samestat(os.lstat(self.path), os.fstat(self.descriptor))
            except FileNotFoundError:
                return False

    def close(self) -> None:
        """Close the file, if it is open, which gives back its lock."""
        # Unlocked first: if a signal handler raises behind the next statement, a descriptor leaks,
        # but no lock.
        if self.descriptor >= 0:
            with files.suppress(OSError):
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        # Last of all: a child that is forked before closes its copy.
        _LOCK_FILES.discard(self)


class UsersLock(LockFile):
    """The lock that each process shares that has a queue open. Hold the open lock to ask for it."""

    def __init__(self, directory: str, busy_timeout_secs: float) -> None:
        """Open the file."""
        super().__init__(os.path.join(directory, files.USERS))
        self._busy_timeout_secs = busy_timeout_secs

    def share(self) -> None:
        """
        Take a shared lock.

        :raise BusyTimeoutError: if another process has an exclusive one for too long
        """
        deadline = time.monotonic() + self._busy_timeout_secs
        if not self.lock(deadline, kind=fcntl.LOCK_SH):
            # This library takes an exclusive lock only with the open lock, which we have.
            raise BusyTimeoutError(
                f"Expected to share {self.path} within {self._busy_timeout_secs} seconds "
                "(busy_timeout_secs), but got: another process has it for itself"
                f"{_names(users_of(self))}. Let that process end.")

    def is_alone(self) -> bool:
        """Tell whether no other process has a shared lock; the caller keeps others from opening."""
        try:
            return self.try_lock()
        finally:
            # Even if it was not taken: the system may have given the shared one back meanwhile.
            self.share()


class ExclusiveLock(LockFile):
    """
    A lock that one thread of one process has: a lock of threads, and then one of processes.

    A signal handler may raise at any instruction of the main thread, also at the first one of
    ``release``. Therefore ``release`` may be called whatever a thread has of the lock, and has to be
    called again after an exception::

        lock.refuse_nesting()
        try:
            lock.acquire(timeout)
            ...
        finally:
            try:
                lock.release()
            except BaseException:
                lock.release()
                raise
    """

    def __init__(self, path: str, doing: str) -> None:
        """
        Open the file.

        :param doing: what is done with the lock, for texts of errors
        """
        super().__init__(path)
        self._doing = doing
        # Re-entrant, because such a lock knows its owner, which alone can release it.
        self.mutex = threading.RLock()
        self._owner = 0  # thread that has the mutex and perhaps the file's lock; 0: none

    def refuse_nesting(self) -> None:
        """Raise if a signal handler interrupted this thread while it has the lock."""
        if self._owner == threading.get_ident():
            raise StoreError(f"Expected to {self._doing} when this thread is not in the middle of "
                             "that, but got: a signal handler that interrupted it. Set a flag "
                             "there, and write later.")

    def acquire(self, timeout: float, page: SharedPage | None = None) -> None:
        """
        Take the lock.

        :param timeout: in seconds
        :param page: where waiting processes ask the holder to make way
        :raise BusyTimeoutError: if another thread or process has it for so long
        """
        if self.mutex.acquire(timeout=timeout):
            self._owner = threading.get_ident()
            # One attempt without a deadline spares the plain path the clock.
            if self.try_lock() or self.lock(time.monotonic() + timeout, page):
                return
        # Not released here, as the caller does it: a second release would take the mutex from a caller
        # that had it before.
        raise BusyTimeoutError(
            f"Expected to {self._doing} within {timeout} seconds (busy_timeout_secs), but got: "
            "another process is in the middle of a write. It may be stopped, or the disk may hang.")

    def release(self) -> None:
        """Release what this thread has of the lock."""
        if self._owner == threading.get_ident():
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            except OSError as error:
                # Where there are no locks, locking has raised already.
                if error.errno is None:
                    raise
            self._owner = 0
            self.mutex.release()
        else:
            # Perhaps the mutex alone: a signal handler has raised after it was taken, or before it
            # was released.
            release(self.mutex)

    @contextlib.contextmanager
    def held(self, timeout: float) -> Iterator[None]:
        """Have the lock in a block; see :py:meth:`acquire`."""
        self.refuse_nesting()
        try:
            self.acquire(timeout)
            yield
        finally:
            try:
                self.release()
            except BaseException:
                self.release()
                raise


def release(mutex: "threading.RLock") -> None:
    """Release a lock of threads if this thread has it."""
    with contextlib.suppress(RuntimeError):
        mutex.release()


def make_way(page: SharedPage) -> None:
    """Pause for 0.1 ms if another process waits for the write lock; to be called after unlocking."""
    if page.words[SharedPage.WAITS]:
        page.words[SharedPage.WAITS] = 0
        time.sleep(_COURTESY_SECS)


class _Patience:
    """
    The deadline of a wait for the open lock.

    It moves on as long as the holder is seen to make a data file anew: the holder rebuilds the store
    after a power failure, or compacts or restores it. Rejected: a lock or a word of its own that says
    so, which a holder that hangs would leave as it is.
    """

    def __init__(self, directory: str, busy_timeout_secs: float) -> None:
        """Begin to wait."""
        self._directory = directory
        self._busy_timeout_secs = busy_timeout_secs
        self._seen = self._look()
        self._deadline = time.monotonic() + busy_timeout_secs
        self._is_logged = False

    def next_look(self) -> float:
        """Return the time of the next call of ``check``, on the monotonic clock."""
        return min(self._deadline, time.monotonic() + _LOOK_SECS)

    def check(self) -> None:
        """
        Look whether the holder made progress.

        :raise BusyTimeoutError: if it made none for too long
        """
        now = time.monotonic()
        seen = self._look()
        if seen != self._seen:
            self._seen = seen
            self._deadline = now + self._busy_timeout_secs
            if seen is not None and not self._is_logged:
                self._is_logged = True
                _LOGGER.warning(
                    "Waiting for a rebuild of the queue %s by another process. So far its new data "
                    "file has %d bytes; the old one has %d bytes.", self._directory, seen[0],
                    self._bytes(files.DATA))
        if now >= self._deadline:
            raise BusyTimeoutError(
                f"Expected to open or close the queue {self._directory} within "
                f"{self._busy_timeout_secs} seconds (busy_timeout_secs), but got: another process is "
                "in the middle of that. It may be stopped, or the disk may hang.")

    def _look(self) -> tuple[int, int] | None:
        """Read size and time of change of the data file that is made anew; None if there is none."""
        try:
            status = os.lstat(os.path.join(self._directory, files.DATA + ".new"))
        except OSError as error:
            if error.errno is None:
                raise  # by a signal handler, see files
            return None
        return status.st_size, status.st_mtime_ns

    def _bytes(self, name: str) -> int:
        """Read the size of a file; 0 if there is none."""
        with files.suppress(OSError):
            return os.lstat(os.path.join(self._directory, name)).st_size
        return 0


@contextlib.contextmanager
def open_lock(directory: str, busy_timeout_secs: float) -> Iterator[None]:
    """
    Keep other processes from opening, closing or creating a queue.

    :raise BusyTimeoutError: if another process does that for too long, and makes no progress
    """
    patience = _Patience(directory, busy_timeout_secs)
    while True:  # until the deadline of ``patience``
        lock = LockFile(os.path.join(directory, files.OPEN_LOCK))
        try:
            while not lock.lock(patience.next_look()):
                patience.check()
            # The queue may be dropped while we wait: then other processes lock a new file.
            if lock.is_there():
                yield
                return
        finally:
            try:
                lock.close()
            except BaseException:
                lock.close()  # see ``ExclusiveLock``
                raise
        patience.check()


def forget_parent() -> bool:
    """
    Close the lock files of the parent in a forked child; do not unlock: the locks are the parent's.

    :return: True if the parent had a queue open, or opened or closed one in another thread
    """
    inherited = list(_LOCK_FILES)
    _LOCK_FILES.clear()
    paths = []
    for lock in inherited:
        descriptor, lock.descriptor = lock.descriptor, -1
        if descriptor < 0:
            paths.append(lock.path)
            continue
        with contextlib.suppress(OSError):
            os.close(descriptor)
    # Another thread of the parent was between two instructions, or in the middle of a system call.
    files.close_all_of(paths)
    return bool(inherited)


def users_of(lock: LockFile) -> list[int]:
    """List the processes that have a file locked with ``flock``, as far as the system tells."""
    with files.translated(path=lock.path, doing="look at"):
        inode = f":{os.fstat(lock.descriptor).st_ino}"
    processes = set()
    with contextlib.suppress(OSError, ValueError), open("/proc/locks", encoding="ascii") as file:
        for line in file:
            # 1: FLOCK  ADVISORY  READ  1234 08:01:5678 0 EOF
            fields = line.split()
            if len(fields) == 8 and fields[1] == "FLOCK" and fields[5].endswith(inode):
                processes.add(int(fields[4]))
    # In another PID namespace, the system does not tell.
    return sorted(process for process in processes if process > 0)


def _names(processes: list[int]) -> str:
    """Write process ids behind a word, if they are known."""
    return f" ({', '.join(map(str, processes[:5]))})" if processes else ""
