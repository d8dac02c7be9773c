"""
Run transactions on one open store, for all threads of the process.

Locks, in the order in which they are taken:

1. the registry's lock (opening, closing, forking), see :py:mod:`persipubsub.environment._registry`,
2. the open gate of a store (between processes, while one of them opens, closes or creates it),
3. the copy lock of an environment (while a checkpoint is written),
4. the write lock of an environment (between threads), then the write gate (between processes),
5. the flush lock of an environment,
6. the read lock of an environment.

A thread that holds a later one never asks for an earlier one. ``RLock`` is used although nothing is
entered twice: it knows its owner, so that a ``finally`` clause can give it back without knowing
whether a KeyboardInterrupt came before or after it was taken.
"""

import contextlib
import fcntl
import time
from collections.abc import Callable
from typing import Final, TypeVar

import lmdb

import persipubsub.errors
from persipubsub.environment import _checkpoint, _files, _gate, _line, _map, _opening
from persipubsub.environment._opening import MapFullError, Options
from persipubsub.store._databases import Databases

__all__ = ["Transactions", "Work"]

ResultT = TypeVar("ResultT")

Work = Callable[["lmdb.Transaction[memoryview]", Databases], ResultT]

#: No more works than this share a transaction, so that no thread writes for the others forever.
_LARGEST_GROUP: Final = 512

#: The table of readers is searched for dead processes once in so many commits of all processes.
_READER_CHECK_COMMITS: Final = 256

#: A read that finds no slot in the table of readers tries again after this time, in seconds.
_SLOT_PAUSE_SECS: Final = 0.001

#: The reserve is taken again when there is room for it; time between two looks, in seconds.
_RESERVE_SECS: Final = 1.0


