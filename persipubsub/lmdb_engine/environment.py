"""
One open store of this process: opening, transactions, the background thread, forks, closing.

LMDB's file locks belong to the process: opening the same files twice and closing one of the two drops
the locks of the other. One registry, by device and inode of the data file, therefore hands out a
single environment for each store and counts its users.

**Power failure.** If the mark of a store in use is of another boot, ``open`` throws LMDB's file away
and builds it anew: see ``_rebuild``, and ``Journal.replay``.

**Fork.** In the hook after a fork, and never later, the child closes the lock files that it
inherited, since they hold the parent's locks, also those of another thread of the parent that was in
the middle of opening or closing a queue. Then it makes new thread locks. It keeps the inherited LMDB
environment for ever without touching it, and opens its own at the first use.
"""

import atexit
import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeVar

import lmdb

from persipubsub import config
from persipubsub.drop_log import DropLog
from persipubsub.errors import ClosedError, DiskFullError, PersipubsubError
from persipubsub.lmdb_engine import datafile, files
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import lmdb_private, locks, log, meta, retention
from persipubsub.lmdb_engine.claims import Held
from persipubsub.lmdb_engine.datafile import MapFullError
from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.format import Databases, Tx
from persipubsub.lmdb_engine.journal import Journal, remove_journal
from persipubsub.lmdb_engine.notifier import Notifier

ResultT = TypeVar("ResultT")

_LOGGER = logging.getLogger("persipubsub.queue")

#: Numbers skip this far after a power failure: more can hardly have been sent in the last second,
#: and the numbers last for 65,536 power failures.
_SKIPPED_NUMBERS: Final = 1 << 32

#: A read that finds no slot in the table of readers tries again after this time, in seconds.
_SLOT_PAUSE_SECS: Final = 0.001

#: Most transactions in which the background thread deletes blocks in a row.
_MOST_CHUNKS: Final = 16

#: The end of the interpreter waits for a thread that is still at work, in seconds.
_LEAVE_SECS: Final = 5.0

#: One warning of the background thread in so many seconds.
_WARNING_SECS: Final = 60.0

#: Parts of what is open that are used directly.
_PARTS: Final = ("page", "journal", "notifier")


class _Store:
    """What is open of a store."""

    def __init__(self, directory: str, read: Callable[..., Any], busy_timeout_secs: float) -> None:
        """Open all but LMDB."""
        self.lmdb: lmdb.Environment | None = None
        self.db: Databases
        self.page = SharedPage(directory)
        self.write_lock = locks.ExclusiveLock(os.path.join(directory, files.WRITE_LOCK),
                                              f"write to the queue {directory}")
        self.users = locks.UsersLock(directory, busy_timeout_secs)
        self.journal = Journal(directory, self.page, read, busy_timeout_secs)
        self.notifier = Notifier(self.page)
        self.is_stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def close_locks(self) -> None:
        """Close the files that are locked."""
        self.write_lock.close()
        self.users.close()
        self.journal.close()

    def close(self) -> None:
        """Close everything that is open."""
        environment, self.lmdb = self.lmdb, None
        if environment is not None:
            environment.close()
        self.close_locks()


class Member(Protocol):
    """A part of an open queue that has locks or files."""

    def forget_parent(self) -> None:
        """Begin anew in a forked child."""


