"""
Look after queues for the people on call: look at messages, verify, back up, compact, restore, drop.

What takes the place of a store is made beside it, flushed and verified, and only then renamed over
it: whatever happens before, the store is as it was; whatever happens after, it is the new one.
"""

import contextlib
import fcntl
import io
import os
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Generator, Iterator
from typing import Final, NamedTuple

import icontract
import lmdb
import lmdb.verify

import persipubsub.config
import persipubsub.errors
from persipubsub.lmdb_engine import attempts, check, environment, files
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import locks, log, positions
from persipubsub.lmdb_engine.format import Databases, Tx
from persipubsub.message import Peeked
from persipubsub.statistics import Progress

# Looking at messages

#: A look ends with the message that reaches this many bytes; the next one goes on behind it.
_LOOK_BYTES: Final = 1 << 20

#: ... or after this many messages.
_LOOK_MESSAGES: Final = 1000

#: A follower looks at the queue this often whatever happens, in seconds.
_LONGEST_PAUSE_SECS: Final = 1.0


class _Look:
    """Collects messages inside of a transaction, up to a limit."""

    def __init__(self, tx: Tx, now_ns: int, limit: int) -> None:
        """Initialize without messages."""
        self.cursor = tx.cursor()
        self.audiences = log.read_audiences(tx)
        self.messages: list[Peeked] = []
        self._now_ns = now_ns
        self._limit = min(limit, _LOOK_MESSAGES)
        self._size = 0

    def is_full(self) -> bool:
        """Tell whether the limit is reached."""
        return len(self.messages) >= self._limit or self._size >= _LOOK_BYTES

    def add(self, found: log.Found, number: int) -> None:
        """Copy a message."""
        first, block, value = found
        content: bytes | None = None
        with contextlib.suppress(persipubsub.errors.CorruptMessageError):
            content = fmt.copy_message(value, block, number - first, number)
            self._size += len(content)
        self.messages.append(
            Peeked(number=number,
                   age_seconds=max(0, self._now_ns - block.time_ns) / 1e9,
                   subscribers=self.audiences.get(block.audience),
                   content=content))


def peek(path: str, queue: persipubsub.config.Queue, subscriber: str, count: int,
         start: int) -> list[Peeked]:
    """Look at the next messages of a subscriber; nothing is changed, and nobody waits."""
    messages: list[Peeked] = []
    # No message is behind it, and a key has no room for any number.
    start = min(start, fmt.MAX_NUMBER + 1)
    with environment.opened(path, queue, is_read_only=True) as opened:
        while True:
            found = opened.read(_peek, subscriber.encode("utf-8"), start, count - len(messages),
                                opened.now_ns(), opened.queue.high_water_mark.msg_timeout_secs)
            messages.extend(found)
            if not found or len(messages) >= count:
                return messages
            start = found[-1].number + 1


def _peek(tx: Tx, key: bytes, start: int, limit: int, now_ns: int,
          timeout_secs: float | None) -> list[Peeked]:
    """Copy messages that a subscriber still has to acknowledge."""
    look = _Look(tx, now_ns, limit)
    record = positions.require(tx, key)
    oldest_ns = 0 if timeout_secs is None else now_ns - int(timeout_secs * 1e9)
    while (not look.is_full()
           and (run := positions.next_run(tx, record, look.cursor, start)) is not None):
        start = run.number if run.found.block.time_ns >= oldest_ns else run.stop
        while start < run.stop and not look.is_full():
            look.add(run.found, start)
            start += 1
    return look.messages


def follow(path: str, queue: persipubsub.config.Queue,
           last: int) -> Generator[list[Peeked], None, None]:
    """Look at messages as they are sent, for ever; a look, not a subscriber."""
    with environment.opened(path, queue) as opened:
        number = opened.read(_begin_of_last, last)
        while True:
            stamp = opened.notifier.arm()
            messages = opened.read(_read_on, number, opened.now_ns())
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


