"""Read a JSON file that anybody may have written, and say what is wrong with it."""

import collections
import itertools
import json
import math
import os
import pathlib
import re
import reprlib
import stat
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Union

import persipubsub.errors

# In bytes. It stands between a wrong path and the memory of the machine.
_MAX_FILE_SIZE = 64 * 1024**2

# A correct file has four levels. Relying on RecursionError instead would overflow the stack of the
# C parser, and crash, in a program that raised its recursion limit.
_MAX_NESTING = 32

# In characters. Converting can take time quadratic in the length, and raises ValueError above a
# limit that the application may change.
_MAX_NUMBER_LENGTH = 50

# Strings (also one that does not end, so that the search is linear) and all else but brackets.
_NO_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[^]"[{}]+', re.DOTALL)

_REPR = reprlib.Repr()
_REPR.maxstring = 150
_REPR.maxother = 60


class Literal:
    """Stand for a number that is none for Python, or too long; shown as it is in the file."""

    def __init__(self, text: str) -> None:
        """Initialize with the text in the file."""
        self.text = text

    def __repr__(self) -> str:
        """Return the text in the file."""
        return self.text


class Object(dict[str, Any]):
    """Stand for an object of the file, and know the keys that are there more than once."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        """Initialize with all keys and values, in the order of the file."""
        super().__init__(pairs)
        counts = collections.Counter(key for key, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = [key for key, count in counts.items() if count > 1]


def shown(found: object, limit: int = 200) -> str:
    """Return the value for a message: without control characters, and within the limit."""
    text = _REPR.repr(found)
    return text if len(text) <= limit else f"{text[:limit - 3]}..."


def listed(names: Iterable[str]) -> str:
    """Return the first few of the names for a message."""
    known = list(names)
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return ", ".join(shown(name, limit=60) for name in known[:5]) + more or "there is none"


def at(place: str, key: str) -> str:
    """Return the place of the key's value."""
    plain = 0 < len(key) <= 100 and key.isprintable() and not re.search(r"\s", key)
    return f"{place}{'.' if place else ''}{key if plain else shown(key, limit=100)}"


def raise_error(path: pathlib.Path, problems: Sequence[str]) -> NoReturn:
    """Raise the error with the file's name, the first problem and how many more there are."""
    name = str(path) if str(path).isprintable() else repr(str(path))
    more = len(problems) - 1
    tail = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    raise persipubsub.errors.ConfigError(f"{name}: {problems[0]}{tail}", problems=problems)


def absolute(config_pth: Union[str, "os.PathLike[str]"]) -> pathlib.Path:
    """Check the type of the path, and make it independent of the working directory."""
    # An integer would be taken for a descriptor: 0 is the standard input.
    name = os.fspath(config_pth) if isinstance(config_pth, (str, os.PathLike)) else None
    if not isinstance(name, str):
        raise TypeError(f"Expected config_pth as str or os.PathLike[str], but got: {config_pth!r}")
    try:
        # Not os.path.abspath: "link/../config.json" would become another file.
        return pathlib.Path(name).absolute()
    except OSError:  # the working directory was removed
        return pathlib.Path(name)


def read_bytes(name: str, path: pathlib.Path) -> bytes:
    """Return the content of the file, or a bit more than is allowed of it."""
    # Without O_NONBLOCK, opening a FIFO waits. Looking at the kind before opening is not enough,
    # the file may be replaced in between.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    chunks = [b""]
    try:
        if not name:
            raise ValueError("empty")  # the system would say that there is no such file
        descriptor = os.open(name, flags)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO"}
                found = kinds.get(stat.S_IFMT(mode), "a device")
                raise_error(path, [f"Expected a regular file, but got: {found}"])

            # Not by st_size, which is 0 in /proc and may change.
            left = _MAX_FILE_SIZE + 1
            while left > 0 and (chunk := os.read(descriptor, min(left, 2**16))):
                chunks.append(chunk)
                left -= len(chunk)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise_error(path, [f"Expected a file that can be read, but got: {error.strerror}"])
    except ValueError:
        raise_error(path, [f"Expected the path of a file, but got: {shown(name)}"])
    return b"".join(chunks)


def load(text: bytes, path: pathlib.Path) -> Any:
    """Return the JSON value, with stand-ins for what Python's types can not tell."""
    if len(text) > _MAX_FILE_SIZE:
        raise_error(path, [f"Expected a file of at most {_MAX_FILE_SIZE} bytes, but got more"])
    if text.startswith(b"\xef\xbb\xbf"):
        # Not skipped: parsers of other languages, which read the same file, do not take it.
        raise_error(path, ["Expected UTF-8 without a byte order mark, but got one"])
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise_error(path,
                    [f"line {line}: Expected UTF-8, but got the byte 0x{text[error.start]:02x}"])

    if not decoded.strip():
        raise_error(path, ["Expected a JSON object, but got an empty file"])
    steps = (1 if bracket in "[{" else -1 for bracket in _NO_BRACKET.sub("", decoded))
    if any(depth > _MAX_NESTING for depth in itertools.accumulate(steps)):
        raise_error(path, [f"Expected at most {_MAX_NESTING} levels of nesting, but got more"])
    try:
        return json.loads(decoded,
                          object_pairs_hook=Object,
                          parse_int=_number,
                          parse_float=_number,
                          parse_constant=Literal)
    except json.JSONDecodeError as error:
        near = shown(decoded[error.pos:error.pos + 40])
        place = f"line {error.lineno}, column {error.colno}"
        raise_error(path, [f"{place}: Expected JSON, but got: {near} ({error.msg})"])


def _number(literal: str) -> int | float | Literal:
    """Return the number of the file."""
    if len(literal) > _MAX_NUMBER_LENGTH:
        return Literal(literal)
    number = int(literal) if literal.lstrip("-").isdigit() else float(literal)
    return number if math.isfinite(number) else Literal(literal)
