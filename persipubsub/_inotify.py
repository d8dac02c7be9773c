"""Call the kernel's inotify, for which Python has no binding."""

import os
import struct
from typing import Any, Final

from persipubsub import _fork_guard

#: What is read from the descriptor: watch, mask, cookie, length of a name (0, as files have none).
EVENT: Final = struct.Struct("iIII")

#: In the mask of an event: the kernel's queue was full, and events are missing.
OVERFLOW: Final = 0x4000

_ACCESS: Final = 0x1
_DONT_FOLLOW: Final = 0x02000000

_library: Any = None  # ctypes.CDLL, when it was needed


def _call(name: str, *arguments: Any) -> int:
    """Call a function of the C library; raise OSError if it fails, or AttributeError without it."""
    global _library  # pylint: disable=global-statement
    with _fork_guard.LOCK:
        import ctypes  # pylint: disable=import-outside-toplevel  # slow, and only waiters need it
    _library = _library or ctypes.CDLL(None, use_errno=True)
    result: int = getattr(_library, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def start() -> int:
    """
    Open an instance; users have 128.

    :return: its descriptor, closed on exec, which never blocks
    """
    return _call("inotify_init1", os.O_CLOEXEC | os.O_NONBLOCK)


def watch(instance: int, path: str) -> int:
    """
    Have each read of a file reported.

    :param instance: descriptor
    :param path: of the file; a symbolic link is not followed
    :return: number of the watch, one for each file
    """
    return _call("inotify_add_watch", instance, os.fsencode(path), _ACCESS | _DONT_FOLLOW)


def forget(instance: int, number: int) -> None:
    """
    Have a file reported no longer; nothing happens if the kernel does not know the watch.

    :param instance: descriptor
    :param number: of the watch
    """
    _library.inotify_rm_watch(instance, number)
