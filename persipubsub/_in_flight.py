"""
Find the messages that consumers hold claims on right now: how many, in which process, since when.

The kernel is asked for a lock in a range, then for those beside it: two questions for each consumer
at work, however many messages wait. ``/proc/locks`` was rejected: it lists the locks of the whole
machine, and names files by a device that is not that of ``stat`` on some file systems.

The kernel does not tell who has a lock of a description, and since when. Consumers note that on a
*board*, a small file that all of them have mapped: a few bytes are set in memory, no call is made.
What stands there is only believed of what the kernel says is claimed, and of a process that is
there. It is for people to look at: nothing is decided by it.
"""

import errno
import fcntl
import mmap
import os
import stat
import struct
import sys
from collections.abc import Mapping
from typing import Final, NamedTuple

import persipubsub.errors
from persipubsub.environment import _files
from persipubsub.store import _clock

#: The offset of a claim is the subscriber's ordinal times this, plus the message's number.
_NUMBERS: Final = 1 << 48

#: Whoever has more consumers at work at once does not count them: each question walks a list.
_MOST_QUESTIONS: Final = 10000

#: struct flock of Linux: type, whence, start, length, process.
_FLOCK: Final = struct.Struct("hhqqi4x")

#: Only there do claims belong to descriptions, so that a new descriptor sees those of everybody.
_GETLK: Final[int] = getattr(fcntl, "F_OFD_GETLK", -1) if sys.platform == "linux" else -1

#: Number of notes on a board. Who claims a message whose number differs by a multiple of it writes
#: over the note of the other one, of which nothing is known then.
_NOTES: Final = 1024

#: Subscriber's ordinal, process, first number, time since boot in nanoseconds, and a sum of all of
#: it, by which a note is known that is half written.
_NOTE: Final = struct.Struct("<IIQQQ")

_NOTE_BYTES: Final = 32

_BOARD_BYTES: Final = _NOTES * _NOTE_BYTES


class Note(NamedTuple):
    """Hold what a consumer noted of a claim."""

    process_id: int
    since_ns: int  #: time since boot


class Span(NamedTuple):
    """Hold messages that one consumer claimed together."""

    first: int  #: number of the first one
    length: int  #: how many
    note: Note | None  #: None if nothing is known


class Board:
    """
    Note claims where other processes see them; any number of threads and processes may do so.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     board = Board(os.path.join(directory, "board"))
    ...     board.note(ordinal=0, number=7, process_id=os.getpid())
    ...     board.find(ordinal=0, number=7).process_id == os.getpid(), board.find(0, 8)
    (True, None)
    """

    def __init__(self, path: str, is_look: bool = False) -> None:
        """
        Initialize without touching the file. It is opened, and made (mode 0600), at the first use.

        :param path: of the board, in a directory that exists
        :param is_look: True for who only reads, and makes no file that would be the wrong user's
        """
        self._path = path
        self._is_look = is_look
        self._page: mmap.mmap | None = None
        self._is_missing = False

    def note(self, ordinal: int, number: int, process_id: int) -> None:
        """
        Note a claim. It never fails: without a board, nobody knows more than that it is claimed.

        :param ordinal: of the subscriber
        :param number: of the first message
        :param process_id: of this process
        """
        page = self._page
        if page is None:
            page = self._map()
            if page is None:
                return
        since_ns = _clock.ticks_ns()
        # In one call, as it is done for each message.
        _NOTE.pack_into(page, (number + ordinal) % _NOTES * _NOTE_BYTES, ordinal, process_id,
                        number, since_ns,
                        ordinal + process_id * 3 + number * 5 + since_ns * 7 & 0xffffffffffffffff)

    def find(self, ordinal: int, number: int) -> Note | None:
        """
        Find what was noted of a claim last. Whether there still is one, it does not tell.

        :param ordinal: of the subscriber
        :param number: of the first message
        :return: note of a process that is there; None if there is none
        """
        page = self._page or self._map()
        if page is None:
            return None
        found, process_id, first, since_ns, total = _NOTE.unpack_from(page, (number + ordinal) %
                                                                      _NOTES * _NOTE.size)
        if ((found, first) != (ordinal, number) or total
                != ordinal + process_id * 3 + number * 5 + since_ns * 7 & 0xffffffffffffffff
                or not _is_alive(process_id)):
            return None
        return Note(process_id, since_ns)

    def _map(self) -> mmap.mmap | None:
        """
        Map the file.

        :return: mapped bytes; None if that is not possible, which is not tried again
        """
        if self._is_missing:
            return None
        try:
            descriptor = (os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                          if self._is_look else _files.open_own_file(self._path))
            try:
                status = os.fstat(descriptor)
                is_short = status.st_size < _BOARD_BYTES
                if not stat.S_ISREG(status.st_mode) or (is_short and self._is_look):
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                # Never a part that is there: another process may have noted something in it.
                if is_short:
                    _files.extend(descriptor, status.st_size, _BOARD_BYTES)
                self._page = _files.map_file(
                    descriptor,
                    _BOARD_BYTES,
                    access=mmap.ACCESS_READ if self._is_look else mmap.ACCESS_WRITE)
            finally:
                os.close(descriptor)
        except (OSError, persipubsub.errors.PersipubsubError):
            self._is_missing = True
        return self._page


def _is_alive(process_id: int) -> bool:
    """
    Tell whether there is a process.

    :param process_id: of it
    :return: True if so, whomever it belongs to
    """
    try:
        os.kill(process_id, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def find(path: str, spans: Mapping[int, tuple[int, int]],
         board: Board | None) -> Mapping[int, list[Span]] | None:
    """
    Find claimed numbers. It takes no lock and waits for nobody.

    Consumers go on claiming and releasing meanwhile, so that it is no snapshot. The descriptor that
    is opened for it is closed at the end; no claim is lost by that.

    :param path: of the claims file; as long as there is none, nobody claimed anything
    :param spans: by subscriber's ordinal: first number to look at, number behind the last one
    :param board: on which they were noted; None for who does not want to know
    :return: in order, by ordinal; None if the system can not tell, or too many are at work
    """
    if _GETLK < 0:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return {ordinal: [] for ordinal in spans}
    except OSError:
        return None
    try:
        return _find(descriptor, spans, board)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _find(descriptor: int, spans: Mapping[int, tuple[int, int]],
          board: Board | None) -> Mapping[int, list[Span]] | None:
    """
    Find claimed numbers.

    :param descriptor: of the claims file
    :param spans: of each subscriber's ordinal: first number to look at, number behind the last one
    :param board: on which they were noted
    :return: by ordinal; None if too many are at work
    """
    claims: dict[int, list[Span]] = {}
    questions = 0
    for ordinal, (first, end) in spans.items():
        base = ordinal * _NUMBERS
        claimed: list[Span] = []
        ranges: list[tuple[int, int]] = [(base + first, base + end)]
        while ranges:
            begin, behind = ranges.pop()
            if begin >= behind:
                continue
            questions += 1
            if questions > _MOST_QUESTIONS:
                return None
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, begin, behind - begin, 0)
            kind, _, start, length, _ = _FLOCK.unpack(fcntl.fcntl(descriptor, _GETLK, asked))
            if kind != fcntl.F_UNLCK:
                # It may begin in front of the range; the kernel names any, not always the first.
                low = max(begin, start)
                high = min(behind, start + length) if length else behind
                note = None if board is None else board.find(ordinal, start - base)
                claimed.append(Span(low - base, high - low, note))
                ranges += [(begin, low), (high, behind)]
        claims[ordinal] = sorted(claimed)
    return claims
