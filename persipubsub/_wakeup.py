"""
Wait for other processes and wake them, without polling while nothing happens.

A bell is a file of one page beside the queue, mapped by all. Its first byte, the flag, says that
somebody may be asleep. Whoever published rings: if the flag is set, clear it, put a stamp never
used before into the page, and read a byte of the file, which inotify reports to all who watch it.
The number behind the new message is put there as well, which spares those who wake up a look.
Rejected: to write a byte. It needs the journal for the time of modification, and took 14 instead
of 7 microseconds from the call to the other's ``poll``. A read works on a full disk, too.

Why no wake-up is lost: the publisher does C: commit, R: read the flag, and if it was set K: clear
it, B: ring. The waiter does W: watch the file, N: forget former rings, S: set the flag, F: full
memory fence, L: look. Assume that the look L misses the commit C; then it is rung after S:

* L misses C, thus C, and R after it, come after S. (F keeps L from being done before others see S.
  Between C and R, LMDB unlocks its mutex and the interpreter lock is taken: a fence as well.)
* R reads 1: K and B follow, after W and N. The kernel queues the event, somebody in this process
  reads it and rings the ticket, and nothing forgets it.
* R reads 0: S had set the flag, thus another publisher's K came between S and R. Its B follows
  and wakes the waiter, which starts over with a new S, and sees C or is at the top of this list.

So every K needs its B: Python interrupts nothing between the two. A publisher killed there loses
a ring, for which callers look at the queue once a second anyhow. B before K would be wrong: K
could undo the S of the waiter that B woke. A waiter that was killed costs one needless ring.

Users have 128 inotify instances, so a process has one, and no thread of its own: one of the waiting
threads, the leader, polls it and rings the tickets of the others, the followers, who sleep at a
gate each. A leader that leaves appoints another. Events are read, and tickets rung, under the lock
under which a waiter checks that it was not rung; what nobody read stays in the kernel.

Without inotify, or with ``PERSIPUBSUB_POLLING`` in the environment, the leader polls the stamps
every 0.1 to 5 milliseconds. A stamp is the time: of two counters, one could bring a number back.
"""

import errno
import os
import select
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Optional

import persipubsub.errors
from persipubsub import _inotify
from persipubsub.environment import _files

__all__ = ["Bell", "Ticket", "dispatch"]

_PAGE_BYTES, _FLAG, _UNUSED = 4096, 0, 128  # bytes from the last one on have no meaning
_STAMP, _END, _STAMP_AND_END = slice(64, 72), slice(72, 80), slice(64, 80)  # not beside the flag

_SHORTEST_POLL_SECS, _LONGEST_POLL_SECS = 0.0001, 0.005
_RETRY_SECS = 1.0  # between attempts to get inotify
_LONGEST_SLEEP_SECS = 3600.0  # poll(2) overflows after 24 days
_LONGEST_HOLD_SECS = 0.02  # a lock held for longer is held by the code that a handler interrupted


