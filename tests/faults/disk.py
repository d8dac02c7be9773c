"""
Model what a disk holds at a power failure, from a recording of what a process did.

Only what was flushed is sure to be there. Of the rest any part may be: each 4096-byte (or 512-byte)
piece of a write that was not followed by a flush of its file, each change of a file's size, each
name that was not followed by a flush of its directory. A rename is atomic.
"""

import pathlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from tests.faults import tracing

#: Everything that changes files or makes changes durable, and locks. Files are mapped for reading
#: only, but for ``shared`` and LMDB's lock file: their content means nothing after a power failure.
_CALLS = (
    "openat,open,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,"
    "fdatasync,fsync,sync,syncfs,msync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,"
    "rmdir,link,linkat,symlink,sync_file_range,copy_file_range,sendfile,lseek,flock")

_LINE = re.compile(rb"(\d+) +(?:(\w+)\((.*)|<\.\.\. (\w+) resumed>(.*))$", re.S)
#: A descriptor, with the path that it has at the moment.
_OPENED = re.compile(rb"(?:AT_FDCWD|\d+)<((?:\\x[0-9a-f]{2})*)>(\(deleted\))?")
_STRING = re.compile(rb'"((?:\\x[0-9a-f]{2})*)"')
_UNFINISHED = b" <unfinished ...>"

_WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2")


class Call(NamedTuple):
    name: str
    strings: tuple[bytes, ...]  #: its arguments that are strings
    words: tuple[str, ...]  #: all its arguments, each string replaced by one letter
    paths: tuple[str, ...]  #: those of its descriptors; empty for a file without a name


class Event(NamedTuple):
    """Hold the beginning or the end of a system call."""

    key: int  #: the same for the beginning and the end
    thread: int
    call: Call
    result: int | None  #: None at the beginning


def record(work: Callable[[], None], output: Path, options: Sequence[str] = ()) -> list[Event]:
    """Run a function in a process of its own and record what it does to files."""
    code = tracing.run(lambda: work, [
        "-y", "-xx", "-s", "100000000", "-o",
        str(output), "-e", f"trace={_CALLS}", "-e", "signal=none", *options
    ])
    assert code == 0, f"Expected the recorded process to end well, but got: {code}"
    return list(_parse(output.read_bytes().splitlines()))


def _parse(lines: Sequence[bytes]) -> Iterator[Event]:
    begun: dict[bytes, tuple[int, bytes]] = {}
    for key, line in enumerate(lines):
        match = _LINE.match(line)
        if match is None:
            assert b"+++" in line or b"---" in line, line[:200]
            continue
        thread, name, rest, _, resumed = match.groups()
        if name is not None:
            call_text = name + b"(" + rest
            if rest.endswith(_UNFINISHED):
                begun[thread] = (key, call_text[:-len(_UNFINISHED)])
                yield Event(key, int(thread), _parse_call(begun[thread][1]), None)
                continue
            call = _parse_call(call_text)
            yield Event(key, int(thread), call, None)
        else:
            key, text = begun.pop(thread)
            call_text = text + resumed
            call = _parse_call(call_text)
        found = re.search(rb"\) += (-?\d+|\?)[^\"]*$", call_text)
        assert found is not None, call_text[-200:]
        yield Event(key, int(thread), call, -1 if found.group(1) == b"?" else int(found.group(1)))


def _unescape(text: bytes) -> bytes:
    """Decode what strace writes in hexadecimal digits."""
    return bytes.fromhex(text.decode("ascii").replace("\\x", ""))


def _parse_call(text: bytes) -> Call:
    strings = tuple(map(_unescape, _STRING.findall(text)))
    text = _STRING.sub(b"S", text)
    paths = tuple("" if deleted else _unescape(path).decode("utf-8", "surrogateescape")
                  for path, deleted in _OPENED.findall(text))
    name, _, rest = _OPENED.sub(b"D", text).decode("ascii").partition("(")
    arguments = re.sub(r"\) += .*$", "", rest)
    return Call(name, strings, tuple(word.strip() for word in arguments.split(",")), paths)


class _Change:
    """Hold a change of a file, or of names, that was not flushed yet."""

    def __init__(self, key: int, place: int, data: bytes, size: int | None) -> None:
        self.key = key
        self.place = place
        self.data = data
        self.size = size  # of the file from now on; None: of a write

    def apply(self, content: bytearray) -> None:
        if self.size is not None:
            _resize(content, self.size)
            return
        end = self.place + len(self.data)
        if len(content) < end:
            _resize(content, end)
        content[self.place:end] = self.data


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


