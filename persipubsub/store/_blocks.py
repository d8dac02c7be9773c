"""
Encode, decode and check blocks: the messages of one commit behind their record. Format 1.

A block is the value of ``data_db``. All its integers are little-endian:

================= ==================================================================================
bytes             content
================= ==================================================================================
40                record: see :py:class:`Block`
8 each            totals of the audiences from 1 on
8 each            table: for each message where it ends (4 bytes) and its CRC-32 (4 bytes)
the rest          the messages' bytes, one behind the other
================= ==================================================================================

Everything here is pure: no file is touched, no lock is taken.
"""

import itertools
import struct
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import persipubsub.errors

#: Blocks are filled up to this many bytes of table and messages (a larger message has its own).
BLOCK_BYTES: Final = 1 << 20

#: LMDB stores the length of a value in 32 bits; a little is left for the block's header.
MAX_MESSAGE_BYTES: Final = (1 << 32) - (1 << 20)

#: Each message costs this much in the table of its block.
ENTRY_BYTES: Final = 8

_BLOCK = struct.Struct("<QQQIHHII")
_BLOCK_WITHOUT_CRC = struct.Struct("<QQQIHHI")
_BLOCK_CRC = struct.Struct("<I")
_ENTRY = struct.Struct("<II")
# Of a record without totals and its first entry: time, messages, audience, audiences, both CRC-32
_SINGLE = struct.Struct("<Q16xIHH4xIII")
_END = struct.Struct("<I")


class Block(NamedTuple):
    """
    Hold the record in front of a block's messages.

    The totals run over the whole log, this block included, so that the number of messages between
    two places of the log is a subtraction, however many there are.
    """

    time_ns: int  #: when the block was committed, on the queue's clock
    total_count: int  #: messages in the log up to the end of this block
    total_bytes: int  #: their bytes, without any overhead
    messages: int  #: how many the block holds; 0: a placeholder that only keeps its number taken
    audience: int  #: whom they are for; 0: every subscriber
    audiences: int  #: how many totals of audiences follow
    generation: int  #: changes when positions went back, or subscribers came or went
    crc: int  #: CRC-32 of the fields above and of the totals that follow


def pack_block(time_ns: int, total_count: int, total_bytes: int, count: int, audience: int,
               generation: int, totals: Sequence[int]) -> bytes:
    """
    Encode the record of a block and the totals of its audiences.

    :param time_ns: when the block is committed, in nanoseconds of the queue's clock
    :param total_count: messages in the log up to the end of this block
    :param total_bytes: bytes of these messages
    :param count: messages of this block
    :param audience: whom they are for
    :param generation: of the positions
    :param totals: of each audience but the one of everybody: messages in the log up to here
    :return: encoded record
    """
    fields = _BLOCK_WITHOUT_CRC.pack(time_ns, total_count, total_bytes, count, audience,
                                     len(totals), generation)
    if not totals:
        return fields + _BLOCK_CRC.pack(zlib.crc32(fields))

    tail = struct.pack(f"<{len(totals)}Q", *totals)
    return fields + _BLOCK_CRC.pack(zlib.crc32(tail, zlib.crc32(fields))) + tail


def unpack_block(value: memoryview, number: int) -> Block:
    """
    Decode the record of a block and check it.

    :param value: of the block in ``data_db``
    :param number: of the block's first message, for the error
    :return: decoded record
    :raise StoreCorruptError: if the record is damaged
    """
    try:
        block = Block._make(_BLOCK.unpack_from(value))
        crc = zlib.crc32(value[:36])
        if block.audiences:
            crc = zlib.crc32(value[40:40 + 8 * block.audiences], crc)
    except struct.error:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected a block of at least {_BLOCK.size} bytes at message {number}, but got: "
            f"{len(value)} bytes") from None

    if crc != block.crc:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected the record of the block at message {number} to have the checksum "
            f"{block.crc:#010x}, but got: {crc:#010x}")
    table_end = _BLOCK.size + 8 * block.audiences + ENTRY_BYTES * block.messages
    if len(value) < table_end:
        raise persipubsub.errors.StoreCorruptError(
            f"Expected a block of at least {table_end} bytes at message {number}, but got: "
            f"{len(value)} bytes")
    return block


