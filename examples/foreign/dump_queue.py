"""
Show every record of a queue, byte by byte, and what the bytes mean.

Written from docs/format.rst, not from the library; it needs only ``lmdb``. It only reads:

    python examples/foreign/dump_queue.py QUEUE_DIRECTORY

Exit codes: 0 done, 1 not a queue, or a truncated one.
"""

import fcntl
import os
import pathlib
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import lmdb


class Field(NamedTuple):
    """Describe a part of a record."""

    size: int  #: in bytes
    kind: str  #: "number" (little-endian), "key" (big-endian) or "bytes"
    meaning: str


_HEADER = [
    Field(8, "bytes", "magic"),
    Field(4, "number", "format"),
    Field(4, "number", "flags; none so far"),
    Field(8, "number", "offset of the queue's clock, ns"),
    Field(16, "bytes", "id of the boot that the offset belongs to"),
    Field(4, "number", "ordinal of the next new subscriber"),
    Field(16, "bytes", "id of the journal")
]

_SUBSCRIBER = [
    Field(4, "number", "ordinal"),
    Field(4, "number", "flags; 1: ranges, 2: attempts, 4: paused"),
    Field(8, "number", "position"),
    Field(8, "number", "acknowledged"),
    Field(8, "number", "failed"),
    Field(8, "number", "dropped by timeout"),
    Field(8, "number", "dropped by mark"),
    Field(8, "number", "cleared"),
    Field(8, "number", "skipped"),
    Field(8, "number", "corrupt"),
    Field(8, "number", "dead-lettered"),
    Field(8, "number", "last acknowledged, ns on the queue's clock")
]

_AHEAD_KEY = [Field(4, "key", "ordinal"), Field(8, "key", "first number acknowledged ahead")]
_ATTEMPTS_KEY = [Field(4, "key", "ordinal"), Field(8, "key", "number of the message")]
_ATTEMPTS = [
    Field(4, "number", "deliveries so far"),
    Field(4, "number", "flags; 1: the last one goes on, or its process died"),
    Field(8, "number", "first recorded, ns on the queue's clock"),
    Field(8, "number", "retry at, ns on the queue's clock")
]

_ONCE = [
    Field(8, "number", "number of the message"),
    Field(8, "number", "time, ns on the queue's clock")
]

_AHEAD = [Field(8, "number", "number behind the range")]

_BLOCK = [
    Field(8, "number", "time of the commit, ns on the queue's clock"),
    Field(8, "number", "messages in the log up to here"),
    Field(8, "number", "their bytes"),
    Field(4, "number", "messages in this block"),
    Field(2, "number", "audience; 0: everybody"),
    Field(2, "number", "totals that follow"),
    Field(4, "number", "generation"),
    Field(4, "number", "CRC-32 of the fields above and the totals")
]


def _parts(fields: Sequence[Field], data: bytes) -> Iterator[tuple[bytes, str]]:
    """
    Cut a record into its parts.

    :param fields: of the record
    :param data: its bytes
    :return: bytes of each part, what they mean
    """
    offset = 0
    for field in fields:
        part = data[offset:offset + field.size]
        offset += field.size
        value = repr(part)[1:]
        if field.kind != "bytes":
            value = str(int.from_bytes(part, "big" if field.kind == "key" else "little"))
        elif field.meaning != "magic" and not part.isascii():
            value = ""
        yield part, f"{field.meaning}: {value}".rstrip(": ")
    if offset < len(data):
        yield data[offset:], "more than this program knows"


def _block_fields(data: bytes) -> list[Field]:
    """
    List the parts of a block.

    :param data: its bytes
    :return: fields
    """
    messages = int.from_bytes(data[24:28], "little")
    audiences = int.from_bytes(data[30:32], "little")
    fields = list(_BLOCK)
    for index in range(audiences):
        fields.append(Field(8, "number", f"messages for audience {index + 1} up to here"))
    sizes: list[int] = []
    table = 40 + 8 * audiences
    for index in range(messages):
        fields.append(Field(4, "number", f"message {index + 1} of the block ends at"))
        fields.append(Field(4, "number", "its CRC-32"))
        end = int.from_bytes(data[table + 8 * index:table + 8 * index + 4], "little")
        sizes.append(end - sum(sizes))
    for size in sizes:
        fields.append(Field(size, "bytes", "message"))
    return fields