class _File:
    """Hold a file: what everybody sees, what is on the disk for sure, and what is between them."""

    def __init__(self, content: bytes = b"") -> None:
        self.seen = bytearray(content)
        self.durable = bytearray(content)
        self.pending: list[_Change] = []

    def add(self, change: _Change) -> None:
        change.apply(self.seen)
        self.pending.append(change)

    def flush(self, keys: Sequence[int]) -> None:
        """Make the changes of some calls durable."""
        for change in self.pending:
            if change.key in keys:
                change.apply(self.durable)
        self.pending = [change for change in self.pending if change.key not in keys]

    def survive(self, chance: random.Random, how: "Survival") -> bytes:
        """Choose what of the file there is after a power failure."""
        content = bytearray(self.durable)
        pieces: list[_Change] = []
        for change in self.pending:
            if change.size is not None:
                pieces.append(change)
                continue
            begin = 0
            while begin < len(change.data):
                place = change.place + begin
                end = min(len(change.data), place - place % how.piece + how.piece - change.place)
                pieces.append(_Change(change.key, place, change.data[begin:end], None))
                begin = end
        only = chance.randrange(len(pieces)) if pieces else 0
        for index, piece in enumerate(pieces):
            if how.is_odd_one_out:
                survives = (index == only) == (how.chance < 0.5)
            elif how.is_prefix:
                survives = index < only
            else:
                survives = chance.random() < how.chance
            if survives:
                piece.apply(content)
        if how.keeps_size and len(content) < len(self.seen):
            # The size reached the disk, the pages did not.
            _resize(content, len(self.seen))
        return bytes(content)


class Survival(NamedTuple):
    """Say how much of what was not flushed survives."""

    chance: float  #: that a piece survives
    piece: int  #: in bytes
    is_odd_one_out: bool  #: one piece survives, or (chance over one half) one does not
    is_prefix: bool  #: the first pieces of a file survive, in the order in which they were written
    keeps_size: bool  #: files have the sizes that they had, with zeros where nothing survived
    name_chance: float  #: that a change of a name survives
    keeps_name_order: bool  #: of these changes, as in a journal: none behind the first that is lost

    @staticmethod
    def choose(chance: random.Random) -> "Survival":
        """Choose at random, extremes more often than not."""
        return Survival(chance=chance.choice((0.0, 1.0, 0.5, chance.random(), 0.9, 0.1)),
                        piece=chance.choice((4096, 4096, 512)),
                        is_odd_one_out=chance.random() < 0.3,
                        is_prefix=chance.random() < 0.3,
                        keeps_size=chance.random() < 0.4,
                        name_chance=chance.choice((0.0, 1.0, 0.5)),
                        keeps_name_order=chance.random() < 0.5)


class _Names:
    """Hold a change of names that was not flushed yet."""

    def __init__(self, key: int, parents: Sequence[str], removed: str | None,
                 added: "Optional[tuple[str, Optional[_File]]]") -> None:
        self.key = key
        self.parents = parents
        self.removed = removed
        self.added = added

    def apply(self, names: "dict[str, Optional[_File]]") -> None:
        if self.removed is not None:
            names.pop(self.removed, None)
        if self.added is not None:
            names[self.added[0]] = self.added[1]