def _read_on(tx: Tx, number: int, now_ns: int) -> list[Peeked]:
    """Copy messages from a number on."""
    look = _Look(tx, now_ns, _LOOK_MESSAGES)
    found = log.seek(look.cursor, number)
    while found is not None and not look.is_full():
        number = max(number, found.first)
        end = found.first + found.block.messages
        while number < end and not look.is_full():
            look.add(found, number)
            number += 1
        found = log.following(look.cursor)
    return look.messages


# Verifying

#: Where a meta page has the number of its transaction, and the size of a page.
_TRANSACTION_OFFSET: Final = 144
_PAGE_SIZE_OFFSET: Final = 40

_TRANSACTION = struct.Struct("=Q")
_PAGE_SIZE = struct.Struct("=I")

#: Two pages of any size.
_HEAD_BYTES: Final = 1 << 17


class _Pages(io.RawIOBase):
    """
    The pages of a store; those of the beginning as they were when it was opened.

    They are walked through without LMDB's engine, which trusts its file and would be killed by damage.
    """

    def __init__(self, descriptor: int, progress: Progress) -> None:
        """Read the beginning."""
        super().__init__()
        self._descriptor = descriptor
        self._progress = progress
        self._position = 0
        self._head = bytearray(os.pread(descriptor, _HEAD_BYTES, 0))
        self._page_bytes = 0
        if len(self._head) >= _PAGE_SIZE_OFFSET + _PAGE_SIZE.size:
            self._page_bytes, = _PAGE_SIZE.unpack_from(self._head, _PAGE_SIZE_OFFSET)
        del self._head[2 * self._page_bytes:]
        self.size = os.fstat(descriptor).st_size
        progress.begin("bytes", total=self.size)

    def pin(self, transaction: int) -> bool:
        """Show the store as of the transaction of a reader; return False if it is not there any more."""
        is_there = False
        for offset in (_TRANSACTION_OFFSET, self._page_bytes + _TRANSACTION_OFFSET):
            found, = _TRANSACTION.unpack_from(self._head, offset)
            is_there = is_there or found == transaction
            if found > transaction:
                # A commit later, in the other page: make it the one before.
                _TRANSACTION.pack_into(self._head, offset, transaction - 1)
        return is_there

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        assert whence == os.SEEK_SET, "The verifier counts from the beginning only."
        self._position = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        """Read from the place."""
        begin = self._position
        self._position += size
        self._progress.done += size
        if begin + size <= len(self._head):
            return bytes(self._head[begin:begin + size])
        return os.pread(self._descriptor, size, begin)

    def verify(self) -> list[str]:
        """Walk through all pages in use."""
        return environment.find_damage(self, self.size)


def verify(path: str, queue: persipubsub.config.Queue, progress: Progress) -> list[str]:
    """Verify all pages, records and messages of a queue and its journal. It holds up no process."""
    try:
        with environment.opened(path, queue) as opened:
            findings = _verify_open(opened, progress)
            # A walk with the engine over pages that are not sound could end the process.
            return findings or opened.read(check.check, progress) + opened.journal.check()
    except persipubsub.errors.StoreCorruptError as error:
        return [str(error)]


def _verify_open(opened: environment.Environment, progress: Progress) -> list[str]:
    """Verify the pages of a store that is in use, in one snapshot."""
    path = os.path.join(opened.directory, files.DATA)

    def work(tx: Tx) -> list[str] | None:
        with files.translated(path=path, doing="read"), open(path, "rb", buffering=0) as file:
            pages = _Pages(file.fileno(), progress)
            return pages.verify() if pages.pin(tx.txn.id()) else None

    while (findings := opened.read(work)) is None:
        pass
    return findings


def _fail_if_any(findings: list[str], path: str) -> None:
    """Raise what is wrong with a data file."""
    if findings:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected {path} to be sound, but got {len(findings)} finding(s): "
            f"{'; '.join(findings[:3])}")


