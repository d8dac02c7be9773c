"""
The journal: what survives a power failure.

LMDB runs without flushes. Its file survives the death of processes, but is not trusted after a
power failure: it is then thrown away and rebuilt from the journal, a directory of *segments*. A
segment is a file of fixed size. It is written with zeros and flushed when it is made, and reused
when everything in it is finished. To flush a file whose blocks are allocated and written takes one
write to the disk; to flush a growing file, or one that is only allocated, takes two or three. The
next segment is made in advance. With the durability ``os`` it is only allocated: writing zeros costs
more than it saves at one flush a second.

A segment begins with a header, which has a page of 4096 bytes to itself:

======= ============================================================================================
offset  header of a segment
======= ============================================================================================
0       magic ``persijnl`` (8)
8       format (4), size of the file (8)
20      number of the segment (8), id of the journal (16), identity (16)
60      number of the first record (8), end of the log (8) and time of the newest id (8) before it
84      CRC-32 (4) of all before it
======= ============================================================================================

Records follow, one after the other, each filled up to a multiple of 8 bytes:

======= ============================================================================================
offset  record
======= ============================================================================================
0       CRC-32 (4) of the segment's identity, of the fields after it, and of the body
4       kind (4), bytes of the body (8)
16      number of the record (8), end of the log (8) after what the record holds
32      body
======= ============================================================================================

There are three kinds of records. *Blocks* hold a run of commits exactly as in ``data_db``: how many
bytes of blocks follow (8), then number (8), length (8) and bytes of each block, then the ids of the
messages. *Lists* hold the lists of recipients that are new. A *state* holds all that is not
messages: subscribers, ranges, attempts, header, settings, end of the log. The identity of a segment
is random and new at each reuse, and every CRC begins with it: what a segment held before is never
taken for new.

``prune_last`` removes blocks at the end of the log, and blocks that all subscribers are finished
with may be deleted before they are copied. The journal has no record of a removal. The rebuild sees
it from the totals, which tell how many messages precede the next block: if these are fewer than
what was replayed, messages were pruned; if more, blocks were deleted before they were copied.

``Journal._catch_up`` copies commits from LMDB into the journal, under the journal's lock. It copies
the commits of all threads and processes. ``secure`` calls it for a sender that waits for the disk,
after the commit, and flushes, unless another thread or process has flushed the commit meanwhile.
The background thread writes a state record and lets go of segments.
"""

import contextlib
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from persipubsub.errors import (AccessError, BusyTimeoutError, DiskFullError, FlushError,
                                FormatError, NotInitializedError, StoreCorruptError)
from persipubsub.lmdb_engine import files
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import locks, log, once, positions
from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.format import Tx
from persipubsub.lmdb_engine.notifier import Futex

_MAGIC: Final = b"persijnl"
_FORMAT: Final = 1

_BLOCKS, _LISTS, _STATE = 1, 2, 3

#: The header of a segment has a page of the disk to itself.
_HEADER_BYTES: Final = 4096

#: Sizes of segments: they grow with what is in use.
_SMALLEST_BYTES: Final = 1 << 18
_LARGEST_BYTES: Final = 1 << 28

#: With ``os`` the room for messages that are not copied yet grows up to this size.
_MOST_ROOM_BYTES: Final = 1 << 24

#: Zeros are written in pieces of this size. A file system caches a file in pieces as large as its
#: writes, and goes through a whole piece at each later small write: with pieces of 1 MiB, a flush
#: takes a tenth longer.
_WRITTEN_BYTES: Final = 1 << 16

#: Blocks are gathered up to this many bytes a record. A record for each block would take several
#: times as long, in a thread that shares the interpreter's lock with the application.
_RECORD_BYTES: Final = 1 << 20

#: A journal made anew from the store starts its record numbers this far after those of the old one.
_SKIPPED_RECORDS: Final = 1 << 32

#: What a message costs at most in the journal beside its bytes and those of its id.
MESSAGE_COST: Final = 160

_HEADER = struct.Struct("<8sIQQ16s16sQQQ")
_RECORD = struct.Struct("<IQQQ")
_CRC = struct.Struct("<I")
_SIZE = struct.Struct("<Q")
_ENTRY = struct.Struct("<QQ")
_ID = struct.Struct("<QQB")
_RECORD_HEAD_BYTES: Final = _CRC.size + _RECORD.size

#: Longest sleep of a sender that waits for the flush of another thread or process, in seconds.
_FLUSH_PAUSE_SECS: Final = 0.001

_FLUSH_HINT: Final = (
    "Close all that this process has open of the queue and open it again; look at the disk.")

Read: TypeAlias = Callable[..., Any]


