"""
Look after queues for the people on call: look at messages, verify, back up, compact, restore, drop.

What takes the place of a store is made beside it, flushed and verified, and only then renamed over
it: if the process or the machine goes down, the store is either as it was or the new one.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from typing import Final, NamedTuple

import icontract

from persipubsub import config
from persipubsub.errors import (AccessError, BusyTimeoutError, CorruptMessageError, FormatError,
                                NotInitializedError, QueueInUseError, StoreCorruptError, StoreError)
from persipubsub.lmdb_engine import attempts, check, datafile, environment, files
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import journal, locks, log, meta, positions
from persipubsub.lmdb_engine.format import Tx
from persipubsub.message import Peeked
from persipubsub.statistics import Progress

# Looking at messages

#: A look ends with the message that reaches this many bytes; the next one goes on after it.
_LOOK_BYTES: Final = 1 << 20

#: ... or after this many messages.
_LOOK_MESSAGES: Final = 1000

#: A follower looks at the queue again after this time, in seconds, even without a notification.
_LONGEST_PAUSE_SECS: Final = 1.0


def _copy(tx: Tx, key: bytes | None, start: int, limit: int, oldest_ns: int,
          now_ns: int) -> list[Peeked]:
    """Copy messages from a number on: those that a subscriber has to acknowledge, or all."""
    audiences = log.read_audiences(tx)
    messages: list[Peeked] = []
    size = 0
    for (first, block, value), begin, end in _runs(tx, key, start, oldest_ns):
        for number in range(begin, end):
            content: bytes | None = None
            with contextlib.suppress(CorruptMessageError):
                content = fmt.copy_message(value, block, number - first, number)
                size += len(content)
            messages.append(
                Peeked(number=number,
                       age_seconds=max(0, now_ns - block.time_ns) / 1e9,
                       subscribers=audiences.get(block.audience),
                       content=content))
            if len(messages) >= min(limit, _LOOK_MESSAGES) or size >= _LOOK_BYTES:
                return messages
    return messages


def _runs(tx: Tx, key: bytes | None, number: int,
          oldest_ns: int) -> Iterator[tuple[log.Found, int, int]]:
    """Iterate over runs of messages in a block: those that a subscriber would get, or all."""
    if key is not None:
        number = max(number, positions.beginning(tx, oldest_ns))
        for run in positions.runs(tx, positions.require(tx, key), number, fmt.MAX_NUMBER):
            yield run.found, run.number, run.stop
        return
    cursor = tx.cursor()
    found = log.seek(cursor, number)
    while found is not None:  # the cursor moves forward
        yield found, max(number, found.first), found.first + found.block.messages
        found = log.following(cursor)


def peek(path: str, queue: config.Queue, subscriber: str, count: int, start: int) -> list[Peeked]:
    """Look at the next messages of a subscriber; nothing is changed, and no process waits."""
    messages: list[Peeked] = []
    # No message has a larger number, and a key has no room for an arbitrary one.
    start = min(start, fmt.MAX_NUMBER + 1)
    with environment.opened(path, queue, is_read_only=True) as opened:
        timeout_secs = opened.queue.high_water_mark.msg_timeout_secs
        while True:  # each look begins behind the one before, and ``count`` ends it
            now_ns = opened.now_ns()
            oldest_ns = 0 if timeout_secs is None else now_ns - int(timeout_secs * 1e9)
            found = opened.read(_copy, subscriber.encode("utf-8"), start, count - len(messages),
                                oldest_ns, now_ns)
            messages.extend(found)
            if not found or len(messages) >= count:
                return messages
            start = found[-1].number + 1


def follow(path: str, queue: config.Queue, last: int) -> Generator[list[Peeked], None, None]:
    """Look at messages as they are sent, for ever, without being a subscriber."""
    with environment.opened(path, queue) as opened:
        number = opened.read(_begin_of_last, last)
        while True:  # for ever: the caller ends the iteration
            stamp = opened.notifier.arm()
            messages = opened.read(_copy, None, number, _LOOK_MESSAGES, 0, opened.now_ns())
            yield messages
            if messages:
                number = messages[-1].number + 1
            else:
                opened.notifier.wait(stamp, _LONGEST_PAUSE_SECS)


def _begin_of_last(tx: Tx, last: int) -> int:
    """Find the first of the newest messages."""
    cursor = tx.cursor()
    log_end = log.read_end(cursor)
    head = log.head(cursor)
    if head is None or last == 0:
        return log_end.next_number
    return log.number_at_count(cursor, head.first, log_end.next_number, log_end.total_count - last)


# Verifying


def verify(path: str, queue: config.Queue, progress: Progress) -> list[str]:
    """Verify all pages, records and messages of a queue and its journal. It holds up no process."""
    try:
        with environment.opened(path, queue) as opened:
            findings = _verify_open(opened, progress)
            # A walk with the engine over pages that are not sound could end the process.
            return findings or check.check(opened.read, progress) + opened.journal.check()
    except StoreCorruptError as error:
        return [str(error)]


def _verify_open(opened: environment.Environment, progress: Progress) -> list[str]:
    """
    Verify the pages of a store that is in use, in one snapshot.

    :raise BusyTimeoutError: if no snapshot stays the newest one until its pages are found
    """
    path = os.path.join(opened.directory, files.DATA)
    # It hardly ever takes more than a few attempts: a commit has to come between the beginning of a
    # snapshot and the read after it. But nothing says that it does not each time.
    deadline = time.monotonic() + opened.queue.busy_timeout_secs
    while True:
        with opened.snapshot() as txn_id:
            findings = datafile.find_damage(path, progress, txn_id)
        if findings is not None:
            return findings
        if time.monotonic() >= deadline:
            raise BusyTimeoutError(
                f"Expected a moment without a commit to the queue {opened.directory} within "
                f"{opened.queue.busy_timeout_secs} seconds (busy_timeout_secs), but got: none. Verify "
                "it when its publishers pause.")


def _verify_copy(path: str, progress: Progress, origin: str) -> None:
    """Verify a copy of a store that no process writes to; errors name where it comes from."""
    try:
        datafile.check_pages(path, progress)
        with datafile.opened(path) as (_, begin), begin() as tx:
            datafile.fail_if_any(check.check(lambda step, place: step(tx, place), progress), path)
    except StoreError as error:
        raise type(error)(str(error).replace(path, origin)) from error


# Backups


@icontract.ensure(lambda result: result > 0)
def backup(path: str, queue: config.Queue, target: str, progress: Progress) -> int:
    """Copy a snapshot of a queue into one file, verified and durable. No process waits for it."""
    target = os.path.abspath(target)
    data = os.path.join(path, files.DATA)
    occupied = StoreError(f"Expected to write a new file {target}, but got: it is there already")
    if os.path.lexists(target):
        raise occupied
    # The store is opened first: if something is wrong with it, no file is left behind.
    with environment.opened(path, queue) as opened, files.translated(path=target, doing="write"):
        directory, name = os.path.split(target)
        try:
            descriptor, copy = tempfile.mkstemp(prefix=name + ".", suffix=".new", dir=directory)
        except FileNotFoundError:
            raise AccessError(
                f"Expected to write {target}, but got: there is no such directory") from None
        try:
            with open(descriptor, "wb"):
                datafile.fail_if_any(_verify_open(opened, progress), data)
                opened.copy(descriptor)
                os.fsync(descriptor)
            _verify_copy(copy, progress, origin=data)
            try:
                # A rename would replace a file that came there meanwhile.
                os.link(copy, target)
            except FileExistsError:
                raise occupied from None
            files.flush_directory(directory)
            return os.stat(copy).st_size
        finally:
            os.unlink(copy)


class Sizes(NamedTuple):
    """What a queue takes on the disk before and after it was compacted."""

    before: int  #: in bytes
    after: int  #: in bytes


#: Processes that only look, as ``stat`` and scrapes of metrics do, have a queue open for some
#: milliseconds. How long they are waited for, and the pause between two attempts, in seconds.
_LOOK_SECS: Final = 0.5
_PAUSE_SECS: Final = 0.005

#: Room that a restored store needs beyond twice its size for what is changed in it, in bytes.
_ROOM_BYTES: Final = 1 << 24

#: A restored queue goes on so far after the last number that is known to have been used.
_SKIPPED_BY_RESTORE: Final = 3 << 31


@contextlib.contextmanager
def _alone(path: str, busy_timeout_secs: float) -> Iterator[None]:
    """Keep a queue for this block alone: no process has it open, and none can open it."""
    users = os.path.join(path, files.USERS)
    if os.path.lexists(os.path.join(path, files.DATA)) and not os.path.lexists(users):
        raise FormatError(f"Expected the queue {path} to have the file {files.USERS}, but got: "
                          "none. It may be an LMDB environment of another program.")
    deadline = time.monotonic() + _LOOK_SECS
    while True:  # until the deadline
        # This process can not open it meanwhile, either.
        with environment.REGISTRY.lock, locks.open_lock(path, busy_timeout_secs):
            lock = locks.LockFile(users)
            try:
                if lock.try_lock():
                    yield
                    return
                found = locks.users_of(lock)
            finally:
                lock.close()
        if time.monotonic() >= deadline:
            names = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
            raise QueueInUseError(f"Expected no process to use the queue {path}, but got: it is "
                                  f"open in {f'process {names}' if found else 'another process'}")
        # Sleep without the lock: processes that only look need it to close the queue.
        time.sleep(_PAUSE_SECS)


@icontract.ensure(lambda result: result.after > 0)
def compact(path: str, queue: config.Queue, progress: Progress) -> Sizes:
    """Free the disk space that a queue does not need; no process may have the queue open."""
    # If a crash left damage, the opening repairs or refuses it.
    with environment.opened(path, queue) as in_use:
        in_use.delete_finished(in_use.now_ns())
    store = os.path.join(path, files.DATA)
    before = files.disk_bytes(path)
    with _alone(path, queue.busy_timeout_secs), files.translated(path=path, doing="compact"):
        with files.replacing(store) as (made, descriptor):
            datafile.check_pages(store, progress)
            with datafile.opened(store) as (opened, _):
                opened.copyfd(descriptor, compact=True)
            _verify_copy(made, progress, origin=store)
        files.mark_clean(path)
    environment.release(environment.acquire(path, queue, renews_journal=True))
    return Sizes(before=before, after=files.disk_bytes(path))


def _read_used(store: str) -> tuple[int, int, int]:
    """Read next number, generation, next ordinal of the store that is there, if it can be trusted."""
    if os.path.lexists(store):
        # Without the check, a damaged store could end the process.
        with contextlib.suppress(StoreCorruptError):
            datafile.check_pages(store)
            with datafile.opened(store) as (_, begin), begin() as tx:
                log_end = log.read_end(tx.cursor())
                return log_end.next_number, log_end.generation, meta.read_header(tx).next_ordinal
    return 0, 0, 0


def restore(path: str, queue: config.Queue, source: str, progress: Progress) -> None:
    """Let a backup take the place of a queue's store; the queue need not be there."""
    if not os.path.isfile(source):
        # To open a FIFO would wait.
        raise StoreError(f"Expected a data file that can be read at {source}, but got: none")
    files.prepare_directory(path)
    store = os.path.join(path, files.DATA)
    with _alone(path, queue.busy_timeout_secs), files.translated(path=path, doing="restore"):
        with files.replacing(store) as (made, descriptor):
            with (files.translated(path=source, doing="copy"), open(source, "rb") as
                  content, open(descriptor, "wb", closefd=False) as target):
                shutil.copyfileobj(content, target)
            _verify_copy(made, progress, origin=source)
            used = _read_used(store)
            size = 2 * os.stat(made).st_size + _ROOM_BYTES
            with datafile.opened(made, size) as (_, begin), begin() as tx:
                _go_on_after(tx, *used)
        files.mark_clean(path)
        os.close(files.open_file(os.path.join(path, files.JOURNAL_LOCK)))
    environment.release(environment.acquire(path, queue, renews_journal=True))


