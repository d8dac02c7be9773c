"""Read and change what is true of a whole store, inside of a transaction."""

import time
from typing import Final

import lmdb

import persipubsub.errors
from persipubsub.store import _blocks, _clock, _layout
from persipubsub.store._databases import Databases

#: How far numbers skip ahead when an earlier state of the store takes its place. More messages than
#: that were hardly sent since then, and the numbers last for 65,536 power failures.
_SKIPPED_NUMBERS: Final = 1 << 32


def read(txn: "lmdb.Transaction[memoryview]", databases: Databases,
         directory: str) -> _layout.Header:
    """
    Read the header of a store.

    :param txn: any transaction
    :param databases: handles
    :param directory: of the store, for errors
    :return: decoded header
    """
    value = txn.get(_layout.HEADER_KEY, db=databases.meta)
    return _layout.unpack_header(value if value is not None else b"", directory)


def update(txn: "lmdb.Transaction[memoryview]", databases: Databases, flags: int,
           was_interrupted: bool) -> _layout.Header:
    """
    Let the queue's clock, and after a power failure its numbers, go on in this boot.

    :param txn: write transaction
    :param databases: handles
    :param flags: of the store
    :param was_interrupted: True if the store may be an earlier one: after a power failure
    :return: header as written
    """
    header = read(txn, databases, "")
    boot = _clock.boot_id()
    number = _layout.FIRST_NUMBER
    last: _blocks.Block | None = None
    cursor = txn.cursor(db=databases.data)
    if cursor.last():
        number = _layout.unpack_number(cursor.key())
        last = _blocks.unpack_block(cursor.value(), number)
        number = _blocks.end_of(number, last)
    if header.boot_id != boot:
        # Never earlier than what is stored: ages would be negative, positions by time wrong.
        latest = max(last.time_ns if last is not None else 0, time.time_ns())
        header = header._replace(boot_id=boot, clock_offset_ns=latest - _clock.ticks_ns())
    if was_interrupted:
        placeholder = _blocks.pack_block(0, 0, 0, 0, _layout.EVERYONE, 0, ())
        if last is not None:
            placeholder = _blocks.pack_block(last.time_ns, last.total_count, last.total_bytes, 0,
                                             _layout.EVERYONE, last.generation,
                                             _blocks.unpack_totals(cursor.value(), last))
        txn.put(_layout.pack_number(number + _SKIPPED_NUMBERS), placeholder, db=databases.data)
    header = header._replace(flags=flags)
    txn.put(_layout.HEADER_KEY, _layout.pack_header(header), db=databases.meta)
    return header


def durability_error(directory: str, found: int, expected: int) -> persipubsub.errors.ConfigError:
    """
    Describe a store of another durability.

    :param directory: of the store
    :param found: flags of the store
    :param expected: flags that the configuration asks for
    :return: error to be raised
    """
    names = {0: "fsync", _layout.FLAG_DURABILITY_OS: "os"}
    return persipubsub.errors.ConfigError(
        "Expected the queue {} to have the durability {!r} of the configuration, but got: {!r}. "
        "Run persipubsub.control.initialize_all_dbs while no process uses it.".format(
            directory, names[expected], names.get(found, found)))