class Segment(NamedTuple):
    """The header of a segment."""

    file: int  #: number in the name of the file
    size: int
    sequence: int  #: number of the segment: one more at each use
    journal_id: bytes
    identity: bytes
    first_record: int
    end: int  #: of the log, before the first record
    ids_ns: int  #: time of the newest id before the first record

    def pack(self) -> bytes:
        """Encode the header."""
        packed = _HEADER.pack(_MAGIC, _FORMAT, *self[1:])  # pylint: disable=unsubscriptable-object
        return packed + _CRC.pack(zlib.crc32(packed))


class _Position(NamedTuple):
    """Where the next record goes; all processes share it through the page."""

    file: int  #: of the segment
    sequence: int  #: number of the segment
    offset: int  #: of the next record
    record: int  #: number of the next record
    end: int  #: of the log: everything before it is in the journal
    ids_ns: int  #: time of the newest id in the journal
    oldest: int  #: number of the oldest segment that is needed
    written: int  #: bytes of records so far
    next_file: int  #: file that is the next segment, made in advance
    next_size: int  #: its size; 0: there is none


class _State(msgspec.Struct):
    """A state record."""

    end: tuple[int, int, int, int, int, list[int]]  #: of the log
    #: number of the oldest block with messages that LMDB still had; ``keep`` in the record
    oldest_number: int = msgspec.field(name="keep")
    records: list[tuple[int, bytes, bytes]]  #: sub-database, key, value
    oldest: int = 0  #: number of the oldest segment that is needed


class _Collected(NamedTuple):
    """What was copied out of LMDB in one snapshot."""

    blocks: bytes  #: body of a record; empty if there is nothing new
    end: int
    ids_ns: int  #: time of the newest id
    lists: dict[bytes, bytes]
    is_all: bool
    state: _State | None
    txn_id: int


_POSITION = struct.Struct("<10Q")
_SHARED = struct.Struct("<11Q")  # with the CRC-32