def _verify_copy(path: str, progress: Progress, origin: str) -> None:
    """Verify a copy of a store that nobody writes to; errors name where it comes from."""
    try:
        _check_regular(path)
        if files.missing_bytes(path) > 0:
            raise persipubsub.errors.StoreCorruptError(
                f"Expected {path} to be whole, but got: a truncated file")
        with files.translated(path=path, doing="read"), open(path, "rb", buffering=0) as file:
            _fail_if_any(_Pages(file.fileno(), progress).verify(), path)
        with _opened_file(path) as (opened, db), opened.begin(buffers=True) as txn:
            _fail_if_any(check.check(Tx(txn, db), progress), path)
    except persipubsub.errors.StoreError as error:
        raise type(error)(str(error).replace(path, origin)) from error


@contextlib.contextmanager
def _opened_file(path: str,
                 is_read_only: bool = True,
                 size: int = 1 << 20) -> Iterator[tuple[lmdb.Environment, Databases]]:
    """Open a data file that stands for itself, with its sub-databases."""
    try:
        with environment.opened_alone(path, is_read_only, size) as opened:
            yield opened, Databases(*(opened.open_db(name, create=False)
                                      for name in fmt.DATABASE_NAMES))
    except (lmdb.NotFoundError, lmdb.IncompatibleError, lmdb.DbsFullError):
        raise persipubsub.errors.FormatError(
            f"Expected {path} to be the data file of a queue, but got: one of another program"
        ) from None
    except lmdb.Error as error:
        raise environment.translate(error, path) from error