def guess_messages(value: memoryview) -> int:
    """
    Read how many messages a block seems to hold; the record is not checked.

    :param value: of the block in ``data_db``
    :return: how many
    """
    return int.from_bytes(value[24:28], "little")


def guess_total_bytes(value: memoryview) -> int:
    """
    Read how many bytes of messages the log seems to have up to a block; the record is not checked.

    :param value: of the block in ``data_db``
    :return: how many
    """
    return int.from_bytes(value[16:24], "little")


def unpack_totals(value: memoryview, block: Block) -> tuple[int, ...]:
    """
    Decode the totals of the audiences that follow a block's record.

    :param value: of the block in ``data_db``
    :param block: its decoded record
    :return: totals of the audiences from 1 on
    """
    if not block.audiences:
        return ()
    return struct.unpack_from(f"<{block.audiences}Q", value, _BLOCK.size)


def end_of(number: int, block: Block) -> int:
    """
    Compute the number behind a block.

    :param number: of the block's first message
    :param block: its record
    :return: number of the first message that can follow it
    """
    return number + (block.messages or 1)


class Batch(NamedTuple):
    """Hold the messages of one block, encoded before any lock is taken."""

    messages: int  #: how many
    size: int  #: their bytes
    body: bytes  #: table and messages


def encode_single(message: bytes) -> tuple[int, int, bytes]:
    """
    Encode a message as the body of a block of its own.

    :param message: to be encoded
    :return: what a :py:class:`Batch` holds; to make and to read that would take as long as all this
    """
    size = len(message)
    return 1, size, _ENTRY.pack(size, zlib.crc32(message)) + message


def encode_batches(messages: Sequence[bytes]) -> list[Batch]:
    """
    Encode messages as the bodies of one or more blocks.

    :param messages: in the order in which they are to be received
    :return: bodies of at most :py:data:`BLOCK_BYTES`, or of a single message
    """
    if len(messages) == 1:
        return [Batch(*encode_single(messages[0]))]

    if messages and sum(map(len, messages)) + _ENTRY.size * len(messages) <= BLOCK_BYTES:
        return [_encode_batch(messages)]

    batches: list[Batch] = []
    begin = 0
    size = 0
    for index, message in enumerate(messages):
        added = len(message) + _ENTRY.size
        if size + added > BLOCK_BYTES and index > begin:
            batches.append(_encode_batch(messages=messages[begin:index]))
            begin = index
            size = 0
        size += added
    if begin < len(messages):
        batches.append(_encode_batch(messages=messages[begin:]))
    return batches


def _encode_batch(messages: Sequence[bytes]) -> Batch:
    """
    Encode the body of one block.

    :param messages: of the block
    :return: encoded body
    """
    ends = list(itertools.accumulate(map(len, messages)))
    table = struct.pack(f"<{2 * len(messages)}I",
                        *itertools.chain.from_iterable(zip(ends, map(zlib.crc32, messages))))
    return Batch(messages=len(messages), size=ends[-1], body=b"".join((table, *messages)))


def size_before(value: memoryview, block: Block, index: int) -> int:
    """
    Compute how many bytes the first messages of a block have.

    :param value: of the block in ``data_db``
    :param block: its record
    :param index: of a message in the block, or their count
    :return: bytes of the messages before the one at ``index``
    """
    if index == 0:
        return 0
    offset = _BLOCK.size + 8 * block.audiences + _ENTRY.size * (index - 1)
    return int(_END.unpack_from(value, offset)[0])


def slice_message(value: memoryview, block: Block, index: int) -> tuple[memoryview, int]:
    """
    Find a message in its block.

    The result is a view into the store: copy it before the transaction ends. The checksum is not
    compared here, see :py:func:`copy_message`.

    :param value: of the block in ``data_db``
    :param block: its record
    :param index: of the message in the block, from 0
    :return: view of the message's bytes, expected CRC-32
    """
    table = _BLOCK.size + 8 * block.audiences
    begin = table + _ENTRY.size * block.messages
    entry = table + _ENTRY.size * index
    end, crc = _ENTRY.unpack_from(value, entry)
    start = _END.unpack_from(value, entry - _ENTRY.size)[0] if index else 0
    return value[begin + start:begin + end], crc


