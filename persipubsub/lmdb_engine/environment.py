"""
One open store of this process: opening, transactions, the background thread, forks, closing.

LMDB's file locks belong to the process: opening the same files twice and closing one of the two drops
the locks of the other. One registry, by device and inode of the data file, therefore hands out a
single environment for each store and counts its users.

**Fork.** In the hook after a fork, and never later, the child closes the lock files that it
inherited, since they hold the parent's locks, and makes new thread locks. It keeps the inherited LMDB
environment for ever without touching it, and opens its own at the first use.
"""

import atexit
import contextlib
import ctypes
import errno
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, Final, Protocol, TypeVar

import lmdb
import lmdb._envid
import msgspec
import msgspec.structs

import persipubsub.config
import persipubsub.errors
from persipubsub.drop_log import DropLog
from persipubsub.lmdb_engine import files
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import locks, log, retention
from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.format import Databases, Tx
from persipubsub.lmdb_engine.journal import Journal
from persipubsub.lmdb_engine.notifier import Notifier

ResultT = TypeVar("ResultT")

_LOGGER = logging.getLogger("persipubsub.queue")

#: Sub-databases of a store, and some room for those of later versions. ``max_db_num`` is not used for
#: it: LMDB copies the handles at every transaction (1,024 slow a read transaction from 0.6 to 1.1
#: microseconds).
_MAX_DBS: Final = 16

#: LMDB's lock file: the part in front of the second slot of the table of readers, and a slot.
_LOCK_HEADER_BYTES: Final = 192
_READER_BYTES: Final = 64

#: Numbers skip this far after a power failure: more can hardly have been sent in the last second,
#: and the numbers last for 65,536 power failures.
_SKIPPED_NUMBERS: Final = 1 << 32

#: A read that finds no slot in the table of readers tries again after this time, in seconds.
_SLOT_PAUSE_SECS: Final = 0.001

#: The reserve is taken again when there is room for it; time between two looks, in seconds.
_RESERVE_SECS: Final = 1.0

#: Blocks that the background thread deletes in a transaction, and its most transactions in a row.
_CHUNK_BLOCKS: Final = 256
_MOST_CHUNKS: Final = 16

#: The end of the interpreter waits for a thread that is still at work, in seconds.
_LEAVE_SECS: Final = 5.0

#: One warning of the background thread in so many seconds.
_WARNING_SECS: Final = 60.0

#: Keys of a queue in the configuration that are not settings of the store.
_NOT_STORED: Final = ("path", "subscribers")

#: Directories and differences of settings that were warned of: once in a process.
_TOLD_DIFFERENCES: Final[set[tuple[str, str]]] = set()


class MapFullError(persipubsub.errors.DiskFullError):
    """Report that the map is full, as opposed to the disk: dropping messages makes room."""


class _Store:
    """What is open of a store."""

    def __init__(self, directory: str, read: Callable[..., Any], busy_timeout_secs: float) -> None:
        """Open all but LMDB."""
        self.lmdb: lmdb.Environment | None = None
        self.db: Databases
        self.page = SharedPage(directory)
        self.write_lock = locks.LockFile(os.path.join(directory, files.WRITE_LOCK))
        self.users = locks.LockFile(os.path.join(directory, files.USERS))
        self.journal = Journal(directory, self.page, read, busy_timeout_secs)
        self.notifier = Notifier(self.page)
        self.is_stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def close_locks(self) -> None:
        """Close the files that are locked."""
        self.write_lock.close()
        self.users.close()
        self.journal.close()


class Member(Protocol):
    """A part of an open queue that has locks or files."""

    def forget_parent(self) -> None:
        """Begin anew in a forked child."""