class Environment:  # pylint: disable=too-many-instance-attributes
    """An open store, for all threads of the process. See ``locks`` for the order of its locks."""

    def __init__(self, directory: str, queue: config.Queue, is_read_only: bool) -> None:
        """Initialize without opening anything; see :py:func:`acquire`."""
        self.directory = directory
        #: Settings of the queue: those that are stored in it, once it is open.
        self.queue = queue
        self.is_read_only = is_read_only
        #: Key of the registry, and how often it is in use.
        self.identity: files.Identity
        self.users = 0
        self.process_id = os.getpid()
        #: Numbers that this process has claimed, by the ordinal of the subscriber.
        self.held: dict[int, Held] = {}
        #: Parts of the open queues that have locks or files: to be begun anew in a forked child.
        self.members: list[Member] = []
        #: They report before the environment is closed, and at the interpreter's end.
        self.drop_logs: list[DropLog] = []
        self.clock_offset_ns = 0
        # Set while the store is open, see __getattr__.
        self.page: SharedPage
        self.journal: Journal
        self.notifier: Notifier
        self._store: _Store | None = None
        self._is_over = False
        self._warned_at = -_WARNING_SECS
        self._make_locks()

    def _make_locks(self) -> None:
        """Create the thread locks."""
        #: LMDB's number of the last transaction that this process committed; under the write lock.
        self.committed = 0
        #: How many of its transactions were not committed; under the write lock.
        self.aborted = 0
        self._read_mutex = threading.RLock()

    # Figures

    def now_ns(self) -> int:
        """Read the queue's clock: it never goes back, can not be set, and survives restarts."""
        # Not by a call of ticks_ns, which takes time: this is read for each message.
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) + self.clock_offset_ns

    def __getattr__(self, name: str) -> Any:
        """Open the store again in a forked child, where it has no journal, notifier or page yet."""
        # Not properties: with them a send takes 5 % longer.
        if name in _PARTS:
            return getattr(self._require(), name)
        raise AttributeError(name)

    def _lmdb(self) -> lmdb.Environment:
        """Return LMDB's environment."""
        store = self._require()
        if store.lmdb is None:
            self._open_again(store)
        assert store.lmdb is not None
        return store.lmdb

    def file_bytes(self) -> int:
        """Size of LMDB's file."""
        with files.translated(path=self.directory, doing="look at"):
            return os.stat(os.path.join(self.directory, files.DATA)).st_size

    # Transactions

    def read(self, work: Callable[..., ResultT], *args: Any) -> ResultT:
        """
        Run a function in a read transaction.

        :param work: gets a ``Tx`` and the arguments; may be called again, and must not keep buffers
        """
        deadline = 0.0
        while True:  # until the deadline of ``_recover``
            store = self._store or self._require()
            try:
                with self._read_mutex:
                    if store.lmdb is None:
                        raise self._absent_error()
                    with store.lmdb.begin(None, None, False, True) as txn:
                        return work(Tx(txn, store.db), *args)
            except lmdb.Error as error:
                deadline = deadline or time.monotonic() + self.queue.busy_timeout_secs
                self._recover(store, error, deadline)
            except PersipubsubError as error:
                _name_queue(error, self.directory)
                raise

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[int]:
        """
        Keep LMDB from reusing the pages of a snapshot in this block, which holds no lock.

        :return: number of its transaction, for a reader of the file. There is no ``Tx``: LMDB's map
            may be replaced meanwhile.
        """
        # As in ``read``: it maps anew, and waits for a slot of a reader.
        self.read(lambda tx: None)
        try:
            with self._read_mutex:
                txn = self._lmdb().begin()
        except lmdb.Error as error:
            raise datafile.translate(error, self.directory) from error
        try:
            yield txn.id()
        finally:
            with self._read_mutex:
                txn.abort()

    def write(self, work: Callable[..., ResultT], *args: Any, makes_room: bool = False) -> ResultT:
        """
        Run a function in a write transaction: all that it does, or nothing of it.

        The function is run again after an error only if it can not have been committed. Other
        errors are raised.

        :param work: gets a ``Tx`` and the arguments; no code of a user
        :param makes_room: True if it acknowledges, drops or deletes: then the reserve of a full disk
            is spent for it
        :raise BusyTimeoutError: if another process or thread is in the middle of a write for too long
        :raise FlushError: if a flush failed since the queue was opened
        """
        deadline = 0.0
        while True:  # until the deadline of ``_recover``
            store = self._store or self._require()
            try:
                result = self._write(store, work, args)
            except lmdb.Error as error:
                deadline = deadline or time.monotonic() + self.queue.busy_timeout_secs
                self._recover(store, error, deadline, makes_room)
            except PersipubsubError as error:
                _name_queue(error, self.directory)
                raise
            else:
                if store.page.words[SharedPage.WAITS]:
                    locks.make_way(store.page)
                return result

    def _write(self, store: _Store, work: Callable[..., ResultT], args: tuple[Any, ...]) -> ResultT:
        """Take the write lock and commit."""
        lock = store.write_lock
        lock.refuse_nesting()
        try:
            lock.acquire(self.queue.busy_timeout_secs, store.page)
            if store.lmdb is None or self._is_over:
                raise self._absent_error()
            words = store.page.words
            if words[Journal.FAILED]:
                raise store.journal.failure("an earlier flush failed")
            # What an aborted transaction or a killed process reserved is free again: the holder of
            # the write lock is alone.
            words[Journal.RESERVED] = words[Journal.COMMITTED]
            # The arguments, by position: no parent, a write, views instead of copies.
            try:
                with store.lmdb.begin(None, None, True, True) as txn:
                    result = work(Tx(txn, store.db), *args)
                    txn_id = txn.id()
            except BaseException:
                # LMDB reuses this number for the next transaction; ``Sender._end`` needs to tell
                # them apart.
                self.aborted += 1
                raise
            self.committed = txn_id
            # What was reserved in the journal is in LMDB now.
            words[Journal.COMMITTED] = words[Journal.RESERVED]
            return result
        finally:
            # Not in a function of its own, see ``ExclusiveLock``.
            try:
                lock.release()
            except BaseException:
                lock.release()
                raise

    def copy(self, descriptor: int) -> None:
        """Write a compact copy of a snapshot of LMDB's file. No process waits for it."""
        # copyfd does not notice a map that another process enlarged; a read does, and maps it
        # anew.
        self.read(lambda tx: None)
        try:
            self._lmdb().copyfd(descriptor, compact=True)
        except lmdb.Error as error:
            raise datafile.translate(error, self.directory) from error

    def write_state(self, txn_id: int = 0) -> None:
        """
        Write a state record and flush it; what was committed then survives a power failure.

        :param txn_id: if given: nothing is done if a state record goes that far
        """
        try:
            self.journal.write_state(self._oldest_id_ns(self.now_ns()), txn_id)
        except DiskFullError:
            # After a state record the journal lets go of segments, which gives room.
            if not files.spend_reserve(self.directory):
                raise
            self.journal.write_state(self._oldest_id_ns(self.now_ns()), txn_id)

    def check_readers(self) -> int:
        """Free the slots of dead processes in LMDB's table of readers."""
        store = self._require()
        with self._read_mutex:
            return 0 if store.lmdb is None else store.lmdb.reader_check()

    def _free_room(self, error: PersipubsubError) -> bool:
        """Free room for a transaction that makes room itself; return False if that can not help."""
        if not isinstance(error, DiskFullError):
            return False
        # Pages stay in use for readers that were killed, until their slots are freed.
        if self.check_readers():
            return True
        if isinstance(error, MapFullError):
            self.check_stuck_readers()
            return False
        return files.spend_reserve(self.directory)

    def check_stuck_readers(self) -> None:
        """
        Look for readers that keep the pages of a full map: dropping messages would give none back.

        :raise DiskFullError: if there are any
        """
        stuck = []
        environment = self._lmdb()
        with self._read_mutex:
            last = environment.info()["last_txnid"]
            # A header, then a line for each: process, thread, transaction or "-".
            for line in environment.readers().splitlines()[1:]:
                process_id, _, txn_id = line.split()
                if txn_id.isdigit() and int(txn_id) < last:
                    stuck.append(process_id)
        if stuck:
            raise DiskFullError(
                f"Expected free pages in the queue {self.directory} (max_db_size_bytes), but got: "
                f"none, since process {', '.join(stuck)} is in the middle of a read. It may be "
                "stopped; let it go on, or end it.")

    def _oldest_id_ns(self, now_ns: int) -> int:
        """Time of the oldest id that is to be remembered."""
        return now_ns - int(self.queue.once_window_secs * 1e9)

    # The background thread

    def _run(self, store: _Store) -> None:
        """Write state records as long as something changes, and look after the store."""
        while not store.is_stopped.wait(self.queue.checkpoint_secs):  # until the close
            try:
                self._lmdb()  # opened again if that failed before
                with self._read_mutex:
                    if store.lmdb is None:
                        continue
                    txn_id = store.lmdb.info()["last_txnid"]
                    store.lmdb.reader_check()
                self.write_state(txn_id)
                # Sends delete, too. If nobody sends, only this lets the journal release segments.
                self.delete_finished(self.now_ns(), most_chunks=_MOST_CHUNKS)
                files.keep_reserve(self.directory)
            except (PersipubsubError, lmdb.Error, OSError) as error:
                now = time.monotonic()
                if not store.is_stopped.is_set() and now >= self._warned_at + _WARNING_SECS:
                    self._warned_at = now
                    _LOGGER.warning("The background work on the queue %s failed: %s",
                                    self.directory, error)

    def delete_finished(self,
                        now_ns: int,
                        keeps_retained: bool = True,
                        most_chunks: int = sys.maxsize) -> None:
        """
        Delete finished messages and old ids, in many short transactions.

        :param keeps_retained: False to delete also what ``retain_secs`` keeps, and the last block
        """
        oldest_id_ns = self._oldest_id_ns(now_ns)
        retained_ns = self.retained_ns(now_ns) if keeps_retained else log.RETAINS_NOTHING_NS
        for _ in range(most_chunks):
            # If there is one, the write deletes one: both see the same low watermark, or a later one.
            if not self.read(retention.is_any_finished, oldest_id_ns, retained_ns):
                break
            self.write(retention.delete_finished, oldest_id_ns, retained_ns, makes_room=True)
        if not keeps_retained:
            self.write(retention.empty_last, makes_room=True)

    def retained_ns(self, now_ns: int) -> int:
        """Tell since when messages stay although they are finished."""
        retain_secs = self.queue.retain_secs
        return now_ns - int(retain_secs * 1e9) if retain_secs else log.RETAINS_NOTHING_NS

    # Trouble

    def _recover(self,
                 store: _Store,
                 error: lmdb.Error,
                 deadline: float,
                 makes_room: bool = False) -> None:
        """
        Prepare to repeat a transaction that failed, or raise the error of this library.

        :param deadline: ``busy_timeout_secs`` after the first failure, on the monotonic clock. What
            is done here mostly helps at once; but other processes may undo it again and again: they
            raise the limit, fill the disk, or die as readers.
        """
        translated = datafile.translate(error, self.directory, self.queue.max_db_size_bytes)
        if time.monotonic() >= deadline:
            raise translated from error
        if isinstance(error, lmdb.MapResizedError):
            # Another process raised max_db_size_bytes: map as much as it does.
            with store.write_lock.mutex, self._read_mutex:
                if store.lmdb is not None:
                    store.lmdb.set_mapsize(0)
        elif isinstance(error, lmdb.ReadersFullError):
            # Free the slots of killed processes; if there are none, wait until a live one ends its
            # read.
            if self.check_readers() == 0:
                time.sleep(_SLOT_PAUSE_SECS)
        elif isinstance(error, lmdb.PanicError) and not self._is_over:
            self._open_again(store)
        elif not (makes_room and self._free_room(translated)):
            raise translated from error

    def _open_again(self, store: _Store) -> None:
        """Open LMDB again: since the disk had no room for a meta page, it refuses to work."""
        try:
            # In the order of ``locks``: what fails here leaves LMDB as it is, for the next call.
            with store.write_lock.held(self.queue.busy_timeout_secs), self._read_mutex:
                if self._is_over:
                    raise self._closed_error()
                refusing, store.lmdb = store.lmdb, None
                if refusing is not None:
                    refusing.close()
                self._map(store, time.monotonic() + self.queue.busy_timeout_secs)
        except ClosedError:
            raise
        except PersipubsubError as error:
            raise type(
                error
            )(f"Expected to open the queue {self.directory} again after a write to the disk "
              f"failed (no room for a meta page of LMDB), but got: {error}. Make room on the disk "
              "and look at it; the next call opens the queue again.") from error

    def _absent_error(self) -> Exception:
        """Describe why LMDB is not open: closed, or a call before could not open it again."""
        return self._closed_error() if self._is_over else lmdb.PanicError("it was not opened again")

    def _closed_error(self) -> ClosedError:
        """Describe an environment that was closed."""
        return ClosedError(
            f"Expected the queue {self.directory} to be open, but got: it was closed")

    def _require(self) -> _Store:
        """Return what is open; open it again in a forked child."""
        store = self._store
        if store is not None:
            return store
        with REGISTRY.lock:
            if self._store is None:
                if self._is_over or self.users == 0:
                    raise self._closed_error()
                self.open()
            assert self._store is not None
            return self._store

    # Opening

    def open(self, renews_journal: bool = False) -> None:
        """
        Open the store; hold the registry's lock.

        :param renews_journal: True to make the journal anew from the store
        """
        path = os.path.join(self.directory, files.DATA)
        if not os.path.lexists(os.path.join(self.directory, files.JOURNAL_LOCK)):
            # A store without this file is of another program, or of version 1. It is refused before
            # anything is made beside it.
            datafile.check_pages(path)
            with datafile.opened(path):
                pass
        with self._opening():
            store = _Store(self.directory, self.read, self.queue.busy_timeout_secs)
            try:
                store.users.share()
                # A process that was killed while it made a store has left this file.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path + ".new")
                if files.read_mark(self.directory) in (None, files.boot_id()):
                    if datafile.check_metas(path) and store.users.is_alone():
                        datafile.check_pages(path)
                else:
                    self._rebuild(store, path)
                    self.is_read_only = False
                datafile.reserve_lock_file(self.directory, self.queue.max_reader_num,
                                           store.users.is_alone)
                self._open_lmdb(store)
                self._use(store)
                self.queue = self.read(meta.read_settings)
                self.clock_offset_ns = self.read(meta.find_clock)
                if not self.is_read_only:
                    self._begin_work(store, renews_journal)
            except BaseException:
                self._use(None)
                store.close()
                raise

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        """Keep other processes from opening and closing the queue."""
        with locks.open_lock(self.directory, self.queue.busy_timeout_secs), files.translated(
                path=self.directory, doing="open the queue"):
            yield

    def _use(self, store: _Store | None) -> None:
        """Work with what is open, or with nothing."""
        self._store = store
        for name in _PARTS:
            self.__dict__.pop(name, None)
            if store is not None:
                setattr(self, name, getattr(store, name))

    def begin_work(self) -> None:
        """Switch from read-only to read-write; hold the registry's lock."""
        if self.is_read_only:
            with self._opening():
                self._begin_work(self._require(), renews_journal=False)

    def _begin_work(self, store: _Store, renews_journal: bool) -> None:
        """Make the store ready to be written to; hold the open lock."""
        header = self.read(meta.read_header, self.directory)
        mark = files.read_mark(self.directory)
        is_shared = mark == files.boot_id()
        # With the mark of another boot, ``open`` has rebuilt the store a moment ago. The last segment
        # is not used any more: a torn record may be followed by a whole one from before the failure,
        # which a new record in the gap would make look valid.
        renews_journal |= not is_shared and mark is not None
        if renews_journal or not store.journal.open(header.journal_id, is_shared,
                                                    self.read(_end_of_log)):
            # Any process may be the first one that opens a store that was created, not only its creator:
            # a store in which nothing ever was has no journal yet, and that is no reason to warn.
            is_new = not header.next_ordinal and self.read(_end_of_log) == log.EMPTY.next_number
            if not renews_journal and not is_shared and not is_new:
                _LOGGER.warning(
                    "The journal of the queue %s is not the one of its store, which was left cleanly. "
                    "It is made anew from the store.", self.directory)
            store.journal.restart(header.journal_id, self._oldest_id_ns(self.now_ns()))
        # A process may have been killed after it changed names and before it flushed them.
        files.flush_directory(self.directory)
        files.mark_running(self.directory)
        if header.boot_id != files.boot_id():
            self.write(meta.keep_clock, self.clock_offset_ns, makes_room=True)
        files.keep_reserve(self.directory)
        if is_shared and store.users.is_alone():
            # The last process was killed. With ``os``, nothing has flushed what it sent since then. A
            # full disk is no reason not to open: the background thread tries again.
            with contextlib.suppress(DiskFullError):
                self.write_state()
        self.is_read_only = False
        # Each process has the thread, even if it does not write: the process that wrote may have
        # been killed.
        thread = threading.Thread(target=self._run,
                                  args=(store, ),
                                  name="persipubsub-journal",
                                  daemon=True)
        # The start fails without memory, or at the end of the interpreter. Then other processes
        # write state records, and the close writes one.
        with contextlib.suppress(RuntimeError):
            thread.start()
            store.thread = thread

    def _open_lmdb(self, store: _Store) -> None:
        """Open LMDB."""
        deadline = time.monotonic() + self.queue.busy_timeout_secs
        # py-lmdb opens databases in a write transaction, and waits for it with the interpreter's lock
        # held: without our lock, a process stopped in the middle of a commit would freeze us.
        with store.write_lock.held(self.queue.busy_timeout_secs):
            self._map(store, deadline)

    def _map(self, store: _Store, deadline: float) -> None:
        """Open LMDB while the write lock is held."""
        store.lmdb, store.db = datafile.open_shared(self.directory, self._map_size(self.queue),
                                                    self.queue.max_reader_num, deadline)

    def _map_size(self, queue: config.Queue) -> int:
        """Map more than ``max_db_size_bytes``, as room to acknowledge, to drop and to delete."""
        size = 0
        # If the limit was lowered below the size of the file, LMDB would map only the file as it
        # is, which leaves no room for deletions.
        for needed in (queue.max_db_size_bytes, self.file_bytes()):
            if needed > size:
                size = needed + min(1 << 26, max(1 << 20, needed // 8))
        return size

    def use_settings(self, queue: config.Queue, adopts_settings: bool) -> None:
        """
        Store the settings of a configuration, or name those that differ from the stored ones.

        :param queue: settings in the configuration
        :param adopts_settings: True to store them
        """
        # First of all, since a full store has no room for new settings.
        self._enlarge(queue if adopts_settings else self.queue)
        differing = meta.differences(queue, self.read(meta.read_settings))
        if adopts_settings:
            if differing:
                self.write(meta.write_settings, queue)
                self.write_state()
            self.queue = queue
        elif differing and not self.is_read_only:
            meta.warn_of_differences(
                self.directory, ", ".join(f"{key} is {there!r}, not {here!r}"
                                          for key, (here, there) in differing.items()))

    def _enlarge(self, queue: config.Queue) -> None:
        """Map as much as settings ask for, if that is more than now."""
        store, size = self._require(), self._map_size(queue)
        with store.write_lock.mutex, self._read_mutex:
            if store.lmdb is not None and size > store.lmdb.info()["map_size"]:
                store.lmdb.set_mapsize(size)

    def _rebuild(self, store: _Store, path: str) -> None:
        """Build the store anew from the journal, after a power failure; it may be repeated."""
        begun = time.monotonic()
        size = self._map_size(self.queue) + 2 * store.journal.bytes_on_disk() + (1 << 26)
        with files.replacing(path) as (made, file), datafile.opened(made, size,
                                                                    is_new=True) as (_, begin):
            # Flushed bit by bit: processes that open the queue meanwhile wait as long as they see the
            # file change (``locks.open_lock``). One flush at the end may take longer than they wait.
            store.journal.replay(begin, lambda: os.fsync(file))
            with begin() as tx:
                meta.skip_numbers(tx, _SKIPPED_NUMBERS)
        _LOGGER.warning(
            "The machine went down while the queue %s was in use. It was rebuilt from its journal in "
            "%.1f seconds. Messages may come again whose acknowledgement was less than %s second(s) "
            "old%s.", self.directory,
            time.monotonic() - begun, self.queue.checkpoint_secs,
            "" if self.queue.durability is config.Durability.FSYNC else
            ", and messages that were sent in that time may be lost")

    # Closing

    def close(self, lock_secs: float = -1) -> None:
        """
        Close the store, so that nothing of this process is lost. Hold the registry's lock.

        :param lock_secs: how long to wait for threads that are still at work; -1: for ever
        """
        store = self._store
        for drop_log in self.drop_logs:
            drop_log.report()
        if store is None:
            return
        store.is_stopped.set()
        # From here on this process writes nothing: a clean close says that the last state record
        # holds everything.
        write_mutex = store.write_lock.mutex
        write_mutex.acquire(timeout=lock_secs)
        self._is_over = True
        locks.release(write_mutex)
        store.notifier.close()
        if store.thread is not None and store.thread is not threading.current_thread():
            store.thread.join(None if lock_secs < 0 else lock_secs)
        # The open lock is kept until the lock of the users is given back: of two processes that close,
        # each would take the other one for a user, and the mark of a running store would stay.
        # Rejected: to give that lock back before LMDB is closed, as ``compact`` may replace LMDB's file
        # then.
        with contextlib.ExitStack() as opening:
            try:
                # A directory that is gone, or may not be written to, is no reason to keep the files
                # open. The mark of a running store stays then.
                with files.suppress(PersipubsubError, OSError, lmdb.Error):
                    if not self.is_read_only and store.lmdb is not None:
                        opening.enter_context(
                            locks.open_lock(self.directory, self.queue.busy_timeout_secs))
                        self._leave(store)
            finally:
                if (write_mutex.acquire(timeout=lock_secs)
                        and self._read_mutex.acquire(timeout=lock_secs)):
                    self._use(None)
                    store.close()
                locks.release(self._read_mutex)
                locks.release(write_mutex)

    def _leave(self, store: _Store) -> None:
        """Leave the journal and LMDB's file as the next process expects them; hold the open lock."""
        is_last = store.users.is_alone() and not store.journal.has_failed
        assert store.lmdb is not None
        # Written even if other processes have the queue open: if these only look, none of them
        # records what was acknowledged since the last state record.
        store.journal.write_state(self._oldest_id_ns(self.now_ns()),
                                  0 if is_last else store.lmdb.info()["last_txnid"])
        if is_last:
            store.lmdb.sync(True)
            files.mark_clean(self.directory)

    def forget_parent(self) -> None:
        """Let go of what belongs to the parent, in a forked child."""
        store = self._store
        self._use(None)
        if store is not None:
            store.close_locks()
            # Never collected: that would close files that are not of this process any more.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))
        for member in self.members:
            member.forget_parent()
        self.process_id = os.getpid()
        self._make_locks()


class _Registry:
    """The open environments of this process."""

    def __init__(self) -> None:
        """Initialize with nothing open."""
        # Guards the registry, and with it opening and closing; the first lock to be taken.
        self.lock = threading.RLock()
        self.environments: dict[files.Identity, Environment] = {}

    def leave(self) -> None:
        """Close at the end of the interpreter what is still open."""
        if self.lock.acquire(timeout=_LEAVE_SECS):
            for environment in list(self.environments.values()):
                environment.close(_LEAVE_SECS)
            self.lock.release()

    def forget_parent(self) -> None:
        """Begin anew in a forked child."""
        # First of all: until then, this process holds locks of its parent.
        has_inherited = locks.forget_parent()
        self.lock = threading.RLock()
        for environment in self.environments.values():
            environment.forget_parent()
        # Not if ``environments`` says so: it does not have those that another thread of the parent is
        # opening or closing.
        if has_inherited:
            lmdb_private.forget_open_files()


REGISTRY: Final = _Registry()
atexit.register(REGISTRY.leave)
os.register_at_fork(after_in_child=REGISTRY.forget_parent)


def acquire(directory: str,
            queue: config.Queue,
            is_read_only: bool = False,
            adopts_settings: bool = False,
            renews_journal: bool = False) -> Environment:
    """
    Open a store, or share it if this process has it open already.

    :param directory: of the queue
    :param queue: its settings in the configuration
    :param is_read_only: True only to look, for a moment
    :param adopts_settings: True to store the settings in the queue
    :param renews_journal: True to make the journal anew from the store, which no process has open
    """
    with REGISTRY.lock:
        environment = REGISTRY.environments.get(files.identify_store(directory))
        if environment is None:
            environment = Environment(directory, queue, is_read_only)
            environment.open(renews_journal)
            # A rebuild may have put another file in the place.
            environment.identity = files.identify_store(directory)
            REGISTRY.environments[environment.identity] = environment
        environment.users += 1
        try:
            if not is_read_only:
                environment.begin_work()
            environment.use_settings(queue, adopts_settings)
        except BaseException:
            release(environment)
            raise
        return environment


def release(environment: Environment) -> None:
    """Give back one use of an environment; the last one closes it."""
    with REGISTRY.lock:
        environment.users -= 1
        if environment.users == 0:
            del REGISTRY.environments[environment.identity]
            environment.close()


@contextlib.contextmanager
def opened(directory: str, queue: config.Queue, **how: bool) -> Iterator[Environment]:
    """Have a store open in a ``with`` block; the options are those of :py:func:`acquire`."""
    environment = acquire(directory, queue, **how)
    try:
        yield environment
    finally:
        release(environment)


def create(directory: str, queue: config.Queue) -> None:
    """
    Create a store unless it is there; the first process that opens it makes its journal.

    :raise FormatError: if the directory holds something else
    """
    path = os.path.join(directory, files.DATA)
    with REGISTRY.lock:
        if files.prepare_directory(directory):
            return
        with locks.open_lock(directory,
                             queue.busy_timeout_secs), files.translated(path=directory,
                                                                        doing="create a queue in"):
            if os.path.lexists(path):
                return
            header = fmt.Header(format=fmt.FORMAT,
                                flags=0,
                                clock_offset_ns=time.time_ns() - files.ticks_ns(),
                                boot_id=files.boot_id(),
                                next_ordinal=0,
                                journal_id=os.urandom(16))
            with files.replacing(path) as (made, _):
                with datafile.opened(made, 1 << 20, is_new=True) as (_, begin), begin() as tx:
                    meta.write_header(tx, header)
                    meta.write_settings(tx, queue)
                # If the data file of a queue was removed, its journal must not be taken for that of
                # this queue.
                remove_journal(directory)
                files.mark_clean(directory)
                # A store without these files is taken for one of another program, or of version 1.
                for lock in (files.USERS, files.JOURNAL_LOCK):
                    os.close(files.open_file(os.path.join(directory, lock)))


def _end_of_log(tx: Tx) -> int:
    """Read the next number."""
    return log.read_end(tx.cursor()).next_number


def _name_queue(error: PersipubsubError, directory: str) -> None:
    """Add the queue to the text of an error of a function that does not know the queue."""
    text = str(error)
    if directory not in text:
        error.args = (f"{text.removesuffix('.')}; queue {directory}", *error.args[1:])
