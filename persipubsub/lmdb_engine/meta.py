"""What is true of a whole store: its header, with clock and journal, and the settings of the queue."""

import functools
import logging
import time
from collections.abc import Mapping

import msgspec
import msgspec.structs

from persipubsub import config
from persipubsub.lmdb_engine import files
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log
from persipubsub.lmdb_engine.format import Tx

_LOGGER = logging.getLogger("persipubsub.queue")

# Header


def read_header(tx: Tx, path: str = "") -> fmt.Header:
    """Read the header; an error names the path."""
    return fmt.unpack_header(bytes(tx.txn.get(fmt.HEADER_KEY, b"", db=tx.db.meta)), path)


def write_header(tx: Tx, header: fmt.Header) -> None:
    """Store the header."""
    tx.txn.put(fmt.HEADER_KEY, fmt.pack_header(header), db=tx.db.meta)


def find_clock(tx: Tx) -> int:
    """Find the offset with which the queue's clock goes on in this boot."""
    header = read_header(tx)
    if header.boot_id == files.boot_id():
        return header.clock_offset_ns
    # Never earlier than what is stored: ages would be negative, positions by time wrong.
    return max(log.read_end(tx.cursor()).time_ns, time.time_ns()) - files.ticks_ns()


def keep_clock(tx: Tx, clock_offset_ns: int) -> None:
    """Store the clock of this boot."""
    write_header(tx,
                 read_header(tx)._replace(boot_id=files.boot_id(), clock_offset_ns=clock_offset_ns))


def skip_numbers(tx: Tx, count: int, next_number: int = 0, generation: int = 0) -> None:
    """
    Skip numbers, so that none is used a second time.

    :param next_number: the first one that was not used, as far as is known
    :param generation: the last one that was used, as far as is known
    """
    log_end = log.read_end(tx.cursor())
    log.put_placeholder(
        tx.cursor(),
        log_end._replace(next_number=max(log_end.next_number, next_number) + count,
                         generation=max(log_end.generation, generation) + 1 & 0xffffffff))


# Settings


def read_settings(tx: Tx) -> config.Queue:
    """Read the settings that are stored in the queue."""
    found = bytes(tx.txn.get(fmt.SETTINGS_KEY, b"{}", db=tx.db.meta))
    return msgspec.json.decode(found, type=dict[str, config.Queue])["queue"]


def write_settings(tx: Tx, queue: config.Queue) -> None:
    """Store the settings of a queue."""
    stored = {"queue": msgspec.structs.replace(queue, path=None, subscribers=())}
    tx.txn.put(fmt.SETTINGS_KEY, msgspec.json.encode(stored), db=tx.db.meta)


def differences(here: config.Queue, there: config.Queue) -> Mapping[str, tuple[object, object]]:
    """Compare settings: of each key that differs, the value of both."""
    found, other = _flatten(here), _flatten(there)
    return {key: (value, other[key]) for key, value in found.items() if value != other[key]}


def _flatten(queue: config.Queue) -> dict[str, object]:
    """List the settings that are stored, those of the mark after the others."""
    found = msgspec.to_builtins(msgspec.structs.replace(queue, path=None, subscribers=()))
    mark = found.pop("high-water-mark")
    return {**found, **{f"high-water-mark.{key}": value for key, value in mark.items()}}


@functools.cache
def warn_of_differences(directory: str, differing: str) -> None:
    """Warn that a queue has other settings than the configuration, once in a process."""
    _LOGGER.warning(
        "The queue %s has other settings than the configuration: %s. It works with the stored "
        "ones; 'persipubsub init' stores those of the configuration.", directory, differing)
