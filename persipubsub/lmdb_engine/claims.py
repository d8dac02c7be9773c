"""
Claims: which consumer has which message. The kernel gives those of a killed process back.

A claim is a lock of the kernel on bytes of the file ``claims.lock``. Each message of each
subscriber has one byte there, at the offset ``ordinal * 2**48 + number``. The file stays empty. The
locks belong to open file descriptions (``F_OFD_SETLK``): the kernel gives them back when the last
descriptor is closed. So it gives back the claims of a process that is killed, at that moment:
nothing has to be repaired, and there is no timeout to wait for. A stopped process keeps its claims.
Rejected: leases with a time stamp in the store. Each costs a commit, and their timeout is too long
for consumers that wait or too short for consumers that work. Locks of one description never
conflict with each other, so each claim in progress has a descriptor of its own, which is kept for a
later claim.
"""

import contextlib
import errno
import fcntl
import functools
import io
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from persipubsub.errors import ClosedError, StoreError
from persipubsub.lmdb_engine import files
from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.format import Subscriber
from persipubsub.statistics import InFlight

# 2**15 subscribers times 2**48 numbers fill exactly the non-negative offsets of a file.
_NUMBERS: Final = 1 << 48

#: Descriptors that are kept, so that a burst of claims does not pin thousands of them.
_MOST_IDLE: Final = 64

#: struct flock of Linux: type, whence, start, length, process (0 for locks of descriptions).
_FLOCK: Final = struct.Struct("hhqq8x")
_LOCK: Final = functools.partial(_FLOCK.pack, fcntl.F_WRLCK, os.SEEK_SET)
_UNLOCK: Final = functools.partial(_FLOCK.pack, fcntl.F_UNLCK, os.SEEK_SET)
_SETLK: Final[int] = fcntl.F_OFD_SETLK

ResultT = TypeVar("ResultT")


class Held:
    """What this process has claimed of one subscriber, and where a search for more begins."""

    __slots__ = ("ends", "start", "start_until", "retry_at_ns")

    def __init__(self) -> None:
        """Initialize with nothing claimed."""
        #: Claimed ranges: first number, and the number after the last one. Rejected: a set of all
        #: numbers, which would add a tenth to the time of a batch.
        self.ends: dict[int, int] = {}
        #: ``start``: where a search begins; messages before it are claimed, or wait for a retry.
        #: ``start_until``: when a search begins at the position again, on the monotonic clock.
        #: ``retry_at_ns``: time of the first retry, on the queue's clock; 0: none. A search begins
        #: at the position again then, too.
        self.start, self.start_until, self.retry_at_ns = 0, 0.0, 0

    def give_back(self, first: int) -> None:
        """Let the next search find the messages of a range again."""
        self.ends.pop(first, None)
        self.start = min(self.start, first)


class Claim(msgspec.Struct, eq=False):
    """A range of messages that one consumer has."""

    ordinal: int
    first: int
    stop: int  #: number after the last one
    held: Held
    file: io.FileIO | None = None  #: None: it is not locked


