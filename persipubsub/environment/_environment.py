"""Open one store, keep it open through forks, and close it without loss."""

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, Final

import lmdb

import persipubsub.errors
from persipubsub.environment import _checkpoint, _files, _mark, _opening, _transactions
from persipubsub.environment._opening import MapFullError, Options
from persipubsub.environment._transactions import ResultT
from persipubsub.store import _check, _clock, _header
from persipubsub.store._databases import Databases

__all__ = ["Databases", "Environment", "MapFullError", "Options"]

#: A checkpoint that could not be written is tried again after this time, in seconds.
_PAUSE_SECS: Final = 0.001

#: Time between checkpoints of a process that is to write none, but beside others that do.
_JOINED_SECS: Final = 1.0


class Environment(_transactions.Transactions):
    """
    Hold an open store, for all threads of the process.

    Obtain it from :py:func:`persipubsub.environment._registry.acquire`. After a fork it reopens
    itself in the child at its first use there.
    """

    def __init__(self, directory: str, options: Options) -> None:
        """
        Initialize without opening anything.

        :param directory: of the store
        :param options: how to open it
        """
        super().__init__(directory=directory, options=options)
        self.clock_offset_ns = 0
        # Time between two checkpoints; 0: none. That of the options, but see _prepare_os.
        self._checkpoint_secs = 0.0

    # State

    def now_ns(self) -> int:
        """
        Read the queue's clock: it never goes back and nobody sets it, and it survives restarts.

        :return: nanoseconds; about the time since 1970
        """
        # Not by a call of ticks_ns: this is read for each message.
        return time.clock_gettime_ns(_clock.BOOT_CLOCK) + self.clock_offset_ns

    def file_bytes(self) -> int:
        """
        Measure the store.

        :return: bytes of its data file
        """
        with _files.translated(path=self.directory, doing="look at"):
            return os.stat(os.path.join(self.directory, _files.DATA)).st_size

    # Opening and closing

    def open(self, adopts_durability: bool = False) -> None:
        """
        Open the store; a broken one is closed before. Hold the registry's lock and the open gate.

        :param adopts_durability: True to change the store's durability to that of the options
        """
        with contextlib.ExitStack() as stack:
            # Other threads may be using a broken one.
            for lock in self._locks():
                stack.enter_context(lock)
            self._close_handles()
            self._failure = None
            self._has_left = False
            self._committed = self._flushed = 0
            self.left = None
            self._seen = 0
            try:
                with _files.translated(path=self.directory, doing="open the queue"):
                    self._handles = _opening.open_store(self.directory, self.options)
                self._start(adopts_durability=adopts_durability)
            except BaseException as error:
                self._close_handles()
                if isinstance(error, persipubsub.errors.PersipubsubError):
                    # That of another file, such as the id of the boot, does not name the queue.
                    _opening.name_queue(error, self.directory)
                raise
        # Not before: a store that is refused shall not replace its checkpoint.
        if not self.is_look:
            self._begin_checkpoints()

    def _begin_checkpoints(self) -> None:
        """Let checkpoints be written in the background, from the next change on."""
        if self._checkpoint_secs and self._checkpointer is None:
            self._checkpointer = _checkpoint.Checkpointer(self._checkpoint_secs,
                                                          self._write_checkpoint)

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

        if handles.was_interrupted and not handles.was_restored:
            self._check_content()

        # Whatever is written from here on may reach the disk in part: before it, there has to be a
        # checkpoint of what is there, and the mark. A restored store has both from before.
        is_outdated = (header.boot_id != _clock.boot_id() or header.flags != flags
                       or handles.was_interrupted)
        if (self.options.keeps_os and not handles.was_interrupted
                and (is_outdated or not self.is_look)):
            self._prepare_os()
        if is_outdated:
            was_interrupted = handles.was_interrupted
            # A full map must not lock those out who would make room.
            header = self.write(
                lambda txn, databases: _header.update(txn, databases, flags, was_interrupted),
                may_grow=True)
            self.flush_now()
        if not self.options.keeps_os and (is_outdated or _mark.is_marked(self.directory)
                                          or _checkpoint.is_there(self.directory)):
            # Not only when it was just changed: the process that did may have been killed before.
            _mark.mark_clean(self.directory)
            _checkpoint.remove(self.directory)
        if self.options.keeps_os and handles.was_interrupted:
            self._prepare_os()
        self.clock_offset_ns = header.clock_offset_ns
        # Not at once after it was spent, by a write that opens the store again: it would go on.
        if self._reserve_due is None:
            _files.keep_reserve(self.directory)

    def begin_work(self) -> None:
        """Let a store that was only looked at be written to; hold what :py:meth:`open` needs."""
        # A forked child has it closed, and prepares it when it opens it.
        if self.options.keeps_os and self._handles is not None:
            self._prepare_os()
            self._begin_checkpoints()
        self.is_look = False

    def enlarge(self, map_size: int) -> None:
        """
        Let the store become larger than it was allowed to be; hold the registry's lock.

        :param map_size: largest size of the store in bytes
        """
        with contextlib.ExitStack() as stack:
            for lock in self._locks():
                stack.enter_context(lock)
            if self._is_writing or self._is_reading:
                # A signal handler in the middle of a transaction, whose map may not go away. The
                # next one who opens the queue does it.
                return
            # In a forked child that did not use it yet, it is done by the reopening.
            if (self._handles is not None
                    and map_size > self._handles.environment.info()["map_size"]):
                self._remap(map_size)
            self.options = self.options._replace(map_size=map_size)

    def _check_content(self) -> None:
        """
        Check the messages and positions of a store without checkpoints after a power failure.

        Its pages were looked at before, but one of them that never reached the disk may be a good
        page of earlier times, or the middle of a message.

        :raise StoreCorruptError: if anything is wrong
        """
        findings = self.read(_check.check)
        if findings:
            raise persipubsub.errors.StoreCorruptError(
                "Expected the store {} to be sound, but got {} finding(s): {}".format(
                    os.path.join(self.directory, _files.DATA), len(findings),
                    "; ".join(findings[:3])))

    def _prepare_os(self) -> None:
        """
        Write a first checkpoint and the mark of a running store; hold the open gate.

        After a power failure, the mark says whether the checkpoint takes the place of the store,
        whatever the configuration says by then. So whoever comes while others have the store open
        does as they do.
        """
        has_one = _checkpoint.is_there(self.directory)
        is_running = _mark.is_marked(self.directory)
        is_covered = is_running and _mark.is_checkpointed(self.directory)
        if is_running and (self._checkpointer is not None
                           or not self._open_handles().users.is_alone()):
            self._join(is_covered)
            return
        self._checkpoint_secs = self.options.checkpoint_secs
        if self._checkpoint_secs:
            if not (is_covered and has_one) and not self._cover():
                raise self._slow_checkpoint_error()
        elif has_one or is_covered:
            # What killed processes wrote may not have reached the disk.
            self.flush_now()
        _mark.mark_running(self.directory, bool(self._checkpoint_secs))
        if has_one and not self._checkpoint_secs:
            _checkpoint.remove(self.directory)

    def _join(self, has_checkpoints: bool) -> None:
        """
        Write checkpoints if those who have the store open do so, whatever the options say.

        :param has_checkpoints: True if they do
        """
        wanted = self.options.checkpoint_secs
        self._checkpoint_secs = (wanted or _JOINED_SECS) if has_checkpoints else 0.0
        if has_checkpoints != bool(wanted):
            # Slow, and hardly ever needed.
            import logging  # pylint: disable=import-outside-toplevel

            logging.getLogger("persipubsub.checkpoint").warning(
                "The queue %s is in use %s checkpoints, so that this process does the same, though "
                "its checkpoint_secs is %s. That holds until nobody has the queue open.",
                self.directory, "with" if has_checkpoints else "without", wanted)

    def _write_checkpoint(self) -> bool:
        """
        Write a checkpoint.

        :return: False if another process is writing one
        """
        with self._copy_lock:
            if self._handles is None and self.reopener is not None:
                return False  # not by this thread, which is waited for when the queue is closed
            handles = self._open_handles()
            try:
                return self._follow(lambda: _checkpoint.write(self.directory, handles.environment))
            except lmdb.Error as error:
                # Not by _translate: a copy that failed says nothing of the store itself.
                raise _opening.translate(error, self.directory) from error

    def _cover(self) -> bool:
        """
        Write a checkpoint of all that was committed before.

        One that another process is writing may have begun too early: it is waited for, within
        reason, and so is a slot in the table of readers.

        :return: False if the wait was too long
        """
        deadline = time.monotonic() + self.options.busy_timeout_secs
        while True:
            is_late = time.monotonic() >= deadline
            try:
                if self._write_checkpoint():
                    return True
            except persipubsub.errors.ReadersFullError:
                if is_late:
                    raise
            if is_late:
                return False
            time.sleep(_PAUSE_SECS)

    def secure_now(self) -> None:
        """
        Let all that was committed survive a power failure, whatever the durability.

        With checkpoints that takes one: to flush the store would be in vain, since the checkpoint
        takes its place.

        :raise DiskFullError: if there is no room for it
        :raise BusyTimeoutError: if another process is in the middle of writing one for too long
        """
        if not self._checkpoint_secs:
            self.flush_now()
            return
        # Maps as much as other processes do.
        self.read(lambda txn, databases: None)
        if not self._cover():
            raise self._slow_checkpoint_error()

    def _slow_checkpoint_error(self) -> persipubsub.errors.BusyTimeoutError:
        """Describe a wait for another process's checkpoint that was too long."""
        return persipubsub.errors.BusyTimeoutError(
            "Expected to write a checkpoint of the queue {} within {} seconds (busy_timeout_secs), "
            "but got: another process is in the middle of writing one".format(
                self.directory, self.options.busy_timeout_secs))

    def copy(self, descriptor: int, verify: Callable[[lmdb.Environment], None]) -> None:
        """
        Write a compact copy of a snapshot. It holds up nobody.

        Pages that are freed meanwhile are not used again before it ends.

        :param descriptor: of an empty file
        :param verify: fails if the pages are damaged, for the copy would end the process
        """
        # Opens the store again in a forked child.
        self.read(lambda txn, databases: None)
        with self._copy_lock:
            try:
                environment = self._open_handles().environment
                self._follow(lambda: verify(environment))
                self._follow(lambda: environment.copyfd(descriptor, compact=True))
            except lmdb.Error as error:
                # Not by _translate: a copy that failed says nothing of the store itself.
                raise _opening.translate(error, self.directory) from error

    def _follow(self, use: Callable[[], ResultT]) -> ResultT:
        """
        Use the store; again with more of it mapped if other processes wrote more just before.

        :param use: begins a transaction before all that could not be done again
        :return: what it returns
        """
        while True:
            try:
                return use()
            except lmdb.MapResizedError:
                self._follow_map_size()

    def is_usable(self) -> bool:
        """
        Tell whether the store is open in this process, and LMDB does not refuse to work with it.

        :return: True if so
        """
        if self._handles is None:
            return False
        try:
            with self._read_lock, self._open_handles().environment.begin():
                return True
        except lmdb.PanicError:
            return False
        except lmdb.Error:
            return True

    def close(self) -> None:
        """
        Close the store. Hold the registry's lock.

        An ``os`` store is flushed and marked clean by its last user.
        """
        if self._checkpointer is not None:
            self._checkpointer.stop()
        with contextlib.ExitStack() as stack:
            is_os = self.options.keeps_os and self._failure is None and self._handles is not None
            try:
                if is_os:
                    stack.enter_context(_opening.open_gate(self.directory, self.options))
            except persipubsub.errors.PersipubsubError:
                # The directory is gone or can not be written to: no reason to keep it open. The
                # mark of a running store stays, so that the next open looks at the store closely.
                is_os = False
            for lock in self._locks():
                stack.enter_context(lock)
            self.reopener = None
            try:
                if is_os and self._handles is not None:
                    self._close_os(self._handles)
            except persipubsub.errors.PersipubsubError:
                pass
            finally:
                self._close_handles()

    def leave(self, seconds: float) -> None:
        """
        Leave an ``os`` store as closed at the end of the interpreter, unless a thread hangs inside.

        Daemon threads that go on stop for good at the next lock. Closing the store under them was
        rejected: their tracebacks, written while the interpreter ends, can abort it. The thread
        that leaves gets ClosedError if it writes once more, in a function of ``atexit`` that was
        registered before this one: nothing would tell after a power failure that it is not flushed.

        :param seconds: how long to wait for other threads
        """
        handles = self._handles
        if not self.options.keeps_os or self._failure is not None or handles is None:
            return
        if self._checkpointer is not None:
            self._checkpointer.stop()
        with contextlib.suppress(persipubsub.errors.PersipubsubError), _opening.open_gate(
                self.directory, self.options):
            if all(lock.acquire(timeout=seconds) for lock in self._locks()):
                self._close_os(handles)
                self._has_left = True
                self._failure = (f"Expected to write to the queue {self.directory} before the "
                                 f"interpreter ends, but got: it was left")

    def _close_os(self, handles: _opening.Handles) -> None:
        """
        Leave an ``os`` store so that nothing of this process is lost; hold the open gate.

        :param handles: of the store
        """
        if self.is_look and not _mark.is_marked(self.directory):
            # Nobody wrote since it was left clean, this process neither.
            return
        if handles.users.is_alone():
            self.flush_now()
            _mark.mark_clean(self.directory)
        elif self._checkpoint_secs and self._committed:
            # Nobody else may notice what was written since the last checkpoint.
            self._cover()

    def save(self) -> None:
        """Make safe what this process sent to an ``os`` store so far, and go on using it."""
        if (self.options.keeps_os and self._failure is None and self._handles is not None
                and self._committed):
            with contextlib.suppress(persipubsub.errors.PersipubsubError):
                self.secure_now()

    # Forking

    def before_fork(self, seconds: float = -1) -> bool:
        """
        Wait until no thread of this process is inside LMDB, or copies the store.

        :param seconds: how long at most for each of the locks; -1: without a bound
        :return: True if all locks are held; otherwise none of them is
        """
        for count, lock in enumerate(self._locks()):
            if not lock.acquire(timeout=seconds):
                for other in reversed(self._locks()[:count]):
                    other.release()
                return False
        return True

    def after_fork_in_parent(self) -> None:
        """Go on."""
        for lock in reversed(self._locks()):
            lock.release()

    def after_fork_in_child(self) -> None:
        """Let go of what belongs to the parent; the next use opens the store anew."""
        if self._is_writing or self._is_reading:
            # Forked by a signal handler in the middle of a transaction of the same thread: the
            # handles can be neither used nor closed here.
            _ABANDONED.append(self._handles)
            self._handles = None
        self._is_writing = self._is_reading = False
        self._checkpointer = None
        self._make_locks()
        self._close_handles()


# Handles that can not be closed in a forked child; kept so that they are never collected.
_ABANDONED: list[Any] = []