def copy_message(value: memoryview, block: Block, index: int, number: int) -> bytes:
    """
    Copy a message out of its block and check it.

    :param value: of the block in ``data_db``
    :param block: its record
    :param index: of the message in the block, from 0
    :param number: of the message, for the error
    :return: bytes that were sent
    :raise CorruptMessageError: if they are not the bytes that were sent
    """
    view, expected = slice_message(value=value, block=block, index=index)
    message = bytes(view)
    crc = zlib.crc32(message)
    if crc != expected:
        raise _corrupt_error(number, message, expected)
    return message


def copy_single(value: memoryview) -> tuple[int, bytes] | None:
    """
    Copy the message of a block that has no other and is for everybody, and check it all.

    So are the messages of single sends, unless some of the queue ever were for certain subscribers.
    It takes a third of the time, since nothing is decoded that is not needed for it.

    :param value: of the block in ``data_db``
    :return: when it was committed, bytes that were sent; None if it is another kind of block, or
        damaged: :py:func:`unpack_block` and :py:func:`copy_message` say how
    """
    if len(value) < _SINGLE.size:
        return None
    time_ns, messages, audience, audiences, expected, size, crc = _SINGLE.unpack_from(value)
    if messages != 1 or audience or audiences or zlib.crc32(value[:36]) != expected:
        return None
    # Not bytes(), which looks its argument over for longer than it copies a small message.
    message = value[_SINGLE.size:_SINGLE.size + size].tobytes()
    return None if zlib.crc32(message) != crc else (time_ns, message)


def _corrupt_error(number: int, message: bytes,
                   expected: int) -> persipubsub.errors.CorruptMessageError:
    """
    Describe a damaged message.

    :param number: of the message
    :param message: what its bytes are
    :param expected: checksum of what was sent
    :return: error to be raised
    """
    return persipubsub.errors.CorruptMessageError(
        f"Expected the message {number} ({len(message)} bytes) to have the checksum "
        f"{expected:#010x}, but got: {zlib.crc32(message):#010x}",
        number=number)


def copy_messages(value: memoryview, block: Block, first: int, begin: int,
                  stop: int) -> list[bytes]:
    """
    Copy a run of messages out of their block and check them.

    :param value: of the block in ``data_db``
    :param block: its record
    :param first: number of the block's first message
    :param begin: index of the first message to copy
    :param stop: index behind the last message to copy
    :return: bytes that were sent
    :raise CorruptMessageError: if a message is not what was sent (the first such one is named)
    """
    table = _BLOCK.size + 8 * block.audiences
    body = table + _ENTRY.size * block.messages
    entries = struct.unpack_from(f"<{2 * (stop - begin)}I", value, table + _ENTRY.size * begin)
    start = size_before(value=value, block=block, index=begin)
    ends = entries[::2]
    data = bytes(value[body + start:body + max(start, ends[-1])])
    if start:
        ends = tuple(end - start for end in ends)
    messages = [data[i:j] for i, j in zip((0, ) + ends, ends)]
    crcs = tuple(map(zlib.crc32, messages))
    if crcs != entries[1::2]:
        for number, crc, expected, message in zip(itertools.count(first + begin), crcs,
                                                  entries[1::2], messages):
            if crc != expected:
                raise _corrupt_error(number, message, expected)
    return messages


def truncate_body(value: memoryview, block: Block, count: int) -> Batch:
    """
    Encode a body of only the first messages of a block.

    :param value: of the block in ``data_db``
    :param block: its record
    :param count: how many messages to keep, at least one
    :return: body with these messages
    """
    table = _BLOCK.size + 8 * block.audiences
    body = table + _ENTRY.size * block.messages
    size = size_before(value=value, block=block, index=count)
    kept = bytes(value[table:table + _ENTRY.size * count]) + bytes(value[body:body + size])
    return Batch(messages=count, size=size, body=kept)