class _File:
    """
    Hold the open and mapped file of a bell, and what the hub knows of it.

    The descriptor is closed when the last user drops the object, never before: a thread that rings
    while another one closes the bell must not touch a file that got the same number.
    """

    def __init__(self, path: str) -> None:
        """Open the file, and create it if missing. Any number of processes may do so at once."""
        self.path = path
        self.tickets: dict["Ticket", None] = {}
        self.watch = -1  # inotify's number for the file
        self.stamp = b""  # when polled last; the first poll rings once without a need
        self.descriptor = _files.open_own_file(path)
        with _files.translated(path=path, doing="map"):
            status = os.fstat(self.descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            # Written, as a hole is SIGBUS on a full disk; not its beginning: the flag may be set.
            filling = bytes(_PAGE_BYTES - _UNUSED)
            if (status.st_size < _PAGE_BYTES
                    and os.pwrite(self.descriptor, filling, _UNUSED) < len(filling)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.page = _files.map_file(self.descriptor, _PAGE_BYTES)

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        """Close the descriptor, if there is one yet."""
        if hasattr(self, "descriptor"):
            _close(self.descriptor)

    def ring(self, end: int) -> None:
        """Clear the flag, and wake all who watch or poll the file."""
        rung = struct.pack("=QQ", time.monotonic_ns(), end)
        # Python raises KeyboardInterrupt after calls: there is none from clearing to reading.
        self.page[_FLAG] = 0
        self.page[_STAMP_AND_END] = rung
        try:
            os.pread(self.descriptor, 1, _PAGE_BYTES - 1)
        except OSError:
            self.page[_FLAG] = 1  # the message is safe: do not fail, the next publisher rings


class _Hub:  # pylint: disable=too-many-instance-attributes
    """Share one inotify instance between all bells and threads of a process."""

    def __init__(self) -> None:
        """Initialize without any descriptor."""
        # Guards all attributes, and those of files and tickets. The innermost lock but the guard
        # of forks: nothing is called back or waited for while it is held. Not re-entrant.
        self.lock = threading.Lock()
        self.files: dict["Bell", _File] = {}
        self.watched: dict[int, list[_File]] = {}  # several bells on one file have one watch
        self.polled: dict[_File, None] = {}
        self.leader: Optional["Ticket"] = None
        self.leader_polls = False
        self.followers: dict["Ticket", None] = {}  # asleep and not rung; empty without a leader
        self.callbacks: list[Callable[[], object]] = []  # of rung tickets, still to be called
        self.closing: list["Bell"] = []  # to be forgotten; without the lock, appending is atomic
        self.inotify = -1
        self.nudge = -1  # eventfd that gets the leader out of poll()
        self.poller: Any | None = None  # select.poll on both; for the leader only
        self.retry_at = 0.0

    def register(self, bell: "Bell", file: _File) -> "Ticket":
        """Return a new ticket for the bell, whose file is watched or polled from now on."""
        with self.lock:
            file = self.files.setdefault(bell, file)
            if file.watch < 0 and not self._watch(file) and file not in self.polled:
                self.polled[file] = None
                if self.leader is not None:
                    self._signal(self.leader)  # it may be in poll() for long
            ticket = Ticket(hub=self, file=file)
            file.tickets[ticket] = None
            return ticket

    def _watch(self, file: _File) -> bool:
        """Try to watch the file, at most once a second if that fails."""
        now = time.monotonic()
        if sys.platform != "linux" or now < self.retry_at or os.environ.get("PERSIPUBSUB_POLLING"):
            return False
        try:
            if self.nudge < 0:
                self.nudge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            if self.poller is None:
                self.inotify = _inotify.start()
                poller = select.poll()
                poller.register(self.nudge, select.POLLIN)
                poller.register(self.inotify, select.POLLIN)
                self.poller = poller
            watch = _inotify.watch(self.inotify, file.path)
            # Rejected: /proc/self/fd/N needs no check, but is forbidden after setuid.
            if not os.path.samestat(os.lstat(file.path), os.fstat(file.descriptor)):
                raise OSError(errno.ESTALE, "Another file took the place", file.path)
        except (OSError, AttributeError, ImportError):  # the latter: a C library without inotify
            self.retry_at = now + _RETRY_SECS
            return False
        file.watch = watch
        self.watched.setdefault(watch, []).append(file)
        self.polled.pop(file, None)
        return True

    def close_descriptors(self) -> None:
        """Give the inotify instance back. Only where nobody polls: in a child, without a leader."""
        # Forgotten first: another thread may fork when they are closed, and its child must not
        # close files that got the same numbers.
        descriptors = (self.inotify, self.nudge)
        self.inotify, self.nudge, self.poller = -1, -1, None
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)

    def forget(self, bell: "Bell") -> None:
        """
        Wake all waiters of the bell for good, and watch its file no longer.

        If a signal handler interrupted the holder of the lock, that one does it, in leave() or
        dispatch(). Rejected: a re-entrant lock, as it shows half-done changes.
        """
        self.closing.append(bell)
        taken: list[bool] = []
        try:
            # Noted before the call returns: an interrupt behind it would leave the lock taken.
            taken.extend(map(self.lock.acquire, (True, ), (_LONGEST_HOLD_SECS, )))
            while taken == [True] and self.closing:
                self._forget(self.closing.pop())
        finally:
            if taken == [True]:
                self.lock.release()
        if taken == [True]:
            self._call_back()

    def _forget(self, bell: "Bell") -> None:
        file = self.files.pop(bell, None)
        if file is not None:
            same = self.watched.get(file.watch, [])
            if same == [file]:
                del self.watched[file.watch]
                _inotify.forget(self.inotify, file.watch)
            elif file in same:  # not if it was closed between being opened and registered
                same.remove(file)
            self.polled.pop(file, None)
            for ticket in file.tickets:
                ticket.closed = True
            self._ring(file)
            file.tickets.clear()  # else it stays open until the garbage is collected
            if not (self.files or self.leader):
                self.close_descriptors()

    def dispatch(self, by_leader: bool = False) -> bool:
        """Ring the tickets of all bells that rang, without blocking. Return True if any did."""
        with self.lock:
            self.leader_polls = self.leader_polls and not by_leader
            try:
                rang = self._drain()
            except BaseException:
                # A KeyboardInterrupt, for example, and events that were read may be lost with it.
                for file in self.files.values():
                    self._ring(file)
                raise
        self._call_back()
        return rang

    def _drain(self) -> bool:
        events = b""
        if self.inotify >= 0:
            try:
                events = os.read(self.inotify, 256 * _inotify.EVENT.size)
            except BlockingIOError:
                pass
        rang = bool(events)
        # IN_IGNORED, after we removed a watch, finds nobody. The kernel removes none of open files.
        for watch, mask, _, _ in _inotify.EVENT.iter_unpack(events):
            overflow = mask & _inotify.OVERFLOW
            for file in self.files.values() if overflow else self.watched.get(watch, ()):
                self._ring(file)
        for file in self.polled:
            stamp = file.page[_STAMP]
            if stamp != file.stamp:
                rang = True
                file.stamp = stamp
                self._ring(file)
        return rang

    def _ring(self, file: _File) -> None:
        for ticket in file.tickets:
            if not ticket.rung:
                ticket.rung = True
                self.followers.pop(ticket, None)  # not fit to lead
                if ticket.callback is not None:
                    self.callbacks.append(ticket.callback)
                self._signal(ticket)

    def _signal(self, ticket: "Ticket") -> None:
        """Make the thread of the ticket check again whether it was rung, and whether it leads."""
        if ticket.gate.locked():
            ticket.gate.release()
        if ticket is self.leader and self.leader_polls:
            os.eventfd_write(self.nudge, 1)

    def _call_back(self) -> None:
        """Call the callbacks of rung tickets; without the lock, which they may need."""
        if self.closing:
            self.forget(self.closing.pop())
        while self.callbacks:
            with self.lock:
                callbacks, self.callbacks = self.callbacks, []
            for callback in callbacks:
                try:
                    callback()
                except RuntimeError:
                    pass  # its event loop was closed: nobody waits there, but others do elsewhere

    def wait(self, ticket: "Ticket", deadline: float) -> bool:
        """Block until the ticket is rung, or until the monotonic deadline; call leave() after."""
        delay = _SHORTEST_POLL_SECS
        while True:
            remaining = min(deadline - time.monotonic(), _LONGEST_SLEEP_SECS)
            with self.lock:
                if ticket.rung or ticket.closed:
                    ticket.rung = False
                    return True
                if remaining <= 0:
                    return False
                if self.leader is None:
                    self.leader = ticket
                leads = self.leader is ticket
                poller = self.poller if leads else None
                if leads:
                    self.leader_polls = poller is not None
                    remaining = min(remaining, delay) if self.polled else remaining
                else:
                    self.followers[ticket] = None
            if poller is None:
                ticket.gate.acquire(timeout=remaining)  # pylint: disable=consider-using-with
            else:
                for descriptor, _ in poller.poll(remaining * 1000):
                    if descriptor == self.nudge:
                        os.eventfd_read(descriptor)
            if leads:
                rang = self.dispatch(by_leader=True)
                delay = _SHORTEST_POLL_SECS if rang else min(2 * delay, _LONGEST_POLL_SECS)

    def leave(self, ticket: "Ticket") -> None:
        """Hand leadership over if the ticket has it. May be called again."""
        with self.lock:
            self.followers.pop(ticket, None)
            if self.leader is ticket:
                self.leader_polls = False
                self.leader = self.followers.popitem()[0] if self.followers else None
                if self.leader is not None:
                    self._signal(self.leader)
                elif not self.files:
                    self.close_descriptors()
        if self.closing:
            self.forget(self.closing.pop())


_hub = _Hub()


def _forget_parent() -> None:
    """Start anew in a child: it would steal the parent's events, and locks may be locked in it."""
    global _hub  # pylint: disable=global-statement
    _hub.close_descriptors()
    _hub = _Hub()


os.register_at_fork(after_in_child=_forget_parent)


class Ticket:
    """Be one waiter of a bell, for one thread. It may be rung without a need: look again."""

    def __init__(self, hub: _Hub, file: _File) -> None:
        """Initialize as not rung. Only :py:meth:`Bell.prepare` does that."""
        self.file = file
        self.rung = False
        self.closed = False
        # Guards nothing: the waiter sleeps by locking it twice, and others unlock it, under the
        # hub's lock. Rejected: threading.Condition, with a new lock for every sleep.
        self.gate = threading.Lock()
        self.gate.acquire()  # pylint: disable=consider-using-with
        self.callback: Callable[[], object] | None = None
        self._hub = hub
        self._fence = threading.Lock()  # guards nothing, see arm()

    def __enter__(self) -> "Ticket":
        """Return the ticket itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the ticket."""
        self.close()

    def arm(self) -> None:
        """
        Forget former rings, set the flag: every commit that a look after this misses will ring.

        Never blocks. The flag must be visible before the look reads anything, but processors delay
        a store past later loads. Locking and unlocking twice is a full fence: on x86 every atomic
        instruction is one, on ARM unlocking is not passed by locking. Rejected: ``sched_yield`` and
        ``membarrier``, which cost a system call.
        """
        self.rung = False
        self.file.page[_FLAG] = 1
        with self._fence:
            pass
        with self._fence:
            pass

    def wait(self, timeout: float) -> bool:
        """
        Block until the bell rings. An exception, as of a signal, leaves everything in order.

        :param timeout: most time to block, in seconds; only check whether it rang if not positive
        :return: True if rung since :py:meth:`arm` or the last ``wait``, or closed meanwhile
        :raise ClosedError: if ticket or bell were closed before, or are of the parent process
        """
        hub = self._hub
        if self.closed or hub is not _hub:
            raise persipubsub.errors.ClosedError(
                f"Expected an open bell of this process, but got: {self.file.path!r}")
        if timeout <= 0:
            hub.dispatch()
        try:
            return hub.wait(ticket=self, deadline=time.monotonic() + timeout)
        finally:
            hub.leave(self)

    @property
    def end(self) -> int:
        """Return what the last who woke anybody by :py:meth:`Bell.ring` gave as ``end``."""
        return int.from_bytes(self.file.page[_END], sys.byteorder)

    def set_callback(self, callback: Callable[[], object] | None) -> None:
        """
        Have the callback called when the ticket is rung, once after each :py:meth:`arm`.

        :param callback: called by who notices the ring, or at once if it rang already; short, and
            never raising but ``RuntimeError`` by ``loop.call_soon_threadsafe``
        """
        with self._hub.lock:
            self.callback = callback
            rung = self.rung
        if rung and callback is not None:
            callback()

    def fileno(self) -> int:
        """
        Return the descriptor for ``loop.add_reader`` and ``dispatch``. Closing may close it, too.

        :return: inotify's; -1 without inotify: call :py:func:`dispatch` every few milliseconds
        """
        return self._hub.inotify if self.file.watch >= 0 and self._hub is _hub else -1

    def close(self) -> None:
        """Unregister the waiter. Never blocks, and may be called again."""
        self.closed = True
        if self._hub is _hub:
            with self._hub.lock:
                self.file.tickets.pop(self, None)
            self._hub.leave(self)


class Bell:
    """
    Wake the waiters of all processes. All threads may use it at the same time.

    The first call of :py:meth:`ring` or :py:meth:`prepare` opens or creates the file, and may raise
    ``AccessError``, ``DiskFullError``, ``NotInitializedError`` or ``StoreError``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     bell = Bell(os.path.join(directory, "bell"))
    ...     with bell.prepare() as ticket:
    ...         bell.ring()
    ...         ticket.wait(timeout=60)
    ...     bell.close()
    True
    """

    def __init__(self, path: str) -> None:
        """Initialize with the path of the bell file. It is not touched before the first use."""
        self._path = os.path.abspath(path)  # the program may change its directory before
        self._file: _File | None = None
        self._opened_by: _Hub | None = None
        self._closed = False

    def _open(self) -> _File:
        """Return the open file; opened again in a child. Several threads may do so at once."""
        file = self._file
        if file is None or self._opened_by is not _hub:
            if self._closed:
                raise persipubsub.errors.ClosedError(
                    f"Expected an open bell, but it is closed: {self._path!r}")
            file = self._file = _File(self._path)
            self._opened_by = _hub
        return file

    def ring(self, end: int = 0) -> None:
        """
        Wake all who prepared to wait, in all processes. Call it after the commit, never before.

        Never blocks, takes no lock: one load from memory if nobody sleeps, else one system call.

        :param end: all below are committed, or never will be, see :py:attr:`Ticket.end`; 0: look
        """
        file = self._file
        if file is None or self._opened_by is not _hub:
            file = self._open()
        if file.page[_FLAG]:
            file.ring(end)

    def prepare(self) -> Ticket:
        """
        Return a new waiter, armed: look at the queue, and sleep if there is nothing. Never blocks.

        :return: for one thread; use it in a ``with`` statement, so that it is closed in any case
        """
        ticket = _hub.register(bell=self, file=self._open())
        if self._closed:  # by another thread, too early to find the ticket
            self.close()
            self._open()  # raises the error
        ticket.arm()
        return ticket

    def close(self) -> None:
        """
        Wake this bell's waiters in this process: all calls raise ``ClosedError`` from now on.

        Blocks for 20 milliseconds at most, also in a signal handler, and may be called again.
        """
        self._closed = True
        self._file = None
        _hub.forget(self)


def dispatch() -> None:
    """Ring the tickets of all bells that rang. Never blocks, any thread may call it at any time."""
    _hub.dispatch()
