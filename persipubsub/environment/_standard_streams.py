"""
Keep the files of a queue away from the numbers of standard input, output and error.

Whatever is printed, by a library in C or by a process that crashes, is written to these numbers,
whoever has them by then: a file that is opened after they were closed, as daemons do it at any
time. A store that has one of them is damaged by the first line that somebody prints.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

_NUMBERS: Final = (0, 1, 2)

#: If nothing can be opened in the place of a stream, a queue that works is worth more.
_MOST_ATTEMPTS: Final = 5


class _Closable(Protocol):
    """Be what can be closed."""

    def close(self) -> object:
        """Close it."""


OpenT = TypeVar("OpenT", bound=_Closable)


def occupy() -> None:
    """
    Open something in the place of standard input, output and error, as far as they are closed.

    It is to be called before any file is opened that somebody writes to. It is not enough alone:
    what it finds there may be a file that another thread is about to close.
    """
    for number in _NUMBERS:
        try:
            fcntl.fcntl(number, fcntl.F_GETFD)
        except OSError:
            # What is written to a directory fails as before. Rejected: the null device, which may
            # be missing.
            with contextlib.suppress(OSError):
                descriptor = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                if descriptor not in _NUMBERS:
                    os.close(descriptor)  # another thread was faster


def step_aside(descriptor: int) -> int:
    """
    Give a file that was just opened another number if it got that of a standard stream.

    :param descriptor: of the file; closed if it is not the one returned
    :return: descriptor, closed on exec, and none of a standard stream
    """
    if descriptor not in _NUMBERS:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, len(_NUMBERS))
    finally:
        os.close(descriptor)


def open_elsewhere(open_files: Callable[[], OpenT]) -> OpenT:
    """
    Open files whose numbers are not ours to choose, as LMDB does it and a mapping in Python.

    :param open_files: opens them; what it returns can be closed, and is if it is not returned
    :return:
        what ``open_files`` returned; none of its files is a standard stream, unless nothing can be
        opened in the place of one
    """
    for _ in range(_MOST_ATTEMPTS - 1):
        occupy()
        before = _files_of_streams()
        opened = open_files()
        # Whatever is there now: what was opened may have been replaced already.
        if _files_of_streams() == before:
            return opened
        # Somebody closed a stream since we looked. It is occupied the next time.
        opened.close()
    occupy()
    return open_files()


def _files_of_streams() -> list[tuple[int, int]]:
    """
    Tell which files are standard input, output and error.

    :return: device and inode of each; zeros for one that is closed
    """
    found: list[tuple[int, int]] = []
    for number in _NUMBERS:
        try:
            status = os.fstat(number)
        except OSError:
            found.append((0, 0))
        else:
            found.append((status.st_dev, status.st_ino))
    return found
