"""Look after a queue while others use it: verify, back up, change its subscribers."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Sequence
from typing import ContextManager

import lmdb

import persipubsub.errors
from persipubsub import _wakeup
from persipubsub._progress import Progress
from persipubsub._settings import Settings
from persipubsub.environment import _environment, _files, _registry, _standard_streams
from persipubsub.maintenance import _verification
from persipubsub.store import _attempts, _log, _positions, _retention
from persipubsub.store._databases import Databases

#: How many blocks are deleted in one transaction after a subscriber was removed.
_CHUNK_BLOCKS = 256


def opened(settings: Settings, is_look: bool = False) -> ContextManager[_environment.Environment]:
    """
    Have a queue open in a ``with`` block.

    :param settings: of the queue
    :param is_look: True for who reads a little and is gone
    """
    return _registry.opened(settings.path, settings.options(), is_look=is_look)


def verify(settings: Settings, progress: Progress) -> list[str]:
    """
    Verify all pages, records and messages of a queue, in one snapshot. It holds up no process.

    :param settings: of the queue
    :param progress: to be counted up
    :return: what is wrong; nothing if the queue is sound
    """
    try:
        with opened(settings) as environment:
            return _verification.verify_open(environment, progress)
    except persipubsub.errors.StoreCorruptError as error:
        return [str(error)]


def backup(settings: Settings, target: str, progress: Progress) -> int:
    """
    Copy a snapshot of a queue into one file, verified and durable. It holds up nobody.

    The target is there with all its content or not at all.

    :param settings: of the queue
    :param target: path of a file that is not there yet
    :param progress: to be counted up
    :return: size of the file in bytes
    :raise StoreError: if the target is there
    """
    target = os.path.abspath(target)
    data = os.path.join(settings.path, _files.DATA)
    occupied = persipubsub.errors.StoreError(
        f"Expected to write a new file {target}, but got: it is there already")
    if os.path.lexists(target):
        raise occupied
    # The store first: whatever is wrong with it leaves nothing behind.
    with opened(settings) as environment:
        with _files.translated(path=target, doing="write"):
            directory, name = os.path.split(target)
            _standard_streams.occupy()
            try:
                descriptor, path = tempfile.mkstemp(prefix=f"{name}.", suffix=".new", dir=directory)
            except FileNotFoundError:
                raise persipubsub.errors.AccessError(
                    f"Expected to write {target}, but got: there is no such directory") from None
            try:
                descriptor = _standard_streams.step_aside(descriptor)
                try:
                    environment.copy(
                        descriptor,
                        lambda source: _verification.verify_pages(source, data, progress))
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                _verification.verify_copy(path, progress, origin=data)
                size = os.stat(path).st_size
                try:
                    # Not a renaming: that would replace what came there meanwhile.
                    os.link(path, target)
                except FileExistsError:
                    raise occupied from None
                _files.flush_directory(directory)
            finally:
                os.unlink(path)
    return size


def add_subscribers(settings: Settings, subscribers: Sequence[str]) -> list[str]:
    """
    Add subscribers to a queue, in one transaction and durably. They get what is sent from now on.

    :param settings: of the queue
    :param subscribers: their ids; those that are there stay as they are
    :return: ids of those that were added
    """
    keys = [subscriber.encode("utf-8") for subscriber in subscribers]

    def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> list[str]:
        added = [key for key in keys if _positions.read(txn, databases, key) is None]
        if added:
            _positions.add(txn, databases, added)
        return [key.decode("utf-8") for key in added]

    with opened(settings) as environment:
        added = environment.write(work)
        environment.secure_now()
        return added


def remove_subscriber(settings: Settings, subscriber: str) -> int:
    """
    Remove a subscriber from a queue, in one transaction and durably; its messages leave with it.

    Consumers that are at work finish what they have, and then fail. Publishers that address it go
    on, and those that wait for room wake up. Messages that nobody else needs are deleted in many
    short transactions afterwards.

    :param settings: of the queue
    :param subscriber: its id
    :return: how many messages it did not acknowledge
    :raise NotInitializedError: if there is no such subscriber
    """
    key = subscriber.encode("utf-8")

    def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> int:
        record = _positions.read(txn, databases, key)
        if record is None:
            raise persipubsub.errors.NotInitializedError(
                f"Expected the queue to have the subscriber {subscriber!r}, but got: none of "
                f"that id")
        cursor = txn.cursor(db=databases.data)
        audiences = _positions.audiences_of(_log.read_audiences(txn, databases), key)
        lag = _positions.count_pending(txn, databases, record, audiences, 0,
                                       _log.read_tail(cursor).next_number)
        _positions.drop_ranges(txn, databases, record.ordinal, 0)
        _attempts.forget_all(txn, databases, record.ordinal)
        txn.delete(key, db=databases.pending)
        # Whoever remembers how far all subscribers have come looks again.
        _log.change_generation(cursor)
        return lag

    with opened(settings) as environment:
        lag = environment.write(work, may_grow=True)
        environment.secure_now()
        # There may be room now for who waits for it, and its own consumers see that it is gone.
        bell = _wakeup.Bell(os.path.join(settings.path, _files.BELL))
        with contextlib.suppress(persipubsub.errors.PersipubsubError):
            bell.ring()  # those who are not woken look once a second
        bell.close()
        delete = functools.partial(_retention.delete_finished,
                                   budget=_CHUNK_BLOCKS,
                                   retained_ns=settings.retained_ns(environment.now_ns()))
        while environment.write(delete, may_grow=True) == _CHUNK_BLOCKS:
            pass
        return lag