class Disk:
    """
    Follow the recorded calls; materialize what a power failure leaves behind.

    Paths are those of a directory and of what is below it; everything else is ignored.
    """

    def __init__(self, root: Path, initial: Path | None = None) -> None:
        """Initialize with a disk that is empty but for its root."""
        self.root = str(root)
        self.seen: dict[str, _File | None] = {}
        if initial is not None:
            for path in sorted(initial.rglob("*")):
                name = f"{self.root}/{path.relative_to(initial)!s}"
                self.seen[name] = None if path.is_dir() else _File(path.read_bytes())
        self.durable = dict(self.seen)
        self.pending: list[_Names] = []
        self.flushing: dict[int, list[int]] = {}
        self.running: set[int] = set()
        #: Where the next ``write`` goes: a file is written that way by one process at a time.
        self.places: dict[str, int] = {}

    def feed(self, event: Event) -> None:
        call, key = event.call, event.key
        if event.result is None:
            self.running.add(key)
            if call.name in _WRITES:
                self._write(key, call)
            elif call.name in ("fsync", "fdatasync"):
                self.flushing[key] = self._complete_keys(call.paths[0])
            return
        self.running.discard(key)
        if event.result < 0:
            assert call.name not in _WRITES, event
            if call.name in ("fsync", "fdatasync"):
                self._fail_flush(call.paths[0], self.flushing.pop(key))
            return
        handler = getattr(self, f"_end_{call.name}", None)
        if handler is not None:
            handler(key, call, event.result)
            return
        assert call.name in ("msync", "flock"), \
            f"Expected a call that is modelled, but got: {call}"

    def _below(self, path: str) -> bool:
        return path.startswith(f"{self.root}/")

    def _file(self, path: str) -> _File | None:
        return self.seen.get(path) if self._below(path) else None

    def _complete_keys(self, path: str) -> list[int]:
        """List the calls whose changes a flush that begins now covers."""
        file = self._file(path)
        if file is not None:
            keys = {change.key for change in file.pending}
        else:
            keys = {names.key for names in self.pending if path in names.parents}
        return sorted(keys - self.running)

    def _write(self, key: int, call: Call) -> None:
        file = self._file(call.paths[0])
        if file is None:
            return
        data = b"".join(call.strings)
        if call.name == "pwritev2":
            place = int(call.words[-2])
        elif call.name in ("pwrite64", "pwritev"):
            place = int(call.words[-1])
        else:
            place = self.places.get(call.paths[0], 0)
            self.places[call.paths[0]] = place + len(data)
        file.add(_Change(key, place, data, None))

    def _end_write(self, _: int, call: Call, result: int) -> None:
        if self._file(call.paths[0]) is not None:
            assert result == len(b"".join(call.strings)), "Expected no short write"

    _end_pwrite64 = _end_writev = _end_pwritev = _end_pwritev2 = _end_write

    def _end_fsync(self, key: int, call: Call, _: int) -> None:
        keys = self.flushing.pop(key)
        file = self._file(call.paths[0])
        if file is not None:
            file.flush(keys)
            return
        for names in self.pending:
            if names.key in keys:
                names.apply(self.durable)
        self.pending = [names for names in self.pending if names.key not in keys]

    _end_fdatasync = _end_fsync

    def _fail_flush(self, path: str, keys: Sequence[int]) -> None:
        """Fail a flush: no later one brings to the disk what this one did not."""
        file = self._file(path)
        assert file is not None
        for change in file.pending:
            if change.key in keys:
                change.key = -1

    def _end_openat(self, key: int, call: Call, _: int) -> None:
        path = call.strings[0].decode("utf-8")
        flags = call.words[2]
        if not self._below(path) or (path in self.seen and self.seen[path] is None):
            return
        if "O_WRONLY" in flags or "O_RDWR" in flags:
            self.places[path] = 0
        file = self.seen.get(path)
        if file is None:
            self._change_names(key, None, (path, _File()))
        elif "O_TRUNC" in flags and file.seen:
            file.add(_Change(key, 0, b"", 0))

    def _change_names(self, key: int, removed: str | None,
                      added: "Optional[tuple[str, Optional[_File]]]") -> None:
        path = added[0] if added is not None else removed
        assert path is not None
        change = _Names(key, [path.rpartition("/")[0]], removed, added)
        change.apply(self.seen)
        self.pending.append(change)

    def _end_lseek(self, _: int, call: Call, result: int) -> None:
        """Seek: LMDB does so under its lock."""
        self.places[call.paths[0]] = result

    def _end_fallocate(self, key: int, call: Call, _: int) -> None:
        file = self._file(call.paths[0])
        if file is not None:
            assert call.words[1] == "0", call
            size = max(len(file.seen), int(call.words[2]) + int(call.words[3]))
            file.add(_Change(key, 0, b"", size))

    def _end_link(self, _: int, call: Call, __: int) -> None:
        """Give a file that is not followed a second name."""
        assert not any(self._below(string.decode("utf-8")) for string in call.strings), call

    def _end_rename(self, key: int, call: Call, _: int) -> None:
        old, new = (string.decode("utf-8") for string in call.strings)
        if not self._below(new):
            return
        file = self.seen[old]
        assert file is not None, "Expected no directory to be renamed"
        self._change_names(key, old, (new, file))

    def _end_unlink(self, key: int, call: Call, _: int) -> None:
        path = call.strings[0].decode("utf-8")
        if self._below(path):
            self._change_names(key, path, None)

    def _end_unlinkat(self, key: int, call: Call, _: int) -> None:
        path = str(pathlib.PurePath(call.paths[0], call.strings[0].decode("utf-8")))
        if self._below(path):
            self._change_names(key, path, None)

    _end_rmdir = _end_unlink

    def _end_mkdir(self, key: int, call: Call, _: int) -> None:
        path = call.strings[0].decode("utf-8")
        if self._below(path):
            self._change_names(key, None, (path, None))

    def materialize(self, target: Path, chance: random.Random, how: Survival) -> None:
        names = dict(self.durable)
        for change in self.pending:
            if chance.random() < how.name_chance:
                change.apply(names)
            elif how.keeps_name_order:
                break
        target.mkdir(mode=0o700)
        for path, file in sorted(names.items()):
            place = target / path[len(self.root) + 1:]
            if not place.parent.is_dir():
                continue
            if file is None:
                place.mkdir(mode=0o700)
            else:
                place.write_bytes(file.survive(chance, how))
