"""
Let one process at a time write to a queue, with a bounded wait.

LMDB has a lock of its own for writers, but a process that waits for it can be reached neither by a
signal nor by a timeout: a publisher that was stopped (SIGSTOP) in the middle of a commit would hang
all others. Every write transaction of this library therefore passes this gate first, an exclusive
``flock`` that is tried and never waited for in the kernel.

Trying again and again is unfair to whoever waits: the holder comes back within microseconds. So the
waiting process sets a byte in a shared page, and a holder that finds it set leaves the others a
moment after it left the gate.
"""

import fcntl
import mmap
import os
import time
from collections.abc import Callable
from typing import Final

import persipubsub.errors
from persipubsub.environment import _files

_FIRST_PAUSE_SECS: Final = 0.00002
_LONGEST_PAUSE_SECS: Final = 0.001
_COURTESY_SECS: Final = 0.0001


class LockFile:
    """
    Hold the descriptor of a file that is locked with ``flock``.

    It is closed, and with it the lock given back, when the object is dropped at the latest: a
    KeyboardInterrupt may come in between the entry into ``close`` and its first instruction, and
    nobody would know the number any more. With ``io.FileIO`` it would be a ResourceWarning then.
    """

    descriptor = -1  # for the destructor of what was never opened

    def __init__(self, path: str) -> None:
        """
        Open the file, and create it if it is missing.

        :param path: of the file
        """
        self.path = path
        self.descriptor = _files.open_own_file(path)

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        """Close what nobody closed; at the end of the interpreter ``os`` may be gone."""
        if self.descriptor >= 0:
            _close(self.descriptor)

    def share(self) -> None:
        """
        Take a shared lock; wait for whoever has the other one.

        :raise StoreError: if the file system, or the kernel, refuses the lock
        """
        with _files.translated(path=self.path, doing="lock"):
            fcntl.flock(self.descriptor, fcntl.LOCK_SH)

    def is_alone(self) -> bool:
        """
        Tell whether nobody else has a lock on the file. Let nobody come meanwhile.

        :return: True if so; the lock is a shared one afterwards
        :raise StoreError: if the file system, or the kernel, refuses the lock
        """
        with _files.translated(path=self.path, doing="lock"):
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            finally:
                fcntl.flock(self.descriptor, fcntl.LOCK_SH)
        return True

    def close(self) -> None:
        """Close the file, if it is open. A lock that is held is given back by that."""
        # In this order, with no call between: the number is soon another file's.
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            try:
                os.close(descriptor)
            except OSError:
                pass  # closed all the same, and nothing was written that anybody needs


class Gate(LockFile):
    """
    Guard the write transactions of one queue between processes.

    Between the threads of one process it guards nothing: hold the environment's write lock. The
    descriptor is an attribute since the lock is given back by a plain ``fcntl.flock`` in a
    ``finally`` clause: between the entry into a Python function and its first instruction a
    KeyboardInterrupt could come in and leave the gate shut.
    """

    def __init__(self, path: str) -> None:
        """
        Open the gate's file, and create it if it is missing.

        :param path: of the gate's file
        """
        super().__init__(path)
        try:
            with _files.translated(path=path, doing="extend"):
                if os.fstat(self.descriptor).st_size < mmap.PAGESIZE:
                    _files.reserve(self.descriptor, mmap.PAGESIZE)
                self._page: mmap.mmap | None = _files.map_file(self.descriptor, mmap.PAGESIZE)
        except BaseException:
            super().close()
            raise

    def enter(self, deadline: float) -> bool:
        """
        Try to enter until the deadline.

        :param deadline: on the clock of ``time.monotonic``, in seconds
        :return: True if entered
        :raise StoreError: if the file system, or the kernel, refuses the lock
        """
        pause = _FIRST_PAUSE_SECS
        while True:
            with _files.translated(path=self.path, doing="lock"):
                try:
                    fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    pass
            if time.monotonic() >= deadline:
                return False
            if self._page is not None:
                self._page[0] = 1
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECS)

    def is_there(self) -> bool:
        """
        Tell whether the file is still the one that others find.

        :return: False if it was removed, or another one took its place
        """
        with _files.translated(path=self.path, doing="look at"):
            try:
                return os.path.samestat(os.lstat(self.path), os.fstat(self.descriptor))
            except FileNotFoundError:
                return False

    def make_way(self) -> None:
        """Pause for 0.1 milliseconds if another process waits; call it after leaving the gate."""
        page = self._page
        if page is not None and page[0]:
            page[0] = 0
            time.sleep(_COURTESY_SECS)

    def close(self) -> None:
        """Close the gate's file, if it is open. A lock that is held is given back by that."""
        # The page has a descriptor of its own, which holds the lock as well.
        if self._page is not None:
            self._page.close()
            self._page = None
        super().close()


def busy_error(path: str, seconds: float) -> persipubsub.errors.BusyTimeoutError:
    """
    Describe a wait that was too long.

    :param path: of the queue
    :param seconds: how long was waited
    :return: error to be raised
    """
    return persipubsub.errors.BusyTimeoutError(
        "Expected to write to the queue {} within {} seconds (busy_timeout_secs), but got: another "
        "process is in the middle of a write. It may be stopped, or the disk may hang.".format(
            path, seconds))


def nested_error(path: str) -> persipubsub.errors.StoreError:
    """
    Describe a write inside of another one of the same thread.

    :param path: of the queue
    :return: error to be raised
    """
    return persipubsub.errors.StoreError(
        "Expected to write to the queue {} when this thread is not in the middle of a write, but "
        "got: a signal handler that interrupted one. Set a flag there, and write later.".format(
            path))
