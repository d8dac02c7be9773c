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
"""

import contextlib
import fcntl
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


class LockFile:
    """A file that is locked with ``flock``."""

    def __init__(self, path: str) -> None:
        """Open the file, and create it if it is missing."""
        self.path = path
        self.descriptor = files.open_file(path)

    def try_lock(self) -> bool:
        """Lock the file, unless another process has it."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno is None:
                raise  # by a signal handler, see files
            raise files.translate_os_error(error, self.path, "lock") from error
        return True

    def lock(self, deadline: float, page: SharedPage | None = None) -> bool:
        """Lock the file; return False at the deadline, on the monotonic clock."""
        pause = _FIRST_PAUSE_SECS
        while not self.try_lock():
            if time.monotonic() >= deadline:
                return False
            if page is not None:
                page.words[SharedPage.WAITS] = 1
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECS)
        return True

    def share(self) -> None:
        """Take a shared lock; wait for the end of an exclusive one."""
        with files.translated(path=self.path, doing="lock"):
            fcntl.flock(self.descriptor, fcntl.LOCK_SH)

    def is_alone(self) -> bool:
        """Tell whether no other process has a shared lock; the caller keeps others from opening."""
        try:
            return self.try_lock()
        finally:
            self.share()

    def is_there(self) -> bool:
        """Tell whether the path still leads to this file."""
        with files.translated(path=self.path, doing="look at"):
            try:
                return os.path.samestat(os.lstat(self.path), os.fstat(self.descriptor))
            except FileNotFoundError:
                return False

    def close(self) -> None:
        """Close the file, if it is open, which gives back its lock."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


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


@contextlib.contextmanager
def open_lock(directory: str, busy_timeout_secs: float) -> Iterator[None]:
    """Keep other processes from opening, closing or creating a queue."""
    deadline = time.monotonic() + busy_timeout_secs
    while True:
        lock = LockFile(os.path.join(directory, files.OPEN_LOCK))
        try:
            # The queue may be dropped while we wait: then other processes lock a new file.
            if lock.lock(deadline) and lock.is_there():
                yield
                return
        finally:
            lock.close()
        if time.monotonic() >= deadline:
            raise BusyTimeoutError(
                f"Expected to open the queue {directory} within {busy_timeout_secs} seconds "
                "(busy_timeout_secs), but got: another process is in the middle of opening it")


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
