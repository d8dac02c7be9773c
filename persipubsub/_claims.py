"""
Claim messages for one of several competing consumers.

A claim is a lock of the kernel on bytes of a *claims file*: one byte for each message of each
subscriber, at offset subscriber index times 2**48 plus message number. The file stays empty.

The locks belong to open file descriptions (``F_OFD_SETLK``). The kernel gives them back when the
last descriptor is closed, hence at the very moment a process dies, however it dies: nothing needs
repair, there is no timeout to wait for. A stopped process (SIGSTOP, a debugger) keeps its claims.
Leases with a time stamp in the store were rejected: they cost a commit each, and a timeout too long
for those who wait or too short for those who work. Locks of one description never conflict with
each other, so each claim in progress has a descriptor for itself, kept for the next claim.

**Fork.** A child shares the descriptions of its parent. If it kept them, a claim would outlive the
parent; if it unlocked a byte, the parent's claim would be gone. So a child forked by Python closes
them at once without unlocking. Claims which it inherited are dead. All are closed on exec.

**A deleted file.** Who opens a file that was made anew locks other bytes than those who opened it
before. Only opening one more descriptor notices that; to look on each claim would double its cost.

**Systems without such locks** (macOS) fall back to POSIX record locks, which belong to a process as
a whole: a table in memory keeps its claims apart. The kernel drops all those of a process on a file
when the process closes any descriptor of it, so the file is opened once in a process and never
closed. Both kinds exclude each other between processes; do not mix them on a file in one process.
"""

import collections
import contextlib
import errno
import fcntl
import io
import os
import stat
import struct
import sys
import threading
import weakref
from typing import Final

from persipubsub import _fork_guard, errors
from persipubsub.environment import _files

# 2**15 subscribers times 2**48 numbers fill exactly the non-negative offsets of a file.
_NUMBER_BITS: Final = 48
_NUMBERS: Final = 1 << _NUMBER_BITS
_SUBSCRIBERS: Final = 1 << 15
_MAX_IDLE: Final = 64  # descriptors, so that a burst of claims does not pin thousands of them

# struct flock of <fcntl.h> with native alignment: (type, whence, start, length, process) on Linux,
# (start, length, process, type, whence) on macOS and the BSDs
_IS_LINUX: Final = sys.platform == "linux"
_FLOCK: Final = struct.Struct("hhqqi4x" if _IS_LINUX else "qqihh8x")

# Other systems that have these constants get POSIX locks: nobody tested what theirs do on fork.
_SETLK: Final[int] = getattr(fcntl, "F_OFD_SETLK", -1) if _IS_LINUX else -1
_GETLK: Final[int] = getattr(fcntl, "F_OFD_GETLK", -1) if _IS_LINUX else -1


def _flock(kind: int, start: int, length: int) -> bytes:
    """Pack a lock. The process must be 0 for locks of descriptions; length 0 means to the end."""
    if _IS_LINUX:
        return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    return _FLOCK.pack(start, length, 0, kind, os.SEEK_SET)


def _has_description_locks() -> bool:
    """Ask the kernel whether it knows locks of open file descriptions (Linux since 3.15)."""
    with contextlib.suppress(OSError), open(os.devnull, "rb+", buffering=0) as null:
        return bool(fcntl.fcntl(null, _GETLK, _flock(fcntl.F_WRLCK, 0, 1)))
    return False


_UNLOCK_ALL: Final = _flock(fcntl.F_UNLCK, 0, 0)

_Registry = dict[io.FileIO, "weakref.ref[_Holder]"]  # files and who holds locks with them


class _Holder:
    """
    Hold locks as one open file description.

    Only who popped it from the pool, or popped the ticket of its claim, may use it. So there is no
    lock here, and neither threads nor signal handlers ever wait for each other.
    """

    __slots__ = ("file", "descriptor", "path", "process_id", "registry", "ticket", "__weakref__")
    set_command, get_command = _SETLK, _GETLK

    def __init__(self, file: io.FileIO, path: str, registry: _Registry) -> None:
        self.file = file
        self.descriptor = file.fileno()
        self.path = path
        self.process_id = os.getpid()
        self.ticket: list[None] = []  # of the claim in progress, see Claim
        self.registry = registry
        registry[file] = weakref.ref(self)

    def lock(self, start: int, length: int) -> bool:
        """Lock the bytes, or return False if another holder has any of them."""
        return self._set(_flock(fcntl.F_WRLCK, start, length))

    def unlock(self, start: int, length: int) -> None:
        """Unlock the first or the last bytes of those locked."""
        self._set(_flock(fcntl.F_UNLCK, start, length))

    def unlock_all(self) -> None:
        """Unlock all that this holder has."""
        self._set(_UNLOCK_ALL)

    def _set(self, flock: bytes) -> bool:
        try:
            fcntl.fcntl(self.descriptor, self.set_command, flock)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # POSIX allows either.
                return False
            raise _files.translate_os_error(error, self.path, doing="lock") from error
        return True

    def conflict(self, start: int, length: int) -> int | None:
        """Return a byte of the range that another holder has, not always the first; or None."""
        flock = _flock(fcntl.F_WRLCK, start, length)
        with _files.translated(self.path, doing="query"):
            fields = _FLOCK.unpack(fcntl.fcntl(self.descriptor, self.get_command, flock))
        kind, found = (fields[0], fields[2]) if _IS_LINUX else (fields[3], fields[0])
        return None if kind == fcntl.F_UNLCK else max(int(found), start)

    def discard(self) -> None:
        """Unlock all and close; in a forked child, close only."""
        _give_up(self.file, self.registry, self.process_id)

    def __del__(self) -> None:
        """Give back what an exception, say KeyboardInterrupt, kept from being given back."""
        with contextlib.suppress(Exception):  # At exit, modules may be torn down already.
            self.discard()