def _check_regular(path: str) -> None:
    """Check that a file can be read without waiting for somebody who writes it."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise persipubsub.errors.StoreError(
            f"Expected a data file at {path}, but got: no such file") from None
    except OSError as error:
        raise files.translate_os_error(error=error, path=path, doing="look at") from error
    if not stat.S_ISREG(mode):
        raise persipubsub.errors.FormatError(
            f"Expected {path} to be a regular file, but got: {stat.filemode(mode)}")


# Backups


@icontract.ensure(lambda result: result > 0)
def backup(path: str, queue: persipubsub.config.Queue, target: str, progress: Progress) -> int:
    """Copy a snapshot of a queue into one file, verified and durable. It holds up nobody."""
    target = os.path.abspath(target)
    data = os.path.join(path, files.DATA)
    occupied = persipubsub.errors.StoreError(
        f"Expected to write a new file {target}, but got: it is there already")
    if os.path.lexists(target):
        raise occupied
    # The store first: whatever is wrong with it leaves nothing behind.
    with environment.opened(path, queue) as opened, files.translated(path=target, doing="write"):
        directory, name = os.path.split(target)
        try:
            descriptor, copy = tempfile.mkstemp(prefix=name + ".", suffix=".new", dir=directory)
        except FileNotFoundError:
            raise persipubsub.errors.AccessError(
                f"Expected to write {target}, but got: there is no such directory") from None
        try:
            descriptor = files.above_streams(descriptor)
            try:
                _fail_if_any(_verify_open(opened, progress), data)
                opened.copy(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            _verify_copy(copy, progress, origin=data)
            try:
                # Not a renaming: that would replace what came there meanwhile.
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


#: Those who only look, as ``stat`` and scrapes of metrics do, have a queue open for some milliseconds.
#: They are waited for so long, in seconds, with so much time between two attempts.
_LOOK_SECS: Final = 0.5
_PAUSE_SECS: Final = 0.005

#: Room that a restored store needs beyond its own size for what is changed in it, in bytes.
_ROOM_BYTES: Final = 1 << 24

#: A restored queue goes on so far behind the last number that is known to have been used.
_SKIPPED_NUMBERS: Final = 3 << 31


@contextlib.contextmanager
def _alone(path: str, busy_timeout_secs: float) -> Iterator[None]:
    """Have a queue for oneself: nobody has it open, and nobody can open it until the block is left."""
    users = os.path.join(path, files.USERS)
    if os.path.lexists(os.path.join(path, files.DATA)) and not os.path.lexists(users):
        raise persipubsub.errors.FormatError(
            f"Expected the queue {path} to have the file {files.USERS}, but got: none. It may be an "
            "LMDB environment of another program.")
    deadline = time.monotonic() + _LOOK_SECS
    while True:
        with environment.alone(path, busy_timeout_secs) as lock:
            if lock.try_lock(fcntl.LOCK_EX):
                yield
                return
            found = locks.users_of(lock)
        if time.monotonic() >= deadline:
            names = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
            raise persipubsub.errors.QueueInUseError(
                f"Expected no process to use the queue {path}, but got: it is open in "
                f"{f'process {names}' if found else 'another process'}")
        # Without the lock: those who only look need it to close the queue.
        time.sleep(_PAUSE_SECS)


@icontract.ensure(lambda result: result.after > 0)
def compact(path: str, queue: persipubsub.config.Queue, progress: Progress) -> Sizes:
    """Give the room on the disk back that a queue does not need any more. It needs it for itself."""
    # Whatever a crash left is mended, or refused, by opening it.
    with environment.opened(path, queue):
        pass
    store = os.path.join(path, files.DATA)
    before = files.disk_bytes(path)
    with _alone(path, queue.busy_timeout_secs), files.translated(path=path, doing="compact"):
        with _beside(store) as copy:
            with open(store, "rb", buffering=0) as file:
                _fail_if_any(_Pages(file.fileno(), progress).verify(), store)
            with _opened_file(store) as (opened, _):
                descriptor = files.open_file(copy, os.O_WRONLY)
                try:
                    opened.copyfd(descriptor, compact=True)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            _verify_copy(copy, progress, origin=store)
            _take_place(path, copy)
    environment.release(environment.acquire(path, queue, renews_journal=True))
    return Sizes(before=before, after=files.disk_bytes(path))


@contextlib.contextmanager
def _beside(store: str) -> Iterator[str]:
    """Make a file that is to take the place of a store; removed if it did not."""
    path = store + ".new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    os.close(files.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        model = os.stat(store if os.path.exists(store) else os.path.dirname(store))
        if os.path.exists(store):
            os.chmod(path, model.st_mode & 0o777)
        if os.geteuid() == 0:
            # An administrator must not lock the owner of the queue out.
            os.chown(path, model.st_uid, model.st_gid)
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _take_place(path: str, copy: str) -> None:
    """Let a flushed file take the place of the store, durably. The journal is made anew at the opening."""
    os.rename(copy, os.path.join(path, files.DATA))
    files.flush_directory(path)
    files.mark_clean(path)


class _Known(NamedTuple):
    """What was used up in the life of a queue."""

    next_number: int
    generation: int
    next_ordinal: int


def _read_known(path: str) -> _Known:
    """Read what was used up by the store that is there, as far as it can be trusted."""
    store = os.path.join(path, files.DATA)
    if not os.path.lexists(store):
        return _Known(0, 0, 0)
    try:
        # Without it, a damaged store could end the process.
        files.missing_bytes(store)
        environment.verify_pages(store)
        with _opened_file(store) as (opened, db), opened.begin(buffers=True) as txn:
            tx = Tx(txn, db)
            header = fmt.unpack_header(bytes(txn.get(fmt.HEADER_KEY, b"", db=db.meta)), path)
            log_end = log.read_end(tx.cursor())
            return _Known(log_end.next_number, log_end.generation, header.next_ordinal)
    except persipubsub.errors.StoreCorruptError:
        return _Known(0, 0, 0)


def restore(path: str, queue: persipubsub.config.Queue, source: str, progress: Progress) -> None:
    """Let a backup take the place of a queue's store; the queue need not be there."""
    _check_regular(source)
    with files.translated(path=path, doing="create"):
        files.make_directories(path)
        foreign = files.foreign_names(path)
    store = os.path.join(path, files.DATA)
    if foreign and not os.path.lexists(store):
        raise persipubsub.errors.FormatError(
            f"Expected the directory {path} to be a queue or to be empty, but got: "
            f"{', '.join(foreign[:3])}")
    with _alone(path, queue.busy_timeout_secs), files.translated(path=path, doing="restore"):
        with _beside(store) as copy:
            with files.translated(path=source, doing="copy"):
                _copy_file(source, copy)
            _verify_copy(copy, progress, origin=source)
            known = _read_known(path)
            size = os.stat(copy).st_size
            with _opened_file(copy) as (opened, db), opened.begin() as txn:
                size += _ROOM_BYTES + fmt.used_bytes(txn, db.attempts)
            with _opened_file(copy, is_read_only=False, size=size) as (opened, db):
                with opened.begin(write=True, buffers=True) as txn:
                    _go_on_behind(Tx(txn, db), known)
                opened.sync(True)
            _take_place(path, copy)
            os.close(files.open_file(os.path.join(path, files.JOURNAL_LOCK)))
    environment.release(environment.acquire(path, queue, renews_journal=True))