class Claims:
    """Claims of the consumers of one open queue. Any thread may use it."""

    def __init__(self, directory: str) -> None:
        """Initialize without touching the file, which is opened at the first use."""
        self._directory = directory
        self._path = os.path.join(os.path.abspath(directory), files.CLAIMS)
        # Appending to a list and popping are atomic.
        self._idle: list[io.FileIO] = []
        #: All that are open, with the claims that they lock.
        self._all: dict[io.FileIO, Claim | None] = {}
        #: One object for each thread that is opening a file, see ``forget_parent``.
        self._openings: set[object] = set()
        self._identity: files.Identity | None = None
        #: Lets a close wait for acknowledgements that are on the way. Otherwise it would give a
        #: claim back while the acknowledgement is written, and another consumer would get the
        #: message a second time.
        self.ending_lock = threading.RLock()
        #: Lets one consumer thread at a time compute what was dropped. It is here since this object
        #: makes its locks anew in a forked child. It is held for a moment, and no other lock is
        #: taken meanwhile.
        self.counting_lock = threading.RLock()
        self.is_closed = False

    def claim(self, claim: Claim) -> bool:
        """
        Claim a range up to the first message that another consumer has claimed.

        If a signal handler raises here or later, a release gives back what was claimed.
        """
        file = claim.file = self._take()
        base = claim.ordinal * _NUMBERS
        while claim.first < claim.stop:  # each round takes at least one off its end
            if self._ask(fcntl.fcntl, file, _SETLK,
                         _LOCK(base + claim.first, claim.stop - claim.first)):
                self._all[file] = claim
                claim.held.ends[claim.first] = claim.stop
                return True
            # The kernel names any claim in the range, not always the first; none if it was given
            # back a moment ago.
            found = self._ask(_find_lock, file, base + claim.first, base + claim.stop)
            claim.stop = min(claim.stop - 1, found[0] - base if found else claim.stop)
        claim.file = None
        self._idle.append(file)
        return False

    def is_claimed(self, ordinal: int, number: int) -> bool:
        """Tell whether a consumer, in this process or another, has claimed a message."""
        file = self._take()  # it has no locks itself, so all locks are those of others
        start = ordinal * _NUMBERS + number
        try:
            return self._ask(_find_lock, file, start, start + 1) is not None
        finally:
            self._idle.append(file)

    def narrow(self, claim: Claim, first: int, stop: int) -> None:
        """Give back what is outside of a part of a claim, which stays claimed all the time."""
        assert claim.file is not None, "It is locked."
        base = claim.ordinal * _NUMBERS
        for begin, end in ((claim.first, first), (stop, claim.stop)):
            if begin < end:
                self._ask(fcntl.fcntl, claim.file, _SETLK, _UNLOCK(base + begin, end - begin))
                claim.held.give_back(begin)
        # In this order, a release after a signal handler's exception still frees everything.
        claim.held.give_back(claim.first)
        claim.first, claim.stop = first, stop
        claim.held.ends[first] = stop

    def release(self, claim: Claim) -> None:
        """Give a claim back, if it was locked; nothing happens after a close, nor in a forked child."""
        file = claim.file
        if file is None:
            return
        is_kept = False
        try:
            start = claim.ordinal * _NUMBERS + claim.first
            fcntl.fcntl(file, _SETLK, _UNLOCK(start, claim.stop - claim.first))
            is_kept = len(self._idle) < _MOST_IDLE
        except ValueError:
            pass  # another thread closed it
        except OSError as error:
            if error.errno != errno.EBADF:  # ... in the middle of the call
                raise
        finally:
            claim.held.give_back(claim.first)
            claim.file = None
            if is_kept:
                self._all[file] = None
                self._idle.append(file)
            else:
                # If a signal handler raised: closing the descriptor gives back all of its locks.
                self._all.pop(file, None)
                file.close()

    def _ask(self, ask: Callable[..., ResultT], *args: Any) -> ResultT | None:
        """Lock or look for locks; return None if another consumer has a lock."""
        try:
            return ask(*args)
        except (ValueError, OSError) as error:
            if self.is_closed:
                # Another thread closed the file, before the call or in the middle of it.
                raise self.closed_error() from error
            if not isinstance(error, OSError) or error.errno is None:
                raise  # by a signal handler, see files
            if error.errno == errno.EAGAIN:
                return None
            raise files.translate_os_error(error, self._path, "lock") from error

    def _take(self) -> io.FileIO:
        """Take a descriptor that has no locks, or open one more."""
        try:
            return self._idle.pop()
        except IndexError:
            pass
        if self.is_closed:
            raise self.closed_error()
        opening = object()
        self._openings.add(opening)
        try:
            file = io.FileIO(files.open_file(self._path), "r+")
            status = os.fstat(file.fileno())
            found = files.Identity(status.st_dev, status.st_ino)
            # Locks on a new file of this name do not exclude processes that have the old one open.
            if self._identity not in (None, found):
                file.close()
                raise StoreError(
                    f"Expected {self._path} to stay in place, but got: another file of that name")
            self._identity = found
            self._all[file] = None
            return file
        finally:
            self._openings.discard(opening)

    def closed_error(self) -> ClosedError:
        """Describe that the queue was closed, which gives back what is claimed."""
        return ClosedError(
            f"Expected the queue {self._directory} to be open until the messages are acknowledged, "
            "but got: it was closed, which gave them back")

    def close(self) -> None:
        """Give back what is still claimed; it may be repeated."""
        self.is_closed = True
        self._idle.clear()
        while self._all:  # fewer each time, as none is opened any more
            for file in list(self._all):
                claim = self._all.get(file)
                if claim is not None:
                    claim.held.give_back(claim.first)
                # Unlock first: a child forked at this moment has a copy of the descriptor, so that
                # closing this one would not give the lock back.
                with files.suppress(OSError, ValueError):
                    fcntl.fcntl(file, _SETLK, _UNLOCK(0, 0))
                file.close()
                # Last of all: a child that is forked before closes its copy.
                self._all.pop(file, None)

    def forget_parent(self) -> None:
        """Close the parent's files in a forked child; do not unlock: the claims are not its own."""
        # No thread of the parent holds these.
        self.ending_lock = threading.RLock()
        self.counting_lock = threading.RLock()
        self._idle.clear()
        while self._all:  # one less each time: there is no other thread
            file, claim = self._all.popitem()
            if claim is not None:
                claim.file = None
                claim.held.give_back(claim.first)
            with contextlib.suppress(OSError):
                file.close()
        # Another thread of the parent was in the middle of opening one, and may lock it now.
        if self._openings:
            self._openings.clear()
            files.close_all_of([self._path])


