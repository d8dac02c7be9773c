"""
Errors of the library: one class for each way in which a caller can react.

::

    PersipubsubError
     +-- ConfigError             correct the configuration file
     |    +-- ConfigNotFoundError     name the file that you mean
     +-- ClosedError             call init() first, or do not use it after close()
     +-- NotInitializedError     run persipubsub.control.initialize_all_dbs first
     +-- QueueInUseError         end the other processes of the queue, then repeat
     +-- BusyTimeoutError        repeat later; another process holds the queue for too long
     +-- ReadersFullError        raise max_reader_num, or end processes
     +-- UnavailableError        repeat later; look at the servers of the queue
     +-- AccessError             give the process the rights to the queue's directory
     +-- MessageError            change what you send
     |    +-- MessageTooLargeError
     |    +-- CorruptMessageError    one message is damaged; all others are fine
     +-- QueueFullError          repeat when subscribers have caught up
     +-- DiskFullError           make room on the disk, or raise max_db_size_bytes
     +-- StoreError              check the disk and the store
          +-- FlushError             an earlier write may be lost: check the disk, reopen
          +-- FormatError            the files are not a queue of this version
          +-- StoreCorruptError      restore a backup

Errors of ``lmdb``, ``msgspec`` and ``nats`` do not leave the library:
``lmdb_engine.datafile.translate`` and ``jetstream.errors`` translate them, and
``lmdb_engine.files.translate_os_error`` those of the operating system. A wrong argument raises
``TypeError`` or ``ValueError``, as everywhere in Python.
"""

from collections.abc import Sequence

__all__ = [
    "PersipubsubError", "ConfigError", "ConfigNotFoundError", "ClosedError", "NotInitializedError",
    "QueueInUseError", "BusyTimeoutError", "ReadersFullError", "UnavailableError", "AccessError",
    "MessageError", "MessageTooLargeError", "CorruptMessageError", "QueueFullError",
    "DiskFullError", "StoreError", "FlushError", "FormatError", "StoreCorruptError"
]


class PersipubsubError(Exception):
    """Root of all errors of this library."""


class ConfigError(PersipubsubError):
    """
    Report a configuration file that can not be used.

    The text names the file, the place in it (``queues./q.max_reader_num``), what was found and what
    was expected. ``problems`` lists all problems that were found.
    """

    def __init__(self, message: str, problems: Sequence[str] | None = None) -> None:
        """
        Initialize with the message and the list of problems.

        :param message: what is wrong, with the file's name
        :param problems: each problem that was found in the file; the message alone if not given
        """
        super().__init__(message)
        self.problems = tuple(problems) if problems is not None else (message, )


class ConfigNotFoundError(ConfigError, FileNotFoundError):
    """Report that there is no configuration file; ``except FileNotFoundError`` catches it, too."""


class ClosedError(PersipubsubError):
    """Report that an object was used before ``init`` or after ``close``."""


class NotInitializedError(PersipubsubError):
    """Report a queue, or a subscriber of a queue, that was never initialized."""


class QueueInUseError(PersipubsubError):
    """Report that something needs a queue for itself while other processes have it open."""


class BusyTimeoutError(PersipubsubError):
    """
    Report that the queue could not be written to within ``busy_timeout_secs``.

    Another process is in the middle of a write or a flush: it was stopped (SIGSTOP, a debugger), or
    the disk is very slow. The call has written nothing, unless the text says that the message is in
    the queue, but not yet safe.
    """


class ReadersFullError(PersipubsubError):
    """Report that all ``max_reader_num`` slots of the queue's reader table are taken."""


class UnavailableError(PersipubsubError):
    """
    Report that the servers of a queue (``nats://...``) did not answer in time, or lack JetStream.

    It is not known whether they did what they were asked for: a message may have been stored, or an
    acknowledgement taken. If the call is repeated, the message may be delivered twice.
    """


class AccessError(PersipubsubError):
    """Report that the process lacks the rights to the queue's directory or to a file in it."""


class MessageError(PersipubsubError):
    """Root of the errors about a single message or a single batch."""


class MessageTooLargeError(MessageError):
    """Report a message, or a batch, that the queue could never hold. Nothing of it was sent."""


class CorruptMessageError(MessageError):
    """
    Report a message whose bytes are not those that were sent.

    The message is set aside and counted; all other messages are delivered.
    """

    def __init__(self, message: str, number: int = 0) -> None:
        """
        Initialize with the number of the damaged message.

        :param message: what was found, with the queue's path
        :param number: of the damaged message in its queue; 0 if it is not known
        """
        super().__init__(message)
        self.number = number


class QueueFullError(PersipubsubError):
    """
    Report that the queue is at a limit, and that nothing may be dropped. Nothing was sent.

    The strategy of the queue is ``reject``, or it is ``block`` and there was no room in time. The
    text names the subscriber that needs the oldest message.
    """


class DiskFullError(PersipubsubError):
    """
    Report that the disk, a quota or the queue's map is full.

    What was sent before stays, and messages can be received. Nothing of the call that raises it was
    stored. Sending works again as soon as there is room; nothing needs to be reopened.
    """


class StoreError(PersipubsubError):
    """Report that the files of a queue could not be read or written."""


class FlushError(StoreError):
    """
    Report that the disk failed to store what was written.

    The operating system may have lost the data. For this reason, the open queue refuses further
    writes until it is closed and opened again.

    If the text says that the message is in the queue, but not yet safe, it was committed and will be
    received, and only a power failure may lose it: do not send it again. If the reason was a full
    disk, the queue goes on, and the next send that finds room makes it safe.
    """


class FormatError(StoreError):
    """Report files that are no queue, or a queue of another format. They are left untouched."""


class StoreCorruptError(StoreError):
    """Report a damaged store. Its files are left untouched."""
