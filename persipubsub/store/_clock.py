"""Read what time it is in a way that nobody can set, and in which boot."""

import time
from typing import Final

import persipubsub.errors

_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"

#: Where the clock that includes sleep is missing, the one without it has to do.
BOOT_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_id() -> bytes:
    """
    Identify the running boot of the operating system.

    :return: 16 bytes that change with every boot; zeros where the system does not tell
    :raise StoreError: if it can not be read now, as where no more files can be opened
    """
    try:
        # Not as text: the first use of an encoding loads a module, for which there may be no file.
        with open(_BOOT_ID, "rb") as fid:
            return bytes.fromhex(fid.read().strip().replace(b"-", b"").decode())
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError):
        return bytes(16)
    except OSError as error:
        # Not zeros: they would look like another boot, and a checkpoint would take the place of a
        # store that others have open.
        raise persipubsub.errors.StoreError(
            f"Expected to read {_BOOT_ID}, but got: {error.strerror or error}") from error


def ticks_ns() -> int:
    """
    Read a clock that nobody sets.

    The wall clock was rejected for the age of messages: somebody setting it one year ahead would
    drop every message as too old.

    :return: nanoseconds since boot, sleep included
    """
    return time.clock_gettime_ns(BOOT_CLOCK)
