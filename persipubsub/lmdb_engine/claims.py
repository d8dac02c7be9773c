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
import io
import os
import struct
import time
from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec

from persipubsub.errors import ClosedError, StoreError
from persipubsub.lmdb_engine import files
from persipubsub.lmdb_engine.files import SharedPage

# 2**15 subscribers times 2**48 numbers fill exactly the non-negative offsets of a file.
_NUMBERS: Final = 1 << 48

#: Descriptors that are kept, so that a burst of claims does not pin thousands of them.
_MOST_IDLE: Final = 64

#: struct flock of Linux: type, whence, start, length, process (0 for locks of descriptions).
_FLOCK: Final = struct.Struct("hhqqi4x")
_SETLK: Final[int] = fcntl.F_OFD_SETLK
_GETLK: Final[int] = fcntl.F_OFD_GETLK
_UNLOCK_ALL: Final = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0)

#: Most questions to the kernel for one list of claims: it walks through its locks for each of them.
_MOST_QUESTIONS: Final = 10000


class Held:
    """What this process has claimed of one subscriber, and where a search for more begins."""

    __slots__ = ("ends", "start", "start_until", "retry_at_ns")

    def __init__(self) -> None:
        """Initialize with nothing claimed."""
        #: Numbers after the ranges that are claimed, by their first numbers. Rejected: a set of all
        #: numbers, which would add a tenth to the time of a batch.
        self.ends: dict[int, int] = {}
        #: ``start``: where a search begins; messages before it are claimed, or wait for a retry.
        #: ``start_until``: when a search begins at the position again, on the monotonic clock.
        #: ``retry_at_ns``: ... or earlier: time of the first retry, on the queue's clock; 0: none.
        self.start, self.start_until, self.retry_at_ns = 0, 0.0, 0

    def give_back(self, first: int) -> None:
        """Let the next search find the messages of a range again."""
        self.ends.pop(first, None)
        self.start = min(self.start, first)


class HeldOf(dict[int, Held]):
    """What this process has claimed, by the ordinal of the subscriber."""

    def __missing__(self, ordinal: int) -> Held:
        """Begin with nothing claimed. Two threads get the same."""
        return self.setdefault(ordinal, Held())


class Claim(msgspec.Struct, eq=False):
    """A range of messages that one consumer has."""

    ordinal: int
    first: int
    count: int
    held: Held
    file: io.FileIO | None = None  #: None: it is not locked