def _give_up(file: io.FileIO, registry: _Registry, process_id: int) -> None:
    """Unlock all and close. It may be repeated, by any thread: file objects close only once."""
    # Unlock before closing, as another thread may fork in between: its child would share the lock.
    # Never in a child, where finalizers may run before our hook.
    with contextlib.suppress(OSError, ValueError):
        if process_id == os.getpid():
            fcntl.fcntl(file, _SETLK, _UNLOCK_ALL)
    file.close()
    registry.pop(file, None)


class _SharedFile:
    """Be the only descriptor of a claims file in a process, with POSIX locks."""

    def __init__(self, file: io.FileIO) -> None:
        self.file = file  # which does not close the descriptor
        # Range (first byte, end) of each holder
        self.table: dict["weakref.ref[_Holder]", tuple[int, int]] = {}
        # Guards the table and its agreement with the kernel. No lock is taken inside. Re-entrant,
        # as a finalizer may run anywhere.
        self.guard = threading.RLock()


class _TableHolder(_Holder):
    """Hold one range as an entry in a table, simple and slow with many: few systems need it."""

    __slots__ = ("shared", "reference")
    set_command, get_command = fcntl.F_SETLK, fcntl.F_GETLK

    def __init__(self, shared: _SharedFile, path: str) -> None:
        super().__init__(shared.file, path, registry={})
        self.shared = shared
        self.reference: "weakref.ref[_Holder]" = weakref.ref(self)

    def lock(self, start: int, length: int) -> bool:
        with self.shared.guard:
            if self.conflict(start, length) is not None:
                return False
            # Before the lock: whatever comes in between, it is known what to unlock.
            self.shared.table[self.reference] = (start, start + length)
            locked = super().lock(start, length)
            if not locked:
                self.shared.table.pop(self.reference)
            return locked

    def unlock(self, start: int, length: int) -> None:
        with self.shared.guard:
            first, end = self.shared.table[self.reference]
            super().unlock(start, length)
            first, end = (start + length, end) if start == first else (first, start)
            self.shared.table[self.reference] = (first, end)

    def unlock_all(self) -> None:
        self._forget(self.reference)

    def conflict(self, start: int, length: int) -> int | None:
        with self.shared.guard:
            for reference, (first, end) in list(self.shared.table.items()):
                if reference() is None:
                    self._forget(reference)
                elif reference is not self.reference and first < start + length and start < end:
                    return max(first, start)
            return super().conflict(start, length)

    def discard(self) -> None:
        if self.process_id == os.getpid():
            self._forget(self.reference)

    def _forget(self, reference: "weakref.ref[_Holder]") -> None:
        with self.shared.guard:
            if reference in self.shared.table:
                first, end = self.shared.table[reference]
                super().unlock(first, end - first)
                self.shared.table.pop(reference)


_instances: "weakref.WeakSet[Claims]" = weakref.WeakSet()

# Used with the guard of forks, which is held while a descriptor is opened and registered: no fork
# falls between the two.
_shared_files: dict[tuple[int, int], _SharedFile] = {}


