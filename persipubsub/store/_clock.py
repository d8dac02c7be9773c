"""Read what time it is in a way that nobody can set, and in which boot."""

import time
from typing import Final

#: Where the clock that includes sleep is missing, the one without it has to do.
BOOT_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_id() -> bytes:
    """
    Identify the running boot of the operating system.

    :return: 16 bytes that change with every boot; zeros where the system does not tell
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", "rt", encoding="ascii") as fid:
            return bytes.fromhex(fid.read().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


def ticks_ns() -> int:
    """
    Read a clock that nobody sets.

    The wall clock was rejected for the age of messages: somebody setting it one year ahead would
    drop every message as too old.

    :return: nanoseconds since boot, sleep included
    """
    return time.clock_gettime_ns(BOOT_CLOCK)
