"""Open one store, keep it open through forks, and close it without loss."""

import os
import time
from typing import Any, Final, List

import lmdb

import persipubsub.errors
from persipubsub import _checkpoint, _files, _header, _opening, _transactions
from persipubsub._opening import Databases, MapFullError, Options

__all__ = ["Databases", "Environment", "MapFullError", "Options"]

#: Room on the disk that is given back when it is full, so that messages can be acknowledged.
_RESERVE_BYTES: Final = 1 << 18


class Environment(_transactions.Transactions):
    """
    Hold an open store, for all threads of the process.

    Obtain it from :py:func:`persipubsub._registry.acquire`. After a fork it reopens itself in the
    child at its first use there.
    """

    def __init__(self, directory: str, options: Options) -> None:
        """
        Initialize without opening anything.

        :param directory: of the store
        :param options: how to open it
        """
        super().__init__(directory=directory, options=options)
        self.clock_offset_ns = 0

    # State

    def now_ns(self) -> int:
        """
        Read the queue's clock: it never goes back and nobody sets it, and it survives restarts.

        :return: nanoseconds; about the time since 1970
        """
        return _files.ticks_ns() + self.clock_offset_ns

    def file_bytes(self) -> int:
        """
        Measure the store.

        :return: bytes of its data file
        """
        with _files.translated(path=self.directory, doing="look at"):
            return os.stat(os.path.join(self.directory, _files.DATA)).st_size

    def check_readers(self) -> int:
        """
        Free the slots of dead processes in LMDB's table of readers.

        :return: how many were freed
        """
        if self._handles is None:
            self._reopen()
        with self._read_lock:
            return self._open_handles().environment.reader_check()

    # Opening and closing

    def open(self, adopts_durability: bool = False) -> None:
        """
        Open the store. Hold the registry's lock and the open gate.

        :param adopts_durability: True to change the store's durability to that of the options
        """
        self._failure = None
        self._committed = self._flushed = 0
        self._seen = 0
        if self.options.keeps_os and self.options.checkpoint_secs:
            self._checkpointer = _checkpoint.Checkpointer(self.options.checkpoint_secs,
                                                          self._write_checkpoint)
        self._handles = _opening.open_store(self.directory, self.options)
        try:
            self._start(adopts_durability=adopts_durability)
        except BaseException:
            self._close_handles()
            raise

    def _start(self, adopts_durability: bool) -> None:
        """
        Read the header of a store just opened, and bring it up to this boot.

        :param adopts_durability: True to change the store's durability
        """
        handles = self._open_handles()
        header = self.read(lambda txn, databases: _header.read(txn, databases, self.directory))
        flags = _opening.flags_of(self.options)
        if header.flags != flags:
            if not adopts_durability:
                raise _header.durability_error(self.directory, header.flags, flags)
            _opening.check_alone(self.directory, handles)

        # Whatever is written from here on may reach the disk in part: before it, there has to be a
        # checkpoint of what is there, and the mark. A restored store has both from before.
        if self.options.keeps_os and not handles.was_restored:
            self._prepare_os()
        if header.boot_id != _files.boot_id() or header.flags != flags or handles.was_restored:
            header = self.write(
                lambda txn, databases: _header.update(txn, databases, flags, handles.was_restored))
            self.flush_now()
            if not self.options.keeps_os:
                _opening.mark_clean(self.directory)
        if self.options.keeps_os and handles.was_restored:
            self._prepare_os()
        self.clock_offset_ns = header.clock_offset_ns
        _files.keep_reserve(self.directory, _RESERVE_BYTES)

    def _prepare_os(self) -> None:
        """Write a first checkpoint and the mark of a running store; hold the open gate."""
        if _opening.is_marked(self.directory):
            return
        if self.options.checkpoint_secs:
            self._write_checkpoint()
        _opening.mark_running(self.directory)

    def _write_checkpoint(self) -> bool:
        """
        Write a checkpoint.

        :return: False if another process is writing one
        """
        with self._copy_lock:
            handles = self._open_handles()
            try:
                return _checkpoint.write(self.directory, handles.environment)
            except lmdb.Error as error:
                # Not by _translate: a copy that failed says nothing of the store itself.
                raise _opening.translate(error, self.directory) from error

    def is_open(self) -> bool:
        """
        Tell whether the store is open in this process.

        :return: True if so
        """
        return self._handles is not None

    def close(self) -> None:
        """
        Close the store. Hold the registry's lock.

        An ``os`` store is flushed and marked clean by its last user.
        """
        if self._checkpointer is not None:
            self._checkpointer.stop()
        with self._copy_lock, self._write_lock, self._flush_lock, self._read_lock:
            self.reopener = None
            if self._handles is None:
                return
            try:
                if self.options.keeps_os and self._failure is None:
                    with _opening.open_gate(self.directory, self.options):
                        self._close_os(self._handles)
            except persipubsub.errors.PersipubsubError:
                # The directory is gone or can not be written to: no reason to keep it open. The
                # mark of a running store stays, so that the next open looks at the store closely.
                pass
            finally:
                self._close_handles()

    def _close_os(self, handles: _opening.Handles) -> None:
        """
        Leave an ``os`` store so that nothing of this process is lost; hold the open gate.

        :param handles: of the store
        """
        if _opening.is_alone(handles):
            self.flush_now()
            _opening.mark_clean(self.directory)
        elif self.options.checkpoint_secs:
            # Nobody else may notice what was written since the last checkpoint. Another process
            # that is writing one may have begun too early: wait for it, within reason.
            deadline = time.monotonic() + self.options.busy_timeout_secs
            while not self._write_checkpoint() and time.monotonic() < deadline:
                time.sleep(0.001)

    def _close_handles(self) -> None:
        """Close everything that is open."""
        handles, self._handles = self._handles, None
        if handles is not None:
            _opening.close_store(handles)

    # Forking

    def before_fork(self) -> None:
        """Wait until no thread of this process is inside LMDB, or copies the store."""
        self._copy_lock.acquire()
        self._write_lock.acquire()
        self._flush_lock.acquire()
        self._read_lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._read_lock.release()
        self._flush_lock.release()
        self._write_lock.release()
        self._copy_lock.release()

    def after_fork_in_child(self) -> None:
        """Let go of what belongs to the parent; the next use opens the store anew."""
        if self._is_writing or self._is_reading:
            # Forked by a signal handler in the middle of a transaction of the same thread: the
            # handles can be neither used nor closed here.
            _ABANDONED.append(self._handles)
            self._handles = None
        self._is_writing = self._is_reading = False
        self._requests.clear()
        self._checkpointer = None
        self._make_locks()
        self._close_handles()


# Handles that can not be closed in a forked child; kept so that they are never collected.
_ABANDONED = []  # type: List[Any]