class Claim:
    """
    Have a range of messages to yourself until :py:meth:`release`.

    One consumer uses it. ``release`` may be called twice, and by any thread: only one call gives
    back. A claim that was dropped is given back by the garbage collector.
    """

    __slots__ = ("first", "count", "_base", "_claims", "_holder", "ticket")

    def __init__(self, claims: "Claims", holder: _Holder, base: int, first: int,
                 count: int) -> None:
        """Initialize; only :py:class:`Claims` does. Message 0 is at the offset ``base``."""
        self.first = first
        self.count = count
        self._base = base
        self._claims = claims
        self._holder = holder
        # Who pops the ticket (which is atomic) may use the holder. A lock was rejected: a signal
        # handler that closes the subscriber would wait for the very code that it interrupted.
        self.ticket: list[None] = [None]

    def narrow(self, first: int, count: int) -> None:
        """
        Give back what is outside of a sub-range, which stays claimed all the time. Never blocks.

        Nothing happens after ``release``. Do not call both at the same time.

        :param first: number of the first message to keep
        :param count: number of messages to keep, at least 1
        :raise StoreError: if it is not a sub-range, or the operating system fails
        """
        if not self.first <= first < first + count <= self.first + self.count:
            raise errors.StoreError(
                "Expected a part of the {} number(s) from {} in {}, but got: {!r} from {!r}".format(
                    self.count, self.first, self._claims.path, count, first))
        try:
            self.ticket.pop()
        except IndexError:
            return
        try:
            end = self.first + self.count
            for start, stop in ((self.first, first), (first + count, end)):
                if start < stop:
                    self._holder.unlock(self._base + start, stop - start)
            self.first, self.count = first, count
        finally:
            self.ticket.append(None)
            if self._claims.closed:
                self.release()

    def release(self) -> None:
        """
        Give back. Never blocks. Nothing happens the second time, nor in a forked child.

        :raise StoreError: if the operating system fails; it is given back even then
        """
        try:
            self.ticket.pop()
        except IndexError:
            return
        holder = self._holder
        # From now on the pool alone says how long the descriptor stays open.
        del self._holder
        # In a child before the hook below ran: the claim belongs to the parent.
        if holder.process_id != os.getpid():
            return
        try:
            holder.unlock_all()
        except BaseException:
            holder.discard()
            raise
        self._claims.put_idle(holder)