class Journal:  # pylint: disable=too-many-instance-attributes
    """The journal of one open queue. All threads may use it at the same time."""

    # Words of the shared page. RESERVED and COMMITTED are written under the write lock, all others
    # under the journal's lock.
    _POSITION: Final = SharedPage.JOURNAL  # see _Position
    _SAFE: Final = _POSITION + 16  # end of the log that was flushed
    RESERVED: Final = _SAFE + 1  #: cost of all messages that were or are being sent
    COMMITTED: Final = _SAFE + 2  #: ... of those that were committed
    _COPIED: Final = _SAFE + 3  # ... of those that are in the journal
    _ROOM: Final = _SAFE + 4  # room in the segment made in advance, for what is not copied yet
    FAILED: Final = _SAFE + 5  #: 1 after a flush that failed, until a process opens the queue
    _STATE_TXN: Final = _SAFE + 6  # LMDB's transaction up to which the last state record goes
    _WAITS: Final = _SAFE + 8  # 1: a sender may sleep until a flush

    def __init__(self, directory: str, page: SharedPage, read: Read,
                 busy_timeout_secs: float) -> None:
        """
        Open the lock; see :py:meth:`open`.

        :param read: runs a function in a read transaction
        """
        self.directory = os.path.join(directory, files.JOURNAL)
        self._queue = directory
        self._words = page.words
        self._map = page.map
        self._read = read
        self._busy_timeout_secs = busy_timeout_secs
        # The flush lock and the journal's lock. They guard all below.
        self._lock = locks.ExclusiveLock(os.path.join(directory, files.JOURNAL_LOCK),
                                         f"write to the journal of the queue {directory}")
        if os.path.islink(self.directory):
            raise AccessError(
                f"Expected {self.directory} to be a directory, but got: a symbolic link")
        self._futex = Futex(page, SharedPage.FLUSH_STAMP)
        self._descriptor = -1
        self._segment: Segment | None = None
        # Of the segment; -1: none is open.
        self._sequence, self._size, self._seed = -1, 0, 0
        self._lists = 0  # lists of recipients that are in the journal, as far as is known here
        # Bytes of records at the last look, and about how many come between two looks.
        self._written, self._traffic = 0, 0

    # Opening

    def open(self, journal_id: bytes, is_shared: bool, end: int) -> bool:
        """
        Find the end of the journal; hold the open lock.

        :param journal_id: of the store
        :param is_shared: True if processes have or had it open in this boot: the page is right
        :param end: of the log in the store
        :return: False if the journal is not that of the store: it is to be made anew
        """
        with self._lock.held(self._busy_timeout_secs):
            if is_shared:
                try:
                    self._follow(self._require())
                except StoreCorruptError:
                    return False
                # If a process was killed while it restored the queue, this is the journal of
                # another store.
                assert self._segment is not None
                return self._segment.journal_id == journal_id and not self.has_failed
            self._reset()
            chain = self._used(journal_id)
            records = list(self._records(chain[-1])) if chain else []
            if not records or records[-1][1] != _STATE:
                # The last process that leaves a queue writes a state record.
                return False
            state = msgspec.msgpack.decode(records[-1][4], type=_State)
            if state.end[0] != end:
                return False
            # Remove the segments after the chain: they have no whole record, and new segments get
            # their sequence numbers.
            for segment in self._segments():
                if segment.sequence > chain[-1].sequence:
                    os.unlink(self._path(segment.file))
            files.flush_directory(self.directory)
            self._store(self._position_after(chain[-1], state.oldest))
            self._words[self._SAFE] = end
            self._take_ahead()
            return True

    def _reset(self) -> None:
        """Forget what the page says of another boot; no other process uses the queue."""
        for index in range(self._SAFE, self._STATE_TXN + 1):
            self._words[index] = 0
        self._close_segment()
        self._lists = 0

    def restart(self, journal_id: bytes, oldest_id_ns: int) -> None:
        """Begin a new journal with all that is in the store, flush it, and let go of the old one."""
        with self._lock.held(self._busy_timeout_secs):
            with files.translated(self.directory, "create"):
                files.make_directories(self.directory)
            before = self._segments()
            first = max((one.sequence for one in before), default=0) + 1
            # The old segments stay until the new journal is whole: they may be needed after all.
            oldest = min((one.sequence for one in before if one.sequence), default=first)
            record = max((one.first_record for one in before), default=0) + _SKIPPED_RECORDS
            self._reset()
            file, size = self._make_segment(_SMALLEST_BYTES)
            self._begin_segment(_Position(0, first - 1, 0, record, 0, 0, oldest, 0, file, size),
                                journal_id)
            self._write_state(oldest_id_ns, oldest=first)
            for segment in self._free():
                with files.suppress(OSError):
                    os.unlink(self._path(segment.file))

    def close(self) -> None:
        """Close the files."""
        self._close_segment()
        self._lock.close()

    # Sending

    def reserve(self, cost: int) -> bool:
        """
        Make sure of the room for messages before they are committed; hold the write lock.

        :param cost: of the messages, see ``MESSAGE_COST``
        :return: False if there is not enough: see :py:meth:`make_room`
        """
        reserved = self._words[self.RESERVED] + cost
        if reserved - self._words[self._COPIED] > self._words[self._ROOM]:
            return False
        self._words[self.RESERVED] = reserved
        return True

    def make_room(self, cost: int, is_flushed: bool) -> None:
        """
        Make a segment in advance that has room for messages. The write lock must not be held.

        :param is_flushed: True if senders flush. Otherwise the room doubles whenever it is used up:
            messages are copied later then, and those that are finished by then are not copied.
        :raise DiskFullError: if the disk has no room for it
        """
        with self._lock.held(self._busy_timeout_secs):
            more = 0 if is_flushed else min(2 * self._words[self._ROOM], _MOST_ROOM_BYTES)
            self._catch_up()
            position = self._require()
            if position.next_size < max(cost + _HEADER_BYTES, more):
                file, size = self._make_room_for(cost, more, is_flushed)
                self._store(self._require()._replace(next_file=file, next_size=size))
                self._words[self._ROOM] = size - _HEADER_BYTES

    def secure(self, end: int) -> None:
        """
        Wait until the log up to a number is in the journal on the disk.

        One of the threads and processes that wait copies and flushes for all of them.

        :raise FlushError: if the disk refused it
        :raise BusyTimeoutError: if another process holds the journal for too long
        """
        deadline = time.monotonic() + self._busy_timeout_secs
        while self._words[self._SAFE] < end:
            stamp = self._futex.load()
            if self._words[self.FAILED]:
                raise self.failure("an earlier flush failed")
            try:
                with self._lock.held(timeout=0):
                    self._flush(self._catch_up())
                    self._wake()
            except BusyTimeoutError:
                if time.monotonic() >= deadline:
                    raise BusyTimeoutError(
                        f"Expected to flush the journal of the queue {self._queue} within "
                        f"{self._busy_timeout_secs} seconds (busy_timeout_secs), but got: another "
                        "process is in the middle of a flush. The message is in the queue, but not "
                        "yet safe.") from None
                self._words[self._WAITS] = 1
                # Look once more: the flush may have ended since the first look.
                if self._words[self._SAFE] < end:
                    self._futex.wait(stamp, _FLUSH_PAUSE_SECS)

    def _wake(self) -> None:
        """Wake all senders that wait for a flush, in all processes."""
        if self._words[self._WAITS]:
            self._words[self._WAITS] = 0
            self._futex.wake_all()

    def failure(self, found: object) -> FlushError:
        """Describe a flush that failed."""
        return FlushError(f"Expected to flush the journal of the queue {self._queue}, but got: "
                          f"{found}. {_FLUSH_HINT}")

    def _failure_of(self, error: OSError) -> FlushError:
        """Refuse all further writes after an error of the disk."""
        if error.errno is None:
            raise error  # by a signal handler, see files
        self._words[self.FAILED] = 1
        return self.failure(error.strerror or error)

    @property
    def has_failed(self) -> bool:
        """Whether a flush failed since the queue was opened, in any process."""
        return bool(self._words[self.FAILED])

    # Looking after

    def write_state(self, oldest_id_ns: int, txn_id: int = 0) -> None:
        """
        Write a state record and flush it; let go of segments of which LMDB has nothing any more.

        :param oldest_id_ns: ids of earlier messages are not needed
        :param txn_id: if given: nothing is done if a state record goes that far
        """
        if txn_id and self._words[self._STATE_TXN] >= txn_id:
            return
        with self._lock.held(self._busy_timeout_secs):
            self._write_state(oldest_id_ns)
            self._let_go()
        self._wake()

    def bytes_on_disk(self) -> int:
        """Measure all segments."""
        total = 0
        with files.translated(self.directory, "list"):
            indices = self._indices()
        for index in indices:
            with files.suppress(OSError):
                total += os.stat(self._path(index)).st_size
        return total

    def lag_bytes(self) -> int:
        """About how many bytes are in LMDB and not yet in the journal."""
        return max(0, self._words[self.COMMITTED] - self._words[self._COPIED])

    def _write_state(self, oldest_id_ns: int, oldest: int = 0) -> None:
        """Copy all that was committed, write a state record after it, and flush."""
        collected = self._catch_up(with_state=True)
        state = collected.state
        assert state is not None, "It was asked for."
        state.oldest = oldest or self._oldest_needed(state.oldest_number, oldest_id_ns)
        position = self._require()
        self._append(position, _STATE, msgspec.msgpack.encode(state), collected.end,
                     position.ids_ns)
        self._flush(collected)
        self._store(self._require()._replace(oldest=state.oldest))
        self._words[self._STATE_TXN] = collected.txn_id

    def _oldest_needed(self, oldest_number: int, oldest_id_ns: int) -> int:
        """Find the oldest segment that has a block that LMDB has, or an id that is needed."""
        position = self._require()
        live = [one for one in self._segments() if position.oldest <= one.sequence]
        for segment, following in zip(live, live[1:]):
            if following.end > oldest_number or following.ids_ns >= oldest_id_ns:
                return segment.sequence
        return position.sequence

    def _let_go(self) -> None:
        """Keep as many free segments as are written in a while, and remove the others."""
        self._take_ahead()
        usual = self._usual_size()
        written = self._require().written
        self._traffic = max(written - self._written, self._traffic * 15 // 16)
        self._written = written
        kept = 0
        for segment in reversed(self._free()):
            kept += segment.size
            if segment.size < usual // 4 or kept > max(usual, self._traffic):
                with files.suppress(OSError):
                    os.unlink(self._path(segment.file))

    def _usual_size(self) -> int:
        """Choose the size of a new segment: a quarter of what is needed now."""
        position = self._require()
        needed = sum(one.size for one in self._segments() if one.sequence >= position.oldest)
        size = _SMALLEST_BYTES
        while size < min(needed // 4, _LARGEST_BYTES):
            size *= 2
        return size

    # Copying

    def _catch_up(self, with_state: bool = False) -> _Collected:
        """Copy everything that was committed into the journal; hold the journal's lock."""
        position = self._require()
        while True:
            # Read before the snapshot, so that the snapshot has all of it.
            committed = self._words[self.COMMITTED]
            self._follow(position)
            room = self._size - position.offset
            # Gather as much as fits into the segment, unless that is next to nothing.
            budget = min(_RECORD_BYTES, room - 256) if room > 4096 else _RECORD_BYTES
            collected: _Collected = self._read(self._collect, position, budget, with_state)
            if collected.lists:
                lists = msgspec.msgpack.encode(collected.lists)
                position = self._append(position, _LISTS, lists, position.end, position.ids_ns)
                self._lists += len(collected.lists)
            if collected.blocks:
                position = self._append(position, _BLOCKS, collected.blocks, collected.end,
                                        collected.ids_ns)
            if collected.is_all:
                self._words[self._COPIED] = committed
                return collected

    def _collect(self, tx: Tx, position: _Position, budget: int, with_state: bool) -> _Collected:
        """Gather what the journal does not have, up to a number of bytes but at least a block."""
        parts: list[bytes | memoryview] = [b""]
        size = 0
        is_all = True
        cursor = tx.cursor()
        if cursor.set_range(fmt.pack_number(position.end)):
            for key, value in cursor.iternext():
                size += _ENTRY.size + len(value)
                if len(parts) > 1 and size > budget:
                    is_all = False
                    break
                parts += (_ENTRY.pack(int.from_bytes(key, "big"), len(value)), value)
        end, ids_ns = position.end, position.ids_ns
        if len(parts) > 1:
            # The record is not checked: the consumer that reaches a damaged one handles it.
            end = max(
                end,
                _ENTRY.unpack(parts[-2])[0] + (fmt.guess_messages(memoryview(parts[-1])) or 1))
            parts[0] = _SIZE.pack(sum(map(len, parts)))
            for identifier, number, ids_ns in once.since(tx, ids_ns, position.end, end):
                parts.append(_ID.pack(number, ids_ns, len(identifier)) + identifier)
        lists: dict[bytes, bytes] = {}
        while (members := tx.txn.get(fmt.audience_key(self._lists + len(lists) + 1),
                                     db=tx.db.meta)) is not None:
            lists[fmt.audience_key(self._lists + len(lists) + 1)] = bytes(members)
        state = None
        if with_state and is_all:
            log_end = log.read_end(tx.cursor())
            head = log.head(tx.cursor())
            end = max(end, log_end.next_number)
            records = [(which, bytes(key), bytes(value)) for which, database in enumerate(tx.db)
                       if database is not tx.db.data and database is not tx.db.once
                       for key, value in tx.txn.cursor(db=database)]
            # The journal keeps all that LMDB has, even what is finished: a seek may go back to it. It
            # does not keep the messages that a placeholder stands for.
            oldest_number = log_end.next_number
            if head is not None:
                oldest_number = head.first + (0 if head.block.messages else 1)
            state = _State((*log_end[:5], list(log_end.totals)), oldest_number, records)
        return _Collected(b"".join(parts), end, ids_ns, lists, is_all, state, tx.txn.id())

    def _append(self, position: _Position, kind: int, body: bytes, end: int,
                ids_ns: int) -> _Position:
        """Write a record, and return the position after it; hold the journal's lock."""
        size = _RECORD_HEAD_BYTES + len(body)
        whole = _aligned(size)
        if whole > self._size - position.offset:
            position = self._roll(position, whole)
        head = _RECORD.pack(kind, len(body), position.record, end)
        crc = _CRC.pack(zlib.crc32(body, zlib.crc32(head, self._seed)))
        rest, offset = memoryview(b"".join((crc, head, body))), position.offset
        try:
            while rest:  # a record of more than 2 GiB takes more than one call
                written = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            raise self._failure_of(error) from error
        file, sequence, at, record, _, _, oldest, written, next_file, next_size = position
        position = _Position(file, sequence, at + whole, record + 1, end, ids_ns, oldest,
                             written + size, next_file, next_size)
        self._store(position)
        return position

    def _flush(self, collected: _Collected) -> None:
        """Flush the segment; hold the journal's lock."""
        self._flush_file()
        self._words[self._SAFE] = max(collected.end, self._words[self._SAFE])

    def _flush_file(self) -> None:
        """Flush the segment. After any error, what can be read may not be on the disk."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._failure_of(error) from error

    # Segments

    def _roll(self, position: _Position, size: int) -> _Position:
        """Go on in the segment made in advance, or in a new one if it is too small."""
        assert self._segment is not None
        journal_id = self._segment.journal_id
        if position.next_size - _HEADER_BYTES < size:
            file, made = self._make_room_for(size)
            position = position._replace(next_file=file, next_size=made)
        # Flush this segment before anything is written to the next one: later flushes are of that
        # file only.
        self._flush_file()
        self._begin_segment(position, journal_id)
        self._take_ahead()
        return self._require()

    def _begin_segment(self, position: _Position, journal_id: bytes) -> None:
        """Give the file made in advance a new identity; the next flush covers its header too."""
        segment = Segment(position.next_file, position.next_size, position.sequence + 1, journal_id,
                          os.urandom(16), position.record, position.end, position.ids_ns)
        self._close_segment()
        path = self._path(segment.file)
        self._descriptor = self._open_segment(segment)
        with files.translated(path, "write"):
            os.pwrite(self._descriptor, segment.pack(), 0)
        self._words[self._ROOM] = 0
        self._store(
            position._replace(file=segment.file,
                              sequence=segment.sequence,
                              offset=_HEADER_BYTES,
                              next_file=0,
                              next_size=0))
        # This comes last: if a signal handler raises before it, this process does not use the
        # segment yet, and another process may begin it again.
        self._use(segment)

    def _follow(self, position: _Position) -> None:
        """Open the segment in which the position is."""
        if self._sequence == position.sequence:
            return
        self._close_segment()
        segment = self._read_header(position.file)
        if segment is None or segment.sequence != position.sequence:
            raise StoreCorruptError(
                f"Expected the segment {position.sequence} of the journal in "
                f"{self._path(position.file)}, but got: {segment and segment.sequence}. Close all "
                "that is open of the queue, and open it again.")
        self._descriptor = self._open_segment(segment)
        self._use(segment)

    def _open_segment(self, segment: Segment) -> int:
        """Open the file of a segment; the queue is initialized, so that it has to be there."""
        try:
            return files.open_file(self._path(segment.file), os.O_RDWR)
        except NotInitializedError as error:
            raise StoreCorruptError(
                f"Expected the segment {self._path(segment.file)} of the journal, but got: no such "
                "file. Close all that is open of the queue, and open it again: the journal is then "
                "made anew from the store.") from error

    def _use(self, segment: Segment) -> None:
        """Write to a segment that was opened."""
        self._size = segment.size
        self._seed = zlib.crc32(segment.identity)
        self._segment = segment
        self._sequence = segment.sequence

    def _close_segment(self) -> None:
        """Close the file of the segment."""
        descriptor, self._descriptor = self._descriptor, -1
        self._segment, self._sequence = None, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _take_ahead(self) -> None:
        """Let a free segment be the next one, if none was made in advance."""
        position = self._require()
        if position.next_size:
            return
        for segment in self._free():
            self._store(position._replace(next_file=segment.file, next_size=segment.size))
            self._words[self._ROOM] = segment.size - _HEADER_BYTES
            return

    def _free(self) -> list[Segment]:
        """List the segments whose messages are all finished, except the next one."""
        position = self._require()
        return [
            one for one in self._segments()
            if one.sequence < position.oldest and one.file != position.next_file
        ]

    def _make_room_for(self, size: int, more: int = 0, is_written: bool = True) -> tuple[int, int]:
        """Make a segment for records; on a full disk, one that is no larger than it has to be."""
        least = max(_SMALLEST_BYTES, size + _HEADER_BYTES)
        try:
            return self._make_segment(max(self._usual_size(), least, more), is_written)
        except DiskFullError:
            return self._make_segment(least, is_written)

    def _make_segment(self, size: int, is_written: bool = True) -> tuple[int, int]:
        """Make a file of zeros, written or only allocated, durably; return its index and its size."""
        size = _aligned(size)
        index = max(self._indices(), default=0) + 1
        path = self._path(index)
        temporary = path + ".new"
        with files.translated(path, "write"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)  # of a process that was killed here
            descriptor = files.open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                if is_written:
                    for offset in range(0, size, _WRITTEN_BYTES):
                        files.extend(descriptor, offset, min(size, offset + _WRITTEN_BYTES))
                else:
                    os.posix_fallocate(descriptor, 0, size)
                # The header of a free segment: it is found if this process is killed before it is
                # used.
                packed = Segment(index, size, 0, bytes(16), bytes(16), 0, 0, 0).pack()
                os.pwrite(descriptor, packed, 0)
                os.fsync(descriptor)
                os.rename(temporary, path)
                files.flush_directory(self.directory)
            except BaseException:
                # Give the room back: the disk may be full.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
            finally:
                os.close(descriptor)
        return index, size

    def _path(self, index: int) -> str:
        """Name the file of a segment."""
        return os.path.join(self.directory, f"{index:08d}")

    def _indices(self) -> list[int]:
        """List the files of segments."""
        try:
            # Not os.path.isdir, which returns False if a signal handler raises an OSError.
            is_directory = stat.S_ISDIR(os.lstat(self.directory).st_mode)
        except FileNotFoundError:
            return []
        if not is_directory:
            raise AccessError(
                f"Expected {self.directory} to be a directory, but got: something else")
        return sorted(int(name) for name in os.listdir(self.directory) if name.isdigit())

    def _segments(self) -> list[Segment]:
        """Read the headers of all segments that were used, in order."""
        found = [self._read_header(index) for index in self._indices()]
        return sorted((one for one in found if one is not None), key=lambda one: one.sequence)

    def _read_header(self, index: int) -> Segment | None:
        """Read the header of a segment; None if it has none yet, or is damaged."""
        path = self._path(index)
        try:
            descriptor = files.open_file(path, os.O_RDONLY)
        except NotInitializedError:
            return None
        try:
            with files.translated(path, "read"):
                found = os.pread(descriptor, _HEADER.size + _CRC.size, 0)
                size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if len(found) < _HEADER.size + _CRC.size:
            return None
        magic, version, *fields = _HEADER.unpack_from(found)
        if magic != _MAGIC or zlib.crc32(found[:_HEADER.size]) != _CRC.unpack_from(
                found, _HEADER.size)[0]:
            return None
        if version != _FORMAT:
            raise FormatError(
                f"Expected the journal {path} to be of format {_FORMAT}, but got: {version}")
        segment = Segment(index, *fields)
        return segment if segment.size <= size else None

    def _records(self, segment: Segment) -> Iterator[tuple[int, int, int, int, bytes]]:
        """Read records up to the first one that is missing: offset, kind, number, end, body."""
        seed = zlib.crc32(segment.identity)
        offset, number = _HEADER_BYTES, segment.first_record
        path = self._path(segment.file)
        with files.translated(path, "read"), open(path, "rb") as file:
            while offset + _RECORD_HEAD_BYTES <= segment.size:
                file.seek(offset)
                head = file.read(_RECORD_HEAD_BYTES)
                if len(head) < _RECORD_HEAD_BYTES:
                    return
                crc, = _CRC.unpack_from(head)
                kind, length, found, end = _RECORD.unpack_from(head, _CRC.size)
                if found != number or offset + _RECORD_HEAD_BYTES + length > segment.size:
                    return
                body = file.read(length)
                if zlib.crc32(body, zlib.crc32(head[_CRC.size:], seed)) != crc:
                    return
                yield offset, kind, number, end, body
                offset += _aligned(_RECORD_HEAD_BYTES + length)
                number += 1

    def _next_record(self, segment: Segment) -> int:
        """Return the number after that of the last whole record."""
        number = segment.first_record
        for _, _, found, _, _ in self._records(segment):
            number = found + 1
        return number

    # The position

    def _load(self) -> _Position | None:
        """Read the position; None if a process was killed in the middle of writing it."""
        *fields, crc = _SHARED.unpack_from(self._map, 8 * self._POSITION)
        if not fields[3] or zlib.crc32(_POSITION.pack(*fields)) != crc:
            return None
        return _Position(*fields)

    def _require(self) -> _Position:
        """Read the position, or find it again."""
        position = self._load()
        if position is None:
            position = self._find_position()
            self._store(position)
        return position

    def _store(self, position: _Position) -> None:
        """Write the position."""
        packed = _POSITION.pack(*position)
        _SHARED.pack_into(self._map, 8 * self._POSITION, *position, zlib.crc32(packed))

    def _find_position(self) -> _Position:
        """Find the position after the last record, after a kill in the middle of writing it."""
        segments = [one for one in self._segments() if one.sequence]
        if not segments:
            raise StoreCorruptError(
                f"Expected segments of the journal in {self.directory}, but got: none. Close all that "
                "is open of the queue, and open it again.")
        self._words[self._ROOM] = 0
        return self._position_after(segments[-1], self._oldest_of(segments))

    def _position_after(self, segment: Segment, oldest: int) -> _Position:
        """Find the position after the last whole record of a segment."""
        position = _Position(segment.file, segment.sequence, _HEADER_BYTES, segment.first_record,
                             segment.end, segment.ids_ns, oldest, 0, 0, 0)
        for offset, kind, number, end, body in self._records(segment):
            times = [time_ns for _, _, time_ns in _ids_of(body)] if kind == _BLOCKS else []
            position = position._replace(offset=offset + _aligned(_RECORD_HEAD_BYTES + len(body)),
                                         record=number + 1,
                                         end=max(end, position.end),
                                         ids_ns=max([position.ids_ns, *times]))
        return position

    # After a power failure

    def replay(self, begin: Callable[[], "contextlib.AbstractContextManager[Tx]"],
               flush: Callable[[], None]) -> None:
        """
        Put everything that the journal holds into an empty store.

        :param begin: begins a write transaction, which is committed at the end of the block
        :param flush: flushes the store, after each segment
        :raise StoreCorruptError: if there is no whole journal
        """
        chain = self._choose_chain()
        last_state, oldest_number = 0, 0
        for segment in chain:
            for _, kind, number, _, body in self._records(segment):
                if kind == _STATE:
                    last_state = number
                    oldest_number = msgspec.msgpack.decode(body, type=_State).oldest_number
        for segment in chain:
            # Each segment has a transaction: all at once could be too much for the memory.
            with begin() as tx:
                for _, kind, number, _, body in self._records(segment):
                    if kind == _BLOCKS:
                        _replay_blocks(tx, body, oldest_number if number < last_state else 0)
                    elif kind == _LISTS:
                        for key, members in msgspec.msgpack.decode(body, type=dict[bytes,
                                                                                   bytes]).items():
                            tx.txn.put(key, members, db=tx.db.meta)
                    elif number == last_state:
                        _replay_state(tx, msgspec.msgpack.decode(body, type=_State))
            flush()

    def _oldest_of(self, segments: list[Segment]) -> int:
        """Read in the last state record which segment is the oldest that is needed; 0: there is none."""
        for segment in reversed(segments):
            states = [body for _, kind, _, _, body in self._records(segment) if kind == _STATE]
            if states:
                return msgspec.msgpack.decode(states[-1], type=_State).oldest
        return 0

    def _used(self, journal_id: bytes) -> list[Segment]:
        """List the segments of a journal, without those at its end that have no record."""
        chain = [one for one in self._segments() if one.journal_id == journal_id]
        while chain and next(self._records(chain[-1]), None) is None:
            chain.pop()
        return chain

    def _choose_chain(self) -> list[Segment]:
        """Choose the newest journal that has a state record, and check that it is whole."""
        segments = self._segments()
        for journal_id in dict.fromkeys(one.journal_id for one in reversed(segments)):
            chain = self._used(journal_id)
            oldest = self._oldest_of(chain)
            if not oldest:
                continue
            chain = [one for one in chain if one.sequence >= oldest]
            for expected, segment in enumerate(chain, start=oldest):
                if segment.sequence != expected:
                    raise self._damaged(f"the segment {expected} is missing")
            for index, following in enumerate(chain[1:], start=1):
                behind = self._next_record(chain[index - 1])
                if following.first_record > behind + _SKIPPED_RECORDS // 2:
                    # A process began to make the journal anew, and ended before the first state
                    # record.
                    return chain[:index]
                if following.first_record != behind:
                    raise self._damaged(f"{self._path(chain[index - 1].file)} is damaged")
            if chain:
                return chain
        raise self._damaged("no segment with a state record")

    def _damaged(self, found: str) -> StoreCorruptError:
        """Describe a journal from which the store can not be rebuilt."""
        return StoreCorruptError(
            f"Expected a whole journal in {self.directory}, but got: {found}. The machine went down "
            f"while the queue was in use, so that {os.path.join(self._queue, files.DATA)} can not be "
            "trusted. Restore a backup with 'persipubsub restore'; or, to accept what that file holds, "
            f"remove {os.path.join(self._queue, files.RUNNING)} and run 'persipubsub verify'.")

    def check(self) -> list[str]:
        """Read all records; return what is wrong. Others write to the journal meanwhile."""
        with self._lock.held(self._busy_timeout_secs):
            self._catch_up()
            position = self._require()
            live = [one for one in self._segments() if one.sequence >= position.oldest]
        findings: list[str] = []
        expected = [*(one.first_record for one in live[1:]), position.record]
        for segment, record in zip(live, expected):
            # Another process may remove it, or use it again: then LMDB has nothing of it any more.
            with contextlib.suppress(NotInitializedError):
                found = self._next_record(segment)
                if found < record and self._read_header(segment.file) == segment:
                    findings.append(
                        f"Expected the segment {segment.sequence} of the journal to end "
                        f"with the record {record - 1}, but got: {found - 1}")
        return findings


def remove_journal(directory: str) -> None:
    """Remove the segments of a journal, durably."""
    path = os.path.join(directory, files.JOURNAL)
    if os.path.islink(path) or not os.path.isdir(path):
        files.remove_durably(path)
        return
    for name in os.listdir(path):
        os.unlink(os.path.join(path, name))
    os.rmdir(path)
    files.flush_directory(directory)


def _blocks_of(body: bytes) -> Iterator[tuple[int, memoryview]]:
    """Iterate over the blocks of a record."""
    view = memoryview(body)
    offset, end = _SIZE.size, _SIZE.size + _SIZE.unpack_from(view)[0]
    while offset < end:
        number, length = _ENTRY.unpack_from(view, offset)
        offset += _ENTRY.size
        yield number, view[offset:offset + length]
        offset += length


def _ids_of(body: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Iterate over the ids of a record of blocks, with number and time of their messages."""
    offset = _SIZE.size + _SIZE.unpack_from(body)[0]
    while offset < len(body):
        number, time_ns, length = _ID.unpack_from(body, offset)
        offset += _ID.size
        yield body[offset:offset + length], number, time_ns
        offset += length


def _replay_blocks(tx: Tx, body: bytes, oldest_number: int) -> None:
    """Put blocks and ids into a store; blocks before a number are not needed."""
    cursor = tx.cursor()
    for number, value in _blocks_of(body):
        block = fmt.unpack_block(value, number)
        if fmt.end_of(number, block) <= oldest_number:
            continue
        _go_on_at(tx, number, block.total_count - block.messages)
        cursor.put(fmt.pack_number(number), value)
    for identifier, number, time_ns in _ids_of(body):
        once.remember(tx, identifier, number, time_ns)


def _go_on_at(tx: Tx, number: int, total: int) -> None:
    """Make the log end so that the next block has this number and this many messages before it."""
    cursor = tx.cursor()
    log_end = log.read_end(cursor)
    head = log.head(cursor)
    if head is not None and head.block.total_count - head.block.messages > total:
        # The whole log was pruned, and also messages before it, which the journal has no more.
        while cursor.first():
            cursor.delete()
    elif log_end.total_count > total:
        # Those at the end were pruned.
        assert head is not None
        cut = log.number_at_count(cursor, head.first, log_end.next_number, total)
        log.truncate(cursor, log_end, cut)
    elif log_end.total_count < total:
        # Blocks were deleted before they were copied. Blocks are deleted in order, and only after
        # all subscribers are finished with them: everything before them is finished, too, even if
        # no state record says so.
        for subscriber in positions.read_all(tx):
            positions.finish(tx, subscriber, 0, number)
            positions.write(tx, subscriber)
        while cursor.first():
            cursor.delete()


def _replay_state(tx: Tx, state: _State) -> None:
    """Put all that is not messages into a store."""
    for which, key, value in state.records:
        tx.txn.put(key, value, db=tx.db[which])
    next_number, time_ns, count, size, generation, totals = state.end
    _go_on_at(tx, next_number, count)
    cursor = tx.cursor()
    if log.read_end(cursor).next_number < next_number:
        log.put_placeholder(
            cursor, log.LogEnd(next_number, time_ns, count, size, generation, tuple(totals)))


def _aligned(size: int) -> int:
    """Round up to a multiple of 8."""
    return size + 7 & ~7