def _go_on_after(tx: Tx, next_number: int, generation: int, next_ordinal: int) -> None:
    """Let no number, generation or ordinal of the store that was there be used again."""
    now_ns = max(log.read_end(tx.cursor()).time_ns, time.time_ns())
    meta.skip_numbers(tx, _SKIPPED_BY_RESTORE, next_number, generation)
    header = meta.read_header(tx)
    meta.write_header(
        tx,
        header._replace(next_ordinal=max(header.next_ordinal, next_ordinal),
                        boot_id=files.boot_id(),
                        clock_offset_ns=now_ns - files.ticks_ns(),
                        journal_id=os.urandom(16)))
    # A dead letter that left its queue since the backup may have to be put there again. That queue
    # remembers the ids of its letters. An id depends on the time of the first delivery: with a new
    # time, the letter has a new id.
    attempts.begin_anew(tx, now_ns)


def drop(path: str, queue: config.Queue) -> list[str]:
    """Remove a queue with all its messages; return the names of files that are not of this library."""
    if not os.path.lexists(os.path.join(path, files.USERS)):
        try:
            files.identify_store(path)
        except NotInitializedError:
            # A process may have been killed at the end of a drop.
            if not os.path.isdir(path):
                raise
    with _alone(path, queue.busy_timeout_secs), files.translated(path=path, doing="remove"):
        foreign = files.foreign_names(path)
        # The mark must not be gone before the store, which can not be trusted without it.
        files.remove_durably(os.path.join(path, files.DATA))
        journal.remove_journal(path)
        # ``users.lock`` and ``open.lock`` are removed last: with the first one, a drop that was
        # interrupted can be run again; another process may be waiting for the second one.
        last = (files.USERS, files.OPEN_LOCK)
        for name in (*sorted(files.OWN - set(last)), *last):
            for each in (name + ".new", name):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(path, each))
        files.flush_directory(path)
    try:
        os.rmdir(path)
    except OSError:
        return foreign
    with contextlib.suppress(OSError):
        files.flush_directory(os.path.dirname(path))
    return []