class Claims:
    """Claims of the consumers of one open queue. Any thread may use it."""

    def __init__(self, directory: str, held: HeldOf) -> None:
        """
        Initialize without touching the file, which is opened at the first use.

        :param held: what this process has claimed, by the ordinal of the subscriber; shared by all that
            it has open of the queue
        """
        self._path = os.path.join(os.path.abspath(directory), files.CLAIMS)
        self.held = held
        # Appending to a list and popping are atomic. ``_all`` has all that is open.
        self._idle: list[io.FileIO] = []
        self._all: dict[io.FileIO, None] = {}
        self._claims: set[Claim] = set()
        self._identity: files.Identity | None = None
        self.is_closed = False

    def claim(self, claim: Claim) -> bool:
        """
        Claim all messages of a range, or none.

        If a signal handler raises here or later, a release gives back what was claimed.
        """
        file = self._take()
        claim.file = file
        try:
            fcntl.fcntl(
                file, _SETLK,
                _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, claim.ordinal * _NUMBERS + claim.first,
                            claim.count, 0))
        except OSError as error:
            if error.errno is None:
                raise  # by a signal handler, see files
            claim.file = None
            self._idle.append(file)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise files.translate_os_error(error, self._path, "lock") from error
        self._claims.add(claim)
        claim.held.ends[claim.first] = claim.first + claim.count
        return True

    def claim_prefix(self, claim: Claim) -> bool:
        """Claim the longest part of a range that begins with its first message and is free."""
        for _ in range(8):  # after so many lost races, a single message has to do
            if self.claim(claim):
                return True
            if claim.count == 1:
                return False
            claim.count = self._free_prefix(claim.ordinal, claim.first, claim.count)
            if claim.count == 0:
                return False
        claim.count = 1
        return self.claim(claim)

    def is_claimed(self, ordinal: int, number: int) -> bool:
        """Tell whether a consumer, in this process or another, has claimed a message."""
        return self._free_prefix(ordinal, number, 1) == 0

    def _free_prefix(self, ordinal: int, first: int, count: int) -> int:
        """Count the messages before the first one that is claimed."""
        file = self._take()  # it has no locks itself, so all locks are those of others
        start = ordinal * _NUMBERS + first
        try:
            while count > 0:
                with files.translated(self._path, doing="query"):
                    found = _find_lock(file, start, count)
                if found is None:
                    break
                # The kernel names any claim in the range, not always the first.
                count = max(found[0], start) - start
            return count
        except (ValueError, StoreError) as error:
            if not self.is_closed:
                raise
            raise self._closed_error() from error
        finally:
            self._idle.append(file)

    def narrow(self, claim: Claim, first: int, count: int) -> None:
        """Give back what is outside of a part of a claim, which stays claimed all the time."""
        assert claim.file is not None, "It is locked."
        base = claim.ordinal * _NUMBERS
        end, stop = claim.first + claim.count, first + count
        for begin, behind in ((claim.first, first), (stop, end)):
            if begin < behind:
                with files.translated(self._path, doing="lock"):
                    fcntl.fcntl(
                        claim.file, _SETLK,
                        _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, base + begin, behind - begin, 0))
                claim.held.give_back(begin)
        # In this order, a release after a signal handler's exception still frees everything.
        claim.held.give_back(claim.first)
        claim.first, claim.count = first, count
        claim.held.ends[first] = stop

    def release(self, claim: Claim) -> None:
        """Give a claim back, if it was locked; nothing happens after a close, nor in a forked child."""
        file = claim.file
        if file is None:
            return
        try:
            fcntl.fcntl(
                file, _SETLK,
                _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, claim.ordinal * _NUMBERS + claim.first,
                            claim.count, 0))
            self._claims.discard(claim)
            claim.held.give_back(claim.first)
        except BaseException as error:
            # A signal handler raised: closing the descriptor gives back all of its locks.
            claim.file = None
            self._claims.discard(claim)
            claim.held.give_back(claim.first)
            self._discard(file)
            # Another thread closed it, before the call or in the middle of it.
            if isinstance(error, ValueError) or getattr(error, "errno", 0) == errno.EBADF:
                return
            raise
        claim.file = None
        if len(self._idle) < _MOST_IDLE:
            self._idle.append(file)
        else:
            self._discard(file)

    def _take(self) -> io.FileIO:
        """Take a descriptor that has no locks."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._open()

    def _open(self) -> io.FileIO:
        """Open one more descriptor."""
        if self.is_closed:
            raise self._closed_error()
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

    def _closed_error(self) -> ClosedError:
        """Describe that another thread closed the files."""
        return ClosedError(f"Expected {self._path} in use, but got: the queue was closed")

    def _discard(self, file: io.FileIO) -> None:
        """Close a descriptor, which gives back all of its locks."""
        self._all.pop(file, None)
        file.close()

    def close(self) -> None:
        """Give back what is still claimed; it may be repeated."""
        self.is_closed = True
        self._idle.clear()
        while self._claims:
            claim = self._claims.pop()
            claim.held.give_back(claim.first)
        while self._all:
            file, _ = self._all.popitem()
            # Unlock first: a child that is being forked shares the lock until it closes its file.
            with files.suppress(OSError):
                fcntl.fcntl(file, _SETLK, _UNLOCK_ALL)
            file.close()

    def forget_parent(self) -> None:
        """Close the parent's files in a forked child; do not unlock: the claims are not its own."""
        self._idle.clear()
        self._claims.clear()
        while self._all:
            file, _ = self._all.popitem()
            with contextlib.suppress(OSError):
                file.close()