def _copy_file(source: str, path: str) -> None:
    """Copy the content of a file, and wait until it is on the disk."""
    descriptor = files.open_file(path, os.O_WRONLY | os.O_TRUNC)
    with open(descriptor, "wb") as target, open(source, "rb") as content:
        shutil.copyfileobj(content, target)
        target.flush()
        os.fsync(descriptor)


def _go_on_behind(tx: Tx, known: _Known) -> None:
    """Take care that nothing of the store that was there is used again."""
    cursor = tx.cursor()
    log_end = log.read_end(cursor)
    log.put_placeholder(
        cursor,
        log_end._replace(next_number=max(log_end.next_number, known.next_number) + _SKIPPED_NUMBERS,
                         generation=max(log_end.generation, known.generation) + 1 & 0xffffffff))
    header = fmt.unpack_header(bytes(tx.txn.get(fmt.HEADER_KEY, b"", db=tx.db.meta)), "")
    now_ns = max(log_end.time_ns, time.time_ns())
    header = header._replace(next_ordinal=max(header.next_ordinal, known.next_ordinal),
                             boot_id=files.boot_id(),
                             clock_offset_ns=now_ns - files.ticks_ns(),
                             journal_id=os.urandom(16))
    tx.txn.put(fmt.HEADER_KEY, fmt.pack_header(header), db=tx.db.meta)
    # A letter that left the queue of dead letters since the backup may be needed again: it is to be
    # another one, as the ids of those that were there are remembered.
    attempts.begin_anew(tx, now_ns)


def drop(path: str, busy_timeout_secs: float) -> list[str]:
    """Remove a queue with all its messages; return the names of files that are not of this library."""
    if not os.path.lexists(os.path.join(path, files.USERS)) and not _is_remnant(path):
        files.identify_store(path)
    with _alone(path, busy_timeout_secs), files.translated(path=path, doing="remove"):
        foreign = files.foreign_names(path)
        # The mark must not be gone before the store, which can not be trusted without it.
        files.remove_durably(os.path.join(path, files.DATA))
        environment.remove_journal(path)
        aside = os.path.join(path, files.CREATING)
        if os.path.isdir(aside) and not os.path.islink(aside):
            shutil.rmtree(aside)
        # The lock and what tells that it is used last: somebody may be waiting there.
        names = set(os.listdir(path)) - set(foreign) - {files.OPEN_LOCK, files.USERS}
        for name in sorted(names) + [files.USERS, files.OPEN_LOCK]:
            if name in files.OWN or name.endswith(".new"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(path, name))
        files.flush_directory(path)
    try:
        os.rmdir(path)
    except OSError:
        return foreign
    with contextlib.suppress(OSError):
        files.flush_directory(os.path.dirname(path))
    return []


def _is_remnant(path: str) -> bool:
    """Tell whether a process was killed here at the end of removing a queue."""
    try:
        return set(os.listdir(path)) <= {files.OPEN_LOCK}
    except OSError:
        return False