class Claims:
    """
    Claim messages of the subscribers of one queue.

    Any number of threads and processes may call the methods at the same time. None of them blocks.
    A claim excludes all others, those of the same thread too.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     claims = Claims(path=os.path.join(directory, "claims"))
    ...     claim = claims.claim(subscriber=0, first=7)
    ...     print(claim.first, claims.claim(subscriber=0, first=7))
    ...     claim.release()
    ...     print(claims.is_claimed(subscriber=0, first=7))
    ...     claims.close()
    7 None
    False
    """

    def __init__(self, path: str, _ofd: bool = True) -> None:
        """
        Initialize without touching the file. It is opened, and made (mode 0600), at the first use.

        :param path: of the claims file, in a directory that exists
        :param _ofd: False to fall back to POSIX locks
        """
        # Absolute, since more descriptors are opened later: the process may change its directory.
        self.path = os.path.abspath(path)
        self._ofd = _ofd and _has_description_locks()
        self.closed = False
        self._identity: tuple[int, int] | None = None  # device and inode as first opened
        # Appending to a deque and popping are documented as safe between threads. A full one drops
        # its oldest holder, which closes itself.
        self.idle: collections.deque[_Holder] = collections.deque(maxlen=_MAX_IDLE)
        self.registry: _Registry = {}
        self.holders: "weakref.WeakSet[_Holder]" = weakref.WeakSet()  # idle or not
        _instances.add(self)

    def claim(self, subscriber: int, first: int, count: int = 1) -> Claim | None:
        """
        Claim all messages of a range, or none.

        :param subscriber: index of the subscriber, less than 2**15
        :param first: number of the first message, less than 2**48
        :param count: number of messages, at least 1
        :return: the claim; None if any of the messages is claimed already, by whomever
        :raise ClosedError: after :py:meth:`close`
        :raise AccessError: if the file may not be made or written, or is a symbolic link
        :raise StoreError: if the operating system fails, say without a free file descriptor
        """
        start = self.start_of(subscriber, first, count)
        holder = self.take_idle()
        # Made before the lock: nothing is called between the lock and the return, so that a
        # KeyboardInterrupt comes either inside of the try block or to the caller.
        claim = Claim(self, holder, start - first, first, count)
        try:
            locked = holder.lock(start, count)
        except BaseException:
            # Nobody knows whether it was locked, and the traceback keeps it from being collected.
            holder.discard()
            raise
        if not locked:
            self.put_idle(holder)
            for file, reference in self.registry.copy().items():
                if reference() is None:  # since a KeyboardInterrupt came up in the finalizer, too
                    _give_up(file, self.registry, os.getpid())
            return None
        holder.ticket = claim.ticket
        if self.closed:
            # Another thread called close, maybe before it could see this ticket. This raises:
            claim.release()
            return self.claim(subscriber, first, count)
        return claim

    def claim_prefix(self, subscriber: int, first: int, count: int) -> Claim | None:
        """
        Claim the longest part of a range that begins with ``first`` and is free.

        It may be shorter than possible when others claim and give back at the same moment.

        :param subscriber: index of the subscriber, less than 2**15
        :param first: number of the first message, less than 2**48
        :param count: number of messages at most, at least 1
        :return: the claim of at least one message; None if the first one is claimed already
        """
        start = self.start_of(subscriber, first, count)
        for _ in range(8):  # Whoever loses that many races is content with a single number.
            claim = self.claim(subscriber, first, count)
            if claim is not None:
                return claim
            count = self._free_prefix(start, count)
            if count == 0:
                return None
        return self.claim(subscriber, first, 1)

    def is_claimed(self, subscriber: int, first: int, count: int = 1) -> bool:
        """
        Tell whether anybody, in this process or another, has claimed any message of a range.

        :param subscriber: index of the subscriber, less than 2**15
        :param first: number of the first message, less than 2**48
        :param count: number of messages, at least 1
        :return: True if claimed
        """
        return self._free_prefix(self.start_of(subscriber, first, count), count) < count

    def close(self) -> None:
        """Give back whatever is still claimed, and close the file; idempotent."""
        self.closed = True
        with contextlib.suppress(IndexError):
            while True:
                self.idle.pop().discard()
        with _fork_guard.LOCK:
            for holder in list(self.holders):
                with contextlib.suppress(IndexError):
                    holder.ticket.pop()
                    holder.discard()

    def start_of(self, subscriber: int, first: int, count: int) -> int:
        """Return the offset of the first message; raise if it is no range of one subscriber."""
        # Zero bytes would be all up to the end for the kernel.
        if not (0 <= subscriber < _SUBSCRIBERS and 0 <= first and 1 <= count <= _NUMBERS - first):
            raise errors.StoreError(
                "Expected a subscriber below 2**15 and some numbers below 2**48 for {}, "
                "but got: {!r}, {!r} from {!r}".format(self.path, subscriber, count, first))
        return (subscriber << _NUMBER_BITS) + first

    def _free_prefix(self, start: int, count: int) -> int:
        """Count the messages before the first one that is claimed."""
        holder = self.take_idle()  # It has no locks itself, so it sees those of everybody.
        while count > 0 and (found := holder.conflict(start, count)) is not None:
            count = found - start
        self.put_idle(holder)
        return count

    def take_idle(self) -> _Holder:
        """Take a holder that has no locks."""
        try:
            return self.idle.pop()
        except IndexError:
            return self._open()

    def put_idle(self, holder: _Holder) -> None:
        """Keep a holder that has no locks for the next claim."""
        self.idle.append(holder)
        if self.closed:
            self.close()

    def _open(self) -> _Holder:
        """Make one more holder."""
        with _fork_guard.LOCK, _files.translated(path=self.path, doing="open"):
            if self.closed:
                raise errors.ClosedError(f"Expected {self.path} in use, but got: closed")
            if self._ofd:
                file = io.FileIO(_files.open_own_file(self.path), "r+")
                holder = _Holder(file, self.path, self.registry)
                self._identify(os.fstat(holder.descriptor))
            else:
                holder = self._open_table()
            self.holders.add(holder)
            return holder

    def _open_table(self) -> _Holder:
        """Open the file unless this process has it open."""
        shared = None
        with contextlib.suppress(OSError):
            status = os.lstat(self.path)
            shared = _shared_files.get((status.st_dev, status.st_ino))
        if shared is None:
            file = io.FileIO(_files.open_own_file(self.path), "r+", closefd=False)
            status = os.fstat(file.fileno())
            shared = _shared_files.setdefault((status.st_dev, status.st_ino), _SharedFile(file))
        self._identify(status)
        return _TableHolder(shared, self.path)

    def _identify(self, status: os.stat_result) -> None:
        """Raise unless it is a regular file, and the one that was opened first."""
        found = (status.st_dev, status.st_ino)
        self._identity = self._identity or found
        if not stat.S_ISREG(status.st_mode) or self._identity != found:
            raise errors.StoreError(
                "Expected {} to be a regular file that stays in place, but got: {}, {} after {}".
                format(self.path, stat.filemode(status.st_mode), found, self._identity))


def _after_fork_in_child() -> None:
    """Close what the parent uses. The other threads of the parent do not exist here."""
    for claims in list(_instances):
        for holder in list(claims.holders):
            holder.ticket.clear()
        for file in claims.registry:
            with contextlib.suppress(OSError):  # Another hook may have closed everything.
                file.close()
        claims.registry.clear()
        claims.idle.clear()
    for shared in _shared_files.values():
        shared.table.clear()
        shared.guard = threading.RLock()
    _shared_files.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