class Environment:  # pylint: disable=too-many-instance-attributes
    """An open store, for all threads of the process. See ``locks`` for the order of its locks."""

    def __init__(self, directory: str, queue: persipubsub.config.Queue, is_read_only: bool) -> None:
        """Initialize without opening anything; see :py:func:`acquire`."""
        self.directory = directory
        #: Settings of the queue: those that are stored in it, once it is open.
        self.queue = queue
        self.is_read_only = is_read_only
        self.users = 0
        self.process_id = os.getpid()
        #: Numbers that this process has claimed, by the ordinal of the subscriber.
        self.held: dict[int, locks.Held] = {}
        #: Parts of the open queues that have locks or files: to be begun anew in a forked child.
        self.members: list[Member] = []
        #: Told to report before the environment is closed, and at the interpreter's end.
        self.drop_logs: list[DropLog] = []
        self.clock_offset_ns = 0
        # Set while the store is open, see __getattr__.
        self.page: SharedPage
        self.journal: Journal
        self.notifier: Notifier
        self._store: _Store | None = None
        self._is_over = False
        self._reserve_due: float | None = None
        self._warned_at = -_WARNING_SECS
        self._make_locks()

    def _make_locks(self) -> None:
        """Create the thread locks."""
        # Re-entrant, as they know their owner: a finally clause releases them without knowing whether
        # an exception of a signal handler came before or after they were taken.
        self._write_mutex = threading.RLock()
        #: LMDB's number of the last transaction that this process committed; under the write lock.
        self.committed = 0
        #: How many of its transactions were not committed; under the write lock.
        self.aborted = 0
        self._read_mutex = threading.RLock()
        self._is_writing = False

    # Figures

    def now_ns(self) -> int:
        """Read the queue's clock: it never goes back, nobody sets it, and it survives restarts."""
        # Not by a call of ticks_ns: this is read for each message.
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) + self.clock_offset_ns

    def __getattr__(self, name: str) -> Any:
        """Open the store again in a forked child, where it has no journal, notifier or page yet."""
        if name in ("journal", "notifier", "page"):
            self._require()
            return self.__dict__[name]
        raise AttributeError(name)

    def _engine(self) -> lmdb.Environment:
        """Return LMDB's environment."""
        environment = self._require().lmdb
        assert environment is not None
        return environment

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
        while True:
            store = self._store or self._require()
            try:
                with self._read_mutex:
                    if store.lmdb is None:
                        raise self._closed_error()
                    with store.lmdb.begin(None, None, False, True) as txn:
                        return work(Tx(txn, store.db), *args)
            except lmdb.MapResizedError:
                self._follow_map_size(store)
            except lmdb.ReadersFullError as error:
                deadline = deadline or time.monotonic() + self.queue.busy_timeout_secs
                # Those of processes that were killed are freed; the living finish.
                if self.check_readers() == 0:
                    time.sleep(_SLOT_PAUSE_SECS)
                    if time.monotonic() >= deadline:
                        raise translate(error, self.directory) from error
            except lmdb.Error as error:
                if not self._recover(store, error):
                    raise translate(error, self.directory) from error
            except persipubsub.errors.PersipubsubError as error:
                _name_queue(error, self.directory)
                raise

    def write(self, work: Callable[..., ResultT], *args: Any, makes_room: bool = False) -> ResultT:
        """
        Run a function in a write transaction: all that it does, or nothing of it.

        Whatever ends it is raised, and nothing is run again that could have been committed.

        :param work: gets a ``Tx`` and the arguments; no code of a user
        :param makes_room: True if it acknowledges, drops or deletes: then the reserve of a full disk
            is spent for it
        :raise BusyTimeoutError: if another process or thread is in the middle of a write for too long
        :raise FlushError: if a flush failed since the queue was opened
        """
        while True:
            store = self._store or self._require()
            try:
                result = self._write(store, work, args)
            except lmdb.MapResizedError:
                self._follow_map_size(store)
            except lmdb.Error as error:
                translated = translate(error, self.directory)
                if not (makes_room and self._make_room(translated) or self._recover(store, error)):
                    raise translated from error
            except persipubsub.errors.PersipubsubError as error:
                _name_queue(error, self.directory)
                raise
            else:
                if store.page.words[SharedPage.WAITS]:
                    locks.make_way(store.page)
                return result

    def _write(self, store: _Store, work: Callable[..., ResultT], args: tuple[Any, ...]) -> ResultT:
        """Take the write lock and commit."""
        is_owner = False
        try:
            timeout = self.queue.busy_timeout_secs
            if not self._write_mutex.acquire(timeout=timeout):
                raise self._busy_error()
            if self._is_writing:
                raise persipubsub.errors.StoreError(
                    f"Expected to write to the queue {self.directory} when this thread is not in the "
                    "middle of a write, but got: a signal handler that interrupted one. Set a flag "
                    "there, and write later.")
            is_owner = self._is_writing = True
            # One attempt without a deadline spares the plain path the clock.
            if not store.write_lock.try_lock() and not store.write_lock.lock(
                    time.monotonic() + timeout, store.page):
                raise self._busy_error()
            if store.lmdb is None or self._is_over:
                raise self._closed_error()
            words = store.page.words
            if words[Journal.FAILED]:
                raise store.journal.failure("an earlier flush failed")
            # By position: no parent, a write, views instead of copies.
            try:
                with store.lmdb.begin(None, None, True, True) as txn:
                    result = work(Tx(txn, store.db), *args)
                    txn_id = txn.id()
            except BaseException:
                # The next transaction has the same number.
                self.aborted += 1
                raise
            self.committed = txn_id
            # What was reserved in the journal is in LMDB now.
            words[Journal.COMMITTED] = words[Journal.RESERVED]
            return result
        finally:
            try:
                if is_owner:
                    self._is_writing = False
                    store.write_lock.unlock()
                self._write_mutex.release()
            except RuntimeError:
                pass  # an exception of a signal handler came before it was taken
            except BaseException:
                # A signal handler raised in the middle of this; the others wait for these locks.
                if is_owner:
                    self._is_writing = False
                    store.write_lock.unlock()
                locks.release(self._write_mutex)
                raise

    def copy(self, descriptor: int) -> None:
        """Write a compact copy of a snapshot of LMDB's file. It holds up nobody."""
        # Maps as much as other processes do.
        self.read(lambda tx: None)
        try:
            self._engine().copyfd(descriptor, compact=True)
        except lmdb.Error as error:
            raise translate(error, self.directory) from error

    def secure_now(self, txn_id: int = 0) -> None:
        """
        Let all that was committed survive a power failure, whatever the durability.

        :param txn_id: if given: nothing is done if a state record goes that far
        """
        try:
            self.journal.write_state(self._oldest_id_ns(), txn_id)
        except persipubsub.errors.DiskFullError:
            # With it the journal lets go of segments, which gives room.
            if not self._spend_reserve():
                raise
            self.journal.write_state(self._oldest_id_ns(), txn_id)

    def check_readers(self) -> int:
        """Free the slots of dead processes in LMDB's table of readers."""
        store = self._require()
        with self._read_mutex:
            return 0 if store.lmdb is None else store.lmdb.reader_check()

    def _make_room(self, error: persipubsub.errors.PersipubsubError) -> bool:
        """Make room for what makes room itself; return False if the error is another one, or lasts."""
        if not isinstance(error, persipubsub.errors.DiskFullError):
            return False
        # Readers that were killed keep pages that could be used again.
        if self.check_readers():
            return True
        if isinstance(error, MapFullError):
            self.check_stuck_readers()
            return False
        return self._spend_reserve()

    def check_stuck_readers(self) -> None:
        """
        Look for readers that keep the pages of a full map: dropping messages would give none back.

        :raise DiskFullError: if there are any
        """
        stuck = self.stuck_readers()
        if stuck:
            raise persipubsub.errors.DiskFullError(
                f"Expected free pages in the queue {self.directory} (max_db_size_bytes), but got: "
                f"none, since process {', '.join(map(str, stuck))} is in the middle of a read. It may "
                "be stopped; let it go on, or end it.")

    def stuck_readers(self) -> list[int]:
        """List the processes that stand in the middle of an old read, and keep pages from reuse."""
        found = []
        with self._read_mutex:
            last = self._engine().info()["last_txnid"]
            # A header, then a line for each: process, thread, transaction or "-".
            for line in self._engine().readers().splitlines()[1:]:
                process_id, _, txn_id = line.split()
                if txn_id.isdigit() and int(txn_id) < last:
                    found.append(int(process_id))
        return found

    def _oldest_id_ns(self) -> int:
        """Time of the oldest id that is to be remembered."""
        return self.now_ns() - int(self.queue.once_window_secs * 1e9)

    # The background thread

    def _start_thread(self, store: _Store) -> None:
        """
        Let state records be written as long as the store is open.

        In each process, whether it writes or not: the one that wrote may have been killed.
        """
        thread = threading.Thread(target=self._run,
                                  args=(store, ),
                                  name="persipubsub-journal",
                                  daemon=True)
        # No memory, or the end of the interpreter: other processes do it, and the close.
        with contextlib.suppress(RuntimeError):
            thread.start()
            store.thread = thread

    def _run(self, store: _Store) -> None:
        """Write state records as long as something changes, and look after the store."""
        while not store.is_stopped.wait(self.queue.checkpoint_secs):
            try:
                with self._read_mutex:
                    if store.lmdb is None:
                        return
                    txn_id = store.lmdb.info()["last_txnid"]
                    store.lmdb.reader_check()
                self.secure_now(txn_id)
                self._delete_finished(store)
                if self._reserve_due is not None and time.monotonic() >= self._reserve_due:
                    is_kept = files.keep_reserve(self.directory)
                    self._reserve_due = None if is_kept else time.monotonic() + _RESERVE_SECS
            except (persipubsub.errors.PersipubsubError, lmdb.Error, OSError) as error:
                now = time.monotonic()
                if not store.is_stopped.is_set() and now >= self._warned_at + _WARNING_SECS:
                    self._warned_at = now
                    _LOGGER.warning(
                        "The state of the queue %s could not be written to its journal: %s",
                        self.directory, error)

    def _delete_finished(self, store: _Store) -> None:
        """Delete what is finished: without sends, which do it otherwise, the journal would keep it."""
        retain_secs = self.queue.retain_secs
        retained_ns = (self.now_ns() -
                       int(retain_secs * 1e9) if retain_secs else log.RETAINS_NOTHING_NS)
        for _ in range(_MOST_CHUNKS):
            if store.is_stopped.is_set() or not self.read(retention.is_any_finished, retained_ns):
                break
            self.write(retention.delete_finished, _CHUNK_BLOCKS, retained_ns, makes_room=True)

    # Trouble

    def _follow_map_size(self, store: _Store) -> None:
        """Map as much as the process that raised ``max_db_size_bytes``."""
        with self._write_mutex, self._read_mutex:
            if store.lmdb is not None:
                store.lmdb.set_mapsize(0)

    def _recover(self, store: _Store, error: lmdb.Error) -> bool:
        """Open LMDB again if it refuses to work since the disk had no room for a meta page."""
        if not isinstance(error, lmdb.PanicError) or self._is_over:
            return False
        with self._write_mutex, self._read_mutex:
            if store.lmdb is not None:
                store.lmdb.close()
                store.lmdb = None
                self._open_lmdb(store, self.queue.max_db_size_bytes)
        return True

    def _spend_reserve(self) -> bool:
        """Give the reserve back to the disk."""
        self._reserve_due = time.monotonic() + _RESERVE_SECS
        return files.spend_reserve(self.directory)

    def _busy_error(self) -> persipubsub.errors.BusyTimeoutError:
        """Describe a wait that was too long."""
        return persipubsub.errors.BusyTimeoutError(
            f"Expected to write to the queue {self.directory} within {self.queue.busy_timeout_secs} "
            "seconds (busy_timeout_secs), but got: another process is in the middle of a write. It "
            "may be stopped, or the disk may hang.")

    def _closed_error(self) -> persipubsub.errors.ClosedError:
        """Describe an environment that was closed."""
        return persipubsub.errors.ClosedError(
            f"Expected the queue {self.directory} to be open, but got: it was closed")

    def _require(self) -> _Store:
        """Return what is open; open it again in a forked child."""
        store = self._store
        if store is not None:
            return store
        with _REGISTRY.lock:
            if self._store is None:
                if self._is_over or self.users == 0:
                    raise self._closed_error()
                self.open()
            assert self._store is not None
            return self._store

    # Opening

    def open(self, adopts_settings: bool = False, renews_journal: bool = False) -> None:
        """
        Open the store; hold the registry's lock.

        :param adopts_settings: True to store the settings of the configuration in the queue
        :param renews_journal: True to make the journal anew from the store
        """
        # Before the lock: its file would be left in the directory of another program.
        self._check_version(os.path.join(self.directory, files.DATA))
        with locks.open_lock(self.directory, self.queue.busy_timeout_secs):
            with files.translated(path=self.directory, doing="open the queue"):
                self._open(adopts_settings, renews_journal)

    def _open(self, adopts_settings: bool, renews_journal: bool) -> None:
        """Open the store; hold the registry's lock and the open lock."""
        path = os.path.join(self.directory, files.DATA)
        store = _Store(self.directory, self.read, self.queue.busy_timeout_secs)
        try:
            store.users.share()
            # Of a process that was killed while it compacted or restored the queue.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + ".new")
            mark = files.read_mark(self.directory)
            is_shared = mark == files.boot_id()
            is_rebuilt = mark is not None and not is_shared
            if is_rebuilt:
                self._rebuild(store)
            elif files.missing_bytes(path) > 0 and store.users.is_alone():
                # It was truncated, or LMDB never wrote its last pages, as the transaction that needed
                # them gave them back.
                verify_pages(path)
            _reserve_lock_file(self.directory, self.queue.max_reader_num, store.users)
            self._open_lmdb(store, self.queue.max_db_size_bytes)
            self._use(store)
            header = self._read_header()
            given = self.queue
            self._adopt(self.stored_settings())
            self.clock_offset_ns = header.clock_offset_ns
            if header.boot_id != files.boot_id():
                self.clock_offset_ns = self.read(_next_clock_offset)
            if self.is_read_only and not is_rebuilt:
                store.journal.open(header.journal_id, is_shared, self.read(_end_of_log))
            else:
                self._begin_work(store, header, is_shared, is_rebuilt, renews_journal)
            self.use_settings(given, adopts_settings)
        except BaseException:
            self._use(None)
            _close(store)
            raise

    def _use(self, store: _Store | None) -> None:
        """Work with what is open, or with nothing."""
        self._store = store
        for name in ("page", "journal", "notifier"):
            if store is None:
                self.__dict__.pop(name, None)
            else:
                setattr(self, name, getattr(store, name))

    def _begin_work(self,
                    store: _Store,
                    header: fmt.Header,
                    is_shared: bool,
                    is_rebuilt: bool = False,
                    renews_journal: bool = False) -> None:
        """Make the store ready to be written to; hold the open lock."""
        if is_rebuilt:
            store.journal.resume(self._oldest_id_ns())
        elif renews_journal or not store.journal.open(header.journal_id, is_shared,
                                                      self.read(_end_of_log)):
            if not renews_journal and not is_shared:
                _LOGGER.warning(
                    "The journal of the queue %s is not the one of its store, which was left cleanly. "
                    "It is made anew from the store.", self.directory)
            store.journal.restart(header.journal_id, self._oldest_id_ns())
        # Names that a process changed but was killed before flushing.
        files.flush_directory(self.directory)
        files.mark_running(self.directory)
        if header.boot_id != files.boot_id():
            self.write(_update_header, self.clock_offset_ns, makes_room=True)
        if self._reserve_due is None:
            files.keep_reserve(self.directory)
        self.is_read_only = False
        self._start_thread(store)

    def begin_work(self) -> None:
        """Switch from read-only to read-write; hold the registry's lock."""
        with locks.open_lock(self.directory, self.queue.busy_timeout_secs):
            store = self._require()
            is_shared = files.read_mark(self.directory) == files.boot_id()
            with files.translated(path=self.directory, doing="open the queue"):
                self._begin_work(store, self._read_header(), is_shared)

    def _check_version(self, path: str) -> None:
        """Refuse the store of another program, or of version 1, before anything is made beside it."""
        if os.path.lexists(os.path.join(self.directory, files.JOURNAL_LOCK)):
            return
        files.missing_bytes(path)
        verify_pages(path)
        try:
            with opened_alone(path) as environment, environment.begin() as txn:
                meta = environment.open_db(fmt.META_DB, txn, create=False)
                fmt.unpack_header(bytes(txn.get(fmt.HEADER_KEY, b"", db=meta)), self.directory)
        except (lmdb.NotFoundError, lmdb.IncompatibleError, lmdb.DbsFullError):
            raise _foreign_error(self.directory) from None
        except lmdb.Error as error:
            raise translate(error, self.directory) from error

    def _open_lmdb(self, store: _Store, max_bytes: int) -> None:
        """Open LMDB; wait a little for a slot if its table of readers is full."""
        timeout = self.queue.busy_timeout_secs
        deadline = time.monotonic() + timeout
        # py-lmdb opens databases in a write transaction, and waits for it with the interpreter's lock
        # held: without our lock, a process stopped in the middle of a commit would freeze us.
        if not store.write_lock.lock(deadline):
            raise self._busy_error()
        environment = None
        size = map_size(max_bytes)
        if self.file_bytes() > size:
            # The limit was lowered. LMDB maps what is there, which leaves no room for deleting it.
            size = map_size(self.file_bytes())
        try:
            while environment is None:
                try:
                    with files.occupied_streams():
                        environment = lmdb.open(
                            os.fsencode(self.directory),
                            map_size=size,
                            max_readers=self.queue.max_reader_num,
                            max_dbs=_MAX_DBS,
                            # A cached read transaction owns a slot of the table of readers, which a
                            # forked child would give back for its parent.
                            max_spare_txns=0,
                            sync=False,
                            metasync=False,
                            mode=files.FILE_MODE,
                            create=False,
                            readahead=False,
                            lib_version=0)
                except lmdb.ReadersFullError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(0.01)
            store.db = Databases(*(environment.open_db(name, create=False)
                                   for name in fmt.DATABASE_NAMES))
            environment.reader_check()
            store.lmdb = environment
        except (lmdb.NotFoundError, lmdb.IncompatibleError, lmdb.DbsFullError):
            raise _foreign_error(self.directory) from None
        except lmdb.Error as error:
            raise translate(error, self.directory) from error
        finally:
            if environment is not None and store.lmdb is None:
                environment.close()
            store.write_lock.unlock()

    def _read_header(self) -> fmt.Header:
        """Read what is true of the whole store."""
        return self.read(lambda tx: fmt.unpack_header(
            bytes(tx.txn.get(fmt.HEADER_KEY, b"", db=tx.db.meta)), self.directory))

    def use_settings(self, queue: persipubsub.config.Queue, adopts_settings: bool) -> None:
        """
        Store the settings of a configuration, or name those that differ from the stored ones.

        :param queue: settings in the configuration
        :param adopts_settings: True to store them
        """
        differing = differences(queue, self.stored_settings())
        if adopts_settings:
            if differing:
                self.write(_put_settings, encode_settings(queue))
                self.secure_now()
            self._adopt(queue)
        elif differing and not self.is_read_only and (self.directory,
                                                      str(differing)) not in _TOLD_DIFFERENCES:
            _TOLD_DIFFERENCES.add((self.directory, str(differing)))
            _LOGGER.warning(
                "The queue %s has other settings than the configuration: %s. It works with the stored "
                "ones; 'persipubsub init' stores those of the configuration.", self.directory,
                ", ".join(f"{key} is {there!r}, not {here!r}"
                          for key, (here, there) in differing.items()))

    def _adopt(self, queue: persipubsub.config.Queue) -> None:
        """Go by other settings, and map as much as they ask for."""
        self.queue = queue
        wanted = map_size(queue.max_db_size_bytes)
        with self._write_mutex, self._read_mutex:
            if wanted > self._engine().info()["map_size"]:
                self._engine().set_mapsize(wanted)

    def stored_settings(self) -> persipubsub.config.Queue:
        """Read the settings that are stored in the queue."""
        found = self.read(lambda tx: bytes(tx.txn.get(fmt.SETTINGS_KEY, b"{}", db=tx.db.meta)))
        return msgspec.json.decode(found, type=_Stored).queue

    def _rebuild(self, store: _Store) -> None:
        """Build the store anew from the journal, after a power failure; it may be repeated."""
        begun = time.monotonic()
        aside = os.path.join(self.directory, files.CREATING)
        size = map_size(
            self.queue.max_db_size_bytes) + 2 * store.journal.bytes_on_disk() + (1 << 26)
        with _created(aside, size) as environment:
            db = Databases(*(environment.open_db(name) for name in fmt.DATABASE_NAMES))

            @contextlib.contextmanager
            def begin() -> Iterator[Tx]:
                with environment.begin(write=True, buffers=True) as txn:
                    yield Tx(txn, db)

            store.journal.replay(begin)
            with begin() as tx:
                _skip_numbers(tx)
            environment.sync(True)
        os.rename(os.path.join(aside, files.DATA), os.path.join(self.directory, files.DATA))
        files.flush_directory(self.directory)
        _remove_aside(aside)
        _LOGGER.warning(
            "The machine went down while the queue %s was in use. It was rebuilt from its journal in "
            "%.1f seconds. Messages may come again whose acknowledgement was less than %s second(s) "
            "old%s.", self.directory,
            time.monotonic() - begun, self.queue.checkpoint_secs,
            "" if self.queue.durability is persipubsub.config.Durability.FSYNC else
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
        # Nothing is written from here on: the mark says that the last state record has it all.
        self._write_mutex.acquire(timeout=lock_secs)
        self._is_over = True
        locks.release(self._write_mutex)
        store.is_stopped.set()
        store.notifier.close()
        if store.thread is not None and store.thread is not threading.current_thread():
            store.thread.join(None if lock_secs < 0 else lock_secs)
        try:
            # A directory that is gone, or may not be written to, is no reason to keep the files open.
            # The mark of a running store stays then.
            with files.suppress(persipubsub.errors.PersipubsubError, OSError, lmdb.Error):
                if not self.is_read_only and store.lmdb is not None:
                    self._leave(store)
        finally:
            if (self._write_mutex.acquire(timeout=lock_secs)
                    and self._read_mutex.acquire(timeout=lock_secs)):
                self._use(None)
                _close(store)
            locks.release(self._read_mutex)
            locks.release(self._write_mutex)

    def _leave(self, store: _Store) -> None:
        """Leave the journal and LMDB's file as they should be found."""
        with locks.open_lock(self.directory, self.queue.busy_timeout_secs):
            is_last = store.users.is_alone() and not store.journal.has_failed
            assert store.lmdb is not None
            # Else perhaps nobody records what was acknowledged since the last state record: the
            # others may have the queue open and do nothing.
            store.journal.write_state(self._oldest_id_ns(),
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
        for member in (*self.members, *self.drop_logs):
            member.forget_parent()
        self.held.clear()
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
        self.lock = threading.RLock()
        for environment in self.environments.values():
            environment.forget_parent()
        if self.environments:
            _let_files_be_opened_again()


def _let_files_be_opened_again() -> None:
    """
    Let py-lmdb open files in a forked child that its parent has open.

    It refuses to open files, known by device and inode, twice in a process, and counts what a child
    inherits. Closing that was rejected: it waits for threads that only the parent has.
    """
    keys = lmdb._envid.env_keys  # pylint: disable=protected-access
    process_id = os.getpid()

    def keys_of_child(path: bytes, subdir: int) -> tuple[object, ...]:
        return tuple(
            (process_id, key) for key in keys(path, subdir))  # type: ignore[no-untyped-call]

    lmdb._envid.env_keys = keys_of_child  # pylint: disable=protected-access


_REGISTRY: Final = _Registry()
atexit.register(_REGISTRY.leave)
os.register_at_fork(after_in_child=_REGISTRY.forget_parent)


def acquire(directory: str,
            queue: persipubsub.config.Queue,
            is_read_only: bool = False,
            adopts_settings: bool = False,
            renews_journal: bool = False) -> Environment:
    """
    Open a store, or share it if this process has it open already.

    :param directory: of the queue
    :param queue: its settings in the configuration
    :param is_read_only: True only to look, for a moment
    :param adopts_settings: True to store the settings in the queue
    :param renews_journal: True to make the journal anew from the store, which nobody has open
    """
    with _REGISTRY.lock:
        environment = _REGISTRY.environments.get(files.identify_store(directory))
        if environment is None:
            environment = Environment(directory, queue, is_read_only)
            environment.users = 1
            environment.open(adopts_settings, renews_journal)
            # A rebuild may have put another file in the place.
            _REGISTRY.environments[files.identify_store(directory)] = environment
            return environment
        if environment.is_read_only and not is_read_only:
            environment.begin_work()
        environment.use_settings(queue, adopts_settings)
        environment.users += 1
        return environment


def release(environment: Environment) -> None:
    """Give back one use of an environment; the last one closes it."""
    with _REGISTRY.lock:
        environment.users -= 1
        if environment.users == 0:
            for identity, other in list(_REGISTRY.environments.items()):
                if other is environment:
                    del _REGISTRY.environments[identity]
            environment.close()


@contextlib.contextmanager
def opened(directory: str,
           queue: persipubsub.config.Queue,
           is_read_only: bool = False) -> Iterator[Environment]:
    """Have a store open in a ``with`` block."""
    environment = acquire(directory, queue, is_read_only)
    try:
        yield environment
    finally:
        release(environment)


@contextlib.contextmanager
def alone(directory: str, busy_timeout_secs: float) -> Iterator[locks.LockFile]:
    """Keep this process from opening stores, and all others from opening, closing or creating this."""
    with _REGISTRY.lock, locks.open_lock(directory, busy_timeout_secs):
        users = locks.LockFile(os.path.join(directory, files.USERS))
        try:
            yield users
        finally:
            users.close()


def create(directory: str, queue: persipubsub.config.Queue) -> bool:
    """
    Create a store unless it is there.

    :return: True if it was created
    :raise FormatError: if the directory holds something else
    """
    with _REGISTRY.lock:
        try:
            with files.translated(path=directory, doing="create"):
                files.make_directories(directory)
        except persipubsub.errors.NotInitializedError as error:
            # In /proc, say, or below a file: it is not that somebody forgot to create it.
            raise persipubsub.errors.AccessError(str(error)) from error
        path = os.path.join(directory, files.DATA)
        if os.path.lexists(path):
            return False
        with files.translated(path=directory, doing="list"):
            foreign = not os.path.isdir(directory) or files.foreign_names(directory)
        if foreign:
            files.identify_store(directory)
        with locks.open_lock(directory, queue.busy_timeout_secs):
            if os.path.lexists(path):
                return False
            with files.translated(path=directory, doing="create a queue in"):
                _build(directory, queue)
            return True


def _build(directory: str, queue: persipubsub.config.Queue) -> None:
    """Build an empty store; hold the open lock."""
    aside = os.path.join(directory, files.CREATING)
    header = fmt.Header(format=fmt.FORMAT,
                        flags=0,
                        clock_offset_ns=time.time_ns() - files.ticks_ns(),
                        boot_id=files.boot_id(),
                        next_ordinal=0,
                        journal_id=os.urandom(16))
    with _created(aside, 1 << 20) as environment:
        for name in fmt.DATABASE_NAMES:
            environment.open_db(name)
        meta = environment.open_db(fmt.META_DB)
        with environment.begin(write=True, db=meta) as txn:
            txn.put(fmt.HEADER_KEY, fmt.pack_header(header))
            txn.put(fmt.SETTINGS_KEY, encode_settings(queue))
        environment.sync(True)
    # Of a queue whose data file was removed: it shall not come back in the place of this one.
    remove_journal(directory)
    files.remove_durably(os.path.join(directory, files.RUNNING))
    # A store that lacks them is another program's, or of version 1, not one of ours.
    for lock in (files.USERS, files.JOURNAL_LOCK):
        os.close(files.open_file(os.path.join(directory, lock)))
    os.rename(os.path.join(aside, files.DATA), os.path.join(directory, files.DATA))
    files.flush_directory(directory)
    _remove_aside(aside)


def remove_journal(directory: str) -> None:
    """Remove the segments of a journal, durably."""
    path = os.path.join(directory, files.JOURNAL)
    if os.path.islink(path) or not os.path.isdir(path):
        files.remove_durably(path)
        return
    for name in os.listdir(path):
        os.unlink(os.path.join(path, name))
    os.rmdir(path)
    files.flush_directory(directory)


def _remove_aside(aside: str) -> None:
    """Remove the directory in which a store is built; what a link leads to is not ours to empty."""
    if os.path.islink(aside):
        os.unlink(aside)
    elif os.path.lexists(aside):
        # An empty one first: an administrator may have left it, whose directories others can not list.
        with contextlib.suppress(OSError):
            os.rmdir(aside)
            return
        for name in os.listdir(aside):
            os.unlink(os.path.join(aside, name))
        os.rmdir(aside)


@contextlib.contextmanager
def _created(directory: str, size: int) -> Iterator[lmdb.Environment]:
    """Create a store in a directory that nobody else uses; none is left if it fails."""
    _remove_aside(directory)
    os.mkdir(directory, mode=files.DIRECTORY_MODE)
    try:
        with files.occupied_streams():
            environment = lmdb.open(
                os.fsencode(directory),
                map_size=size,
                max_dbs=_MAX_DBS,
                mode=files.FILE_MODE,
                sync=False,
                create=False,
                # LMDB makes its lock file with holes, which is SIGBUS on a full disk.
                lock=False,
                lib_version=0)
        with environment:
            yield environment
    except BaseException as error:
        # First: the removal frees room, so the disk would not seem full.
        translated = (translate(error, os.path.dirname(directory))
                      if isinstance(error, lmdb.Error) else error)
        _remove_aside(directory)
        raise translated from error.__cause__


@contextlib.contextmanager
def opened_alone(path: str,
                 is_read_only: bool = True,
                 size: int = 1 << 20) -> Iterator[lmdb.Environment]:
    """Open a data file that stands for itself and that nobody else uses."""
    with files.occupied_streams():
        environment = lmdb.open(os.fsencode(path),
                                subdir=False,
                                map_size=size,
                                max_dbs=_MAX_DBS,
                                readonly=is_read_only,
                                lock=False,
                                create=False,
                                readahead=False,
                                lib_version=0)
    with environment:
        yield environment


def verify_pages(path: str) -> None:
    """
    Walk through all pages of a data file without LMDB's engine, which would be killed by damage.

    :raise StoreCorruptError: if it is not sound
    """
    with files.translated(path=path, doing="read"), open(path, "rb") as file:
        findings = find_damage(file, os.fstat(file.fileno()).st_size)
    if findings:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected the store {path} to be sound, but got {len(findings)} finding(s): "
            f"{'; '.join(findings[:3])}")


def find_damage(file: IO[bytes] | io.RawIOBase, size: int) -> list[str]:
    """Walk through all pages of a data file; return what is wrong."""
    # Slow, and hardly ever needed.
    import lmdb.verify  # pylint: disable=import-outside-toplevel,redefined-outer-name

    # Not lmdb.verify.verify: it looks only at the first page of a large value, so that it finds nothing
    # wrong with a file that was cut in the middle of one.
    # pylint: disable-next=protected-access
    verifier = lmdb.verify._Verifier(file, size)  # type: ignore[no-untyped-call]
    try:
        findings = list(verifier.verify())  # type: ignore[no-untyped-call]
    except lmdb.verify.VerifyError as error:
        return [str(error)]
    lost = sum(verifier.live[size // verifier.psize:])
    return findings + ([f"{lost} pages in use are beyond the end of the file"] if lost else [])


def _close(store: _Store) -> None:
    """Close everything that is open of a store."""
    environment, store.lmdb = store.lmdb, None
    if environment is not None:
        environment.close()
    store.close_locks()


def _reserve_lock_file(directory: str, max_readers: int, users: locks.LockFile) -> None:
    """
    Make LMDB's lock file as large as LMDB would make it, but without holes: SIGBUS on a full disk.

    LMDB would follow a link in its place, and hang at a FIFO: both are refused here.
    """
    path = os.path.join(directory, files.LOCK)
    size = _LOCK_HEADER_BYTES + _READER_BYTES * (max_readers - 1)
    # This process does not have it open; else closing it would give back LMDB's locks.
    descriptor = files.open_file(path)
    try:
        begin = os.fstat(descriptor).st_size
        if begin < size and users.is_alone():
            with files.translated(path=path, doing="reserve"):
                files.extend(descriptor, begin, size)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)


# Settings


class _Stored(msgspec.Struct):
    """Settings as they are stored."""

    queue: persipubsub.config.Queue


def encode_settings(queue: persipubsub.config.Queue) -> bytes:
    """Encode the settings of a queue."""
    return msgspec.json.encode(_Stored(msgspec.structs.replace(queue, path=None, subscribers=())))


def differences(here: persipubsub.config.Queue,
                there: persipubsub.config.Queue) -> Mapping[str, tuple[object, object]]:
    """Compare settings: of each key that differs, the value of both."""
    found: dict[str, tuple[object, object]] = {}
    for prefix, one, other in (("", here, there), ("high-water-mark.", here.high_water_mark,
                                                   there.high_water_mark)):
        for field in msgspec.structs.fields(one):
            values = getattr(one, field.name), getattr(other, field.name)
            if field.name not in (*_NOT_STORED, "high_water_mark") and values[0] != values[1]:
                found[prefix + field.encode_name] = (getattr(values[0], "value", values[0]),
                                                     getattr(values[1], "value", values[1]))
    return found


def _put_settings(tx: Tx, settings: bytes) -> None:
    """Store settings."""
    tx.txn.put(fmt.SETTINGS_KEY, settings, db=tx.db.meta)


def map_size(max_bytes: int) -> int:
    """Map more than ``max_db_size_bytes``: acknowledging, dropping and deleting always find room."""
    return max_bytes + min(1 << 26, max(1 << 20, max_bytes // 8))


# Works on the header


def _end_of_log(tx: Tx) -> int:
    """Read the next number."""
    return log.read_end(tx.cursor()).next_number


def _next_clock_offset(tx: Tx) -> int:
    """Let the queue's clock go on in this boot."""
    # Never earlier than what is stored: ages would be negative, positions by time wrong.
    return max(log.read_end(tx.cursor()).time_ns, time.time_ns()) - files.ticks_ns()


def _update_header(tx: Tx, clock_offset_ns: int) -> None:
    """Note the clock of this boot."""
    header = fmt.unpack_header(bytes(tx.txn.get(fmt.HEADER_KEY, b"", db=tx.db.meta)), "")
    header = header._replace(boot_id=files.boot_id(), clock_offset_ns=clock_offset_ns)
    tx.txn.put(fmt.HEADER_KEY, fmt.pack_header(header), db=tx.db.meta)


def _skip_numbers(tx: Tx) -> None:
    """Take care that no number is used again that was used before a power failure."""
    cursor = tx.cursor()
    log_end = log.read_end(cursor)
    log.put_placeholder(
        cursor,
        log_end._replace(next_number=log_end.next_number + _SKIPPED_NUMBERS,
                         generation=(log_end.generation + 1) & 0xffffffff))
    _update_header(tx, _next_clock_offset(tx))


# Errors

_Translation = tuple[type[persipubsub.errors.PersipubsubError], str, tuple[type[lmdb.Error], ...],
                     tuple[int, ...]]

# The first row that fits decides. In a row: classes of LMDB, then error numbers of the system.
_TRANSLATIONS: Final[tuple[_Translation, ...]] = (
    (MapFullError, " (max_db_size_bytes)", (lmdb.MapFullError, ), ()),
    (persipubsub.errors.DiskFullError, "", (lmdb.DiskError, ), (errno.ENOSPC, errno.EDQUOT,
                                                                errno.EFBIG)),
    (persipubsub.errors.ReadersFullError, " (max_reader_num)", (lmdb.ReadersFullError, ), ()),
    (persipubsub.errors.StoreCorruptError, "", (lmdb.CorruptedError, lmdb.PageNotFoundError,
                                                lmdb.BadTxnError), ()),
    (persipubsub.errors.FormatError, "", (lmdb.VersionMismatchError, lmdb.InvalidError,
                                          lmdb.IncompatibleError), ()),
    (persipubsub.errors.FlushError, ". Close all that this process has open of the queue and open "
     "it again; look at the disk.", (lmdb.PanicError, ), (errno.EIO, )),
    (persipubsub.errors.AccessError, "", (lmdb.ReadonlyError, ), (errno.EACCES, errno.EPERM,
                                                                  errno.EROFS)),
    (persipubsub.errors.NotInitializedError, "", (), (errno.ENOENT, errno.ENOTDIR)),
    # LMDB locks a byte at the offset of the process id.
    (persipubsub.errors.StoreError, " (perhaps a process with the same process id has it open: "
     "containers that share a queue have to share a namespace of process ids)", (), (errno.EAGAIN, )
     ),
)


def translate(error: lmdb.Error, directory: str) -> persipubsub.errors.PersipubsubError:
    """Choose the error of this library for an error of LMDB."""
    text = f"Expected to work with the queue {directory}, but got: {error}"
    code = getattr(error, "code", 0)
    if code == errno.EIO and files.is_full(directory):
        # What LMDB makes of a write that was cut short.
        return persipubsub.errors.DiskFullError(text + " (no room left)")
    for kind, hint, classes, codes in _TRANSLATIONS:
        if isinstance(error, classes) or code in codes:
            return kind(text + hint)
    return persipubsub.errors.StoreError(text)


def _foreign_error(directory: str) -> persipubsub.errors.FormatError:
    """Describe a store of another program."""
    return persipubsub.errors.FormatError(
        f"Expected {directory} to be a queue of persipubsub, but got: an LMDB environment of another "
        "program")


def _name_queue(error: persipubsub.errors.PersipubsubError, directory: str) -> None:
    """Complete the text of an error that a function on a store raised: it does not know the queue."""
    text = str(error)
    if directory not in text:
        error.args = (f"{text.removesuffix('.')}; queue {directory}", *error.args[1:])