def _find_lock(file: io.FileIO | int, start: int, count: int) -> tuple[int, int] | None:
    """Ask for a lock in a range; return its start and its length (0: to the end)."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, count, 0)
    kind, _, begin, length, _ = _FLOCK.unpack(fcntl.fcntl(file, _GETLK, asked))
    return None if kind == fcntl.F_UNLCK else (begin, length)


class Note(NamedTuple):
    """What a consumer noted of a claim."""

    process_id: int
    since_ns: int  #: time since boot


class Span(NamedTuple):
    """Messages that one consumer claimed together."""

    first: int  #: number of the first one
    length: int  #: how many
    note: Note | None  #: None if nothing is known


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
    since_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)  # without a call of ticks_ns
    try:
        place = (process_id * 61 +
                 claim.file.fileno()) % _NOTES  # type: ignore[union-attr]  # it is locked
    except ValueError:
        return  # another thread closed it a moment ago
    total = claim.ordinal + process_id * 3 + claim.first * 5 + since_ns * 7 & _MASK
    _NOTE.pack_into(page.map, SharedPage.NOTES + place * _NOTE.size, claim.ordinal, process_id,
                    claim.first, since_ns, total)


def _read_notes(page: SharedPage) -> dict[tuple[int, int], Note]:
    """Read the newest whole note on each claim, by ordinal and first number."""
    notes: dict[tuple[int, int], Note] = {}
    written = page.map[SharedPage.NOTES:SharedPage.NOTES + _NOTES * _NOTE.size]
    for ordinal, process_id, first, since_ns, total in _NOTE.iter_unpack(written):
        if process_id and total == ordinal + process_id * 3 + first * 5 + since_ns * 7 & _MASK:
            other = notes.get((ordinal, first))
            if other is None or other.since_ns < since_ns:
                notes[ordinal, first] = Note(process_id, since_ns)
    there = set(filter(_is_there, {note.process_id for note in notes.values()}))
    return {claim: note for claim, note in notes.items() if note.process_id in there}


def _is_there(process_id: int) -> bool:
    """Tell whether a process has not ended."""
    try:
        os.kill(process_id, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def find_claims(directory: str, wanted: Mapping[int, tuple[int, int]],
                page: SharedPage) -> Mapping[int, list[Span]] | None:
    """
    Find the messages that consumers hold right now: two questions to the kernel for each consumer.

    Rejected: ``/proc/locks``, which lists the locks of the whole machine, and names files by a device
    that is not that of ``stat`` on some file systems.

    :param wanted: first number and number after the last, by the ordinal of the subscriber
    :return: claims by the ordinal; None if the system does not tell, or there are too many
    """
    # pylint: disable=too-many-locals
    path = os.path.join(directory, files.CLAIMS)
    if not os.path.lexists(path):
        return {ordinal: [] for ordinal in wanted}
    claims: dict[int, list[Span]] = {}
    notes = _read_notes(page)
    questions = 0
    with files.using(path, os.O_RDWR) as descriptor:
        for ordinal, (first, end) in wanted.items():
            base = ordinal * _NUMBERS
            claimed = claims[ordinal] = []
            ranges = [(base + first, base + end)]
            while ranges:
                begin, behind = ranges.pop()
                if begin >= behind:
                    continue
                questions += 1
                if questions > _MOST_QUESTIONS:
                    return None
                try:
                    found = _find_lock(descriptor, begin, behind - begin)
                except OSError:
                    return None
                if found is not None:
                    # The lock may begin before the range, and need not be the first one in it.
                    start, length = found
                    low = max(begin, start)
                    high = min(behind, start + length) if length else behind
                    claimed.append(Span(low - base, high - low, notes.get((ordinal, start - base))))
                    ranges += [(begin, low), (high, behind)]
            claimed.sort()
    return claims