class Transactions(_map.Mapped):
    """Run transactions on one store, from any number of threads; ``Environment`` opens it."""

    def __init__(self, directory: str, options: Options) -> None:
        """
        Initialize without anything open.

        :param directory: of the store
        :param options: how it is opened
        """
        super().__init__(directory, options)
        # Opens it in a forked child, or when LMDB needs it; takes the registry's lock.
        self.reopener: Callable[[], None] | None = None

        # The text of an error after which nothing is written until the store is reopened; with
        # _has_left, because it was left as closed at the end of the interpreter.
        self._failure: str | None = None
        self._has_left = False
        # Ids of LMDB's transactions: the last one of this process, the last flushed one, and the
        # last one that was seen by a reader and is to be in a checkpoint.
        self._committed = self._flushed = self._seen = 0

        # What the last work of this process returned, and the id of its transaction. The first work
        # of the very next transaction finds the store as that left it. Under the write lock.
        self.left, self.left_by = None, 0  # type: object, int
        # When to look whether there is room for the reserve; None if it was not spent.
        self._reserve_due: float | None = None
        self.is_look = False  # True while nobody in this process does more than have a short look
        # Only for an "os" store, and then told of every commit.
        self._checkpointer: _checkpoint.Checkpointer | None = None

    # Transactions

    def read(self, work: Work[ResultT]) -> ResultT:
        """
        Run a work in a read transaction.

        It sees a consistent snapshot. It waits for nobody but other threads' reads, and for a slot
        in LMDB's table of readers. Nothing that points into the store may leave the work: copy it.

        :param work: to be run; no user code in it
        :return: what the work returned
        :raise ReadersFullError: if more processes read all the time than the table has slots
        """
        deadline = 0.0
        while True:
            if self._handles is None:
                self._reopen()
            try:
                with self._read_lock:
                    handles = self._open_handles()
                    # True in a signal handler that interrupted a read.
                    was_reading, self._is_reading = self._is_reading, True
                    try:
                        with handles.environment.begin(buffers=True) as txn:
                            if self._checkpointer is not None and txn.id() != self._seen:
                                # A publisher that died may have left it to us.
                                self._seen = txn.id()
                                self._checkpointer.notice()
                            return work(txn, handles.databases)
                    finally:
                        self._is_reading = was_reading
            except lmdb.MapResizedError:
                self._follow_map_size()
            except lmdb.ReadersFullError as error:
                deadline = deadline or time.monotonic() + self.options.busy_timeout_secs
                # Those of processes that were killed are freed; the living finish.
                if self.check_readers() == 0:
                    time.sleep(_SLOT_PAUSE_SECS)
                    if time.monotonic() >= deadline:
                        raise self._translate(error) from error
            except lmdb.Error as error:
                if not self._recover(error):
                    raise self._translate(error) from error
            except persipubsub.errors.PersipubsubError as error:
                _opening.name_queue(error, self.directory)
                raise

    def check_readers(self) -> int:
        """
        Free the slots of dead processes in LMDB's table of readers.

        As long as the slot of a process that was killed in a read is there, no page that was freed
        since then is used again, and the store grows with every commit.

        :return: how many were freed
        """
        if self._handles is None:
            self._reopen()
        with self._read_lock:
            return self._open_handles().environment.reader_check()

    def write(self,
              work: Work[ResultT],
              is_flushed: bool = False,
              may_grow: bool = False,
              announce: Callable[[], object] | None = None) -> ResultT:
        """
        Run a work in a write transaction, possibly together with works of other threads.

        All of the work is committed, or nothing if it raises. It may be run several times, and only
        the last one counts. It waits for other threads and processes for up to
        ``busy_timeout_secs`` seconds.

        :param work: to be run; no user code in it
        :param is_flushed: True to return only when the commit survives a power failure, if that is
            the store's durability
        :param may_grow: True for what makes room: a full map is made a little larger for it
        :param announce: called behind the commit, while it may still have to be flushed
        :return: what the work returned
        :raise BusyTimeoutError: if another process is in the middle of a write for too long
        """
        if self._handles is None:
            self._reopen()
        request = _line.Request(work, is_flushed and not self.options.keeps_os)
        try:
            self._take_turn(request)
        except lmdb.MapResizedError:
            self._follow_map_size()
            return self.write(work, is_flushed, may_grow, announce)
        handles = self._handles
        if handles is not None:
            handles.gate.make_way()
        if request.error is not None:
            if self._find_way(request, may_grow):
                return self.write(work, is_flushed, may_grow, announce)
            if request.error is not None:
                raise request.error
        if not request.done:
            raise _gate.busy_error(self.directory, self.options.busy_timeout_secs)
        if announce is not None:
            announce()
        if self._reserve_due is not None or not request.commit % _READER_CHECK_COMMITS:
            self._look_after_store(request.commit)
        if self._checkpointer is not None:
            self._checkpointer.notice()
        elif request.is_flushed:
            self._flush(request)
        return request.result  # type: ignore[no-any-return]

    def _take_turn(self, request: _line.Request) -> None:
        """
        Get a work committed, by this thread or by another one.

        :param request: gets the result or the error; neither if the wait was too long
        """
        line, lock = self._line, self._line.lock
        line.requests.append(request)
        group: list[_line.Request] = []
        try:
            is_locked = (not line.held_until and lock.acquire(blocking=False)
                         or line.wait(request, self.options.busy_timeout_secs))
            # More than once if so many others were before us that our work was not in the group.
            while is_locked and not request.done and request.error is None:
                if group:
                    line.share_flush(group, request)
                group = self._commit_group(request)
        finally:
            # Not with contextlib.suppress: a KeyboardInterrupt in there would leave it taken.
            try:
                lock.release()
            except RuntimeError:
                pass  # not ours: another thread did the work, or the wait timed out
            else:
                if line.requests:
                    line.wake_next()
            if len(group) > 1:
                line.share_flush(group, request)
            is_taken = not request.done and not line.withdraw(request)

        if is_taken:
            # Another thread is about to commit it: only that tells whether nothing was written.
            with lock:
                line.withdraw(request)
            line.wake_next()

    def _commit_group(self, own: _line.Request) -> list[_line.Request]:
        """
        Run the works that wait, this thread's own among them, and commit them together.

        :param own: request of this thread, which holds the write lock
        :return: those that were run; their threads still sleep, own excepted
        """
        if self._is_writing:
            own.error = _gate.nested_error(self.directory)
            return []
        handles = self._open_handles()
        gate = handles.gate
        group: list[_line.Request] = []
        try:
            # Before the gate: a signal handler that writes must not leave it for the code that it
            # interrupted, nor take the works of other threads along.
            self._is_writing = True
            # One attempt without a deadline spares the plain path the clock.
            try:
                fcntl.flock(gate.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                # Of another process's lock mostly. What else it may be is told by the gate.
                timeout = self.options.busy_timeout_secs
                if not gate.enter(deadline=time.monotonic() + timeout):
                    # Not done, so that it is withdrawn: nobody shall write it later.
                    own.error = _gate.busy_error(self.directory, timeout)
                    return []

            requests = self._line.requests
            while requests and len(group) < _LARGEST_GROUP:
                group.append(requests.popleft())
            if not group and not own.done:
                # A thread that was interrupted took our work out of the queue and never ran it.
                group.append(own)
            self._run_group(handles, group)
            return group
        except BaseException:
            self._recognize_committed(handles, group)
            for request in reversed(group):
                if not request.done and request is not own:
                    self._line.requests.appendleft(request)
                request.wake()
            raise
        finally:
            # First, with no call before it: whatever interrupts the rest must not leave it set.
            self._is_writing = False
            try:
                fcntl.flock(gate.descriptor, fcntl.LOCK_UN)
            except OSError:
                pass  # where there are no locks; what that comes to was raised by entering

    def _recognize_committed(self, handles: _opening.Handles, group: list[_line.Request]) -> None:
        """
        See which works were committed although an exception came, and must not be run again.

        :param handles: of the open store; the gate is held, so that nobody else committed since
        :param group: works that were run, or not
        """
        # A KeyboardInterrupt that arrives during a commit is raised right behind it.
        last = handles.environment.info()["last_txnid"]
        for request in group:
            if 0 < request.commit <= last:
                self._committed = max(self._committed, request.commit)
                request.done = True
            # Another process may get the id of a transaction that was not committed.
            request.commit = request.commit if request.done else 0

    def _run_group(self, handles: _opening.Handles, group: list[_line.Request]) -> None:
        """
        Run works in one transaction; when it fails, each of them in one of its own.

        :param handles: of the open store
        :param group: works to be run
        """
        try:
            self._run(handles, group)
        except lmdb.MapResizedError:
            raise  # followed without the gate
        except Exception as error:  # pylint: disable=broad-exception-caught
            # Whatever it is, nothing of the transaction was committed, and it is the fault of one
            # work alone: each gets a transaction, and its error, of its own.
            for request in group:
                request.commit = 0
            if len(group) == 1:
                group[0].error = error
                if isinstance(error, lmdb.Error):
                    group[0].error = self._translate(error)
                    group[0].error.__cause__ = error
                elif isinstance(error, persipubsub.errors.PersipubsubError):
                    _opening.name_queue(error, self.directory)
                group[0].done = True
                return
            for request in group:
                self._run_group(handles, [request])

    def _run_in_larger_map(self, request: _line.Request) -> None:
        """
        Run a work that makes room in a full map; nobody else's, which would use the room up.

        :param request: with the error that there was no room; gets the result, or another error
        """
        try:
            with self._copy_lock, self._line.lock:
                gate = self._open_handles().gate
                if not gate.enter(deadline=time.monotonic() + self.options.busy_timeout_secs):
                    request.error = _gate.busy_error(self.directory, self.options.busy_timeout_secs)
                    return
                try:
                    self._is_writing = True
                    with self._grown() as steps:
                        for _ in steps:
                            request.error = None
                            self._run_group(self._open_handles(), [request])
                            if not isinstance(request.error, MapFullError):
                                break
                finally:
                    self._is_writing = False
                    # Closed, with the lock, where nothing can be mapped any more.
                    if gate.descriptor >= 0:
                        fcntl.flock(gate.descriptor, fcntl.LOCK_UN)
        finally:
            self._line.wake_next()

    def _run(self, handles: _opening.Handles, group: list[_line.Request]) -> None:
        """
        Run works in one transaction.

        :param handles: of the open store
        :param group: works to be run
        """
        if self._failure is not None:
            if self._has_left:
                raise persipubsub.errors.ClosedError(self._failure)
            raise persipubsub.errors.FlushError(self._failure)
        try:
            with handles.environment.begin(write=True, buffers=True) as txn:
                commit = txn.id()
                for request in group:
                    request.result = request.work(txn, handles.databases)
                    request.commit = commit
                    # For the next work, which finds the store as if this one were committed.
                    self.left, self.left_by = request.result, commit - 1
        except BaseException:
            self.left = None
            raise
        self._committed = self.left_by = commit
        if not group:
            self.left = None
        for request in group:
            request.done = True

    def _flush(self, request: _line.Request) -> None:
        """
        Wait until a commit survives a power failure.

        What is left since the commit is LMDB's meta page; one flush serves all threads that came.

        :param request: that was committed
        :raise FlushError: also for a flush of another thread that failed: the kernel tells it once,
            and one more would succeed and mean nothing
        """
        try:
            # Without the lock first: whoever holds it may be flushing what came later.
            if self._flushed >= request.commit:
                return
            with self._flush_lock:
                if self._flushed >= request.commit:
                    return
                if self._failure is not None:
                    raise persipubsub.errors.FlushError(self._failure)
                # Not of our own works: one that changes nothing leaves its id to the next commit.
                committed = self._open_handles().environment.info()["last_txnid"]
                self._sync()
                self._flushed = committed
        finally:
            self._line.pass_on(request)

    def _find_way(self, request: _line.Request, may_grow: bool) -> bool:
        """
        Find room for a work that failed, or open the store again for it.

        :param request: with the error; run in a larger map if that is what it takes
        :param may_grow: True if it makes room
        :return: True if it is worth another try
        """
        if may_grow and isinstance(request.error, MapFullError):
            if self.check_readers() > 0:
                return True
            if not self._is_in_read():
                self._run_in_larger_map(request)
        # In the larger map, too: the disk may be as full as the map.
        error = request.error
        return error is not None and ((may_grow and self._find_room(error))
                                      or self._recover(error.__cause__))

    def _find_room(self, error: BaseException) -> bool:
        """
        Find room on a full disk for what makes room.

        :param error: of a transaction that acknowledged or dropped something
        :return: True if it is worth another try
        """
        if (isinstance(error, MapFullError)
                or not isinstance(error, persipubsub.errors.DiskFullError)):
            return False
        # As a time, so that it is not looked for at every send.
        self._reserve_due = time.monotonic() + _RESERVE_SECS
        return _files.spend_reserve(self.directory)

    def _look_after_store(self, commit: int) -> None:
        """Do what has to be done from time to time; the transaction's id tells when."""
        if not commit % _READER_CHECK_COMMITS:
            # Where everybody is busy, nobody else does it.
            with contextlib.suppress(lmdb.Error, persipubsub.errors.ClosedError):
                self.check_readers()
        if self._reserve_due is not None and time.monotonic() >= self._reserve_due:
            is_kept = _files.keep_reserve(self.directory)
            self._reserve_due = None if is_kept else time.monotonic() + _RESERVE_SECS

    def _recover(self, error: BaseException | None) -> bool:
        """
        Open the store again if LMDB refuses to work since the disk had no room for a meta page.

        Nothing was committed by that: LMDB has put the old meta page back.

        :param error: of LMDB
        :return: True if it is worth another try
        """
        if self._failure or self.reopener is None or not isinstance(error, lmdb.PanicError):
            return False
        self._reopen()
        return True

    def _translate(self, error: lmdb.Error) -> persipubsub.errors.PersipubsubError:
        """
        Choose the error of this library for an error of LMDB: the one place where that is done.

        :param error: that LMDB raised
        :return: error to be raised instead
        """
        translated = _opening.translate(error=error, directory=self.directory)
        if (isinstance(translated, persipubsub.errors.FlushError)
                and not isinstance(error, lmdb.PanicError)):
            self._failure = str(translated)
        return translated

    def _sync(self) -> None:
        """Flush the data file; hold the flush lock. Any error: what can be seen is not safe."""
        try:
            self._open_handles().environment.sync(True)
        except lmdb.Error as error:
            self._failure = _opening.flush_error_text(error, self.directory)
            raise persipubsub.errors.FlushError(self._failure) from error

    def flush_now(self) -> None:
        """Flush everything, whatever the durability."""
        with self._flush_lock:
            self._sync()

    def _reopen(self) -> None:
        """Open the store in a forked child, or again after it could not be opened."""
        if self.reopener is None:
            self._open_handles()
        else:
            self.reopener()