def _describe(name: str, key: bytes, value: bytes) -> Iterator[tuple[bytes, str]]:
    """
    Cut a record of a sub-database into its parts.

    :param name: of the sub-database
    :param key: of the record
    :param value: of the record
    :return: bytes of each part, what they mean; first those of the key
    """
    if name == "data_db":
        yield from _parts([Field(8, "key", "key: number of the first message")], key)
        yield from _parts(_block_fields(value), value)
    elif name == "pending_db":
        yield from _parts([Field(len(key), "bytes", "key: subscriber")], key)
        yield from _parts(_SUBSCRIBER, value)
    elif name == "ahead_db":
        yield from _parts(_AHEAD_KEY, key)
        yield from _parts(_AHEAD, value)
    elif name == "attempts_db":
        yield from _parts(_ATTEMPTS_KEY, key)
        yield from _parts(_ATTEMPTS + [Field(len(value) - 24, "bytes", "last error")], value)
    elif name == "once_db" and key.startswith(b"i"):
        yield from _parts([Field(len(key), "bytes", "key: i and an id")], key)
        yield from _parts(_ONCE, value)
    elif name == "once_db":
        fields = [
            Field(1, "bytes", "key"),
            Field(8, "key", "time"),
            Field(len(key) - 9, "bytes", "id")
        ]
        yield from _parts(fields, key)
    elif name == "meta_db" and key == b"header":
        yield from _parts([Field(6, "bytes", "key")], key)
        yield from _parts(_HEADER, value)
    elif name == "meta_db" and key == b"settings":
        yield from _parts([Field(8, "bytes", "key")], key)
        yield value[:16], f"the first 16 of {len(value)} bytes: {value[:16].decode()!r}"
    elif name == "meta_db" and key.startswith(b"audience"):
        yield from _parts([Field(8, "bytes", "key"), Field(2, "key", "index of the audience")], key)
        while value:
            size = value[0]
            yield value[:1], f"length of the next id: {size}"
            yield value[1:1 + size], f"subscriber: {value[1:1 + size].decode('utf-8')!r}"
            value = value[1 + size:]
    else:
        yield key, "key"
        yield value, "value"


def _check_size(path: pathlib.Path) -> None:
    """
    Compare the size of a data file with its newer meta page: LMDB dies of SIGBUS if it is shorter.

    :param path: of the data file
    :raise ValueError: if it is no data file of LMDB 0.9, or truncated
    """
    with open(path, "rb") as file:
        page_size = 0
        metas: list[tuple[int, int]] = []
        for _ in range(2):
            file.seek(page_size)
            meta = file.read(152)
            if len(meta) < 152:
                raise ValueError(f"{path}: truncated")
            if struct.unpack_from("=II", meta, 16) != (0xBEEFC0DE, 1):
                raise ValueError(f"{path}: not a store of LMDB 0.9, or damaged")
            page_size = page_size or struct.unpack_from("=I", meta, 40)[0]
            last_page, transaction = struct.unpack_from("=QQ", meta, 136)
            metas.append((transaction, last_page))
        # The size last: the file may grow meanwhile.
        if os.fstat(file.fileno()).st_size < (max(metas)[1] + 1) * page_size:
            raise ValueError(f"{path}: truncated")


def dump(directory: pathlib.Path) -> Iterator[str]:
    """
    Show all records of a queue.

    :param directory: of the queue
    :return: lines
    :raise ValueError: if the store is truncated, or not one of LMDB 0.9
    :raise OSError: if it is not there
    """
    with open(directory / "users.lock", "rb+") as users:
        # As long as this lock is held, nobody compacts or restores the queue.
        fcntl.flock(users, fcntl.LOCK_SH)
        _check_size(directory / "data.mdb")
        with lmdb.open(str(directory), readonly=True, max_dbs=16, lib_version=0) as environment:
            with environment.begin() as txn:
                names = [key.decode("utf-8") for key in txn.cursor().iternext(values=False)]
            for name in names:
                yield name
                database = environment.open_db(name.encode("utf-8"), create=False)
                with environment.begin(db=database) as txn:
                    for key, value in txn.cursor():
                        yield ""
                        for part, meaning in _describe(name, key, value):
                            yield from _lines(part, meaning)
                yield ""


def _lines(part: bytes, meaning: str) -> Iterator[str]:
    """
    Show the bytes of a part.

    :param part: bytes
    :param meaning: of the part
    :return: lines of 16 bytes each, the meaning in the first one
    """
    for offset in range(0, max(1, len(part)), 16):
        text = part[offset:offset + 16].hex(" ")
        yield f"  {text:<48}  {'' if offset else meaning}".rstrip()


if __name__ == "__main__":
    try:
        print("\n".join(dump(pathlib.Path(sys.argv[1]))))
    except (OSError, ValueError, lmdb.Error) as error:
        sys.exit(f"dump_queue: {error}")
