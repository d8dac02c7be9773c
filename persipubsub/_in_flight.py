"""
Count the messages that consumers hold claims on right now.

The kernel is asked for a lock in a range, then for those beside it: two questions for each consumer
at work, however many messages wait. ``/proc/locks`` was rejected: it lists the locks of the whole
machine, and names files by a device that is not that of ``stat`` on some file systems.
"""

import fcntl
import os
import struct
import sys
from typing import Dict, Final, List, Mapping, Optional, Tuple

#: The offset of a claim is the subscriber's ordinal times this, plus the message's number.
_NUMBERS: Final = 1 << 48

#: Whoever has more consumers at work at once does not count them: each question walks a list.
_MOST_QUESTIONS: Final = 10000

#: struct flock of Linux: type, whence, start, length, process.
_FLOCK: Final = struct.Struct("hhqqi4x")

#: Only there do claims belong to descriptions, so that a new descriptor sees those of everybody.
_GETLK: Final[int] = getattr(fcntl, "F_OFD_GETLK", -1) if sys.platform == "linux" else -1


def count(path: str, spans: Mapping[int, Tuple[int, int]]) -> Optional[Mapping[int, int]]:
    """
    Count claimed numbers. It takes no lock and waits for nobody.

    Consumers go on claiming and releasing meanwhile, so that it is no snapshot. The descriptor that
    is opened for it is closed at the end; no claim is lost by that.

    :param path: of the claims file; as long as there is none, nobody claimed anything
    :param spans: by subscriber's ordinal: first number to look at, number behind the last one
    :return: by ordinal; None if the system can not tell, or too many are at work
    """
    if _GETLK < 0:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return {ordinal: 0 for ordinal in spans}
    except OSError:
        return None
    try:
        return _count(descriptor, spans)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _count(descriptor: int, spans: Mapping[int, Tuple[int, int]]) -> Optional[Mapping[int, int]]:
    """
    Count claimed numbers.

    :param descriptor: of the claims file
    :param spans: of each subscriber's ordinal: first number to look at, number behind the last one
    :return: by ordinal; None if too many are at work
    """
    counts = {}  # type: Dict[int, int]
    questions = 0
    for ordinal, (first, end) in spans.items():
        base = ordinal * _NUMBERS
        claimed = 0
        ranges = [(base + first, base + end)]  # type: List[Tuple[int, int]]
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
                claimed += high - low
                ranges += [(begin, low), (high, behind)]
        counts[ordinal] = claimed
    return counts
