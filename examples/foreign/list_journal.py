"""
List the records of a queue's journal, and the messages in them.

Written from docs/format.rst, not from the library. It needs nothing but Python, and only reads:

    python examples/foreign/list_journal.py QUEUE_DIRECTORY

Exit codes: 0 done, 1 no journal, or a damaged header.
"""

import pathlib
import struct
import sys
import zlib
from collections.abc import Iterator

_HEADER = struct.Struct("<8sIQQ16s16sQQQ")
_RECORD = struct.Struct("<IQQQ")
_KINDS = {1: "blocks", 2: "lists", 3: "state"}


def _blocks(body: bytes) -> Iterator[str]:
    """
    List the messages of a record of blocks.

    :param body: of the record
    :return: lines
    """
    offset, end = 8, 8 + int.from_bytes(body[:8], "little")
    while offset < end:
        number, length = struct.unpack_from("<QQ", body, offset)
        block = body[offset + 16:offset + 16 + length]
        messages, _, audiences = struct.unpack_from("<IHH", block, 24)
        table = 40 + 8 * audiences
        start = table + 8 * messages
        behind = start
        for index in range(messages):
            last = start + int.from_bytes(block[table + 8 * index:table + 8 * index + 4], "little")
            yield f"    message {number + index}: {block[behind:last]!r}"
            behind = last
        offset += 16 + length
    while offset < len(body):
        number, _, length = struct.unpack_from("<QQB", body, offset)
        yield f"    id of message {number}: {body[offset + 17:offset + 17 + length]!r}"
        offset += 17 + length


def list_segment(content: bytes) -> Iterator[str]:
    """
    List the records of a segment.

    :param content: of its file
    :return: lines
    :raise ValueError: if the header is damaged, or of another format
    """
    magic, version, size, sequence, _, identity, number, _, _ = _HEADER.unpack_from(content)
    crc = int.from_bytes(content[_HEADER.size:_HEADER.size + 4], "little")
    if magic != b"persijnl" or version != 1 or crc != zlib.crc32(content[:_HEADER.size]):
        raise ValueError("no segment of a journal of format 1")
    yield f"segment {sequence}, {size} bytes"
    offset = 4096
    while offset + 32 <= size:
        kind, length, found, end = _RECORD.unpack_from(content, offset + 4)
        body = content[offset + 32:offset + 32 + length]
        crc = zlib.crc32(identity + content[offset + 4:offset + 32] + body)
        if found != number or int.from_bytes(content[offset:offset + 4], "little") != crc:
            return  # the end: what follows is of an earlier use of the segment, or zeros
        yield f"  record {number}: {_KINDS[kind]}, up to message {end - 1}"
        if kind == 1:
            yield from _blocks(body)
        number += 1
        offset += (32 + length + 7) // 8 * 8


def list_journal(directory: pathlib.Path) -> Iterator[str]:
    """
    List the segments in the order in which they were written, and those that are free.

    :param directory: of the queue
    :return: lines
    :raise ValueError: if there is none, or a header is damaged
    """
    segments = [pth.read_bytes() for pth in (directory / "journal").glob("????????")]
    if not segments:
        raise ValueError("no journal")
    for content in sorted(segments, key=lambda content: content[20:28][::-1]):
        yield from list_segment(content)


if __name__ == "__main__":
    try:
        print("\n".join(list_journal(pathlib.Path(sys.argv[1]))))
    except (OSError, ValueError, struct.error) as error:
        sys.exit(f"list_journal: {error}")