def _find_lock(file: io.FileIO | int, start: int, stop: int) -> tuple[int, int] | None:
    """Find the part of a range that another consumer has locked."""
    found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _LOCK(start, stop - start))
    kind, _, begin, length = _FLOCK.unpack(found)
    if kind == fcntl.F_UNLCK:
        return None
    # The lock may begin before the range, and need not be the first one in it.
    return begin, begin + (length or 1 << 63)


#: Ordinal of the subscriber, process, first number, time since boot in nanoseconds, and a sum of all
#: of them, which is wrong in a note that is half written.
_NOTE: Final = struct.Struct("<IIQQQ")
_NOTES: Final = SharedPage.NOTES_BYTES // _NOTE.size
_MASK: Final = 0xffffffffffffffff


def note_claim(page: SharedPage, claim: Claim, process_id: int) -> None:
    """
    Note a claim where other processes see it: the kernel does not tell its process and its age.

    Notes are shown to people; the library decides nothing by them. Each descriptor of a process has
    its place, so that a claim that is held for long keeps its note. Two processes may have the same
    place.
    """
    assert claim.file is not None, "It is locked."
    since_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)  # without a call of ticks_ns
    try:
        place = (process_id * 61 + claim.file.fileno()) % _NOTES
    except ValueError:
        return  # another thread closed it a moment ago
    total = claim.ordinal + process_id * 3 + claim.first * 5 + since_ns * 7 & _MASK
    _NOTE.pack_into(page.map, SharedPage.NOTES + place * _NOTE.size, claim.ordinal, process_id,
                    claim.first, since_ns, total)


def _read_notes(page: SharedPage) -> dict[tuple[int, int], tuple[int, int]]:
    """Read the time and the process in the newest note on each claim: by ordinal and number."""
    notes: dict[tuple[int, int], tuple[int, int]] = {}
    written = page.map[SharedPage.NOTES:SharedPage.NOTES + _NOTES * _NOTE.size]
    for ordinal, process_id, first, since_ns, total in _NOTE.iter_unpack(written):
        if process_id and total == ordinal + process_id * 3 + first * 5 + since_ns * 7 & _MASK:
            note = (since_ns, process_id)
            notes[ordinal, first] = max(note, notes.get((ordinal, first), note))
    return notes


def find_claims(directory: str, subscribers: Sequence[Subscriber], end: int,
                page: SharedPage) -> dict[int, list[InFlight]]:
    """
    Find the messages that consumers hold right now: two questions to the kernel for each consumer.

    Rejected: ``/proc/locks``, which lists the locks of the whole machine, and names files by a device
    that is not that of ``stat`` on some file systems.

    :param end: number of the next message
    :return: claims by the ordinal of the subscriber
    """
    claims: dict[int, list[InFlight]] = {subscriber.ordinal: [] for subscriber in subscribers}
    path = os.path.join(directory, files.CLAIMS)
    if not os.path.lexists(path):
        return claims
    notes, now_ns = _read_notes(page), files.ticks_ns()
    with files.using(path, os.O_RDWR) as descriptor, files.translated(path, "query"):
        for subscriber in subscribers:
            base = subscriber.ordinal * _NUMBERS
            ranges = [(base + subscriber.position, base + end)]
            while ranges:  # each round looks at one; the two that it adds are shorter together
                begin, behind = ranges.pop()
                found = _find_lock(descriptor, begin, behind) if begin < behind else None
                if found is None:
                    continue
                low, high = max(begin, found[0]), min(behind, found[1])
                since_ns, process_id = notes.get((subscriber.ordinal, found[0] - base),
                                                 (None, None))
                seconds = None if since_ns is None else max(0, now_ns - since_ns) / 1e9
                claims[subscriber.ordinal].append(
                    InFlight(subscriber.name, low - base, high - low, process_id, seconds))
                ranges += [(begin, low), (high, behind)]
            claims[subscriber.ordinal].sort(key=lambda claim: claim.number)
    return claims
