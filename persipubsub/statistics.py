"""
What is in a queue and what happened to it.

The figures are structs, as those of :py:mod:`persipubsub.config` are: they can not be changed, and
``msgspec.to_builtins`` makes dictionaries of them.
"""

import msgspec

__all__ = ["InFlight", "Progress", "QueueStatistics", "SubscriberStatistics", "share"]


class InFlight(msgspec.Struct, frozen=True):
    """
    Messages that one consumer claimed together and is working on.

    >>> InFlight("sub", number=7, count=1, process_id=None, seconds=None).number
    7
    """

    subscriber: str  #: its id
    number: int  #: of the first message
    count: int  #: numbers that are claimed, from the first one on
    process_id: int | None  #: of the consumer; None if it is not known
    seconds: float | None  #: since they were claimed; None if it is not known


class SubscriberStatistics(msgspec.Struct, frozen=True):
    """Figures of one subscriber since it was added to the queue."""

    subscriber: str  #: its id
    lag: int  #: messages that it still has to acknowledge
    #: of these, how many at most are being worked on: claimed, and not acknowledged yet
    in_flight: int
    position: int  #: number of the first message that it still has to acknowledge
    acknowledged: int  #: messages that were received and acknowledged
    #: deliveries that ended with an exception, and so were or will be made again; those whose
    #: consumer was killed are not counted, as nobody is left to do it
    failed: int
    dropped_by_timeout: int  #: messages that were dropped unread since they were too old
    dropped_by_mark: int  #: messages that were dropped unread at a high-water mark
    cleared: int  #: messages that an operator cleared or deleted
    #: messages that ``pop_to_top`` and ``receive_to_top`` acknowledged, or ``seek`` passed unread
    skipped: int
    corrupt: int  #: damaged messages that were set aside
    dead_lettered: int  #: messages that were given up after ``max_deliveries``
    seconds_since_acknowledged: float | None  #: None: it never acknowledged
    claims: tuple[InFlight, ...] = ()  #: what is in flight, where and since when; ordered by number
    is_paused: bool = False  #: True if an operator lets its consumers wait


class QueueStatistics(msgspec.Struct, frozen=True):
    """Figures of one queue."""

    path: str  #: directory of the queue; on servers: its path, ``nats://...``
    messages: int  #: from the oldest one that a subscriber still has to acknowledge
    message_share: float | None  #: of ``MAX_MSGS_NUM``; 1.0 is the mark; None without a limit
    message_bytes: int  #: bytes of these messages
    byte_share: float | None  #: of ``HWM_LMDB_SIZE_BYTES``; 1.0 is the mark; None without a limit
    file_bytes: int  #: size of LMDB's data file; on servers: the same as ``message_bytes``
    file_share: float | None  #: of ``max_db_size_bytes``; on servers: the same as ``byte_share``
    oldest_age_seconds: float | None  #: age of the oldest waiting message; None if none waits
    age_share: float | None  #: of ``MSG_TIMEOUT_SECS``; 0.0 if none waits; None without a limit
    next_number: int  #: of the next message
    #: write transactions: sends, acknowledgements and the rest, since the store was created,
    #: compacted or restored; on servers: number of the last message
    commits: int
    subscribers: tuple[SubscriberStatistics, ...]  #: ordered by id
    sent: int = 0  #: messages that were ever sent
    journal_bytes: int = 0  #: size of the journal
    journal_lag_bytes: int = 0  #: about the bytes of messages that are not in the journal yet
    disk_bytes: int = 0  #: what all files of the queue take on the disk


def share(value: float, limit: float | None) -> float | None:
    """
    Compute how much of a limit is used; None without a limit.

    >>> share(5, 10)
    0.5
    """
    return None if limit is None else value / limit


class Progress(msgspec.Struct):
    """
    How far a long walk has come: counted up by the walk, and looked at by another thread.

    >>> progress = Progress()
    >>> progress.begin("bytes", total=4)
    >>> progress.done += 1
    >>> progress.share()
    0.25
    """

    what: str = ""  #: what is counted, such as "bytes"
    done: int = 0  #: so far
    total: int = 0  #: how much there is

    def begin(self, what: str, total: int) -> None:
        """
        Begin a part of the work.

        :param what: what is counted, such as "bytes"
        :param total: how much there is
        """
        self.what, self.done, self.total = what, 0, total

    def share(self) -> float:
        """
        Compute how much of the part is done.

        :return: from 0 to 1
        """
        return min(1.0, self.done / self.total) if self.total else 1.0
