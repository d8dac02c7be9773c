"""
Hold what is open of a store, with its locks, and decide how much of the file is mapped.

LMDB never uses more of a file than is mapped. Two things make a map larger: a process whose
``max_db_size_bytes`` is larger than ours, which we follow; and a full map, as LMDB writes to fresh
pages even where it deletes: nothing could be acknowledged or dropped. So works that make room run
in a map that is larger only as long as they run. It used to stay larger: whoever sent next used
that room up, until nothing was left to acknowledge anything in.

Other processes meet what was written there, and LMDB's meta page says how large the map was. A size
that nobody configured is told by its remainder, and not followed.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Final, Union

import lmdb

import persipubsub.errors
from persipubsub.environment import _line, _opening
from persipubsub.environment._opening import Options

#: A full map grows by so much for works that make room, by more if that is not enough, and at most
#: by so much beyond what was mapped when the store was opened.
_GROWTH_BYTES: Final = 1 << 20
_LARGEST_GROWTH_BYTES: Final = 1 << 26

#: Of a size of which others shall know that nobody configured it, in bytes of an incomplete page.
_REMAINDER_BYTES: Final = 1


class Mapped:
    """Hold what is open of one store. All threads share it; see the locks."""

    def __init__(self, directory: str, options: Options) -> None:
        """
        Initialize without anything open.

        :param directory: of the store
        :param options: how it is opened
        """
        self.directory = directory
        self.options = options

        # None before it was opened, in a forked child, and after it was closed.
        self._handles: _opening.Handles | None = None
        # While a transaction is open in the thread that holds the lock.
        self._is_writing = self._is_reading = False
        # The largest size that another process was seen to have configured, in bytes.
        self._followed_size = 0
        self._make_locks()

    def _make_locks(self) -> None:
        """Create the locks; see :py:mod:`._transactions` for their order."""
        # Guards copies of the store, so that none is being made when the process forks or closes.
        self._copy_lock = threading.RLock()
        # The write lock: guards the writing half, requests being run, the gate's descriptor.
        self._line = _line.Line()
        # Guards flushes: one serves all threads that wait for one.
        self._flush_lock = threading.RLock()
        # Guards read transactions, so that none is open when the process forks or remaps.
        self._read_lock = threading.RLock()

    def _locks(self) -> "Sequence[Union[threading.RLock, _line.Line]]":
        """Return the locks in the order in which they are taken."""
        return self._copy_lock, self._line, self._flush_lock, self._read_lock

    def _open_handles(self) -> _opening.Handles:
        """Return what is open of the store; raise ClosedError if it was closed meanwhile."""
        handles = self._handles
        if handles is None:
            raise persipubsub.errors.ClosedError(
                f"Expected the queue {self.directory} to be open, but got: it was closed")
        return handles

    def _map_size(self) -> int:
        """Return how much is mapped if nobody needs more, in bytes."""
        return max(self.options.map_size, self._followed_size)

    def _is_in_read(self) -> bool:
        """
        Tell whether this thread runs a signal handler that interrupted a read of its own.

        It holds the last of the locks then, and must not wait for others: who forks may hold them.
        """
        with self._read_lock:
            return self._is_reading

    def _follow_map_size(self) -> None:
        """Map as much as the process that raised ``max_db_size_bytes`` did, or as is written."""
        if self._is_in_read():
            # Its map may not go away, and the handler can not wait for the end of the read.
            raise persipubsub.errors.StoreError(
                "Expected to map more of the queue {} when this thread is not in the middle of a "
                "read, but got: a signal handler that interrupted one".format(self.directory))
        # A copy is waited for, perhaps for seconds: not with the gate, which others need.
        with self._copy_lock, self._line.lock, self._flush_lock, self._read_lock:
            handles = self._open_handles()
            self._remap(0)
            size = handles.environment.info()["map_size"]
            if size % handles.environment.stat()["psize"] == _REMAINDER_BYTES:
                # LMDB maps what is written in any case.
                self._remap(self._map_size())
            else:
                self._followed_size = max(self._followed_size, size)
        self._line.wake_next()

    @contextlib.contextmanager
    def _grown(self) -> "Iterator[Iterator[None]]":
        """
        Let the map be larger for a while; hold the copy lock, the write lock and the gate.

        :return: makes it larger with each step, and ends when it may not be larger any more
        """
        try:
            yield self._grow()
        finally:
            # None after it could not be mapped.
            if self._handles is not None:
                self._resize(self._map_size())

    def _grow(self) -> Iterator[None]:
        """Make the map larger, step by step."""
        handles = self._open_handles()
        largest = max(self._map_size(), handles.map_size) + _LARGEST_GROWTH_BYTES
        growth = _GROWTH_BYTES
        while True:
            page = handles.environment.stat()["psize"]
            used = (handles.environment.info()["last_pgno"] + 1) * page
            size = (max(self._map_size(), used) + growth) // page * page + _REMAINDER_BYTES
            if size > largest:
                return
            self._resize(size)
            yield
            growth *= 4

    def _resize(self, size: int) -> None:
        """
        Map another size; hold the copy lock and the write lock, and be in no read.

        :param size: in bytes; LMDB maps what is written in any case
        """
        with self._flush_lock, self._read_lock:
            self._remap(size)

    def _remap(self, size: int) -> None:
        """
        Map another size; hold all the locks, with no transaction open.

        :param size: in bytes; 0: that of LMDB's meta page
        :raise StoreError: if there is no memory for it; the next use opens the store again
        """
        try:
            self._open_handles().environment.set_mapsize(size)
        except lmdb.Error as error:
            # The map is gone, and LMDB refuses all further work with the environment.
            self._close_handles()
            raise _opening.translate(error=error, directory=self.directory) from error

    def _close_handles(self) -> None:
        """Close everything that is open."""
        handles, self._handles = self._handles, None
        if handles is not None:
            # With no call before it that could be interrupted: LMDB opens no store twice in a
            # process. The other two close themselves when they are dropped.
            handles.environment.close()
            handles.gate.close()
            handles.users.close()
